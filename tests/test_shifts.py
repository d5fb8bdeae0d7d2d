"""Translations: shifts of parameters that others undo, or that nothing sees."""

from __future__ import annotations

import copy
import json
from functools import partial

import pytest
import torch
from completeness import Flow
from conftest import params_of, relative
from torch import nn
from torch.func import functional_call, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel

import teleport_lite as tl
from teleport_lite.errors import ShapeError, TeleportError, UnknownNameError
from teleport_lite.functional import loss_of, value_and_grad
from teleport_lite.groups import Translation
from teleport_lite.symmetries import Move, Shift, Step, Symmetry

D, H, FF, IN, OUT = 4, 2, 5, 6, 3


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(D, H, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


class Tables(nn.Module):
    def __init__(self):
        super().__init__()
        self.token, self.place, self.head = nn.Embedding(7, D), nn.Embedding(5, D), nn.Linear(D, 5)

    def forward(self, i):
        return torch.tanh(self.head(self.token(i) + self.place(torch.arange(i.shape[1]))))


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.cell, self.head = kind(IN, D, batch_first=True), nn.Linear(D, OUT)

    def forward(self, x):
        return self.head(self.cell(x)[0])


class Routed(nn.Module):
    """Attention pooling, and a softmax over experts."""

    def __init__(self):
        super().__init__()
        self.score, self.router, self.values = nn.Linear(D, 1), nn.Linear(D, OUT), nn.Linear(D, OUT)

    def forward(self, x):
        pooled = (self.score(x).softmax(1) * x).sum(1)
        return self.router(pooled).softmax(-1) * torch.tanh(self.values(pooled))


class Pooled(nn.Module):
    """A mean of values, with weights from a softmax."""

    def __init__(self):
        super().__init__()
        self.value, self.score, self.head = nn.Linear(D, 5), nn.Linear(D, 1), nn.Linear(5, OUT)

    def forward(self, x):
        return self.head((self.score(x).softmax(1) * self.value(x)).sum(1))


class Vision(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches, self.head = nn.Conv2d(1, D, 2, 2), nn.Linear(D, OUT)
        self.cls, self.places = nn.Parameter(torch.randn(1, 1, D)), nn.Parameter(torch.randn(1, 5, D))

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.places
        return self.head(torch.tanh(x * x[:, 1:2]).mean(1))


class LowRank(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.a, self.b = nn.Linear(IN, OUT), nn.Linear(IN, 2, bias=False), nn.Linear(2, OUT, bias=False)

    def forward(self, x):
        return torch.tanh(self.w(x) + 0.5 * self.b(self.a(x)))


class ByHand(nn.Module):
    """A LayerNorm of plain operations, whose output changes its place in memory."""

    def __init__(self):
        super().__init__()
        self.gain, self.shift = nn.Parameter(torch.randn(D)), nn.Parameter(torch.randn(D))
        self.reader = nn.Linear(D, OUT)

    def forward(self, x):
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * self.gain + self.shift
        return torch.tanh(self.reader(x.transpose(0, 1).contiguous()))


class WideStream(nn.Module):
    """A residual layer on a stream that is wider than what comes in and than what is read in the end."""

    def __init__(self, end=lambda net, x: net.head(x), readers=1):
        super().__init__()
        self.first, self.up, self.down = nn.Linear(2, IN), nn.Linear(IN, FF), nn.Linear(FF, IN)
        self.head, self.end = nn.Linear(IN, OUT), end
        self.other = nn.Linear(IN, 1) if readers > 1 else None

    def forward(self, x):
        x = self.first(x)
        return self.end(self, x + self.down(torch.tanh(self.up(x))))


class SideBySide(nn.Module):
    """What a stream was, and what became of it, side by side in front of a norm."""

    def __init__(self):
        super().__init__()
        self.first, self.up, self.down = nn.Linear(IN, D), nn.Linear(D, FF), nn.Linear(FF, D)
        self.skip, self.norm, self.head = nn.Linear(2 * D, D), nn.LayerNorm(D), nn.Linear(D, OUT)

    def forward(self, x):
        x = self.first(x)
        y = x + self.down(torch.tanh(self.up(x)))
        return self.head(self.norm(self.skip(torch.cat([y, x], -1))))


class Pieces(nn.Module):
    """Units that each pick one of several linear functions, or blend them; in one layer or in layers beside each other.

    What all functions of a unit are shifted by, its readers take back; and weights of a later layer shift alike, too,
    by what its readers send to zero.
    """

    def __init__(self, pick, beside=0, bias=True, between=nn.Identity, out=2):
        super().__init__()
        size, self.pick, self.between = (1, beside) if beside else (2, 1), pick, between()
        self.a, self.b = (
            nn.ModuleList(nn.Linear(n, D * size[0], bias or k == 0) for k in range(size[1])) for n in (IN, D)
        )
        self.c = nn.Linear(D, out)

    def forward(self, x):
        for layer in (self.a, self.b):
            x = self.between(self.pick(*(part(x) for part in layer)))
        return self.c(x)


class Factors(nn.Module):
    """Products of the factors of any two fields, a bias for each entry, and perhaps a network beside."""

    def __init__(self, fields=2, deep=False, end=nn.Identity):
        super().__init__()
        self.factors, self.biases = (nn.ModuleList(nn.Embedding(7, k) for _ in range(fields)) for k in (3, 1))
        self.deep = nn.Sequential(nn.Linear(3 * fields, 5), nn.Tanh(), nn.Linear(5, 1)) if deep else None
        self.end = end()

    def forward(self, i):
        v = torch.stack([table(k) for table, k in zip(self.factors, i.unbind(1), strict=True)], 1)
        score = self.end((v.sum(1).square() - v.square().sum(1)).sum(-1, keepdim=True) / 2)
        for table, k in zip(self.biases, i.unbind(1), strict=True):
            score = score + table(k)
        return score if self.deep is None else score + self.deep(v.flatten(1))


def transformer():
    block = nn.TransformerEncoderLayer(D, H, FF, 0.0, "gelu", batch_first=True, norm_first=True)
    return nn.Sequential(nn.Linear(IN, D), block, nn.LayerNorm(D), nn.Linear(D, OUT))


def normed(norm):
    return nn.Sequential(nn.Conv2d(2, D, 2), norm, nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(D, OUT))


def real(*shape):
    return lambda n, seed: torch.randn(n, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def whole(high, length):
    return lambda n, seed: torch.randint(high, (n, length), generator=torch.Generator().manual_seed(seed))


READERS, WRITERS = 3 * D + FF + OUT, IN + D + FF  # rows behind norms, columns into the stream
CASES = {  # model, inputs, dimension of the translations, and of all symmetries when these are complete
    "linear layers": (
        lambda: nn.Sequential(nn.Linear(IN, D), nn.Linear(D, D), nn.Linear(D, OUT)),
        real(IN),
        D + D,
        None,  # that of overcomplete factorisations comes on top
    ),
    "a bottleneck": (
        lambda: nn.Sequential(nn.Linear(IN, 3), nn.Linear(3, 4)), real(IN), 3, 3 * 3 + 3,
    ),
    "keys and values": (Attention, real(5, D), D + D, H * 2 * (D // H) ** 2 + D + D),
    "a transformer": (transformer, real(5, IN), 2 * D + 3 * D + READERS + WRITERS + 3, None),  # rotations come on top
    "two tables": (Tables, whole(7, 5), D + D, D * D + D + D),
    "a LayerNorm by hand": (ByHand, real(5, D), D + OUT, D + D + OUT),
    "an LSTM": (lambda: Recurrent(nn.LSTM), real(5, IN), 4 * D, 4 * D),
    "a GRU": (lambda: Recurrent(nn.GRU), real(5, IN), 2 * D, 2 * D),
    "scores and routers": (Routed, real(5, D), 1 + D + 1, 1 + D + 1),
    "a weighted mean": (Pooled, real(5, D), 5 + 1, None),  # mixings of its two linear maps come on top
    "convolutions": (
        lambda: nn.Sequential(nn.Conv2d(2, 2, 2), nn.Conv2d(2, 4, 1), nn.Tanh(), nn.AdaptiveAvgPool2d(1)),
        real(2, 5, 5), 2, 2 * 2 + 2,
    ),
    "a GroupNorm": (lambda: normed(nn.GroupNorm(2, D)), real(2, 6, 6), 2, None),  # and a scale, up to eps
    "an InstanceNorm": (lambda: normed(nn.InstanceNorm2d(D, affine=True)), real(2, 6, 6), D, None),
    "patches, class and places": (Vision, real(1, 4, 4), D + D, D + D),
    "a wide stream": (
        WideStream, real(2),
        2 * IN + (IN - 2) * FF + (IN - OUT) * (FF + 1),  # biases; what reads first; what writes last
        3 * IN + (IN + 1) * (FF + OUT) + (FF + 1) * IN - FF * (3 + OUT) - 3 * OUT,  # all weights, but for those of f
    ),
    "a loop": (Flow, real(5), 3, 3 * 3 + 3),  # the stream, for each step takes back at its beginning what comes in
    "two streams in front of a norm": (  # biases; head; norm; skip; what writes last
        SideBySide, real(IN), 2 * D + D + OUT + (2 * D + 1) + (FF + 1), None,
    ),
    "a low-rank term": (LowRank, real(IN), OUT * 2 + 2 * IN, OUT * 2 + 2 * IN),
    "products of factors": (Factors, whole(7, 2), 3 + 3 + 1, None),  # few inputs there are, and all factors mix
    "products of factors, a network beside": (partial(Factors, 3, True), whole(7, 3), 3 * 3 + 3, None),
    **{
        f"pieces, {name}": (partial(Pieces, pick, beside), real(IN), 2 * D + (D - 2) * D, None)  # biases, weights
        for name, pick, beside in (
            ("amax", lambda h: h.unflatten(-1, (D, 2)).amax(-1), 0),
            ("min and indices", lambda h: h.view(len(h), 2, D).min(1).values, 0),
            ("max_pool", lambda h: nn.functional.max_pool1d(h[:, None], 2)[:, 0], 0),
            ("logsumexp", lambda h: h.view(len(h), D, 2).logsumexp(-1), 0),
            ("sort", lambda h: h.view(len(h), D, 2).sort(-1).values[..., 0], 0),
            ("chunks", lambda h: torch.minimum(*h.chunk(2, -1)), 0),
            ("maximum", torch.maximum, 2),
            ("a comparison", lambda a, b: torch.where(a > b, a, b), 2),
            ("stack", lambda *h: torch.stack(h).median(0).values, 3),
            ("one after another", lambda a, b, c: torch.maximum(torch.minimum(a, b), c), 3),
        )
    },
}  # fmt: skip
LENGTHS = {"two tables": None, "patches, class and places": None, "convolutions": None, "a GroupNorm": None}
FALSE = {
    "padding": lambda: nn.Sequential(nn.Conv2d(2, 2, 2, padding=1), nn.Conv2d(2, 2, 2, padding=1), nn.Tanh()),
    "a ReLU between": lambda: nn.Sequential(nn.Conv2d(2, 3, 1), nn.ReLU(), nn.Conv2d(3, 2, 1)),
    "dropout behind what writes": lambda: nn.Sequential(
        nn.Conv2d(2, 3, 1), nn.Dropout(0.5), nn.GroupNorm(1, 3, affine=False), nn.Tanh()
    ),
}


ONE_SIDED = {
    "a ReLU behind": {"between": nn.ReLU},
    "no bias on one side": {"bias": False, "out": D},
    "a square behind": {"between": lambda: Squared()},
}


class Squared(nn.Module):
    def forward(self, x):
        return x * x


class Elsewhere(nn.Module):
    """A bias, or a table, that is also used elsewhere."""

    def __init__(self, tied):
        super().__init__()
        self.tied, self.a, self.b = tied, nn.Embedding(7, D), nn.Embedding(7, D)
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, i):
        if self.tied:
            return torch.tanh((self.a(i) + self.b(i.flip(1))) @ self.a.weight.T)
        return torch.tanh(self.a(i) + self.scale * self.b(i.flip(1))) * self.a.weight.sum()


def build(name):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        make, inputs, *_ = CASES[name]
        model = make().double()
        for p in model.parameters():  # biases begin at zero
            p.data += 0.3 * torch.randn_like(p)
    return model, inputs


def shifts_of(model, x):
    return tl.find_symmetries(model, x).select(kind="translation")


def kernel(model, inputs):
    """The dimension of the kernel of the Jacobian of the outputs by the parameters."""
    params = params_of(model.eval())
    with sdpa_kernel(SDPBackend.MATH):
        jacobian = jacrev(lambda p: functional_call(model, p, inputs(60, 5)).flatten())(params)
    values = torch.linalg.svdvals(torch.cat([j.flatten(1) for j in jacobian.values()], 1))
    return sum(p.numel() for p in params.values()) - int((values > 1e-9 * values[0]).sum())


@pytest.mark.parametrize("name", CASES)
def test_dimensions_are_those_of_the_fibre(name):
    model, inputs = build(name)
    *_, translations, fibre = CASES[name]
    symmetry = tl.find_symmetries(model, inputs(4, 0))
    assert symmetry.select(kind="translation").dim == translations
    rank = symmetry.rank(params_of(model))
    assert rank <= kernel(model, inputs)
    if fibre is not None:
        assert rank == fibre == kernel(model, inputs)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_a_hundred_elements_keep_the_outputs(name, training):
    model, inputs = build(name)
    symmetry, params, generator = shifts_of(model, inputs(4, 0)), params_of(model), torch.Generator().manual_seed(0)
    model.train(training)
    for k, n in enumerate([1, 2, 9, 30] * 25):
        x = inputs(n, k + 10)
        x = x.repeat(1, 2, *[1] * (x.ndim - 2)) if x.ndim == 3 and k % 2 else x  # of another length
        xi = symmetry.sample(params, radius=0.5, generator=generator)
        moved = symmetry.act(params, xi)
        assert relative(functional_call(model, moved, x), model(x)) < 1e-11
        back = symmetry.act(moved, symmetry.inverse(xi))
        assert all(relative(back[n], params[n]) < 1e-13 for n in params)


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_carried_along(name):
    model, inputs = build(name)
    symmetry, params = shifts_of(model, inputs(4, 0)), params_of(model)
    x = inputs(9, 3)
    loss = loss_of(model, lambda net: net(x).square().sum())
    xi = symmetry.sample(params, generator=torch.Generator().manual_seed(1))
    carried = symmetry.transport(value_and_grad(loss, params)[1], xi, params)
    found = value_and_grad(loss, symmetry.act(params, xi))[1]
    size = max(float(g.abs().max()) for g in found.values())
    assert max(float((carried[n] - found[n]).abs().max()) for n in found) < 1e-10 * size


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("entry", [torch.square, torch.abs, torch.clone], ids=["square", "abs", "clone"])
@pytest.mark.parametrize("dual", [True, False])
def test_entrywise_transport_is_that_of_the_dense_matrix(name, entry, dual):
    model, inputs = build(name)
    params = params_of(model)
    tensors = {n: p.abs() for n, p in params.items()}
    for shift in shifts_of(model, inputs(4, 0)):
        xi = shift.sample(params, generator=torch.Generator().manual_seed(1))
        found = shift.spread(tensors, xi, entry, dual=dual, params=params)
        dense = Symmetry.spread(shift, tensors, xi, entry, dual=dual, params=params)
        if entry is torch.square and shift.in_kernel:  # of sums of products, each taken as if they were uncorrelated
            terms = 2 * max(n for p in params.values() for n in p.shape)
            assert all(bool((dense[n] <= terms * found[n] + 1e-9).all()) for n in params)
        elif entry is torch.abs:  # a bound
            assert all(bool((found[n] >= dense[n] - 1e-9).all()) for n in params)
        else:
            assert all(torch.allclose(found[n], dense[n], 1e-9, 1e-9) for n in params)


@pytest.mark.parametrize("name", FALSE)
def test_what_breaks_a_shift_is_noticed(name):
    torch.manual_seed(0)
    model = FALSE[name]()
    assert not shifts_of(model, torch.randn(3, 2, 5, 5)).dim


def test_what_breaks_a_shift_of_factors_is_noticed():
    torch.manual_seed(0)
    found = shifts_of(Factors(end=nn.Tanh), whole(7, 2)(9, 0))
    assert found.dim == 1 and not any("factors" in name for name in found.names)


@pytest.mark.parametrize("far", [50.0, 1e4])
def test_a_bound_behind_the_largest_piece_stops_shifts(far):
    """Few inputs reach it: the largest of two pieces is seldom as small as that."""
    between = partial(Bounded, lambda z: torch.relu(z + far) - far, **{k: nn.Identity() for k in "ehuv"})
    for seed in range(6):
        torch.manual_seed(seed)
        model = Pieces(lambda h: h.unflatten(-1, (D, 2)).amax(-1), between=between).double()
        assert not shifts_of(model, torch.randn(7, IN).double()).dim, seed


@pytest.mark.parametrize("how", ONE_SIDED)
def test_what_breaks_a_shift_of_all_pieces_is_noticed(how):
    torch.manual_seed(0)
    model = Pieces(torch.maximum, 2, **ONE_SIDED[how])
    assert not shifts_of(model, torch.randn(9, IN)).dim


@pytest.mark.parametrize(
    ("end", "readers", "free"),
    {
        "two readers": (lambda net, x: torch.cat([net.head(x), net.other(x)], -1), 2, IN - OUT - 1),
        "a second reader in training": (lambda net, x: net.head(x) + (net.other(x) if net.training else 0), 2, 0),
        "a function between": (lambda net, x: net.head(torch.tanh(x)), 1, 0),
        "all is read": (lambda net, x: net.head(x) + x.square().sum(-1, keepdim=True), 1, 0),
    }.values(),
    ids=["two readers", "a second reader in training", "a function between", "all is read"],
)
def test_what_writes_last_is_free_in_the_kernel_of_all_that_reads_it(end, readers, free):
    torch.manual_seed(0)
    model = WideStream(end, readers).double()
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p)
    params, x, generator = params_of(model), torch.randn(9, 2).double(), torch.Generator().manual_seed(1)
    found = [s for s in shifts_of(model, x) if s.in_kernel and "down.weight" in s.moved]
    assert sum(m.count for s in found for m in s.moves if m.name == "down.weight") == free * FF
    for s in found:
        moved = s.act(params, s.sample(params, generator=generator))
        for mode in (model.eval(), model.train()):
            assert relative(functional_call(mode, moved, 3 * x), mode(3 * x)) < 1e-11
        saved = tl.Product.from_dict(json.loads(json.dumps(tl.Product([s]).to_dict())))
        assert saved[0] == s


def test_a_reader_of_zeros_gives_finite_gradients():
    torch.manual_seed(0)
    model, x = WideStream().double(), torch.randn(9, 2).double()
    symmetry = shifts_of(model, x)
    nn.init.zeros_(model.head.weight)
    params = params_of(model)
    grads = value_and_grad(loss_of(model, lambda net: net(x).square().sum()), params)[1]
    carried = symmetry.transport(grads, symmetry.zeros(params), params)
    assert all(torch.equal(carried[n], grads[n]) for n in grads)


@pytest.mark.parametrize("tied", [False, True])
def test_tables_that_are_used_elsewhere_stay(tied):
    assert not shifts_of(Elsewhere(tied), whole(7, 5)(4, 0)).dim


def test_a_learned_factor_is_no_number():
    """It is one while the symmetries are looked for, but another one later."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(IN, D), nn.Linear(D, OUT), nn.Parameter(torch.tensor([2.0]))

        def forward(self, x):
            return torch.tanh(self.b(self.c * self.a(x)))

    torch.manual_seed(0)
    model, x = Scaled().double(), torch.randn(9, IN).double()
    symmetry = shifts_of(model, x)
    params = {**params_of(model), "c": torch.tensor([-3.0]).double()}
    moved = symmetry.act(params, symmetry.sample(params, generator=torch.Generator().manual_seed(0)))
    assert relative(functional_call(model, moved, x), functional_call(model, params, x)) < 1e-12


def test_rows_that_no_input_picks_are_not_shifted_apart():
    """All rows of the first table may move alike; its first row, the only one read here, not by itself."""

    class Typed(nn.Module):
        def __init__(self):
            super().__init__()
            self.word, self.kind, self.place = nn.Embedding(7, D, padding_idx=0), nn.Embedding(2, D), nn.Embedding(5, D)

        def forward(self, i, kinds=None):
            kinds = torch.zeros_like(i) if kinds is None else kinds
            return torch.tanh(self.word(i) + self.kind(kinds) + self.place(torch.arange(i.shape[1])))

    torch.manual_seed(0)
    model, i = Typed().double(), whole(7, 5)(4, 0)
    symmetry, params = shifts_of(model, i), params_of(model)
    assert symmetry.dim == D + D
    moved = symmetry.act(params, symmetry.sample(params, generator=torch.Generator().manual_seed(0)))
    kinds = whole(2, 5)(4, 1)
    assert relative(functional_call(model, moved, (i, kinds)), model(i, kinds)) < 1e-12


def test_a_frozen_weight_stays_out():
    model, inputs = build("linear layers")
    model[1].weight.requires_grad_(False)
    symmetry = shifts_of(model, inputs(4, 0))
    assert symmetry.dim == D and "1.weight" not in symmetry.names


def test_what_a_cross_entropy_does_not_see():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(IN, D), nn.Tanh(), nn.Linear(D, OUT)).double()
    x, y = torch.randn(20, IN).double(), torch.randint(OUT, (20,))
    assert not shifts_of(model, x).dim
    symmetry = tl.find_symmetries(model, x, of="loss").select(kind="translation")
    assert symmetry.dim == D + 1 and symmetry.of == "loss"
    assert tl.Product.from_dict(json.loads(json.dumps(symmetry.to_dict()))).of == "loss"
    before, reference = model(x), copy.deepcopy(model)
    report = tl.teleport(
        model, lambda net: nn.functional.cross_entropy(net(x), y), symmetry, search="random",
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert report.accepted and report.invariance_error < 1e-12
    assert relative(model(x), before) > 1e-2
    report = tl.teleport(
        reference, lambda net: net(x).square().sum(), symmetry, search="random",
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert not report.accepted and torch.equal(reference(x), before)
    with pytest.raises(UnknownNameError):
        tl.find_symmetries(model, x, of="losses")


OPTIMIZERS = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.01),
    "momentum": lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9),
    "Adam": lambda params: torch.optim.Adam(params, lr=0.01),
}


CARRIED = ["linear layers", "a transformer", "a low-rank term", "a loop", "two streams in front of a norm"]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", [*CARRIED, "pieces, amax", "products of factors"])
def test_state_of_optimizers_is_carried_along(name, optimizer):
    model, inputs = build(name)
    x = inputs(9, 3)
    symmetry = shifts_of(model, x)
    opt = OPTIMIZERS[optimizer](model.parameters())
    for _ in range(3):
        opt.zero_grad()
        model(x).square().sum().backward()
        opt.step()
    params, state = (
        {n: p.detach().clone() for n, p in model.named_parameters()},
        copy.deepcopy(opt.state_dict())["state"],
    )
    teleporter = tl.Teleporter(
        model, opt, symmetry, search="random", generator=torch.Generator().manual_seed(0), state="transport"
    )
    report = teleporter.step(lambda net: net(x).square().sum())
    assert report is not None and report.accepted and report.invariance_error < 1e-11
    names = [*params]
    for entry in ("momentum_buffer", "exp_avg"):
        old = {names[k]: s[entry] for k, s in state.items() if s.get(entry) is not None}
        if old:
            expected = report.symmetry.transport(old, report.xi, params)
            assert all(
                torch.allclose(opt.state[p][entry], expected[n], 1e-12, 1e-12) for n, p in model.named_parameters()
            )
    if optimizer == "Adam":
        assert all(bool((s["exp_avg_sq"] >= 0).all()) for s in opt.state.values())


def test_a_default_teleport_leaves_translations_alone():
    model, inputs = build("a transformer")
    x = inputs(9, 3)
    symmetry, again = tl.find_symmetries(model, x), copy.deepcopy(model)
    loss = lambda net: net(x).square().sum()  # noqa: E731
    tl.teleport(model, loss, symmetry)
    tl.teleport(again, loss, tl.Product([f for f in symmetry if f.group.kind != "translation"]))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_saved_and_loaded(name):
    model, inputs = build(name)
    symmetry = tl.find_symmetries(model, inputs(4, 0))
    again = tl.Product.from_dict(json.loads(json.dumps(symmetry.to_dict())))
    assert again == symmetry and repr(again) == repr(symmetry)


def test_overlapping_factors_are_counted_once():
    model, inputs = build("a low-rank term")
    symmetry = tl.find_symmetries(model, inputs(4, 0))
    assert symmetry.dim - symmetry.rank(params_of(model)) == symmetry.overlap == 2 * 2
    assert repr(symmetry).startswith(
        f"Product of {len(symmetry)} symmetries, dim {symmetry.dim}, rank {symmetry.dim - 4}"
    )
    assert all(f.rank(params_of(model)) == f.dim for f in symmetry if f.dim)


@pytest.mark.parametrize("name", ["linear layers", "a transformer", "a low-rank term"])
def test_second_derivatives_agree_with_those_of_the_action(name):
    model, inputs = build(name)
    symmetry, params = tl.find_symmetries(model, inputs(4, 0)).continuous, params_of(model)
    symmetry = tl.Product([f for f in symmetry if f.homogeneous or isinstance(f, Shift)])
    xi = symmetry.sample(params, generator=torch.Generator().manual_seed(1))
    found, expected = symmetry.jet(params, xi), Symmetry.jet(symmetry, params, xi)
    assert all(
        torch.allclose(a[n], b[n], 1e-9, 1e-9) for a, b in zip(found, expected, strict=True) for n in symmetry.names
    )


def test_errors_say_what_is_wrong():
    step = Step((), "oi,i->o", (2,), (("w", 0, 3, 1),))
    with pytest.raises(TeleportError, match="read and moved"):
        Shift(2, [Move("w", (1, 2), 0, 2), Move("b", (3,), 0, 2, (step,))])
    shift = Shift(2, [Move("a", (2,), 0, 2), Move("b", (3,), 0, 2, (step,))])
    params = {"a": torch.zeros(2), "b": torch.zeros(3), "w": torch.zeros(3, 2)}
    with pytest.raises(ShapeError):
        shift.act({**params, "b": torch.zeros(4)}, torch.zeros(2))
    with pytest.raises(ShapeError):
        shift.act({**params, "w": torch.zeros(2, 2)}, torch.zeros(2))
    nonlinear = Shift(2, [Move("a", (2,), 0, 2, (Step((), "i,i->i", (2,), (("w", 0, 2, -1),)),))])
    with pytest.raises(TeleportError, match="nonlinear"):
        nonlinear.spread({"a": torch.ones(2), "w": torch.ones(2)}, torch.ones(2), torch.square)


def test_the_group(generator):
    group = Translation(5)
    like = torch.zeros(1, dtype=torch.float64)
    lengths = torch.stack([group.norm(group.sample(like, radius=0.5, generator=generator)) for _ in range(200)])
    assert lengths.max() <= 0.5 < 2 * lengths.max()
    xi = group.sample(like, radius=3.0, generator=generator)
    assert torch.equal(group.along(group.compose(xi, group.inverse(xi)), torch.ones(5, 2), 0), torch.ones(5, 2))
    assert float(group.norm(group.clip(10 * xi, 0.5))) == pytest.approx(0.5)


@pytest.mark.parametrize("seed", [3, 4, 5])
def test_a_bias_in_a_deep_network_is_not_free_because_all_inputs_turn_its_neurons_on(seed):
    torch.manual_seed(seed)
    widths = [nn.Linear(16, 16) for _ in range(32)]
    model = nn.Sequential(*[layer for linear in widths for layer in (linear, nn.ReLU())], nn.Linear(16, 3)).double()
    x = torch.randn(32, 16, dtype=torch.float64)
    for linear in (*widths, model[-1]):
        nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
    params, generator = params_of(model), torch.Generator().manual_seed(1)
    for factor in tl.find_symmetries(model, x):
        moved = factor.act(params, factor.sample(params, generator=generator))
        assert relative(functional_call(model, moved, (x,)), model(x)) < 1e-9, factor


@pytest.mark.parametrize("activation", [nn.Hardsigmoid, nn.Hardtanh, nn.ReLU6, nn.Hardswish, nn.Softshrink])
def test_an_activation_that_is_linear_in_the_small_leaves_no_translation(activation):
    """Inputs as small as these leave it linear, thirty times larger ones flat: gradients alone see a kernel."""
    for seed in (*range(8), 21, 28):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(5, 8), activation(), nn.Linear(8, 3))
        example = torch.ones(2, 5) if seed % 2 else torch.randn(4, 5)
        assert not tl.find_symmetries(net, example).select(kind="translation"), seed


@pytest.mark.parametrize("between", [lambda z: z.clamp(-5, 5), nn.Hardtanh(-20, 20), nn.Threshold(-2.0, 0.0)])
def test_a_bound_that_no_run_meets_leaves_no_translation(between):
    """The runs stay on one side of it, so that it does nothing there; a translation goes to the other side."""
    for seed in range(10):
        torch.manual_seed(seed)
        parts = {"e": nn.Linear(3, 8), "u": nn.Linear(8, 6), "v": nn.Linear(6, 8), "h": nn.Linear(8, 2)}
        model = Bounded(between, **parts)
        found = tl.find_symmetries(model, 0.1 * torch.randn(6, 3)).select(kind="translation")
        params, x = params_of(model.double()), torch.randn(200, 3, dtype=torch.float64) * 40
        for factor in found:
            xi = factor.sample(params, radius=20.0, generator=torch.Generator().manual_seed(seed))
            after = torch.func.functional_call(model, factor.act(params, xi), x)
            torch.testing.assert_close(after, model(x), rtol=1e-9, atol=1e-9)


class Bounded(nn.Module):
    def __init__(self, between, **parts):
        super().__init__()
        self.between = between
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x):
        return self.h(self.v(self.between(self.u(self.e(x)))))


BOUNDS = {  # far beyond what inputs of usual size meet
    "hardtanh": nn.Hardtanh(-100, 100),
    "clamp": lambda z: z.clamp(max=500),
    "minimum": lambda z: torch.minimum(z, torch.full_like(z, 150)),
    "where": lambda z: torch.where(z.abs() < 200, z, 0 * z),
    "masked": lambda z: z.masked_fill(z > 2000, 0.0),
    "relu": lambda z: torch.relu(z + 1e4) - 1e4,
    "softplus": lambda z: nn.functional.softplus(z + 300) - 300,
}


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("body", ["linear", "two layers", "convolution"])
def test_a_bound_far_away_stops_translations_and_shears(bound, body):
    torch.manual_seed(0)
    between = Bounded(BOUNDS[bound], u=nn.Identity(), e=nn.Identity(), v=nn.Identity(), h=nn.Identity())
    x = torch.randn(6, 5)
    match body:
        case "linear":
            model = nn.Sequential(nn.Linear(5, 8), between, nn.Linear(8, 3))
        case "two layers":
            model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8), between, nn.Linear(8, 3))
        case "convolution":
            model = nn.Sequential(nn.Conv1d(2, 4, 3), between, nn.Conv1d(4, 3, 2))
            x = torch.randn(6, 2, 9)
    found = tl.find_symmetries(model, x)
    params = params_of(model.double())
    for factor in (f for f in found if f.dim):
        moved = factor.act(params, factor.sample(params, generator=torch.Generator().manual_seed(1)))
        for size in (1.0, 1e2, 1e3, 1e5):
            far = size * torch.randn(100, *x.shape[1:], dtype=torch.float64)
            before, after = model(far), torch.func.functional_call(model, moved, (far,))
            assert (after - before).abs().max() < 1e-9 * before.abs().max(), (factor, size)
