"""What a teleport costs on a convnet, a residual net and a transformer, from 0.1 M to 100 M parameters.

`make bench` measures the first two sizes of each; `python benchmarks/costs.py` all four, up to 100 M, which
takes most of an hour and 7 GB of memory. Everything is a ratio to one gradient on the same batch, in one run.
"""

from __future__ import annotations

import copy
import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import teleport_lite as tl

BATCHES = (64, 64, 32, 32)  # images of 32 x 32, or sequences of 32 tokens, by size
REPEATS = 3


def convnet(batch: int, width: int) -> tuple[nn.Module, Tensor, Tensor]:
    """Convolutions with batch norm, ReLU and pooling, then two linear layers."""
    body: list[nn.Module] = []
    for a, b in ((3, width), (width, 2 * width), (2 * width, 4 * width)):
        body += [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2)]
    model = nn.Sequential(*body, nn.Flatten(), nn.Linear(64 * width, 8 * width), nn.ReLU(), nn.Linear(8 * width, 10))
    return model, torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))


class Block(nn.Module):
    """A residual block with batch norm."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.na, self.nb = nn.BatchNorm2d(out), nn.BatchNorm2d(out)
        self.skip = nn.Identity() if channels == out else nn.Conv2d(channels, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.nb(self.b(F.relu(self.na(self.a(x))))) + self.skip(x))


def resnet(batch: int, width: int) -> tuple[nn.Module, Tensor, Tensor]:
    """Four stages of two residual blocks."""
    body: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    channels = width
    for stage in range(4):
        for k in range(2):
            body.append(Block(channels, width << stage, 2 if stage and not k else 1))
            channels = width << stage
    model = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))
    return model, torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))


class Transformer(nn.Module):
    """A decoder with learned positions and torch's own pre-norm layers."""

    def __init__(self, width: int, layers: int, vocabulary: int, length: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, max(2, width // 64), 4 * width, dropout=0.0, batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        n = tokens.shape[1]
        mask = torch.ones(n, n, dtype=torch.bool, device=tokens.device).triu(1)
        x = self.tokens(tokens) + self.places.weight[:n]
        for layer in self.layers:
            x = layer(x, src_mask=mask)
        return self.head(self.norm(x))


def transformer(batch: int, width: int, layers: int, vocabulary: int) -> tuple[nn.Module, Tensor, Tensor]:
    tokens = torch.randint(vocabulary, (batch, 33))
    return Transformer(width, layers, vocabulary, 32), tokens[:, :-1], tokens[:, 1:].flatten()


SIZES = {
    "convnet": (convnet, [(13,), (41,), (130,), (410,)]),
    "residual net": (resnet, [(6,), (19,), (60,), (190,)]),
    "transformer": (transformer, [(48, 3, 200), (128, 4, 1000), (320, 6, 4000), (768, 12, 9000)]),
}


class Board(Protocol):
    def row(self, what: str, value: float, limit: float | None = None, *, at_least: bool = False) -> None: ...


def peak(action: Callable[[], object]) -> float:
    """The most memory that the process held during `action`, in bytes (Linux counts it; elsewhere not a number)."""
    gc.collect()
    try:
        Path("/proc/self/clear_refs").write_text("5")
        action()
        status = Path("/proc/self/status").read_text()
    except OSError:
        return float("nan")
    return 1024.0 * int(status.split("VmHWM:")[1].split()[0])


def costs(board: Board, sizes: int = 2) -> None:
    """A teleport, discovery and peak memory beside one gradient, and beside one step of training."""
    for family, (make, known) in SIZES.items():
        for size, batch in zip(known[:sizes], BATCHES, strict=False):
            torch.manual_seed(0)
            model, x, y = make(batch, *size)
            model.eval()
            count = sum(p.numel() for p in model.parameters())
            fresh = copy.deepcopy(model.state_dict())
            optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
            symmetry = tl.find_symmetries(model, x)

            def loss_fn(net, x=x, y=y):
                return F.cross_entropy(net(x).flatten(0, -2), y)

            def gradient(model=model, loss_fn=loss_fn):
                model.zero_grad()
                loss_fn(model).backward()

            def step(optimizer=optimizer, gradient=gradient):
                gradient()
                optimizer.step()

            def teleport(model=model, loss_fn=loss_fn, symmetry=symmetry):
                report = tl.teleport(model, loss_fn, symmetry)
                assert report.accepted, report

            actions = {
                "gradient": gradient,
                "teleport": teleport,
                "find": lambda m=model, x=x: tl.find_symmetries(m, x),
            }
            seconds: dict[str, list[float]] = {name: [] for name in actions}
            gradient()
            for _ in range(REPEATS if count < 5e7 else 1):
                for name, action in actions.items():
                    start = time.perf_counter()
                    action()
                    seconds[name].append(time.perf_counter() - start)
                    model.load_state_dict(fresh)
            one, whole, found = (median(times) for times in seconds.values())
            name = f"{family}, {count / 1e6:.2g} M, dim {symmetry.dim}"
            board.row(f"{name}: teleport / gradient", whole / one, 3.0)
            board.row(f"{name}: find_symmetries / gradient", found / one, 10.0 if count > 9e5 else 50.0)
            if count > 5e6:  # below, it is lost among the pages of the process
                model.zero_grad(set_to_none=False)
                more = (peak(teleport) - peak(step)) / (4 * count)
                board.row(f"{name}: peak memory beyond a step / parameters", more, 3.0)


if __name__ == "__main__":
    from run import Board as Printed

    printed = Printed()
    costs(printed, sizes=4)
    sys.exit(int(printed.failed))
