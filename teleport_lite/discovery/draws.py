"""Random draws under control: what a model computes in training, made comparable.

Two models that differ by a permutation of neurons draw the same dropout masks in distribution, but not one by one.
`Draws(even=True)` gives all entries of a tensor the same draw, which no permutation can move. Decisions that a whole
layer is run or skipped hang on single draws; a `pattern` sets them, so that a few runs see layers present and absent.
"""

from __future__ import annotations

import random
import sys
from itertools import cycle

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from teleport_lite.discovery.dispatch import DispatchMode

LOW, HIGH = 1e-6, 1 - 1e-6
PATTERNS = ((LOW,), (HIGH,), (LOW, HIGH), (HIGH, LOW))
UNIFORM = {"rand", "rand_like", "uniform", "uniform_"}
SAMPLERS = "randn randn_like normal normal_ randint randint_like random_ exponential_ geometric_ cauchy_ log_normal_"
DROPOUTS = "dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout feature_alpha_dropout"


class Draws(DispatchMode):
    """Decides how random numbers are drawn.

    Args:
        even: one draw for all entries of a tensor; dropout keeps everything where `keep`.
        keep: whether Bernoulli draws are all 1, when `even`.
        pattern: values in (0, 1) that single uniform and Bernoulli draws take in turn; empty for random ones.

    Attributes:
        single: whether there were draws of single numbers.
        many: whether there were draws of several numbers at once.
        outside: whether Python or NumPy has drawn, whose draws cannot be set.
    """

    def __init__(self, even: bool = False, keep: bool = True, pattern: tuple[float, ...] = ()) -> None:
        super().__init__()
        self.even, self.keep, self.pattern = even, keep, cycle(pattern) if pattern else None
        self.single = self.many = self.outside = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        name = func._schema.name.split("::")[1]
        if name == "native_dropout":
            return self._draw_dropout(func, *args, **kwargs)
        if name in ("rrelu_with_noise", "rrelu_with_noise_"):
            self.many = True
            return func(*args[:4]) if self.even else func(*args, **kwargs)
        if name in ("bernoulli", "bernoulli_"):
            return self._draw_bernoulli(func, name, *args, **kwargs)
        if name in UNIFORM or name in SAMPLERS.split():
            return self._draw_tensor(func, name, args, kwargs)
        self.many = True  # permutations, categories: drawn as they are
        return func(*args, **kwargs)

    def _changes_draw(self, count: int) -> bool:
        """Whether this draw of `count` numbers is one that is changed."""
        self.single |= count == 1
        self.many |= count > 1
        return self.pattern is not None if count == 1 else self.even

    def _draw_uniform(self, like: Tensor) -> Tensor:
        """A number in (0, 1)."""
        if self.pattern is not None:
            return torch.full((), next(self.pattern), dtype=torch.float64, device=like.device)
        return torch.rand((), dtype=torch.float64, device=like.device)

    def _draw_dropout(self, func, x, p, train=True):
        if not train or not self._changes_draw(x.numel()):
            return func(x, p, train)
        kept = torch.ones_like(x, dtype=torch.bool) & ((self.keep and self.even) | (self._draw_uniform(x) >= p))
        return x * kept / max(1 - p, 1e-300), kept

    def _draw_bernoulli(self, func, name, x, p=None, *, generator=None):
        if not self._changes_draw(x.numel()):
            return func(x, *(() if p is None else (p,)), generator=generator)
        chance = (0.5 if name == "bernoulli_" else x) if p is None else p
        u = self._draw_uniform(x)
        u = torch.zeros_like(u) if self.even and self.keep and x.numel() > 1 else u
        drawn = torch.broadcast_to(torch.as_tensor(u < chance), x.shape).to(x.dtype)
        return x.copy_(drawn) if name == "bernoulli_" else drawn

    def _draw_tensor(self, func, name: str, args: tuple, kwargs: dict) -> Tensor:
        place = next((i for i, a in enumerate(args) if isinstance(a, (list, tuple))), None)  # of the shape, if any
        shape = torch.Size(args[place]) if place is not None else args[0].shape
        if not self._changes_draw(shape.numel()):
            return func(*args, **kwargs)
        if shape.numel() == 1:
            return self._draw_single(func, name, args, kwargs)
        if place is not None:
            one = func(*args[:place], [1], *args[place + 1 :], **kwargs)
        else:
            one = func(args[0].new_zeros(1), *args[1:], **kwargs)
        drawn = one.expand(shape)
        return args[0].copy_(drawn) if name.endswith("_") else drawn.clone()

    def _draw_single(self, func, name: str, args: tuple, kwargs: dict) -> Tensor:
        out = func(*args, **kwargs)
        if name in UNIFORM:
            low, high = args[1:3] if name.startswith("uniform") and len(args) > 2 else (0, 1)
            out.copy_(low + (high - low) * self._draw_uniform(out))
        elif name == "randint":
            low, high = (args[0], args[1]) if len(args) > 2 else (0, args[0])
            out.copy_(low + ((high - low) * self._draw_uniform(out)).floor())
        return out


class WithoutDropout(TorchFunctionMode):
    """Leaves dropout away: masks that differ from entry to entry would seem to tell the neurons apart."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in DROPOUTS.split() and args:
            return args[0]
        return func(*args, **(kwargs or {}))


def seed_everything(seed: int) -> None:
    """Seed the generators of the CPU (those of devices are left alone), of Python and of NumPy."""
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)


def drawn_outside(seed: int) -> bool:
    """Whether Python or NumPy has drawn anything since `seed_everything(seed)`."""
    if random.getstate() != random.Random(seed).getstate():
        return True
    if "numpy" not in sys.modules:
        return False
    numpy = sys.modules["numpy"].random
    now, then = numpy.get_state(), numpy.RandomState(seed).get_state()
    return now[2:] != then[2:] or bool((now[1] != then[1]).any())
