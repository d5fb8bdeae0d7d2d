"""What teleports cost on a device: time, waits of the host, kernels and peak memory, beside those of one gradient.

`make bench` writes them to benchmarks/results/DEVICE.json, and the page *On devices* shows them. On a GPU all is
measured there. Elsewhere times are those of the CPU; waits, kernels and memory are counted on the simulated device.
"""

from __future__ import annotations

import copy
import gc
import json
import re
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from costs import BATCHES, SIZES, Board
from simulated import SIM, Device, simulated
from torch import Tensor, nn

import teleport_lite as tl

RESULTS = Path(__file__).parent / "results"
PRECISIONS = ("float32", "TF32", "bfloat16", "autocast")  # on a GPU; elsewhere the first
REPEATS = 3


def mlp(batch: int, width: int) -> tuple[nn.Module, Tensor, Tensor]:
    """Four linear layers with ReLU."""
    widths = (784, width, width, width, 10)
    body = [layer for n, m in pairwise(widths) for layer in (nn.Linear(n, m), nn.ReLU())][:-1]
    return nn.Sequential(*body), torch.rand(batch, 784), torch.randint(10, (batch,))


MODELS: dict[str, tuple[Callable, list]] = {
    "small MLP": (mlp, [(5,)]),
    "MLP": (mlp, [(106,), (445,), (1800,), (5600,)]),
    **SIZES,
}


class Case:
    """A model, a batch and a symmetry on a device, in some precision.

    Args:
        family: a name in `MODELS`.
        size: which of its sizes.
        device: where to.
        precision: a name in `PRECISIONS`.
    """

    def __init__(self, family: str, size: int, device: str, precision: str) -> None:
        torch.manual_seed(0)
        make, sizes = MODELS[family]
        model, x, y = make(BATCHES[size], *sizes[size])
        self.symmetry = tl.find_symmetries(model.eval(), x)
        dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        self.model, self.y = model.to(device, dtype), y.to(device)
        self.x = x.to(device, dtype) if x.is_floating_point() else x.to(device)
        self.device, self.precision = device, precision
        self.count = sum(p.numel() for p in model.parameters())
        self.bytes = sum(p.numel() * p.element_size() for p in model.parameters())
        self.fresh = copy.deepcopy(self.model.state_dict())
        self.optimizer = torch.optim.Adam(self.model.parameters(), 1e-4)
        self.gradient()
        self.optimizer.step()
        self.teleporter = tl.Teleporter(self.model, self.optimizer, self.symmetry, every=1, radius=0.2)

    def loss(self, net: nn.Module) -> Tensor:
        with torch.autocast(self.device, torch.bfloat16) if self.precision == "autocast" else nullcontext():
            out = net(self.x)
        return F.cross_entropy(out.flatten(0, -2).float(), self.y)

    def gradient(self) -> None:
        self.model.zero_grad()
        self.loss(self.model).backward()

    def teleport(self, objective: str) -> Callable[[], object]:
        return lambda: tl.teleport(self.model, self.loss, self.symmetry, objective, radius=0.2)

    def calls(self) -> dict[str, Callable[[], object]]:
        """What is measured, by name."""
        return {
            "gradient": self.gradient,
            **{name: self.teleport(name) for name in ("gradient_norm", "weight_norm", "one_step_loss")},
            "Teleporter, Adam": lambda: self.teleporter.step(self.loss),
            "sharpness, 10 losses": lambda: tl.sharpness(
                self.model, self.loss, radii=[0.1], directions=10, chunk_size=1
            ),
            "curvature, 10 curves": lambda: tl.curvature(self.model, self.symmetry, samples=10),
        }

    def restore(self) -> None:
        self.model.load_state_dict(self.fresh)
        self.model.zero_grad()


def seconds(case: Case) -> list[float]:
    """The median time of each call, taken in turns so that all see the same machine; on the CPU what it spent on it."""
    on_gpu = case.device == "cuda"
    clock = time.perf_counter if on_gpu else time.process_time
    times: list[list[float]] = []
    for _ in range(REPEATS):
        times.append([])
        for call in case.calls().values():
            case.restore()
            if on_gpu:
                torch.cuda.synchronize()
            start = clock()
            call()
            if on_gpu:
                torch.cuda.synchronize()
            times[-1].append(clock() - start)
    return [median(column) for column in zip(*times, strict=True)]


def counted(case: Case, call: Callable[[], object], device: Device | None) -> dict[str, float]:
    """Waits, kernels, and the most memory beyond what was there before, in copies of the parameters."""
    case.restore()
    gc.collect()
    if device is not None:
        device.waits.clear()
        device.operators.clear()
        before = device.used()
        call()
        found = device.waits.total(), device.operators.total(), device.peak() - before
    else:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        peak = torch.cuda.max_memory_allocated() - before
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            call()
            torch.cuda.set_sync_debug_mode("default")
        waits = sum("synchronizing" in str(w.message) for w in caught)
        with torch.profiler.profile() as profile:
            call()
        kernels = sum(e.count for e in profile.key_averages() if re.match("cu(da)?LaunchKernel", e.key))
        found = waits, kernels, peak
    return {"waits": found[0], "kernels": found[1], "memory": round(found[2] / case.bytes, 2)}


def measured(family: str, size: int, precision: str, *, timed: bool = True) -> list[dict[str, Any]]:
    """A row for each call, of which the first is a gradient."""
    on_gpu = torch.cuda.is_available()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "TF32"
    rows = []
    with nullcontext() if on_gpu else simulated() as device:
        case = Case(family, size, "cuda" if on_gpu else SIM, precision)
        for name, call in case.calls().items():
            call()  # the first teleport checks more than those that follow
            row = {"model": family, "parameters": case.count, "precision": precision, "call": name}
            rows.append(row | counted(case, call, device))
    if timed:
        case = case if on_gpu else Case(family, size, "cpu", precision)
        times = seconds(case)
        for row, one in zip(rows, times, strict=True):
            row["time"] = round(one / times[0], 2)
    return rows


def devices(board: Board) -> None:
    """Measure and print, and write the record of this device, anew after each model."""
    on_gpu = torch.cuda.is_available()
    rows: list[dict[str, Any]] = []
    for precision in PRECISIONS if on_gpu else PRECISIONS[:1]:
        for family, (_, sizes) in MODELS.items():
            for size in range(len(sizes) if on_gpu else 1):
                new = measured(family, size, precision)
                for row in new:
                    what = f"{family}, {row['parameters'] / 1e6:.2g} M, {precision}: {row['call']}"
                    board.row(f"{what}: kernels / gradient", row["kernels"] / new[0]["kernels"])
                    board.row(f"{what}: waits", row["waits"])
                rows += new
                write(rows)


def write(rows: list[dict[str, Any]]) -> None:
    """One row a line."""
    on_gpu = torch.cuda.is_available()
    name = torch.cuda.get_device_name() if on_gpu else "CPU"
    facts = {
        "device": name,
        "counted on": name if on_gpu else "the simulated device",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{re.sub(r'[^a-z0-9]+', '-', name.lower())}.json"
    path.write_text(f'{json.dumps(facts)[:-1]}, "rows": [\n  {lines}\n]}}\n', "utf8")


if __name__ == "__main__":
    from run import Board as Printed

    devices(Printed())
    sys.exit()
