"""Teleports are verified on the model: what shares its memory, reads it otherwise, or differentiates it falsely."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import mlp, params_of, relative
from torch import nn
from torch.utils.checkpoint import checkpoint

import teleport_lite as tl
from teleport_lite.errors import LossError, ParameterError, TeleportError
from teleport_lite.exactness import largest_change
from teleport_lite.functional import Evaluation, hvp, trainable, value_and_grad
from teleport_lite.symmetries import scaling

DOUBLE = torch.float64
X = torch.randn(64, 5, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
Y = torch.randint(3, (64,), generator=torch.Generator().manual_seed(1))


def loss_fn(net):
    return F.cross_entropy(net(X), Y)


def net():
    return mlp([5, 6, 3], nn.ReLU())


def bits(model):
    return copy.deepcopy(model.state_dict())


def same(model, before):
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def real_gradient_norm(model, loss):
    grads = torch.autograd.grad(loss(model), [*model.parameters()])
    return float(torch.stack([g.norm() for g in grads]).norm())


# --- parameters that share memory -------------------------------------------------------------------------------------


class Autoencoder(nn.Module):
    """Tied by storage, in two parameters."""

    def __init__(self):
        super().__init__()
        self.enc, self.dec = nn.Linear(5, 4), nn.Linear(4, 5)
        self.double()
        self.dec.weight.data = self.enc.weight.data.t()

    def forward(self, x):
        return self.dec(self.enc(x).relu())


class Halves(nn.Module):
    """A parameter that is a part of another one."""

    def __init__(self):
        super().__init__()
        self.both = nn.Parameter(torch.randn(12, 5, dtype=DOUBLE))
        self.first = nn.Parameter(self.both.data[:6])
        self.out = nn.Linear(12, 3, dtype=DOUBLE)

    def forward(self, x):
        return self.out(F.linear(x, self.both).relu()) + F.linear(x, self.first)[:, :3]


class Interleaved(nn.Module):
    """Two parameters in one storage that have no entry in common."""

    def __init__(self):
        super().__init__()
        memory = torch.randn(6, 5, 2, dtype=DOUBLE)
        self.a, self.b = (nn.Parameter(memory[..., k]) for k in (0, 1))
        self.out = nn.Linear(6, 3, dtype=DOUBLE)

    def forward(self, x):
        return self.out((F.linear(x, self.a) + F.linear(x, self.b)).relu())


@pytest.mark.parametrize("make", [Autoencoder, Halves])
@pytest.mark.parametrize("act", [tl.teleport, tl.level_set_teleport, tl.null_space_teleport])
def test_parameters_that_overlap_in_memory_are_refused(make, act):
    model = make()
    before = bits(model)
    with pytest.raises(ParameterError, match="alone in its memory"):
        act(model, lambda net: net(X).square().mean())
    assert same(model, before)


def test_parameters_side_by_side_in_memory_are_fine():
    model = Interleaved()
    outputs = model(X).detach()
    assert tl.teleport(model, loss_fn).accepted and relative(model(X), outputs) < 1e-12


class Twice(nn.Module):
    """One module under two names."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(5, 8), nn.Linear(8, 3)]).double()
        self.first = self.layers[0]

    def forward(self, x):
        return self.layers[1](self.first(x).relu())


