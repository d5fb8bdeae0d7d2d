"""A loss at a point, of which a teleport computes the value and the gradient once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from teleport_lite.distributed import Ranks
from teleport_lite.functional import Evaluation, Loss, Params, check_scalar, value_and_grad
from teleport_lite.symmetries.base import Symmetry

if TYPE_CHECKING:
    from teleport_lite.objectives import Objective

SCALE = 1024.0  # of a loss under float16 autocast, when it is differentiated
AlongOrbit = Callable[[Any], Tensor]  # an objective as a function of the coordinates xi


@dataclass
class Problem:
    """A loss at a point, with its value and gradient computed once, when asked for.

    Attributes:
        local: the loss on the batch of this process.
        params: the point.
        ranks: the processes whose batches count; by default this one alone.
        buffers: those of the model that a symmetry moves along.
    """

    local: Loss
    params: Params
    ranks: Ranks | None = None
    buffers: Params = field(default_factory=dict)
    _gradient: tuple[Tensor, Params] | None = field(default=None, repr=False)
    _along: AlongOrbit | None = field(default=None, repr=False)

    @cached_property
    def loss(self) -> Loss:
        """The loss on the batches of all ranks."""
        return self.mean(lambda params: check_scalar(self.local(params)))

    def mean(self, function: Loss) -> Loss:
        """The mean over the ranks of a `function` of parameters; differentiable, but not by `vmap`."""
        return self.ranks.mean(function) if self.ranks else function

    def differentiate(self) -> tuple[Tensor, Params]:
        """The loss and its gradient, without graph."""
        self._gradient = self._gradient or value_and_grad(self.loss, self.params, scale=self._scale)
        return self._gradient

    def _scale(self) -> float:
        """What keeps small gradients from being lost where float16 is computed in, though no parameter is of it."""
        low = getattr(self.local, "dtype", None) == torch.float16
        return SCALE if low and all(p.dtype != torch.float16 for p in self.params.values()) else 1.0

    @property
    def gradient(self) -> Params:
        """The gradient of the loss, without graph."""
        return self.differentiate()[1]

    @property
    def point(self) -> Params:
        """The parameters and the buffers."""
        return {**self.params, **self.buffers}

    def moved(self, symmetry: Symmetry, xi: Any) -> Params:
        """The parameters that an element moves to; from now on the loss has the buffers that it moves to."""
        point = symmetry.act(self.point, xi)
        if self.buffers and isinstance(self.local, Evaluation):
            self.local.buffers = {name: point.pop(name) for name in self.buffers}
        return point

    def along(self, objective: Objective, symmetry: Symmetry) -> AlongOrbit:
        """The objective as a function of the coordinates, made once."""
        self._along = self._along or objective.along(self, symmetry)
        return self._along

    def forget(self) -> None:
        """Give the memory of the gradient and of the objective back."""
        self._gradient = self._along = None

    @cached_property
    def value(self) -> Tensor:
        """The loss, without graph."""
        if self._gradient is not None:
            return self._gradient[0]
        return self.at(self.params)

    def at(self, params: Params) -> Tensor:
        """The loss at other parameters, without graph."""
        with torch.no_grad():
            return check_scalar(self.loss(params))
