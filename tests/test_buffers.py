"""Permutations and signs that move buffers along: running statistics, codebooks, constants of one's own."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import largest_gap, params_of, relative
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import teleport_lite as tl
from teleport_lite.errors import TeleportError, UnknownNameError
from teleport_lite.functional import Params
from teleport_lite.groups import Permutation, PositiveScaling, Signs
from teleport_lite.runtime import named_tensors
from teleport_lite.symmetries.axes import Leg, NeuronSymmetry

ELEMENTS = 20


class Block(nn.Module):
    """Of a ResNet, with a projection where the width changes."""

    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.one, self.norm1 = nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o)
        self.two, self.norm2 = nn.Conv2d(o, o, 3, 1, 1, bias=False), nn.BatchNorm2d(o)
        self.down = nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False), nn.BatchNorm2d(o))
        self.down = self.down if stride > 1 else nn.Identity()

    def forward(self, x):
        return F.relu(self.norm2(self.two(F.relu(self.norm1(self.one(x))))) + self.down(x))


class Inverted(nn.Module):
    """Of a MobileNet: wider, depthwise, narrower."""

    def __init__(self, n: int, wide: int) -> None:
        super().__init__()
        self.up, self.norm1 = nn.Conv2d(n, wide, 1, bias=False), nn.BatchNorm2d(wide)
        self.depth, self.norm2 = nn.Conv2d(wide, wide, 3, 1, 1, groups=wide, bias=False), nn.BatchNorm2d(wide)
        self.down, self.norm3 = nn.Conv2d(wide, n, 1, bias=False), nn.BatchNorm2d(n)

    def forward(self, x):
        return x + self.norm3(self.down(F.relu6(self.norm2(self.depth(F.relu6(self.norm1(self.up(x))))))))


class Dense(nn.Module):
    """Of a DenseNet: what comes in goes on beside what is new."""

    def __init__(self, i: int, new: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(i), nn.Conv2d(i, new, 3, 1, 1, bias=False)

    def forward(self, x):
        return torch.cat([x, self.conv(F.relu(self.norm(x)))], 1)


class Own(nn.Module):
    """A constant for each channel, in a buffer."""

    def __init__(self, values: torch.Tensor, apply=torch.mul, persistent: bool = True) -> None:
        super().__init__()
        self.one, self.two, self.apply_ = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 2, 3), apply
        self.register_buffer("values", values, persistent)

    def forward(self, x):
        return self.two(torch.tanh(self.apply_(self.one(x), self.values))).mean((2, 3))


class Whitened(nn.Module):
    """A norm written by hand, whose statistics are replaced by new tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 6), nn.Linear(6, 3)
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("square", torch.ones(6))

    def forward(self, x):
        x = self.one(x)
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
            self.square = torch.lerp(self.square, x.detach().square().mean(0), 0.1)
        return self.two(F.gelu((x - self.mean) / (self.square + 1e-3).sqrt()))


class Codebook(nn.Module):
    """The nearest code, straight through; codes follow moving averages of what they stand for."""

    def __init__(self, codes: int = 7, d: int = 5) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(4, d), nn.Linear(d, 3)
        self.register_buffer("codes", torch.randn(codes, d))
        self.register_buffer("sums", self.codes.clone())
        self.register_buffer("counts", torch.ones(codes))

    def forward(self, x):
        z = self.encoder(x)
        nearest = (self.codes.square().sum(-1) - 2 * z @ self.codes.T).argmin(-1)
        hits = F.one_hot(nearest, len(self.codes)).to(z)
        code = hits @ self.codes
        if self.training:
            with torch.no_grad():
                self.counts.mul_(0.9).add_(hits.sum(0), alpha=0.1)
                self.sums.mul_(0.9).add_(hits.T @ z, alpha=0.1)
                self.codes.copy_(self.sums / self.counts[:, None])
        return self.decoder(z + (code - z).detach())


def sequence(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers)


def head(n: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(n, 3)]


