"""A family of problems for a learned optimizer: batches of them, their losses, gradients and symmetries."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from teleport_lite.errors import NoSymmetryError
from teleport_lite.functional import Params, norm
from teleport_lite.runtime import as_inputs
from teleport_lite.symmetries.base import Symmetry
from teleport_lite.symmetries.minibatch import MiniBatchMixing
from teleport_lite.symmetries.product import Product


@dataclass(frozen=True)
class Task:
    """A family of problems; every tensor of `params` and `data` has one more dimension in front, the problems.

    Args:
        loss: (params, data) of one problem -> its loss, a positive scalar.
        sample: generator -> (params, data) of a batch of problems.
        symmetry: a symmetry of one problem, or data -> such a symmetry (see `on_batch`).
    """

    loss: Callable[[Params, Any], Tensor]
    sample: Callable[[torch.Generator], tuple[Params, Any]]
    symmetry: Symmetry | Callable[[Any], Symmetry] | None = None

    def on(self, data: Any) -> Product:
        """The symmetry of the problem with these data.

        Raises:
            NoSymmetryError: when the task has none.
        """
        if self.symmetry is None:
            raise NoSymmetryError(["the task was made without a symmetry"], "pass symmetry=... to Task")
        return Product([self.symmetry if isinstance(self.symmetry, Symmetry) else self.symmetry(data)])

    def values(self, params: Params, data: Any) -> Tensor:
        """The losses of all problems, [problems]."""
        return vmap(self.loss)(params, data)

    def act(self, params: Params, xi: tuple, data: Any) -> Params:
        """The parameters of all problems, each moved by its own element."""
        return vmap(lambda p, x, d: self.on(d).act(p, x))(params, xi, data)

    def transport(self, grads: Params, xi: tuple, data: Any) -> Params:
        """Their gradients, carried along."""
        return vmap(lambda g, x, d: self.on(d).transport(g, x))(grads, xi, data)

    def slopes(self, grads: Params, data: Any) -> Tensor:
        r"""How fast $\log\|\nabla L\|$ grows along each coordinate of the group, [problems, dim]."""

        def slopes_of_one(g: Params, d: Any) -> Tensor:
            symmetry = self.on(d)
            found = torch.func.grad(lambda xi: norm(symmetry.transport(g, xi)).log())(symmetry.zeros(g))
            return torch.cat([x.flatten() for x in found])

        return vmap(slopes_of_one)(grads, data)


def symmetry_of_first(task: Task, data: Any) -> Product:
    """The symmetry of the first problem."""
    return task.on(torch.utils._pytree.tree_map(lambda t: t[0], data))


def on_batch(symmetry: Product, inputs: object) -> Product:
    """Mini-batch symmetries, as `minibatch_symmetries` gives them, on another batch of inputs."""
    factors = [copy.copy(factor) for factor in symmetry]
    for factor in factors:
        if isinstance(factor, MiniBatchMixing):
            factor.inputs = as_inputs(inputs)
    return Product(factors)


def gradient(
    task: Task, params: Params, data: Any, *, keep: bool = False, create: bool = False
) -> tuple[Tensor, Params]:
    """The losses of all problems, differentiable when `keep`, and their gradients, differentiable when `create`."""
    with torch.enable_grad():
        points = params if keep else {name: p.detach() for name, p in params.items()}
        points = {name: p if p.requires_grad else p.detach().requires_grad_() for name, p in points.items()}
        values = task.values(points, data)
        grads = torch.autograd.grad(values.sum(), [*points.values()], retain_graph=keep, create_graph=create)
    return values if keep else values.detach(), dict(zip(points, grads, strict=True))
