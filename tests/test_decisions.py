"""Gates, routers and readings by Python: what a model decides by comparing is not moved, also where no run shows it."""

from __future__ import annotations

import pytest
import torch
from conftest import params_of
from torch import Tensor, nn
from torch.func import functional_call

import teleport_lite as tl

F64 = torch.float64


class Gated(nn.Module):
    """Two layers, with a function that decides between them."""

    def __init__(self, decide) -> None:
        super().__init__()
        self.one, self.two, self.decide = nn.Linear(6, 8), nn.Linear(8, 3), decide

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.decide(self.one(x)))


def gate(of, threshold: float):
    return lambda h: h * (1.0 + (of(h) > threshold))


FALSE = {  # gates, and by how much the inputs are enlarged on which they are met
    "largest entry": (gate(lambda h: h.amax(-1, keepdim=True), 1.0), 1),
    "length": (gate(lambda h: h.norm(dim=-1, keepdim=True), 1.0), 1),
    "sum of sizes": (gate(lambda h: h.abs().sum(-1, keepdim=True), 4.0), 1),
    "sum": (gate(lambda h: h.sum(-1, keepdim=True), 1.0), 1),
    "far sum": (lambda h: torch.where(h.sum(-1, keepdim=True) > 1000, h, 2 * h), 1000),
    "place of the largest": (lambda h: h * (1.0 + (h.argmax(-1, keepdim=True) > 3)), 1),
    "best two": (lambda h: h * (1.0 + h.topk(2, -1).indices.amin(-1, keepdim=True)), 1),
    "rounded sum": (lambda h: h * (1.0 + h.sum(-1, keepdim=True).round()), 1),
    "as integers": (lambda h: h * (1.0 + h.sum(-1, keepdim=True).long()), 1),
    "list": (lambda h: h * torch.tensor([[1.0 + (sum(row) > 1)] for row in h.tolist()]).to(h), 1),
    "array": (lambda h: h * torch.from_numpy(1.0 + (h.detach().numpy().sum(-1, keepdims=True) > 1)).to(h), 1),
}


def changes(model: nn.Module, symmetry: tl.Product, size: float) -> float:
    """By how much random elements of each factor change the outputs on many other inputs, relative."""
    params, worst = params_of(model), 0.0
    new = size * torch.randn(1000, 6, dtype=F64, generator=torch.Generator().manual_seed(7))
    before = functional_call(model, params, new)
    for k, factor in enumerate(symmetry):
        moved = factor.act(params, factor.sample(params, generator=torch.Generator().manual_seed(k)))
        gap = (functional_call(model, moved, new) - before).abs().max() / before.abs().max()
        worst = max(worst, float(gap))
    return worst


@pytest.mark.parametrize("rows", [1, 2, 16])
@pytest.mark.parametrize("name", FALSE)
def test_nothing_that_a_decision_sees_is_moved(name, rows):
    decide, size = FALSE[name]
    for seed in range(3):
        torch.manual_seed(seed)
        model = Gated(decide).double()
        symmetry = tl.find_symmetries(model, torch.randn(rows, 6, dtype=F64))
        assert changes(model, symmetry, size) < 1e-11, symmetry


TRUE = {  # decisions that leave something, and the dimension of a group of that kind
    "ReLU by a mask": (lambda h: torch.where(h > 0, h, 0.1 * h), "scaling", 8),
    "gate on a length": (gate(lambda h: h.norm(dim=-1, keepdim=True), 1.0), "rotation", 28),
    "sorted": (lambda h: h.sort(0).values, "mixing", 0),
    "largest of all examples": (lambda h: h - h.max(0).values, "scaling", 8),
    "sign": (lambda h: h.sign() * h, "scaling", 8),
    "not a number": (lambda h: torch.where(h.isnan(), 0.0, h.relu()), "scaling", 8),
    "minus infinity": (lambda h: torch.where(h.relu() == -torch.inf, 0.0, h.relu()), "scaling", 8),
}


@pytest.mark.parametrize("name", TRUE)
def test_what_multiplies_a_margin_may_move(name):
    decide, kind, dim = TRUE[name]
    torch.manual_seed(0)
    model = Gated(decide).double()
    symmetry = tl.find_symmetries(model, torch.randn(5, 6, dtype=F64))
    assert (not dim and kind not in str(symmetry)) or symmetry.select(kind=kind).dim == dim
    assert changes(model, symmetry, 1) < 1e-11


