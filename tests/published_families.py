"""Models as they are published, of kinds that no other table has; 91% was found of them at first sight.

They were written after the finder, before it was run on any. Some were given other sizes after that, and before the
finder changed: those whose fibre was no orbit, as where a layer lifts its data to more channels than there are.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from completeness import INVERSE, TOKENS, WORDS, D, Family, RMSNorm, _x, rotary
from published_pictures import PICTURES
from torch import nn


class Language(nn.Module):
    """Embeds tokens, runs blocks and reads; each kind below fills in its blocks."""

    def __init__(self, blocks, norm, d=D, words=WORDS):
        super().__init__()
        self.embed, self.head = nn.Embedding(words, d), nn.Linear(d, words, bias=False)
        self.blocks, self.norm = nn.ModuleList(blocks), norm

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def causal(scores):
    n = scores.shape[-1]
    return scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), float("-inf"))


class RelativeXL(nn.Module):
    """Transformer-XL: content and position scores, with one bias each for queries; norms behind the sums."""

    def __init__(self, d=D, h=2):
        super().__init__()
        self.h, k = h, d // h
        self.q, self.kv, self.r = nn.Linear(d, d, False), nn.Linear(d, 2 * d, False), nn.Linear(d, d, False)
        self.u, self.v = nn.Parameter(torch.randn(h, k)), nn.Parameter(torch.randn(h, k))
        self.o, self.n1, self.n2 = nn.Linear(d, d, False), nn.LayerNorm(d), nn.LayerNorm(d)
        self.ff = nn.Sequential(nn.Linear(d, 5), nn.GELU(), nn.Linear(5, d))

    def forward(self, x):
        b, n, d = x.shape
        back = torch.arange(n - 1, -1, -1, dtype=x.dtype)
        angles = back[:, None] / 10 ** torch.arange(d // 2, dtype=x.dtype)
        r = self.r(torch.cat([angles.sin(), angles.cos()], -1)).view(n, self.h, -1)
        q = self.q(x).view(b, n, self.h, -1)
        k, v = (t.view(b, n, self.h, -1) for t in self.kv(x).chunk(2, -1))
        content = torch.einsum("bihd,bjhd->bhij", q + self.u, k)
        place = torch.einsum("bihd,jhd->bhij", q + self.v, r)
        place = F.pad(place, (1, 0)).view(b, self.h, n + 1, n)[:, :, 1:].reshape(b, self.h, n, n)
        a = causal((content + place) / math.sqrt(d // self.h)).softmax(-1)
        x = self.n1(x + self.o(torch.einsum("bhij,bjhd->bihd", a, v).reshape(b, n, d)))
        return self.n2(x + self.ff(x))


class T5(nn.Module):
    """Biases of bucketed distances, no scale of the scores, gated GELU, no biases."""

    def __init__(self, d=D, h=2, k=3):
        super().__init__()
        self.h, self.k = h, k
        self.embed, self.bias = nn.Embedding(WORDS, d), nn.Embedding(4, h)
        self.n1, self.n2, self.last = RMSNorm(d), RMSNorm(d), RMSNorm(d)
        self.q, self.key, self.v, self.o = (nn.Linear(*s, bias=False) for s in [(d, h * k)] * 3 + [(h * k, d)])
        self.w0, self.w1, self.wo = nn.Linear(d, 5, False), nn.Linear(d, 5, False), nn.Linear(5, d, False)
        self.head = nn.Linear(d, WORDS, bias=False)

    def forward(self, tokens):
        x = self.embed(tokens)
        b, n, _ = x.shape
        y = self.n1(x)
        q, k, v = (m(y).view(b, n, self.h, self.k).transpose(1, 2) for m in (self.q, self.key, self.v))
        far = torch.arange(n)[None] - torch.arange(n)[:, None]
        bucket = (far > 0) * 2 + far.abs().clamp(max=1)
        a = (q @ k.transpose(2, 3) + self.bias(bucket).permute(2, 0, 1)[None]).softmax(-1)
        x = x + self.o((a @ v).transpose(1, 2).reshape(b, n, -1))
        y = self.n2(x)
        x = x + self.wo(F.gelu(self.w0(y), approximate="tanh") * self.w1(y))
        return self.head(self.last(x) * x.shape[-1] ** -0.5)


class Bloom(nn.Module):
    """ALiBi: scores fall with the distance; queries, keys and values of a head side by side in one matrix."""

    def __init__(self, d=D, h=2):
        super().__init__()
        self.h = h
        self.n1, self.n2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.dense = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, 6), nn.Linear(6, d)

    def forward(self, x):
        b, n, d = x.shape
        q, k, v = self.qkv(self.n1(x)).view(b, n, self.h, 3, -1).unbind(3)
        slopes = 2.0 ** -torch.arange(1, self.h + 1, dtype=x.dtype)
        alibi = slopes[:, None, None] * torch.arange(n, dtype=x.dtype)
        a = causal(torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(d // self.h) + alibi).softmax(-1)
        x = x + self.dense(torch.einsum("bhij,bjhd->bihd", a, v).reshape(b, n, d))
        return x + self.down(F.gelu(self.up(self.n2(x)), approximate="tanh"))


class Latent(nn.Module):
    """DeepSeek: keys and values out of one compressed vector; a rotary key shared by all heads."""

    def __init__(self, d=6, h=2, k=2, r=2, low=3):
        super().__init__()
        self.h, self.k, self.r, self.low = h, k, r, low
        self.n1, self.n2 = RMSNorm(d), RMSNorm(d)
        self.qa, self.qn, self.qb = nn.Linear(d, low, False), RMSNorm(low), nn.Linear(low, h * (k + r), False)
        self.kva, self.kvn, self.kvb = nn.Linear(d, low + r, False), RMSNorm(low), nn.Linear(low, h * 2 * k, False)
        self.o = nn.Linear(h * k, d, bias=False)
        self.gate, self.up, self.down = nn.Linear(d, 5, False), nn.Linear(d, 5, False), nn.Linear(5, d, False)

    def forward(self, x):
        b, n, _ = x.shape
        y = self.n1(x)
        q = self.qb(self.qn(self.qa(y))).view(b, n, self.h, -1).transpose(1, 2)
        q, qr = q.split([self.k, self.r], -1)
        c, kr = self.kva(y).split([self.low, self.r], -1)
        k, v = self.kvb(self.kvn(c)).view(b, n, self.h, -1).transpose(1, 2).chunk(2, -1)
        qr, kr = rotary(qr, "halves", self.r), rotary(kr[:, None], "halves", self.r)
        q, k = torch.cat([q, qr], -1), torch.cat([k, kr.expand(-1, self.h, -1, -1)], -1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).reshape(b, n, -1))
        y = self.n2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class NeoX(nn.Module):
    """Attention and feed-forward side by side, each behind its own norm; rotary."""

    def __init__(self, d=D, h=2, one=False):
        super().__init__()
        self.h = h
        self.n1 = nn.LayerNorm(d)
        self.n2 = self.n1 if one else nn.LayerNorm(d)
        self.k = 1 if one else h  # Falcon: one key and value for all heads, one norm
        self.qkv, self.dense = nn.Linear(d, d + 2 * self.k * d // h, not one), nn.Linear(d, d, not one)
        self.up, self.down = nn.Linear(d, 6, not one), nn.Linear(6, d, not one)

    def forward(self, x):
        b, n, d = x.shape
        k = d // self.h
        q, key, v = self.qkv(self.n1(x)).split([d, self.k * k, self.k * k], -1)
        q, key, v = (t.view(b, n, -1, k).transpose(1, 2) for t in (q, key, v))
        q, key = rotary(q, "halves", k), rotary(key, "halves", k)
        key, v = (t.expand(-1, self.h, -1, -1) for t in (key, v))
        y = F.scaled_dot_product_attention(q, key, v, is_causal=True).transpose(1, 2).reshape(b, n, d)
        return x + self.dense(y) + self.down(F.gelu(self.up(self.n2(x))))


class Gemma(nn.Module):
    """Gemma 2: norms before and behind each part, gains 1 + w, scores and logits through a soft cap, tied."""

    def __init__(self, d=D, h=2):
        super().__init__()
        self.h = h
        self.embed = nn.Embedding(WORDS, d)
        self.norms = nn.ModuleList(RMSNorm(d, plus=1) for _ in range(5))
        self.q, self.k, self.v, self.o = (nn.Linear(d, d, bias=False) for _ in range(4))
        self.gate, self.up, self.down = nn.Linear(d, 5, False), nn.Linear(d, 5, False), nn.Linear(5, d, False)

    def forward(self, tokens):
        x = self.embed(tokens)
        b, n, d = x.shape
        x = x * d**0.5
        y = self.norms[0](x)
        q, k, v = (m(y).view(b, n, self.h, -1).transpose(1, 2) for m in (self.q, self.k, self.v))
        q, k = rotary(q, "halves", d // self.h), rotary(k, "halves", d // self.h)
        scores = 5 * torch.tanh(q @ k.transpose(2, 3) * (d // self.h) ** -0.5 / 5)
        y = (causal(scores).softmax(-1) @ v).transpose(1, 2).reshape(b, n, d)
        x = x + self.norms[1](self.o(y))
        y = self.norms[2](x)
        x = x + self.norms[3](self.down(F.gelu(self.gate(y), approximate="tanh") * self.up(y)))
        return 3 * torch.tanh(F.linear(self.norms[4](x), self.embed.weight) / 3)


class Mamba(nn.Module):
    """Selective state space: short convolution, steps of low rank, a gate."""

    def __init__(self, d=3, e=4, n=2, low=1):
        super().__init__()
        self.n, self.low = n, low
        self.norm = RMSNorm(d)
        self.inp, self.conv = nn.Linear(d, 2 * e, False), nn.Conv1d(e, e, 3, padding=2, groups=e)
        self.x, self.dt = nn.Linear(e, low + 2 * n, False), nn.Linear(low, e)
        self.A, self.D = nn.Parameter(torch.arange(1.0, n + 1).log().repeat(e, 1)), nn.Parameter(torch.ones(e))
        self.out = nn.Linear(e, d, bias=False)

    def forward(self, x):
        length = x.shape[1]
        u, z = self.inp(self.norm(x)).chunk(2, -1)
        u = F.silu(self.conv(u.transpose(1, 2))[..., :length].transpose(1, 2))
        dt, B, C = self.x(u).split([self.low, self.n, self.n], -1)
        dt = F.softplus(self.dt(dt))
        A = -self.A.exp()
        state, outputs = u.new_zeros(len(u), u.shape[2], self.n), []
        for t in range(length):
            decay = (dt[:, t, :, None] * A).exp()
            state = decay * state + (dt[:, t] * u[:, t])[..., None] * B[:, t, None]
            outputs.append((state * C[:, t, None]).sum(-1))
        y = torch.stack(outputs, 1) + self.D * u
        return x + self.out(y * F.silu(z))


class RetNet(nn.Module):
    """Retention: scores decay with the distance, no softmax; a group norm without gain, a swish gate."""

    def __init__(self, d=D, h=2):
        super().__init__()
        self.h = h
        self.n1, self.n2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.q, self.k, self.v, self.g, self.o = (nn.Linear(d, d, bias=False) for _ in range(5))
        self.group = nn.GroupNorm(h, d, affine=False)
        self.up, self.down = nn.Linear(d, 5), nn.Linear(5, d)

    def forward(self, x):
        b, n, d = x.shape
        y = self.n1(x)
        q, k, v = (m(y).view(b, n, self.h, -1).transpose(1, 2) for m in (self.q, self.k, self.v))
        gamma = 1 - 2.0 ** (-1 - torch.arange(self.h, dtype=x.dtype))
        far = torch.arange(n)[:, None] - torch.arange(n)
        decay = torch.where(far >= 0, gamma[:, None, None] ** far.clamp(min=0), 0.0)
        y2 = (((q @ k.transpose(2, 3)) * decay) @ v).transpose(1, 2).reshape(b * n, d)
        x = x + self.o(F.silu(self.g(y)) * self.group(y2).view(b, n, d))
        return x + self.down(F.gelu(self.up(self.n2(x))))


class Hyena(nn.Module):
    """Gates and long convolutions by Fourier transforms; the filter is a small network of the position, decaying."""

    def __init__(self, d=3):
        super().__init__()
        self.embed, self.norm = nn.Linear(4, d), nn.LayerNorm(d)
        self.inp, self.short = nn.Linear(d, 3 * d), nn.Conv1d(3 * d, 3 * d, 3, padding=2, groups=3 * d)
        self.f1, self.f2, self.f3 = nn.Linear(3, 5), nn.Linear(5, 5), nn.Linear(5, d, bias=False)
        self.bias, self.out, self.head = nn.Parameter(torch.randn(d)), nn.Linear(d, d), nn.Linear(d, 2)

    def forward(self, x):
        x = self.embed(x)
        n = x.shape[1]
        x1, x2, v = self.short(self.inp(self.norm(x)).transpose(1, 2))[..., :n].chunk(3, 1)
        t = torch.linspace(0, 1, n, dtype=x.dtype)[:, None]
        filters = self.f3(torch.sin(self.f2(torch.sin(self.f1(torch.cat([t, (6 * t).sin(), (6 * t).cos()], -1))))))
        filters = (filters * (-2 * t).exp()).T
        v = v * x1
        y = torch.fft.irfft(torch.fft.rfft(v, n=2 * n) * torch.fft.rfft(filters, n=2 * n), n=2 * n)[..., :n]
        y = (y + self.bias[:, None] * v) * x2
        return self.head(x + self.out(y.transpose(1, 2)))


class SRU(nn.Module):
    """Simple recurrent unit, two layers; the state's own weights are vectors."""

    def __init__(self, d=4):
        super().__init__()
        self.embed = nn.Linear(5, d)
        self.w = nn.ModuleList(nn.Linear(d, 3 * d, bias=False) for _ in range(2))
        self.v, self.b = nn.Parameter(torch.randn(2, 2, d)), nn.Parameter(torch.randn(2, 2, d))
        self.head = nn.Linear(d, 2)

    def forward(self, x):
        x = self.embed(x)
        for w, v, b in zip(self.w, self.v, self.b, strict=True):
            c, states = torch.zeros_like(x[:, 0]), []
            for t in range(x.shape[1]):
                u, f, r = w(x[:, t]).chunk(3, -1)
                f, r = torch.sigmoid(f + v[0] * c + b[0]), torch.sigmoid(r + v[1] * c + b[1])
                c = f * c + (1 - f) * u
                states.append(r * c + (1 - r) * x[:, t])
            x = torch.stack(states, 1)
        return self.head(x[:, -1])


