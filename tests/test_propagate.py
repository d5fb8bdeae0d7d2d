"""What the run of a model exercises, and what it writes into fresh memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import teleport_lite as tl
from teleport_lite.discovery.constraints import PERM, SCALE, SIGN
from teleport_lite.discovery.operation import Operation
from teleport_lite.discovery.propagate import Propagation
from teleport_lite.discovery.solve import solve_permutations, solve_scalings


def followed(model: nn.Module, *inputs) -> Propagation:
    run = Propagation(dict(model.named_parameters()))
    with torch.no_grad(), run:
        out = model(*inputs)
    run.finish([out])
    run.fix_unexercised()
    return run


def staying(run: Propagation, name: str, dim: int) -> list[bool]:
    """For each entry of an axis, whether it is fixed because the run did not exercise it."""
    all_systems = SCALE | SIGN | PERM
    why = [a for a, systems, why in run.constraints.fixed if why == Operation.NOT_EXERCISED and systems == all_systems]
    fixed = torch.cat([torch.zeros(0, dtype=torch.int64), *why])
    return torch.isin(run.parameter_axes[name, dim, 1], fixed).tolist()


def free(run: Propagation, name: str, dim: int) -> int:
    """How many entries of an axis a scaling or a permutation moves."""
    labels = run.parameter_axes[name, dim, 1] >> 1
    return int(
        ((solve_scalings(run.constraints)[0][labels] > 0) | (solve_permutations(run.constraints)[labels] > 0)).sum()
    )


class Table(nn.Module):
    """A table of which `read` takes some rows."""

    def __init__(self, read) -> None:
        super().__init__()
        self.table, self.one, self.read = nn.Parameter(torch.randn(6, 4)), nn.Linear(4, 2), read

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x + self.read(self.table).sum(0))


@pytest.mark.parametrize(
    ("read", "rows"),
    [
        (lambda t: t[:4], [0, 1, 2, 3]),
        (lambda t: t[torch.tensor([1, 5])], [1, 5]),
        (lambda t: t.t()[:, 2:].t(), [2, 3, 4, 5]),
        (lambda t: t.clone().view(3, 8)[1:2].view(2, 4), [2, 3]),
        (lambda t: torch.stack([t, t.flip(0)])[1][:2], [4, 5]),
        (lambda t: torch.cat([t[:1], 2 * t[3:]])[1:3], [3, 4]),
        (lambda t: t.tanh()[0:1], [0]),
        (lambda t: t.masked_select(torch.arange(24).view(6, 4) < 8).view(2, 4), [0, 1]),
        (
            lambda t: torch.view_as_real(torch.view_as_complex(t.view(6, 2, 2)).clone()[:2]).view(2, 4) * 1,
            [0, 1, 2, 3, 4, 5],
        ),
        (lambda t: (t * t)[0:1], [0, 1, 2, 3, 4, 5]),  # all of them are read, whatever is done with it
    ],
)
def test_rows_that_no_operator_read_stay(read, rows):
    run = followed(Table(read), torch.randn(3, 4))
    unread = [k not in rows for k in range(6)]
    assert staying(run, "table", 0) == unread and staying(run, "table", 1) == [False] * 4
    assert run.unexercised == (["table"] if any(unread) else [])


class Recurrent(nn.Module):
    def __init__(self, state) -> None:
        super().__init__()
        self.w, self.u, self.head, self.state = nn.Linear(3, 5), nn.Linear(5, 5, bias=False), nn.Linear(5, 2), state

    def forward(self, x: Tensor, steps: int) -> Tensor:
        h = self.state(x)
        for _ in range(steps):
            h = torch.relu(self.w(x) + self.u(h))
        return self.head(h)


ZEROS = {
    "new_zeros": lambda x: x.new_zeros(len(x), 5),
    "zeros": lambda x: torch.zeros(len(x), 5),
    "expanded": lambda x: torch.zeros(1, 5).expand(len(x), 5),
    "stacked": lambda x: torch.zeros(2, len(x), 5)[1] * 0.5,
}


@pytest.mark.parametrize("state", ZEROS)
def test_a_weight_that_met_only_zeros_stays(state):
    once = followed(Recurrent(ZEROS[state]), torch.randn(2, 3), 1)
    assert staying(once, "u.weight", 0) == staying(once, "u.weight", 1) == [True] * 5
    assert free(once, "w.weight", 0) == 0  # it shares its axis with what was not exercised
    twice = followed(Recurrent(ZEROS[state]), torch.randn(2, 3), 2)
    assert staying(twice, "u.weight", 1) == [False] * 5
    assert free(twice, "w.weight", 0) == 5


def test_a_buffer_of_zeros_is_a_constant_like_any_other():
    held = torch.zeros(2, 5)  # made outside of the run
    run = followed(Recurrent(lambda x: held), torch.randn(2, 3), 2)
    assert free(run, "w.weight", 0) == 0


class Steps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.b(h[:, -1] + (h[:, 1:] - h[:, :-1]).tanh().sum(1))


@pytest.mark.parametrize("length", [1, 4])
def test_operators_on_empty_tensors_write_the_same_equations(length):
    classes, _ = solve_scalings((run := followed(Steps(), torch.randn(2, length, 3))).constraints)
    assert not classes[run.parameter_axes["a.weight", 0, 1] >> 1].any()  # tanh commutes with no scaling


class Experts(nn.Module):
    """Experts in a list, of which the first tokens are for the first ones."""

    def __init__(self) -> None:
        super().__init__()
        self.g, self.experts = nn.Parameter(torch.ones(4)), nn.ModuleList(nn.Linear(4, 3) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.experts[k](F.layer_norm(row, (4,)) * self.g) for k, row in enumerate(x)])


def test_experts_that_took_no_part_keep_the_others_where_they_are():
    assert free(followed(Experts(), torch.randn(3, 4)), "g", 0) == 4
    run = followed(Experts(), torch.randn(2, 4))
    assert free(run, "g", 0) == 0 and staying(run, "experts.0.weight", 1) == [True] * 4


class Filled(nn.Module):
    """Two layers; `fill` carries what is between them through memory that was fresh."""

    def __init__(self, fill) -> None:
        super().__init__()
        self.one, self.two, self.fill = nn.Linear(4, 5, bias=False), nn.Linear(5, 2), fill

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.relu(self.fill(self.one(x))))


def by_rows(make):
    def fill(h: Tensor) -> Tensor:
        out = make(h)
        for t in range(len(h)):
            out[t] = h[: t + 1].mean(0)
        return out

    return fill


def by_views(h: Tensor) -> Tensor:
    out = torch.zeros_like(h)
    parts = out.unbind(0)  # views that are made before anything is written
    for part, row in zip(parts, h, strict=True):
        part.copy_(row)
    return out


def transposed(h: Tensor) -> Tensor:
    out = torch.empty(h.shape[1], len(h), dtype=h.dtype)
    out.t()[:] = h
    return out.t()


def beside_a_constant(h: Tensor) -> Tensor:
    out = torch.ones_like(h)
    out[1:] = h[1:]
    return out


@pytest.mark.parametrize(
    ("fill", "dim"),
    [
        (by_rows(torch.empty_like), 5),
        (by_rows(torch.zeros_like), 5),
        (by_views, 5),
        (transposed, 5),
        (beside_a_constant, 0),
        (lambda h: torch.zeros_like(h).index_add_(0, torch.tensor([0, 0, 2]), h), 5),
        (lambda h: torch.zeros_like(h).scatter_add(0, torch.tensor([[0], [0], [2]]).expand(3, 5), h), 5),
        (lambda h: torch.zeros_like(h).index_put((torch.tensor([0, 2, 1]),), h), 5),
        (lambda h: torch.zeros_like(h).scatter_reduce(0, torch.tensor([[0], [0], [2]]).expand(3, 5), h, "amax"), 5),
        (lambda h: torch.sparse.mm(torch.eye(3, dtype=h.dtype).to_sparse(), h), 5),
        (lambda h: torch.cat([torch.zeros_like(h[:1]), h[:-1]]), 5),
        (lambda h: h.cumsum(0), 5),
        (lambda h: h.sort(0).values, 5),
        (lambda h: h.topk(2, 0).values, 5),
        (lambda h: h.addcmul(h, torch.ones(3, 1, dtype=h.dtype)), 5),
        (lambda h: torch.segment_reduce(h, "mean", lengths=torch.tensor([1, 2])), 5),
        (lambda h: torch.fft.fft(h, dim=0).real, 5),
    ],
)
def test_values_through_fresh_memory_and_along_indices(fill, dim):
    torch.manual_seed(0)
    symmetry = tl.find_symmetries(Filled(fill), torch.randn(3, 4))
    assert symmetry.dim == dim, symmetry.reasons
    if dim:
        assert not any("not understood" in reason for reason in symmetry.reasons)
    else:
        assert "over a constant" in "; ".join(symmetry.reasons)
