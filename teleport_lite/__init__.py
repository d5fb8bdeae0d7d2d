"""Parameter-space symmetries of neural networks, and teleports along them.

A symmetry is a group acting on a model's parameters without changing what the model computes; teleporting is choosing
a group element on purpose.
"""

from teleport_lite import data, symmetries
from teleport_lite.discover import find_symmetries
from teleport_lite.errors import TeleportError
from teleport_lite.objectives import Objective, one_step_loss
from teleport_lite.symmetries import Product, Symmetry, minibatch_symmetries
from teleport_lite.teleport import Report, teleport

__version__ = "0.1.0"

__all__ = [
    "Objective",
    "Product",
    "Report",
    "Symmetry",
    "TeleportError",
    "data",
    "find_symmetries",
    "minibatch_symmetries",
    "one_step_loss",
    "symmetries",
    "teleport",
]
