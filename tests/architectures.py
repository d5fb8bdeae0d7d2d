"""Small models of many families, as people write them: what `find_symmetries` is tried on."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def mlp(activation: Callable[[], nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), activation(), nn.Linear(6, 4), activation(), nn.Linear(4, 3))


class Lenet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 4, 5), nn.Conv2d(4, 6, 3)
        self.three, self.four = nn.Linear(6 * 3 * 3, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(torch.relu(self.one(x)), 2)
        x = F.avg_pool2d(F.relu(self.two(x), inplace=True), 2)
        return self.four(F.relu(self.three(x.view(len(x), -1))))


def vgg() -> nn.Module:
    def block(a: int, b: int) -> list[nn.Module]:
        return [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(inplace=True)]

    body = [*block(3, 4), nn.MaxPool2d(2), *block(4, 6), *block(6, 6), nn.MaxPool2d(2), nn.Flatten()]
    return nn.Sequential(*body, nn.Linear(6 * 2 * 2, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 3))


class Residual(nn.Module):
    """A residual block, with or without batch norm."""

    def __init__(self, channels: int, out: int, stride: int = 1, norm: bool = True) -> None:
        super().__init__()
        make = nn.BatchNorm2d if norm else nn.Identity
        self.a, self.b = nn.Conv2d(channels, out, 3, stride, 1), nn.Conv2d(out, out, 3, padding=1)
        self.na, self.nb = make(out), make(out)
        self.skip = nn.Identity() if channels == out else nn.Conv2d(channels, out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.na(self.a(x)))
        return F.relu(self.nb(self.b(h)) + self.skip(x))


def resnet(norm: bool = True) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4) if norm else nn.Identity(),
        nn.ReLU(),
        Residual(4, 4, norm=norm),
        Residual(4, 6, 2, norm=norm),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 3),
    )


class Dense(nn.Module):
    """Every layer reads the concatenation of all before it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(3 + 4 * i, 4, 3, padding=1) for i in range(3)])
        self.last = nn.Linear(15, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat([x, F.relu(layer(x))], 1)
        return self.last(x.mean((2, 3)))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.deep = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)
        self.up, self.join, self.last = (
            nn.ConvTranspose2d(6, 4, 2, 2),
            nn.Conv2d(8, 5, 3, padding=1),
            nn.Conv2d(5, 2, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        a = F.leaky_relu(self.down(x))
        b = F.leaky_relu(self.deep(F.max_pool2d(a, 2)))
        c = torch.cat([a, F.relu(self.up(b))], dim=1)
        return self.last(F.relu(self.join(c)))


class UpSampled(nn.Module):
    def __init__(self, mode: str) -> None:
        super().__init__()
        self.a, self.b, self.up = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 2, 3), nn.Upsample(scale_factor=2, mode=mode)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.up(F.relu(self.a(x))))


def mobilenet() -> nn.Module:
    def block(a: int, b: int) -> list[nn.Module]:
        return [nn.Conv2d(a, a, 3, padding=1, groups=a), nn.ReLU(), nn.Conv2d(a, b, 1), nn.ReLU()]

    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)]
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), *block(4, 6), *block(6, 6), *head)


def grouped() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 8, 1), nn.ReLU(), nn.Conv2d(8, 12, 3, groups=2), nn.ReLU(), nn.Conv2d(12, 2, 1), nn.Flatten()
    )


class ConvNext(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide = nn.Conv2d(3, 6, 2, 2), nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 12), nn.Linear(12, 6)
        self.gamma, self.head = nn.Parameter(torch.ones(6)), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        h = self.norm(self.wide(x).permute(0, 2, 3, 1))
        h = self.gamma * self.down(F.gelu(self.up(h)))
        return self.head((x + h.permute(0, 3, 1, 2)).mean((-2, -1)))


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        kind = x.dtype
        x = x.to(torch.float32)
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)).to(kind)


def rotate(x: Tensor) -> Tensor:
    """Rotary positions for [batch, heads, length, width]."""
    length, half = x.shape[-2], x.shape[-1] // 2
    angle = torch.arange(length)[:, None] / 100 ** (torch.arange(half) / half)
    cos, sin = (torch.cat([f(angle)] * 2, -1).to(x) for f in (torch.cos, torch.sin))
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


