"""Follow every axis of every parameter through one run of a model.

This is abstract interpretation, in the manner of sharding propagation: beside the data go labels of its axes, and a
rule for each operator (`teleport_lite.discovery.rules`) says what labels its results have and what it asks of those
that it reads. `Propagation` is a dispatch mode, so it sees each operation that PyTorch carries out, whatever module,
function or loop asked for it. It keeps state only: labels, constraints, and what is known of memory. An operator
without a rule is taken apart into others where PyTorch, or we, know how; otherwise all that it reads stays.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from teleport_lite.discovery import rules  # noqa: F401 (enters the rules into the table)
from teleport_lite.discovery.constraints import PERM, SCALE, SIGN, Constraints
from teleport_lite.discovery.dispatch import DispatchMode
from teleport_lite.discovery.labels import Labels, cluster_by_dims, lift_labels
from teleport_lite.discovery.memory import Memory, storage_key
from teleport_lite.discovery.operation import Operation, RuleMisfit
from teleport_lite.discovery.registry import find_decomposition, find_rule
from teleport_lite.discovery.rules.views import FACTORY_OPS, IDENTITY_OPS, VIEW_OPS

FACTORIES, IDENTITIES, VIEWS = (frozenset(names.split()) for names in (FACTORY_OPS, IDENTITY_OPS, VIEW_OPS))
MOVING = VIEWS | IDENTITIES | {"embedding"}  # what only carries entries to another place


class Propagation(DispatchMode):
    """The constraints that a run of a model puts on the axes of `params`.

    Args:
        params: the parameters by name.
        stacks: those that hold several matrices with axes of their own along their first dimension, and how many.
        buffers: buffers that may move along, by name, on the axes on which their values vary.

    Attributes:
        constraints: the equations between labels.
        buffers: as given.
        parameter_axes: for each axis of each parameter its labels; an axis is a parameter, a dimension and a number of
            groups.
        used: names of the parameters that took part.
        unsupported_ops: operators without a rule, and why, where that is known.
        unexercised: names of the parameters of which the run read nothing, or not all.
        memory: what is known of memory.
        answers: what elementwise functions were found to commute with.
        partly: lengths of axes that move, of which some entries were not read: what else has such an axis may move too.
        cut: names of matrices whose rows were split into parts, and how many equal ones make these.
    """

    def __init__(
        self,
        params: dict[str, Tensor],
        stacks: Mapping[str, int] | None = None,
        buffers: dict[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        stacks, self.buffers = stacks or {}, buffers or {}
        params = {**params, **self.buffers}
        self.constraints = Constraints()
        self.parameter_axes: dict[tuple[str, int, int], Tensor] = {}
        self.used: set[str] = set()
        self.unsupported_ops: dict[str, str] = {}
        self.unexercised: list[str] = []
        self.partly: set[int] = set()
        self.memory = Memory(params)
        self.answers: dict[Any, Any] = {}
        self.cut: dict[str, int] = {}
        self._params = params
        self._names = {id(p): name for name, p in params.items()}
        self._labels: dict[int, Labels] = {}
        self._alive: list[Tensor] = list(params.values())  # so that no `id` is used twice
        for name, p in params.items():
            own = self._labels[id(p)] = []
            for dim in (d for d in range(p.ndim) if p.ndim <= 2 or p.shape[d] > 1):
                if name in self.buffers and bool((p == p.narrow(dim, 0, 1)).all()):
                    continue
                groups = stacks.get(name, 1) if dim else 1
                labels = self.constraints.fresh(*(n if d == dim else 1 if d else groups for d, n in enumerate(p.shape)))
                self.parameter_axes[name, dim, groups] = labels.reshape(-1)
                own.append(labels if groups == 1 else labels.repeat_interleave(len(p) // groups, 0))
                if not dim and stacks.get(name) == len(p):  # as many multiples as another dimension has for each index
                    self.constraints.fix(own[-1], "", SCALE | SIGN)

    def labels_of(self, tensor: Tensor) -> Labels:
        """The labels of a tensor."""
        written = self.memory.labels_in(tensor)
        return self._labels.get(id(tensor), []) if written is None else written

    def grouped_axis(self, weight: Tensor, groups: int) -> Tensor | None:
        """Labels [groups, shape[1]] of a parameter whose dimension 1 means something else in each group of rows."""
        name = self._names.get(id(weight))
        if name is None:
            return None
        if (name, 1, groups) not in self.parameter_axes:
            self.parameter_axes[name, 1, groups] = self.constraints.fresh(groups * weight.shape[1])
        return self.parameter_axes[name, 1, groups]

    def freeze(self, name: str, why: str) -> None:
        """Keep a parameter where it is."""
        for (owner, _, _), labels in self.parameter_axes.items():
            if owner == name:
                self.constraints.fix(labels, why, SCALE | SIGN | PERM)

    def finish(self, outputs: list[Tensor]) -> None:
        """What a run of the model returns stays as it is."""
        for tensor in outputs:
            self.memory.mark_read(tensor)
            self._fix_all([tensor], "the model returns them")

    def fix_idle_matrices(self, matters: Mapping[str, Tensor]) -> None:
        """Keep the matrices of a stack, as experts that no token visits, of which no entry `matters`."""
        for (name, _, groups), labels in self.parameter_axes.items():
            idle = ~matters[name].reshape(groups, -1).any(1).cpu() if groups > 1 else None
            if idle is not None and not bool(idle.all()):
                self.constraints.fix(labels.view(groups, -1)[idle], Operation.NOT_EXERCISED, SCALE | SIGN | PERM)

    def fix_unexercised(self) -> None:
        """After all runs, keep the entries of parameters that none read, and parameters whose siblings took no part.

        Siblings have the same name but for numbers, and the same shape, as experts in a list: those that took part
        share axes with the rest of the model, and so would those that did not.
        """
        idle = {(_numbers_hidden(n), p.shape) for n, p in self._params.items() if n not in self.used}
        fixed = torch.zeros(2 * self.constraints.count, dtype=torch.bool)
        for labels, systems, _ in self.constraints.fixed:
            fixed[labels] |= systems == SCALE | SIGN | PERM
        for (name, dim, groups), labels in self.parameter_axes.items():
            p = self._params[name]
            if name not in self.used:
                continue
            unread = ~self.memory.exercised_along(p, dim, groups) if p.numel() else torch.zeros(len(labels)) > 0
            if (_numbers_hidden(name), p.shape) in idle and re.search(r"\d", name):
                unread = torch.ones(len(labels)) > 0
            unread &= ~fixed[labels]  # as the rows of a table, which inputs pick
            if bool(unread.any()):
                self.constraints.fix(labels[unread], Operation.NOT_EXERCISED, SCALE | SIGN | PERM)
                self.unexercised += [name] if name not in self.unexercised else []
                self.partly |= {p.shape[dim]} if bool((~unread & ~fixed[labels]).any()) else set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        op = Operation(func, args, kwargs or {}, self)
        self.used.update(self._names[id(t)] for t in op.tensors if id(t) in self._names)
        busy = any(op.labels(t) for t in op.tensors)
        pieces = find_decomposition(func) if busy else None
        if pieces is None and busy and find_rule(func) is None:
            pieces = _known_decomposition
        if pieces is not None:
            with self:
                out = pieces(*args, **op.kwargs) if pieces is not _known_decomposition else pieces(op)
                if out is not NotImplemented:
                    return args[0].copy_(out) if op.is_in_place and pieces is not _known_decomposition else out
        blank = self._blank_memory(op) if busy else {}
        op.out = func(*args, **op.kwargs)
        labels = self._infer_labels(op) if busy else []
        self._note_memory(op)
        self._note_parts(op)
        if busy:
            self._assign_labels(op, labels, blank)
        return op.out

    def _infer_labels(self, op: Operation) -> list[Labels]:
        """The labels of the results; none, and all that is read stays, where there is no rule or it does not fit."""
        rule = find_rule(op.func)
        try:
            labels = [] if rule is None else rule(op)
            if rule is not None and isinstance(labels, list) and all(isinstance(new, list) for new in labels):
                return labels
            why = "" if rule is None else "its rule gives no list of labels for each result"
        except RuleMisfit as misfit:
            why = str(misfit)
        self.unsupported_ops[op.short_name] = why
        self._fix_all(op.tensors, f"{op.short_name} is not understood")
        return []

    def _fix_all(self, tensors: list[Tensor], why: str) -> None:
        for labels in (a for t in tensors for a in self.labels_of(t)):
            self.constraints.fix(labels, why, SCALE | SIGN | PERM)

    def _blank_memory(self, op: Operation) -> dict[int, Tensor]:
        """Of the tensors that will be written, those in memory that is zero or empty as a whole; and that memory."""
        found: dict[int, Tensor] = {}
        for t in op.written:
            base = self.memory.base_of(t)
            if base is not None and not op.labels(t) and self.memory.is_zero(base):
                found[id(t)] = base
        return found

    def _assign_labels(self, op: Operation, labels: list[Labels], blank: dict[int, Tensor]) -> None:
        """Give the results their labels; what was written into memory that was there before has to agree with it."""
        results = op.results()
        written = {id(t): t for t in op.written}
        for tensor, new in zip(results, labels + [[]] * len(results), strict=False):
            if written.pop(id(tensor), None) is not None and op.short_name not in VIEWS:
                self._agree_with_memory(tensor, new, blank.get(id(tensor)))
            else:
                self._labels[id(tensor)] = [a for a in new if bool(a.any())]
                self._alive.append(tensor)
        for tensor in written.values():
            self._agree_with_memory(tensor, [], None)

    def _agree_with_memory(self, tensor: Tensor, new: Labels, blank: Tensor | None) -> None:
        """A tensor in memory that others may see too: what is written has to move as what was there.

        Where there was nothing, in the memory of `blank`, each axis of it moves as what is written there.
        """
        if blank is not None and new:
            if blank.shape == tensor.shape and blank.stride() == tensor.stride():
                self.memory.give_labels(blank, [lift_labels(a, blank.ndim) for a in new])
                return
            self.memory.give_labels(blank, self.constraints.fresh_axes(blank.shape))
        old = self.labels_of(tensor)
        if len(old) == len(new) and all(a is b or torch.equal(a, b) for a, b in zip(old, new, strict=True)):
            return
        for cluster in cluster_by_dims([old, new]):
            a, b = (self.constraints.sum_labels(part) for part in cluster)
            if a is None or b is None:
                for x in (x for x in (a, b) if x is not None):
                    self.constraints.fix(x, "they are written over a constant", SCALE | SIGN | PERM)
            else:
                self.constraints.equate(a, b)

    def _note_memory(self, op: Operation) -> None:
        """Note which entries of parameters were read, and where what came out comes from."""
        results, kind = op.results(), op.short_name
        tracked = [t for t in op.tensors if self.memory.is_tracked(t)]
        if tracked and not (_carries_entries(op, tracked) and all(map(self.memory.keeps_type, tracked))):
            for t in tracked:
                if id(t) not in op.unexercised:
                    self.memory.mark_read(t)
            tracked = []
        made = kind in FACTORIES or (kind == "lift_fresh" and results[0].numel() == 1)
        sources = op.moved_tensors() if kind in VIEWS else op.tensors
        uniform = bool(sources) and all(self.memory.origin(t) == "uniform" for t in sources)
        uniform &= kind in MOVING or torch.Tag.pointwise in op.func.tags
        uniform |= kind in ("mul", "mm", "bmm") and any(map(self.memory.is_zero, op.tensors))
        origin = "empty" if made and "empty" in kind else "uniform" if made or uniform else "computed"
        here = {storage_key(t) for t in op.tensors}
        written = {id(t) for t in op.written}
        for t in results:
            if id(t) in written or made or storage_key(t) not in here:
                self.memory.note_result(t, origin, id(t) in written)
        new = [t for t in results if storage_key(t) not in here]
        if tracked and new:
            for t, entries in zip(results, self._tracked_entries(op, tracked[0]), strict=True):
                self.memory.carry_entries(t, entries)

    def _note_parts(self, op: Operation) -> None:
        """Note where the rows of a matrix fall into parts, all of which are taken out."""
        name = self._names.get(id(op.args[0])) if op.args and op.short_name in VIEWS else None
        if name is None or (p := self._params[name]).ndim != 2 or len(parts := op.results()) < 2:
            return
        if all(t.shape[1:] == p.shape[1:] for t in parts) and sum(map(len, parts)) == len(p):
            self.cut[name] = len(p) // math.gcd(len(p) // self.cut.get(name, 1), *map(len, parts))

    def _tracked_entries(self, op: Operation, tracked: Tensor) -> list[Tensor]:
        """For each result of an operation that carries entries of parameters along, which ones."""
        if op.short_name not in VIEWS:
            entries = self.memory.entries_of(tracked)
            assert entries is not None
            return [entries[op["indices"].cpu()] if op.short_name == "embedding" else entries]
        nobody = torch.full((1,), -1)
        known = [(t, self.memory.entries_of(t)) for t in op.moved_tensors()]
        return op.replay([nobody.expand(op.shapes[id(t)]) if ids is None else ids for t, ids in known])


def _known_decomposition(op: Operation) -> Any:
    """An operator taken apart as PyTorch does it, or NotImplemented."""
    parts = op.func.decompose(*op.args, **op.kwargs)
    if parts is NotImplemented:
        from torch._decomp import decomposition_table  # slow to import, and seldom needed

        rule = decomposition_table.get(op.func)
        parts = rule(*op.args, **op.kwargs) if rule else NotImplemented
    return parts


def _carries_entries(op: Operation, tracked: list[Tensor]) -> bool:
    """Whether what comes out are entries of parameters, elsewhere or each changed for itself."""
    if op.short_name in MOVING:
        return True
    return (
        len(tracked) == 1
        and torch.Tag.pointwise in op.func.tags
        and not op.is_in_place
        and tracked[0].shape == op.results()[0].shape
    )


def _numbers_hidden(name: str) -> str:
    return re.sub(r"\d+", "#", name)
