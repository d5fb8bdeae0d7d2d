"""Teleports of several processes that train one model.

This file is its own worker: `torchrun` starts it on two processes, each case leaves what it found on each rank, and
the tests compare the ranks with each other, bit for bit, and with one process on the whole batch.
"""

from __future__ import annotations

import copy
import datetime
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from completeness import Attention
from conftest import mlp
from torch import nn

import teleport_lite as tl
from teleport_lite.distributed import Ranks
from teleport_lite.errors import LossError, ParameterError, RankError, StateError, TeleportError
from teleport_lite.objectives import OBJECTIVES
from teleport_lite.optim.state_rules import RULES

X = torch.randn(12, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.randn(12, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
UP = {"gradient_norm": True, "weight_norm": False, "one_step_loss": False, "sharpness": False, "curvature": True}


def build(activation: nn.Module | None = None) -> nn.Sequential:
    return mlp([5, 7, 6, 3], activation or nn.ReLU())


class World:
    """The batch, the model and the rank of one process; in a world of one the whole batch."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size
        self.x, self.y = X.chunk(size)[rank], Y.chunk(size)[rank]

    def wrap(self, model: nn.Module) -> nn.Module:
        return nn.parallel.DistributedDataParallel(model) if self.size > 1 else model

    def loss_fn(self, net):
        return (net(self.x) - self.y).square().mean()


def found(model: nn.Module, *reports: tl.Report, **more: Any) -> dict[str, Any]:
    tensors = {name.removeprefix("module."): p.detach().clone() for name, p in model.named_parameters()}
    numbers = [[r.loss_before, r.loss_after, r.objective_before, r.objective_after] for r in reports]
    return {
        "tensors": tensors | more,
        "numbers": torch.tensor(numbers),
        "facts": [(r.accepted, r.reason) for r in reports],
    }


# --- cases that agree with one process on the whole batch -------------------------------------------------------------


def by_name(name: str):
    def case(world: World):
        model = world.wrap(build())
        return found(model, tl.teleport(model, world.loss_fn, None, name, UP.get(name, True)))

    return case


def mini_batch(name: str, objective: Any):
    def case(world: World):
        inner = build(nn.Tanh())
        symmetry = tl.minibatch_symmetries(inner, X[:4])  # the same on every rank: the batch of the symmetry is global
        model = world.wrap(inner)
        x, y = (t[:4].chunk(world.size)[world.rank] for t in (X, Y))
        report = tl.teleport(
            model, lambda net: (net(x) - y).square().mean(), symmetry, objective, UP.get(name, True), radius=0.2
        )
        return found(model, report)

    return case


def own_objective(world: World):
    model, shapes = world.wrap(build()), build()

    def far(params):  # depends on the shard
        noisy = {name: p + 0.1 * p.detach().sign() for name, p in params.items()}
        return world.loss_fn(lambda x: torch.func.functional_call(shapes, noisy, x))

    return found(model, tl.teleport(model, world.loss_fn, None, far, maximize=False))


def mixing(world: World):
    model = world.wrap(build(nn.Identity()))
    return found(model, tl.teleport(model, world.loss_fn, radius=0.5))


def at_random(world: World):
    model, generator = world.wrap(build()), torch.Generator().manual_seed(3)
    first = tl.teleport(model, world.loss_fn, generator=generator, search="random", radius=0.3)
    second = tl.teleport(model, world.loss_fn, generator=generator, search="ascent", radius=0.3)
    return found(model, first, second)


class Turned(nn.Module):
    """Attention over the numbers of a vector, with rotary positions."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attention, self.head = nn.Linear(1, 4), Attention(4, layout="halves"), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.attention(self.embed(x[..., None])).mean(1))


def layers(*inner: nn.Module, bias: bool = True) -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), *inner, nn.Linear(6, 3, bias=bias))


