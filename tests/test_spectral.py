"""Models that compute with complex numbers: what is found spans the fibre and holds on other inputs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import params_of
from fibre import fibre
from torch import Tensor, nn
from torch.func import functional_call

import teleport_lite as tl

N = 8  # places


class FourierOperator(nn.Module):
    """A few frequencies mixed by complex matrices, beside a convolution of one place (Li et al. 2021)."""

    def __init__(self, width: int = 4, modes: int = 3) -> None:
        super().__init__()
        self.lift, self.out = nn.Linear(5, width), nn.Linear(width, 2)
        self.mix = nn.ParameterList(nn.Parameter(torch.randn(width, width, modes, 2)) for _ in range(2))
        self.skip = nn.ModuleList(nn.Conv1d(width, width, 1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        h = self.lift(x).mT
        for mix, skip in zip(self.mix, self.skip, strict=True):
            f = torch.fft.rfft(h)
            g = torch.einsum("bim,iom->bom", f[..., : mix.shape[2]], torch.view_as_complex(mix))
            g = F.pad(g, (0, f.shape[-1] - mix.shape[2]))
            h = F.relu(torch.fft.irfft(g, n=h.shape[-1]) + skip(h))
        return self.out(h.mT)


class GlobalFilter(nn.Module):
    """Each channel times a filter of its own in the frequency domain (Rao et al. 2021)."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.lift, self.out = nn.Linear(5, width), nn.Linear(width, 6)
        self.filter = nn.Parameter(torch.randn(N // 2 + 1, width, 2))

    def forward(self, x: Tensor) -> Tensor:
        f = torch.fft.rfft(self.lift(x), dim=1, norm="ortho") * torch.view_as_complex(self.filter)
        return self.out(torch.fft.irfft(f, n=N, dim=1, norm="ortho"))


class FNet(nn.Module):
    """Places and channels transformed, real parts kept, and a layer of ReLUs behind (Lee-Thorp et al. 2022)."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.lift, self.up, self.down = nn.Linear(5, width), nn.Linear(width, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.lift(x)
        h = h + torch.fft.fft(torch.fft.fft(h, dim=2), dim=1).real
        return self.down(self.up(h).relu())


class LongConvolution(nn.Module):
    """Gates around a causal convolution over all places, by transforms of twice the length (Poli et al. 2023)."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.gate, self.value, self.out = nn.Linear(5, width), nn.Linear(5, width), nn.Linear(width, 6)
        self.filter = nn.Parameter(torch.randn(width, N))

    def forward(self, x: Tensor) -> Tensor:
        v = self.value(x).mT
        f = torch.fft.rfft(v, n=2 * N) * torch.fft.rfft(self.filter, n=2 * N)
        return self.out((torch.fft.irfft(f, n=2 * N)[..., :N] * self.gate(x).mT).mT)


class Modulus(nn.Module):
    """The size of complex numbers, which a real multiple of both parts scales."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(5, 8), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.view_as_complex(self.one(x).unflatten(-1, (4, 2))).abs())


MODELS = {  # how it is made, and what of its fibre is not found
    "Fourier operator": (FourierOperator, 36),  # imaginary parts where a real signal has none, 32; shifts of a bias, 4
    "global filter": (GlobalFilter, 12),  # the same, 8 and 4
    "FNet": (FNet, 7),  # what commutes with a Fourier transform
    "long convolution": (LongConvolution, 0),
    "modulus": (Modulus, 4),  # the phases
}


@pytest.mark.parametrize("name", MODELS)
def test_what_is_found_spans_the_fibre_and_holds(name):
    torch.manual_seed(0)
    make, rest = MODELS[name]
    model, x = make().double(), torch.randn(2, N, 5, dtype=torch.float64)
    symmetry, params = tl.find_symmetries(model, x), params_of(model)
    counted = fibre(model, (x,))
    assert not any("not understood" in reason for reason in symmetry.reasons)
    assert counted.gap > 4 and symmetry.rank(params) + rest == counted.dim
    generator = torch.Generator().manual_seed(1)
    for size in (1e-3, 1.0, 1e3):
        new = size * torch.randn(5, N, 5, generator=generator, dtype=torch.float64)
        moved = symmetry.act(params, symmetry.sample(params, radius=0.5, generator=generator))
        before, after = (functional_call(model, p, new) for p in (params, moved))
        assert float((after - before).abs().max() / before.abs().max()) < 1e-11


def test_a_filter_with_one_phase_for_all_is_no_scaling():
    """The imaginary part of what is returned mixes the parts: nothing but a multiple of the whole passes."""

    class Phase(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(5, 8), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            z = torch.view_as_complex(self.one(x).unflatten(-1, (4, 2)))
            return self.two((z + 1).abs())

    torch.manual_seed(0)
    assert tl.find_symmetries(Phase(), torch.randn(3, 5)).dim == 0
