"""The table from operators to rules.

A rule is a function of one `Operation`: it writes equations into `op.constraints` and gives the labels of each result.
It is found by the operator's name, namespace included, so that `mylib::clone` is not taken for PyTorch's. Families of
operators are tables in `teleport_lite.discovery.rules`, one file a family; a decomposition is a function of the same
arguments that does the same with simpler operators.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch._ops import OpOverload, OpOverloadPacket

from teleport_lite.discovery.labels import Labels
from teleport_lite.discovery.operation import Operation
from teleport_lite.errors import TeleportError, UnknownNameError

Rule = Callable[[Operation], list[Labels]]

RULES: dict[str, Rule] = {}
WORDS: dict[str, Rule] = {}  # rules by a word, for `register_rule`
DECOMPOSITIONS: dict[str, Callable] = {}
POINTWISE = "pointwise"  # the word for operators with PyTorch's tag


def rule_for(names: Iterable[str] | str) -> Callable[[Rule], Rule]:
    """Enter a rule into the table under the names of operators, "add" for "aten::add", separated by spaces."""

    def enter_rule(rule: Rule) -> Rule:
        for name in names.split() if isinstance(names, str) else names:
            RULES[name if "::" in name else f"aten::{name}"] = rule
        return rule

    return enter_rule


def decomposition_of(name: str) -> Callable[[Callable], Callable]:
    """Enter a function of the same arguments, made of simpler operators."""

    def enter_decomposition(function: Callable) -> Callable:
        DECOMPOSITIONS[f"aten::{name}"] = function
        return function

    return enter_decomposition


def _names_of(op: OpOverload) -> list[str]:
    """Under which names an operator is looked up: the overload, the packet, and PyTorch's own out of place."""
    name = op._schema.name
    out_of_place = [name.rstrip("_")] if name.startswith("aten::") else []
    return [full for n in (name, *out_of_place) for full in (f"{n}.{op._overloadname}", n)]


def find_rule(op: OpOverload) -> Rule | None:
    """The rule of an operator; the rule for elementwise functions where PyTorch says that it is one; or None."""
    for name in _names_of(op):
        if name in RULES:
            return RULES[name]
    return WORDS[POINTWISE] if torch.Tag.pointwise in op.tags else None


def find_decomposition(op: OpOverload) -> Callable | None:
    """Our own decomposition of an operator."""
    return next((DECOMPOSITIONS[name] for name in _names_of(op) if name in DECOMPOSITIONS), None)


def register_rule(op: object, rule: str | Rule) -> None:
    r"""Teach `find_symmetries` an operator that it does not know.

    The rule is a word, where one is enough: "pointwise" (an elementwise function; what it commutes with is tried out
    with random numbers), "homogeneous" (elementwise, $f(cx) = c f(x)$ for $c > 0$), "odd" (elementwise,
    $f(-x) = -f(x)$), "linear" (elementwise, both), "identity" (it gives back its first argument), "constant" (what
    comes out depends on no values), "views" (data that only changes place), "softmax" (along a dimension `dim`). A
    product that sums over indices is an einsum string, as "nk,km->nm". All else is a function of the `Operation`: it
    writes equations into `op.constraints` and returns a list with the labels of each result. Every symmetry that
    follows is verified on the whole model as usual, so that a wrong rule costs time, and is usually found out.

    Args:
        op: a custom operator (of `torch.library.custom_op`), or an operator as `torch.ops.mylib.name` or
            `torch.ops.mylib.name.default`.
        rule: a word, an einsum string, or a function of an `Operation`.

    Raises:
        UnknownNameError: when the word is none of those.
        TeleportError: when `op` is no operator, or `rule` is none of the three.

    >>> @torch.library.custom_op("teleport_docs::my_relu", mutates_args=(), schema="(Tensor x) -> Tensor")
    ... def my_relu(x: torch.Tensor) -> torch.Tensor:
    ...     return x.clamp(min=0)
    >>> class Net(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.one, self.two = torch.nn.Linear(4, 6), torch.nn.Linear(6, 2)
    ...     def forward(self, x):
    ...         return self.two(my_relu(self.one(x)))
    >>> import teleport_lite as tl
    >>> tl.find_symmetries(Net(), torch.zeros(1, 4)).reasons[0]
    'teleport_docs::my_relu is not understood: what it reads stays as it is'
    >>> tl.register_rule(my_relu, "homogeneous")
    >>> tl.find_symmetries(Net(), torch.zeros(1, 4))
    Product of 2 symmetries, dim 6
      parameters                         group     dim  holds on
      one.weight, one.bias -> two.weight  (R>0)^6  6    all inputs
      one.weight, one.bias -> two.weight  S(6)     0    all inputs
    """
    RULES[_name_of(op)] = rule if callable(rule) else _rule_by_word(rule)


def _rule_by_word(word: object) -> Rule:
    """The rule that a word or an einsum string stands for."""
    if isinstance(word, str) and "->" in word:
        from teleport_lite.discovery.rules.contraction import einsum_rule

        return einsum_rule(word)
    if not isinstance(word, str):
        raise TeleportError(
            "a word, an einsum string or a function of an Operation", type(word).__name__, 'try "pointwise"'
        )
    if word not in WORDS:
        raise UnknownNameError("rule", word, sorted(WORDS))
    return WORDS[word]


def _name_of(op: object) -> str:
    """The name of an operator, with its namespace, and with its overload where one was chosen."""
    if isinstance(op, OpOverload):
        name, overload = op._schema.name, op._overloadname
        return f"{name}.{overload}" if overload else name
    if isinstance(op, OpOverloadPacket):
        return op._qualified_op_name
    qualified = getattr(op, "_qualname", None)  # of torch.library.custom_op
    if not isinstance(qualified, str):
        remedy = "pass what torch.library.custom_op returned, or torch.ops.mylib.name"
        raise TeleportError("an operator", type(op).__name__, remedy)
    return qualified