GROUPS = {  # a model, a kind of its symmetries, their dimension, and whether an ascent gains anything
    "rotations behind a gain": (lambda: layers(nn.RMSNorm(6)), "rotation", 15, True),
    "rotary pairs": (Turned, "rotation", 2, False),
    "shifts": (lambda: layers(nn.Linear(6, 6)), "translation", 12, True),
    "shears": (lambda: layers(nn.LayerNorm(6), bias=False), "shear", 6, True),
    "permutations with buffers": (lambda: layers(nn.BatchNorm1d(6), nn.ReLU()), "permutation", 0, False),
    "signs with buffers": (lambda: layers(nn.BatchNorm1d(6), nn.Tanh()), "sign", 0, False),
}


def group(make, kind: str, dim: int, ascends: bool):
    """A search, a random element, and Adam's state carried by random elements between steps."""

    def case(world: World):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            inner = make().double()
            for p in inner.parameters():
                p.data += 0.3 * torch.randn_like(p)
        inner(X), inner.eval()  # so that statistics of a batch norm are not those it begins with
        symmetry, model = tl.find_symmetries(inner, X[:4]).select(kind=kind), world.wrap(inner)
        assert symmetry.dim == dim and len(symmetry) > 0
        optimizer, generator = torch.optim.Adam(model.parameters(), lr=0.01), torch.Generator().manual_seed(1)
        reports = [
            tl.teleport(model, world.loss_fn, symmetry, radius=0.5, search=search, generator=generator)
            for search in ("random", *["ascent"] * ascends)
        ]
        teleporter = tl.Teleporter(
            model, optimizer, symmetry, every=1, radius=0.5, state="transport", search="random", generator=generator
        )
        more, slots = steps(2, world, model, optimizer, teleporter)
        buffers = {n: b for n, b in inner.named_buffers() if b.is_floating_point()}
        return found(model, *reports, *more, **slots, **buffers)

    return case


def steps(count: int, world: World, model, optimizer, teleporter):
    """The reports of training with a teleport after each step, and the optimizer's state at the end."""
    reports = []
    for _ in range(count):
        optimizer.zero_grad()
        world.loss_fn(model).backward()
        optimizer.step()
        reports.append(teleporter.step(world.loss_fn))
    return reports, {f"{i}.{k}": v for i, s in optimizer.state_dict()["state"].items() for k, v in s.items()}


def trained(state: str, every: Any):
    def case(world: World):
        model = world.wrap(build())
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        generator = torch.Generator().manual_seed(5)
        teleporter = tl.Teleporter(
            model, optimizer, every=every, state=state, generator=generator, search="closed_form"
        )
        reports, slots = steps(6, world, model, optimizer, teleporter)
        return found(model, *filter(None, reports), **slots)

    return case


def zero_redundancy(world: World):
    """Each rank holds the state of some parameters, and carries that."""
    model = world.wrap(build())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    if world.size > 1:
        from torch.distributed.optim import ZeroRedundancyOptimizer

        optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.Adam, lr=0.01)
        with pytest.raises(TeleportError, match=r"optimizer\.optim"):
            tl.Teleporter(model, optimizer)
        assert 0 < len(optimizer.optim.param_groups[0]["params"]) < 6
    teleporter = tl.Teleporter(model, getattr(optimizer, "optim", optimizer), every={2})
    for _ in range(5):
        optimizer.zero_grad()
        world.loss_fn(model).backward()
        optimizer.step()
        teleporter.step(world.loss_fn)
    assert teleporter.report is not None
    return found(model, teleporter.report)


AGREE = {
    **{name: by_name(name) for name in OBJECTIVES},
    "gradient_norm on a mini-batch": mini_batch("gradient_norm", "gradient_norm"),
    "hessian_trace on a mini-batch": mini_batch("hessian_trace", tl.objectives.hessian_trace(samples=2)),
    "one_step_loss on a mini-batch": mini_batch("one_step_loss", "one_step_loss"),
    "an objective of one's own": own_objective,
    "mixings": mixing,
    **{name: group(*made) for name, made in GROUPS.items()},
    "random elements, random starts": at_random,
    "Teleporter, transport": trained("transport", {1, 3}),
    "Teleporter, reset": trained("reset", {1, 3}),
    "Teleporter, a share of the state on each rank": zero_redundancy,
    "Teleporter, random schedule": trained("transport", 0.5),
    "Teleporter, rank 0 decides": trained("transport", lambda step: step == 2 and os.environ.get("RANK", "0") == "0"),
}


