"""register_rule: what the page in the reference says, all words, and what is refused; names with their namespace."""

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import teleport_lite as tl
from teleport_lite.discovery import registry
from teleport_lite.discovery.operation import RuleMisfit
from teleport_lite.errors import TeleportError, UnknownNameError

PAGE = Path(__file__).parents[1] / "book/reference/custom-operators.md"


@pytest.fixture(autouse=True)
def same_table_afterwards(monkeypatch):
    monkeypatch.setattr(registry, "RULES", dict(registry.RULES))


def operator(name: str, function, **options):
    """A custom operator of this test file; PyTorch keeps its name until the process ends."""
    return torch.library.custom_op(f"teleport_tests::{name}", function, mutates_args=(), **options)


class Between(nn.Module):
    """Two layers with a function between them."""

    def __init__(self, function) -> None:
        super().__init__()
        self.one, self.two, self.function = nn.Linear(4, 6), nn.Linear(6, 2), lambda x: function(x)

    def forward(self, x):
        return self.two(self.function(self.one(x)))


def kinds(function) -> list[str]:
    """The groups that a rule gives; translations need none, since they follow the numbers."""
    symmetry = tl.find_symmetries(Between(function), torch.ones(3, 4))
    return [type(f.group).__name__ for f in symmetry if f.group.kind != "translation"]


def relu(x: Tensor) -> Tensor:
    return x.clamp(min=0)


def tanh(x: Tensor) -> Tensor:
    return x.tanh()


def double(x: Tensor) -> Tensor:
    return 2 * x


def copied(x: Tensor) -> Tensor:
    return x.clone()


def soft(x: Tensor) -> Tensor:
    return x.softmax(-1)


@pytest.mark.parametrize(
    ("function", "word", "expected"),
    [
        (relu, "homogeneous", ["PositiveScaling", "Permutation"]),
        (relu, "pointwise", ["PositiveScaling", "Permutation"]),
        (tanh, "odd", ["Signs", "Permutation"]),
        (tanh, "pointwise", ["Signs", "Permutation"]),
        (double, "linear", ["GeneralLinear"]),
        (copied, "identity", ["GeneralLinear"]),
        (soft, "softmax", ["Permutation"]),
    ],
)
def test_the_words(function, word, expected):
    op = operator(f"{function.__name__}_{word}", function)
    assert kinds(op) == []
    tl.register_rule(op, word)
    assert kinds(op) == expected


def test_a_word_that_promises_too_much_gives_nothing_false():
    op = operator("softplus", lambda_softplus)
    tl.register_rule(op, "homogeneous")
    symmetry = tl.find_symmetries(Between(op), torch.ones(3, 4))
    assert [str(f.group) for f in symmetry] == ["S(6)"]
    assert any("changes the outputs" in reason for reason in symmetry.reasons)


def lambda_softplus(x: Tensor) -> Tensor:
    return torch.nn.functional.softplus(x)


def product(a: Tensor, b: Tensor) -> Tensor:
    return torch.einsum("nk,mk->nm", a, b)


class Product(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(2, 6))
        self.function = lambda a, b: function(a, b)

    def forward(self, x):
        return self.function(torch.relu(self.function(x, self.one)), self.two)


@pytest.mark.parametrize("how", ["packet", "overload", "custom_op"])
def test_einsum_strings_and_the_ways_to_name_an_operator(how):
    op = operator(f"product_{how}", product)
    packet = getattr(torch.ops.teleport_tests, f"product_{how}")
    tl.register_rule({"packet": packet, "overload": packet.default, "custom_op": op}[how], "nk,mk->nm")
    assert tl.find_symmetries(Product(op), torch.ones(3, 4)).dim == 6


def test_the_page_in_the_reference():
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf8"), re.S)
    names: dict = {}
    for block in blocks:
        exec(block, names)
    assert kinds(names["my_relu"]) == ["PositiveScaling", "Permutation"]
    assert tl.find_symmetries(Product(names["linear_relu"]), torch.ones(3, 4)).dim == 6


def test_the_page_lists_all_words():
    listed = set(re.findall(r'^\| `"(\w+)"`', PAGE.read_text("utf8"), re.M))
    assert listed == {*registry.WORDS}


def shift(x: Tensor) -> Tensor:
    return x + 1


def test_another_namespace_does_not_take_the_rule_of_pytorch():
    op = operator("clone", shift)  # aten::clone leaves its argument as it is
    assert kinds(op) == []
    symmetry = tl.find_symmetries(Between(op), torch.ones(3, 4))
    assert "teleport_tests::clone is not understood: what it reads stays as it is" in symmetry.reasons


def test_a_rule_that_does_not_fit_says_why():
    op = operator("refused", copied)

    def rule(operation):
        raise RuleMisfit("only on Sundays")

    tl.register_rule(op, rule)
    symmetry = tl.find_symmetries(Between(op), torch.ones(3, 4))
    assert symmetry.reasons[0].startswith("teleport_tests::refused is not understood (only on Sundays)")


@pytest.mark.parametrize("equation", ["nk,km->nm", "nk->nk"])
def test_an_einsum_string_of_other_operands_does_not_fit(equation):
    op = operator("alone", copied)
    tl.register_rule(op, equation)
    assert f"{equation!r} is of other operands" in tl.find_symmetries(Between(op), torch.ones(3, 4)).reasons[0]


def test_a_module_may_hold_its_operator():
    op = operator("held", copied)
    tl.register_rule(op, "identity")
    model = Between(op)
    model.held, model.packet = op, torch.ops.aten.relu  # which copy.deepcopy does not copy
    assert tl.find_symmetries(model, torch.ones(3, 4)).dim == tl.find_symmetries(Between(op), torch.ones(3, 4)).dim > 0


def test_a_mistake_in_a_rule_is_not_hidden():
    op = operator("broken", copied)
    tl.register_rule(op, lambda operation: 1 / 0)
    with pytest.raises((ZeroDivisionError, TeleportError), match="division by zero"):
        tl.find_symmetries(Between(op), torch.ones(3, 4))


def test_what_is_refused():
    op = operator("anything", copied)
    with pytest.raises(UnknownNameError, match="'homogeneous', 'identity'"):
        tl.register_rule(op, "homogenous")
    with pytest.raises(TeleportError, match="a word, an einsum string or a function"):
        tl.register_rule(op, 3)
    with pytest.raises(TeleportError, match="expected an operator"):
        tl.register_rule(torch.relu, "homogeneous")


@pytest.mark.parametrize("rule", [lambda op: None, lambda op: torch.ones(2), lambda op: [torch.ones(2)]])
def test_a_rule_that_returns_no_labels_is_named(rule, monkeypatch):
    """As None, where `return` was forgotten: what the operator reads stays, and the reason says why."""
    name = "aten::tanh"
    monkeypatch.setitem(registry.RULES, name, rule)
    found = tl.find_symmetries(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.ones(1, 3))
    assert not found and any("its rule gives no list of labels" in reason for reason in found.reasons)
