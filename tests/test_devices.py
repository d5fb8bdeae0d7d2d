"""What the package does on a device other than the CPU: the same as there, or the same typed error."""

from __future__ import annotations

import copy
import functools
import gc
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import teleport_lite as tl
from teleport_lite.book import plot
from teleport_lite.errors import ParameterError, TeleportError
from teleport_lite.geometry import conserved_quantities, hessian_trace
from teleport_lite.groups.base import matrix_exp, spectral_norm
from teleport_lite.learned import LearnedOptimizer, State, Task
from teleport_lite.runtime import float32_in_full

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
from devices import RESULTS, measured
from simulated import USABLE, simulated

pytestmark = pytest.mark.skipif(not USABLE, reason="the device is simulated for torch 2.13 without an accelerator")


class Block(nn.Module):
    """A residual net."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(4, 3)
        self.a, self.b = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(6), nn.BatchNorm2d(4)])

    def forward(self, x):
        x = self.norms[0](self.stem(x)).relu()
        x = x + self.norms[2](self.b(self.norms[1](self.a(x)).relu()))
        return self.head(x.relu().mean((2, 3)))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.rnn, self.head = kind(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


class Tables(nn.Module):
    """Indices of several kinds, and a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(11, 6), nn.Parameter(torch.randn(5, 6))
        self.inner, self.outer = nn.Linear(6, 7), nn.Linear(7, 3)
        self.register_buffer("order", torch.tensor([4, 3, 2, 1, 0]))

    def forward(self, words):
        x = self.words(words) + self.places[torch.arange(words.shape[1], device=words.device)]
        x = self.inner(x).relu()[:, self.order[-words.shape[1] :] % words.shape[1]]
        x = torch.take_along_dim(x, words[..., None] % words.shape[1], 1)
        keep = (words > 2)[..., None]
        return self.outer(x.masked_fill(~keep, 0.0).sum(1) / (keep.sum(1) + 1))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.read, self.layer = nn.Linear(4, 8), nn.TransformerEncoderLayer(8, 2, 10, 0.0, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.layer(self.read(x)).mean(1))


class Mixed(nn.Module):
    """Weights in bfloat16, a norm in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.middle, self.outer = (nn.Linear(n, m).bfloat16() for n, m in ((4, 6), (6, 6), (6, 3)))
        self.norm = nn.LayerNorm(6)

    def forward(self, x):
        x = self.norm(self.inner(x.bfloat16()).float())
        return self.outer(self.middle(x.bfloat16()).relu()).float()


class Pipeline(nn.Module):
    """Layers on two devices, by hand."""

    def __init__(self, *parts: nn.Module, devices: tuple[str, ...] = ("cpu", "cpu")) -> None:
        super().__init__()
        self.parts, self.devices = nn.ModuleList(parts), devices
        self.scale = torch.ones(())  # neither parameter nor buffer

    def to(self, device: str):  # the last part stays on the CPU
        self.devices = (device, "cpu")
        self.parts[0].to(device)
        self.scale = self.scale.to(device)
        return self

    def forward(self, x):
        x = self.parts[0](x.to(self.devices[0])) * self.scale
        return self.parts[1](x.to(self.devices[1])).to(x.device)


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape)


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "mlp": lambda: (
        nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)),
        rows(6, 4),
    ),
    "linear maps": lambda: (nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), rows(6, 4)),
    "convnet": lambda: (
        nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU(),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(20, 3),
        ),
        rows(6, 1, 7, 7),
    ),
    "residual": lambda: (Block(), rows(6, 1, 6, 6)),
    "attention": lambda: (Attention(), rows(6, 5, 4)),
    "lstm": lambda: (Recurrent(nn.LSTM), rows(6, 3, 4)),
    "gru": lambda: (Recurrent(nn.GRU), rows(6, 3, 4)),
    "tables": lambda: (Tables(), torch.randint(0, 11, (6, 5))),
    "two devices": lambda: (
        Pipeline(
            nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.Linear(5, 4)),
            nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)),
        ),
        rows(6, 4),
    ),
    "mixed types": lambda: (Mixed(), rows(6, 4)),
    "bfloat16": lambda: (Attention().bfloat16(), rows(6, 5, 4).bfloat16()),
    "float16": lambda: (Attention().half(), rows(6, 5, 4).half()),
}  # fmt: skip
CASES_OF = tuple(MODELS)  # all of them
MODELS["gains"] = lambda: (
    nn.Sequential(
        nn.Linear(4, 8),
        nn.TransformerEncoderLayer(8, 2, 10, 0.0, batch_first=True, norm_first=True),
        nn.Flatten(),
        nn.Linear(40, 3),
    ),
    rows(6, 5, 4),
)
COARSE = {"mixed types": 0.2, "bfloat16": 0.2, "float16": 0.05}


class World:
    """A model, a batch and a symmetry, on one device."""

    def __init__(self, name: str, device: str, symmetry: tl.Product | None = None) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model, x = MODELS[name]()
            y = torch.randint(0, 3, (len(x),))
        self.name, self.device = name, device
        self.model, self.x, self.y = model.to(device), x.to(device), y.to(device)
        self.symmetry = symmetry or _found(name)

    def loss(self, net) -> Tensor:
        return F.cross_entropy(net(self.x).float(), self.y)

    def params(self) -> dict[str, Tensor]:
        return {n: p.detach() for n, p in self.model.named_parameters()}


@functools.cache
def _found(name: str) -> tl.Product:
    """The symmetries on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return tl.find_symmetries(*MODELS[name]())


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def numbers(report: tl.Report) -> list:
    return [report.accepted, report.loss_after, report.objective_before, report.objective_after]


