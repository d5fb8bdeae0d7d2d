"""Every continuous symmetry of many small models: what is found spans the Jacobian's kernel, or the rest is named."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from completeness import FAMILIES as FIRST
from completeness import Family
from conftest import params_of
from fibre import fibre
from further_families import FURTHER
from later_families import LATER
from published_families import PUBLISHED
from torch import Tensor, nn
from torch.func import functional_call
from unseen_families import UNSEEN

import teleport_lite as tl
from teleport_lite.outputs import tensors_of

FAMILIES = FIRST | LATER
EVERY = FAMILIES | UNSEEN | FURTHER | PUBLISHED


def drawn(family: Family) -> tuple[nn.Module, tl.Product, tuple[Tensor, ...]]:
    """The model at generic weights, in float64; its symmetry, and its example."""
    torch.manual_seed(family.seed)
    model, generator = family.make().eval(), torch.Generator().manual_seed(family.seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
        for m in model.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                m.running_mean.normal_(generator=generator)
                m.running_var.uniform_(0.5, 2.0, generator=generator)
    symmetry = tl.find_symmetries(model, family.example)
    return model.double(), symmetry, tuple(x.double() if x.is_floating_point() else x for x in family.example)


def outputs(model: nn.Module, params: dict[str, Tensor], example: tuple[Tensor, ...]) -> Tensor:
    with torch.no_grad():
        return torch.cat([t.reshape(-1) for t in tensors_of(functional_call(model, params, example))])


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # of PyTorch, for a weight norm
@pytest.mark.parametrize("name", EVERY)
def test_all_continuous_symmetries_of_a_family_are_found(name):
    family = EVERY[name]
    model, symmetry, example = drawn(family)
    counted, params = fibre(model, example), params_of(model)
    assert counted.gap > 4 or counted.dim == 0
    assert symmetry.rank(params) + family.rest == counted.dim, family.why
    before, generator = outputs(model, params, example), torch.Generator().manual_seed(1)
    for _ in range(10):
        moved = symmetry.act(params, symmetry.sample(params, radius=0.5, generator=generator))
        error = (outputs(model, moved, example) - before).abs().max() / before.abs().max()
        assert float(error) < 1e-11


def test_each_rest_has_a_reason():
    assert len(FAMILIES) >= 60
    tables = FAMILIES, UNSEEN, FURTHER, PUBLISHED
    assert len(EVERY) == sum(map(len, tables))
    assert all(bool(family.rest) == bool(family.why) for family in EVERY.values())
    chapter = (Path(__file__).parent.parent / "book/06-beyond/have-we-found-them-all.ipynb").read_text("utf8")
    rows = re.findall(r"\| (\d+) [^|]*\| (\d+) \|[^|]*\| (\d+), ", chapter)
    for (count, total, found), table in zip(rows, tables, strict=True):
        assert int(count) == len(table)
        assert int(total) - int(found) == sum(family.rest for family in table.values())
    assert int(rows[0][1]) - int(rows[0][2]) <= 0.02 * int(rows[0][1])


def test_a_count_can_fail():
    model, symmetry, example = drawn(FAMILIES["MLP, leaky ReLU"])
    partly = symmetry.select(name="0.*")
    assert partly.rank(params_of(model)) < fibre(model, example).dim
