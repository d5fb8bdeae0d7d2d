"""What is known of memory, whichever tensors look at it: who made it, and which parameter's entries stand in it.

Views share memory, so this is kept for each storage and needs no rule for a view. Three questions are answered:
which entries of the parameters an operation really read (what was only sliced, stacked or multiplied by zero was not
exercised by the run); whether a constant is *uniform*, filled with one number by the model whatever its inputs are; and
what the labels are of memory that the model made empty or zero and fills piece by piece.
"""

from __future__ import annotations

import torch
from torch import Tensor

from teleport_lite.discovery.labels import Labels, compact_labels, laid_out_as


def storage_key(tensor: Tensor) -> int:
    """A number for the memory that a tensor looks at; 0 where there is none."""
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else 0


class Memory:
    """The storages that a run of a model reads and writes.

    Attributes:
        exercised: for each entry of the parameters' storages, one after another, whether it was read.
    """

    def __init__(self, params: dict[str, Tensor]) -> None:
        self._alive: list[Tensor] = []  # so that no storage is used twice
        self._start: dict[int, int] = {}  # of a parameter's storage in `exercised`
        self._sizes: dict[int, int] = {}  # of one entry, in bytes
        self._copies: dict[int, Tensor] = {}  # for each position of a storage, the place in `exercised`, or -1
        self._origin: dict[int, str] = {}  # "empty", "uniform", "computed"; not there: from outside of the run
        self._base: dict[int, Tensor] = {}  # of empty and uniform storages, the tensor that was made
        self._labels: dict[int, Labels] = {}  # of storages that are filled piece by piece, in the shape of the base
        total = 0
        for p in params.values():
            key = storage_key(p)
            if key and key not in self._start:
                self._start[key], self._sizes[key] = total, p.element_size()
                total += p.untyped_storage().nbytes() // p.element_size()
        self.exercised = torch.zeros(total, dtype=torch.bool)

    # -- which entries of the parameters are read

    def entries_of(self, tensor: Tensor) -> Tensor | None:
        """For each entry of a tensor its place in `exercised`, -1 for none; None when there is none at all."""
        key = storage_key(tensor)
        if key in self._copies and self._sizes[key] == tensor.element_size():
            ids = self._copies[key]
        elif key in self._start and self._sizes[key] == tensor.element_size():
            start, size = self._start[key], tensor.untyped_storage().nbytes() // tensor.element_size()
            ids = torch.arange(start, start + size)
        else:
            return None
        return torch.as_strided(ids, tensor.size(), tensor.stride(), tensor.storage_offset())

    def is_tracked(self, tensor: Tensor) -> bool:
        """Whether entries of parameters stand in a tensor."""
        key = storage_key(tensor)
        return bool(key) and (key in self._copies or key in self._start)

    def keeps_type(self, tensor: Tensor) -> bool:
        """Whether a tensor has one entry for each of the parameters', and is no complex view of real memory."""
        return self._sizes[storage_key(tensor)] == tensor.element_size()

    def carry_entries(self, tensor: Tensor, entries: Tensor) -> None:
        """Note that a new tensor holds these entries of the parameters."""
        key = storage_key(tensor)
        if key and key not in self._start and key not in self._copies:
            ids = torch.full((tensor.untyped_storage().nbytes() // tensor.element_size(),), -1)
            torch.as_strided(ids, tensor.size(), tensor.stride(), tensor.storage_offset()).copy_(entries)
            self._copies[key], self._sizes[key] = ids, tensor.element_size()
            self._alive.append(tensor)

    def mark_read(self, tensor: Tensor) -> None:
        """Note that an operation computes with a tensor."""
        key = storage_key(tensor)
        if not key or not tensor.numel():
            return
        if key in self._sizes and self._sizes[key] != tensor.element_size():  # read as another type
            whole = self._copies.get(key)
            if whole is None:
                start = self._start[key]
                self.exercised[start : start + tensor.untyped_storage().nbytes() // self._sizes[key]] = True
            else:
                self.exercised[whole[whole >= 0]] = True
        elif key in self._copies:
            found = self.entries_of(tensor)
            assert found is not None
            self.exercised[found[found >= 0]] = True
        elif key in self._start:
            sizes = [1 if step == 0 else n for n, step in zip(tensor.size(), tensor.stride(), strict=True)]
            place = self._start[key] + tensor.storage_offset()
            torch.as_strided(self.exercised, sizes, tensor.stride(), place).fill_(True)

    def exercised_along(self, param: Tensor, dim: int, groups: int = 1) -> Tensor:
        """For each group of rows and each index along a dimension of a parameter, whether any entry there was read."""
        start = self._start.get(storage_key(param), 0) + param.storage_offset()
        read = torch.as_strided(self.exercised, param.size(), param.stride(), start)
        read = read.reshape(groups, -1, *param.shape[1:]).movedim(dim + 1, 1)
        return read.flatten(2).any(2).flatten() if read.ndim > 2 else read.flatten()

    # -- where constants come from

    def note_result(self, tensor: Tensor, origin: str, written: bool) -> None:
        """Note where what an operation made, or wrote into, comes from."""
        key = storage_key(tensor)
        if not key:
            return
        if written:
            if key in self._origin and origin != "uniform":
                self._origin[key] = "computed"
            return
        self._origin[key] = origin
        for table in (self._base, self._labels, self._copies):
            table.pop(key, None)
        if origin != "computed":
            self._base[key] = tensor
            self._alive.append(tensor)

    def origin(self, tensor: Tensor) -> str:
        """Where a constant comes from: "empty", "uniform", "computed", or "outside" of the run."""
        return self._origin.get(storage_key(tensor), "outside")

    def is_zero(self, tensor: Tensor) -> bool:
        """Whether a tensor is zero, or empty memory, whatever the inputs are."""
        origin = self.origin(tensor)
        return origin == "empty" or (origin == "uniform" and not bool(tensor.any()))

    # -- labels of memory that is filled piece by piece

    def labels_in(self, tensor: Tensor) -> Labels | None:
        """The labels of what was written where a tensor looks; None when nothing was."""
        key = storage_key(tensor)
        if key not in self._labels:
            return None
        base = self._base[key]
        if base.element_size() != tensor.element_size():  # read as another type, which no rule follows
            return []
        offset = tensor.storage_offset() - base.storage_offset()
        return [
            compact_labels(torch.as_strided(laid_out_as(a, base), tensor.size(), tensor.stride(), offset))
            for a in self._labels[key]
        ]

    def base_of(self, tensor: Tensor) -> Tensor | None:
        """The empty or zero tensor in whose memory a tensor lies, when that may still be given labels."""
        return self._base.get(storage_key(tensor))

    def give_labels(self, base: Tensor, labels: Labels) -> None:
        """Labels for all of a tensor that `base_of` has named."""
        self._labels[storage_key(base)] = labels
