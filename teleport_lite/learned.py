r"""Learned optimizers: a recurrent network reads gradients and emits steps and group elements.

One step, from parameters w with gradient $\nabla$, is

- "fixed" or "rate": $w \mapsto w' - \eta\,\nabla L(w')$ with $w' = e^{\xi} \cdot w$, teleport first;
- "update": $w \mapsto e^{\xi} \cdot (w + u)$, the update where its gradient was read, then the teleport,

with $\eta$, u and $\xi$ emitted by a two-layer LSTM (arXiv:2305.13404, section 5; with momentum after
arXiv:2504.15399). An exact symmetry carries the gradient to w' for free; a mini-batch one needs a second gradient.
Everything runs on a batch of problems at once. Derived in the chapter *Learning to teleport*.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap

from teleport_lite.errors import DivergenceError, NoSymmetryError, TeleportError, UnknownNameError
from teleport_lite.functional import Params, norm
from teleport_lite.groups import Group, PositiveScaling
from teleport_lite.groups.base import draw
from teleport_lite.runtime import as_inputs
from teleport_lite.symmetries.base import Symmetry, check_radius
from teleport_lite.symmetries.minibatch import MiniBatchMixing
from teleport_lite.symmetries.product import Product

EMITS = ("fixed", "rate", "update")
TELEPORTS = ("none", "learned", "random")
EXPLODED = 1e4  # times the loss at the start of a problem
PATIENCE = 10  # failures in a row without a new checkpoint


@dataclass(frozen=True)
class Task:
    """A family of problems; every tensor of `params` and `data` has one more dimension in front, the problems.

    Args:
        loss: (params, data) of one problem -> its loss, a positive scalar.
        sample: generator -> (params, data) of a batch of problems.
        symmetry: a symmetry of one problem, or data -> such a symmetry (see `on_batch`).
    """

    loss: Callable[[Params, Any], Tensor]
    sample: Callable[[torch.Generator], tuple[Params, Any]]
    symmetry: Symmetry | Callable[[Any], Symmetry] | None = None

    def on(self, data: Any) -> Product:
        """The symmetry of the problem with these data.

        Raises:
            NoSymmetryError: when the task has none.
        """
        if self.symmetry is None:
            raise NoSymmetryError(["the task was made without a symmetry"], "pass symmetry=... to Task")
        return Product([self.symmetry if isinstance(self.symmetry, Symmetry) else self.symmetry(data)])

    def values(self, params: Params, data: Any) -> Tensor:
        """The losses of all problems, [problems]."""
        return vmap(self.loss)(params, data)

    def act(self, params: Params, xi: tuple, data: Any) -> Params:
        """The parameters of all problems, each moved by its own element."""
        return vmap(lambda p, x, d: self.on(d).act(p, x))(params, xi, data)

    def transport(self, grads: Params, xi: tuple, data: Any) -> Params:
        """Their gradients, carried along."""
        return vmap(lambda g, x, d: self.on(d).transport(g, x))(grads, xi, data)

    def slopes(self, grads: Params, data: Any) -> Tensor:
        r"""How fast $\log\|\nabla L\|$ grows along each coordinate of the group, [problems, dim]."""

        def slope(g: Params, d: Any) -> Tensor:
            symmetry = self.on(d)
            found = torch.func.grad(lambda xi: norm(symmetry.transport(g, xi)).log())(symmetry.zeros(g))
            return torch.cat([x.flatten() for x in found])

        return vmap(slope)(grads, data)


def on_batch(symmetry: Product, inputs: object) -> Product:
    """Mini-batch symmetries, as `minibatch_symmetries` gives them, on another batch of inputs."""
    factors = [copy.copy(factor) for factor in symmetry]
    for factor in factors:
        if isinstance(factor, MiniBatchMixing):
            factor.inputs = as_inputs(inputs)
    return Product(factors)


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

        def cut(pair):
            return None if pair is None else tuple(t.detach() for t in pair)

        velocity = self.velocity and {name: v.detach() for name, v in self.velocity.items()}
        return State(cut(self.memory), cut(self.element_memory), velocity)


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
            if (symmetry := _of_one(task, data)).exact and symmetry.linear:
                grads = task.transport(grads, xi, data)
                state.velocity = state.velocity and task.transport(state.velocity, xi, data)
            else:
                grads = gradient(task, params, data, keep=train, create=train)[1]
        if "decay" in emitted:
            decay = emitted["decay"].sigmoid()
            old = state.velocity or {name: torch.zeros_like(g) for name, g in grads.items()}
            grads = state.velocity = {name: _each(decay, old[name]) + g for name, g in grads.items()}
        return values, {name: p - _each(size, grads[name]) for name, p in params.items()}, state

    def element(
        self, task: Task, params: Params, data: Any, emitted: dict[str, Tensor], generator: torch.Generator | None
    ) -> tuple | None:
        """The coordinates of the group elements of all problems, one tensor a factor; None without a teleport."""
        if self.teleports == "none":
            return None
        symmetry = _of_one(task, data)
        zeros = symmetry.zeros({name: p[0] for name, p in params.items()})
        like, problems = zeros[0], len(next(iter(params.values())))
        if self.teleports == "learned":
            raw = emitted["element"]
        else:
            shape = problems, sum(z.numel() for z in zeros)
            raw = draw(torch.randn, *shape, like=like, generator=generator)
        parts = [
            r.view(problems, *z.shape) for r, z in zip(raw.split([z.numel() for z in zeros], 1), zeros, strict=True)
        ]
        pairs = zip(symmetry, parts, strict=True)
        return tuple(vmap(lambda x, g=f.group: bounded(g, x, self.radius))(part) for f, part in pairs)


def gradient(
    task: Task, params: Params, data: Any, *, keep: bool = False, create: bool = False
) -> tuple[Tensor, Params]:
    """The losses of all problems, differentiable when `keep`, and their gradients, differentiable when `create`."""
    with torch.enable_grad():
        points = params if keep else {name: p.detach() for name, p in params.items()}
        points = {name: p if p.requires_grad else p.detach().requires_grad_() for name, p in points.items()}
        values = task.values(points, data)
        grads = torch.autograd.grad(values.sum(), [*points.values()], retain_graph=keep, create_graph=create)
    return values if keep else values.detach(), dict(zip(points, grads, strict=True))


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


@dataclass
class History:
    """What happened in meta-training.

    Attributes:
        score: by batch of problems, the mean over steps and problems of the logarithm of the loss.
        failures: (batch, step, what) of everything that was not finite or exploded.
    """

    score: list[float] = field(default_factory=list)
    failures: list[tuple[int, int, str]] = field(default_factory=list)


def meta_train(
    optimizer: LearnedOptimizer,
    task: Task,
    *,
    batches: int,
    steps: int = 100,
    unroll: int = 10,
    lr: float = 1e-3,
    clip: float = 1.0,
    generator: torch.Generator,
    checkpoint: str | os.PathLike | None = None,
    every: int = 10,
    progress: Callable[[range], Iterable[int]] = iter,
) -> History:
    r"""Train `optimizer` in place: minimise the mean of $\log L(w_t)$ over steps and problems by Adam.

    Each batch of problems is run for `steps` steps; after every `unroll` of them the gradient of the losses in
    between is clipped and applied, and the graph is cut. A loss that exceeds `EXPLODED` times its first value ends its
    batch there, after a last update. When a loss or a gradient is not finite, training goes back to the last
    checkpoint and on with fresh problems. Both are noted with the step.

    Args:
        optimizer: what to train.
        task: where its problems come from.
        batches: how many batches of problems.
        steps: steps on each problem.
        unroll: steps between two updates; divides `steps`.
        lr: the rate of Adam.
        clip: bound on the norm of a gradient.
        generator: draws problems and random teleports.
        checkpoint: a file that is written after every `every` batches and at the end; when it exists, training goes on
            from there, bit for bit as if it had not stopped.
        every: batches between two checkpoints, which are kept in memory when there is no file.
        progress: wraps the range of batches, such as `tqdm.tqdm`.

    Raises:
        TeleportError: when `unroll` does not divide `steps`.
        DivergenceError: when training fails again and again from the same checkpoint.
    """
    if min(batches, steps, unroll, every) < 1 or steps % unroll:
        raise TeleportError(
            "positive numbers, steps a multiple of unroll", (batches, steps, unroll, every), "change them"
        )
    adam = torch.optim.Adam(optimizer.parameters(), lr=lr)
    history, done, failed = History(), 0, 0

    def snapshot() -> dict:
        random = generator.get_state()
        saved = {"optimizer": optimizer.state_dict(), "adam": adam.state_dict(), "score": history.score}
        return copy.deepcopy(saved | {"random": random, "done": done, "failures": history.failures})

    def restore(saved: dict) -> None:
        nonlocal done
        saved = copy.deepcopy(saved)
        optimizer.load_state_dict(saved["optimizer"])
        adam.load_state_dict(saved["adam"])
        done, history.score = saved["done"], saved["score"]

    path = None if checkpoint is None else Path(checkpoint)
    if path is not None and path.exists():
        last = torch.load(path, weights_only=True)
        restore(last)
        history.failures = [tuple(f) for f in last["failures"]]
        generator.set_state(last["random"])
    last = snapshot()
    bar = iter(progress(range(done, batches)))
    while done < batches:
        try:
            score, exploded = _episode(optimizer, task, adam, steps, unroll, clip, generator)
            history.score.append(score)
            if exploded is not None:
                history.failures.append((done, exploded, "a loss exploded"))
        except _Failure as failure:
            history.failures.append((done, *failure.args))
            failed += 1
            if failed >= PATIENCE:
                got = f"{failed} failures, the last at batch {done}, step {failure.args[0]}: {failure.args[1]}"
                raise DivergenceError("training that stays finite", got, "lower lr, size or radius") from None
            restore(last)
            continue
        next(bar, None)
        done += 1
        if done % every == 0 or done == batches:
            last, failed = snapshot(), 0
            if path is not None:
                torch.save(last, partial := path.with_name(path.name + ".part"))
                partial.replace(path)
    next(bar, None)
    return history


class _Failure(Exception):
    """(step, what) of an unroll that cannot be used."""


def _episode(optimizer, task, adam, steps, unroll, clip, generator) -> tuple[float, int | None]:
    """One batch of problems: the mean of the logarithms of their losses, and the step at which one exploded.

    Raises:
        _Failure: when something is not finite.
    """
    params, data = task.sample(generator)
    state, scores, limit = State(), [], None
    for first in range(0, steps, unroll):
        params = {name: p.detach().requires_grad_() for name, p in params.items()}
        state, losses, exploded = state.detach(), [], None
        for step in range(first, first + unroll + 1):
            try:
                if step < first + unroll:
                    values, params, state = optimizer.step(task, params, data, state, generator)
                else:
                    values = task.values(params, data)
            except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
                raise _Failure(step, "a group element is not finite") from error
            losses.append(values)
            limit = EXPLODED * values.detach() if limit is None else limit
            if not values.isfinite().all():
                raise _Failure(step, "a loss is not finite")
            if (values > limit).any():
                exploded = step
                break
        if exploded == first:
            break
        score = torch.stack(losses[1:]).log().mean()
        adam.zero_grad()
        score.backward()
        size = nn.utils.clip_grad_norm_(optimizer.parameters(), clip)
        if not math.isfinite(size):
            raise _Failure(first + len(losses) - 1, "the gradient is not finite")
        adam.step()
        scores.append(float(score.detach()))
        if exploded is not None:
            break
    return sum(scores) / max(len(scores), 1), exploded


def _each(factors: Tensor, tensor: Tensor) -> Tensor:
    """A factor [problems] times its own slice of a tensor [problems, ...]."""
    return factors.view(-1, *[1] * (tensor.ndim - 1)) * tensor


def _of_one(task: Task, data: Any) -> Product:
    """The symmetry of the first problem."""
    return task.on(torch.utils._pytree.tree_map(lambda t: t[0], data))
