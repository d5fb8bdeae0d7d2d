"""Figures and explorers for the book (needs the extra `teleport-lite[book]`).

One style, one palette in which an experimental arm has the same colour everywhere, and one kind of explorer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from teleport_lite.errors import ShapeError, TeleportError, UnknownNameError

try:
    import matplotlib.pyplot as plt
    from cycler import cycler
    from matplotlib.axes import Axes
    from matplotlib.colors import BoundaryNorm, LinearSegmentedColormap
    from matplotlib.contour import QuadContourSet

    from teleport_lite.book.explorer import Explorer, explorer
except ImportError as error:
    raise TeleportError("matplotlib", "none", "pip install teleport-lite[book]") from error

__all__ = ["BANDS", "COLOURS", "Explorer", "colour", "compare", "explorer", "level_sets", "path", "use_style"]
COLOURS = {
    "plain": "#6E6E6E",
    "teleport": "#0072B2",
    "random": "#E69F00",
    "reset": "#009E73",
    "accent": "#D55E00",
    "balance": "#CC79A7",
    "light": "#56B4E9",
    "ink": "#1A1A1A",
}


def use_style() -> None:
    """Set the figure style of the book: colour-blind safe, quiet axes, on a white card in light and dark pages."""
    plt.rcdefaults()
    plt.rcParams.update(
        {
            "axes.prop_cycle": cycler(color=[c for name, c in COLOURS.items() if name != "ink"]),
            "axes.spines.right": False,
            "axes.spines.top": False,
            "axes.titlesize": "medium",
            "figure.constrained_layout.use": True,
            "figure.dpi": 96,
            "figure.figsize": (6.4, 3.8),
            "font.size": 10.5,
            "image.cmap": "Blues",
            "legend.frameon": False,
            "lines.linewidth": 1.8,
            "savefig.facecolor": "white",
        }
    )


def colour(arm: str) -> str:
    """The colour of an arm.

    Raises:
        UnknownNameError: when the palette has none.

    >>> colour("teleport")
    '#0072B2'
    """
    if arm not in COLOURS:
        raise UnknownNameError("arm", arm, COLOURS)
    return COLOURS[arm]


_VALLEY = LinearSegmentedColormap.from_list("valley", ["#FFFFFF", "#E3E9F0", "#BCC8D6"])
_RIM = "#9AA7B5"
_GRID = 240


def level_sets(
    ax: Axes,
    f: Callable[[Tensor], Tensor],
    xlim: tuple[float, float],
    ylim: tuple[float, float],
    *,
    levels: int | Iterable[float] = 12,
) -> QuadContourSet:
    """Draw the level sets of `f` over a rectangle: white where it is low, grey where it is high.

    A number n of levels is spread so that a bowl gets evenly spaced rings, whatever the range of f: below the k-th of
    them lies k²/(n + 1)² of the area.

    Args:
        ax: where to draw.
        f: a function of points, [..., 2] to [...].
        xlim: range of the first coordinate.
        ylim: range of the second coordinate.
        levels: how many level sets, or their values.

    Returns:
        The lines, for `ax.clabel`.

    Raises:
        ShapeError: when f does not return one value a point.
        TeleportError: when f is constant, or finite nowhere.
    """
    x, y = torch.linspace(*xlim, _GRID), torch.linspace(*ylim, _GRID)
    with torch.no_grad():
        values = f(torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)).cpu().double()
    if values.shape != (_GRID, _GRID):
        raise ShapeError("f(points)", f"[{_GRID}, {_GRID}]", list(values.shape), "return one value a point, [...]")
    finite = values[values.isfinite()]
    if len(finite.unique()) < 2:
        raise TeleportError("a function with several values", finite.unique().tolist(), "draw another one")
    if isinstance(levels, int):
        levels = torch.quantile(finite, torch.linspace(0, 1, levels + 2, dtype=torch.float64)[1:-1] ** 2).tolist()
    levels = np.unique([*levels])
    edges = np.unique([float(finite.min()), *levels, float(finite.max())])
    heights = np.ma.masked_invalid(values.numpy())
    ax.contourf(x, y, heights, levels=edges, norm=BoundaryNorm(edges, _VALLEY.N), cmap=_VALLEY)
    lines = ax.contour(x, y, heights, levels=levels, colors=_RIM, linewidths=0.7)
    ax.set(xlim=xlim, ylim=ylim)
    return lines


def path(ax: Axes, points: Tensor, arm: str, *, label: str | None = None, marker: str = "o") -> None:
    """Draw a trajectory in the colour of its arm; a ring marks its start.

    Args:
        ax: where to draw.
        points: [steps, 2].
        arm: a name from `COLOURS`.
        label: its name in the legend, the arm by default.
        marker: what marks each point, "" for a line alone.

    Raises:
        ShapeError: when `points` is not [steps, 2].
        UnknownNameError: when the arm has no colour.
    """
    points = torch.as_tensor(points).detach().cpu()
    if points.ndim != 2 or points.shape[1] != 2:
        raise ShapeError("points", "[steps, 2]", list(points.shape), "stack the points in rows")
    ax.plot(points[:, 0], points[:, 1], marker=marker, ms=3.2, lw=1.3, color=colour(arm), label=label or arm)
    ax.plot(*points[:1].T, marker="o", ms=8, mfc="none", color=colour(arm))


def _median_and_range(runs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return runs.quantile(0.5, dim=0), runs.amin(0), runs.amax(0)


def _mean_and_deviation(runs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    mean, spread = runs.mean(0), runs.std(0, correction=min(1, len(runs) - 1))
    return mean, mean - spread, mean + spread


BANDS = {"range": _median_and_range, "std": _mean_and_deviation}


def compare(
    ax: Axes,
    curves: Mapping[str, Tensor],
    x: Tensor | None = None,
    *,
    band: str = "range",
    labels: Mapping[str, str] | None = None,
) -> None:
    """Draw a line and a band over the runs of each arm.

    Args:
        ax: where to draw.
        curves: by arm (a name from `COLOURS`), [runs, steps], or [steps] for one run.
        x: where the steps lie, [steps]; 0, 1, 2 ... by default.
        band: "range" for the median and all runs around it, "std" for the mean and one standard deviation.
        labels: by arm, its name in the legend; the arm by default.

    Raises:
        ShapeError: when a curve is neither [runs, steps] nor [steps].
        UnknownNameError: when an arm has no colour, or for another band.
    """
    if band not in BANDS:
        raise UnknownNameError("band", band, BANDS)
    for arm, curve in curves.items():
        runs = torch.atleast_2d(torch.as_tensor(curve).detach().cpu().double())
        if runs.ndim != 2 or (x is not None and runs.shape[1] != len(x)):
            expected = "[runs, steps]" if x is None else f"[runs, {len(x)}]"
            raise ShapeError(f"curves[{arm!r}]", expected, list(runs.shape), "stack the runs in rows")
        steps = torch.arange(runs.shape[1]) if x is None else torch.as_tensor(x).detach().cpu()
        line, low, high = BANDS[band](runs)
        ax.plot(steps, line, color=colour(arm), label=(labels or {}).get(arm, arm))
        if len(runs) > 1:
            ax.fill_between(steps, low, high, color=colour(arm), alpha=0.18, lw=0)
    ax.legend()
