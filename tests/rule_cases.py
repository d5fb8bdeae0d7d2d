"""One operator at a time, on small random tensors: what the rules of discovery are tried on."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Case = tuple[Callable[..., Any], dict[str, Tensor]]  # a function of the tensors, those that carry labels


class Draw(random.Random):
    """Random sizes, dimensions, strides and tensors."""

    def size(self, low: int = 1, high: int = 3) -> int:
        return self.randint(low, high)

    def sizes(self, n: int) -> list[int]:
        return [self.size() for _ in range(n)]

    def normal(self, *shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.randrange(10**9))
        order = self.sample(range(len(shape)), len(shape))  # strides in any order
        base = torch.randn([shape[d] for d in order], generator=generator, dtype=torch.float64)
        return base.permute([order.index(d) for d in range(len(shape))])

    def index(self, size: int, *shape: int) -> Tensor:
        return torch.randint(0, size, shape, generator=torch.Generator().manual_seed(self.randrange(10**9)))

    def several(self, **tensors: Tensor) -> dict[str, Tensor]:
        """At least one of them; the others are constants."""
        names = self.sample(sorted(tensors), self.randint(1, len(tensors)))
        self.constants = {name: t for name, t in tensors.items() if name not in names}
        return {name: t for name, t in tensors.items() if name in names}


class Applied:
    """A function of tensors that carry labels, with `constants` beside them, which can be drawn anew."""

    def __init__(
        self, function: Callable[..., Any], constants: dict[str, Callable[[Draw], Tensor]], draw: Draw
    ) -> None:
        self.function, self.make, self.draw = function, constants, draw
        self.redraw()

    def redraw(self) -> None:
        self.constants = {name: make(self.draw) for name, make in self.make.items()}

    def __call__(self, **tensors: Tensor) -> Any:
        return self.function(**tensors, **self.constants)


def like(tensor: Tensor) -> Callable[[Draw], Tensor]:
    return lambda draw: draw.normal(*tensor.shape)


def of(
    function: Callable[..., Any], draw: Draw, also: dict[str, Callable[[Draw], Tensor]] | None = None, **tensors: Tensor
) -> Case:
    """The function of some of the tensors, the others as constants; `also` are constants, too."""
    moving = draw.several(**tensors)
    constants = {name: like(t) for name, t in draw.constants.items()} | (also or {})
    return Applied(function, constants, draw), moving


def broadcast_pair(draw: Draw) -> dict[str, Tensor]:
    """Two tensors that broadcast."""
    shape = draw.sizes(draw.size(1, 3))
    other = [n if draw.random() < 0.7 else 1 for n in shape][draw.randint(0, len(shape) - 1) :]
    return {"a": draw.normal(*shape), "b": draw.normal(*other)}


def unary(function: Callable[[Tensor], Any], low: int = 1) -> Callable[[Draw], Case]:
    return lambda draw: ((lambda a: function(a)), {"a": draw.normal(*draw.sizes(draw.size(low, 3)))})


def along(function: Callable[[Tensor, int], Any], low: int = 1) -> Callable[[Draw], Case]:
    """A function of a tensor and a dimension, of length at least `low`."""

    def make(draw: Draw) -> Case:
        a = draw.normal(*(draw.size(low, 3) for _ in range(draw.size(1, 3 if low < 3 else 2))))
        dim = draw.randrange(a.ndim) - (a.ndim if draw.random() < 0.5 else 0)
        return (lambda a: function(a, dim)), {"a": a}

    return make


def binary(function: Callable[[Tensor, Tensor], Any]) -> Callable[[Draw], Case]:
    return lambda draw: of(lambda a, b: function(a, b), draw, **broadcast_pair(draw))


def product(equation: str, function: Callable[..., Any], biased: bool = False) -> Callable[[Draw], Case]:
    """A contraction of tensors with the indices of an einsum string, perhaps with a bias in front."""

    def make(draw: Draw) -> Case:
        inputs, output = equation.split("->")
        size = {k: draw.size() for k in "gnkm"}
        shapes = [[size[k] for k in indices] for indices in inputs.split(",")]
        tensors = {name: draw.normal(*shape) for name, shape in zip("ab", shapes, strict=True)}
        if biased:
            kept = [size[k] for k in output]
            tensors["c"] = draw.normal(*kept[draw.randint(0, len(kept) - 1) :])
            return of(lambda a, b, c: function(c, a, b), draw, **tensors)
        return of(lambda a, b: function(a, b), draw, **tensors)

    return make


def convolution(n: int, transposed: bool, groups: bool = False) -> Callable[[Draw], Case]:
    def make(draw: Draw) -> Case:
        g = draw.size(2, 2) if groups else 1
        inside, outside = g * draw.size(1, 2), g * draw.size(1, 2)
        x = draw.normal(inside)
        channels = (inside, outside // g) if transposed else (outside, inside // g)
        weight, bias = draw.normal(*channels, *[2] * n), draw.normal(outside)
        name = f"conv_transpose{n}d" if transposed else f"conv{n}d"
        padding = draw.randint(0, 1)

        def function(x: Tensor, weight: Tensor, bias: Tensor, pixels: Tensor) -> Tensor:
            return getattr(F, name)(x.reshape(-1, *[1] * n) * pixels, weight, bias, padding=padding, groups=g)

        pixels = {"pixels": lambda draw: draw.normal(2, inside, *[4] * n)}
        return of(function, draw, pixels, x=x, weight=weight, bias=bias)

    return make


def unflattened(draw: Draw) -> Case:
    """A convolution of an axis that was cut into channels and pixels."""
    a, weight = draw.normal(draw.size(1, 2), 2 * 3 * 3), draw.normal(draw.size(1, 2), 2, 2, 2)
    return of(lambda a, w: F.conv2d(a.view(len(a), 2, 3, 3), w), draw, a=a, w=weight)


def depthwise(draw: Draw, fixed: bool = False) -> Case:
    """A convolution of each channel, whose weight is a view of a parameter, or a constant."""
    n = draw.size(2)
    x, weight = draw.normal(n), draw.normal(n, 2)

    def function(x: Tensor, pixels: Tensor, weight: Tensor = weight) -> Tensor:
        return F.conv1d(x[:, None] * pixels, weight[:, None], groups=n)

    weights = {} if fixed else {"weight": weight}
    return of(function, draw, {"pixels": lambda draw: draw.normal(2, n, 4)}, x=x, **weights)


def normed(function: Callable[..., Any], channels: int, least: int = 1) -> Callable[[Draw], Case]:
    """A norm with a gain and a shift along dimension `channels`."""

    def make(draw: Draw) -> Case:
        shape = [2, *(2 * draw.size(1, 2) for _ in range(least)), 3]
        n = shape[channels]
        return of(function, draw, x=draw.normal(*shape), gain=draw.normal(n), shift=draw.normal(n))

    return make


def written(how: str) -> Callable[[Draw], Case]:
    """Values that go where an index, which is anything, says."""

    def make(draw: Draw) -> Case:
        shape = [draw.size(2, 3) for _ in range(draw.size(1, 3))]
        dim, rows, zero = draw.randrange(len(shape)), draw.size(2, 3), draw.random() < 0.5
        rows = min(rows, shape[dim] - (how == "index_copy"))
        source = draw.normal(*[rows if d == dim else n for d, n in enumerate(shape)])

        def function(a: Tensor, b: Tensor, index: Tensor) -> Tensor:
            base = torch.zeros(shape, dtype=torch.float64) if zero else a
            spread = index.reshape([-1 if d == dim else 1 for d in range(len(shape))]).expand(b.shape)
            match how:
                case "index_add" | "index_copy":
                    return getattr(base, how)(dim, index, b)
                case "scatter_add":
                    return base.scatter_add(dim, spread, b)
                case "in place":
                    return base.clone().scatter_add_(dim, spread, b)
                case "index_put":
                    return base.movedim(dim, 0).index_put((index,), b.movedim(dim, 0), accumulate=True)
                case "mask":
                    mask = torch.zeros(shape[dim], dtype=torch.bool).index_fill(0, index, True)
                    out = base.movedim(dim, 0).clone()
                    out[mask] = b.movedim(dim, 0)[:1].expand(int(mask.sum()), *out.shape[1:])
                    return out
                case _:
                    return base.scatter_reduce(dim, spread, b, how)

        def index(draw: Draw) -> Tensor:
            order = torch.randperm(shape[dim], generator=torch.Generator().manual_seed(draw.randrange(10**9)))
            return order[:rows] if how == "index_copy" else draw.index(shape[dim], rows)

        return of(function, draw, {"index": index}, a=draw.normal(*shape), b=source)

    return make


def erased(draw: Draw) -> Case:
    """Zeros that go where an index, which is anything, says."""
    shape = [draw.size(2, 3) for _ in range(draw.size(1, 3))]
    dim = draw.randrange(len(shape))

    def function(a: Tensor, index: Tensor) -> Tensor:
        spread = index.reshape([-1 if d == dim else 1 for d in range(len(shape))])
        return a.scatter(dim, spread.expand([2 if d == dim else n for d, n in enumerate(shape)]), 0.0)

    return of(function, draw, {"index": lambda draw: draw.index(shape[dim], 2)}, a=draw.normal(*shape))


def filled(draw: Draw) -> Case:
    """A tensor that is made empty or zero and filled slice by slice."""
    a = draw.normal(*[draw.size(2, 3) for _ in range(draw.size(2, 3))])
    make = draw.choice([torch.empty_like, torch.zeros_like])
    dim = draw.randrange(a.ndim)

    def function(a: Tensor) -> Tensor:
        out = make(a)
        for i in range(a.shape[dim]):
            out.select(dim, i).copy_(a.select(dim, a.shape[dim] - 1 - i))
        return out

    return function, {"a": a}


def cut(draw: Draw) -> Case:
    a = draw.normal(draw.size(2, 3), draw.size(2, 3))
    return (lambda a: torch.cat([a[1:], torch.zeros(1, a.shape[1], dtype=torch.float64)], 0)), {"a": a}


def bag(draw: Draw) -> Case:
    weight, mode = draw.normal(draw.size(2, 3), draw.size(2, 3)), draw.choice(["sum", "mean", "max"])
    ids = {"ids": lambda draw: draw.index(len(weight), 2, 3)}
    return Applied(lambda weight, ids: F.embedding_bag(ids, weight, mode=mode), ids, draw), {"weight": weight}


def looked_up(draw: Draw) -> Case:
    weight = draw.normal(draw.size(2, 3), draw.size(2, 3))
    ids = {"ids": lambda draw: draw.index(len(weight), 2, 3)}
    return Applied(lambda weight, ids: F.embedding(ids, weight), ids, draw), {"weight": weight}


def segments(draw: Draw) -> Case:
    kind, a = draw.choice(["sum", "mean", "max", "min"]), draw.normal(4, draw.size(1, 3))
    cuts = {"first": lambda draw: torch.tensor(draw.randint(1, 3))}

    def function(a: Tensor, first: Tensor) -> Tensor:
        return torch.segment_reduce(a, kind, lengths=torch.stack([first, 4 - first]))

    return Applied(function, cuts, draw), {"a": a}


def sparse(draw: Draw) -> Case:
    m, a = draw.normal(draw.size(), draw.size(2, 3)), None
    a = draw.normal(m.shape[1], draw.size())
    return (lambda a: torch.sparse.mm(m.to_sparse(), a)), {"a": a}


def bilinear(draw: Draw) -> Case:
    i, j, o = draw.sizes(3)
    tensors = {"a": draw.normal(2, i), "b": draw.normal(2, j), "w": draw.normal(o, i, j), "c": draw.normal(o)}
    return of(lambda a, b, w, c: F.bilinear(a, b, w, c), draw, **tensors)


def attention(draw: Draw) -> Case:
    n, d, e = draw.size(2, 3), draw.size(1, 2), draw.size(1, 2)
    tensors = {"q": draw.normal(1, n, d), "k": draw.normal(1, n, d), "v": draw.normal(1, n, e)}
    return of(lambda q, k, v: torch.bmm(torch.bmm(q, k.mT).softmax(-1), v), draw, **tensors)


def three(function: Callable[[Tensor, Tensor, Tensor], Any]) -> Callable[[Draw], Case]:
    def make(draw: Draw) -> Case:
        shape = draw.sizes(draw.size(1, 2))
        return of(lambda a, b, c: function(a, b, c), draw, **{k: draw.normal(*shape) for k in "abc"})

    return make


def pooled(function: Callable[[Tensor], Any]) -> Callable[[Draw], Case]:
    def make(draw: Draw) -> Case:
        n = draw.size(1, 3)
        pixels = {"pixels": lambda draw: draw.normal(1, n, 4, 4)}
        return Applied(lambda a, pixels: function(a[:, None, None] * pixels), pixels, draw), {"a": draw.normal(n)}

    return make


def turned(draw: Draw) -> Case:
    """Pairs of entries as complex numbers, times complex ones: rotary positions."""
    pairs = [*draw.sizes(draw.size(1, 2)), 2]
    tensors = {"a": draw.normal(*pairs), "b": draw.normal(*pairs)}
    return of(lambda a, b: torch.view_as_real(as_complex(a) * as_complex(b) * (1 + 2j)), draw, **tensors)


def as_complex(pairs: Tensor) -> Tensor:
    return torch.view_as_complex(pairs.contiguous())


MASK = torch.tensor([True, False, True])
CASES: dict[str, Callable[[Draw], Case]] = {
    "relu": unary(torch.relu),
    "leaky relu": unary(F.leaky_relu),
    "abs": unary(torch.abs),
    "tanh": unary(torch.tanh),
    "exp": unary(torch.exp),
    "square": unary(torch.square),
    "reciprocal": unary(torch.reciprocal),
    "sign": unary(torch.sign),
    "times a number": unary(lambda a: 3 * a),
    "plus a number": unary(lambda a: a + 1),
    "clamp": unary(lambda a: a.clamp(min=0)),
    "in place": unary(lambda a: a.clone().relu_()),
    "rounded": unary(lambda a: a.to(torch.int64).double()),
    "add": binary(torch.add),
    "subtract": binary(torch.sub),
    "multiply": binary(torch.mul),
    "divide": binary(torch.div),
    "maximum": binary(torch.maximum),
    "max of two": binary(torch.max),
    "logaddexp": binary(torch.logaddexp),
    "where": binary(lambda a, b: torch.where(a > 0, a, b)),
    "where not": binary(lambda a, b: torch.where(b > 0, a, 0.0)),
    "prelu": binary(lambda a, b: torch.where(a > 0, a, b * a)),
    "hypot": binary(torch.hypot),
    "plus zeros": unary(lambda a: a + torch.zeros_like(a)),
    "times zeros": unary(lambda a: a * torch.zeros_like(a)),
    "addcmul": three(torch.addcmul),
    "addcdiv": three(torch.addcdiv),
    "lerp": three(torch.lerp),
    "mm": product("nk,km->nm", torch.mm),
    "transposed mm": product("nk,mk->nm", lambda a, b: torch.mm(a, b.t())),
    "bmm": product("gnk,gkm->gnm", torch.bmm),
    "mv": product("nk,k->n", torch.mv),
    "dot": product("k,k->", torch.dot),
    "outer": product("n,m->nm", torch.outer),
    "einsum": product("gnk,km->gnm", lambda a, b: torch.einsum("gnk,km->gnm", a, b)),
    "einsum over two": product("gnk,gkm->nm", lambda a, b: torch.einsum("gnk,gkm->nm", a, b)),
    "addmm": product("nk,km->nm", torch.addmm, biased=True),
    "linear": product("nk,mk->nm", lambda c, a, b: F.linear(a, b) + c, biased=True),
    "baddbmm": product("gnk,gkm->gnm", torch.baddbmm, biased=True),
    "addbmm": product("gnk,gkm->nm", torch.addbmm, biased=True),
    "addmv": product("nk,k->n", torch.addmv, biased=True),
    "addr": product("n,m->nm", torch.addr, biased=True),
    "zeros times a matrix": product("nk,km->nm", lambda a, b: torch.zeros_like(a) @ b + b[:1]),
    "sparse mm": sparse,
    "bilinear": bilinear,
    "attention": attention,
    "conv1d": convolution(1, False),
    "conv2d": convolution(2, False),
    "conv_transpose1d": convolution(1, True),
    "grouped conv1d": convolution(1, False, groups=True),
    "grouped conv_transpose1d": convolution(1, True, groups=True),
    "depthwise conv1d of a view": depthwise,
    "depthwise conv1d with a constant": lambda draw: depthwise(draw, fixed=True),
    "view": unary(lambda a: a.reshape(-1)),
    "unflatten": unary(lambda a: a.reshape(-1, 1, *a.shape[1:])),
    "transpose": unary(lambda a: a.transpose(0, -1)),
    "expand": unary(lambda a: a.unsqueeze(0).expand(2, *a.shape)),
    "flip": along(lambda a, d: a.flip(d)),
    "roll": along(lambda a, d: a.roll(1, d)),
    "narrow": along(lambda a, d: a.narrow(d, a.shape[d] // 2, 1)),
    "select": along(lambda a, d: a.select(d, 0)),
    "cut to nothing": along(lambda a, d: a.narrow(d, 0, 0)),
    "cat": along(lambda a, d: torch.cat([a, a.flip(d)], d)),
    "cat with ones": along(lambda a, d: torch.cat([a, torch.ones_like(a)], d)),
    "cat with zeros": along(lambda a, d: torch.cat([torch.zeros_like(a), a], d)),
    "shifted by a row": cut,
    "stack": binary(lambda a, b: torch.stack(torch.broadcast_tensors(a, b))),
    "split": along(lambda a, d: a.split(1, d)),
    "repeat": unary(lambda a: a.repeat(2, *[1] * (a.ndim - 1)) if a.ndim > 1 else a.repeat(2)),
    "repeat_interleave": along(lambda a, d: a.repeat_interleave(2, d)),
    "index_select": along(lambda a, d: a.index_select(d, torch.tensor([0, 0]))),
    "gather": along(lambda a, d: a.gather(d, torch.zeros_like(a, dtype=torch.int64))),
    "index": unary(lambda a: a[torch.tensor([0, 0])]),
    "masked": unary(lambda a: a[torch.arange(a.numel()).view(a.shape) % 2 == 0]),
    "as_strided": unary(lambda a: a.contiguous().as_strided((a.numel(),), (1,))),
    "unfold": along(lambda a, d: a.unfold(d, 1, 1)),
    "diagonal": unary(torch.diagonal, low=2),
    "tril": unary(torch.tril, low=2),
    "slice_scatter": along(lambda a, d: torch.zeros_like(a).slice_scatter(a.narrow(d, 0, 1), d, 0, 1)),
    "pad": unary(lambda a: F.pad(a, (1, 2))),
    "pad with ones": unary(lambda a: F.pad(a, (1, 2), value=1.0)),
    "filled": filled,
    "sum": along(torch.sum),
    "sum of all": unary(torch.sum),
    "mean": along(torch.mean),
    "max": along(lambda a, d: a.max(d).values, low=2),
    "min of all": unary(torch.min),
    "amax": along(torch.amax, low=2),
    "argmax": along(lambda a, d: a.argmax(d).double(), low=2),
    "norm": along(lambda a, d: torch.linalg.vector_norm(a, dim=d), low=2),
    "norm of all": unary(torch.norm),
    "std": along(lambda a, d: a.std(d, correction=0), low=3),
    "var": along(lambda a, d: a.var(d, correction=0), low=3),
    "prod": along(torch.prod, low=2),
    "logsumexp": along(torch.logsumexp, low=2),
    "any": along(lambda a, d: (a > 0).any(d), low=2),
    "median": along(lambda a, d: a.median(d).values, low=2),
    "cumsum": along(torch.cumsum),
    "cumprod": along(torch.cumprod, low=2),
    "cummax": along(lambda a, d: a.cummax(d).values, low=2),
    "sort": along(lambda a, d: a.sort(d).values, low=2),
    "topk": along(lambda a, d: a.topk(1, d).values, low=2),
    "softmax": along(torch.softmax, low=3),
    "log_softmax": along(torch.log_softmax, low=3),
    "layer norm": normed(lambda x, gain, shift: F.layer_norm(x, x.shape[-1:], gain, shift, 0.5), -1),
    "rms norm": normed(lambda x, gain, shift: F.rms_norm(x, x.shape[-1:], gain, 0.5) + shift, -1),
    "batch norm": normed(
        lambda x, gain, shift: F.batch_norm(
            x, torch.arange(1, x.shape[1] + 1).double(), torch.ones(x.shape[1]).double(), gain, shift
        ),
        1,
    ),
    "batch norm, training": normed(lambda x, gain, shift: F.batch_norm(x, None, None, gain, shift, True, eps=0.5), 1),
    "group norm": normed(lambda x, gain, shift: F.group_norm(x, 2, gain, shift, 0.5), 1),
    "conv2d of an axis": unflattened,
    "max_pool2d": pooled(lambda a: F.max_pool2d(a, 2)),
    "avg_pool2d": pooled(lambda a: F.avg_pool2d(a, 2)),
    "adaptive pool": pooled(lambda a: F.adaptive_avg_pool2d(a, 1)),
    "adaptive max pool": pooled(lambda a: F.adaptive_max_pool2d(a, 2)),
    "nearest": pooled(lambda a: F.interpolate(a, scale_factor=2)),
    "bilinear up": pooled(lambda a: F.interpolate(a, scale_factor=2, mode="bilinear")),
    "reflection": pooled(lambda a: F.pad(a, (1, 1, 1, 1), mode="reflect")),
    "rotary": turned,
    "complex": binary(lambda a, b: torch.view_as_real(torch.complex(*torch.broadcast_tensors(a, b)) * (1 + 2j))),
    "absolute value": binary(lambda a, b: torch.complex(*torch.broadcast_tensors(a, b)).abs()),
    "conjugate": unary(lambda a: torch.view_as_real((torch.complex(a, 2 * a) * (1 + 2j)).conj().resolve_conj())),
    "fft": along(lambda a, d: torch.view_as_real(torch.fft.fft(a, dim=d)), low=2),
    "rfft": along(lambda a, d: torch.view_as_real(torch.fft.rfft(a, dim=d) * (1 + 2j)), low=2),
    "spectral filter": along(lambda a, d: torch.fft.irfft(torch.fft.rfft(a, dim=d).cumsum(d), a.shape[d], d), low=3),
    "embedding": looked_up,
    "embedding_bag": bag,
    "segment_reduce": segments,
    **{how: written(how) for how in ("index_add", "index_copy", "scatter_add", "in place", "index_put", "mask")},
    "scatter of zeros": erased,
    **{f"scatter_reduce {how}": written(how) for how in ("sum", "mean", "amax", "prod")},
}

if hasattr(torch.ops.aten, "_fused_rms_norm"):  # torch >= 2.8

    def fused_rms_norm(x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
        return torch.ops.aten._fused_rms_norm(x, [x.shape[-1]], gain, 0.5)[0] + shift

    CASES["fused rms norm"] = normed(fused_rms_norm, -1)
