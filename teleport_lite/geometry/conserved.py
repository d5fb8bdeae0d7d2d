"""What gradient flow conserves because of a symmetry.

Derived in the chapter *Symmetries of networks*.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from teleport_lite.functional import Params
from teleport_lite.groups import GeneralLinear, PositiveScaling
from teleport_lite.symmetries.axes import NeuronSymmetry
from teleport_lite.symmetries.base import Symmetry
from teleport_lite.symmetries.product import check_symmetry


def conserved_quantities(params: Params, symmetry: Symmetry) -> list[Tensor]:
    r"""What gradient flow conserves because of a symmetry, and a teleport changes; a tensor for each scaling or mixing.

    For a scaling $\lVert V_i \rVert^2 - k \lVert U_{:i} \rVert^2$, [n], where U moves by $g^{-k}$, mostly with k = 1;
    for a mixing $VV^\top - U^\top U$, [n, n]. Theorem 2.10 of the chapter *Symmetries of networks*.

    Args:
        params: the parameters by name.
        symmetry: scalings and mixings; other factors conserve nothing here.

    Raises:
        TeleportError: when `params` is no dictionary, or `symmetry` no symmetry.

    >>> from teleport_lite.symmetries import scaling
    >>> w = {"v": torch.tensor([[3.0], [1.0]]), "u": torch.tensor([[2.0, 2.0]])}
    >>> conserved_quantities(w, scaling(2, "v", "u"))
    [tensor([ 5., -3.])]
    """
    found = []
    for factor in check_symmetry(symmetry):
        factor.check(params)
        group: Any = factor.group
        if isinstance(factor, NeuronSymmetry) and isinstance(group, (PositiveScaling, GeneralLinear)):
            home = params[factor.legs[0].name].device
            axes = [factor.axis(p := params[leg.name], leg) + factor.offset_of(p, leg) for leg in factor.legs]
            grams = [leg.exponent * group.gram(a, 0).to(home) for leg, a in zip(factor.legs, axes, strict=True)]
            found.append(torch.stack(grams).sum(0))
    return found
