"""Shears of what reads a LayerNorm, and of the mean of a stream: found, exact, carried, saved and searched."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from completeness import Attention, Decoder, Encoder, Translate, Vision
from conftest import keep_the_outputs, params_of, relative
from later_families import NanoGPT
from torch import Tensor, nn

import teleport_lite as tl
from teleport_lite.errors import TeleportError
from teleport_lite.functional import loss_of, value_and_grad
from teleport_lite.groups import Shears
from teleport_lite.optim.state_rules import move
from teleport_lite.symmetries import GainedSymmetry
from teleport_lite.symmetries.base import Symmetry


class Read(nn.Module):
    """Two readers of a norm, of which one has no bias, and one of the stream itself."""

    def __init__(self, affine: bool = True, bias: bool = False, norm: type[nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.write, self.norm = nn.Linear(6, 4), norm(4, elementwise_affine=affine)
        self.a, self.b, self.c = nn.Linear(4, 3), nn.Linear(4, 3, bias=bias), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.write(x)
        y = self.norm(x)
        return self.a(y).tanh() * self.b(y).sigmoid() + self.c(x).tanh()


def words(n: int, length: int, seed: int) -> Tensor:
    return torch.randint(0, 9, (n, length), generator=torch.Generator().manual_seed(seed))


def real(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tokens(n: int, seed: int) -> tuple[Tensor, ...]:
    return (words(n, 5 - seed % 2, seed),)


CASES = {  # how a model and inputs are made, and the dimensions of its shears
    "a reader without a bias": (Read, lambda n, seed: (real(n, 6, seed=seed),), [4, 4]),
    "all readers have biases": (lambda: Read(bias=True), lambda n, seed: (real(n, 6, seed=seed),), [4]),
    "no gain": (lambda: Read(affine=False), lambda n, seed: (real(n, 6, seed=seed),), []),
    "an RMSNorm": (lambda: Read(norm=nn.RMSNorm), lambda n, seed: (real(n, 6, seed=seed),), []),
    "GPT": (Decoder, tokens, [4]),
    "GPT without biases": (NanoGPT, tokens, [4, 4, 4]),
    "GPT, post-norm": (lambda: Decoder(post=True), tokens, [4, 4]),
    "GPT, tied": (lambda: Decoder(lambda: Attention(4), tied=True), tokens, [4]),
    "vision transformer": (lambda: Vision(2), lambda n, seed: (real(n, 1, 6, 6, seed=seed),), [4, 4]),
    "encoder, pre-norm": (lambda: Encoder(True, "gelu"), lambda n, seed: (real(n, 3 + n % 4, 6, seed=seed),), [4]),
    "encoder and decoder": (
        Translate,
        lambda n, seed: (words(n, 4 + seed % 2, seed), words(n, 3 + seed % 3, seed + 1)),
        [4, 4, 4],
    ),
}


def build(name: str) -> tuple[nn.Module, tl.Product]:
    """A model in float64, off its initial values, and its shears."""
    torch.manual_seed(0)
    model, generator = CASES[name][0]().double(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model, tl.find_symmetries(model, CASES[name][1](4, 0)).select(kind="shear")


FOUND = [name for name in CASES if CASES[name][2]]


@pytest.mark.parametrize("name", CASES)
def test_those_that_translations_do_not_make_are_found(name):
    assert [f.dim for f in build(name)[1]] == CASES[name][2]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", FOUND)
def test_a_hundred_elements_keep_the_outputs(name, training):
    model, symmetry = build(name)
    keep_the_outputs(model.train(training), symmetry, CASES[name][1])


@pytest.mark.parametrize("name", FOUND)
def test_gradients_are_carried_along(name):
    model, symmetry = build(name)
    params, inputs = params_of(model), CASES[name][1](9, 3)
    loss = loss_of(model, lambda net: net(*inputs).square().sum())
    xi = symmetry.sample(params, radius=0.5, generator=torch.Generator().manual_seed(1))
    carried = symmetry.transport(value_and_grad(loss, params)[1], xi, params)
    found = value_and_grad(loss, symmetry.act(params, xi))[1]
    size = max(float(g.abs().max()) for g in found.values())
    assert max(float((carried[n] - found[n]).abs().max()) for n in found) < 1e-10 * size


@pytest.mark.parametrize("entry", [torch.clone, torch.square, torch.abs], ids=["clone", "square", "abs"])
@pytest.mark.parametrize("dual", [True, False])
def test_entrywise_transport_is_that_of_the_dense_matrix(entry, dual, generator):
    model, symmetry = build("a reader without a bias")
    params = params_of(model)
    tensors = {n: torch.rand(p.shape, generator=generator, dtype=p.dtype) for n, p in params.items()}
    assert {type(f) for f in symmetry} > {GainedSymmetry}
    for f in symmetry:
        xi = f.sample(params, generator=generator)
        found = f.spread(tensors, xi, entry, dual=dual, params=params)
        dense = Symmetry.spread(f, tensors, xi, entry, dual=dual, params=params)
        assert all(torch.allclose(found[n], dense[n], 1e-11, 1e-12) for n in params)


def test_velocity_and_jet_are_derivatives(generator):
    model, symmetry = build("a reader without a bias")
    params = params_of(model)
    for f in symmetry:
        xi = f.sample(params, generator=generator)
        first, second = f.jet(params, xi)
        plus, minus = (f.act(params, t * xi) for t in (1e-4, -1e-4))
        for n in f.names:
            assert torch.allclose((plus[n] - minus[n]) / 2e-4, first[n], atol=1e-6)
            assert torch.allclose((plus[n] - 2 * params[n] + minus[n]) / 1e-8, second[n], atol=1e-5)


OPTIMIZERS = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.01),
    "momentum": lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9),
    "Adam": lambda params: torch.optim.Adam(params, lr=0.01),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ["a reader without a bias", "GPT"])
def test_state_of_optimizers_follows(name, optimizer):
    model, symmetry = build(name)
    inputs = CASES[name][1](9, 3)
    twin, xi = copy.deepcopy(model), symmetry.sample(params_of(model), generator=torch.Generator().manual_seed(2))
    one, other = (OPTIMIZERS[optimizer](net.parameters()) for net in (model, twin))
    one.param_groups[0]["lr"] = other.param_groups[0]["lr"] = 0.0  # at one point, state is what gradients there leave
    for _ in range(3):
        one.zero_grad()
        model(*inputs).square().sum().backward()
        one.step()
    move(model, symmetry, xi, [one])
    move(twin, symmetry, xi)
    for _ in range(3):
        other.zero_grad()
        twin(*inputs).square().sum().backward()
        other.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        for entry in {"momentum_buffer", "exp_avg"} & one.state[p].keys():
            if one.state[p][entry] is not None:
                assert torch.allclose(one.state[p][entry], other.state[q][entry], 1e-9, 1e-11)
        assert bool((one.state[p].get("exp_avg_sq", p.new_zeros(1)) >= 0).all())
    one.param_groups[0]["lr"] = 0.01
    teleporter = tl.Teleporter(model, one, symmetry, search="random", generator=torch.Generator().manual_seed(0))
    report = teleporter.step(lambda net: net(*inputs).square().sum())
    assert report is not None and report.accepted and report.invariance_error < 1e-11


def test_a_teleport_by_shears_alone():
    model, symmetry = build("GPT")
    inputs = CASES["GPT"][1](9, 3)
    report = tl.teleport(model, lambda net: net(*inputs).square().sum(), symmetry, radius=0.5)
    assert report.accepted and report.objective_after > report.objective_before


@pytest.mark.parametrize("name", FOUND)
def test_saved_and_loaded(name):
    symmetry = build(name)[1]
    again = tl.Product.from_dict(json.loads(json.dumps(symmetry.to_dict())))
    assert again == symmetry and repr(again) == repr(symmetry)


def test_a_gain_of_zero_is_refused(generator):
    model, symmetry = build("GPT")
    with torch.no_grad():
        model.norm.weight[2] = 0.0
    inputs, before = CASES["GPT"][1](9, 3), copy.deepcopy(model.state_dict())
    loss = lambda net: net(*inputs).square().sum()  # noqa: E731
    report = tl.teleport(model, loss, symmetry, search="random", generator=generator)
    assert not report.accepted and "not finite" in report.reason
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_an_element_has_a_closed_form(generator):
    xi = torch.randn(5, generator=generator, dtype=torch.float64)
    for transposed in (False, True):
        group = Shears(5, transposed)
        assert relative(group.exp(xi), torch.linalg.matrix_exp(group.algebra(xi))) < 1e-14
        assert float(group.norm(xi)) == pytest.approx(float(torch.linalg.matrix_norm(group.algebra(xi), 2)))
        same = group.algebra(xi).diff(dim=int(not transposed))  # all columns, or all rows
        assert not same.any() and torch.equal(group.algebra(xi).diagonal(), xi)
    moved = Shears(5).along(Shears(5).exp(xi), torch.tensor([1.0, -2.0, 1.0, 0.0, 0.0]).double(), 0)
    assert relative(moved, torch.tensor([1.0, -2.0, 1.0, 0.0, 0.0]).double()) < 1e-15
    with pytest.raises(TeleportError):
        Shears(0)


@pytest.mark.parametrize("seed", range(4))
def test_none_is_found_where_the_signal_has_died(seed):
    """With 32 layers the outputs vary by 1e-15, and whatever the first layers do shows nowhere."""
    torch.manual_seed(seed)
    layers = [layer for _ in range(32) for layer in (nn.Linear(6, 6), nn.ReLU())]
    symmetry = tl.find_symmetries(nn.Sequential(*layers, nn.Linear(6, 6)), torch.randn(3, 6))
    assert {f.group.kind for f in symmetry.continuous} == {"scaling"}
