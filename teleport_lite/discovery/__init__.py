"""Finding the symmetries of an unmodified model."""

from teleport_lite.discovery.find import find_symmetries
from teleport_lite.discovery.inputs import Call

__all__ = ["Call", "find_symmetries"]
