"""How many continuous symmetries a model has, by counting: the kernel of the Jacobian of its parameters."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from teleport_lite.discovery.float64 import Float64
from teleport_lite.functional import Params
from teleport_lite.outputs import tensors_of
from teleport_lite.runtime import unfused_attention

ROWS = 2  # equations for each unknown, at least
BATCH = 32


class Fibre(NamedTuple):
    """The local fibre of w -> f(w, .) through the weights of a model.

    Attributes:
        dim: its dimension, that of the kernel of the Jacobian.
        gap: decades between the last singular value that counts and the first one that does not.
    """

    dim: int
    gap: float


def fibre(model: nn.Module, example: tuple[Tensor, ...]) -> Fibre:
    """Count, in float64 and evaluation mode, on random inputs of the example's shapes.

    Where statistics of a batch matter, as in a batch norm, the outputs are those with fixed and with its own ones
    together: the kernel of both Jacobians, one above the other.
    """
    modes = [model, *([own] if (own := _with_own_statistics(model)) else [])]
    params = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    size = sum(p.numel() for p in params.values())
    generator = torch.Generator().manual_seed(2)

    def drawn(x: Tensor) -> Tensor:
        if x.is_floating_point():
            return 2 * torch.randn(BATCH, *x.shape[1:], generator=generator, dtype=torch.float64)
        return torch.randint(0, int(x.max()) + 1, (BATCH, *x.shape[1:]), generator=generator)

    blocks: list[Tensor] = []
    while sum(map(len, blocks)) < ROWS * size:
        inputs = tuple(drawn(x) for x in example)

        def outputs(p: Params, inputs: tuple[Tensor, ...] = inputs, seed: int = sum(map(len, blocks))) -> Tensor:
            found = torch.cat([t.reshape(-1) for m in modes for t in tensors_of(functional_call(m, p, inputs))])
            mixed = torch.randn(4 * BATCH, len(found), generator=torch.Generator().manual_seed(seed), dtype=found.dtype)
            return found if len(found) <= 4 * BATCH else mixed @ found

        with unfused_attention(), Float64():  # some models compute in float32 whatever they are given
            parts = jacrev(outputs)(params).values()
        rows = torch.cat([j.reshape(len(j), -1) for j in parts], 1)
        blocks.append(rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-300))
    values = torch.linalg.svdvals(torch.linalg.qr(torch.cat(blocks), mode="r")[1])
    drops = (values[:-1] / values[1:].clamp(min=1e-17 * float(values[0]))).clamp(min=1).log10()
    last = int(drops.argmax())
    gap = float(drops[last])
    return Fibre(size - 1 - last, gap) if gap > 4 else Fibre(0, gap)


def _with_own_statistics(model: nn.Module) -> nn.Module | None:
    """A copy whose batch norms use the statistics of each batch, as in training; None where there is no batch norm."""
    own = copy.deepcopy(model)
    norms = [m for m in own.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for m in norms:
        m.running_mean = m.running_var = None
    return own if norms else None
