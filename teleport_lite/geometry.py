r"""The geometry of the loss around a point: sharpness, curvature of orbits, conserved quantities, the Hessian.

All is measured through losses, gradients and Hessian-vector products, on the model as it is; nothing of it changes.
Derived in the chapters *Sharpness and curvature* and *Symmetries of networks*.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import vmap
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from teleport_lite.errors import TeleportError
from teleport_lite.groups import PositiveScaling
from teleport_lite.params import Loss, Params, check_scalar, dot, hvp, loss_of, trainable
from teleport_lite.symmetries.base import Product, Symmetry
from teleport_lite.symmetries.minibatch import is_chain, jets
from teleport_lite.symmetries.neurons import NeuronSymmetry

RADII = tuple(round(0.001 + 0.01 * k, 3) for k in range(20))  # of arXiv:2305.13404, for MNIST
PAIRED = (F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss)
LINEAR = {F.linear, F.conv1d, F.conv2d, F.conv3d}  # f(input, weight, bias, ...), linear in (weight, bias)


# --- sharpness --------------------------------------------------------------------------------------------------------


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
    drawn = _normal(params, count, generator)
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


# --- curvature of orbits ----------------------------------------------------------------------------------------------


def curvature(
    model: nn.Module, symmetry: Symmetry, *, samples: int = 100, generator: torch.Generator | None = None
) -> Tensor:
    r"""The mean curvature of the orbit curves through a point: $\psi(w) = \frac1k \sum_{i \le k} \kappa(\gamma_{M_i})$.

    $\gamma_M(t) = e^{tM} \cdot w$ at t = 0, for random M; see `kappa`. Finite factors, which have no curves, are passed
    over. Section 4 of arXiv:2305.13404.

    Args:
        model: the model; only read.
        symmetry: whose orbit.
        samples: how many curves k.
        generator: draws M.

    >>> from teleport_lite.symmetries import TestFunction
    >>> point = TestFunction("ellipse", start=(2.0, 0.0))  # the orbit x^2 + 9 y^2 = 4 has half-axes 2 and 2/3
    >>> curvature(point, point.symmetry, samples=3)  # 2 / (2/3)^2
    tensor(4.5000)
    """
    params = {name: p.detach() for name, p in trainable(model).items()}
    with torch.no_grad():
        return mean_kappa(params, symmetry, sample_curves(params, symmetry, samples, generator=generator))


def sample_curves(
    params: Params, symmetry: Symmetry, count: int, *, generator: torch.Generator | None = None
) -> tuple[Tensor, ...]:
    """`count` random elements of the Lie algebra, for each continuous factor its coordinates [count, ...].

    Raises:
        TeleportError: when the symmetry has no continuous factor, or `count` is not positive.
    """
    continuous = Product([symmetry]).continuous
    if not len(continuous) or count < 1:
        raise TeleportError("a continuous symmetry, and samples", f"{symmetry!r} and {count}", "pass one of dim > 0")
    drawn = [continuous.sample(params, generator=generator) for _ in range(count)]
    return tuple(torch.stack(xis) for xis in zip(*drawn, strict=True))


def mean_kappa(params: Params, symmetry: Symmetry, curves: tuple[Tensor, ...]) -> Tensor:
    """The mean `kappa` of the `sample_curves`, differentiable in `params`."""
    continuous = Product([symmetry]).continuous
    if all(map(_is_matrix_scaling, continuous)):
        return scaling_kappas(params, continuous, curves).mean()
    if is_chain(continuous):
        return vmap(kappa)(*jets(continuous, params, curves)).mean()
    one = continuous[0] if len(continuous) == 1 else None
    return vmap(lambda xi: kappa(*(one.jet(params, xi[0]) if one else continuous.jet(params, xi))))(curves).mean()


def _is_matrix_scaling(factor: Symmetry) -> bool:
    """Whether it multiplies rows and columns, the first two dimensions of tensors, by positive numbers."""
    legs = factor.legs if isinstance(factor, NeuronSymmetry) and isinstance(factor.group, PositiveScaling) else ()
    return len(legs) > 0 and all(leg.dim < 2 and leg.groups == 1 for leg in legs)


def scaling_kappas(params: Params, scalings: Product, curves: tuple[Tensor, ...]) -> Tensor:
    r"""`kappa` of curves of scalings, [curves], by a few matrix products; differentiable in `params`.

    Such a curve is $w_i(t) = e^{\theta_i t} w_i$, so that $|\gamma'|^2$, $\gamma' \cdot \gamma''$ and
    $|\gamma''|^2$ are $\sum_i \theta_i^m w_i^2$ for m = 2, 3, 4. For a matrix $\theta_{ij} = a_i + b_j$, and all
    follows from $\sum_{ij} a_i^p\, w_{ij}^2\, b_j^q$. The sums are of float64, for $\kappa$ is a difference of them.

    Args:
        params: w.
        scalings: of rows and columns.
        curves: from `sample_curves`.

    >>> from teleport_lite.symmetries import scaling
    >>> w = {"v": torch.tensor([[2.0]]), "u": torch.tensor([[1.0]])}
    >>> scaling_kappas(w, Product([scaling(1, "v", "u")]), (torch.ones(1, 1),))  # of (2 e^t, e^-t): 4 / 5^(3/2)
    tensor([0.3578])
    """
    tables = []
    for name in scalings.names:
        moves = zip(scalings, curves, strict=True)
        legs = [(f.group, xi, leg) for f, xi in moves for leg in f.legs if leg.name == name]
        w = params[name].double().square()
        w = w.flatten(2).sum(2) if w.ndim > 2 else w.reshape(len(w), -1)
        for dim in {0, 1} - {leg.dim for *_, leg in legs}:
            w = w.sum(dim, keepdim=True)
        rates = [w.new_zeros(len(curves[0]), n) for n in w.shape]
        for group, xi, leg in legs:
            rate = (group.dual(xi) if leg.dual else xi).repeat_interleave(leg.each, 1)
            rates[leg.dim].narrow(1, leg.start, rate.shape[1]).add_(rate)
        a, b = (torch.linalg.vander(rate, N=5) for rate in rates)
        tables.append(torch.einsum("kip,ij,kjq->pqk", a, w, b))
    table = torch.stack(tables).sum(0)
    speed, along, bend = (  # by the binomial theorem
        torch.stack([math.comb(m, p) * table[p, m - p] for p in range(m + 1)]).sum(0) for m in (2, 3, 4)
    )
    across = (bend - along.square() / speed).clamp(min=torch.finfo(bend.dtype).eps * bend)
    return (across.sqrt() / speed).to(params[scalings.names[0]])


def kappa(first: Params, second: Params) -> Tensor:
    r"""The curvature $\kappa = \sqrt{|\gamma'|^2|\gamma''|^2 - (\gamma'\cdot\gamma'')^2}\,/\,|\gamma'|^3$ of a curve.

    Computed as the length of the part of $\gamma''$ across $\gamma'$, divided by $|\gamma'|^2$.

    Args:
        first: $\gamma'$, by name.
        second: $\gamma''$, by name.

    >>> kappa({"w": torch.tensor([0.0, 2.0])}, {"w": torch.tensor([-1.0, 5.0])})
    tensor(0.2500)
    """
    speed = dot(first, first)
    along = dot(first, second) / speed
    across = {n: second[n] - along * first[n] for n in first}
    return (dot(across, across) + torch.finfo(speed.dtype).tiny).sqrt() / speed


# --- conserved quantities ---------------------------------------------------------------------------------------------


def conserved_quantities(params: Params, symmetry: Symmetry) -> list[Tensor]:
    r"""What gradient flow conserves because of a symmetry, and a teleport changes; a tensor for each scaling or mixing.

    For a scaling $\lVert V_i \rVert^2 - \lVert U_{:i} \rVert^2$, [n]; for a mixing $VV^\top - U^\top U$, [n, n].
    Theorem 2.10 of the chapter *Symmetries of networks*.

    >>> from teleport_lite.symmetries import scaling
    >>> w = {"v": torch.tensor([[3.0], [1.0]]), "u": torch.tensor([[2.0, 2.0]])}
    >>> conserved_quantities(w, scaling(2, "v", "u"))
    [tensor([ 5., -3.])]
    """
    found = []
    for factor in Product([symmetry]):
        group: Any = factor.group
        if isinstance(factor, NeuronSymmetry) and not group.isometry:
            grams = [group.gram(factor.axis(params[leg.name], leg), 0) for leg in factor.legs]
            signs = [-1 if leg.dual else 1 for leg in factor.legs]
            found.append(torch.stack([s * g for s, g in zip(signs, grams, strict=True)]).sum(0))
    return found


# --- the Hessian ------------------------------------------------------------------------------------------------------


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
    drawn = _normal(params, count, generator)
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
    start = torch.cat([d.flatten() for d in _normal(params, 1, generator).values()]).double().cpu().numpy()
    values = eigsh(operator, k=count, which="LA", v0=start, return_eigenvectors=False)
    return torch.as_tensor(values.copy()).sort(descending=True).values.to(next(iter(params.values())))


def _normal(params: Params, count: int, generator: torch.Generator | None) -> Params:
    """Normal random numbers [count, ...] for each parameter, drawn where the generator lives."""
    drawn = {}
    for name, p in params.items():
        device = p.device if generator is None else generator.device
        drawn[name] = torch.randn(count, *p.shape, generator=generator, dtype=p.dtype, device=device).to(p.device)
    return drawn
