r"""Groups in coordinates: what a symmetry's `xi` means.

A Lie group is used through coordinates `xi` of its Lie algebra, with `exp` onto the group: `xi` and `-xi` give an
element and its inverse, zeros the identity, and the radius of `xi` is the operator norm, so that each element stretches
no direction by more than $e^{radius}$. A finite group has the same verbs; its `xi` is the element itself.

Every group here acts on vectors of length `n`, and `along` lets it act on one dimension of a tensor. A tensor that
pairs with such vectors (the outgoing weights of neurons, the gradient with respect to incoming ones) transforms by
the dual representation $g \mapsto g^{-\top}$, whose coordinates `dual` gives. Derived in the chapter *Symmetries of
networks*.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from teleport_lite.errors import TeleportError
from teleport_lite.runtime import check_generator

TOGETHER = 8  # matrices
SQUARINGS = 10  # of matrices, on a device


class Group(ABC):
    """A group acting on vectors of length `n`.

    Attributes:
        n: length of the vectors.
        shape: of the coordinates.
        dim: dimension of the group, 0 when it is finite.
        isometry: whether all elements preserve the Euclidean norm.
        matrices: whether `exp` is that of the matrices which `algebra` gives.
        kind: what its elements do, in one word.
    """

    isometry = False
    matrices = False
    kind: str

    def __init__(self, n: int) -> None:
        if n < 1:
            raise TeleportError("a group on vectors of length at least 1", n, "pass the width of the layer")
        self.n = n

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.n,)

    @property
    def dim(self) -> int:
        return math.prod(self.shape)

    @property
    @abstractmethod
    def symbol(self) -> str:
        """The group in the notation of the book, such as GL(16)."""

    def zeros(self, like: Tensor) -> Tensor:
        """Coordinates of the identity, on the device and with the dtype of `like`, but in float32 at least."""
        return like.new_zeros(self.shape, dtype=element_dtype(like.dtype))

    def exp(self, xi: Tensor) -> Tensor:
        """The element with coordinates `xi`."""
        return xi

    @abstractmethod
    def compose(self, g: Tensor, h: Tensor) -> Tensor:
        """The element that acts as h, then g."""

    @abstractmethod
    def along(self, g: Tensor, tensor: Tensor, dim: int) -> Tensor:
        """`tensor` with `g` applied to dimension `dim`, of length n; its dtype stays."""

    @abstractmethod
    def sample(self, like: Tensor, *, radius: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """Random coordinates with `norm` at most `radius`; a finite group draws uniformly from all its elements."""

    def inverse(self, xi: Tensor) -> Tensor:
        """Coordinates of the inverse element."""
        return -xi

    def algebra(self, xi: Tensor) -> Tensor:
        """The element of the Lie algebra with coordinates `xi`, in the form that `exp` gives and `along` takes."""
        return xi

    def dual(self, xi: Tensor) -> Tensor:
        r"""Coordinates of $g^{-\top}$, the element of the dual representation."""
        return xi

    def pair(self, xi: Tensor) -> tuple[Tensor, Tensor]:
        """The element with coordinates `xi`, and that of the dual representation."""
        return element_pairs([self], [xi])[0]

    def norm(self, xi: Tensor) -> Tensor:
        """Operator norm of `xi`; zero for a finite group."""
        return xi.new_zeros((), dtype=torch.get_default_dtype())

    def clip(self, xi: Tensor, radius: float) -> Tensor:
        """The nearest coordinates with `norm` at most `radius`; of a finite group, all."""
        return xi * (radius / self.norm(xi).clamp(min=radius)) if self.dim else xi

    def __repr__(self) -> str:
        return self.symbol

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash((type(self), self.n))


def element_pairs(groups: Sequence[Group], xis: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """What `group.pair(xi)` gives for each group; the exponentials of matrices of one size are taken together.

    At most about `TOGETHER` of them, for each is held several times while it is computed.
    """
    found: list[Any] = [None] * len(groups)
    sizes: dict[Any, list[tuple[int, Tensor]]] = defaultdict(list)
    counts: Counter[Any] = Counter()
    for k, (group, xi) in enumerate(zip(groups, xis, strict=True)):
        dual = group.dual(xi)
        both = [xi] if dual is xi else [xi, dual]
        if group.matrices:
            matrices = torch.stack([group.algebra(x) for x in both])
            key = matrices.shape[-1], xi.dtype, xi.device
            sizes[key, counts[key] // TOGETHER].append((k, matrices))
            counts[key] += matrices[..., 0, 0].numel()
        else:
            found[k] = [group.exp(x) for x in both]
    for same in sizes.values():
        flat = torch.cat([m.flatten(0, -3) for _, m in same])
        parts = matrix_exp(flat).split([m[..., 0, 0].numel() for _, m in same])
        for (k, m), part in zip(same, parts, strict=True):
            found[k] = part.view(m.shape).unbind()
    return [(pair[0], pair[-1]) for pair in found]


def element_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """The type in which elements live that act on tensors of these types: float32 at least.

    >>> element_dtype(torch.bfloat16), element_dtype(torch.bfloat16, torch.float64)
    (torch.float32, torch.float64)
    """
    return functools.reduce(torch.promote_types, dtypes, torch.float32)


def multiply_along(vector: Tensor, tensor: Tensor, dim: int) -> Tensor:
    """`tensor`, multiplied along dimension `dim` by `vector` [n]; its dtype stays."""
    shaped = vector.reshape([-1 if d == dim else 1 for d in range(tensor.ndim)])
    return (tensor * shaped).to(tensor.dtype)


def matmul_along(g: Tensor, tensor: Tensor, dim: int) -> Tensor:
    """`tensor` with the matrix `g` [n, n] applied to dimension `dim`; its dtype stays."""
    g, x = same_dtype(g, tensor)
    return torch.tensordot(g, x, dims=([1], [dim])).movedim(0, dim).to(tensor.dtype)


def same_dtype(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both tensors in the wider of their types."""
    dtype = torch.promote_types(a.dtype, b.dtype)
    return a.to(dtype), b.to(dtype)


