"""One operation of a run, as a rule sees it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from teleport_lite.discovery.constraints import ALL, MIX, SCALE, SIGN
from teleport_lite.discovery.dispatch import leaves_of, map_tensors, written_tensors
from teleport_lite.discovery.labels import Labels, cluster_by_dims, varying_dims

if TYPE_CHECKING:
    from teleport_lite.discovery.propagate import Propagation


class RuleMisfit(Exception):
    """A rule that does not fit the arguments of a call; the operation then counts as not understood."""


def is_inexact(tensor: Tensor) -> bool:
    """Whether a tensor holds real or complex numbers, which can be multiplied, and no integers or truth values."""
    return tensor.is_floating_point() or tensor.is_complex()


class Operation:
    """One operation that a model carries out: what it reads, what comes out, and the equations to write.

    Attributes:
        func: the operator, a `torch._ops.OpOverload`.
        name: its name with the namespace, as "aten::mm".
        args: the positional arguments.
        kwargs: the keyword arguments.
        tensors: all tensors among the arguments.
        written: those that the operation writes into.
        shapes: their shapes before the call, by `id`.
        out: what came out.
        constraints: the equations between labels.
        unexercised: `id` of the arguments that met nothing but zeros.
        answers: what elementwise functions were found to commute with.
    """

    NOT_EXERCISED = "not exercised by these inputs"

    def __init__(self, func: Any, args: tuple, kwargs: dict, propagation: Propagation) -> None:
        self.func, self.args, self.kwargs = func, args, kwargs
        self.name: str = func._schema.name
        self.constraints = propagation.constraints
        self.memory, self.answers = propagation.memory, propagation.answers
        self.grouped_axis = propagation.grouped_axis
        self.out: Any = None
        self.unexercised: set[int] = set()
        self._labels_of = propagation.labels_of
        self.tensors = [t for t in leaves_of(args, kwargs) if isinstance(t, Tensor)]
        self.shapes = {id(t): t.shape for t in self.tensors}
        self.written = list(written_tensors(func, args, kwargs))
        busy = any(map(self._labels_of, self.tensors))
        self._zeros = {
            id(t) for t in self.tensors if busy and not self._labels_of(t) and self.memory.is_zero(t)
        }  # before the call

    def __getitem__(self, name: str) -> Any:
        """An argument by its name in the schema; its default where it was not passed.

        Raises:
            RuleMisfit: when the schema has none of that name.
        """
        for i, argument in enumerate(self.func._schema.arguments):
            if argument.name == name:
                return self.args[i] if i < len(self.args) else self.kwargs.get(name, argument.default_value)
        raise RuleMisfit(f"{self.func} has no argument {name}")

    def has(self, name: str) -> bool:
        """Whether the schema has an argument of that name."""
        return any(argument.name == name for argument in self.func._schema.arguments)

    def results(self) -> list[Tensor]:
        """The tensors that came out."""
        return [t for t in leaves_of(self.out) if isinstance(t, Tensor)]

    def labels(self, tensor: Any) -> Labels:
        """The labels of an argument; none for a constant."""
        return self._labels_of(tensor) if isinstance(tensor, Tensor) else []

    def is_zero(self, tensor: Any) -> bool:
        """Whether an argument is a constant that the model made zero, or empty memory, whatever its inputs are."""
        return id(tensor) in self._zeros

    def fix(self, labels: Iterable[Tensor], why: str, systems: int = ALL) -> None:
        """Keep what has these labels."""
        for a in labels:
            self.constraints.fix(a, why, systems)

    def keep_entries_apart(self, labels: Iterable[Tensor], systems: int = MIX) -> None:
        """No mixing of the entries of an axis."""
        for a in labels:
            self.constraints.distinguish(a, systems=systems)

    def note_gain(self, tensor: Any, labels: Tensor | None) -> None:
        """Note that `tensor`, with these labels, multiplies an axis, if it consists of parameters."""
        if labels is not None and self.memory.is_tracked(tensor):
            self.constraints.gains.append(labels)

    @property
    def is_in_place(self) -> bool:
        """Whether the operation writes its result over its first argument."""
        return bool(self.written) and self.name.endswith("_")

    @property
    def short_name(self) -> str:
        """The name without the namespace of PyTorch and the mark of what works in place."""
        return self.name.removeprefix("aten::").rstrip("_") if self.name.startswith("aten::") else self.name

    def moved_tensors(self) -> list[Tensor]:
        """The tensors that an operation moves about: one, a list, or two, where one is written into the other."""
        first = self.args[0]
        if isinstance(first, (list, tuple)):
            return list(first)
        return [first, self.args[1]] if self.name == "aten::slice_scatter" else [first]

    def replay(self, stand_ins: list[Tensor]) -> list[Tensor]:
        """What the operation, which only moves data, makes of stand-ins for the tensors that it moves.

        Raises:
            RuleMisfit: when it cannot carry labels, which are integers.
        """
        args, kwargs = map_tensors(Tensor.cpu, (self.args, self.kwargs))
        listed = isinstance(args[0], (list, tuple))
        args = (stand_ins, *args[1:]) if listed else (*stand_ins, *args[len(stand_ins) :])
        if self.short_name in ("view", "_unsafe_view", "_reshape_alias"):  # the stand-in has other strides
            return [stand_ins[0].reshape(self.out.shape)]
        try:
            moved = self.func(*args, **kwargs)
        except (RuntimeError, NotImplementedError) as error:
            raise RuleMisfit(f"{self.func} cannot move labels: {error}") from error
        return [t for t in leaves_of(moved) if isinstance(t, Tensor)]

    def color_by_values(self, constant: Tensor, labels: Tensor) -> None:
        """Tell apart the entries that a constant multiplies or shifts differently.

        Where all values happen to be equal although they were computed, other inputs may make them differ.
        """
        origin, offset = self.memory.origin(constant), labels.ndim - constant.ndim
        steps = [0] * offset + [step if n > 1 else 0 for n, step in zip(constant.shape, constant.stride(), strict=True)]
        dims = [d + labels.ndim for d in varying_dims(labels)]
        if not any(steps[d] for d in dims):
            return
        constant = constant.detach()
        constant = constant.real + math.pi * constant.imag if constant.is_complex() else constant.double()
        constant = constant.nan_to_num().reshape((1,) * offset + constant.shape)
        rest = [d for d in range(labels.ndim) if d not in dims]
        if rest:  # a random sum over them, equal only for entries that are equal everywhere
            shape = [constant.shape[d] if d in rest else 1 for d in range(labels.ndim)]
            weights = torch.rand(shape, generator=torch.Generator().manual_seed(0))
            summed = (constant * weights.to(constant)).sum(rest, keepdim=True)
        else:
            summed = constant
        values, colors = summed.reshape(-1).unique(return_inverse=True)
        if len(values) < 2 and origin == "computed":
            self.constraints.distinguish(labels)
        else:
            self.constraints.distinguish(labels, colors.reshape(summed.shape).cpu())

    def add_bias(self, labels: Labels, bias: Tensor | None, fit: Callable[[Tensor], Tensor]) -> Labels:
        """Labels of a sum with a bias, which `fit` makes broadcast."""
        if bias is None or self.is_zero(bias):
            return labels
        found: Labels = []
        for cluster in cluster_by_dims([labels, [fit(a) for a in self.labels(bias)]]):
            a, b = (self.constraints.sum_labels(part) for part in cluster)
            if a is not None and b is not None:
                self.constraints.equate(a, b)
                if bias.ndim == 1 and a.numel() == b.numel():
                    self.constraints.biases.append((a.reshape(-1), b.reshape(-1)))
            elif a is not None:
                self.fix([a], "a constant is added to them", SCALE | SIGN)
                self.color_by_values(fit(bias), a)
                self.keep_entries_apart([a])
            elif b is not None:
                self.fix([b], "they are added to what is fixed")
            if a is not None:
                found.append(a)
        return found
