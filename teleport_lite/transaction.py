"""Writing tensors in place: all of it, or none of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from teleport_lite.functional import Params
from teleport_lite.runtime import named_tensors

Check = Callable[[Sequence[float]], None]  # of numbers, raises
Finish = Callable[[list[Tensor], Check], None]  # is given numbers that the host does not have yet, and what checks them
Pairs = Iterable[tuple[Tensor, Tensor]]  # where to write, and what


def commit(model: nn.Module, moved: Params, finish: Callable[[], None] | None = None) -> None:
    """Use `moved` up: copy it into the parameters and buffers of `model`, in place, then `finish`; all or nothing."""
    write_in_place([consume_pairs(named_tensors(model), moved)], finish)


def consume_pairs(parameters: Mapping[str, Tensor], moved: Params) -> Iterator[tuple[Tensor, Tensor]]:
    """Each of `moved` with the parameter of its name, taken out of the dictionary, so that its memory is given back."""
    while moved:
        name, value = moved.popitem()
        yield parameters[name], value


def write_in_place(steps: Iterable[Pairs], finish: Callable[[], None] | None = None) -> None:
    """Copy the second tensor of each pair into the first, step by step, then `finish`; nothing when anything raises.

    A step is made when those before are written, so that one holds the new values of one step at a time.
    """
    backup: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        try:
            for pairs in steps:
                for target, value in pairs:
                    backup.append((target, target.detach().clone()))
                    target.copy_(value)
                    del value
            if finish is not None:
                finish()
        except BaseException:
            for target, value in backup:
                target.copy_(value)
            raise
