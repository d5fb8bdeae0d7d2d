"""Small models of many families whose continuous symmetries are counted, and what of them is known not to be found.

A model with batch norm has to keep its outputs with fixed statistics and with those of the batch: what training breaks
is no symmetry. So its fibre is that of both outputs together, and is counted so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

D, WORDS, LENGTH = 4, 9, 5  # width of a stream, size of a vocabulary, number of positions


class Lambda(nn.Module):
    """An activation."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Gated(nn.Module):
    """A gated layer, $U (\\phi(V x) \\odot W x)$."""

    def __init__(self, d: int, h: int, act: Callable[[Tensor], Tensor] = F.silu, bias: bool = False) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(d, h, bias), nn.Linear(d, h, bias)
        self.down, self.act = nn.Linear(h, d, bias), act

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x))


def feed(d: int, h: int, act: Callable[[], nn.Module] = nn.GELU) -> nn.Module:
    return nn.Sequential(nn.Linear(d, h), act(), nn.Linear(h, d))


class RMSNorm(nn.Module):
    """Written by hand; `plus` for a gain of the form 1 + w, None for no gain."""

    def __init__(self, d: int, plus: float | None = 0.0) -> None:
        super().__init__()
        self.plus, self.weight = plus, None if plus is None else nn.Parameter(torch.ones(d) - plus)

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return x if self.weight is None else x * (self.plus + self.weight if self.plus else self.weight)


def rotary(x: Tensor, layout: str, part: int) -> Tensor:
    """Positions for [..., length, width]: its first `part` entries are turned in pairs."""
    x, rest = x[..., :part], x[..., part:]
    half = part // 2
    angle = torch.arange(x.shape[-2])[:, None] / 10 ** (torch.arange(half) / half)
    cos, sin = angle.cos().to(x), angle.sin().to(x)
    a, b = (x[..., :half], x[..., half:]) if layout == "halves" else (x[..., ::2], x[..., 1::2])
    a, b = a * cos - b * sin, a * sin + b * cos
    turned = torch.cat([a, b], -1) if layout == "halves" else torch.stack([a, b], -1).flatten(-2)
    return torch.cat([turned, rest], -1)


