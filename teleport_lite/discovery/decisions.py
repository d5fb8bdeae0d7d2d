"""What a model decides by comparing numbers: a symmetry must not move it, though no run may show that it does.

A gate, a router or a sort gives truth values or indices, which change where a difference of two numbers, its margin,
changes its sign, and nowhere else: on few inputs, or on none of those that are tried. So margins are compared
themselves. Invariant of what holds: each entry of a margin is multiplied by a positive number that is the same for all
inputs, as that of a ReLU's input by a scaling; of what is rounded, by 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from teleport_lite.discovery.dispatch import DispatchMode
from teleport_lite.discovery.elements import random_element
from teleport_lite.discovery.trial import Trial
from teleport_lite.discovery.verify import Verifier
from teleport_lite.functional import Params
from teleport_lite.symmetries.base import Symmetry

COMPARISONS = frozenset(
    ["gt", "ge", "lt", "le", "eq", "ne", "greater", "greater_equal", "less", "less_equal", "not_equal"]
)
ORDERS = frozenset(["argmax", "argmin", "argsort", "sort", "topk", "max", "min", "median", "kthvalue", "mode"])
STEPS = frozenset(["round", "floor", "ceil", "trunc", "equal", "_local_scalar_dense"])  # or what Python reads
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
EXACT, ROUNDING = 1e-8, 1e-12  # of margins in float64, relative to the largest; and to what is compared
S = TypeVar("S", bound=Symmetry)
Margin = tuple[Tensor, float, bool]  # with the size of the numbers compared, and whether it may be scaled


class Decisions(DispatchMode):
    """Notes the margins by which a run decides.

    Attributes:
        margins: of each decision.
    """

    def __init__(self) -> None:
        super().__init__()
        self.margins: list[Margin] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name.split("::")[1].rstrip("_")
        compared = [x for x in (*args[:2], *kwargs.values()) if isinstance(x, Tensor) and x.is_floating_point()]
        if not compared or any(x.layout != torch.strided or not x.numel() for x in compared):
            return out
        x = compared[0]
        if name in COMPARISONS:
            a, b = (t.double() if isinstance(t, Tensor) else t for t in (*args, *kwargs.values()))
            self._note_margin(a - b, max(map(_largest_of, compared)))
        elif name == "sign":
            self._note_margin(x, _largest_of(x))
        elif name in STEPS or (name == "_to_copy" and out.dtype in INTEGERS):
            self._note_margin(x, _largest_of(x), scaled=False)
        elif name in ORDERS and x.ndim and (dim := _dimension_of(func, args, kwargs)) is not None:
            self._note_margin(x.diff(dim=dim), _largest_of(x))
        return out

    def _note_margin(self, margin: Tensor, size: float, scaled: bool = True) -> None:
        self.margins.append((margin.detach().double().clone(), size, scaled))


def _largest_of(x: Tensor) -> float:
    return float(x.detach().double().nan_to_num(0, 0, 0).abs().max())


def _dimension_of(func: Any, args: tuple, kwargs: dict) -> int | None:
    """The dimension along which an operator orders; nothing, where it gives one value of all and no index."""
    for i, argument in enumerate(func._schema.arguments):
        if argument.name == "dim":
            dim = args[i] if i < len(args) else kwargs.get("dim", argument.default_value)
            return -1 if dim is None else dim
    return None


def keep_decisions(symmetries: Sequence[S], check: Verifier) -> list[S]:
    """Those of the symmetries that move no decision; finite ones are left to the outputs."""
    trials, moving = check.planned.calm, [s for s in symmetries if s.dim]

    def margins_of(part: Sequence[S], trial: Trial) -> list[Margin]:
        moved = check.params
        for s in part:
            moved = {**moved, **s.move(moved, random_element(s, 0, check.params))}
        return _margins_at(trial, moved, check)

    first = trials[min(1, len(trials) - 1)]
    usual = margins_of((), first) if moving else []
    found = margins_of(moving, first) if usual else []
    if len(usual) == len(found) and all(map(_is_same, usual, found)):
        return list(symmetries)  # nothing that is compared depends on what moves
    before = [margins_of((), trial) for trial in trials]

    def keeps(part: Sequence[S]) -> bool:
        return _are_kept(before, [margins_of(part, trial) for trial in trials])

    def deciding(part: list[S]) -> list[S]:
        if not part or keeps(part):
            return []
        half = len(part) // 2
        return part if len(part) == 1 else deciding(part[:half]) + deciding(part[half:])

    dropped = deciding(moving)
    return [s for s in symmetries if s not in dropped]


def _is_same(a: Margin, b: Margin) -> bool:
    return torch.equal(a[0].nan_to_num(), b[0].nan_to_num())


def _margins_at(trial: Trial, params: Params, check: Verifier) -> list[Margin]:
    """The margins of a run at `params`."""
    mode = Decisions()
    with check.probe.at(params):
        try:
            check.probe.outputs(trial.call, trial.training, trial.seed, (*trial.modes(), mode))
        except Exception:  # as where a decision leads to another shape
            return []
    return mode.margins


def _are_kept(before: list[list[Margin]], after: list[list[Margin]]) -> bool:
    """Whether margins were multiplied by numbers of their own, the same in all runs in which they have one shape."""
    groups: dict[tuple, list[tuple[Tensor, Tensor, float, bool]]] = {}
    for old, new in zip(before, after, strict=True):
        if [m.shape for m, *_ in old] != [m.shape for m, *_ in new]:
            return False
        for k, ((a, size, scaled), (b, other, _)) in enumerate(zip(old, new, strict=True)):
            groups.setdefault((k, len(old), a.shape), []).append((a, b, max(size, other), scaled))
    for runs in groups.values():
        a, b = torch.stack([a for a, *_ in runs]), torch.stack([b for _, b, *_ in runs])
        if not _is_scaled(a, b, max(size for *_, size, _ in runs), runs[0][3]):
            return False
    return True


def _is_scaled(old: Tensor, new: Tensor, size: float, scaled: bool) -> bool:
    """Whether new is old times positive numbers that are the same along dimension 0; [runs, ...] each."""
    far = ~(old.isfinite() & new.isfinite())
    if not bool((old[far] == new[far]).logical_or(old[far].isnan() & new[far].isnan()).all()):
        return False
    old, new = old.masked_fill(far, 0), new.masked_fill(far, 0)
    rounding = ROUNDING * size + EXACT * torch.maximum(old.abs().amax(0), new.abs().amax(0))
    largest = old.abs().argmax(0, keepdim=True)
    ratio = (new.gather(0, largest) / old.gather(0, largest)).nan_to_num(1.0, 1.0, 1.0) if scaled else 1.0
    same_side = torch.as_tensor(ratio > 0) | (old.abs().amax(0) <= ROUNDING * size)
    return bool(((new - ratio * old).abs() <= rounding).all()) and bool(same_side.all())
