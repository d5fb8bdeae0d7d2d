"""The published teleport: the numbers of a plain loop, its identity that is none, its stop, and nothing half done."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from conftest import largest_gap, mlp, params_of
from torch import nn

import teleport_lite as tl
from teleport_lite import published
from teleport_lite.errors import LossError, NoSymmetryError, ParameterError, TeleportError, UnknownNameError
from teleport_lite.functional import loss_of, norm, value_and_grad

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
from run import plain_paper_teleport

NETWORKS = {  # widths and batch: all widths larger, all smaller, the batch in between, deep, equal
    "wide": ([12, 24, 20, 3], 10),
    "narrow": ([12, 6, 5, 3], 10),
    "one layer": ([12, 24, 3], 10),
    "between": ([12, 24, 8, 20, 3], 10),
    "deep": ([12, 18, 14, 16, 3], 10),
    "wide outputs": ([8, 20, 24, 16], 10),
    "equal": ([12, 10, 10, 3], 10),
}
ACTIVATIONS = [nn.LeakyReLU(0.1), nn.Tanh(), nn.GELU(), nn.ReLU(), nn.Identity()]
ILL_CONDITIONED = {"between", "equal"}  # their random features are close to singular
EXACT = {name for name, (widths, k) in NETWORKS.items() if min(widths[1:-1]) >= k}


def problem(name: str, activation: nn.Module, bias: bool):
    widths, k = NETWORKS[name]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(k, widths[0], generator=generator, dtype=torch.float64)
    y = torch.randn(k, widths[-1], generator=generator, dtype=torch.float64)
    model = mlp(widths, activation, bias=bias)
    return model, x, lambda out: (out - y).square().mean()


def plain(model, x, loss, activation, **options):
    layers = [layer for layer in model if isinstance(layer, nn.Linear)]
    ws, bs = plain_paper_teleport([f.weight for f in layers], [f.bias for f in layers], x, activation, loss, **options)
    values = [t for pair in zip(ws, bs, strict=True) for t in pair if t is not None]
    return {name: t.detach() for name, t in zip(params_of(model), values, strict=True)}


def square(model, loss_fn) -> float:
    return float(norm(value_and_grad(loss_of(model, loss_fn), params_of(model))[1])) ** 2


@pytest.mark.parametrize("hidden", ["recomputed", "carried"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: type(a).__name__)
@pytest.mark.parametrize("name", NETWORKS)
def test_the_numbers_of_a_plain_loop(name, activation, bias, hidden):
    model, x, loss = problem(name, activation, bias)
    lr = 1e-4 if name in ILL_CONDITIONED else 1e-2
    expected = plain(model, x, loss, activation, lr=lr, steps=4, carried=hidden == "carried")
    before = params_of(copy.deepcopy(model))
    report = tl.paper_teleport(model, lambda net: loss(net(x)), lr=lr, steps=4, hidden=hidden)
    assert report.accepted and report.seconds > 0
    scale = max(float(p.abs().max()) for p in expected.values())
    assert largest_gap(params_of(model), before) > 1e-5 * scale
    assert largest_gap(params_of(model), expected) < 1e-8 * scale


@pytest.mark.parametrize("name", NETWORKS)
def test_the_report_tells_the_truth(name):
    model, x, loss = problem(name, nn.LeakyReLU(0.1), True)
    old, before = square(model, lambda net: loss(net(x))), loss(model(x)).item()
    report = tl.paper_teleport(model, lambda net: loss(net(x)), lr=1e-2)
    after = loss(model(x)).item()
    assert report.loss_before == pytest.approx(before) and report.loss_after == pytest.approx(after)
    assert report.objective_before**2 == pytest.approx(old)
    assert report.objective_after**2 == pytest.approx(square(model, lambda net: loss(net(x))))
    assert report.invariance_error == pytest.approx(abs(after - before) / before, rel=1e-3, abs=1e-12)
    assert (report.invariance_error < 1e-11) == (name in EXACT - ILL_CONDITIONED)


def test_carried_hidden_states_lose_the_loss_from_three_layers_on():
    errors = {}
    for name in ("one layer", "wide"):
        for hidden in ("recomputed", "carried"):
            model, x, loss = problem(name, nn.LeakyReLU(0.1), False)
            errors[name, hidden] = tl.paper_teleport(model, lambda net: loss(net(x)), hidden=hidden).invariance_error  # noqa: B023
    assert errors.pop(("wide", "carried")) > 1e-8
    assert max(errors.values()) < 1e-12


def test_fast_path_is_taken_where_it_applies(monkeypatch):
    def refuse(*args):
        raise AssertionError

    monkeypatch.setattr(published, "by_weights", refuse)
    for name in NETWORKS:
        model, x, loss = problem(name, nn.LeakyReLU(0.1), True)
        if name in EXACT:
            assert tl.paper_teleport(model, lambda net: loss(net(x))).accepted  # noqa: B023
        else:
            with pytest.raises(AssertionError):
                tl.paper_teleport(model, lambda net: loss(net(x)))  # noqa: B023


def test_a_batch_without_full_rank():
    model, x, loss = problem("wide", nn.LeakyReLU(0.1), True)
    x[1] = x[0]
    expected = plain(model, x, loss, nn.LeakyReLU(0.1), lr=1e-2, steps=3)
    tl.paper_teleport(model, lambda net: loss(net(x)), lr=1e-2, steps=3)
    assert largest_gap(params_of(model), expected) < 1e-8


def test_the_first_step_is_the_slope_of_the_published_action():
    model, x, loss = problem("narrow", nn.Tanh(), True)
    params = params_of(copy.deepcopy(model))
    action = tl.minibatch_symmetries(model, x, minimum_change=False)
    xi = [t.requires_grad_() for t in action.zeros(params)]
    _, grads = value_and_grad(loss_of(model, lambda net: loss(net(x))), action.act(params, xi), create_graph=True)
    slopes = torch.autograd.grad(norm(grads) ** 2, xi)
    tl.paper_teleport(model, lambda net: loss(net(x)), lr=1e-4, steps=1)
    expected = action.act(params, [1e-4 * t for t in slopes])
    assert largest_gap(params_of(model), expected) < 1e-4 * largest_gap(
        params_of(model), params
    )  # exp(T) is I + T + ...


def test_the_identity_lowers_the_gradient_norm_where_the_batch_is_smaller_than_the_widths():
    """The shape and scale of 784-512-512-10 on 200 images, an eighth of each."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(25, 98, generator=generator), torch.randint(10, (25,), generator=generator)
    model = mlp([98, 64, 64, 10], nn.LeakyReLU(0.1), bias=False, dtype=torch.float32)
    report = tl.paper_teleport(model, lambda net: nn.functional.cross_entropy(net(x), y), lr=1e-12)
    assert report.invariance_error < 1e-6
    assert 0.3 < (report.objective_after / report.objective_before) ** 2 < 0.8