def by_objective(objective: Any, **more: Any):
    return lambda w: numbers(tl.teleport(w.model, w.loss, w.symmetry, objective, radius=0.3, **more))


def train(kind: Callable, state: str):
    def face(w: World):
        optimizer = kind(w.model.parameters())
        teleporter = tl.Teleporter(w.model, optimizer, w.symmetry, every={1}, state=state, radius=0.3)
        for _ in range(3):
            optimizer.zero_grad()
            w.loss(w.model).backward()
            optimizer.step()
            teleporter.step(w.loss)
        return [w.loss(w.model), *numbers(teleporter.report)]

    return face


def discovered(w: World):
    found = _found(w.name) if w.device == "cpu" else tl.find_symmetries(w.model, w.x)
    return [sorted(map(repr, found)), found.dim]


def saved(w: World):
    found = tl.Product.from_dict(w.symmetry.to_dict())
    xi = found.sample(w.params(), radius=0.2, generator=seeded())
    return found.act(w.params(), xi), found.transport(w.params(), xi), found.inverse(xi)


FACES: dict[str, Callable[[World], Any]] = {
    "find_symmetries": discovered,
    "gradient_norm": by_objective("gradient_norm"),
    "gradient_norm down": by_objective("gradient_norm", maximize=False),
    "weight_norm": by_objective("weight_norm"),
    "one_step_loss": by_objective("one_step_loss"),
    "sharpness objective": by_objective(tl.objectives.sharpness([0.1], 2)),
    "curvature objective": by_objective(tl.objectives.curvature(2)),
    "hessian_trace objective": by_objective(tl.objectives.hessian_trace(1)),
    "own objective": by_objective(lambda params: next(iter(params.values())).float().abs().sum()),
    "at random": lambda w: numbers(
        tl.teleport(w.model, w.loss, w.symmetry, radius=0.3, search="random", generator=seeded())
    ),
    "SGD, transport": train(functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9), "transport"),
    "Adam, transport": train(functools.partial(torch.optim.Adam, lr=0.01), "transport"),
    "Adam, reset": train(functools.partial(torch.optim.Adam, lr=0.01), "reset"),
    "SGD, keep": train(functools.partial(torch.optim.SGD, lr=0.05), "keep"),
    "level_set_teleport": lambda w: numbers(tl.level_set_teleport(w.model, w.loss, steps=2)),
    "null_space_teleport": lambda w: numbers(tl.null_space_teleport(w.model, w.loss, steps=2)),
    "sharpness": lambda w: tl.sharpness(w.model, w.loss, radii=[0.1, 0.2], directions=3, generator=seeded()),
    "sharpness, by one": lambda w: tl.sharpness(
        w.model, w.loss, radii=[0.1], directions=2, generator=seeded(), chunk_size=1
    ),
    "curvature": lambda w: tl.curvature(w.model, w.symmetry, samples=3, generator=seeded()),
    "hessian_trace": lambda w: hessian_trace(w.model, w.loss, samples=2, generator=seeded()),
    "conserved": lambda w: conserved_quantities(w.params(), w.symmetry),
    "saved": saved,
}


