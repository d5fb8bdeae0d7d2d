"""Draw the README's picture: gradient descent on an ellipse, with and without one teleport.

python book/teaser.py
"""

import math
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import torch

import teleport_lite as tl
from teleport_lite.symmetries.plane import TestFunction

PLAIN, TELEPORT, ACCENT = "#6E6E6E", "#0072B2", "#D55E00"
START, RATE, STEPS = (2.6, 0.25), 0.05, 30


def descend(point: TestFunction) -> torch.Tensor:
    """The points of gradient descent, [STEPS + 1, 2], from where `point` stands."""
    optimizer = torch.optim.SGD(point.parameters(), lr=RATE)
    path = [point.w.detach().clone()]
    for _ in range(STEPS):
        optimizer.zero_grad()
        point().backward()
        optimizer.step()
        path.append(point.w.detach().clone())
    return torch.stack(path)


plain = TestFunction("ellipse", START)
moved = TestFunction("ellipse", START)
report = tl.teleport(moved, lambda net: net(), moved.symmetry, radius=math.pi)
assert report.accepted
paths = {
    "plain": (descend(plain), PLAIN),
    "one teleport, then plain": (descend(moved), TELEPORT),
}

fig, (left, right) = plt.subplots(
    1, 2, figsize=(9, 3.4), layout="constrained", width_ratios=[1.5, 1]
)
x, y = torch.meshgrid(
    torch.linspace(-3, 3, 300), torch.linspace(-1.3, 1.3, 150), indexing="xy"
)
left.contour(
    x,
    y,
    plain.value(torch.stack([x, y], -1)),
    levels=[0.2, 0.9, 2.4, 4.6, 7.2],
    colors="#C4C4C4",
)
start, end = torch.tensor(START), paths["one teleport, then plain"][0][0]
angles = [torch.atan2(3 * p[1], p[0]).item() for p in (start, end)]
turn = torch.linspace(angles[0], angles[1], 100)
radius = plain.value(start).sqrt()
left.plot(
    radius * turn.cos(),
    radius * turn.sin() / 3,
    color=TELEPORT,
    linestyle=":",
    linewidth=2.5,
)
for name, (path, color) in paths.items():
    left.plot(*path.T, "o-", color=color, markersize=4, linewidth=1.2)
    right.semilogy(plain.value(path), color=color, linewidth=2, label=name)
left.plot(0, 0, "*", color=ACCENT, markersize=14)
left.set(
    xlabel="$w_1$",
    ylabel="$w_2$",
    aspect="equal",
    title="Dotted: the teleport, at constant loss",
)
right.set(
    xlabel="gradient step",
    ylabel="loss",
    title="Same steps, same learning rate",
    ylim=(1e-6, 20),
)
right.legend(frameon=False)
for axes in (left, right):
    axes.spines[["top", "right"]].set_visible(False)
    axes.title.set_fontsize(11)
fig.savefig(Path(__file__).parent / "_static" / "teaser.png", dpi=160)
