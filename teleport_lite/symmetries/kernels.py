r"""What some parameters send to zero, as an operand of translations.

Where matrices H alone read what a matrix V writes, $V \mapsto V + N c$ changes nothing for N with $HN = 0$; and H may
move by $c N^\top$ where N is orthogonal to all that is written. Both are translations, of what is not read in N.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from teleport_lite.functional import Params


@dataclass(frozen=True)
class Kernel:
    r"""The vectors that all rows of a matrix H [m, n] give zero with, by a basis N [n, n - m].

    With the projector $P = I - H^+ H$ it consists of the first columns of P, so it depends smoothly on H.

    Args:
        parts: what H consists of: parameters, the dimension of each that stands for columns, and the first of these.
        length: n.
        centered: whether all rows are to give the same in place of zero, as where a LayerNorm reads what H writes.

    >>> Kernel((("head", 1, 0),), 3).basis({"head": torch.tensor([[0.0, 0.0, 2.0]])})
    tensor([[1., 0.],
            [0., 1.],
            [0., 0.]])
    """

    parts: tuple[tuple[str, int, int], ...]
    length: int
    centered: bool = False

    def rows(self, params: Params, sign: Tensor | float = -1.0) -> Tensor:
        """The matrix H; if `centered`, its other rows and, with this sign, the first one."""
        parts = (params[name].movedim(dim, -1).narrow(-1, first, self.length) for name, dim, first in self.parts)
        rows = torch.cat([part.reshape(-1, self.length) for part in parts])
        return rows[1:] + sign * rows[:1] if self.centered else rows

    def basis(self, params: Params, like: Tensor | None = None) -> Tensor:
        """The matrix N."""
        return self._solved(params, like)[1]

    def tangent(self, params: Params, tensors: Params, entry: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
        r"""What N moves by as H does, $-H^+ \dot H N - P \dot H^\top (H^+)^\top$, by the `entry` of each number."""
        inverse, basis, projector = map(entry, self._solved(params, like))
        sign, first = entry(-torch.ones_like(like[:1])), basis.shape[1]
        moved = self.rows(tensors, sign.to(next(iter(tensors.values())))).to(like)
        return sign * (inverse @ moved @ basis + projector @ moved.mT @ inverse[:first].mT)

    def cotangent(self, params: Params, part: Tensor, entry: Callable[[Tensor], Tensor]) -> Params:
        """The transposed map of `tangent`, but for its sign."""
        inverse, basis, projector = map(entry, self._solved(params, part))
        first = basis.shape[1]
        back = inverse.mT @ part @ basis.mT + inverse[:first].mT @ part.mT @ projector
        own = {name: params[name] for name, *_ in self.parts}
        sign = entry(-torch.ones_like(part[:1, 0]))
        rows, pull = torch.func.vjp(lambda p: self.rows(p, sign.to(next(iter(p.values())))), own)[:2]
        return pull(back.to(rows))[0]

    def _solved(self, params: Params, like: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The pseudo-inverse of H, N, and P."""
        h = self.rows(params)
        h = h if like is None else h.to(like)
        inverse = torch.linalg.pinv(h)
        projector = torch.eye(self.length, dtype=h.dtype, device=h.device) - inverse @ h
        return inverse, projector[:, : self.length - len(h)], projector