class Attention(nn.Module):
    """Several heads of width 4, as people write it."""

    def __init__(
        self,
        d: int,
        heads: int = 1,
        kv: int | None = None,
        layout: str = "",
        part: int = 4,
        bias: bool = False,
        norm: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.heads, self.kv, self.layout, self.part = heads, kv or heads, layout, part
        self.q, self.o = nn.Linear(d, 4 * heads, bias), nn.Linear(4 * heads, d, bias)
        self.k, self.v = (nn.Linear(d, 4 * self.kv, bias) for _ in range(2))
        self.qn, self.kn = (norm(4), norm(4)) if norm else (nn.Identity(), nn.Identity())

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        y = x if y is None else y
        q, k, v = (f(t).unflatten(-1, (-1, 4)).transpose(1, 2) for f, t in ((self.q, x), (self.k, y), (self.v, y)))
        q, k = self.qn(q), self.kn(k)
        if self.layout:
            q, k = rotary(q, self.layout, self.part), rotary(k, self.layout, self.part)
        k, v = (t.repeat_interleave(self.heads // self.kv, 1) for t in (k, v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, attention: nn.Module, mlp: nn.Module, norm: Callable[[int], nn.Module], post: bool) -> None:
        super().__init__()
        self.attention, self.mlp, self.post = attention, mlp, post
        self.one, self.two = norm(D), norm(D)

    def forward(self, x: Tensor) -> Tensor:
        if self.post:
            x = self.one(x + self.attention(x))
            return self.two(x + self.mlp(x))
        x = x + self.attention(self.one(x))
        return x + self.mlp(self.two(x))


class Decoder(nn.Module):
    """A language model of one block."""

    def __init__(
        self,
        attention: Callable[[], nn.Module] = lambda: Attention(D, bias=True),
        mlp: Callable[[], nn.Module] = lambda: feed(D, 5),
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
        positions: bool = True,
        tied: bool = False,
        post: bool = False,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, D)
        self.place = nn.Embedding(LENGTH, D) if positions else None
        self.block = Block(attention(), mlp(), norm, post)
        self.norm, self.head = nn.Identity() if post else norm(D), nn.Linear(D, WORDS, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        if self.place is not None:
            x = x + self.place(torch.arange(tokens.shape[1]))
        return self.head(self.norm(self.block(x)))


def llama(norm: Callable[[int], nn.Module] = RMSNorm, **options: Any) -> nn.Module:
    settings: dict[str, Any] = {"layout": "halves", **options}
    tied = settings.pop("tied", False)
    return Decoder(partial(Attention, D, **settings), partial(Gated, D, 5), norm, positions=False, tied=tied)


class Encoder(nn.Module):
    """PyTorch's layer behind a linear embedding."""

    def __init__(self, norm_first: bool, act: str) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(6, D), nn.Linear(D, 5)
        self.layer = nn.TransformerEncoderLayer(D, 1, 5, 0.0, act, batch_first=True, norm_first=norm_first)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.embed(x)))


class Translate(nn.Module):
    """Encoder and decoder with attention across."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(WORDS, D), nn.Embedding(WORDS, D)
        self.inner, self.cross = Attention(D), Attention(D)
        self.a, self.b, self.c = nn.LayerNorm(D), nn.LayerNorm(D), nn.LayerNorm(D)
        self.head = nn.Linear(D, WORDS)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        x, y = self.source(source), self.target(target)
        x = x + self.inner(self.a(x))
        y = y + self.cross(self.b(y), x)
        return self.head(self.c(y))


class Vision(nn.Module):
    """Patches, a class token, positions."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.patch, self.token = nn.Conv2d(1, D, 3, 3), nn.Parameter(torch.randn(1, 1, D))
        self.place = nn.Parameter(torch.randn(1, 5, D))
        self.blocks = nn.Sequential(*(Block(Attention(D), feed(D, 5), nn.LayerNorm, False) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.place
        return self.head(self.norm(self.blocks(x))[:, 0])


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.one, self.two = nn.Linear(6, D), nn.LayerNorm(D), nn.LayerNorm(D)
        self.tokens, self.channels, self.head = feed(LENGTH, 6), feed(D, 5), nn.Linear(D, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.tokens(self.one(x).transpose(1, 2)).transpose(1, 2)
        return self.head((x + self.channels(self.two(x))).mean(1))


class Pooled(nn.Module):
    """A learned score for each item, softmax over the items."""

    def __init__(self) -> None:
        super().__init__()
        self.value, self.score, self.head = (
            nn.Linear(4, 5),
            nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)),
            nn.Linear(5, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.score(x).softmax(1) * self.value(x)).sum(1))


class Experts(nn.Module):
    """A mixture: all experts run, weighted by softmax; with `top`, only the best ones."""

    def __init__(self, top: int | None = None) -> None:
        super().__init__()
        self.router, self.top = nn.Linear(4, 3), top
        self.experts = nn.ModuleList([feed(4, 3, nn.LeakyReLU) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        p = self.router(x).softmax(-1)
        if self.top is not None:
            best = p.topk(self.top, -1)
            p = torch.zeros_like(p).scatter(-1, best.indices, best.values)
        return sum(p[:, k : k + 1] * expert(x) for k, expert in enumerate(self.experts))


class Lora(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base, self.head = nn.Linear(5, 4), nn.Linear(4, 3)
        self.a, self.b = nn.Linear(5, 2, bias=False), nn.Linear(2, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.base(x) + 0.5 * self.b(self.a(x))))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module], **options: object) -> None:
        super().__init__()
        self.cell, self.head = kind(3, 4, batch_first=True, **options), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[0])


class Graph(nn.Module):
    """Two graph convolutions on a fixed ring of nodes, `scatter` or `matrix`."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.one, self.two, self.how = nn.Linear(3, 5), nn.Linear(5, 4), how
        self.head = nn.Linear(4, 2)

    def aggregate(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        source, target = torch.arange(n), (torch.arange(n) + 1) % n
        if self.how == "matrix":
            adjacency = torch.zeros(n, n, dtype=x.dtype)
            adjacency[target, source] = 1.0
            return adjacency @ x + x
        return torch.zeros_like(x).index_add(1, target, x[:, source]) + x

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.aggregate(self.one(x)))
        return self.head(F.leaky_relu(self.aggregate(self.two(x))).mean(1))


class Flow(nn.Module):
    """A neural ordinary differential equation, four steps of Euler."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.field, self.head = nn.Linear(5, 3), feed(3, 4, nn.Tanh), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for _ in range(4):
            x = x + 0.25 * self.field(x)
        return self.head(x)


class Excited(nn.Module):
    """Squeeze and excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.squeeze, self.excite = nn.Conv2d(2, 4, 3), nn.Linear(4, 3), nn.Linear(3, 4)
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.conv(x))
        s = torch.sigmoid(self.excite(torch.tanh(self.squeeze(x.mean((2, 3))))))
        return self.last((x * s[:, :, None, None]).mean((2, 3)))


class Residual(nn.Module):
    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 3, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
        self.na, self.nb, self.head = norm(3), norm(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.stem(x))
        x = F.leaky_relu(self.nb(self.b(F.leaky_relu(self.na(self.a(x))))) + x)
        return self.head(x.mean((2, 3)))


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(2 + 2 * i, 2, 3, padding=1) for i in range(3)])
        self.last = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat([x, F.leaky_relu(layer(x))], 1)
        return self.last(x.mean((2, 3)))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.deep = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
        self.up, self.join, self.last = (
            nn.ConvTranspose2d(4, 3, 2, 2),
            nn.Conv2d(6, 3, 3, padding=1),
            nn.Conv2d(3, 1, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        a = F.leaky_relu(self.down(x))
        b = F.leaky_relu(self.deep(F.max_pool2d(a, 2)))
        return self.last(F.leaky_relu(self.join(torch.cat([a, F.leaky_relu(self.up(b))], 1))))


class ConvNext(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide = nn.Conv2d(2, D, 2, 2), nn.Conv2d(D, D, 3, padding=1, groups=D)
        self.norm, self.up, self.down = nn.LayerNorm(D), nn.Linear(D, 5), nn.Linear(5, D)
        self.gamma, self.last, self.head = nn.Parameter(torch.ones(D)), nn.LayerNorm(D), nn.Linear(D, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        h = self.gamma * self.down(F.gelu(self.up(self.norm(self.wide(x).permute(0, 2, 3, 1)))))
        return self.head(self.last((x + h.permute(0, 3, 1, 2)).mean((2, 3))))


def mlp(act: Callable[[], nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), act(), nn.Linear(5, 4), act(), nn.Linear(4, 3))


def conv(norm: Callable[[int], nn.Module]) -> nn.Module:
    body = [nn.Conv2d(2, 4, 3), norm(4), nn.LeakyReLU(), nn.Conv2d(4, 4, 3), norm(4), nn.LeakyReLU()]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


def mobile() -> nn.Module:
    body = [nn.Conv2d(2, 4, 3), nn.LeakyReLU(), nn.Conv2d(4, 4, 3, groups=4), nn.LeakyReLU(), nn.Conv2d(4, 5, 1)]
    return nn.Sequential(*body, nn.LeakyReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3))


def _x(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def _tokens() -> Tensor:
    return torch.randint(0, WORDS, (2, LENGTH), generator=torch.Generator().manual_seed(1))


VECTORS, IMAGES, TOKENS = _x(7, 4), _x(2, 2, 6, 6), torch.arange(2 * LENGTH).remainder(WORDS).reshape(2, LENGTH)


@dataclass(frozen=True)
class Family:
    """A model, its example, and the continuous symmetries that are not found: how many, and why."""

    make: Callable[[], nn.Module]
    example: tuple[Tensor, ...]
    rest: int = 0
    why: str = ""
    seed: int = 0  # of weights with which each neuron is on and off


def _square(x: Tensor) -> Tensor:
    return F.relu(x).square()


GAINS = "a curve of gains of a norm, with the same spectrum in the metric of the norm that reads it next"
INVERSE = "a shift that the next matrices carry to the vector of ones, which a norm forgets"
CONSTANT = "what asks does not depend on the data, so its weights, and those of what is asked, count in a product only"
UNIFORM = "one scale for all entries of an axis, taken back by weights of another axis"
FILM = "a shift that data multiply, undone by other weights which read the same data"
SCALE = "a scale of the outputs that are compared by angles"
FAMILIES: dict[str, Family] = {
    **{
        f"MLP, {name}": Family(partial(mlp, act), (VECTORS,), seed=12)
        for name, act in {
            "identity": nn.Identity,
            "leaky ReLU": nn.LeakyReLU,
            "PReLU": nn.PReLU,
            "tanh": nn.Tanh,
            "sigmoid": nn.Sigmoid,
            "GELU": nn.GELU,
            "ELU": nn.ELU,
            "softplus": nn.Softplus,
            "square": partial(Lambda, torch.square),
            "cube": partial(Lambda, lambda x: x**3),
            "x |x|": partial(Lambda, lambda x: x * x.abs()),
            "squared leaky ReLU": partial(Lambda, lambda x: F.leaky_relu(x).square()),
            "absolute value": partial(Lambda, torch.abs),
        }.items()
    },
    "gated, SiLU": Family(lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), Gated(4, 5, bias=True)), (VECTORS,)),
    "gated, leaky ReLU": Family(lambda: nn.Sequential(nn.Tanh(), Gated(4, 5, F.leaky_relu)), (VECTORS,)),
    "convolutions": Family(partial(conv, lambda n: nn.Identity()), (IMAGES,)),
    "convolutions, batch norm": Family(partial(conv, nn.BatchNorm2d), (IMAGES,)),
    "convolutions, group norm": Family(partial(conv, partial(nn.GroupNorm, 2)), (IMAGES,)),
    "convolutions, instance norm": Family(partial(conv, partial(nn.InstanceNorm2d, affine=True)), (IMAGES,)),
    "convolutions, layer norm": Family(partial(conv, partial(nn.GroupNorm, 1)), (IMAGES,)),
    "ResNet": Family(partial(Residual, lambda n: nn.Identity()), (IMAGES,)),
    "ResNet, group norm": Family(partial(Residual, partial(nn.GroupNorm, 1)), (IMAGES,)),
    "DenseNet": Family(Dense, (IMAGES,)),
    "U-Net": Family(UNet, (IMAGES[:, :1],)),
    "MobileNet": Family(mobile, (IMAGES,)),
    "ConvNeXt": Family(ConvNext, (IMAGES,)),
    "squeeze and excitation": Family(Excited, (IMAGES,)),
    "encoder, pre-norm": Family(partial(Encoder, True, "gelu"), (_x(2, 5, 6),)),
    "encoder, post-norm": Family(partial(Encoder, False, "gelu"), (_x(2, 5, 6),), rest=1, why=GAINS),
    "GPT": Family(Decoder, (TOKENS,)),
    "GPT, two heads": Family(partial(Decoder, partial(Attention, D, 2, bias=True)), (TOKENS,)),
    "GPT, tied": Family(partial(Decoder, tied=True), (TOKENS,)),
    "GPT, post-norm": Family(partial(Decoder, post=True), (TOKENS,), rest=1, why=GAINS),
    "Llama": Family(llama, (TOKENS,)),
    "Llama, neighbours": Family(partial(llama, layout="neighbours"), (TOKENS,)),
    "Llama, grouped queries": Family(partial(llama, heads=2, kv=1), (TOKENS,)),
    "Llama, partial rotary": Family(partial(llama, part=2), (TOKENS,)),
    "Llama, query-key norm": Family(
        lambda: Decoder(partial(Attention, D, norm=RMSNorm, layout="halves"), partial(Gated, D, 5), RMSNorm, False),
        (TOKENS,),
    ),
    "Llama, tied": Family(partial(llama, tied=True), (TOKENS,)),
    "Llama, gains 1 + w": Family(partial(llama, partial(RMSNorm, plus=1.0)), (TOKENS,)),
    "Llama, no gains": Family(partial(llama, partial(RMSNorm, plus=None)), (TOKENS,)),
    "encoder and decoder": Family(Translate, (TOKENS, TOKENS), rest=2, why=INVERSE),
    "vision transformer": Family(partial(Vision, 2), (_x(2, 1, 6, 6),)),
    "vision transformer, one block": Family(partial(Vision, 1), (_x(2, 1, 6, 6),), rest=12, why=CONSTANT),
    "mixer": Family(Mixer, (_x(2, LENGTH, 6),), rest=1, why=UNIFORM),
    "attention pooling": Family(Pooled, (_x(2, 5, 4),)),
    "mixture of experts": Family(Experts, (VECTORS,)),
    "mixture of experts, top 2": Family(partial(Experts, 2), (VECTORS,)),
    "LoRA": Family(Lora, (_x(7, 5),)),
    "LSTM": Family(partial(Recurrent, nn.LSTM), (_x(2, 4, 3),)),
    "GRU": Family(partial(Recurrent, nn.GRU), (_x(2, 4, 3),)),
    "RNN, tanh": Family(partial(Recurrent, nn.RNN), (_x(2, 4, 3),)),
    "graph network, scatter": Family(partial(Graph, "scatter"), (_x(2, 5, 3),), seed=1),
    "graph network, matrix": Family(partial(Graph, "matrix"), (_x(2, 5, 3),), seed=1),
    "neural ODE": Family(Flow, (_x(7, 5),)),
}
