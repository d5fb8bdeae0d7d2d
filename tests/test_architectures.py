"""find_symmetries on many families of models: the whole group, nothing false, nothing touched."""

from __future__ import annotations

import copy

import pytest
import torch
from architectures import FAMILIES, Decoder
from conftest import params_of
from torch import Tensor, nn
from torch.func import functional_call

import teleport_lite as tl
from teleport_lite.discovery.float64 import Float64
from teleport_lite.errors import TeleportError
from teleport_lite.functional import Params


def outputs(model: nn.Module, params: Params, inputs: object) -> Tensor:
    torch.manual_seed(0)
    args = inputs if isinstance(inputs, tuple) else (inputs,)
    with torch.no_grad(), Float64():  # some models compute in float32 whatever they are given
        return functional_call(model, params, args)


def worst(model: nn.Module, symmetry: tl.Product, inputs: object, elements: int) -> float:
    """Relative change of the outputs under random elements of radius 0.5."""
    params, generator = params_of(model), torch.Generator().manual_seed(0)
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    before, found = outputs(model, {**params, **buffers}, inputs), 0.0
    for _ in range(elements):
        moved = symmetry.act(params, symmetry.sample(params, radius=0.5, generator=generator))
        after = outputs(model, {**moved, **{k: b.clone() for k, b in buffers.items()}}, inputs)
        found = max(found, float((after - before).abs().max() / before.abs().max()))
    return found


def widened(model: nn.Module, inputs: object) -> object:
    """The model in float64 and off its special initial values; its inputs."""
    model.double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    if isinstance(inputs, tuple):
        return tuple(x.double() for x in inputs)
    return inputs.double() if inputs.is_floating_point() else inputs


READERS = 3 * 8 + 12  # rows of weights that read the norms of a block, with biases
WRITERS = 8 + 12 + 1  # columns, and a bias, of what a block writes into its stream; without a bias for attention
UNREAD = 24 * (8 - 3)  # weights of attention that read, beside the three directions of what was embedded, others
TRANSLATIONS = {  # biases undone by biases + weights behind norms + constants in streams that norms read
    "MLP, identity": 6 + 4 + (6 + 1),  # the last: what writes five numbers of which four are read
    "ResNet": 6,
    "ResNet without norms": 6,
    "ConvNeXt": 6 + 12 + 1 + 6,  # the last: a bias behind the gain of the layer
    "Group and instance norm": 2 + 6,
    # keys; one head; the first block reads x
    "Encoder, post-norm, ReLU": 2 * 8 + 8 + (READERS - 3 * 8) + READERS + 2 + UNREAD,
    "Encoder, pre-norm, GELU": 2 * (8 + 2 * 8 + READERS),
    "Decoder, GPT-2 style": 8 + 2 * (8 + 8 + 12) + 9 + 8 + 2 * WRITERS,  # attention has no biases, keys are unseen
    "Decoder, post-norm, ReLU": 8 + 2 * (8 + 12) + 8 + 2 * WRITERS + 1,
    "Decoder, tied embedding": 2 * (8 + 8 + 12) + 6 + 2 * WRITERS,
    # keys, norms, what reads norms, constants
    "Encoder and decoder": 4 * 8 + 8 + (2 * 12 + 2 * 8) + 8 + 2 + 2 + 2 * UNREAD,
    "Vision transformer": 2 * 8 + (8 + 8 + 12) + 8 + 3 + (1 + 5 + 16 + 1) + WRITERS,
    "LSTM": 4 * 5,
    "GRU": 2 * 5,
    "RNN, ReLU": 5,
    "RNN, tanh": 5,
}
SHEARS = {  # norms whose shift something without a bias reads
    "Decoder, GPT-2 style": 3 * 8,
    "Decoder, post-norm, ReLU": 2 * 8,
    "Decoder, tied embedding": 2 * 8,
    "Vision transformer": 8,
}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_group_of_a_family(name):
    make, example, dim = FAMILIES[name]
    torch.manual_seed(0)
    model, inputs = make(), example()
    before = copy.deepcopy(model.state_dict())
    symmetry = tl.find_symmetries(model, inputs)
    shifts, shears = (sum(f.dim for f in symmetry if f.group.kind == kind) for kind in ("translation", "shear"))
    assert (symmetry.dim - shifts - shears, shifts, shears) == (dim, TRANSLATIONS.get(name, 0), SHEARS.get(name, 0))
    assert not any("not understood" in reason for reason in symmetry.reasons)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    inputs = widened(model, inputs)
    model.eval()
    assert worst(model, symmetry, inputs, 100) < 1e-11
    model.train()
    continuous = symmetry.continuous  # a permutation moves a dropout mask's neurons
    assert worst(model, continuous, inputs, 10) < 1e-11


