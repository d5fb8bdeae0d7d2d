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
from teleport_lite.errors import ShapeError, TeleportError
from teleport_lite.functional import loss_of, value_and_grad
from teleport_lite.optim.state_rules import move
from teleport_lite.symmetries import Leg, ModulePermutation


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


class Mixture(nn.Module):
    """Experts in a list, and a router: all of them weighed, the best two, or rows sent to each."""

    def __init__(self, way: str, count: int = 3, told: bool = False, tables: bool = False) -> None:
        super().__init__()
        self.way, self.told = way, told
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 5), nn.LeakyReLU(), nn.Linear(5, 4)) for _ in range(count)
        )
        self.router = None if tables else nn.Linear(4, count)
        self.gate = nn.Parameter(torch.randn(4, count)) if tables else None
        if self.router is not None:
            self.router.register_buffer("open", torch.ones(count))
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        gate = (x @ self.gate if self.router is None else self.router(x) * self.router.open).softmax(-1)
        best, which = gate.topk(2, -1)
        if self.way == "masks":
            gate = gate * torch.zeros_like(gate).scatter(-1, which, 1.0)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            size = 1.0 + (self.told and i == 0)
            if self.way == "rows":
                row, slot = torch.where(which == i)
                out = out.index_add(0, row, size * best[row, slot, None] * expert(x[row]))
            else:
                out = out + size * gate[:, i : i + 1] * expert(x)
        return self.out(torch.tanh(x + out))


def image(n: int) -> Tensor:
    return torch.randn(n, 4, *[n + 3] * 2, dtype=torch.float64)


def line(n: int) -> Tensor:
    return torch.randn(n, 4, n + 3, dtype=torch.float64)


def words(n: int) -> Tensor:
    return torch.randn(n, n + 2, 5, dtype=torch.float64)


def rows(n: int) -> Tensor:
    return torch.randn(20 * n, 4, dtype=torch.float64)


WAYS = ("weighed", "masks", "rows")
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
    **{f"experts, {way}": (lambda way=way: Mixture(way), rows, {"S(3)": 1, "S(5)": 3}) for way in WAYS},
    "experts, a table": (lambda: Mixture("masks", tables=True), rows, {"S(3)": 1, "S(5)": 3}),
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


@pytest.mark.parametrize("way", WAYS)
def test_an_expert_that_the_code_tells_apart_stays_and_so_do_frozen_ones(way):
    def found(model: Mixture) -> list[ModulePermutation]:
        return [f for f in tl.find_symmetries(model.double(), rows(3)) if isinstance(f, ModulePermutation)]

    torch.manual_seed(0)
    assert len(found(Mixture(way))) == 1 and not found(Mixture(way, told=True))
    model = Mixture(way)
    model.experts[1].requires_grad_(False)
    assert not found(model)


def test_layers_one_behind_another_are_not_exchanged():
    torch.manual_seed(0)
    layers = nn.Sequential(
        *[nn.Linear(4, 4, dtype=torch.float64) for _ in range(3)], nn.ReLU(), nn.Linear(4, 3).double()
    )
    assert not [f for f in tl.find_symmetries(layers, rows(1)) if isinstance(f, ModulePermutation)]


def test_a_teleporter_moves_experts_beside_scalings():
    model, found = made("experts, masks")
    optimizer, x = torch.optim.Adam(model.parameters(), 1e-3), rows(3)
    teleporter = tl.Teleporter(model, optimizer, found, every=1, radius=0.2)

    def loss_fn(net: nn.Module) -> Tensor:
        return net(x).square().mean()

    for _ in range(2):
        optimizer.zero_grad()
        loss_fn(model).backward()
        optimizer.step()
        report = teleporter.step(loss_fn)
        assert report.accepted and report.invariance_error < 1e-11


def test_what_is_wrong_with_modules_is_told():
    with pytest.raises(TeleportError, match="equally many names"):
        ModulePermutation([Leg("router", 0)], [("a.0", "a.1"), ("b.0",)])
    two = ModulePermutation([Leg("router", 0)], [("a.0", "a.1")])
    with pytest.raises(ShapeError, match="a.1"):
        two.check({"router": torch.ones(2), "a.0": torch.ones(2), "a.1": torch.ones(3)})
