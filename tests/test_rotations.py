"""Rotations of residual streams and of rotary attention: all that hold are found, exact, carried and searched."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import params_of, relative
from torch import Tensor, nn
from torch.func import functional_call

import teleport_lite as tl
from teleport_lite.errors import ShapeError, TeleportError
from teleport_lite.functional import loss_of, value_and_grad
from teleport_lite.groups import PairRotations, SpecialOrthogonal
from teleport_lite.optim.state_rules import move
from teleport_lite.symmetries import Leg
from teleport_lite.symmetries.base import Symmetry
from teleport_lite.symmetries.gained import GainedSymmetry

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
    """Rotary positions on the first entries of [batch, heads, length, width], in a layout, or as complex numbers."""
    angle = torch.arange(x.shape[-2])[:, None] / 10 ** (torch.arange(turning // 2) / turning)
    cos, sin = angle.cos().to(x), angle.sin().to(x)
    x, rest = x[..., :turning], x[..., turning:]
    if layout == "complex":
        turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.complex(cos, sin)
        return torch.cat([torch.view_as_real(turned).flatten(-2), rest], -1)
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
    "complex numbers": (lambda: Decoder(Rms, heads=4, kv=2, layout="complex"), so(6) + 2 * 2),
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


@pytest.mark.parametrize("entry", [torch.clone, torch.square, torch.abs])
@pytest.mark.parametrize("dual", [True, False])
def test_matrices_of_the_action_against_the_dense_ones(entry, dual, generator):
    model = Decoder(nn.LayerNorm, d=4, width=2, bias=True).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype))
    (rotation,), params = rotations_of(model), params_of(model)
    xi = rotation.sample(params, generator=generator)
    tensors = {n: torch.rand(p.shape, generator=generator, dtype=p.dtype) for n, p in params.items()}
    found = rotation.spread(tensors, xi, entry, dual=dual, params=params)
    dense = Symmetry.spread(rotation, tensors, xi, entry, dual=dual, params=params)
    for n in params:
        assert torch.allclose(found[n], dense[n], rtol=1e-11, atol=1e-12), n
    with pytest.raises(TeleportError, match="the params to be moved"):
        rotation.spread(tensors, xi, entry, dual=dual)


@pytest.mark.parametrize("name", ["llama", "no gains, tied", "GPT"])
def test_velocity_and_jet_are_derivatives(name, generator):
    model = perturbed(name)
    symmetry, params = rotations_of(model), params_of(model)
    xi = symmetry.sample(params, generator=generator)
    for factor, x in zip(symmetry, xi, strict=True):
        first, second = factor.jet(params, x)
        plus, minus = (factor.act(params, t * x) for t in (1e-4, -1e-4))
        for n in factor.names:
            assert torch.allclose((plus[n] - minus[n]) / 2e-4, first[n], atol=1e-6)
            assert torch.allclose((plus[n] - 2 * params[n] + minus[n]) / 1e-8, second[n], atol=1e-5)
    both = symmetry.jet(params, xi)
    plus, minus = (symmetry.act(params, tuple(t * x for x in xi)) for t in (1e-4, -1e-4))
    for n in symmetry.names:
        assert torch.allclose((plus[n] - minus[n]) / 2e-4, both[0][n], atol=1e-6)
        assert torch.allclose((plus[n] - 2 * params[n] + minus[n]) / 1e-8, both[1][n], atol=1e-5)


def loss_fn(net) -> Tensor:
    return F.cross_entropy(net(tokens(4, 6, seed=3)).flatten(0, 1), tokens(4, 6, seed=4).flatten())


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss_fn(model).backward()
        optimizer.step()


def test_momentum_follows_exactly(generator):
    """Gradient descent commutes with rotations that no gain stands in the way of."""
    model = perturbed("no gains, tied")
    symmetry = rotations_of(model)
    xi = symmetry.sample(params_of(model), generator=generator)
    twin = copy.deepcopy(model)
    for net, moves in ((model, True), (twin, False)):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
        train(net, optimizer, 4)
        if moves:
            move(net, symmetry, xi, [optimizer])
        train(net, optimizer, 4)
    there = symmetry.act(params_of(twin), xi)
    assert max(relative(p, there[n]) for n, p in params_of(model).items()) < 1e-11


@pytest.mark.parametrize("name", ["llama", "no gains", "GPT"])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.Adadelta])
def test_optimizer_state_follows(name, kind, generator):
    """At a point where nothing moves, the state is what the gradients at the new point would have left."""
    model, twin = perturbed(name), perturbed(name)
    symmetry = rotations_of(model)
    xi = symmetry.sample(params_of(model), generator=generator)
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    one, other = (kind(net.parameters(), lr=0.0, **options) for net in (model, twin))
    train(model, one, 3)
    move(model, symmetry, xi, [one])
    move(twin, symmetry, xi)
    train(twin, other, 3)
    gradients = {"momentum_buffer", "exp_avg"}
    checked = 0
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        for entry in gradients & one.state[p].keys():
            assert torch.allclose(one.state[p][entry], other.state[q][entry], rtol=1e-9, atol=1e-13)
            checked += 1
        for entry in {"exp_avg_sq", "square_avg"} & one.state[p].keys():
            assert bool((one.state[p][entry] >= 0).all()) and bool(one.state[p][entry].isfinite().all())
    assert checked or kind is torch.optim.Adadelta


def test_a_teleport_by_rotations_alone():
    model = perturbed("llama")
    symmetry, before = rotations_of(model), loss_fn(model).item()
    report = tl.teleport(model, loss_fn, symmetry, radius=0.5)
    assert report.accepted and report.objective_after > 1.05 * report.objective_before
    assert abs(loss_fn(model).item() - before) < 1e-12 * before
    flat = perturbed("no gains")  # there the norm of the gradient is the same everywhere
    report = tl.teleport(flat, loss_fn, rotations_of(flat), radius=0.5)
    assert not report.accepted and report.reason.startswith("nothing larger")


def test_rotations_stay_in_a_search_that_has_a_closed_form(generator):
    model = perturbed("llama")
    symmetry = tl.find_symmetries(model, tokens(2, 5))
    report = tl.teleport(model, loss_fn, symmetry)
    assert report.accepted and not len(report.symmetry.select(kind="rotation"))
    assert tl.teleport(model, loss_fn, symmetry, search="random", radius=0.1, generator=generator).accepted


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_teleporter(kind):
    model = perturbed("llama")
    optimizer = kind(model.parameters(), lr=1e-3, **({"momentum": 0.9} if kind is torch.optim.SGD else {}))
    teleporter = tl.Teleporter(model, optimizer, rotations_of(model), every=1, radius=0.2)
    for _ in range(2):
        train(model, optimizer, 1)
        assert teleporter.step(loss_fn).accepted
        train(model, optimizer, 1)


def test_a_gain_of_zero_is_refused(generator):
    model = perturbed("llama")
    symmetry = rotations_of(model)
    with torch.no_grad():
        model.norm.weight[2] = 0.0
    before = copy.deepcopy(model.state_dict())
    report = tl.teleport(model, loss_fn, symmetry, search="random", generator=generator)
    assert not report.accepted and "not finite" in report.reason
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_other_types(dtype, generator):
    model = perturbed("llama")
    symmetry, wide = rotations_of(model), params_of(model)
    params = {n: p.to(dtype) for n, p in wide.items()}
    xi = symmetry.sample(params, generator=generator)
    assert all(x.dtype == torch.float32 for x in xi)
    moved = symmetry.act(params, xi)
    exact = symmetry.act({n: p.double() for n, p in params.items()}, [x.double() for x in xi])
    for n, p in moved.items():
        assert p.dtype == dtype and relative(p.double(), exact[n]) < 4 * torch.finfo(dtype).eps


def test_what_is_wrong_is_told():
    rotation = GainedSymmetry(SpecialOrthogonal(3), [Leg("w", 1, dual=True)], [Leg("g", 0)])
    with pytest.raises(ShapeError, match="g"):
        rotation.check({"w": torch.ones(2, 3), "g": torch.ones(2)})
    with pytest.raises(TeleportError, match="even"):
        PairRotations(3)


def test_gains_of_the_form_one_plus_w_are_scaled_affinely():
    class Plus(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain, self.first, self.second = nn.Parameter(torch.randn(4)), nn.Linear(5, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(F.normalize(self.first(x), dim=-1) * (1 + self.gain))

    torch.manual_seed(0)
    model, x, y = Plus().double(), torch.randn(9, 5, dtype=torch.float64), torch.randn(9, 3, dtype=torch.float64)
    symmetry = tl.find_symmetries(model, x).select(kind="scaling", name="gain")
    assert symmetry.dim == 4
    params = params_of(model)
    xi = symmetry.sample(params, radius=0.5, generator=torch.Generator().manual_seed(1))

    def loss(w):
        return (functional_call(model, w, (x,)) - y).square().mean()

    moved = symmetry.act(params, xi)
    assert torch.allclose(1 + moved["gain"], xi[0].exp() * (1 + params["gain"]), rtol=1e-14)
    assert abs(float(loss(moved) - loss(params))) < 1e-14
    carried, real = symmetry.transport(torch.func.grad(loss)(params), xi), torch.func.grad(loss)(moved)
    assert all(torch.allclose(carried[n], real[n], rtol=1e-10, atol=1e-13) for n in params)
    back = symmetry.act(moved, symmetry.inverse(xi))
    assert all(torch.allclose(back[n], params[n], rtol=1e-13, atol=1e-14) for n in params)
    step = 1e-6
    ahead, behind = (symmetry.act(params, tuple(s * x for x in xi)) for s in (step, -step))
    speed = symmetry.velocity(params, xi)
    assert all(torch.allclose((ahead[n] - behind[n]) / (2 * step), speed[n], atol=1e-8) for n in symmetry.names)
    assert tl.Product.from_dict(symmetry.to_dict()) == symmetry
    for objective in ("gradient_norm", "weight_norm"):
        report = tl.teleport(model, lambda net: (net(x) - y).square().mean(), symmetry, objective=objective)
        assert report.accepted and report.objective_after != report.objective_before