def by_paper(w: World):
    net = nn.Sequential(w.model[0], nn.LeakyReLU(0.1), w.model[2], nn.LeakyReLU(0.1), w.model[4])
    report = tl.paper_teleport(net, lambda net: F.cross_entropy(net(w.x[:2]), w.y[:2]), steps=2, lr=1e-4)
    return [report.accepted, report.objective_after]


def on_one_batch(w: World):
    net = nn.Sequential(w.model[0], nn.Tanh(), w.model[2])
    symmetry = tl.minibatch_symmetries(net, w.x[:3])
    report = tl.teleport(net, lambda net: net(w.x[:3]).square().mean(), symmetry, radius=0.1)
    return [report.accepted, report.objective_after, tl.curvature(net, symmetry, samples=2, generator=seeded())]


def learned(teleports: str):
    def face(w: World):
        names = {"0.weight": (6, 4), "2.weight": (5, 6)}
        draw = seeded()
        params = {n: torch.rand(3, *shape, generator=draw).to(w.device) for n, shape in names.items()}

        def loss(p, x):
            return ((x @ p["0.weight"].mT).relu() @ p["2.weight"].mT).square().mean()

        symmetry = tl.Product([tl.symmetries.scaling(6, "0.weight", "2.weight")])
        one = {n: p[0] for n, p in params.items()}
        optimizer = LearnedOptimizer(one, symmetry, hidden=4, teleports=teleports)
        for p in optimizer.parameters():
            p.data.copy_(0.3 * torch.randn(p.shape, generator=draw))
        task, data = Task(loss, lambda generator: (params, w.x), symmetry), w.x.expand(3, -1, -1)
        return optimizer.to(w.device).step(task, params, data, State(), seeded())[:2]

    return face


def drawn(w: World):
    weight = next(w.model.parameters()).detach()
    return plot.level_sets(
        Figure().subplots(), lambda z: (z.to(weight) @ weight[:2, :2]).sum(-1), (-1, 1), (-1, 1)
    ).levels


OF_MLP = {
    "paper_teleport": by_paper,
    "mini-batch": on_one_batch,
    "learned optimizer": learned("learned"),
    "learned optimizer, random": learned("random"),
    "level sets": drawn,
}
FACES |= OF_MLP
LONG = [name for name in FACES if name.endswith("objective") or name == "one_step_loss"]  # ascents
LONG_ON = ("mlp", "linear maps", "attention", "tables", "two devices")
CASES = [(m, f) for m in CASES_OF for f in FACES if (m == "mlp" or f not in OF_MLP) and (m in LONG_ON or f not in LONG)]


def outcome(face: Callable[[World], Any], world: World) -> Any:
    """What comes out, on the CPU; of a typed error what it is about."""
    try:
        found = face(world)
    except TeleportError as error:
        return type(error).__name__
    return tree_map(lambda t: t.detach().cpu() if isinstance(t, Tensor) else t, found)


def close(got: Any, expected: Any, tol: float) -> None:
    for a, b in zip(tree_leaves(got), tree_leaves(expected), strict=True):
        assert a == b if isinstance(b, str) else torch.allclose(*map(torch.as_tensor, (a, b)), tol, tol), (
            got,
            expected,
        )


@pytest.fixture(autouse=True)
def short_searches(monkeypatch):
    monkeypatch.setattr(sys.modules["teleport_lite.search.ascent"], "STEPS", 2)
    monkeypatch.setattr(sys.modules["teleport_lite.search.closed_form"], "SWEEPS_DOWN", 5)


@pytest.mark.parametrize(("name", "face"), CASES)
def test_the_device_gives_what_the_cpu_gives(name, face):
    expected = outcome(FACES[face], World(name, "cpu"))
    with simulated():
        got = outcome(FACES[face], World(name, "sim"))
    tol = COARSE.get(name, 2e-3)
    for a, b in zip(tree_leaves(got), tree_leaves(expected), strict=True):
        assert a == b if isinstance(b, str) else torch.allclose(*map(torch.as_tensor, (a, b)), tol, tol), (
            got,
            expected,
        )


