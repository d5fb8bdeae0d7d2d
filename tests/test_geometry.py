"""Sharpness against a loop; curvature against circles, differences and closed forms; the Hessian against its matrix."""

from __future__ import annotations

import copy
import itertools
import subprocess
import sys
import weakref

import pytest
import torch
from conftest import Once, hidden_product, mlp, params_of
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import teleport_lite as tl
from teleport_lite import geometry, objectives
from teleport_lite.errors import LossError, TeleportError
from teleport_lite.functional import loss_of, norm, value_and_grad
from teleport_lite.geometry.curves import is_chain, product_jets, scaling_kappas
from teleport_lite.groups import GeneralLinear, PositiveScaling
from teleport_lite.problem import Problem
from teleport_lite.symmetries import TestFunction, mixing, scaling
from teleport_lite.symmetries.axes import Leg, NeuronSymmetry

DOUBLE = torch.float64


class Twice(nn.Module):
    """A weight used twice, once in a product that is no linear layer, and a parameter that is added."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(5, 5, dtype=DOUBLE)), nn.Parameter(torch.randn(5, dtype=DOUBLE))

    def forward(self, x):
        return F.linear(F.linear(x, self.w, None).tanh(), self.w, self.b) + x @ self.w.mT * self.b


def conv():
    layers = [nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 3, bias=False), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(8, 2)).double().eval()


MODELS = {
    "mlp": (lambda: mlp([5, 7, 6, 2], nn.LeakyReLU(0.1)), (9, 5)),
    "no biases": (lambda: mlp([5, 7, 2], nn.Tanh(), bias=False), (9, 5)),
    "convolutions": (conv, (4, 1, 6, 6)),
    "shared weights": (Twice, (9, 5)),
}


@pytest.fixture(params=MODELS)
def setting(request, generator):
    make, shape = MODELS[request.param]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make()
    x = torch.randn(shape, generator=generator, dtype=DOUBLE)
    return model, lambda net: net(x).square().mean().log1p(), x


# --- sharpness --------------------------------------------------------------------------------------------------------


def test_all_losses_around_are_those_of_a_loop(setting, generator):
    model, loss_fn, _ = setting
    loss, params, radii = loss_of(model, loss_fn), params_of(model), torch.tensor([0.1, 0.7, 2.0], dtype=DOUBLE)
    around = geometry.unit_directions(params, 4, generator=generator)
    found = geometry.losses_around(loss, params, around, radii)
    assert found.shape == (4, 3)
    for (i, d), (j, t) in itertools.product(enumerate(range(4)), enumerate(radii)):
        alone = loss({name: p + t * around[name][d] for name, p in params.items()})
        assert abs(float(found[i, j] - alone)) <= 1e-12 * abs(float(alone))


@pytest.mark.parametrize("labels", ["of a batch", "of a sequence", "probabilities"])
@pytest.mark.parametrize(
    "options",
    [{}, {"reduction": "sum"}, {"reduction": "none"}, {"ignore_index": 1, "label_smoothing": 0.2}, {"weight": True}],
    ids=lambda options: " ".join(options) or "plain",
)
def test_cross_entropies_around_and_their_gradients_are_those_of_a_loop(labels, options, generator):
    if labels == "probabilities" and "ignore_index" in options:
        options = {"label_smoothing": 0.2}
    if "weight" in options:
        options = {"weight": torch.tensor([0.5, 1.0, 3.0, 2.0], dtype=DOUBLE)}
    shape = (9, 3, 5) if labels == "of a sequence" else (9, 5)
    x, y = torch.randn(shape, generator=generator, dtype=DOUBLE), torch.randint(4, shape[:-1], generator=generator)
    if labels == "probabilities":
        y = torch.rand(9, 4, generator=generator, dtype=DOUBLE)
    model = mlp([5, 7, 4], nn.LeakyReLU(0.1))

    def loss_fn(net):
        out = F.cross_entropy(net(x).movedim(-1, 1), y, **options)
        assert out.shape == (shape[:-1] if options.get("reduction") == "none" else ())
        return (out * torch.arange(1.0, 1 + out.numel(), dtype=DOUBLE).reshape(out.shape)).sum()

    loss, radii = loss_of(model, loss_fn), torch.tensor([0.1, 2.0], dtype=DOUBLE)
    points = {name: p.clone().requires_grad_() for name, p in params_of(model).items()}
    around = geometry.unit_directions(params_of(model), 3, generator=generator)
    found = geometry.losses_around(loss, points, around, radii)
    alone = torch.stack(
        [torch.stack([loss({n: p + t * around[n][d] for n, p in points.items()}) for t in radii]) for d in range(3)]
    )
    assert torch.allclose(found, alone, rtol=1e-12)
    grads = [torch.autograd.grad(values.sum(), [*points.values()]) for values in (found, alone)]
    assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-13) for a, b in zip(*grads, strict=True))


def test_the_sharpness_is_the_mean_over_radii_that_share_directions():
    model, x, y = mlp([6, 5, 4, 3], nn.LeakyReLU(0.1)), torch.randn(8, 6, dtype=DOUBLE), torch.arange(8) % 3
    params, radii = params_of(model), [0.1 * k for k in range(1, 10)]
    around = geometry.unit_directions(params, 100, generator=torch.Generator().manual_seed(1))
    losses = [
        F.cross_entropy(functional_call(model, {n: p + t * around[n][d] for n, p in params.items()}, x), y)
        for d, t in itertools.product(range(100), radii)
    ]
    phi = tl.sharpness(
        model,
        lambda net: F.cross_entropy(net(x), y),
        radii=radii,
        directions=100,
        generator=torch.Generator().manual_seed(1),
    )
    assert float(phi) == pytest.approx(float(torch.stack(losses).mean()), rel=1e-12)


def test_the_sharpness_of_a_quadratic_is_known(generator):
    scales = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=DOUBLE)
    point = nn.Linear(4, 1, bias=False, dtype=DOUBLE)

    def loss_fn(net):
        return 0.5 * (net(torch.eye(4, dtype=DOUBLE)).flatten() * scales).square().sum()

    phi = tl.sharpness(point, loss_fn, radii=(0.5, 1.5), directions=40000, generator=generator)
    expected = loss_fn(point).detach() + 0.5 * (0.5**2 + 1.5**2) / 2 * scales.square().sum() / 4
    assert float(phi) == pytest.approx(float(expected), rel=0.02)


def test_chunks_change_memory_only(setting, generator):
    model, loss_fn, _ = setting
    loss, params = loss_of(model, loss_fn), params_of(model)
    around = geometry.unit_directions(params, 7, generator=generator)
    found = []
    for size in (None, 7, 3, 1):
        points = {name: p.clone().requires_grad_() for name, p in params.items()}
        phi = geometry.mean_loss_around(loss, points, around, (0.3, 1.0), chunk_size=size)
        found.append((phi.detach(), torch.autograd.grad(phi, [*points.values()])))
    for phi, grads in found[1:]:
        assert torch.allclose(phi, found[0][0], rtol=1e-12)
        assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-14) for a, b in zip(grads, found[0][1], strict=True))


class Peak(TorchDispatchMode):
    """The most bytes that live tensors hold together, of those that are made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.known, self.live, self.most = weakref.WeakSet(), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.known.update(t.untyped_storage() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor))
        out = func(*args, **(kwargs or {}))
        for storage in [t.untyped_storage() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]:
            if storage not in self.known:
                self.known.add(storage)
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes())
        return out

    def _add(self, size: int) -> None:
        self.live += size
        self.most = max(self.most, self.live)


