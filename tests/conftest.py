"""Shared by the tests: random networks, and their parameters as a dictionary."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

import teleport_lite as tl
from teleport_lite.functional import Params


def mlp(widths, activation: nn.Module, *, bias: bool = True, dtype=torch.float64, seed: int = 0) -> nn.Sequential:
    """A multilayer perceptron; `activation` stands after each layer but the last."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for n, m in pairwise(widths):
            layers += [nn.Linear(n, m, bias=bias, dtype=dtype), activation]
        return nn.Sequential(*layers[:-1])


def hidden_product(build, model: nn.Sequential) -> tl.Product:
    """The symmetry `build` (scaling, mixing, ...) on every hidden layer of an `mlp`."""
    linear = [(i, layer) for i, layer in enumerate(model) if isinstance(layer, nn.Linear)]
    return tl.Product(
        build(first.out_features, f"{i}.weight", f"{j}.weight", bias=None if first.bias is None else f"{i}.bias")
        for (i, first), (j, _) in pairwise(linear)
    )


def params_of(model: nn.Module) -> Params:
    return {name: p.detach() for name, p in model.named_parameters()}


def relative(after: torch.Tensor, before: torch.Tensor) -> float:
    """The largest change, relative to the largest entry."""
    gap = float((after.detach() - before.detach()).abs().max())
    return gap / float(before.detach().abs().max()) if gap else 0.0


def largest_gap(a: Params, b: Params) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
