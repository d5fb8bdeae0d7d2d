"""The inputs of one call of a model, in containers of any kind, and how to vary them.

Values are drawn near those given, integers within the range seen or the table that they index, so that a model with a
restricted domain gets what it can take; what it refuses is left out by the caller.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from teleport_lite.runtime import Call

ROWS, MANY = 3, 64  # of the batch on which symmetries are tried, and of that on which what is found is tried again
Leaves = list[Any]


@dataclass(frozen=True)
class Arguments:
    """Positional and keyword arguments of a model.

    >>> Arguments.of({"x": torch.ones(2), "scale": 3}).leaves()
    [tensor([1., 1.]), 3]
    """

    args: tuple = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, example_inputs: object) -> Arguments:
        """A mapping is keyword arguments, a tuple or list positional ones, anything else the only argument."""
        if isinstance(example_inputs, Call):
            return cls(*example_inputs)
        if isinstance(example_inputs, Mapping):
            return cls((), dict(example_inputs))
        return cls(tuple(example_inputs) if isinstance(example_inputs, (tuple, list)) else (example_inputs,))

    def map(self, leaf: Callable[[Any], Any]) -> Arguments:
        """Each leaf replaced; a tensor that stands in several places stays one."""
        memo: dict[int, Any] = {}
        return Arguments(_map_leaves(self.args, leaf, memo), _map_leaves(self.kwargs, leaf, memo))

    def leaves(self) -> Leaves:
        """Tensors, numbers and whatever else is no container."""
        found: Leaves = []

        def collect_leaf(x: Any) -> Any:
            found.append(x)
            return x

        self.map(collect_leaf)
        return found

    def with_leaves(self, leaves: Leaves) -> Arguments:
        """The same containers around other leaves."""
        parts = iter(leaves)
        return self.map(lambda _: next(parts))

    def fresh(self) -> Arguments:
        """Copies, which a model may write to."""
        return self.map(_copy_leaf)

    def tensors(self) -> list[Tensor]:
        """The tensors among the leaves."""
        return [x for x in self.leaves() if isinstance(x, Tensor)]


def _map_leaves(x: Any, leaf: Callable, memo: dict[int, Any]) -> Any:
    if isinstance(x, Tensor):
        if id(x) not in memo:
            memo[id(x)] = leaf(x)
        return memo[id(x)]
    if isinstance(x, Mapping):
        new = {key: _map_leaves(value, leaf, memo) for key, value in x.items()}
        if type(x) is dict:
            return new
        same: Any = copy.copy(x)
        for key, value in new.items():
            same[key] = value
        return same
    if isinstance(x, (tuple, list)) and not isinstance(x, torch.Size):
        parts = [_map_leaves(part, leaf, memo) for part in x]
        return type(x)(*parts) if hasattr(x, "_fields") else type(x)(parts)
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        again: Any = copy.copy(x)
        for f in dataclasses.fields(x):
            object.__setattr__(again, f.name, _map_leaves(getattr(x, f.name), leaf, memo))
        return again
    return leaf(x)


def _copy_leaf(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.clone()
    if isinstance(x, torch.Generator):
        return torch.Generator().set_state(x.get_state())
    return x if callable(x) else copy.deepcopy(x)


def _vary_leaves(call: Arguments, real: Callable, whole: Callable) -> Arguments:
    """Every real tensor and every tensor of integers replaced."""

    def vary_leaf(x: Any) -> Any:
        if not isinstance(x, Tensor) or x.layout != torch.strided or x.is_nested or not x.numel():
            return x
        return real(x) if x.is_floating_point() or x.is_complex() else whole(x)

    return call.map(vary_leaf)


def variations(call: Arguments, tables: dict[int, int], generator: torch.Generator) -> Iterator[Iterator[Arguments]]:
    """Other values of the same shapes: several kinds, and for each the bolder ones first.

    Args:
        call: what to vary.
        tables: for tensors of integers, by `id`, the length of the table that they index.
        generator: for the draws.
    """

    def draw_normal(x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)

    def draw_uniform(x: Tensor) -> Tensor:
        return torch.rand(x.shape, generator=generator, dtype=torch.float64).to(x.device)

    def add_noise(x: Tensor) -> Tensor:
        return x + _typical_spread(x) * draw_normal(x)

    def keep_signs(x: Tensor) -> Tensor:  # signs stay; columns of integers are drawn from what stands there
        columns = x.reshape(-1, x.shape[-1]) if x.ndim else x.reshape(1, 1)
        counts = (columns == columns.real.round()).all(0) if x.is_complex() else (columns == columns.round()).all(0)
        picked = columns.gather(0, draw_uniform(columns).argsort(0))
        return torch.where(counts, picked, columns * (0.3 * draw_normal(columns).real).exp()).reshape(x.shape)

    def mix_rows(x: Tensor) -> Tensor:  # rows are drawn together, so that sums over a row stay what they are
        if x.ndim < 1 or len(x) < 2:
            return x
        share = draw_uniform(x.flatten(1)[:, 0] if x.ndim > 1 else x).reshape(-1, *[1] * (x.ndim - 1))
        return x + share.to(x.dtype) * (x.roll(1, 0) - x)

    def any_index(x: Tensor) -> Tensor:
        if id(x) not in tables or x.dtype == torch.bool:
            return index_in_range(x)
        return (draw_uniform(x) * tables[id(x)]).to(x.dtype)

    def index_in_range(x: Tensor) -> Tensor:
        low, high = x.min().double(), x.max().double()
        if low >= 0 and high <= 1:  # a mask
            low, high = torch.zeros_like(low), torch.ones_like(high)
        return (low + draw_uniform(x) * (high + 1 - low)).floor().to(x.dtype)

    def keep_values(x: Tensor) -> Tensor:
        return x

    for real in (add_noise, keep_signs, mix_rows):
        yield (_vary_leaves(call, real, whole) for whole in (any_index, index_in_range, keep_values))


def _typical_spread(x: Tensor) -> Tensor | float:
    """How far values lie apart, and not zero."""
    size = float(x.abs().std()) if x.numel() > 1 else 0.0
    return size or float(x.abs().max()) or 1.0


def scale_inputs(call: Arguments, size: float) -> Arguments:
    """Real inputs so many times larger."""
    return _vary_leaves(call, lambda x: size * x, lambda x: x)


def thinned(call: Arguments, generator: torch.Generator) -> Iterator[Arguments]:
    """The same with half of each real mask, of zeros and ones beside other tensors, at zero; and with an empty row.

    In that, integers and truth values are the smallest there are, as those of padding.
    """

    def halve(x: Tensor) -> Tensor:
        mask = bool(((x == 0) | (x == 1)).all())
        return (torch.rand(x.shape, generator=generator) < 0.5).to(x) if mask else x

    def empty_first(x: Tensor) -> Tensor:
        return torch.cat([torch.full_like(x[:1], x.min().item()), x[1:]]) if x.ndim else x

    if len(call.tensors()) > 1:
        yield _vary_leaves(call, halve, lambda x: x)
    yield _vary_leaves(call, lambda x: x, empty_first)


def other_numbers(call: Arguments) -> Iterator[Arguments]:
    """Other values for each Python integer and truth value among the arguments."""
    leaves = call.leaves()
    for i, n in enumerate(leaves):
        if isinstance(n, int):
            for value in [not n] if isinstance(n, bool) else dict.fromkeys([n + 1, *range(8), n - 1, 2 * n]):
                if value != n:
                    yield call.with_leaves([*leaves[:i], value, *leaves[i + 1 :]])


def drop_optional(call: Arguments) -> Iterator[Arguments]:
    """The same with None in place of one of several tensors, as of a mask or a context that may be left out.

    >>> [some.args for some in drop_optional(Arguments((torch.ones(2), torch.ones(1))))]
    [(None, tensor([1.])), (tensor([1., 1.]), None)]
    """
    given: dict[Any, Any] = {**dict(enumerate(call.args)), **call.kwargs}
    tensors = [key for key, value in given.items() if isinstance(value, Tensor)]
    for key in tensors if len(tensors) > 1 else ():
        args = tuple(None if i == key else x for i, x in enumerate(call.args))
        yield Arguments(args, {name: None if name == key else x for name, x in call.kwargs.items()})


def batch_length(call: Arguments) -> int:
    """The length of the first axis of the first tensor that has one."""
    return next((len(x) for x in call.tensors() if x.ndim), ROWS)


def many_rows(call: Arguments) -> int:
    """How many examples are many: `MANY`, or less where an example has many positions, as words or pixels."""
    x = next((x for x in call.tensors() if x.ndim and x.numel()), None)
    if x is None:
        return ROWS
    features = x.shape[-1] if x.ndim > 1 and x.is_floating_point() else 1
    return max(ROWS + 1, MANY * len(x) * features // x.numel())


def few_rows(call: Arguments) -> Arguments | None:
    """The first `ROWS` examples of a batch, or a smaller batch repeated; None when it has that size."""
    return None if batch_length(call) == ROWS else resize_axes(call, batch_length(call), ROWS, 0)


def axis_lengths(call: Arguments) -> Iterator[tuple[int, int | None]]:
    """The lengths of axes: for each length all axes that have it, then those along one dimension."""
    found = {(x.shape[d], d) for x in call.tensors() for d in range(x.ndim)}
    for size in sorted({s for s, _ in found}):
        yield size, None
        yield from ((size, d) for s, d in sorted(found) if s == size)


def has_length(call: Arguments, size: int, dim: int | None) -> bool:
    """Whether a tensor is still as long as that, along one dimension or along any."""
    return any(size in x.shape[slice(dim, None if dim is None else dim + 1)] for x in call.tensors())


def longer_lengths(size: int, dim: int | None) -> list[int]:
    """Lengths to try in place of one, not all of which a model may take; of a batch, one example more."""
    few = [size + 1] if dim == 0 else [2 * size + 1, size + 1, 2 * size]
    return few if size <= 8 else [size + 2, 2 * size, size // 2]


def resize_axes(call: Arguments, old: int, new: int, dim: int | None) -> Arguments:
    """Every axis of length `old` (along `dim` alone, where given) made `new` long, by repetition; integers likewise."""

    def resize_leaf(x: Any) -> Any:
        if isinstance(x, int) and not isinstance(x, bool) and x == old and dim is None:
            return new
        if isinstance(x, Tensor) and x.layout == torch.strided and not x.is_nested:
            for d in range(x.ndim) if dim is None else [dim] if dim < x.ndim else []:
                if x.shape[d] == old:
                    x = x.index_select(d, (torch.arange(new) % old).to(x.device))
        return x

    return call.map(resize_leaf)
