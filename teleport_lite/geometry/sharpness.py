"""The mean loss around a point, in random directions.

Derived in the chapter *Sharpness and curvature*.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import vmap
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from teleport_lite.errors import LossError, TeleportError
from teleport_lite.evaluation import session
from teleport_lite.functional import Loss, Params, as_vector, check_scalar, generator_for, loss_of, trainable
from teleport_lite.runtime import check_generator, unfused_attention

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
    Section 4 of arXiv:2305.13404. Models that `vmap` cannot run are evaluated at one point after the other.

    Args:
        model: the model; only read.
        loss_fn: net -> scalar loss.
        radii: T.
        directions: how many directions D.
        generator: draws the directions; they do not depend on `chunk_size`.
        chunk_size: how many directions to hold and to evaluate at once, at all radii; the peak memory is proportional
            to it. All by default. With 1 the points are taken one by one: two copies of the parameters are enough.

    Raises:
        LossError: when the loss is no scalar, or changes from call to call.
        TeleportError: when there is no radius or direction, or `chunk_size` is not positive.

    >>> model, x = nn.Linear(2, 1, bias=False), torch.eye(2)
    >>> flat = sharpness(model, lambda net: 0 * net(x).sum() + 3, radii=[0.1], directions=5)
    >>> flat.item()
    3.0
    """
    loss = loss_of(model, loss_fn)
    params = {name: p.detach() for name, p in trainable(model).items()}
    around = Directions(params, directions, generator=generator)
    with torch.no_grad():
        return mean_loss_around(loss, params, around, radii, chunk_size=chunk_size)


class Directions:
    """Isotropic directions of length 1 in the space of all parameters together, each drawn from a seed of its own.

    `around[i:j]` gives directions i to j by name, [j - i, ...], always the same. Held are the seeds and the last part.

    Raises:
        TeleportError: when `count` is not positive.

    >>> around = Directions({"a": torch.zeros(2, 3), "b": torch.zeros(4)}, 5)
    >>> sum(d.flatten(1).square().sum(1) for d in around[1:4].values()).round(decimals=5)
    tensor([1., 1., 1.])
    """

    def __init__(self, params: Params, count: int, *, generator: torch.Generator | None = None) -> None:
        if not isinstance(count, int) or count < 1:
            raise TeleportError("a positive number of directions", repr(count), "pass directions=100")
        self.home = next(iter(params.values())).device  # where they live
        given = check_generator(generator)
        self.device = self.home if given is None else given.device  # and are drawn
        self.params, self.dtype = params, reduce(torch.promote_types, {p.dtype for p in params.values()})
        generator = generator_for({"": torch.empty(0)}, given)
        self.seeds = torch.randint(2**62, (count,), generator=generator, device=generator.device).tolist()
        self._last: tuple[list[int], Params] = [], {}

    def __len__(self) -> int:
        return len(self.seeds)

    def __getitem__(self, index: slice) -> Params:
        seeds, sizes = self.seeds[index], [p.numel() for p in self.params.values()]
        if seeds == self._last[0]:
            return self._last[1]
        self._last = [], {}
        rows = torch.empty(len(seeds), sum(sizes), dtype=self.dtype, device=self.device)
        for row, seed in zip(rows, seeds, strict=True):
            row.normal_(generator=torch.Generator(self.device).manual_seed(seed))
            row.div_(torch.linalg.vector_norm(row))
        parts = zip(self.params.items(), rows.to(self.home, non_blocking=True).split(sizes, 1), strict=True)
        self._last = seeds, {name: part.reshape(-1, *p.shape).to(p) for (name, p), part in parts}
        return self._last[1]


def unit_directions(params: Params, count: int, *, generator: torch.Generator | None = None) -> Params:
    """All of `count` `Directions` at once: by name, [count, ...]."""
    return Directions(params, count, generator=generator)[:]


def mean_loss_around(
    loss: Loss,
    params: Params,
    directions: Params | Directions,
    radii: Sequence[float],
    *,
    chunk_size: int | None = None,
    one_by_one: bool | None = None,
) -> Tensor:
    """The mean of `losses_around`, differentiable in `params`; chunks are evaluated again when they are differentiated.

    Args:
        loss: the loss as a function of parameters.
        params: where.
        directions: by name, [directions, ...], or drawn when needed.
        radii: how far to go along each.
        chunk_size: how many directions at once.
        one_by_one: whether to evaluate one point after the other, or all of a chunk by `vmap`; by default as
            `goes_one_by_one` says.

    Raises:
        LossError: when the loss changes from call to call.
        TeleportError: when there is no radius, or `chunk_size` is not positive.
    """
    if isinstance(radii, (float, int)) or not len(radii):
        raise TeleportError("a list of radii", repr(radii), "pass radii=[0.1]")
    if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
        raise TeleportError("a positive chunk_size", repr(chunk_size), "leave it out to evaluate all at once")
    slopes = torch.is_grad_enabled() and any(p.requires_grad for p in params.values())
    if one_by_one is None:
        one_by_one = goes_one_by_one(loss, params, radii, chunk_size, slopes=slopes)
    count = len(directions) if isinstance(directions, Directions) else len(next(iter(directions.values())))
    size = 1 if one_by_one else chunk_size or count

    def summed_losses(start: int, t: float | None) -> Tensor:
        """The losses of a chunk at all radii, or of one direction at one."""
        part = slice(start, start + size)
        chunk = directions[part] if isinstance(directions, Directions) else {n: d[part] for n, d in directions.items()}
        if t is None:
            return losses_around(loss, params, chunk, _radii_on_device(params, radii)).sum()
        return check_scalar(loss(_step_along(params, {n: d[0] for n, d in chunk.items()}, t)))

    calls = [(k, t) for k in range(0, count, size) for t in (radii if one_by_one else [None])]
    again = slopes and len(calls) > 1
    parts = [checkpoint(summed_losses, *call, use_reentrant=False) if again else summed_losses(*call) for call in calls]
    return torch.stack(parts).sum() / (count * len(radii))


