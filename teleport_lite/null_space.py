"""Teleports without a group, along the null spaces of the layers' inputs on a batch.

Derived in the chapter *Level sets without a group*, after
[Wu, Dong, Aloui, Tarokh 2025](https://arxiv.org/abs/2502.11362).
"""

from __future__ import annotations

import inspect
import math
import operator
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from teleport_lite.errors import BatchError, NoSymmetryError, TeleportError
from teleport_lite.outputs import traced
from teleport_lite.runtime import LossFn
from teleport_lite.walk import (
    DONE,
    HALVINGS,
    SPENT,
    STUCK,
    LevelSetReport,
    Point,
    Walk,
    dot_products,
    run_walk,
    to_wide,
)

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)
Slot = tuple[str, int, str, int, int]  # weight and its first row, bias ("" for none) and its first row, how many rows


def null_space_teleport(
    model: nn.Module,
    loss_fn: LossFn,
    steps: int = 10,
    *,
    radius: float = 0.5,
    rcond: float | None = None,
    tol: float | None = None,
    kkt_tol: float = 1e-4,
) -> LevelSetReport:
    r"""Move the weights of `model` within the null spaces of their layers' inputs, in place, to a longer gradient.

    With the inputs of a layer on the batch as the columns of $X$ and $\Pi = I - X X^+$, the weights $W + D \Pi$ give
    the same outputs $W X$ for every $D$. Layers behind see the same inputs, so all layers move at once. The squared
    gradient norm is convex in these moves of one layer and has no maximum, so $\lVert D_l \rVert \le r \lVert W_l
    \rVert$ bounds them. A step goes to the maximum of the linearised objective over these balls, or a part of the way.

    The batch alone is kept: other samples change. Moved are nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d and
    nn.MultiheadAttention, biases as a column of the weights whose input is 1.

    Args:
        model: the model; frozen parameters are never moved.
        loss_fn: net -> scalar loss, deterministic, twice differentiable.
        steps: at most so many.
        radius: bound r on the change of each layer's weights, relative to their length.
        rcond: singular values of X below `rcond` times the largest count as zero; by default below the rounding noise.
        tol: relative tolerance for the loss; by default 1e-10 in float64, 1e-5 in float32, by dtype.
        kkt_tol: stop when the linearised gain that is left, relative to that of the whole balls, is no larger.

    Raises:
        BatchError: when the inputs of every layer span all its features.
        EmptyModelError: when nothing is trainable.
        LossError: when the loss is no scalar, ignores the net, or changes from call to call.
        NoSymmetryError: when no layer is of a known type.
        ParameterError: when a parameter is complex or not finite.
        TeleportError: when steps, radius, tol or kkt_tol is not positive.

    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    >>> x, y = torch.randn(6, 8), torch.randn(6, 1)
    >>> report = null_space_teleport(model, lambda net: nn.functional.mse_loss(net(x), y))
    >>> report.accepted, report.dimension  # 16 * (8 + 1 - 6) + 1 * (16 + 1 - 6)
    (True, 59)
    """
    if not radius > 0:
        raise TeleportError("a positive radius", radius, "pass radius=0.5")

    def search_null_spaces(walk: Walk) -> tuple[Point, float, dict]:
        with _layer_inputs(walk) as inputs, walk.loss.observed() as walk.outputs:
            p = start = walk.at(walk.x)
        spaces = [_NullSpace(walk, key, samples, rcond) for key, samples in inputs.items()]
        if not spaces:
            raise NoSymmetryError(["no trainable linear, convolution or attention layer was called"])
        dimension = sum(s.dimension for s in spaces)
        if not dimension:
            got = f"inputs of full rank in {len(spaces)} layers"
            raise BatchError("a batch that leaves a null space in some layer", got, "use fewer samples")
        lengths = [radius * float(walk.x[s.index].norm()) for s in spaces]
        moved, residual, taken, stopped = torch.zeros_like(walk.x), 0.0, 0, SPENT
        for taken in range(steps + 1):
            h, far = walk.product(p), torch.zeros_like(walk.x)
            floor = 100 * torch.finfo(h.dtype).eps * float(h.norm())
            for space, length in zip(spaces, lengths, strict=True):
                part = space.project(h[space.index])
                if (size := float(part.norm())) > floor:
                    far[space.index] += length / size * part
            best, gap = dot_products((h, far), (h, far - moved))
            residual = max(gap / best, 0.0) if best else 0.0
            if residual <= kkt_tol:
                stopped = DONE if best else "the gradient does not depend on the null spaces"
            if taken == steps or residual <= kkt_tol:
                break
            for halving in range(HALVINGS):
                share = 0.5**halving
                q = walk.at(start.x + moved + share * (far - moved))
                if 0.5 * (q.norm**2 - p.norm**2) >= 1e-4 * share * gap and q.norm < math.inf:
                    break
            else:
                stopped = STUCK
                break
            moved, p = moved + share * (far - moved), q
        return p, residual, {"steps": taken, "stopped": stopped, "dimension": dimension}

    return run_walk(Walk(model, loss_fn, steps, tol, kkt_tol), search_null_spaces)