class MinGRU(nn.Module):
    """Gates from the input only, scanned in logarithms' place by a loop; two layers with RMS norms."""

    def __init__(self, d=3, h=4):
        super().__init__()
        self.embed, self.n1, self.last = nn.Linear(2, d), RMSNorm(d), RMSNorm(d)
        self.z, self.h, self.down = nn.Linear(d, h), nn.Linear(d, h), nn.Linear(h, d, bias=False)
        self.head = nn.Linear(d, 2)

    def forward(self, x):
        x = self.embed(x)
        y = self.n1(x)
        z, new = self.z(y).sigmoid(), self.h(y)
        new = torch.where(new >= 0, new + 0.5, new.sigmoid())
        state, states = torch.zeros_like(new[:, 0]), []
        for t in range(x.shape[1]):
            state = (1 - z[:, t]) * state + z[:, t] * new[:, t]
            states.append(state)
        return self.head(self.last(x + self.down(torch.stack(states, 1))))


class DoRA(nn.Module):
    """A weight plus a low-rank term, its columns normalised, times magnitudes; all of it trained."""

    class Layer(nn.Linear):
        def __init__(self, i, o, r=2):
            super().__init__(i, o)
            self.a, self.b = nn.Parameter(torch.randn(r, i)), nn.Parameter(torch.randn(o, r))
            self.m = nn.Parameter(torch.rand(o) + 0.5)
            self.weight.requires_grad_(False)

        def forward(self, x):
            w = self.weight + 0.5 * self.b @ self.a
            return F.linear(x, (self.m / w.norm(dim=1))[:, None] * w, self.bias)

    def __init__(self):
        super().__init__()
        self.one, self.two = self.Layer(5, 6), self.Layer(6, 4)

    def forward(self, x):
        return self.two(F.gelu(self.one(x)))


