"""teleport: what it improves, what it promises, and that it is exact or nothing."""

from __future__ import annotations

import copy
import random
import re

import pytest
import torch
from conftest import hidden_product, mlp, params_of, relative
from torch import nn

import teleport_lite as tl
from teleport_lite.errors import (
    EmptyModelError,
    LossError,
    NoSymmetryError,
    ParameterError,
    TeleportError,
    UnknownNameError,
)
from teleport_lite.groups import PositiveScaling
from teleport_lite.symmetries import Leg, NeuronSymmetry, permutation, scaling
from teleport_lite.transaction import commit

X = torch.randn(40, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.randn(40, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def loss_fn(net):
    return nn.functional.mse_loss(net(X), Y)


def gradient_norm(model) -> float:
    model.zero_grad()
    loss_fn(model).backward()
    value = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    model.zero_grad()
    return float(value)


@pytest.fixture
def model():
    return mlp([6, 12, 10, 3], nn.ReLU())


@pytest.mark.parametrize("maximize", [True, False])
def test_gradient_norm(model, maximize):
    before, ids, outputs = gradient_norm(model), [id(p) for p in model.parameters()], model(X).detach()
    report = tl.teleport(model, loss_fn, maximize=maximize)
    assert report.accepted and report.reason == ""
    assert report.objective_before == pytest.approx(before, rel=1e-12)
    assert report.objective_after == pytest.approx(gradient_norm(model), rel=1e-12)
    assert report.objective_after > 1.5 * before if maximize else report.objective_after < 0.99 * before
    assert report.invariance_error < 1e-12 and relative(model(X), outputs) < 1e-12
    assert ids == [id(p) for p in model.parameters()]


def test_what_has_no_closed_form_stays_where_others_have_one(model):
    tied = NeuronSymmetry(PositiveScaling(12), [Leg("0.weight", 0), Leg("0.bias", 0), Leg("2.weight", 1, True)] * 2)
    solvable = hidden_product(scaling, model)
    before = copy.deepcopy(model.state_dict())
    report = tl.teleport(model, loss_fn, tl.Product([tied, *solvable]))
    assert report.accepted and report.symmetry == solvable
    for symmetry, how in ((tied, None), (tl.Product([tied, *solvable]), "ascent")):
        model.load_state_dict(before)
        report = tl.teleport(model, loss_fn, symmetry, search=how)
        assert report.accepted and report.symmetry[0] == tied and bool(report.xi[0].any())


def test_the_report_prints_as_a_short_table(model):
    text = str(tl.teleport(model, loss_fn))
    assert text.splitlines()[0] == "Teleported"
    assert [line.split()[0] for line in text.splitlines()[2:]] == [
        "loss",
        "gradient_norm",
        "invariance",
        "output",
        "seconds",
    ]


def test_weight_norm_in_any_direction(model):
    small = tl.teleport(copy.deepcopy(model), loss_fn, objective="weight_norm", maximize=False)
    large = tl.teleport(copy.deepcopy(model), loss_fn, objective="weight_norm", maximize=True)
    norm = float(torch.stack([p.detach().norm() for p in model.parameters()]).norm())
    assert small.objective_before == pytest.approx(norm) == large.objective_before
    assert small.objective_after < norm < large.objective_after


def test_one_step_loss_is_the_loss_after_one_step(model):
    report = tl.teleport(model, loss_fn, objective=tl.one_step_loss(lr=0.3), maximize=False)
    assert report.accepted and report.objective_after < report.objective_before
    model.zero_grad()
    loss_fn(model).backward()
    with torch.no_grad():
        for p in model.parameters():
            p.sub_(0.3 * p.grad)
        assert report.objective_after == pytest.approx(float(loss_fn(model)), rel=1e-10)


def test_any_callable_is_an_objective(model):
    def spread(params):
        return params["2.weight"].norm(dim=1).log().var()

    before = float(spread(params_of(model)))
    report = tl.teleport(model, loss_fn, objective=spread, maximize=False)
    assert report.accepted and report.objective == "spread"
    assert report.objective_before == pytest.approx(before)
    assert report.objective_after == pytest.approx(float(spread(params_of(model))))
    assert report.objective_after < 0.1 * before


@pytest.mark.parametrize("objective", ["gradient_norm", "weight_norm"])
@pytest.mark.parametrize("maximize", [True, False])
def test_ascent_agrees_with_the_closed_form(model, objective, maximize, generator):
    closed, climbed = (
        tl.teleport(copy.deepcopy(model), loss_fn, None, objective, maximize, search=how, generator=g)
        for how, g in (("closed_form", None), ("ascent", generator))
    )
    gain = closed.objective_after - closed.objective_before
    assert (climbed.objective_after - climbed.objective_before) / gain > 0.6
    assert abs(climbed.objective_after - climbed.objective_before) <= abs(gain) * (1 + 1e-9)


def test_random_teleports_are_reproducible_and_bounded(model):
    twins = [copy.deepcopy(model) for _ in range(2)]
    for twin in twins:
        report = tl.teleport(twin, loss_fn, radius=0.5, search="random", generator=torch.Generator().manual_seed(7))
        assert report.accepted
    assert all(torch.equal(a, b) for a, b in zip(twins[0].parameters(), twins[1].parameters(), strict=True))
    assert gradient_norm(twins[0]) != pytest.approx(gradient_norm(model))


def test_radius_bounds_the_stretch(model):
    (symmetry, _) = hidden_product(scaling, model)
    weight = model[0].weight.detach().clone()
    tl.teleport(model, loss_fn, symmetry, radius=0.25)
    ratio = (model[0].weight / weight).detach().log().abs()
    assert float(ratio.max()) == pytest.approx(0.25, rel=1e-9)


def test_optimizer_references_stay_valid(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tl.teleport(model, loss_fn)
    before = loss_fn(model).detach()
    loss_fn(model).backward()
    optimizer.step()
    assert float(loss_fn(model).detach()) != float(before)


def test_gradients_of_the_parameters_are_left_alone(model):
    loss_fn(model).backward()
    grads = [p.grad.clone() for p in model.parameters()]
    tl.teleport(model, loss_fn)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))


def test_float32_and_bfloat16():
    for dtype in (torch.float32, torch.bfloat16):
        model = mlp([6, 12, 10, 3], nn.ReLU()).to(dtype)
        report = tl.teleport(model, lambda net, dtype=dtype: (net(X.to(dtype)) - Y.to(dtype)).square().mean())
        assert report.accepted and all(p.dtype == dtype for p in model.parameters())


def test_float16_is_no_licence():
    """A loss that moves by a tenth is refused: the tolerance is a few roundings of the type, not more."""
    model = mlp([6, 12, 3], nn.Tanh()).half()
    false = hidden_product(scaling, model)  # a tanh commutes with no scaling
    report = tl.teleport(model, lambda net: net(X.half()).square().mean(), false, radius=0.6)
    assert 0.02 < report.invariance_error < 0.9 and report.reason.startswith("the loss moved")


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.GELU()])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_in_half_precision_outputs_change_as_rounding_explains(activation, dtype, autocast):
    """The loss, which is a mean, moves too little to tell: the scalings of a ReLU network are wrong by 5% or more."""
    torch.manual_seed(0)
    model, x = mlp([6, 32, 3], activation), X.float() if autocast else X.to(dtype)
    model = model.float() if autocast else model.to(dtype)
    with torch.autocast("cpu", dtype, enabled=autocast):
        for radius in (0.3, 1.0):
            symmetry = hidden_product(scaling, model)
            report = tl.teleport(model, lambda net: net(x).float().mean() + 5, symmetry, "weight_norm", True, radius)
            assert report.accepted == isinstance(activation, nn.ReLU), report
            assert report.accepted or re.search("beyond the .* that rounding explains", report.reason), report.reason


