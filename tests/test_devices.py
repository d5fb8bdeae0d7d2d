"""What the package does on a device other than the CPU: the same as there, or the same typed error."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from simulated import needs_device, simulated
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import teleport_lite as tl
from teleport_lite.errors import TeleportError
from teleport_lite.geometry import conserved_quantities, hessian_trace

pytestmark = needs_device


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
COARSE = {"mixed types": 0.2, "bfloat16": 0.2, "float16": 0.05}


class World:
    """A model, a batch and a symmetry, on one device."""

    def __init__(self, name: str, device: str, symmetry: tl.Product | None = None) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model, x = MODELS[name]()
            y = torch.randint(0, 3, (len(x),))
        self.device, self.model, self.x, self.y = device, model.to(device), x.to(device), y.to(device)
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
    found = tl.find_symmetries(w.model, w.x)
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


def outcome(face: Callable[[World], Any], world: World) -> Any:
    """What comes out, on the CPU; of a typed error what it is about."""
    try:
        found = face(world)
    except TeleportError as error:
        return type(error).__name__
    return tree_map(lambda t: t.detach().cpu() if isinstance(t, Tensor) else t, found)


@pytest.fixture(autouse=True)
def short_searches(monkeypatch):
    monkeypatch.setattr(sys.modules["teleport_lite.search.ascent"], "STEPS", 4)
    monkeypatch.setattr(sys.modules["teleport_lite.search.closed_form"], "SWEEPS_DOWN", 5)


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("name", MODELS)
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
