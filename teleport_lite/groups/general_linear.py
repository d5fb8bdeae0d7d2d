"""Invertible matrices, one block or several."""

from __future__ import annotations

import torch
from torch import Tensor

from teleport_lite.groups.base import Group, draw_like, in_ball, matmul_along, matrix_exp, same_dtype, spectral_norm


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

    kind = "mixing"
    matrices = True

    def __init__(self, n: int, blocks: int = 1) -> None:
        super().__init__(n * blocks)
        self.blocks = blocks

    @property
    def shape(self) -> tuple[int, ...]:
        size = self.n // self.blocks
        return (size, size) if self.blocks == 1 else (self.blocks, size, size)

    @property
    def symbol(self) -> str:
        return f"GL({self.shape[-1]})" + (f"^{self.blocks}" if self.blocks > 1 else "")

    def exp(self, xi):
        return matrix_exp(xi)

    def compose(self, g, h):
        return g @ h

    def along(self, g, tensor, dim):
        if self.blocks == 1:
            return matmul_along(g, tensor, dim)
        g, first = same_dtype(g, tensor.movedim(dim, 0))
        return (g @ self._block_rows(first)).reshape(first.shape).movedim(0, dim).to(tensor.dtype)

    def sample(self, like, *, radius=1.0, generator=None):
        drawn = [draw_like(torch.randn, *self.shape[-2:], like=like, generator=generator) for _ in range(self.blocks)]
        x, size = torch.stack(drawn), self.shape[-1] ** 2
        return in_ball(x, spectral_norm(x)[:, None, None], size, radius, generator).view(self.shape)

    def dual(self, xi):
        return -xi.mT

    def norm(self, xi):
        return spectral_norm(xi).amax()

    def clip(self, xi, radius):
        u, s, vh = torch.linalg.svd(xi.cpu())
        return (u * s.clamp(max=radius).unsqueeze(-2) @ vh).to(xi.device, non_blocking=True)

    def gram(self, tensor: Tensor, dim: int) -> Tensor:
        r"""Inner products of the slices of `tensor` along `dim`: $T T^\top$, block by block, shaped like `xi`."""
        rows = self._block_rows(tensor.movedim(dim, 0))
        return rows @ rows.mT

    def _block_rows(self, tensor: Tensor) -> Tensor:
        """`tensor` [blocks * n, ...] as matrices [n, rest], one a block."""
        return tensor.reshape(*self.shape[:-1], -1)

    def extremum(self, up: Tensor, down: Tensor, *, maximize: bool, radius: float) -> Tensor:
        r"""Extremise $\mathrm{tr}(A M) + \mathrm{tr}(B M^{-1})$ over $M = e^{2\xi}$, $\xi$ symmetric, $\|\xi\| \le r$.

        Convex in M. The maximum is attained where all eigenvalues of $\xi$ are $\pm r$, with the sign of those of
        $A - B$ (a direction in which both vanish stays). The minimum is the geometric mean $M = A^{-1} \# B$; where
        that leaves the ball its eigenvalues are clipped, which is close to the minimum within the ball and not equal to
        it. Where A or B is singular there is no minimum: M is the identity on their kernels, and the geometric mean on
        the complement of these. Proposition 4.5 of the chapter *Teleporting*. (A = `up`, B = `down`.)

        On the CPU, in float64 for a minimum: a device is waited for once, and not at each decomposition.
        """
        home, both = up, torch.stack([up, down]).cpu()
        up, down = both if maximize else both.double()
        found = (_corner_extremum if maximize else _balanced_minimum)(up, down, radius)
        return found.to(home.dtype).to(home.device, non_blocking=True)


def _corner_extremum(up: Tensor, down: Tensor, radius: float) -> Tensor:
    values, vectors = torch.linalg.eigh(up - down)
    sizes = (vectors * ((up + down) @ vectors)).sum(-2)
    dead = sizes <= 100 * torch.finfo(sizes.dtype).eps * sizes.amax(-1, keepdim=True)
    return _with_eigenvalues(vectors, torch.where(dead, 0.0, torch.where(values >= 0, radius, -radius)))


def _balanced_minimum(up: Tensor, down: Tensor, radius: float) -> Tensor:
    dead = _spectral_projector(_spectral_projector(up) + _spectral_projector(down), kernel=False)
    keep = torch.eye(dead.shape[-1], dtype=dead.dtype, device=dead.device) - dead
    sizes = (m.diagonal(dim1=-2, dim2=-1).amax(-1).clamp(min=torch.finfo(m.dtype).tiny) for m in (up, down))
    up, down = (keep @ m @ keep + size[..., None, None] * dead for m, size in zip((up, down), sizes, strict=True))
    root, inverse = _square_roots(up)
    middle, _ = _square_roots(root @ down @ root)
    values, vectors = torch.linalg.eigh(inverse @ middle @ inverse)
    logs = (values.clamp(min=0).log() / 2).clamp(-radius, radius)
    return keep @ _with_eigenvalues(vectors, logs) @ keep


def _with_eigenvalues(vectors: Tensor, values: Tensor) -> Tensor:
    return (vectors * values.to(vectors).unsqueeze(-2)) @ vectors.mT


def _spectral_projector(matrix: Tensor, *, kernel: bool = True) -> Tensor:
    """The projector on the kernel of a positive semidefinite matrix, or on its range."""
    values, vectors = torch.linalg.eigh(matrix)
    rounding = values.shape[-1] * torch.finfo(torch.float32).eps ** 2  # what is left of a zero, squared
    return _with_eigenvalues(vectors, (values <= rounding * values.amax(-1, keepdim=True)) == kernel)


def _square_roots(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Square root of a positive semidefinite matrix and the inverse of that root (infinite eigenvalues kept finite)."""
    values, vectors = torch.linalg.eigh(matrix)
    root = values.clamp(min=values.amax(-1, keepdim=True) * torch.finfo(values.dtype).eps).sqrt()
    return _with_eigenvalues(vectors, root), _with_eigenvalues(vectors, 1 / root)
