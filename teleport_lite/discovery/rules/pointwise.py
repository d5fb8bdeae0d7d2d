"""Elementwise functions: what they commute with is tried out with random numbers, except for products."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from teleport_lite.discovery.constraints import MIX, PERM, SCALE, SIGN, TURN, negate_labels
from teleport_lite.discovery.labels import (
    Labels,
    are_stacked,
    cluster_by_dims,
    common_shape,
    compact_labels,
    order_along,
    varying_dims,
)
from teleport_lite.discovery.operation import Operation
from teleport_lite.discovery.registry import WORDS, rule_for
from teleport_lite.discovery.rules.equivariance import NEITHER, Ask, Equivariance, Operands, ask_once, operands_of

GUARD = 1e-8  # bounds up to that guard a division by zero
UNMARKED = ("add", "pow", "square")  # after which an axis may still be rotated, as where squares are summed over it


def pointwise_rule(op: Operation) -> list[Labels]:
    """An elementwise function: what it commutes with is tried out."""
    found = operands_of(op)
    return [_commuting_labels(op, found, partial(ask_once, op, found))]


def declared_rule(equivariance: Equivariance, op: Operation) -> list[Labels]:
    """An elementwise function whose equivariance is known."""
    return [_commuting_labels(op, operands_of(op), lambda which: equivariance)]


WORDS.update(
    pointwise=pointwise_rule,
    homogeneous=partial(declared_rule, Equivariance(1, None)),
    odd=partial(declared_rule, Equivariance(None, 1)),
    linear=partial(declared_rule, Equivariance(1, 1, linear=True)),
)
rule_for("max.other min.other")(pointwise_rule)


@rule_for("rrelu_with_noise")
def leaky_relu_in_evaluation(op: Operation) -> list[Labels]:
    """The noise is read in training only."""
    found = replace(operands_of(op), constants=[])
    return [_commuting_labels(op, found, partial(ask_once, op, found))]


@rule_for("clamp_min clamp")
def clamp_labels(op: Operation) -> list[Labels]:
    """A bound of a norm that guards a division by zero, and does not bind, lets everything pass."""
    x, bound, upper = op.args[0], op["min"], op["max"] if op.has("max") else None
    guards = isinstance(bound, float) and 0 < bound <= GUARD and upper is None
    guards = guards and {int(a.reshape(-1)[0]) for a in op.labels(x)} <= op.constraints.lengths
    return [op.labels(x)] if guards and bool(((x > bound) | (x == 0)).all()) else pointwise_rule(op)


@rule_for("add.Tensor sub.Tensor rsub.Tensor")
def add_labels(op: Operation) -> list[Labels]:
    """Sums: a term that the model made zero says nothing."""
    found = operands_of(op)
    if len(found.bearers) == 1 and found.constants and all(map(op.is_zero, found.constants)):
        return [found.labels[found.bearers[0]]]
    if op.short_name == "add" and len(found.bearers) == 1 and (absorbed := _absorb_constant(op, found)):
        return [absorbed]
    labels = pointwise_rule(op)
    if (
        op.short_name == "add"
        and isinstance(op.args[1], (int, float))
        and op.args[1]
        and op.memory.is_tracked(op.args[0])
    ):
        return [[_add_constant(op, a, float(op.args[1])) for a in labels[0]]]
    return labels


def _absorb_constant(op: Operation, found: Operands) -> Labels:
    """Labels of a sum with a bias to which a constant is added: the bias moves as if it held the constant as well."""
    labels, term = found.labels[found.bearers[0]], op.args[op.args[0] is found.leaves[found.bearers[0]]]
    origin = op.memory.origin(term) if isinstance(term, Tensor) else "uniform"
    if len(labels) != 1 or op.kwargs or origin == "outside":  # a buffer may have other numbers later
        return []
    (a,), constant = labels, torch.as_tensor(term)
    if any(n > 1 == a.shape[d - constant.ndim] for d, n in enumerate(constant.shape)):
        return []
    bias = next((b for s, b in reversed(op.constraints.biases) if torch.equal(s, a.reshape(-1))), None)
    if bias is None:
        return []
    values = constant.detach().cpu().double().expand(a.shape).reshape(-1)
    alike, colors = values.unique(return_inverse=True)
    by_chance = len(alike) < 2 and origin == "computed"
    op.fix([a], "a constant is added to them", SIGN)
    op.constraints.distinguish(a.reshape(-1), None if by_chance else colors, PERM)
    op.constraints.absorbed.append((bias, tuple(values.tolist())))
    return labels


def _add_constant(op: Operation, labels: Tensor, number: float) -> Tensor:
    """Labels of a parameter w to which a number was added: the sum moves as a gain, and w with it."""
    for shifted, parameter, added in op.constraints.offsets:
        if added == number and torch.equal(parameter, labels):
            return shifted
    shifted = op.constraints.fresh(*labels.shape)
    op.constraints.equate(shifted, labels, PERM)
    op.constraints.fix(shifted, "a number is added to them", SIGN)
    op.keep_entries_apart([shifted])
    op.constraints.offsets.append((shifted, labels, number))
    return shifted


@rule_for("mul.Tensor div.Tensor")
def multiply_labels(op: Operation) -> list[Labels]:
    """Products: exponents add. A factor that the model made zero may move in any way, and so may the product."""
    found = operands_of(op)
    if len(found.bearers) == 1 and any(map(op.is_zero, found.constants)):
        op.unexercised.update(id(found.leaves[i]) for i in found.bearers)
        labels = found.labels[found.bearers[0]]
        axes = op.constraints.fresh_axes(op.out.shape)
        unlabelled = [a for d, a in enumerate(axes) if a.numel() > 1 and all(b.shape[d] == 1 for b in labels)]
        return [[_free_product(op, a) for a in labels] + unlabelled]
    if op.kwargs or len(found.bearers) < 2:
        return pointwise_rule(op)
    out: Labels = []
    for cluster in cluster_by_dims([found.labels[i] for i in found.bearers]):
        a, b = parts = [op.constraints.sum_labels(part) for part in cluster]
        _tell_apart(op, found, parts)
        for i, part in zip(found.bearers, parts, strict=True):
            op.note_gain(found.leaves[i], part)
        inverse = "div" in op.name
        if a is not None and b is not None:
            a, b = _one_each(op, a, b), _one_each(op, b, a)
            product = op.constraints.sum_of(a, negate_labels(b) if inverse else b)
            op.keep_entries_apart([product, a, b])
            out.append(product)
        elif a is not None:
            out.append(a)
        elif b is not None:
            out.append(negate_labels(b) if inverse else b)
    return [_join_length(op, *out) if op.short_name == "div" and len(out) == 2 else out]


def _join_length(op: Operation, a: Tensor, b: Tensor) -> Labels:
    """Labels of a vector and of one number, as its length, that divides it: together they may cancel."""
    a, b = (a, b) if b.numel() == 1 else (b, a)
    if b.numel() > 1 or a.numel() == 1:
        return [a, b]
    product = op.constraints.fresh(*a.shape)
    op.constraints.sums.append((a.reshape(-1), b.reshape(-1).expand(a.numel()), product.reshape(-1)))
    op.constraints.equate(product, a, PERM)
    return [product]


def _one_each(op: Operation, a: Tensor, b: Tensor) -> Tensor:
    """Labels of a factor that has one entry for each of several axes that are stacked in the other, which stay."""
    missing = [d for d in range(a.ndim) if a.shape[d] < b.shape[d]]
    if not are_stacked(b, {*range(a.ndim)} - {*missing}, missing):
        return a
    op.fix([a], "axes are stacked along them", PERM)
    weights = op.constraints.fresh(*b.shape)
    op.constraints.equate(weights, a, SCALE | SIGN)
    return weights


def _free_product(op: Operation, labels: Tensor) -> Tensor:
    """Labels of a product with zeros: only the places are kept."""
    free = op.constraints.fresh(*labels.shape)
    op.constraints.equate(free, labels, PERM)
    op.keep_entries_apart([free, labels])
    return free


def _tell_apart(op: Operation, found: Operands, parts: list[Tensor | None]) -> None:
    """Constants, and bearers that vary along the axis without a label there, tell the entries of an axis apart."""
    for a in (p for p in parts if p is not None):
        for constant in found.constants:
            op.color_by_values(constant, a)
        for i, part in zip(found.bearers, parts, strict=True):
            t = found.leaves[i]
            seen = [d + a.ndim for d in varying_dims(a) if -d <= t.ndim and t.shape[d] > 1 and t.stride(d)]
            if part is None and seen:
                op.constraints.distinguish(a, order_along(a, seen))


def _commuting_labels(op: Operation, found: Operands, ask: Ask) -> Labels:
    """The labels of an elementwise function, cluster by cluster of dimensions along which its arguments vary.

    A label passes where the function commutes with multiplying all floating arguments that have labels. Where it does
    not, it may still commute with one of them alone, and the others stay.
    """
    joint = ask(found.bearers)
    out: Labels = []
    for cluster in cluster_by_dims([found.labels[i] for i in found.bearers]):
        parts = [op.constraints.sum_labels(part) for part in cluster]
        there = {i: a for i, a in zip(found.bearers, parts, strict=True) if a is not None}
        _tell_apart(op, found, parts)
        first, *others = there.values()
        for a in others:
            op.constraints.equate(first, a, PERM)
        if not joint.linear or len(there) > len(
            [i for i in there if i in found.floating_bearers]
        ):  # a mask holds entry by entry
            op.keep_entries_apart(there.values(), MIX if op.short_name in UNMARKED else MIX | TURN)
        shape = common_shape(a.shape for a in there.values())
        moving = {i: a for i, a in there.items() if i in found.floating_bearers} or there
        answer, passing = _answer_of_leaves(op, found, ask, moving)
        result = next(iter(moving.values())) if passing is None else passing
        if answer.scale not in (1, None) or answer.sign == 0:
            result = op.constraints.fresh(*shape)
            op.constraints.equate(result, first, PERM)
        _restrict_labels(op, result.expand(shape), moving if passing is None else {0: passing}, answer)
        out.append(compact_labels(result.expand(shape)))
    return out


def _answer_of_leaves(
    op: Operation, found: Operands, ask: Ask, moving: dict[int, Tensor]
) -> tuple[Equivariance, Tensor | None]:
    """How the function answers, and the labels of the one argument that may move where not all may."""
    floating = found.floating_bearers
    joint = ask(found.bearers)
    refused = replace(NEITHER, linear=joint.linear)
    joint = joint if len(moving) == len(floating) else refused
    if len(floating) > 1 and joint.scale != 1:
        for i, a in moving.items():
            alone = ask([i])
            if alone.scale:
                others = [x for k, x in moving.items() if k != i]
                op.fix(others, f"{op.short_name} does not commute with rescaling them", SCALE | SIGN)
                return alone, a
    if len(floating) > 1 and joint.scale == 0:  # all by the same factor, which nothing makes sure of
        return refused, None
    return joint, None


def _restrict_labels(op: Operation, result: Tensor, moving: dict[int, Tensor], answer: Equivariance) -> None:
    """Write down what an answer asks of the labels that go in and of the result's."""
    for system, how, word in answer.systems:
        if how:
            for a in moving.values():
                op.constraints.equate(result, a, system, how)
        else:
            stays = [result] + (list(moving.values()) if how is None else [])
            op.fix(stays, f"{op.short_name} does not commute with {word} them", system)
