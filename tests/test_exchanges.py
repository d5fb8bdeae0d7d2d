"""What is exchanged as a whole: channels inside of groups, attention heads, experts: exact, carried, and no more."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from conftest import params_of, relative
from torch import Tensor, nn
from torch.func import functional_call

import teleport_lite as tl
from teleport_lite.functional import loss_of, value_and_grad
from teleport_lite.optim.state_rules import move


def layers(transposed: bool, n: int, activation: type[nn.Module]) -> nn.Sequential:
    """Grouped convolutions, the second one with two channels in each of its three groups."""
    conv = getattr(nn, f"ConvTranspose{n}d" if transposed else f"Conv{n}d")
    return nn.Sequential(
        conv(4, 6, 3, padding=1), activation(), conv(6, 12, 3, groups=3, padding=1), activation(),
        getattr(nn, f"Conv{n}d")(12, 2, 1),
    )  # fmt: skip


class Generator(nn.Module):
    """The decoder of a small generative model."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(3, 8 * 4)
        self.up = nn.Sequential(
            nn.BatchNorm2d(8), nn.LeakyReLU(), nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2),
            nn.BatchNorm2d(6), nn.LeakyReLU(), nn.ConvTranspose2d(6, 6, 2, stride=2, groups=6),
            nn.LeakyReLU(), nn.ConvTranspose2d(6, 1, 3, padding=1),
        )  # fmt: skip

    def forward(self, z: Tensor) -> Tensor:
        return self.up(self.into(z).unflatten(1, (8, 2, 2)))