class Recurrent(nn.Module):
    def __init__(self, kind) -> None:
        super().__init__()
        self.cell, self.head = kind(5, 4, num_layers=2, batch_first=True), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.cell(x)[0])


class Odd(nn.Module):
    """A network whose `middle` is no plain operation."""

    def __init__(self, middle) -> None:
        super().__init__()
        self.first, self.scale, self.last = nn.Linear(5, 4), nn.Parameter(torch.rand(4)), nn.Linear(4, 2)
        self.middle = middle

    def forward(self, x):
        return self.last(self.middle(self.first(x), self.scale).tanh())


class Straight(torch.autograd.Function):
    """Reads its arguments past every torch function."""

    @staticmethod
    def forward(ctx, x, scale):
        return (x * scale).sign()

    @staticmethod
    def backward(ctx, grad):
        return grad, grad


class Batchable(Straight):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, scale):
        return (x * scale).sign()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass


def assign(x, scale):
    x = x * scale
    x[x < 0] = 0.0
    return x


def attend(x, scale):
    return F.scaled_dot_product_attention(x * scale, x, x)


ODD = {
    "LSTM": lambda: Recurrent(nn.LSTM),
    "GRU": lambda: Recurrent(nn.GRU),
    "RNN": lambda: Recurrent(nn.RNN),
    "batch norm in training": lambda: nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)),
    "item": lambda: Odd(lambda x, scale: x * scale / x.abs().max().item()),
    "branch": lambda: Odd(lambda x, scale: x * scale if x.sum() > 0 else -x),
    "boolean assignment": lambda: Odd(assign),
    "attention": lambda: Odd(attend),
    "numpy": lambda: Odd(lambda x, scale: x * scale + torch.from_numpy(x.detach().numpy())),
    "custom function": lambda: Odd(Straight.apply),
    "custom function under vmap": lambda: Odd(Batchable.apply),
    "unique": lambda: Odd(lambda x, scale: x * scale + len(torch.unique(x.sign()))),
}


@pytest.mark.parametrize("name", ODD)
def test_the_sharpness_of_models_that_vmap_cannot_run_is_that_of_a_loop(name, generator):
    torch.manual_seed(0)
    model = ODD[name]().double()
    x = torch.randn(6, 5, generator=generator, dtype=DOUBLE)
    x = x[None].expand(2, 6, 5) if isinstance(model, Recurrent) else x
    params, radii, before = params_of(model), (0.5, 2.0), {n: b.clone() for n, b in model.state_dict().items()}
    around = geometry.unit_directions(params, 4, generator=torch.Generator().manual_seed(3))
    buffers = dict(model.named_buffers())
    alone = [
        functional_call(
            model, {n: b.clone() for n, b in buffers.items()} | {n: p + t * around[n][k] for n, p in params.items()}, x
        )
        .square()
        .mean()
        for k, t in itertools.product(range(4), radii)
    ]
    options = {"radii": radii, "directions": 4, "chunk_size": None}
    for options["chunk_size"] in (None, 3, 1):
        seeded = torch.Generator().manual_seed(3)
        found = tl.sharpness(model, lambda net: net(x).square().mean(), generator=seeded, **options)
        assert float(found) == pytest.approx(float(torch.stack(alone).mean()), rel=1e-12)
    assert all(torch.equal(before[n], b) for n, b in model.state_dict().items())


@pytest.mark.parametrize("name", ["LSTM", "branch", "batch norm in training"])
def test_the_sharpness_of_such_models_is_differentiable(name, generator):
    torch.manual_seed(0)
    model = ODD[name]().double()
    x = torch.randn(2, 6, 5, generator=generator, dtype=DOUBLE)
    loss = loss_of(model, lambda net: net(x if isinstance(model, Recurrent) else x[0]).square().mean())
    points = {n: p.requires_grad_() for n, p in params_of(model).items()}
    around = geometry.unit_directions(params_of(model), 4, generator=generator)
    for size in (None, 3, 1):
        phi = geometry.mean_loss_around(loss, points, around, (0.3, 1.0), chunk_size=size)
        alone = torch.stack(
            [loss({n: p + t * around[n][k] for n, p in points.items()}) for k in range(4) for t in (0.3, 1.0)]
        )
        grads = [torch.autograd.grad(value, [*points.values()]) for value in (phi, alone.mean())]
        assert float(phi.detach()) == pytest.approx(float(alone.detach().mean()), rel=1e-12)
        assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-14) for a, b in zip(*grads, strict=True))


OBJECTIVES_OF_LOSSES = {
    "one_step_loss": objectives.one_step_loss(0.3),
    "sharpness": objectives.sharpness((0.5, 1.0), 3),
    "sharpness in chunks": objectives.sharpness((0.5, 1.0), 4, chunk_size=2),
    "sharpness one by one": objectives.sharpness((0.5, 1.0), 4, chunk_size=1),
    "hessian_trace": objectives.hessian_trace(2),
    "gradient_norm": objectives.as_objective("gradient_norm"),
}


