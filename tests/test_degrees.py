"""Activations that are homogeneous of another degree than 1: what they multiply by is a power of what comes in."""

from __future__ import annotations

import copy
import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import params_of, relative
from torch import nn
from torch.func import functional_call

import teleport_lite as tl
from teleport_lite.functional import loss_of, norm, value_and_grad
from teleport_lite.geometry.conserved import conserved_quantities
from teleport_lite.geometry.curvature import kappa
from teleport_lite.geometry.curves import scaling_kappas
from teleport_lite.groups import PositiveScaling, Signs
from teleport_lite.search import ascent, closed_form, has_closed_form

ACTIVATIONS = {  # the function, its degree, and what -1 makes of it: 1 for odd, 0 for even
    "squared relu": (lambda x: F.relu(x) ** 2, 2, None),
    "relu times itself": (lambda x: F.relu(x) * F.relu(x), 2, None),
    "square": (torch.square, 2, 0),
    "cube": (lambda x: x**3, 3, 1),
    "signed square": (lambda x: x * x.abs(), 2, 1),
    "leaky cube": (lambda x: F.leaky_relu(x, 0.2).pow(3), 3, None),
    "root": (lambda x: F.relu(x).sqrt(), 0.5, None),
    "cube root": (lambda x: x.abs() ** (1 / 3), 1 / 3, 0),
    "no fraction": (lambda x: x.abs() ** 0.5**0.5, 0.5**0.5, 0),
    "inverse root": (lambda x: x.abs().rsqrt(), -0.5, 0),
    "reciprocal": (lambda x: 2 / x, -1, 1),
    "quotient": (lambda x: x**3 / x.abs(), 2, 1),
    "pieces": (lambda x: torch.where(x > 0, x**2, -3 * x**2), 2, None),
}


class Deep(nn.Module):
    def __init__(self, activation, widths=(3, 6, 5, 2)) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.activation = activation
        self.layers = nn.ModuleList(nn.Linear(n, m) for n, m in itertools.pairwise(widths))

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x)


class Gated(nn.Module):
    def __init__(self, activation, width=5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.activation = activation
        self.gate, self.up, self.down = nn.Linear(3, width), nn.Linear(3, width), nn.Linear(width, 2)

    def forward(self, x):
        return self.down(self.activation(self.gate(x)) * self.up(x))


def built(name, kind=Deep):
    """A model and what is found; with positive weights where rounding would decide near a pole."""
    model = kind(ACTIVATIONS[name][0]).double()
    for p in model.parameters() if ACTIVATIONS[name][1] < 0 else ():
        p.detach().abs_()
    return model, tl.find_symmetries(model, torch.ones(1, 3, dtype=torch.float64))


def regression(seed=1):
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.rand(20, n, generator=generator, dtype=torch.float64) for n in (3, 2))
    return lambda net: F.mse_loss(net(x), y)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_scaling_for_each_neuron(name):
    _, degree, parity = ACTIVATIONS[name]
    _, found = built(name)
    scalings = [f for f in found if isinstance(f.group, PositiveScaling)]
    assert [f.dim for f in scalings] == [6, 5] and found.dim == 11
    for f in scalings:
        assert [leg.exponent for leg in f.legs] == [1, 1, pytest.approx(-degree, rel=1e-12)]
    signs = [len(f.legs) for f in found if isinstance(f.group, Signs)]
    assert signs == {None: [], 0: [2, 2], 1: [3, 3]}[parity]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_two_scalings_for_each_gated_neuron(name):
    _, found = built(name, Gated)
    degree = ACTIVATIONS[name][1]
    assert found.dim == 10
    by_name = [{leg.name: leg.exponent for leg in f.legs} for f in found.continuous]
    assert by_name[0]["down.weight"] == pytest.approx(-degree, rel=1e-12) and "up.weight" not in by_name[0]
    assert by_name[1]["up.weight"] == pytest.approx(-degree, rel=1e-12) and "down.weight" not in by_name[1]


