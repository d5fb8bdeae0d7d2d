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

import teleport_lite as tl
from teleport_lite.errors import LossError
from teleport_lite.exactness import ULPS, _is_noise, check_deterministic, rounded
from teleport_lite.objectives import Problem
from teleport_lite.symmetries.axes import NeuronSymmetry

MODELS = {
    "MLP": (lambda: mlp(nn.ReLU), (40, 5)),
    "convnet": (Lenet, (12, 1, 20, 20)),
    "residual net": (resnet, (12, 3, 8, 8)),
    "transformer": (lambda: nn.Sequential(encoder(False, "relu"), nn.Flatten(), nn.Linear(10, 3)), (40, 5, 3)),
    "language model": (lambda: Decoder("relu"), (30, 6)),
}


@functools.cache
def trained(name: str, steps: int, seed: int = 0):
    """A model in float32 after so many steps of Adam, its loss, its inputs and its symmetries."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        make, shape = MODELS[name]
        model, tokens = make(), torch.randint(0, 11, shape)
        x = tokens if name == "language model" else torch.randn(*shape)
        y = tokens.flatten() if name == "language model" else torch.randint(0, 3, (len(x),))

    def loss(net):
        return F.cross_entropy(net(x).flatten(0, -2), y)

    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    return model.eval(), loss, x, tl.find_symmetries(model, x)


def widened(x):
    return x.double() if x.is_floating_point() else x


@pytest.mark.parametrize("steps", [30, 200])
@pytest.mark.parametrize("name", MODELS)
def test_twelve_of_twelve_are_accepted(name, steps):
    model, loss, _, symmetry = trained(name, steps)
    generator = torch.Generator().manual_seed(0)
    goals = itertools.cycle([("gradient_norm", True), ("gradient_norm", False), ("weight_norm", False)])
    for k, (goal, maximize) in zip(range(12), goals, strict=False):
        how = {"search": "random", "generator": generator} if k > 5 else {"maximize": maximize}
        report = tl.teleport(model, loss, symmetry, goal, radius=(0.2, 1.0)[k % 2], **how)
        assert report.accepted, report.reason


@pytest.mark.parametrize("radius", [0.003, 0.1, 1.0])
@pytest.mark.parametrize("name", MODELS)
def test_planted_mistakes_are_refused(name, radius):
    """A scaling or mixing that misses one of the tensors it should move, where float64 says that outputs change."""
    model, loss, x, symmetry = trained(name, 200)
    before, exact, inputs = [p.clone() for p in model.parameters()], copy.deepcopy(model).double(), widened(x)
    params, expected = dict(exact.named_parameters()), exact(inputs)
    factors = [f for f in symmetry if isinstance(f, NeuronSymmetry) and f.dim and len(f.legs) > 1]
    planted = [NeuronSymmetry(f.group, f.legs[:k] + f.legs[k + 1 :]) for f in factors for k in range(len(f.legs))]
    refused = 0
    for false in planted:
        xi = false.sample(dict(model.named_parameters()), radius=radius, generator=torch.Generator().manual_seed(0))
        gap = (torch.func.functional_call(exact, false.act(params, xi), (inputs,)) - expected).abs().max()
        if gap > 2e-4 * expected.abs().max():
            draw = torch.Generator().manual_seed(0)
            report = tl.teleport(model, loss, false, radius=radius, search="random", generator=draw)
            assert not report.accepted, (false, report)
            refused += 1
    assert refused > len(planted) / 2
    assert all(map(torch.equal, before, model.parameters()))


def problem(values) -> Problem:
    """A loss with these values, one after the other."""
    values = iter(values)
    return Problem(lambda params: torch.tensor(next(values)), {"w": torch.ones(3)})


@pytest.mark.parametrize("values", [itertools.cycle([1.1, 1.0]), itertools.count(1.1)])
def test_a_loss_that_changes_by_itself_is_no_rounding(values):
    with pytest.raises(LossError, match="deterministic"):
        check_deterministic(problem(values), 1.0, 1e-5)


def test_where_a_loss_is_computed_is_no_change_of_it():
    check_deterministic(problem(itertools.repeat(1.0001)), 1.0, 1e-5)


def test_what_rounding_does_is_measured_more_than_once():
    """Four weights are often moved up and down in equal numbers, which a loss of their sum does not show."""

    def loss(params):
        return 1.0 + 1e-4 * (params["w"] - 1).sum() / (2 * ULPS * torch.finfo(torch.float32).eps)

    balanced = Problem(loss, {"w": torch.ones(4)})
    assert float(loss(rounded(balanced.params, 0))) == 1.0
    assert _is_noise(1.0 + 1e-4, 1.0, balanced, 1e-5)
    assert not _is_noise(1.0 + 1e-3, 1.0, balanced, 1e-5)
