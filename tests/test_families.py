"""Graph networks, mixtures of experts and recurrences: how many dimensions are found, and that they hold."""

from __future__ import annotations

import copy
import json
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import params_of, relative
from torch import nn
from torch.func import functional_call

import teleport_lite as tl
from teleport_lite.functional import loss_of, norm, value_and_grad
from teleport_lite.groups import GeneralLinear, Permutation, PositiveScaling, Signs
from teleport_lite.search import closed_form

EDGES = torch.tensor([[0, 1, 2, 3, 4, 0, 2], [1, 2, 3, 4, 0, 2, 0]])
SPREAD = {  # messages, from where to where, and how many nodes
    "scatter_add": lambda m, to, like: torch.zeros_like(like).scatter_add(0, to[:, None].expand_as(m), m),
    "index_add": lambda m, to, like: like.new_zeros(like.shape).index_add_(0, to, m),
    "index_put": lambda m, to, like: torch.zeros_like(like).index_put((to,), m, accumulate=True),
    "mean": lambda m, to, like: (
        torch.zeros_like(like).index_add(0, to, m)
        / torch.zeros(len(like)).to(m).index_add(0, to, torch.ones(len(m)).to(m)).clamp(min=1)[:, None]
    ),
    "amax": lambda m, to, like: torch.zeros_like(like).scatter_reduce(
        0, to[:, None].expand_as(m), m, "amax", include_self=False
    ),
    "sparse": lambda m, to, like: (
        torch.sparse_coo_tensor(
            torch.stack([to, torch.arange(len(m))]),
            torch.ones(len(m)).to(m),
            (len(like), len(m)),
            check_invariants=True,
        )
        @ m
    ),
}


class Graph(nn.Module):
    def __init__(self, spread, activation, width=5) -> None:
        super().__init__()
        self.spread, self.activation = spread, activation
        self.one, self.two, self.three = nn.Linear(3, width), nn.Linear(width, width), nn.Linear(width, 2)

    def forward(self, x, edges):
        for layer in (self.one, self.two):
            h = layer(x)
            x = self.activation(h + self.spread(h[edges[0]], edges[1], h))
        return self.three(x)