# -- precision


def trained(name: str, device: str) -> World:
    """A model after some steps, in float32, for TF32 shows nothing at its initial values."""
    world = World(name, device)
    optimizer = torch.optim.Adam(world.model.parameters(), 0.03)
    for _ in range(10):
        optimizer.zero_grad()
        world.loss(world.model).backward()
        optimizer.step()
    return world


@pytest.fixture
def precision():
    """All that says how float32 products are computed, set back afterwards."""
    flags = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    places = [torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn, torch.backends]
    found = [place.fp32_precision for place in places]
    yield lambda: [place.fp32_precision for place in places[:3]]
    torch.set_float32_matmul_precision(flags[0])
    torch.backends.cudnn.allow_tf32 = flags[1]
    for place, value in zip(places, found, strict=True):
        place.fp32_precision = value


ALLOW = {  # TF32
    "as it is": lambda: None,
    "by precision": lambda: torch.set_float32_matmul_precision("high"),
    "by flag": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    "by operation": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "for all": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
}


@pytest.mark.parametrize(
    ("name", "how"),
    [*((m, "by precision") for m in ("mlp", "residual", "attention")), *(("convnet", how) for how in ALLOW)],
)
def test_tf32_refuses_no_teleport(name, how, precision):
    """It is left out of what is compared, and on again afterwards."""
    ALLOW[how]()
    before = precision()
    with simulated(tf32=True):
        world = trained(name, "sim")
        with torch.no_grad():
            coarse = world.model(world.x)
            with float32_in_full():
                exact = world.model(world.x)
        assert not torch.equal(coarse, exact)
        for k in range(12):
            report = tl.teleport(world.model, world.loss, world.symmetry, radius=0.2, maximize=k % 2 == 0)
            assert report.accepted, report.reason
    assert precision() == before


