"""find_symmetries: every activation of torch.nn, nothing false, nothing touched."""

from __future__ import annotations

import copy
import inspect
import warnings

import pytest
import torch
from conftest import params_of, relative
from torch import nn
from torch.func import functional_call

import teleport_lite as tl
from teleport_lite.errors import EmptyModelError, TeleportError

ACTIVATIONS = sorted(
    (
        kind
        for name, kind in inspect.getmembers(torch.nn.modules.activation, inspect.isclass)
        if name in torch.nn.modules.activation.__all__
    ),
    key=lambda kind: kind.__name__,
)
HOMOGENEOUS = {"ReLU", "LeakyReLU", "PReLU", "RReLU"}
ODD = {"Tanh", "Hardtanh", "Softsign", "Tanhshrink", "Softshrink", "Hardshrink"}
SPECIAL = {
    "Threshold": lambda: nn.Threshold(0.5, 0.0),
    "Softmax": lambda: nn.Softmax(-1),
    "LogSoftmax": lambda: nn.LogSoftmax(-1),
    "Softmin": lambda: nn.Softmin(-1),
}


def kinds(symmetry: tl.Product) -> list[str]:
    return [type(f.group).__name__ for f in symmetry]


def shifts(symmetry: tl.Product) -> int:
    return symmetry.select(kind="translation").dim


@pytest.mark.parametrize("kind", ACTIVATIONS, ids=lambda k: k.__name__)
def test_every_activation_of_torch(kind, generator):
    name = kind.__name__
    if name == "MultiheadAttention":
        pytest.skip("a layer with weights of its own, not an elementwise map")
    shape = (2, 6, 4, 4) if name == "Softmax2d" else (5, 4)
    activation = SPECIAL.get(name, kind)()
    model = nn.Sequential(nn.Linear(4, 6), activation, nn.Linear(3 if name == "GLU" else 6, 2)).double()
    symmetry = tl.find_symmetries(model, torch.zeros(shape))
    expected = ["PositiveScaling"] * (name in HOMOGENEOUS | {"GLU"}) + ["Signs"] * (name in ODD | {"GLU"})
    unseen = {"Softmax": 4 + 1, "LogSoftmax": 4 + 1, "Softmin": 4 + 1, "Softmax2d": 6}.get(name, 0)
    assert kinds(symmetry) == [*expected, "Permutation", *["Translation"] * (unseen > 0)]
    assert shifts(symmetry) == unseen  # weights and bias that shift all logits alike; Softmax2d goes over another axis
    params, x = params_of(model), torch.randn(shape, generator=generator, dtype=torch.float64)
    model.eval()
    moved = symmetry.act(params, symmetry.sample(params, generator=generator))
    assert relative(functional_call(model, moved, x), model(x)) < 1e-12


def test_linear_layers_mix_and_dropout_restricts():
    x = torch.zeros(3, 4)
    linear = nn.Sequential(nn.Linear(4, 6), nn.Identity(), nn.Linear(6, 2))
    assert kinds(tl.find_symmetries(linear, x)) == ["GeneralLinear", "Translation"]
    assert shifts(tl.find_symmetries(linear, x)) == 6
    dropped = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 2))
    assert kinds(tl.find_symmetries(dropped, x)) == ["PositiveScaling", "Signs", "Permutation"]


def test_nested_flattened_and_with_per_neuron_slopes(generator):
    model = nn.Sequential(
        nn.Flatten(),
        nn.Sequential(nn.Linear(8, 6, bias=False), nn.PReLU(6), nn.Dropout()),
        nn.Sequential(nn.Sequential(nn.Linear(6, 5), nn.ReLU(inplace=True)), nn.Linear(5, 3)),
    )
    symmetry = tl.find_symmetries(model, torch.zeros(2, 2, 4))
    assert kinds(symmetry) == ["PositiveScaling", "Permutation"] * 2
    assert "1.1.weight" in symmetry[1].names and "1.1.weight" not in symmetry[0].names
    model = model.double().eval()
    params, x = params_of(model), torch.randn(2, 2, 4, generator=generator, dtype=torch.float64)
    moved = symmetry.act(params, symmetry.sample(params, generator=generator))
    assert relative(functional_call(model, moved, x), model(x)) < 1e-12


class Custom(nn.Module):
    """A model that calls its modules in turn, with a twist chosen by `twist`."""

    def __init__(self, twist: str = "") -> None:
        super().__init__()
        self.first, self.act, self.second = nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)
        self.last = nn.Linear(4, 2)
        self.twist = twist
        if twist == "tied":
            self.second.weight = self.first.weight
        if twist == "zero":
            nn.init.zeros_(self.last.weight)

    def forward(self, x):
        h = self.act(self.first(x))
        if self.twist == "functional":
            h = h.sin()
        k = self.act(self.second(h))
        if self.twist == "skip":
            return self.last(k + h)
        if self.twist == "skip the last":
            return self.last(k) + h[:, :2]
        if self.twist == "twice":
            k = self.act(self.second(k))
        if self.twist == "reads the weight":
            return self.last(k) * self.second.weight.norm()
        return self.last(k)


def test_a_custom_model_that_calls_its_modules_in_turn():
    assert kinds(tl.find_symmetries(Custom(), torch.zeros(1, 4))) == ["PositiveScaling", "Permutation"] * 2


