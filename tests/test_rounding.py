"""Trained float32 models, whose loss is small beside its terms: rounding refuses nothing, and excuses no mistake."""

from __future__ import annotations

import copy
import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from architectures import Decoder, Lenet, encoder, mlp, resnet
from torch import nn
from torch.utils._pytree import tree_map

import teleport_lite as tl
from teleport_lite.errors import LossError
from teleport_lite.host import on_host
from teleport_lite.rounding import ULPS, jitter_ulps, relative_gap
from teleport_lite.symmetries.axes import NeuronSymmetry


class Stream(nn.Module):
    """A residual stream with RMSNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.inner, self.outer = nn.Linear(5, 8), nn.Linear(8, 12, bias=False), nn.Linear(12, 8, bias=False)
        self.norms, self.head = nn.ModuleList([nn.RMSNorm(8), nn.RMSNorm(8)]), nn.Linear(8, 3, bias=False)

    def forward(self, x):
        x = self.read(x)
        x = x + self.outer(self.inner(self.norms[0](x)).relu())
        return self.head(self.norms[1](x))


MODELS = {
    "MLP": (lambda: mlp(nn.ReLU), (40, 5)),
    "convnet": (Lenet, (12, 1, 20, 20)),
    "residual net": (resnet, (12, 3, 8, 8)),
    "transformer": (lambda: nn.Sequential(encoder(False, "relu"), nn.Flatten(), nn.Linear(10, 3)), (40, 5, 3)),
    "language model": (lambda: Decoder("relu"), (30, 6)),
    "RMSNorm": (Stream, (40, 5)),
}


@functools.cache
def found(name: str):
    """A model in float32 after thirty steps of Adam, its loss, its inputs and its symmetries."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        make, shape = MODELS[name]
        model, tokens = make(), torch.randint(0, 11, shape)
        x = tokens if name == "language model" else torch.randn(*shape)
        y = tokens.flatten() if name == "language model" else torch.randint(0, 3, (len(x),))

    def loss(net):
        return F.cross_entropy(net(x).flatten(0, -2), y)

    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(30):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    return model.eval(), loss, x, tl.find_symmetries(model, x)


def trained(name: str):
    model, *rest = found(name)
    return copy.deepcopy(model), *rest


def near_minimum(model, x):
    """A squared error that is a hundred roundings of the outputs, squared."""
    with torch.no_grad():
        goal = model(x)
        goal = goal + 1e-5 * goal.std() * torch.randn(goal.shape, generator=draws())
    return lambda net: F.mse_loss(net(x), goal)


def draws():
    return torch.Generator().manual_seed(0)


def test_weights_are_jittered_by_units_in_their_last_place():
    """Each up or down; the other sign is the mirror image, and another seed another draw."""
    params, eps = {"w": torch.ones(1000), "n": torch.arange(3)}, torch.finfo(torch.float32).eps
    up, down, other = (jitter_ulps(params, *how) for how in ((1,), (-1,), (1, 1)))
    steps, mirrored, anew = ((moved["w"] - 1) / eps for moved in (up, down, other))
    assert steps.unique().tolist() == [-ULPS, ULPS] and abs(float(steps.mean())) < ULPS / 5
    assert torch.equal(mirrored, -steps) and not torch.equal(anew, steps) and torch.equal(up["n"], params["n"])
    assert jitter_ulps(params, 1, share=0.25)["w"].unique().tolist() == [0.75, 1.25]


@pytest.mark.parametrize("unit", [1e-12, 1.0, 1e12])
def test_a_relative_gap_has_no_unit(unit):
    a, b, zero = unit * torch.tensor([[3.0, 4.0], [3.0, 3.0], [0.0, 0.0]], dtype=torch.float64)
    assert float(relative_gap(a, b)) == float(relative_gap(b, a)) == pytest.approx(0.2, rel=1e-12)
    assert float(relative_gap(a, zero)) == 1 and float(relative_gap(zero, zero)) == 0


@pytest.mark.parametrize("name", MODELS)
def test_twelve_of_twelve_are_accepted(name):
    model, loss, _, symmetry = trained(name)
    generator = draws()
    goals = itertools.cycle([("gradient_norm", True), ("gradient_norm", False), ("weight_norm", False)])
    for k, (goal, maximize) in zip(range(12), goals, strict=False):
        how = {"search": "random", "generator": generator} if k > 5 else {"maximize": maximize}
        report = tl.teleport(model, loss, symmetry, goal, radius=(0.2, 1.0)[k % 2], **how)
        assert report.accepted, report.reason


@pytest.mark.parametrize("name", MODELS)
def test_rounding_moves_a_loss_near_its_minimum(name):
    model, _, x, symmetry = trained(name)
    loss, generator, moved = near_minimum(model, x), draws(), 0
    for _ in range(12):
        report = tl.teleport(model, loss, symmetry, search="random", radius=0.3, generator=generator)
        assert report.accepted, report.reason
        moved += report.invariance_error > 1e-5
    assert moved > 6


def planted(symmetry) -> list[NeuronSymmetry]:
    """Symmetries that miss one of the tensors that they should move."""
    factors = [f for f in symmetry if isinstance(f, NeuronSymmetry) and f.group.dim and len(f.legs) > 1]
    return [NeuronSymmetry(f.group, f.legs[:k] + f.legs[k + 1 :]) for f in factors for k in range(len(f.legs))]


@pytest.mark.parametrize("name", MODELS)
def test_a_mistake_is_no_rounding(name):
    """Though it changes the outputs by less than rounding may."""
    model, _, x, symmetry = trained(name)
    loss, before, seen = near_minimum(model, x), [p.detach().clone() for p in model.parameters()], 0
    exact, inputs = copy.deepcopy(model).double(), x.double() if x.is_floating_point() else x
    params, expected = {n: p.detach() for n, p in exact.named_parameters()}, exact(inputs)
    for false, radius in itertools.product(planted(symmetry), (1e-5, 3e-5, 1e-4)):
        report = tl.teleport(model, loss, false, radius=radius, search="random", generator=draws())
        xi = tree_map(on_host, report.xi)
        gap = (torch.func.functional_call(exact, false.act(params, xi[0]), inputs) - expected).abs().max()
        if gap > 2e-6 * expected.abs().max():
            assert not report.accepted, report
            seen += 1
        for p, old in zip(model.parameters(), before, strict=True):
            assert report.accepted or torch.equal(p, old)
            p.data.copy_(old)
    assert seen


@pytest.mark.parametrize("drift", [lambda k: k == 1, lambda k: k == 2, lambda k: k > 1, lambda k: k])
@pytest.mark.parametrize("name", ["MLP", "transformer"])
def test_a_drift_is_no_rounding(name, drift):
    model, _, x, symmetry = trained(name)
    before, count, loss = [p.clone() for p in model.parameters()], itertools.count(1), near_minimum(model, x)

    def drifting(net):
        return loss(net) * (1 + drift(next(count)))

    try:
        report = tl.teleport(model, drifting, symmetry, search="random", generator=draws())
        accepted = report.accepted
    except LossError:
        accepted = False
    assert not accepted and all(map(torch.equal, before, model.parameters()))
