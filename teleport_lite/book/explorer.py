"""Explorers: sliders over frames that are drawn once; they move in a notebook, in Colab and on a static page alike."""

from __future__ import annotations

import base64
import html
import io
import itertools
import json
import math
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from teleport_lite.book.player import PAUSE, PLAYER, SLIDER
from teleport_lite.errors import TeleportError, UnknownNameError

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
        base = _decode_webp(self.frames[start])
        texts = {name: _slider_texts(values) for name, values in self.values.items()}
        sliders = "".join(
            SLIDER.substitute(
                label=html.escape(self.labels[name]),
                last=len(text) - 1,
                middle=len(text) // 2,
                text=html.escape(text[len(text) // 2]),
            )
            for name, text in texts.items()
        )
        facts = repr((self.values, self.labels, self.alt)).encode()
        return PLAYER.substitute(
            key=f"{zlib.crc32(b''.join([*self.frames, facts])):08x}",
            alt=html.escape(self.alt),
            height=base.shape[0],
            width=base.shape[1],
            sliders=sliders,
            base=base64.b64encode(_encode_webp(base)).decode(),
            frames=json.dumps([base64.b64encode(_encode_webp(_decode_webp(f), base)).decode() for f in self.frames]),
            texts=json.dumps([*texts.values()]).replace("</", r"<\/"),
            pause=PAUSE,
        )

    def widget(self):
        """The control as an ipywidgets box: a play button, sliders, and the picture, which the kernel changes."""
        import ipywidgets

        sliders = [
            ipywidgets.SelectionSlider(
                options=[(text, i) for i, text in enumerate(_slider_texts(values))],
                value=len(values) // 2,
                description=self.labels[name],
                style={"description_width": "initial"},
                layout={"width": "28em", "max_width": "100%"},
            )
            for name, values in self.values.items()
        ]
        play = ipywidgets.Play(value=sliders[0].index, max=len(sliders[0].options) - 1, interval=PAUSE, repeat=True)
        ipywidgets.jslink((play, "value"), (sliders[0], "index"))
        picture = ipywidgets.Image(format="webp", layout={"max_width": "100%"})

        def show_frame(_=None) -> None:
            picture.value = self.frames[self.position([s.index for s in sliders])]

        show_frame()
        for slider in sliders:
            slider.observe(show_frame, "index")
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
        frames.append(_encode_webp(np.asarray(canvas.buffer_rgba())[..., :3], effort=0))
    return Explorer(frames, lists, {name: (labels or {}).get(name, name) for name in lists}, alt)


def _encode_webp(picture: np.ndarray, base: np.ndarray | None = None, *, effort: int = 2) -> bytes:
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


def _decode_webp(frame: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(frame)).convert("RGB"))


def _slider_texts(values: list) -> list[str]:
    """How a slider shows its values: three significant digits, and no rounding noise around zero.

    >>> _slider_texts([-0.5, 1e-9, 0.5]), _slider_texts([1e-9, 1e-4, 10.0]), _slider_texts([1, 20000, "sgd"])
    (['-0.5', '0', '0.5'], ['1e-09', '0.0001', '10'], ['1', '20000', 'sgd'])
    """
    numbers = sorted(v for v in values if isinstance(v, float))
    noise = 1e-6 * min((b - a for a, b in itertools.pairwise(numbers)), default=0)
    return [f"{v if abs(v) > noise else 0:.3g}" if isinstance(v, float) else str(v) for v in values]
