"""What discovery verifies on: nothing unexercised is free, nothing uncompared is verified, and every model is run."""

from __future__ import annotations

import collections
import dataclasses
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import tensors_in, worst_change
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import teleport_lite as tl
from teleport_lite.discovery.draws import PATTERNS, Draws
from teleport_lite.discovery.inputs import Arguments, variations
from teleport_lite.discovery.probe import Probe
from teleport_lite.discovery.verify import Verifier, describe_error
from teleport_lite.errors import ParameterError, TeleportError
from teleport_lite.outputs import distance, relative_gaps, tensors_of


def x(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def wide(*shape: int) -> Tensor:
    return x(*shape, seed=3).double()


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))


class Model(nn.Module):
    """A model of named layers and parameters, with a forward function that gets it as `s`."""

    def __init__(self, forward: Callable, **parts: Any) -> None:
        super().__init__()
        self.run = forward
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if type(part) is Tensor else part)

    def forward(self, *args, **kwargs):
        return self.run(self, *args, **kwargs)


def with_buffers(model: nn.Module, **buffers: Tensor) -> nn.Module:
    for name, b in buffers.items():
        model.register_buffer(name, b)
    return model


def found(symmetry: tl.Product) -> list[str]:
    """Groups, in the order of the parameters."""
    return [str(f.group) for f in symmetry]


# -- what the example does not exercise is not free: model, example, use of the model, groups, a word of the reasons


def conditional(s, x, c=None):
    return s.o(F.relu(s.a(x) + (s.null if c is None else s.c(c))))


def styled(s, x, style=None):
    h = torch.relu(s.a(x))
    return s.o(h if style is None else h * s.gain(style))


def stateful(s, x, h=None):
    return s.head(torch.relu(s.w(x) + s.u(x.new_zeros(len(x), 5) if h is None else h)))


def gated_off(s, x, gate=None):
    return s.o(torch.relu(s.a(x)) + (torch.zeros(()) if gate is None else gate) * s.low(s.up(x)))


def placed(s, x):
    return s.o(torch.relu(s.a(x) + s.table[: x.shape[1]]))


def relative(s, x):
    steps = torch.arange(x.shape[1])
    near = s.table[steps[:, None] - steps + 8].mean(1)
    return s.o(torch.relu(s.a(x) + near))


def rotary(s, t):
    h, places = s.e(t), torch.arange(t.shape[1])[:, None] / 10 ** (torch.arange(3) / 3)
    c, n = (torch.cat([f(places)] * 2, -1).to(h) for f in (torch.cos, torch.sin))

    def turn(z):
        return z * c + torch.cat([-z[..., 3:], z[..., :3]], -1) * n

    return s.v(F.scaled_dot_product_attention(turn(s.q(h)), turn(s.k(h)), h))


def differences(s, x):
    h = s.a(x)
    return s.b(h[:, -1] + (h[:, 1:] - h[:, :-1]).abs().sum(1))


def recurrent(s, x):
    return s.head(s.cell(x)[0])


def headed(s, x, task):
    return s.heads[task](torch.relu(s.a(x)))


def masked(s, x, task):
    return s.b(torch.relu(s.a(x)) * s.mask[task])


def experts(s, t):
    h = F.layer_norm(s.e(t).flatten(0, 1), (6,)) * s.g
    chosen = s.router(h).argmax(-1)
    out = h.new_zeros(len(h), 3)
    for k in chosen.unique().tolist():
        out[chosen == k] = s.experts[k](h[chosen == k])
    return out


def stacked(s, t):
    x = s.e(t).flatten(0, 1)
    weight, chosen = s.router(x).softmax(-1).max(-1)
    out = torch.zeros_like(x)
    for k in chosen.unique().tolist():
        at = (chosen == k).nonzero()[:, 0]
        out.index_add_(0, at, torch.relu(x[at] @ s.up[k].T) @ s.down[k].T * weight[at, None])
    return x + out


def linears(*sizes: tuple[int, int], bias: bool = True) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(a, b, bias=bias) for a, b in sizes)


