"""Models that were written after the finder, of kinds that no other table has; 80% was found of them at first sight."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from completeness import Family, _x
from torch import nn


class Performer(nn.Module):
    """Linear attention with elu + 1 features, two heads."""

    def __init__(self, d=6, h=2):
        super().__init__()
        self.h = h
        self.embed = nn.Linear(5, d)
        self.n1 = nn.LayerNorm(d)
        self.n2 = nn.LayerNorm(d)
        self.qkv = nn.Linear(d, 3 * d, bias=False)
        self.out = nn.Linear(d, d)
        self.ff = nn.Sequential(nn.Linear(d, 7), nn.GELU(), nn.Linear(7, d))
        self.head = nn.Linear(d, 3)

    def forward(self, x):
        x = self.embed(x)
        b, n, d = x.shape
        q, k, v = (t.view(b, n, self.h, -1).transpose(1, 2) for t in self.qkv(self.n1(x)).chunk(3, -1))
        q, k = F.elu(q) + 1, F.elu(k) + 1
        kv = torch.einsum("bhnd,bhne->bhde", k, v)
        z = 1 / torch.einsum("bhnd,bhd->bhn", q, k.sum(2))
        y = torch.einsum("bhnd,bhde,bhn->bhne", q, kv, z).transpose(1, 2).reshape(b, n, d)
        x = x + self.out(y)
        x = x + self.ff(self.n2(x))
        return self.head(x.mean(1))


class S4D(nn.Module):
    """Diagonal state space, a convolution by Fourier transforms."""

    def __init__(self, d=3, n=2):
        super().__init__()
        self.enc = nn.Linear(4, d)
        self.logdt = nn.Parameter(torch.randn(d) * 0.1 - 1)
        self.logA = nn.Parameter(torch.randn(d, n) * 0.2)
        self.C = nn.Parameter(torch.randn(d, n))
        self.D = nn.Parameter(torch.randn(d))
        self.out = nn.Linear(d, 2 * d)
        self.norm = nn.LayerNorm(d)
        self.head = nn.Linear(d, 2)

    def forward(self, x):
        u = self.enc(x).transpose(1, 2)
        L = u.shape[-1]
        dt = self.logdt.exp()[:, None]
        A = -self.logA.exp()
        K = (
            (self.C * (1 - (A * dt).exp()) / A)[..., None]
            * torch.exp(A[..., None] * dt[..., None] * torch.arange(L).to(x))
        ).sum(1)
        n = 2 * L
        y = torch.fft.irfft(torch.fft.rfft(u, n=n) * torch.fft.rfft(K, n=n), n=n)[..., :L]
        y = F.gelu(y + u * self.D[:, None]).transpose(1, 2)
        y = F.glu(self.out(y), -1)
        return self.head(self.norm(y + u.transpose(1, 2)).mean(1))


class PointNet(nn.Module):
    """A small T-net aligns the points; shared MLP; max over points."""

    def __init__(self):
        super().__init__()
        self.t1 = nn.Conv1d(3, 5, 1)
        self.t2 = nn.Linear(5, 9)
        self.c1 = nn.Conv1d(3, 5, 1)
        self.c2 = nn.Conv1d(5, 6, 1)
        self.f1 = nn.Linear(6, 5)
        self.f2 = nn.Linear(5, 3)

    def forward(self, x):
        x = x.transpose(1, 2)
        t = self.t2(F.leaky_relu(self.t1(x)).amax(-1)).view(-1, 3, 3) + torch.eye(3).to(x)
        x = torch.bmm(t, x)
        x = self.c2(F.leaky_relu(self.c1(x))).amax(-1)
        return self.f2(F.leaky_relu(self.f1(x)))


class Hyper(nn.Module):
    """A network writes the weights of another one."""

    def __init__(self):
        super().__init__()
        self.e = nn.Linear(3, 4)
        self.w = nn.Linear(4, 5 * 4)
        self.b = nn.Linear(4, 5)
        self.last = nn.Linear(5, 2)

    def forward(self, x, z):
        z = torch.tanh(self.e(z))
        w = self.w(z).view(-1, 5, 4)
        b = self.b(z)
        return self.last(F.leaky_relu(torch.einsum("boi,bi->bo", w, x) + b))


class Capsules(nn.Module):
    """Two rounds of routing by agreement."""

    def __init__(self, i=4, o=3, d=3, e=2):
        super().__init__()
        self.prim = nn.Linear(6, i * d)
        self.i = i
        self.W = nn.Parameter(torch.randn(i, o, d, e))
        self.dec = nn.Linear(o * e, 4)

    @staticmethod
    def squash(v):
        n = v.square().sum(-1, keepdim=True)
        return n / (1 + n) * v / (n + 1e-8).sqrt()

    def forward(self, x):
        u = self.squash(self.prim(x).view(len(x), self.i, -1))
        hat = torch.einsum("bid,iode->bioe", u, self.W)
        b = torch.zeros_like(hat[..., 0])
        for r in range(2):
            c = b.softmax(2)
            v = self.squash((c[..., None] * hat).sum(1))
            if r < 1:
                b = b + (hat * v[:, None]).sum(-1)
        return self.dec(v.flatten(1)), v.norm(dim=-1)


class WaveNet(nn.Module):
    """Gated dilated causal convolutions, with residual and skip."""

    def __init__(self, c=3, k=4):
        super().__init__()
        self.first = nn.Conv1d(2, c, 1)
        self.f = nn.ModuleList(nn.Conv1d(c, c, 2, dilation=2**i) for i in range(2))
        self.g = nn.ModuleList(nn.Conv1d(c, c, 2, dilation=2**i) for i in range(2))
        self.r = nn.ModuleList(nn.Conv1d(c, c, 1) for i in range(2))
        self.s = nn.ModuleList(nn.Conv1d(c, k, 1) for i in range(2))
        self.o1 = nn.Conv1d(k, 4, 1)
        self.o2 = nn.Conv1d(4, 3, 1)

    def forward(self, x):
        x = self.first(x)
        skip = 0
        for i, (f, g, r, k) in enumerate(zip(self.f, self.g, self.r, self.s, strict=True)):
            h = F.pad(x, (2**i, 0))
            h = torch.tanh(f(h)) * torch.sigmoid(g(h))
            skip = skip + k(h)
            x = x + r(h)
        return self.o2(F.leaky_relu(self.o1(F.leaky_relu(skip))))


class TCN(nn.Module):
    """Temporal blocks with weight-normed causal convolutions, chomps and a downsample."""

    def __init__(self):
        super().__init__()
        wn = nn.utils.parametrizations.weight_norm
        self.a = wn(nn.Conv1d(2, 4, 3, padding=2))
        self.b = wn(nn.Conv1d(4, 4, 3, padding=2))
        self.down = nn.Conv1d(2, 4, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        h = F.leaky_relu(self.a(x)[..., :-2])
        h = F.leaky_relu(self.b(h)[..., :-2])
        return self.head(F.leaky_relu(h + self.down(x))[..., -1])


class UViT(nn.Module):
    """Tokens with time; a long skip by concatenation."""

    def __init__(self, d=4):
        super().__init__()
        self.patch = nn.Conv2d(1, d, 3, 3)
        self.time = nn.Sequential(nn.Linear(2, 5), nn.SiLU(), nn.Linear(5, d))
        self.pos = nn.Parameter(torch.randn(1, 5, d) * 0.5)
        self.i, self.m, self.o = (
            nn.TransformerEncoderLayer(d, 2, 6, 0.0, "gelu", batch_first=True, norm_first=True) for _ in range(3)
        )
        self.skip = nn.Linear(2 * d, d)
        self.n = nn.LayerNorm(d)
        self.head = nn.Linear(d, 9)

    def forward(self, x, t):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.time(t)[:, None], x], 1) + self.pos
        a = self.i(x)
        x = self.o(self.skip(torch.cat([self.m(a), a], -1)))
        return self.head(self.n(x))[:, 1:]


class GATv2(nn.Module):
    """Graph attention with edge features on a complete graph, then a readout."""

    def __init__(self, d=4):
        super().__init__()
        self.l = nn.Linear(3, d)
        self.r = nn.Linear(3, d)
        self.e = nn.Linear(2, d, bias=False)
        self.att = nn.Parameter(torch.randn(d))
        self.bias = nn.Parameter(torch.randn(d) * 0.3)
        self.h = nn.Linear(d, 5)
        self.o = nn.Linear(5, 2)

    def forward(self, x, edge):
        a, r = self.l(x), self.r(x)
        w = (F.leaky_relu(a[:, None] + r[:, :, None] + self.e(edge), 0.2) * self.att).sum(-1).softmax(-1)
        x = F.elu(w @ a + self.bias)
        return self.o(F.leaky_relu(self.h(x)).sum(1))


class DeepSets(nn.Module):
    """Equivariant layers x -> Lx - G mean x, then a sum."""

    def __init__(self):
        super().__init__()
        self.g1 = nn.Linear(3, 5)
        self.l1 = nn.Linear(3, 5, bias=False)
        self.g2 = nn.Linear(5, 4)
        self.l2 = nn.Linear(5, 4, bias=False)
        self.rho = nn.Sequential(nn.Linear(4, 5), nn.LeakyReLU(), nn.Linear(5, 2))

    def forward(self, x):
        x = F.leaky_relu(self.g1(x) - self.l1(x.mean(1, keepdim=True)))
        x = F.leaky_relu(self.g2(x) - self.l2(x.amax(1, keepdim=True)))
        return self.rho(x.mean(1))


class RealNVP(nn.Module):
    """Two affine couplings, with the log-determinant returned."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (
            nn.Sequential(nn.Linear(2, 5), nn.LeakyReLU(), nn.Linear(5, 4), nn.LeakyReLU(), nn.Linear(4, 4))
            for _ in range(2)
        )
        self.scale = nn.Parameter(torch.randn(2))
        self.scale2 = nn.Parameter(torch.randn(2))

    def forward(self, x):
        a, b = x.chunk(2, -1)
        g, t = self.a(a).chunk(2, -1)
        g = torch.tanh(g) * self.scale
        b = b * g.exp() + t
        volume = g.sum(-1)
        g, t = self.b(b).chunk(2, -1)
        g = torch.tanh(g) * self.scale2
        a = a * g.exp() + t
        return torch.cat([a, b], -1), volume + g.sum(-1)