def conv_norm(norm: nn.Module, activation: nn.Module | None = None) -> nn.Sequential:
    return sequence(nn.Conv2d(3, 6, 3), norm, activation or nn.ReLU(), nn.Conv2d(6, 5, 3), nn.ReLU(), *head(5))


def conv(n: int, norm: nn.Module) -> list[nn.Module]:
    return [nn.Conv2d(3, n, 3), norm, nn.ReLU()]


IMAGE = (3, 9, 9)
MODELS = {  # shape of an input, the finite groups that move buffers, and the model
    "mlp": ((4,), "{1,-1}^6 S(6)", lambda: sequence(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))),
    "dropout": (
        (4,),
        "{1,-1}^6 S(6)",
        lambda: sequence(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.3), nn.Linear(6, 3)),
    ),
    "conv": (IMAGE, "{1,-1}^6 S(6)", lambda: conv_norm(nn.BatchNorm2d(6))),
    "silu": (IMAGE, "{1,-1}^6 S(6)", lambda: conv_norm(nn.BatchNorm2d(6), nn.SiLU())),
    "no gain": (IMAGE, "S(6)", lambda: conv_norm(nn.BatchNorm2d(6, affine=False))),
    "no gain, odd": (IMAGE, "{1,-1}^6 S(6)", lambda: conv_norm(nn.BatchNorm2d(6, affine=False), nn.Tanh())),
    "cumulative": (IMAGE, "{1,-1}^6 S(6)", lambda: conv_norm(nn.BatchNorm2d(6, momentum=None))),
    "sync": (IMAGE, "{1,-1}^6 S(6)", lambda: conv_norm(nn.SyncBatchNorm(6))),
    "instance": (
        IMAGE,
        "{1,-1}^6 S(6)",
        lambda: conv_norm(nn.InstanceNorm2d(6, affine=True, track_running_stats=True)),
    ),
    "instance, no gain": (IMAGE, "S(6)", lambda: conv_norm(nn.InstanceNorm2d(6, track_running_stats=True))),
    "norm first": (IMAGE, "{1,-1}^6 S(6)", lambda: sequence(nn.BatchNorm2d(3), *conv_norm(nn.BatchNorm2d(6)))),
    "resnet": (
        IMAGE,
        "{1,-1}^4 S(4) {1,-1}^4 S(4) {1,-1}^4 {1,-1}^6 S(6) {1,-1}^6 S(6) {1,-1}^6",
        lambda: sequence(*conv(4, nn.BatchNorm2d(4)), Block(4, 4, 1), Block(4, 6, 2), *head(6)),
    ),
    "mobilenet": (
        IMAGE,
        "{1,-1}^4 S(4)" + 2 * " {1,-1}^8 S(8) {1,-1}^8 {1,-1}^4",
        lambda: sequence(*conv(4, nn.BatchNorm2d(4)), Inverted(4, 8), Inverted(4, 8), *head(4)),
    ),
    "densenet": (
        IMAGE,
        "{1,-1}^4 S(4)" + 2 * " {1,-1}^3 S(3)",
        lambda: sequence(nn.Conv2d(3, 4, 3), Dense(4, 3), Dense(7, 3), nn.BatchNorm2d(10), nn.ReLU(), *head(10)),
    ),
    "transposed": (
        IMAGE,
        "{1,-1}^4 S(4) {1,-1}^6 S(6)",
        lambda: sequence(
            *conv(4, nn.BatchNorm2d(4)), nn.ConvTranspose2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), *head(6)
        ),
    ),
    "flattened": (
        IMAGE,
        "{1,-1}^4 S(4) {1,-1}^6 S(6)",
        lambda: sequence(
            *conv(4, nn.BatchNorm2d(4)), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
            nn.Linear(16, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2),
        ),
    ),
    "weight norm": (
        (4,),
        "{1,-1}^6 S(6)",
        lambda: sequence(weight_norm(nn.Linear(4, 6)), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)),
    ),
    "spectral norm": (
        (4,),
        "S(6)",
        lambda: sequence(spectral_norm(nn.Linear(4, 6)), nn.Tanh(), spectral_norm(nn.Linear(6, 3))),
    ),
    "scale": (IMAGE, "{1,-1}^6 S(6) {1,-1}^6", lambda: Own(torch.rand(6, 1, 1) + 0.5)),
    "offset": (IMAGE, "{1,-1}^6 S(6)", lambda: Own(torch.randn(1, 6, 1, 1), torch.add)),
    "by hand": ((4,), "S(6)", Whitened),
    "codebook": ((4,), "{1,-1}^5 S(5)", Codebook),
}  # fmt: skip