def test_a_router_that_python_reads_stays_and_its_experts_move():
    class Route(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Linear(6, 2)
            self.experts = nn.ModuleList(nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([self.experts[a < b](v) for (a, b), v in zip(self.router(x).tolist(), x, strict=True)])

    for seed in range(3):
        torch.manual_seed(seed)
        model = Route().double()
        symmetry = tl.find_symmetries(model, torch.randn(16, 6, dtype=F64))
        assert "router.weight" not in symmetry.continuous.names
        assert symmetry.select(kind="scaling").dim == 8 and changes(model, symmetry, 1) < 1e-11


def test_what_was_left_out_is_named():
    torch.manual_seed(0)
    symmetry = tl.find_symmetries(Gated(FALSE["largest entry"][0]), torch.randn(16, 6))
    assert any("SO(8)" in reason for reason in symmetry.reasons)


class Masked(nn.Module):
    """A mean over places that a mask may leave out."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.two(self.one(x).masked_fill(~mask[..., None].bool(), 0).mean(1))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_a_mask_of_ones_is_varied(dtype):
    torch.manual_seed(0)
    symmetry = tl.find_symmetries(Masked(), (torch.randn(4, 7, 5), torch.ones(4, 7, dtype=dtype)))
    assert "one.bias -> two.bias" not in str(symmetry)


def test_a_truth_value_is_varied():
    class Smooth(Gated):
        def forward(self, x: Tensor, smooth: bool = False) -> Tensor:
            return self.two(torch.tanh(self.one(x)) if smooth else torch.relu(self.one(x)))

    assert not tl.find_symmetries(Smooth(None), (torch.randn(4, 6), False)).continuous.dim
    assert tl.find_symmetries(Smooth(None), torch.randn(4, 6)).dim == 8


def test_what_few_examples_do_not_show_many_do():
    """Signs of six neurons: in a dozen examples two may always be opposite."""
    for seed in range(40, 46):
        torch.manual_seed(seed)
        model = Gated(torch.sign).double()
        symmetry = tl.find_symmetries(model, torch.randn(64, 6, dtype=F64))
        assert changes(model, symmetry, 1) < 1e-11, symmetry


@pytest.mark.parametrize("zero", [True, False])
def test_experts_behind_a_router_that_ties_stay(zero):
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Linear(5, 4)
            self.experts = nn.ModuleList(nn.Linear(5, 3) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            p, i = self.router(x).topk(2, -1)
            p = p.softmax(-1)
            return sum(m(x) * (p * (i == k)).sum(-1, keepdim=True) for k, m in enumerate(self.experts))

    torch.manual_seed(0)
    model = Experts()
    if zero:
        nn.init.zeros_(model.router.weight)
        nn.init.zeros_(model.router.bias)
    found = tl.find_symmetries(model, torch.randn(16, 5))
    assert any(str(s.group) == "S(4)" for s in found) != zero


def test_integers_may_divide():
    class Mean(Masked):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.two((self.one(x).relu() * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))

    torch.manual_seed(0)
    assert tl.find_symmetries(Mean(), (torch.randn(4, 7, 5), torch.rand(4, 7) > 0.3)).dim == 6


def test_a_row_of_padding_only_is_tried():
    class Words(nn.Module):
        """The mean over words, of a bias too where there are any."""

        def __init__(self) -> None:
            super().__init__()
            self.table, self.one, self.two = nn.Embedding(12, 5, padding_idx=0), nn.Linear(5, 5), nn.Linear(5, 3)

        def forward(self, i: Tensor) -> Tensor:
            there = (i != 0).to(self.one.weight)[..., None]
            return self.two((self.one(self.table(i)) * there).sum(1) / there.sum(1).clamp(min=1))

    torch.manual_seed(0)
    words, empty = torch.tensor([[1, 2, 0, 0], [3, 4, 5, 0], [6, 7, 8, 9]]), torch.tensor([[0, 0, 0, 0], [1, 0, 0, 0]])
    model = Words().double()
    params, symmetry = params_of(model), tl.find_symmetries(model, words)
    assert symmetry.dim
    for factor in symmetry:
        moved = factor.act(params, factor.sample(params, generator=torch.Generator().manual_seed(1)))
        torch.testing.assert_close(functional_call(model, moved, empty), model(empty))
