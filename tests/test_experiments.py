"""The experiments run, and train an ensemble as a plain loop would train each network."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

EXPERIMENTS = Path(__file__).resolve().parent.parent / "experiments"
sys.path.insert(0, str(EXPERIMENTS))
from ensemble import SLOPE, evaluate, sgd_step  # noqa: E402


def test_the_ensemble_trains_as_a_loop_does():
    torch.manual_seed(0)
    nets = [
        nn.Sequential(nn.Linear(12, 7, bias=False), nn.LeakyReLU(SLOPE), nn.Linear(7, 5, bias=False)) for _ in range(3)
    ]
    rates = torch.tensor([0.05, 0.1, 0.3])
    weights = [torch.stack([net[k].weight.detach() for net in nets]).clone() for k in (0, 2)]
    batches = [(torch.randn(8, 12), torch.randint(5, (8,))) for _ in range(30)]
    for x, y in batches:
        losses = sgd_step(weights, x, y, rates)
        for m, net in enumerate(nets):
            net.zero_grad()
            loss = nn.functional.cross_entropy(net(x), y)
            loss.backward()
            assert float(losses[m]) == pytest.approx(float(loss.detach()), abs=1e-5)
            with torch.no_grad():
                for p in net.parameters():
                    p -= rates[m] * p.grad
    for m, net in enumerate(nets):
        assert torch.allclose(weights[0][m], net[0].weight, atol=1e-5)
        assert torch.allclose(weights[1][m], net[2].weight, atol=1e-5)
    x, y = batches[0]
    loss, accuracy = evaluate(weights, x, y, chunk=3)
    for m, net in enumerate(nets):
        logits = net(x).detach()
        assert float(loss[m]) == pytest.approx(float(nn.functional.cross_entropy(logits, y)), abs=1e-5)
        assert float(accuracy[m]) == pytest.approx(float((logits.argmax(1) == y).float().mean()))


def test_the_mnist_experiment_runs_and_resumes(tmp_path):
    out = tmp_path / "results.json"
    command = [sys.executable, str(EXPERIMENTS / "mnist_teleport.py"), "--quick", "--out", str(out)]
    subprocess.run([*command, "--network", "784-16-10-10"], check=True, capture_output=True)
    first = json.loads(out.read_text())
    (run,) = first["784-16-10-10"]["runs"]
    assert len(run["test_loss"]) == 3 and len(run["test_loss"][0]) == 7 and len(run["test_loss"][0][0]) == 2
    start = [rates[0][0] for rates in run["test_loss"]]
    assert max(start) - min(start) < 1e-4  # every arm begins at the same function
    subprocess.run([*command, "--network", "784-16-10-10"], check=True, capture_output=True)
    assert json.loads(out.read_text()) == first
