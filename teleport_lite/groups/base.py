r"""Groups in coordinates: what a symmetry's `xi` means.

A Lie group is used through coordinates `xi` of its Lie algebra, with `exp` onto the group: `xi` and `-xi` give an
element and its inverse, zeros the identity, and the radius of `xi` is the operator norm, so that no direction is
stretched by more than $e^{radius}$. A finite group has the same verbs; its `xi` is the element itself.

Every group here acts on vectors of length `n`, and `along` lets it act on one dimension of a tensor. A tensor that
pairs with such vectors (the outgoing weights of neurons, the gradient with respect to incoming ones) transforms by
the dual representation $g \mapsto g^{-\top}$, whose coordinates `dual` gives. Derived in the chapter *Symmetries of
networks*.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from teleport_lite.errors import TeleportError


class Group(ABC):
    """A group acting on vectors of length `n`.

    Attributes:
        n: length of the vectors.
        dim: dimension of the group, 0 when it is finite.
        isometry: whether all elements preserve the Euclidean norm.
    """

    isometry = False

    def __init__(self, n: int) -> None:
        if n < 1:
            raise TeleportError("a group on vectors of length at least 1", n, "pass the width of the layer")
        self.n = n

    @property
    @abstractmethod
    def dim(self) -> int: ...

    @property
    @abstractmethod
    def symbol(self) -> str:
        """The group in the notation of the book, such as GL(16)."""

    @abstractmethod
    def zeros(self, like: Tensor) -> Tensor:
        """Coordinates of the identity, on the device and with the dtype of `like`."""

    @abstractmethod
    def exp(self, xi: Tensor) -> Tensor:
        """The element with coordinates `xi`."""

    @abstractmethod
    def compose(self, g: Tensor, h: Tensor) -> Tensor:
        """The element that acts as h, then g."""

    @abstractmethod
    def along(self, g: Tensor, tensor: Tensor, dim: int) -> Tensor:
        """`tensor` with `g` applied to dimension `dim`, of length n."""

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

    def norm(self, xi: Tensor) -> Tensor:
        """Operator norm of `xi`; zero for a finite group."""
        return xi.new_zeros((), dtype=torch.get_default_dtype())

    def clip(self, xi: Tensor, radius: float) -> Tensor:
        """The nearest coordinates with `norm` at most `radius`."""
        return xi

    def __repr__(self) -> str:
        return self.symbol

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and isinstance(other, Group) and self.n == other.n

    def __hash__(self) -> int:
        return hash((type(self), self.n))


def broadcast(vector: Tensor, tensor: Tensor, dim: int) -> Tensor:
    """`vector` [n] reshaped so that it multiplies dimension `dim` of `tensor`."""
    return vector.reshape([-1 if d == dim else 1 for d in range(tensor.ndim)])


def matmul_along(g: Tensor, tensor: Tensor, dim: int) -> Tensor:
    """`tensor` with the matrix `g` [n, n] applied to dimension `dim`."""
    return torch.tensordot(g, tensor, dims=([1], [dim])).movedim(0, dim)


def draw(distribution: Callable, *shape: int, like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Random numbers drawn where the generator lives, on the device and with the dtype of `like`."""
    device = like.device if generator is None else generator.device
    return distribution(shape, generator=generator, dtype=like.dtype, device=device).to(like.device)


def in_ball(direction: Tensor, length: Tensor, dim: int, radius: float, generator: torch.Generator | None) -> Tensor:
    """Coordinates along `direction`, of that `length`, with a norm drawn as for a uniform point of a ball."""
    norm = radius * draw(torch.rand, like=direction, generator=generator) ** (1 / dim)
    return direction * (norm / length)
