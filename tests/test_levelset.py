"""Teleports without a group: against contours, eigenvectors and dense Hessians; exact or nothing."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from conftest import Once, mlp, params_of, relative
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import teleport_lite as tl
from teleport_lite.errors import BatchError, EmptyModelError, LossError, NoSymmetryError, ParameterError, TeleportError

X = torch.randn(7, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.randn(7, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
BOTH = [tl.level_set_teleport, tl.null_space_teleport]


def loss_fn(net):
    return F.mse_loss(net(X), Y)


class Place(nn.Module):
    """A point, as a model without input."""

    def __init__(self, *w):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w, dtype=torch.float64))

    def forward(self):
        return self.w


def rosenbrock(net):
    x, y = net()
    return 100 * (x**2 - y) ** 2 + (x - 1) ** 2


def booth(net):
    x, y = net()
    return (x + 2 * y - 7) ** 2 + (2 * x + y - 5) ** 2


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def dense(model, loss_fn):
    """The gradient and the Hessian, as a vector and a matrix."""
    parts = {n: p.shape for n, p in model.named_parameters()}

    def loss(w):
        pieces = w.split([s.numel() for s in parts.values()])
        params = {n: piece.view(s) for (n, s), piece in zip(parts.items(), pieces, strict=True)}
        return loss_fn(lambda *args: torch.func.functional_call(model, params, args))

    w = flat(model).requires_grad_()
    return torch.autograd.grad(loss(w), w)[0], torch.autograd.functional.hessian(loss, w.detach())


def bits(model):
    return {n: t.clone() for n, t in model.state_dict().items()}


def same(model, before):
    return all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


# --- level sets: oracles ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [(-1.0, -1.0), (-1.2, 1.0), (0.3, 0.3), (2.0, 0.0), (-1.0, 2.0)])
def test_the_steepest_point_of_a_scanned_contour(start):
    """Rosenbrock is u^2 + v^2 with u = 10 (x^2 - y), v = x - 1, so that its contours are images of circles."""
    model = Place(*start)
    value = float(rosenbrock(model).detach())
    angle = torch.linspace(0, 2 * math.pi, 400_001, dtype=torch.float64)[:-1]
    x = 1 + value**0.5 * angle.sin()
    gap = value**0.5 * angle.cos() / 10  # x^2 - y
    norms = torch.hypot(400 * x * gap + 2 * (x - 1), -200 * gap)
    peaks = norms[(norms > norms.roll(1)) & (norms > norms.roll(-1))]
    report = tl.level_set_teleport(model, rosenbrock, steps=300)
    assert report.accepted and report.stopped == "KKT residual reached" and report.kkt_residual <= 1e-6
    assert abs(float(rosenbrock(model).detach()) - value) <= 1e-6 * value
    assert report.objective_after > report.objective_before
    assert float((peaks / report.objective_after - 1).abs().min()) < 1e-5


@pytest.mark.parametrize("start", [(-1.0, -1.0), (0.3, 0.3), (2.0, 0.0)])
def test_booth_is_steepest_along_its_larger_eigenvalue(start):
    model = Place(*start)
    value = float(booth(model).detach())
    report = tl.level_set_teleport(model, booth, steps=100)
    assert report.objective_after == pytest.approx(math.sqrt(2 * 18 * value), rel=1e-6)
    assert torch.linalg.vector_norm(dense(model, booth)[0]) == pytest.approx(report.objective_after)


@pytest.mark.parametrize("d", [5, 10, 20])
@pytest.mark.parametrize("condition", [10.0, 100.0])
def test_on_a_quadratic_the_top_eigenvector_in_closed_form(d, condition):
    g = torch.Generator().manual_seed(d)
    q = torch.linalg.qr(torch.randn(d, d, generator=g, dtype=torch.float64)).Q
    a = q * torch.logspace(0, math.log10(condition), d, dtype=torch.float64) @ q.T
    model = Place(*torch.randn(d, generator=g, dtype=torch.float64).tolist())

    def quadratic(net):
        return net() @ a @ net() / 2

    value = float(quadratic(model).detach())
    report = tl.level_set_teleport(model, quadratic, steps=300, tol=1e-10, kkt_tol=1e-8)
    top = q[:, -1] * math.sqrt(2 * value / condition)
    assert report.stopped == "KKT residual reached"
    assert report.objective_after == pytest.approx(math.sqrt(2 * value * condition), rel=1e-9)
    assert min((model.w.detach() - top).norm(), (model.w.detach() + top).norm()) < 1e-6 * top.norm()
    gradient, hessian = dense(model, quadratic)
    residual = (hessian @ gradient - condition * gradient).norm() / (hessian @ gradient).norm()
    assert residual < 1e-7 and report.kkt_residual == pytest.approx(float(residual), abs=1e-8)


@pytest.mark.parametrize("activation", [nn.Tanh(), nn.ReLU(), nn.Softplus()])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_network_gets_steeper_on_its_level_set(activation, dtype):
    model = mlp([9, 12, 3], activation, dtype=dtype)
    x, y = X.to(dtype), Y.to(dtype)

    def loss(net):
        return F.mse_loss(net(x), y)

    before, ids = float(loss(model).detach()), [id(p) for p in model.parameters()]
    report = tl.level_set_teleport(model, loss, steps=10)
    gradient, hessian = dense(model, loss)
    hg = hessian @ gradient
    residual = (hg - (gradient @ hg) / (gradient @ gradient) * gradient).norm() / hg.norm()
    assert report.accepted and report.invariance_error < 1e-6 + 8 * torch.finfo(dtype).eps
    assert abs(float(loss(model).detach()) - before) < (1e-6 + 8 * torch.finfo(dtype).eps) * before
    assert report.objective_after == pytest.approx(float(gradient.norm()), rel=1e-4)
    assert report.objective_after > 3 * report.objective_before
    assert report.kkt_residual == pytest.approx(float(residual), abs=1e-3)
    assert report.dimension == sum(p.numel() for p in model.parameters()) - 1 and report.steps == 10
    assert ids == [id(p) for p in model.parameters()]


def test_one_product_a_step_and_no_gradient_twice():
    model, calls = mlp([9, 12, 3], nn.Tanh()), []

    def counted(net):
        calls.append(1)
        return loss_fn(net)

    report = tl.level_set_teleport(model, counted, steps=8)
    assert len(calls) == report.gradients + 1  # and one evaluation to verify
    assert report.steps + 1 <= report.products <= report.steps + 2


def test_the_sublevel_version_may_go_down():

    def up(net):
        return net()[0] ** 2 + 10 * net()[1] ** 2 - 3 * torch.exp(-8 * (net() - 1).square().sum())

    model = Place(0.2, 0.55)
    before = float(up(model).detach())
    report = tl.level_set_teleport(model, up, steps=200, sublevel=True)
    assert report.accepted and report.objective_after > report.objective_before
    assert float(up(model).detach()) <= before + 1e-6 * abs(before)
    convex = Place(3.0, 0.0)  # where the level set is steepest, so is the sublevel set
    report = tl.level_set_teleport(convex, booth, steps=200, sublevel=True)
    assert report.objective_after == pytest.approx(math.sqrt(36 * report.loss_before), rel=1e-5)


@pytest.mark.parametrize("radius", [0.1, 0.5, 4.0])
def test_the_radius_bounds_the_distance(radius):
    model = mlp([9, 12, 3], nn.Tanh())
    before = flat(model)
    report = tl.level_set_teleport(model, loss_fn, steps=50, radius=radius)
    assert report.accepted and report.stopped == "radius reached" and report.invariance_error <= 1e-6
    assert 0.9 * radius < float((flat(model) - before).norm()) <= radius


def test_the_way_back_to_the_level_set_may_not_leave_the_radius():
    """A valley in which a step of the length that is left ends far from the level set."""
    model = Place(-2.0921489179404444, 0.31577380878588107)
    before = bits(model)
    report = tl.level_set_teleport(model, lambda net: net()[0] + torch.sin(5 * net()[1]) + 4, 30, radius=0.774)
    assert report.stopped == "the way back to the level set leaves the radius"
    assert not report.accepted and same(model, before)


def test_a_radius_that_is_never_reached_changes_nothing():
    free, bounded = (mlp([9, 12, 3], nn.Tanh()) for _ in range(2))
    for model, radius in ((free, None), (bounded, 1e9)):
        assert tl.level_set_teleport(model, loss_fn, steps=8, radius=radius).accepted
    assert torch.equal(flat(free), flat(bounded))


def test_no_maximum_means_no_end():
    gains = []
    for steps in (5, 20, 80):
        report = tl.level_set_teleport(mlp([9, 12, 3], nn.Softplus()), loss_fn, steps=steps)
        assert report.stopped == "all steps are taken"
        gains.append(report.objective_after / report.objective_before)
    assert gains[0] * 1.5 < gains[1] and gains[1] * 1.2 < gains[2]


@pytest.mark.parametrize(
    ("start", "stopped"),
    [((1.0, 3.0), "the gradient is zero"), ((3.0, 5.0), "KKT residual reached"), ((3.0, 1.0), "KKT residual reached")],
)
def test_a_stationary_start_is_left_alone(start, stopped):
    """The minimum of Booth, and the ends of both axes of one of its ellipses."""
    model = Place(*start)
    before = bits(model)
    report = tl.level_set_teleport(model, booth)
    assert not report.accepted and same(model, before)
    assert report.stopped == stopped and report.reason == f"nothing steeper was found: {stopped}"


def test_a_loss_that_is_linear_or_flat():
    for loss in (lambda net: net().sum(), lambda net: net().sum() * 0 + 1):
        report = tl.level_set_teleport(Place(1.0, 2.0), loss)
        assert not report.accepted and report.kkt_residual == 0


# --- null spaces ------------------------------------------------------------------------------------------------------


def layer_outputs(model, *inputs):
    seen = []
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))]
    handles = [m.register_forward_hook(lambda _m, _i, out: seen.append(out.detach())) for m in layers]
    model(*inputs)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("bias", [True, False])
def test_every_output_on_the_batch_stays_and_others_change(bias):
    model = mlp([9, 16, 12, 3], nn.Tanh(), bias=bias)
    other = torch.randn(5, 9, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    outputs, held_out, before = layer_outputs(model, X), model(other).detach(), params_of(copy.deepcopy(model))
    report = tl.null_space_teleport(model, loss_fn, radius=0.5)
    assert report.accepted and report.invariance_error < 1e-12
    assert report.objective_after > 1.5 * report.objective_before
    assert all(relative(a, b) < 1e-12 for a, b in zip(layer_outputs(model, X), outputs, strict=True))
    assert relative(model(other), held_out) > 0.01
    assert report.dimension == sum(m * (n + bias - 7) for n, m in [(9, 16), (16, 12), (12, 3)])
    assert float(dense(model, loss_fn)[0].norm()) == pytest.approx(report.objective_after)
    for k in (0, 2, 4):
        names = [f"{k}.weight"] + [f"{k}.bias"] * bias
        change = torch.cat([(model.get_parameter(n) - before[n]).flatten() for n in names]).norm()
        length = torch.cat([before[n].flatten() for n in names]).norm()
        assert change <= 0.5 * length * (1 + 1e-12)


def test_the_maximum_over_one_ball_is_that_of_the_dense_problem():
    """Half the squared gradient norm is a quadratic in one layer: maximised by the secular equation."""
    model = mlp([4, 10, 2], nn.Tanh(), bias=False)
    x, y = X[:5, :4], Y[:5, :2]

    def loss(net):
        return F.mse_loss(net(x), y)

    hidden = torch.tanh(x @ model[0].weight.T).detach()  # the first layer cannot gain from moving: see below
    null = torch.linalg.svd(hidden)[2][5:]  # [5, 10], the directions no sample has
    w0 = model[2].weight.detach().clone()

    def half(z):
        params = {"0.weight": model[0].weight, "2.weight": w0 + z.view(2, 5) @ null}
        points = {n: p if p.requires_grad else p.requires_grad_() for n, p in params.items()}
        value = loss(lambda inputs: torch.func.functional_call(model, points, (inputs,)))
        grads = torch.autograd.grad(value, list(points.values()), create_graph=True)
        return sum(g.square().sum() for g in grads) / 2

    zero = torch.zeros(10, dtype=torch.float64, requires_grad=True)
    b = torch.autograd.grad(half(zero), zero)[0]
    a = torch.autograd.functional.hessian(half, zero.detach())
    values, vectors = torch.linalg.eigh(a)
    length, low, high = 0.5 * float(w0.norm()), float(values[-1]), float(values[-1]) + 100 * float(b.norm())
    for _ in range(200):  # |(nu - A)^-1 b| = length
        middle = (low + high) / 2
        z = vectors @ ((vectors.T @ b) / (middle - values))
        low, high = (middle, high) if float(z.norm()) > length else (low, middle)
    best = math.sqrt(2 * float(half(z).detach()))
    report = tl.null_space_teleport(model, loss, steps=200, radius=0.5, kkt_tol=1e-10)
    assert report.objective_after == pytest.approx(best, rel=1e-8)


def test_the_first_layer_alone_gains_nothing():
    model = mlp([9, 4, 3], nn.Tanh())  # seven samples span the four hidden features, not the nine inputs
    before = bits(model)
    report = tl.null_space_teleport(model, loss_fn)
    assert not report.accepted and same(model, before) and report.dimension == 4 * (9 + 1 - 7)
    assert report.stopped == "the gradient does not depend on the null spaces"


class Pictures(nn.Module):
    """A convolution and a linear layer behind it."""

    def __init__(self, convolution, *shape):
        super().__init__()
        self.first, self.second = convolution, None
        self.x = torch.randn(*shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            for p in self.first.parameters():
                nn.init.normal_(p)
            self.middle = copy.deepcopy(self.first)
            self.head = nn.Linear(self.first.out_channels, 2, dtype=torch.float64)

    def forward(self, x):
        return self.head(self.middle(self.first(x).tanh()).tanh().flatten(2).mean(-1))


CONVOLUTIONS = {
    "1d": (nn.Conv1d(6, 6, 3, padding=1), (1, 6, 4)),
    "1d, same": (nn.Conv1d(6, 6, 3, padding="same", bias=False), (1, 6, 4)),
    "2d": (nn.Conv2d(6, 6, 2, stride=1, padding=1), (1, 6, 2, 2)),
    "2d, groups": (nn.Conv2d(6, 6, 3, padding=1, groups=2), (1, 6, 2, 3)),
    "2d, depthwise": (nn.Conv2d(6, 6, 3, padding=1, groups=6), (1, 6, 2, 2)),
    "2d, circular": (nn.Conv2d(6, 6, 3, padding=1, padding_mode="circular"), (1, 6, 3, 3)),
    "2d, dilated": (nn.Conv2d(6, 6, 3, padding=2, dilation=2), (1, 6, 3, 3)),
    "3d": (nn.Conv3d(6, 6, 2, padding=1), (1, 6, 1, 2, 2)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name):
    convolution, shape = CONVOLUTIONS[name]
    model = Pictures(copy.deepcopy(convolution).double(), *shape)

    def loss(net):
        return F.cross_entropy(net(model.x), torch.tensor([1]))

    outputs = layer_outputs(model, model.x)
    report = tl.null_space_teleport(model, loss)
    assert report.accepted, report.reason
    assert report.objective_after > 1.05 * report.objective_before
    assert all(relative(a, b) < 1e-11 for a, b in zip(layer_outputs(model, model.x), outputs, strict=True))
    if name == "2d":  # the dimension, from patches that F.unfold makes
        ranks = [
            int(torch.linalg.matrix_rank(F.pad(F.unfold(t, 2, padding=1)[0].T, (0, 1), value=1.0)))
            for t in (model.x, outputs[0].tanh())
        ]
        assert report.dimension == sum(6 * (25 - r) for r in ranks) + 2 * (7 - 1)


class Attends(nn.Module):
    """Multi-head attention, and a linear layer behind it."""

    def __init__(self, **options):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64, **options)
            self.head = nn.Linear(8, 3, dtype=torch.float64)

    def forward(self, q, k, v, **options):
        return self.head(self.attention(q, k, v, **options)[0].tanh().mean(1))


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 5, "vdim": 6}, {"add_bias_kv": True}])
@pytest.mark.parametrize("weights", [True, False])
def test_attention(options, weights):
    g = torch.Generator().manual_seed(1)
    q, k, v = (
        torch.randn(1, 3, n, generator=g, dtype=torch.float64)
        for n in (8, options.get("kdim", 8), options.get("vdim", 8))
    )
    model = Attends(**options)

    def loss(net):
        return F.cross_entropy(net(q, k, v, need_weights=weights), torch.tensor([1]))

    before, head = params_of(copy.deepcopy(model)), []
    handle = model.head.register_forward_pre_hook(lambda _m, args: head.append(args[0].detach()))
    report = tl.null_space_teleport(model, loss)
    head.clear()
    loss(model)
    moved_head = head[-1]
    with torch.no_grad():
        original = copy.deepcopy(model)
        for n, p in original.named_parameters():
            p.copy_(before[n])
    loss(original)
    handle.remove()
    assert report.accepted and report.invariance_error < 1e-12, report.reason
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert {"attention.out_proj.weight", "head.weight"} <= moved and not moved & {
        "attention.bias_k",
        "attention.bias_v",
    }
    assert relative(moved_head, head[-1]) < 1e-12


def test_a_transformer_layer_of_torch():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, dtype=torch.float64)
    x = torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for mode in (True, False):
        model.train(mode)
        out = model(x).detach()
        report = tl.null_space_teleport(model, lambda net: net(x).square().sum() + net(x)[..., 0].sum(), radius=0.3)
        assert report.accepted and report.objective_after > report.objective_before
        assert relative(model(x), out) < 1e-11


def test_shared_and_foreign_weights():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(12, 10, dtype=torch.float64)
            self.mix = nn.Linear(10, 10, dtype=torch.float64)
            self.head = nn.Linear(10, 12, bias=False, dtype=torch.float64)
            self.head.weight = self.embed.weight

        def forward(self, i):
            return self.head(self.mix(self.mix(self.embed(i)).tanh()).tanh())

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Tied()
    i = torch.tensor([1, 4])
    embedding = model.embed.weight.detach().clone()
    report = tl.null_space_teleport(model, lambda net: F.cross_entropy(net(i), i))
    assert report.accepted and torch.equal(model.embed.weight, embedding) and model.head.weight is model.embed.weight
    assert report.dimension == 10 * (11 - 4)  # two samples, through the same layer twice


def test_a_weight_with_two_biases_stays():
    """What one of the two layers leaves free the other one does not."""
    model = mlp([6, 6, 6, 3], nn.Tanh())
    model[2].weight = model[0].weight
    x = torch.randn(2, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight = model[0].weight.detach().clone()
    report = tl.null_space_teleport(model, lambda net: net(x).square().mean())
    assert report.accepted and torch.equal(model[0].weight, weight)
    assert report.dimension == 3 * (7 - 2)


def test_frozen_parameters_stay():
    model = mlp([9, 16, 12, 3], nn.Tanh())
    for name in ("2.bias", "4.weight"):
        model.get_parameter(name).requires_grad_(False)
    before = params_of(copy.deepcopy(model))
    for teleport in BOTH:
        assert teleport(model, loss_fn, steps=5).accepted
    assert all(torch.equal(model.get_parameter(n), before[n]) for n in ("2.bias", "4.weight"))
    assert not torch.equal(model.get_parameter("2.weight"), before["2.weight"])


def test_rcond_trades_exactness_for_room():
    x = torch.cat([X[:3], X[:3] + 1e-6 * X[3:6]])
    y = Y[:6]

    def loss(net):
        return F.mse_loss(net(x), y)

    dimensions = []
    for rcond, tol in ((None, None), (1e-3, 1e-2)):
        report = tl.null_space_teleport(mlp([9, 16, 3], nn.Tanh()), loss, rcond=rcond, tol=tol)
        assert report.accepted
        dimensions.append(report.dimension)
    assert dimensions[1] > dimensions[0]
    refused = tl.null_space_teleport(mlp([9, 16, 3], nn.Tanh()), loss, rcond=1e-3, tol=1e-14)
    assert not refused.accepted and "beyond the relative tolerance" in refused.reason


@pytest.mark.parametrize("unit", [1e-9, 1e9])
def test_the_unit_of_the_inputs_does_not_matter(unit):
    """Without biases, whose input is 1."""
    model = mlp([9, 4, 3], nn.Identity(), bias=False)
    report = tl.null_space_teleport(model, lambda net: net(unit * X[:3]).square().sum(), steps=1)
    assert report.dimension == 4 * (9 - 3) + 3 * (4 - 3)


def test_no_null_space_and_no_layer():
    x = torch.randn(50, 9, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    with pytest.raises(BatchError, match="use fewer samples"):
        tl.null_space_teleport(mlp([9, 8, 3], nn.Tanh()), lambda net: net(x).square().mean())
    with pytest.raises(NoSymmetryError, match="no trainable linear"):
        tl.null_space_teleport(Place(1.0, 2.0), rosenbrock)


# --- promises of both -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("teleport", BOTH)
@pytest.mark.parametrize("fault", ["nan", "raise", "interrupt"])
def test_a_fault_at_any_call_leaves_everything_as_it_was(teleport, fault):
    for k in range(1, 100):
        model, calls = (
            nn.Sequential(*mlp([9, 16, 3], nn.Tanh()), nn.BatchNorm1d(3, dtype=torch.float64)),
            list[Tensor](),
        )

        def faulty(net, calls=calls, k=k):
            calls.append(torch.rand(1))
            if len(calls) == k and fault == "raise":
                raise RuntimeError("broken")
            if len(calls) == k and fault == "interrupt":
                raise KeyboardInterrupt
            return loss_fn(net) * (math.nan if len(calls) == k and fault == "nan" else 1)

        before, state = bits(model), torch.get_rng_state()
        try:
            report = teleport(model, faulty, steps=3)
        except (RuntimeError, KeyboardInterrupt):
            report = None
        assert torch.equal(torch.get_rng_state(), state) and model.training
        assert all(not m._forward_pre_hooks for m in model.modules())
        assert all(p.grad is None for p in model.parameters())
        if len(calls) < k:  # the fault never came
            assert report.accepted and not same(model, before) and k > 4
            break
        assert same(model, before)
        assert report is None or (not report.accepted and "not finite" in report.reason)
    else:
        pytest.fail("the teleport never ends")


@pytest.mark.parametrize("teleport", BOTH)
def test_an_interrupt_during_the_commit(teleport, monkeypatch):
    model = mlp([9, 16, 3], nn.Tanh())
    before, done, copy_ = bits(model), 0, torch.Tensor.copy_

    def interrupted(self, *args):
        nonlocal done
        done += isinstance(self, nn.Parameter)
        if done == 2:
            done += 1
            raise KeyboardInterrupt
        return copy_(self, *args)

    monkeypatch.setattr(torch.Tensor, "copy_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        teleport(model, loss_fn, steps=3)
    assert same(model, before)


@pytest.mark.parametrize("teleport", BOTH)
def test_the_unit_of_the_loss_does_not_matter(teleport):
    ends = []
    for unit in (1, 2**20):
        model = mlp([9, 12, 3], nn.Tanh())
        assert teleport(model, lambda net, unit=unit: unit * loss_fn(net), steps=8).accepted
        ends.append(flat(model))
    assert relative(*ends) < 1e-9


@pytest.mark.parametrize("teleport", BOTH)
def test_a_loss_that_changes_by_itself_is_named(teleport):
    model, calls = mlp([9, 16, 3], nn.Tanh()), []
    before = bits(model)
    with pytest.raises(LossError, match="deterministic"):
        teleport(model, lambda net: calls.append(0) or loss_fn(net) * (1 + 0.1 * len(calls)), steps=3)
    assert same(model, before)


@pytest.mark.parametrize("teleport", BOTH)
def test_dropout_in_training_is_replayed(teleport):
    model = nn.Sequential(*mlp([9, 16, 3], nn.Tanh()), nn.Dropout(0.5))
    assert teleport(model, loss_fn, steps=3).accepted and model.training


@pytest.mark.parametrize("teleport", BOTH)
def test_bad_input(teleport):
    model = mlp([9, 16, 3], nn.Tanh())
    for options in ({"steps": 0}, {"tol": 0.0}, {"kkt_tol": 0.0}, {"radius": 0.0}, {"radius": -1.0}, {"tol": math.nan}):
        with pytest.raises(TeleportError):
            teleport(model, loss_fn, **options)
    with pytest.raises(LossError):
        teleport(model, lambda net: net(X))
    with pytest.raises(LossError):
        teleport(model, lambda net: mlp([9, 16, 3], nn.Tanh())(X).sum())
    with pytest.raises(EmptyModelError):
        teleport(nn.Tanh(), loss_fn)
    with torch.no_grad():
        model[0].bias[1] = math.nan
    with pytest.raises(ParameterError, match=r"0\.bias"):
        teleport(model, loss_fn)


@pytest.mark.parametrize("teleport", BOTH)
def test_an_infinite_loss_is_refused(teleport):
    model = mlp([9, 16, 3], nn.Tanh())
    report = teleport(model, lambda net: loss_fn(net) * math.inf)
    assert not report.accepted and "not finite" in report.reason


@pytest.mark.parametrize("teleport", BOTH)
def test_the_report_prints(teleport):
    model = mlp([9, 16, 3], nn.Tanh())
    lines = str(teleport(model, loss_fn, steps=2)).splitlines()
    assert lines[0] == "Teleported" and lines[-2].startswith("  2 steps, ") and "KKT residual" in lines[-1]


@pytest.mark.parametrize("teleport", BOTH)
def test_a_compiled_model(teleport):
    model, twin = (mlp([9, 16, 3], nn.Tanh()) for _ in range(2))
    report = teleport(torch.compile(model, backend="eager"), loss_fn, steps=3)
    assert report.accepted and report.objective_after == pytest.approx(teleport(twin, loss_fn, steps=3).objective_after)
    assert relative(flat(model), flat(twin)) < 1e-9


@pytest.mark.parametrize("teleport", BOTH)
def test_ambient_autocast_is_left_out(teleport):
    model = mlp([9, 16, 3], nn.Tanh(), dtype=torch.float32)
    x, y = X.float(), Y.float()
    with torch.autocast("cpu", torch.bfloat16):
        report = teleport(model, lambda net: F.mse_loss(net(x), y), steps=3)
        assert torch.is_autocast_enabled("cpu")
    assert report.accepted and report.invariance_error < 2e-6


# --- gradients that are not what they seem ----------------------------------------------------------------------------


def reentrant(layer, h):
    return checkpoint(layer, h, use_reentrant=True)


def recomputed(layer, h):
    return checkpoint(layer, h, use_reentrant=False)


class Wrapped(nn.Module):
    """A network with something around its middle layer, through which another way leads past."""

    def __init__(self, around=None, middle: nn.Module | None = None) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(9, 8).double(), nn.Linear(8, 3).double()
            self.middle = (middle or nn.Sequential(nn.SiLU(), nn.Linear(8, 8), nn.Dropout(0.2), nn.Tanh())).double()
        self.around = around or (lambda layer, h: layer(h))

    def forward(self, x):
        h = self.first(x)
        return self.last(self.around(self.middle, h) + h.sin())


def twice(layer, h):
    return recomputed(layer, recomputed(layer, h))


@pytest.mark.parametrize("teleport", BOTH)
@pytest.mark.parametrize(("around", "plain"), [(recomputed, None), (twice, lambda layer, h: layer(layer(h)))])
def test_checkpointed_layers_give_what_plain_ones_give(teleport, around, plain):
    """Layers run again while the loss is differentiated, at the parameters of the point in question."""
    model, twin = Wrapped(around), Wrapped(plain)
    report, expected = (teleport(m.train(), loss_fn, steps=10) for m in (model, twin))
    assert report.accepted and report.objective_after > 1.05 * report.objective_before
    assert report.objective_after == pytest.approx(expected.objective_after, rel=1e-9)
    assert relative(flat(model), flat(twin)) < 1e-9
    torch.manual_seed(3)  # the masks of the dropout are those that followed
    state = torch.get_rng_state()
    report = teleport(model, loss_fn, steps=2)
    assert torch.equal(torch.get_rng_state(), state)
    loss_fn(model).backward()
    real = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    assert report.accepted and float(real) == pytest.approx(report.objective_after, rel=1e-9)


@pytest.mark.parametrize("teleport", BOTH)
def test_what_cannot_be_differentiated_twice_is_named_with_what_helps(teleport):
    y = torch.arange(7) % 3
    cases = [
        (Wrapped(reentrant), loss_fn, "use_reentrant=False"),
        (
            Wrapped(lambda _, h: Once.apply(h.tanh())),
            loss_fn,
            "once_differentiable.*gradient_norm",
        ),
        (Wrapped(), lambda net: F.multi_margin_loss(net(X), y), "multi_margin_loss.*gradient_norm"),
    ]
    for model, loss, message in cases:
        before = bits(model)
        with pytest.raises(LossError, match=message):
            teleport(model, loss, steps=3)
        assert same(model, before)
    lazy = nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.Linear(8, 3)).double()
    with pytest.raises(ParameterError, match=r"0\.weight.*lazy.*run the model once on an input"):
        teleport(lazy, loss_fn)
    lazy(X)
    assert teleport(lazy, loss_fn, steps=2).accepted


@pytest.mark.parametrize("teleport", BOTH)
def test_sparse_gradients_of_embeddings_are_those_of_dense_ones(teleport):
    tokens = torch.tensor([3, 3, 7, 1])
    reports = []
    for sparse in (False, True):
        model = nn.Sequential(nn.Embedding(12, 9, sparse=sparse, dtype=torch.float64), *mlp([9, 16, 3], nn.Tanh()))
        with torch.no_grad():
            model[0].weight.copy_(torch.randn(12, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
        reports.append(teleport(model, lambda net: F.mse_loss(net(tokens), Y[:4]), steps=5))
    assert reports[1].accepted
    assert reports[1].objective_after == pytest.approx(reports[0].objective_after, rel=1e-9)


@pytest.mark.parametrize("teleport", BOTH)
def test_fused_attention_has_second_derivatives(teleport):
    class Attention(nn.Module):
        def forward(self, x):
            q, k, v = x.view(1, 2, 6, 3, 4).unbind(3)
            return F.scaled_dot_product_attention(q, k, v).flatten(1)

    model = nn.Sequential(nn.Linear(5, 12), Attention(), nn.Linear(48, 2))
    x, y = torch.randn(12, 5), torch.randn(1, 2)
    report = teleport(model, lambda net: F.mse_loss(net(x), y), steps=5)
    F.mse_loss(model(x), y).backward()
    real = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    assert report.accepted and float(real) == pytest.approx(report.objective_after, rel=1e-4)


@pytest.mark.parametrize("scale", [1e-3, 1e-9])
def test_a_small_loss_is_kept_as_precisely_as_a_large_one(scale):
    model = mlp([9, 12, 3], nn.Tanh(), dtype=torch.float32)
    x, y = X.float(), Y.float()
    before = float(F.mse_loss(model(x), y).detach())
    report = tl.level_set_teleport(model, lambda net: scale * F.mse_loss(net(x), y), steps=10)
    assert abs(float(F.mse_loss(model(x), y).detach()) - before) <= 3e-6 * before
    assert report.accepted and report.objective_after > 2 * report.objective_before


@pytest.mark.parametrize("teleport", BOTH)
def test_the_penalty_of_a_loss_that_reads_the_model_is_part_of_it(teleport):
    model = mlp([9, 16, 3], nn.Tanh())

    def loss(net):
        return loss_fn(net) + 1e-2 * sum(p.square().sum() for p in model.parameters())

    before, old = float(loss(model).detach()), bits(model)
    report = teleport(model, loss, steps=5)
    assert float(loss(model).detach()) == pytest.approx(before, rel=1e-6)
    assert report.accepted or same(model, old)


def test_outputs_of_a_null_space_teleport_are_compared():
    """A loss that is blind to the part of the outputs that moves."""

    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp([9, 16, 3], nn.Tanh())

        def forward(self, x):
            return self.net(x), self.net[2].weight.square().sum()

    model = Reads()
    before = bits(model)
    report = tl.null_space_teleport(model, lambda net: F.mse_loss(net(X)[0], Y), radius=0.5)
    assert not report.accepted and "the outputs moved" in report.reason and same(model, before)


def test_where_nothing_moves_nothing_is_reported():
    """The gradient is measured again on the model, by the same sum: a ratio of exactly 1."""
    for dtype in (torch.float32, torch.float64):
        model = mlp([9, 4, 3], nn.Tanh(), dtype=dtype)
        report = tl.null_space_teleport(model, lambda net: F.mse_loss(net(X.to(net[0].weight)), Y.to(net[0].weight)))
        assert not report.accepted and report.objective_after == report.objective_before
        assert report.loss_after == report.loss_before and report.invariance_error == 0
