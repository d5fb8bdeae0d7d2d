"""The rules, by family; importing this enters them all into the table."""

from teleport_lite.discovery.rules import (  # noqa: F401  # noqa: F401
    contraction,
    convolution,
    indexing,
    normalization,
    pieces,
    pointwise,
    pooling,
    reductions,
    spectral,
    views,
)
