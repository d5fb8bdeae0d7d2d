"""The mean loss around a point, in random directions.

Derived in the chapter *Sharpness and curvature*.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import vmap
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from teleport_lite.errors import TeleportError
from teleport_lite.functional import Loss, Params, check_scalar, loss_of, normal_like, trainable

RADII = tuple(round(0.001 + 0.01 * k, 3) for k in range(20))  # of arXiv:2305.13404, for MNIST
PAIRED = (F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss)
LINEAR = {F.linear, F.conv1d, F.conv2d, F.conv3d}  # f(input, weight, bias, ...), linear in (weight, bias)


def sharpness(
    model: nn.Module,
    loss_fn: Callable[[Callable], Tensor],
    *,
    radii: Sequence[float] = RADII,
    directions: int = 100,
    generator: torch.Generator | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    r"""The mean loss around a point: $\phi(w) = \frac{1}{|T||D|} \sum_{t \in T} \sum_{d \in D} L(w + t\,d)$.

    The directions d are isotropic, of length 1 over all trainable parameters together; all radii share them.
    Section 4 of arXiv:2305.13404.

    Args:
        model: the model; only read.
        loss_fn: net -> scalar loss.
        radii: T.
        directions: how many directions D.
        generator: draws the directions.
        chunk_size: how many directions to evaluate at once; the peak memory is proportional to it. All by default.

    >>> model, x = nn.Linear(2, 1, bias=False), torch.eye(2)
    >>> flat = sharpness(model, lambda net: 0 * net(x).sum() + 3, radii=[0.1], directions=5)
    >>> flat.item()
    3.0
    """
    loss = loss_of(model, loss_fn)
    params = {name: p.detach() for name, p in trainable(model).items()}
    around = unit_directions(params, directions, generator=generator)
    with torch.no_grad():
        return mean_loss_around(loss, params, around, radii, chunk_size=chunk_size)


def unit_directions(params: Params, count: int, *, generator: torch.Generator | None = None) -> Params:
    """`count` isotropic directions of length 1 in the space of all parameters together: by name, [count, ...].

    Raises:
        TeleportError: when `count` is not positive.

    >>> directions = unit_directions({"a": torch.zeros(2, 3), "b": torch.zeros(4)}, 5)
    >>> sum(d.flatten(1).square().sum(1) for d in directions.values()).round(decimals=5)
    tensor([1., 1., 1., 1., 1.])
    """
    if count < 1:
        raise TeleportError("at least one direction", count, "pass directions=100")
    drawn = normal_like(params, count, generator)
    length = torch.stack([d.flatten(1).square().sum(1) for d in drawn.values()]).sum(0).sqrt()
    return {name: d / length.view(-1, *[1] * (d.ndim - 1)) for name, d in drawn.items()}


def mean_loss_around(
    loss: Loss, params: Params, directions: Params, radii: Sequence[float], *, chunk_size: int | None = None
) -> Tensor:
    """The mean of `losses_around`, differentiable in `params`; chunks are evaluated again when they are differentiated.

    Raises:
        TeleportError: when there is no radius, or `chunk_size` is not positive.
    """
    if not len(radii) or (chunk_size is not None and chunk_size < 1):
        raise TeleportError("a radius, and a positive chunk_size", f"{radii} and {chunk_size}", "pass radii=[0.1]")
    like = next(iter(params.values()))
    t = torch.as_tensor(radii, dtype=like.dtype, device=like.device)
    count = len(next(iter(directions.values())))
    size = chunk_size or count

    def total(start: int) -> Tensor:
        return losses_around(loss, params, {n: d[start : start + size] for n, d in directions.items()}, t).sum()

    again = torch.is_grad_enabled() and size < count
    parts = [checkpoint(total, k, use_reentrant=False) if again else total(k) for k in range(0, count, size)]
    return torch.stack(parts).sum() / (count * len(t))


def losses_around(loss: Loss, params: Params, directions: Params, radii: Tensor) -> Tensor:
    r"""The losses $L(w + t\,d)$, [directions, radii], in one pass, differentiable in w.

    Args:
        loss: the loss as a function of parameters.
        params: w.
        directions: d, by name, [directions, ...].
        radii: t, [radii].

    >>> w, d = {"w": torch.zeros(2)}, {"w": torch.eye(2)}
    >>> losses_around(lambda p: (p["w"] * torch.tensor([1.0, 2.0])).sum(), w, d, torch.tensor([1.0, 3.0]))
    tensor([[1., 3.],
            [2., 6.]])
    """

    def at(direction: Params, t: Tensor) -> Tensor:
        with _Line(params, direction, t):
            return check_scalar(loss(params))

    return vmap(vmap(at, (None, 0)), (0, None))(directions, radii)


class _Line(TorchFunctionMode):
    """Lets a model that is given w compute at w + t d.

    The first linear map sees the data, which no t has touched: there x(w + t d) = xw + t xd, and the two products serve
    all t together. Everywhere else w + t d is put in the place of w. A cross entropy reads the batch as the pixels of
    one picture, [1, classes, batch]: torch is many times faster where the classes are not the last, short axis.
    """

    def __init__(self, params: Params, direction: Params, t: Tensor) -> None:
        super().__init__()
        self.t, self.first = t, True
        self.points = {id(p): (p, direction[name]) for name, p in params.items()}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if self.first and func in LINEAR and len(args) > 2 and id(args[1]) in self.points:
            self.first, (x, w, b, *rest) = False, args
            (w, dw), (b, db) = self.points[id(w)], self.points.get(id(b), (b, None))
            return torch.addcmul(func(x, w, b, *rest), self.t, func(x, dw, db, *rest))
        args, kwargs = tuple(map(self.moved, args)), {k: self.moved(v) for k, v in (kwargs or {}).items()}
        if func is F.cross_entropy and [getattr(a, "ndim", 0) for a in args[:2]] == [2, 1]:
            z, y, *rest = args
            values = func(z.mT[None], y[None], *rest, **kwargs)
            return values.reshape(values.shape[1:])  # a number, or one for each sample
        if func in PAIRED and len(args) > 1:  # under two vmaps their target has to be batched like their input
            args = (args[0], args[1] + torch.zeros_like(args[0]), *args[2:])
        return func(*args, **kwargs)

    def moved(self, argument: Any) -> Any:
        """The moved w + t d for w, anything else as it is."""
        if isinstance(argument, (tuple, list)):
            return type(argument)(map(self.moved, argument))
        p, slope = self.points.get(id(argument), (argument, None))
        return p if slope is None else p + self.t * slope
