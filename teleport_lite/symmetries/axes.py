r"""Symmetries of hidden neurons: scaling, mixing, permutation and sign.

The neurons of one layer form an axis of length h. Incoming weights have it as output axis and transform by g,
outgoing weights pair with it and transform by $g^{-\top}$; between them stands an activation that commutes with g.
One `Leg` says where the axis shows up in one tensor, so that Linear and convolution layers, biases and tied
parameters are all the same case. Proved in the chapter *Symmetries of networks*.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from teleport_lite.errors import ShapeError, TeleportError
from teleport_lite.functional import Params
from teleport_lite.groups import (
    GeneralLinear,
    Group,
    PairRotations,
    Permutation,
    PositiveScaling,
    Shears,
    Signs,
    SpecialOrthogonal,
)
from teleport_lite.symmetries.base import SAVED, Symmetry

GROUPS = {g.kind: g for g in (PositiveScaling, GeneralLinear, SpecialOrthogonal, Shears, Permutation, Signs)}


@dataclass(frozen=True)
class Leg:
    r"""One place where the hidden axis shows up: dimension `dim` of parameter `name`, from entry `start` on.

    Args:
        name: name of the parameter.
        dim: its dimension along which the group acts.
        dual: False for incoming weights and biases (they transform by g), True for outgoing weights.
        start: first entry of the axis along that dimension, where it is a slice of a longer one.
        each: how many entries, side by side, belong to one neuron: the pixels of a channel after flattening.
        groups: number of parts of dimension 0, where the axis is dimension `dim` in one part after another: of a
            grouped convolution, or of a stack of matrices, as the experts of a mixture.
        run: how many entries of each part belong to the axis, from `start` on; 0 where it is a slice of all in a row.
        power: k where a scaling acts by $g^k$, as behind an activation that is homogeneous of degree k.
        offset: c where the group acts on c + w, as on the gain 1 + w of a norm: $w \mapsto g(c + w) - c$; or
            those of all entries, as where the identity is added to a matrix that a network writes.
        buffer: whether `name` is that of a buffer.
    """

    name: str
    dim: int
    dual: bool = False
    start: int = 0
    each: int = 1
    groups: int = 1
    run: int = 0
    power: float = 1.0
    offset: float | tuple[float, ...] = 0.0
    buffer: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.offset, (int, float)):  # which JSON gives as a list
            object.__setattr__(self, "offset", tuple(self.offset))

    @property
    def exponent(self) -> float:
        """The power of g that acts, negative for outgoing weights."""
        return -self.power if self.dual else self.power


class NeuronSymmetry(Symmetry):
    r"""A group acting on the hidden axis that the `legs` describe: $V \mapsto gV,\ b \mapsto gb,\ U \mapsto U g^{-1}$.

    Scalings may act on a leg by a power, as $U \mapsto U g^{-k}$ behind $\mathrm{ReLU}^k$. The gradient with respect to
    a leg transforms like its dual, so gradients are transported by the same code with dual coordinates. Legs of finite
    groups may be buffers, which have no gradients: they move where they are among the parameters.
    """

    gains: tuple[Leg | None, ...] = ()  # that the legs stand behind, which the group does not act on

    def __init__(self, group: Group, legs: Iterable[Leg]) -> None:
        self.group, self.legs = group, tuple(legs)
        if not self.legs:
            raise TeleportError("at least one leg", "none", "name the incoming and outgoing weights")
        self.names, self.buffers = (
            tuple(dict.fromkeys(leg.name for leg in self.legs if leg.buffer is kind)) for kind in (False, True)
        )
        if not self.names or (self.buffers and group.dim):
            remedy = "let a permutation or signs move buffers, along with a parameter"
            raise TeleportError("legs that are parameters, and buffers under finite groups only", self.buffers, remedy)
        self.monomial = isinstance(group, (PositiveScaling, Signs, Permutation))
        self.homogeneous = self.linear and not any(leg.offset for leg in self.legs)

    def move(self, params, xi):
        if (lost := self.missing(params)) and not torch.equal(xi, self.zeros(params)):
            remedy = "pass dict(model.named_parameters()) | dict(model.named_buffers())"
            raise TeleportError("the buffers that move along", f"none named {', '.join(lost)}", remedy)
        return self.moved_by(params, *self.group.pair(xi))

    def moved_by(self, params: Params, g: Tensor, dual: Tensor) -> Params:
        """`move`, by an element of the group and that of the dual representation."""
        return self._with_offsets(self._apply_to_legs(self._with_offsets(params, 1), g, dual), -1)

    def _with_offsets(self, params: Params, sign: int) -> Params:
        """`params` with the offsets of the legs added or taken away."""
        for leg in (leg for leg in self.legs if leg.offset):
            part = self.axis(params[leg.name], leg) + sign * self.offset_of(params[leg.name], leg)
            params = {**params, leg.name: self.put(params[leg.name], part, leg)}
        return params

    def _apply_to_legs(self, params: Params, g: Tensor, dual: Tensor) -> Params:
        """The entries that move, with `g` applied to the legs that are not dual and `dual` to those that are."""
        moved = {name: params[name] for name in (*self.names, *self.buffers) if name in params}
        for leg in (leg for leg in self.legs if leg.name in moved):
            moved[leg.name] = self.along(dual if leg.dual else g, moved[leg.name], leg)
        return moved

    def velocity(self, params: Params, xi: Tensor) -> Params:
        r"""The infinitesimal action $\dot V = MV,\ \dot b = Mb,\ \dot U = -UM$ with M the algebra element of `xi`."""
        m, dual = self.group.algebra(xi), self.group.algebra(self.group.dual(xi))
        found = {name: torch.zeros_like(params[name]) for name in self.names}
        for leg in self.legs:
            part = self.axis(params[leg.name], leg) + self.offset_of(params[leg.name], leg)
            part = leg.power * self.group.along((dual if leg.dual else m).to(part.device), part, 0)
            found[leg.name] = self.put(found[leg.name], self.axis(found[leg.name], leg) + part, leg)
        return found

    def transport(self, grads: Params, xi: Tensor, params: Params | None = None) -> Params:
        r"""Carry a gradient along: incoming weights by $g^{-\top}$, outgoing weights by g; see `Symmetry.transport`."""
        self.check(grads)
        self._check_coordinates(grads, xi)
        return {**grads, **self.carried_by(grads, *self.group.pair(xi))}

    def carried_by(self, grads: Params, g: Tensor, dual: Tensor) -> Params:
        """The moved entries of `transport`, by an element of the group and that of the dual representation."""
        return self._apply_to_legs(grads, dual, g)

    def spread(self, tensors, xi, entry, *, dual=True, params=None):
        self.check(tensors)
        self._check_coordinates(tensors, xi)
        pair = self.group.pair(xi)
        if not isinstance(self.group, Permutation):  # whose entries are 0 and 1
            pair = entry(pair[0]), entry(pair[1])
        return {**tensors, **self._apply_to_legs(tensors, *(reversed(pair) if dual else pair))}

    def check(self, params: Params) -> None:
        super().check(params)
        for leg in (leg for leg in (*self.legs, *filter(None, self.gains)) if leg.name in params):
            shape = params[leg.name].shape
            size = shape[leg.dim] * leg.groups if leg.dim < len(shape) else 0
            stop = leg.start + self.group.n * leg.each
            stop = stop if not leg.run else size if leg.start + leg.run <= shape[leg.dim] else size + 1
            if size < stop or (leg.groups > 1 and (leg.dim == 0 or shape[0] % leg.groups)):
                expected = f"at least {stop} along dimension {leg.dim}"
                raise ShapeError(leg.name, expected, tuple(shape), "pass the parameters that the symmetry was made for")

    def axis(self, tensor: Tensor, leg: Leg) -> Tensor:
        """The slice of a parameter-like tensor on which the group acts, with the hidden axis first: [n, ...]."""
        dim = leg.dim
        if leg.groups > 1:
            parts, dim = _axis_parts(tensor, leg), 0
            if leg.run:
                return parts.narrow(1, leg.start, leg.run).flatten(0, 1)
            tensor = parts.flatten(0, 1)
        part = tensor.narrow(dim, leg.start, self.group.n * leg.each)
        return (part if leg.each == 1 else part.unflatten(dim, (self.group.n, leg.each))).movedim(dim, 0)

    def offset_of(self, tensor: Tensor, leg: Leg) -> Tensor | float:
        """What is added to the `axis` of a parameter before the group acts."""
        if not isinstance(leg.offset, tuple):
            return leg.offset
        return self.axis(torch.tensor(leg.offset, dtype=tensor.dtype, device=tensor.device).view(tensor.shape), leg)

    def put(self, tensor: Tensor, part: Tensor, leg: Leg) -> Tensor:
        """`tensor` with `part` in place of its `axis`."""
        if leg.groups > 1:
            parts = _axis_parts(tensor, leg)
            if leg.run:
                new = part.unflatten(0, (leg.groups, -1))
                parts = parts.slice_scatter(new, 1, leg.start, leg.start + leg.run)
            else:
                parts = self.put(parts.flatten(0, 1), part, replace(leg, dim=0, groups=1)).view(parts.shape)
            return parts.movedim(1, leg.dim + 1).flatten(0, 1)
        part = part.movedim(0, leg.dim)
        part = part if leg.each == 1 else part.flatten(leg.dim, leg.dim + 1)
        if part.shape == tensor.shape:
            return part
        return tensor.slice_scatter(part, leg.dim, leg.start, leg.start + part.shape[leg.dim])

    def along(self, g: Tensor, tensor: Tensor, leg: Leg) -> Tensor:
        """`tensor` with `g`, or its power, applied to its slice of the hidden axis."""
        g = (g if leg.power == 1 else g**leg.power).to(tensor.device)
        if tensor.shape[leg.dim] == self.group.n and leg.groups == 1:
            return self.group.along(g, tensor, leg.dim)
        return self.put(tensor, self.group.along(g, self.axis(tensor, leg), 0), leg)

    def multiply_(self, g: Tensor, tensor: Tensor, leg: Leg) -> None:
        """`along`, in place."""
        if leg.groups > 1:
            tensor.copy_(self.along(g, tensor, leg))
        else:
            part = self.axis(tensor, leg)
            part.copy_(self.group.along(g if leg.power == 1 else g**leg.power, part, 0))

    def to_dict(self) -> dict[str, Any]:
        group = {"kind": self.group.kind, "n": self.group.n, "blocks": getattr(self.group, "blocks", 1)}
        own = vars(self.group)
        options = {key: own[key] for key in ("centered", "halves", "transposed") if key in own}
        return {"symmetry": "neurons", "group": group | options, "legs": [asdict(leg) for leg in self.legs]}

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> NeuronSymmetry:
        """What `to_dict` gave."""
        return cls(cls._group_of_kind(**saved["group"]), [Leg(**leg) for leg in saved["legs"]])

    @staticmethod
    def _group_of_kind(kind: str, n: int, blocks: int, **options: bool) -> Group:
        if kind == "mixing":
            return GeneralLinear(n // blocks, blocks)
        return PairRotations(n, **options) if "halves" in options else GROUPS[kind](n, **options)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, NeuronSymmetry):
            return False
        return (self.group, {*self.legs}, self.gains) == (other.group, {*other.legs}, other.gains)

    def __hash__(self) -> int:
        return hash((self.group, self.legs[0]))

    def __str__(self) -> str:
        sides = (dict.fromkeys(leg.name for leg in self.legs if leg.dual == dual) for dual in (False, True))
        return " -> ".join(", ".join(side) for side in sides if side)


SAVED["neurons"] = NeuronSymmetry


def _axis_parts(tensor: Tensor, leg: Leg) -> Tensor:
    """The parts of dimension 0, and then dimension `dim`: [groups, shape[dim], rows of a part, ...]."""
    return tensor.unflatten(0, (leg.groups, -1)).movedim(leg.dim + 1, 1)


def _dense_legs(incoming: str, outgoing: str, bias: str | None) -> list[Leg]:
    biases = [] if bias is None else [Leg(bias, 0)]
    return [Leg(incoming, 0), *biases, Leg(outgoing, 1, dual=True)]


def scaling(width: int, incoming: str, outgoing: str, bias: str | None = None) -> NeuronSymmetry:
    r"""Positive scaling of `width` neurons, $V \mapsto DV,\ b \mapsto Db,\ U \mapsto U D^{-1}$, D = diag(e^xi).

    Exact for positively homogeneous activations (ReLU, leaky ReLU, PReLU). Proposition 2.3 of the chapter *Symmetries
    of networks*.

    Args:
        width: number of hidden neurons h.
        incoming: name of V, `[h, in_features]` (or `[h, in_channels, ...]`).
        outgoing: name of U, `[out_features, h]`.
        bias: name of b, `[h]`.

    >>> scaling(16, "0.weight", "2.weight", bias="0.bias")
    NeuronSymmetry(0.weight, 0.bias -> 2.weight; (R>0)^16, dim 16, all inputs)
    """
    return NeuronSymmetry(PositiveScaling(width), _dense_legs(incoming, outgoing, bias))


def mixing(width: int, incoming: str, outgoing: str, bias: str | None = None) -> NeuronSymmetry:
    r"""Mixing of `width` neurons by GL(h), $V \mapsto gV,\ b \mapsto gb,\ U \mapsto U g^{-1}$ with $g = e^{\xi}$.

    Exact where no activation stands between the two layers. Arguments as for `scaling`.

    >>> mixing(8, "0.weight", "1.weight").dim
    64
    """
    return NeuronSymmetry(GeneralLinear(width), _dense_legs(incoming, outgoing, bias))


def permutation(width: int, incoming: str, outgoing: str, bias: str | None = None) -> NeuronSymmetry:
    r"""Permutation of `width` neurons, $V \mapsto PV,\ b \mapsto Pb,\ U \mapsto U P^{\top}$.

    Exact for every elementwise activation. Arguments as for `scaling`.

    >>> permutation(8, "0.weight", "2.weight").group
    S(8)
    """
    return NeuronSymmetry(Permutation(width), _dense_legs(incoming, outgoing, bias))


def sign(width: int, incoming: str, outgoing: str, bias: str | None = None) -> NeuronSymmetry:
    r"""Sign flips of `width` neurons, $V \mapsto SV,\ b \mapsto Sb,\ U \mapsto U S$.

    Exact for odd activations (tanh, erf, sin). Arguments as for `scaling`.

    >>> sign(8, "0.weight", "2.weight").group
    {1,-1}^8
    """
    return NeuronSymmetry(Signs(width), _dense_legs(incoming, outgoing, bias))