MASKS = torch.tensor([[1.0] * 6, [1.0, 0.0] * 3])
RELU6 = ["(R>0)^6", "S(6)"]
HIDDEN: dict[str, tuple] = {
    "an optional context": (
        lambda: Model(conditional, a=nn.Linear(5, 6), c=nn.Linear(4, 6), o=nn.Linear(6, 3), null=x(6)),
        x(8, 5), lambda m: m(wide(8, 5), wide(8, 4)), [], "not exercised by these inputs: c.weight, c.bias",
    ),
    "an optional gain": (
        lambda: Model(styled, a=nn.Linear(5, 6), gain=nn.Linear(4, 6), o=nn.Linear(6, 3)),
        x(8, 5), lambda m: m(wide(8, 5), wide(8, 4)), [], "not exercised by these inputs: gain.weight",
    ),
    "an optional context, given": (
        lambda: Model(conditional, a=nn.Linear(5, 6), c=nn.Linear(4, 6), o=nn.Linear(6, 3)),
        (x(8, 5), x(8, 4)), lambda m: m(wide(8, 5), wide(8, 4)), [*RELU6, "R^6"], "",
    ),
    "a state that starts at zero": (
        lambda: Model(stateful, w=nn.Linear(3, 5), u=nn.Linear(5, 5, bias=False), head=nn.Linear(5, 2)),
        x(2, 3), lambda m: m(wide(2, 3), wide(2, 5)), [], "not exercised by these inputs: u.weight",
    ),
    "a branch times zero": (
        lambda: Model(gated_off, a=nn.Linear(3, 6), o=nn.Linear(6, 2), up=nn.Linear(3, 2), low=nn.Linear(2, 6)),
        x(4, 3), lambda m: m(wide(4, 3), 1.0), [], "not exercised by these inputs",
    ),
    "a table cut to the length": (
        lambda: Model(placed, a=nn.Linear(3, 6), o=nn.Linear(6, 2), table=x(16, 6)),
        x(2, 3, 3), lambda m: m(wide(2, 16, 3)), [*RELU6, "R^6"], "table: not exercised by these inputs",
    ),
    "a table of distances": (
        lambda: Model(relative, a=nn.Linear(3, 6), o=nn.Linear(6, 2), table=x(17, 6)),
        x(2, 3, 3), lambda m: m(wide(2, 8, 3)), [*RELU6, "R^6"], "table: not exercised by these inputs",
    ),
    "one token under rotary positions": (
    lambda: Model(
            rotary, e=nn.Embedding(9, 6), q=nn.Linear(6, 6, bias=False), k=nn.Linear(6, 6, bias=False),
            v=nn.Linear(6, 2),
        ),
        torch.tensor([[3], [4]]), lambda m: m(torch.tensor([[1, 2, 3, 4, 5]])), None, "",
    ),
    "differences at length 1": (
        lambda: Model(differences, a=nn.Linear(3, 4), b=nn.Linear(4, 2)),
        x(2, 1, 3), lambda m: m(wide(2, 4, 3)), ["(R>0)^4", "S(4)", "R^4"], "",
    ),
    "a ReLU RNN at length 1": (
        lambda: Model(recurrent, cell=nn.RNN(3, 5, nonlinearity="relu", batch_first=True), head=nn.Linear(5, 2)),
        x(2, 1, 3), lambda m: m(wide(2, 4, 3)), ["(R>0)^5", "S(5)", "R^5"], "",
    ),
    "a GRU at length 1": (
        lambda: Model(recurrent, cell=nn.GRU(3, 5, batch_first=True), head=nn.Linear(5, 2)),
        x(2, 1, 3), lambda m: m(wide(2, 4, 3)), None, "",
    ),
    "an LSTM of two layers at length 1": (
        lambda: Model(recurrent, cell=nn.LSTM(3, 5, 2, batch_first=True), head=nn.Linear(5, 2)),
        x(2, 1, 3), lambda m: m(wide(2, 7, 3)), None, "",
    ),
    "a head for each task": (
        lambda: Model(headed, a=nn.Linear(4, 6), heads=linears((6, 2), (6, 2), (6, 2))),
        (x(3, 4), 0), lambda m: [m(wide(3, 4), k) for k in range(3)], RELU6, "",
    ),
    "a head for each task, by tensor": (
        lambda: Model(headed, a=nn.Linear(4, 6), heads=linears((6, 2), (6, 2), (6, 2))),
        (x(3, 4), torch.tensor(0)), lambda m: [m(wide(3, 4), k) for k in range(3)], [],
        "not exercised by these inputs",
    ),
    "a mask for each task": (
        lambda: with_buffers(Model(masked, a=nn.Linear(3, 6), b=nn.Linear(6, 2)), mask=MASKS),
        (x(2, 3), torch.tensor([0, 0])), lambda m: m(wide(2, 3), torch.tensor([0, 1])), None, "",
    ),
    "experts in a list": (
        lambda: Model(
            experts, e=nn.Embedding(10, 6), g=torch.ones(6), router=nn.Linear(6, 4, bias=False),
            experts=linears(*[(6, 3)] * 4, bias=False),
        ),
        torch.tensor([[3, 4]]), lambda m: m(torch.arange(10)[None]), None, "not exercised by these inputs",
    ),
    "experts in one tensor": (
        lambda: Model(
            stacked, e=nn.Embedding(30, 6), router=nn.Linear(6, 8, bias=False), up=x(8, 5, 6), down=x(8, 6, 5)
        ),
        torch.tensor([[1, 2]]), lambda m: m(torch.arange(30)[None]), None, "up, down",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HIDDEN)
def test_what_the_example_does_not_exercise_is_not_free(name):
    make, example, use, groups, reason = HIDDEN[name]
    torch.manual_seed(0)
    model = make()
    symmetry = tl.find_symmetries(model, example)
    assert groups is None or found(symmetry) == groups, symmetry
    assert any(reason in r for r in symmetry.reasons) or not reason, symmetry
    assert worst_change(model, symmetry, use) < 1e-10, symmetry


def test_a_dead_neuron_hides_no_symmetry():
    model = mlp()
    with torch.no_grad():
        model[0].bias[:2] = -1e3
    assert found(tl.find_symmetries(model, x(3, 4))) == ["(R>0)^5", "S(5)"]


# -- outputs: model, groups


@dataclasses.dataclass
class Answer:
    logits: Tensor


class Lazy:
    __slots__ = ("value",)

    def __init__(self, value: Tensor) -> None:
        self.value = value


def least(y: Tensor) -> Tensor:
    return y.masked_fill(torch.tensor([False, True]), torch.finfo(y.dtype).min)


def half(y: Tensor) -> Tensor:
    return torch.cat([y, y.new_full((len(y), 8), -1e30)], 1)


OUTPUTS = {
    "dataclass": lambda y: Answer(y),
    "slots": lambda y: Lazy(y),
    "distribution": lambda y: torch.distributions.Categorical(logits=y),
    "independent": lambda y: torch.distributions.Independent(torch.distributions.Normal(y, y.exp()), 1),
    "nested": lambda y: {"all": [(y, None)], "mean": y.mean()},
    "least": least,
    "most are huge": half,
    "minus infinity": lambda y: y.masked_fill(torch.tensor([False, True]), float("-inf")),
    "bool beside": lambda y: (y, y > 0),
    "integers beside": lambda y: (y, y.argmax(-1)),
    "complex": lambda y: torch.view_as_complex(y.contiguous()),
    "sparse": lambda y: y.to_sparse(),
    "NumPy": lambda y: (y, y.detach().numpy()),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_of_every_kind_are_compared(name):
    torch.manual_seed(0)
    model = Model(lambda s, z: OUTPUTS[name](s.o(torch.tanh(s.a(z)))), a=nn.Linear(4, 6), o=nn.Linear(6, 2))
    symmetry = tl.find_symmetries(model, x(8, 4))
    unseen = ["R^7"] if name == "distribution" else []  # a constant in all logits: 6 columns and the bias
    assert found(symmetry) == ["{1,-1}^6", "S(6)", *unseen], symmetry
    assert not any("not finite" in r or "inf" in r.split() for r in symmetry.reasons)


@pytest.mark.parametrize("output", [None, "words", (None, [])])
def test_a_model_that_returns_no_tensor_is_refused(output):
    with pytest.raises(TeleportError, match="a model that returns tensors"):
        tl.find_symmetries(Model(lambda s, z: (s.a(z), output)[1], a=nn.Linear(4, 2)), x(3, 4))


def test_one_huge_entry_hides_no_other():
    before = [torch.tensor([1.0, 2.0, 3e38])]
    assert distance([torch.tensor([1.0, 2.2, 3e38])], before) == pytest.approx(0.1, rel=1e-5)
    assert distance(before, before) == 0
    many = [torch.tensor([1.0, 2.0, -1e30, -1e30, -1e30])]
    moved = [torch.tensor([1.0, 2.2, -1e30, -1e30, -1e30])]
    assert relative_gaps(moved, many, [many[0] < 0])[0] == pytest.approx(0.1, rel=1e-5)


def test_entries_that_are_not_finite_have_to_stay():
    inf, nan = float("inf"), float("nan")
    assert distance([torch.tensor([inf, nan, 1.0])], [torch.tensor([inf, nan, 1.0])]) == 0
    for other in ([-inf, nan, 1.0], [inf, 0.0, 1.0], [inf, nan, inf]):
        assert distance([torch.tensor(other)], [torch.tensor([inf, nan, 1.0])]) == inf
    assert distance([torch.ones(2)], [torch.ones(3)]) == inf
    assert len(tensors_of(Answer(torch.ones(1)))) == 1


# -- training mode


def auxiliary(s, z):
    h = F.gelu(s.a(z))
    y = s.o(F.gelu(s.b(h)))
    return y + s.x(h) if s.training else y


def returned_in_training(s, z):
    h = torch.relu(s.a(z))
    return (s.o(h), s.x(h)) if s.training else s.o(h)


def with_dropout(s, z):
    h = torch.relu(s.d(s.a(z)))
    return s.o(h) + (s.x(h) if s.training else 0)


def dropped(s, z, draw):
    for layer, norm in zip(s.l, s.n, strict=True):
        if not (s.training and draw() < 0.2):
            z = norm(z + torch.tanh(layer(z)))
    return s.h(z)


def skipped(s, z, draw):
    h = torch.relu(s.a(z))
    return s.o(h if s.training and draw() < 0.1 else s.g * h)


def aux(forward: Callable, **more: Any) -> Callable:
    return lambda: Model(forward, a=nn.Linear(4, 6), o=nn.Linear(6, 3), x=nn.Linear(6, 3), **more)


def layer_drop(draw: Callable) -> Callable:
    return lambda: Model(
        lambda s, z: dropped(s, z, draw),
        n=nn.ModuleList(nn.LayerNorm(4) for _ in range(2)), l=linears((4, 4), (4, 4)), h=nn.Linear(4, 2),
    )  # fmt: skip


TRAINING: dict[str, tuple] = {
    "a head that is added in training": (
        lambda: Model(auxiliary, a=nn.Linear(4, 6), b=nn.Linear(6, 6), o=nn.Linear(6, 3), x=nn.Linear(6, 3)),
        ["S(6)", "S(6)"],
    ),
    "a head that is returned in training": (aux(returned_in_training), RELU6),
    "a head in training behind dropout": (aux(with_dropout, d=nn.Dropout(0.4)), RELU6),
    # the shift of the last norm in the kernel of the head is all that moves
    "layers dropped at random": (layer_drop(lambda: torch.rand([])), ["R^2"]),
    "layers dropped at random, by Python": (layer_drop(random.random), ["R^2"]),
    "layers dropped at random, one draw in place": (layer_drop(lambda: torch.empty(1).uniform_()), ["R^2"]),
    "a gain skipped at random": (
        lambda: Model(lambda s, z: skipped(s, z, lambda: torch.rand(())), a=nn.Linear(4, 6), o=nn.Linear(6, 2), g=x(6)),
        ["S(6)", "(R>0)^6"],
    ),
}


@pytest.mark.parametrize("name", TRAINING)
def test_training_mode_is_verified_too(name):
    make, groups = TRAINING[name]
    torch.manual_seed(0)
    model = make()
    symmetry = tl.find_symmetries(model, x(8, 4))
    assert found(symmetry) == groups, symmetry

    def use(m):
        return [m(wide(8, 4)) for _ in range(20)]

    finite = [f for f in symmetry if not f.dim]  # these move the neurons that a mask drops
    assert worst_change(model, symmetry, use) < 1e-10
    assert worst_change(model, symmetry.continuous, use, training=True) < 1e-10
    if "dropout" not in name:
        assert worst_change(model, tl.Product(finite), use, training=True) < 1e-10


@pytest.mark.parametrize("make", [nn.Dropout, nn.AlphaDropout, nn.RReLU, lambda: nn.Dropout1d(0.3)])
def test_random_masks_hide_no_permutation(make):
    model = nn.Sequential(nn.Linear(4, 6), nn.Sigmoid(), make(), nn.Linear(6, 2))
    assert "S(6)" in found(tl.find_symmetries(model, x(5, 4)))


# -- inputs within the domain of the model


def asserted(s, z, mask):
    assert bool(((mask == 0) | (mask == 1)).all())
    return s.o(torch.relu(s.a(z)) * mask[..., None])


def on_simplex(s, z):
    assert torch.allclose(z.sum(-1), torch.ones(()).to(z))
    return s.net(z)


def in_place(s, z, p):
    z += p
    return s.net(z)


INPUTS: dict[str, tuple] = {
    "positive": (lambda s, z: s.net((z + 1e-6).log()), torch.rand(8, 4)),
    "square roots": (lambda s, z: s.net(z.sqrt()), torch.rand(8, 4)),
    "a column of categories": (
        lambda s, z: s.net(torch.cat([z[:, 1:], s.e(z[:, 0].long())], 1)),
        torch.cat([torch.arange(5.0)[:, None], x(5, 2)], 1),
    ),
    "probabilities": (on_simplex, torch.rand(8, 4).softmax(-1)),
    "written in place": (in_place, (x(8, 4), x(4))),
    "nested": (lambda s, batch: s.net(batch["x"]) + batch["rest"][0][0], ({"x": x(8, 4), "rest": [(x(2),)]},)),
    "lists": (lambda s, z: s.net(torch.stack(z)), ([x(4), x(4, seed=2)],)),
    "a dataclass": (lambda s, z: s.net(z.logits), Answer(x(8, 4))),
    "a mapping": (lambda s, x=None, mask=None: s.net(x), collections.UserDict(x=x(8, 4))),
    "one example that is fixed": (lambda s, z: s.net(z) if z.sum() == 10 else 1 / 0, torch.arange(5.0)[None, 1:]),
    "zeros": (lambda s, z: s.net(z), torch.zeros(1, 4)),
    "a generator": (
        lambda s, z, g: s.net(z) + torch.randn(2, generator=g).to(z), (x(8, 4), torch.Generator().manual_seed(0))
    ),
    "integers in a table": (lambda s, t: s.net(s.e(t)), torch.tensor([[0, 4, 2]])),
}  # fmt: skip


@pytest.mark.parametrize("name", INPUTS)
def test_inputs_of_every_kind_and_domain(name):
    forward, example = INPUTS[name]
    torch.manual_seed(0)
    tables = {"a column of categories": {"e": nn.Embedding(5, 2)}, "integers in a table": {"e": nn.Embedding(5, 4)}}
    model = Model(forward, net=mlp(), **tables.get(name, {}))
    kept = [t.clone() for t in tensors_in(example)]
    symmetry = tl.find_symmetries(model, example)
    assert all(torch.equal(a, b) for a, b in zip(kept, tensors_in(example), strict=True))
    assert "(R>0)^5" in found(symmetry) and "S(5)" in found(symmetry), symmetry


def test_a_mask_that_the_model_asserts():
    model = Model(asserted, a=nn.Linear(4, 5), o=nn.Linear(5, 2))
    symmetry = tl.find_symmetries(model, (x(3, 6, 4), (x(3, 6) > 0).float()))
    assert found(symmetry) == ["(R>0)^5", "S(5)"]


@pytest.mark.parametrize("x", [[1000.0, 1001.0], [3.0, -1.0, 2.0, 5.0], [[1.0, 9.0], [4.0, 2.0], [2.0, 7.0]]], ids=str)
def test_variations_are_of_the_size_of_what_was_given(x, generator):
    """Noise as large as values lie apart, factors that keep signs, mixtures of rows."""
    x = torch.tensor(x, dtype=torch.float64)
    noisy, scaled, mixed = (next(kind).args[0] for kind in variations(Arguments.of(x), {}, generator))
    assert 0 < (noisy - x).abs().max() < 5 * x.std()
    assert torch.equal(scaled.sign(), x.sign())
    assert not torch.equal(mixed, x)
    assert bool(((mixed >= x.amin(0)) & (mixed <= x.amax(0))).all())


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_draws_that_are_set_lie_where_uniform_ones_do(pattern):
    with Draws(pattern=pattern):
        drawn = [float(torch.rand((), dtype=torch.float64)) for _ in range(2 * len(pattern))]
    assert drawn == 2 * [*pattern] and min(drawn) > 0 and max(drawn) < 1


def test_integers_vary_within_the_table_that_they_index():
    seen = []
    model = Model(
        lambda s, t: (seen.append(t.clone()), s.o(torch.tanh(s.e(t))))[1], e=nn.Embedding(7, 4), o=nn.Linear(4, 2)
    )
    tl.find_symmetries(model, torch.tensor([[2, 3, 2]]))
    values = torch.cat([t.flatten() for t in seen])
    assert values.min() >= 0 and values.max() < 7 and len(values.unique()) > 3
    assert {t.shape[1] for t in seen} > {3}


# -- models that are hard to copy or to run


def keeps(s, z):
    s.last, s.all = s.net(z), [*getattr(s, "all", []), s.net(z)]
    return s.last


def old_weight_norm() -> nn.Module:
    model = mlp()
    with pytest.warns(FutureWarning):
        model[0] = nn.utils.weight_norm(model[0])
    return model


def pruned() -> nn.Module:
    import torch.nn.utils.prune as prune

    model = mlp()
    prune.random_unstructured(model[0], "weight", 0.4)
    return model


class Mixing(nn.Module):
    """A spectral layer: its weights are complex."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(1, 6), nn.Linear(6, 5), nn.Linear(5, 1)
        self.w = nn.Parameter(torch.randn(6, 6, 3, dtype=torch.cfloat))

    def forward(self, z):
        h = torch.einsum("bki,iok->bko", torch.fft.rfft(self.a(z), dim=1)[:, :3], self.w)
        return self.c(torch.relu(self.b(torch.fft.irfft(h, n=z.shape[1], dim=1))))


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c, self.p, self.l = nn.Conv2d(3, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Linear(5, 2)

    def forward(self, z):
        return self.l(self.p(torch.relu(self.c(z))).flatten(1))


def autocast(s, z):
    with torch.autocast("cpu", torch.bfloat16):
        return s.net(z)


ONES = torch.ones(2)  # of the coarse type that a function closes over
RUNS: dict[str, tuple] = {
    "a constant of the default type": (
        lambda s, z: torch.max(s.net(z), torch.full((), torch.finfo(z.dtype).min)), x(3, 4)
    ),
    "sines of integers": (
        lambda s, t: s.net(torch.outer(t, 0.5 ** torch.arange(4)).sin()),
        torch.tensor([1, 5, 9]),
    ),
    "a constant from outside": (lambda s, z: s.net(z) @ torch.diag(ONES), x(3, 4)),
    "half inside": (lambda s, z: s.net(z.half().float()).bfloat16(), x(3, 4)),
    "written into what is coarse": (lambda s, z: torch.zeros(len(z), 2, dtype=torch.float32).copy_(s.net(z)), x(3, 4)),
    "autocast": (autocast, x(3, 4)),
    "kept": (keeps, x(3, 4)),
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_models_are_run_in_float64(name):
    forward, example = RUNS[name]
    torch.manual_seed(0)
    model = Model(forward, net=mlp())
    model(example)  # what is kept is there before
    assert found(tl.find_symmetries(model, example)) == ["(R>0)^5", "S(5)"]
    assert torch.get_default_dtype() == torch.float32


def scripted() -> nn.Module:
    return torch.jit.script(mlp())


COPIES: dict[str, tuple] = {
    "scripted": (scripted, x(3, 4), 5),
    "DataParallel": (lambda: nn.DataParallel(mlp()), x(3, 4), 5),
    "pruned": (pruned, x(3, 4), 5),
    "complex": (Mixing, x(2, 8, 1), 5),
    "channels last": (
        lambda: Images().to(memory_format=torch.channels_last), x(2, 3, 6, 6).to(memory_format=torch.channels_last), 5
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", COPIES)
def test_models_that_are_hard_to_copy(name):
    make, example, dim = COPIES[name]
    torch.manual_seed(0)
    model = make()
    symmetry = tl.find_symmetries(model, example)
    assert symmetry.dim == dim
    inner = model.module if name == "DataParallel" else model
    assert {*symmetry.names} <= dict(inner.named_parameters()).keys()


def test_the_old_weight_norm():
    model = old_weight_norm()
    model(x(3, 4))
    symmetry = tl.find_symmetries(model, x(3, 4))
    assert "S(5)" in found(symmetry)


def test_a_plain_tensor_as_an_attribute():
    model = Model(lambda s, z: s.net(z @ s.mix), net=mlp())
    model.mix = torch.eye(4)
    assert tl.find_symmetries(model, x(3, 4)).dim == 5


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="torch has no grouped_mm")
def test_a_kernel_that_there_is_not_in_float64():
    def grouped(s, z):
        return s.c(F.grouped_mm(torch.relu(s.a(z)), s.w, offs=torch.tensor([3, len(z)], dtype=torch.int32)))

    model = Model(grouped, a=nn.Linear(8, 16), w=torch.randn(2, 16, 8), c=nn.Linear(8, 2))
    symmetry = tl.find_symmetries(model, x(8, 8))
    assert symmetry.dim == 16 + 64 + 2 * 16 * 6  # hidden neurons, a mixing of what the experts give, what is not read


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="torch has no grouped_mm")
def test_a_derivative_that_there_is_not_in_float64():
    def weighted(s, z):
        y = F.grouped_mm(z, s.w, offs=torch.tensor([3, len(z)], dtype=torch.int32))
        return y * s.gate(z).softmax(-1)[:, :1]

    symmetry = tl.find_symmetries(Model(weighted, w=torch.randn(2, 8, 8), gate=nn.Linear(8, 2)), x(8, 8))
    assert symmetry.select(kind="translation").dim == 8 + 1  # of both logits alike, which gradients tell


def test_lazy_layers_are_refused():
    with pytest.raises(ParameterError, match="run the model once on an input"):
        tl.find_symmetries(nn.Sequential(nn.LazyLinear(3)), x(2, 4))


@pytest.mark.parametrize(
    ("example", "remedy"),
    [
        ({"z": x(2, 4)}, "pass a tuple of positional arguments"),
        ((x(2, 4), x(2, 1)), "without targets"),
        (DataLoader(TensorDataset(x(2, 4))), r"next\(iter\(loader\)\)\[0\]"),
        (x(2, 4).numpy(), r"torch\.from_numpy"),
        ({"input": x(2, 4).numpy()}, r"torch\.from_numpy"),
    ],
)
def test_a_model_that_fails_says_how(example, remedy):
    with pytest.raises(TeleportError, match=f"got TypeError.*; .*{remedy}"):
        tl.find_symmetries(mlp(), example)


def test_what_differs_from_run_to_run_is_not_verified():
    count = iter(range(1000))
    model = Model(lambda s, z: s.net(z) * next(count), net=mlp())
    symmetry = tl.find_symmetries(model, x(3, 4))
    assert len(symmetry) == 0 and "two runs on the same input differ" in str(symmetry)


def test_state_of_the_model_and_of_all_generators_is_left():
    model = Model(keeps, net=nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2)))
    state, attributes = random.getstate(), dict(vars(model))
    before = {n: b.clone() for n, b in model.state_dict().items()}
    tl.find_symmetries(model, x(3, 4))
    assert random.getstate() == state and vars(model) == attributes
    assert all(torch.equal(before[n], b) for n, b in model.state_dict().items())


def test_a_copy_goes_back_to_where_it_stood():
    """As when the noise of a trial is measured while symmetries are tried: the next trial must not see the start."""
    probe = Probe(nn.Linear(2, 1))
    with probe.at({"bias": torch.ones(1)}):
        with probe.at({"bias": torch.zeros(1)}):
            pass
        assert probe.params["bias"].item() == 1
    assert torch.equal(probe.params["bias"], probe.values["bias"])


def test_signs_that_undo_each_other_are_told_apart():
    model = Model(lambda s, z: s.o(torch.tanh(s.a(z)) + s.p), a=nn.Linear(3, 1), o=nn.Linear(1, 2), p=x(1))
    symmetry = tl.find_symmetries(model, x(5, 3))
    assert worst_change(model, symmetry, lambda m: m(wide(5, 3))) < 1e-10


def test_arguments_keep_their_containers():
    call = Arguments.of(({"a": [torch.ones(1), 3]}, Answer(torch.zeros(2))))
    again = call.with_leaves([10 * v if isinstance(v, Tensor) else v + 1 for v in call.leaves()])
    assert again.args[0]["a"] == [torch.tensor([10.0]), 4] and isinstance(again.args[1], Answer)
    shared = torch.ones(2)
    first, second = Arguments.of((shared, shared)).fresh().args
    assert first is second and first is not shared


def amplified(s, z):
    """Outputs that, for large inputs, hang on the last digits of a sum."""
    y = s.net(z)
    return torch.sin(1e15 * y) if z.abs().max() > 20 else y


@pytest.mark.parametrize("seed", range(5))
def test_trials_whose_outputs_rounding_decides_are_left_out(seed):
    torch.manual_seed(seed)
    model = Model(amplified, net=nn.Sequential(nn.Linear(4, 20), nn.ReLU(), nn.Linear(20, 2)))
    assert found(tl.find_symmetries(model, x(3, 4))) == ["(R>0)^20", "S(20)"]


def test_outputs_that_are_zero_but_for_rounding_hide_no_symmetry():
    model = Model(lambda s, z: (y := s.net(z), (y + 0.1) - y - 0.1), net=mlp())
    assert found(tl.find_symmetries(model, x(3, 4))) == ["(R>0)^5", "S(5)"]


def test_reasons_name_what_was_found():
    assert describe_error(0.25) == "changes the outputs, by 2.5e-01 relative"
    assert describe_error(float("inf")) == "makes outputs not finite, or of another shape"


# --- states that are handed on, heads whose output is dropped ---------------------------------------------------------


class Cache:
    """What a model keeps for its next call; no container."""

    def __init__(self):
        self.keys = []


class Decoder(nn.Module):
    """Attention that returns its cache under the name of its own argument, or under another one."""

    def __init__(self, name="cache"):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(6, 6, bias=False) for _ in range(3))
        self.name = name

    def forward(self, x, cache=None):
        cache = Cache() if cache is None else cache
        cache.keys.append(self.k(x))
        keys = torch.cat(cache.keys, 1)
        weights = (self.q(x) @ keys.mT).softmax(-1)
        return {"y": weights[..., : x.shape[1]] @ self.v(x), self.name: cache}


def test_a_state_that_a_model_hands_on_to_itself_is_no_output():
    x = torch.randn(2, 5, 6)
    own, other = (tl.find_symmetries(Decoder(name), x) for name in ("cache", "keys"))
    assert own.dim == 36 and {*own[0].names} == {"q.weight", "k.weight"}
    assert other.dim == 0  # under another name the keys are what the model returns


class Dropped(nn.Module):
    """A head runs, and nobody reads what it gives."""

    def __init__(self, runs):
        super().__init__()
        self.a, self.b, self.head, self.runs = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 6), runs

    def forward(self, x):
        h = self.a(x).relu()
        if self.runs:
            self.head(h)
        return self.b(h)


def test_a_head_whose_output_is_dropped_shows_where_it_belongs():
    x = torch.randn(8, 4)
    for runs in (True, False):
        model = Dropped(runs)
        symmetry = tl.find_symmetries(model, x)
        assert "head.weight" not in symmetry.names
        assert symmetry.dim == 0 and any("head.weight" in reason for reason in symmetry.reasons)
    deep = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), Dropped(True))
    deep[2].a = nn.Linear(6, 6)
    found = tl.find_symmetries(deep, x)  # the first layer does not meet the head, though it is as wide
    assert found.dim == 6 and {*found[0].names} == {"0.weight", "0.bias", "2.a.weight"}


def test_axes_are_cut_and_what_holds_on_short_ones_alone_is_not_claimed():
    """The model does something else with long sequences, and reads the same parameters."""

    def longer(s, z):
        h = torch.relu(s.a(z))
        return s.c(h.tanh() if z.shape[1] > 30 else h)

    model = Model(longer, a=nn.Linear(4, 5), c=nn.Linear(5, 2))
    assert found(tl.find_symmetries(model, x(2, 20, 4))) == ["(R>0)^5", "S(5)"]
    assert found(tl.find_symmetries(model, x(2, 40, 4))) == ["S(5)"]
    model = Model(lambda s, z: s.a(z) - (z.shape[1] < 31) * s.a(z).mean(-1, keepdim=True), a=nn.Linear(4, 3))
    assert tl.find_symmetries(model, x(2, 20, 4)).continuous
    assert not tl.find_symmetries(model, x(2, 40, 4)).continuous


def test_a_table_of_positions_does_not_keep_axes_from_being_cut():
    lengths = set()

    def learned(s, z):
        lengths.add(z.shape[1])
        h = torch.relu(s.a(z) + s.table[: z.shape[1]])
        return s.c(h.tanh() if z.shape[1] > 30 else h)

    model = Model(learned, a=nn.Linear(4, 5), c=nn.Linear(5, 2), table=x(40, 5))
    symmetry = tl.find_symmetries(model, x(2, 40, 4))
    assert min(lengths) == 10 and "(R>0)^5" not in found(symmetry) and "S(5)" in found(symmetry)


@pytest.mark.parametrize(("gap", "most", "holds"), [(1e-9, 2, True), (1e-9, 0, False), (1e-3, 2, False)])
def test_what_rounding_adds_up_is_confirmed_by_halves_and_nothing_else_is(monkeypatch, gap, most, holds):
    monkeypatch.setattr(Verifier, "_first_failure", lambda self, s, _: (gap, None, 0) if len(s) > most else None)
    assert object.__new__(Verifier)._hold_in_parts(list("abcde"), []) == holds


def test_what_a_loss_forgets_on_short_axes_alone_is_not_claimed():
    model = Model(lambda s, z: s.a(z).relu() if z.shape[1] > 30 else s.a(z), a=nn.Linear(4, 3))
    assert [f.of for f in tl.find_symmetries(model, x(2, 20, 4), of="loss").continuous] == ["loss"]
    assert not tl.find_symmetries(model, x(2, 40, 4), of="loss").continuous


def test_a_long_search_logs_its_steps(monkeypatch, caplog):
    monkeypatch.setattr("teleport_lite.discovery.find.PATIENCE", 0.0)
    with caplog.at_level("INFO", logger="teleport_lite"):
        tl.find_symmetries(mlp(), x(3, 4))
    assert "2 factors hold" in caplog.text


def test_complex_parameters_stay_and_are_no_error():
    assert not tl.find_symmetries(nn.Linear(3, 3, dtype=torch.complex64), torch.randn(1, 3, dtype=torch.complex64))
