"""Figures show what they say; explorers move without a kernel, are small, and their players are independent."""

from __future__ import annotations

import base64
import io
import json
import re
import runpy
import shutil
import subprocess
import sys

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image

from teleport_lite.book import plot
from teleport_lite.errors import ShapeError, TeleportError, UnknownNameError

matplotlib.use("agg")

WIDGET = "application/vnd.jupyter.widget-view+json"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--hide-scrollbars"),
    *("--force-device-scale-factor=1", "--virtual-time-budget=5000"),
]
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here to move the sliders in")


@pytest.fixture
def ax():
    fig, ax = plt.subplots()
    yield ax
    plt.close(fig)


def line(fig, angle, length=1.0):
    angle = torch.tensor(angle)
    ax = fig.subplots()
    ax.plot([0, length * angle.cos()], [0, length * angle.sin()])
    ax.set(xlim=(-1, 1), ylim=(-1, 1))


@pytest.fixture(scope="module")
def three() -> plot.Explorer:
    return plot.explorer(
        line, alt='a <line> & its "end"', labels={"angle": "angle (rad)"}, angle=torch.tensor([0.0, 1.5, 3.0])
    )


@pytest.fixture(scope="module")
def grid() -> plot.Explorer:
    return plot.explorer(line, alt="a line", angle=[0.0, 1.0], length=[0.2, 0.6, 1.0])


def pixels(frame: bytes | str, mode: str = "RGB") -> np.ndarray:
    """The pixels of a picture, [height, width, channels]."""
    stream = io.BytesIO(base64.b64decode(frame) if isinstance(frame, str) else frame)
    return np.asarray(Image.open(stream).convert(mode))


# --- figures ----------------------------------------------------------------------------------------------------------


def test_levels_of_a_bowl_are_evenly_spaced_rings(ax):
    drawn = plot.level_sets(ax, lambda w: 1e3 * w.square().sum(-1) - 5, (-1, 1), (-1, 1), levels=9)
    radii = np.sqrt((drawn.levels[:8] + 5) / 1e3)
    assert len(drawn.levels) == 9
    assert np.allclose(radii, np.arange(1, 9) * 2 / 10 / np.sqrt(np.pi), rtol=0.02)  # k²/100 of the area 4
    assert ax.get_xlim() == ax.get_ylim() == (-1, 1)


def test_levels_can_be_given_and_infinite_values_are_left_out(ax):
    drawn = plot.level_sets(ax, lambda w: w[..., 0].log(), (0.0, 1.0), (0.0, 1.0), levels=iter([-1.0, -2.0]))
    assert drawn.levels.tolist() == [-2, -1]
    corners = [segment[0, 0] for level in drawn.allsegs for segment in level]
    assert np.allclose(corners, np.exp([-2, -1]), atol=1e-4)


@pytest.mark.parametrize(
    ("f", "error"),
    [(lambda w: w, ShapeError), (lambda w: w[..., 0] * 0, TeleportError), (lambda w: w[..., 0] / 0, TeleportError)],
    ids=["two values a point", "constant", "infinite"],
)
def test_functions_without_level_sets_are_refused(ax, f, error):
    with pytest.raises(error):
        plot.level_sets(ax, f, (0.5, 1), (0.5, 1))


def test_a_path_has_the_colour_of_its_arm_and_a_ring_at_its_start(ax):
    points = torch.rand(5, 2, requires_grad=True)
    plot.path(ax, points, "teleport", label="moved")
    track, ring = ax.lines
    assert track.get_color() == ring.get_color() == plot.COLOURS["teleport"] and track.get_label() == "moved"
    assert np.allclose(track.get_xydata(), points.detach()) and np.allclose(ring.get_xydata(), points[:1].detach())
    with pytest.raises(ShapeError, match=r"points of shape \[steps, 2\], got shape \[5\]"):
        plot.path(ax, points[:, 0], "teleport")


def test_comparisons_show_the_middle_and_the_spread_of_the_runs(ax):
    runs = torch.tensor([[1.0, 4.0], [2.0, 0.0], [3.0, 1.0], [10.0, 2.0]])
    plot.compare(ax, {"plain": runs, "reset": runs[0]}, x=torch.tensor([0, 5]), labels={"plain": "SGD"})
    assert ax.lines[0].get_xydata().tolist() == [[0, 2.5], [5, 1.5]]
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["SGD", "reset"]
    (band,) = ax.collections  # a single run has none
    corners = band.get_paths()[0].vertices
    assert {tuple(c) for c in corners.tolist()} == {(0, 1), (0, 10), (5, 0), (5, 4)}


