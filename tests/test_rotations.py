"""Rotations of residual streams and of rotary attention: all that hold are found, exact, carried and searched."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import params_of, relative
from torch import Tensor, nn
from torch.func import functional_call

import teleport_lite as tl
from teleport_lite.functional import loss_of, value_and_grad
from teleport_lite.groups import PairRotations, SpecialOrthogonal
from teleport_lite.symmetries.rotations import GainedRotation

WORDS = 7


class Rms(nn.Module):
    """A norm by hand: over the whole axis or over `groups` of it, with a gain or none, of the form g or 1 + g."""

    def __init__(self, d: int, gain: bool = True, groups: int = 1, one: float = 0.0) -> None:
        super().__init__()
        self.weight, self.groups, self.one = nn.Parameter(torch.ones(d) - one) if gain else None, groups, one

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(-1, (self.groups, -1))
        x = (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)).flatten(-2)
        if self.weight is None:
            return x
        return x * (self.one + self.weight) if self.one else self.weight * x


class Unit(nn.Module):
    """Vectors of length one."""

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1)


def rotary(x: Tensor, layout: str, turning: int) -> Tensor:
    """Rotary positions on the first entries of [batch, heads, length, width], in one of two layouts."""
    angle = torch.arange(x.shape[-2])[:, None] / 10 ** (torch.arange(turning // 2) / turning)
    cos, sin = angle.cos().to(x), angle.sin().to(x)
    x, rest = x[..., :turning], x[..., turning:]
    dim = -2 if layout == "halves" else -1
    a, b = x.unflatten(-1, (2, -1) if layout == "halves" else (-1, 2)).unbind(dim)
    return torch.cat([torch.stack([a * cos - b * sin, a * sin + b * cos], dim).flatten(-2), rest], -1)


class Decoder(nn.Module):
    """A pre-norm language model, or one with norms behind the sums."""

    def __init__(
        self, norm, d=6, heads=1, kv=1, width=4, layout="", turning=4, bias=False, tied=False, post=False, layers=1
    ) -> None:
        super().__init__()
        self.heads, self.kv, self.width, self.layout, self.turning, self.post = heads, kv, width, layout, turning, post
        self.embed, self.head = nn.Embedding(WORDS, d), nn.Linear(d, WORDS, bias=bias)
        self.place = nn.Parameter(torch.randn(9, d)) if not layout else None
        self.blocks = nn.ModuleList()
        for _ in range(layers):
            sizes = {"q": (d, heads * width), "k": (d, kv * width), "v": (d, kv * width), "o": (heads * width, d)}
            sizes |= {"up": (d, 5), "down": (5, d)}
            block = nn.ModuleDict({name: nn.Linear(*size, bias=bias) for name, size in sizes.items()})
            block.update({"one": norm(d), "two": norm(d)})
            self.blocks.append(block)
        self.norm = norm(d)
        if tied:
            self.head.weight = self.embed.weight

    def attend(self, block: nn.ModuleDict, x: Tensor) -> Tensor:
        q, k, v = (block[name](x).unflatten(-1, (-1, self.width)).transpose(1, 2) for name in "qkv")
        if self.layout:
            q, k = (rotary(t, self.layout, self.turning) for t in (q, k))
        k, v = (t.repeat_interleave(self.heads // self.kv, 1) for t in (k, v))
        return block["o"](F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        if self.place is not None:
            x = x + self.place[: tokens.shape[1]]
        for block in self.blocks:
            if self.post:
                x = block["one"](x + self.attend(block, x))
                x = block["two"](x + block["down"](F.gelu(block["up"](x))))
            else:
                x = x + self.attend(block, block["one"](x))
                x = x + block["down"](F.gelu(block["up"](block["two"](x))))
        return self.head(self.norm(x))


def plain(d: int) -> nn.Module:
    return Rms(d, gain=False)


def so(n: int) -> int:
    return n * (n - 1) // 2


MODELS = {  # how it is made, and the dimension of its rotations
    "llama": (lambda: Decoder(Rms, layers=2, layout="halves"), so(6) + 2 * 2),
    "llama, fused": (lambda: Decoder(nn.RMSNorm, layout="halves"), so(6) + 2),
    "pairs": (lambda: Decoder(Rms, layout="pairs"), so(6) + 2),
    "no gains": (lambda: Decoder(plain, layout="pairs"), so(6) + 2),
    "no gains, tied": (lambda: Decoder(plain, layout="halves", tied=True), so(6) + 2),
    "gains, tied": (lambda: Decoder(Rms, layout="halves", tied=True), 2),
    "grouped queries, halves": (lambda: Decoder(Rms, heads=4, kv=2, layout="halves"), so(6) + 2 * 2),
    "grouped queries, pairs": (lambda: Decoder(Rms, heads=4, kv=2, layout="pairs", bias=True), so(6) + 2 * 2),
    "partial, halves": (lambda: Decoder(Rms, kv=2, heads=2, width=6, layout="halves"), so(6) + 2 * 2),
    "partial, pairs": (lambda: Decoder(Rms, kv=2, heads=2, width=6, layout="pairs"), so(6) + 2 * 2),
    "unit vectors": (lambda: Decoder(lambda d: Unit(), layout="halves"), so(6) + 2),
    "gains of the form 1 + w": (lambda: Decoder(lambda d: Rms(d, one=1.0), layout="halves"), so(6) + 2),
    "two groups": (lambda: Decoder(lambda d: Rms(d, groups=2)), 2 * so(3)),
    "GPT": (lambda: Decoder(nn.LayerNorm, bias=True, layers=2), so(5)),
    "LayerNorm without shift": (lambda: Decoder(lambda d: nn.LayerNorm(d, bias=False)), so(5)),
    "LayerNorm without gain": (lambda: Decoder(lambda d: nn.LayerNorm(d, elementwise_affine=False)), so(5)),
    "GPT, tied": (lambda: Decoder(nn.LayerNorm, tied=True), 0),
    "post-norm": (lambda: Decoder(nn.LayerNorm, bias=True, post=True), 0),
    "wide": (lambda: Decoder(Rms, d=20), so(20)),
}


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, WORDS, shape, generator=torch.Generator().manual_seed(seed))


def perturbed(name: str) -> nn.Module:
    """A model in float64, off its initial values."""
    torch.manual_seed(0)
    model = MODELS[name][0]().double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model


def rotations_of(model: nn.Module) -> tl.Product:
    return tl.find_symmetries(model, tokens(2, 5)).select(kind="rotation")


@pytest.mark.parametrize("name", MODELS)
def test_what_holds_is_found_and_exact(name, generator):
    model, dim = perturbed(name), MODELS[name][1]
    symmetry, params = rotations_of(model), params_of(model)
    assert symmetry.dim == dim, symmetry
    assert tl.Product.from_dict(symmetry.to_dict()) == symmetry
    inputs = tokens(3, 8, seed=1)
    before = functional_call(model, params, (inputs,)).detach()
    for _ in range(100 if dim else 0):
        xi = symmetry.sample(params, radius=0.5, generator=generator)
        moved = symmetry.act(params, xi)
        assert relative(functional_call(model, moved, (inputs,)), before) < 1e-11
    if dim:
        assert relative(moved["embed.weight"], params["embed.weight"]) > 1e-2 or symmetry.dim < 6
        back = symmetry.act(moved, symmetry.inverse(xi))
        assert max(relative(back[n], p) for n, p in params.items()) < 1e-12
        loss = loss_of(model, lambda net: net(inputs).square().mean() + net(inputs).sin().mean())
        carried = symmetry.transport(value_and_grad(loss, params)[1], xi, params)
        expected = value_and_grad(loss, moved)[1]
        size = max(float(g.abs().max()) for g in expected.values())
        assert max(float((carried[n] - g).abs().max()) for n, g in expected.items()) < 1e-11 * size
