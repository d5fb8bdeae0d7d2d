"""Compute in float64 on the CPU, whatever a model asks for.

The copy of a model that discovery runs has its parameters, buffers and inputs in float64. What else it reads may be
coarser, or on a device: tensors that are plain attributes, constants that a function closes over, an explicit
`.float()` or `.cuda()`. `Float64` widens each of them where it meets an operator, and brings it to the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from teleport_lite.discovery.dispatch import DispatchMode, leaves_of, written_tensors
from teleport_lite.host import on_host

WIDER = {
    torch.float32: torch.float64,
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.complex64: torch.complex128,
    torch.complex32: torch.complex128,
}
HERE = ("cpu", "meta")


class Float64(DispatchMode):
    """Widens and moves every tensor, and every type and device that is asked for.

    Attributes:
        needed: whether there was anything to widen or to move.
    """

    def __init__(self) -> None:
        super().__init__()
        self.needed = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = leaves_of(args, kwargs)
        coarse = any(map(_is_foreign, leaves))
        if func in WITHOUT_FLOAT64:
            self.needed = True
            return WITHOUT_FLOAT64[func](*tree_map(_widen_argument, args), **tree_map(_widen_argument, kwargs))
        if not coarse or func is torch.ops.aten.view.dtype:
            return func(*args, **kwargs)
        self.needed = True
        wide = {id(x): on_host(x) for x in leaves if isinstance(x, Tensor) and _is_foreign(x)}

        def widen_leaf(x: Any) -> Any:
            return wide.get(id(x), x) if isinstance(x, Tensor) else _widen_argument(x)

        out = func(*tree_map(widen_leaf, args), **tree_map(widen_leaf, kwargs))
        given = {id(wide[id(x)]): x for x in written_tensors(func, args, kwargs) if id(x) in wide}
        for x in given.values():  # what is written in place keeps its type
            x.copy_(wide[id(x)])
        return tree_map(lambda x: given.get(id(x), x) if isinstance(x, Tensor) else x, out) if given else out


def _is_foreign(x: Any) -> bool:
    if isinstance(x, Tensor):
        return x.dtype in WIDER or _is_foreign(x.device)
    return x.type not in HERE if isinstance(x, torch.device) else isinstance(x, torch.dtype) and x in WIDER


def _widen_argument(x: Any) -> Any:
    if not _is_foreign(x):
        return x
    return on_host(x) if isinstance(x, Tensor) else torch.device("cpu") if isinstance(x, torch.device) else WIDER[x]


def _grouped_mm(a, b, offs=None, bias=None, out_dtype=None):
    """`_grouped_mm` by pieces: group g of the rows of a, of the columns of b, or of the sum, ends at `offs[g]`."""
    if offs is None:
        return torch.bmm(a, b)
    ends = offs.tolist()
    spans = list(zip([0, *ends[:-1]], ends, strict=True))
    if a.ndim == 3:
        return torch.cat([a[g] @ b[:, i:j] for g, (i, j) in enumerate(spans)], 1)
    if b.ndim == 2:
        return torch.stack([a[:, i:j] @ b[i:j] for i, j in spans])
    rest = a.new_zeros(len(a) - ends[-1], b.shape[-1])
    return torch.cat([*(a[i:j] @ b[g] for g, (i, j) in enumerate(spans)), rest])


WITHOUT_FLOAT64: dict[Any, Callable] = {}  # operators that have no kernel for float64
if hasattr(torch.ops.aten, "_grouped_mm"):  # torch >= 2.8
    WITHOUT_FLOAT64[torch.ops.aten._grouped_mm.default] = _grouped_mm


@contextmanager
def float64_default() -> Iterator[None]:
    """New tensors in float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
