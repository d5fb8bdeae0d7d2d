"""The solver against brute force on random systems: union-find, scalings, signs, permutations, colour refinement."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from fractions import Fraction

import pytest
import torch

from teleport_lite.discovery.constraints import ALL, MIX, PERM, SCALE, SIGN, Constraints, negate_labels
from teleport_lite.discovery.solve import (
    PRODUCT,
    SECOND,
    color_signatures,
    connected_components,
    fixing_reasons,
    solve_permutations,
    solve_scalings,
    solve_signs,
)


def test_unions_of_what_was_joined_before():
    joined = connected_components(torch.arange(8), torch.tensor([4]), torch.tensor([5]))
    assert connected_components(joined, torch.tensor([1, 2]), torch.tensor([4, 5])).tolist() == [0, 1, 1, 3, 1, 1, 6, 7]


def by_walking(n: int, edges: list[tuple[int, int]]) -> list[int]:
    """The least node that can be reached from each."""
    found = list(range(n))
    for _ in range(n):
        for a, b in edges:
            found[a] = found[b] = min(found[a], found[b])
    return found


def test_2000_random_sequences_of_unions():
    draw = random.Random(0)
    for _ in range(2000):
        n = draw.randint(1, 12)
        edges: list[tuple[int, int]] = []
        classes = torch.arange(n)
        for _ in range(draw.randint(1, 4)):
            new = [(draw.randrange(n), draw.randrange(n)) for _ in range(draw.randint(0, 4))]
            edges += new
            x, y = (torch.tensor([e[i] for e in new], dtype=torch.int64) for i in (0, 1))
            classes = connected_components(classes, x, y)
            assert classes.tolist() == by_walking(n, edges)


def nullity(rows: list[list[int]], n: int, field: type) -> int:
    """Dimension of the solutions of `rows` = 0, by elimination over the rationals (Fraction) or two elements (bool)."""
    matrix = [[Fraction(v) if field is Fraction else v % 2 for v in row] for row in rows]
    rank = 0
    for column in range(n):
        pivot = next((i for i in range(rank, len(matrix)) if matrix[i][column]), None)
        if pivot is None:
            continue
        matrix[rank], matrix[pivot] = matrix[pivot], matrix[rank]
        for i in range(len(matrix)):
            if i != rank and matrix[i][column]:
                factor = matrix[i][column] / matrix[rank][column] if field is Fraction else 1
                row = (p - factor * q for p, q in zip(matrix[i], matrix[rank], strict=True))
                matrix[i] = [v if field is Fraction else v % 2 for v in row]
        rank += 1
    return n - rank


def coefficients(n: int, *terms: tuple[int, int | Fraction]) -> list[int | Fraction]:
    """The row of a sum of (label, sign)."""
    row = [0] * n
    for label, sign in terms:
        row[label >> 1] += sign * (-1 if label & 1 else 1) if label > 1 else 0
    return row


POWERS = [1, 1, 2, 3, -1, Fraction(1, 2), Fraction(-2, 3)]


def random_system(draw: random.Random, sums: int) -> tuple[Constraints, dict[int, list[list[int]]]]:
    """Random equations, and the rows of each system."""
    n = draw.randint(2, 9)
    c = Constraints()
    c.fresh(n - 1)

    def label() -> int:
        return draw.choice([0, *range(2, 2 * n)])

    terms = []
    for _ in range(draw.randint(0, 5)):
        a, b, systems = label(), label(), draw.choice([SCALE, SIGN, ALL])
        power = draw.choice(POWERS) if systems == SCALE else 1
        c.equate(torch.tensor([a]), torch.tensor([b]), systems, float(power))
        terms.append((systems, ((a, 1), (b, -power))))
    for _ in range(draw.randint(0, 1)):
        a = label()
        c.fix(torch.tensor([a]), "drawn")
        terms.append((SCALE | SIGN, ((a, 1),)))
    for _ in range(sums):
        a, b, o = label(), label(), label()
        c.sums.append((torch.tensor([a]), torch.tensor([b]), torch.tensor([o])))
        terms.append((ALL, ((a, 1), (b, 1), (o, -1))))
    return c, {s: [coefficients(n, *t) for systems, t in terms if systems & s] for s in (SCALE, SIGN)}


@pytest.mark.parametrize("sums", [0, 1, 2, 4])
def test_scalings_and_signs_solve_the_system_exactly(sums):
    draw, whole = random.Random(sums), 0
    for _ in range(200):
        c, rows = random_system(draw, sums)
        for zero in (SECOND, PRODUCT):
            classes, factors = solve_scalings(c, zero)
            values = {k: draw.randint(-9, 9) for k in classes.tolist()} | {0: 0}
            s = [values[k] * f for k, f in zip(classes.tolist(), factors.tolist(), strict=True)]
            assert all(abs(sum(v * x for v, x in zip(row, s, strict=True))) < 1e-6 for row in rows[SCALE])
            found = len({*classes.tolist()} - {0})
            dim = nullity(rows[SCALE] + [[1] + [0] * (c.count - 1)], c.count, Fraction)
            assert found <= dim
            whole += found == dim
            if not sums:
                assert found == dim
        flips = solve_signs(c)
        values = {k: draw.randint(0, 1) for k in flips.tolist()} | {0: 0}
        s = [values[k] for k in flips.tolist()]
        assert all(sum(v * x for v, x in zip(row, s, strict=True)) % 2 == 0 for row in rows[SIGN])
        dim = nullity(rows[SIGN] + [[1] + [0] * (c.count - 1)], c.count, bool)
        assert len({*flips.tolist()} - {0}) == dim if not sums else len({*flips.tolist()} - {0}) <= dim
    assert whole > 100  # a sum that stays free takes one of two solutions, so not all of the space


def test_sums_that_are_decided_lose_nothing():
    """A product of three chains, each end known: every sum is an equality in the end."""
    c = Constraints()
    a, b, d = (c.fresh(4) for _ in range(3))
    o = c.sum_of(a, b)
    p = c.sum_of(o, d)
    c.fix(d, "drawn")
    c.equate(p, a)  # so b is zero
    classes, _ = solve_scalings(c)
    assert (classes[b >> 1] == 0).all() and len({*classes[a >> 1].tolist()}) == 4
    c.equate(a[:2], negate_labels(a[2:]))
    classes, factors = solve_scalings(c)
    assert classes[a >> 1].tolist()[:2] == classes[a >> 1].tolist()[2:]
    assert factors[a >> 1].tolist() == [1, 1, -1, -1]


def test_signs_of_a_product_with_itself():
    """$s_o = s_a + s_a$ is 0 for signs, and a doubled exponent for scalings."""
    c = Constraints()
    a = c.fresh(3)
    o = c.sum_of(a, a)
    flips = solve_signs(c)
    classes, factors = solve_scalings(c)
    assert torch.equal(classes[o >> 1], a >> 1) and factors[o >> 1].tolist() == [2, 2, 2]
    assert (flips[o >> 1] == 0).all() and len({*flips[a >> 1].tolist()} - {0}) == 3


def test_signs_of_a_difference_go_together():
    """With $s_o = 0$, a and b flip together: a layer's gain and its rows."""
    c = Constraints()
    a, b = c.fresh(3), c.fresh(3)
    c.fix(c.sum_of(a, b), "drawn")
    flips = solve_signs(c)
    assert torch.equal(flips[a >> 1], flips[b >> 1]) and (flips[a >> 1] > 0).all()


