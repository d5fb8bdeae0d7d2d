"""Models of pictures, sounds and points, as they are published; for `published_families`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from completeness import CONSTANT, Family, _x
from torch import nn
from torch.nn.utils import parametrizations


def conv_norm(i, o, k, act=nn.SiLU, **options):
    return nn.Sequential(nn.Conv2d(i, o, k, padding=k // 2, bias=False, **options), nn.BatchNorm2d(o), act())


class EfficientNet(nn.Module):
    """Inverted bottleneck with squeeze and excitation, around a sum."""

    def __init__(self, c=4, e=8):
        super().__init__()
        self.stem = conv_norm(2, c, 3)
        self.expand, self.depth = conv_norm(c, e, 1), conv_norm(e, e, 3, groups=e)
        self.reduce, self.excite = nn.Conv2d(e, 2, 1), nn.Conv2d(2, e, 1)
        self.project = nn.Sequential(nn.Conv2d(e, c, 1, bias=False), nn.BatchNorm2d(c))
        self.head = conv_norm(c, 6, 1)
        self.classify = nn.Linear(6, 3)

    def forward(self, x):
        x = self.stem(x)
        h = self.depth(self.expand(x))
        s = self.excite(F.silu(self.reduce(F.adaptive_avg_pool2d(h, 1)))).sigmoid()
        x = x + self.project(h * s)
        return self.classify(F.adaptive_avg_pool2d(self.head(x), 1).flatten(1))


class RegNet(nn.Module):
    """Two residual blocks with grouped convolutions, the first of stride 2 with a projection."""

    def __init__(self, c=4):
        super().__init__()
        act = nn.LeakyReLU
        self.stem = conv_norm(2, c, 3, act)
        self.a = nn.Sequential(
            conv_norm(c, 6, 1, act), conv_norm(6, 6, 3, act, groups=3, stride=2), conv_norm(6, 6, 1, nn.Identity)
        )
        self.short = conv_norm(c, 6, 1, nn.Identity, stride=2)
        self.b = nn.Sequential(
            conv_norm(6, 6, 1, act), conv_norm(6, 6, 3, act, groups=3), conv_norm(6, 6, 1, nn.Identity)
        )
        self.fc = nn.Linear(6, 3)

    def forward(self, x):
        x = self.stem(x)
        x = F.leaky_relu(self.a(x) + self.short(x))
        x = F.leaky_relu(x + self.b(x))
        return self.fc(x.mean((2, 3)))


class Inception(nn.Module):
    """Four branches side by side, one behind a maximum."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.one, self.low, self.mid = nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 1), nn.Conv2d(2, 3, 3, padding=1)
        self.row, self.col = nn.Conv2d(2, 2, (1, 3), padding=(0, 1)), nn.Conv2d(2, 2, (3, 1), padding=(1, 0))
        self.pool = nn.Conv2d(4, 2, 1)
        self.fc = nn.Linear(11, 3)

    def forward(self, x):
        act = F.leaky_relu
        x = act(self.stem(x))
        low = act(self.low(x))
        pool = self.pool(F.max_pool2d(x, 3, stride=1, padding=1))
        x = torch.cat([self.one(x), self.mid(low), self.row(low), self.col(low), pool], 1)
        return self.fc(F.dropout(act(x).mean((2, 3)), 0.1, self.training))