@pytest.mark.parametrize(("name", "face"), [(m, f) for m, f in CASES if m == "linear maps" or f == "weight_norm"])
def test_a_device_without_float64(name, face):
    expected = outcome(FACES[face], World(name, "cpu"))
    with simulated(float64=False):
        close(outcome(FACES[face], World(name, "sim")), expected, COARSE.get(name, 5e-3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["mlp", "attention"])
def test_autocast(name, dtype):
    """The loss is computed as under autocast, and compared within its tolerance."""
    with simulated():
        world = World(name, "sim")

        def loss(net):
            with torch.autocast("sim", dtype):
                out = net(world.x)
            assert out.dtype == dtype
            return F.cross_entropy(out.float(), world.y)

        for objective in ("gradient_norm", "weight_norm"):
            report = tl.teleport(world.model, loss, world.symmetry, objective, radius=0.3)
            assert report.accepted, report.reason


@pytest.mark.parametrize("device", ["cpu", "sim"])
def test_small_gradients_under_float16_autocast(device):
    """They are no multiples of the smallest number of float16, about 6e-8."""
    with simulated():
        world, found = World("mlp", device), []

        def loss(net):
            return 1e-6 * F.cross_entropy(net(world.x).float(), world.y)

        for on in (False, True):
            with torch.autocast(device, torch.float16, enabled=on):
                report = tl.teleport(copy.deepcopy(world.model), loss, world.symmetry, radius=0.3)
            assert report.accepted, report.reason
            found.append([report.objective_before, report.objective_after])
        assert torch.allclose(*map(torch.tensor, found), rtol=0.02, atol=0)


# -- what is left as it was


@pytest.mark.parametrize("name", ["tables", "lstm"])
def test_sums_in_another_order_lose_no_symmetry(name):
    with simulated(atomics=True):
        assert discovered(World(name, "sim"))[1] == _found(name).dim


def test_random_states_stay():
    with simulated() as device:
        world = World("mlp", "sim")
        before, on_cpu = device.generator.get_state(), torch.get_rng_state()
        for face in ("find_symmetries", "gradient_norm", "sharpness", "Adam, transport"):
            FACES[face](world)
        assert torch.equal(device.generator.get_state(), before) and torch.equal(torch.get_rng_state(), on_cpu)


def test_the_default_device(monkeypatch):
    expected = outcome(discovered, World("tables", "cpu")), outcome(FACES["gradient_norm"], World("mlp", "cpu"))
    with simulated():
        worlds = World("tables", "sim"), World("mlp", "sim")
        torch.set_default_device("sim")
        try:
            got = outcome(discovered, worlds[0]), outcome(FACES["gradient_norm"], worlds[1])
        finally:
            torch.set_default_device(None)
    close(got, expected, 2e-3)


def test_a_model_without_data_is_refused():
    with torch.device("meta"):
        model, x = MODELS["mlp"]()
    for call in (
        lambda: tl.find_symmetries(model, x),
        lambda: tl.teleport(model, lambda net: net(x).sum(), _found("mlp")),
        lambda: tl.sharpness(model, lambda net: net(x).sum()),
    ):
        with pytest.raises(ParameterError, match="on the meta device"):
            call()


# -- cost

WAITS = {  # of the host, for a teleport: one, and one more for each kind of mixing; an ascent over mixings, each step
    ("mlp", "gradient_norm"): 1,
    ("mlp", "gradient_norm down"): 1,
    ("mlp", "weight_norm"): 1,
    ("mlp", "one_step_loss"): 1,
    ("mlp", "curvature objective"): 1,
    ("mlp", "hessian_trace objective"): 1,
    ("mlp", "at random"): 1,
    ("mlp", "sharpness objective"): 2,  # one to learn whether vmap can run the model
    ("mlp", "sharpness"): 1,
    ("mlp", "curvature"): 0,
    ("mlp", "hessian_trace"): 0,
    ("convnet", "gradient_norm"): 1,
    ("convnet", "one_step_loss"): 1,
    ("residual", "gradient_norm"): 1,
    ("linear maps", "gradient_norm"): 2,
    ("linear maps", "gradient_norm down"): 2,
    ("linear maps", "one_step_loss"): 1 + 2,
    ("attention", "gradient_norm"): 3,
    ("attention", "weight_norm"): 3,
    ("attention", "one_step_loss"): 1 + 2,
    ("attention", "curvature"): 0,
    ("attention", "at random"): 1,
}


@pytest.mark.parametrize(("name", "face"), WAITS)
def test_waits_of_the_host(name, face):
    with simulated() as device:
        world = World(name, "sim")
        tl.teleport(world.model, world.loss, world.symmetry, radius=0.1)
        device.waits.clear()
        FACES[face](world)
        assert device.waits.total() == WAITS[name, face], device.waits


@pytest.mark.parametrize(("face", "sweeps"), [("gradient_norm", 4), ("weight_norm", 5)])
def test_waits_where_mixings_meet_other_factors(face, sweeps):
    """Behind a norm with gain, whose entries are scaled: two mixings, one wait for each in each sweep, and the last."""
    with simulated() as device:
        world = World("gains", "sim")
        tl.teleport(world.model, world.loss, world.symmetry, radius=0.1)
        device.waits.clear()
        FACES[face](world)
        assert device.waits.total() == 2 * sweeps + 1, device.waits


@pytest.mark.parametrize(("name", "waits"), [("mlp", 1), ("attention", 3)])
def test_waits_of_a_teleporter(name, waits):
    with simulated() as device:
        world = World(name, "sim")
        optimizer = torch.optim.Adam(world.model.parameters())
        world.loss(world.model).backward()
        optimizer.step()
        teleporter = tl.Teleporter(world.model, optimizer, world.symmetry, every=1)
        teleporter.step(world.loss)
        device.waits.clear()
        assert teleporter.step(world.loss).accepted
        assert device.waits.total() == waits, device.waits


class Deep(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        if kind == "mlp":
            layers = [layer for _ in range(6) for layer in (nn.Linear(64, 64), nn.ReLU())]
        else:
            layers = [nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True) for _ in range(2)]
        self.body, self.head = nn.Sequential(*layers), nn.Linear(64 if kind == "mlp" else 32, 3)

    def forward(self, x):
        x = self.body(x)
        return self.head(x if x.ndim == 2 else x.mean(1))


@pytest.mark.parametrize("kind", ["mlp", "transformer"])
def test_peak_memory(kind):
    """In bytes of the parameters, beyond what was in use and what a gradient keeps for itself."""
    torch.manual_seed(0)
    model, x, y = Deep(kind), torch.randn(2, *([64] if kind == "mlp" else [3, 32])), torch.tensor([0, 1])
    symmetry = tl.find_symmetries(model, x)
    with simulated() as device:
        model, x, y = model.to("sim"), x.to("sim"), y.to("sim")
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        optimizer = torch.optim.Adam(model.parameters(), 1e-4)

        def loss(net):
            return F.cross_entropy(net(x), y)

        def peak(call: Callable) -> float:
            gc.collect()
            before = device.used()
            call()
            return (device.peak() - before) / size

        activations = peak(lambda: loss(model).backward()) - 1
        optimizer.step()
        optimizer.zero_grad()
        teleporter = tl.Teleporter(model, optimizer, symmetry, every=1, radius=0.2)
        assert peak(lambda: tl.find_symmetries(model, x)) == 0
        for goal in ("gradient_norm", "weight_norm"):
            for _ in range(2):  # at first the gradient at the new point is computed, too
                assert peak(lambda: tl.teleport(model, loss, symmetry, goal, radius=0.1)) < 3  # noqa: B023
        for _ in range(2):
            assert peak(lambda: teleporter.step(loss)) < 4.01 + activations
        chunks = [
            peak(lambda: tl.sharpness(model, loss, radii=[0.1], directions=8, chunk_size=k))  # noqa: B023
            for k in (1, 2, 8)
        ]
        assert chunks[0] < 2.1 and chunks[1] < chunks[2] / 3
        few, many = (peak(lambda: hessian_trace(model, loss, samples=n)) for n in (2, 6))  # noqa: B023
        assert many < 1.1 * few


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [0.0, 1e-3, 1.0, 30.0])
def test_matrix_functions_without_waiting(size, dtype):
    x = torch.randn(3, 5, 5, dtype=dtype)
    x = size * x / torch.linalg.matrix_norm(x, 2)[:, None, None]
    with simulated() as device:
        there = x.to("sim").requires_grad_()
        device.waits.clear()
        element, norm = matrix_exp(there), spectral_norm(there)
        slope = torch.autograd.grad(element.sum(), there)[0]
        assert device.waits.total() == 0
        found = [t.detach().cpu() for t in (element, norm, slope)]
    x.requires_grad_()
    element = torch.linalg.matrix_exp(x)
    expected = [element, torch.linalg.matrix_norm(x, 2), torch.autograd.grad(element.sum(), x)[0]]
    for a, b in zip(found, expected, strict=True):
        rounding = (100 + 5 * size) * torch.finfo(dtype).eps  # grows with the norm, as the condition of the exponential
        assert (a - b).abs().max() <= rounding * b.abs().max() + 8 * torch.finfo(dtype).tiny