@pytest.mark.parametrize("kind", ["exact", "mini-batch"])
@pytest.mark.parametrize("name", OBJECTIVES_OF_LOSSES)
def test_objectives_of_checkpointed_models_are_those_of_plain_ones(name, kind, generator):
    """A checkpointed layer runs again when an objective is differentiated, which evaluates the loss at many points."""

    class Net(nn.Module):
        def __init__(self, around):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.c, self.around = nn.Linear(5, 8), nn.Linear(8, 6), nn.Linear(6, 3), around
            self.act = nn.ReLU() if kind == "exact" else nn.Tanh()

        def last(self, h):
            return self.c(h.sin() if kind == "mini-batch" else h.relu())

        def forward(self, x):
            return self.around(self.last, self.b(self.act(self.a(x))))

    x, y = (torch.randn(6, n, generator=generator, dtype=DOUBLE) for n in (5, 3))
    found = []
    for around in (lambda f, h: f(h), lambda f, h: checkpoint(f, h, use_reentrant=False)):
        model = Net(around).double()
        symmetry = tl.minibatch_symmetries(model, x) if kind == "mini-batch" else tl.find_symmetries(model, x)
        report = tl.teleport(
            model, lambda net: F.mse_loss(net(x), y), symmetry, objective=OBJECTIVES_OF_LOSSES[name], radius=0.3
        )
        assert report.accepted, report.reason
        found.append((report.objective_before, report.objective_after))
    assert found[0] == pytest.approx(found[1], rel=1e-9)


@pytest.mark.parametrize("order", [1, 2])
def test_evaluations_of_checkpointed_models_may_be_differentiated_together(order, generator):
    """Each has its own parameters when its layers run again."""

    class Net(nn.Module):
        def __init__(self, on):
            super().__init__()
            self.a, self.b, self.on = nn.Linear(5, 4), nn.Linear(4, 3), on

        def last(self, h):
            return self.b(h.sin())

        def forward(self, x):
            return checkpoint(self.last, self.a(x), use_reentrant=False) if self.on else self.last(self.a(x))

    torch.manual_seed(0)
    model, x, found = Net(True).double(), torch.randn(6, 5, generator=generator, dtype=DOUBLE), []
    for model.on in (False, True):
        points = {n: p.requires_grad_() for n, p in params_of(model).items()}
        with loss_of(model, lambda net: net(x).square().mean()) as loss:
            first = loss(points) if order == 1 else norm(value_and_grad(loss, points, create_graph=True)[1])
            second = loss({n: 2 * p for n, p in points.items()})
            found.append(torch.autograd.grad(first + second, [*points.values()]))
    assert all(torch.allclose(a, b, rtol=1e-10) for a, b in zip(*found, strict=True))


def test_one_by_one_and_all_at_once_agree(setting, generator):
    model, loss_fn, _ = setting
    loss, params, radii = loss_of(model, loss_fn), params_of(model), (0.3, 1.0)
    assert not geometry.goes_one_by_one(loss, params, radii)
    around = geometry.Directions(params, 5, generator=generator)
    one, all_at_once = (
        geometry.mean_loss_around(loss, params, around, radii, one_by_one=flag, chunk_size=2) for flag in (True, False)
    )
    assert float(one) == pytest.approx(float(all_at_once), rel=1e-12)


def test_a_loss_that_draws_its_own_random_numbers_is_refused():
    model, own = mlp([5, 4, 2], nn.Tanh()), torch.Generator().manual_seed(0)
    for noise in (lambda: torch.rand((), generator=own), iter(range(9**9)).__next__):
        for size in (None, 1):
            with pytest.raises(LossError, match="deterministic"):
                tl.sharpness(model, lambda net, f=noise: net(torch.ones(1, 5).double()).sum() * f(), chunk_size=size)


def test_an_error_of_the_loss_is_its_own():
    with pytest.raises(ZeroDivisionError):
        tl.sharpness(mlp([5, 2], nn.Tanh()), lambda net: 1 / 0)


@pytest.mark.parametrize("differentiate", [False, True])
def test_the_peak_of_memory_follows_the_chunk_size(differentiate, generator):
    model = mlp([20, 16, 10, 10], nn.LeakyReLU(0.1), bias=False)
    x, y = torch.randn(50, 20, generator=generator, dtype=DOUBLE), torch.arange(50) % 10
    loss = loss_of(model, lambda net: F.cross_entropy(net(x), y))
    params = {name: p.clone().requires_grad_(differentiate) for name, p in params_of(model).items()}
    around, radii = (
        geometry.unit_directions(params_of(model), 100, generator=generator),
        [0.1 * k for k in range(1, 10)],
    )
    if differentiate and geometry.goes_one_by_one(loss, params, radii, 100, slopes=True):
        pytest.skip("in torch 2.4 vmap does not run inside of a checkpoint")
    peaks, values = {}, {}
    for size in (None, 100, 50, 10):
        with Peak() as peak, torch.set_grad_enabled(differentiate):
            phi = geometry.mean_loss_around(loss, params, around, radii, chunk_size=size)
            if differentiate:
                torch.autograd.grad(phi, [*params.values()])
        peaks[size], values[size] = peak.most, phi.detach()
    assert peaks[100] > 100 * 9 * 50 * 16 * 8  # the first hidden layer at all points
    assert peaks[None] == pytest.approx(peaks[100], rel=0.01)
    assert peaks[50] == pytest.approx(peaks[100] / 2, rel=0.1)
    assert peaks[10] == pytest.approx(peaks[100] / 10, rel=0.2)
    assert all(torch.allclose(phi, values[None], rtol=1e-12) for phi in values.values())


@pytest.mark.parametrize("size", [1, 4, None])
def test_measures_hold_no_more_than_a_chunk(size, generator):
    """Beside the parameters: directions, moved points and activations of a chunk; 2 copies when one by one."""
    model, x = mlp([64, 64, 64, 64], nn.Tanh(), bias=False), torch.randn(2, 64, generator=generator, dtype=DOUBLE)
    copy = sum(p.nbytes for p in model.parameters())
    with Peak() as peak:
        tl.sharpness(
            model,
            lambda net: net(x).square().mean(),
            radii=(0.1, 0.2, 0.3),
            directions=40,
            generator=generator,
            chunk_size=size,
        )
    copies = peak.most / copy
    assert copies < 2.2 if size == 1 else 0.9 * (size or 40) < copies < 2.2 * (size or 40)