@pytest.mark.parametrize(
    ("twist", "found", "reason"),
    [
        ("functional", ["Permutation", "PositiveScaling", "Permutation"], None),
        ("skip", ["PositiveScaling", "Permutation"], None),  # one scaling of both layers
        ("skip the last", ["PositiveScaling", "Permutation"] * 2, None),  # of the neurons that are not skipped
        ("twice", ["PositiveScaling", "Permutation"], None),
        ("tied", [], "rows of first.weight: what they are multiplied with is fixed"),
        # the norm of the weight goes down by a factor with it, and the last layer's rows go up
        ("reads the weight", ["PositiveScaling", "Permutation", "Permutation"], None),
        ("zero", ["PositiveScaling", "Permutation"] * 2, None),
    ],
)
def test_no_false_symmetry(twist, found, reason, generator):
    torch.manual_seed(0)
    model = Custom(twist).double()
    symmetry = tl.find_symmetries(model, torch.zeros(1, 4))
    assert kinds(symmetry) == found
    assert reason is None or any(reason in r for r in symmetry.reasons), symmetry.reasons
    if found:
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype))
        params, x = params_of(model), torch.randn(9, 4, generator=generator, dtype=torch.float64)
        moved = symmetry.act(params, symmetry.sample(params, generator=generator))
        assert relative(functional_call(model, moved, x), model(x)) < 1e-11


def test_norms_stop_what_comes_in_and_start_with_their_gain():
    batch = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))
    found = tl.find_symmetries(batch, torch.zeros(3, 4))
    assert kinds(found) == ["Signs", "Permutation", "PositiveScaling"]
    assert [f.buffers for f in found] == [("1.running_mean",), ("1.running_mean", "1.running_var"), ()]
    assert found[2].names == ("1.weight", "1.bias", "3.weight")
    layer = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 2))
    assert kinds(tl.find_symmetries(layer, torch.zeros(3, 4))) == ["Permutation", "PositiveScaling", "Translation"]
    assert shifts(tl.find_symmetries(layer, torch.zeros(3, 4))) == 4 + 1  # constants in what the norm reads


def test_frozen_parameters_stay_with_a_reason():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    model[4].weight.requires_grad_(False)
    symmetry = tl.find_symmetries(model, torch.zeros(3, 4))
    assert kinds(symmetry) == ["PositiveScaling", "Permutation"] and "4.weight" not in symmetry.names
    assert symmetry.reasons == ("rows of 2.weight, 4.weight: 4.weight is frozen",)


def test_weight_norm():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 6)), nn.ReLU(), nn.Linear(6, 2))
    symmetry = tl.find_symmetries(model, torch.zeros(3, 4))
    assert "Permutation" in kinds(symmetry)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_and_the_random_state_are_left_as_they_were(training):
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(), nn.ReLU(), nn.Linear(6, 2)).train(training)
    model[2].eval()
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    state = torch.get_rng_state()
    tl.find_symmetries(model, torch.zeros(3, 4))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert modes == [m.training for m in model.modules()]
    assert torch.equal(state, torch.get_rng_state())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_no_symmetry_has_a_reason():
    symmetry = tl.find_symmetries(nn.Linear(4, 2), torch.zeros(3, 4))
    assert len(symmetry) == 0 and symmetry.dim == 0 and "the model returns them" in symmetry.reasons[0]
    assert "left out: rows of weight: the model returns them" in repr(symmetry)


def test_errors():
    with pytest.raises(EmptyModelError, match="Sequential with none"):
        tl.find_symmetries(nn.Sequential(), torch.zeros(1))
    model = nn.Linear(2, 2)
    model.lock = __import__("threading").Lock()
    with pytest.raises(TeleportError, match=r"copy\.deepcopy"):
        tl.find_symmetries(model, torch.zeros(1, 2))


def test_half_precision_models_are_understood():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).bfloat16()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tl.find_symmetries(model, torch.zeros(3, 4, dtype=torch.bfloat16)).dim == 6


class FarOut(nn.Module):
    """Fine on inputs of the usual size, and not on large ones."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.one, self.two, self.how = nn.Linear(4, 5), nn.Linear(5, 2), how

    def forward(self, x):
        if self.how == "raises" and x.abs().max() > 20:
            raise ValueError("too large")
        y = self.two(torch.relu(self.one(x)))
        return (5 * y).exp().exp() if self.how == "overflows" else y


@pytest.mark.parametrize("how", ["raises", "overflows"])
def test_inputs_that_the_model_cannot_take_are_left_out(how):
    torch.manual_seed(0)
    assert tl.find_symmetries(FarOut(how), torch.randn(20, 4)).dim == 5


class Between(nn.Module):
    """Two layers, with a function of what the first one writes between them."""

    def __init__(self, function, width=3) -> None:
        super().__init__()
        self.one, self.two, self.function = nn.Linear(4, width), nn.Linear(3, 2), function

    def forward(self, x):
        return self.two(self.function(self.one(x)))


@pytest.mark.parametrize(
    ("function", "scales"),
    [
        (lambda h: nn.functional.normalize(h, dim=-1), 1),
        (lambda h: h / h.square().sum(-1, keepdim=True).sqrt(), 1),
        (lambda h: h / h.norm(dim=-1, keepdim=True).clamp(min=0.5), 0),  # binds
        (lambda h: h / (h.norm(dim=-1, keepdim=True) + 1), 0),
        (lambda h: h / h.relu().sum(-1, keepdim=True).clamp(min=1e-10), 0),  # binds where all are off
    ],
)
def test_the_scale_in_front_of_a_length(function, scales):
    torch.manual_seed(0)
    symmetry = tl.find_symmetries(Between(function), torch.randn(5, 4))
    assert symmetry.select(kind="scaling").dim == scales if scales else "PositiveScaling" not in kinds(symmetry)


def test_a_product_of_three_factors_has_all_its_scalings():
    torch.manual_seed(0)
    model = Between(lambda h: h[:, :3] * h[:, 3:6] * h[:, 6:], 9)
    symmetry = tl.find_symmetries(model, torch.randn(5, 4)).select(kind="scaling")
    assert symmetry.dim == symmetry.rank(params_of(model)) == 9  # of each factor, undone by the layer behind them
