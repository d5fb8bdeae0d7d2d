"""Random small models, by seed: residual, gated, tied, recurrent, with optional inputs and several outputs.

`draw(seed)` gives a model, an example, and fresh calls of other sizes, lengths and, for what the example leaves out,
other arguments.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS: list[Callable] = [F.relu, F.leaky_relu, torch.tanh, F.gelu, F.silu, torch.sigmoid, torch.sin, lambda h: h]
Calls = list[tuple[tuple, dict[str, Any]]]


@dataclass
class Draw:
    """A model, its example, and other calls of it."""

    model: nn.Module
    example: Any
    calls: Calls
    kind: str


class Stack(nn.Module):
    """Blocks on a stream of width d, each of a random kind."""

    def __init__(self, pick: random.Random, d: int, sequence: bool) -> None:
        super().__init__()
        kinds = ["layer", "residual", "gated", "norm", "tied", "lowrank", "dropout", "branch", "scaled"]
        self.kinds = [pick.choice(kinds + ["attention", "recurrent"] * sequence) for _ in range(pick.randint(1, 3))]
        self.acts = [pick.choice(ACTIVATIONS) for _ in self.kinds]
        self.blocks = nn.ModuleList(self.block(kind, d, pick) for kind in self.kinds)

    def block(self, kind: str, d: int, pick: random.Random) -> nn.ModuleList:
        h, bias = pick.randint(2, 5), pick.random() < 0.7
        up, down = nn.Linear(d, h, bias=bias), nn.Linear(h, d, bias=bias)
        match kind:
            case "gated":
                return nn.ModuleList([up, nn.Linear(d, h, bias=bias), down])
            case "norm":
                return nn.ModuleList([up, nn.LayerNorm(h), down])
            case "branch":
                return nn.ModuleList([up, down, nn.Linear(h, d)])
            case "attention":
                return nn.ModuleList([nn.Linear(d, 3 * d, bias=bias), nn.Linear(d, d)])
            case "recurrent":
                cell = pick.choice([nn.RNN, nn.GRU, nn.LSTM])
                return nn.ModuleList([cell(d, h, batch_first=True), down])
            case "scaled":
                return nn.ModuleList([up, nn.BatchNorm1d(h), down])
            case "lowrank":
                return nn.ModuleList([nn.Linear(d, 2, bias=False), nn.Linear(2, d, bias=False)])
        return nn.ModuleList([up, down])

    def forward(self, x: Tensor) -> Tensor:
        for kind, act, parts in zip(self.kinds, self.acts, self.blocks, strict=True):
            x = self.apply_block(kind, act, parts, x)
        return x

    def apply_block(self, kind: str, act: Callable, b: nn.ModuleList, x: Tensor) -> Tensor:
        match kind:
            case "layer":
                return b[1](act(b[0](x)))
            case "residual":
                return x + b[1](act(b[0](x)))
            case "gated":
                return x + b[2](act(b[0](x)) * b[1](x))
            case "norm":
                return x + b[2](act(b[1](b[0](x))))
            case "tied":
                return F.linear(act(b[0](x)), b[0].weight.t(), b[1].bias)
            case "lowrank":
                return x + b[1](b[0](x))
            case "dropout":
                return x + b[1](F.dropout(act(b[0](x)), 0.3, self.training))
            case "branch":
                h = act(b[0](x))
                return b[1](h) + (b[2](h) if self.training else 0)
            case "scaled":
                h = b[0](x)
                return x + b[2](act(b[1](h.reshape(-1, h.shape[-1])).reshape(h.shape)))
            case "attention":
                q, k, v = b[0](x).chunk(3, -1)
                return x + b[1](F.scaled_dot_product_attention(q, k, v))
            case _:
                return x + b[1](b[0](x)[0])


class Random(nn.Module):
    """A stack between an input and one or several heads."""

    def __init__(self, pick: random.Random) -> None:
        super().__init__()
        d, self.sequence = pick.randint(2, 5), pick.random() < 0.5
        self.kind = pick.choice(["reals", "tokens"]) if self.sequence else "reals"
        self.entry = nn.Embedding(11, d) if self.kind == "tokens" else nn.Linear(3, d)
        self.table = nn.Parameter(torch.randn(12, d)) if self.sequence and pick.random() < 0.4 else None
        self.context = nn.Linear(2, d) if pick.random() < 0.3 else None
        self.task = pick.random() < 0.25
        self.stack = Stack(pick, d, self.sequence)
        self.heads = nn.ModuleList(nn.Linear(d, 2) for _ in range(pick.randint(1, 3)))
        self.output = pick.choice(["one", "dict", "tuple"])

    def forward(self, x: Tensor, c: Tensor | None = None, task: int = 0) -> Any:
        h = self.entry(x)
        h = h if self.table is None else h + self.table[: x.shape[1]]
        h = h if self.context is None or c is None else h + self.context(c).reshape(len(x), *[1] * (h.ndim - 2), -1)
        h = self.stack(h)
        if self.task:
            return self.heads[task](h)
        outs = [head(h) for head in self.heads]
        return (
            sum(outs)
            if self.output == "one"
            else {"a": outs, "h": h.mean()}
            if self.output == "dict"
            else (*outs, None)
        )


def draw(seed: int) -> Draw:
    """The model of a seed."""
    pick, g = random.Random(seed), torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Random(pick)

    def data(rows: int, length: int, dtype: torch.dtype) -> Tensor:
        if model.kind == "tokens":
            return torch.randint(11, (rows, length), generator=g)
        shape = (rows, length, 3) if model.sequence else (rows, 3)
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    rows, length = pick.randint(2, 5), pick.choice([1, 3, 4])
    given = model.context is not None and pick.random() < 0.5
    context = {"c": torch.randn(rows, 2, generator=g)} if given else {}
    example: Any = (data(rows, length, torch.float32), *context.values(), *([0] if model.task and given else []))
    calls: Calls = []
    for r, n in ((rows, length), (7, 6), (3, 12), (2, 2)):
        calls.append(((data(r, n, torch.float64),), {}))
        if model.context is not None:
            c = torch.randn(r, 2, generator=g, dtype=torch.float64)
            calls.append(((data(r, n, torch.float64), c), {}))
        if model.task:
            calls += [((data(r, n, torch.float64),), {"task": k}) for k in range(len(model.heads))]
    return Draw(model, example, calls, " ".join(model.stack.kinds))