def test_the_trace_holds_one_probe_at_a_time(generator):
    model, x = mlp([64, 64, 64, 64], nn.Tanh(), bias=False), torch.randn(2, 64, generator=generator, dtype=DOUBLE)
    peaks = []
    for samples in (1, 40):
        with Peak() as peak:
            tl.hessian_trace(model, lambda net: net(x).square().mean(), samples=samples, generator=generator)
        peaks.append(peak.most)
    assert peaks[1] < peaks[0] + 1.1 * sum(p.nbytes for p in model.parameters())


def test_directions_do_not_depend_on_chunks_and_may_be_drawn_again():
    params = {"a": torch.zeros(3, 4, dtype=DOUBLE), "b": torch.zeros(5)}
    around = geometry.Directions(params, 10, generator=torch.Generator().manual_seed(7))
    every = geometry.unit_directions(params, 10, generator=torch.Generator().manual_seed(7))
    assert every["a"].dtype == DOUBLE and every["b"].dtype == torch.float32 and every["a"].shape == (10, 3, 4)
    for part in (slice(0, 10), slice(4, 5), slice(7, 12), slice(2, 5)):
        assert all(torch.equal(around[part][name], every[name][part]) for name in params)
    assert torch.allclose(
        (every["a"].flatten(1) @ every["a"].flatten(1).T)[0, 1:].abs().max(), torch.tensor(0.0).double(), atol=0.999
    )


def test_directions_are_isotropic_and_seeded():
    params = {"a": torch.zeros(3, 4), "b": torch.zeros(5)}
    first, again = (
        geometry.unit_directions(params, 20000, generator=torch.Generator().manual_seed(7)) for _ in range(2)
    )
    assert all(torch.equal(first[name], again[name]) for name in params)
    flat = torch.cat([d.flatten(1) for d in first.values()], 1)
    assert torch.allclose(flat.norm(dim=1), torch.ones(20000), atol=1e-5)
    assert flat.mean(0).abs().max() < 0.01
    assert (flat.T @ flat / 20000 * 17 - torch.eye(17)).abs().max() < 0.06


@pytest.mark.parametrize(
    "wrong",
    [
        *({"radii": []}, {"radii": 0.1}, {"directions": 0}, {"directions": 2.5}),
        *({"chunk_size": 0}, {"chunk_size": 1.5}, {"generator": 0}),
    ],
    ids=str,
)
def test_sharpness_refuses(wrong):
    model = nn.Linear(2, 1)
    with pytest.raises(TeleportError):
        tl.sharpness(model, lambda net: net(torch.ones(1, 2)).sum(), **{"radii": [0.1], **wrong})


def test_sharpness_leaves_the_model_alone(setting, generator):
    model, loss_fn, _ = setting
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    tl.sharpness(model, loss_fn, radii=[0.1], directions=3, generator=generator)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


# --- curvature --------------------------------------------------------------------------------------------------------


def test_kappa_of_circles_and_parabolas():
    for radius in (0.1, 1.0, 30.0):
        angle = torch.tensor(0.7, dtype=DOUBLE)
        first = {"w": radius * torch.stack([-angle.sin(), angle.cos()])}
        second = {"w": -radius * torch.stack([angle.cos(), angle.sin()])}
        assert float(geometry.kappa(first, second)) == pytest.approx(1 / radius, rel=1e-12)
    for k in (0.2, 5.0):  # y = k x^2 at x: kappa = 2k / (1 + 4 k^2 x^2)^(3/2), whatever the speed
        for x, speed in ((0.0, 1.0), (0.4, 3.0)):
            first = {"w": speed * torch.tensor([1.0, 2 * k * x], dtype=DOUBLE)}
            second = {"w": speed**2 * torch.tensor([0.0, 2 * k], dtype=DOUBLE)}
            expected = 2 * k / (1 + 4 * k**2 * x**2) ** 1.5
            assert float(geometry.kappa(first, second)) == pytest.approx(expected, rel=1e-12)


def finite_differences(symmetry, params, xi, h=1e-3):
    """First and second derivative of t -> exp(t xi).w by central differences of the fourth order."""
    scale = (lambda t: tuple(t * x for x in xi)) if isinstance(xi, tuple) else (lambda t: t * xi)
    b, a, c, d = (symmetry.act(params, scale(k * h)) for k in (-2, -1, 1, 2))
    first = {n: (b[n] - 8 * a[n] + 8 * c[n] - d[n]) / (12 * h) for n in symmetry.names}
    second = {n: (-b[n] + 16 * a[n] - 30 * params[n] + 16 * c[n] - d[n]) / (12 * h**2) for n in symmetry.names}
    return first, second


def minibatch(kind, activation, x, **options):
    model = mlp([6, 8, 3], activation)
    return model, tl.minibatch_symmetries(model, x, compensate=kind, **options)[0]


def minibatches(kinds, activation, samples, bias=True):
    """Mixings of consecutive layers, on few samples or on more than neurons."""
    model = mlp([6, 8, 7, 5, 3], activation, bias=bias)
    x = torch.randn(samples, 6, generator=torch.Generator().manual_seed(4), dtype=DOUBLE)
    of_kind = {kind: tl.minibatch_symmetries(model, x, compensate=kind) for kind in set(kinds)}
    return model, tl.Product([of_kind[kind][k] for k, kind in enumerate(kinds)])


