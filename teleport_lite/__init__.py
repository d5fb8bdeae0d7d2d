"""Parameter-space symmetries of neural networks, and teleports along them.

A symmetry is a group acting on a model's parameters without changing what the model computes; teleporting is choosing
a group element on purpose.
"""

from teleport_lite import learned, objectives, symmetries
from teleport_lite.book import data
from teleport_lite.discovery import find_symmetries, register_rule
from teleport_lite.errors import TeleportError
from teleport_lite.geometry import conserved_quantities, curvature, hessian_eigenvalues, hessian_trace, sharpness
from teleport_lite.level_set import level_set_teleport
from teleport_lite.null_space import null_space_teleport
from teleport_lite.objectives import Objective, one_step_loss
from teleport_lite.optim import Teleporter
from teleport_lite.published import paper_teleport
from teleport_lite.report import Report
from teleport_lite.symmetries import Product, Symmetry, minibatch_symmetries
from teleport_lite.teleport import teleport
from teleport_lite.walk import LevelSetReport

__version__ = "0.1.0"

__all__ = [
    "LevelSetReport",
    "Objective",
    "Product",
    "Report",
    "Symmetry",
    "TeleportError",
    "Teleporter",
    "conserved_quantities",
    "curvature",
    "data",
    "find_symmetries",
    "hessian_eigenvalues",
    "hessian_trace",
    "learned",
    "level_set_teleport",
    "minibatch_symmetries",
    "null_space_teleport",
    "objectives",
    "one_step_loss",
    "paper_teleport",
    "register_rule",
    "sharpness",
    "symmetries",
    "teleport",
]
