"""The curvature of orbits.

Derived in the chapter *Sharpness and curvature*.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import vmap

from teleport_lite.errors import TeleportError
from teleport_lite.functional import Params, dot, trainable
from teleport_lite.geometry.curves import is_chain, is_matrix_scaling, product_jets, scaling_kappas
from teleport_lite.runtime import check_generator
from teleport_lite.symmetries.base import Symmetry
from teleport_lite.symmetries.product import Product, check_symmetry

CURVES = 4  # at once, each of which holds several copies of the parameters


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
    symmetry = check_symmetry(symmetry)
    with torch.no_grad():
        return mean_kappa(params, symmetry, sample_curves(params, symmetry, samples, generator=generator))


def sample_curves(
    params: Params, symmetry: Symmetry, count: int, *, generator: torch.Generator | None = None
) -> tuple[Tensor, ...]:
    """`count` random elements of the Lie algebra, for each continuous factor its coordinates [count, ...].

    Raises:
        TeleportError: when it is no symmetry or has no continuous factor, or `count` is not positive.
    """
    check_generator(generator)
    continuous = check_symmetry(symmetry).continuous
    if not len(continuous):
        got = "finite ones only" if len(check_symmetry(symmetry)) else "none"
        raise TeleportError("a symmetry with continuous factors, which have curves", got, "pass one of dim > 0")
    if not isinstance(count, int) or count < 1:
        raise TeleportError("a positive number of samples", repr(count), "pass samples=100")
    for factor in continuous:
        factor.check(params)
    drawn = [continuous.sample(params, generator=generator) for _ in range(count)]
    return tuple(torch.stack(xis) for xis in zip(*drawn, strict=True))


def mean_kappa(params: Params, symmetry: Symmetry, curves: tuple[Tensor, ...]) -> Tensor:
    """The mean `kappa` of the `sample_curves`, differentiable in `params`."""
    continuous = Product([symmetry]).continuous
    if all(map(is_matrix_scaling, continuous)):
        return scaling_kappas(params, continuous, curves).mean()
    if is_chain(continuous):
        return vmap(kappa)(*product_jets(continuous, params, curves)).mean()
    return vmap(lambda xi: kappa(*continuous.jet(params, xi)), chunk_size=CURVES)(curves).mean()


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
    across = {n: second[n] - along.to(first[n].device) * first[n] for n in first}
    return (dot(across, across) + torch.finfo(speed.dtype).tiny).sqrt() / speed