X = 0.3 * torch.randn(5, 6, generator=torch.Generator().manual_seed(3), dtype=DOUBLE)
SMOOTH = [nn.LeakyReLU(0.1), nn.Tanh(), nn.Sigmoid()]
CURVES = {
    "scaling": lambda: (mlp([6, 8, 3], nn.ReLU()), scaling(8, "0.weight", "2.weight", bias="0.bias")),
    "mixing": lambda: (mlp([6, 8, 3], nn.Identity()), mixing(8, "0.weight", "2.weight", bias="0.bias")),
    "scalings": lambda: (m := mlp([6, 8, 7, 3], nn.ReLU()), hidden_product(scaling, m)),
    "mixings": lambda: (m := mlp([6, 5, 4, 3], nn.Identity()), hidden_product(mixing, m)),
    **{
        f"{kind} {type(act).__name__}": lambda kind=kind, act=act: minibatch(kind, act, X)
        for kind in ("outgoing", "incoming")
        for act in SMOOTH
    },
    "chain, few samples": lambda: minibatches(["outgoing"] * 3, nn.Tanh(), 4),
    "chain, many samples": lambda: minibatches(["outgoing"] * 3, nn.GELU(), 30),
    "chain, incoming": lambda: minibatches(["incoming"] * 3, nn.Tanh(), 4),
    "chain, incoming, many": lambda: minibatches(["incoming"] * 2, nn.LeakyReLU(0.1), 30, bias=False),
    "chain, both ways": lambda: minibatches(["incoming", "outgoing", "incoming"], nn.LeakyReLU(0.1), 12),
    "no chain": lambda: (m := minibatches(["outgoing"] * 3, nn.Tanh(), 4), (m[0], tl.Product([m[1][0], m[1][2]])))[1],
}


@pytest.mark.parametrize("name", CURVES)
def test_jets_agree_with_differentiation_and_with_differences(name, generator):
    model, symmetry = CURVES[name]()
    params = params_of(model)
    xi = symmetry.sample(params, radius=0.3, generator=generator)
    first, second = symmetry.jet(params, xi)
    kinds = [finite_differences(symmetry, params, xi)]
    symmetry.homogeneous, homogeneous = False, symmetry.homogeneous
    if homogeneous:  # compare with what the base class does without closed forms
        kinds.append(tl.Symmetry.jet(symmetry, params, xi))
    if is_chain(tl.Product([symmetry])):
        kinds.append(product_jets(tl.Product([symmetry]), params, xi if isinstance(xi, tuple) else (xi,)))
    for one, two in kinds:
        expected = float(geometry.kappa(one, two))
        assert float(geometry.kappa(first, second)) == pytest.approx(expected, rel=1e-6)
        for n in symmetry.names:
            assert torch.allclose(first[n], one[n], rtol=1e-5, atol=1e-6)
            assert torch.allclose(second[n], two[n], rtol=1e-4, atol=1e-5)
    assert len(kinds) == (1 if name == "no chain" else 2)


@pytest.mark.parametrize("activation", SMOOTH, ids=lambda a: type(a).__name__)
def test_the_closed_form_of_incoming_mixing(activation, generator):
    model, symmetry = minibatch("incoming", activation, X)
    params = params_of(model)
    m = symmetry.sample(params, radius=0.3, generator=generator)
    x = torch.cat([X, torch.ones(5, 1, dtype=DOUBLE)], 1).T  # samples as columns, a row of ones for the bias
    v, u = torch.cat([params["0.weight"], params["0.bias"][:, None]], 1), params["2.weight"]
    h = (v @ x).requires_grad_()
    a = activation(h)
    slope = torch.autograd.grad(a.sum(), h, create_graph=True)[0]
    bend = torch.autograd.grad(slope.sum(), h)[0] if slope.requires_grad else torch.zeros_like(h)
    a, slope = a.detach(), slope.detach()
    once, twice = m @ a, m @ m @ a
    v1 = (once / slope) @ torch.linalg.pinv(x)
    v2 = (twice / slope - bend * once**2 / slope**3) @ torch.linalg.pinv(x)
    first, second = product_jets([symmetry], params, (m,))
    assert torch.allclose(torch.cat([first["0.weight"], first["0.bias"][:, None]], 1), v1, atol=1e-9)
    assert torch.allclose(torch.cat([second["0.weight"], second["0.bias"][:, None]], 1), v2, atol=1e-8)
    assert torch.allclose(first["2.weight"], -u @ m, atol=1e-10)
    assert torch.allclose(second["2.weight"], u @ m @ m, atol=1e-10)


def scaled_convolutions():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 1)).double()
    first = scaling(4, "0.weight", "2.weight", bias="0.bias")
    return model, tl.Product([first, scaling(3, "2.weight", "4.weight", bias="2.bias")])


def slices():
    """Scalings of parts of an axis, two of them on the same one, and one that meets a tensor on both sides."""
    legs = [Leg("0.weight", 0, start=3), Leg("2.weight", 1, dual=True, start=3), Leg("2.weight", 0, start=1)]
    symmetry = NeuronSymmetry(PositiveScaling(2), legs)
    return mlp([5, 8, 6, 3], nn.ReLU()), tl.Product([scaling(8, "0.weight", "2.weight", bias="0.bias"), symmetry])


def flattened():
    """A convolution whose channels meet a linear layer as four pixels each."""
    model = nn.Sequential(nn.Conv2d(1, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)).double()
    legs = [Leg("0.weight", 0), Leg("0.bias", 0), Leg("3.weight", 1, dual=True, each=4)]
    return model, NeuronSymmetry(PositiveScaling(3), legs)


def grouped():
    """A scaling in front of a grouped convolution, in which columns of other rows are other channels."""
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.ReLU(), nn.Conv2d(4, 6, 1, groups=2)).double()
    legs = [Leg("0.weight", 0), Leg("0.bias", 0), Leg("2.weight", 1, dual=True, groups=2)]
    return model, NeuronSymmetry(PositiveScaling(4), legs)


@pytest.mark.parametrize("build", [*CURVES.values(), scaled_convolutions, slices, flattened, grouped])
def test_the_curvature_is_the_mean_over_curves(build, generator):
    model, symmetry = build()
    symmetry, params = tl.Product([symmetry]), params_of(model)
    curves = tuple(0.3 * xi for xi in geometry.sample_curves(params, symmetry, 3, generator=generator))
    alone = [geometry.kappa(*symmetry.jet(params, xi)) for xi in zip(*curves, strict=True)]
    found = geometry.mean_kappa(params, symmetry, curves)
    assert float(found) == pytest.approx(float(torch.stack(alone).mean()), rel=1e-8)