class Attention(nn.Module):
    def __init__(self, d: int, heads: int, kv: int | None = None, rotary: bool = False, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.kv, self.width = heads, kv or heads, d // heads
        self.rotary, self.causal = rotary, causal
        self.q, self.o = nn.Linear(d, d, bias=False), nn.Linear(d, d, bias=False)
        self.k, self.v = (nn.Linear(d, self.kv * self.width, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, self.width)).transpose(1, 2) for f in (self.q, self.k, self.v))
        if self.rotary:
            q, k = rotate(q), rotate(k)
        k, v = (t.repeat_interleave(self.heads // self.kv, 1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.o(y.transpose(1, 2).flatten(2))


class Swiglu(nn.Module):
    def __init__(self, d: int, h: int) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(d, h, False), nn.Linear(d, h, False), nn.Linear(h, d, False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, attention: nn.Module, mlp: nn.Module, norm: Callable[[], nn.Module], post: bool) -> None:
        super().__init__()
        self.attention, self.mlp, self.one, self.two, self.post = attention, mlp, norm(), norm(), post

    def forward(self, x: Tensor) -> Tensor:
        if self.post:
            x = self.one(x + self.attention(x))
            return self.two(x + self.mlp(x))
        x = x + self.attention(self.one(x))
        return x + self.mlp(self.two(x))


class Decoder(nn.Module):
    """A language model; `style` is that of GPT-2 or of Llama."""

    def __init__(self, style: str, post: bool = False, kv: int | None = None, tied: bool = False) -> None:
        super().__init__()
        d, words = 8, 11
        llama = style == "llama"
        self.embed = nn.Embedding(words, d)
        self.place = None if llama else nn.Parameter(torch.randn(6, d))

        def feed() -> nn.Module:
            kind = nn.ReLU if style == "relu" else nn.GELU
            return Swiglu(d, 12) if llama else nn.Sequential(nn.Linear(d, 12), kind(), nn.Linear(12, d))

        def norm() -> nn.Module:
            return RMSNorm(d) if llama else nn.LayerNorm(d)

        self.blocks = nn.ModuleList(
            [Block(Attention(d, 2, kv, rotary=llama, causal=True), feed(), norm, post) for _ in range(2)]
        )
        self.norm, self.head = norm(), nn.Linear(d, words, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        if self.place is not None:
            x = x + self.place[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def encoder(norm_first: bool, activation: str) -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 12, activation=activation, batch_first=True, norm_first=norm_first)
    return nn.Sequential(nn.Linear(3, 8), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(8, 2))


class Translate(nn.Module):
    """nn.Transformer, encoder and decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.core = nn.Transformer(8, 2, 1, 1, 12, batch_first=True)
        self.a, self.b, self.head = nn.Linear(3, 8), nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head(self.core(self.a(x), self.b(y)))


class Vision(nn.Module):
    """A vision transformer with a class token."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.token = nn.Conv2d(1, 8, 4, 4), nn.Parameter(torch.randn(1, 1, 8))
        self.place = nn.Parameter(torch.randn(1, 5, 8))
        feed = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
        self.block = Block(Attention(8, 2), feed, lambda: nn.LayerNorm(8), False)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.place
        return self.head(self.norm(self.block(x))[:, 0])


class Lora(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(6, 6)
        self.base.requires_grad_(False)
        self.a, self.b = nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.randn(6, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 0.5 * F.linear(F.linear(x, self.a), self.b)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module], **options: object) -> None:
        super().__init__()
        self.cell, self.head = kind(3, 5, batch_first=True, **options), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[0])


class Einsum(nn.Module):
    """Attention written with einsum, its weights of shape [heads, d, width]: not all of it is found."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Parameter(torch.randn(2, 8, 4)) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("bld,hde->bhle", x, w) for w in (self.q, self.k, self.v))
        weights = (torch.einsum("bhle,bhse->bhls", q, k) / math.sqrt(4)).softmax(-1)
        return torch.einsum("bhle,hde->bld", torch.einsum("bhls,bhse->bhle", weights, v), self.o)


def _x(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def _tokens() -> Tensor:
    return torch.randint(0, 11, (2, 6), generator=torch.Generator().manual_seed(1))


def _pair() -> tuple[Tensor, Tensor]:
    return _x(2, 4, 3)(), _x(2, 5, 3)()


IMAGES, SMALL = _x(2, 3, 8, 8), _x(2, 1, 8, 8)
# name: (make, example inputs, dimension of the group)
FAMILIES: dict[str, tuple[Callable[[], nn.Module], Callable[[], object], int]] = {
    "MLP, identity": (lambda: mlp(nn.Identity), _x(7, 5), 36 + 16),
    "MLP, ReLU": (lambda: mlp(nn.ReLU), _x(7, 5), 10),
    "MLP, leaky ReLU": (lambda: mlp(nn.LeakyReLU), _x(7, 5), 10),
    "MLP, PReLU": (lambda: mlp(nn.PReLU), _x(7, 5), 10),
    "MLP, ELU": (lambda: mlp(nn.ELU), _x(7, 5), 0),
    "MLP, tanh": (lambda: mlp(nn.Tanh), _x(7, 5), 0),
    "MLP, sigmoid": (lambda: mlp(nn.Sigmoid), _x(7, 5), 0),
    "MLP, GELU": (lambda: mlp(nn.GELU), _x(7, 5), 0),
    "LeNet": (Lenet, _x(2, 1, 20, 20), 4 + 6 + 10),
    "VGG with batch norm": (vgg, IMAGES, 4 + 6 + 6 + 8),
    "ResNet": (resnet, IMAGES, 4 + 4 + 6 + 6),
    "ResNet without norms": (lambda: resnet(False), IMAGES, 4 + 4 + 6 + 6),
    "DenseNet": (Dense, IMAGES, 12),
    "U-Net": (UNet, SMALL, 4 + 6 + 4 + 5),
    "Up-sampling, nearest": (lambda: UpSampled("nearest"), SMALL, 4),
    "Up-sampling, bilinear": (lambda: UpSampled("bilinear"), SMALL, 4),
    "MobileNet": (mobilenet, IMAGES, 4 + 4 + 6 + 6 + 6),
    "Grouped convolutions": (grouped, _x(2, 2, 5, 5), 8 + 12),
    "ConvNeXt": (ConvNext, IMAGES, 6 + 6 + 6),
    "Conv1d": (lambda: nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Conv1d(4, 3, 3, dilation=2)), _x(2, 2, 9), 4),
    "Conv3d": (lambda: nn.Sequential(nn.Conv3d(1, 4, 2), nn.ReLU(), nn.Conv3d(4, 3, 2)), _x(2, 1, 4, 4, 4), 4),
    "Transposed convolutions": (
        lambda: nn.Sequential(nn.ConvTranspose2d(3, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 2, 3, stride=2)),
        IMAGES,
        4,
    ),
    "Group and instance norm": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3),
            nn.GroupNorm(2, 4),
            nn.ReLU(),
            nn.Conv2d(4, 6, 3),
            nn.InstanceNorm2d(6, affine=True),
            nn.ReLU(),
            nn.Conv2d(6, 2, 3),
        ),
        IMAGES,
        4 + 6,
    ),
    "Encoder, post-norm, ReLU": (lambda: encoder(False, "relu"), _x(2, 5, 3), 2 * (2 * 2 * 16 + 12) + 8),
    "Encoder, pre-norm, GELU": (lambda: encoder(True, "gelu"), _x(2, 5, 3), 2 * 2 * 2 * 16 + 2 * 16),
    "Decoder, GPT-2 style": (lambda: Decoder("gelu"), _tokens, 2 * 2 * 2 * 16 + 5 * 8 + 21),
    "Decoder, post-norm, ReLU": (lambda: Decoder("relu", post=True), _tokens, 2 * (2 * 2 * 16 + 12) + 8),
    "Decoder, tied embedding": (lambda: Decoder("gelu", tied=True), _tokens, 2 * 2 * 2 * 16 + 4 * 8),
    "Decoder, Llama style": (lambda: Decoder("llama"), _tokens, 2 * (2 * 2 * 2 + 2 * 16 + 12) + 5 * 8 + 28),
    "Decoder, Llama style, grouped queries": (
        lambda: Decoder("llama", kv=1),
        _tokens,
        2 * (2 * 2 + 16 + 12) + 5 * 8 + 28,
    ),
    "Encoder and decoder": (Translate, _pair, 3 * 2 * 2 * 16 + 2 * 12 + 2 * 8),
    "Vision transformer": (Vision, SMALL, 2 * 2 * 16 + 3 * 8 + 21),
    "Attention by einsum": (Einsum, _x(2, 5, 8), 2 * (2 * 16)),
    "LoRA": (Lora, _x(7, 6), 4),
    "LSTM": (lambda: Recurrent(nn.LSTM), _x(2, 4, 3), 0),
    "GRU": (lambda: Recurrent(nn.GRU), _x(2, 4, 3), 0),
    "RNN, ReLU": (lambda: Recurrent(nn.RNN, nonlinearity="relu"), _x(2, 4, 3), 5),
    "RNN, tanh": (lambda: Recurrent(nn.RNN), _x(2, 4, 3), 0),
}
