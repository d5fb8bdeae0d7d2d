"""More models that were written after the finder, before it was run on any; 68% was found of them at first sight."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from completeness import Family, _x
from torch import nn
from unseen_families import ONE_SIDED


class StandardisedConv(nn.Conv2d):
    """Each filter has mean zero and variance one."""

    def forward(self, x):
        w = self.weight
        w = w - w.mean((1, 2, 3), keepdim=True)
        w = w / (w.var((1, 2, 3), keepdim=True, unbiased=False) + 1e-8).sqrt()
        return F.conv2d(x, w, self.bias, self.stride, self.padding)


class BigTransfer(nn.Module):
    """Residual block of weight-standardised convolutions and group norms, in front of the activation."""

    def __init__(self, c=4):
        super().__init__()
        self.root = StandardisedConv(2, c, 3, padding=1)
        self.n1, self.n2, self.last = (nn.GroupNorm(2, c) for _ in range(3))
        self.c1 = StandardisedConv(c, c, 3, padding=1, bias=False)
        self.c2 = StandardisedConv(c, c, 3, padding=1, bias=False)
        self.head = nn.Linear(c, 3)

    def forward(self, x):
        x = self.root(x)
        h = self.c1(F.leaky_relu(self.n1(x)))
        x = x + self.c2(F.leaky_relu(self.n2(h)))
        return self.head(F.leaky_relu(self.last(x)).mean((2, 3)))


class Maxout(nn.Module):
    """Two layers of maxima over three pieces each."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 5 * 3), nn.Linear(5, 4 * 3), nn.Linear(4, 2)

    def forward(self, x):
        x = self.a(x).unflatten(-1, (5, 3)).amax(-1)
        x = self.b(x).unflatten(-1, (4, 3)).amax(-1)
        return self.c(x)


class SuperResolution(nn.Module):
    """Residual blocks with scaled branches, a long skip, and a pixel shuffle."""

    def __init__(self, c=3):
        super().__init__()
        self.head = nn.Conv2d(1, c, 3, padding=1)
        self.body = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, 4, 3, padding=1), nn.PReLU(), nn.Conv2d(4, c, 3, padding=1)) for _ in range(2)
        )
        self.tail = nn.Conv2d(c, c, 3, padding=1)
        self.up = nn.Conv2d(c, 2 * 4, 3, padding=1)
        self.shuffle = nn.PixelShuffle(2)
        self.last = nn.Conv2d(2, 1, 3, padding=1)

    def forward(self, x):
        x = y = self.head(x)
        for block in self.body:
            y = y + 0.1 * block(y)
        x = x + self.tail(y)
        return self.last(F.leaky_relu(self.shuffle(self.up(x))))


class ResidualGLU(nn.Module):
    """Residual gated layers without norms, ReGLU and GEGLU, and few classes."""

    def __init__(self, d=6, h=5):
        super().__init__()
        self.first = nn.Linear(8, d)
        self.w, self.v = nn.Linear(d, 2 * h), nn.Linear(d, 2 * h, bias=False)
        self.o, self.u = nn.Linear(h, d), nn.Linear(h, d)
        self.head = nn.Linear(d, 3)

    def forward(self, x):
        x = self.first(x)
        a, b = self.w(x).chunk(2, -1)
        x = x + self.o(F.leaky_relu(a) * b)
        a, b = self.v(x).chunk(2, -1)
        x = x + self.u(F.gelu(a) * b)
        return self.head(x)


class MatrixMemory(nn.Module):
    """A recurrent cell with a matrix as state, exponential gates and a normaliser (mLSTM)."""

    def __init__(self, d=4, k=3):
        super().__init__()
        self.norm = nn.LayerNorm(d)
        self.q, self.k, self.v = nn.Linear(d, k), nn.Linear(d, k), nn.Linear(d, k)
        self.gates = nn.Linear(d, 2)
        self.o = nn.Linear(d, k)
        self.out = nn.Linear(k, d)
        self.head = nn.Linear(d, 5)

    def forward(self, x):
        y = self.norm(x)
        q, k, v = self.q(y), self.k(y) / 3**0.5, self.v(y)
        i, f = self.gates(y).unbind(-1)
        i, f = i.exp(), f.sigmoid()
        memory, total, out = x.new_zeros(len(x), 3, 3), x.new_zeros(len(x), 3), []
        for t in range(x.shape[1]):
            memory = f[:, t, None, None] * memory + i[:, t, None, None] * v[:, t, :, None] * k[:, t, None, :]
            total = f[:, t, None] * total + i[:, t, None] * k[:, t]
            h = (memory @ q[:, t, :, None])[..., 0] / (total * q[:, t]).sum(-1, keepdim=True).abs().clamp(min=1.0)
            out.append(h)
        x = x + self.out(self.o(y).sigmoid() * torch.stack(out, 1))
        return self.head(x)