# Atomicity ---------------------------------------------------------------------------------------------------------


class Everything(nn.Module):
    """A model with buffers, dropout in evaluation mode, mixed modes and a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(6)
        self.body = mlp([6, 12, 10, 3], nn.ReLU())
        self.drop = nn.Dropout().eval()
        self.double()

    def forward(self, x):
        return self.drop(self.body(self.norm(x)))


class Snapshot:
    """All that a teleport must leave bit for bit as it was."""

    def __init__(self, model, optimizer):
        self.model, self.optimizer = model, optimizer
        self.ids = [id(p) for p in model.parameters()]
        self.state, self.slots = self.take()
        self.modes = [m.training for m in model.modules()]
        self.rng = torch.get_rng_state()

    def take(self):
        state = copy.deepcopy(self.model.state_dict())
        return state, copy.deepcopy(self.optimizer.state_dict()["state"])

    def assert_unchanged(self, parameters=True):
        state, slots = self.take()
        for name, old in self.state.items():
            if parameters or ("weight" not in name and "bias" not in name):
                assert torch.equal(state[name], old), name
        for k, slot in self.slots.items():
            assert all(torch.equal(torch.as_tensor(slots[k][n]), torch.as_tensor(v)) for n, v in slot.items())
        assert [id(p) for p in self.model.parameters()] == self.ids
        assert [m.training for m in self.model.modules()] == self.modes
        assert torch.equal(torch.get_rng_state(), self.rng)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in self.model.modules())


@pytest.fixture
def whole():
    model = Everything()
    optimizer = torch.optim.Adam(model.parameters())
    loss_fn(model).backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def calls_of(**options) -> int:
    """How often a teleport calls the loss."""
    count = 0

    def counting(net):
        nonlocal count
        count += 1
        return loss_fn(net)

    assert tl.teleport(Everything(), counting, **options).accepted
    return count


OPTIONS = {
    "closed form": {},
    "one step": {"objective": tl.one_step_loss(0.1), "maximize": False},
    "random": {"search": "random", "generator": torch.Generator().manual_seed(0)},
}
FAULTS = [
    (case, k, fault)
    for case, options in OPTIONS.items()
    for k in range(1, min(calls_of(**options), 12) + 1)
    for fault in ("interrupt", "raise", "nan", "drift")
]


def test_buffers_modes_and_random_state_survive_a_success(whole):
    snapshot = Snapshot(*whole)
    assert tl.teleport(whole[0], loss_fn).accepted
    snapshot.assert_unchanged(parameters=False)


@pytest.mark.parametrize(("case", "k", "fault"), FAULTS)
def test_a_fault_at_any_call_leaves_everything_as_it_was(whole, case, k, fault):
    snapshot, count = Snapshot(*whole), 0

    def faulty(net):
        nonlocal count
        count += 1
        value = loss_fn(net)
        if count != k:
            return value
        if fault == "interrupt":
            raise KeyboardInterrupt
        if fault == "raise":
            raise RuntimeError("injected")
        return value * float("nan") if fault == "nan" else value + 0.1

    if fault in ("interrupt", "raise"):
        with pytest.raises(KeyboardInterrupt if fault == "interrupt" else RuntimeError):
            tl.teleport(whole[0], faulty, **OPTIONS[case])
        snapshot.assert_unchanged()
        return
    try:
        report = tl.teleport(whole[0], faulty, **OPTIONS[case])
    except LossError:  # the drift showed as nondeterminism
        assert fault == "drift"
        snapshot.assert_unchanged()
        return
    if not report.accepted:
        assert report.reason
        snapshot.assert_unchanged()
    else:  # a fault in a call whose value is only searched by, or only gives inputs, does not matter
        snapshot.assert_unchanged(parameters=False)
        assert report.invariance_error < 1e-10


@pytest.mark.parametrize("name", ["0.weight", "2.weight", "4.weight"])
def test_an_interrupt_while_committing_restores_all(model, name, monkeypatch):
    before, moved = params_of(copy.deepcopy(model)), {n: p + 1 for n, p in params_of(model).items()}
    parameters, copy_, done = dict(model.named_parameters()), torch.Tensor.copy_, []

    def interrupted(self, value):
        if self is parameters[name] and not done:
            done.append(name)
            raise KeyboardInterrupt
        return copy_(self, value)

    monkeypatch.setattr(torch.Tensor, "copy_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        commit(model, moved)
    monkeypatch.undo()
    assert done and all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def drawn_anew():
    """A loss with random numbers of its own."""
    own = torch.Generator().manual_seed(0)
    return lambda net: loss_fn(net) + 0.1 * torch.rand((), generator=own)


def counted():
    """A loss that knows how often it was called."""
    calls = []
    return lambda net: calls.append(0) or loss_fn(net) * (1 + 0.1 * len(calls))


@pytest.mark.parametrize("noisy", [drawn_anew, counted])
def test_a_nondeterministic_loss_is_refused(whole, noisy):
    snapshot = Snapshot(*whole)
    with pytest.raises(LossError, match="deterministic loss, got .* at the same parameters"):
        tl.teleport(whole[0], noisy())
    snapshot.assert_unchanged()


@pytest.mark.parametrize(
    "noisy",
    [
        lambda net: loss_fn(net) + 0.1 * torch.rand(()),
        lambda net: nn.functional.mse_loss(nn.functional.dropout(net(X), 0.5), Y),
        lambda net: loss_fn(net) * (1 + random.random()),
    ],
)
def test_global_random_numbers_are_the_same_at_each_evaluation(whole, noisy):
    snapshot = Snapshot(*whole)
    report = tl.teleport(whole[0], noisy)
    assert report.accepted and report.invariance_error < 1e-12
    snapshot.assert_unchanged(parameters=False)


def test_dropout_in_training_is_replayed():
    model = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(), nn.Linear(12, 3)).double()
    report = tl.teleport(model, loss_fn)
    assert model.training and report.accepted and report.invariance_error < 1e-12
    assert report.objective_after > 1.5 * report.objective_before


def test_a_move_beyond_tol_is_refused(model):
    before = copy.deepcopy(model.state_dict())
    wrong = hidden_product(scaling, mlp([6, 12, 10, 3], nn.Tanh()))
    tanh = nn.Sequential(model[0], nn.Tanh(), model[2], nn.Tanh(), model[4])
    report = tl.teleport(tanh, loss_fn, wrong)
    assert not report.accepted and "beyond the relative tolerance 1e-10" in report.reason
    assert report.invariance_error == pytest.approx(abs(report.loss_after - report.loss_before) / report.loss_before)
    assert report.output_change > 1e-9 and "Not teleported" in str(report)
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())


def test_nothing_better_is_said(model):
    report = tl.teleport(model, loss_fn, objective=lambda params: params["4.bias"].sum())
    assert not report.accepted and report.reason == "nothing larger was found within the radius"


def test_a_scale_that_nothing_takes_back_is_named():
    """The length of a direction that the forward pass divides out: no balanced point, so the closed form leaves it."""

    class Directions(nn.Module):
        def __init__(self):
            super().__init__()
            self.v, self.head = (
                nn.Parameter(3 * torch.randn(8, 6, dtype=torch.float64)),
                nn.Linear(8, 3, dtype=torch.float64),
            )

        def forward(self, x):
            return self.head((x @ (self.v / self.v.norm(dim=1, keepdim=True)).T).tanh())

    net = Directions()
    report = tl.teleport(net, loss_fn, objective="weight_norm")
    assert not report.accepted and "nothing takes back a scale of v: search='ascent'" in report.reason
    assert tl.teleport(net, loss_fn, objective="weight_norm", search="ascent").accepted
    assert "takes back" not in tl.teleport(net, loss_fn, objective="weight_norm", radius=1e-9, search="ascent").reason


def test_what_autocast_inside_of_a_model_does_is_told_by_the_outputs():
    """Rounding in 16 bits moves the gradient as well, and outputs are the clearer reason."""

    class Inside(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = mlp([10, 16, 16, 4], nn.ReLU()).float()

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return self.body(x).float()

    for seed in range(6):
        torch.manual_seed(seed)
        x, y = torch.randn(40, 10), torch.randint(4, (40,))
        report = tl.teleport(Inside(), lambda net, x=x, y=y: nn.functional.cross_entropy(net(x), y))
        assert not report.accepted and "if the model opens autocast itself, pass tol=5e-2" in report.reason


def test_finite_groups_are_moved_along_at_random_only(model, generator):
    symmetry = hidden_product(permutation, model)
    with pytest.raises(NoSymmetryError, match=r"finite: S\(12\), S\(10\)\); pass search=.random. and a gen"):
        tl.teleport(model, loss_fn, symmetry)
    report = tl.teleport(model, loss_fn, symmetry, search="random", generator=generator)
    assert report.accepted and report.objective_after == pytest.approx(report.objective_before)


# Bad input ---------------------------------------------------------------------------------------------------------


def test_frozen_parameters_are_never_moved(model):
    model[2].weight.requires_grad_(False)
    with pytest.raises(ParameterError, match="'2.weight' to be trainable, got requires_grad=False"):
        tl.teleport(model, loss_fn, hidden_product(scaling, model))
    with pytest.raises(NoSymmetryError, match="2.weight is frozen.*; unfreeze what is frozen, or use level"):
        tl.teleport(model, loss_fn)
    deeper = mlp([6, 8, 8, 8, 3], nn.ReLU())
    deeper[6].weight.requires_grad_(False)
    frozen = deeper[6].weight.detach().clone()
    assert tl.teleport(deeper, loss_fn).accepted
    assert torch.equal(deeper[6].weight, frozen)


def test_shared_parameters_stay_shared():
    first = nn.Linear(6, 6)
    model = nn.Sequential(first, nn.ReLU(), first, nn.ReLU(), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    outputs, shared = model(X).detach(), first.weight.detach().clone()
    report = tl.teleport(model, loss_fn)
    assert report.accepted and model[0].weight is model[2].weight
    assert torch.equal(first.weight, shared) and relative(model(X), outputs) < 1e-12


def test_nan_parameters_are_named(model):
    with torch.no_grad():
        model[2].weight[0, 0] = float("nan")
    symmetry = tl.find_symmetries(mlp([6, 12, 10, 3], nn.ReLU()), X)
    for where in (symmetry, None):
        with pytest.raises(ParameterError, match="'2.weight' to be finite"):
            tl.teleport(model, loss_fn, where)


def test_integer_parameters_are_refused():
    class Quantised(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, 6, dtype=torch.int8), requires_grad=False)
            self.scale = nn.Parameter(torch.ones(4, 3))

        def forward(self, x):
            return x @ self.weight.T.to(x) @ self.scale.T.to(x)

    with pytest.raises(ParameterError, match="torch.int8"):
        tl.teleport(Quantised(), lambda net: net(X).sum(), scaling(3, "weight", "scale"))


def test_bad_arguments(model):
    with pytest.raises(UnknownNameError, match="'gradient_norm', 'weight_norm', 'one_step_loss', .*got 'gradnorm'"):
        tl.teleport(model, loss_fn, objective="gradnorm")
    with pytest.raises(UnknownNameError, match="'closed_form', 'ascent', 'random', got 'newton'"):
        tl.teleport(model, loss_fn, search="newton")
    with pytest.raises(UnknownNameError, match="'ascent', 'random', got 'closed_form'"):
        tl.teleport(model, loss_fn, objective="one_step_loss", search="closed_form")
    with pytest.raises(UnknownNameError, match="got '9.weight'"):
        tl.teleport(model, loss_fn, scaling(3, "9.weight", "2.weight"))
    value, unbounded, kind = (
        r"; pass radius=1\.0$",
        "an orbit without a bound .*: pass radius=",
        "; pass a number, such as",
    )
    table = {0.0: value, -1: value, float("nan"): value, float("inf"): unbounded, "1": kind, True: kind, X: kind}
    for radius, remedy in table.items():
        for objective in ("gradient_norm", "weight_norm"):
            with pytest.raises(TeleportError, match=f"positive finite radius, got .{{,30}}{remedy}"):
                tl.teleport(model, loss_fn, radius=radius, objective=objective)
    with pytest.raises(TeleportError, match="positive tol"):
        tl.teleport(model, loss_fn, tol=0.0)
    with pytest.raises(TeleportError, match="generator for a random teleport"):
        tl.teleport(model, loss_fn, search="random")
    with pytest.raises(TeleportError, match="positive lr"):
        tl.one_step_loss(lr=0.0)
    with pytest.raises(TeleportError, match="name of an objective"):
        tl.teleport(model, loss_fn, objective=3)
    with pytest.raises(EmptyModelError):
        tl.teleport(nn.ReLU(), lambda net: net(X).sum())
    with pytest.raises(NoSymmetryError, match="the model returns them"):
        tl.teleport(nn.Linear(6, 3).double(), loss_fn)
    assert tl.level_set_teleport(nn.Linear(6, 3).double(), loss_fn, steps=2).accepted  # the remedy that it names
    with pytest.raises(NoSymmetryError, match="an empty product"):
        tl.teleport(model, loss_fn, tl.Product([]))


def test_bad_losses(model):
    symmetry = tl.find_symmetries(model, X)
    with pytest.raises(LossError, match=r"shape \(40, 3\)"):
        tl.teleport(model, lambda net: net(X), symmetry)
    with pytest.raises(LossError, match="got float"):
        tl.teleport(model, lambda net: float(net(X).detach().sum()), symmetry)
    with pytest.raises(LossError, match="without a gradient"):
        tl.teleport(model, lambda net: net(X).detach().sum(), symmetry)
    other = copy.deepcopy(model)
    with pytest.raises(LossError, match="uses none of them"):
        tl.teleport(model, lambda net: loss_fn(other), symmetry)
    with pytest.raises(LossError, match="calls the given net"):
        tl.teleport(model, lambda net: loss_fn(other))
    with pytest.raises(LossError, match="scalar tensor from the objective"):
        tl.teleport(model, loss_fn, symmetry, objective=lambda params: 3.0)
    with pytest.raises(
        LossError, match=r"objective of params.*got TypeError: 'dict'.*functional_call\(model, params, x\)"
    ):
        tl.teleport(model, loss_fn, symmetry, objective=lambda net: net(X).sum())
    before = model(X).sum() + model[0].bias.sum()
    report = tl.teleport(
        model, loss_fn, symmetry, lambda p: torch.func.functional_call(model, p, X).sum() + p["0.bias"].sum()
    )
    assert report.accepted and report.objective_before == pytest.approx(before.item())


@pytest.mark.parametrize("wrong", ["down", 0, 1.0, torch.tensor(True)])
def test_a_direction_that_is_no_bool_is_refused(model, wrong):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for call in (
        lambda: tl.teleport(model, loss_fn, maximize=wrong),
        lambda: tl.Teleporter(model, optimizer, maximize=wrong),
        lambda: tl.level_set_teleport(model, loss_fn, sublevel=wrong),
    ):
        with pytest.raises(TeleportError, match=r"True.* as (maximize|sublevel), got .*; pass \1=True"):
            call()


def penalised(net):
    """A loss with a gradient by its inputs."""
    x = X.clone().requires_grad_()
    out = net(x)
    return out.square().mean() + torch.autograd.grad(out.sum(), x, create_graph=True)[0].square().mean()


def mapped(net):
    """A loss with derivatives of torch.func."""
    rows = torch.func.vmap(torch.func.jacrev(lambda x: net(x[None])[0]))(X[:4])
    return rows.square().mean() + net(X).square().mean()


@pytest.mark.parametrize("loss", [penalised, mapped])
@pytest.mark.parametrize("objective", ["gradient_norm", "weight_norm"])
def test_a_loss_may_differentiate_by_its_inputs(loss, objective):
    model = mlp([6, 12, 3], nn.ReLU())
    symmetry = hidden_product(scaling, model)
    for _ in range(2):  # at first the gradient is verified as well
        report = tl.teleport(model, loss, symmetry, objective, radius=0.2)
        assert report.accepted and report.invariance_error < 1e-12
    wrong = mlp([6, 12, 3], nn.Tanh())
    assert not tl.teleport(wrong, loss, hidden_product(scaling, wrong), objective).accepted


class Lower(nn.Module):
    """A model that opens autocast itself."""

    def __init__(self):
        super().__init__()
        self.inner = mlp([6, 12, 3], nn.ReLU()).float()

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.inner(x.float()).to(x)  # as the targets are


def with_dropout():
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Dropout(), nn.Linear(12, 3)).double()


def with_length(net):
    return loss_fn(net) + 1e-2 * sum(p.square().sum() for p in net.parameters())


@pytest.mark.parametrize(
    ("make", "loss", "how", "reason"),
    [
        (with_dropout, loss_fn, "random", "the loss moved .*; random numbers, as of dropout, .* call model.eval()"),
        (lambda: mlp([6, 12, 3], nn.ReLU()), with_length, None, "the loss moved .*; the outputs did not: leave out"),
        (Lower, lambda net: loss_fn(net).float(), None, "if the model opens autocast itself, pass tol=5e-2"),
    ],
)
def test_a_refusal_says_what_to_do(make, loss, how, reason):
    torch.manual_seed(0)
    report = tl.teleport(make(), loss, search=how, generator=torch.Generator().manual_seed(0))
    assert not report.accepted and re.search(reason, report.reason), report.reason


def with_backward(net):
    loss = loss_fn(net)
    loss.backward()
    return loss


FAILING = {  # in what, with what remedy
    "return the loss and leave backward": lambda net: tl.teleport(net, with_backward, hidden_product(scaling, net)),
    "leave backward to the package": lambda net: tl.sharpness(net, with_backward),
    "call it outside of inference_mode": lambda net: torch.inference_mode()(tl.teleport)(net, loss_fn),
    "without .item": lambda net: tl.teleport(net, lambda net: loss_fn(net).item()),
    "or what else comes with it": lambda net: tl.level_set_teleport(net, lambda net: (loss_fn(net), net)),
    "take weights by name": lambda net: tl.teleport(net, loss_fn, objective=lambda net: net[0].weight.norm()),
    "made under inference_mode; load its state_dict": lambda _: tl.teleport(unborn(), loss_fn),
}


@torch.inference_mode()
def unborn():
    return mlp([6, 12, 3], nn.ReLU())


@pytest.mark.parametrize("remedy", FAILING)
def test_what_cannot_be_differentiated_is_said_with_a_remedy(model, remedy):
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(TeleportError, match=remedy):
        FAILING[remedy](model)
    assert all(map(torch.equal, before, model.parameters())) and all(p.grad is None for p in model.parameters())


NO_LOSS = {  # not functions of the net alone
    "Tensor of shape": torch.ones(()),
    r"CrossEntropyLoss, which takes \(input, target\)": nn.CrossEntropyLoss(),
    r"<lambda>, which takes \(\)": lambda: 0,
    r"mse_loss, which takes \(input, target, ": nn.functional.mse_loss,
}


@pytest.mark.parametrize("got", NO_LOSS)
@pytest.mark.parametrize("routine", ["teleport", "sharpness", "hessian_trace", "level_set_teleport", "step"])
def test_what_is_no_function_of_the_net_is_refused(model, routine, got):
    call = getattr(tl, routine) if routine != "step" else lambda net, loss: teleporter.step(loss)
    teleporter = tl.Teleporter(model, torch.optim.SGD(model.parameters()), every={9})
    with pytest.raises(TeleportError, match=rf"a function of the net, got {got}.*; pass lambda net: criterion\(net"):
        call(model, NO_LOSS[got])


@pytest.mark.parametrize("wrong", [loss_fn, nn.Linear, "model", X])
@pytest.mark.parametrize(
    "routine", ["teleport", "sharpness", "hessian_trace", "level_set_teleport", "find_symmetries", "curvature"]
)
def test_what_is_no_model_is_refused(routine, wrong):
    with pytest.raises(TeleportError, match=r"expected a model, got .{5,30}; pass an instance of torch\.nn\.Module"):
        getattr(tl, routine)(wrong, loss_fn)
