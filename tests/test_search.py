"""Closed forms against independent oracles: long searches, known formulas, stationarity."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import hidden_product, mlp, params_of
from torch import nn

import teleport_lite as tl
from teleport_lite.functional import hvp, loss_of, norm, value_and_grad
from teleport_lite.groups import GeneralLinear, PositiveScaling
from teleport_lite.search import closed_form
from teleport_lite.symmetries import mixing, scaling

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
@pytest.mark.parametrize("seed", range(3))
def test_scaling_maximum_is_the_best_of_all_corners(gradients, seed):
    symmetry, params, grads = problem([6, 4, 5, 3], seed=seed)
    tensors = grads if gradients else params
    xi = closed_form(symmetry, tensors, gradients, radius=1.0)
    assert all(bool((x.abs() == 1).all()) for x in xi)
    corners = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=9)), dtype=torch.float64)
    best = max(float(transported_norm(symmetry, tensors, gradients, tuple(c.split([4, 5])))) for c in corners)
    assert float(transported_norm(symmetry, tensors, gradients, xi)) >= 0.99 * best


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
    assert max(float(s.abs().max()) for s in slopes) < 1e-6


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
    assert group.extremum(up, down, maximize=False, radius=1.0).tolist() == [0.0, 1.0, -1.0]


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


def test_products_of_mixings_and_scalings():
    layers = [nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 6), nn.Linear(6, 5), nn.Linear(5, 3)]
    model = nn.Sequential(*layers).double()
    symmetry, params = tl.find_symmetries(model, X), params_of(model)
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
