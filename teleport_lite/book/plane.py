r"""Test functions of the plane whose level sets are circles in disguise, with their SO(2) symmetry.

Each is $f(w) = u^2 + v^2$ in suitable coordinates $(u, v) = \varphi(w)$; rotating $(u, v)$ keeps f. The functions are
those of arXiv:2205.10637; the chapter *Orbits* derives the actions, *Teleporting* uses them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from teleport_lite.errors import UnknownNameError
from teleport_lite.groups import SpecialOrthogonal
from teleport_lite.symmetries.base import Symmetry


@dataclass(frozen=True)
class Chart:
    """Coordinates (u, v) of the plane: `flat` maps w to (u, v), `curved` maps back; both on the last dimension.

    `linear` says that `flat` is affine.
    """

    flat: Callable[[Tensor], Tensor]
    curved: Callable[[Tensor], Tensor]
    linear: bool


def _elliptic_chart(a: float, b: float) -> Chart:
    def axis_lengths(w: Tensor) -> Tensor:
        return torch.tensor([a, b], dtype=w.dtype, device=w.device)

    return Chart(lambda w: w * axis_lengths(w), lambda z: z / axis_lengths(z), linear=True)


def _booth_flat(w: Tensor) -> Tensor:
    x, y = w.unbind(-1)
    return torch.stack([x + 2 * y - 7, 2 * x + y - 5], -1)


def _booth_curved(z: Tensor) -> Tensor:
    u, v = z.unbind(-1)
    return torch.stack([(2 * v - u) / 3 + 1, (2 * u - v) / 3 + 3], -1)


def _rosenbrock_flat(w: Tensor) -> Tensor:
    x, y = w.unbind(-1)
    return torch.stack([10 * (x**2 - y), x - 1], -1)


def _rosenbrock_curved(z: Tensor) -> Tensor:
    u, v = z.unbind(-1)
    return torch.stack([v + 1, (v + 1) ** 2 - u / 10], -1)


CHARTS = {
    "ellipse": _elliptic_chart(1.0, 3.0),
    "booth": Chart(_booth_flat, _booth_curved, linear=True),
    "rosenbrock": Chart(_rosenbrock_flat, _rosenbrock_curved, linear=False),
}


class PlaneRotation(Symmetry):
    r"""Rotation of $(u, v) = \varphi(w)$ by SO(2): $w \mapsto \varphi^{-1}(R(\xi)\,\varphi(w))$.

    `xi` has shape [1]: the angle in radians.

    Args:
        chart: the coordinates in which f is $u^2 + v^2$.
        name: the parameter, of shape [2].
    """

    def __init__(self, chart: Chart, name: str = "w") -> None:
        self.chart, self.names, self.group, self.linear = chart, (name,), SpecialOrthogonal(2), chart.linear

    def move(self, params, xi):
        (name,) = self.names
        turned = self.group.along(self.group.exp(xi), self.chart.flat(params[name]), -1)
        return {name: self.chart.curved(turned)}


class TestFunction(nn.Module):
    """A test function of the plane as a model: its parameter `w` [2] is the point, its output the value f(w).

    Args:
        name: ellipse (x^2 + 9 y^2), booth or rosenbrock.
        start: the point to begin at.

    Raises:
        UnknownNameError: for another name.

    >>> point = TestFunction("rosenbrock", start=(-1.0, -1.0))
    >>> point().item(), point.symmetry
    (404.0, PlaneRotation(w; SO(2), dim 1, all inputs))
    """

    __test__ = False  # not a test case, whatever its name

    def __init__(self, name: str, start: tuple[float, float]) -> None:
        super().__init__()
        if name not in CHARTS:
            raise UnknownNameError("test function", name, CHARTS)
        self.name, self.chart = name, CHARTS[name]
        self.w = nn.Parameter(torch.tensor([float(c) for c in start]))
        self.symmetry = PlaneRotation(self.chart)

    def forward(self) -> Tensor:
        return self.value(self.w)

    def value(self, w: Tensor) -> Tensor:
        """The values f(w) at the points `w` [..., 2], shape [...]."""
        return self.chart.flat(w).square().sum(-1)

    def extra_repr(self) -> str:
        return f"{self.name}, w={self.w.tolist()}"
