"""The exact symmetries of neurons: invariance, group laws, transport."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import hidden_product, largest_gap, mlp, params_of, relative
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call

import teleport_lite as tl
from teleport_lite.errors import ParameterError, ShapeError, TeleportError, UnknownNameError
from teleport_lite.functional import loss_of, value_and_grad
from teleport_lite.groups import (
    GeneralLinear,
    PairRotations,
    Permutation,
    PositiveScaling,
    Shears,
    Signs,
    SpecialOrthogonal,
    Translation,
)
from teleport_lite.symmetries import Leg, NeuronSymmetry, Symmetry, TestFunction, mixing, permutation, scaling, sign


class Sin(nn.Module):
    def forward(self, x):
        return x.sin()


class Erf(nn.Module):
    def forward(self, x):
        return x.erf()


HOMOGENEOUS = (nn.ReLU(), nn.LeakyReLU(0.1), nn.PReLU(init=0.3))
ODD = (nn.Tanh(), Sin(), Erf())
ELEMENTWISE = (nn.GELU(), nn.SiLU(), nn.Sigmoid(), nn.ELU(), nn.Softplus(), nn.ReLU())
CASES = {
    "scaling": (scaling, HOMOGENEOUS),
    "mixing": (mixing, (nn.Identity(),)),
    "permutation": (permutation, ELEMENTWISE),
    "sign": (sign, ODD),
}
LIMITS = {torch.float64: 1e-12, torch.float32: 1e-5}
widths = st.lists(st.integers(1, 64), min_size=3, max_size=7)  # 1 to 5 hidden layers


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("case", CASES)
@settings(max_examples=200, deadline=None, derandomize=True)
@given(widths=widths, bias=st.booleans(), seed=st.integers(0, 2**31), which=st.integers(0, 5))
def test_outputs_stay(case, dtype, widths, bias, seed, which):
    build, activations = CASES[case]
    model = mlp(widths, activations[which % len(activations)], bias=bias, dtype=dtype, seed=seed).to(dtype)
    symmetry, params, generator = hidden_product(build, model), params_of(model), torch.Generator().manual_seed(seed)
    moved = symmetry.act(params, symmetry.sample(params, generator=generator))
    x = torch.randn(16, widths[0], generator=generator, dtype=dtype)
    assert relative(functional_call(model, moved, x), model(x)) <= LIMITS[dtype]


@pytest.mark.parametrize("case", CASES)
def test_two_hundred_elements_move_the_weights_but_not_the_outputs(case, generator):
    build, activations = CASES[case]
    model = mlp([5, 24, 17, 3], activations[0])
    symmetry, params = hidden_product(build, model), params_of(model)
    x = torch.randn(16, 5, generator=generator, dtype=torch.float64)
    before = model(x)
    for _ in range(200):
        moved = symmetry.act(params, symmetry.sample(params, generator=generator))
        assert largest_gap(moved, params) > 1e-2
        assert relative(functional_call(model, moved, x), before) <= 1e-12


@pytest.mark.parametrize("case", CASES)
def test_wrong_activation_is_no_symmetry(case, generator):
    """The counterpart of the tests above: they can fail."""
    wrong = {"scaling": nn.Tanh(), "mixing": nn.ReLU(), "permutation": nn.Softmax(0), "sign": nn.ReLU()}[case]
    model = mlp([5, 8, 3], wrong)
    symmetry, params = hidden_product(CASES[case][0], model), params_of(model)
    moved = symmetry.act(params, symmetry.sample(params, generator=generator))
    x = torch.randn(16, 5, generator=generator, dtype=torch.float64)
    changed = relative(functional_call(model, moved, x), model(x)) > 1e-3
    assert changed != (case == "permutation")  # a softmax over the batch does commute with permuting neurons


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=50, deadline=None, derandomize=True)
@given(widths=widths, seed=st.integers(0, 2**31))
def test_group_laws(case, widths, seed):
    model = mlp(widths, nn.Identity(), seed=seed)
    params, generator = params_of(model), torch.Generator().manual_seed(seed)
    for factor in hidden_product(CASES[case][0], model):
        a, b = (factor.sample(params, generator=generator) for _ in range(2))
        assert largest_gap(factor.act(params, factor.zeros(params)), params) == 0.0
        assert largest_gap(factor.act(factor.act(params, a), factor.inverse(a)), params) <= 1e-12
        twice = factor.act(factor.act(params, a), b)
        if isinstance(factor.group, (PositiveScaling, Signs)):  # commutative
            both = a + b if isinstance(factor.group, PositiveScaling) else a * b
            assert largest_gap(twice, factor.act(params, both)) <= 1e-12
            assert largest_gap(twice, factor.act(factor.act(params, b), a)) <= 1e-12


GROUPS = [
    PositiveScaling(6),
    GeneralLinear(6),
    GeneralLinear(3, blocks=2),
    SpecialOrthogonal(6),
    SpecialOrthogonal(6, centered=True),
    PairRotations(6),
    PairRotations(6, halves=True),
    Shears(6),
    Shears(6, transposed=True),
    Permutation(6),
    Signs(6),
]


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: f"{type(group).__name__} {group}")
def test_groups(group, generator):
    like = torch.zeros(1, dtype=torch.float64)
    vectors = torch.randn(3, 6, 2, generator=generator, dtype=torch.float64)
    a, b = (group.sample(like, radius=0.7, generator=generator) for _ in range(2))
    g, h = group.exp(a), group.exp(b)

    def acted(g):
        return group.along(g, vectors, 1)

    assert torch.equal(acted(group.exp(group.zeros(like))), vectors)
    assert relative(group.along(group.exp(group.inverse(a)), acted(g), 1), vectors) < 1e-14
    assert relative(group.along(g, acted(h), 1), acted(group.compose(g, h))) < 1e-14
    pairing = torch.einsum("aib,aib->ab", acted(g), group.along(group.exp(group.dual(a)), vectors, 1))
    assert relative(pairing, vectors.square().sum(1)) < 1e-13  # dual vectors keep their pairing
    assert group.isometry == (abs(float(acted(g).norm() / vectors.norm()) - 1) < 1e-12)
    if group.dim:
        assert float(group.norm(a)) <= 0.7
        assert 0.5 < max(float(group.norm(group.sample(like, generator=generator))) for _ in range(30)) <= 1.0
        far = 10 * a / group.norm(a)
        assert float(group.norm(group.clip(far, 0.5))) == pytest.approx(0.5)
        assert relative(group.clip(-far, 0.5), -group.clip(far, 0.5)) < 1e-12
        assert relative(group.clip(a, 0.8), a) < 1e-12  # what is inside stays
        stretch = torch.linalg.matrix_norm(acted(g).movedim(1, 0).flatten(1), 2) / torch.linalg.matrix_norm(
            vectors.movedim(1, 0).flatten(1), 2
        )
        assert float(stretch) <= torch.e**0.7


def test_sample_is_reproducible_and_leaves_the_global_generator_alone():
    model = mlp([4, 8, 2], nn.ReLU())
    params, symmetry = params_of(model), tl.find_symmetries(model, torch.zeros(1, 4))
    state = torch.get_rng_state()
    first, second = (symmetry.sample(params, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(state, torch.get_rng_state())


TRANSPORT = {
    "scaling": (nn.LeakyReLU(0.1), scaling),
    "mixing": (nn.Identity(), mixing),
    "permutation": (nn.GELU(), permutation),
    "sign": (nn.Tanh(), sign),
}


@pytest.mark.parametrize("case", TRANSPORT)
@pytest.mark.parametrize("seed", range(5))
def test_transport_agrees_with_autograd(case, seed, generator):
    activation, build = TRANSPORT[case]
    model = mlp([6, 10, 7, 3], activation, seed=seed)
    product = hidden_product(build, model)
    x = torch.randn(20, 6, generator=generator, dtype=torch.float64)
    y = torch.randn(20, 3, generator=generator, dtype=torch.float64)
    loss, params = loss_of(model, lambda net: nn.functional.mse_loss(net(x), y)), params_of(model)
    grads = value_and_grad(loss, params)[1]
    for symmetry in (*product, product):
        xi = symmetry.sample(params, generator=generator)
        expected = value_and_grad(loss, symmetry.act(params, xi))[1]
        assert largest_gap(symmetry.transport(grads, xi), expected) <= 1e-10
        if not isinstance(symmetry, tl.Product):  # the rule that the base class derives from act
            assert largest_gap(Symmetry.transport(symmetry, grads, xi), expected) <= 1e-10


def test_transport_of_a_product_of_all_kinds(generator):
    layers = [nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 5), nn.Linear(5, 3)]
    model = nn.Sequential(*layers).double()
    x = torch.randn(20, 6, generator=generator, dtype=torch.float64)
    symmetry = tl.find_symmetries(model, x)
    assert {type(f.group) for f in symmetry} == {PositiveScaling, Permutation, Signs, GeneralLinear, Translation}
    loss, params = loss_of(model, lambda net: net(x).square().sum()), params_of(model)
    xi = symmetry.sample(params, generator=generator)
    expected = value_and_grad(loss, symmetry.act(params, xi))[1]
    assert largest_gap(symmetry.transport(value_and_grad(loss, params)[1], xi, params), expected) <= 1e-10


@pytest.mark.parametrize("name", ["ellipse", "booth", "rosenbrock"])
def test_plane_rotations(name, generator):
    point = TestFunction(name, start=(-1.3, 0.7)).double()
    params, rotation = params_of(point), point.symmetry
    loss = loss_of(point, lambda net: net())
    value, grads = value_and_grad(loss, params)
    for _ in range(20):
        xi = rotation.sample(params, radius=torch.pi, generator=generator)
        moved = rotation.act(params, xi)
        moved_value, moved_grads = value_and_grad(loss, moved)
        assert float(moved_value) == pytest.approx(float(value), rel=1e-12)
        assert largest_gap(rotation.act(moved, rotation.inverse(xi)), params) < 1e-12
        assert relative(rotation.transport(grads, xi, params)["w"], moved_grads["w"]) < 1e-10
    assert largest_gap(rotation.act(params, rotation.zeros(params)), params) < 1e-15


def test_nonlinear_transport_needs_the_point():
    point = TestFunction("rosenbrock", start=(0.0, 0.0))
    with pytest.raises(TeleportError, match="expected params"):
        point.symmetry.transport(params_of(point), torch.zeros(1))


def test_act_is_pure_differentiable_and_vmaps(generator):
    model = mlp([4, 6, 2], nn.ReLU())
    params, (symmetry,) = params_of(model), hidden_product(scaling, model)
    before = {name: p.clone() for name, p in params.items()}
    xis = torch.stack([symmetry.sample(params, generator=generator) for _ in range(3)])
    batch = torch.vmap(lambda xi: symmetry.act(params, xi))(xis)
    for i, xi in enumerate(xis):
        moved = symmetry.act(params, xi)
        assert list(moved) == list(params)
        assert moved["2.bias"] is params["2.bias"]  # untouched
        assert all(torch.equal(batch[name][i], moved[name]) for name in moved)
    assert largest_gap(before, params) == 0.0
    slope = torch.func.grad(lambda xi: symmetry.act(params, xi)["0.weight"].sum())(torch.zeros(6, dtype=torch.float64))
    assert torch.allclose(slope, params["0.weight"].sum(1))


def test_legs_may_be_slices_of_a_longer_axis(generator):
    model = nn.Sequential(nn.Linear(4, 10), nn.GLU(), nn.Linear(5, 2)).double()
    gate = NeuronSymmetry(PositiveScaling(5), [Leg("0.weight", 0), Leg("0.bias", 0), Leg("2.weight", 1, dual=True)])
    params = params_of(model)
    moved = gate.act(params, gate.sample(params, generator=generator))
    assert torch.equal(moved["0.weight"][5:], params["0.weight"][5:])
    x = torch.randn(7, 4, generator=generator, dtype=torch.float64)
    assert relative(functional_call(model, moved, x), model(x)) < 1e-14


@pytest.mark.parametrize("offset", [1.0, -0.5, 2.0, (1.0, 0.0, 0.0, 1.0, -0.5, 2.0)])
def test_a_leg_with_an_offset_moves_as_the_sum(offset, generator):
    """What multiplies is c + w, as in a norm with the gain 1 + w."""
    plain, shifted = (NeuronSymmetry(GeneralLinear(3), [Leg("a", 0, offset=c), Leg("b", 1, True)]) for c in (0, offset))
    saved = json.loads(json.dumps(shifted.to_dict()))
    assert NeuronSymmetry.from_dict(saved) == shifted != plain
    offset = torch.tensor(offset).view(-1, 2) if isinstance(offset, tuple) else offset
    params = {"a": torch.randn(3, 2, generator=generator), "b": torch.randn(1, 3, generator=generator)}
    xi = shifted.sample(params, generator=generator)
    expected = plain.act({**params, "a": params["a"] + offset}, xi)
    assert largest_gap(shifted.act(params, xi), {**expected, "a": expected["a"] - offset}) < 1e-6


def test_at_a_fixed_point_there_is_no_direction():
    symmetry, zero = scaling(3, "a", "b"), {"a": torch.zeros(3, 2), "b": torch.zeros(1, 3)}
    assert symmetry.rank(zero) == 0 and symmetry.rank({n: p + 1 for n, p in zero.items()}) == symmetry.dim


def test_errors_carry_their_facts():
    params = {"a": torch.ones(3, 2), "b": torch.ones(1, 3)}
    symmetry = scaling(3, "a", "b")
    with pytest.raises(UnknownNameError, match="expected one of 'a', got 'b'"):
        symmetry.act({"a": params["a"]}, torch.zeros(3))
    with pytest.raises(ParameterError, match="torch.int64"):
        symmetry.act({**params, "a": torch.ones(3, 2, dtype=torch.int64)}, torch.zeros(3))
    with pytest.raises(ShapeError, match=r"shape \(3,\), got Tensor of shape \(2,\)"):
        symmetry.act(params, torch.zeros(2))
    with pytest.raises(ShapeError, match="at least 4"):
        scaling(4, "a", "b").act(params, torch.zeros(4))
    for xi, got in ((torch.zeros(3), r"Tensor of shape \(3,\)"), ((), "tuple of length 0"), (None, "None")):
        with pytest.raises(TeleportError, match=f"xi to be a tuple of 1 tensors, got {got}; take xi from sample"):
            tl.Product([symmetry]).act(params, xi)
    with pytest.raises(ShapeError, match=r"xi of shape \(3,\), got 'a'; take xi from sample"):
        symmetry.act(params, "a")
    for leg in (Leg("c", 0, groups=2), Leg("c", 1, groups=4)):  # along the groups themselves; of groups that differ
        with pytest.raises(ShapeError, match="c of shape at least"):
            NeuronSymmetry(PositiveScaling(2), [leg]).act({"c": torch.ones(6, 2)}, torch.zeros(2))
    with pytest.raises(TeleportError, match="positive finite radius"):
        symmetry.sample(params, radius=float("inf"))
    with pytest.raises(TeleportError, match="at least one leg"):
        NeuronSymmetry(PositiveScaling(3), [])
    with pytest.raises(TeleportError, match="length at least 1"):
        PositiveScaling(0)
    with pytest.raises(UnknownNameError, match="booth"):
        TestFunction("himmelblau", start=(0.0, 0.0))


def test_product_is_a_sequence_and_prints_as_a_table():
    symmetry = tl.Product([scaling(3, "a", "b"), tl.Product([permutation(3, "a", "b")])], reasons=["c is frozen"])
    assert len(symmetry) == 2 and symmetry.dim == 3 and symmetry.exact
    assert symmetry[0].dim == 3 and len(symmetry[:1]) == 1
    lines = repr(symmetry).splitlines()
    assert lines[0] == "Product of 2 symmetries, dim 3"
    assert lines[2].split() == ["a", "->", "b", "(R>0)^3", "3", "all", "inputs"]
    assert lines[-1] == "  left out: c is frozen"


# --- products ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def product():
    """Factors that do not commute: mixings, scalings and a permutation of the same neurons."""
    names = "0.weight", "1.weight", "0.bias"
    return tl.Product([mixing(5, *names), scaling(5, *names), permutation(5, *names), mixing(5, *names)])


def test_the_inverse_of_a_product_undoes_it(product, generator):
    model = mlp([4, 5, 3], nn.Identity())
    model = nn.Sequential(model[0], model[2])
    params, xi = params_of(model), product.sample(params_of(model), generator=generator)
    back, moved = product.inverse(xi), product.act(params, xi)
    assert largest_gap(product.act(moved, back), params) < 1e-12
    assert largest_gap(product.act(params, product.inverse(back)), moved) < 1e-14
    naive = tuple(f.inverse(x) for f, x in zip(product, xi, strict=True))  # in the wrong order
    assert largest_gap(product.act(moved, naive), params) > 1e-2


def test_gradients_go_back_by_the_inverse_of_a_product(product, generator):
    model = mlp([4, 5, 3], nn.Identity())
    params = params_of(nn.Sequential(model[0], model[2]))
    xi = product.sample(params, generator=generator)
    grads = {name: torch.randn(p.shape, generator=generator, dtype=p.dtype) for name, p in params.items()}
    assert largest_gap(product.transport(product.transport(grads, xi), product.inverse(xi)), grads) < 1e-12


def test_products_are_saved_as_json(product, generator):
    heads = NeuronSymmetry(GeneralLinear(2, 3), [Leg("q", 0, each=2), Leg("k", 1, True, start=4)])
    whole = tl.Product([*product, sign(4, "a", "b"), heads], ["left out"])
    again = tl.Product.from_dict(json.loads(json.dumps(whole.to_dict())))
    assert again == whole and again.reasons == whole.reasons and repr(again) == repr(whole)
    batch = torch.randn(3, 4, dtype=torch.float64)
    with pytest.raises(TeleportError, match="a symmetry that can be saved, got OutgoingMixing"):
        tl.minibatch_symmetries(mlp([4, 5, 3], nn.Tanh()), batch).to_dict()
    for wrong in ({}, {"factors": [{}], "reasons": []}, {"factors": [{"symmetry": "clocks"}], "reasons": []}):
        with pytest.raises(TeleportError, match="a saved product"):
            tl.Product.from_dict(wrong)


def test_selecting_from_a_product(product):
    assert [f.group.kind for f in product] == ["mixing", "scaling", "permutation", "mixing"]
    assert product.select(kind="mixing") == tl.Product([product[0], product[3]])
    assert product.select(name="?.weight") == product and product.select("scaling", "0.*") == product[1:2]
    assert product.select("sign").reasons == ("no factor of kind 'sign'",)
    with pytest.raises(UnknownNameError, match="'scaling', 'mixing', .*got 'scalings'"):
        product.select("scalings")
    with pytest.raises(UnknownNameError, match=r"one of '0.weight', '0.bias', '1.weight', got '0.wieght'; .*pattern"):
        product.select("scaling", "0.wieght")
    many = tl.Product([scaling(2, f"{i}.weight", f"{i + 1}.weight") for i in range(20)])
    with pytest.raises(UnknownNameError, match=r"one of '17.weight', .* or 16 others, got '17.weights'"):
        many.select(name="17.weights")


def test_spreading_the_entries_as_they_are_is_transport(generator):
    """The slow answer of the base class, by a dense Jacobian, carries gradients unless it is told otherwise."""
    symmetry = mixing(4, "0.weight", "1.weight")
    params = params_of(mlp([3, 4, 2], nn.Identity(), bias=False))
    params = {"0.weight": params["0.weight"], "1.weight": params["2.weight"]}
    xi = symmetry.sample(params, generator=generator)
    assert largest_gap(tl.Symmetry.spread(symmetry, params, xi, torch.clone), symmetry.transport(params, xi)) < 1e-12
