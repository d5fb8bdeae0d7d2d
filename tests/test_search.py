"""Closed forms against independent oracles: long searches, known formulas, stationarity."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from conftest import hidden_product, mlp, params_of, relative
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils._python_dispatch import TorchDispatchMode

import teleport_lite as tl
from teleport_lite.functional import hvp, loss_of, norm, value_and_grad
from teleport_lite.groups import GeneralLinear, PositiveScaling, SpecialOrthogonal
from teleport_lite.search import closed_form
from teleport_lite.symmetries import Leg, NeuronSymmetry, mixing, scaling

X = torch.randn(40, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.randn(40, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def problem(widths, activation=None, build=scaling, seed=0):
    """A scaling or mixing product with the parameters and the gradient of a random regression."""
    model = mlp(widths, activation or nn.LeakyReLU(0.1), seed=seed)
    params = params_of(model)
    grads = value_and_grad(loss_of(model, lambda net: nn.functional.mse_loss(net(X), Y)), params)[1]
    return hidden_product(build, model), params, grads


def transported_norm(symmetry, tensors, gradients, xi):
    return norm(symmetry.transport(tensors, xi) if gradients else symmetry.act(tensors, xi))


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("seed", range(12))
def test_scaling_maximum_is_the_best_of_all_corners(gradients, seed):
    symmetry, params, grads = problem([6, 4, 5, 3], seed=seed)
    tensors = grads if gradients else params
    xi = closed_form(symmetry, tensors, gradients, radius=1.0)
    assert all(bool((x.abs() == 1).all()) for x in xi)
    corners = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=9)), dtype=torch.float64)
    values = torch.func.vmap(lambda c: transported_norm(symmetry, tensors, gradients, c.split([4, 5])))(corners)
    assert float(transported_norm(symmetry, tensors, gradients, xi)) == pytest.approx(float(values.max()), rel=1e-12)


def test_scaling_maximum_beats_restarts_of_a_long_search(generator):
    symmetry, params, grads = problem([6, 24, 16, 12, 3])
    best = 0.0
    for _ in range(20):
        xi = [x.sign() for x in symmetry.sample(params, generator=generator)]
        for k in 20 * [*range(len(xi))]:  # the corner of one factor that the slope at its centre points to
            xi[k] = torch.zeros_like(xi[k], requires_grad=True)
            (slope,) = torch.autograd.grad(transported_norm(symmetry, grads, True, tuple(xi)), xi[k])
            xi[k] = slope.sign()
        best = max(best, float(transported_norm(symmetry, grads, True, tuple(xi))))
    found = float(transported_norm(symmetry, grads, True, closed_form(symmetry, grads, True)))
    assert found >= 0.99 * best


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("depth", [1, 2, 3, 5])
def test_scaling_minimum_is_stationary(gradients, depth):
    symmetry, params, grads = problem([6, *range(8, 8 + depth), 3])
    tensors = grads if gradients else params
    xi = closed_form(symmetry, tensors, gradients, maximize=False, radius=20.0)
    assert max(float(x.abs().max()) for x in xi) < 20.0
    free = tuple(x.requires_grad_() for x in xi)
    slopes = torch.autograd.grad(transported_norm(symmetry, tensors, gradients, free), free)
    assert max(float(s.abs().max()) for s in slopes) < 1e-12


def test_weight_norm_minimum_of_one_hidden_layer_is_the_balanced_point():
    symmetry, params, _ = problem([6, 9, 3])
    (xi,) = closed_form(symmetry, params, False, maximize=False, radius=20.0)
    incoming = torch.cat([params["0.weight"], params["0.bias"][:, None]], 1).norm(dim=1)
    outgoing = params["2.weight"].norm(dim=0)
    assert torch.allclose(xi, (outgoing / incoming).log() / 2, rtol=0, atol=1e-10)
    moved = symmetry.act(params, (xi,))
    balanced = torch.cat([moved["0.weight"], moved["0.bias"][:, None]], 1).norm(dim=1)
    assert torch.allclose(balanced, moved["2.weight"].norm(dim=0), rtol=1e-10)


def test_minimum_within_a_radius_is_clipped_and_stationary_inside():
    symmetry, _, grads = problem([6, 20, 3])
    (xi,) = closed_form(symmetry, grads, True, maximize=False, radius=0.3)
    (slope,) = torch.autograd.grad(transported_norm(symmetry, grads, True, (xi.requires_grad_(),)), (xi,))
    inside = xi.detach().abs() < 0.3
    assert bool(inside.any()) and bool((~inside).any())
    assert float(slope[inside].abs().max()) < 1e-8
    assert bool((slope[~inside] * xi.detach()[~inside] < 0).all())  # downhill points out of the box


def test_dead_neurons_stay():
    group = PositiveScaling(3)
    up, down = torch.tensor([0.0, 0.0, 2.0]), torch.tensor([0.0, 1.0, 0.0])
    assert group.extremum(up, down, maximize=True, radius=1.0).tolist() == [0.0, -1.0, 1.0]
    assert group.extremum(up, down, maximize=False, radius=1.0).tolist() == [0.0, 0.0, 0.0]  # no minimum


@pytest.mark.parametrize("gradients", [True, False])
def test_mixing_maximum_beats_random_elements(gradients, generator):
    symmetry, params, grads = problem([6, 5, 3], nn.Identity(), mixing)
    tensors = grads if gradients else params
    (xi,) = closed_form(symmetry, tensors, gradients, radius=0.7)
    assert float(symmetry[0].group.norm(xi)) == pytest.approx(0.7)
    found = float(transported_norm(symmetry, tensors, gradients, (xi,)))
    rotations = torch.linalg.qr(torch.randn(500, 5, 5, generator=generator, dtype=torch.float64))[0]
    signs = torch.where(torch.rand(500, 1, 5, generator=generator, dtype=torch.float64) < 0.5, -0.7, 0.7)
    values = [float(transported_norm(symmetry, tensors, gradients, (x,))) for x in rotations * signs @ rotations.mT]
    climbed = (rotations * signs @ rotations.mT)[torch.tensor(values).argmax()].requires_grad_()
    for _ in range(300):
        value = transported_norm(symmetry, tensors, gradients, (climbed,))
        (slope,) = torch.autograd.grad(value, climbed)
        climbed = symmetry[0].group.clip((climbed + 0.1 * slope / slope.norm()).detach(), 0.7).requires_grad_()
    best = float(transported_norm(symmetry, tensors, gradients, (climbed,)).detach())
    assert max(values) <= found * (1 + 1e-12)
    assert best <= found * (1 + 1e-9) and best > 0.98 * found


def test_mixing_minimum_is_stationary():
    group = GeneralLinear(4)
    a, b = (m @ m.mT for m in torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64))
    xi = group.extremum(a, b, maximize=False, radius=20.0).requires_grad_()
    stretched = torch.linalg.matrix_exp(2 * xi)
    value = (a * stretched).sum() + (b * torch.linalg.inv(stretched)).sum()
    (slope,) = torch.autograd.grad(value, xi)
    assert float(slope.abs().max()) < 1e-8
    assert torch.allclose(stretched @ a @ stretched, b, atol=1e-8)  # the geometric mean solves M A M = B


def test_mixing_minimum_where_a_form_is_singular():
    """On the complement of the kernels it is the minimum; on the kernels, where there is none, nothing moves."""
    group, generator = GeneralLinear(5), torch.Generator().manual_seed(3)
    basis = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64))[0]
    a, b = (m @ m.mT for m in torch.randn(2, 5, 7, generator=generator, dtype=torch.float64))
    for left, right in ((1, 0), (1, 2), (0, 2)):  # dimensions of the two kernels
        p, q = basis[:, left:], basis[:, : 5 - right]
        up, down = p @ p.mT @ a @ p @ p.mT, q @ q.mT @ b @ q @ q.mT
        xi = group.extremum(up, down, maximize=False, radius=20.0)
        for unit in (1e-12, 1e12):  # what counts as zero is relative
            assert torch.allclose(group.extremum(unit * up, unit * down, maximize=False, radius=20.0), xi, atol=1e-8)
        kernels = torch.cat([basis[:, :left], basis[:, 5 - right :]], 1)
        assert float((xi @ kernels).abs().max()) < 1e-10
        rest = basis[:, left : 5 - right].mT
        free = (rest @ xi @ rest.mT).requires_grad_()
        stretched = torch.linalg.matrix_exp(2 * free)
        value = (rest @ up @ rest.mT * stretched).sum() + (rest @ down @ rest.mT * torch.linalg.inv(stretched)).sum()
        (slope,) = torch.autograd.grad(value, free)
        assert float(slope.abs().max()) < 1e-7 * float(value.detach()) and float(free.detach().abs().max()) > 1e-2


class Attention(nn.Module):
    """One head layer with a norm before it that may be wider."""

    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 3)

    def forward(self, x):
        h = self.norm(x.to(self.norm.weight.dtype)).to(self.qkv.weight.dtype)
        q, k, v = self.qkv(h).view(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.out(mixed.reshape(x.shape)).mean(1)


class LowRank(nn.Module):
    """A layer and its usual low-rank adapter, which begins at zero."""

    def __init__(self):
        super().__init__()
        self.base, self.a, self.b = nn.Linear(6, 8), nn.Linear(6, 3, bias=False), nn.Linear(3, 8, bias=False)
        self.head = nn.Linear(8, 3)
        nn.init.zeros_(self.b.weight)

    def forward(self, x):
        return self.head(torch.relu(self.base(x) + self.b(self.a(x))))


def test_a_balanced_point_that_does_not_exist_is_left():
    model = LowRank().double()
    symmetry = mixing(3, "a.weight", "b.weight")
    before = params_of(copy.deepcopy(model))

    def loss_fn(net):
        return nn.functional.mse_loss(net(X), Y)

    report = tl.teleport(model, loss_fn, symmetry, objective="weight_norm", radius=20.0)
    assert not report.accepted and "nothing smaller was found" in report.reason
    assert all(torch.equal(p, before[n]) for n, p in params_of(model).items())
    report = tl.teleport(model, loss_fn, objective="weight_norm", radius=20.0)  # with the rest, which is balanced
    assert report.accepted
    assert torch.equal(model.a.weight, before["a.weight"]) and not torch.equal(model.head.weight, before["head.weight"])


def test_a_neuron_without_one_side_is_left():
    model = mlp([6, 5, 4, 3], nn.ReLU())
    with torch.no_grad():
        model[2].weight[:, 1] = 0  # nobody reads it
        model[0].weight[3], model[0].bias[3] = 0, 0  # it says nothing
    before = params_of(copy.deepcopy(model))
    symmetry = hidden_product(scaling, model)
    xi = closed_form(symmetry, before, False, maximize=False, radius=20.0)
    assert xi[0][[1, 3]].tolist() == [0, 0] and bool((xi[0][[0, 2, 4]] != 0).all()) and bool((xi[1] != 0).all())
    free = tuple(x.requires_grad_() for x in xi)
    slopes = torch.autograd.grad(transported_norm(symmetry, before, False, free), free)
    assert float(slopes[0][[0, 2, 4]].abs().max()) < 1e-6 and float(slopes[1].abs().max()) < 1e-6


@pytest.mark.parametrize("build", [PositiveScaling, GeneralLinear])
def test_one_sided_factors_have_no_minimum(build):
    """A layer that is normalised behind: its weight scales, or its unread columns mix, and nothing pairs with it."""
    symmetry = tl.Product([NeuronSymmetry(build(4), [Leg("w", 0)])])
    params = {"w": torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))}
    for gradients in (False, True):
        (down,) = closed_form(symmetry, params, gradients, maximize=False, radius=2.0)
        (up,) = closed_form(symmetry, params, gradients, maximize=True, radius=2.0)
        assert float(down.abs().max()) == 0
        one = torch.ones(4) if build is PositiveScaling else torch.eye(4)
        assert torch.allclose(up, (-2.0 if gradients else 2.0) * one.double(), atol=1e-12)


def test_weight_normalised_layers_are_balanced_where_they_can_be():
    """Directions may have any length, so none is best; lengths pair with the next layer, where that is a plain one."""
    g, v, b = "0.parametrizations.weight.original0", "0.parametrizations.weight.original1", "0.bias"
    direction = NeuronSymmetry(PositiveScaling(5), [Leg(v, 0)])

    def loss_fn(net):
        return nn.functional.mse_loss(net(X), Y)

    model = nn.Sequential(weight_norm(nn.Linear(6, 5)), nn.ReLU(), weight_norm(nn.Linear(5, 3))).double()
    report = tl.teleport(model, loss_fn, direction, objective="weight_norm")
    assert not report.accepted and "nothing smaller was found" in report.reason
    model = nn.Sequential(weight_norm(nn.Linear(6, 5)), nn.ReLU(), nn.Linear(5, 3)).double()
    product = tl.Product([direction, scaling(5, g, "2.weight", b)])
    report = tl.teleport(model, loss_fn, product, objective="weight_norm", radius=9.0)
    assert report.accepted and float(report.xi[0].abs().max()) == 0
    lengths = torch.cat([model.get_parameter(g), model.get_parameter(b)[:, None]], 1).norm(dim=1)
    assert torch.allclose(lengths, model[2].weight.norm(dim=0), rtol=1e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mixed", [False, True])
def test_matrices_in_half_precision(dtype, mixed):
    """Elements live in float32, also where the weights do not, and where norms are wider than the rest."""
    torch.manual_seed(0)
    model = Attention().to(dtype)
    if mixed:
        model.norm.float()
    dtypes = {n: p.dtype for n, p in params_of(model).items()}
    x, y = torch.randn(6, 7, 8).to(dtype), torch.randint(3, (6,))
    symmetry = tl.find_symmetries(model, x)
    assert {type(f.group) for f in symmetry} > {GeneralLinear, PositiveScaling}
    assert all(
        z.dtype == torch.float32 for f, z in zip(symmetry, symmetry.zeros(params_of(model)), strict=True) if f.dim
    )
    generator = torch.Generator().manual_seed(0)
    for options in (
        {},
        {"objective": "weight_norm"},
        {"search": "ascent"},
        {"search": "random", "generator": generator},
        {"objective": "curvature"},
    ):
        outputs = model(x).detach().float()
        report = tl.teleport(
            model, lambda net: nn.functional.cross_entropy(net(x).float(), y), symmetry, radius=0.5, **options
        )
        assert report.accepted, report.reason
        assert relative(model(x).float(), outputs) < 10 * torch.finfo(dtype).eps
        assert {n: p.dtype for n, p in params_of(model).items()} == dtypes


class Exponentials(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.linalg_matrix_exp.default
        return func(*args, **(kwargs or {}))


def test_one_exponential_gives_an_element_and_its_dual(generator):
    for group, count in ((GeneralLinear(3), 1), (GeneralLinear(2, blocks=3), 1), (SpecialOrthogonal(4), 1)):
        xi = group.sample(torch.zeros(1, dtype=torch.float64), generator=generator)
        with Exponentials() as exponentials:
            g, dual = group.pair(xi)
        assert exponentials.count == count
        assert torch.allclose(dual.mT @ g, torch.eye(g.shape[-1], dtype=g.dtype).expand_as(g), atol=1e-12)


def test_a_product_over_several_dtypes_is_as_exact_as_each():
    """Wide weights are moved in their own precision, though the first that a factor names is narrow."""
    symmetry = tl.Product([scaling(4, "a", "b"), mixing(3, "b", "c")])
    shapes = {"a": (4, 2), "b": (3, 4), "c": (2, 3)}
    g = torch.Generator().manual_seed(1)
    types = dict(zip(shapes, (torch.bfloat16, torch.float64, torch.float32), strict=True))
    params = {n: torch.randn(s, generator=g).to(types[n]) for n, s in shapes.items()}
    xi = symmetry.sample(params, generator=g)
    moved = symmetry.act(params, xi)
    wide = symmetry.act({n: p.double() for n, p in params.items()}, xi)
    for name, dtype in types.items():
        assert moved[name].dtype == dtype
        assert relative(moved[name].double(), wide[name]) <= 2 * torch.finfo(dtype).eps
    for maximize in (True, False):
        found = closed_form(symmetry, params, False, maximize=maximize)
        other = closed_form(symmetry, {n: p.double() for n, p in params.items()}, False, maximize=maximize)
        assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(found, other, strict=True))


def test_products_of_mixings_and_scalings():
    layers = [nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 6), nn.Linear(6, 5), nn.Linear(5, 3)]
    model = nn.Sequential(*layers).double()
    found, params = tl.find_symmetries(model, X), params_of(model)
    assert found.select(kind="translation").dim == 6 + 5 + (7 + 1) + 2 * (6 + 1)  # biases, and what is written unread
    symmetry = tl.Product([f for f in found if f.group.kind != "translation"])
    assert [type(f.group) for f in symmetry if f.dim] == [PositiveScaling, GeneralLinear, GeneralLinear]
    grads = value_and_grad(loss_of(model, lambda net: nn.functional.mse_loss(net(X), Y)), params)[1]
    before, found = float(norm(grads)), closed_form(symmetry, grads, True, radius=0.5)
    value = float(transported_norm(symmetry, grads, True, found))
    assert value > 1.2 * before
    for k, factor in enumerate(symmetry):  # no single factor can be improved
        for seed in range(20):
            trial = factor.sample(params, radius=0.5, generator=torch.Generator().manual_seed(seed))
            xi = (*found[:k], trial, *found[k + 1 :])
            assert float(transported_norm(symmetry, grads, True, xi)) <= value * (1 + 1e-9)


def test_hessian_vector_products_against_the_dense_hessian(generator):
    model = mlp([6, 4, 3], nn.Tanh())
    params = params_of(model)
    loss = loss_of(model, lambda net: nn.functional.mse_loss(net(X), Y))
    vector = {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in params.items()}
    names = list(params)

    def flat(*values):
        return loss(dict(zip(names, values, strict=True)))

    dense = torch.autograd.functional.hessian(flat, tuple(params.values()))
    product = hvp(loss, params, vector)
    for i, name in enumerate(names):
        row = sum(torch.tensordot(dense[i][j], vector[other], dims=params[other].ndim) for j, other in enumerate(names))
        assert torch.allclose(product[name], row, atol=1e-12)
