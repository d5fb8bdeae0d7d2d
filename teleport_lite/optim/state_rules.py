r"""What becomes of an optimizer's state when its model moves along a symmetry.

An optimizer remembers gradients and steps. Where the weights move by $w \mapsto \rho w$, steps move by $\rho$ and
gradients by $M = \rho^{-\top}$; `KINDS` says how everything that is made from them moves, and `RULES` of which kind
each entry of each optimizer of torch.optim is:

| kind | entries | moves by | because it holds |
|---|---|---|---|
| fixed | step, eta, mu, mu_product, ro, t, ... | nothing | counts, rates, products of a gradient and a step |
| gradient | exp_avg, grad_avg, prev, old_dirs, ..., momentum_buffer of SGD and Muon | M | sums of gradients |
| squared gradient | exp_avg_sq, max_exp_avg_sq, square_avg, sum, variance | M with squared entries | sums of squares |
| factored square | row_var, col_var of Adafactor | the same | a square, which is rebuilt, moved and factored again |
| gradient bound | exp_inf of Adamax | absolute entries of M | a maximum of absolute values |
| step | d, old_stps of LBFGS | $\rho$ | differences of points |
| squared step | acc_delta of Adadelta | $\rho$ with squared entries | sums of squares of steps, not of gradients |
| step bound | step_size of Rprop | absolute entries of $\rho$ | absolute values of steps |
| direction | momentum_buffer of RMSprop | signs of the entries of M | sums of $g / \sqrt v$, free of scale |
| point | ax of ASGD | the action | an average of weights |
| inverse curvature | H_diag of LBFGS | made again | $y \cdot s / y \cdot y$ of the last gradient and step kept |

All are exact for `monomial` actions (scaling, sign, permutation): they equal what the moved gradients would have left.
(Of Adafactor, the square that it divides by is; its factors alone cannot tell their own.) Under mixing, gradients,
steps and points are exact too; squares move as if the entries of a gradient were uncorrelated, a gradient bound stays a
bound, and a step bound or a direction is refused. An entry without a rule is refused as well, never kept in silence.

A momentum buffer sums gradients that were taken at different points; one M carries them all because the action is
linear. Where it is not, M is that at the present weights, and the state is right to first order. What weight decay adds
to a gradient is carried along with it, though its penalty is not invariant, and so is what eps or an initial value adds
to a square. See the chapter *Momentum, AdaGrad, RMSProp, Adam*.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Adagrad, Optimizer

from teleport_lite.errors import StateError, UnknownNameError
from teleport_lite.functional import Params, as_vector, dot
from teleport_lite.runtime import eager_mode, named_tensors, unwrap_compiled
from teleport_lite.symmetries.base import Symmetry
from teleport_lite.transaction import Finish, Pairs, consume_pairs, write_in_place

STATES = ("transport", "reset", "keep")
Slots = dict[str, Params]  # the entries of an optimizer's state by name, each by the name of its parameter


@dataclass(frozen=True)
class Carrier:
    """A move of `params`, all that `symmetry` names, by `xi`; it carries what is shaped like some of them."""

    symmetry: Symmetry
    xi: Any
    params: Params

    def gradients(self, tensors: Params) -> Params:
        """M x."""
        return self._carry_all(lambda x: self.symmetry.transport(x, self.xi, self._at), tensors)

    def points(self, tensors: Params) -> Params:
        """The action itself."""
        return self._carry_all(lambda x: self.symmetry.act(x, self.xi), tensors)

    def spread(self, tensors: Params, entry: Callable[[Tensor], Tensor], *, dual: bool = True) -> Params:
        """M x, or the Jacobian times x when not `dual`, with `entry` applied to each entry of the matrix first."""
        return self._carry_all(lambda x: self.symmetry.spread(x, self.xi, entry, dual=dual, params=self._at), tensors)

    @property
    def _at(self) -> Params | None:
        return None if self.symmetry.linear else self.params

    def _carry_all(self, carry: Callable[[Params], Params], tensors: Params) -> Params:
        """`carry` on the tensors that move; a parameter without an entry has a zero there."""
        moving = {n: tensors[n] if n in tensors else torch.zeros_like(p) for n, p in self.params.items()}
        return {**tensors, **carry(moving)}


def _move_squares(carrier: Carrier, slots: Slots, entry: str) -> Params:
    """Squares, with the variance and the squared mean apart where there is a mean: a variance must not fall below 0."""
    squares = slots[entry]
    if "grad_avg" not in slots or carrier.symmetry.monomial:
        return carrier.spread(squares, torch.square)
    means = slots["grad_avg"]
    variances = carrier.spread({n: v - means[n].square() for n, v in squares.items()}, torch.square)
    return {n: variances[n] + m.square() for n, m in carrier.gradients(means).items()}


def _move_factors(carrier: Carrier, slots: Slots, entry: str) -> Params:
    """Row or column means of the moved square; the square is the rank-one matrix with the given means."""
    rows, columns = slots["row_var"], slots["col_var"]
    sizes = {n: r.mean(-2, keepdim=True).clamp(min=torch.finfo(r.dtype).tiny) for n, r in rows.items()}
    moved = carrier.spread({n: r @ columns[n] / sizes[n] for n, r in rows.items()}, torch.square)
    return {n: moved[n].mean(-1 if entry == "row_var" else -2, keepdim=True) for n in rows}


def _inverse_curvature(carrier: Carrier, slots: Slots, entry: str) -> Params:
    last = max((e for e in slots if e.startswith("old_dirs.")), key=lambda e: int(e[9:]))
    y, s = carrier.gradients(slots[last]), carrier.spread(slots["old_stps" + last[8:]], torch.clone, dual=False)
    y, s = ({n: x[n] for n in slots[last]} for x in (y, s))
    return {"": dot(y, s) / dot(y, y)}


KINDS: dict[str, Callable[[Carrier, Slots, str], Params]] = {  # but for "fixed"
    "gradient": lambda carrier, slots, entry: carrier.gradients(slots[entry]),
    "squared gradient": _move_squares,
    "factored square": _move_factors,
    "gradient bound": lambda carrier, slots, entry: carrier.spread(slots[entry], torch.abs),
    "step": lambda carrier, slots, entry: carrier.spread(slots[entry], torch.clone, dual=False),
    "squared step": lambda carrier, slots, entry: carrier.spread(slots[entry], torch.square, dual=False),
    "step bound": lambda carrier, slots, entry: carrier.spread(slots[entry], torch.abs, dual=False),
    "direction": lambda carrier, slots, entry: carrier.spread(slots[entry], torch.sign),
    "point": lambda carrier, slots, entry: carrier.points(slots[entry]),
    "inverse curvature": _inverse_curvature,
}
ENTANGLED = ("grad_avg", "row_var")  # entries that others are computed from
MONOMIAL_ONLY = ("step bound", "direction")


_ADAM = {"fixed": "step", "gradient": "exp_avg", "squared gradient": "exp_avg_sq max_exp_avg_sq"}
_MOMENTUM = {"gradient": "momentum_buffer"}
_SQUARES = {"fixed": "step", "squared gradient": "square_avg"}
_ENTRIES: dict[str, dict[str, str]] = {  # by the name of the class of the optimizer, or of a base of it
    **dict.fromkeys(("SGD", "Muon"), _MOMENTUM),
    **dict.fromkeys(("Adam", "AdamW", "SparseAdam", "RAdam"), _ADAM),
    "NAdam": {**_ADAM, "fixed": "step mu_product"},
    "Adamax": {"fixed": "step", "gradient": "exp_avg", "gradient bound": "exp_inf"},
    "Adagrad": {"fixed": "step", "squared gradient": "sum"},
    "Adadelta": {**_SQUARES, "squared step": "acc_delta"},
    "RMSprop": {**_SQUARES, "gradient": "grad_avg", "direction": "momentum_buffer"},
    "Rprop": {"fixed": "step", "gradient": "prev", "step bound": "step_size"},
    "ASGD": {"fixed": "step eta mu", "point": "ax"},
    "Adafactor": {"fixed": "step", "factored square": "row_var col_var", "squared gradient": "variance"},
    "LBFGS": {
        "fixed": "n_iter func_evals t ro al prev_loss",
        "gradient": "old_dirs prev_flat_grad",
        "step": "old_stps d",
        "inverse curvature": "H_diag",
    },
}
RULES: dict[str, dict[str, str]] = {  # the kind of each entry
    optimizer: {entry: kind for kind, entries in table.items() for entry in entries.split()}
    for optimizer, table in _ENTRIES.items()
}


def move(
    model: nn.Module,
    symmetry: Symmetry,
    xi: Any,
    optimizers: Iterable[Optimizer] = (),
    state: str = "transport",
    moved: Params | None = None,
    finish: Finish | None = None,
) -> None:
    """Move `model` by a given element, in place, and the state of its optimizers with it; all of it or nothing.

    One entry of the state moves at a time, so that beside the old values those of one are held.

    Args:
        model: the model.
        symmetry: where to move.
        xi: coordinates of the element.
        optimizers: those that hold its parameters.
        state: "transport" to carry the state along, "reset" to forget it, "keep" to leave it.
        moved: the parameters and buffers that `symmetry.act` gives, when they are known already; used up.
        finish: called when all is written, with numbers that it has to hand on to a check; what it raises undoes the
            move.

    Raises:
        StateError: when an entry of the state cannot be carried.
        UnknownNameError: when `state` is none of the three.

    >>> from teleport_lite.symmetries import scaling
    >>> model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Linear(1, 1, bias=False))
    >>> optimizer = torch.optim.Adagrad(model.parameters(), initial_accumulator_value=1.0)
    >>> move(model, scaling(1, "0.weight", "2.weight"), torch.tensor([2.0]).log(), [optimizer])
    >>> [optimizer.state[p]["sum"].item() for p in model.parameters()]
    [0.25, 4.0]
    """
    if state not in STATES:
        raise UnknownNameError("state", state, STATES)
    model, optimizers = unwrap_compiled(model, symmetry.names), list(optimizers)
    parameters = named_tensors(model)
    names = (*symmetry.names, *symmetry.buffers)
    carrier = Carrier(symmetry, xi, {name: parameters[name].detach() for name in names})
    with torch.no_grad(), eager_mode(next(iter(carrier.params.values())).device.type):
        new = symmetry.act(carrier.params, xi) if moved is None else moved
        infinite: dict[tuple[str, str], Tensor] = {}  # for entries of the state whether they are not finite

        def check_finite(found: Sequence[float]) -> None:
            for (label, entry), bad in zip(infinite, found, strict=True):
                if bad:
                    raise StateError(label, entry, "finite values", "NaN or infinity", "pass a smaller radius")

        def write_steps() -> Iterator[Pairs]:
            for optimizer in optimizers if state == "transport" else ():
                yield from _moved_entries(optimizer, carrier, parameters, infinite)
            yield consume_pairs(parameters, {name: new.pop(name) for name in names})

        def finish_move() -> None:
            if finish is not None:
                finish([*infinite.values()], check_finite)
            elif infinite:
                check_finite(as_vector([*infinite.values()]).tolist())
            if state == "reset":
                _reset_states(optimizers)

        write_in_place(write_steps(), finish_move)


def _moved_entries(
    optimizer: Optimizer, carrier: Carrier, parameters: dict[str, Tensor], infinite: dict[tuple[str, str], Tensor]
) -> Iterator[Pairs]:
    """The tensors of the state that move, with new values, entry by entry; all at once where they are entangled."""
    label = type(optimizer).__name__
    rules: dict[str, str] = next((RULES[c.__name__] for c in type(optimizer).__mro__ if c.__name__ in RULES), {})
    names = {id(parameters[name]): name for name in carrier.params}
    slots = _flat_slots(optimizer, names) if isinstance(optimizer, LBFGS) else _parameter_slots(optimizer, names)
    kinds: dict[str, str] = {}
    for entry, tensors in slots.items():
        kind = rules.get(entry.partition(".")[0])
        if kind is None:
            known = "rules for " + ", ".join(rules) if rules else "no rules for this optimizer"
            remedy = f"say how it moves in teleport_lite.optim.state_rules.RULES[{label!r}], or pass state='reset'"
            raise StateError(label, entry, "a rule", known, remedy)
        if kind == "fixed" or not tensors:
            continue
        if not carrier.symmetry.exact:
            got = "one that holds on one batch, while the state remembers others"
            raise StateError(label, entry, "a symmetry that holds on all inputs", got, "pass state='reset'")
        if kind in MONOMIAL_ONLY and not carrier.symmetry.monomial:
            expected = "a symmetry that moves the weights one by one (scaling, sign, permutation)"
            raise StateError(label, entry, expected, "one that mixes them", "pass state='reset'")
        kinds[entry] = kind
    entangled = isinstance(optimizer, LBFGS) or not slots.keys().isdisjoint(ENTANGLED)

    def move_entry(entry: str) -> Iterator[tuple[Tensor, Tensor]]:
        found = KINDS[kinds[entry]](carrier, slots, entry)
        targets = {n: t for n, t in slots[entry].items() if n in carrier.params or not n}
        largest = [torch.linalg.vector_norm(found[name], torch.inf) for name in targets]  # takes no memory
        infinite[label, entry] = ~as_vector(largest).isfinite().all()
        return consume_pairs(targets, {name: found[name] for name in targets})

    parts = map(move_entry, kinds)
    yield from [chain.from_iterable(list(parts))] if entangled else parts


def _parameter_slots(optimizer: Optimizer, names: dict[int, str]) -> Slots:
    """The tensors in the state of the parameters with these ids; an entry that is no tensor is there, but empty."""
    slots: Slots = {}
    for p, state in optimizer.state.items():
        for entry, value in state.items() if id(p) in names else ():
            slots.setdefault(entry, {}).update({names[id(p)]: value} if isinstance(value, Tensor) else {})
    return slots


def _flat_slots(optimizer: LBFGS, names: dict[int, str]) -> Slots:
    """LBFGS keeps flat vectors over all its parameters, and lists of them: split into views, and numbered."""
    params = optimizer.param_groups[0]["params"]
    sizes = [p.numel() for p in params]
    slots: Slots = {}
    for entry, value in optimizer.state.get(params[0], {}).items() if any(id(p) in names for p in params) else ():
        numbered = [(f"{entry}.{i}", v) for i, v in enumerate(value)] if isinstance(value, list) else [(entry, value)]
        for key, v in numbered:
            parts = zip(params, v.split(sizes), strict=True) if isinstance(v, Tensor) and v.ndim else ()
            slots[key] = {names.get(id(p), f"#{i}"): part.view_as(p) for i, (p, part) in enumerate(parts)}
            if isinstance(v, Tensor) and not v.ndim:
                slots[key] = {"": v}
    return slots


def _reset_states(optimizers: list[Optimizer]) -> None:
    """Give each optimizer the state of a new one: none, but for Adagrad, which fills its sums from the start.

    `optimizer.state` stays the same object: others may hold it.
    """
    backup = [dict(optimizer.state) for optimizer in optimizers]
    try:
        _replace_states(optimizers, map(_initial_state, optimizers))
    except BaseException:
        _replace_states(optimizers, backup)
        raise


def _initial_state(optimizer: Optimizer) -> Mapping:
    if not isinstance(optimizer, Adagrad):
        return {}
    groups = [dict(group) for group in optimizer.param_groups]
    return Adagrad(groups, initial_accumulator_value=optimizer.defaults["initial_accumulator_value"]).state


def _replace_states(optimizers: list[Optimizer], states: Iterable[Mapping]) -> None:
    for optimizer, state in zip(optimizers, states, strict=True):
        optimizer.state.clear()
        optimizer.state.update(state)
