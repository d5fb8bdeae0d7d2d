"""Rows of one matrix that are read apart, constants behind a gain, means of tokens: counted, and exact."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import keep_the_outputs, params_of, relative
from fibre import fibre
from torch import Tensor, nn
from torch.func import functional_call

import teleport_lite as tl

D, HIDDEN, LENGTH = 4, 6, 5


class Cross(nn.Module):
    """One set asks another: queries, keys and values are rows of one matrix."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads, self.rows = heads, nn.Parameter(torch.randn(3 * D, D) / 2)
        self.x, self.y, self.head = nn.Linear(5, D, False), nn.Linear(6, D, False), nn.Linear(D, 5, False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        q, kv = self.rows.split([D, 2 * D])
        parts = self.x(x) @ q.T, *(self.y(y) @ kv.T).chunk(2, -1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in parts)
        return self.head(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Gain(nn.Module):
    """What is added to a stream goes through a gain, and a norm forgets the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up, self.down = nn.Linear(5, D), nn.Linear(5, HIDDEN), nn.Linear(HIDDEN, D)
        self.gain, self.norm = nn.Parameter(torch.ones(D)), nn.LayerNorm(D, elementwise_affine=False)
        self.head = nn.Linear(D, 3, False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.stem(x) + self.gain * self.down(self.up(x).sigmoid() * x.sum(-1, True))))


class Tokens(nn.Module):
    """A layer over the tokens, whose bias is one number for each of them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.norm = nn.Linear(5, D, False), nn.Linear(LENGTH, LENGTH), nn.LayerNorm(D)
        self.head = nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(self.norm(x + self.mix(x.sigmoid().transpose(1, 2)).transpose(1, 2)))


def real(*shape: int):
    return lambda n, seed: torch.randn(n, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def two(n: int, seed: int) -> tuple[Tensor, ...]:
    return real(3 + seed % 3, 5)(n, seed), real(4 + seed % 2, 6)(n, seed + 1)


WRITTEN = (5 + 1) + (HIDDEN + 1)  # columns of what writes to the stream, and biases
CASES = {  # a model, its inputs, and the dimension of all its symmetries
    "rows read apart": (lambda: Cross(1), two, 4 * D**2),
    "rows read apart, two heads": (lambda: Cross(2), two, 2 * D**2 + 2 * 2 * (D // 2) ** 2),
    "behind a gain": (Gain, lambda n, seed: (real(5)(n, seed),), D + (D - 1) * (D - 2) // 2 + D + WRITTEN + 3 - 1),
    "a number for each token": (Tokens, lambda n, seed: (real(LENGTH, 5)(n, seed),), D + LENGTH + D + 3),
}


def build(name: str) -> tuple[nn.Module, tl.Product]:
    torch.manual_seed(0)
    model, generator = CASES[name][0]().double(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model.eval(), tl.find_symmetries(model, CASES[name][1](4, 0))


@pytest.mark.parametrize("name", CASES)
def test_the_dimension_is_that_of_the_formula_and_of_the_fibre(name):
    model, symmetry = build(name)
    assert symmetry.rank(params_of(model)) == CASES[name][2] == fibre(model, CASES[name][1](4, 0)).dim


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_a_hundred_elements_keep_the_outputs(name, training):
    model, symmetry = build(name)
    keep_the_outputs(model.train(training), symmetry, CASES[name][1])


class Narrow(nn.Module):
    """Rows that are read apart, and of the first ones only some columns, unless asked for all."""

    def __init__(self, apart: bool) -> None:
        super().__init__()
        self.read, self.head, self.apart = nn.Linear(5, D), nn.Linear(D, 2), apart
        rows = (torch.randn(2 * D, D),) if apart else torch.randn(2, D, D)
        self.rows = nn.ParameterList(map(nn.Parameter, rows))

    def forward(self, x: Tensor, columns: int = D - 1) -> Tensor:
        x = torch.tanh(self.read(x))
        a, b = self.rows[0].split(D) if self.apart else self.rows
        return self.head(x[:, :columns] @ a[:, :columns].T + torch.tanh(x @ b.T))


@pytest.mark.parametrize("apart", [True, False])
def test_columns_that_are_not_read_may_be_elsewhere(apart):
    """The sign of the last neuron would not show here, but where all columns are read."""
    torch.manual_seed(0)
    model, x = Narrow(apart).double(), real(5)(6, 0)
    params, symmetry = params_of(model), tl.find_symmetries(model, x)
    assert any("in part" in reason for reason in symmetry.reasons)
    for seed in range(20):
        moved = symmetry.act(params, symmetry.sample(params, generator=torch.Generator().manual_seed(seed)))
        for columns in (D - 1, D):
            assert relative(functional_call(model, moved, (x, columns)), model(x, columns)) < 1e-12