class KAN(nn.Module):
    """Each edge its own function: a SiLU and B-splines, two layers."""

    class Layer(nn.Module):
        def __init__(self, i, o, k=4):
            super().__init__()
            self.base, self.scale = nn.Parameter(torch.randn(o, i)), nn.Parameter(torch.randn(o, i))
            self.coef = nn.Parameter(torch.randn(o, i, k + 3))
            self.register_buffer("grid", torch.arange(-3.0, k + 4) * (6 / k) - 3)

        def splines(self, x):
            x, g = x[..., None], self.grid
            b = ((x >= g[:-1]) & (x < g[1:])).to(x.dtype)
            for k in range(1, 4):
                left = (x - g[: -k - 1]) / (g[k:-1] - g[: -k - 1])
                b = left * b[..., :-1] + (g[k + 1 :] - x) / (g[k + 1 :] - g[1:-k]) * b[..., 1:]
            return b

        def forward(self, x):
            curves = torch.einsum("bik,oik->boi", self.splines(x), self.coef)
            return (self.base * F.silu(x)[:, None] + self.scale * curves).sum(-1)

    def __init__(self):
        super().__init__()
        self.one, self.two = self.Layer(3, 3), self.Layer(3, 2)

    def forward(self, x):
        return self.two(self.one(x))


