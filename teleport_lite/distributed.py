r"""Several processes that train one model: the mean of their losses, and what they must agree on.

Under `DistributedDataParallel` each process, a rank, holds all parameters and a shard of the batch. A value is shared
when all ranks hold the same (a parameter), and local when each has its own (the loss on a shard). Two maps lead from
one kind to the other, `_Share` (the identity) and `_Mean` (the mean over the ranks). With the inner product
$\langle a, b \rangle = \frac1R \sum_r a_r b_r$ of local values each is the adjoint of the other, so each is the
derivative of the other, and mean(loss(share(w))) has all its derivatives.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves, tree_map

from teleport_lite.errors import ParameterError, RankError
from teleport_lite.runtime import check_model

Loss = Callable[[dict[str, Tensor]], Tensor]  # of parameters by name
NO, YES, FAILED = 0, 1, 2  # what a rank answers
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Ranks:
    """The processes that train `model` together: those of its `DistributedDataParallel`, or this one alone.

    What `DataParallel` wraps is one process, and stands for itself.

    Its methods are collectives: all ranks call them, in the same order. Before anything is exchanged the ranks tell
    each other that they are well, and one that has failed says so there: see `together`.

    Attributes:
        model: the module inside, which has the same names of parameters on one process and on many.
        group: the process group, or None.

    >>> alone = Ranks(nn.Linear(2, 1))
    >>> alone.group, alone.ask(True), alone.first([1, 2])
    (None, [0], [1, 2])
    """

    def __init__(self, model: nn.Module) -> None:
        wrapped = getattr(model, "_orig_mod", model)  # inside of torch.compile
        self.model: Any = model
        self.group: Any = None
        if isinstance(wrapped, DistributedDataParallel):
            self.model, self.group = wrapped.module, wrapped.process_group
        elif isinstance(wrapped, nn.DataParallel):
            self.model = wrapped.module
        check_whole(self.model)

    @contextmanager
    def together(self) -> Iterator[None]:
        """A context in which an exception on one rank ends the work of all.

        Raises:
            RankError: on the others, at the next exchange.
        """
        try:
            yield
        except RankError:
            raise
        except BaseException:
            with suppress(RankError):  # the others may be gone
                self._gather_rows(FAILED)
            raise

    def ask(self, answer: bool) -> list[int]:
        """The ranks whose answer is yes; waits until all are here.

        Raises:
            RankError: when a rank has failed.
        """
        answers = self._gather_rows(YES if answer else NO)
        failed = [rank for rank, (said,) in enumerate(answers) if said == FAILED]
        if failed:
            raise RankError("every rank to finish the teleport", failed, "an exception", "see its message there")
        return [rank for rank, (said,) in enumerate(answers) if said == YES]

    def first(self, tree: Any) -> Any:
        """A tree of tensors as the first rank holds it, on every rank."""
        if self.group is None:
            return tree
        tree = tree_map(lambda x: x.detach().clone(memory_format=torch.contiguous_format), tree)
        self.ask(False)
        with _await_all_ranks():
            for x in tree_leaves(tree):
                dist.broadcast(x, dist.get_global_rank(self.group, 0), group=self.group)
        return tree

    def check_same(self, **facts: Any) -> None:
        """Check that all ranks hold the same, bit for bit.

        Args:
            facts: trees of tensors, or whatever prints as what it is, by name.

        Raises:
            RankError: when they do not.
        """
        if self.group is None:
            return
        digests = [_hash_tree(fact) for fact in facts.values()]
        self.ask(False)
        table = self._gather_rows(*digests)
        for name, *column in zip(facts, *table, strict=True):
            others = [rank for rank, digest in enumerate(column) if digest != column[0]]
            if others:
                remedy = "seed and build it alike on every rank, or send that of rank 0 to all"
                raise RankError(f"the same {name.replace('_', ' ')} on every rank", others, "another one", remedy)

    def mean(self, loss: Loss) -> Loss:
        """The mean of `loss` over the ranks, as a function of shared parameters; as often differentiable as `loss`."""
        if self.group is None:
            return loss

        def mean_loss(params: dict[str, Tensor]) -> Tensor:
            shared = _Share.apply(self, *params.values())
            return _Mean.apply(self, loss(dict(zip(params, shared, strict=True))))[0]

        return mean_loss

    def average(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The mean of each tensor over the ranks, without derivative."""
        count = dist.get_world_size(self.group)
        parts = tuple((x / count).contiguous() for x in tensors)
        self.ask(False)
        with _await_all_ranks():
            for work in [dist.all_reduce(x, group=self.group, async_op=True) for x in parts]:
                work.wait()
        return parts

    def _gather_rows(self, *row: int) -> list[list[int]]:
        """The `row` of each rank."""
        if self.group is None:
            return [list(row)]
        device = next(self.model.parameters()).device
        table = torch.zeros(dist.get_world_size(self.group), len(row), dtype=torch.int64, device=device)
        table[dist.get_rank(self.group)] = torch.tensor(row, device=device)
        with _await_all_ranks():
            dist.all_reduce(table, group=self.group)
        return table.tolist()


@contextmanager
def _await_all_ranks() -> Iterator[None]:
    """A context in which all ranks have to take part."""
    try:
        yield
    except RuntimeError as error:
        got = f"none in time ({error})"
        raise RankError("an answer of every rank", [], got, "start the ranks again from a checkpoint") from error


class _Share(Function):
    """Shared tensors as local ones."""

    @staticmethod
    def forward(ctx, ranks, *shared):
        ctx.ranks = ranks
        return tuple(x.view_as(x) for x in shared)

    @staticmethod
    def backward(ctx, *local):
        return None, *_Mean.apply(ctx.ranks, *local)


class _Mean(Function):
    """The means of local tensors, which are shared."""

    @staticmethod
    def forward(ctx, ranks, *local):
        ctx.ranks = ranks
        return ranks.average(local)

    @staticmethod
    def backward(ctx, *shared):
        return None, *_Share.apply(ctx.ranks, *shared)


def check_whole(model: nn.Module) -> None:
    """Refuse parameters of which each process holds a part only, and what is no model.

    Raises:
        ParameterError: when there is one.
        TeleportError: when it is no model.
    """
    check_model(model)
    remedy = "teleport before sharding, or gather the full state, teleport a plain copy and load it back"
    for name, p in model.named_parameters():
        if hasattr(p, "placements"):  # a DTensor, of FSDP2 or of tensor parallelism
            raise ParameterError(name, "a whole tensor on this process", f"a DTensor, {p.placements}", remedy)
    for name, module in model.named_modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise ParameterError(
                f"{name}.*".lstrip("."), "a whole tensor on this process", "one that FSDP shards", remedy
            )


def _hash_tree(tree: Any) -> int:
    """A number for what is in `tree`; of a tensor the sum of its entries, read as integers, stands for its bits.

    >>> _hash_tree([torch.ones(2), "a"]) == _hash_tree([torch.ones(2), "b"])
    False
    """
    leaves = tree_leaves(tree)
    tensors = [torch.view_as_real(x) if x.is_complex() else x for x in leaves if isinstance(x, Tensor)]
    sums = [x.detach().contiguous().view(BITS[x.dtype.itemsize]).sum(dtype=torch.int64) for x in tensors]
    facts = [(tuple(x.shape), str(x.dtype), int(s)) for x, s in zip(tensors, sums, strict=True)]
    text = repr((facts, [x for x in leaves if not isinstance(x, Tensor)]))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")