@pytest.mark.parametrize("kind", [Deep, Gated])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_hundred_elements(name, kind, generator):
    model, found = built(name, kind)
    params, loss_fn = params_of(model), regression()
    loss = loss_of(model, loss_fn)
    grads = value_and_grad(loss, params)[1]
    for k in range(100):
        x = torch.rand(1 + k, 3, generator=generator, dtype=torch.float64) - 0.5 * (ACTIVATIONS[name][1] > 0)
        xi = found.sample(params, radius=0.5, generator=generator)
        moved = found.act(params, xi)
        assert relative(functional_call(model, moved, x), model(x)) < 1e-11
        back = found.act(moved, found.inverse(xi))
        assert max(relative(back[n], params[n]) for n in params) < 1e-13
    carried, there = found.transport(grads, xi), value_and_grad(loss, moved)[1]
    assert max(relative(carried[n], there[n]) for n in params) < 1e-10
    velocity = found[0].velocity(params, found[0].sample(params, generator=generator))
    assert abs(float(sum((velocity[n] * grads[n]).sum() for n in velocity))) < 1e-12 * float(norm(grads))


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, 1e-3),
        lambda p: torch.optim.SGD(p, 1e-3, momentum=0.9),
        lambda p: torch.optim.Adam(p, 1e-3, amsgrad=True),
    ],
    ids=["SGD", "momentum", "Adam"],
)
@pytest.mark.parametrize("name", ["squared relu", "cube", "root"])
def test_the_state_of_optimizers_is_what_carried_gradients_leave(name, optimizer, generator):
    model, found = built(name)
    twin = copy.deepcopy(model)
    one, other = optimizer(model.parameters()), optimizer(twin.parameters())
    xi = found.sample(params_of(model), radius=0.5, generator=generator)
    names = [n for n, _ in model.named_parameters()]
    for seed in range(5):  # gradients by hand, at fixed points, so that only the state differs
        grads = value_and_grad(loss_of(model, regression(seed)), params_of(model))[1]
        carried = found.transport(grads, xi)
        for net, g, o in ((model, grads, one), (twin, carried, other)):
            for n, p in net.named_parameters():
                p.grad = g[n].clone()
            with torch.no_grad():
                before = params_of(net)
                kept = {n: p.clone() for n, p in before.items()}
                o.step()
                for n, p in before.items():
                    p.copy_(kept[n])
    tl.optim.state_rules.move(model, found, xi, [one])
    for n, p, q in zip(names, model.parameters(), twin.parameters(), strict=True):
        for entry, value in one.state[p].items():
            if isinstance(value, torch.Tensor) and value.ndim:
                assert relative(value, other.state[q][entry]) < 1e-12, (n, entry)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_a_teleporter_moves_it(optimizer):
    model, found = built("squared relu")
    steps = optimizer(model.parameters(), 1e-2)
    loss_fn = regression()
    teleporter = tl.Teleporter(model, steps, found, every={2}, radius=0.5)
    for _ in range(4):
        steps.zero_grad()
        loss_fn(model).backward()
        report = teleporter.step(loss_fn)
        if report is not None:
            assert report.accepted and report.objective_after > 1.02 * report.objective_before
            assert report.invariance_error < 1e-12
        steps.step()


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("name", ["squared relu", "cube", "root", "reciprocal", "no fraction"])
def test_closed_forms(name, gradients, generator):
    model, found = built(name)
    found, params = found.continuous, params_of(model)
    tensors = value_and_grad(loss_of(model, regression()), params)[1] if gradients else params

    def value(xi):
        return norm(found.transport(tensors, xi) if gradients else found.act(tensors, xi)).log()

    assert has_closed_form(found, tl.objectives.OBJECTIVES["gradient_norm" if gradients else "weight_norm"])
    corners = itertools.product((-0.5, 0.5), repeat=11)
    values = torch.func.vmap(lambda c: value(c.split([6, 5])))(torch.tensor([*corners], dtype=torch.float64))
    highest = float(value(closed_form(found, tensors, gradients, radius=0.5)))
    assert highest <= float(values.max()) + 1e-12 and highest > float(values.max()) - 0.01
    lowest = closed_form(found, tensors, gradients, maximize=False, radius=0.5)
    if name == "reciprocal":  # all that it touches grows or shrinks together: there is no minimum, and it stays
        assert not any(x.any() for x in lowest)
        return
    searched = ascent(value, found, [found.zeros(params)], maximize=False, radius=0.5)
    assert float(value(lowest)) <= float(value(searched)) + 1e-9
    free = tuple(x.requires_grad_() for x in closed_form(found, tensors, gradients, maximize=False, radius=30.0))
    inside = [x.detach().abs() < 30 for x in free]
    slopes = torch.autograd.grad(value(free), free)
    assert max(float(s[i].abs().max()) for s, i in zip(slopes, inside, strict=True) if i.any()) < 1e-6