# --- cases that leave every rank as it was ----------------------------------------------------------------------------


def refused(world: World, act, model: nn.Module | None = None, prepare=lambda model: None) -> str:
    """What `act` on a wrapped model raises or reports here; nothing may have moved, and the ranks stay in step."""
    model = world.wrap(model or build())
    prepare(model)
    before = copy.deepcopy(model.state_dict())
    try:
        text = act(model).reason
    except (Exception, KeyboardInterrupt) as error:
        text = f"{type(error).__name__}: {error}"
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert tl.teleport(world.wrap(build()), world.loss_fn).accepted
    return text


def fails_at(world: World, rank: int, call: int, error: BaseException | float):
    """A loss that raises, or is this number, on one rank from its n-th call on."""
    calls = []

    def loss_fn(net):
        calls.append(1)
        if world.rank == rank and len(calls) >= call:
            if isinstance(error, BaseException):
                raise error
            return error * world.loss_fn(net)
        return world.loss_fn(net)

    return loss_fn


def other_weights(world: World):
    def shift(model):
        with torch.no_grad():
            model.module[0].weight[0, 0] += world.rank

    return refused(world, lambda model: tl.teleport(model, world.loss_fn), prepare=shift)


def interrupted_commit(world: World):
    module = sys.modules["teleport_lite.transaction"]
    write = module.write_in_place

    def interrupt():
        raise KeyboardInterrupt("while the weights are written")

    def act(model):
        if world.rank == 1:
            module.write_in_place = lambda pairs, finish: write(pairs, interrupt)
        try:
            return tl.teleport(model, world.loss_fn)
        finally:
            module.write_in_place = write

    return refused(world, act)


