"""Whether a model computes after a move what it computed before.

A loss is a mean, so it is compared within the tolerance; outputs are compared entry by entry, and their largest change
may be `LARGEST` times that. Where a loss is so small that rounding alone moves it further, what rounding does is
measured: the loss again, with each weight moved by a few units in its last place.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from teleport_lite.functional import Params

LARGEST = 10  # times the tolerance
HIDDEN = 1e6  # an entry that did not change is no measure for those that did when it is so many times larger
ULPS = 4  # units in the last place by which weights are moved to see what rounding does


def largest_change(before: Sequence[Tensor], after: Sequence[Tensor]) -> Tensor:
    """The largest change of an entry, relative to the largest entry of its tensor; infinite where shapes differ.

    Entries that are equal, not finite ones too, count as unchanged. One that stands out by `HIDDEN`, as the constant of
    a mask does, and did not change is left out of the size.

    >>> mask = torch.tensor([1.0, 2.0, -3e38])
    >>> largest_change([mask], [mask + torch.tensor([0.5, 0.0, 0.0])])
    tensor(0.2500)
    """
    worst = torch.zeros((), device=before[0].device if before else None)
    if len(before) != len(after):
        return worst + torch.inf
    for old, new in zip(before, after, strict=True):
        if old.shape != new.shape:
            return worst + torch.inf
        if not (old.is_floating_point() or old.is_complex()) or not old.numel():
            continue
        if old.is_complex():
            old, new = torch.view_as_real(old), torch.view_as_real(new)
        same = (old == new) | (old.isnan() & new.isnan())
        sizes = torch.where(old.isfinite(), old.abs(), 0.0).float()
        moved = torch.where(same, 0.0, sizes).amax()
        size = torch.where(sizes <= HIDDEN * moved, sizes, 0.0).amax()
        gap = torch.where(same, 0.0, (new - old).abs().nan_to_num(torch.inf).float()).amax()
        worst = torch.maximum(worst, torch.where(gap > 0, gap / size, 0.0).to(worst.device))
    return worst


def rounded(params: Params, sign: int) -> Params:
    """`params` with each entry moved by `ULPS` units in its last place, up or down at random, or the other way.

    >>> w = {"w": torch.ones(100)}
    >>> float((rounded(w, 1)["w"] - 1).abs().max()) < 1e-6
    True
    """
    draw = torch.Generator().manual_seed(0)

    def move(p: Tensor) -> Tensor:
        signs = torch.randint(0, 2, p.shape, generator=draw).to(p.device) * 2 - 1
        return p * (1 + sign * ULPS * torch.finfo(p.dtype).eps * signs.to(p.dtype))

    return {name: move(p) if p.is_floating_point() else p for name, p in params.items()}