KERNELS = {  # at most, in those of a gradient
    ("mlp", "gradient_norm"): 20,
    ("mlp", "weight_norm"): 45,
    ("mlp", "curvature"): 8,
    ("residual", "gradient_norm"): 10,
    ("linear maps", "gradient_norm"): 15,
    ("linear maps", "curvature"): 26,
    ("attention", "gradient_norm"): 12,
    ("attention", "curvature"): 31,  # sixteen groups
}


@pytest.mark.parametrize(("name", "face"), KERNELS)
def test_kernels(name, face):
    with simulated() as device:
        world = World(name, "sim")
        tl.teleport(world.model, world.loss, world.symmetry, radius=0.1)
        device.operators.clear()
        world.loss(world.model).backward()
        one = device.operators.total()
        device.operators.clear()
        FACES[face](world)
        assert device.operators.total() <= KERNELS[name, face] * one


def test_elements_of_many_layers_are_made_together():
    """Four mixings need the exponential of one."""
    group, many = tl.symmetries.mixing(4, "a", "b"), [tl.symmetries.mixing(4, f"{k}a", f"{k}b") for k in range(4)]
    with simulated() as device:
        counts = []
        for factors in ([group], many):
            product = tl.Product(factors)
            params = {name: torch.ones(4, 4, device="sim") for name in product.names}
            xi = product.zeros(params)
            device.operators.clear()
            product.act(params, xi)
            counts.append({name: device.operators[name] for name in ("baddbmm", "exp2", "where")})
        assert counts[0] == counts[1]