def test_permutations_and_signatures_by_brute_force():
    draw = random.Random(5)
    for _ in range(200):
        n = draw.randint(2, 9)
        c = Constraints()
        c.fresh(n - 1)
        edges = [(draw.randrange(n), draw.randrange(n)) for _ in range(draw.randint(0, 4))]
        for a, b in edges:
            c.equate(torch.tensor([2 * a]), torch.tensor([2 * b + (b > 0)]), draw.choice([PERM, ALL]))
            c.equate(torch.tensor([2 * a]), torch.tensor([2 * draw.randrange(n)]), SCALE)
        fixed = draw.randrange(1, n)
        c.fix(torch.tensor([2 * fixed]), "drawn", draw.choice([PERM, ALL]))
        expected = by_walking(n, [*edges, (fixed, 0)])
        classes = solve_permutations(c)
        assert classes.tolist() == expected
        given: dict[int, Counter] = {k: Counter() for k in expected}
        for step in range(draw.randint(0, 4)):
            labels = [draw.randrange(n) for _ in range(draw.randint(1, 5))]
            colors = [draw.randrange(3) for _ in labels]
            systems = draw.choice([PERM, MIX])
            c.distinguish(2 * torch.tensor(labels), torch.tensor(colors), systems)
            for v, color in zip(labels, colors, strict=True):
                if systems == PERM:
                    given[expected[v]][step, color] += 1
        numbers = color_signatures(c, classes, PERM).tolist()
        for v, w in itertools.combinations(range(n), 2):
            assert (numbers[v] == numbers[w]) == (given[expected[v]] == given[expected[w]])


def test_axes_that_cross_are_permuted_along_the_one_that_leaves_more():
    """A table of positions and features is added to features: the features are permuted, the positions keep theirs."""
    c = Constraints()
    places, features, stream = c.fresh(3, 1), c.fresh(1, 4), c.fresh(1, 4)
    first = c.fresh(1, 4)  # at the first position stands a token of its own
    c.equate(c.sum_labels([places, features]), torch.cat([first, stream, stream]))
    classes = solve_permutations(c)
    assert (classes[places >> 1] == 0).all()
    assert torch.equal(classes[features >> 1], classes[stream >> 1])
    assert (
        torch.equal(classes[first >> 1], classes[stream >> 1]) and len({*classes[stream >> 1].flatten().tolist()}) == 4
    )


def test_the_reason_is_the_first_one_of_what_it_is_equated_with():
    c = Constraints()
    a, b, d = c.fresh(2), c.fresh(2), c.fresh(2)
    c.equate(a, b)
    c.fix(b, "one")
    c.fix(a, "two")
    c.fix(d, "places only", PERM)
    assert fixing_reasons(c, [a, b, d]) == ["one", "one", ""]
