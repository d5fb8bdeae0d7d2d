"""The learned optimizer: an LSTM that reads gradients and emits the step and the group element."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap

from teleport_lite.errors import NoSymmetryError, TeleportError, UnknownNameError
from teleport_lite.functional import Params
from teleport_lite.groups import Group, PositiveScaling
from teleport_lite.groups.base import draw_like
from teleport_lite.learned.task import Task, gradient, symmetry_of_first
from teleport_lite.symmetries.base import Symmetry, check_radius

EMITS = ("fixed", "rate", "update")
TELEPORTS = ("none", "learned", "random")


def bounded(group: Group, raw: Tensor, radius: float) -> Tensor:
    r"""Coordinates of operator norm below `radius`, from any numbers `raw`.

    $r\tanh(x_i)$ for the factors of a scaling, $r\,x / \sqrt{1 + \|x\|^2}$ in every other group.

    >>> bounded(PositiveScaling(2), torch.tensor([0.0, 100.0]), 0.5)
    tensor([0.0000, 0.5000])
    """
    if isinstance(group, PositiveScaling):
        return radius * raw.tanh()
    return radius * raw / (1 + raw.square().sum()).sqrt()


@dataclass
class State:
    """What a learned optimizer remembers between steps: its LSTM states, and the velocity of momentum."""

    memory: Any = None
    element_memory: Any = None
    velocity: Params | None = None

    def detach(self) -> State:
        """The same numbers, cut off from the graph that gave them."""

        def detach_pair(pair):
            return None if pair is None else tuple(t.detach() for t in pair)

        velocity = self.velocity and {name: v.detach() for name, v in self.velocity.items()}
        return State(detach_pair(self.memory), detach_pair(self.element_memory), velocity)


class LearnedOptimizer(nn.Module):
    r"""A two-layer LSTM that reads gradients and emits the step and the group element.

    It reads $\operatorname{arsinh}(\nabla / \mathrm{rms}(\nabla))$ and $\log\mathrm{rms}(\nabla)$, so that losses of
    any size look alike. All heads start at zero: before training it does not teleport, "rate" is gradient descent with
    the rate `size`, and "update" stands still.

    Args:
        params: parameters of one problem, for their shapes.
        symmetry: the symmetry of one problem, for its dimension; needed to teleport.
        emits: "fixed" (gradient steps of rate `size`), "rate" (a rate of its own), or "update" (the whole step).
        teleports: "none", "learned", or "random" (as far, without being read off anything).
        hidden: width of the LSTM.
        size: the learning rate before training, or the size of an entry of an update.
        radius: bound on the operator norm of each factor of the group element.
        momentum: with "rate", also emit the decay $\beta$ of a velocity, $v \mapsto \beta v + \nabla$, which an exact
            symmetry carries along like a gradient.
        coordinatewise: one small LSTM for all entries of w, one for all coordinates of the group, which reads
            `Task.slopes`; it fits networks of any width. Needs an exact symmetry that is linear in the parameters.

    Raises:
        UnknownNameError: for another name in `emits` or `teleports`.
        NoSymmetryError: when there is nothing to teleport along.
        TeleportError: when the arguments do not go together.

    >>> LearnedOptimizer({"w": torch.zeros(2)}, emits="rate", teleports="none", hidden=4).extra_repr()
    'emits=rate, teleports=none, radius=0.1'
    """

    def __init__(
        self,
        params: Params,
        symmetry: Symmetry | None = None,
        *,
        emits: str = "update",
        teleports: str = "learned",
        hidden: int = 64,
        size: float = 1e-2,
        radius: float = 0.1,
        momentum: bool = False,
        coordinatewise: bool = False,
    ) -> None:
        super().__init__()
        if emits not in EMITS:
            raise UnknownNameError("emission", emits, EMITS)
        if teleports not in TELEPORTS:
            raise UnknownNameError("kind of teleport", teleports, TELEPORTS)
        if teleports != "none" and (symmetry is None or not symmetry.dim):
            why = "none was passed" if symmetry is None else "all its groups are finite"
            raise NoSymmetryError([why], "pass symmetry=... with a continuous factor")
        if momentum and emits != "rate":
            raise TeleportError(
                "emits='rate' with momentum", repr(emits), "an LSTM that emits updates has its own memory"
            )
        if coordinatewise and symmetry is not None and not (symmetry.exact and symmetry.linear):
            raise TeleportError("an exact, linear symmetry", symmetry.holds, "pass coordinatewise=False")
        self.emits, self.teleports, self.size, self.radius = emits, teleports, size, check_radius(radius)
        self.coordinatewise = coordinatewise
        d = sum(p.numel() for p in params.values())
        self.memory = nn.LSTM(2 if coordinatewise else d + 1, hidden, num_layers=2)
        self.heads = nn.ModuleDict()
        if emits != "fixed":
            self.heads["size"] = nn.Linear(hidden, 1)
        if emits == "update":
            self.heads["entries"] = nn.Linear(hidden, 1 if coordinatewise else d)
        if momentum:
            self.heads["decay"] = nn.Linear(hidden, 1)
        if teleports == "learned" and symmetry is not None:
            self.heads["element"] = nn.Linear(hidden, 1 if coordinatewise else symmetry.dim)
            self.element_memory = nn.LSTM(1, hidden, num_layers=2) if coordinatewise else None
        for weight in self.heads.parameters():
            nn.init.zeros_(weight)

    def forward(self, grads: Params, state: State, slopes: Tensor | None = None) -> tuple[dict[str, Tensor], State]:
        """What the heads emit (size, decay, entries of the update, group element), [problems, ...]; the new state.

        Raises:
            TeleportError: when a coordinatewise teleport is to be emitted and `slopes` is missing.
        """
        flat = torch.cat([g.flatten(1) for g in grads.values()], 1)
        rms = flat.square().mean(1, keepdim=True).sqrt() + torch.finfo(flat.dtype).tiny
        relative, level = (flat / rms).asinh(), rms.log() / 10
        problems, d = flat.shape
        if self.coordinatewise:
            rows = torch.stack([relative, level.expand_as(relative)], -1).flatten(0, 1)
        else:
            rows = torch.cat([relative, level], 1)
        out, memory = self.memory(rows[None], state.memory)
        found = {name: head(out[0]) for name, head in self.heads.items() if name != "element"}
        if self.coordinatewise:
            found = {name: value.view(problems, d) for name, value in found.items()}
            if self.emits == "update":  # each entry has a size of its own
                found["entries"] = found["entries"] * found.pop("size").exp()
        emitted = {name: v if name == "entries" else v.mean(1) for name, v in found.items()}
        element_memory = None
        if "element" in self.heads:
            if self.element_memory is not None:
                if slopes is None:
                    raise TeleportError("the slopes along the group", None, "pass task.slopes(grads, data)")
                out, element_memory = self.element_memory(slopes.reshape(1, -1, 1), state.element_memory)
            emitted["element"] = self.heads["element"](out[0]).view(problems, -1)
        return emitted, State(memory, element_memory, state.velocity)

    def extra_repr(self) -> str:
        return f"emits={self.emits}, teleports={self.teleports}, radius={self.radius}"

    def step(
        self, task: Task, params: Params, data: Any, state: State, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Params, State]:
        """One step of all problems: the losses before it, the new parameters, the new state.

        The emission is a function of gradients that count as constants, as is usual; the step is differentiable in
        it, through the group element and the gradient at the moved parameters too.
        """
        train = torch.is_grad_enabled()
        values, grads = gradient(task, params, data, keep=train)
        grads = {name: g.detach() for name, g in grads.items()}
        slopes = None
        if self.coordinatewise and self.teleports == "learned":
            slopes = task.slopes(grads, data)
        emitted, state = self(grads, state, slopes)
        xi = self.element(task, params, data, emitted, generator)

        size = self.size * emitted["size"].exp() if "size" in emitted else values.new_full(values.shape, self.size)
        if self.emits == "update":
            flat = size[:, None] * emitted["entries"]
            parts = flat.split([p[0].numel() for p in params.values()], 1)
            params = {name: p + u.view_as(p) for (name, p), u in zip(params.items(), parts, strict=True)}
            return values, params if xi is None else task.act(params, xi, data), state

        if xi is not None:
            params = task.act(params, xi, data)
            if (symmetry := symmetry_of_first(task, data)).exact and symmetry.linear:
                grads = task.transport(grads, xi, data)
                state.velocity = state.velocity and task.transport(state.velocity, xi, data)
            else:
                grads = gradient(task, params, data, keep=train, create=train)[1]
        if "decay" in emitted:
            decay = emitted["decay"].sigmoid()
            old = state.velocity or {name: torch.zeros_like(g) for name, g in grads.items()}
            grads = state.velocity = {name: _scale_problems(decay, old[name]) + g for name, g in grads.items()}
        return values, {name: p - _scale_problems(size, grads[name]) for name, p in params.items()}, state

    def element(
        self, task: Task, params: Params, data: Any, emitted: dict[str, Tensor], generator: torch.Generator | None
    ) -> tuple | None:
        """The coordinates of the group elements of all problems, one tensor a factor; None without a teleport."""
        if self.teleports == "none":
            return None
        symmetry = symmetry_of_first(task, data)
        zeros = symmetry.zeros({name: p[0] for name, p in params.items()})
        like, problems = zeros[0], len(next(iter(params.values())))
        if self.teleports == "learned":
            raw = emitted["element"]
        else:
            shape = problems, sum(z.numel() for z in zeros)
            raw = draw_like(torch.randn, *shape, like=like, generator=generator)
        parts = [
            r.view(problems, *z.shape) for r, z in zip(raw.split([z.numel() for z in zeros], 1), zeros, strict=True)
        ]
        pairs = zip(symmetry, parts, strict=True)
        return tuple(vmap(lambda x, g=f.group: bounded(g, x, self.radius))(part) for f, part in pairs)


@torch.no_grad()
def run(
    optimizer: LearnedOptimizer,
    task: Task,
    params: Params,
    data: Any,
    steps: int,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The losses of all problems before every step and after the last, [steps + 1, problems]."""
    state, losses = State(), []
    for _ in range(steps):
        values, params, state = optimizer.step(task, params, data, state, generator)
        losses.append(values)
    return torch.stack([*losses, task.values(params, data)])


def _scale_problems(factors: Tensor, tensor: Tensor) -> Tensor:
    """A factor [problems] times its own slice of a tensor [problems, ...]."""
    return factors.view(-1, *[1] * (tensor.ndim - 1)) * tensor