class DeepAR(nn.Module):
    """Embedding and covariates into an LSTM cell unrolled by hand; mean and scale heads."""

    def __init__(self, h=4):
        super().__init__()
        self.emb = nn.Embedding(5, 3)
        self.cell = nn.LSTMCell(1 + 2 + 3, h)
        self.mu = nn.Linear(2 * h, 1)
        self.sigma = nn.Linear(2 * h, 1)
        self.h = h
        self.cell2 = nn.LSTMCell(h, h)

    def forward(self, z, cov, idx):
        h = c = z.new_zeros(len(z), self.h)
        h2 = c2 = h
        out = []
        e = self.emb(idx)
        for t in range(z.shape[1]):
            h, c = self.cell(torch.cat([z[:, t, None], cov[:, t], e], -1), (h, c))
            h2, c2 = self.cell2(h, (h2, c2))
            y = torch.stack([h, h2], -1).flatten(1)
            out.append(torch.cat([self.mu(y), F.softplus(self.sigma(y))], -1))
        return torch.stack(out, 1)


ONE_SIDED = "neurons that are never off"
STEP = "a step in time, taken back by rates under an exponential"
EACH = "a rotation for each capsule by itself"
DROPPED = "weights whose results are dropped, 12, and the mixings of the stream that they would write to, 9, stay"
LENGTHS = "lengths of directions, which a weight norm takes back"
MEANS = "the mean of what is added to a stream that is read before and after"
INDICES = torch.arange(2).remainder(5) + 3