def test_comparisons_by_mean_and_deviation(ax):
    plot.compare(ax, {"plain": torch.tensor([[1.0, 5.0], [3.0, 5.0]])}, band="std")
    assert ax.lines[0].get_ydata().tolist() == [2, 5]
    assert ax.collections[0].get_paths()[0].vertices[:, 1].max() == pytest.approx(5)
    assert ax.collections[0].get_paths()[0].vertices[:, 1].min() == pytest.approx(2 - 2**0.5)


def test_unknown_names_list_the_known_ones_and_wrong_shapes_are_named(ax):
    with pytest.raises(UnknownNameError, match="'plain', 'teleport', .* got 'pink'"):
        plot.compare(ax, {"pink": torch.ones(3)})
    with pytest.raises(UnknownNameError, match="'range', 'std', got 'sem'"):
        plot.compare(ax, {"plain": torch.ones(3)}, band="sem")
    with pytest.raises(ShapeError, match=r"curves\['plain'\] of shape \[runs, 4\], got shape \[1, 3\]"):
        plot.compare(ax, {"plain": torch.ones(3)}, x=torch.arange(4))


def test_the_style_is_a_white_card_without_a_frame():
    with matplotlib.rc_context():
        plt.rcParams["axes.spines.top"] = plt.rcParams["legend.frameon"] = True
        plot.use_style()
        fig, ax = plt.subplots()
        assert not ax.spines["top"].get_visible() and not plt.rcParams["legend.frameon"]
        assert matplotlib.colors.to_hex(fig.get_facecolor()) == "#ffffff"
        assert next(iter(plt.rcParams["axes.prop_cycle"]))["color"] == plot.COLOURS["plain"]
        plt.close(fig)


def test_without_matplotlib_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(TeleportError, match=r"expected matplotlib, got none; pip install teleport-lite\[book\]"):
        runpy.run_path(plot.__file__)


# --- explorers --------------------------------------------------------------------------------------------------------


def test_the_player_is_closed_deterministic_and_needs_nothing_else(three):
    page = three.html()
    again = plot.explorer(line, alt=three.alt, labels=three.labels, angle=[0.0, 1.5, 3.0])
    other = plot.explorer(line, alt=three.alt, labels={"angle": "turn"}, angle=[0.0, 1.5, 3.0])
    assert page == again.html() != other.html()
    assert len({re.search(r'data-key="(\w+)"', e.html())[1] for e in (three, again, other)}) == 2
    assert page.startswith('<div class="tl-player"') and page.endswith("</div><!-- tl-player -->")
    assert page.count("</div><!-- tl-player -->") == 1
    assert 'alt="a &lt;line&gt; &amp; its &quot;end&quot;"' in page and 'aria-label="angle (rad)"' in page
    assert not re.search(r"https?:|(src|href)=\"(?!data:)", page)
    assert repr(three) == "Explorer(angle: 3 values)" and plt.get_fignums() == []


def test_the_player_holds_the_frames_exactly(three):
    """The middle frame is whole; laid over it, the others give back what was drawn."""
    page = three.html()
    base = pixels(re.search(r'src="data:image/webp;base64,([^"]+)"', page)[1])
    layers = json.loads(re.search(r"frames = (\[.*?\])", page)[1])
    drawn = [pixels(frame) for frame in three.frames]
    assert (base == drawn[1]).all() and all((drawn[i] != drawn[1]).any() for i in (0, 2))
    for encoded, frame in zip(layers, drawn, strict=True):
        layer = pixels(encoded, "RGBA")
        assert set(np.unique(layer[..., 3])) <= {0, 255}
        assert (np.where(layer[..., 3:] == 255, layer[..., :3], base) == frame).all()
    assert not pixels(layers[1], "RGBA")[..., 3].any()


def test_forty_frames_fit_into_a_page():
    def draw(fig, t):
        left, right = fig.subplots(1, 2)
        plot.level_sets(left, lambda w: (w - 0.3).square().sum(-1), (-1, 1), (-1, 1))
        plot.path(left, torch.linspace(0, t, 30)[:, None] * torch.tensor([1.0, 0.5]), "teleport")
        right.plot([0, t], [0, t * t])
        right.set(xlim=(0, 1), ylim=(0, 1))

    eight = plot.explorer(draw, alt="a path", t=torch.linspace(0, 1, 8)).html()
    assert len(eight) < 8 * 600_000 / 40


def test_two_sliders_give_a_frame_for_every_pair(grid):
    single = plot.explorer(line, alt="a line", angle=[1.0], length=[0.2])
    assert len(grid.frames) == 6 and grid.frames[grid.position([1, 0])] == single.frames[0]
    assert grid.html().count('type="range"') == 2 and repr(grid) == "Explorer(angle: 2 values, length: 3 values)"


def test_values_reach_draw_as_they_are():
    seen = []
    plot.explorer(lambda fig, v: seen.append(v), alt="nothing", v=[1, 2.5, "sgd", torch.tensor(3), np.float32(0.5)])
    assert seen == [1, 2.5, "sgd", 3, 0.5] and [type(v) for v in seen] == [int, float, str, int, float]