def trained(name: str, steps: int = 3) -> tuple[nn.Module, tuple[int, ...]]:
    """A model with statistics that are not those of the start."""
    shape, _, build = MODELS[name]
    torch.manual_seed(0)
    model = build().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for k in range(steps):
        step(model, optimizer, inputs(shape, 12, seed=100 + k))
    return model.eval(), shape


def inputs(shape: tuple[int, ...], rows: int, *, larger: int = 0, seed: int = 0) -> torch.Tensor:
    shape = (shape[0], *(n + larger for n in shape[1:]))
    return torch.randn(rows, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> None:
    """One of training; dropout draws the same each time, for all."""
    model.train()
    torch.manual_seed(1)
    optimizer.zero_grad()
    (model(x) - 1).square().mean().backward()
    optimizer.step()


def put(model: nn.Module, tensors: Params) -> nn.Module:
    """A copy of the model with other parameters and buffers."""
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for name, t in named_tensors(copied).items():
            t.copy_(tensors[name])
    return copied


def all_of(model: nn.Module) -> Params:
    return {name: t.detach().clone() for name, t in named_tensors(model).items()}


def with_buffers(symmetry: tl.Product) -> tl.Product:
    return tl.Product([f for f in symmetry if f.buffers])


@pytest.mark.parametrize("name", MODELS)
def test_outputs_statistics_and_training_correspond(name, generator):
    """On fresh inputs of other sizes, in both modes; what a step of training changes is moved, too."""
    model, shape = trained(name)
    symmetry = with_buffers(tl.find_symmetries(model, inputs(shape, 5)))
    assert " ".join(str(f.group) for f in symmetry) == MODELS[name][1]
    for k in range(ELEMENTS):
        xi = symmetry.sample(all_of(model), generator=generator)
        moved = put(model, symmetry.act(all_of(model), xi))
        assert any(not torch.equal(moved.get_buffer(n), model.get_buffer(n)) for n in symmetry.buffers)
        x = inputs(shape, 3 + k, larger=0 if name == "flattened" else k % 3, seed=k)
        assert relative(moved(x), model(x)) < 1e-11
        twin = copy.deepcopy(model)
        if name != "dropout":  # which draws by the place of a neuron
            assert relative(moved.train()(x), twin.train()(x)) < 1e-11
            for net in (twin, moved):
                step(net, torch.optim.SGD(net.parameters(), lr=0.1), x)
        expected = symmetry.act(all_of(twin), xi)
        assert largest_gap(all_of(moved), expected) < 1e-11
        assert relative(moved.eval()(x), twin.eval()(x)) < 1e-11


class Placed(nn.Module):
    """A weight for each place in time, or one that is read in another way."""

    def __init__(self, how: str) -> None:
        super().__init__()
        double = {"dtype": torch.float64}
        self.how, self.one, self.two = how, nn.Linear(4, 6, **double), nn.Linear(6, 2, **double)
        values = torch.rand(6, **double) + 0.5
        values = {"mask": values > 1, "mask of numbers": (values > 1).double()}.get(how, values)
        self.register_buffer("values", values, how != "not saved")
        if how == "shared":
            self.register_buffer("again", self.values[:3])

    def forward(self, x):
        x = torch.tanh(self.one(x))
        if self.how == "places":
            x = x * self.values[:, None]
        elif self.how == "first":
            x = x * self.values + self.values[0]
        elif self.how == "running sums":
            x = x * self.values.cumsum(0)
        elif self.how == "sorted":
            x = x * self.values.sort().values
        else:
            x = x * self.values
        return self.two(x)


PINNED = {  # how a buffer is read, the shape of an input, and what is permuted
    "places": ((6, 4), "S(6)"),
    "first": ((4,), "S(5)"),  # all but the first, and the buffer with them
    "running sums": ((4,), ""),
    "sorted": ((4,), ""),
    "mask": ((4,), "S(2)"),  # where it is on; the others are not exercised
    "mask of numbers": ((4,), "S(2)"),
    "not saved": ((4,), ""),
    "shared": ((4,), ""),
}


@pytest.mark.parametrize("how", PINNED)
def test_buffers_that_cannot_move_stay(how, generator):
    shape, permuted = PINNED[how]
    torch.manual_seed(0)
    model = Placed(how)
    x = torch.randn(5, *shape, generator=generator, dtype=torch.float64)
    symmetry = tl.find_symmetries(model, x)
    assert symmetry.buffers == (("values",) if how == "first" else ())
    assert " ".join(str(f.group) for f in symmetry.select(kind="permutation")) == permuted
    moved = symmetry.act(all_of(model), symmetry.sample(all_of(model), generator=generator))
    assert relative(put(model, moved)(x), model(x)) < 1e-11


def test_without_buffers_the_public_pattern_is_the_identity(generator):
    model, shape = trained("conv")
    x, params = inputs(shape, 5), params_of(model)
    symmetry = tl.find_symmetries(model, x)
    xi = symmetry.sample(params, generator=generator, radius=0.5)
    moved = symmetry.act(params, xi)
    assert moved.keys() == params.keys()
    assert any(not torch.equal(moved[n], params[n]) for n in params)
    assert relative(put(model, all_of(model) | moved)(x), model(x)) < 1e-11
    assert all(torch.equal(p, params[n]) for n, p in symmetry.act(params, symmetry.zeros(params)).items())
    xi = symmetry.sample(all_of(model), generator=generator)
    with pytest.raises(TeleportError, match="named_buffers") as caught:
        symmetry.act(params, xi)
    assert "1.running_mean" in str(caught.value)
    point = dict(model.named_parameters()) | dict(model.named_buffers())
    assert relative(put(model, symmetry.act(point, xi))(x), model(x)) < 1e-11


def test_inverse_and_saved_symmetry(generator):
    model, shape = trained("resnet")
    symmetry = with_buffers(tl.find_symmetries(model, inputs(shape, 5)))
    assert tl.Product.from_dict(symmetry.to_dict()) == symmetry
    assert len(symmetry.select(name="*.norm1.running_var")) == 2
    xi = symmetry.sample(all_of(model), generator=generator)
    back = symmetry.act(symmetry.act(all_of(model), xi), symmetry.inverse(xi))
    assert all(torch.equal(t, back[n]) for n, t in all_of(model).items())


def test_a_moved_model_is_saved_and_loaded(generator, tmp_path):
    model, shape = trained("mobilenet")
    x, symmetry = inputs(shape, 5), tl.find_symmetries(model, inputs(shape, 5))
    moved = put(model, symmetry.act(all_of(model), symmetry.sample(all_of(model), generator=generator)))
    torch.save(moved.state_dict(), tmp_path / "moved.pt")
    loaded = MODELS["mobilenet"][2]().double().eval()
    loaded.load_state_dict(torch.load(tmp_path / "moved.pt"))
    assert torch.equal(loaded(x), moved(x)) and relative(loaded(x), model(x)) < 1e-11


@pytest.mark.parametrize("name", ["resnet", "scale", "codebook"])
def test_continuous_factors_are_those_without_buffers(name, monkeypatch):
    """And teleports along them are the same, bit for bit."""
    model, shape = trained(name)
    x = inputs(shape, 5)
    found = tl.find_symmetries(model, x)
    monkeypatch.setattr("teleport_lite.discovery.probe._movable_buffers", lambda _: set())
    pinned = tl.find_symmetries(model, x)
    assert not pinned.buffers and found.buffers
    assert found.continuous == pinned.continuous and not found.continuous.buffers
    if found.dim:
        twin = copy.deepcopy(model)
        reports = [tl.teleport(m, lambda net: net(x).square().mean(), s) for m, s in ((model, found), (twin, pinned))]
        assert all(r.accepted for r in reports)
        assert all(torch.equal(a, b) for a, b in zip(all_of(model).values(), all_of(twin).values(), strict=True))


@pytest.mark.parametrize("training", [False, True])
def test_a_random_teleport_moves_buffers(training, generator):
    model, shape = trained("conv")
    x = inputs(shape, 8)
    symmetry = with_buffers(tl.find_symmetries(model, x))
    model.train(training)
    before, kept = model(x).detach(), all_of(model)
    report = tl.teleport(model, lambda net: net(x).square().mean(), symmetry, search="random", generator=generator)
    assert report.accepted
    expected = symmetry.act(kept, report.xi)
    assert all(torch.equal(t, expected[n]) for n, t in all_of(model).items())
    assert not torch.equal(model.get_buffer("1.running_mean"), kept["1.running_mean"])
    assert relative(model(x), before) < 1e-11


def test_a_false_one_is_refused_bit_for_bit(generator):
    """A permutation that forgets the variance."""
    model, shape = trained("conv")
    x, kept = inputs(shape, 8), all_of(model)
    right = with_buffers(tl.find_symmetries(model, x)).select(kind="permutation")[0]
    false = NeuronSymmetry(right.group, [leg for leg in right.legs if leg.name != "1.running_var"])
    report = tl.teleport(model, lambda net: net(x).square().mean(), false, search="random", generator=generator)
    assert not report.accepted and "moved" in report.reason
    assert all(torch.equal(t, kept[n]) for n, t in all_of(model).items())


OBJECTIVES = ("gradient_norm", "weight_norm", "one_step_loss", "sharpness")


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_objectives_are_evaluated_with_moved_buffers(objective, generator):
    """Permutations and signs change no objective; with old buffers the loss would be another."""
    model, shape = trained("mlp")
    x = inputs(shape, 8)
    symmetry = with_buffers(tl.find_symmetries(model, x))
    goal = tl.objectives.sharpness(radii=[1e-6], directions=3) if objective == "sharpness" else objective
    report = tl.teleport(
        model, lambda net: net(x).square().mean(), symmetry, goal, search="random", generator=generator
    )
    change = abs(report.objective_after - report.objective_before) / abs(report.objective_before)
    assert report.accepted and change < (1e-4 if objective == "sharpness" else 1e-11)


def test_an_optimizer_goes_on_as_before(generator):
    """A random element through Teleporter, with the state of Adam, then a step of training."""
    model, shape = trained("conv")
    x = inputs(shape, 8)
    symmetry = with_buffers(tl.find_symmetries(model, x))
    twin = copy.deepcopy(model)
    adams = [torch.optim.Adam(net.parameters(), lr=1e-2) for net in (model, twin)]
    for net, adam in zip((model, twin), adams, strict=True):
        step(net, adam, x)
    teleporter = tl.Teleporter(
        model, adams[0], symmetry, objective=lambda p: p["0.weight"][0].norm(), search="random",
        generator=generator.manual_seed(1),
    )  # fmt: skip
    report = teleporter.step(lambda net: net(x).square().mean())
    assert report is not None and report.accepted
    for net, adam in zip((model, twin), adams, strict=True):
        step(net, adam, x)
    expected = symmetry.act(all_of(twin), report.xi)
    assert largest_gap(all_of(model), expected) < 1e-11


def test_what_is_refused():
    legs = [Leg("a", 0), Leg("b", 0, buffer=True)]
    for group, own in ((PositiveScaling(2), legs), (Permutation(2), legs[1:])):
        with pytest.raises(TeleportError, match="finite groups"):
            NeuronSymmetry(group, own)
    model = sequence(nn.Linear(2, 2), nn.Linear(2, 1))
    symmetry = NeuronSymmetry(Signs(2), [Leg("0.bias", 0), Leg("1.running_mean", 0, buffer=True)])
    with pytest.raises(UnknownNameError, match="buffer"):
        tl.teleport(
            model, lambda net: net(torch.ones(1, 2)).sum(), symmetry, search="random", generator=torch.Generator()
        )