class Borrowed(nn.Module):
    """One parameter in two modules, and in a third place under another name."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(5, 8), nn.Linear(5, 8), nn.Linear(8, 3)
        self.double()
        self.b.weight = self.again = self.a.weight

    def forward(self, x):
        return self.out((self.a(x) + self.b(2 * x) + F.linear(x, self.again)).relu())


@pytest.mark.parametrize("make", [Twice, Borrowed])
@pytest.mark.parametrize("fails", [False, True])
def test_what_is_registered_twice_stays_trainable(make, fails):
    model = make()
    places = [(m, key, p) for m in model.modules() for key, p in m._parameters.items()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    calls = []

    def loss(net):
        calls.append(0)
        if fails and len(calls) == 3:
            raise RuntimeError("injected")
        return loss_fn(net)

    if fails:
        with pytest.raises(RuntimeError, match="injected"):
            tl.teleport(model, loss)
    else:
        assert tl.teleport(model, loss).accepted
    assert all(m._parameters[key] is p and p.requires_grad for m, key, p in places)
    before = bits(model)
    loss_fn(model).backward()
    optimizer.step()
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())


# --- losses that read the model otherwise -----------------------------------------------------------------------------


def penalised(parameters):
    return lambda net: loss_fn(net) + 1e-2 * sum(p.square().sum() for p in parameters())


PENALTIES = {
    "the model": lambda model: penalised(model.parameters),
    "a list made before": lambda model: penalised([*model.parameters()].copy),
    "one layer": lambda model: lambda net: loss_fn(net) + 1e-2 * model[2].weight.abs().sum(),
}


@pytest.mark.parametrize("which", PENALTIES)
def test_a_penalty_on_the_weights_is_seen(which):
    model = net()
    loss, before = PENALTIES[which](model), bits(model)
    value = float(loss(model).detach())
    report = tl.teleport(model, loss, tl.find_symmetries(model, X), radius=2.0)
    assert not report.accepted and "the loss moved" in report.reason
    assert report.loss_before == pytest.approx(value, rel=1e-12) and report.invariance_error > 0.01
    assert same(model, before)


@pytest.mark.parametrize("which", ["the model", "one layer"])
def test_a_penalty_counts_along_a_level_set(which):
    model = net()
    loss = PENALTIES[which](model)
    value = float(loss(model).detach())
    report = tl.level_set_teleport(model, loss, steps=5)
    assert report.accepted and float(loss(model).detach()) == pytest.approx(value, rel=1e-6)
    assert report.objective_after == pytest.approx(real_gradient_norm(model, loss), rel=1e-9)


def test_a_penalty_is_part_of_the_hessian():
    model = nn.Linear(5, 3, bias=False, dtype=DOUBLE)
    plain = tl.hessian_eigenvalues(model, loss_fn, 1)
    more = tl.hessian_eigenvalues(model, lambda net: loss_fn(net) + 0.5 * model.weight.square().sum(), 1)
    assert float(more - plain) == pytest.approx(1.0, rel=1e-6)


class Classifier(nn.Module):
    """A model with methods, options and a state of its own."""

    def __init__(self):
        super().__init__()
        self.a, self.c, self.o = nn.Linear(5, 6), nn.Linear(4, 6), nn.Linear(6, 3)
        self.double()
        self.calls, self.kept = 0, None

    def encode(self, x, c=None):
        return self.a(x) if c is None else self.a(x) + self.c(c)

    def forward(self, x, c=None):
        self.calls, self.kept = self.calls + 1, self.o(self.encode(x, c).relu())
        return {"logits": self.kept}

    def training_step(self, batch):
        return F.cross_entropy(self(**batch)["logits"], Y)


C = torch.randn(64, 4, generator=torch.Generator().manual_seed(2), dtype=DOUBLE)
LOSSES = {
    "a keyword": lambda net: F.cross_entropy(net(X, c=C)["logits"], Y),
    "keywords": lambda net: F.cross_entropy(net(c=C, x=X)["logits"], Y),
    "a step of a framework": lambda net: net.training_step({"x": X, "c": C}),
    "its parameters": lambda net: net.training_step({"x": X, "c": C}) + 0 * sum(p.sum() for p in net.parameters()),
}


@pytest.mark.parametrize("how", LOSSES)
def test_net_answers_as_the_model_does(how):
    model = Classifier()
    outputs = model(X, C)["logits"].detach()
    kept, calls = model.kept, model.calls
    report = tl.teleport(model, LOSSES[how])
    assert report.accepted and report.symmetry.dim == 6 and {"a.weight", "c.weight"} <= {*report.symmetry.names}
    assert model.kept is kept and model.calls == calls  # what a forward pass keeps is as it was
    assert relative(model(X, C)["logits"], outputs) < 1e-12


def test_a_method_can_be_called_with_a_symmetry_at_hand():
    model = Classifier()

    def loss(net):
        return F.cross_entropy(net.o(net.encode(X, C).relu()), Y)

    assert tl.teleport(model, loss, tl.find_symmetries(model, (X, C))).accepted
    with pytest.raises(LossError, match="symmetry=find_symmetries"):
        tl.teleport(model, loss)


def test_a_copy_moves_along_with_what_the_report_says():
    model = net()
    average = copy.deepcopy(model)
    report = tl.teleport(model, loss_fn)
    average.load_state_dict(report.symmetry.act(dict(average.state_dict()), report.xi))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), average.parameters(), strict=True))


# --- small losses, hidden outputs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1e-6, 1e-14, 1e-30])
def test_a_false_symmetry_is_seen_under_a_small_loss(size):
    model = mlp([5, 6, 3], nn.Tanh())
    before = bits(model)
    report = tl.teleport(model, lambda net: size * loss_fn(net), scaling(6, "0.weight", "2.weight", "0.bias"))
    assert not report.accepted and report.invariance_error > 1e-4 and same(model, before)


@pytest.mark.parametrize("size", [1e-6, 1e-14, 1e-30])
def test_a_true_one_holds_under_a_small_loss(size):
    model = net()
    assert tl.teleport(model, lambda net: size * loss_fn(net)).accepted


def test_a_perfect_fit_may_round():
    model = net()
    target = model(X).detach() + 1e-13
    report = tl.teleport(model, lambda net: F.mse_loss(net(X), target))
    assert report.accepted and report.loss_before < 1e-25


def test_outputs_are_compared_where_the_loss_does_not_tell():
    model = mlp([5, 6, 3], nn.Tanh())
    before = bits(model)
    false = scaling(6, "0.weight", "2.weight", "0.bias")
    report = tl.teleport(model, lambda net: net(X).mul(0).sum() + net[2].bias.square().sum(), false)
    assert not report.accepted and same(model, before)
    report = tl.teleport(
        model,
        lambda net: net(X).mul(0).sum() + 1,
        false,
        search="random",
        generator=torch.Generator().manual_seed(0),
        objective=lambda params: params["0.weight"].norm(),
    )
    assert not report.accepted and "the outputs moved" in report.reason and same(model, before)


def test_the_largest_change_is_not_hidden_by_what_does_not_change():
    old = torch.tensor([1.0, -2.0, -3.4e38, float("-inf"), float("nan")])
    new = old.clone()
    assert largest_change([old], [new]) == 0
    new[0] += 0.5
    assert largest_change([old], [new]) == pytest.approx(0.25)
    new[3] = 0.0
    assert largest_change([old], [new]) == torch.inf
    assert largest_change([old], []) == torch.inf and largest_change([old], [old[:2]]) == torch.inf
    assert largest_change([torch.tensor([1])], [torch.tensor([2])]) == 0  # numbers of classes, say
    z = torch.tensor([3 + 4j])
    assert largest_change([z], [z + 1]) == pytest.approx(0.25)


# --- gradients that are not what they seem ----------------------------------------------------------------------------


class Checkpointed(nn.Module):
    def __init__(self, on=None):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.o, self.on = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3), on
        self.double()

    def forward(self, x):
        def middle(h):
            return self.b(h.relu()).tanh()

        h = self.a(x)
        return self.o(middle(h) if self.on is None else checkpoint(middle, h, use_reentrant=self.on))


def test_checkpoints_are_differentiated_at_the_right_parameters():
    plain, saved = Checkpointed(), Checkpointed(on=False)
    params = {n: p + 0.3 for n, p in trainable(plain).items()}
    results = []
    for model in (plain, saved):
        loss = Evaluation(model, loss_fn)
        results.append((value_and_grad(loss, params)[1], hvp(loss, params, params)))
    for a, b in zip(*results, strict=True):
        assert all(torch.allclose(a[n], b[n], rtol=1e-12, atol=1e-14) for n in a)


@pytest.mark.parametrize(
    ("objective", "maximize"), [("one_step_loss", False), ("gradient_norm", True), ("hessian_trace", False)]
)
def test_teleports_of_checkpointed_models(objective, maximize):
    reports = [tl.teleport(Checkpointed(on), loss_fn, objective=objective, maximize=maximize) for on in (None, False)]
    assert reports[0].accepted and reports[1].accepted
    assert reports[0].objective_after == pytest.approx(reports[1].objective_after, rel=1e-10)


def test_level_sets_of_checkpointed_models():
    reports = [tl.level_set_teleport(Checkpointed(on), loss_fn, steps=10) for on in (None, False)]
    assert reports[0].accepted and reports[0].objective_after == pytest.approx(reports[1].objective_after, rel=1e-9)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("act", [tl.teleport, tl.level_set_teleport])
def test_reentrant_checkpoints_are_refused_with_a_remedy_that_works(act):
    model = Checkpointed(on=True)
    before = bits(model)
    with pytest.raises(LossError, match="use_reentrant=False"):
        act(model, loss_fn)
    assert same(model, before)
    model.on = False
    assert act(model, loss_fn).accepted


class Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w):
        return w.sign()

    @staticmethod
    def backward(ctx, g):
        return g


class Straight(nn.Linear):
    """Binary weights by a straight-through estimator."""

    def forward(self, x):
        return F.linear(x, Sign.apply(self.weight), self.bias)


class Scaled(nn.Module):
    """A rectifier whose backward pass is that of a softplus: a surrogate gradient."""

    class Surrogate(torch.autograd.Function):
        @staticmethod
        def forward(ctx, h):
            ctx.save_for_backward(h)
            return h.relu()

        @staticmethod
        def backward(ctx, g):
            return g * ctx.saved_tensors[0].sigmoid()

    def forward(self, h):
        return self.Surrogate.apply(h)


FALSE = {
    "straight-through": lambda: nn.Sequential(Straight(5, 8), nn.ReLU(), nn.Linear(8, 3)).double(),
    "surrogate": lambda: nn.Sequential(nn.Linear(5, 8), Scaled(), nn.Linear(8, 3)).double(),
}


@pytest.mark.parametrize("kind", FALSE)
def test_gradients_that_are_no_derivatives_are_found_out(kind):
    model = FALSE[kind]()
    symmetry = scaling(8, "0.weight", "2.weight", "0.bias") if kind == "surrogate" else tl.find_symmetries(model, X)
    before = bits(model)
    report = tl.teleport(model, loss_fn, symmetry)
    assert not report.accepted and "not the derivative of the forward pass" in report.reason
    if kind == "straight-through":  # what is reported is measured, not foretold
        assert report.objective_after == pytest.approx(real_gradient_norm(model, loss_fn), rel=1e-6)
    assert not tl.teleport(model, loss_fn, symmetry, objective="one_step_loss").accepted
    assert same(model, before)


def test_states_that_are_made_of_false_gradients_are_not_carried():
    model = FALSE["surrogate"]()
    symmetry = scaling(8, "0.weight", "2.weight", "0.bias")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loss_fn(model).backward()
    optimizer.step()
    before = bits(model)
    options = {"objective": "weight_norm", "every": {0}}
    assert not tl.Teleporter(model, optimizer, symmetry, **options).step(loss_fn).accepted and same(model, before)
    assert tl.Teleporter(model, optimizer, symmetry, state="reset", **options).step(loss_fn).accepted


def test_the_objective_of_a_report_is_that_of_the_real_model():
    for model in (net(), mlp([5, 8, 8, 3], nn.LeakyReLU(0.1)), Twice()):
        report = tl.teleport(model, loss_fn)
        assert report.objective_after == pytest.approx(real_gradient_norm(model, loss_fn), rel=1e-12)


# --- what a teleport leaves alone -------------------------------------------------------------------------------------


def test_all_global_random_states_are_kept():
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Dropout(), nn.Linear(6, 3)).double()

    def loss(net):
        return loss_fn(net) * (1 + random.random() + np.random.rand())  # noqa: NPY002

    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    assert tl.teleport(model, loss).accepted
    assert torch.equal(states[0], torch.get_rng_state()) and states[1] == random.getstate()
    assert np.array_equal(states[2], np.random.get_state()[1])  # noqa: NPY002


def test_natural_directions():
    model = net()
    small = tl.teleport(copy.deepcopy(model), loss_fn, objective="weight_norm")
    next_loss = tl.teleport(copy.deepcopy(model), loss_fn, objective="one_step_loss")
    steep = tl.teleport(copy.deepcopy(model), loss_fn)
    assert small.objective_after < small.objective_before and steep.objective_after > steep.objective_before
    assert next_loss.objective_after < next_loss.objective_before


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (lambda: torch.jit.script(net()), "a module of Python, got a ScriptModule"),
        (lambda: nn.Sequential(nn.LazyLinear(6), nn.ReLU(), nn.Linear(6, 3)).double(), "initialised, got a lazy one"),
        (lambda: net().to("meta"), "a tensor with data, got one on the meta device"),
    ],
)
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_modules_that_cannot_be_moved_are_refused(wrap, message):
    with pytest.raises(TeleportError, match=message):
        tl.teleport(wrap(), loss_fn)


def test_data_parallel_and_sparse_gradients():
    model = nn.DataParallel(net())
    assert tl.teleport(model, loss_fn).accepted
    table = nn.Sequential(nn.Embedding(9, 6, sparse=True), nn.ReLU(), nn.Linear(6, 3)).double()
    tokens = torch.randint(9, (64,), generator=torch.Generator().manual_seed(3))
    outputs = table(tokens).detach()
    report = tl.teleport(table, lambda net: F.cross_entropy(net(tokens), Y))
    assert report.accepted and relative(table(tokens), outputs) < 1e-12
    assert params_of(table)["0.weight"].layout == torch.strided


def test_float32_is_computed_in_full_and_the_setting_restored():
    model, seen = net(), []

    def loss(net):
        seen.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
        return loss_fn(net)

    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("medium")
    try:
        assert tl.teleport(model, loss).accepted
        assert set(seen) == {("highest", False)}
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("medium", before[1])
    finally:
        torch.set_float32_matmul_precision(before[0])
