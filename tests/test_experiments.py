"""The experiments run, and train an ensemble as a plain loop would train each network."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

EXPERIMENTS = Path(__file__).resolve().parent.parent / "experiments"
sys.path.insert(0, str(EXPERIMENTS))
from datasets import SETTINGS  # noqa: E402
from ensemble import RULES, SLOPE, Ensemble, evaluate  # noqa: E402

OPTIMIZERS = {
    "sgd": torch.optim.SGD,
    "momentum": lambda params, lr: torch.optim.SGD(params, lr=lr, momentum=0.9),
    "adagrad": torch.optim.Adagrad,
    "rmsprop": torch.optim.RMSprop,
    "adam": torch.optim.Adam,
}


def test_every_rule_has_its_counterpart():
    assert OPTIMIZERS.keys() == RULES.keys()


@pytest.mark.parametrize("optimizer", RULES)
def test_the_ensemble_trains_as_a_loop_does(optimizer):
    torch.manual_seed(0)
    nets = [
        nn.Sequential(nn.Linear(12, 7, bias=False), nn.LeakyReLU(SLOPE), nn.Linear(7, 5, bias=False)).double()
        for _ in range(3)
    ]
    rates = torch.tensor([0.005, 0.01, 0.02], dtype=torch.float64)
    loops = [OPTIMIZERS[optimizer](net.parameters(), lr=float(lr)) for net, lr in zip(nets, rates, strict=True)]
    ensemble = Ensemble([torch.stack([net[k].weight.detach() for net in nets]) for k in (0, 2)], rates, optimizer)
    batches = [(torch.randn(8, 12, dtype=torch.float64), torch.randint(5, (8,))) for _ in range(30)]
    for step, (x, y) in enumerate(batches):
        if step == 20:  # the second member starts anew
            loops[1] = OPTIMIZERS[optimizer](nets[1].parameters(), lr=float(rates[1]))
            ensemble.reset(slice(1, 2))
        losses = ensemble.step(x, y)
        for m, (net, loop) in enumerate(zip(nets, loops, strict=True)):
            loop.zero_grad()
            loss = nn.functional.cross_entropy(net(x), y)
            loss.backward()
            loop.step()
            assert float(losses[m]) == pytest.approx(float(loss.detach()), abs=1e-9)
    for m, net in enumerate(nets):
        assert torch.allclose(ensemble.weights[0][m], net[0].weight, atol=1e-7)
        assert torch.allclose(ensemble.weights[1][m], net[2].weight, atol=1e-7)
    x, y = batches[0]
    loss, accuracy = evaluate(ensemble.weights, x, y, chunk=3)
    for m, net in enumerate(nets):
        logits = net(x).detach()
        assert float(loss[m]) == pytest.approx(float(nn.functional.cross_entropy(logits, y)), abs=1e-6)
        assert float(accuracy[m]) == pytest.approx(float((logits.argmax(1) == y).float().mean()))


def test_the_mnist_experiment_runs_and_resumes(tmp_path):
    out = tmp_path / "results.json"
    command = [sys.executable, str(EXPERIMENTS / "mnist_teleport.py"), "--quick", "--out", str(out)]
    subprocess.run([*command, "--network", "784-16-10-10"], check=True, capture_output=True)
    first = json.loads(out.read_text())
    (run,) = first["784-16-10-10"]["runs"]
    assert [len(run["test_loss"]), len(run["test_loss"][0]), len(run["test_loss"][0][0])] == [5, 8, 2]
    start = [rates[0][0] for rates in run["test_loss"]]
    assert max(start) - min(start) < 1e-4  # every arm begins at the same function
    subprocess.run([*command, "--network", "784-16-10-10"], check=True, capture_output=True)
    assert json.loads(out.read_text()) == first


@pytest.mark.parametrize("name", ["optimizers", "sgd_search", "minima"])
def test_the_other_experiments_run_and_resume(name, tmp_path):
    out = tmp_path / "results.json"
    command = [sys.executable, str(EXPERIMENTS / f"{name}.py"), "--quick", "--out", str(out)]
    if name == "optimizers":
        command += ["--optimizer", "adam", "--optimizer", "sgd"]
    subprocess.run(command, check=True, capture_output=True)
    first = json.loads(out.read_text())
    assert first["runs"] and first["config"]["data"] == "synthetic"
    for run in first["runs"]:
        losses = np.array(run["test_loss"], float)  # ..., epochs: before anything, and after it
        start = losses[:, :2].T if name == "minima" else losses.reshape(-1, losses.shape[-1])[:, 0]
        assert np.ptp(start, axis=0).max() < 1e-4 and (losses[..., -1] != losses[..., 0]).any()
        diverges = name == "minima" and run["arm"].startswith("published")  # nothing stops those from untrained weights
        assert diverges or np.isfinite(losses).all()
    last = first["runs"][-1]
    first["runs"] = [] if name == "minima" else first["runs"][:-1]  # it saves the arms of a seed together
    out.write_text(json.dumps(first))
    subprocess.run(command, check=True, capture_output=True)
    again = json.loads(out.read_text())["runs"]
    same = ("arm", "seed", "test_loss")
    assert {k: again[-1][k] for k in same if k in last} == {k: last[k] for k in same if k in last}


def test_the_learned_optimizers_run_and_resume(tmp_path):
    out = tmp_path / "results.json"
    command = [sys.executable, str(EXPERIMENTS / "learned.py"), "--quick", "--out", str(out)]
    command += ["--arm", "LSTM(lr, tele)", "--arm", "coordinatewise(update, exact tele)"]
    subprocess.run(command, check=True, capture_output=True)
    first = json.loads(out.read_text())
    assert {run["arm"] for run in first["runs"]} >= {"GD", "LSTM(lr, tele)", "coordinatewise(update, exact tele)"}
    last = first["runs"].pop()
    out.write_text(json.dumps(first))
    subprocess.run(command, check=True, capture_output=True)
    again = json.loads(out.read_text())["runs"]
    assert len(again) == len(first["runs"]) + 1
    losses = [[run["test"][s]["loss"] for s in run["test"]] for run in (again[-1], last)]
    assert losses[0] == losses[1]


def test_the_architectures_train_and_resume(tmp_path):
    out = tmp_path / "results.json"
    command = [sys.executable, str(EXPERIMENTS / "architectures.py"), "--quick", "--out", str(out)]
    subprocess.run(command, check=True, capture_output=True)
    first = json.loads(out.read_text())
    assert {name: net["dimension"] for name, net in first["networks"].items()} == {"convnet": 54, "transformer": 400}
    assert len(first["runs"]) == 2 * len(first["config"]["arms"])
    for run in first["runs"]:
        (train,), (start, end) = run["train_loss"], run["test_loss"]  # one epoch
        assert start == pytest.approx(2.3, abs=0.2) and train < start + 0.1 and 0 < end < start + 0.1
        moved = run["teleports"]
        assert len(moved) == (0 if run["arm"] in ("plain", "reset") else 1)
        assert all(move["accepted"] and move["invariance_error"] < 1e-5 for move in moved)
        assert all(move["gain"] < 1 if run["arm"] == "balance" else move["gain"] > 1 for move in moved)
    by_arm = {(run["network"], run["arm"]): run for run in first["runs"]}
    for network in first["networks"]:
        plain, reset = by_arm[network, "plain"], by_arm[network, "reset"]
        assert plain["test_loss"][0] == reset["test_loss"][0] and plain["train_loss"] != reset["train_loss"]
    last = first["runs"].pop()
    out.write_text(json.dumps(first))
    subprocess.run(command, check=True, capture_output=True)
    again = json.loads(out.read_text())["runs"]
    assert again[:-1] == first["runs"] and again[-1]["test_loss"] == last["test_loss"]


def test_measures_of_generalization(tmp_path):
    out = tmp_path / "results.json"
    command = [sys.executable, str(EXPERIMENTS / "generalization.py"), "--quick", "--out", str(out)]
    subprocess.run(command, check=True, capture_output=True)
    found = json.loads(out.read_text())["networks"]
    assert all(len(values) == 3 and torch.tensor(values).isfinite().all() for values in found.values())
    loss, around = (torch.tensor(found[name]) for name in ("train_loss", "sharpness_isotropic"))
    assert (around - loss).abs().max() < 0.1 and (around != loss).all()
    recorded = json.loads(out.read_text())
    for name in ("curvature_published", "weight_norm", "test_loss"):  # what is missing is added, from the kept weights
        del recorded["networks"][name]
    out.write_text(json.dumps(recorded))
    subprocess.run(command, check=True, capture_output=True)
    assert json.loads(out.read_text())["networks"] == found


@pytest.fixture
def three_networks():
    """Of widths 7-6-5-4, stacked, in float64; inputs and labels of nine samples."""
    draw = torch.Generator().manual_seed(0)
    shapes = ((6, 7), (5, 6), (4, 5))
    weights = [torch.randn(3, *shape, generator=draw, dtype=torch.float64) / 2 for shape in shapes]
    x = torch.randn(9, 7, generator=draw, dtype=torch.float64)
    return weights, x, torch.randint(4, (9,), generator=draw)


def one_loss(vector, weights, x, y):
    """The loss of one network, from all its weights in one vector; written without the code of the experiments."""
    parts = vector.split([w[0].numel() for w in weights])
    h = x
    for k, (part, w) in enumerate(zip(parts, weights, strict=True)):
        h = h @ part.view(w[0].shape).T
        h = torch.where(h > 0, h, SLOPE * h) if k < len(weights) - 1 else h
    return nn.functional.cross_entropy(h, y)


def test_the_exact_trace_is_that_of_the_whole_hessian(three_networks):
    weights, x, y = three_networks
    found = importlib.import_module("generalization").hessian_trace(weights, x)
    for m in range(3):
        vector = torch.cat([w[m].flatten() for w in weights])
        dense = torch.autograd.functional.hessian(lambda v: one_loss(v, weights, x, y), vector)
        assert float(found[m]) == pytest.approx(float(dense.trace()), rel=1e-10)


def test_losses_around_are_those_of_the_moved_weights(three_networks):
    weights, x, y = three_networks
    script, draw = importlib.import_module("generalization"), torch.Generator().manual_seed(1)
    for kind in (torch.randn, torch.rand):
        way = script.unit(weights, kind, draw)
        assert torch.allclose(sum(d.flatten(1).square().sum(1) for d in way), torch.ones(3, dtype=torch.float64))
        for way_used in (way, script.relative(weights, way)):
            found = script.around(weights, way_used, x, y, [0.0, 0.7])
            for m in range(3):
                moved = torch.cat([(w + 0.7 * d)[m].flatten() for w, d in zip(weights, way_used, strict=True)])
                assert float(found[1, m]) == pytest.approx(float(one_loss(moved, weights, x, y)), rel=1e-12)


def test_the_published_curvature_is_that_of_the_added_up_curves(three_networks, monkeypatch):
    """Against forward differentiation of the mixings of each pair, added up: not one formula is shared."""
    weights, x, _ = three_networks
    script = importlib.import_module("generalization")
    monkeypatch.setattr(script, "BATCH_SIZE", len(x))
    data = type("Data", (), {"batch": lambda self, size, generator: (x, None)})()
    found, draw, total = script.published_curvature(weights, data, 2), torch.Generator().manual_seed(7), 0
    for _ in range(2):
        elements = [torch.rand(n, n, generator=draw).double() for n in (6, 5)]
        elements = [m / m.norm() for m in elements]
        kappas = []
        for m in range(3):
            v, u, top = (w[m] for w in weights)

            def curve(t, v=v, u=u, top=top, elements=elements):
                invert = lambda a: torch.where(a > 0, a, a / SLOPE)  # noqa: E731
                act = lambda h: torch.where(h > 0, h, SLOPE * h)  # noqa: E731
                hidden = act(x @ v.T)
                ends = []
                for inputs, low, high, e in ((x, v, u, elements[0]), (hidden, u, top, elements[1])):
                    a, g = act(inputs @ low.T), torch.linalg.matrix_exp(t * e)
                    change = torch.linalg.pinv(inputs) @ (invert(a @ g.T) - inputs @ low.T)
                    ends.append((low + change.T, high @ torch.linalg.matrix_exp(-t * e)))
                (v1, u1), (u2, top2) = ends
                return torch.cat([v1.flatten(), (u1 + u2 - u).flatten(), top2.flatten()])

            zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
            slope = lambda t, curve=curve, one=one: torch.func.jvp(curve, (t,), (one,))[1]  # noqa: E731
            first, second = torch.func.jvp(slope, (zero,), (one,))
            speed = first @ first
            kappas.append((speed * (second @ second) - (first @ second) ** 2).sqrt() / speed**1.5)
        total = total + torch.stack(kappas) / 2
    assert torch.allclose(found, total, rtol=1e-7)


def test_published_moves(three_networks, monkeypatch):
    """The identity stays where it is when there are more samples than neurons, and the moves climb what they should."""
    weights, x, y = three_networks
    script = importlib.import_module("minima")
    monkeypatch.setattr(script, "CAP", math.inf)
    own = [w[0] for w in weights]
    h = x @ own[0].T
    still = script.mixed(own, h, torch.where(h > 0, h, SLOPE * h), [torch.zeros(n, n).double() for n in (6, 5)])
    assert all(torch.allclose(a, b) for a, b in zip(still, own, strict=True))

    def mean_around(point):
        draw, values = torch.Generator().manual_seed(5), []
        for _ in range(20):
            way = script.unit([w[None] for w in point], torch.rand, draw)
            for t in script.PUBLISHED_RADII:
                moved = torch.cat([(w + t * d[0]).flatten() for w, d in zip(point, way, strict=True)])
                values.append(one_loss(moved, weights, x, y))
        return torch.stack(values).mean()

    ends = [script.sharpness_round(own, x, y, 3, lr, torch.Generator().manual_seed(0))[0] for lr in (-0.05, 0.05)]
    assert mean_around(ends[0]) < mean_around(own) < mean_around(ends[1])


@pytest.mark.parametrize("data", [name for name in SETTINGS if name != "mnist"])
@pytest.mark.parametrize("name", ["mnist_teleport", "optimizers", "sgd_search", "minima", "generalization"])
def test_the_experiments_run_on_other_data(name, data, tmp_path, monkeypatch):
    script, setting, few = importlib.import_module(name), SETTINGS[data], []
    if name == "mnist_teleport":
        few = ["--network", "-".join(map(str, setting.training))]
    elif name == "optimizers":
        few = ["--optimizer", "adam", "--arm", "plain", "--arm", "teleport"]
    out = tmp_path / "results.json"
    monkeypatch.setattr(sys, "argv", [name, "--data", data, "--quick", "--out", str(out), *few])
    script.main()
    found = json.loads(out.read_text())
    config = found[few[1]]["config"] if name == "mnist_teleport" else found["config"]
    at_minima = name in ("minima", "generalization")
    assert config["widths"] == list(setting.minima if at_minima else setting.training)
    assert config.get("rate", 0.01 * setting.speed) == 0.01 * setting.speed
    assert ("images_from" in config) == (data == "cifar10") or name not in ("minima", "generalization")
    if name == "generalization":
        assert [round(t, 4) for t in config["radii"]] == [round(0.0001 + 0.001 * k, 4) for k in range(20)]


def test_records_of_other_data_have_names_of_their_own(monkeypatch):
    script = importlib.import_module("mnist_teleport")
    for data, name in {"mnist": "mnist_teleport.json", "cifar10": "mnist_teleport-cifar10.json"}.items():
        monkeypatch.setattr(sys, "argv", ["mnist_teleport", "--data", data])
        found = script.command_line("", script.RESULTS, "", data=SETTINGS).out
        assert found == script.RESULTS.with_name(name)


def test_a_mixing_carries_momentum_exactly_where_the_network_is_linear(monkeypatch):
    """P and Q from least squares on a batch, against the gradient at the moved weights by automatic differentiation."""
    script = importlib.import_module("optimizers")
    monkeypatch.setattr(script, "SLOPE", 1.0)
    torch.manual_seed(0)
    old = [torch.randn(n, m, dtype=torch.float64) for n, m in ((6, 9), (5, 6), (3, 5))]
    g, h = (torch.eye(n, dtype=torch.float64) + 0.3 * torch.randn(n, n, dtype=torch.float64) for n in (6, 5))
    moved = [g @ old[0], h @ old[1] @ g.inverse(), old[2] @ h.inverse()]
    x, y = torch.randn(40, 9, dtype=torch.float64), torch.randint(3, (40,))

    def gradient(weights):
        leaves = [w.clone().requires_grad_() for w in weights]
        loss = nn.functional.cross_entropy(x @ leaves[0].T @ leaves[1].T @ leaves[2].T, y)
        return torch.autograd.grad(loss, leaves)

    ensemble = Ensemble([w[None].clone() for w in moved], torch.ones(1), "adam")
    for state, before in zip(ensemble.states, gradient(old), strict=True):
        state["exp_avg"], state["exp_avg_sq"] = before[None].clone(), torch.ones_like(before)[None]
    script.carry_mixing(ensemble, 0, old, x)
    for state, after in zip(ensemble.states, gradient(moved), strict=True):
        assert torch.allclose(state["exp_avg"][0], after, rtol=1e-6, atol=1e-9)
    squares = (g.inverse().T.square() @ torch.ones(6, 9, dtype=torch.float64))[None]
    assert torch.allclose(ensemble.states[0]["exp_avg_sq"], squares, rtol=1e-6)


def test_a_corner_that_is_held_walks_as_far_as_it_says(tmp_path, monkeypatch):
    script = importlib.import_module("optimizers")
    out = tmp_path / "results.json"
    arms = ["--arm", "random", "--arm", "random, redrawn", "--arm", "start"]
    monkeypatch.setattr(sys, "argv", ["optimizers", "--quick", "--out", str(out), "--optimizer", "momentum", *arms])
    script.main()
    moves = {run["arm"]: run["teleports"] for run in json.loads(out.read_text())["runs"]}
    assert moves["random"]["walked"] == pytest.approx([1.0] * 5, abs=1e-3)  # eight times 1/8
    assert moves["start"]["walked"] == pytest.approx([1.0] * 5, abs=1e-3)
    assert max(moves["random, redrawn"]["walked"]) < 0.5
    assert all(len(member) == 8 for member in moves["random"]["accepted"])
    assert all(len(member) == 1 for member in moves["start"]["accepted"])


def test_a_grid_grows_where_an_arm_is_best_at_its_edge():
    script = importlib.import_module("optimizers")

    def run(arm, seed, rates, ends):
        curves = [[9.0, end] for end in ends]
        return {"optimizer": "sgd", "arm": arm, "seed": seed, "rates": rates, "validation_loss": curves}

    rates = [0.01, 0.02, 0.05]
    runs = [
        run("plain", 0, rates, [3, 1, 2]),
        run("teleport", 0, rates[:1], [1]),
        run("teleport", 0, rates[1:], [2, 3]),
    ]
    assert script.grown(runs, "sgd", ["plain"], rates) == rates
    assert script.grown(runs, "sgd", ["plain", "teleport"], rates) == [0.005, *rates]
    assert script.grown([run("plain", 0, rates, [None, 2, 1])], "sgd", ["plain"], rates) == [*rates, 0.1]