@pytest.mark.parametrize("name", ["one layer", "narrow"])
def test_it_stops_before_a_step_from_beyond_the_bound(name):
    model, x, loss = problem(name, nn.LeakyReLU(0.1), False)
    fresh = copy.deepcopy(model.state_dict())

    def run(**options):
        model.load_state_dict(fresh)
        return tl.paper_teleport(model, lambda net: loss(net(x)), lr=1e-2, **options)

    run(steps=3)
    three, bound = params_of(copy.deepcopy(model)), square(model, lambda net: loss(net(x)))
    report = run(stop=bound * (1 - 1e-6))  # the gradient norm rises, and is looked at before each step
    assert report.accepted and largest_gap(params_of(model), three) < 1e-12
    report = run(stop=bound * (1 + 1e-6))
    assert report.accepted and largest_gap(params_of(model), three) > 1e-6
    report = run(stop=1e-9)
    assert not report.accepted and "exceeds 1e-09 at the start" in report.reason
    assert all(torch.equal(fresh[n], p) for n, p in model.state_dict().items())


@pytest.mark.parametrize("hidden", ["recomputed", "carried"])
def test_it_stops_where_the_plain_loop_stops(hidden):
    activation = nn.LeakyReLU(0.1)
    model, x, loss = problem("wide", activation, True)
    options = {"lr": 1e-2, "stop": 0.18}
    stopped, on = (plain(model, x, loss, activation, carried=hidden == "carried", **o) for o in (options, {"lr": 1e-2}))
    tl.paper_teleport(model, lambda net: loss(net(x)), hidden=hidden, **options)
    assert largest_gap(stopped, on) > 1e-6 and largest_gap(stopped, params_of(model)) < 1e-8


