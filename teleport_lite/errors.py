"""Errors that carry their facts: what was expected, what was found, and the remedy.

Every error the package raises on purpose is a `TeleportError`; its subclasses take facts rather than
sentences, so that a program can read `.expected`, `.got` and `.remedy` as easily as a person can.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

MANY = 12  # names, of which a message lists the nearest


class TeleportError(Exception):
    """Base of all errors of the package.

    Args:
        expected: what the routine needs.
        got: what it was given.
        remedy: what to do about it.

    >>> raise TeleportError("a positive radius", -1.0, "pass radius=1.0")
    Traceback (most recent call last):
    teleport_lite.errors.TeleportError: expected a positive radius, got -1.0; pass radius=1.0
    """

    def __init__(self, expected: object, got: object, remedy: str) -> None:
        self.expected, self.got, self.remedy = expected, got, remedy
        super().__init__(f"expected {expected}, got {got}; {remedy}")


class UnknownNameError(TeleportError, KeyError):
    """A name that a registry does not hold; the message lists those it does, or of many the nearest ones.

    >>> raise UnknownNameError("objective", "gradnorm", ["gradient_norm", "weight_norm"])
    Traceback (most recent call last):
    teleport_lite.errors.UnknownNameError: expected one of 'gradient_norm', 'weight_norm', got 'gradnorm'; \
pass a known objective
    """

    def __init__(self, kind: str, name: object, known: Iterable[str]) -> None:
        names = [*map(str, known)]
        near = get_close_matches(str(name), names, 5, 0.0) if len(names) > MANY else names
        listed = ", ".join(map(repr, near)) + f" or {len(names) - len(near)} others" * (near != names)
        super().__init__(f"one of {listed or 'nothing (there is none)'}", repr(name), f"pass a known {kind}")

    __str__ = Exception.__str__


class ShapeError(TeleportError, ValueError):
    """A tensor whose shape does not fit the symmetry, the group or the model."""

    def __init__(self, name: str, expected: object, got: object, remedy: str = "") -> None:
        got = got if isinstance(got, str) else f"shape {got}"
        super().__init__(f"{name} of shape {expected}", got, remedy or f"reshape {name}")


class ParameterError(TeleportError, ValueError):
    """A parameter that cannot be teleported: frozen, integer, complex, shared in two roles, or not finite."""

    def __init__(self, name: str, expected: str, got: str, remedy: str) -> None:
        self.name = name
        super().__init__(f"parameter {name!r} to be {expected}", got, remedy)


class EmptyModelError(TeleportError, ValueError):
    """A model without any trainable parameter."""

    def __init__(self, model: object) -> None:
        super().__init__(
            "a model with trainable parameters",
            f"{type(model).__name__} with none",
            "pass a model whose parameters have requires_grad=True",
        )


WITHOUT_GROUP = "use level_set_teleport, which needs no symmetry and keeps the loss on its batch, not the outputs"


class NoSymmetryError(TeleportError, ValueError):
    """A teleport was asked for, and the symmetry has no factor to move along."""

    def __init__(self, reasons: Iterable[str], remedy: str = WITHOUT_GROUP) -> None:
        self.reasons = list(reasons)
        frozen = any("is frozen" in reason for reason in self.reasons)
        super().__init__(
            "a symmetry with at least one factor to move along",
            "none (" + ("; ".join(self.reasons) or "an empty product") + ")",
            "unfreeze what is frozen, or " * frozen + remedy,
        )


class ActivationError(TeleportError, ValueError):
    """An activation without the property that the asked symmetry needs."""

    def __init__(self, activation: object, needs: str, remedy: str) -> None:
        super().__init__(f"an activation that is {needs}", repr(activation), remedy)


class BatchError(TeleportError, ValueError):
    """A batch smaller or larger than a mini-batch symmetry needs."""


class LossError(TeleportError, ValueError):
    """A loss that cannot be teleported on: not a scalar, independent of the net, or nondeterministic."""


class RankError(TeleportError, RuntimeError):
    """Processes that train one model do not hold the same, or one of them has failed.

    >>> raise RankError("the same generator on every rank", [1, 3], "another one", "seed it alike")
    Traceback (most recent call last):
    teleport_lite.errors.RankError: expected the same generator on every rank, got another one on rank 1, 3; \
seed it alike
    """

    def __init__(self, expected: str, ranks: list[int], got: str, remedy: str) -> None:
        self.ranks = ranks
        super().__init__(expected, f"{got} on rank {', '.join(map(str, ranks))}" if ranks else got, remedy)


class StateError(TeleportError, ValueError):
    """An entry of an optimizer's state that cannot be carried along; the message names both.

    >>> raise StateError("Lion", "exp_avg", "a rule in RULES", "none", "pass state='reset'")
    Traceback (most recent call last):
    teleport_lite.errors.StateError: expected a rule in RULES for 'exp_avg' of Lion, got none; pass state='reset'
    """

    def __init__(self, optimizer: str, entry: str, expected: str, got: str, remedy: str) -> None:
        self.optimizer, self.entry = optimizer, entry
        super().__init__(f"{expected} for {entry!r} of {optimizer}", got, remedy)


class DivergenceError(TeleportError, ArithmeticError):
    """Meta-training that diverges again and again from the same checkpoint."""


class DataError(TeleportError, OSError):
    """A dataset file that is missing, truncated or of another format; the message names the file."""

    def __init__(self, path: object, expected: str, got: str, remedy: str) -> None:
        self.path = str(path)
        super().__init__(f"{expected} in {path}", got, remedy)

    __str__ = Exception.__str__
