"""Mini-batch symmetries: exact on the batch when the rank condition holds, honest when it does not."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from conftest import largest_gap, mlp, params_of, relative
from torch import nn
from torch.func import functional_call

import teleport_lite as tl
from teleport_lite.errors import ActivationError, BatchError, NoSymmetryError, TeleportError, UnknownNameError
from teleport_lite.functional import loss_of, norm, value_and_grad
from teleport_lite.objectives import as_objective
from teleport_lite.outputs import tensors_of
from teleport_lite.problem import Problem

ACTIVATIONS = {"outgoing": [nn.LeakyReLU(0.1), nn.Tanh(), nn.GELU(), nn.Sigmoid()], "incoming": [nn.LeakyReLU(0.1)]}
EXACT = [(kind, act) for kind, acts in ACTIVATIONS.items() for act in acts]


def batch(k: int, n: int = 12, seed: int = 1) -> torch.Tensor:
    return torch.randn(k, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("minimum_change", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("kind", "activation"), EXACT, ids=lambda v: v if isinstance(v, str) else type(v).__name__)
def test_batch_outputs_stay_when_the_rank_suffices(kind, activation, bias, minimum_change, generator):
    model, x = mlp([12, 20, 16, 3], activation, bias=bias), batch(10)
    symmetry = tl.minibatch_symmetries(model, x, compensate=kind, minimum_change=minimum_change)
    params = params_of(model)
    assert not symmetry.exact and len(symmetry) == 2
    for factor in symmetry:
        factor.require_exact(params)
    for _ in range(5):
        moved = symmetry.act(params, symmetry.sample(params, radius=0.3, generator=generator))
        assert largest_gap(moved, params) > 1e-2
        assert relative(functional_call(model, moved, x), model(x)) <= 1e-9
        assert relative(functional_call(model, moved, batch(50, seed=2)), model(batch(50, seed=2))) > 1e-3


@pytest.mark.parametrize("activation", [nn.Tanh(), nn.Sigmoid(), nn.Softplus()], ids=lambda a: type(a).__name__)
def test_incoming_mixing_inside_the_range_of_the_activation(activation, generator):
    model, x = mlp([12, 8, 3], activation), 0.1 * batch(10)
    symmetry = tl.minibatch_symmetries(model, x, compensate="incoming")
    params = params_of(model)
    moved = symmetry.act(params, symmetry.sample(params, radius=0.01, generator=generator))
    assert relative(functional_call(model, moved, x), model(x)) <= 1e-9


def test_outside_the_range_the_weights_are_nan_and_a_teleport_refuses(generator):
    model, x = mlp([12, 8, 3], nn.Tanh()), 10 * batch(10)
    symmetry = tl.minibatch_symmetries(model, x, compensate="incoming")
    before = copy.deepcopy(model.state_dict())
    report = tl.teleport(model, lambda net: net(x).square().mean(), symmetry, generator=generator, search="random")
    assert not report.accepted and "not finite" in report.reason
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", ["outgoing", "incoming"])
@pytest.mark.parametrize("k", [6, 40])
def test_identity_is_the_identity_with_minimum_change_only(kind, k):
    model, x = mlp([12, 20, 16, 3], nn.LeakyReLU(0.1)), batch(k)
    params = params_of(model)
    symmetry = tl.minibatch_symmetries(model, x, compensate=kind)
    assert largest_gap(symmetry.act(params, symmetry.zeros(params)), params) == 0.0
    published = tl.minibatch_symmetries(model, x, compensate=kind, minimum_change=False)
    defect = largest_gap(published.act(params, published.zeros(params)), params)
    assert defect > 1e-2 if k == 6 else defect < 1e-12


@pytest.mark.parametrize("kind", ["outgoing", "incoming"])
def test_minimum_change_is_the_nearest_solution(kind, generator):
    model, x = mlp([12, 20, 3], nn.LeakyReLU(0.1), bias=False), batch(6)
    params = params_of(model)
    nearest, published = (
        tl.minibatch_symmetries(model, x, compensate=kind, minimum_change=flag) for flag in (True, False)
    )
    xi = nearest.sample(params, radius=0.3, generator=generator)
    name = "2.weight" if kind == "outgoing" else "0.weight"
    a, b = (s.act(params, xi)[name] for s in (nearest, published))
    features = x if kind == "incoming" else model[1](x @ nearest.act(params, xi)["0.weight"].T)
    assert relative(features @ a.T, features @ b.T) < 1e-10  # both solve the same equations
    assert float((a - params[name]).norm()) < float((b - params[name]).norm())
    null = torch.eye(features.shape[1], dtype=torch.float64) - torch.linalg.pinv(features) @ features
    assert (
        float(((a - params[name]) @ null).abs().max()) < 1e-10
    )  # the correction has no part that the batch cannot see


@pytest.mark.parametrize("kind", ["outgoing", "incoming"])
def test_curves_of_both_formulas_are_the_same_where_the_solution_is_unique(kind, generator):
    model, x = mlp([12, 10, 3], nn.LeakyReLU(0.1)), batch(40)
    params = params_of(model)
    closed, differentiated = (
        tl.minibatch_symmetries(model, x, compensate=kind, minimum_change=flag)[0] for flag in (True, False)
    )
    xi = closed.sample(params, radius=0.3, generator=generator)
    for one, two in zip(closed.jet(params, xi), differentiated.jet(params, xi), strict=True):
        assert all(relative(one[name], two[name]) < 1e-9 for name in closed.names)


@pytest.mark.parametrize("kind", ["outgoing", "incoming"])
def test_too_large_a_batch_is_reported_with_the_error_recomputed(kind, generator):
    model, x = mlp([12, 10, 3], nn.LeakyReLU(0.1)), batch(60)
    symmetry, y = tl.minibatch_symmetries(model, x, compensate=kind), batch(60, 3, seed=5)

    def loss_fn(net):
        return nn.functional.mse_loss(net(x), y)

    with pytest.raises(BatchError, match="got rank 1"):
        symmetry[0].require_exact(params_of(model))
    before = copy.deepcopy(model.state_dict())
    report = tl.teleport(model, loss_fn, symmetry, radius=0.2)
    assert not report.accepted and "batch of at most 1" in report.reason
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())

    old = float(loss_fn(model).detach())
    accepted = tl.teleport(model, loss_fn, symmetry, radius=0.2, tol=10.0)
    new = float(loss_fn(model).detach())
    assert accepted.accepted and accepted.objective_after > accepted.objective_before
    assert accepted.invariance_error == pytest.approx(abs(new - old) / abs(old), rel=1e-9)
    assert accepted.invariance_error > 1e-4


def test_gradient_norm_is_that_of_the_moved_model():
    model, x = mlp([12, 20, 16, 3], nn.Tanh()), batch(8)
    symmetry = tl.minibatch_symmetries(model, x)
    report = tl.teleport(model, lambda net: net(x).square().mean(), symmetry, radius=0.3)
    model(x).square().mean().backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert report.accepted and report.objective_after == pytest.approx(float(norm), rel=1e-10)
    assert report.objective_after > 1.2 * report.objective_before


def test_errors():
    x = batch(5)
    with pytest.raises(ActivationError, match="invertible"):
        tl.minibatch_symmetries(mlp([12, 8, 3], nn.ReLU()), x, compensate="incoming")
    with pytest.raises(ActivationError, match="shape-preserving"):
        tl.minibatch_symmetries(nn.Sequential(nn.Linear(12, 8), nn.GLU(), nn.Linear(4, 1)).double(), x)
    with pytest.raises(UnknownNameError, match="'outgoing', 'incoming'"):
        tl.minibatch_symmetries(mlp([12, 8, 3], nn.ReLU()), x, compensate="both")
    with pytest.raises(NoSymmetryError, match="no hidden layer"):
        tl.minibatch_symmetries(nn.Linear(12, 3), x)
    symmetry = tl.minibatch_symmetries(mlp([12, 8, 3], nn.ReLU()), x)
    with pytest.raises(TeleportError, match="group action"):
        symmetry.transport({}, [None])


@pytest.mark.parametrize("kind", ["outgoing", "incoming"])
def test_the_gradient_norm_along_the_orbit_is_that_at_the_moved_parameters(kind, generator):
    model, x = mlp([12, 9, 7, 3], nn.LeakyReLU(0.1)), batch(6)
    symmetry, params = tl.minibatch_symmetries(model, x, compensate=kind), params_of(model)
    loss = loss_of(model, lambda net: net(x).exp().mean())
    xi = symmetry.sample(params, radius=0.3, generator=generator)
    found = as_objective("gradient_norm").along(Problem(loss, params), symmetry)(xi)
    expected = norm(value_and_grad(loss, symmetry.act(params, xi))[1])
    assert float(found.detach()) == pytest.approx(float(expected), rel=1e-10)
    points = tuple(x.clone().requires_grad_() for x in xi)  # as a search does
    found = as_objective("gradient_norm").along(Problem(loss, params), symmetry)(points)
    assert float(found.detach()) == pytest.approx(float(expected), rel=1e-10)


class Net(nn.Module):
    """Three linear layers, put together by `run(net, x)`; `last` is read in the usual way."""

    def __init__(self, run) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.act, self.drop, self.run = nn.Tanh(), nn.Dropout(0.5), run

    def forward(self, x):
        return self.run(self, x)


@dataclass
class Out:
    logits: torch.Tensor
    hidden: torch.Tensor


READ_ELSEWHERE = {  # what runs, and whether the layer between a and b, and the one between b and c, are free
    "plain": (lambda n, x: n.c(n.act(n.b(n.act(n.a(x))))), True, True),
    "residual": (lambda n, x: (h := n.act(n.a(x)), n.c(n.act(n.b(h) + h)))[1], False, None),
    "residual at the end": (lambda n, x: (h := n.act(n.a(x)), n.c(n.act(n.b(h))) + h[:, :3])[1], False, True),
    "twice": (lambda n, x: n.c(n.act(n.b(n.act(n.b(n.act(n.a(x))))))), False, False),
    "an output too": (lambda n, x: (n.c(n.act(n.b(h := n.act(n.a(x))))), h), False, True),
    "an output in an object": (lambda n, x: (h := n.act(n.a(x)), Out(n.c(n.act(n.b(h))), h))[1], False, True),
    "a gate": (lambda n, x: (h := n.act(n.a(x)), n.c(n.act(n.b(h))) * h.sum(1, keepdim=True))[1], False, True),
    "in training only": (
        lambda n, x: (h := n.act(n.a(x)), n.c(n.act(n.b(h))) + n.training * h[:, :3])[1],
        False,
        True,
    ),
    "weights of its own": (lambda n, x: n.c(n.act(n.b(n.act(n.a(x))))) + n.b.weight.square().sum(), False, False),
    "transposed": (lambda n, x: n.c(n.act(n.b(n.act(n.a(x))))) @ n.c.weight, True, False),
}


@pytest.mark.parametrize("kind", ["outgoing", "incoming"])
@pytest.mark.parametrize("name", READ_ELSEWHERE)
def test_hidden_layers_that_are_read_elsewhere_are_left_out(name, kind, generator):
    run, first, second = READ_ELSEWHERE[name]
    torch.manual_seed(0)
    model, x = Net(run).double().eval(), 0.1 * batch(4, 5)
    if not first and not second:
        with pytest.raises(NoSymmetryError, match=r"a -> b: .*(another way|called 2 times)"):
            tl.minibatch_symmetries(model, x, compensate=kind)
        return
    symmetry = tl.minibatch_symmetries(model, x, compensate=kind)
    found = {str(factor) for factor in symmetry}
    assert found == {
        text
        for free, text in ((first, "a.weight, a.bias -> b.weight"), (second, "b.weight, b.bias -> c.weight"))
        if free
    }
    assert len(symmetry.reasons) == 2 - len(found)
    params, before = params_of(model), tensors_of(model(x))
    for training in (False, True):
        moved = symmetry.act(params, symmetry.sample(params, radius=0.05, generator=generator))
        assert largest_gap(moved, params) > 1e-3
        before = tensors_of(model.train(training)(x))
        after = tensors_of(functional_call(model, moved, x))
        assert max(relative(a, b) for a, b in zip(after, before, strict=True)) < 1e-9


def test_dropout_between_the_maps_is_none_in_evaluation_mode_only():
    model, x = Net(lambda n, x: n.c(n.drop(n.act(n.b(n.act(n.a(x))))))).double(), batch(4, 5)
    found = tl.minibatch_symmetries(model, x)
    assert [str(f) for f in found] == ["a.weight, a.bias -> b.weight"] and "model.eval()" in found.reasons[0]
    assert len(tl.minibatch_symmetries(model.eval(), x)) == 2


def test_what_stands_between_the_maps_outside_of_modules_is_named():
    """A factor in front of the activation keeps the outputs where the layer's are held, and not where it is mixed."""
    model, x = Net(lambda n, x: n.c(n.act(n.b(n.act(2 * n.a(x)))))).double(), batch(4, 5)
    found = tl.minibatch_symmetries(model, x)
    assert [str(f) for f in found] == ["b.weight, b.bias -> c.weight"]
    assert found.reasons == ("a -> b: the input of act is not what the module before it gave",)
    assert tl.minibatch_symmetries(mlp([5, 8, 3], nn.Tanh()), x).reasons == ()


def test_what_is_looked_at_is_left_as_it_was():
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    state = torch.get_rng_state()
    with pytest.raises(ActivationError):
        tl.minibatch_symmetries(model, batch(1, 5).float())
    model = mlp([5, 8, 3], nn.Tanh(), dtype=torch.float32)
    before = copy.deepcopy(model.state_dict())
    assert len(tl.minibatch_symmetries(model, batch(1, 5).float())) == 1
    assert torch.equal(torch.get_rng_state(), state) and model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
