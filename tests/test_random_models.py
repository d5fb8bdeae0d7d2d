"""A property of every symmetry that is found: nothing changes, on inputs of other sizes, lengths, arguments and modes.

`python tests/test_random_models.py 500` tries so many models.
"""

from __future__ import annotations

import random
import sys

import pytest
import torch
from conftest import worst_change
from random_models import draw

import teleport_lite as tl
from teleport_lite.discovery.inputs import Arguments
from teleport_lite.discovery.probe import Probe, run_settings
from teleport_lite.discovery.verify import Verifier
from teleport_lite.groups import Permutation, PositiveScaling, Signs
from teleport_lite.symmetries.axes import Leg, NeuronSymmetry

COUNT = 60


def largest(seed: int) -> tuple[float, tl.Product]:
    """The largest change of any output of the model of a seed, by any factor alone."""
    drawn = draw(seed)
    symmetry = tl.find_symmetries(drawn.model, drawn.example)
    change = 0.0
    for training in (False, True):
        for factor in symmetry:
            if training and not factor.dim and "dropout" in drawn.kind:
                continue  # moves the neurons that a mask drops
            for args, kwargs in drawn.calls:
                use = lambda m, args=args, kwargs=kwargs: m(*args, **kwargs)  # noqa: E731
                change = max(change, worst_change(drawn.model, factor, use, training=training, elements=2))
    return change, symmetry


@pytest.mark.parametrize("seed", range(COUNT))
def test_no_factor_changes_anything(seed):
    change, symmetry = largest(seed)
    assert change < 1e-10, symmetry


def planted(model: torch.nn.Module, pick: random.Random) -> NeuronSymmetry | None:
    """A scaling, flip or permutation of two axes of equal length, which hardly ever is a symmetry."""
    axes = [(name, dim, n) for name, p in model.named_parameters() for dim, n in enumerate(p.shape) if n > 1]
    first = pick.choice(axes)
    others = [a for a in axes if a[2] == first[2] and a[0] != first[0]]
    if not others:
        return None
    second = pick.choice(others)
    group = pick.choice([PositiveScaling, Signs, Permutation])(first[2])
    return NeuronSymmetry(group, [Leg(*first[:2]), Leg(*second[:2], dual=True)])


@pytest.mark.parametrize("block", range(4))
def test_planted_symmetries_that_are_false_are_refused(block):
    refused = 0
    for seed in range(25 * block, 25 * block + 25):
        drawn = draw(seed)
        wrong = [s for s in (planted(drawn.model, random.Random(k)) for k in range(4)) if s]
        probe = Probe(drawn.model)
        generator = torch.Generator().manual_seed(0)
        with run_settings(probe.module):
            probe.perturb_parameters(generator)
            kept = Verifier(probe, Arguments.of(drawn.example), generator).keep(wrong, lambda *_: None)
        refused += len(wrong) - len(kept)
        for symmetry in kept:
            for args, kwargs in drawn.calls:
                use = lambda m, args=args, kwargs=kwargs: m(*args, **kwargs)  # noqa: E731
                assert worst_change(drawn.model, symmetry, use) < 1e-10, (seed, symmetry)
    assert refused > 50


if __name__ == "__main__":
    count, start = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    torch.set_num_threads(1)
    factors = dim = bad = 0
    worst = 0.0
    for seed in range(start, start + count):
        change, symmetry = largest(seed)
        factors, dim, worst = factors + len(symmetry), dim + symmetry.dim, max(worst, change)
        if change > 1e-10:
            bad += 1
            print(f"seed {seed} ({draw(seed).kind}) changes by {change:.1e}\n{symmetry}", flush=True)
    print(f"{count} models, {factors} factors, dimension {dim}: {bad} with a change above 1e-10, largest {worst:.1e}")
