"""Finding the symmetries of an unmodified model."""

from teleport_lite.discovery.find import find_symmetries

__all__ = ["find_symmetries"]
