"""The symmetries: what acts on the parameters of a network without changing what it computes."""

from typing import Any

from teleport_lite.symmetries.axes import Leg, NeuronSymmetry, mixing, permutation, scaling, sign
from teleport_lite.symmetries.base import Symmetry
from teleport_lite.symmetries.gained import GainedSymmetry
from teleport_lite.symmetries.minibatch import IncomingMixing, OutgoingMixing, minibatch_symmetries
from teleport_lite.symmetries.modules import ModulePermutation
from teleport_lite.symmetries.product import Product
from teleport_lite.symmetries.shifts import Move, Shift, Step

__all__ = [
    "GainedSymmetry",
    "IncomingMixing",
    "Leg",
    "ModulePermutation",
    "Move",
    "NeuronSymmetry",
    "OutgoingMixing",
    "Product",
    "Shift",
    "Step",
    "Symmetry",
    "minibatch_symmetries",
    "mixing",
    "permutation",
    "scaling",
    "sign",
]


def __getattr__(name: str) -> Any:
    """The test functions of the plane, which serve the book, where they are asked for.

    Raises:
        AttributeError: for any other name.
    """
    if name in ("PlaneRotation", "TestFunction"):
        from teleport_lite.book import plane

        return getattr(plane, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