class OwnMatrix(nn.Module):
    """The matrix of a graph is a sparse buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 5), nn.Linear(5, 2)
        self.register_buffer("matrix", torch.eye(5).roll(1, 0).to_sparse())

    def forward(self, x):
        return torch.sparse.mm(self.matrix, self.two(F.leaky_relu(torch.sparse.mm(self.matrix, self.one(x)), 0.2)))


def silu_gate(gate, up):
    return F.silu(gate) * up


def cube(gate, up):
    return up**3


def nothing(gate, up):
    return up


class Experts(nn.Module):
    """A mixture in a residual stream; the matrices of the experts stand in stacks, or in modules of their own."""

    def __init__(self, way, inner=silu_gate, width=4, hidden=3, count=4) -> None:
        super().__init__()
        self.way, self.inner, self.count = way, inner, count
        self.into, self.router, self.out = nn.Linear(3, width), nn.Linear(width, count), nn.Linear(width, 5)
        nn.init.orthogonal_(self.router.weight, 3.0)
        nn.init.orthogonal_(self.into.weight, 3.0)
        self.closed = count  # an expert that is never chosen

        def stack(*shape):
            whole = 0.7 * torch.randn(count, *shape)
            return nn.ParameterList(whole.unbind(0)) if "modules" in way else nn.Parameter(whole)

        self.down = stack(hidden, width)
        self.joint = stack(2 * hidden, width) if way == "joint" else None  # as in Mixtral
        self.up = None if way == "joint" else stack(width, hidden)
        self.gate = stack(width, hidden) if inner is silu_gate and way != "joint" else None

    def expert(self, e, x):
        if self.joint is not None:
            return self.inner(*F.linear(x, self.joint[e]).chunk(2, -1)) @ self.down[e]
        return self.inner(None if self.gate is None else x @ self.gate[e], x @ self.up[e]) @ self.down[e]

    def forward(self, x):
        x = self.into(x).tanh()
        weights, which = (
            self.router(x).masked_fill(torch.arange(self.count) == self.closed, -torch.inf).softmax(-1).topk(2, -1)
        )
        full = torch.zeros(len(x), self.count).to(x).scatter(1, which, weights)
        match self.way:
            case "loop" | "modules" | "joint":
                y = torch.zeros_like(x)
                for e in range(self.count):
                    token, slot = torch.where(which == e)
                    y.index_add_(0, token, weights[token, slot, None] * self.expert(e, x[token]))
            case "masked":
                y = torch.zeros_like(x)
                for e in range(self.count):
                    chosen = (which == e).any(-1)
                    y[chosen] += full[chosen, e, None] * self.expert(e, x[chosen])
            case "stacked modules":
                y = torch.einsum("ne,ned->nd", full, torch.stack([self.expert(e, x) for e in range(self.count)], 1))
            case "bmm":
                y = (self.expert(slice(None), x.expand(self.count, *x.shape)) * full.T[..., None]).sum(0)
            case "einsum":
                gate = None if self.gate is None else torch.einsum("nd,edh->neh", x, self.gate)
                h = self.inner(gate, torch.einsum("nd,edh->neh", x, self.up))
                y = torch.einsum("neh,ehd,ne->nd", h, self.down, full)
            case "gathered":
                y = 0
                for k in range(2):
                    e = which[:, k]
                    y = y + weights[:, k, None] * self.expert(e, x[:, None])[:, 0]
        return self.out(x + y)


class Steps(nn.Module):
    """States that are written, one after another, into a tensor that was there before."""

    def __init__(self, way) -> None:
        super().__init__()
        self.way = way
        self.into, self.step, self.out = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        h = torch.zeros(len(x), 4).to(x)
        found = torch.empty(len(x), x.shape[1], 4).to(x)
        listed = []
        for t in range(x.shape[1]):
            h = F.leaky_relu(self.into(x[:, t]) + self.step(h), 0.2)
            found[:, t] = h
            listed.append(h)
        return self.out(found if self.way == "empty" else torch.stack(listed, 1))


class Flow(nn.Module):
    """A differential equation, by Runge and Kutta; its state is mixed, its field has a hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.one, self.two, self.out = nn.Linear(3, 4), nn.Linear(4, 6), nn.Linear(6, 4), nn.Linear(4, 2)

    def forward(self, x):
        def field(y):
            return self.two(F.leaky_relu(self.one(y), 0.2))

        y = self.into(x)
        path = torch.zeros(4, *y.shape).to(y)
        for i in range(4):
            a = field(y)
            b = field(y + 0.1 * a)
            y = y + 0.1 * (a + b)
            path[i] = y
        return self.out(path).sum(0)


class Written(nn.Module):
    """A network writes what another one is multiplied by, up to a constant: a matrix, a gain, or a shift."""

    def __init__(self, way) -> None:
        super().__init__()
        self.way, size = way, {"matrix": 9, "matrix, in place": 9, "gain": 3, "shift": 3}[way]
        self.one, self.two = nn.Linear(4, 5), nn.Linear(5, size)
        self.into = None if "matrix" in way else nn.Linear(3, 3)
        self.read, self.out = nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, x, z):
        w = self.two(torch.tanh(self.one(z)))
        match self.way:
            case "matrix":
                x = ((w.view(-1, 3, 3) + torch.eye(3).to(w)) @ x[..., None])[..., 0]
            case "matrix, in place":
                w = w.view(-1, 3, 3)
                w += torch.eye(3).to(w)
                x = (w @ x[..., None])[..., 0]
            case "gain":
                x = F.leaky_relu((1 + w) * torch.tanh(self.into(x)), 0.2)
            case "shift":
                x = F.leaky_relu(w + (2 * torch.arange(3.0).to(w) - 1), 0.2) * torch.tanh(self.into(x))
        return self.out(torch.tanh(self.read(x)))


def nodes(n):
    return (torch.randn(n, 3), EDGES if n == 5 else torch.randint(0, n, (2, 3 * n)))


def rows(n):
    return (torch.randn(8 * n, 3),)