class GIN(nn.Module):
    """Sums over edges by index_add, a learnt epsilon, batch norms; all layers read out."""

    def __init__(self, d=4):
        super().__init__()
        self.eps = nn.Parameter(torch.zeros(2))
        sizes = [(3, d), (d, d)]
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(i, 5), nn.BatchNorm1d(5), nn.LeakyReLU(), nn.Linear(5, o)) for i, o in sizes
        )
        self.norms, self.heads = nn.ModuleList(nn.BatchNorm1d(d) for _ in sizes), nn.ModuleList()
        self.heads.extend(nn.Linear(i, 2) for i in (3, d, d))
        self.register_buffer("edges", torch.tensor([[0, 1, 1, 2, 2, 3, 3, 0, 4, 0], [1, 0, 2, 1, 3, 2, 0, 3, 0, 4]]))

    def forward(self, x):
        b, n, _ = x.shape
        y = self.heads[0](x.sum(1))
        for eps, mlp, norm, head in zip(self.eps, self.mlps, self.norms, self.heads[1:], strict=True):
            source, target = self.edges
            gathered = torch.zeros_like(x).index_add(1, target, x[:, source])
            x = mlp(((1 + eps) * x + gathered).flatten(0, 1))
            x = F.leaky_relu(norm(x)).view(b, n, -1)
            y = y + head(x.sum(1))
        return y


