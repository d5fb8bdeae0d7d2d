"""The rules, by family; importing this enters them all into the table."""

from teleport_lite.discovery.rules import (
    contraction,
    convolution,
    indexing,
    normalization,
    pieces,
    pointwise,
    pooling,
    reductions,
    views,
)

__all__ = [
    "contraction",
    "convolution",
    "indexing",
    "normalization",
    "pieces",
    "pointwise",
    "pooling",
    "reductions",
    "views",
]