def unknown_state(world: World):
    made = []

    def train(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        world.loss_fn(model).backward()
        optimizer.step()
        made.append(tl.Teleporter(model, optimizer))

    def act(model):
        rules = RULES["SGD"]
        if world.rank == 1:
            RULES["SGD"] = {}
        try:
            return made[0].step(world.loss_fn)
        finally:
            RULES["SGD"] = rules
            assert made[0].steps == 0

    return refused(world, act, prepare=train)


def on_shards(world: World):
    inner = build(nn.Tanh())
    symmetry = tl.minibatch_symmetries(inner, world.x[:3])
    return refused(world, lambda model: tl.teleport(model, world.loss_fn, symmetry, radius=0.2), inner)


def with_loss(rank: int, call: int, error: BaseException | float, **arguments: Any):
    return lambda world: refused(
        world, lambda model: tl.teleport(model, fails_at(world, rank, call, error), **arguments)
    )


PEER = "RankError: expected every rank to finish the teleport, got an exception on rank {}; see its message there"
REFUSED = {  # what rank 0 and rank 1 say
    "an exception while symmetries are sought": (
        with_loss(1, 1, ValueError("no data")),
        PEER.format(1),
        "ValueError: no data",
    ),
    "an exception at the gradient": (with_loss(0, 2, ValueError("no data")), "ValueError: no data", PEER.format(0)),
    "an exception in an ascent": (
        with_loss(1, 9, ValueError("no data"), objective="one_step_loss", maximize=False),
        PEER.format(1),
        "ValueError: no data",
    ),
    "an interrupt": (with_loss(1, 3, KeyboardInterrupt("now")), PEER.format(1), "KeyboardInterrupt: now"),
    "an interrupted commit": (interrupted_commit, PEER.format(1), "KeyboardInterrupt: while the weights are written"),
    "no number on one rank": (with_loss(1, 3, float("nan")), "the loss after the move is not finite", "the loss after"),
    "a loss that changes on one rank": (with_loss(1, 3, 1.5), *2 * ["LossError: expected a deterministic loss"]),
    "a loss that is no scalar on one rank": (
        lambda world: refused(
            world, lambda model: tl.teleport(model, lambda net: net(world.x) if world.rank else world.loss_fn(net))
        ),
        PEER.format(1),
        "LossError: expected a real scalar tensor",
    ),
    "a loss without the net on one rank": (
        lambda world: refused(
            world,
            lambda model: tl.teleport(
                model, lambda net: world.loss_fn(net).detach() if world.rank else world.loss_fn(net)
            ),
        ),
        PEER.format(1),
        "LossError: expected a loss that depends on the parameters",
    ),
    "other weights": (
        other_weights,
        *2 * ["RankError: expected the same parameters on every rank, got another one on rank 1"],
    ),
    "other seeds": (
        lambda world: refused(
            world,
            lambda model: tl.teleport(
                model, world.loss_fn, search="random", generator=torch.Generator().manual_seed(world.rank)
            ),
        ),
        *2 * ["RankError: expected the same generator on every rank"],
    ),
    "another request": (
        lambda world: refused(world, lambda model: tl.teleport(model, world.loss_fn, radius=1.0 + world.rank)),
        *2 * ["RankError: expected the same request on every rank"],
    ),
    "a wrong argument on one rank": (
        lambda world: refused(world, lambda model: tl.teleport(model, world.loss_fn, radius=1.0 - 2 * world.rank)),
        PEER.format(1),
        "TeleportError: expected a positive finite radius",
    ),
    "mini-batch symmetries of the shards": (on_shards, *2 * ["RankError: expected the same batch of the symmetry"]),
    "state without a rule on one rank": (unknown_state, PEER.format(1), "StateError: expected a rule for"),
}


# --- other cases ------------------------------------------------------------------------------------------------------


def alone(world: World):
    """A plain model in an initialised process group is teleported on its own batch, without any exchange."""
    model = build()
    report = tl.teleport(model, world.loss_fn) if world.rank else None
    return found(model, *([report] if report else []))


def discovered(world: World):
    model = build()
    return repr(tl.find_symmetries(world.wrap(model), world.x)), repr(tl.find_symmetries(model, world.x))


def sharded(world: World):
    try:
        from torch.distributed.fsdp import fully_shard
    except ImportError:  # torch 2.4 and 2.5
        from torch.distributed._composable.fsdp import fully_shard

    model = build()
    fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (world.size,)))
    optimizer = torch.optim.SGD(model.parameters())
    errors = []
    for act in (
        lambda: tl.teleport(model, world.loss_fn),
        lambda: tl.Teleporter(model, optimizer),
        lambda: tl.find_symmetries(model, world.x),
        lambda: tl.level_set_teleport(model, world.loss_fn),
    ):
        with pytest.raises(ParameterError) as caught:
            act()
        errors.append((caught.value.name, caught.value.expected, caught.value.got, caught.value.remedy))
    return errors


def measured(world: World):
    """What is not made for several processes says so."""
    model = world.wrap(build())
    with pytest.raises(TeleportError, match=r"model\.module"):
        tl.sharpness(model, world.loss_fn)
    with pytest.raises(TeleportError, match=r"model\.module"):
        tl.level_set_teleport(model, world.loss_fn)


OTHERS = {"alone": alone, "discovered": discovered, "sharded": sharded, "measured": measured}


FOUR = ("gradient_norm", "curvature", "mixings", "Teleporter, transport", "Teleporter, random schedule")  # ranks


def killed(world: World, call: int) -> tuple[str, bool]:
    """What a rank raises when the last one is gone in the middle of a teleport, and whether its model is as it was."""
    model, calls = world.wrap(build()), []
    before = copy.deepcopy(model.state_dict())

    def loss_fn(net):
        calls.append(1)
        if world.rank == world.size - 1 and len(calls) == call:
            os._exit(0)
        return world.loss_fn(net)

    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    try:
        tl.Teleporter(model, optimizer, tl.find_symmetries(model, world.x)).step(loss_fn)
        raised = ""
    except Exception as error:
        raised = type(error).__name__
    return raised, all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def work(folder: Path, call: int = 0) -> None:
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=20 if call else 100))
    world = World(dist.get_rank(), dist.get_world_size())
    if call:
        torch.save(killed(world, call), folder / f"{world.rank}.pt")
        os._exit(0)  # what is left of the group would be waited for
    cases = {**AGREE, **{name: case for name, (case, *_) in REFUSED.items()}, **OTHERS}
    cases = cases if world.size == 2 else {name: AGREE[name] for name in FOUR}
    torch.save({name: case(world) for name, case in cases.items()}, folder / f"{world.rank}.pt")
    dist.destroy_process_group()