class Equivariant(nn.Module):
    """A layer of an E(n)-equivariant graph network on a complete graph, twice, with positions that move."""

    def __init__(self, d=3, h=5):
        super().__init__()
        self.embed = nn.Linear(2, d)
        self.edge, self.node, self.place = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for _ in range(2):
            self.edge.append(nn.Sequential(nn.Linear(2 * d + 1, h), nn.SiLU(), nn.Linear(h, h), nn.SiLU()))
            self.place.append(nn.Sequential(nn.Linear(h, 4), nn.SiLU(), nn.Linear(4, 1, bias=False)))
            self.node.append(nn.Sequential(nn.Linear(d + h, h), nn.SiLU(), nn.Linear(h, d)))
        self.head = nn.Linear(d, 2)

    def forward(self, x, p):
        x = self.embed(x)
        n = x.shape[1]
        for edge, node, place in zip(self.edge, self.node, self.place, strict=True):
            d = p[:, :, None] - p[:, None]
            pairs = [x[:, :, None].expand(-1, n, n, -1), x[:, None].expand(-1, n, n, -1), d.square().sum(-1, True)]
            m = edge(torch.cat(pairs, -1))
            p = p + (d * place(m)).mean(2)
            x = x + node(torch.cat([x, m.sum(2)], -1))
        return self.head(x.sum(1)), p


class DeepONet(nn.Module):
    """A branch and a trunk, multiplied and summed, and a bias."""

    def __init__(self, k=4):
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(6, 5), nn.LeakyReLU(), nn.Linear(5, k))
        self.trunk = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, k))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, u, y):
        return torch.einsum("bk,bk->b", self.branch(u), self.trunk(y)) + self.bias


class Recommender(nn.Module):
    """Users and items: factors, biases, and a tower of both beside them."""

    def __init__(self, d=3):
        super().__init__()
        self.user, self.item = nn.Embedding(30, d), nn.Embedding(20, d)
        self.ub, self.ib = nn.Embedding(30, 1), nn.Embedding(20, 1)
        self.mean = nn.Parameter(torch.zeros(1))
        self.u2, self.i2 = nn.Embedding(30, 2), nn.Embedding(20, 2)
        self.tower = nn.Sequential(nn.Linear(4, 5), nn.LeakyReLU(), nn.Linear(5, 1))

    def forward(self, u, i):
        score = (self.user(u) * self.item(i)).sum(-1) + self.ub(u)[..., 0] + self.ib(i)[..., 0] + self.mean
        return score + self.tower(torch.cat([self.u2(u), self.i2(i)], -1))[..., 0]


class Listener(nn.Module):
    """A GRU reads, a GRU cell writes, and looks back by additive attention."""

    def __init__(self, h=4, a=3):
        super().__init__()
        self.reader = nn.GRU(3, h, batch_first=True, bidirectional=True)
        self.bridge = nn.Linear(2 * h, h)
        self.keys, self.ask, self.score = nn.Linear(2 * h, a, bias=False), nn.Linear(h, a), nn.Linear(a, 1)
        self.cell = nn.GRUCell(2 * h + 2, h)
        self.out = nn.Linear(h + 2 * h, 3)

    def forward(self, x, y):
        seen, _ = self.reader(x)
        state, keys, out = torch.tanh(self.bridge(seen[:, -1])), self.keys(seen), []
        for t in range(y.shape[1]):
            w = self.score(torch.tanh(keys + self.ask(state)[:, None])).softmax(1)
            context = (w * seen).sum(1)
            state = self.cell(torch.cat([context, y[:, t]], -1), state)
            out.append(self.out(torch.cat([state, context], -1)))
        return torch.stack(out, 1)


