"""Learned optimizers: their step against plain loops, exact resumption, and failures that are caught and told."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import largest_gap
from torch import nn

import teleport_lite as tl
from teleport_lite import learned
from teleport_lite.errors import DivergenceError, NoSymmetryError, TeleportError, UnknownNameError
from teleport_lite.groups import GeneralLinear, PositiveScaling, SpecialOrthogonal
from teleport_lite.learned import LearnedOptimizer, State, Task, bounded, meta_train, on_batch, run
from teleport_lite.symmetries import TestFunction, mixing, scaling

N, H, K, PROBLEMS = 4, 6, 4, 3
V, U = "0.weight", "2.weight"
EXACT = tl.Product([scaling(H, V, U)])
NET = nn.Sequential(nn.Linear(N, H, bias=False), nn.LeakyReLU(0.1), nn.Linear(H, 2, bias=False)).double()
PAPER = tl.minibatch_symmetries(NET, torch.rand(K, N, dtype=torch.float64), compensate="incoming")
SYMMETRIES = {"exact": EXACT, "mini-batch": lambda data: on_batch(PAPER, data[0])}


def loss(params, data):
    x, y = data
    return 0.5 * (y - F.leaky_relu(x @ params[V].mT, 0.1) @ params[U].mT).square().sum()


def sample(generator, width: int = H):
    def uniform(*shape):
        return torch.rand(PROBLEMS, *shape, generator=generator, dtype=torch.float64)

    return {V: uniform(width, N), U: uniform(2, width)}, (uniform(K, N), uniform(K, 2))


def make(kind: str | None = "exact", *, seed: int = 0, task=None, **options):
    """An optimizer whose heads are not zero, its task, and a batch of problems."""
    symmetry = {None: None, "exact": EXACT, "mini-batch": PAPER}[kind]
    if kind is None:
        options["teleports"] = "none"
    torch.manual_seed(seed)
    optimizer = LearnedOptimizer(sample_one(), symmetry, hidden=5, **options).double()
    for head in optimizer.heads.values():
        nn.init.normal_(head.weight, std=0.3)
    task = task or Task(loss, sample, SYMMETRIES.get(kind or ""))
    return optimizer, task, *task.sample(torch.Generator().manual_seed(1))


def sample_one():
    return {name: p[0] for name, p in sample(torch.Generator().manual_seed(0))[0].items()}


def moved(kind, v, u, xi, x):
    """The action on one problem, written out."""
    if kind == "exact":
        scale = xi.exp()
        return scale[:, None] * v, u / scale
    g, hidden = torch.linalg.matrix_exp(xi), F.leaky_relu(x @ v.T, 0.1)
    target = hidden @ g.T
    pre = torch.where(target > 0, target, 10 * target)
    return v + (torch.linalg.pinv(x) @ (pre - x @ v.T)).T, u @ torch.linalg.inv(g)


@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("emits", learned.EMITS)
@pytest.mark.parametrize("kind", ["exact", "mini-batch", None])
def test_steps_are_those_of_a_plain_loop(kind, emits, momentum):
    if momentum and emits != "rate":
        pytest.skip("refused")
    optimizer, task, params, data = make(kind, emits=emits, size=1e-3, momentum=momentum)
    losses = run(optimizer, task, params, data, 4)
    for k in range(PROBLEMS):
        v, u, x, y = params[V][k], params[U][k], data[0][k], data[1][k]
        memory, velocity = None, None
        for t in range(5):
            grads = torch.func.grad(loss)({V: v, U: u}, (x, y))
            value = loss({V: v, U: u}, (x, y))
            assert float(losses[t, k]) == pytest.approx(float(value), rel=1e-9)
            g = torch.cat([grads[V].flatten(), grads[U].flatten()])
            rms = g.square().mean().sqrt()
            out, memory = optimizer.memory(torch.cat([(g / rms).asinh(), rms.log()[None] / 10])[None, None], memory)
            heads = {name: head(out[0, 0]).detach() for name, head in optimizer.heads.items()}
            size = 1e-3 * (heads["size"].exp() if "size" in heads else 1)
            xi = None
            if kind is not None:
                raw = heads["element"].view(*([H] if kind == "exact" else [H, H]))
                xi = 0.1 * raw.tanh() if kind == "exact" else 0.1 * raw / (1 + raw.norm() ** 2).sqrt()
            if emits == "update":
                v, u = (
                    v + (size * heads["entries"][: v.numel()]).view_as(v),
                    u + (size * heads["entries"][v.numel() :]).view_as(u),
                )
                if xi is not None:
                    v, u = moved(kind, v, u, xi, x)
                continue
            if xi is not None:
                v, u = moved(kind, v, u, xi, x)
                if kind == "exact" and velocity is not None:
                    velocity = velocity[0] / xi.exp()[:, None], velocity[1] * xi.exp()
            new = torch.func.grad(loss)({V: v, U: u}, (x, y))
            step = new[V], new[U]
            if momentum:
                decay = heads["decay"].sigmoid()
                velocity = (
                    step if velocity is None else tuple(decay * a + b for a, b in zip(velocity, step, strict=True))
                )
                step = velocity
            v, u = v - size * step[0], u - size * step[1]


@pytest.mark.parametrize("kind", ["exact", "mini-batch"])
@pytest.mark.parametrize("emits", ["rate", "update"])
def test_the_meta_gradient_is_that_of_finite_differences(kind, emits):
    optimizer, task, params, data = make(kind, emits=emits, size=1e-3)
    points = {name: p.requires_grad_() for name, p in params.items()}

    def score():
        _, after, _ = optimizer.step(task, points, data, State())
        return task.values(after, data).log().mean()

    score().backward()
    for name in ("element", "size"):
        bias = optimizer.heads[name].bias
        slope, h = float(bias.grad[0]), 1e-5
        ends = []
        for sign in (1, -1):
            bias.data[0] += sign * h
            ends.append(float(score().detach()))
            bias.data[0] -= sign * h
        assert slope == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("teleports", ["learned", "random"])
@pytest.mark.parametrize("kind", ["exact", "mini-batch"])
def test_a_teleport_moves_the_parameters_and_not_the_loss(kind, teleports, generator):
    optimizer, task, params, data = make(kind, emits="update", size=0.0, teleports=teleports)
    losses = run(optimizer, task, params, data, 5, generator)
    assert torch.allclose(losses, losses[:1].expand_as(losses), rtol=1e-9)
    with torch.no_grad():
        _, after, _ = optimizer.step(task, params, data, State(), generator)
    assert largest_gap(after, params) > 1e-3


@pytest.mark.parametrize("emits", ["rate", "update"])
@pytest.mark.parametrize("teleports", learned.TELEPORTS)
def test_coordinatewise_runs_on_other_widths_and_ignores_order(emits, teleports):
    width = 9
    symmetry = tl.Product([scaling(width, V, U)])
    optimizer, *_ = make(emits=emits, size=1e-3, teleports=teleports, coordinatewise=True)
    task = Task(loss, lambda g: sample(g, width), symmetry)
    params, data = task.sample(torch.Generator().manual_seed(2))
    losses = run(optimizer, task, params, data, 6, torch.Generator().manual_seed(3))
    assert losses.isfinite().all() and not torch.equal(losses[0], losses[-1])
    if teleports != "random":
        order = torch.randperm(width, generator=torch.Generator().manual_seed(0))
        mixed = {V: params[V][:, order], U: params[U][:, :, order]}
        assert torch.allclose(run(optimizer, task, mixed, data, 6), losses, rtol=1e-9)


def test_slopes_are_derivatives_of_the_log_of_the_gradient_norm():
    _, task, params, data = make()
    grads = learned.gradient(task, params, data)[1]
    expected = (grads[U].square().sum(1) - grads[V].square().sum(2)) / sum(
        g.square().sum((1, 2))[:, None] for g in grads.values()
    )
    assert torch.allclose(task.slopes(grads, data), expected)


@pytest.mark.parametrize("group", [PositiveScaling(5), GeneralLinear(4), SpecialOrthogonal(4)])
def test_coordinates_stay_within_the_radius(group, generator):
    like = group.zeros(torch.zeros(1, dtype=torch.float64))
    for size in (1e-3, 1.0, 1e3):
        raw = size * torch.randn(like.shape, generator=generator, dtype=torch.float64)
        assert 0 < group.norm(bounded(group, raw, 0.3)) <= 0.3 + 1e-12


def fresh(seed: int = 0, **options):
    optimizer, task, *_ = make(seed=seed, emits="update", teleports="random", **options)
    return optimizer, task


def test_training_lowers_the_loss(generator):
    optimizer, task = make("exact", emits="rate", size=1e-4)[:2]
    history = meta_train(optimizer, task, batches=30, steps=10, lr=2e-2, generator=generator)
    assert history.score[-1] < history.score[0] - 0.2 and not history.failures


def test_resumes_bit_for_bit(tmp_path):
    path = tmp_path / "checkpoint"
    whole, task = fresh()
    expected = meta_train(whole, task, batches=6, steps=4, unroll=2, generator=torch.Generator().manual_seed(5))
    first, _ = fresh()
    options = {"steps": 4, "unroll": 2, "checkpoint": path, "every": 2}
    meta_train(first, task, batches=4, generator=torch.Generator().manual_seed(5), **options)
    second, _ = fresh(seed=1)  # everything comes from the file
    found = meta_train(second, task, batches=6, generator=torch.Generator().manual_seed(77), **options)
    assert found.score == expected.score
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True))
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


def broken(values):
    """A task whose loss is multiplied by the next of `values` at each evaluation, by 1 once they are used up."""
    left = itertools.chain(values, itertools.repeat(1.0))
    return Task(lambda params, data: next(left) * loss(params, data), sample, EXACT)


@pytest.mark.parametrize(("evaluation", "where"), [(7, (1, 1)), (8, (1, 2)), (9, (1, 2)), (11, (1, 4))])
def test_a_nan_is_noted_with_its_batch_and_step_and_training_goes_on(evaluation, where, generator):
    """A batch of 4 steps is two unrolls of 2 steps, each with 3 evaluations, the last one repeated by the next."""
    optimizer, _ = fresh()
    task = broken([*[1.0] * evaluation, math.nan])
    history = meta_train(optimizer, task, batches=2, steps=4, unroll=2, generator=generator)
    assert history.failures == [(*where, "a loss is not finite")] and len(history.score) == 2
    assert all(p.isfinite().all() for p in optimizer.parameters())


@pytest.mark.parametrize("step", [0, 1, 2, 3])
def test_a_nan_restores_the_checkpoint(step, generator):
    optimizer, _ = fresh()
    before = {name: p.clone() for name, p in optimizer.state_dict().items()}
    evaluations = step + step // 2  # each unroll evaluates the last loss once more
    task = broken([*[1.0] * evaluations, *[math.nan] * 1000])
    with pytest.raises(DivergenceError, match="a loss is not finite"):
        meta_train(optimizer, task, batches=1, steps=4, unroll=2, generator=generator)
    assert all(torch.equal(before[name], p) for name, p in optimizer.state_dict().items())


def test_a_gradient_that_is_not_finite_is_caught(generator, monkeypatch):
    optimizer, task = fresh()
    clip, left = nn.utils.clip_grad_norm_, [math.nan]
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", lambda *a: torch.tensor(left.pop()) if left else clip(*a))
    history = meta_train(optimizer, task, batches=2, steps=4, unroll=2, generator=generator)
    assert history.failures == [(0, 2, "the gradient is not finite")] and len(history.score) == 2
    assert all(p.isfinite().all() for p in optimizer.parameters())


def test_an_explosion_ends_its_batch_after_a_last_update(generator):
    optimizer, _ = fresh()
    history = meta_train(optimizer, broken([1.0, 1e5]), batches=2, steps=4, unroll=2, generator=generator)
    assert history.failures == [(0, 1, "a loss exploded")] and len(history.score) == 2


def test_a_rate_that_explodes_is_learned_away(generator):
    optimizer, task = make(None, emits="rate", size=3.0)[:2]
    history = meta_train(optimizer, task, batches=40, steps=10, lr=5e-2, generator=generator)
    assert history.failures and history.failures[-1][0] < 39
    assert history.score[-1] < 3


def test_progress_sees_every_batch(generator):
    optimizer, task = fresh()
    seen = []

    def progress(batches):
        for b in batches:
            seen.append(b)
            yield b

    meta_train(optimizer, task, batches=3, steps=2, unroll=1, generator=generator, progress=progress)
    assert seen == [0, 1, 2]


def test_the_learned_rotation_is_the_known_one(generator):
    """On x^2 + 9 y^2 the best point of a circle for a small gradient step is on the steep axis."""
    f, size = TestFunction("ellipse", (1.0, 0.0)), 0.02

    def circle(g):
        angle = 2 * math.pi * torch.rand(64, generator=g)
        return {"w": torch.stack([angle.cos(), angle.sin() / 3], 1)}, torch.zeros(64)

    task = Task(lambda p, _: f.value(p["w"]), circle, f.symmetry)
    torch.manual_seed(0)
    optimizer = LearnedOptimizer({"w": torch.zeros(2)}, f.symmetry, emits="fixed", size=size, radius=1.6, hidden=16)
    meta_train(optimizer, task, batches=500, steps=1, unroll=1, lr=3e-2, generator=generator)
    params, data = circle(torch.Generator().manual_seed(9))
    after = run(optimizer, task, params, data, 1)[1]
    assert float(after.mean()) <= 1.01 * (1 - 18 * size) ** 2 + 1e-9


def test_what_is_refused(generator):
    one = sample_one()
    for options in ({"emits": "step"}, {"teleports": "sometimes"}):
        with pytest.raises(UnknownNameError):
            LearnedOptimizer(one, EXACT, **options)
    for symmetry in (None, tl.symmetries.permutation(H, V, U)):
        with pytest.raises(NoSymmetryError):
            LearnedOptimizer(one, symmetry)
    with pytest.raises(NoSymmetryError):
        Task(loss, sample).on(None)
    for symmetry, options in (
        (EXACT, {"momentum": True}),
        (PAPER, {"coordinatewise": True}),
        (EXACT, {"radius": -1.0}),
    ):
        with pytest.raises(TeleportError):
            LearnedOptimizer(one, symmetry, **options)
    optimizer, task = fresh()
    with pytest.raises(TeleportError, match="multiple of unroll"):
        meta_train(optimizer, task, batches=1, steps=5, unroll=2, generator=generator)
    assert mixing(3, V, U).dim == 9