@pytest.mark.parametrize("name", ["wide", "narrow"])
@pytest.mark.parametrize("lr", [1e60, 1e300])
def test_numbers_that_are_not_finite_leave_the_model_as_it_was(name, lr):
    model, x, loss = problem(name, nn.LeakyReLU(0.1), True)
    before = copy.deepcopy(model.state_dict())
    report = tl.paper_teleport(model, lambda net: loss(net(x)), lr=lr, stop=1e308)
    assert not report.accepted and "not finite" in report.reason
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())


@pytest.mark.parametrize("call", range(1, 7))
def test_exceptions_leave_the_model_as_it_was(call):
    model, x, loss = problem("narrow", nn.LeakyReLU(0.1), True)
    before, calls = copy.deepcopy(model.state_dict()), []

    def loss_fn(net):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return loss(net(x))

    with pytest.raises(KeyboardInterrupt):
        tl.paper_teleport(model, loss_fn)
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model)


def test_parameters_stay_the_same_objects_and_the_rest_stays_untouched():
    model, x, loss = problem("wide", nn.LeakyReLU(0.1), True)
    ids, state = [id(p) for p in model.parameters()], torch.get_rng_state()
    tl.paper_teleport(model, lambda net: loss(net(x)))
    assert ids == [id(p) for p in model.parameters()] and torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None and p.requires_grad and p.is_leaf for p in model.parameters()) and model.training


def test_errors():
    model, x, loss = problem("wide", nn.LeakyReLU(0.1), True)
    before = copy.deepcopy(model.state_dict())

    def loss_fn(net):
        return loss(net(x))

    for options in ({"steps": 0}, {"lr": 0.0}, {"lr": float("nan")}, {"stop": 0.0}):
        with pytest.raises(TeleportError, match="positive"):
            tl.paper_teleport(model, loss_fn, **options)
    with pytest.raises(UnknownNameError, match="'recomputed', 'carried'"):
        tl.paper_teleport(model, loss_fn, hidden="kept")
    with pytest.raises(LossError):
        tl.paper_teleport(model, lambda net: model[0].weight.sum())
    with pytest.raises(NoSymmetryError):
        tl.paper_teleport(nn.Linear(12, 3).double(), loss_fn)
    calls = []
    with pytest.raises(LossError, match="deterministic"):
        tl.paper_teleport(model, lambda net: calls.append(0) or loss_fn(net) * (1 + 0.1 * len(calls)))
    other = nn.Sequential(*model, nn.LayerNorm(3).double())
    with pytest.raises(TeleportError, match=r"5\.bias, 5\.weight"):
        tl.paper_teleport(other, loss_fn)
    model[2].weight.requires_grad_(False)
    with pytest.raises(ParameterError, match="trainable"):
        tl.paper_teleport(model, loss_fn)
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())


def test_frozen_last_bias_and_inputs_of_more_axes():
    model, x, loss = problem("wide", nn.LeakyReLU(0.1), True)
    model[-1].bias.requires_grad_(False)
    twin = copy.deepcopy(model)
    tl.paper_teleport(model, lambda net: loss(net(x)), lr=1e-2)
    tl.paper_teleport(twin, lambda net: loss(net(x.view(2, 5, -1)).flatten(0, 1)), lr=1e-2)
    assert largest_gap(params_of(model), params_of(twin)) < 1e-12
