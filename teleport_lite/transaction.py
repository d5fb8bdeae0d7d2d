"""Writing tensors in place: all of it, or none of it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from teleport_lite.functional import Params


def commit(model: nn.Module, moved: Params, finish: Callable[[], None] | None = None) -> None:
    """Copy `moved` into the parameters of `model`, in place, then `finish`; all or nothing when anything interrupts."""
    parameters = dict(model.named_parameters())
    write([(parameters[name], value) for name, value in moved.items()], finish)


def write(pairs: list[tuple[Tensor, Tensor]], finish: Callable[[], None] | None = None) -> None:
    """Copy the second tensor of each pair into the first, then `finish`; all of it, or nothing when anything raises."""
    backup = [(target, target.detach().clone()) for target, _ in pairs]
    with torch.no_grad():
        try:
            for target, value in pairs:
                target.copy_(value)
            if finish is not None:
                finish()
        except BaseException:
            for target, value in backup:
                target.copy_(value)
            raise
