"""What a set of runs did not use, or used without effect: nothing can be known of that."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from teleport_lite.discovery.float64 import Float64
from teleport_lite.functional import Params

Run = Callable[[], list[Tensor]]


def exercised_entries(params: Params, runs: Iterable[Run]) -> tuple[Params, set[str], list[Params]]:
    """For each parameter which of its entries have a gradient in some run, of random sums of the outputs.

    The runs end when every parameter has such an entry. An entry without may still matter, as before an argmax.

    Args:
        params: the parameters, as the runs read them.
        runs: each gives the outputs.

    Returns:
        The entries; the parameters from which some way leads to the outputs, if only times zero, which are all of them
        where a run cannot be differentiated; and the gradients.
    """
    connected: set[str] = set()
    gradients: list[Params] = []
    found = {
        n: torch.zeros_like(p, dtype=torch.bool) for n, p in params.items() if p.is_floating_point() or p.is_complex()
    }
    asked = {name: params[name].requires_grad for name in found}
    generator = torch.Generator().manual_seed(0)
    try:
        for name in found:
            params[name].requires_grad_()
        for run in runs:
            grads = _existing_gradients(run, {name: params[name] for name in found}, generator)
            connected |= found.keys() if grads is None else grads.keys()
            gradients += [grads] if grads else []
            for name, g in (grads or {}).items():
                found[name] |= g != 0
    finally:
        for name, wanted in asked.items():
            params[name].requires_grad_(wanted)
    return found, connected, gradients


def _existing_gradients(run: Run, params: Params, generator: torch.Generator) -> Params | None:
    """Those that there are; None where the run cannot be differentiated."""
    with torch.enable_grad():
        try:
            outputs = [torch.view_as_real(t) if t.is_complex() else t for t in run() if t.requires_grad]
            sums = [
                (torch.where(t.isfinite(), t, 0) * torch.rand(t.shape, generator=generator).to(t)).sum()
                for t in outputs
                if t.layout == torch.strided and not t.is_nested
            ]
            if not sums:
                return {}
            total = torch.stack([s.to(sums[0].device) for s in sums]).sum()
            with Float64():  # the derivative of what has no kernel for float64 has none either
                found = torch.autograd.grad(total, list(params.values()), allow_unused=True)
        except Exception:  # no gradients: then everything is tried
            return None
    grads = ((name, g) for name, g in zip(params, found, strict=True) if g is not None)
    return {name: g.to_dense() if g.is_sparse else g for name, g in grads}


def without_effect(names: list[str], same: Callable[[list[str]], bool]) -> list[str]:
    """Those among `names` that may be changed: `same` says whether all outputs stay, bit for bit. By halves."""
    if not names or same(names):
        return names
    if len(names) == 1:
        return []
    half = len(names) // 2
    return without_effect(names[:half], same) + without_effect(names[half:], same)
