"""The trace and the largest eigenvalues of the Hessian, by Hessian-vector products.

Used in the chapters *Sharpness and curvature* and *Teleporting minima*.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from teleport_lite.errors import LossError, TeleportError
from teleport_lite.functional import Params, dot, generator_for, hvp, loss_of, normal_like, trainable
from teleport_lite.runtime import check_generator, home_of_float64

CYCLES = 1000  # of the Lanczos method, at most


def hessian_trace(
    model: nn.Module,
    loss_fn: Callable[[Callable], Tensor],
    *,
    samples: int = 100,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""An unbiased estimate of the trace of the Hessian: the mean of $z^\top H z$ over `samples` random sign vectors z.

    M. F. Hutchinson, Communications in Statistics 18, 1989. One Hessian-vector product a sample, one sample at a time.

    >>> model, x = nn.Linear(2, 1, bias=False), torch.tensor([[1.0, 2.0]])
    >>> seeded = torch.Generator().manual_seed(0)
    >>> hessian_trace(model, lambda net: 0.5 * (net(x) * torch.eye(1)).square().sum(), generator=seeded).round()
    tensor(5.)
    """
    loss = loss_of(model, loss_fn)
    params = {name: p.detach() for name, p in trainable(model).items()}
    probes = sign_probes(params, samples, generator=generator)
    with loss:
        return torch.stack([dot(z, hvp(loss, params, z)) for z in probes]).mean()


def sign_probes(params: Params, count: int, *, generator: torch.Generator | None = None) -> Iterator[Params]:
    """`count` vectors of independent random signs, shaped like `params`, each drawn when it is asked for.

    Raises:
        TeleportError: when `count` is not positive.
    """
    if not isinstance(count, int) or count < 1:
        raise TeleportError("a positive number of samples", repr(count), "pass samples=100")
    generator = generator_for(params, check_generator(generator))
    drawn = (normal_like(params, generator) for _ in range(count))
    return ({name: torch.where(d < 0, -1.0, 1.0).to(d) for name, d in draw.items()} for draw in drawn)


def hessian_eigenvalues(
    model: nn.Module,
    loss_fn: Callable[[Callable], Tensor],
    count: int = 1,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The `count` algebraically largest eigenvalues of the Hessian, falling, each as often as it occurs.

    By `largest_eigenvalues`, in float64, which holds about max(2 count, 20) vectors.

    Raises:
        TeleportError: when there are fewer parameters than `count`.
        LossError: when the Hessian is not finite, or so noisy that no eigenvalue settles.

    >>> model, x = nn.Linear(3, 1, bias=False), torch.eye(3) * torch.tensor([1.0, 2.0, 3.0])
    >>> hessian_eigenvalues(model, lambda net: 0.5 * net(x).square().sum(), 2).round()
    tensor([9., 4.])
    """
    loss = loss_of(model, loss_fn)
    params = {name: p.detach() for name, p in trainable(model).items()}
    generator = generator_for(params, check_generator(generator))
    like, sizes = next(iter(params.values())), [p.numel() for p in params.values()]
    if not isinstance(count, int) or not 0 < count <= sum(sizes):
        raise TeleportError(f"a count from 1 to {sum(sizes)}, the number of parameters", repr(count), "pass count=1")
    home = home_of_float64(like.device)

    def as_vector(parts: Params) -> Tensor:
        return torch.cat([p.flatten().to(home).double() for p in parts.values()])

    def hessian_product(v: Tensor) -> Tensor:
        parts = zip(params.items(), v.split(sizes), strict=True)
        return as_vector(hvp(loss, params, {name: part.to(p).view_as(p) for (name, p), part in parts}))

    def draw_vector() -> Tensor:
        return as_vector(normal_like(params, generator))

    eps = max(torch.finfo(p.dtype).eps for p in params.values())
    with loss:
        return largest_eigenvalues(hessian_product, draw_vector, count, min(100 * eps, 1e-3)).to(like)


def largest_eigenvalues(
    product: Callable[[Tensor], Tensor], draw: Callable[[], Tensor], count: int, tol: float
) -> Tensor:
    r"""The `count` largest eigenvalues of a symmetric matrix, falling, by the Lanczos method with thick restarts.

    The rows of V are orthonormal (a new one is made so against all others, twice), and $T = V A V^\top$. When they are
    m, the upper eigenvectors of T replace them, and the next vector goes on from there (K. Wu, H. Simon, SIAM Journal
    on Matrix Analysis and Applications 22, 2000). From one vector no eigenvalue is found twice. Hence those found must
    survive a search that starts from a new vector orthogonal to them, and that knows the next one too.

    Args:
        product: v -> A v, of vectors in float64.
        draw: gives a random vector.
        count: how many.
        tol: how long the residual of an eigenvector may be, relative to the largest eigenvalue in size.

    Raises:
        LossError: when the matrix is not finite, or they do not settle.

    >>> a = torch.diag(torch.tensor([3.0, 1.0, 3.0, 2.0]).double())
    >>> largest_eigenvalues(lambda v: a @ v, lambda: torch.randn(4).double(), 3, 1e-12).round(decimals=6)
    tensor([3., 3., 2.], dtype=torch.float64)
    """
    start = draw()
    n, m = len(start), min(len(start), max(2 * count + 1, 20))
    basis, table = start.new_zeros(m + 1, n), torch.zeros(m, m, dtype=torch.float64)
    found: Tensor | None = None

    def extend_basis(k: int, v: Tensor) -> Tensor:
        """Row k: v without its parts along the rows before, or a random one; gives the parts, and the length left."""
        along = basis.new_zeros(k)
        for _ in range(2):
            part = basis[:k] @ v
            along, v = along + part, v - part @ basis[:k]
        parts = torch.cat([along, v.norm()[None]]).cpu()  # the one time that the host waits
        if parts[-1] > 1e-14 * parts.norm():
            basis[k] = v / float(parts[-1])
        elif k < n:
            extend_basis(k, draw())
        return parts

    kept, following = 0, start
    for _ in range(CYCLES):
        extend_basis(kept, following)
        for j in range(kept, m):
            *_, length = parts = extend_basis(j + 1, product(basis[j]))
            table[j, : j + 1] = table[: j + 1, j] = parts[:-1]
        if not table.isfinite().all():
            raise LossError("a loss with finite second derivatives", "NaN or infinity", "look at the loss where it is")
        values, vectors = torch.linalg.eigh(table)
        top = values[-count:]
        if m == n:
            return top.flip(0)
        small, residuals = tol * float(values.abs().max()), length * vectors[-1].abs()
        kept, following = count + (m - count) // 2, basis[m].clone()
        settled = residuals[-count:].max() <= small
        if found is not None:
            settled &= residuals[-count - 1] <= max(small, 0.01 * float(top[0] - values[-count - 1]))
        if settled:
            if found is not None and (top - found).abs().max() <= 10 * small:
                return top.flip(0)
            found, kept, following = top, count, draw()
        basis[:kept] = vectors[:, -kept:].T.to(basis) @ basis[:m]
        table = table.new_zeros(m, m)
        table.diagonal()[:kept] = values[-kept:]
    remedy = "ask for fewer, or compute in float64"
    raise LossError("eigenvalues that settle", f"residuals above {tol:.0e} after {CYCLES} cycles", remedy)