def test_the_extremum_of_several_powers(generator):
    group, powers = PositiveScaling(40), (1.0, -1.0, 2.0, -0.5, 3.0)
    u = torch.rand(5, 40, generator=generator, dtype=torch.float64) ** 4
    u *= torch.logspace(-6, 6, 40, dtype=torch.float64) ** torch.tensor([1, 0, -1, 0, 0]).double()[:, None]
    u[1:4:2, 0] = 0  # no minimum
    grid = torch.linspace(-2, 2, 4001, dtype=torch.float64)
    p = torch.tensor(powers, dtype=torch.float64)
    values = torch.einsum("ki,kx->ix", u, (2 * p[:, None] * grid).exp())
    for maximize in (True, False):
        xi = group.extremum(*u, powers=powers, maximize=maximize, radius=2.0)
        found = (u * (2 * p[:, None] * xi).exp()).sum(0)
        assert (xi[0] == 0) == (not maximize)
        best = values.amax(1) if maximize else values.amin(1)
        assert ((found - best)[1:] * (1 if maximize else -1) >= -1e-12 * best[1:]).all()


@pytest.mark.parametrize("powers", [(1.0, -1.0), (3.0, -2.0), (0.5, 2.0, -1.0)], ids=str)
def test_the_maximum_is_the_better_end(powers, generator):
    us = torch.randn(len(powers), 2000, generator=generator, dtype=torch.float64).exp()
    xi = PositiveScaling(2000).extremum(*us, powers=powers, maximize=True, radius=0.3)
    left, right = (sum(u * math.exp(2 * p * end) for p, u in zip(powers, us, strict=True)) for end in (-0.3, 0.3))
    assert torch.equal(xi > 0, right > left) and bool((xi.abs() == 0.3).all())
    assert bool((right > left).any()) and bool((right < left).any())


def test_conserved_quantities():
    """Along gradient flow their rate is minus twice the sum of exponent times weight times gradient."""
    model, found = built("cube")
    params = params_of(model)
    grads = value_and_grad(loss_of(model, regression()), params)[1]
    step = {n: params[n].requires_grad_() for n in params}
    for quantity, size in zip(conserved_quantities(step, found), (6, 5), strict=False):
        for q in quantity:
            slope = torch.autograd.grad(q, list(step.values()), retain_graph=True, allow_unused=True)
            rate = sum((s * grads[n]).sum() for n, s in zip(step, slope, strict=True) if s is not None)
            assert len(quantity) == size and abs(float(rate)) < 1e-12 * float(norm(grads))


def test_curvature_agrees_with_the_jet(generator):
    model, found = built("squared relu")
    params, found = params_of(model), found.continuous
    xi = found.sample(params, generator=generator)
    one = scaling_kappas(params, found, tuple(x[None] for x in xi))
    assert float(one) == pytest.approx(float(kappa(*found.jet(params, xi))), rel=1e-9)


def test_powers_are_saved_and_older_files_are_read():
    _, found = built("cube")
    saved = json.loads(json.dumps(found.to_dict()))
    assert tl.Product.from_dict(saved) == found
    for leg in (leg for f in saved["factors"] for leg in f["legs"]):
        del leg["power"]
    assert all(leg.power == 1 for f in tl.Product.from_dict(saved) for leg in f.legs)


@pytest.mark.parametrize(
    "activation",
    [torch.tanh, F.silu, lambda x: x**2 + x, lambda x: x**2 + 1, lambda x: x / (1 + x.abs()), torch.exp, torch.asin],
)
def test_what_has_no_degree(activation):
    model = Deep(activation).double()
    assert tl.find_symmetries(model, torch.full((1, 3), 0.1, dtype=torch.float64)).dim == 0
