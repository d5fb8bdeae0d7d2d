"""Teleports inside a training loop: when, and what becomes of the optimizer's state."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from teleport_lite.distributed import Ranks
from teleport_lite.errors import ParameterError, TeleportError, UnknownNameError
from teleport_lite.functional import Params
from teleport_lite.objectives import Objective, as_objective
from teleport_lite.optim.state_rules import STATES, move
from teleport_lite.report import Report
from teleport_lite.runtime import LossFn, check_generator, check_loss_fn, describe_value, unwrap_compiled
from teleport_lite.symmetries.base import Symmetry, check_radius
from teleport_lite.symmetries.product import Product, check_symmetry
from teleport_lite.teleport import carry_out, check_movable, symmetries_of
from teleport_lite.transaction import Check, Finish


class Teleporter:
    r"""Teleports a model while it is trained; `step` is called beside `optimizer.step()`, as that of a scheduler is.

    Calls of `step` are numbered from 0, and the number is what the schedule sees: every={0}, the default, teleports
    once, at the first, and every=50 at calls 0, 50, 100, ... Each teleport is exact or nothing, for the model and for
    the state of the optimizer alike. `p.grad` is left as found: teleport after `optimizer.step()` and before the next
    backward pass.

    All teleports of one Teleporter share one `radius`: each spends the norm of its element, so that together they
    stretch no direction by more than $e^{radius}$, however many there are. The steps of a collection divide what is
    left evenly (so a single one may use all of it); a schedule without an end uses half of what is left each time, and
    is over when a thousandth is left. Rotations, permutations and signs stretch nothing and spend nothing.

    Why: a stretch by $e^{\xi}$ acts on a gradient step as a change of the learning rates of single weights by up to
    $e^{4\xi}$. At the start of training, where the loss is flat, that speeds it up; late, at a tuned rate, a large one
    makes it diverge. Teleport early.

    Under `DistributedDataParallel` all ranks call `step`, each with the loss on its own shard; see `teleport`. Rank 0
    decides when a schedule is random or a callable.

    See the chapter *Momentum, AdaGrad, RMSProp, Adam*.

    Args:
        model: the model, compiled or not, distributed or not.
        optimizer: its optimizer, or several, that together hold all that moves; read, and changed by a teleport as
            `state` says. With an optimizer that wraps another pass both, or the inner one if only that has a state.
        symmetry: where to move; by default that of `find_symmetries` on the inputs of the first teleport, found once.
        every: when to teleport: every so many steps (an integer), at these steps (a collection), with this probability
            at each step (a float between 0 and 1, drawn from `generator`), or where a callable of the step says so.
        objective: what to improve, as in `teleport`.
        radius: bound on the operator norm of the coordinates, for all teleports together.
        state: "transport" to carry the optimizer's state along, as `teleport_lite.optim.state_rules` says;
            "reset" to begin with a new state after each teleport; "keep" to leave it as it was, made for old weights.
        maximize: the direction; by default the natural one of the objective.
        generator: for random choices.
        search: how to choose, as in `teleport`.
        tol: relative tolerance for the loss, as in `teleport`.

    Attributes:
        steps: how often `step` was called.
        spent: how much of the radius has been used.
        report: the last report, if any.

    Raises:
        ParameterError: when the model is sharded over several processes, or the symmetry moves a parameter that is
            frozen, or that no optimizer here holds.
        TeleportError: when an argument is not usable, or the optimizer leaves its state to another one.
        UnknownNameError: when the state, the objective or a parameter of the symmetry is not known.

    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
    >>> x, y = torch.randn(32, 8), torch.randn(32, 1)
    >>> optimizer = torch.optim.Adam(model.parameters())
    >>> teleporter = Teleporter(model, optimizer, every={1})
    >>> for _ in range(3):
    ...     nn.functional.mse_loss(model(x), y).backward()
    ...     optimizer.step()
    ...     report = teleporter.step(lambda net: nn.functional.mse_loss(net(x), y))
    ...     optimizer.zero_grad()
    >>> teleporter.steps, teleporter.report.accepted
    (3, True)
    >>> teleporter
    Teleporter(Sequential, Adam; at steps 1; gradient_norm up, radius 1; state: transport; 3 steps)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Iterable[Optimizer],
        symmetry: Symmetry | None = None,
        every: int | float | Collection[int] | Callable[[int], bool] = (0,),
        objective: str | Objective | Callable[[Params], Tensor] = "gradient_norm",
        radius: float = 1.0,
        state: str = "transport",
        maximize: bool | None = None,
        generator: torch.Generator | None = None,
        search: str | None = None,
        tol: float | None = None,
    ) -> None:
        self.symmetry = None if symmetry is None else check_symmetry(symmetry)
        self.model, self.every, self.generator = model, every, check_generator(generator)
        self.optimizers = _list_optimizers(optimizer)
        self.objective, self.radius = as_objective(objective), check_radius(radius)
        self.maximize = self.objective.goes_up(maximize)
        self.state, self.search, self.tol = state, search, tol
        self.steps, self.spent, self._ranks = 0, 0.0, Ranks(model)
        self.report: Report | None = None
        if state not in STATES:
            raise UnknownNameError("state", state, STATES)
        held = self._held_ids()
        if not any(id(p) in held for p in model.parameters()):
            remedy = "pass the optimizer that trains this model"
            raise TeleportError("an optimizer of the model's parameters", "one that holds none of them", remedy)
        if self.symmetry is not None:
            check_movable(unwrap_compiled(self._ranks.model, self.symmetry.names), self.symmetry)
            if self._ranks.group is None:
                self._check_held(self.symmetry)
        self._due, self._when = _read_schedule(every, generator)
        self._listed = frozenset(every) if isinstance(every, Collection) else None

    def step(self, loss_fn: LossFn) -> Report | None:
        """Teleport if it is time to.

        An exception leaves the model, the state of the optimizer, the generator, the radius that is left and the count
        of steps as they were. A teleport that is refused leaves the model and the state as they were, spends nothing,
        and counts as a step.

        Args:
            loss_fn: net -> scalar loss, deterministic, as in `teleport`; called only when it is time.

        Returns:
            The report of the teleport, or None where it was not time, or no radius is left.

        Raises:
            ParameterError: when no optimizer here holds a parameter that would move.
            RankError: when another rank fails, or the ranks do not hold the same.
            StateError: when an entry of the optimizer's state cannot be carried.
            TeleportError: as `teleport`.
        """
        check_loss_fn(loss_fn)
        drawn = None if self.generator is None else self.generator.get_state()
        spent = self.spent
        try:
            with self._ranks.together():
                report = self._teleport_now(loss_fn) if self._is_due() else None
        except BaseException:
            if self.generator is not None and drawn is not None:
                self.generator.set_state(drawn)
            self.spent = spent
            raise
        self.report = report or self.report
        self.steps += 1
        return report

    def _is_due(self) -> bool:
        due = self._due(self.steps)
        free = callable(self.every) or isinstance(self.every, float)
        due = 0 in self._ranks.ask(due) if free else due
        return due and self.radius - self.spent > 1e-3 * self.radius

    def _teleport_now(self, loss_fn: LossFn) -> Report:
        if self.symmetry is None:
            self.symmetry = symmetries_of(self.model, loss_fn)
        self._check_held(self.symmetry)

        def commit_with_state(model: nn.Module, product: Product, xi: Any, moved: Params, finish: Finish) -> None:
            used = [f.group.norm(x) for f, x in zip(product, xi, strict=True) if not f.group.isometry]
            norms: list[float] = []

            def finish_with_norms(numbers: list[Tensor], check: Check) -> None:
                def check_both(found: Sequence[float]) -> None:
                    norms.extend(found[: len(used)])
                    check(found[len(used) :])

                finish([*used, *numbers], check_both)

            move(model, product, xi, self.optimizers, self.state, moved, finish_with_norms)
            self.spent += max(norms, default=0.0)

        return carry_out(
            self._ranks,
            loss_fn,
            self.symmetry,
            self.objective,
            maximize=self.maximize,
            radius=self._next_radius(self.symmetry),
            tol=self.tol,
            generator=self.generator,
            search=self.search,
            carries=self.state == "transport",
            commit=commit_with_state,
        )

    def _next_radius(self, symmetry: Product) -> float:
        """The radius of the next teleport."""
        if all(factor.group.isometry for factor in symmetry):
            return self.radius
        parts = sum(step >= self.steps for step in self._listed) if self._listed else 2
        return (self.radius - self.spent) / parts

    def _held_ids(self) -> set[int]:
        return {id(p) for o in self.optimizers for group in o.param_groups for p in group["params"]}

    def _check_held(self, symmetry: Symmetry) -> None:
        """Check that the optimizers, those of all ranks together, hold what `symmetry` moves."""
        held = self._held_ids()
        parameters = dict(unwrap_compiled(self._ranks.model, symmetry.names).named_parameters())
        missing = [name for name in symmetry.names if id(parameters[name]) not in held]
        if self._ranks.ask(bool(missing)):  # on some rank; another one may hold them
            missing = [name for name in symmetry.names if not self._ranks.ask(id(parameters[name]) in held)]
        if missing:
            remedy = "pass the optimizers of all that moves, or a symmetry=... that moves only what they hold"
            raise ParameterError(", ".join(missing), "held by an optimizer of the Teleporter", "held by none", remedy)

    def state_dict(self) -> dict[str, Any]:
        """What resumes it bit for bit: the count of steps, the radius spent, and the state of the generator if any."""
        generator = None if self.generator is None else self.generator.get_state()
        return {"steps": self.steps, "spent": self.spent, "generator": generator}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a `state_dict`.

        Raises:
            TeleportError: when its entries are others, or when one has a generator and the other has none.
        """
        if not isinstance(state, Mapping) or state.keys() != self.state_dict().keys():
            got = f"the keys {[*state]}" if isinstance(state, Mapping) else describe_value(state)
            remedy = "pass what Teleporter.state_dict gave"
            raise TeleportError(f"a state with the keys {[*self.state_dict()]}", got, remedy)
        if (state["generator"] is None) != (self.generator is None):
            words = "the state of a Teleporter with a generator", "the state of one without"
            expected, got = words if state["generator"] is None else words[::-1]
            raise TeleportError(expected, got, "make the Teleporter as it was when the state was saved")
        if self.generator is not None:
            self.generator.set_state(state["generator"])
        self.steps, self.spent = int(state["steps"]), float(state["spent"])

    def __repr__(self) -> str:
        names = ", ".join(type(o).__name__ for o in [self.model, *self.optimizers])
        goal = f"{self.objective.name} {'up' if self.maximize else 'down'}, radius {self.radius:g}"
        return f"Teleporter({names}; {self._when}; {goal}; state: {self.state}; {self.steps} steps)"


def _list_optimizers(given: Any) -> list[Optimizer]:
    """The optimizers as a list."""
    found = [given] if isinstance(given, Optimizer) else list(given) if isinstance(given, Iterable) else []
    if not found or not all(isinstance(o, Optimizer) for o in found):
        got = "no optimizer" if not isinstance(given, Iterable) or found else "none"
        raise TeleportError("an optimizer, or several", got, "pass the torch.optim.Optimizer that trains the model")
    for o in found:
        for name, value in vars(o).items():
            if any(isinstance(inner, Optimizer) and inner not in found for inner in tree_leaves(value)):
                got = f"{type(o).__name__}, which leaves it to .{name}"
                remedy = f"pass optimizer.{name}, or both in a list if the wrapper has a state of its own"
                raise TeleportError("an optimizer that holds its state", got, remedy)
    return found


def _read_schedule(every: Any, generator: torch.Generator | None) -> tuple[Callable[[int], bool], str]:
    """Whether it is time at a step, as a function and in words."""
    if callable(every):
        return every, f"when {getattr(every, '__name__', type(every).__name__)} says so"
    if isinstance(every, int) and not isinstance(every, bool) and every > 0:
        return lambda step: step % every == 0, f"every {every} step{'s' * (every > 1)}"
    if isinstance(every, float) and 0 < every < 1:
        if generator is None:
            remedy = "pass generator=torch.Generator().manual_seed(0)"
            raise TeleportError("a generator for a random schedule", None, remedy)
        return lambda step: bool(torch.rand((), generator=generator, device=generator.device) < every), f"p = {every:g}"
    listed = isinstance(every, Collection) and not isinstance(every, (str, bytes, Tensor))
    if listed and all(isinstance(step, int) and step >= 0 for step in every):
        words = ", ".join(map(str, sorted(every)[:8])) + ", ..." * (len(every) > 8)
        return frozenset(every).__contains__, f"at steps {words or 'none'}"
    expected = "a positive number of steps, a collection of steps, a probability below 1, or a callable of the step"
    raise TeleportError(expected, repr(every), "pass every={0}, every=50, every=0.01 or every=lambda step: ...")