def test_the_check_of_a_family_can_fail():
    model = Decoder("gelu")
    symmetry = tl.find_symmetries(model, FAMILIES["Decoder, GPT-2 style"][1]())
    wrong = tl.Product([tl.symmetries.scaling(12, "blocks.0.mlp.0.weight", "blocks.0.mlp.2.weight")])
    inputs = widened(model, FAMILIES["Decoder, GPT-2 style"][1]())
    assert worst(model, tl.Product([*symmetry, *wrong]), inputs, 3) > 1e-3


def test_heads_are_permuted_as_blocks():
    model = Decoder("gelu")
    symmetry = tl.find_symmetries(model, FAMILIES["Decoder, GPT-2 style"][1]())
    heads = [s for s in symmetry if repr(s.group) == "S(2)"]
    assert [s.legs[0].each for s in heads] == [4, 4]
    assert {leg.name for leg in heads[0].legs} == {f"blocks.0.attention.{k}.weight" for k in "qkvo"}


def test_rotary_positions_keep_a_scaling_for_each_frequency():
    symmetry = tl.find_symmetries(Decoder("llama"), FAMILIES["Decoder, Llama style"][1]())
    pairs = [
        s for s in symmetry.select(kind="scaling") if "attention.q.weight" in str(s) and "attention.k.weight" in str(s)
    ]
    queries = [s for s in pairs if not any("one" in name for name in s.names)]
    assert [repr(s.group) for s in queries] == ["(R>0)^2"] * 4  # two layers, two heads, two frequencies each


class Adversarial(nn.Module):
    """What a model may do to mislead, chosen by `trick`."""

    def __init__(self, trick: str) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.register_buffer("seen", torch.zeros(4))
        self.trick = trick

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.one(x))
        match self.trick:
            case "control flow":
                h = h if float(h.sum()) > 0 else h + 1
            case "another path far out":
                h = h if float(x.abs().max()) < 30 else h.tanh()
            case "in place":
                h[:, 0] = h[:, 0].exp()
            case "in place through a view":
                h.view(-1)[::4].sigmoid_()
            case "complex":
                z = torch.view_as_complex(h.view(-1, 2, 2))
                h = torch.view_as_real(z * 1j).reshape(-1, 4)
            case "sort":
                h = h.sort(-1).values
            case "cumulative":
                h = h.cumsum(-1)
            case "positions":
                h = h * torch.arange(1.0, 5.0).to(h)
            case "noise":
                h = h + torch.randn_like(h)
            case "buffer":
                self.seen = self.seen + h.detach().mean(0)
                h = h + self.seen
            case "written into a constant":
                out = torch.zeros_like(h)
                out[:, :2] = h[:, :2]
                h = out + h.flip(-1)
            case "detached":
                h = h * (h.detach() > 0.5)
            case "data in numpy":
                h = h + torch.from_numpy(h.detach().cpu().numpy() ** 2)
            case "custom function":
                h = Cube.apply(h)
            case "weight outside":
                h = h @ self.two.weight.detach() / self.two.weight.norm()
            case "einsum and topk":
                h = torch.einsum("bi,ij->bj", h, self.two.weight) + h.topk(1, -1).values
        return self.three(torch.relu(self.two(h)))


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x**3

    @staticmethod
    def backward(ctx, g):
        return g


TRICKS = {  # and the dimension of the group that is found
    "control flow": 4,  # of the second hidden layer; that of the first would be true on one of two paths
    "another path far out": 4,
    "in place": 7,  # all but the neuron that is written over
    "in place through a view": 7,
    "complex": 6,  # of the first layer, the two parts of a number go together
    "sort": 4,
    "cumulative": 4,
    "positions": 8,
    "noise": 4,
    "buffer": 4,  # what it keeps may be anything, so it stays and so does what is added to it
    "written into a constant": 6,  # of the first layer, neurons 0 and 3 go together, and 1 and 2
    "detached": 4,
    "data in numpy": 4,
    "custom function": 8,  # a cube
    "weight outside": 7,  # rotations of the columns of a weight that meet those of its copy, and its scale
    "einsum and topk": 3,  # those of them that keep the vector of ones
}


@pytest.mark.parametrize("trick", TRICKS)
def test_adversarial_models(trick):
    torch.manual_seed(0)
    model, x = Adversarial(trick), torch.randn(6, 4)
    before = copy.deepcopy(model.state_dict())
    symmetry = tl.find_symmetries(model, x)
    assert symmetry.dim == TRICKS[trick]
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    x = widened(model, x)
    for seed, size in enumerate((1.0, 0.1, 100.0)):
        new = size * torch.randn(50, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert worst(model, symmetry, new, 20) < 1e-11, symmetry


def test_a_model_that_does_not_run_is_refused():
    with pytest.raises(TeleportError, match="a model that runs on example_inputs"):
        tl.find_symmetries(nn.Linear(4, 2), torch.zeros(3, 5))