class FeaturePyramid(nn.Module):
    """Lateral convolutions and a way down; one head, shared by the levels, for classes and boxes."""

    def __init__(self, c=3):
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.l1, self.l2 = nn.Conv2d(3, c, 1), nn.Conv2d(4, c, 1)
        self.s1, self.s2 = nn.Conv2d(c, c, 3, padding=1), nn.Conv2d(c, c, 3, padding=1)
        self.tower, self.norm = nn.Conv2d(c, 4, 3, padding=1), nn.GroupNorm(2, 4)
        self.classes, self.boxes = nn.Conv2d(4, 2, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.scales = nn.Parameter(torch.ones(2))

    def forward(self, x):
        one = F.silu(self.c1(x))
        two = F.silu(self.c2(one))
        p2 = self.l2(two)
        p1 = self.l1(one) + F.interpolate(p2, scale_factor=2, mode="nearest")
        outputs = []
        for level, scale in zip((self.s1(p1), self.s2(p2)), self.scales, strict=True):
            h = F.silu(self.norm(self.tower(level)))
            outputs += [self.classes(h), (scale * self.boxes(h)).exp()]
        return outputs


class BiFPN(nn.Module):
    """Weights of the sums through ReLU, divided by their sum; separable convolutions."""

    def __init__(self, c=3):
        super().__init__()
        self.stem, self.down = nn.Conv2d(1, c, 3, padding=1), nn.Conv2d(c, c, 3, stride=2, padding=1)
        self.w1, self.w2 = nn.Parameter(torch.ones(2) + 0.5), nn.Parameter(torch.ones(3) + 0.5)
        self.up = nn.Sequential(nn.Conv2d(c, c, 3, padding=1, groups=c, bias=False), conv_norm(c, c, 1, nn.Identity))
        self.out = nn.Sequential(nn.Conv2d(c, c, 3, padding=1, groups=c, bias=False), conv_norm(c, c, 1, nn.Identity))
        self.head = nn.Conv2d(c, 2, 1)

    def forward(self, x):
        one = self.stem(x)
        two = self.down(F.silu(one))
        w = F.relu(self.w1)
        w = w / (w.sum() + 1e-4)
        p1 = self.up(F.silu(w[0] * one + w[1] * F.interpolate(two, scale_factor=2)))
        w = F.relu(self.w2)
        w = w / (w.sum() + 1e-4)
        p2 = self.out(F.silu(w[0] * two + w[1] * F.max_pool2d(p1, 2) + w[2] * F.avg_pool2d(one, 2)))
        return self.head(p1), self.head(p2)


class HRNet(nn.Module):
    """Two resolutions that exchange twice."""

    def __init__(self):
        super().__init__()
        act = nn.LeakyReLU
        self.stem = conv_norm(1, 3, 3, act)
        self.down = conv_norm(3, 4, 3, act, stride=2)
        self.high, self.low = conv_norm(3, 3, 3, act), conv_norm(4, 4, 3, act)
        self.rise, self.sink = conv_norm(4, 3, 1, nn.Identity), conv_norm(3, 4, 3, nn.Identity, stride=2)
        self.last = nn.Conv2d(7, 2, 1)

    def forward(self, x):
        a = self.stem(x)
        b = self.down(a)
        a, b = self.high(a), self.low(b)
        up = F.interpolate(self.rise(b), size=a.shape[-2:], mode="bilinear", align_corners=False)
        a, b = F.leaky_relu(a + up), F.leaky_relu(b + self.sink(a))
        up = F.interpolate(b, size=a.shape[-2:], mode="bilinear", align_corners=False)
        return self.last(torch.cat([a, up], 1))


class Generator(nn.Module):
    """DCGAN: transposed convolutions with batch norm, tanh at the end."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.ConvTranspose2d(4, 4, 2, bias=False),
            nn.BatchNorm2d(4),
            nn.LeakyReLU(0.2),
            nn.ConvTranspose2d(4, 3, 4, 2, 1, bias=False),
            nn.BatchNorm2d(3),
            nn.LeakyReLU(0.2),
            nn.ConvTranspose2d(3, 1, 3, 1, 1),
            nn.Tanh(),
        )

    def forward(self, z):
        return self.net(z[:, :, None, None])


class Discriminator(nn.Module):
    """Spectral norms and the deviation over the batch as one more channel."""

    def __init__(self):
        super().__init__()
        normed = parametrizations.spectral_norm
        self.a = normed(nn.Conv2d(1, 3, 3, padding=1))
        self.b = normed(nn.Conv2d(3, 4, 3, stride=2, padding=1))
        self.c = nn.Conv2d(5, 3, 3, padding=1)
        self.fc = normed(nn.Linear(3, 1))

    def forward(self, x):
        x = F.leaky_relu(self.b(F.leaky_relu(self.a(x), 0.2)), 0.2)
        deviation = (x.var(0, unbiased=False) + 1e-8).sqrt().mean().expand(x.shape[0], 1, *x.shape[2:])
        x = F.leaky_relu(self.c(torch.cat([x, deviation], 1)), 0.2)
        return self.fc(x.sum((2, 3)))


class PixelCNN(nn.Module):
    """Masked convolutions, a vertical and a horizontal stack, gated by tanh and sigmoid."""

    def __init__(self, c=3):
        super().__init__()
        self.vert, self.hori = nn.Conv2d(1, 2 * c, (2, 3)), nn.Conv2d(1, 2 * c, (1, 2))
        self.link, self.mix = nn.Conv2d(2 * c, 2 * c, 1), nn.Conv2d(c, c, 1)
        self.vert2, self.hori2 = nn.Conv2d(c, 2 * c, (2, 3)), nn.Conv2d(c, 2 * c, (1, 2))
        self.link2, self.mix2 = nn.Conv2d(2 * c, 2 * c, 1), nn.Conv2d(c, c, 1)
        self.out = nn.Conv2d(c, 3, 1)

    @staticmethod
    def gate(x):
        a, b = x.chunk(2, 1)
        return a.tanh() * b.sigmoid()

    def forward(self, x):
        v = self.vert(F.pad(x, (1, 1, 2, 0))[:, :, :-1])
        h = self.hori(F.pad(x, (2, 0))[..., :-1]) + self.link(v)
        v, h = self.gate(v), self.mix(self.gate(h))
        v2 = self.vert2(F.pad(v, (1, 1, 1, 0)))
        h2 = self.hori2(F.pad(h, (1, 0))) + self.link2(v2)
        return self.out(F.elu(h + self.mix2(self.gate(h2))))


class Swin(nn.Module):
    """Attention in windows, the second shifted, with a table of relative biases; patches merged."""

    def __init__(self, d=4, w=2, h=2):
        super().__init__()
        self.w, self.h = w, h
        self.patch, self.first = nn.Conv2d(1, d, 2, 2), nn.LayerNorm(d)
        self.blocks = nn.ModuleList(self.block(d) for _ in range(2))
        self.merge, self.reduce = nn.LayerNorm(4 * d), nn.Linear(4 * d, 6, bias=False)
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 3)
        grid = torch.stack(torch.meshgrid(torch.arange(w), torch.arange(w), indexing="ij")).flatten(1)
        between = (grid[:, :, None] - grid[:, None]) + w - 1
        self.register_buffer("index", between[0] * (2 * w - 1) + between[1])

    def block(self, d):
        parts = {"n1": nn.LayerNorm(d), "qkv": nn.Linear(d, 3 * d), "proj": nn.Linear(d, d), "n2": nn.LayerNorm(d)}
        parts |= {"up": nn.Linear(d, 6), "down": nn.Linear(6, d)}
        block = nn.ModuleDict(parts)
        block.table = nn.Parameter(0.1 * torch.randn((2 * self.w - 1) ** 2, self.h))
        return block

    def attend(self, m, x, shift):
        b, n, _, d = x.shape
        w = self.w
        x = torch.roll(m["n1"](x), (-shift, -shift), (1, 2))
        x = x.view(b, n // w, w, n // w, w, d).permute(0, 1, 3, 2, 4, 5).reshape(-1, w * w, d)
        q, k, v = m["qkv"](x).view(len(x), w * w, 3, self.h, -1).permute(2, 0, 3, 1, 4)
        bias = m.table[self.index.view(-1)].view(w * w, w * w, self.h).permute(2, 0, 1)
        a = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + bias
        x = m["proj"]((a.softmax(-1) @ v).transpose(1, 2).reshape(len(x), w * w, d))
        x = x.view(b, n // w, n // w, w, w, d).permute(0, 1, 3, 2, 4, 5).reshape(b, n, n, d)
        return torch.roll(x, (shift, shift), (1, 2))

    def forward(self, x):
        x = self.first(self.patch(x).permute(0, 2, 3, 1))
        for i, m in enumerate(self.blocks):
            x = x + self.attend(m, x, i)
            x = x + m["down"](F.gelu(m["up"](m["n2"](x))))
        x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
        x = self.norm(self.reduce(self.merge(x)))
        return self.head(x.mean((1, 2)))


class MaskFormer(nn.Module):
    """Queries ask a picture, then each other, norms behind the sums; classes, and masks by products with pixels."""

    def __init__(self, d=4, n=6):
        super().__init__()
        self.backbone, self.project, self.pixels = nn.Conv2d(1, 3, 3, 2, 1), nn.Conv2d(3, d, 1), nn.Conv2d(3, 3, 1)
        self.row, self.col = nn.Parameter(torch.rand(3, d // 2)), nn.Parameter(torch.rand(3, d // 2))
        self.content, self.place = nn.Embedding(n, d), nn.Embedding(n, d)
        self.own, self.cross = (nn.MultiheadAttention(d, 2, batch_first=True) for _ in range(2))
        self.n1, self.n2, self.n3 = (nn.LayerNorm(d) for _ in range(3))
        self.up, self.down = nn.Linear(d, 6), nn.Linear(6, d)
        self.classes, self.masks = nn.Linear(d, 3), nn.Sequential(nn.Linear(d, 5), nn.GELU(), nn.Linear(5, 3))

    def forward(self, x):
        features = F.gelu(self.backbone(x))
        col, row = self.col[None].expand(3, -1, -1), self.row[:, None].expand(-1, 3, -1)
        places = torch.cat([col, row], -1).flatten(0, 1)[None]
        memory = self.project(features).flatten(2).transpose(1, 2)
        y, asked = (m.weight[None].expand(len(x), -1, -1) for m in (self.content, self.place))
        y = self.n1(y + self.cross(y + asked, memory + places, memory, need_weights=False)[0])
        y = self.n2(y + self.own(y + asked, y + asked, y, need_weights=False)[0])
        y = self.n3(y + self.down(F.gelu(self.up(y))))
        return self.classes(y), torch.einsum("bqc,bchw->bqhw", self.masks(y), self.pixels(features))


class Wav2Vec(nn.Module):
    """Convolutions over time with a group norm and a layer norm; positions from a grouped convolution, weight norm."""

    def __init__(self, c=4, d=4):
        super().__init__()
        self.c1, self.g1 = nn.Conv1d(1, c, 3, 2, bias=False), nn.GroupNorm(c, c)
        self.c2 = nn.Conv1d(c, c, 3, 2, bias=False)
        self.norm, self.project = nn.LayerNorm(c), nn.Linear(c, d)
        self.place = parametrizations.weight_norm(nn.Conv1d(d, d, 3, padding=1, groups=2), dim=2)
        self.after = nn.LayerNorm(d)
        self.layer = nn.TransformerEncoderLayer(d, 2, 5, 0.0, "gelu", batch_first=True)
        self.final = nn.Linear(d, 3)

    def forward(self, x):
        x = F.gelu(self.c2(F.gelu(self.g1(self.c1(x))))).transpose(1, 2)
        x = self.project(self.norm(x))
        x = x + F.gelu(self.place(x.transpose(1, 2))).transpose(1, 2)
        return self.final(self.layer(self.after(x)))


class Conformer(nn.Module):
    """Half-step feed-forwards around attention and a gated convolution with a batch norm."""

    def __init__(self, d=4, h=2):
        super().__init__()
        self.h = h
        self.embed = nn.Linear(3, d)
        self.f1, self.f2 = (
            nn.Sequential(nn.LayerNorm(d), nn.Linear(d, 6), nn.SiLU(), nn.Linear(6, d)) for _ in range(2)
        )
        self.n1, self.n2, self.last = (nn.LayerNorm(d) for _ in range(3))
        self.attention = nn.MultiheadAttention(d, h, batch_first=True)
        self.widen, self.depth = nn.Conv1d(d, 2 * d, 1), nn.Conv1d(d, d, 3, padding=1, groups=d)
        self.bn, self.narrow = nn.BatchNorm1d(d), nn.Conv1d(d, d, 1)
        self.head = nn.Linear(d, 3)

    def forward(self, x):
        x = self.embed(x)
        x = x + 0.5 * self.f1(x)
        y = self.n1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        y = F.glu(self.widen(self.n2(x).transpose(1, 2)), 1)
        x = x + self.narrow(F.silu(self.bn(self.depth(y)))).transpose(1, 2)
        x = self.last(x + 0.5 * self.f2(x))
        return self.head(x).log_softmax(-1)


class SIREN(nn.Module):
    """Sines of frequency 30; here 3, for float64."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(2, 6), nn.Linear(6, 6), nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.d(torch.sin(self.c(torch.sin(3 * self.b(torch.sin(3 * self.a(x)))))))


class NeRF(nn.Module):
    """Sines of positions, a skip, a density, and a colour that depends on the direction."""

    def __init__(self, w=6):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3 + 12, w), nn.Linear(w, w), nn.Linear(w + 15, w)
        self.density, self.feature = nn.Linear(w, 1), nn.Linear(w, w)
        self.view, self.colour = nn.Linear(w + 3 + 6, 4), nn.Linear(4, 3)

    @staticmethod
    def encode(x, n):
        return torch.cat([x, *(f(x * 2**i) for i in range(n) for f in (torch.sin, torch.cos))], -1)

    def forward(self, x, direction):
        act = F.leaky_relu
        e = self.encode(x, 2)
        h = act(self.b(act(self.a(e))))
        h = act(self.c(torch.cat([e, h], -1)))
        direction = self.encode(direction / direction.norm(dim=-1, keepdim=True), 1)
        v = act(self.view(torch.cat([self.feature(h), direction], -1)))
        return F.softplus(self.density(h)), self.colour(v).sigmoid()


