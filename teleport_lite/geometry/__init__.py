"""The geometry of the loss around a point: sharpness, curvature of orbits, conserved quantities, the Hessian.

All is measured through losses, gradients and Hessian-vector products, on the model as it is; nothing of it changes.
"""

from teleport_lite.geometry.conserved import conserved_quantities
from teleport_lite.geometry.curvature import curvature, kappa, mean_kappa, sample_curves
from teleport_lite.geometry.hessian import hessian_eigenvalues, hessian_trace, sign_probes
from teleport_lite.geometry.sharpness import (
    RADII,
    Directions,
    goes_one_by_one,
    losses_around,
    mean_loss_around,
    sharpness,
    unit_directions,
)

__all__ = [
    "RADII",
    "Directions",
    "conserved_quantities",
    "curvature",
    "goes_one_by_one",
    "hessian_eigenvalues",
    "hessian_trace",
    "kappa",
    "losses_around",
    "mean_kappa",
    "mean_loss_around",
    "sample_curves",
    "sharpness",
    "sign_probes",
    "unit_directions",
]
