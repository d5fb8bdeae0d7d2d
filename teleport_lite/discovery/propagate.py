"""Follow every axis of every parameter through one run of a model.

`Propagation` is a dispatch mode: it sees each operation that PyTorch carries out, whatever module, function or loop
asked for it, and writes down what the operation allows to move (`Constraints`). An operation falls into one of a few
kinds, and a rule says what a kind asks of its axes: data that only changes place takes its labels along; elementwise
functions are asked, with random numbers, what they commute with; a contraction wants the two axes that it sums over to
move inversely to each other; a norm stops what comes in and starts anew with its gain. What has no rule, and
no decomposition into operations that have one, stops everything that it reads.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from teleport_lite.discovery.constraints import MIX, PERM, SCALE, SIGN, Constraints, negative

Labels = list[Tensor]  # of one tensor: each broadcasts to its shape, and they add up

LOW = (torch.float32, torch.float16, torch.bfloat16)
SCALES = (1e-12, 1e-6, 1e-3, 1.0, 1e3, 1e6, 1e12)  # magnitudes at which an elementwise function is asked
PLACES = re.compile(
    "view|_unsafe_view|_reshape_alias|reshape|permute|transpose|t|expand|slice|select|unsqueeze|squeeze|cat|stack|split"
    "|split_with_sizes|unsafe_split|unsafe_split_with_sizes|unbind|flip|roll|repeat|index|index_select|gather|unfold"
    "|diagonal|as_strided|pixel_shuffle|pixel_unshuffle|channel_shuffle|repeat_interleave|narrow|movedim"
)
KEEP = re.compile("clone|_to_copy|contiguous|detach|alias|lift_fresh|lift_fresh_copy|native_dropout")
NEW = re.compile("(zeros|ones|empty|full|rand|randn)_like|new_(zeros|ones|empty|full)")
REDUCE = re.compile("sum|mean|amax|amin|max|min|std|var|var_mean|linalg_vector_norm|norm|prod|logsumexp|any|all")
SOFTMAX = re.compile("_softmax|_log_softmax|_safe_softmax")
SPACE = re.compile(r"_?(?:\w*avg_pool|\w*max_pool|upsample|reflection_pad|replication_pad)\D*(\d)d\w*")


class InFloat64(TorchDispatchMode):
    """Computes in float64 where a model asks for less."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **_widened(kwargs))


def _widened(kwargs: dict | None) -> dict:
    kwargs = kwargs or {}
    return {**kwargs, "dtype": torch.float64} if kwargs.get("dtype") in LOW else kwargs


@dataclass(frozen=True)
class Nature:
    """How a function answers when some of its arguments are multiplied: "same", "free" (not at all), or "still"."""

    scale: str
    sign: str
    linear: bool