@pytest.mark.parametrize("name", [name for name in CURVES if name.startswith("chain")])
def test_curvature_of_chained_mixings_and_its_gradient_are_those_of_differentiated_curves(name, generator):
    model, symmetry = CURVES[name]()
    curves = tuple(0.3 * xi for xi in geometry.sample_curves(params_of(model), symmetry, 3, generator=generator))
    found, grads = [], []
    for way in (
        lambda w: geometry.mean_kappa(w, symmetry, curves),
        lambda w: torch.stack([geometry.kappa(*symmetry.jet(w, xi)) for xi in zip(*curves, strict=True)]).mean(),
    ):
        points = {n: p.clone().requires_grad_() for n, p in params_of(model).items()}
        found.append(way(points))
        grads.append(torch.autograd.grad(found[-1], [*points.values()], allow_unused=True))
    assert float(found[0].detach()) == pytest.approx(float(found[1].detach()), rel=1e-9)
    for a, b in zip(*grads, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b, rtol=1e-6, atol=1e-8 * float(b.abs().max()))


@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32])
@pytest.mark.parametrize("build", [CURVES["scaling"], CURVES["scalings"], scaled_convolutions, slices, flattened])
def test_curvature_of_scalings_by_moments_is_that_of_their_jets(build, dtype, generator):
    model, symmetry = build()
    symmetry, params = tl.Product([symmetry]), params_of(model)
    curves = geometry.sample_curves(params, symmetry, 5, generator=generator)
    points = {name: p.to(dtype).requires_grad_() for name, p in params.items()}
    found = scaling_kappas(points, symmetry, tuple(xi.to(dtype) for xi in curves))
    exact = {name: p.clone().requires_grad_() for name, p in params.items()}
    jets = [symmetry.jet(exact, xi) for xi in zip(*curves, strict=True)]
    expected = torch.stack([geometry.kappa(*jet) for jet in jets])
    assert found.dtype == dtype
    tol = 1e-11 if dtype == DOUBLE else 1e-6
    assert torch.allclose(found.double(), expected, rtol=tol)
    for one, two in zip(
        torch.autograd.grad(found.sum(), [*points.values()], allow_unused=True),
        torch.autograd.grad(expected.sum(), [*exact.values()], allow_unused=True),
        strict=True,
    ):
        assert (one is None) == (two is None)
        assert one is None or torch.allclose(one.double(), two, rtol=100 * tol, atol=100 * tol * float(two.abs().max()))


@pytest.mark.parametrize("name", ["ellipse", "rosenbrock", "booth"])
def test_curvature_of_the_level_curves_of_the_plane(name):
    point = TestFunction(name, start=(-0.4, 0.7)).double()
    w = point.w.detach().requires_grad_()
    value = point.value(w)
    g = torch.autograd.grad(value, w)[0]
    hessian = torch.autograd.functional.hessian(point.value, w.detach())
    tangent = torch.stack([-g[1], g[0]])
    expected = float(tangent @ hessian @ tangent / g.norm() ** 3)  # of the implicit curve f = const
    assert float(tl.curvature(point, point.symmetry, samples=2)) == pytest.approx(abs(expected), rel=1e-9)


def test_curvature_needs_a_continuous_symmetry():
    model = mlp([4, 5, 2], nn.GELU())
    finite = tl.find_symmetries(model, torch.zeros(1, 4, dtype=DOUBLE))
    for wrong, message in [
        (finite, "continuous factors.*finite ones only"),
        (tl.Product([]), "continuous factors.*got none"),
        ("gradient_norm", "a symmetry, got 'gradient_norm'"),
        ([finite], r"pass tl\.Product"),
        (scaling(5, "0.weight", "no.weight"), "'0.weight'"),
    ]:
        with pytest.raises(TeleportError, match=message):
            tl.curvature(model, wrong)
    for options in ({"samples": 0}, {"samples": 2.5}, {"generator": 0}):
        with pytest.raises(TeleportError, match="samples=100|torch.Generator"):
            tl.curvature(model, scaling(5, "0.weight", "2.weight", bias="0.bias"), **options)


def test_curvature_along_one_sided_factors(generator):
    """The scale that a normalisation undoes: its curves are exponentials in the rows, whose curvature is known."""
    model = nn.Sequential(nn.Linear(4, 1, bias=False), nn.Linear(1, 2)).double()
    for factor in (NeuronSymmetry(PositiveScaling(1), [Leg("0.weight", 0)]), mixing_of_rows()):
        xi = factor.sample(params_of(model), generator=generator)
        first, second = finite_differences(factor, params_of(model), xi)
        curve = (xi[None],)
        found = geometry.mean_kappa(params_of(model), factor, curve)
        assert float(found) == pytest.approx(float(geometry.kappa(first, second)), rel=1e-5, abs=1e-6)


def mixing_of_rows():
    """Two outputs of the last layer, mixed, as they are in front of something that does not look at them."""
    return NeuronSymmetry(GeneralLinear(2), [Leg("1.weight", 0), Leg("1.bias", 0)])


# --- conserved quantities ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("build", "activation"), [(scaling, nn.ReLU()), (mixing, nn.Identity())])
def test_conserved_quantities_stand_still_along_the_flow_and_move_with_teleports(build, activation, generator):
    model = mlp([5, 6, 4, 3], activation)
    symmetry, params = hidden_product(build, model), params_of(model)
    x = torch.randn(9, 5, generator=generator, dtype=DOUBLE)
    loss = loss_of(model, lambda net: net(x).exp().mean())
    slope = torch.func.grad(loss)(params)
    along = torch.func.jvp(lambda p: tuple(tl.conserved_quantities(p, symmetry)), (params,), (slope,))
    for q, dq in zip(*along, strict=True):
        assert dq.abs().max() < 1e-12 < 1e-2 < q.abs().max()
    moved = symmetry.act(params, symmetry.sample(params, generator=generator))
    pairs = zip(tl.conserved_quantities(moved, symmetry), along[0], strict=True)
    assert all((a - b).abs().max() > 1e-2 for a, b in pairs)


def test_conserved_quantities_want_parameters_and_a_symmetry():
    model = mlp([5, 6, 3], nn.ReLU())
    symmetry = hidden_product(scaling, model)
    with pytest.raises(TeleportError, match=r"dict\(model\.named_parameters\(\)\)"):
        tl.conserved_quantities(model, symmetry)
    for wrong in ("scaling", None, [symmetry], model):
        with pytest.raises(TeleportError, match="a symmetry"):
            tl.conserved_quantities(params_of(model), wrong)