ROUTER = 4 + 1  # columns and bias that shift all its logits alike
FAMILIES = {
    **{f"graph, {k}": (Graph, (s, lambda x: F.leaky_relu(x, 0.2)), nodes, 10) for k, s in SPREAD.items()},
    "graph, squared": (Graph, (SPREAD["scatter_add"], lambda x: F.relu(x) ** 2), nodes, 10),
    "graph, linear": (Graph, (SPREAD["scatter_add"], nn.Identity()), nodes, 50),
    "graph, sparse buffer": (OwnMatrix, (), lambda n: (torch.randn(5, 3),), 5),
    **{
        f"experts, {way}": (Experts, (way,), rows, 12 + ROUTER)
        for way in ("loop", "modules", "joint", "masked", "stacked modules", "bmm", "einsum", "gathered")
    },
    "cubes, bmm": (Experts, ("bmm", cube), rows, 12 + ROUTER),
    **{
        f"linear experts, {way}": (Experts, (way, nothing), rows, 36 + ROUTER)
        for way in ("bmm", "einsum", "loop", "modules")
    },
    "steps, empty": (Steps, ("empty",), lambda n: (torch.randn(n, n + 1, 3),), 4 + 4),
    "steps, stack": (Steps, ("stack",), lambda n: (torch.randn(n, n + 1, 3),), 4 + 4),
    **{
        f"written, {way}": (Written, (way,), lambda n: (torch.randn(n, 3), torch.randn(n, 4)), dim)
        for way, dim in {"matrix": 9, "matrix, in place": 9, "gain": 3, "shift": 3}.items()
    },
    "flow": (Flow, (), lambda n: (torch.randn(n, 3),), 4**2 + 6),
}


def scalings_and_mixings(found):
    return tl.Product([f for f in found.continuous if f.group.kind != "translation"])


@pytest.fixture(params=FAMILIES)
def family(request):
    kind, arguments, inputs, dim = FAMILIES[request.param]
    torch.manual_seed(0)
    model = kind(*arguments).double()
    double = lambda n: tuple(x.double() if x.is_floating_point() else x for x in inputs(n))  # noqa: E731
    return model, tl.find_symmetries(model, double(5)), double, dim


def test_dimensions_and_that_they_hold(family, generator):
    model, found, inputs, dim = family
    assert found.dim == dim, found
    params, x = params_of(model), inputs(5)
    target = torch.randn_like(model(*x))
    loss = loss_of(model, lambda net: F.mse_loss(net(*x), target))
    grads = value_and_grad(loss, params)[1]
    for k in range(100):
        fresh = inputs(3 + k % 7)
        xi = found.sample(params, radius=0.5, generator=generator)
        moved = found.act(params, xi)
        assert relative(functional_call(model, moved, fresh), model(*fresh)) < 1e-11
        back = found.act(moved, found.inverse(xi))
        assert max(relative(back[n], params[n]) for n in params) < 1e-11
    carried, there = found.transport(grads, xi), value_and_grad(loss, moved)[1]
    assert max(relative(carried[n], there[n]) for n in params) < 1e-10


@pytest.mark.parametrize("way", ["modules", "joint", "bmm", "einsum", "gathered", "loop"])
def test_each_expert_has_scalings_signs_and_orders_of_its_own_and_the_stream_is_permuted(way):
    torch.manual_seed(0)
    model = Experts(way).double()
    found = tl.find_symmetries(model, torch.randn(40, 3, dtype=torch.float64))
    count = {kind: sum(f.group.n for f in found if isinstance(f.group, kind)) for kind in (PositiveScaling, Signs)}
    assert count[PositiveScaling] == 12 and count[Signs] == 12 + 4
    orders = [
        (f.group.n, "router.weight" in f.names, "into.weight" in f.names)
        for f in found
        if isinstance(f.group, Permutation)
    ]
    assert orders.count((3, False, False)) == 4 and (4, True, True) in orders  # neurons, the stream
    assert (4, True, False) in orders  # whole experts
    if way != "modules":
        assert len(scalings_and_mixings(found)) == 1  # one factor for all experts


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, partial(torch.optim.SGD, momentum=0.9), torch.optim.Adam])
def test_state_moves_where_a_constant_is_added(optimizer):
    torch.manual_seed(0)
    model = Written("matrix").double()
    x, z, y = torch.randn(40, 3).double(), torch.randn(40, 4).double(), torch.randn(40, 2).double()
    found = scalings_and_mixings(tl.find_symmetries(model, (x, z)))
    assert tl.Product.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    opt = optimizer(model.parameters(), lr=1e-3)
    for _ in range(3):
        opt.zero_grad()
        F.mse_loss(model(x, z), y).backward()
        opt.step()
    before, params, state = model(x, z), params_of(copy.deepcopy(model)), copy.deepcopy(opt.state_dict())["state"]
    report = tl.Teleporter(model, opt, found, every={0}, radius=0.3).step(lambda net: F.mse_loss(net(x, z), y))
    assert report.accepted and relative(model(x, z), before) < 1e-11
    for entry in ("momentum_buffer", "exp_avg"):
        old = {n: s[entry] for n, s in zip(params, state.values(), strict=False) if s.get(entry) is not None}
        expected = report.symmetry.transport(old, report.xi, params) if old else {}
        for n, p in model.named_parameters():
            assert n not in expected or torch.allclose(opt.state[p][entry], expected[n], 1e-11, 1e-13)