class Propagation(TorchDispatchMode):
    """The constraints that a run of a model puts on the axes of `params`.

    Attributes:
        constraints: what the run writes down.
        parameter_axes: for each axis of each parameter its labels; an axis is a parameter, a dimension and a number of groups.
        used: names of the parameters that took part.
        unsupported_ops: operations without a rule.
    """

    def __init__(self, params: dict[str, Tensor]) -> None:
        super().__init__()
        self.constraints = Constraints()
        self.parameter_axes: dict[tuple[str, int, int], Tensor] = {}
        self.used: set[str] = set()
        self.unsupported_ops: dict[str, None] = {}
        self._names = {id(p): name for name, p in params.items()}
        self._labels: dict[int, Labels] = {}
        self._alive: list[Tensor] = list(params.values())  # so that no `id` is used twice
        self._blank: set[int] = set()
        self._natures: dict[Any, Nature] = {}
        for name, p in params.items():
            own = self._labels[id(p)] = []
            for dim in (d for d in range(p.ndim) if p.ndim <= 2 or p.shape[d] > 1):
                labels = self.constraints.fresh(*(p.shape[dim] if d == dim else 1 for d in range(p.ndim)))
                self.parameter_axes[name, dim, 1] = labels.reshape(-1)
                own.append(labels)

    def of(self, tensor: Any) -> Labels:
        """The labels of a tensor."""
        return self._labels.get(id(tensor), []) if isinstance(tensor, Tensor) else []

    def freeze(self, name: str, why: str) -> None:
        """Keep a parameter where it is."""
        for (owner, _, _), labels in list(self.parameter_axes.items()):
            if owner == name:
                self.constraints.fix(labels, why, SCALE | SIGN | PERM)

    def finish(self, outputs: list[Tensor]) -> None:
        """What the model returns stays as it is."""
        for tensor in outputs:
            self._stop(self.of(tensor), "the model returns them")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = _widened(kwargs)
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        self.used.update(self._names[id(t)] for t in tensors if id(t) in self._names)
        name = func._schema.name.split("::")[1].rstrip("_")
        busy = any(self.of(t) for t in tensors)
        if busy and self._rule(name, func) is None:
            with self:
                parts = func.decompose(*args, **kwargs)
                if parts is NotImplemented:
                    from torch._decomp import decomposition_table  # slow to import, and seldom needed

                    rule = decomposition_table.get(func)
                    parts = rule(*args, **kwargs) if rule else NotImplemented
            if parts is not NotImplemented:
                return parts
        written = [
            a for a, s in zip(args, func._schema.arguments, strict=False) if s.alias_info and s.alias_info.is_write
        ]
        self._shapes = {id(t): t.shape for t in tensors}
        out = func(*args, **kwargs)
        if busy:
            found = self._follow(name, func, args, kwargs, out)
            results = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
            touched = {id(t): t for t in tree_leaves(written) if isinstance(t, Tensor)}
            for tensor, labels in zip(results, found + [[]] * len(results), strict=False):
                if touched.pop(id(tensor), None) is not None and not PLACES.fullmatch(name):
                    self._overwrite(tensor, labels)
                else:
                    self._labels[id(tensor)] = [a for a in labels if bool(a.any())]
                    self._alive.append(tensor)
            for tensor in touched.values():
                self._overwrite(tensor, [])
        return out

    def _follow(self, name: str, func, args: tuple, kwargs: dict, out: Any) -> list[Labels]:
        """The labels of the results; none, and all that is read stays, where there is no rule or it does not fit."""
        rule = self._rule(name, func)
        try:
            if rule is not None:
                return rule(name, func, args, kwargs, out)
        except Exception:  # arguments that the rule does not foresee
            pass
        self.unsupported_ops[name] = None
        for t in tree_leaves((args, kwargs)):
            self._stop(self.of(t), f"{name} is not understood")
        return []

    def _rule(self, name: str, func) -> Any:
        for names, rule in (
            (KEEP, self._keep),
            (NEW, lambda *_: []),
            (PLACES, self._places),
            (REDUCE, self._reduce),
            (SOFTMAX, self._softmax),
            (SPACE, self._space),
        ):
            if names.fullmatch(name):
                return rule
        alike = torch.Tag.pointwise in func.tags or name == "rrelu_with_noise"
        return getattr(self, f"_op_{name}", None) or (self._elementwise if alike else None)

    # -- bookkeeping

    def _stop(self, labels: Labels, why: str, systems: int = SCALE | SIGN | PERM) -> None:
        for a in labels:
            self.constraints.fix(a, why, systems)

    def _overwrite(self, tensor: Tensor, new: Labels) -> None:
        """A tensor in memory that others may see too: what is written has to move as what was there."""
        old = self.of(tensor)
        if id(tensor) in self._blank:  # a product with zero, which nobody else sees
            self._blank.discard(id(tensor))
            self._labels[id(tensor)] = new
            return
        if len(old) == len(new) and all(a is b or torch.equal(a, b) for a, b in zip(old, new, strict=True)):
            return
        for cluster in _clusters([old, new]):
            a, b = (self.constraints.sum_labels(part) for part in cluster)
            if a is None or b is None:
                self._stop([x for x in (a, b) if x is not None], "they are written over a constant")
            else:
                self.constraints.equate(a, b)

    def _told_apart_by(self, constant: Tensor, labels: Tensor) -> None:
        """Entries that a constant multiplies or shifts differently."""
        dims = [d for d in range(labels.ndim) if labels.shape[d] > 1]
        offset = labels.ndim - constant.ndim
        if not any(d >= offset and constant.shape[d - offset] > 1 for d in dims):
            return
        constant = constant.detach().double().nan_to_num().reshape((1,) * offset + constant.shape)
        rest = [d for d in range(labels.ndim) if d not in dims]
        if rest:
            weights = torch.rand(
                [constant.shape[d] if d in rest else 1 for d in range(labels.ndim)], generator=_seeded()
            )
            constant = (constant * weights.to(constant)).sum(rest, keepdim=True)
        _, colours = constant.reshape(-1).unique(return_inverse=True)
        self.constraints.distinguish(labels, colours.reshape(constant.shape).cpu())

    # -- rules: each gives the labels of the results

    def _keep(self, name, func, args, kwargs, out) -> list[Labels]:
        return [self.of(args[0])]

    def _places(self, name, func, args, kwargs, out) -> list[Labels]:
        """The data only changes place: let the labels do the same."""
        inputs = list(args[0]) if isinstance(args[0], (list, tuple)) else [args[0]]
        outputs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        found: list[Labels] = [[] for _ in outputs]
        clusters = [[[a]] for a in self.of(inputs[0])] if len(inputs) == 1 else _clusters([self.of(t) for t in inputs])
        for cluster in clusters:
            parts = [self.constraints.sum_labels(part) for part in cluster]
            full = [
                (torch.zeros(1, dtype=torch.int64) if a is None else a).expand(self._shapes[id(t)])
                for a, t in zip(parts, inputs, strict=True)
            ]
            first: Any = full if isinstance(args[0], (list, tuple)) else full[0]
            if name in ("view", "_unsafe_view", "_reshape_alias"):
                moved = first.reshape(out.shape)
            else:
                moved = func(first, *args[1:], **kwargs)
            for labels, result in zip(found, (t for t in tree_leaves(moved) if isinstance(t, Tensor)), strict=True):
                labels.append(_compact(result))
        return found

    def _elementwise(self, name, func, args, kwargs, out) -> list[Labels]:
        leaves, spec = tree_flatten((args, kwargs))
        at = [i for i, t in enumerate(leaves) if isinstance(t, Tensor)]
        ndim = out.ndim
        labels = {i: [a.reshape((1,) * (ndim - a.ndim) + a.shape) for a in self.of(leaves[i])] for i in at}
        bearers = [i for i in at if labels[i]]
        constants = [leaves[i] for i in at if not labels[i] and leaves[i].numel() > 1]
        nothing = [id(t) in self._blank or not bool(t.any()) for t in constants]  # initial states, often
        if name in ("add", "sub") and len(bearers) == 1 and constants and all(nothing):
            return [labels[bearers[0]]]
        if name == "mul" and any(nothing):
            self._blank.add(id(out))
            return [[]]
        if name == "rrelu_with_noise":  # which in evaluation mode does not read its noise
            constants = []
        product = name in ("mul", "div") and len(bearers) == 2 and not kwargs
        joint = self._nature(func, leaves, spec, bearers)
        found: Labels = []
        for cluster in _clusters([labels[i] for i in bearers]):
            parts = [self.constraints.sum_labels(part) for part in cluster]
            there = [a for a in parts if a is not None]
            shape = torch.broadcast_shapes(*(a.shape for a in there))
            for t in [*constants, *(leaves[i] for i, a in zip(bearers, parts, strict=True) if a is None)]:
                for a in there:
                    if any(leaves[i] is t for i in bearers):  # known only to vary
                        offset = ndim - t.ndim
                        if any(d >= offset and t.shape[d - offset] > 1 for d in range(ndim) if a.shape[d] > 1):
                            self.constraints.distinguish(a)
                    else:
                        self._told_apart_by(t, a)
            if product:
                a, b = parts
                b = negative(b) if b is not None and name == "div" else b
                if a is not None and b is not None:
                    out_labels = self.constraints.sum_of(a, b)
                    self.constraints.distinguish(out_labels, systems=MIX)
                    for x in there:
                        self.constraints.distinguish(x, systems=MIX)
                else:
                    out_labels = a if a is not None else b
                found.append(out_labels)
                continue
            for a in there[1:]:
                self.constraints.equate(there[0], a, PERM)
            if not joint.linear:
                for a in there:
                    self.constraints.distinguish(a, systems=MIX)
            real = [i for i in bearers if leaves[i].is_floating_point()] or bearers  # a mask is not multiplied
            there = [a for i, a in zip(bearers, parts, strict=True) if a is not None and i in real] or there
            natures = joint if len(there) == len(real) else Nature("still", "still", joint.linear)
            keeper = there[0].expand(shape)
            if len(real) > 1 and natures.scale != "same":  # perhaps one of them alone may move
                for i, a in zip(bearers, parts, strict=True):
                    alone = self._nature(func, leaves, spec, [i])
                    if a is not None and i in real and alone.scale == "same":
                        keeper, natures = a.expand(shape), alone
                        for x in there:
                            if x is not a:
                                self._stop([x], f"{name} does not commute with rescaling them", SCALE | SIGN)
                        there = [a]
                        break
            if len(real) > 1 and natures.scale == "free":
                natures = Nature("still", "still", natures.linear)
            if "free" in (natures.scale, natures.sign):
                keeper = self.constraints.fresh(*shape)
                self.constraints.equate(keeper, there[0], PERM)
            for system, how in ((SCALE, natures.scale), (SIGN, natures.sign)):
                word = "rescaling" if system == SCALE else "flipping"
                if how == "same":
                    for a in there:
                        self.constraints.equate(keeper, a, system)
                else:
                    for a in [keeper, *(there if how == "still" else [])]:
                        self.constraints.fix(a, f"{name} does not commute with {word} them", system)
            found.append(_compact(keeper))
        return [found]

    def _nature(self, func, leaves: list, spec, bearers: list[int]) -> Nature:
        """Ask an elementwise function, at all `SCALES`, what happens when its `bearers` are multiplied."""
        key = (func, tuple(str(x.dtype) if isinstance(x, Tensor) else repr(x) for x in leaves), tuple(bearers))
        if key in self._natures:
            return self._natures[key]
        draw = _seeded()

        def value(arguments: list) -> Tensor:
            args, kwargs = tree_unflatten([x.clone() if isinstance(x, Tensor) else x for x in arguments], spec)
            return func(*args, **kwargs).double()

        same = free = odd = even = linear = True
        for scale in SCALES:
            trial = []
            for i, x in enumerate(leaves):
                if not isinstance(x, Tensor):
                    trial.append(x)
                elif x.is_floating_point():
                    magnitude = scale if i in bearers else 1.0
                    trial.append(magnitude * torch.randn(64, generator=draw, dtype=torch.float64))
                else:
                    trial.append(torch.randint(0, 2, (64,), generator=draw).to(x.dtype))

            real = [i for i in bearers if leaves[i].is_floating_point()]

            def times(c: float) -> Tensor:
                return value([c * x if i in real else x for i, x in enumerate(trial)])  # noqa: B023

            one, big, flip, none = times(1.0), times(3.7), times(-1.0), times(0.0)
            size = one.abs().max()
            same &= _close(big, 3.7 * one, size)
            free &= _close(big, one, size)
            odd &= _close(flip, -one, size)
            even &= _close(flip, one, size)
            other = [torch.randn(64, generator=draw).double() * scale if i in real else x for i, x in enumerate(trial)]
            both = value([x + y if i in real else x for i, (x, y) in enumerate(zip(trial, other, strict=True))])
            linear &= bool(real) and _close(both, one + value(other), size) and _close(none, 0 * none, size)
        found = Nature(
            "same" if same else "free" if free else "still",
            "same" if odd else "free" if even else "still",
            linear and same,
        )
        self._natures[key] = found
        return found

    def _op_copy(self, name, func, args, kwargs, out) -> list[Labels]:
        source = self.of(args[1])
        return [[a.reshape((1,) * (out.ndim - a.ndim) + a.shape) for a in source]]

    def _contract(self, a: Labels, b: Labels, n: int, k: int, m: int) -> Labels:
        """Labels of the batched product of [g, n, k] and [g, k, m]."""
        sizes = n, m
        out: Labels = []
        summed: list[Labels] = [[], []]
        for side, labels in enumerate((a, b)):
            inner, outer = (2, 1) if side == 0 else (1, 2)
            lone = [x for x in labels if x.numel() == 1] if k == 1 else []
            for x in labels:
                if x.shape[inner] > 1 or any(x is y for y in (lone if sizes[side] > 1 else lone[-1:])):
                    summed[side].append(self.constraints.tie_along(x, [outer]).movedim(inner, 1))
                else:
                    out.append(x)
        left, right = (self.constraints.sum_labels(part) for part in summed)
        self._contracted(left, right)
        for x in [*(y for y in (left, right) if y is not None), *out]:
            if x.shape[0] > 1:
                self.constraints.distinguish(x, torch.arange(x.shape[0]).reshape(-1, 1, 1))
        return out

    def _contracted(self, a: Tensor | None, b: Tensor | None) -> None:
        """Two axes that are summed over together move inversely to each other."""
        if a is not None and b is not None:
            self.constraints.equate(a, negative(b))
        else:
            self._stop([x for x in (a, b) if x is not None], "what they are multiplied with is fixed")

    def _op_bmm(self, name, func, args, kwargs, out) -> list[Labels]:
        if self._zero(args):
            return [[]]
        _, n, k = args[0].shape
        return [self._contract(self.of(args[0]), self.of(args[1]), n, k, args[1].shape[2])]

    def _op_mm(self, name, func, args, kwargs, out) -> list[Labels]:
        if self._zero(args):
            return [[]]
        a, b = ([x[None] for x in self.of(t)] for t in args[:2])
        n, k = args[0].shape
        return [[x[0] for x in self._contract(a, b, n, k, args[1].shape[1])]]

    def _op_mv(self, name, func, args, kwargs, out) -> list[Labels]:
        a, b = [x[None] for x in self.of(args[0])], [x[None, :, None] for x in self.of(args[1])]
        n, k = args[0].shape
        return [[x[0, :, 0] for x in self._contract(a, b, n, k, 1)]]

    def _op_dot(self, name, func, args, kwargs, out) -> list[Labels]:
        a, b = [x[None, None] for x in self.of(args[0])], [x[None, :, None] for x in self.of(args[1])]
        self._contract(a, b, 1, args[0].shape[0], 1)
        return [[]]

    def _op_addmm(self, name, func, args, kwargs, out) -> list[Labels]:
        product = self._op_mm(name, func, args[1:], kwargs, out)[0]
        return [self._shifted(product, args[0], _last(out), zero=self._zero(args[1:]))]

    def _op_baddbmm(self, name, func, args, kwargs, out) -> list[Labels]:
        product = self._op_bmm(name, func, args[1:], kwargs, out)[0]
        return [self._shifted(product, args[0], _last(out), zero=self._zero(args[1:]))]

    def _shifted(
        self, labels: Labels, bias: Tensor | None, fit: Callable[[Tensor], Tensor], zero: bool = False
    ) -> Labels:
        """Labels of a sum with a bias, which `fit` makes broadcast; `zero` says that there is nothing else."""
        if bias is None:
            return labels
        found: Labels = []
        for cluster in _clusters([labels, [fit(a) for a in self.of(bias)]]):
            a, b = (self.constraints.sum_labels(part) for part in cluster)
            if a is not None and b is not None:
                self.constraints.equate(a, b)
            elif a is not None and bool(bias.any()):
                self._stop([a], "a constant is added to them", SCALE | SIGN)
                self._told_apart_by(fit(bias), a)
                self.constraints.distinguish(a, systems=MIX)
            elif b is not None and not zero:
                self._stop([b], "they are added to what is fixed")
            found += [x for x in (a, b) if x is not None and (x is a or zero)]
        return found

    def _zero(self, factors: tuple) -> bool:
        """Whether one of two factors is a constant that is zero, as an initial state may be."""
        return any(not self.of(t) and not bool(t.any()) for t in factors[:2])

    def _op_embedding(self, name, func, args, kwargs, out) -> list[Labels]:
        found: Labels = []
        for a in self.of(args[0]):
            if a.shape[0] > 1:
                self._stop([a], "inputs pick them")
            else:
                found.append(a.reshape((1,) * (out.ndim - 1) + a.shape[1:]))
        return [found]

    def _op_convolution(self, name, func, args, kwargs, out) -> list[Labels]:
        x, weight, bias, transposed, groups = args[0], args[1], args[2], args[6], args[8]
        spatial = list(range(2, x.ndim))
        channels = x.shape[1]
        coming: Labels = []
        rest: Labels = []
        for a in self.of(x):
            (coming if a.shape[1] > 1 or (channels == 1 and a.numel() == 1) else rest).append(
                self.constraints.tie_along(a, spatial)
            )
        self._stop([a for a in rest if a.numel() > 1], "convolution", SCALE | SIGN | PERM)
        arriving = self.constraints.sum_labels([self.constraints.tie_along(a, [0]).reshape(-1) for a in coming])
        inner, outer = (0, 1) if transposed else (1, 0)
        sides: dict[int, Labels] = {0: [], 1: []}
        for a in self.of(weight):
            vary = [d for d in range(a.ndim) if a.shape[d] > 1]
            if len(vary) > 1 or vary > [1]:
                self._stop([a], "a convolution sums over them")
            else:
                side = vary[0] if vary else inner if weight.shape[inner] == 1 and not sides[inner] else outer
                sides[side].append(a.reshape(-1))
        within, leaving = self.constraints.sum_labels(sides[inner]), self.constraints.sum_labels(sides[outer])
        if groups > 1:  # dimension 1 of the weight has a label for each group
            slot = self._grouped(weight, groups)
            shared = leaving if transposed else within
            if shared is not None:
                self._stop([shared], "groups share them")
            within, leaving = (within, slot) if transposed else (slot, leaving)
            depthwise = channels == groups == out.shape[1]
            for axis in (arriving, within, leaving):
                if axis is not None and not depthwise:
                    self.constraints.distinguish(axis, torch.arange(axis.numel()) // (axis.numel() // groups))
                elif axis is not None:
                    self.constraints.distinguish(axis, systems=MIX)
            if depthwise and arriving is not None and leaving is not None:
                self.constraints.equate(arriving, leaving, PERM)
            elif not depthwise and slot is not None:
                self._stop([slot], "groups", PERM)
        self._contracted(arriving, within)
        return [self._shifted([] if leaving is None else [_second(out)(leaving)], bias, _second(out))]

    def _grouped(self, weight: Tensor, groups: int) -> Tensor | None:
        """Labels [groups, shape[1]] of a parameter whose dimension 1 means something else in each group of rows."""
        name = self._names.get(id(weight))
        if name is None:
            return None
        if (name, 1, groups) not in self.parameter_axes:
            self.parameter_axes[name, 1, groups] = self.constraints.fresh(groups * weight.shape[1])
        return self.parameter_axes[name, 1, groups]

    def _normal(
        self, labels: Labels, gain: Tensor | None, shift: Tensor | None, fit: Callable[[Tensor], Tensor]
    ) -> Labels:
        """Labels after a norm with a gain and a shift, which `fit` makes broadcast."""
        starts = self.constraints.sum_labels([fit(a) for a in self.of(gain)])
        found: Labels = []
        for a in labels:
            self._stop([a], "they are normalised", SCALE | SIGN)
            self.constraints.distinguish(a, systems=MIX)
            if gain is None or starts is None or not _meet(a, starts):
                found.append(a)
            else:
                self.constraints.equate(a, starts, PERM)
        if starts is not None:
            self.constraints.distinguish(starts, systems=MIX)
            if not any(_meet(a, starts) for a in labels):
                self._stop([starts], "they meet different data", PERM)
            found.append(starts)
        elif gain is not None:
            for a in found:
                self._told_apart_by(fit(gain), a)
        return self._shifted(found, shift, fit)

    def _op_native_batch_norm(self, name, func, args, kwargs, out) -> list[Labels]:
        x, gain, shift, mean, var = args[:5]
        training = args[5] if isinstance(args[5], bool) else False
        fit = _second(x)
        labels = [self.constraints.tie_along(a, list(range(2, x.ndim))) for a in self.of(x)]
        for a in labels if not training else ():
            for constant in (mean, var):
                self._told_apart_by(fit(constant), a)
        return [self._normal(labels, gain, shift, fit)]

    _op__native_batch_norm_legit = _op__native_batch_norm_legit_no_training = _op_native_batch_norm
    _op_cudnn_batch_norm = _op_native_batch_norm

    def _op_native_layer_norm(self, name, func, args, kwargs, out) -> list[Labels]:
        x, _, gain, shift = args[:4]
        return [self._normal(self.of(x), gain, shift, _last(x))]

    def _op__fused_rms_norm(self, name, func, args, kwargs, out) -> list[Labels]:
        return [self._normal(self.of(args[0]), args[2], None, _last(args[0]))]

    def _op_native_group_norm(self, name, func, args, kwargs, out) -> list[Labels]:
        x, gain, shift, groups = args[0], args[1], args[2], args[6]
        fit = _second(x)
        labels = [self.constraints.tie_along(a, list(range(2, x.ndim))) for a in self.of(x)]
        for a in labels:
            self.constraints.distinguish(a, fit(torch.arange(x.shape[1]) // (x.shape[1] // groups)), PERM)
        return [self._normal(labels, gain, shift, fit)]

    def _space(self, name, func, args, kwargs, out) -> list[Labels]:
        """Pooling, resizing and padding: the same for all channels."""
        n = int(SPACE.fullmatch(name)[1])  # type: ignore[index]
        x = args[0]
        found = [self.constraints.tie_along(a, list(range(x.ndim - n, x.ndim))) for a in self.of(x)]
        if "max" in name:
            for a in found:
                self.constraints.fix(a, "the maximum does not commute with flipping them", SIGN)
                self.constraints.distinguish(a, systems=MIX)
        return [found]

    def _op_constant_pad_nd(self, name, func, args, kwargs, out) -> list[Labels]:
        x, pad, value = args[0], args[1], args[2] if len(args) > 2 else 0
        found: Labels = []
        for a in self.of(x):
            if value:
                self._stop([a], "a constant stands beside them")
                continue
            sizes = [p if a.shape[a.ndim - 1 - i // 2] > 1 else 0 for i, p in enumerate(pad)]
            found.append(torch.nn.functional.pad(a, sizes))
        return [found]

    def _softmax(self, name, func, args, kwargs, out) -> list[Labels]:
        labels = self.of(args[0])
        self._stop(labels, "softmax does not commute with rescaling them", SCALE | SIGN)
        for a in labels:
            self.constraints.distinguish(a, systems=MIX)
        return [labels]

    def _reduce(self, name, func, args, kwargs, out) -> list[Labels]:
        """Sums and the like over some dimensions."""
        x = args[0]
        spec = {s.name: v for s, v in zip(func._schema.arguments, args, strict=False)} | kwargs
        dims = spec.get("dim")
        if isinstance(dims, Tensor) or isinstance(spec.get("other"), Tensor):  # max of two tensors
            return self._elementwise(name, func, args, kwargs, out)
        dims = list(range(x.ndim)) if dims is None or dims == [] else [dims] if isinstance(dims, int) else list(dims)
        dims = [d % x.ndim for d in dims] if x.ndim else []
        kept = [d for d in range(x.ndim) if d not in dims]
        found: Labels = []
        for a in self.of(x):
            if any(a.shape[d] > 1 for d in dims):
                self._stop([a], f"{name} goes over them", SCALE | SIGN)
                self.constraints.distinguish(a, systems=MIX)
                if any(a.shape[d] > 1 for d in kept):
                    places = torch.arange(torch.Size([a.shape[d] for d in kept]).numel())
                    self.constraints.distinguish(
                        a, places.reshape([a.shape[d] if d in kept else 1 for d in range(x.ndim)]), PERM
                    )
                continue
            if name not in ("sum", "mean"):
                self.constraints.fix(a, f"{name} does not commute with flipping them", SIGN)
                self.constraints.distinguish(a, systems=MIX)
                if name not in ("amax", "amin", "max", "min", "std", "linalg_vector_norm", "norm"):
                    self.constraints.fix(a, f"{name} does not commute with rescaling them", SCALE)
            result = tree_leaves(out)[0]
            found.append(a if result.ndim == x.ndim else a.squeeze(dims))
        return [found, found]


def _clusters(sides: list[Labels]) -> list[list[Labels]]:
    """Labels of several tensors, sorted into those that vary along common dimensions: [cluster][tensor]."""
    clusters: list[tuple[set[int], list[Labels]]] = []
    for i, labels in enumerate(sides):
        for a in labels:
            dims = {d - a.ndim for d in range(a.ndim) if a.shape[d] > 1}
            touching = [c for c in clusters if c[0] & dims or not (c[0] or dims)]
            joined: list[Labels] = [[] for _ in sides]
            for c in touching:
                dims = dims | c[0]
                joined = [x + y for x, y in zip(joined, c[1], strict=True)]
                clusters.remove(c)
            joined[i].append(a)
            clusters.append((dims, joined))
    return [c[1] for c in clusters]


def _meet(a: Tensor, b: Tensor) -> bool:
    """Whether labels vary along a common dimension, or not at all."""
    varying = [[d - x.ndim for d in range(x.ndim) if x.shape[d] > 1] for x in (a, b)]
    return bool({*varying[0]} & {*varying[1]}) or not (varying[0] or varying[1])


def _last(out: Tensor) -> Callable[[Tensor], Tensor]:
    """Stand along the last dimensions of `out`."""
    return lambda t: t.reshape((1,) * (out.ndim - t.ndim) + t.shape)


def _second(out: Tensor) -> Callable[[Tensor], Tensor]:
    """Stand along dimension 1 of `out`."""
    return lambda t: t.reshape([-1 if d == 1 else 1 for d in range(out.ndim)])


def _compact(labels: Tensor) -> Tensor:
    """`labels` with length 1 along each dimension on which they do not depend."""
    for d in range(labels.ndim):
        if labels.shape[d] > 1:
            first = labels.narrow(d, 0, 1)
            if labels.stride(d) == 0 or bool((labels == first).all()):
                labels = first
    return labels


def _close(a: Tensor, b: Tensor, size: Tensor) -> bool:
    return bool(((a - b).abs() <= 1e-9 * size).all()) if bool(size.isfinite()) else False


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)
