"""Figures and explorers for the book (needs the extra `teleport-lite[book]`).

One style, one palette in which an experimental arm has the same colour everywhere, and one kind of explorer: sliders
over frames that are drawn once, so that it moves in a notebook, in Colab and on a static page alike.
"""

from __future__ import annotations

import base64
import html
import io
import itertools
import json
import math
import string
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from teleport_lite.errors import ShapeError, TeleportError, UnknownNameError

try:
    import matplotlib.pyplot as plt
    from cycler import cycler
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import BoundaryNorm, LinearSegmentedColormap
    from matplotlib.contour import QuadContourSet
    from matplotlib.figure import Figure
    from PIL import Image
except ImportError as error:
    raise TeleportError("matplotlib", "none", "pip install teleport-lite[book]") from error

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


# --- figures ----------------------------------------------------------------------------------------------------------

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


def _range(runs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return runs.quantile(0.5, dim=0), runs.amin(0), runs.amax(0)


def _deviation(runs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    mean, spread = runs.mean(0), runs.std(0, correction=min(1, len(runs) - 1))
    return mean, mean - spread, mean + spread


BANDS = {"range": _range, "std": _deviation}


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


# --- explorers --------------------------------------------------------------------------------------------------------

_WIDGET = "application/vnd.jupyter.widget-view+json"
_DPI = 120
_MARGIN = 4  # pixels
_MOST = 144


@dataclass(frozen=True, eq=False, repr=False)
class Explorer:
    """Frames over one or two sliders; shows as a player that needs no kernel, and as an ipywidgets control with one.

    Made by `explorer`.

    Attributes:
        frames: pictures (lossless WebP), in the order of `itertools.product` over the values.
        values: by parameter, what its slider runs over.
        labels: by parameter, what stands beside its slider.
        alt: what the picture shows, in words.
    """

    frames: list[bytes]
    values: dict[str, list]
    labels: dict[str, str]
    alt: str

    def __repr__(self) -> str:
        return f"Explorer({', '.join(f'{name}: {len(v)} values' for name, v in self.values.items())})"

    def html(self) -> str:
        """The player as self-contained HTML: a picture, a play button and labelled sliders.

        The middle frame is whole; of the others only what differs from it is kept, everything else is transparent.
        """
        start = self.position([len(v) // 2 for v in self.values.values()])
        base = _decode(self.frames[start])
        texts = {name: _texts(values) for name, values in self.values.items()}
        sliders = "".join(
            _SLIDER.substitute(
                label=html.escape(self.labels[name]),
                last=len(text) - 1,
                middle=len(text) // 2,
                text=html.escape(text[len(text) // 2]),
            )
            for name, text in texts.items()
        )
        facts = repr((self.values, self.labels, self.alt)).encode()
        return _PLAYER.substitute(
            key=f"{zlib.crc32(b''.join([*self.frames, facts])):08x}",
            alt=html.escape(self.alt),
            height=base.shape[0],
            width=base.shape[1],
            sliders=sliders,
            base=base64.b64encode(_encode(base)).decode(),
            frames=json.dumps([base64.b64encode(_encode(_decode(f), base)).decode() for f in self.frames]),
            texts=json.dumps([*texts.values()]).replace("</", r"<\/"),
            pause=_PAUSE,
        )

    def widget(self):
        """The control as an ipywidgets box: a play button, sliders, and the picture, which the kernel changes."""
        import ipywidgets

        sliders = [
            ipywidgets.SelectionSlider(
                options=[(text, i) for i, text in enumerate(_texts(values))],
                value=len(values) // 2,
                description=self.labels[name],
                style={"description_width": "initial"},
                layout={"width": "28em", "max_width": "100%"},
            )
            for name, values in self.values.items()
        ]
        play = ipywidgets.Play(value=sliders[0].index, max=len(sliders[0].options) - 1, interval=_PAUSE, repeat=True)
        ipywidgets.jslink((play, "value"), (sliders[0], "index"))
        picture = ipywidgets.Image(format="webp", layout={"max_width": "100%"})

        def show(_=None) -> None:
            picture.value = self.frames[self.position([s.index for s in sliders])]

        show()
        for slider in sliders:
            slider.observe(show, "index")
        return ipywidgets.VBox([picture, ipywidgets.HBox([play, ipywidgets.VBox(sliders)])])

    def position(self, indices: Iterable[int]) -> int:
        """Which frame belongs to the value at `indices[i]` of the i-th slider."""
        k = 0
        for values, index in zip(self.values.values(), indices, strict=True):
            k = k * len(values) + index
        return k

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict[str, Any]:
        bundle: dict[str, Any] = {"text/plain": repr(self), "text/html": self.html()}
        try:
            view = {"version_major": 2, "version_minor": 0, "model_id": self.widget().model_id}
        except ImportError:
            return bundle
        return bundle | {_WIDGET: view}


def explorer(
    draw: Callable[..., None],
    *,
    alt: str,
    labels: Mapping[str, str] | None = None,
    figsize: tuple[float, float] = (6.4, 3.6),
    **values: Iterable,
) -> Explorer:
    """Draw a figure for every value of one parameter (or every pair of two) and put sliders under it.

    Axes keep the place that they have in the first frame, so that nothing jumps; set their limits in `draw`.

    Args:
        draw: called with a fresh figure and the values by name.
        alt: what the picture shows, for those who cannot see it.
        labels: what to write beside the sliders, by name; the names themselves by default.
        figsize: size of the figure in inches.
        values: the numbers or words of one or two parameters, in order.

    Raises:
        TeleportError: when there are no or more than two parameters, an empty one, or more than 144 frames.
        UnknownNameError: when a label belongs to no parameter.

    >>> def draw(fig, angle):
    ...     fig.subplots().plot([0, math.cos(angle)], [0, math.sin(angle)])
    >>> explorer(draw, alt="a rotating line", angle=torch.linspace(0, 1, 5))
    Explorer(angle: 5 values)
    """
    lists = {name: [v.item() if hasattr(v, "item") else v for v in vs] for name, vs in values.items()}
    if not 1 <= len(lists) <= 2 or not all(lists.values()):
        got = f"{len(lists)} with lengths {[len(v) for v in lists.values()]}"
        raise TeleportError("one or two parameters with at least one value each", got, "pass name=[value, ...]")
    if (number := math.prod(map(len, lists.values()))) > _MOST:
        raise TeleportError(f"at most {_MOST} frames", number, "pass fewer values")
    for name in labels or {}:
        if name not in lists:
            raise UnknownNameError("parameter", name, lists)
    frames: list[bytes] = []
    places: list = []
    for choice in itertools.product(*lists.values()):
        fig = Figure(figsize=figsize, dpi=_DPI, layout="constrained", facecolor="white")
        canvas = FigureCanvasAgg(fig)
        draw(fig, **dict(zip(lists, choice, strict=True)))
        if len(places) != len(fig.axes):
            fig.draw_without_rendering()
            places = [ax.get_position(original=True) for ax in fig.axes]
        fig.set_layout_engine("none")
        for ax, place in zip(fig.axes, places, strict=True):
            ax.set_position(place)
        canvas.draw()
        frames.append(_encode(np.asarray(canvas.buffer_rgba())[..., :3], effort=0))
    return Explorer(frames, lists, {name: (labels or {}).get(name, name) for name in lists}, alt)


def _encode(picture: np.ndarray, base: np.ndarray | None = None, *, effort: int = 2) -> bytes:
    """A picture [height, width, 3] as lossless WebP; transparent where it is equal to `base`.

    What is kept has a margin, in which both are equal: a browser that scales the pictures blends over a few pixels.
    """
    if base is not None:
        changed = torch.from_numpy((picture != base).any(-1)).float()[None]
        for size, margin in (((2 * _MARGIN + 1, 1), (_MARGIN, 0)), ((1, 2 * _MARGIN + 1), (0, _MARGIN))):
            changed = torch.nn.functional.max_pool2d(changed, size, stride=1, padding=margin)
        mask = (255 * changed).byte().numpy()[0, ..., None]
        picture = np.concatenate([picture & mask, mask], -1)
    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(stream, "webp", lossless=True, method=effort)
    return stream.getvalue()


def _decode(frame: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(frame)).convert("RGB"))


def _texts(values: list) -> list[str]:
    """How a slider shows its values: three significant digits, and no rounding noise around zero.

    >>> _texts([-0.5, 1e-9, 0.5]), _texts([1e-9, 1e-4, 10.0]), _texts([1, 20000, "sgd"])
    (['-0.5', '0', '0.5'], ['1e-09', '0.0001', '10'], ['1', '20000', 'sgd'])
    """
    numbers = sorted(v for v in values if isinstance(v, float))
    noise = 1e-6 * min((b - a for a, b in itertools.pairwise(numbers)), default=0)
    return [f"{v if abs(v) > noise else 0:.3g}" if isinstance(v, float) else str(v) for v in values]


_PAUSE = 150  # milliseconds from frame to frame

_SLIDER = string.Template(
    '<label style="flex:1 1 14em;min-width:0;margin:0">'
    '<span>$label = <output style="font-variant-numeric:tabular-nums">$text</output></span>'
    '<input type="range" min="0" max="$last" value="$middle" step="1" aria-label="$label" aria-valuetext="$text" '
    'style="display:block;width:100%;margin:.2em 0;accent-color:#0072B2"></label>'
)

_PLAYER = string.Template(
    """<div class="tl-player" data-key="$key" style="box-sizing:border-box;max-width:calc(${width}px + 1em);\
margin:0 auto;padding:.5em;border-radius:6px;background:#FFF;color:#1A1A1A;color-scheme:light">
<img src="data:image/webp;base64,$base" alt="$alt" width="$width" height="$height" \
style="display:block;width:100%;height:auto;filter:none;background:#FFF 0 0/100% 100% no-repeat">
<div style="display:flex;gap:.8em;align-items:center;margin-top:.4em">
<button type="button" style="width:4.5em;padding:.3em 0;border:1px solid #9AA7B5;border-radius:4px;\
background:#F3F5F8;color:inherit;font:inherit;cursor:pointer">Play</button>
<div style="flex:1;min-width:0;display:flex;flex-wrap:wrap;gap:.2em 1.5em">$sliders</div></div>
<script>(() => {
  const prefix = "data:image/webp;base64,", frames = $frames, texts = $texts;
  const play = box => {
    const image = box.querySelector("img"), button = box.querySelector("button");
    const sliders = [...box.querySelectorAll("input")], outputs = box.querySelectorAll("output");
    let timer = 0;
    const show = () => {
      let k = 0;
      sliders.forEach((slider, i) => {
        const text = texts[i][slider.value];
        k = k * texts[i].length + Number(slider.value);
        slider.setAttribute("aria-valuetext", text);
        outputs[i].value = text;
      });
      image.src = prefix + frames[k];
    };
    const stop = () => { clearInterval(timer); timer = 0; button.textContent = "Play"; };
    const step = () => {
      if (!box.isConnected) return stop();
      sliders[0].value = (Number(sliders[0].value) + 1) % texts[0].length;
      show();
    };
    image.style.backgroundImage = `url("$${image.src}")`;
    sliders.forEach(slider => slider.addEventListener("input", () => { stop(); show(); }));
    button.addEventListener("click", () => {
      if (timer) return stop();
      button.textContent = "Pause";
      timer = setInterval(step, $pause);
    });
    show();
  };
  const start = tries => {
    const boxes = document.querySelectorAll('.tl-player[data-key="$key"]:not([data-ready])');
    boxes.forEach(box => { box.dataset.ready = ""; play(box); });
    if (!boxes.length && tries) setTimeout(start, 50, tries - 1);
  };
  start(100);
})();</script>
</div><!-- tl-player -->"""
)
