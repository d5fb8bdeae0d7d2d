"""What a symmetry is: a group acting on the parameters of a model without changing what the model computes.

A new symmetry gives its `group`, the `names` of the parameters that it moves, and `move`; everything else is derived.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from teleport_lite.errors import ParameterError, ShapeError, TeleportError, UnknownNameError
from teleport_lite.functional import Params
from teleport_lite.groups import Group
from teleport_lite.runtime import describe_value
from teleport_lite.symmetries.rank import tangent_rank

KINDS = ("scaling", "mixing", "rotation", "shear", "translation", "permutation", "sign")  # of groups
SAVED: dict[str, Any] = {}  # by the name that a saved symmetry carries, its class


class Symmetry(ABC):
    r"""A group action $(\xi, w) \mapsto e^{\xi} \cdot w$ on parameters w with $L(e^{\xi} \cdot w) = L(w)$.

    Attributes:
        group: the group, in coordinates `xi`.
        names: the parameters that the action moves; all others stay untouched.
        buffers: the buffers that have to move along, as the running statistics of a BatchNorm; of finite groups only.
        exact: whether it holds on all inputs, or only on one batch.
        linear: whether it is affine in the parameters, so that one gradient gives the gradient on the whole orbit.
        homogeneous: whether it is linear in the parameters, without a constant.
        of: what it keeps: the "outputs" of the model, or their "loss" alone.
        monomial: whether every moved entry is a multiple of a single old one, so that squares and signs are carried
            exactly.
    """

    group: Group
    names: tuple[str, ...]
    buffers: tuple[str, ...] = ()
    exact: bool = True
    linear: bool = True
    homogeneous: bool = False
    monomial: bool = False
    of: str = "outputs"

    @abstractmethod
    def move(self, params: Params, xi: Any) -> Params:
        """The moved entries of `params` (those in `names`, all checked to be there); pure and differentiable.

        Those in `buffers` are moved where they are there.
        """

    def act(self, params: Params, xi: Any) -> Params:
        r"""The parameters $e^{\xi} \cdot w$: a new dictionary, in the same order, other entries untouched.

        Raises:
            UnknownNameError: when a moved parameter is missing.
            TeleportError: when a buffer that has to move along is missing, and `xi` is not the identity.
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
        self._check_point(params)
        end = self.act(grads if params is None else params, xi)
        pull = torch.func.vjp(lambda w: self.act(w, self.inverse(xi)), end)[1]
        return pull(grads)[0]

    def spread(
        self,
        tensors: Params,
        xi: Any,
        entry: Callable[[Tensor], Tensor],
        *,
        dual: bool = True,
        params: Params | None = None,
    ) -> Params:
        r"""Multiply `tensors` by the matrix with which gradients move, `entry` applied to each of its entries first.

        That matrix is $M = J^{-\top}$ with J the Jacobian of the action, or J itself, with which displacements move,
        when not `dual`. With `torch.square` it carries squares v of gradients to the diagonal of
        $M\,\mathrm{diag}(v)\,M^{\top}$: exact where M has one entry a row (`monomial`), elsewhere as if the gradients
        were uncorrelated. With `torch.abs` it carries upper bounds of absolute values to upper bounds.

        Here M is dense, [n, n] for n moved entries: for small n, or as the slow answer to check a fast one.

        Raises:
            TeleportError: when the action is nonlinear and `params`, where J is taken, is missing.
        """
        self._check_point(params)
        point = tensors if params is None else params
        self.check(point)

        def flatten_entries(p: Params) -> Tensor:
            return torch.cat([p[name].reshape(-1) for name in self.names])

        def split_entries(vector: Tensor) -> Params:
            parts = vector.split([point[name].numel() for name in self.names])
            return {**tensors, **{n: part.view_as(point[n]) for n, part in zip(self.names, parts, strict=True)}}

        jacobian = torch.func.jacrev(lambda w: flatten_entries(self.move({**point, **split_entries(w)}, xi)))(
            flatten_entries(point)
        )
        return split_entries(entry(torch.linalg.inv(jacobian).mT if dual else jacobian) @ flatten_entries(tensors))

    def velocity(self, params: Params, xi: Any) -> Params:
        r"""The infinitesimal action $A_\xi w = \frac{d}{dt} e^{t\xi} \cdot w$ at t = 0, for the entries in `names`."""
        return torch.func.jvp(lambda z: self.move(params, z), (_identity_coordinates(xi),), (xi,))[1]

    def jet(self, params: Params, xi: Any) -> tuple[Params, Params]:
        r"""First and second derivative of the curve $t \mapsto e^{t\xi} \cdot w$ at t = 0, for the entries in `names`.

        A homogeneous action has $A_\xi w$ and $A_\xi A_\xi w$ with A its `velocity`; any other one is differentiated
        forward, twice.
        """
        if self.homogeneous:
            first = self.velocity(params, xi)
            return first, self.velocity(first, xi)

        def velocity_at(z: Any) -> Params:
            return torch.func.jvp(lambda y: self.move(params, y), (z,), (xi,))[1]

        return torch.func.jvp(velocity_at, (_identity_coordinates(xi),), (xi,))[:2]

    def zeros(self, params: Params) -> Any:
        """Coordinates of the identity."""
        return self.group.zeros(self._widest_parameter(params))

    def sample(self, params: Params, *, radius: float = 1.0, generator: torch.Generator | None = None) -> Any:
        """Random coordinates of operator norm at most `radius`; for a finite group a uniform element.

        It is the identity where a buffer that has to move along is not among the `params`.
        """
        xi = self.group.sample(self._widest_parameter(params), radius=check_radius(radius), generator=generator)
        return self.zeros(params) if self.missing(params) else xi

    def inverse(self, xi: Any) -> Any:
        """Coordinates of the inverse element."""
        return self.group.inverse(xi)

    def missing(self, params: Params) -> list[str]:
        """The buffers that have to move along and are not among the `params`."""
        return [name for name in self.buffers if name not in params]

    @property
    def dim(self) -> int:
        """Dimension of the group; 0 when it is finite."""
        return self.group.dim

    @property
    def holds(self) -> str:
        """Where the symmetry holds, in words."""
        return ("all inputs" if self.exact else "one batch") + (", the loss" if self.of == "loss" else "")

    @property
    def moved(self) -> tuple[str, ...]:
        """Those among `names` whose values change; of the others the gradients do."""
        return self.names

    def rank(self, params: Params) -> int:
        """The rank of the tangents at `params`, in float64: how many directions there are.

        It is below `dim` where factors overlap, as a low-rank term that the weight beside it absorbs, and the mixing of
        its two matrices. A dense matrix [dim, entries] is made for each set of factors that move common parameters.
        """
        return tangent_rank([self], params)

    def check(self, params: Params) -> None:
        """Refuse parameters that the action cannot move.

        Raises:
            TeleportError: when `params` is no dictionary.
            UnknownNameError: when a moved parameter is missing.
            ParameterError: when a moved parameter is not of a real floating-point type.
        """
        if not isinstance(params, Mapping):
            raise TeleportError("parameters by name", type(params).__name__, "pass dict(model.named_parameters())")
        for name in self.names:
            if name not in params:
                raise UnknownNameError("parameter", name, params)
            if not params[name].is_floating_point():
                remedy = "teleport before quantising, or leave it out of the symmetry"
                raise ParameterError(name, "of a real floating-point type", str(params[name].dtype), remedy)

    def to_dict(self) -> dict[str, Any]:
        """The symmetry as numbers and strings.

        Raises:
            TeleportError: when it belongs to one model and one batch.
        """
        remedy = "make it again from the model and the batch"
        raise TeleportError("a symmetry that can be saved", type(self).__name__, remedy)

    def _check_point(self, params: Params | None) -> None:
        if params is None and not self.linear:
            remedy = "pass the params to be moved, at which the tensors were taken"
            raise TeleportError("params, because the action is nonlinear", None, remedy)

    def _check_coordinates(self, params: Params, xi: Any) -> None:
        if not isinstance(xi, Tensor) or xi.shape != self.group.shape:
            raise ShapeError("xi", self.group.shape, describe_value(xi), "take xi from sample or zeros")

    def _widest_parameter(self, params: Params) -> Tensor:
        """The moved parameter of the widest type: in that one `xi` lives."""
        self.check(params)
        return max((params[name] for name in self.names), key=lambda p: torch.finfo(p.dtype).bits)

    def __str__(self) -> str:
        return ", ".join(self.names)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self}; {self.group}, dim {self.dim}, {self.holds})"


def _identity_coordinates(xi: Any) -> Any:
    """The coordinates of the identity, one for all that `vmap` runs together."""
    return tree_map(lambda x: torch.zeros(x.shape, dtype=x.dtype, device=x.device), xi)


def check_radius(radius: Any) -> float:
    """`radius` when it is a positive finite number.

    Raises:
        TeleportError: otherwise.
    """
    number = isinstance(radius, (int, float)) or (isinstance(radius, Tensor) and radius.numel() == 1)
    if not number or isinstance(radius, bool):
        raise TeleportError("a positive finite radius", describe_value(radius), "pass a number, such as radius=1.0")
    if not 0 < radius < float("inf"):
        remedy = "an orbit without a bound may have no best point: pass radius=1.0"
        raise TeleportError("a positive finite radius", radius, remedy if radius > 0 else "pass radius=1.0")
    return float(radius)