class EdgeNetwork(nn.Module):
    """Messages are matrices that a network makes of each edge; a GRU cell updates; twice, with shared weights."""

    def __init__(self, d=3):
        super().__init__()
        self.d, self.inp = d, nn.Linear(4, d)
        self.edge, self.bias = (
            nn.Sequential(nn.Linear(2, 4), nn.GELU(), nn.Linear(4, d * d)),
            nn.Parameter(torch.randn(d)),
        )
        self.cell, self.gate, self.value = nn.GRUCell(d, d), nn.Linear(d + 4, 3), nn.Linear(d, 3)

    def forward(self, x, e):
        b, n, _ = x.shape
        h = self.inp(x).tanh()
        a = self.edge(e).view(b, n, n, self.d, self.d)
        for _ in range(2):
            m = torch.einsum("bijkl,bjl->bik", a, h) + self.bias
            h = self.cell(F.leaky_relu(m).flatten(0, 1), h.flatten(0, 1)).view(b, n, -1)
        return (self.gate(torch.cat([h, x], -1)).sigmoid() * self.value(h)).sum(1)


class SAGE(nn.Module):
    """Means over neighbours; each layer's output on the unit sphere."""

    def __init__(self, d=4):
        super().__init__()
        self.l1, self.r1 = nn.Linear(3, d), nn.Linear(3, d, bias=False)
        self.l2, self.r2 = nn.Linear(d, d), nn.Linear(d, d, bias=False)
        self.head = nn.Linear(d, 2)
        self.register_buffer("mean", torch.tensor([[0.0, 1, 1, 0], [1, 0, 0, 0], [1, 0, 0, 1], [0, 0, 1, 0]]))

    def forward(self, x):
        a = self.mean.to(x.dtype)
        a = a / a.sum(1, keepdim=True)
        x = F.gelu(F.normalize(self.l1(a @ x) + self.r1(x), dim=-1))
        x = F.normalize(self.l2(a @ x) + self.r2(x), dim=-1)
        return self.head(x)


class EGNN(nn.Module):
    """Messages of squared distances; coordinates move along differences, features beside them."""

    def __init__(self, d=3):
        super().__init__()
        self.inp = nn.Linear(4, d)
        self.message = nn.Sequential(nn.Linear(2 * d + 1, 4), nn.SiLU(), nn.Linear(4, 4), nn.SiLU())
        self.move = nn.Sequential(nn.Linear(4, 4), nn.SiLU(), nn.Linear(4, 1, bias=False))
        self.node = nn.Sequential(nn.Linear(d + 4, 5), nn.SiLU(), nn.Linear(5, d))
        self.attend, self.head = nn.Sequential(nn.Linear(4, 1), nn.Sigmoid()), nn.Linear(d, 1)

    def forward(self, h, x):
        n = h.shape[1]
        h = self.inp(h)
        between = x[:, :, None] - x[:, None]
        square = between.square().sum(-1, keepdim=True)
        pairs = [h[:, :, None].expand(-1, -1, n, -1), h[:, None].expand(-1, n, -1, -1), square]
        m = self.message(torch.cat(pairs, -1))
        m = m * self.attend(m)
        x = x + (between / (square + 1e-8).sqrt() * self.move(m)).mean(2)
        h = h + self.node(torch.cat([h, m.sum(2)], -1))
        return self.head(h), x


