"""Shared by the tests: random networks, and their parameters as a dictionary."""

from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Mapping
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

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


def keep_the_outputs(model: nn.Module, symmetry, example) -> None:
    """A hundred elements, on inputs of several sizes: no output moves, and each is undone by its inverse."""
    params, generator = params_of(model), torch.Generator().manual_seed(0)
    for k in range(100):
        inputs = example([1, 2, 9, 30][k % 4], k + 10)
        xi = symmetry.sample(params, radius=0.5, generator=generator)
        moved = symmetry.act(params, xi)
        assert relative(functional_call(model, moved, inputs), model(*inputs)) < 1e-11
        back = symmetry.act(moved, symmetry.inverse(xi))
        assert all(relative(back[n], params[n]) < 1e-12 for n in params)
    assert max(relative(moved[n], params[n]) for n in symmetry.names) > 1e-2


def tensors_in(output: object) -> list[torch.Tensor]:
    """Tensors in containers and dataclasses."""
    if dataclasses.is_dataclass(output):
        output = [getattr(output, f.name) for f in dataclasses.fields(output)]
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, (list, tuple)):
        return [t for part in output for t in tensors_in(part)]
    return [output] if isinstance(output, torch.Tensor) else []


def worst_change(model: nn.Module, symmetry, use, *, training: bool = False, elements: int = 5) -> float:
    """The largest change of what `use(model)` gives under random elements, each relative to its largest finite entry.

    Tried on a copy in float64, off its initial values, parameters written in place.
    """
    model = copy.deepcopy(model).double().train(training)
    generator, found = torch.Generator().manual_seed(0), 0.0
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
        values = {name: p.clone() for name, p in model.named_parameters()}
        buffers = {name: b.clone() for name, b in model.named_buffers()}

        def at(params) -> list[torch.Tensor]:
            for name, p in model.named_parameters():
                p.copy_(params[name])
            for name, b in model.named_buffers():
                b.copy_(buffers[name])
            torch.manual_seed(0)
            random.seed(0)
            return [t.clone() for t in tensors_in(use(model))]

        before = at(values)
        for _ in range(elements if symmetry.names else 0):
            xi = symmetry.sample(values, radius=0.5, generator=generator)
            moved = at(symmetry.act(values, xi))
            for a, b in zip(moved, before, strict=True):
                real = b.isfinite() & (b.abs() < 1e30)
                found = max(found, float((a - b)[real].abs().max() / b[real].abs().max()))
    return found


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


class Once(torch.autograd.Function):
    """An exponential that can be differentiated once."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0].exp()
