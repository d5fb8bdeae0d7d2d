"""The trace and the largest eigenvalues of the Hessian, by Hessian-vector products.

Used in the chapters *Sharpness and curvature* and *Teleporting minima*.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from teleport_lite.errors import TeleportError
from teleport_lite.functional import Params, dot, hvp, loss_of, normal_like, trainable


def hessian_trace(
    model: nn.Module,
    loss_fn: Callable[[Callable], Tensor],
    *,
    samples: int = 100,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""An unbiased estimate of the trace of the Hessian: the mean of $z^\top H z$ over `samples` random sign vectors z.

    M. F. Hutchinson, Communications in Statistics 18, 1989. One Hessian-vector product a sample.

    >>> model, x = nn.Linear(2, 1, bias=False), torch.tensor([[1.0, 2.0]])
    >>> hessian_trace(model, lambda net: 0.5 * (net(x) * torch.eye(1)).square().sum(), samples=400).round()
    tensor(5.)
    """
    loss = loss_of(model, loss_fn)
    params = {name: p.detach() for name, p in trainable(model).items()}
    probes = sign_probes(params, samples, generator=generator)
    return torch.stack([dot(z, hvp(loss, params, z)) for z in probes]).mean()


def sign_probes(params: Params, count: int, *, generator: torch.Generator | None = None) -> list[Params]:
    """`count` vectors of independent random signs, shaped like `params`."""
    drawn = normal_like(params, count, generator)
    return [{name: torch.where(d[k] < 0, -1.0, 1.0).to(d) for name, d in drawn.items()} for k in range(count)]


def hessian_eigenvalues(
    model: nn.Module,
    loss_fn: Callable[[Callable], Tensor],
    count: int = 1,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The `count` algebraically largest eigenvalues of the Hessian, falling; by scipy's Lanczos method, in float64.

    Raises:
        TeleportError: when scipy is missing, or there are not more parameters than `count`.

    >>> model, x = nn.Linear(3, 1, bias=False), torch.eye(3) * torch.tensor([1.0, 2.0, 3.0])
    >>> hessian_eigenvalues(model, lambda net: 0.5 * net(x).square().sum(), 2).round()
    tensor([9., 4.])
    """
    try:
        from scipy.sparse.linalg import LinearOperator, eigsh
    except ImportError as error:
        raise TeleportError("scipy", "none", "pip install teleport-lite[book]") from error
    loss = loss_of(model, loss_fn)
    params = {name: p.detach() for name, p in trainable(model).items()}
    sizes = [p.numel() for p in params.values()]
    if not 0 < count < sum(sizes):
        raise TeleportError(f"a count from 1 to {sum(sizes) - 1}", count, "ask for fewer, or build the whole matrix")

    def product(vector: Any) -> Any:
        parts = torch.as_tensor(vector).flatten().split(sizes)
        shaped = {n: v.to(p).view_as(p) for (n, p), v in zip(params.items(), parts, strict=True)}
        return torch.cat([h.flatten() for h in hvp(loss, params, shaped).values()]).double().cpu().numpy()

    operator = LinearOperator((sum(sizes), sum(sizes)), matvec=product, dtype="float64")
    start = torch.cat([d.flatten() for d in normal_like(params, 1, generator).values()]).double().cpu().numpy()
    values = eigsh(operator, k=count, which="LA", v0=start, return_eigenvectors=False)
    return torch.as_tensor(values.copy()).sort(descending=True).values.to(next(iter(params.values())))