# --- the Hessian ------------------------------------------------------------------------------------------------------


def dense_hessian(loss, params):
    sizes = [p.numel() for p in params.values()]

    def flat_loss(flat):
        parts = zip(params.items(), flat.split(sizes), strict=True)
        return loss({name: part.view_as(p) for (name, p), part in parts})

    return torch.autograd.functional.hessian(flat_loss, torch.cat([p.flatten() for p in params.values()]))


def test_trace_and_eigenvalues_are_those_of_the_matrix(generator):
    model, x = mlp([3, 4, 2], nn.Tanh()), torch.randn(7, 3, generator=generator, dtype=DOUBLE)

    def loss_fn(net):
        return net(x).square().mean()

    hessian = dense_hessian(loss_of(model, loss_fn), params_of(model))
    values = tl.hessian_eigenvalues(model, loss_fn, 3, generator=generator)
    assert torch.allclose(values, torch.linalg.eigvalsh(hessian).flip(0)[:3], rtol=1e-8)
    trace = tl.hessian_trace(model, loss_fn, samples=2000, generator=generator)
    assert float(trace) == pytest.approx(float(hessian.trace()), rel=0.05)
    assert torch.allclose(tl.hessian_eigenvalues(model, loss_fn, 26), torch.linalg.eigvalsh(hessian).flip(0), atol=1e-9)
    for count in (0, 27):
        with pytest.raises(TeleportError, match="count"):
            tl.hessian_eigenvalues(model, loss_fn, count)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize(
    "spectrum",
    [[9.0] * 3 + [4.0] * 3, [9.0, 8.9999, 9.0], [1.0] * 60, [-1.0, 1.0], [0.0], range(60), [1e-9, 5e-9]],
    ids=["multiple", "near", "identity", "both signs", "zero", "spread", "small"],
)
def test_eigenvalues_of_large_matrices_are_found_as_often_as_they_occur(spectrum, count, generator):
    """Sixty parameters are more than the vectors that the method holds."""
    eigenvalues = torch.tensor([*spectrum, *[-3e-9] * 60][:60], dtype=DOUBLE)
    q = torch.linalg.qr(torch.randn(60, 60, generator=generator, dtype=DOUBLE)).Q
    matrix = q * eigenvalues @ q.T

    def loss_fn(net):
        w = net.weight.flatten() if isinstance(net, nn.Module) else net(torch.eye(60, dtype=DOUBLE)).flatten()
        return 0.5 * w @ matrix @ w

    found = tl.hessian_eigenvalues(nn.Linear(60, 1, bias=False, dtype=DOUBLE), loss_fn, count, generator=generator)
    expected = eigenvalues.sort(descending=True).values[:count]
    assert torch.allclose(found, expected, rtol=0, atol=1e-12 * float(eigenvalues.abs().max()))


def test_eigenvalues_in_float32_and_of_a_loss_without_second_derivatives(generator):
    model, x = mlp([6, 9, 3], nn.Tanh()), torch.randn(20, 6, generator=generator, dtype=DOUBLE)
    hessian = dense_hessian(loss_of(model, lambda net: net(x).exp().mean()), params_of(model))
    found = tl.hessian_eigenvalues(model.float(), lambda net: net(x.float()).exp().mean(), 4, generator=generator)
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), torch.linalg.eigvalsh(hessian).flip(0)[:4], rtol=1e-4)
    with pytest.raises(LossError, match="finite second derivatives"):
        tl.hessian_eigenvalues(model, lambda net: (net(x.float()) * 0).square().sum().sqrt() + net(x.float()).sum(), 1)