class SoftActorCritic(nn.Module):
    """A squashed policy and two critics on one trunk with a layer norm."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh())
        self.actor = nn.Sequential(nn.Linear(5, 5), nn.ELU(), nn.Linear(5, 4))
        self.q = nn.ModuleList(nn.Sequential(nn.Linear(7, 4), nn.ELU(), nn.Linear(4, 1)) for _ in range(2))

    def forward(self, s, a):
        z = self.trunk(s)
        mean, log_std = self.actor(z).chunk(2, -1)
        log_std = -5 + 0.5 * 7 * (log_std.tanh() + 1)
        return mean.tanh(), log_std, *(q(torch.cat([z, a], -1)) for q in self.q)


class MixtureDensity(nn.Module):
    """Weights, means and deviations of three Gaussians; the log-likelihood of a target."""

    def __init__(self):
        super().__init__()
        self.body, self.pi, self.mu, self.sigma = nn.Linear(3, 5), nn.Linear(5, 3), nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, x, y):
        h = self.body(x).tanh()
        sigma = F.elu(self.sigma(h)) + 1 + 1e-6
        z = (y - self.mu(h)) / sigma
        return (self.pi(h).log_softmax(-1) - sigma.log() - 0.5 * z.square()).logsumexp(-1)


class DeepFM(nn.Module):
    """Linear terms, pairs of factors and a deep part over the same embeddings."""

    def __init__(self, fields=3, size=5, k=2):
        super().__init__()
        self.w, self.v = nn.Embedding(fields * size, 1), nn.Embedding(fields * size, k)
        self.bias, self.size = nn.Parameter(torch.randn(1)), size
        self.deep = nn.Sequential(nn.Linear(fields * k, 4), nn.GELU(), nn.Linear(4, 1))

    def forward(self, x):
        x = x + self.size * torch.arange(x.shape[1])
        e = self.v(x)
        pairs = 0.5 * (e.sum(1).square() - e.square().sum(1)).sum(1, keepdim=True)
        return (self.bias + self.w(x).sum(1) + pairs + self.deep(e.flatten(1))).sigmoid()


class DLRM(nn.Module):
    """A bottom network, embeddings, all their dot products, a top network."""

    def __init__(self, k=3):
        super().__init__()
        self.bottom = nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, k))
        self.tables = nn.ModuleList(nn.Embedding(4, k) for _ in range(2))
        self.top = nn.Sequential(nn.Linear(k + 3, 4), nn.GELU(), nn.Linear(4, 1))
        self.register_buffer("pairs", torch.tril_indices(3, 3, -1))

    def forward(self, x, c):
        x = self.bottom(x)
        z = torch.stack([x, *(t(c[:, i]) for i, t in enumerate(self.tables))], 1)
        dots = (z @ z.transpose(1, 2))[:, self.pairs[0], self.pairs[1]]
        return self.top(torch.cat([x, dots], 1))


class TwoTower(nn.Module):
    """Cosines of two towers times a temperature."""

    def __init__(self):
        super().__init__()
        self.user = nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 3))
        self.words, self.item, self.logit = nn.Embedding(9, 4), nn.Linear(4, 3), nn.Parameter(torch.tensor(1.0))

    def forward(self, x, items):
        u = F.normalize(self.user(x), dim=-1)
        i = F.normalize(self.item(self.words(items).mean(1)), dim=-1)
        return self.logit.exp() * u @ i.T


class Prototypes(nn.Module):
    """Minus the squared distances of queries to the means of a support set."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 3))

    def forward(self, support, query):
        means = self.net(support).mean(2)
        return -(self.net(query)[:, :, None] - means[:, None]).square().sum(-1)


