"""Teleports beside an optimizer, and what becomes of its state."""

from teleport_lite.optim.state_rules import KINDS, RULES, STATES, move
from teleport_lite.optim.teleporter import Teleporter

__all__ = ["KINDS", "RULES", "STATES", "Teleporter", "move"]
