"""Products that sum over indices, each an einsum string: what is summed over together moves inversely to each other."""

from __future__ import annotations

from torch import Tensor

from teleport_lite.discovery.constraints import PERM, negate_labels
from teleport_lite.discovery.labels import Labels, along_last, are_stacked, order_along
from teleport_lite.discovery.operation import Operation, RuleMisfit
from teleport_lite.discovery.registry import RULES, Rule

PRODUCTS = {  # the equation of the last two tensors that are multiplied; a bias stands before them
    "mm": "nk,km->nm",
    "_sparse_mm": "nk,km->nm",
    "bmm": "gnk,gkm->gnm",
    "mv": "nk,k->n",
    "dot": "k,k->",
    "vdot": "k,k->",
}
BIASED_PRODUCTS = {
    "addmm": "nk,km->nm",
    "_sparse_addmm": "nk,km->nm",
    "baddbmm": "gnk,gkm->gnm",
    "addbmm": "gnk,gkm->nm",
    "addmv": "nk,k->n",
    "addr": "n,m->nm",
}


def einsum_rule(equation: str, biased: bool = False) -> Rule:
    """The rule of a product of two tensors, given as an einsum string.

    Args:
        equation: two inputs and one output, as "nk,km->nm".
        biased: whether the product's arguments come after a tensor that is added to it.
    """

    def einsum_labels(op: Operation) -> list[Labels]:
        factors = op.args[int(biased) : int(biased) + 2]
        letters = equation.replace(" ", "").split("->")[0].split(",")
        if len(factors) != 2 or [getattr(x, "ndim", None) for x in factors] != [*map(len, letters)]:
            raise RuleMisfit(f"{equation!r} is of other operands")
        a, b = factors
        if biased and op["alpha"] == 0:
            raise RuleMisfit("a product times zero")
        bias = op.args[0] if biased and op["beta"] != 0 else None
        return [op.add_bias(contract(op, equation, a, b), bias, along_last(op.out))]

    return einsum_labels


RULES.update({f"aten::{name}": einsum_rule(equation) for name, equation in PRODUCTS.items()})
RULES.update({f"aten::{name}": einsum_rule(equation, biased=True) for name, equation in BIASED_PRODUCTS.items()})


def contract(op: Operation, equation: str, a: Tensor, b: Tensor) -> Labels:
    """The labels of a product of two tensors.

    Everything is laid out over all letters of the equation, with length 1 along those that a tensor does not have. A
    label that varies along a letter that is summed over may vary along those that both tensors have, and along no
    other: otherwise the two sides could not cancel. All others pass. So does one that varies along both: of axes that
    were stacked, and are summed over, each moves as the others.
    """
    inputs, output = equation.replace(" ", "").split("->")
    left, right = inputs.split(",")
    letters = list(dict.fromkeys(left + right))
    sizes = dict(zip(left, a.shape, strict=True)) | dict(zip(right, b.shape, strict=True))
    summed = [letters.index(k) for k in letters if k not in output]
    shared = [letters.index(k) for k in letters if k in left and k in right and k in output]
    passing: Labels = []
    sides: list[Tensor | None] = []
    for tensor, own, other, theirs in ((a, left, b, right), (b, right, a, left)):
        free = [letters.index(k) for k in own if letters.index(k) not in summed + shared]
        meeting: Labels = []
        single = all(sizes[letters[d]] == 1 for d in summed)
        scalars: Labels = []
        fixed = not any(_over_letters(x, theirs, letters).shape[d] > 1 for x in op.labels(other) for d in summed)
        fixed &= not op.memory.is_tracked(tensor)  # stacked weights have one axis for each matrix
        for x in _factor_labels(op, tensor, other):
            spread = _over_letters(x, own, letters)
            if are_stacked(spread, summed, free):
                spread = op.constraints.tie_along(spread, summed)
            elif fixed and any(spread.shape[d] > 1 for d in summed) and any(spread.shape[d] > 1 for d in free):
                op.fix([spread], "rows of what is computed stay in their places", PERM)
                spread = op.constraints.tie_along(spread, summed)
            if any(spread.shape[d] > 1 for d in summed):
                meeting.append(spread)
            elif single and summed and x.numel() == 1:
                scalars.append(spread)
            else:
                passing.append(spread)
        if scalars:  # an axis of length 1 has a label as well; the last one is that of the axis that is summed over
            last = len(scalars) if any(sizes[letters[d]] > 1 for d in free) else 1
            passing += scalars[: len(scalars) - last]
            meeting += scalars[len(scalars) - last :]
        sides.append(op.constraints.sum_labels([op.constraints.tie_along(x, free) for x in meeting]))
    cancel_axes(op, *sides)
    for x in [*(side for side in sides if side is not None), *passing]:
        for d in shared:
            if x.shape[d] > 1:  # one product for each index: nothing moves from one to another
                op.constraints.distinguish(x, order_along(x, [d]))
    kept = [letters.index(k) for k in output]
    return [
        x.permute([*kept, *(d for d in range(x.ndim) if d not in kept)])[(...,) + (0,) * len(summed)] for x in passing
    ]


def _factor_labels(op: Operation, tensor: Tensor, other: Tensor) -> Labels:
    """The labels of a factor; if it is a state that starts at zero, new ones, since zero may move in any way."""
    if op.is_zero(tensor) and op.labels(other):
        op.unexercised.add(id(other))
        return op.constraints.fresh_axes(tensor.shape)
    return op.labels(tensor)


def _over_letters(x: Tensor, own: str, letters: list[str]) -> Tensor:
    """Labels of a tensor with the indices `own`, over all letters."""
    x = x.permute([own.index(k) for k in letters if k in own])
    return x.reshape([x.shape[[k for k in letters if k in own].index(k)] if k in own else 1 for k in letters])


def cancel_axes(op: Operation, a: Tensor | None, b: Tensor | None) -> None:
    """Two axes that are summed over together move inversely to each other."""
    if a is not None and b is not None:
        op.constraints.equate(a, negate_labels(b))
    else:
        op.fix([x for x in (a, b) if x is not None], "what they are multiplied with is fixed")