class Projector(nn.Module):
    """SimCLR: an encoder, a projector with batch norm, cosines between all pairs."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 4))
        self.project = nn.Sequential(nn.Linear(4, 5, bias=False), nn.BatchNorm1d(5), nn.LeakyReLU(), nn.Linear(5, 3))

    def forward(self, x):
        z = F.normalize(self.project(self.encoder(x)), dim=1)
        return z @ z.T / 0.5


class Bilinear(nn.Module):
    """Low-rank bilinear pooling of two inputs; then the outer product, signed root, normalised."""

    def __init__(self):
        super().__init__()
        self.u, self.v, self.p = nn.Linear(4, 4, bias=False), nn.Linear(3, 4, bias=False), nn.Linear(4, 3)
        self.a, self.b, self.head = nn.Linear(3, 2, bias=False), nn.Linear(3, 2, bias=False), nn.Linear(4, 2)

    def forward(self, x, y):
        z = F.gelu(self.p(self.u(x) * self.v(y)))
        outer = torch.einsum("bi,bj->bij", self.a(z), self.b(z)).flatten(1)
        return self.head(F.normalize(outer, dim=1))


class Chain(nn.Module):
    """Recurrent tagger with a conditional random field: the log-partition and the score of one tagging."""

    def __init__(self, tags=3):
        super().__init__()
        self.words, self.lstm = nn.Embedding(9, 3), nn.GRU(3, 2, batch_first=True, bidirectional=True)
        self.emit, self.move = nn.Linear(4, tags), nn.Parameter(torch.randn(tags, tags))
        self.start, self.end = nn.Parameter(torch.randn(tags)), nn.Parameter(torch.randn(tags))

    def forward(self, words, tags):
        e = self.emit(self.lstm(self.words(words))[0])
        score, alpha = self.start[tags[:, 0]] + e[:, 0].gather(1, tags[:, :1])[:, 0], self.start + e[:, 0]
        for t in range(1, words.shape[1]):
            score = score + self.move[tags[:, t - 1], tags[:, t]] + e[:, t].gather(1, tags[:, t : t + 1])[:, 0]
            alpha = (alpha[:, :, None] + self.move + e[:, t, None]).logsumexp(1)
        return score + self.end[tags[:, -1]] - (alpha + self.end).logsumexp(1)


class Glow(nn.Module):
    """Act norm, an invertible mixing, an affine coupling; twice; and the logarithm of the determinant."""

    def __init__(self, d=4):
        super().__init__()
        self.loc, self.scale = nn.Parameter(torch.randn(2, d)), nn.Parameter(torch.randn(2, d))
        self.mix = nn.Parameter(torch.linalg.qr(torch.randn(2, d, d))[0])
        self.nets = nn.ModuleList(nn.Sequential(nn.Linear(2, 4), nn.GELU(), nn.Linear(4, 4)) for _ in range(2))

    def forward(self, x):
        log = x.new_zeros(len(x))
        for loc, scale, mix, net in zip(self.loc, self.scale, self.mix, self.nets, strict=True):
            x = (x + loc) * scale.exp()
            x = x @ mix
            log = log + scale.sum() + torch.linalg.slogdet(mix)[1]
            a, b = x.chunk(2, -1)
            s, t = net(a).chunk(2, -1)
            s = (s + 2).sigmoid()
            x, log = torch.cat([a, b * s + t], -1), log + s.log().sum(-1)
        return x, log


class NBeats(nn.Module):
    """Backcasts are taken off, forecasts are summed; two blocks, the second with fixed waves."""

    def __init__(self, back=5, ahead=3, h=4):
        super().__init__()
        self.fc = nn.ModuleList(
            nn.Sequential(nn.Linear(back, h), nn.GELU(), nn.Linear(h, h), nn.GELU()) for _ in range(2)
        )
        self.tb, self.tf = nn.Linear(h, 2, bias=False), nn.Linear(h, 2, bias=False)
        self.backcast, self.forecast = nn.Linear(2, back, bias=False), nn.Linear(2, ahead, bias=False)
        self.waves, self.n = nn.Linear(h, 3, bias=False), (back, ahead)

    def forward(self, x):
        h = self.fc[0](x)
        x, y = x - self.backcast(self.tb(h)), self.forecast(self.tf(h))
        t = torch.arange(sum(self.n), dtype=x.dtype) / sum(self.n)
        basis = torch.stack([t**0, (6 * t).cos(), (6 * t).sin()])
        theta = self.waves(self.fc[1](x)) @ basis
        return x - theta[:, : self.n[0]], y + theta[:, self.n[0] :]


class ComplEx(nn.Module):
    """Triples scored by products of complex embeddings; beside them TransE's distances."""

    def __init__(self, k=2):
        super().__init__()
        self.entity, self.relation = nn.Embedding(5, 2 * k), nn.Embedding(3, 2 * k)
        self.place, self.shift = nn.Embedding(5, 3), nn.Embedding(3, 3)

    def forward(self, s, r, o):
        (a, b), (c, d), (e, f) = (
            m(i).chunk(2, -1) for m, i in ((self.entity, s), (self.relation, r), (self.entity, o))
        )
        product = (a * c * e + b * c * f + a * d * f - b * d * e).sum(-1)
        return product, (self.place(s) + self.shift(r) - self.place(o)).norm(dim=-1)


class Interest(nn.Module):
    """Deep interest network: a candidate asks a history, with differences and products, no softmax."""

    def __init__(self, d=3):
        super().__init__()
        self.items, self.a, self.b = nn.Embedding(9, d), nn.Linear(4 * d, 4), nn.Linear(4, 1)
        self.alpha, self.fc, self.out = nn.Parameter(torch.rand(4)), nn.Linear(2 * d, 4), nn.Linear(4, 1)

    def forward(self, history, candidate):
        h, c = self.items(history), self.items(candidate)
        q = c[:, None].expand_as(h)
        w = self.b(self.a(torch.cat([q, h, q - h, q * h], -1)).sigmoid())
        return self.out(F.prelu(self.fc(torch.cat([(w * h).sum(1), c], -1)), self.alpha))


