"""Families that were written after the finder, in the ways in which others write them; counted as those before."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from completeness import (
    CONSTANT,
    FILM,
    IMAGES,
    INVERSE,
    LENGTH,
    SCALE,
    TOKENS,
    UNIFORM,
    VECTORS,
    WORDS,
    D,
    Family,
    _x,
)
from torch import Tensor, nn


class NanoGPT(nn.Module):
    """No biases but those of the norms; queries, keys and values in one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(WORDS, D), nn.Embedding(LENGTH, D)
        self.one, self.two, self.last = (nn.LayerNorm(D) for _ in range(3))
        self.attn, self.proj = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D, bias=False)
        self.up, self.down = nn.Linear(D, 5, bias=False), nn.Linear(5, D, bias=False)
        self.head = nn.Linear(D, WORDS, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1]))
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.attn(self.one(x)).split(D, 2))
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return self.head(self.last(x + self.down(F.gelu(self.up(self.two(x))))))


class Across(nn.Module):
    """PyTorch's decoder layer, norms behind the sums, which asks a memory."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.memory, self.head = nn.Embedding(WORDS, D), nn.Linear(6, D), nn.Linear(D, WORDS)
        self.layer = nn.TransformerDecoderLayer(D, 2, 5, 0.0, "gelu", batch_first=True)

    def forward(self, tokens: Tensor, x: Tensor) -> Tensor:
        return self.head(self.layer(self.embed(tokens), self.memory(x)))


class ResponseNorm(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.zeros(1, 1, 1, d)), nn.Parameter(torch.zeros(1, 1, 1, d))

    def forward(self, x: Tensor) -> Tensor:
        size = x.square().sum((1, 2), keepdim=True).add(1e-9).sqrt()
        return self.gamma * (x * size / (size.mean(-1, keepdim=True) + 1e-6)) + self.beta + x


class ConvNextV2(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first = nn.Conv2d(2, D, 2, 2), nn.LayerNorm(D)
        self.wide, self.norm = nn.Conv2d(D, D, 3, padding=1, groups=D), nn.LayerNorm(D)
        self.up, self.response, self.down = nn.Linear(D, 6), ResponseNorm(6), nn.Linear(6, D)
        self.last, self.head = nn.LayerNorm(D), nn.Linear(D, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.stem(x).permute(0, 2, 3, 1))
        h = self.norm(self.wide(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        x = x + self.down(self.response(F.gelu(self.up(h))))
        return self.head(self.last(x.mean((1, 2))))


class GatedMLP(nn.Module):
    """A gate that mixes tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.up, self.down = nn.Linear(6, D), nn.LayerNorm(D), nn.Linear(D, 6), nn.Linear(3, D)
        self.gate, self.space = nn.LayerNorm(3), nn.Conv1d(LENGTH, LENGTH, 1)
        self.last, self.head = nn.LayerNorm(D), nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        u, v = F.gelu(self.up(self.norm(x))).chunk(2, -1)
        return self.head(self.last(x + self.down(u * self.space(self.gate(v)))).mean(1))


class Perceiver(nn.Module):
    """Latents that ask the data, and then each other."""

    def __init__(self) -> None:
        super().__init__()
        self.latents, self.read = nn.Parameter(torch.randn(3, D)), nn.Linear(6, D)
        self.asks, self.asked, self.inner, self.last = (nn.LayerNorm(D) for _ in range(4))
        self.q, self.kv, self.o = nn.Linear(D, D, bias=False), nn.Linear(D, 2 * D, bias=False), nn.Linear(D, D)
        self.qkv, self.out = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D)
        self.mlp = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, 5), nn.GELU(), nn.Linear(5, D))
        self.head = nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        latents = self.latents.expand(len(x), -1, -1)
        k, v = self.kv(self.asked(self.read(x))).chunk(2, -1)
        x = latents + self.o(F.scaled_dot_product_attention(self.q(self.asks(latents)), k, v))
        x = x + self.out(F.scaled_dot_product_attention(*self.qkv(self.inner(x)).chunk(3, -1)))
        return self.head(self.last(x + self.mlp(x)).mean(1))


class Modulated(nn.Module):
    """Features that a condition scales and shifts."""

    def __init__(self) -> None:
        super().__init__()
        self.condition = nn.Sequential(nn.Linear(3, 6), nn.SiLU())
        self.gamma, self.beta = nn.Linear(6, 5), nn.Linear(6, 5)
        self.a, self.b, self.c = nn.Linear(4, 5), nn.Linear(5, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        z = self.condition(z)
        return self.c(F.leaky_relu(self.b(F.leaky_relu(self.gamma(z) * self.a(x) + self.beta(z)))))


class Dueling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.LeakyReLU(), nn.Linear(6, 5), nn.LeakyReLU())
        self.value, self.advantage = nn.Linear(5, 1), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        a = self.advantage(h)
        return self.value(h) + a - a.mean(-1, keepdim=True)