def goes_one_by_one(
    loss: Loss, params: Params, radii: Sequence[float], chunk_size: int | None = None, *, slopes: bool = False
) -> bool:
    """Whether points are evaluated one after the other: as asked for by chunks of 1, or because `vmap` cannot run it.

    It is tried at two points, and has to give what single evaluations give; with `slopes`, finite gradients as well,
    and for chunks it has to run inside of a checkpoint, which it does not in torch 2.4.

    Raises:
        LossError: when the loss changes from call to call.
    """
    params, radius = {name: p.detach() for name, p in params.items()}, max(map(float, radii))
    d = Directions(params, 1, generator=torch.Generator().manual_seed(0))[:]
    with torch.no_grad():
        a, b, again = (
            check_scalar(loss(_step_along(params, {n: x[0] for n, x in d.items()}, t)))
            for t in (radius, radius / 2, radius)
        )
    rtol = min(1e4 * torch.finfo(a.dtype).eps, 1e-2)
    checks = [torch.isclose(a, again, rtol=rtol, equal_nan=True)]
    one_by_one = chunk_size == 1
    if not one_by_one:
        points = {name: p.clone().requires_grad_() for name, p in params.items()} if slopes else params
        try:
            kept = saved_tensors_hooks(*2 * [lambda x: x]) if slopes and chunk_size else nullcontext()
            with warnings.catch_warnings(), torch.set_grad_enabled(slopes), session(loss), kept:
                warnings.simplefilter("ignore", UserWarning)  # of operations that vmap runs one by one
                found = losses_around(loss, points, d, _radii_on_device(params, (radius, radius / 2)))[0]
                grads = torch.autograd.grad(found.sum(), [*points.values()], allow_unused=True) if slopes else ()
            checks.append(torch.isclose(found.detach(), torch.stack([a, b]), rtol=rtol, equal_nan=True).all())
            checks += [g.isfinite().all() for g in grads if g is not None]
        except Exception:  # of many kinds; an error that does not come from vmap comes again without it
            one_by_one = True
    repeated, *fine = as_vector(checks).tolist()
    if not repeated:
        got, remedy = f"{float(a):.6g} and {float(again):.6g} at the same parameters", "fix its random numbers"
        raise LossError("a deterministic loss", got, remedy)
    return one_by_one or not all(fine)


def _step_along(params: Params, direction: Params, t: float) -> Params:
    return {name: torch.add(p, direction[name], alpha=float(t)) for name, p in params.items()}


def _radii_on_device(params: Params, radii: Sequence[float]) -> Tensor:
    """The radii as a tensor where the parameters are, which the host does not wait for."""
    like = next(iter(params.values()))
    return torch.stack([like.new_full((), float(t)) for t in radii])


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

    def loss_at(direction: Params, t: Tensor) -> Tensor:
        with _Line(params, direction, t) as line:
            return check_scalar(loss(line.places))

    with unfused_attention():  # fused kernels have no rule for vmap either
        return vmap(vmap(loss_at, (None, 0)), (0, None))(directions, radii)


class _Line(TorchFunctionMode):
    """Lets a model that is given `places` compute at w + t d.

    Places have the shapes of w and no memory. Where they are read past this mode they are NaN, and so is the loss.

    The first linear map sees the data, which no t has touched: there x(w + t d) = xw + t xd, and the two products serve
    all t together. Everywhere else w + t d is put in the place of w. A cross entropy reads the batch as the pixels of
    one picture, [1, classes, batch]: torch is many times faster where the classes are not the last, short axis.
    """

    def __init__(self, params: Params, direction: Params, t: Tensor) -> None:
        super().__init__()
        self.t, self.first = t, True
        self.places = {name: p.new_full((), math.nan).expand(p.shape) for name, p in params.items()}
        self.points = {id(p): (params[name], direction[name]) for name, p in self.places.items()}

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
        return p if slope is None else torch.addcmul(p, self.t, slope)
