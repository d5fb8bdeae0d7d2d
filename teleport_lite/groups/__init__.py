"""Groups in coordinates: one file a group."""

from teleport_lite.groups.base import Group
from teleport_lite.groups.general_linear import GeneralLinear
from teleport_lite.groups.orthogonal import PairRotations, SpecialOrthogonal
from teleport_lite.groups.permutation import Permutation
from teleport_lite.groups.scaling import PositiveScaling
from teleport_lite.groups.shears import Shears
from teleport_lite.groups.signs import Signs
from teleport_lite.groups.translation import Translation

__all__ = [
    "GeneralLinear",
    "Group",
    "PairRotations",
    "Permutation",
    "PositiveScaling",
    "Shears",
    "Signs",
    "SpecialOrthogonal",
    "Translation",
]