# --- the tests --------------------------------------------------------------------------------------------------------


def launch(folder: Path, size: int, *more: str) -> list[Any]:
    """What each of several processes found; None where it left nothing."""
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("torch is built without gloo")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    command = [*launcher, __file__, str(folder), *more]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    files = [folder / f"{rank}.pt" for rank in range(size)]
    return [torch.load(file, weights_only=False) if file.exists() else None for file in files]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, Any]]:
    """What each of two processes found."""
    return launch(tmp_path_factory.mktemp("ranks"), 2)


def test_four_processes_end_alike(tmp_path):
    first, *others = launch(tmp_path, 4)
    for name in FOUR:
        one = AGREE[name](World())
        assert all(rank[name]["facts"] == first[name]["facts"] == one["facts"] for rank in others), name
        for key, value in one["tensors"].items():
            assert all(torch.equal(rank[name]["tensors"][key], first[name]["tensors"][key]) for rank in others)
            assert (first[name]["tensors"][key] - value).norm() <= 1e-6 * value.norm(), (name, key)


@pytest.mark.parametrize(("size", "call"), [(2, 1), (2, 2), (4, 2)])
def test_a_rank_that_is_gone_ends_the_teleport_of_all(tmp_path, size, call):
    """Before the search, and when the model has moved already."""
    *rest, gone = launch(tmp_path, size, str(call))
    assert gone is None and rest == [("RankError", True)] * (size - 1)


@pytest.mark.parametrize("name", AGREE)
def test_all_ranks_go_where_one_process_goes_with_the_whole_batch(ranks, name):
    first, second = (rank[name] for rank in ranks)
    one = AGREE[name](World())
    assert first["facts"] == second["facts"] == one["facts"] and all(accepted for accepted, _ in one["facts"])
    assert len(one["facts"]) > 0 and torch.equal(first["numbers"], second["numbers"])
    assert torch.allclose(first["numbers"], one["numbers"], rtol=1e-6, atol=0)
    for key, value in one["tensors"].items():
        assert torch.equal(first["tensors"][key], second["tensors"][key]), key
        assert (first["tensors"][key] - value).norm() <= 1e-6 * value.norm(), key


@pytest.mark.parametrize("name", REFUSED)
def test_all_ranks_stay_where_they_were(ranks, name):
    for rank, expected in zip(ranks, REFUSED[name][1:], strict=True):
        assert rank[name].startswith(expected)


def test_a_plain_model_stays_local(ranks):
    start, alone = ranks[0]["alone"], ranks[1]["alone"]
    one = build()
    shard = World(1, 2)
    assert tl.teleport(one, shard.loss_fn).accepted and alone["facts"] == [(True, "")]
    for name, p in one.named_parameters():
        assert torch.equal(alone["tensors"][name], p) and torch.equal(
            start["tensors"][name], build().get_parameter(name)
        )


def test_symmetries_of_a_distributed_model_are_those_of_the_module_inside(ranks):
    for rank in ranks:
        wrapped, inner = rank["discovered"]
        assert wrapped == inner and "0.weight" in inner


def test_sharded_parameters_are_refused(ranks):
    for rank in ranks:
        assert len(rank["sharded"]) == 4
        for name, expected, got, remedy in rank["sharded"]:
            assert (
                name == "0.weight" and "whole tensor" in expected and "DTensor" in got and "before sharding" in remedy
            )


def test_one_process_alone_exchanges_nothing():
    alone = Ranks(nn.Linear(2, 1))
    with pytest.raises(StateError), alone.together():
        raise StateError("SGD", "entry", "this", "that", "remedy")
    assert alone.ask(False) == [] and alone.mean(len) is len
    alone.check_same(anything=object())
    assert issubclass(RankError, TeleportError) and issubclass(LossError, TeleportError)


if __name__ == "__main__":
    work(Path(sys.argv[1]), *map(int, sys.argv[2:]))
