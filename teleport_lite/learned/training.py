"""Meta-training: a learned optimizer is trained on unrolls of its own steps."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from teleport_lite.errors import DivergenceError, TeleportError
from teleport_lite.learned.optimizer import LearnedOptimizer, State
from teleport_lite.learned.task import Task

EXPLODED = 1e4  # times the loss at the start of a problem
PATIENCE = 10  # failures in a row without a new checkpoint


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

    def take_snapshot() -> dict:
        random = generator.get_state()
        saved = {"optimizer": optimizer.state_dict(), "adam": adam.state_dict(), "score": history.score}
        return copy.deepcopy(saved | {"random": random, "done": done, "failures": history.failures})

    def restore_snapshot(saved: dict) -> None:
        nonlocal done
        saved = copy.deepcopy(saved)
        optimizer.load_state_dict(saved["optimizer"])
        adam.load_state_dict(saved["adam"])
        done, history.score = saved["done"], saved["score"]

    path = None if checkpoint is None else Path(checkpoint)
    if path is not None and path.exists():
        last = torch.load(path, weights_only=True)
        restore_snapshot(last)
        history.failures = [tuple(f) for f in last["failures"]]
        generator.set_state(last["random"])
    last = take_snapshot()
    bar = iter(progress(range(done, batches)))
    while done < batches:
        try:
            score, exploded = _train_on_batch(optimizer, task, adam, steps, unroll, clip, generator)
            history.score.append(score)
            if exploded is not None:
                history.failures.append((done, exploded, "a loss exploded"))
        except _FailedUnroll as failure:
            history.failures.append((done, *failure.args))
            failed += 1
            if failed >= PATIENCE:
                got = f"{failed} failures, the last at batch {done}, step {failure.args[0]}: {failure.args[1]}"
                raise DivergenceError("training that stays finite", got, "lower lr, size or radius") from None
            restore_snapshot(last)
            continue
        next(bar, None)
        done += 1
        if done % every == 0 or done == batches:
            last, failed = take_snapshot(), 0
            if path is not None:
                torch.save(last, partial := path.with_name(path.name + ".part"))
                partial.replace(path)
    next(bar, None)
    return history


class _FailedUnroll(Exception):
    """(step, what) of an unroll that cannot be used."""


def _train_on_batch(optimizer, task, adam, steps, unroll, clip, generator) -> tuple[float, int | None]:
    """One batch of problems: the mean of the logarithms of their losses, and the step at which one exploded.

    Raises:
        _FailedUnroll: when something is not finite.
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
                raise _FailedUnroll(step, "a group element is not finite") from error
            losses.append(values)
            limit = EXPLODED * values.detach() if limit is None else limit
            if not values.isfinite().all():
                raise _FailedUnroll(step, "a loss is not finite")
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
            raise _FailedUnroll(first + len(losses) - 1, "the gradient is not finite")
        adam.step()
        scores.append(float(score.detach()))
        if exploded is not None:
            break
    return sum(scores) / max(len(scores), 1), exploded