class Autoencoder(nn.Module):
    """A variational one."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.mean, self.log, self.decode, self.last = (
            nn.Linear(*size) for size in ((5, 6), (6, 3), (6, 3), (3, 6), (6, 5))
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = F.leaky_relu(self.encode(x))
        mean, log = self.mean(h), self.log(h)
        z = mean + (log / 2).exp() * torch.randn_like(mean) if self.training else mean
        h = self.decode(z)
        return self.last(F.leaky_relu(h) * h.abs()), mean, log


class Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        body = [nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.LeakyReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        self.net = nn.Sequential(*body, nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 4))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return F.cosine_similarity(self.net(a), self.net(b))


class Highway(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.read, self.new, self.gate, self.head = (nn.Linear(*size) for size in ((5, 4), (4, 4), (4, 4), (4, 3)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.read(x)
        gate = torch.sigmoid(self.gate(x))
        return self.head(gate * F.leaky_relu(self.new(x)) + (1 - gate) * x)


class Tacotron(nn.Module):
    """A narrow network, convolutions with a residual, and a recurrent one in both directions."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 4), nn.GELU())
        self.a, self.b, self.norm = nn.Conv1d(4, 5, 3, padding=1), nn.Conv1d(5, 4, 3, padding=1), nn.LayerNorm(4)
        self.recurrent, self.last = nn.GRU(4, 3, batch_first=True, bidirectional=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x + self.b(F.gelu(self.a(x.transpose(1, 2)))).transpose(1, 2)
        return self.last(self.recurrent(self.norm(x))[0])


class Tabular(nn.Module):
    """Words of three columns, each with a table of its own, and numbers beside them; as TabTransformer."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(4, D) for _ in range(3))
        self.layer = nn.TransformerEncoderLayer(D, 2, 5, 0.0, "gelu", batch_first=True, norm_first=True)
        self.norm = nn.LayerNorm(3)
        self.mlp = nn.Sequential(nn.Linear(3 * D + 3, 7), nn.LeakyReLU(), nn.Linear(7, 2))

    def forward(self, words: Tensor, x: Tensor) -> Tensor:
        z = self.layer(torch.stack([table(words[:, k]) for k, table in enumerate(self.tables)], 1))
        return self.mlp(torch.cat([z.flatten(1), self.norm(x)], -1))


class Pooling(nn.Module):
    """One set asks another; as in a set transformer."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(n, D) for n in (d, d, d, D))
        self.one, self.two = nn.LayerNorm(D), nn.LayerNorm(D)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(y), self.v(y)
        x = self.one(q + F.scaled_dot_product_attention(q, k, v))
        return self.two(x + F.gelu(self.o(x)))


class SetTransformer(nn.Module):
    """A set that asks itself; then two seeds, or for comparison its first two elements, ask what comes of it."""

    def __init__(self, seeds: bool = True) -> None:
        super().__init__()
        self.within, self.pool, self.head = Pooling(6), Pooling(D), nn.Linear(D, 2)
        self.seeds = nn.Parameter(torch.zeros(1, 2, D)) if seeds else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.within(x, x)
        return self.head(self.pool(x[:, :2] if self.seeds is None else self.seeds.expand(len(x), -1, -1), x))


OPEN = "not known"
CATEGORIES = torch.arange(21).remainder(4).view(7, 3)

LATER: dict[str, Family] = {
    "GPT without biases": Family(NanoGPT, (TOKENS,), rest=1, why=INVERSE),
    "decoder across, post-norm": Family(Across, (TOKENS, _x(2, 6, 6))),
    "ConvNeXt V2": Family(ConvNextV2, (IMAGES,)),
    "gated MLP": Family(GatedMLP, (_x(2, LENGTH, 6),), rest=2, why=UNIFORM),
    "Perceiver": Family(Perceiver, (_x(2, 6, 6),), rest=6, why=CONSTANT),
    "FiLM": Family(Modulated, (VECTORS, _x(7, 3)), rest=5, why=FILM),
    "dueling Q-network": Family(Dueling, (VECTORS,)),
    "variational autoencoder": Family(Autoencoder, (_x(7, 5),), seed=1),
    "Siamese": Family(Siamese, (IMAGES, IMAGES.flip(0)), rest=1, why=SCALE),
    "highway": Family(Highway, (_x(7, 5),)),
    "Tacotron": Family(Tacotron, (_x(2, 5, 6),)),
    "tabular": Family(Tabular, (CATEGORIES, _x(7, 3)), rest=7, why=OPEN),
    "set transformer": Family(SetTransformer, (_x(2, 5, 6),), rest=4 + 3, why=f"{CONSTANT}; {OPEN}"),
    "set transformer, elements ask": Family(partial(SetTransformer, False), (_x(2, 5, 6),), rest=3, why=OPEN),
}