def test_the_record_says_what_is_counted(monkeypatch):
    """That of the CPU; a GPU's is what it measured."""
    monkeypatch.undo()  # searches run to their end here
    record = json.loads((RESULTS / "cpu.json").read_text("utf8"))
    rows = [row for row in record["rows"] if row["model"] == "MLP"]
    found = measured("MLP", 0, "float32", timed=False)
    assert [{**row, "time": None} for row in rows] == [{**row, "time": None} for row in found]


def test_the_page_says_what_these_tests_say():
    root = Path(__file__).parent
    page = (root.parent / "book/reference/devices.md").read_text("utf8")
    there = "".join(path.read_text("utf8") for path in root.glob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", page):
        assert f"def {name}(" in there, name
    counted = {key: waits for key, waits in WAITS.items() if waits != 1}  # "every other call waits once"
    for row in json.loads((RESULTS / "cpu.json").read_text("utf8"))["rows"]:
        if row["model"] == "transformer" and row["call"] in ("gradient_norm", "weight_norm"):
            counted["transformer", row["call"]] = row["waits"]
    rows = [f"| {name} | {face} | {waits} |" for (name, face), waits in counted.items()]
    assert re.findall(r"^\| [\w ]+ \| [\w ]+ \| \d+ \|$", page, re.M) == rows


# -- the device itself


def test_the_simulated_device(precision):
    """It refuses what a device refuses, gives what the CPU gives, and counts."""
    x, w, at = torch.randn(3, 4), torch.randn(2, 4), torch.tensor([0, 2])
    with simulated() as device:
        dx, dw = x.to("sim"), w.to("sim")
        for call in (
            lambda: dx + x,
            lambda: x.add_(dx),
            lambda: F.linear(dx, w),
            lambda: torch.stack([dx.sum(), x.sum()]),
            lambda: torch.where(x > 0, dx, dx),
            lambda: dx.index_select(0, at),
            lambda: torch.func.vmap(torch.dot)(dx, x),
            lambda: torch.randn(2, device="sim", generator=torch.Generator()),
        ):
            with pytest.raises(RuntimeError, match="Expected"):
                call()
        for call, expected, waits in (
            (lambda: dx * torch.tensor(2.0) @ dw.mT, 2 * x @ w.mT, 0),
            (lambda: dx[at], x[at], 1),
            (lambda: dx[dx > 0], x[x > 0], 1),
            (lambda: torch.func.vmap(torch.func.grad(lambda a: (a**3).sum()))(dx), 3 * x**2, 0),
            (lambda: torch.func.hessian(lambda a: (a**3).sum())(dx[0]), torch.diag(6 * x[0]), 0),
            (lambda: torch.linalg.eigh(dx @ dx.mT)[0], torch.linalg.eigh(x @ x.mT)[0], 1),
            (lambda: dx.cpu(), x, 1),
            (lambda: x.to("sim", non_blocking=True), x, 0),
            (lambda: dx.sum().item(), x.sum(), 1),
        ):
            device.waits.clear()
            found = call()
            assert device.waits.total() == waits
            close([found.cpu() if isinstance(found, Tensor) else found], [expected], 1e-5)
        assert device.operators["_linalg_eigh"] == 1
        a, b = (torch.Generator("sim").manual_seed(3) for _ in range(2))
        first = torch.randn(3, device="sim", generator=a)
        assert torch.equal(first, torch.randn(3, device="sim", generator=b))
        assert not torch.equal(first.cpu(), torch.randn(3, generator=torch.Generator().manual_seed(3)))
        before = device.used()
        y = torch.zeros(1000, device="sim").view(10, 100) + 1
        assert (device.peak() - before, y.numel()) == (8000, 1000)
    big = torch.randn(64, 64)
    for how in ("ieee", "tf32"):
        torch.backends.cuda.matmul.fp32_precision = how
        with simulated(tf32=True):
            gap = float(((big.to("sim") @ big.to("sim")).cpu() - big @ big).norm() / (big @ big).norm())
        assert 1e-5 < gap < 1e-3 if how == "tf32" else gap < 1e-6
    with simulated(float64=False), pytest.raises(TypeError, match="float64"):
        x.to("sim").double()
