"""Draw the diagrams of networks and groups: book/_static/diagrams/NAME.svg, one style, legible in light and in dark.

    python book/diagrams.py

Colours follow the reader's system, and on the site its theme. What a group element touches is vermillion, data that
flow are ink, weights are boxes.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable
from html import escape
from pathlib import Path

BOOK = Path(__file__).resolve().parent
FOLDER = BOOK / "_static" / "diagrams"
RECORD = BOOK / "results" / "mnist_teleport.json"
DARK = "--ink:#E8E8E8;--soft:#A9B1BA;--paper:#14181E;--card:#242B34;--blue:#56B4E9;--accent:#F58A4B;--fill:#56B4E940"
STYLE = f"""
.tl-d{{--ink:#1A1A1A;--soft:#5F6670;--paper:#FFF;--card:#EEF2F6;--blue:#0072B2;--accent:#C24E00;--fill:#0072B226}}
@media(prefers-color-scheme:dark){{.tl-d{{{DARK}}}}}
html[data-theme=light] .tl-d{{--ink:#1A1A1A;--soft:#5F6670;--paper:#FFF;--card:#EEF2F6;--blue:#0072B2;--accent:#C24E00;--fill:#0072B226}}
html[data-theme=dark] .tl-d{{{DARK}}}
.tl-d text{{fill:var(--ink);font:15px system-ui,"DejaVu Sans",sans-serif;text-anchor:middle;dominant-baseline:central}}
.tl-d .m{{font:italic 19px "STIX Two Text","Cambria","DejaVu Serif",Georgia,serif}}
.tl-d .s{{font-size:13px;fill:var(--soft)}} .tl-d .l{{text-anchor:start}} .tl-d .r{{text-anchor:end}}
.tl-d .p{{fill:var(--paper)}} .tl-d .box{{fill:var(--card);stroke:var(--ink);stroke-width:1.4}}
.tl-d .g{{fill:var(--paper);stroke:var(--accent);stroke-width:2}} .tl-d text.ga{{fill:var(--accent)}} .tl-d text.bl{{fill:var(--blue)}}
.tl-d .line{{fill:none;stroke:var(--ink);stroke-width:1.6}} .tl-d .thin{{fill:none;stroke:var(--soft);stroke-width:1}}
.tl-d .blue{{fill:none;stroke:var(--blue);stroke-width:2.6}} .tl-d .acc{{fill:none;stroke:var(--accent);stroke-width:2.6}}
.tl-d .soft{{fill:none;stroke:var(--soft);stroke-width:2.6}} .tl-d .sf{{fill:var(--soft)}}
.tl-d .rand{{fill:none;stroke:#D08A00;stroke-width:2.6}} .tl-d .rf{{fill:#D08A00}} .tl-d .bf{{fill:var(--blue)}} .tl-d .af{{fill:var(--accent)}} .tl-d .if{{fill:var(--ink)}} .tl-d .area{{fill:var(--fill)}}
.tl-d .dash{{stroke-dasharray:5 4}}
"""
DIAGRAMS: dict[str, tuple[str, Callable[[], str]]] = {}
Point = tuple[float, float]


def diagram(alt: str) -> Callable[[Callable[[], str]], Callable[[], str]]:
    """Register a drawing under its name, with what it shows in words."""

    def register(draw: Callable[[], str]) -> Callable[[], str]:
        DIAGRAMS[draw.__name__.replace("_", "-")] = (alt, draw)
        return draw

    return register


# --- strokes ----------------------------------------------------------------------------------------------------------


def label(x: float, y: float, text: str, kind: str = "") -> str:
    """Words; with the kind "m" mathematics, where ^{...} and _{...} are raised and lowered."""
    parts = re.split(r"([\^_])\{([^}]*)\}", text)
    out = [escape(parts[0])]
    for sign, inside, rest in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        dy = -0.45 if sign == "^" else 0.35
        out.append(f'<tspan dy="{dy}em" font-size="70%">{escape(inside)}</tspan>')
        out.append(f'<tspan dy="{-0.7 * dy:.3g}em">{escape(rest) or "&#8203;"}</tspan>')
    return f'<text x="{x:g}" y="{y:g}" class="{kind}">{"".join(out)}</text>'


def box(x: float, y: float, text: str, width: float = 64, height: float = 44) -> str:
    """A weight, or a fixed function, around a point."""
    return (
        f'<rect x="{x - width / 2:g}" y="{y - height / 2:g}" width="{width:g}" height="{height:g}" '
        f'rx="5" class="box"/>' + label(x, y, text, "m")
    )


def element(x: float, y: float, text: str, radius: float = 21) -> str:
    """A group element, in a ring."""
    ring = f'<circle cx="{x:g}" cy="{y:g}" r="{radius:g}" class="g"/>'
    return ring + label(x, y, text, "m ga")


def line(points: Iterable[Point], kind: str = "line", closed: bool = False) -> str:
    """A polygon line."""
    text = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return f'<path d="M{text}{"Z" if closed else ""}" class="{kind}"/>'


def arrow(*points: Point, kind: str = "line") -> str:
    """A polygon line with a head at its end."""
    (x0, y0), (x, y) = points[-2:]
    size = math.hypot(x - x0, y - y0)
    dx, dy = (x - x0) / size, (y - y0) / size
    fill = {"line": "if", "blue": "bf", "acc": "af", "thin": "if"}[kind.split()[0]]
    sides = [(x - 10 * dx + s * 4.5 * dy, y - 10 * dy - s * 4.5 * dx) for s in (1, -1)]
    stem = [*points[:-1], (x - 6 * dx, y - 6 * dy)]
    return line(stem, kind) + line([(x, y), *sides], fill, closed=True)


def dot(x: float, y: float, kind: str = "if", radius: float = 5) -> str:
    """A point."""
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" class="{kind}"/>'


def chain(y: float, xs: Iterable[float], half: Iterable[float]) -> str:
    """Arrows from one thing to the next, each of which takes `half` to both sides."""
    xs, half = list(xs), list(half)
    gaps = zip(
        zip(xs, half, strict=True), zip(xs[1:], half[1:], strict=True), strict=False
    )
    return "".join(arrow((x + a + 4, y), (z - b - 4, y)) for (x, a), (z, b) in gaps)


def picture(name: str) -> str:
    """The whole file."""
    alt, draw = DIAGRAMS[name]
    body, width, height = draw()
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="tl-d" viewBox="0 0 {width:g} {height:g}" '
        f'width="{width:g}" height="{height:g}" role="img" aria-label="{escape(alt)}">'
        f"<style>{STYLE.strip()}</style>"
        f'<rect class="p" width="{width:g}" height="{height:g}" rx="6"/>{body}</svg>\n'
    )


# --- diagrams ---------------------------------------------------------------------------------------------------------


@diagram(
    "Above, a network of two layers: the inputs X pass through V, the activation sigma and U. Below, the same with g "
    "behind V and its inverse before U; g joins V, the inverse joins U"
)
def two_layers():
    y, z = 50, 150
    top = [60, 180, 330, 480, 600]
    half = [12, 32, 32, 32, 12]
    body = [
        label(60, y, "X", "m"),
        box(180, y, "V"),
        box(330, y, "σ"),
        box(480, y, "U"),
    ]
    body += [label(600, y, "Y", "m"), chain(y, top, half)]
    low = [60, 140, 220, 330, 440, 520, 600]
    body += [label(60, z, "X", "m"), box(140, z, "V"), element(220, z, "g")]
    body += [box(330, z, "σ"), element(440, z, "g^{−1}"), box(520, z, "U")]
    body += [label(600, z, "Y", "m"), chain(z, low, [12, 32, 21, 32, 21, 32, 12])]
    for left, right, text in ((104, 245, "gV"), (415, 556, "Ug^{−1}")):
        body.append(
            line(
                [(left, z + 34), (left, z + 42), (right, z + 42), (right, z + 34)],
                "acc",
            )
        )
        body.append(label((left + right) / 2, z + 62, text, "m ga"))
    body.append(label(330, z + 58, "passes g if σ(gz) = gσ(z)", "s"))
    return "".join(body), 660, 235


@diagram(
    "A square of four arrows: from z by g to gz, then by sigma down; or from z by sigma down, then by g. Both ways end "
    "at the same point"
)
def commuting_square():
    a, b, y, z = 95, 345, 50, 185
    body = [label(a, y, "z", "m"), label(b, y, "gz", "m"), label(a, z, "σ(z)", "m")]
    body += [label(b + 28, z, "σ(gz) = gσ(z)", "m")]
    body += [
        arrow((a + 20, y), (b - 24, y), kind="acc"),
        arrow((a + 34, z), (b - 40, z), kind="acc"),
    ]
    body += [arrow((a, y + 20), (a, z - 22)), arrow((b, y + 20), (b, z - 22))]
    body += [
        label((a + b) / 2, y - 20, "g", "m ga"),
        label((a + b) / 2, z - 20, "g", "m ga"),
    ]
    body += [label(a - 20, (y + z) / 2, "σ", "m"), label(b + 20, (y + z) / 2, "σ", "m")]
    body.append(label((a + b) / 2, (y + z) / 2, "both ways agree", "s"))
    return "".join(body), 450, 230


@diagram(
    "An attention head. Queries and keys meet in a scalar product, one moved by g, the other by its inverse transpose. "
    "Values pass through f, are mixed over tokens by the attention weights, and f is undone before the output weight"
)
def attention_head():
    q, k, v = 50, 130, 235
    body = [label(46, k, "X", "m")]
    for y, weight, ring in (
        (q, "W_{Q}", "g"),
        (k, "W_{K}", "g^{−⊤}"),
        (v, "W_{V}", "f"),
    ):
        body += [
            arrow((64, k), (92, y), (124, y)) if y != k else arrow((64, k), (124, k))
        ]
        body += [
            box(160, y, weight),
            arrow((196, y), (216, y)),
            element(242, y, ring, 23),
        ]
    body += [
        arrow((267, q), (330, q), (352, 76)),
        arrow((267, k), (330, k), (352, 104)),
    ]
    body += [
        box(425, 90, "softmax K^{⊤}Q", 142, 48),
        label(330, 160, "scores: g cancels", "s"),
    ]
    body += [
        arrow((425, 116), (425, v - 26)),
        label(442, 165, "A", "m"),
        arrow((267, v), (390, v)),
    ]
    body.append(box(425, v, "· A"))
    body += [
        arrow((460, v), (488, v)),
        element(514, v, "f^{−1}", 23),
        arrow((539, v), (562, v)),
    ]
    body += [box(598, v, "W_{O}"), arrow((632, v), (660, v)), label(678, v, "Y", "m")]
    body.append(
        label(
            425,
            v + 42,
            "A acts on tokens, f on the entries of a token: they pass each other",
            "s",
        )
    )
    return "".join(body), 710, 300


@diagram(
    "The residual stream as a thick line from left to right. The embedding writes to it, two blocks read from it through "
    "a norm and write back, the read-out reads at the end. Everything that writes is multiplied by g, everything that "
    "reads by its inverse"
)
def residual_stream():
    y, z = 200, 80
    body = [
        line([(128, y), (696, y)], "blue"),
        label(40, y, "x", "m"),
        arrow((52, y), (74, y)),
    ]
    body += [
        box(104, y, "gE").replace('"m"', '"m ga"'),
        label(380, y + 22, "the stream z becomes gz", "s"),
    ]
    for left in (180, 440):
        body += [arrow((left, y), (left, z + 20)), box(left, z, "N", 44, 36)]
        body += [
            arrow((left + 24, z), (left + 38, z)),
            box(left + 72, z, "Ag^{−1}", 62, 36).replace('"m"', '"m ga"'),
        ]
        body += [
            arrow((left + 105, z), (left + 119, z)),
            box(left + 140, z, "F", 36, 36),
        ]
        body += [
            arrow((left + 160, z), (left + 174, z)),
            box(left + 202, z, "gB", 48, 36).replace('"m"', '"m ga"'),
        ]
        body += [
            arrow((left + 202, z + 20), (left + 202, y - 8)),
            dot(left + 202, y, "bf", 8),
        ]
        body += [
            line([(left + 197, y), (left + 207, y)], "line"),
            line([(left + 202, y - 5), (left + 202, y + 5)], "line"),
        ]
        body.append(label(left + 100, z - 36, "a block", "s"))
    body += [
        arrow((690, y), (722, y), kind="blue"),
        box(750, y, "N", 44, 36),
        arrow((775, y), (789, y)),
    ]
    body += [
        box(845, y, "W_{read} g^{−1}", 106, 40).replace('"m"', '"m ga"'),
        arrow((901, y), (922, y)),
        label(936, y, "y", "m"),
    ]
    return "".join(body), 960, 250


@diagram(
    "Three pictures of eight neurons between minus r and r. Sweeps from the lowest corner only rise, those from the "
    "highest only fall; at the end they meet at all neurons, so that one corner is left"
)
def vise():
    rows = [
        ("at the start", [0] * 8, [1] * 8),
        ("after one sweep", [1, 0, 0, 0, 1, 0, 1, 0], [1, 0, 1, 0, 1, 1, 1, 0]),
        (
            "they meet: the best corner",
            [1, 0, 1, 0, 1, 0, 1, 0],
            [1, 0, 1, 0, 1, 0, 1, 0],
        ),
    ]
    body, low, high = [], 165, 60
    for k, (title, bottom, top) in enumerate(rows):
        left = 60 + 240 * k
        body.append(label(left + 88, 24, title, ""))
        for i in range(8):
            x = left + 25 * i
            y0, y1 = (high if bottom[i] else low), (high if top[i] else low)
            body.append(line([(x, low), (x, high)], "thin"))
            if y0 != y1:
                body.append(
                    f'<rect x="{x - 5}" y="{high}" width="10" height="{low - high}" class="area"/>'
                )
            body.append(
                line([(x - 8, y0 + 8), (x, y0 - 5), (x + 8, y0 + 8)], "bf", closed=True)
            )
            body.append(
                line([(x - 8, y1 - 8), (x, y1 + 5), (x + 8, y1 - 8)], "af", closed=True)
            )
    body += [label(30, high, "r", "m"), label(28, low, "−r", "m")]
    body += [
        label(60, 205, "▲ from the lowest corner: only up", "l bl"),
        label(420, 205, "▼ from the highest: only down", "l ga"),
    ]
    return "".join(body), 760, 230


@diagram(
    "A circle and the ellipse to which the steepest mixing takes it: longer by the factor e to the r along directions "
    "where outgoing gradients are larger, shorter by the same factor where incoming ones are"
)
def steepest_mixing():
    r, unit, tilt = 0.6, 74, math.radians(28)
    body = []

    def curve(cx, cy, a, b, kind):
        turn = [2 * math.pi * k / 90 for k in range(90)]
        points = [(a * math.cos(t), b * math.sin(t)) for t in turn]
        c, s = math.cos(tilt), math.sin(tilt)
        return line(
            [
                (cx + unit * (c * x - s * y), cy - unit * (s * x + c * y))
                for x, y in points
            ],
            kind,
            closed=True,
        )

    def axis(cx, cy, length, angle, kind):
        x, y = unit * length * math.cos(angle), unit * length * math.sin(angle)
        return arrow((cx, cy), (cx + x, cy - y), kind=kind)

    for cx, a, b in ((140, 1, 1), (470, math.exp(r), math.exp(-r))):
        body += [curve(cx, 130, 1, 1, "thin dash" if a != 1 else "line")]
        if a != 1:
            body.append(curve(cx, 130, a, b, "blue"))
        body += [
            axis(cx, 130, a, tilt, "blue"),
            axis(cx, 130, b, tilt + math.pi / 2, "acc"),
        ]
    body += [
        label(140, 236, "the unit circle", "s"),
        label(470, 244, "after exp(ξ), ξ = r sign(A − B)", "s"),
    ]
    body += [arrow((238, 130), (320, 130)), label(278, 112, "g", "m ga")]
    body += [label(632, 52, "× e^{r}", "m bl"), label(632, 78, "A − B > 0", "s")]
    body += [label(404, 36, "× e^{−r}", "m ga"), label(404, 60, "A − B < 0", "s")]
    return "".join(body), 680, 265


def surface(height: Callable[[float, float], float], cx: float, cy: float, unit: float):
    """A map from (x, y, height) to the page, and the net of a surface over a square."""

    def at(x: float, y: float) -> Point:
        return cx + unit * (x - 0.62 * y) * 0.86, cy + unit * (
            0.34 * x + 0.42 * y
        ) - unit * height(x, y)

    steps = [k / 20 - 1 for k in range(41)]
    net = [[at(x, y) for y in steps] for x in steps[::5]] + [
        [at(x, y) for x in steps] for y in steps[::5]
    ]
    return at, net, steps


@diagram(
    "A saddle-shaped surface of minima: along one tangent direction it bends up, along the other down, by the same "
    "amount, so that the two curvatures cancel in the sum"
)
def saddle():
    at, net, steps = surface(lambda x, y: 0.55 * (x * x - y * y), 230, 150, 130)
    body = [line(points, "thin") for points in net]
    body += [
        line([at(t, 0) for t in steps], "blue"),
        line([at(0, t) for t in steps], "acc"),
        dot(*at(0, 0)),
    ]
    body += [
        label(405, 95, "bends up: B(e_{1}, e_{1})", "m bl l"),
        label(405, 125, "bends down: B(e_{2}, e_{2})", "m ga l"),
    ]
    body += [
        label(405, 165, "the sum is zero,", "l"),
        label(405, 187, "the squares are not", "l"),
    ]
    x, y = at(0, 0)
    body += [arrow((x, y), (x, y - 75)), label(x + 14, y - 72, "n", "m")]
    return "".join(body), 640, 300


@diagram(
    "The plane of two weights. From a balanced start near zero the flow creeps along the diagonal to the minima; from "
    "unbalanced starts on the same orbit it is faster"
)
def plateau():
    left, low, unit = 70, 300, 150

    def at(u: float, v: float) -> Point:
        return left + unit * u, low - unit * v

    def hyperbola(c: float) -> list[Point]:
        us = [0.02 * k for k in range(1, 100)]
        return [at(u, c / u) for u in us if c / u < 1.9]

    body = [
        arrow((left - 12, low), (left + 320, low), kind="thin"),
        arrow((left, low + 12), (left, 10), kind="thin"),
    ]
    body += [label(left + 332, low, "u", "m"), label(left - 16, 18, "v", "m")]
    body += [line(hyperbola(1.0), "line dash"), line(hyperbola(0.04), "thin")]
    times = []
    for xi, kind in ((0.0, "acc"), (0.9, "blue"), (-0.9, "blue")):
        u, v, t, path, next_tick, ticks = (
            0.2 * math.exp(xi),
            0.2 * math.exp(-xi),
            0.0,
            [],
            0.5,
            [],
        )
        while u * v < 0.95:
            path.append(at(u, v))
            pull = 1 - u * v
            u, v, t = u + 0.002 * pull * v, v + 0.002 * pull * u, t + 0.002
            if t > next_tick:
                ticks, next_tick = [*ticks, at(u, v)], next_tick + 0.5
        times.append(t)
        body += [
            line([*path[::25], path[-1]], kind),
            dot(*path[0], kind="af" if kind == "acc" else "bf"),
        ]
        body += [dot(*p, kind="if", radius=2.6) for p in ticks]
    body += [
        label(410, 70, "minima, uv = 1", "l"),
        line([(402, 70), at(0.98, 1.02)], "thin"),
    ]
    body += [
        label(410, 130, f"balanced: time {times[0]:.1f}", "l ga"),
        label(410, 154, f"unbalanced: time {times[1]:.1f}", "l bl"),
    ]
    body += [
        label(410, 190, "a dot every half unit of time;", "l s"),
        label(410, 210, "all three start with the same function", "l s"),
    ]
    assert times[1] < times[0] and abs(times[1] - times[2]) < 0.01
    return "".join(body), 700, 325


@diagram(
    "Test loss on MNIST against the learning rate, after one epoch and after ten, for plain training, one teleport and "
    "one random teleport: at small rates the teleported network is ahead; the lowest points after ten epochs are level"
)
def findings():
    entry = json.loads(RECORD.read_text("utf8"))["784-512-512-10"]
    arms, rates = list(entry["config"]["arms"]), entry["config"]["rates"]
    body = []
    for left, epoch, top in ((70, 1, 0.7), (400, 10, 0.24)):
        low, wide, tall = 250, 260, 200

        def x(rate: float, left: float = left, wide: float = wide) -> float:
            return (
                left
                + 14
                + (wide - 28)
                * math.log(rate / rates[0])
                / math.log(rates[-1] / rates[0])
            )

        def y(loss: float, top: float = top) -> float:
            return 250 - 200 * min(loss, top) / top

        body += [line([(left, low - tall), (left, low), (left + wide, low)], "thin")]
        body += [
            label(left + wide / 2, 26, f"after {epoch} epoch{'s' if epoch > 1 else ''}")
        ]
        body += [label(left + wide / 2, low + 42, "learning rate", "s")]
        body += [label(x(rate), low + 18, f"{rate:g}", "s") for rate in rates]
        ticks = [top * k / 2 for k in range(3)] if top > 0.5 else [0, 0.08, 0.16, 0.24]
        body += [label(left - 8, y(t), f"{t:g}", "s r") for t in ticks]
        for arm, kind in (("plain", "soft"), ("random", "rand"), ("teleport", "blue")):
            runs = [run["test_loss"][arms.index(arm)] for run in entry["runs"]]
            points = []
            for k, rate in enumerate(rates):
                values = sorted(
                    math.inf if r[k][epoch] is None else r[k][epoch] for r in runs
                )
                middle, place = values[len(values) // 2], x(rate)
                if middle > top:
                    ends = [
                        (place + d, y(top) + s * d) for s in (1, -1) for d in (-5, 5)
                    ]
                    body += [line(ends[:2], kind), line(ends[2:], kind)]
                else:
                    points.append((place, y(middle)))
            body += [line(points, kind)] + [
                dot(*p, kind=f"{kind[0]}f", radius=4) for p in points
            ]
    body += [
        label(20, 150, "test loss", "s").replace(
            "<text ", '<text transform="rotate(-90 20 150)" '
        )
    ]
    for k, (name, kind) in enumerate(
        (("plain SGD", "soft"), ("one teleport", "blue"), ("random teleport", "rand"))
    ):
        body += [
            line([(110 + 180 * k, 318), (135 + 180 * k, 318)], kind),
            label(143 + 180 * k, 318, name, "l"),
        ]
    return "".join(body), 690, 340


@diagram(
    "A learned optimizer, unrolled. From the weights the gradient goes up to the LSTM, which passes its memory on to "
    "itself at the next step and sends down an update u, added to the weights, and coordinates xi, whose group element "
    "acts on the sum; the logarithms of the losses at all weights are added up"
)
def learned_optimizer():
    y, z, body = 58, 165, []
    for t in range(3):
        x = 50 + 245 * t
        body += [label(x, z, f"w_{{{t}}}", "m"), arrow((x, z + 18), (x, z + 54))]
        body.append(label(x, z + 70, f"log L(w_{{{t}}})", "m"))
        if t == 2:
            break
        plus, turn, net = x + 95, x + 165, x + 130
        body.append(
            line([(x, z - 18), (x, y), (net - 48, y)])
            + label(x + 8, 112, "gradient", "s l")
        )
        body += [arrow((net - 60, y), (net - 46, y)), box(net, y, "LSTM", 84, 48)]
        body += [
            arrow((x + 20, z), (plus - 15, z)),
            dot(plus, z, "box", 13),
            label(plus, z, "+"),
        ]
        body += [arrow((plus + 15, z), (turn - 23, z)), element(turn, z, "e^{ξ}")]
        body.append(arrow((turn + 23, z), (x + 225, z)))
        body += [
            arrow((plus, y + 26), (plus, z - 16)),
            label(plus + 14, 112, f"u_{{{t}}}", "m"),
        ]
        body += [
            arrow((turn, y + 26), (turn, z - 24), kind="acc"),
            label(turn + 16, 112, f"ξ_{{{t}}}", "m ga"),
        ]
    body.append(
        arrow((222, y - 14), (376, y - 14), kind="blue")
        + label(299, y - 28, "memory", "s")
    )
    body += [label(172, z + 70, "+", "m"), label(417, z + 70, "+", "m")]
    return "".join(body), 600, 262


def main() -> None:
    """Write all of them."""
    FOLDER.mkdir(exist_ok=True)
    for name in DIAGRAMS:
        (FOLDER / f"{name}.svg").write_text(picture(name), "utf8")


if __name__ == "__main__":
    main()