class Fourier(nn.Module):
    """Fourier neural operator in one dimension: a few modes mixed by complex matrices, beside a convolution."""

    def __init__(self, c=3, modes=3):
        super().__init__()
        self.modes = modes
        self.lift, self.q1, self.q2 = nn.Linear(4, c), nn.Linear(c, 5), nn.Linear(5, 1)
        self.w = nn.ParameterList(nn.Parameter(torch.rand(c, c, modes, 2) / c) for _ in range(2))
        self.skip = nn.ModuleList(nn.Conv1d(c, c, 1) for _ in range(2))

    def forward(self, x):
        x = self.lift(x).transpose(1, 2)
        for w, skip in zip(self.w, self.skip, strict=True):
            f = torch.fft.rfft(x)
            g = torch.einsum("bim,iom->bom", f[..., : self.modes], torch.view_as_complex(w))
            g = F.pad(g, (0, f.shape[-1] - self.modes))
            x = F.gelu(torch.fft.irfft(g, n=x.shape[-1]) + skip(x))
        return self.q2(F.gelu(self.q1(x.transpose(1, 2))))


LEVELS = "a number for each level, beside a layer that all levels share"
DIVIDED = "weights that are divided by their sum and a small number, which move along a curve"
SPECTRAL = "scales of a matrix that is divided by its spectral norm"
MEAN = "imaginary parts of a mean, which nothing reads, 18, and a shift through a Fourier transform, 3"
PICTURES = {
    "EfficientNet": Family(EfficientNet, (_x(2, 2, 5, 5),)),
    "RegNet": Family(RegNet, (_x(2, 2, 6, 6),)),
    "Inception": Family(Inception, (_x(2, 2, 5, 5),), seed=2),
    "feature pyramid": Family(FeaturePyramid, (_x(2, 1, 6, 6),), rest=1, why=LEVELS),
    "BiFPN": Family(BiFPN, (_x(2, 1, 6, 6),), rest=2, why=DIVIDED),
    "HRNet": Family(HRNet, (_x(2, 1, 6, 6),)),
    "DCGAN": Family(Generator, (_x(7, 4),)),
    "discriminator": Family(Discriminator, (_x(4, 1, 8, 8),), rest=7, why=SPECTRAL),
    "PixelCNN": Family(PixelCNN, (_x(2, 1, 5, 5),)),
    "Swin": Family(Swin, (_x(2, 1, 8, 8),)),
    "MaskFormer": Family(MaskFormer, (_x(2, 1, 6, 6),), rest=17, why=CONSTANT),
    "wav2vec": Family(Wav2Vec, (_x(2, 1, 25),)),
    "Conformer": Family(Conformer, (_x(2, 6, 3),)),
    "SIREN": Family(SIREN, (_x(7, 2),)),
    "NeRF": Family(NeRF, (_x(7, 3), _x(7, 3))),
    "Fourier neural operator": Family(Fourier, (_x(2, 8, 4),), rest=21, why=MEAN),
}
