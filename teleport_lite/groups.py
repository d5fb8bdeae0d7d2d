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

import math
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


class PositiveScaling(Group):
    r"""$(\mathbb R_{>0})^n$: `xi` of shape [n], acting by $x_i \mapsto e^{\xi_i} x_i$.

    >>> group, one = PositiveScaling(2), torch.ones(2)
    >>> group.along(group.exp(torch.tensor([0.0, 2.0]).log1p()), one, 0)
    tensor([1., 3.])
    """

    @property
    def dim(self) -> int:
        return self.n

    @property
    def symbol(self) -> str:
        return f"(R>0)^{self.n}"

    def zeros(self, like):
        return like.new_zeros(self.n)

    def exp(self, xi):
        return xi.exp()

    def compose(self, g, h):
        return g * h

    def along(self, g, tensor, dim):
        return tensor * _broadcast(g, tensor, dim)

    def sample(self, like, *, radius=1.0, generator=None):
        return radius * (2 * _draw(torch.rand, self.n, like=like, generator=generator) - 1)

    def dual(self, xi):
        return -xi

    def norm(self, xi):
        return xi.abs().amax()

    def clip(self, xi, radius):
        return xi.clamp(-radius, radius)

    def gram(self, tensor: Tensor, dim: int) -> Tensor:
        """Squared length of each slice of `tensor` along `dim`: shape [n]."""
        return tensor.movedim(dim, 0).reshape(self.n, -1).square().sum(1)

    def extremum(self, up: Tensor, down: Tensor, *, maximize: bool, radius: float) -> Tensor:
        r"""Extremise $\sum_i u_i e^{2\xi_i} + d_i e^{-2\xi_i}$ over $|\xi_i| \le r$, in closed form.

        Convex in each coordinate: the maximum is at the corner $\pm r$ on the side of the larger coefficient, the
        minimum at $\tfrac14 \log(d_i / u_i)$, clipped. A coordinate with both coefficients zero stays at zero.

        >>> PositiveScaling(1).extremum(torch.tensor([1.0]), torch.tensor([16.0]), maximize=False, radius=1.0)
        tensor([0.6931])
        """
        if maximize:
            return radius * torch.where((up == 0) & (down == 0), 0.0, torch.where(up >= down, 1.0, -1.0)).to(up)
        return ((down.log() - up.log()) / 4).nan_to_num(0.0, radius, -radius).clamp(-radius, radius)


