"""A property of every symmetry that is found: nothing changes, on inputs of other sizes, lengths, arguments and modes.

`python tests/test_random_models.py 500` tries so many models.
"""

from __future__ import annotations

import sys

import pytest
import torch
from conftest import worst_change
from random_models import draw

import teleport_lite as tl

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
