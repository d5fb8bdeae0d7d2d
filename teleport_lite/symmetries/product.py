"""Several symmetries as one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import register_pytree_node

from teleport_lite.errors import TeleportError, UnknownNameError
from teleport_lite.functional import Params
from teleport_lite.groups.base import element_pairs
from teleport_lite.runtime import describe_value
from teleport_lite.symmetries.axes import NeuronSymmetry
from teleport_lite.symmetries.base import KINDS, SAVED, Symmetry
from teleport_lite.symmetries.rank import tangent_rank
from teleport_lite.symmetries.shifts import Shift


class Inverse(tuple):
    """Coordinates of the factors of a product, for an element that applies them last to first."""


register_pytree_node(Inverse, lambda xi: (list(xi), None), lambda xi, _: Inverse(xi))


class Product(Symmetry, Sequence):
    """Several symmetries, applied one after the other; `xi` is the tuple of their coordinates.

    Args:
        factors: the symmetries; products among them are flattened.
        reasons: why something was left out, for people to read.
        overlap: how many dimensions are counted twice, as far as that is known.

    Raises:
        TeleportError: when a factor is no symmetry.

    >>> Product([])
    Product of 0 symmetries, dim 0
    """

    def __init__(self, factors: Iterable[Symmetry], reasons: Iterable[str] = (), overlap: int = 0) -> None:
        self.factors: tuple[Symmetry, ...] = tuple(
            leaf for f in factors for leaf in (f.factors if isinstance(f, Product) else (f,))
        )
        for factor in self.factors:
            if not isinstance(factor, Symmetry):
                raise TeleportError("symmetries as factors", repr(factor), "pass what teleport_lite.symmetries makes")
        self.reasons, self.overlap = tuple(reasons), overlap
        self.names = tuple(dict.fromkeys(name for f in self.factors for name in f.names))
        self.buffers = tuple(dict.fromkeys(name for f in self.factors for name in f.buffers))
        self.of = "loss" if any(f.of == "loss" for f in self.factors) else "outputs"
        self.exact = all(f.exact for f in self.factors)
        self.linear = all(f.linear for f in self.factors)
        self.homogeneous = all(f.homogeneous for f in self.factors)
        self.monomial = all(f.monomial for f in self.factors)

    def _factor_steps(self, xi: Any) -> list[tuple[Symmetry, Any]]:
        """The factors with their coordinates, in the order in which they are applied."""
        steps = list(zip(self.factors, xi, strict=True))
        return steps[::-1] if isinstance(xi, Inverse) else steps

    def _factor_elements(self, params: Params, xi: Any) -> list[tuple[Any, Any, tuple[Tensor, Tensor] | None]]:
        """The `_factor_steps`, with the elements of linear actions by matrices, exponentials taken together."""
        steps, linear, together = self._factor_steps(xi), [], []
        for factor, x in steps:
            own = isinstance(factor, NeuronSymmetry) and factor.linear and factor.group.matrices
            if own:
                factor.check(params)
                factor._check_coordinates(params, x)
                linear.append((factor.group, x))
            together.append(own)
        found = iter(element_pairs(*zip(*linear, strict=True)) if linear else ())
        return [(f, x, next(found) if own else None) for (f, x), own in zip(steps, together, strict=True)]

    def move(self, params, xi):
        for factor, x, pair in self._factor_elements(params, xi):
            params = {**params, **factor.moved_by(params, *pair)} if pair else factor.act(params, x)
        return {name: params[name] for name in (*self.names, *self.buffers) if name in params}

    def transport(self, grads, xi, params=None):
        self._check_coordinates(grads, xi)
        for factor, x, pair in self._factor_elements(grads, xi):
            grads = {**grads, **factor.carried_by(grads, *pair)} if pair else factor.transport(grads, x, params)
            params = None if params is None else factor.act(params, x)
        return grads

    def spread(self, tensors, xi, entry, *, dual=True, params=None):
        return self._carry_through(lambda f, t, x, p: f.spread(t, x, entry, dual=dual, params=p), tensors, xi, params)

    def _carry_through(self, carry: Callable[..., Params], tensors: Params, xi: Any, params: Params | None) -> Params:
        """`carry` by one factor after the other, from where those before have moved the parameters."""
        self._check_coordinates(tensors, xi)
        for factor, x in self._factor_steps(xi):
            tensors = carry(factor, tensors, x, params)
            params = None if params is None else factor.act(params, x)
        return tensors

    def jet(self, params, xi):
        if len(self) == 1:
            return self[0].jet(params, xi[0])
        if not all(f.homogeneous or isinstance(f, Shift) for f in self.factors):
            return super().jet(params, xi)
        zero = {name: torch.zeros_like(params[name]) for name in self.names}
        first, second = zero, zero
        for factor, x in self._factor_steps(xi):  # (e^{tA} w(t))'' = w'' + 2 A w' + A A w
            once, twice = factor.jet(params, x)
            cross = factor.bend(params, x, first) if isinstance(factor, Shift) else factor.velocity(first, x)
            first = {**first, **{n: first[n] + once[n] for n in once}}
            second = {**second, **{n: second[n] + 2 * cross[n] + twice[n] for n in once}}
        return first, second

    def zeros(self, params):
        return tuple(f.zeros(params) for f in self.factors)

    def sample(self, params, *, radius=1.0, generator=None):
        return tuple(f.sample(params, radius=radius, generator=generator) for f in self.factors)

    def inverse(self, xi):
        """Coordinates of the inverse element: those of the inverses of the factors, applied last to first."""
        parts = [f.inverse(x) for f, x in zip(self.factors, xi, strict=True)]
        return tuple(parts) if isinstance(xi, Inverse) else Inverse(parts)

    def select(self, kind: str | None = None, name: str | None = None) -> Product:
        """The factors of one kind, and those that move a parameter or buffer whose name matches a pattern.

        Args:
            kind: "scaling", "mixing", "rotation", "shear", "translation", "permutation" or "sign".
            name: a pattern with * and ?, as for file names.

        Raises:
            UnknownNameError: when there is no such kind, or when a name that is no pattern is not moved.

        >>> from teleport_lite.symmetries import permutation, scaling
        >>> product = Product([scaling(4, "0.weight", "2.weight"), permutation(4, "0.weight", "2.weight")])
        >>> product.select(kind="scaling", name="0.*").dim, len(product.select(name="1.*"))
        (4, 0)
        """
        if kind is not None and kind not in KINDS:
            raise UnknownNameError("kind", kind, KINDS)
        moved = (*self.names, *self.buffers)
        if name is not None and name not in moved and not set("*?[") & set(name):
            raise UnknownNameError("parameter that moves, or a pattern such as '0.*'", name, moved)
        found = [
            f
            for f in self.factors
            if (kind is None or f.group.kind == kind)
            and (name is None or any(fnmatchcase(n, name) for n in (*f.names, *f.buffers)))
        ]
        asked = [f"kind {kind!r}" if kind else "", f"name {name!r}" if name else ""]
        return Product(found, self.reasons if found else [f"no factor of {' and '.join(filter(None, asked))}"])

    def to_dict(self) -> dict[str, Any]:
        """The product as numbers and strings, for `from_dict`.

        Raises:
            TeleportError: when a factor belongs to one model and one batch.
        """
        factors = [f.to_dict() for f in self.factors]
        return {"factors": factors, "reasons": list(self.reasons), "overlap": self.overlap}

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> Product:
        """What `to_dict` gave.

        Raises:
            TeleportError: when it is something else.

        >>> from teleport_lite.symmetries import scaling
        >>> product = Product([scaling(4, "0.weight", "2.weight")])
        >>> Product.from_dict(product.to_dict()) == product
        True
        """
        try:
            factors = [SAVED[f["symmetry"]].from_dict(f) for f in saved["factors"]]
            return cls(factors, saved["reasons"], saved.get("overlap", 0))
        except (KeyError, TypeError) as error:
            remedy = "pass what Product.to_dict gave, of this version or an older one"
            raise TeleportError("a saved product", f"{type(error).__name__}: {error}", remedy) from error

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Product) and self.factors == other.factors

    def __hash__(self) -> int:
        return hash(self.factors)

    @property
    def dim(self) -> int:
        return sum(f.dim for f in self.factors)

    @property
    def moved(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for f in self.factors for name in f.moved))

    def rank(self, params: Params) -> int:
        return tangent_rank(self.factors, params)

    @property
    def continuous(self) -> Product:
        """The factors whose group is not finite."""
        return Product([f for f in self.factors if f.dim], self.reasons)

    def _check_coordinates(self, params, xi):
        if not isinstance(xi, (tuple, list)) or len(xi) != len(self.factors):
            raise TeleportError(
                f"xi to be a tuple of {len(self)} tensors", describe_value(xi), "take xi from sample or zeros"
            )

    def __len__(self) -> int:
        return len(self.factors)

    def __iter__(self) -> Iterator[Symmetry]:
        return iter(self.factors)

    def __getitem__(self, index):
        found = self.factors[index]
        return Product(found) if isinstance(index, slice) else found

    def __repr__(self) -> str:
        head = f"Product of {len(self)} symmetr{'y' if len(self) == 1 else 'ies'}, dim {self.dim}"
        head += f", rank {self.dim - self.overlap}" if self.overlap else ""
        rows = [("parameters", "group", "dim", "holds on")]
        rows += [(_abbreviate_names(str(f)), str(f.group), str(f.dim), f.holds) for f in self.factors]
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        table = ["  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        notes = [f"  left out: {reason}" for reason in self.reasons]
        return "\n".join([head, *(table if self.factors else []), *notes])

    __str__ = __repr__


def _abbreviate_names(names: str) -> str:
    """Names in two lists, each of at most four, or shortened.

    >>> _abbreviate_names("a, b, c, d, e -> f, g")
    'a, b, ... 2 more, e -> f, g'
    """
    sides = (side.split(", ") for side in names.split(" -> "))
    return " -> ".join(
        ", ".join(side if len(side) <= 4 else [*side[:2], f"... {len(side) - 3} more", side[-1]]) for side in sides
    )


def check_symmetry(symmetry: object) -> Product:
    """`symmetry` as a product.

    Raises:
        TeleportError: when it is no symmetry.

    >>> check_symmetry("gradient_norm")
    Traceback (most recent call last):
    teleport_lite.errors.TeleportError: expected a symmetry, got 'gradient_norm'; pass what find_symmetries gives; \
the objective is passed as objective=...
    """
    if isinstance(symmetry, Product):
        return symmetry
    if isinstance(symmetry, Symmetry):
        return Product([symmetry])
    listed = isinstance(symmetry, (list, tuple)) and all(isinstance(f, Symmetry) for f in symmetry)
    remedy = "pass what find_symmetries gives; the objective is passed as objective=..."
    got = f"a {type(symmetry).__name__} of symmetries" if listed else describe_value(symmetry)
    raise TeleportError("a symmetry", got, "pass tl.Product(...) of them" if listed else remedy)
