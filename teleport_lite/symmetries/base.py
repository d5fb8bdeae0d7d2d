r"""What a symmetry is: a group acting on the parameters of a model without changing what the model computes.

A new symmetry gives its `group`, the `names` of the parameters that it moves, and `move`; everything else is derived.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from teleport_lite.errors import ParameterError, ShapeError, TeleportError, UnknownNameError
from teleport_lite.groups import Group
from teleport_lite.params import Params


class Symmetry(ABC):
    r"""A group action $(\xi, w) \mapsto e^{\xi} \cdot w$ on parameters w with $L(e^{\xi} \cdot w) = L(w)$.

    Attributes:
        group: the group, in coordinates `xi`.
        names: the parameters that the action moves; all others stay untouched.
        exact: whether it holds on all inputs, or only on one batch.
        linear: whether it is affine in the parameters, so that one gradient gives the gradient on the whole orbit.
    """

    group: Group
    names: tuple[str, ...]
    exact: bool = True
    linear: bool = True

    @abstractmethod
    def move(self, params: Params, xi: Any) -> Params:
        """The moved entries of `params` (those in `names`, all checked to be there); pure and differentiable."""

    def act(self, params: Params, xi: Any) -> Params:
        r"""The parameters $e^{\xi} \cdot w$: a new dictionary, in the same order, other entries untouched.

        Raises:
            UnknownNameError: when a moved parameter is missing.
            ParameterError: when a moved parameter is not of a real floating-point type.
            ShapeError: when a parameter or `xi` does not fit the group.
        """
        self.check(params)
        self._check_coordinates(params, xi)
        return {**params, **self.move(params, xi)}

    def transport(self, grads: Params, xi: Any, params: Params | None = None) -> Params:
        r"""Carry a gradient at w to the gradient at $e^{\xi} \cdot w$.

        Because L is constant along the action, $\nabla L(e^{\xi} \cdot w) = J^{-\top} \nabla L(w)$ with J the Jacobian
        of the action at w: one vector-Jacobian product with the action of the inverse. Where the action is affine, J
        does not depend on w; elsewhere pass the `params` w at which `grads` was taken.

        Raises:
            TeleportError: when the action is nonlinear and `params` is missing.
        """
        if params is None and not self.linear:
            remedy = "pass the params at which grads was taken"
            raise TeleportError("params, because the action is nonlinear", None, remedy)
        end = self.act(grads if params is None else params, xi)
        pull = torch.func.vjp(lambda w: self.act(w, self.inverse(xi)), end)[1]
        return pull(grads)[0]

    def zeros(self, params: Params) -> Any:
        """Coordinates of the identity."""
        return self.group.zeros(self._like(params))

    def sample(self, params: Params, *, radius: float = 1.0, generator: torch.Generator | None = None) -> Any:
        """Random coordinates of operator norm at most `radius`; for a finite group a uniform element."""
        return self.group.sample(self._like(params), radius=check_radius(radius), generator=generator)

    def inverse(self, xi: Any) -> Any:
        """Coordinates of the inverse element."""
        return self.group.inverse(xi)

    @property
    def dim(self) -> int:
        """Dimension of the group; 0 when it is finite."""
        return self.group.dim

    @property
    def holds(self) -> str:
        """Where the symmetry holds, in words."""
        return "all inputs" if self.exact else "one batch"

    def check(self, params: Params) -> None:
        """Refuse parameters that the action cannot move.

        Raises:
            UnknownNameError: when a moved parameter is missing.
            ParameterError: when a moved parameter is not of a real floating-point type.
        """
        for name in self.names:
            if name not in params:
                raise UnknownNameError("parameter", name, params)
            if not params[name].is_floating_point():
                remedy = "teleport before quantising, or leave it out of the symmetry"
                raise ParameterError(name, "of a real floating-point type", str(params[name].dtype), remedy)

    def _check_coordinates(self, params: Params, xi: Any) -> None:
        expected = self.zeros(params)
        if not isinstance(xi, Tensor) or xi.shape != expected.shape:
            got = tuple(xi.shape) if isinstance(xi, Tensor) else type(xi).__name__
            raise ShapeError("xi", tuple(expected.shape), got, "take xi from sample or zeros")

    def _like(self, params: Params) -> Tensor:
        self.check(params)
        return params[self.names[0]]

    def __str__(self) -> str:
        return ", ".join(self.names)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self}; {self.group}, dim {self.dim}, {self.holds})"


class Product(Symmetry, Sequence):
    """Several symmetries, applied one after the other; `xi` is the tuple of their coordinates.

    Args:
        factors: the symmetries; products among them are flattened.
        reasons: why something was left out, for people to read.

    >>> Product([])
    Product of 0 symmetries, dim 0
    """

    def __init__(self, factors: Iterable[Symmetry], reasons: Iterable[str] = ()) -> None:
        self.factors: tuple[Symmetry, ...] = tuple(
            leaf for f in factors for leaf in (f.factors if isinstance(f, Product) else (f,))
        )
        self.reasons = tuple(reasons)
        self.names = tuple(dict.fromkeys(name for f in self.factors for name in f.names))
        self.exact = all(f.exact for f in self.factors)
        self.linear = all(f.linear for f in self.factors)

    def move(self, params, xi):
        for factor, x in zip(self.factors, xi, strict=True):
            params = factor.act(params, x)
        return {name: params[name] for name in self.names}

    def transport(self, grads, xi, params=None):
        self._check_coordinates(grads, xi)
        for factor, x in zip(self.factors, xi, strict=True):
            grads = factor.transport(grads, x, params)
            if params is not None:
                params = factor.act(params, x)
        return grads

    def zeros(self, params):
        return tuple(f.zeros(params) for f in self.factors)

    def sample(self, params, *, radius=1.0, generator=None):
        return tuple(f.sample(params, radius=radius, generator=generator) for f in self.factors)

    def inverse(self, xi):
        raise TeleportError(
            "one symmetry", f"a product of {len(self)}", "invert factor by factor: factors may not commute"
        )

    @property
    def dim(self) -> int:
        return sum(f.dim for f in self.factors)

    @property
    def continuous(self) -> Product:
        """The factors whose group is not finite."""
        return Product([f for f in self.factors if f.dim], self.reasons)

    def _check_coordinates(self, params, xi):
        if not isinstance(xi, (tuple, list)) or len(xi) != len(self.factors):
            got = f"length {len(xi)}" if isinstance(xi, (tuple, list)) else type(xi).__name__
            raise ShapeError("xi", f"tuple of {len(self)}", got, "take xi from sample or zeros")

    def __len__(self) -> int:
        return len(self.factors)

    def __iter__(self) -> Iterator[Symmetry]:
        return iter(self.factors)

    def __getitem__(self, index):
        found = self.factors[index]
        return Product(found) if isinstance(index, slice) else found

    def __repr__(self) -> str:
        head = f"Product of {len(self)} symmetr{'y' if len(self) == 1 else 'ies'}, dim {self.dim}"
        rows = [("parameters", "group", "dim", "holds on")]
        rows += [(str(f), str(f.group), str(f.dim), f.holds) for f in self.factors]
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        table = ["  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        notes = [f"  left out: {reason}" for reason in self.reasons]
        return "\n".join([head, *(table if self.factors else []), *notes])

    __str__ = __repr__


def check_radius(radius: float) -> float:
    """`radius` when it is a positive finite number.

    Raises:
        TeleportError: otherwise.
    """
    if not 0 < radius < float("inf"):
        remedy = "the gradient norm has no maximum on an unbounded orbit: pass radius=1.0"
        raise TeleportError("a positive finite radius", radius, remedy)
    return float(radius)