def matrix_exp(x: Tensor) -> Tensor:
    r"""$e^x$ of matrices [..., n, n]; on a device by a fixed course, for torch waits there to choose one.

    Taylor's series at $x / 2^s$, of norm at most 1, squared s times, s at most `SQUARINGS`. The series, of degree 19,
    is $p_0 + y (p_1 + y (p_2 + y p_3))$ with $y = x^5$ and polynomials of degree 4 (Paterson and Stockmeyer, 1973).
    """
    if x.device.type == "cpu":
        return torch.linalg.matrix_exp(x)
    flat = x.reshape(-1, *x.shape[-2:])
    size = flat.detach().abs().sum(-1).amax(-1)[:, None, None]
    squarings = size.log2().ceil().clamp(0, SQUARINGS)
    small, one = flat * (-squarings).exp2(), torch.eye(x.shape[-1], dtype=x.dtype, device=x.device).expand_as(flat)
    square = small @ small
    third, fourth = torch.stack([small, square]) @ square
    fifth, powers = fourth @ small, torch.stack([one, small, square, third, fourth])
    inverse = torch.arange(20, dtype=x.dtype, device=x.device).clamp(min=1).cumprod(0).reciprocal()  # 1 / k!
    parts = torch.tensordot(inverse.view(4, 5), powers, 1)
    power = parts[3]
    for k in (2, 1, 0):
        power = torch.baddbmm(parts[k], fifth, power)
    for k in range(SQUARINGS):
        power = power @ torch.where(k < squarings, power, one)
    return power.view_as(x)


def spectral_norm(x: Tensor) -> Tensor:
    r"""The largest singular values of matrices [..., n, n]; on a device, without waiting for it, bounds from above.

    There it is $\lVert (x^\top x)^{2^k} \rVert_F^{2^{-k}}$, its root, which is too large by at most $n^{2^{-k-2}}$.
    """
    if x.device.type == "cpu":
        return torch.linalg.matrix_norm(x, 2)
    gram, logs = x.mT @ x, []
    for _ in range(SQUARINGS):
        size = torch.linalg.vector_norm(gram, dim=(-2, -1), keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
        gram = (gram / size) @ (gram / size)
        logs.append(size[..., 0, 0].log())
    return functools.reduce(lambda total, log: total / 2 + log, reversed(logs)).div(2).exp()


def draw_like(distribution: Callable, *shape: int, like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Random numbers drawn where the generator lives, on the device of `like`, in float32 at least."""
    generator = check_generator(generator)
    device = like.device if generator is None else generator.device
    drawn = distribution(shape, generator=generator, dtype=element_dtype(like.dtype), device=device)
    return drawn.to(like.device, non_blocking=True)


def in_ball(direction: Tensor, length: Tensor, dim: int, radius: float, generator: torch.Generator | None) -> Tensor:
    """Coordinates along `direction`, of that `length`, with a norm drawn as for a uniform point of a ball."""
    norm = radius * draw_like(torch.rand, *length.shape, like=direction, generator=generator) ** (1 / dim)
    return direction * (norm / length)