def test_the_hessian_needs_no_scipy():
    code = "import sys; sys.modules['scipy'] = None; import torch, teleport_lite as tl; m = torch.nn.Linear(3, 1)\n"
    code += "print(tl.hessian_eigenvalues(m, lambda net: net(torch.eye(3)).square().sum()).round(decimals=4).item())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) == 8.0  # of 2 [[I, 1], [1', 3]]


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_hessian_through_fused_attention(checkpointed, dtype, generator):
    """The kernels that torch chooses have a first derivative only; the same by hand has all."""

    class Attention(nn.Module):
        def __init__(self, fused):
            super().__init__()
            self.q, self.o, self.fused = nn.Linear(4, 12), nn.Linear(4, 2), fused

        def attend(self, x):
            q, k, v = self.q(x).chunk(3, -1)
            if self.fused:
                return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
            return (q @ k.mT / 2).softmax(-1) @ v

        def forward(self, x):
            h = checkpoint(self.attend, x, use_reentrant=False) if checkpointed and self.fused else self.attend(x)
            return self.o(h).mean(1)

    torch.manual_seed(0)
    model, plain = Attention(True).to(dtype), Attention(False).to(dtype)
    plain.load_state_dict(model.state_dict())
    x, y = torch.randn(6, 5, 4, generator=generator, dtype=dtype), torch.tensor([0, 1, 1, 0, 1, 0])
    results = []
    for net in (model, plain):

        def loss_fn(n):
            return F.cross_entropy(n(x), y)

        point, seed = params_of(net), lambda: torch.Generator().manual_seed(1)
        moved = copy.deepcopy(net)
        report = tl.teleport(moved, loss_fn, objective=objectives.hessian_trace(4), maximize=True)
        assert report.accepted or "larger" in report.reason
        results.append(
            [
                tl.hessian_trace(net, loss_fn, samples=5, generator=seed()),
                *tl.hessian_eigenvalues(net, loss_fn, 2, generator=seed()),
                torch.tensor(report.objective_after),
                tl.sharpness(net, loss_fn, directions=3, radii=(1.0,), generator=seed()),
            ]
        )
        assert all(torch.equal(p, point[n]) for n, p in params_of(net).items())
    rtol = 1e-3 if dtype == torch.float32 else 1e-9
    assert all(torch.allclose(a.double(), b.double(), rtol=rtol) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("make", [lambda: nn.Dropout(0.5), lambda: nn.RReLU()], ids=["dropout", "random slopes"])
def test_measures_in_training_mode_replay_the_random_state(make, generator):
    model, x = nn.Sequential(*mlp([6, 8, 3], nn.Tanh()), make()), torch.randn(9, 6, generator=generator, dtype=DOUBLE)
    torch.manual_seed(4)
    state, values = torch.get_rng_state(), []
    for size in (None, 1):
        phi = tl.sharpness(
            model, lambda net: net(x).square().mean(), chunk_size=size, generator=torch.Generator().manual_seed(1)
        )
        trace = tl.hessian_trace(
            model, lambda net: net(x).square().mean(), samples=3, generator=torch.Generator().manual_seed(1)
        )
        values.append((float(phi), float(trace)))
        assert torch.equal(state, torch.get_rng_state()) and model.training
    assert values[0] == pytest.approx(values[1], rel=1e-12)
    torch.manual_seed(5)
    again = tl.sharpness(model, lambda net: net(x).square().mean(), generator=torch.Generator().manual_seed(1))
    assert float(again) != pytest.approx(values[0][0], rel=1e-6)  # another mask


def test_without_a_generator_probes_differ():
    """Evaluations put the global random state back, which must not make all probes one."""
    model = nn.Linear(8, 1, bias=False, dtype=DOUBLE)
    matrix = torch.ones(8, 8, dtype=DOUBLE)

    def loss_fn(net):
        return 0.5 * net.weight[0] @ matrix @ net.weight[0] + 0 * net(torch.ones(1, 8, dtype=DOUBLE)).sum()

    torch.manual_seed(0)
    found = {float(tl.hessian_trace(model, loss_fn, samples=3)) for _ in range(5)}
    assert len(found) > 1 and float(tl.hessian_trace(model, loss_fn, samples=3000)) == pytest.approx(8, rel=0.1)
    assert float(tl.hessian_eigenvalues(model, loss_fn, 1)) == pytest.approx(8.0, rel=1e-9)


def test_a_hessian_that_torch_leaves_out_in_silence_is_refused():
    model = Odd(lambda x, scale: Once.apply(x * scale)).double()
    x = torch.ones(3, 5, dtype=DOUBLE)
    for measure in (tl.hessian_trace, tl.hessian_eigenvalues):
        with pytest.raises(LossError, match="once_differentiable"):
            measure(model, lambda net: net(x).square().mean())


# --- objectives -------------------------------------------------------------------------------------------------------


def independent(name, loss, moved, symmetry):
    """The objective at moved parameters, from the definition."""
    seed = torch.Generator().manual_seed(0)
    if name == "sharpness":
        around = geometry.unit_directions(moved, 6, generator=seed)
        return sum(loss({n: p + t * around[n][d] for n, p in moved.items()}) for d in range(6) for t in (0.1, 0.5)) / 12
    if name == "hessian_trace":
        probes = geometry.sign_probes(moved, 6, generator=seed)
        flat = torch.stack([torch.cat([z[n].flatten() for n in moved]) for z in probes])
        return ((flat @ dense_hessian(loss, moved)) * flat).sum(1).mean()
    curves = [symmetry.sample(moved, generator=seed) for _ in range(6)]
    return torch.stack([geometry.kappa(*symmetry.jet(moved, xi)) for xi in curves]).mean()


OBJECTIVES = {
    "sharpness": objectives.sharpness((0.1, 0.5), 6),
    "hessian_trace": objectives.hessian_trace(6),
    "curvature": objectives.curvature(6),
}


@pytest.mark.parametrize("kind", ["exact", "mini-batch"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_along_the_orbit(name, kind, generator):
    model = mlp([5, 6, 4, 2], nn.Tanh() if kind == "mini-batch" else nn.LeakyReLU(0.1))
    x = 0.5 * torch.randn(4, 5, generator=generator, dtype=DOUBLE)
    symmetry = hidden_product(scaling, model) if kind == "exact" else tl.minibatch_symmetries(model, x)
    loss, params = loss_of(model, lambda net: net(x).exp().mean()), params_of(model)
    along = OBJECTIVES[name].along(Problem(loss, params), symmetry)
    xi = tuple(0.2 * v for v in symmetry.sample(params, generator=generator))
    points = tuple(v.clone().requires_grad_() for v in xi)
    value = along(points)
    expected = float(independent(name, loss, symmetry.act(params, xi), symmetry))
    assert float(value.detach()) == pytest.approx(expected, rel=1e-9)
    grads = torch.autograd.grad(value, points)
    way = tuple(torch.randn(v.shape, generator=generator, dtype=DOUBLE) for v in xi)
    h = 1e-5
    ends = [float(along(tuple(v + s * h * d for v, d in zip(xi, way, strict=True))).detach()) for s in (1, -1)]
    slope = sum(float((g * d).sum()) for g, d in zip(grads, way, strict=True))
    assert slope == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-4)


@pytest.mark.parametrize("maximize", [True, False])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_teleports_raise_and_lower_it(name, maximize, generator):
    model, x = mlp([5, 6, 4, 2], nn.LeakyReLU(0.1)), torch.randn(9, 5, generator=generator, dtype=DOUBLE)
    before = functional_call(model, params_of(model), x)
    report = tl.teleport(
        model, lambda net: net(x).exp().mean(), objective=OBJECTIVES[name], maximize=maximize, radius=0.5
    )
    gain = report.objective_after / report.objective_before
    clear = 1.005 if name == "sharpness" else 1.1  # the loss at the point itself is part of the sharpness
    assert report.accepted and (gain > clear if maximize else gain < 1 / clear)
    assert torch.allclose(model(x), before, rtol=1e-12)


@pytest.mark.parametrize("loss", [F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss])
def test_sharpness_under_losses_of_pairs(loss):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    x, y = torch.randn(12, 4).double(), torch.randn(12, 3).double()
    by_hand = {
        F.mse_loss: lambda e: e.square(),
        F.l1_loss: lambda e: e.abs(),
    }.get(loss, lambda e: torch.where(e.abs() < 1, e.square() / 2, e.abs() - 0.5))
    found, expected = (
        float(tl.sharpness(model, f, directions=7, generator=torch.Generator().manual_seed(0)))
        for f in (lambda net: loss(net(x), y), lambda net: by_hand(net(x) - y).mean())
    )
    assert found == pytest.approx(expected, rel=1e-12)