class ConvLSTM(nn.Module):
    """Gates by convolution, over three frames, then a transposed convolution."""

    def __init__(self, c=3):
        super().__init__()
        self.c = c
        self.enc = nn.Conv2d(1, 2, 3, stride=2, padding=1)
        self.gates = nn.Conv2d(2 + c, 4 * c, 3, padding=1)
        self.dec = nn.ConvTranspose2d(c, 2, 2, stride=2)
        self.last = nn.Conv2d(2, 1, 1)

    def forward(self, x):
        h = c = x.new_zeros(len(x), self.c, x.shape[-2] // 2, x.shape[-1] // 2)
        for t in range(x.shape[1]):
            z = F.leaky_relu(self.enc(x[:, t]))
            i, f, o, g = self.gates(torch.cat([z, h], 1)).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        return self.last(F.leaky_relu(self.dec(h)))


class Sparse(nn.Module):
    """Experts in a list, of which each token visits two, in a residual layer."""

    def __init__(self, d=4, e=3):
        super().__init__()
        self.first = nn.Linear(5, d)
        self.norm = nn.LayerNorm(d)
        self.router = nn.Linear(d, e)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(d, 5), nn.LeakyReLU(), nn.Linear(5, d)) for _ in range(e))
        self.head = nn.Linear(d, 3)

    def forward(self, x):
        x = self.first(x)
        y = self.norm(x)
        top, at = self.router(y).topk(2, -1)
        gate, out = top.softmax(-1), torch.zeros_like(x)
        for k, expert in enumerate(self.experts):
            row, slot = torch.where(at == k)
            out[row] = out[row] + gate[row, slot, None] * expert(y[row])
        return self.head(x + out)


class Universal(nn.Module):
    """One block, applied three times, with an embedding of the step."""

    def __init__(self, d=4):
        super().__init__()
        self.first = nn.Linear(5, d)
        self.step = nn.Parameter(torch.randn(3, d) * 0.3)
        self.block = nn.TransformerEncoderLayer(d, 2, 6, 0.0, "gelu", batch_first=True, norm_first=True)
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, 3)

    def forward(self, x):
        x = self.first(x)
        for s in self.step:
            x = self.block(x + s)
        return self.head(self.norm(x))


TOLERATED = "lengths of filters that are standardised, but for the number under the root"
PIECES = "a piece that is the largest for few of the inputs counted on; with five times as many it is not free"
EXPONENT = "a shift under an exponential gate, which queries take back"
COUNTED = "a shift that is added once a node, so that it depends on their number"
FACTORS = "a direction of one item's factors, along which no neuron switches for any user"
INDICES = torch.arange(60)  # of all users, and of all items

FURTHER: dict[str, Family] = {
    "weight-standardised ResNet": Family(BigTransfer, (_x(2, 2, 5, 5),), rest=5, why=TOLERATED),
    "maxout": Family(Maxout, (_x(7, 4),), rest=5, why=PIECES),
    "super-resolution": Family(SuperResolution, (_x(2, 1, 5, 5),)),
    "residual gated layers": Family(ResidualGLU, (_x(7, 8),)),
    "mLSTM": Family(MatrixMemory, (_x(2, 5, 4),), rest=1, why=EXPONENT),
    "E(n)-equivariant network": Family(Equivariant, (_x(2, 4, 2), _x(2, 4, 3)), rest=2, why=COUNTED),
    "DeepONet": Family(DeepONet, (_x(7, 6), _x(7, 2))),
    "recommender": Family(Recommender, (INDICES % 30, INDICES % 20), rest=1, why=FACTORS),
    "seq2seq, additive attention": Family(Listener, (_x(2, 5, 3), _x(2, 4, 2))),
    "ConvLSTM": Family(ConvLSTM, (_x(2, 3, 1, 6, 6),), rest=14, why=ONE_SIDED),
    "mixture of experts in a list": Family(Sparse, (_x(9, 5),), rest=4, why=ONE_SIDED),
    "universal transformer": Family(Universal, (_x(2, 5, 5),)),
}