STEPS = torch.arange(28).reshape(7, 4)
RELATIVE = "mixings of queries, keys and positions beside biases of the queries, 4"
UNUSED = "rows of a table that no distance asks for"
ROUNDED = "lengths of rows of a table in front of a norm, but for the number under its root"
PAIR = "turns and scales of the one pair of numbers in a key that all heads share"
RETAINED = (
    "a scale of queries and values in front of a norm, 2, and one that is exact but for the number under the root, 2"
)
ENTRIES = "a number for each pair of entries of two axes"
WRITTEN = "scales of what is multiplied by matrices that the network writes"
FIELDS = "shifts and scales of one of several tables that meet in products"
OUTER = "a rotation of one of two factors whose outer product is read"
PARTITION = "shifts of scores that their partition function has as well"
EXPONENTIAL = "a scale that is the exponential of a weight"
PHASES = "phases of complex numbers that are written as pairs"
DEPENDENT = "readers of several parts side by side, one of which is a difference of others"
PUBLISHED = PICTURES | {
    "Transformer-XL": Family(
        lambda: Language([RelativeXL()], nn.Identity()), (TOKENS,), rest=4 + 1, why=f"{RELATIVE}; {INVERSE}, 1"
    ),
    "T5": Family(T5, (TOKENS,), rest=2, why=UNUSED),
    "Bloom": Family(lambda: Language([nn.LayerNorm(D), Bloom()], nn.LayerNorm(D)), (TOKENS,), rest=10, why=ROUNDED),
    "latent attention": Family(lambda: Language([Latent()], RMSNorm(6), 6), (TOKENS,)),
    "NeoX": Family(lambda: Language([NeoX()], nn.LayerNorm(D), words=24), (STEPS[:6] % 24,)),
    "Falcon": Family(
        lambda: Language([NeoX(one=True)], nn.LayerNorm(D), words=24), (STEPS[:6] % 24,), rest=2, why=PAIR
    ),
    "Gemma 2": Family(Gemma, (TOKENS,)),
    "Mamba": Family(lambda: nn.Sequential(nn.Linear(2, 3), Mamba(), RMSNorm(3), nn.Linear(3, 2)), (_x(2, 5, 2),)),
    "RetNet": Family(lambda: Language([RetNet(8)], nn.LayerNorm(8), 8), (TOKENS,), rest=4, why=RETAINED),
    "Hyena": Family(Hyena, (_x(2, 28, 4),)),
    "SRU": Family(SRU, (_x(2, 4, 5),)),
    "minimal GRU": Family(MinGRU, (_x(2, 4, 2),)),
    "DoRA": Family(DoRA, (_x(7, 5),)),
    "Kolmogorov-Arnold": Family(KAN, (_x(7, 3),), seed=1, rest=6, why=ENTRIES),
    "GIN": Family(GIN, (_x(2, 5, 3),)),
    "edge network": Family(EdgeNetwork, (_x(2, 4, 4), _x(2, 4, 4, 2)), rest=3, why=WRITTEN),
    "GraphSAGE": Family(SAGE, (_x(2, 4, 3),)),
    "EGNN": Family(EGNN, (_x(2, 4, 4), _x(2, 4, 3))),
    "soft actor-critic": Family(SoftActorCritic, (_x(7, 4), _x(7, 2))),
    "mixture density": Family(MixtureDensity, (_x(7, 3), _x(7, 1))),
    "DeepFM": Family(DeepFM, (STEPS[:, :3] % 5,), rest=8, why=FIELDS),
    "DLRM": Family(DLRM, (_x(7, 4), torch.arange(8)[:7, None].add(torch.arange(2)) % 4), rest=3, why=FIELDS),
    "two towers": Family(TwoTower, (_x(7, 4), STEPS % 9)),
    "prototypes": Family(Prototypes, (_x(2, 3, 2, 4), _x(2, 4, 4))),
    "contrastive projector": Family(Projector, (_x(7, 4),)),
    "bilinear pooling": Family(Bilinear, (_x(7, 4), _x(7, 3)), rest=1, why=OUTER),
    "conditional random field": Family(Chain, (STEPS % 9, STEPS % 3), rest=4, why=PARTITION),
    "Glow": Family(Glow, (_x(7, 4),), rest=18, why=EXPONENTIAL),
    "N-BEATS": Family(NBeats, (_x(7, 5),)),
    "knowledge graph": Family(ComplEx, (STEPS[:, 0] % 5, STEPS[:, 1] % 3, STEPS[:, 3] % 5), rest=2, why=PHASES),
    "deep interest": Family(Interest, (STEPS % 9, STEPS[:, 1] % 9), rest=12, why=DEPENDENT),
}