class _NullSpace:
    """Rows of a weight (bias as last column) and the row space of their inputs, in `groups` blocks.

    `index` [groups, out, in] says where in the vector of all parameters they are.
    """

    def __init__(self, walk: Walk, slot: Slot, samples: list[Tensor], rcond: float | None) -> None:
        weight, i, bias, j, n = slot
        ends = torch.tensor([p.numel() for p in walk.params.values()]).cumsum(0).tolist()
        places = {
            name: torch.arange(end - p.numel(), end, device=walk.x.device).view_as(p)
            for (name, p), end in zip(walk.params.items(), ends, strict=True)
        }
        rows = torch.cat(samples, 1)  # [groups, samples, in]
        self.index = places[weight][i : i + n].reshape(len(rows), -1, rows.shape[-1])
        if bias:
            self.index = torch.cat([self.index, places[bias][j : j + n].reshape(len(rows), -1, 1)], -1)
            rows = torch.cat([rows, torch.ones_like(rows[..., :1])], -1)
        self.bases = [_row_space(x, rcond) for x in rows.to(walk.x.device)]
        self.dimension = sum(self.index.shape[1] * (self.index.shape[2] - len(basis)) for basis in self.bases)

    def project(self, blocks: Tensor) -> Tensor:
        parts = zip(to_wide(blocks), self.bases, strict=True)
        return torch.stack([block - (block @ basis.T) @ basis for block, basis in parts]).to(blocks)


def _row_space(x: Tensor, rcond: float | None) -> Tensor:
    """An orthonormal basis [rank, n] of the rows of `x` [b, n]."""
    rcond = max(x.shape) * torch.finfo(x.dtype).eps if rcond is None else rcond
    x = to_wide(x)
    if len(x) > x.shape[1]:
        x = torch.linalg.qr(x, mode="r").R
    _, s, rows = torch.linalg.svd(x, full_matrices=False)
    return rows[s > rcond * s.max()]


@contextmanager
def _layer_inputs(walk: Walk) -> Iterator[dict[Slot, list[Tensor]]]:
    """Inside: what known layers receive, in blocks [groups, samples, in], by the parameters that it meets."""
    names = {id(p): name for name, p in walk.model.named_parameters() if name in walk.params}
    for module in walk.model.modules():  # what another layer uses too must stay as it is
        for p in () if isinstance(module, LAYERS) else module.parameters(recurse=False):
            names.pop(id(p), None)
    slots = {m: _parameter_rows(m, names) for m in walk.model.modules() if isinstance(m, LAYERS)}
    inputs: dict[Slot, list[Tensor]] = defaultdict(list)
    busy: list[nn.Module] = []  # `_input_features` may call its module

    def note_inputs(module: Any, args: tuple, kwargs: dict, output: object) -> None:
        if module not in busy:
            busy.append(module)
            for slot, x in zip(slots[module], _input_features(module, args, kwargs), strict=True):
                if slot is not None:
                    inputs[slot].append(x.detach())
            busy.pop()

    with traced([module for module, found in slots.items() if any(found)], note_inputs):
        yield inputs
    uses = Counter(part for slot in inputs for part in (slot[:2], slot[2:4]) if part[0])
    for slot in [s for s in inputs if max(uses[s[:2]], uses[s[2:4]]) > 1]:  # shared in two roles
        del inputs[slot]


def _parameter_rows(module: Any, names: dict[int, str]) -> list[Slot | None]:
    """Which rows of which weight and bias a layer multiplies with which input; None where the weight stays."""

    def name_of(attribute: str) -> str:
        return names.get(id(operator.attrgetter(attribute)(module)), "")

    if not isinstance(module, nn.MultiheadAttention):
        parts = [("weight", 0, "bias", 0, len(module.weight))]
    else:
        e = module.embed_dim
        one = module.in_proj_weight is not None
        weights = ["in_proj_weight"] * 3 if one else ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
        parts = [(weight, k * e * one, "in_proj_bias", k * e, e) for k, weight in enumerate(weights)]
        parts.append(("out_proj.weight", 0, "out_proj.bias", 0, e))
    return [(w, i, name_of(b), j, n) if (w := name_of(a)) else None for a, i, b, j, n in parts]


def _input_features(module: Any, args: tuple, kwargs: dict) -> list[Tensor]:
    """What the weights of a layer are multiplied with, [groups, samples, in]; an identity as weight shows it."""
    if isinstance(module, nn.MultiheadAttention):
        given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        x = given["query"]
        last = {"out_proj.weight": torch.eye(module.embed_dim, dtype=x.dtype, device=x.device)}
        if module.out_proj.bias is not None:
            last["out_proj.bias"] = x.new_zeros(module.embed_dim)
        heads = functional_call(module, last, args, kwargs)[0]
        return [t.reshape(1, -1, t.shape[-1]) for t in (x, given["key"], given["value"], heads)]
    x = args[0] if args else next(iter(kwargs.values()))
    if isinstance(module, nn.Linear):
        return [x.reshape(1, -1, x.shape[-1])]
    weight = module.weight[0]
    identity = torch.eye(weight.numel(), dtype=x.dtype, device=x.device).reshape(-1, *weight.shape)
    patches = module._conv_forward(x, torch.cat([identity] * module.groups), None)
    patches = patches.movedim(-weight.dim(), -1)
    return [patches.reshape(-1, module.groups, weight.numel()).movedim(1, 0)]