class WrittenTwice(Written):
    """The matrix is read without the constant, too."""

    def forward(self, x, z):
        return super().forward(x, z) + self.two(torch.tanh(self.one(z))).square().sum(-1, keepdim=True)


class WrittenBeside(Written):
    """What is added is no constant."""

    def forward(self, x, z):
        w = self.two(torch.tanh(self.one(z))).view(-1, 3, 3) + torch.diag(z[0, :3])
        return self.out(torch.tanh(self.read((w @ x[..., None])[..., 0])))


class WrittenLater(Written):
    """What is added may be another matrix later."""

    def __init__(self, way) -> None:
        super().__init__(way)
        self.register_buffer("constant", torch.eye(3))

    def forward(self, x, z):
        w = self.two(torch.tanh(self.one(z))).view(-1, 3, 3) + self.constant
        return self.out(torch.tanh(self.read((w @ x[..., None])[..., 0])))


@pytest.mark.parametrize("kind", [WrittenTwice, WrittenBeside, WrittenLater])
def test_no_mixing_where_more_than_a_constant_is_added(kind):
    torch.manual_seed(0)
    found = tl.find_symmetries(kind("matrix").double(), (torch.randn(9, 3).double(), torch.randn(9, 4).double()))
    assert not found.dim


def test_mixings_of_a_stack_are_one_factor():
    torch.manual_seed(0)
    found = tl.find_symmetries(Experts("bmm", nothing).double(), torch.randn(40, 3).double())
    (mixing,) = scalings_and_mixings(found)
    assert mixing.group == GeneralLinear(3, 4) and {leg.groups for leg in mixing.legs} == {4}


def test_an_expert_that_no_token_visits_stays():
    torch.manual_seed(0)
    model = Experts("loop").double()
    model.closed = 2
    found = tl.find_symmetries(model, torch.randn(40, 3, dtype=torch.float64))
    found = tl.Product([f for f in found if "router.weight" not in f.names])  # but for the stream
    moved = found.act(params_of(model), found.sample(params_of(model)))
    assert found.dim == 9
    for name in ("up", "down", "gate"):
        assert torch.equal(moved[name][2], model.get_parameter(name)[2])


@pytest.mark.parametrize(("inner", "dim"), [(silu_gate, 12), (nothing, 36)])
@pytest.mark.parametrize("way", ["joint", "bmm"])
def test_stacks_are_searched_and_their_state_moves(way, inner, dim, generator):
    if way == "joint" and inner is nothing:
        return
    torch.manual_seed(0)
    model = Experts(way, inner).double()
    x, y = torch.randn(40, 3).double(), torch.randn(40, 5).double()
    found = scalings_and_mixings(tl.find_symmetries(model, x))
    assert found.dim == dim

    def loss_fn(net):
        return F.mse_loss(net(x), y)

    params = params_of(model)
    grads = value_and_grad(loss_of(model, loss_fn), params)[1]
    best = float(norm(found.transport(grads, closed_form(found, grads, True, radius=0.5))))
    others = (found.transport(grads, found.sample(params, radius=0.5, generator=generator)) for _ in range(200))
    assert best > max(float(norm(g)) for g in others)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    loss_fn(model).backward()
    optimizer.step()
    grown = copy.deepcopy(model)
    report = tl.Teleporter(model, optimizer, found, every={0}, radius=0.3).step(loss_fn)
    assert report.accepted and report.objective_after > report.objective_before
    assert relative(model(x), grown(x)) < 1e-11
