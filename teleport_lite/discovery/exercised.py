"""Which parameters a set of runs did not use, or used without effect: nothing can be known of those."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from teleport_lite.functional import Params

Run = Callable[[], list[Tensor]]


def unexercised(params: Params, runs: Iterable[Run], same: Callable[[list[str]], bool]) -> list[str]:
    """The names of parameters that change no output of any run.

    First by one gradient of random sums of the outputs; where that is zero throughout, as before an argmax, by trying.

    Args:
        params: the parameters, as the runs read them.
        runs: each gives the outputs.
        same: whether all outputs stay, bit for bit, when the parameters of these names are changed.
    """
    left = [name for name, p in params.items() if p.is_floating_point() or p.is_complex()]
    asked = {name: params[name].requires_grad for name in left}
    generator = torch.Generator().manual_seed(0)
    try:
        for name in left:
            params[name].requires_grad_()
        for run in runs:
            if left:
                moved = _with_gradient(run, {name: params[name] for name in left}, generator)
                left = [name for name in left if name not in moved]
    finally:
        for name, wanted in asked.items():
            params[name].requires_grad_(wanted)
    return _without_effect(left, same)


def _with_gradient(run: Run, params: Params, generator: torch.Generator) -> set[str]:
    with torch.enable_grad():
        try:
            outputs = [torch.view_as_real(t) if t.is_complex() else t for t in run() if t.requires_grad]
            sums = [
                (torch.where(t.isfinite(), t, 0) * torch.rand(t.shape, generator=generator).to(t)).sum()
                for t in outputs
                if t.layout == torch.strided and not t.is_nested
            ]
            if not sums:
                return set()
            total = torch.stack([s.to(sums[0].device) for s in sums]).sum()
            found = torch.autograd.grad(total, list(params.values()), allow_unused=True)
        except Exception:  # no gradients: then everything is tried
            return set()
    return {name for name, g in zip(params, found, strict=True) if g is not None and bool((g != 0).any())}


def _without_effect(names: list[str], same: Callable[[list[str]], bool]) -> list[str]:
    """By halves."""
    if not names or same(names):
        return names
    if len(names) == 1:
        return []
    half = len(names) // 2
    return _without_effect(names[:half], same) + _without_effect(names[half:], same)