class GeneralLinear(Group):
    r"""The identity component of $GL(n)$: `xi` of shape [n, n], acting by $x \mapsto e^{\xi} x$.

    Args:
        n: size of a block.
        blocks: with more than one, the group $GL(n)^{blocks}$ of block-diagonal matrices, such as the heads of an
            attention layer: `xi` has shape [blocks, n, n] and acts on vectors of length blocks * n.

    >>> group = GeneralLinear(2)
    >>> group.exp(group.zeros(torch.ones(1)))
    tensor([[1., 0.],
            [0., 1.]])
    >>> GeneralLinear(2, blocks=3), GeneralLinear(2, blocks=3).dim
    (GL(2)^3, 12)
    """

    def __init__(self, n: int, blocks: int = 1) -> None:
        super().__init__(n * blocks)
        self.blocks = blocks
        self.shape = (n, n) if blocks == 1 else (blocks, n, n)

    @property
    def dim(self) -> int:
        return math.prod(self.shape)

    @property
    def symbol(self) -> str:
        return f"GL({self.shape[-1]})" + (f"^{self.blocks}" if self.blocks > 1 else "")

    def zeros(self, like):
        return like.new_zeros(self.shape)

    def exp(self, xi):
        return torch.linalg.matrix_exp(xi)

    def compose(self, g, h):
        return g @ h

    def along(self, g, tensor, dim):
        if self.blocks == 1:
            return _matmul_along(g, tensor, dim)
        first = tensor.movedim(dim, 0)
        return (g @ self._rows(first)).reshape(first.shape).movedim(0, dim)

    def sample(self, like, *, radius=1.0, generator=None):
        drawn = [_draw(torch.randn, *self.shape[-2:], like=like, generator=generator) for _ in range(self.blocks)]
        size = self.shape[-1] ** 2
        balls = [_in_ball(x, torch.linalg.matrix_norm(x, 2), size, radius, generator) for x in drawn]
        return torch.stack(balls).view(self.shape)

    def dual(self, xi):
        return -xi.mT

    def norm(self, xi):
        return torch.linalg.matrix_norm(xi, 2).amax()

    def clip(self, xi, radius):
        u, s, vh = torch.linalg.svd(xi)
        return u * s.clamp(max=radius).unsqueeze(-2) @ vh

    def gram(self, tensor: Tensor, dim: int) -> Tensor:
        r"""Inner products of the slices of `tensor` along `dim`: $T T^\top$, block by block, shaped like `xi`."""
        rows = self._rows(tensor.movedim(dim, 0))
        return rows @ rows.mT

    def _rows(self, tensor: Tensor) -> Tensor:
        """`tensor` [blocks * n, ...] as matrices [n, rest], one a block."""
        return tensor.reshape(*self.shape[:-1], -1)

    def extremum(self, up: Tensor, down: Tensor, *, maximize: bool, radius: float) -> Tensor:
        r"""Extremise $\mathrm{tr}(A M) + \mathrm{tr}(B M^{-1})$ over $M = e^{2\xi}$, $\xi$ symmetric, $\|\xi\| \le r$.

        Convex in M. The maximum is attained where all eigenvalues of $\xi$ are $\pm r$, with the sign of those of
        $A - B$ (a direction in which both vanish stays). The minimum is the geometric mean $M = A^{-1} \# B$; where
        that leaves the ball, or A is singular, its eigenvalues are clipped, which is close to the minimum within the
        ball and not equal to it. Proposition 4.5 of the chapter *Teleporting*. (A = `up`, B = `down`.)
        """
        if maximize:
            values, vectors = torch.linalg.eigh(up - down)
            sizes = (vectors * ((up + down) @ vectors)).sum(-2)
            dead = sizes <= 100 * torch.finfo(sizes.dtype).eps * sizes.amax(-1, keepdim=True)
            signs = torch.where(dead, 0.0, torch.where(values >= 0, radius, -radius))
            return (vectors * signs.to(vectors).unsqueeze(-2)) @ vectors.mT
        root, inverse = _roots(up)
        middle, _ = _roots(root @ down @ root)
        values, vectors = torch.linalg.eigh(inverse @ middle @ inverse)
        logs = (values.clamp(min=0).log() / 2).nan_to_num(0.0, radius, -radius).clamp(-radius, radius)
        return (vectors * logs.unsqueeze(-2)) @ vectors.mT

    def __eq__(self, other: object) -> bool:
        return super().__eq__(other) and isinstance(other, GeneralLinear) and self.shape == other.shape

    def __hash__(self) -> int:
        return super().__hash__()


class SpecialOrthogonal(Group):
    r"""$SO(n)$: `xi` of shape [n(n-1)/2], the lower triangle of a skew matrix; for n = 2 the angle.

    >>> group = SpecialOrthogonal(2)
    >>> group.exp(torch.tensor([torch.pi / 2])).round().abs()
    tensor([[0., 1.],
            [1., 0.]])
    """

    isometry = True

    @property
    def dim(self) -> int:
        return self.n * (self.n - 1) // 2

    @property
    def symbol(self) -> str:
        return f"SO({self.n})"

    def zeros(self, like):
        return like.new_zeros(self.dim)

    def algebra(self, xi):
        i, j = torch.tril_indices(self.n, self.n, -1, device=xi.device)
        lower = xi.new_zeros(self.n, self.n).index_put((i, j), xi)
        return lower - lower.mT

    def exp(self, xi):
        return torch.linalg.matrix_exp(self.algebra(xi))

    def compose(self, g, h):
        return g @ h

    def along(self, g, tensor, dim):
        return _matmul_along(g, tensor, dim)

    def sample(self, like, *, radius=1.0, generator=None):
        drawn = _draw(torch.randn, self.dim, like=like, generator=generator)
        return _in_ball(drawn, self.norm(drawn), self.dim, radius, generator)

    def norm(self, xi):
        return torch.linalg.matrix_norm(self.algebra(xi), 2)

    def clip(self, xi, radius):
        return xi * (radius / self.norm(xi).clamp(min=radius))