UNSEEN: dict[str, Family] = {
    "Performer": Family(Performer, (_x(2, 5, 5),)),
    "S4D": Family(S4D, (_x(2, 6, 4),), rest=3, why=STEP),
    "PointNet": Family(PointNet, (_x(3, 7, 3),), rest=5, why=ONE_SIDED),
    "hypernetwork": Family(Hyper, (_x(7, 4), _x(7, 3) + 1)),
    "capsules": Family(Capsules, (_x(7, 6),), rest=12, why=EACH),
    "WaveNet": Family(WaveNet, (_x(2, 2, 7),), rest=21 + 8, why=f"{DROPPED}; {ONE_SIDED}"),
    "TCN": Family(TCN, (_x(2, 2, 7),), rest=3, why=LENGTHS),
    "U-ViT": Family(UViT, (_x(2, 1, 6, 6), _x(2, 2)), rest=4, why=MEANS),
    "GATv2": Family(GATv2, (_x(2, 5, 3), _x(2, 5, 5, 2))),
    "DeepSets": Family(DeepSets, (_x(3, 6, 3),), rest=2, why=ONE_SIDED),
    "RealNVP": Family(RealNVP, (_x(7, 4),), rest=2, why=ONE_SIDED),
    "DeepAR": Family(DeepAR, (_x(2, 4), _x(2, 4, 2), INDICES)),
}