class Heads(nn.Module):
    """Attention whose positions turn the first entries of each head, or weigh heads by slopes."""

    def __init__(
        self,
        heads: int,
        kv: int,
        layout: str,
        turning: int = 4,
        width: int = 6,
        fused: bool = False,
        slopes: bool = False,
    ) -> None:
        super().__init__()
        self.heads, self.kv, self.layout, self.turning, self.width = heads, kv, layout, turning, width
        self.fused, self.slopes = fused, slopes
        self.into, self.out = nn.Linear(5, (heads + 2 * kv) * width), nn.Linear(heads * width, 3)

    def turned(self, x: Tensor) -> Tensor:
        """x, [batch, heads, length, width], with its first entries turned in pairs."""
        x, rest = x[..., : self.turning], x[..., self.turning :]
        angle = torch.arange(x.shape[-2])[:, None] / 10 ** (torch.arange(self.turning // 2) / self.turning)
        cos, sin = angle.cos().to(x), angle.sin().to(x)
        dim = -2 if self.layout == "halves" else -1
        a, b = x.unflatten(-1, (2, -1) if self.layout == "halves" else (-1, 2)).unbind(dim)
        return torch.cat([torch.stack([a * cos - b * sin, a * sin + b * cos], dim).flatten(-2), rest], -1)

    def forward(self, x: Tensor) -> Tensor:
        if self.fused:  # queries, keys and values of one head after another, as in GPT-NeoX
            q, k, v = self.into(x).unflatten(-1, (self.heads, -1)).transpose(1, 2).chunk(3, -1)
        else:
            sizes = [n * self.width for n in (self.heads, self.kv, self.kv)]
            parts = self.into(x).split(sizes, -1)
            q, k, v = (t.unflatten(-1, (-1, self.width)).transpose(1, 2) for t in parts)
        q, k = self.turned(q), self.turned(k)
        k, v = (t.repeat_interleave(self.heads // self.kv, 1) for t in (k, v))
        scores = q @ k.mT / self.width**0.5
        if self.slopes:
            place = torch.arange(x.shape[1])
            away = (place[:, None] - place).abs() * 2.0 ** -torch.arange(self.heads)[:, None, None]
            scores = scores - away.to(x)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def image(n: int) -> Tensor:
    return torch.randn(n, 4, *[n + 3] * 2, dtype=torch.float64)


def line(n: int) -> Tensor:
    return torch.randn(n, 4, n + 3, dtype=torch.float64)


def words(n: int) -> Tensor:
    return torch.randn(n, n + 2, 5, dtype=torch.float64)


IN_GROUPS = {"S(2)": 3, "S(4)": 3, "(R>0)^6": 1, "(R>0)^12": 1}
MODELS = {  # how it is made, its inputs, and how often each group has to be among what is found
    "transposed": (lambda: layers(True, 2, nn.LeakyReLU), image, IN_GROUPS),
    "transposed, 1d": (lambda: layers(True, 1, nn.LeakyReLU), line, IN_GROUPS),
    "transposed, odd": (lambda: layers(True, 1, nn.Tanh), line, {"S(2)": 3, "S(4)": 3, "{1,-1}^6": 1, "{1,-1}^12": 1}),
    "transposed, linear": (lambda: layers(True, 2, nn.Identity), image, {"GL(2)^3": 1, "GL(4)^3": 1}),
    "not transposed": (lambda: layers(False, 2, nn.LeakyReLU), image, IN_GROUPS),
    "generator": (
        Generator, lambda n: torch.randn(n, 3, dtype=torch.float64),
        {"S(4)": 2, "S(3)": 2, "{1,-1}^8": 1, "{1,-1}^6": 1, "(R>0)^8": 1, "(R>0)^6": 2},
    ),
    "heads, halves": (lambda: Heads(3, 3, "halves"), words, {"S(3)": 1}),
    "heads, pairs": (lambda: Heads(3, 3, "pairs"), words, {"S(3)": 1}),
    "heads, one in a block of its own": (lambda: Heads(3, 3, "halves", fused=True), words, {"S(3)": 1}),
    "heads, all turned in pairs": (lambda: Heads(3, 3, "pairs", turning=6), words, {"S(3)": 1}),
    "grouped queries": (lambda: Heads(6, 2, "halves"), words, {"S(2)": 1, "S(3)": 2}),
    "grouped queries, pairs": (lambda: Heads(4, 2, "pairs"), words, {"S(2)": 3}),
    "grouped queries, all turned": (lambda: Heads(6, 3, "halves", turning=6), words, {"S(3)": 1, "S(2)": 3}),
    "one key for all queries": (lambda: Heads(3, 1, "halves"), words, {"S(3)": 1}),
}  # fmt: skip


def made(name: str) -> tuple[nn.Module, tl.Product]:
    """A model in float64, off its initial values, and what is found."""
    torch.manual_seed(0)
    model = MODELS[name][0]().double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model.eval(), tl.find_symmetries(model, MODELS[name][1](5))


@pytest.mark.parametrize("name", MODELS)
def test_what_is_exchanged_is_found_exact_and_invertible(name, generator):
    model, found = made(name)
    _, inputs, groups = MODELS[name]
    count = Counter(repr(f.group) for f in found)
    assert {k: count[k] for k in groups} == groups, found
    assert tl.Product.from_dict(found.to_dict()) == found
    state = params_of(model) | {n: b for n, b in model.named_buffers() if b.is_floating_point()}
    for k in range(100):
        x = inputs(2 + k % 6)
        xi = found.sample(state, radius=0.5, generator=generator)
        moved = found.act(state, xi)
        assert relative(functional_call(model, moved, (x,)), functional_call(model, state, (x,))) < 1e-11
        back = found.act(moved, found.inverse(xi))
        assert max(relative(back[n], state[n]) for n in state) < 1e-11
    loss = loss_of(model, lambda net: net(x).square().mean() + net(x).sin().mean())
    carried = found.transport(value_and_grad(loss, params_of(model))[1], xi)
    for n, b in model.named_buffers():
        b.copy_(moved.get(n, b))
    there = value_and_grad(loss, {n: moved[n] for n in params_of(model)})[1]
    size = max(float(g.abs().max()) for g in there.values())
    assert max(float((carried[n] - g).abs().max()) for n, g in there.items()) < 1e-10 * size


@pytest.mark.parametrize("name", MODELS)
def test_the_state_of_an_optimizer_moves_along_exactly(name, generator):
    """At rate zero the state is what the gradients at the new point would have left."""
    model, found = made(name)
    monomial = [f for f in found if f.monomial]
    found = tl.Product(monomial or [*found])
    x, twin = MODELS[name][1](4), copy.deepcopy(model)
    xi = found.sample(dict(model.named_parameters()) | dict(model.named_buffers()), generator=generator)
    one, other = (torch.optim.Adam(net.parameters(), lr=0.0) for net in (model, twin))

    def train(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for _ in range(2):
            optimizer.zero_grad()
            (net(x).square().mean() + net(x).sin().mean()).backward()
            optimizer.step()

    train(model, one)
    move(model, found, xi, [one])
    move(twin, found, xi)
    train(twin, other)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        for entry in ("exp_avg", "exp_avg_sq") if monomial else ("exp_avg",):
            assert torch.allclose(one.state[p][entry], other.state[q][entry], rtol=1e-9, atol=1e-15), entry


def test_channels_that_a_constant_tells_apart_stay():
    class Told(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv1d(4, 6, 3), nn.ConvTranspose1d(6, 4, 3, groups=2)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(torch.tanh(self.one(x) + torch.tensor([0.0, 0, 1, 1, 1, 0]).to(x)[:, None]))

    found = tl.find_symmetries(Told().double(), line(3))
    assert [repr(f.group) for f in found if not f.dim] == ["S(2)", "S(2)"]


@pytest.mark.parametrize("kv", [2, 4])
def test_heads_that_slopes_tell_apart_stay(kv):
    torch.manual_seed(0)
    found = tl.find_symmetries(Heads(4, kv, "halves", slopes=True).double(), words(3))
    assert found.dim and not [f for f in found if f.group.kind == "permutation"]
    torch.manual_seed(0)
    found = tl.find_symmetries(Heads(4, kv, "halves").double(), words(3))
    assert [f for f in found if f.group.kind == "permutation"]