class Permutation(Group):
    """The permutations of n things: `xi` is the index tensor [n] itself, acting by x -> x[xi].

    >>> group = Permutation(3)
    >>> cycle = torch.tensor([1, 2, 0])
    >>> group.along(cycle, torch.tensor([10, 20, 30]), 0), group.inverse(cycle)
    (tensor([20, 30, 10]), tensor([2, 0, 1]))
    """

    isometry = True
    dim = 0

    @property
    def symbol(self) -> str:
        return f"S({self.n})"

    def zeros(self, like):
        return torch.arange(self.n, device=like.device)

    def exp(self, xi):
        return xi

    def compose(self, g, h):
        return h[g]

    def along(self, g, tensor, dim):
        return tensor.index_select(dim, g)

    def sample(self, like, *, radius=1.0, generator=None):
        return _draw(torch.rand, self.n, like=like, generator=generator).argsort()

    def inverse(self, xi):
        return xi.argsort()


class Signs(Group):
    r"""$\{+1, -1\}^n$: `xi` is the tensor [n] of signs itself, acting by $x_i \mapsto \xi_i x_i$.

    >>> group = Signs(2)
    >>> group.along(torch.tensor([1.0, -1.0]), torch.ones(2), 0)
    tensor([ 1., -1.])
    """

    isometry = True
    dim = 0

    @property
    def symbol(self) -> str:
        return f"{{1,-1}}^{self.n}"

    def zeros(self, like):
        return like.new_ones(self.n)

    def exp(self, xi):
        return xi

    def compose(self, g, h):
        return g * h

    def along(self, g, tensor, dim):
        return tensor * _broadcast(g, tensor, dim)

    def sample(self, like, *, radius=1.0, generator=None):
        return torch.where(_draw(torch.rand, self.n, like=like, generator=generator) < 0.5, -1.0, 1.0).to(like)

    def inverse(self, xi):
        return xi


def _broadcast(vector: Tensor, tensor: Tensor, dim: int) -> Tensor:
    """`vector` [n] reshaped so that it multiplies dimension `dim` of `tensor`."""
    return vector.reshape([-1 if d == dim else 1 for d in range(tensor.ndim)])


def _matmul_along(g: Tensor, tensor: Tensor, dim: int) -> Tensor:
    return torch.tensordot(g, tensor, dims=([1], [dim])).movedim(0, dim)


def _draw(distribution: Callable, *shape: int, like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Random numbers drawn where the generator lives, on the device and with the dtype of `like`."""
    device = like.device if generator is None else generator.device
    return distribution(shape, generator=generator, dtype=like.dtype, device=device).to(like.device)


def _in_ball(direction: Tensor, length: Tensor, dim: int, radius: float, generator: torch.Generator | None) -> Tensor:
    """Coordinates along `direction`, of that `length`, with a norm drawn as for a uniform point of a ball."""
    norm = radius * _draw(torch.rand, like=direction, generator=generator) ** (1 / dim)
    return direction * (norm / length)


def _roots(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Square root of a positive semidefinite matrix and the inverse of that root (infinite eigenvalues kept finite)."""
    values, vectors = torch.linalg.eigh(matrix)
    root = values.clamp(min=values.amax(-1, keepdim=True) * torch.finfo(values.dtype).eps).sqrt().unsqueeze(-2)
    return (vectors * root) @ vectors.mT, (vectors / root) @ vectors.mT
