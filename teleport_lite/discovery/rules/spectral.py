"""Complex numbers, whose real multiples are followed, and Fourier transforms."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from teleport_lite.discovery.labels import Labels, varying_dims
from teleport_lite.discovery.operation import Operation
from teleport_lite.discovery.registry import decomposition_of, rule_for
from teleport_lite.discovery.rules.equivariance import Equivariance
from teleport_lite.discovery.rules.reductions import gather_over

LINEAR = Equivariance(1, 1, linear=True)


@rule_for("view_as_complex")
def join_parts(op: Operation) -> list[Labels]:
    """A real and an imaginary part move alike; what multiplies nothing but both is left to another axis."""
    labels, last = op.labels(op.args[0]), op.args[0].ndim - 1
    along = [a for a in labels if a.shape[last] > 1]
    wide = [{*varying_dims(b)} for b in labels if b.shape[last] == 1]
    idle = [a for a in along if any({*varying_dims(a)} - {-1} <= b for b in wide)]
    op.fix(idle, "")
    gather = partial(gather_over, op, dims=[last], how=LINEAR, entrywise=False, symmetric=False)
    return [[gather(a).squeeze(last) for a in labels if all(a is not b for b in idle)]]


@rule_for("view_as_real")
def split_parts(op: Operation) -> list[Labels]:
    """Both parts move as the number does."""
    return [[a.unsqueeze(-1) for a in op.labels(op.args[0])]]


@rule_for("_fft_r2c _fft_c2r _fft_c2c")
def transform_labels(op: Operation) -> list[Labels]:
    """A sum over all entries along the dimensions of the transform, for each frequency another one."""
    x, dims = op.args[0], [d % op.args[0].ndim for d in op["dim"]]
    return [[gather_over(op, a, dims, LINEAR, entrywise=False, symmetric=False) for a in op.labels(x)]]


@decomposition_of("complex")
def _join_as_complex(real: Tensor, imag: Tensor) -> Tensor:
    return torch.view_as_complex(torch.stack(torch.broadcast_tensors(real, imag), -1))


@decomposition_of("polar")
def _join_polar(size: Tensor, angle: Tensor) -> Tensor:
    return torch.complex(size * angle.cos(), size * angle.sin())
