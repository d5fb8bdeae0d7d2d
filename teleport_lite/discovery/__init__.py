"""Finding the symmetries of an unmodified model, and teaching that an operator that it does not know."""

from teleport_lite.discovery.find import find_symmetries
from teleport_lite.discovery.registry import register_rule

__all__ = ["find_symmetries", "register_rule"]
