r"""Propose translations where a stream is wider than what is read of it, or than what is written to it.

Where matrices H alone read what V writes, each gradient along the rows of V is in the span of the rows of H: then V may
move by N c with HN = 0. Where H reads $x = Vu + b$ alone, its gradients along x are in the span of V, once that of its
bias times b is taken away: it may move by $c N^\top$ with $N^\top V = 0$, and its bias by $-c N^\top b$.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from teleport_lite.discovery.probe import randn_like
from teleport_lite.discovery.ties import Tie
from teleport_lite.functional import Params
from teleport_lite.symmetries.kernels import Kernel
from teleport_lite.symmetries.shifts import Move, Shift, Step

INSIDE = 1e-9  # relative, what rounding leaves of a vector in a span outside of it
CHEAP = 1e8  # operations that the basis of a kernel may take
PIECES = 8  # of an axis, each of which may be a stream, and taps of a convolution, which may be apart
PLACED = 1 << 16  # entries of a parameter of which a part moves


class _Slice(NamedTuple):
    """Entries along an axis of a parameter from `first` on, at one tap or at all.

    A random combination of its gradients, and the same one of the gradients of its bias. Or rows that are `tied`, of
    one parameter or of several, each with the numbers of the groups in which they move alike; then the tap is -1.
    """

    name: str
    dim: int
    first: int
    tap: int | None
    gradient: Tensor
    of_bias: Tensor | None
    tied: tuple[tuple[str, tuple[int, ...]], ...] = ()


def kernel_shifts(
    params: Params,
    gradients: list[Params],
    products: dict[str, tuple],
    connected: dict[tuple[str, int], Tensor],
    ties: Iterable[Tie],
    generator: torch.Generator,
) -> Iterator[tuple[Shift, Kernel]]:
    """The translations that gradients propose, with the kernel that each is in: of each slice that with fewest rows.

    Where a matrix gives zero matters to what meets it in some product alone: to what is `connected` with it.
    """
    params = {name: p for name, p in params.items() if p.is_floating_point()}
    products = {name: product for name, product in products.items() if name in params}  # no complex ones
    after = dict(zip(params, [*params, ""][1:], strict=True))
    slices = _slices(params, gradients, after, ties, generator)
    found = dict.fromkeys(_kernels(params, products, after, slices))
    kernels = [(k, sum(params[n].numel() // params[n].shape[d] for n, d, _ in k.parts) - k.centered) for k in found]
    kernels = [(k, n) for k, n in kernels if n < k.length and n**2 * k.length <= CHEAP]

    def numbers_at(name: str, dim: int, first: int) -> set[int]:
        return {*connected[name, dim][:, first].tolist()} if (name, dim) in connected else set()

    meeting = {s[:3]: numbers_at(*s[:3]) for near in slices.values() for s in near}
    done: set[tuple] = set()
    for kernel, _ in sorted(kernels, key=lambda pair: pair[1]):
        own = {name for name, *_ in kernel.parts}
        part = any(params[name].shape[dim] > kernel.length for name, dim, _ in kernel.parts)
        bias = after[kernel.parts[0][0]] if len(kernel.parts) == 1 and not part else ""
        met = set().union(*(numbers_at(*part) for part in kernel.parts))
        near = [s for s in slices[kernel.length] if s.name not in own and (s.tied or met & meeting[s[:3]])]
        near = [s for s in near if {s[:4], (*s[:3], None)}.isdisjoint(done)] if done else near
        near = [s for s in near if not part or (s.tap is None and params[s.name].shape[s.dim] == kernel.length)]
        if not near:
            continue
        span = torch.linalg.qr(kernel.rows(params).T)[0]
        plain = torch.stack([s.gradient for s in near], 1)
        inside = [_inside(plain, span)]
        if bias and params[bias].shape == (kernel.length,):
            taken = [s.of_bias * params[bias] if s.of_bias is not None else 0 * params[bias] for s in near]
            inside.append(_inside(plain - torch.stack(taken, 1), span))
        for s, *how in zip(near, *inside, strict=True):
            fits = any(how) and {s[:4], (*s[:3], None)}.isdisjoint(done) and (how[0] or s.name != bias)
            if fits and (shift := _moved(params, s, kernel, () if how[0] else (after[s.name], bias))):
                done.add(s[:4])
                yield shift, kernel


def _inside(vectors: Tensor, span: Tensor) -> list[bool]:
    left = vectors - span @ (span.T @ vectors)
    return (left.norm(dim=0) <= INSIDE * vectors.norm(dim=0)).tolist()


def _slices(
    params: Params, gradients: list[Params], after: dict[str, str], ties: Iterable[Tie], generator: torch.Generator
) -> dict[int, list[_Slice]]:
    """Those that have the length of a whole axis, by that; and rows whose biases are tied."""
    found = {n: [g[n] for g in gradients if n in g] for n, p in params.items() if p.requires_grad}
    total = {n: torch.stack(some).sum(0) for n, some in found.items() if some}
    total = {n: g for n, g in total.items() if bool(g.any())}
    whole: list[_Slice] = []
    for name, g in total.items():
        for dim in (d for d in range(g.ndim) if g.shape[d] > 1):
            along = g.movedim(dim, 0) if g.ndim > 1 else g[:, None]  # [n, rows of the bias, taps ...]
            along = along.flatten(2) if along.ndim > 2 else along[..., None]
            weights = randn_like(along[0], generator)
            beside = total.get(after[name])
            beside = beside if g.ndim > 1 and beside is not None and beside.shape == along.shape[1:2] else None
            of_bias = None if beside is None else weights.sum(1) @ beside
            whole.append(_Slice(name, dim, 0, None, (along * weights).sum((1, 2)), of_bias))
            if dim and 1 < along.shape[2] <= PIECES + 1:
                each = (along * weights).sum(1).T, [None if beside is None else w @ beside for w in weights.T]
                whole += [_Slice(name, dim, 0, k, *pair) for k, pair in enumerate(zip(*each, strict=True))]
    parts: dict[int, list[_Slice]] = defaultdict(list)
    for n in {len(s.gradient) for s in whole if s.tap is None}:
        for s in whole:
            parts[n] += [
                s._replace(first=first, gradient=s.gradient[first : first + n]) for first in _starts(len(s.gradient), n)
            ]
    before = {bias: name for name, bias in after.items()}
    for tied in (tuple((before.get(bias, ""), groups) for bias, _, groups in tie) for tie in ties):
        rows = [total[name] for name, groups in tied if name in total and len(groups) == len(total[name])]
        alike = len(rows) == len(tied) and len({g.shape[1:] for g in rows}) == 1 < rows[0].ndim
        if alike and sum(g.numel() for g in rows) <= PLACED:
            numbers = torch.tensor([group for _, groups in tied for group in groups])
            mixed = (torch.cat(rows) * randn_like(rows[0][0], generator)).flatten(1).sum(1)
            summed = mixed.new_zeros(int(numbers.max()) + 1).index_add(0, numbers, mixed)
            parts[len(summed)].append(_Slice(tied[0][0], 0, 0, -1, summed, None, tied))
    return {n: [s for s in near if bool(s.gradient.any())] for n, near in parts.items()}


def _starts(length: int, n: int) -> list[int]:
    """Where a stream of length n may begin on an axis, in front of others like it or behind them."""
    if not n <= length <= PIECES * n:
        return []
    return sorted({*range(0, length - n + 1, n), *range(length - n, -1, -n)})


def _kernels(
    params: Params, products: dict[str, tuple], after: dict[str, str], slices: dict[int, list[_Slice]]
) -> Iterator[Kernel]:
    """Of each parameter, of it and the bias that follows it, and of the matrices that read the same tensor."""
    for name, p in params.items():
        for dim in range(p.ndim) if p.is_floating_point() and p.numel() else ():
            for n in slices:
                yield from (Kernel(((name, dim, first),), n) for first in _starts(p.shape[dim], n))
                if dim == 1 and p.shape[1:] == (2 * n,):  # two streams side by side, in front of a norm
                    yield from (Kernel(((name, 1, first),), n, True) for first in (0, n))
            if (n := p.shape[dim]) in slices and after[name] and params[after[name]].shape == (n,) and p.ndim > 1:
                yield Kernel(((name, dim, 0), (after[name], 0, 0)), n)
    readers: dict[tuple, list[tuple[str, int, int]]] = defaultdict(list)
    for name, (x, _, _) in products.items():
        readers[x].append((name, 1, 0))
    for parts in readers.values():
        n = params[parts[0][0]].shape[1]
        if len(parts) > 1 and n in slices and all(params[name].shape[1] == n for name, *_ in parts):
            yield Kernel(tuple(parts), n)


def _moved(params: Params, s: _Slice, kernel: Kernel, undo: tuple[str, ...]) -> Shift | None:
    """The translation of a slice in a kernel; where it reads what has a bias, its own bias undoes that."""
    p, axes = params[s.name], "abcdef"[: params[s.name].ndim]
    taps = [d for d in range(p.ndim) if s.tap is not None and d > 1 and not s.tied]
    wide = [1 if d in taps else kernel.length if d == s.dim else k for d, k in enumerate(p.shape)]
    narrow = [kernel.length - len(kernel.rows(params)) if d == s.dim else k for d, k in enumerate(wide)]
    own, n = axes.replace(axes[s.dim], "z"), torch.Size(narrow).numel()
    steps = [Step((), f"{axes[s.dim]}z,{own}->{axes}", tuple(narrow), (kernel,))]
    if s.tied:
        places = torch.arange(torch.Size(wide).numel()).view(wide)
        steps_of = {name: [*steps, Step(tuple(places[list(groups)].flatten().tolist()))] for name, groups in s.tied}
        return Shift(n, [Move(name, tuple(params[name].shape), 0, n, tuple(own)) for name, own in steps_of.items()])
    if wide != list(p.shape):
        if p.numel() > PLACED:
            return None
        places = torch.full(p.shape, -1)
        part = places.narrow(s.dim, s.first, kernel.length)
        part = part if s.tap is None else part.flatten(2)[:, :, s.tap]
        part.copy_(torch.arange(part.numel()).view(part.shape))
        steps.append(Step(tuple(places.flatten().tolist())))
    moves = [Move(s.name, tuple(p.shape), 0, n, tuple(steps))]
    if undo:
        bias, constant = undo
        operands = kernel, (constant, 0, kernel.length, 1)
        equation = f"{axes[s.dim]}z,{axes[s.dim]},{own}->{axes[0 if s.dim else 1]}"
        moves.append(Move(bias, tuple(params[bias].shape), 0, n, (Step((), equation, tuple(narrow), operands, -1.0),)))
    return Shift(n, moves)
