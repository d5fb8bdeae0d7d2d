"""Which elements of a group are tried: the same ones for the same symmetry, whatever is tried beside it."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from teleport_lite.functional import Params
from teleport_lite.groups import Permutation, Signs, Translation
from teleport_lite.symmetries.axes import NeuronSymmetry
from teleport_lite.symmetries.base import Symmetry

DRAWN = 2  # random elements of small finite groups
FAR = 3  # how far each coordinate of a translation goes, about


def random_element(symmetry: Symmetry, turn: int, params: Params) -> Tensor:
    """A random element; of a finite group, in two turns, elements that generate it or nearly so.

    The same symmetry has the same element in a turn, whatever stands beside it.
    """
    n, like = symmetry.group.n, params[symmetry.names[0]]
    two = turn if turn < 2 + DRAWN else 0
    if isinstance(symmetry.group, Permutation) and two < 2:  # a cycle, then the exchange of two
        order = torch.arange(n, device=like.device)
        return order.roll(1) if two == 0 else torch.cat([order[:2].flip(0), order[2:]])
    if not isinstance(symmetry, NeuronSymmetry):  # a translation so far that nothing saturates
        radius = FAR * n**0.5 if isinstance(symmetry.group, Translation) else 1.0
        return symmetry.sample(
            params, generator=_drawn_for(f"{getattr(symmetry, 'moves', symmetry)} {turn}"), radius=radius
        )
    legs = f"{symmetry.legs} {symmetry.group}"
    if isinstance(symmetry.group, Signs) and two < 2:  # the first and random ones but the last, then all the others
        flipped = torch.rand(n, generator=_drawn_for(legs)) < 0.5
        flipped[-1] = False
        flipped[1:] ^= two == 1
        flipped[0] = two == 0 or n == 1
        return 1 - 2 * flipped.to(like)
    return symmetry.sample(params, generator=_drawn_for(f"{legs} {turn}"))


def _drawn_for(text: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(text.encode()))
