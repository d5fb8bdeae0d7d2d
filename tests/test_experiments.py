"""The experiments run, and train an ensemble as a plain loop would train each network."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

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
        losses = torch.tensor(run["test_loss"])  # ..., epochs: before anything, and after it
        start = losses.reshape(-1, losses.shape[-1])[:, 0]
        assert losses.isfinite().all() and start.max() - start.min() < 1e-4
        assert (losses[..., -1] != losses[..., 0]).any()
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
    if name == "generalization":
        assert [round(t, 4) for t in config["radii"]] == [round(0.0001 + 0.001 * k, 4) for k in range(20)]


def test_records_of_other_data_have_names_of_their_own(monkeypatch):
    script = importlib.import_module("mnist_teleport")
    for data, name in {"mnist": "mnist_teleport.json", "cifar10": "mnist_teleport-cifar10.json"}.items():
        monkeypatch.setattr(sys, "argv", ["mnist_teleport", "--data", data])
        found = script.command_line("", script.RESULTS, "", data=SETTINGS).out
        assert found == script.RESULTS.with_name(name)
