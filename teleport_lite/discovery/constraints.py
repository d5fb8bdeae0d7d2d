r"""What may move, as equations between the entries of axes.

Every entry of every axis has a *label*, an integer: label $2v$ stands for the variable $s_v$, label $2v+1$ for $-s_v$,
and 0 for "does not move". A rescaling multiplies the tensor entry with labels a, b, ... by $e^{s_a + s_b + \dots}$, a
flip of signs by $(-1)^{s_a + s_b + \dots}$, and a permutation moves an entry to the place of another one.
What a model does to its tensors gives equations between the labels, one system for each kind of group; their solutions
are the symmetries that can be proposed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

SCALE, SIGN, PERM, MIX = 1, 2, 4, 8  # the systems, as bits
ALL = SCALE | SIGN | PERM


def negative(labels: Tensor) -> Tensor:
    """The labels of $-s$."""
    return torch.where(labels < 2, labels, labels ^ 1)


@dataclass
class Constraints:
    """A growing list of equations between labels."""

    count: int = 1  # of variables; the first one is zero
    equal: list[tuple[Tensor, Tensor, int]] = field(default_factory=list)
    totals: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    stills: list[tuple[Tensor, int, str]] = field(default_factory=list)
    colours: list[tuple[Tensor, Tensor, int]] = field(default_factory=list)

    def fresh(self, *shape: int) -> Tensor:
        """Labels of new variables."""
        size = torch.Size(shape).numel()
        self.count += size
        return 2 * torch.arange(self.count - size, self.count).reshape(shape)

    def same(self, a: Tensor, b: Tensor, systems: int = ALL) -> None:
        """Entries with these labels move in the same way."""
        a, b = torch.broadcast_tensors(a, b)
        if a is not b:
            self.equal.append((a.reshape(-1), b.reshape(-1), systems))

    def still(self, labels: Tensor, why: str, systems: int = SCALE | SIGN) -> None:
        """Entries with these labels are not multiplied by anything; with PERM, they also keep their places."""
        self.stills.append((labels.reshape(-1), systems, why))

    def total(self, a: Tensor, b: Tensor) -> Tensor:
        """New labels, of products: $s_a + s_b$; the three are permuted together."""
        a, b = torch.broadcast_tensors(a, b)
        out = self.fresh(*a.shape)
        self.totals.append((a.reshape(-1), b.reshape(-1), out.reshape(-1)))
        self.same(a, out, PERM)
        self.same(b, out, PERM)
        return out

    def apart(self, labels: Tensor, colours: Tensor | None = None, systems: int = PERM | MIX) -> None:
        """Entries of different `colours` (by default, any two) are not exchanged (PERM) or not mixed (MIX)."""
        if colours is None:
            colours = torch.arange(labels.numel())
        else:
            labels, colours = torch.broadcast_tensors(labels, colours)
        self.colours.append((labels.reshape(-1), colours.reshape(-1), systems))

    def scalings(self, signed: bool, second: bool = False) -> tuple[Tensor, Tensor]:
        """Solve for rescalings, or for flips of signs when not `signed`.

        A product $s_o = s_a + s_b$ that nothing else decides has several solutions; taken is $s_b = 0$, or $s_o = 0$
        when `second`.

        Returns:
            For each variable its class, 0 for those that do not move, and whether it moves inversely to the class.
        """
        system = SCALE if signed else SIGN

        def node(labels: Tensor) -> Tensor:
            return labels if signed else labels & ~1

        pairs = [(node(a), node(b)) for a, b, s in self.equal if s & system]
        pairs += [(node(a), torch.zeros_like(a)) for a, s, _ in self.stills if s & system]
        triples = [torch.cat(part) for part in zip(*self.totals, strict=True)] or [
            torch.zeros(0, dtype=torch.int64)
        ] * 3
        a, b, o = (node(part) for part in triples)
        done = torch.zeros_like(a, dtype=torch.bool)
        x = torch.cat([torch.zeros(1, dtype=torch.int64), *(p for p, _ in pairs)])
        y = torch.cat([torch.ones(1, dtype=torch.int64), *(p for _, p in pairs)])
        labels = torch.arange(2 * self.count)
        decide = False
        while True:
            labels = _components(labels, torch.cat([x, negative(x)]), torch.cat([y, negative(y)]))
            if signed:  # what equals its own negative is zero
                own = (labels == labels[negative(torch.arange(2 * self.count))]).nonzero()[:, 0]
                if bool((labels[own] != 0).any()):
                    x, y = own, torch.zeros_like(own)
                    continue
            la, lb, lo = labels[a], labels[b], labels[o]
            rules = [  # what holds, and which two are then the same
                ((la == 0) | (lb == lo), [(torch.where(la == 0, b, a), torch.where(la == 0, o, torch.zeros_like(o)))]),
                ((lb == 0) | (la == lo), [(torch.where(lb == 0, a, b), torch.where(lb == 0, o, torch.zeros_like(o)))]),
                ((lo == 0) | (la == labels[negative(b)]), [(a, negative(b)), (o, torch.zeros_like(o))]),
            ]
            x, y, progress = x[:0], y[:0], False
            for holds, equations in rules:
                new = holds & ~done
                if bool(new.any()):
                    progress, done = True, done | new
                    x = torch.cat([x, *(p[new] for p, _ in equations)])
                    y = torch.cat([y, *(q[new] for _, q in equations)])
            if progress:
                continue
            if decide or bool(done.all()):
                break
            decide = True
            x = (o if second else b)[~done]
            y = torch.zeros_like(x)
        plus, minus = labels[0::2], labels[1::2]
        least = torch.minimum(plus, minus) if signed else plus
        return least, (minus < plus) if signed else torch.zeros_like(plus, dtype=torch.bool)

    def permutations(self) -> Tensor:
        """For each variable the class with which it is permuted, 0 for those that keep their places."""
        pairs = [(a >> 1, b >> 1) for a, b, s in self.equal if s & PERM]
        pairs += [(a >> 1, torch.zeros_like(a)) for a, s, _ in self.stills if s & PERM]
        x, y = (torch.cat([p[i] for p in pairs]) if pairs else torch.zeros(0, dtype=torch.int64) for i in (0, 1))
        return _components(torch.arange(self.count), x, y)

    def kinds(self, classes: Tensor, system: int) -> Tensor:
        """For each variable a number that two classes share when nothing tells them apart."""
        found = torch.zeros(2 * self.count, dtype=torch.int64)
        for step, (labels, colours, systems) in enumerate(self.colours):
            if systems & system:
                found.index_add_(0, classes[labels >> 1], _hash(colours * 1_000_003 + step))
        return found[classes]

    def reasons(self, axes: list[Tensor]) -> list[str]:
        """For each of some axes the first reason why its first entry is not multiplied by anything, or ''."""
        pairs = [(a >> 1, b >> 1) for a, b, s in self.equal if s & SCALE]
        x, y = (torch.cat([p[i] for p in pairs]) if pairs else torch.zeros(0, dtype=torch.int64) for i in (0, 1))
        classes = _components(torch.arange(self.count), x, y)
        found: dict[int, str] = {}
        for labels, systems, why in self.stills:
            for c in classes[labels >> 1].unique().tolist() if systems & SCALE else ():
                found.setdefault(c, why)
        return [found.get(int(classes[labels.reshape(-1)[0] >> 1]), "") for labels in axes]


def _components(labels: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The least label of each connected component, when nodes x and y are joined; `labels` are components so far."""
    labels = labels.clone()
    while True:
        low = torch.minimum(labels[x], labels[y])
        new = labels.scatter_reduce(0, labels[x], low, "amin").scatter_reduce(0, labels[y], low, "amin")
        new = new.scatter_reduce(0, x, low, "amin").scatter_reduce(0, y, low, "amin")
        new = new[new]
        if torch.equal(new, labels):
            return labels
        labels = new


def _hash(numbers: Tensor) -> Tensor:
    """Scattered over all 64-bit integers, by steps of SplitMix64."""
    numbers = (numbers + 1) * -7046029254386353131
    numbers = (numbers ^ (numbers >> 30)) * -4658895280553007687
    numbers = (numbers ^ (numbers >> 27)) * -7723592293110705685
    return numbers ^ (numbers >> 31)
