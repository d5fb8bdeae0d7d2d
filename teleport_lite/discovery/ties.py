"""Entries that have to be shifted alike, where an operator lets nothing else through.

A maximum along an axis moves by what is added to all that it is taken of, and so do a minimum, a median, a sort or
`logsumexp`; a comparison does not see what is added to both sides. Which operators these are, the numbers tell.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from teleport_lite.discovery.differences import Difference, Source, output_differences, rerun_shifted
from teleport_lite.discovery.dispatch import leaves_of

Tie = tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]  # parameters, their shapes, and who has which coordinate
Found = list[tuple[Tensor, Difference]]


def ties_let_through(call: Any, results: list[Tensor], stopped: Found) -> Iterator[Tie]:
    """How entries of shifts that an operator has `stopped` are tied so that it moves by them, or does not see them."""
    func, args, kwargs = call
    leaves, pointwise = leaves_of(args, kwargs), torch.Tag.pointwise in func.tags
    data = {id(x): x for x in leaves if isinstance(x, Tensor) and x.is_floating_point()}
    if pointwise != (len(data) > 1):
        return
    stopped = [(x, d) for x, d in stopped if d.choice and d.choice.scale == 1]
    stopped.sort(key=lambda pair: -len(pair[1].source.c))  # the finest first
    done: set[frozenset[str]] = set()
    for seed in stopped:
        first, places = _filled_places([seed, *stopped], [*data])
        if not places or (names := frozenset(s.name for s in first)) in done:
            continue
        done.add(names)
        c = torch.cat([s.c for s in first])
        for windows in _tied_windows(places, {k for k in leaves if isinstance(k, int)}):
            groups = _joined_entries(windows, len(c))
            if len(first) == 1 and not groups.any():  # which is tried in any case
                continue
            alike = torch.empty_like(c).scatter_(0, groups, c)[groups]
            tied = [(x, Difference(seed[1].source, alike[places[i]], ((),), seed[1].support)) for i, x in data.items()]
            found = output_differences(results, rerun_shifted(call, tied, False, set()))
            if any(t is not None for t in found) or (found and not any(x.is_floating_point() for x in results)):
                parts = zip(first, groups.split([len(s.c) for s in first]), strict=True)
                yield tuple(
                    (name, shape, tuple((g[list(own[0].indices)] if own else g).tolist()))
                    for s, g in parts
                    for name, shape, own in s.parts
                )
                break


def _filled_places(found: Found, data: list[int]) -> tuple[dict[Source, int], dict[int, Tensor]]:
    """Sources that, one beside the other, shift all of the data, and which entry of theirs stands where."""
    first: dict[Source, int] = {}
    places: dict[int, Tensor] = {}
    for x, d in found:
        if d.source not in first and {n for n, *_ in d.source.parts} & {n for s in first for n, *_ in s.parts}:
            continue
        own = torch.tensor(d.choice.indices if d.choice else ()).view(d.t.shape)
        here = places.get(id(x), torch.full_like(own, -1))
        if bool(((own >= 0) & (here >= 0)).any()):
            continue
        start = first.setdefault(d.source, sum(len(s.c) for s in first))
        places[id(x)] = torch.where(own >= 0, own + start, here)
    whole = places.keys() == {*data} and all(bool((p >= 0).all()) for p in places.values())
    return first, {i: places[i] for i in data} if whole else {}


def _tied_windows(places: dict[int, Tensor], lengths: set[int]) -> Iterator[Tensor]:
    """Those of equal places in several tensors; or along an axis of a single one, of some of these lengths or whole."""
    together = torch.stack(torch.broadcast_tensors(*places.values()))
    if len(together) > 1:
        yield together.flatten(1)
        return
    for dim, n in enumerate(together.shape[1:]):
        for k in sorted(k for k in {n, *lengths, *(n // k for k in lengths if k)} if 1 < k <= n and n % k == 0):
            yield together[0].unflatten(dim, (-1, k)).movedim(dim + 1, 0).flatten(1)


def _joined_entries(windows: Tensor, n: int) -> Tensor:
    """For each of n entries the number of its group, where all of a window [entries, windows] are in one."""
    label, old = torch.arange(n), None
    while old is None or not torch.equal(label, old):
        old = label
        label = label.scatter_reduce(0, windows.flatten(), label[windows].amin(0).expand_as(windows).flatten(), "amin")
    return label.unique(return_inverse=True)[1]
