r"""Follow shifts of parameters through one run of a model, to where others undo them or nothing sees them.

Beside the data goes, for each *source*, the difference that a random shift c of a parameter makes. An operator that is
not linear in it blocks the source. Where the difference is the same for all data, the numbers tell what it is: entries
of what it was, or a matrix that the operator reads times it. It ends where it vanishes, as under a softmax, or where
another parameter, added at the same place, can undo it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from teleport_lite.discovery.differences import (
    EXACT,
    Difference,
    Part,
    Source,
    choice_of,
    cluster_by_source,
    compact_tensor,
    extend_chain,
    multiply_shift,
    output_differences,
    product_step,
    rerun_shifted,
    sum_or_mean,
    undoing_step,
)
from teleport_lite.discovery.dispatch import DispatchMode, leaves_of, written_tensors
from teleport_lite.discovery.memory import storage_key
from teleport_lite.discovery.propagate import MOVING
from teleport_lite.discovery.ties import Tie, ties_let_through
from teleport_lite.functional import Params
from teleport_lite.symmetries.shifts import Operand, Shift, Step

WHOLE = 4096  # entries of a table that is shifted entry by entry
BIASES = {"addmm": (0, -1), "native_layer_norm": (3, -1)}  # where an operator has its bias, and along which dimension
BIASES |= dict.fromkeys(("convolution", "native_batch_norm", "native_group_norm"), (2, 1))
ROWS = {"mm": 0, "addmm": 1, "convolution": 0}  # products row by row, and where what they are linear in stands
PICKS = {"embedding", "index", "index_select", "gather"}
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "convolution"}


class Shifts(DispatchMode):
    """The sources of a run; parameters that are `looped` are read again and again, entries in `ties` shifted alike.

    Attributes:
        sources: those.
        products: for each matrix what it is multiplied with, the memory of the result, and its dimensions: out and in,
            "oi", or "io".
        uses: how many operators compute with each parameter.
        tables: parameters of which rows are picked, or that are multiplied by others alone.
        ties: those, and others that operators of this run ask for.
    """

    def __init__(
        self, params: Params, generator: torch.Generator, looped: frozenset[str] = frozenset(), ties: Iterable[Tie] = ()
    ) -> None:
        super().__init__()
        self.uses: Counter[str] = Counter()
        self.tables: set[str] = set()
        self._params, self._generator, self._looped = params, generator, looped
        keys = [storage_key(p) for p in params.values()]
        self._owners = {k: n for k, n in zip(keys, params, strict=True) if keys.count(k) == 1}
        self._found: dict[int, list[Difference]] = {}
        self._alive: list[Tensor] = []  # so that no `id` is used twice
        self._own: dict[str, list[Source]] = {}
        self._vectors: dict[int, list[str]] = {}  # by their length
        self.sources: list[Source] = []
        self.products: dict[str, tuple[tuple[int, ...], int, str]] = {}
        self.ties = dict.fromkeys(ties)
        self._tied = len(self.ties)
        for tie in self.ties:
            self._new_source(1 + max(max(groups) for *_, groups in tie), *((n, s, (Step(g),)) for n, s, g in tie))

    def _new_source(self, n: int, *parts: Part) -> Source:
        p = self._params[parts[0][0]]
        c = torch.randn(n, generator=self._generator, dtype=p.dtype).to(p) * (1 + p.square().mean().sqrt())
        self.sources.append(Source(*parts[0], c, parts[1:]))
        return self.sources[-1]

    def _enter_parameter(self, x: Tensor) -> None:
        """Begin with the shifts of a parameter, of which `x` is a view: of all entries or rows alike, and of each."""
        name = self._owners[storage_key(x)]
        p = self._params[name]
        if not (p.is_floating_point() and p.requires_grad and p.ndim and (x is p or p.numel() <= WHOLE)):
            return
        if name not in self._own:
            alike = (1,) * p.ndim
            shapes = [alike, (*alike[1:], p.shape[-1]), tuple(p.shape)][: 2 + (p.numel() <= WHOLE)]
            tied = [s for s in self.sources[: self._tied] if any(name == other for other, *_ in s.parts)]
            alone = [self._new_source(torch.Size(s).numel(), (name, s, ())) for s in dict.fromkeys(shapes)]
            self._own[name] = [*alone, *tied]
        row = x.numel() == p.shape[-1] < p.numel()  # others may go elsewhere: then a source that moves it alone
        for s in reversed(self._own[name]) if row else self._own[name]:
            _, shape, own = next(part for part in s.parts if part[0] == name)
            t = (s.c[list(own[0].indices)] if own else s.c).view(shape)
            if x is not p:
                laid = torch.empty_strided(p.size(), p.stride(), dtype=p.dtype, device=p.device).copy_(t)
                t = compact_tensor(laid.as_strided(x.size(), x.stride(), x.storage_offset() - p.storage_offset()))
            step = choice_of(s.c, t.reshape(-1))
            if step is not None:
                self._attach_difference(x, Difference(s, t, (extend_chain((), *step),), s.read | True))

    def _attach_difference(self, tensor: Tensor, difference: Difference) -> None:
        self._found.setdefault(id(tensor), []).append(difference)
        self._alive.append(tensor)

    def finish(self, outputs: list[Tensor]) -> list[Shift]:
        """The translations found; what reaches the outputs is seen."""
        for x in outputs:
            for d in self._found.get(id(x), []):
                d.source.blocked |= d.support
        found = [(s, part) for s in self.sources for part in s.ended_shifts()]
        own = {s: (s.name, tuple(step for step in s.own if step.equation)) for s, _ in found}
        whole = {own[s]: len(s.c) for s, part in sorted(found, key=lambda f: len(f[0].c)) if part.dim == len(s.c)}
        return [part for s, part in found if len(s.c) >= whole.get(own[s], 0)]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        kind = func._schema.name.removeprefix("aten::").rstrip("_")
        given = [x for x in leaves_of(args, kwargs) if isinstance(x, Tensor)]
        written = {id(x) for x in written_tensors(func, args, kwargs)}
        moving = kind in MOVING and not written
        views = not written and any(r.alias_info for r in func._schema.returns)
        for x in () if views else [args[BIASES[kind][0]]] if kind in BIASES else given:
            owned = isinstance(x, Tensor) and storage_key(x) in self._owners and id(x) not in self._found
            if owned and (x.ndim < 2 or kind not in PRODUCTS):  # where the shift of a matrix meets the data, it is seen
                self._enter_parameter(x)
        # nothing depends on a shift that is blocked and undoes no other
        shifted = [(x, d) for x in {id(x): x for x in given}.values() for d in self._found.get(id(x), [])]
        shifted = [(x, d) for x, d in shifted if d.source.undoes or bool((d.support > d.source.blocked).any())]
        alive = cluster_by_source(shifted)
        call, bias = (func, args, kwargs), args[BIASES[kind][0]] if kind in BIASES else None
        direct = [len(i) == 1 and i[0][0] is bias and bias.ndim == 1 for i in alive]
        rows = args[ROWS[kind]] if kind in ROWS and not kwargs and len({*map(id, given)}) == len(given) else None
        ends = [
            [] if known
            else multiply_shift(call, rows, i[0][1].t) if len(i) == 1 and i[0][0] is rows
            else rerun_shifted(call, i, moving, written)
            for known, i in zip(direct, alive, strict=True)
        ]  # fmt: skip
        out = func(*args, **kwargs)
        results = [x for x in leaves_of(out) if isinstance(x, Tensor)]
        for i in written:
            self._found.pop(i, None)
        ndim, stopped = results[0].ndim if results else 0, []
        for inputs, moved, known in zip(alive, ends, direct, strict=True):
            (x, d), s = inputs[0], inputs[0][1].source
            support = torch.stack([d.support for _, d in inputs]).any(0)
            s.born = s.born or (0 if moving else len(self._alive))
            s.read |= support & (not moving)
            shape = [-1 if k == BIASES[kind][1] % ndim else 1 for k in range(ndim)] if known else []
            new = [d.t.view(shape)] if known else output_differences(results, moved)
            found = [
                self._express_difference((kind, args, given), inputs, t, support) if t is not None else None
                for t in new
            ]
            if not found or (storage_key(x) in self._owners and any(d and d.v is not None for d in found)):
                s.blocked |= support  # by what is not linear, a number that Python reads, or data times a gain
                stopped += inputs
                continue
            s.settled |= support & (not moving and found[0] is None)
            for x, new_d in zip(results, found, strict=False):
                if new_d:
                    self._attach_difference(x, new_d)
        if stopped and not written and kind not in PRODUCTS:
            self.ties.update(dict.fromkeys(ties_let_through(call, results, stopped)))
        if kind in ("mm", "addmm"):
            self._read_normalized(args[-2], args[-1], results[0])
        elif kind == "convolution" and args[1].shape[1] == args[1][0].numel() == args[0].shape[1] and not args[6]:
            self._read_normalized(args[0].movedim(1, -1).flatten(0, -2), args[1].flatten(1).T, results[0])
        names = {self._owners.get(storage_key(x), "") for x in given}
        self.uses.update(() if views or moving else names)
        if kind in PICKS or (kind in PRODUCTS and "" not in names):
            self.tables |= names
        for x in results:
            self._absorb_shifts(self._found.get(id(x), []), names)
        return out

    def _express_difference(
        self, op: tuple[str, tuple, list[Tensor]], inputs: list[tuple[Tensor, Difference]], t: Tensor, support: Tensor
    ) -> Difference:
        """The difference `t` in terms of those in the arguments."""
        (kind, args, given), s = op, inputs[0][1].source
        if len(inputs) == 2 and kind in ("add", "sub") and all(d.v is None for _, d in inputs):
            parts = []
            for x, d in inputs:
                shape = (1,) * (t.ndim - x.ndim) + d.t.shape
                places = torch.arange(d.t.numel()).view(shape).expand(t.shape).reshape(-1)
                scale = 1.0 if x is args[0] else -1.0 if kind == "sub" else 1.0
                parts.append((d, Step(tuple(places.tolist()), scale=scale)))
            total = torch.stack([step.scale * d.t.reshape(-1)[list(step.indices)] for d, step in parts]).sum(0)
            if torch.allclose(total, t.reshape(-1), EXACT, EXACT * float(t.abs().max())):
                return Difference(s, t, tuple(extend_chain(c, step) for d, step in parts for c in d.chains), support)
        d = inputs[0][1]
        v, w = d.t.reshape(-1) if d.v is None else d.v, t.reshape(-1)
        step = next(([r] for x in given if (r := self._match_product(x, v, w))), None)
        if step is None and d.v is None:
            step = self._match_broadcast(given, inputs[0][0], d.t, w) if kind in PRODUCTS else sum_or_mean(d.t, w)
        step = choice_of(v, w) if step is None else step
        if step is None or (len(inputs) > 1 and any(part.equation or part.scale != 1 for part in step)):
            return Difference(s, t, d.chains, support, v)
        return Difference(s, t, tuple(extend_chain(c, *step) for c in d.chains), support)

    def _match_broadcast(self, given: list[Tensor], x: Tensor, t: Tensor, w: Tensor) -> list[Step] | None:
        """A choice of entries and a product that make w of `t`, which is the same along an axis of x."""
        for dim in (k for k in range(x.ndim) if t.shape[k] < x.shape[k]):
            wide = t.expand(*(n if k == dim else -1 for k, n in enumerate(x.shape))).reshape(-1)
            product = next((r for p in given if (r := self._match_product(p, wide, w))), None)
            if product:
                return [*(choice_of(t.reshape(-1), wide) or ()), product]
        return None

    def _parameter_rows(self, x: Any) -> tuple[Operand, Tensor] | None:
        """The rows of a parameter that a tensor shows, in whatever order, and these rows themselves."""
        name = self._owners.get(storage_key(x)) if isinstance(x, Tensor) else None
        if name is None or not (p := self._params[name]).ndim or not p.is_contiguous():
            return None
        first, width = x.storage_offset() - p.storage_offset(), max(p.stride(0), 1)
        count = torch.Size(n for n, step in zip(x.shape, x.stride(), strict=True) if step).numel()
        if first % width or count % width or first + count > p.numel():
            return None
        operand = name, first // width, count // width, 1
        return operand, p.narrow(0, *operand[1:3])

    def _match_product(self, x: Tensor, v: Tensor, w: Tensor) -> Step | None:
        """The parameter that `x` shows, times v, where w is that."""
        found = self._parameter_rows(x)
        return product_step(*found, v, w) if found and not torch.equal(v, w) else None

    def _absorb_shifts(self, here: list[Difference], names: set[str]) -> None:
        """Let what is shifted by one source be shifted back by another, whose entries are added at the same places."""
        for d in [d for d in here if d.v is None]:
            for e in here:
                s, other, choice = d.source, e.source, e.choice
                if (
                    other.name in {name for name, *_ in s.parts}
                    or choice is None
                    or other.own
                    or other.name in self._looped - names
                ):
                    continue  # what a loop reads has gone elsewhere, too, but right where it is read
                if bool((other.blocked & e.support).any()) and all(o is not other for o, _ in s.undone):
                    continue  # it went where s did not
                if d.choice and s.born > other.born:  # what was there before may have gone elsewhere, too
                    continue
                if step := undoing_step(d, e, choice):
                    for c in d.chains:
                        s.undone[other, extend_chain(c, step)] = s.undone.get((other, extend_chain(c, step)), 0) + 1
                    other.undoes = True
                    s.settled |= d.support
                    s.absorbed |= d.support
                    here.remove(d)
                    break

    def _read_normalized(self, x: Tensor, matrix: Tensor, out: Tensor) -> None:
        r"""Sources $W \mapsto W + c\,(1/g)^\top$ for weights that read a LayerNorm with gain g and shift $\beta$.

        What it gives has $\sum_i (x_i - \beta_i) / g_i = 0$, so that Wx is shifted by $c \sum_i \beta_i / g_i$. The
        numbers tell g and $\beta$, wherever x comes from.
        """
        name = self._owners.get(storage_key(matrix), "")
        (d, m), outer = matrix.shape, "oi" if matrix.stride(0) == 1 else "io"
        if not name or self._params[name].ndim != out.ndim or self._params[name].shape[outer.index("i")] != d:
            return
        rows: tuple[Step, ...] = ()
        if self._params[name].numel() == matrix.numel():
            if out.ndim == 2:
                self.products[name] = (storage_key(x), int(x.storage_offset()), x.numel()), storage_key(out), outer
        elif outer == "oi":
            places = torch.full((self._params[name].numel(),), -1)
            places[matrix.storage_offset() :][: matrix.numel()] = torch.arange(matrix.numel())
            rows = (Step(tuple(places.tolist())),)
        else:
            return
        if d not in self._vectors:
            self._vectors[d] = [n for n, v in self._params.items() if v.shape == (d,) and d > 1]
        if not (names := self._vectors[d]) or not len(x):
            return
        vectors = torch.stack([self._params[n] for n in names]).to(x)
        inverse = vectors.reciprocal()
        totals, sizes = x @ inverse.T, x.abs().amax(0) @ inverse.abs().T
        for k in ((totals - totals[:1]).abs().amax(0) <= EXACT * sizes).nonzero()[:, 0].tolist():
            total, rounding, gain = totals[0, k], EXACT * sizes[k], (names[k], 0, d, -1)
            shifts = ((vectors @ inverse[k] - total).abs() <= rounding).nonzero()[:, 0].tolist()
            if shifts or total.abs() <= rounding:
                own = Step((), f"i,o->{outer}", (m,), (gain,))
                s = self._new_source(m, (name, tuple(self._params[name].shape), (own, *rows)))
                s.settled |= bool(total.abs() <= rounding)
                s.read |= True
            if shifts and total.abs() > rounding:
                step = Step((), "i,i,o->o", (m,), ((names[shifts[0]], 0, d, 1), gain))
                t = (total.to(s.c) * s.c).to(out).view(1, m, *[1] * (out.ndim - 2))
                self._attach_difference(out, Difference(s, t, ((step,),), s.read | True))