def test_axes_keep_their_place():
    figures = []

    def draw(fig, top):
        figures.append(fig)
        fig.subplots().set(ylim=(0, top), ylabel="loss")

    plot.explorer(draw, alt="an axis", top=[1.0, 1e9])
    first, second = (fig.axes[0].get_position().bounds for fig in figures)
    assert first == second and first[0] > 0.05


def test_a_kernel_gets_a_widget_that_follows_its_sliders(grid):
    bundle = grid._repr_mimebundle_()
    assert set(bundle) == {"text/plain", "text/html", WIDGET} and bundle[WIDGET]["model_id"]
    shown, controls = grid.widget().children
    play, sliders = controls.children
    assert shown.value == grid.frames[grid.position([1, 1])] and (play.value, play.max) == (1, 1)
    sliders.children[0].index, sliders.children[1].index = 0, 2
    assert shown.value == grid.frames[2] != grid.frames[4]


def test_without_ipywidgets_the_player_remains(three, monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    assert set(three._repr_mimebundle_()) == {"text/plain", "text/html"}


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({}, TeleportError, "one or two parameters"),
        ({"a": [1], "b": [1], "c": [1]}, TeleportError, "got 3 with lengths"),
        ({"a": []}, TeleportError, r"got 1 with lengths \[0\]"),
        ({"a": range(20), "b": range(20)}, TeleportError, "at most 144 frames, got 400"),
        ({"a": [1], "labels": {"b": "beta"}}, UnknownNameError, "one of 'a', got 'b'"),
    ],
)
def test_explorers_refuse_what_they_cannot_show(values, error, message):
    with pytest.raises(error, match=message):
        plot.explorer(lambda fig, **_: None, alt="nothing", **values)


# --- in a browser -----------------------------------------------------------------------------------------------------


def browse(tmp_path, body: str, *more: str) -> str:
    page = tmp_path / "page.html"
    page.write_text(f'<!doctype html><meta charset="utf-8"><body style="margin:0">{body}</body>', "utf8")
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", *more, page.as_uri()]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


@in_browser
def test_moving_sliders_shows_their_frame(tmp_path, three, grid):
    """Copies of two players on one page, each moved to other values: each shows its frame, pixel by pixel."""
    cases = [(three, [0]), (three, [1]), (three, [2]), (grid, [1, 0]), (grid, [0, 2])]
    height, width, _ = pixels(three.frames[0]).shape
    body = "".join(
        f'<div style="position:absolute;top:{600 * i}px;width:{width + 16}px">{player.html()}</div>'
        for i, (player, _) in enumerate(cases)
    )
    move = f"""<script>document.querySelectorAll("input").forEach((slider, i) => {{
        slider.value = {[index for _, indices in cases for index in indices]}[i];
        slider.dispatchEvent(new Event("input")); }})</script>"""
    shot = tmp_path / "shot.png"
    browse(tmp_path, body + move, f"--window-size={width + 16},{600 * len(cases)}", f"--screenshot={shot}")
    page = pixels(shot.read_bytes())
    for i, (player, indices) in enumerate(cases):
        seen = page[600 * i + 8 : 600 * i + 8 + height, 8 : 8 + width]
        assert np.array_equal(seen, pixels(player.frames[player.position(indices)])), f"copy {i} shows another frame"


@in_browser
def test_the_player_plays_and_pauses_and_fits_a_phone(tmp_path, three):
    observe = """<script>
      const box = document.querySelector(".tl-player"), find = selector => box.querySelector(selector), log = [];
      const state = () => [find("input").value, find("output").value, find("input").ariaValueText,
                           find("button").textContent];
      log.push(state());
      find("button").click();
      setTimeout(() => {
        log.push(state());
        find("button").click();
        log.push(state());
        setTimeout(() => {
          const names = Object.keys(window).filter(name => !known.has(name) && !/^(box|find|log|state)$/.test(name));
          log.push(state(), box.scrollWidth, names);
          document.body.textContent = JSON.stringify(log);
        }, 1000);
      }, 200);
    </script>"""
    known = "<script>const known = new Set(Object.keys(window));</script>"
    body = f'{known}<div style="width:390px">{three.html()}</div>{observe}'
    text = browse(tmp_path, body, "--dump-dom")
    start, playing, paused, later, wide, names = json.loads(re.search(r"<body[^>]*>(.*?)</body>", text, re.DOTALL)[1])
    assert start == ["1", "1.5", "1.5", "Play"]
    assert playing == ["2", "3", "3", "Pause"]
    assert paused == later == ["2", "3", "3", "Play"]
    assert wide <= 390 and names == []
