"""Parameters as a plain dictionary, and losses as functions of it.

Everything in the package is a function of `Params`, the dictionary that `dict(model.named_parameters())` gives. A loss
is evaluated at other parameters by an `Evaluation`: on the model itself, with those parameters in the places of its own
for as long as that takes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from teleport_lite.distributed import check_whole
from teleport_lite.errors import EmptyModelError, LossError, ParameterError, ShapeError
from teleport_lite.evaluation import BACKWARD, DIFFERENTIABLE
from teleport_lite.evaluation import Evaluation as Evaluation  # the functions that this module is about
from teleport_lite.evaluation import Loss as Loss
from teleport_lite.evaluation import Params as Params
from teleport_lite.evaluation import loss_of as loss_of
from teleport_lite.evaluation import session as session
from teleport_lite.host import check_loaded
from teleport_lite.runtime import check_generator, unfused_attention


def trainable(model: nn.Module) -> Params:
    """The parameters of `model` that require a gradient, by name; a shared parameter stands once, under its first name.

    Raises:
        EmptyModelError: when there is none.
        ParameterError: when one is sharded over several processes, has no shape or data, or overlaps another one in
            memory.

    >>> sorted(trainable(nn.Linear(2, 3)))
    ['bias', 'weight']
    """
    check_whole(model)
    check_loaded(model)
    everything: Params = dict(model.named_parameters())
    check_apart(everything)
    params: Params = {name: p for name, p in everything.items() if p.requires_grad}
    if not params:
        raise EmptyModelError(model)
    return params


def check_finite(params: Params) -> None:
    """Refuse parameters that are not finite.

    Raises:
        ParameterError: when there is one.
    """
    for name, p in params.items():
        if not p.isfinite().all():
            raise ParameterError(name, "finite", "NaN or infinity in it", "restore it from a checkpoint")


def check_apart(params: Params) -> None:
    """Refuse two parameters that share an entry in memory: moving one would move the other.

    Raises:
        ParameterError: when there are such.
    """
    by_storage: dict[Any, list[tuple[int, int, str]]] = {}
    for name, p in params.items():
        if p.layout == torch.strided and p.numel():
            first = int(p.storage_offset())
            last = first + sum(int((n - 1) * step) for n, step in zip(p.shape, p.stride(), strict=True))
            key = p.untyped_storage()._cdata
            by_storage.setdefault(key, []).append((first * p.itemsize, (last + 1) * p.itemsize, name))
    for spans in by_storage.values():
        spans.sort()
        for k, (_, end, name) in enumerate(spans):
            for other in (other for start, _, other in spans[k + 1 :] if start < end):
                if torch.isin(_byte_offsets(params[name]), _byte_offsets(params[other])).any():
                    remedy = f"let both modules hold one nn.Parameter, or compute one from {name!r} in forward"
                    raise ParameterError(other, "alone in its memory", f"the memory of {name!r}", remedy)


def _byte_offsets(p: Tensor) -> Tensor:
    """Where the entries of `p` begin in its storage, in bytes."""
    places = torch.arange(p.untyped_storage().nbytes() // p.itemsize)
    return places.as_strided(p.shape, p.stride(), p.storage_offset()).flatten() * p.itemsize


def value_and_grad(
    loss: Loss, params: Params, *, create_graph: bool = False, scale: Callable[[], float] = lambda: 1.0
) -> tuple[Tensor, Params]:
    """The loss at `params` and its gradient, one reverse pass.

    With `create_graph` both can be differentiated again, with respect to whatever `params` were computed from. A
    `scale`, asked for when the loss is known, multiplies what is differentiated, and divides the gradient.

    Raises:
        LossError: when the loss is no scalar, or does not depend on the parameters.

    >>> value_and_grad(lambda p: (p["w"] ** 2).sum(), {"w": torch.tensor([1.0, 2.0])})
    (tensor(5.), {'w': tensor([2., 4.])})
    """
    with session(loss), unfused_attention() if create_graph else nullcontext(), torch.enable_grad():
        points = {  # views, because one parameter may have been computed from another
            name: p.view_as(p) if create_graph and p.requires_grad else p.detach().requires_grad_()
            for name, p in params.items()
        }
        value = check_scalar(loss(points))
        if not value.requires_grad:
            raise LossError(
                "a loss that depends on the parameters",
                "one without a gradient",
                "call the given net inside loss_fn, and do not detach its output",
            )
        along = None if (factor := scale()) == 1 else torch.full_like(value, factor)
        grads = gradients(value, [*points.values()], along=along, create_graph=create_graph)
        grads = grads if along is None else [None if g is None else g / factor for g in grads]
        if create_graph and isinstance(loss, Evaluation):
            loss.return_before([g for g in grads if g is not None], points)
    if all(g is None for g in grads):
        raise LossError(
            "a loss that depends on the parameters",
            "one that uses none of them",
            "call the given net inside loss_fn",
        )
    filled = {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(points.items(), grads, strict=True)}
    return (value if create_graph else value.detach()), filled


REENTRANT = ("a reentrant checkpoint", "pass use_reentrant=False to torch.utils.checkpoint.checkpoint")
FEWER = "replace that operation, or use what needs fewer derivatives, as gradient_norm does"
HINDRANCES = {  # by what torch says: what it means, what helps
    "use_reentrant": REENTRANT,
    "compatible with .grad()": REENTRANT,
    "sparse tensors": ("sparse gradients", "pass sparse=False to the embedding"),
    "no autograd formula": ("{}", "give the operator one, with register_autograd"),
    "is not implemented": ("{}", FEWER),
    "once_differentiable": ("{}", "drop the mark from its backward, or use what needs one derivative"),
    "a second time": BACKWARD,
}


def gradients(
    value: Tensor, points: Sequence[Tensor], *, along: Tensor | None = None, create_graph: bool = False
) -> list[Tensor | None]:
    """The derivatives of `value` by `points`, dense: `torch.autograd.grad` with errors that say what to do.

    Raises:
        LossError: when something stands in the way that a user can change.
        RuntimeError: whatever else torch has to say.
    """
    try:
        grads = torch.autograd.grad(value, [*points], along, create_graph=create_graph, allow_unused=True)
    except RuntimeError as error:
        for said, (meant, remedy) in HINDRANCES.items():
            if said in str(error):
                got = meant.format(str(error).split(". ")[0].rstrip("."))
                raise LossError(DIFFERENTIABLE, got, remedy) from error
        raise
    return [g.to_dense() if g is not None and g.is_sparse else g for g in grads]


def check_complete(grads: Iterable[Tensor]) -> None:
    """Refuse gradients that torch differentiates only in part, without a word: past a @once_differentiable backward.

    Raises:
        LossError: when there is one.
    """
    nodes, seen = [g.grad_fn for g in grads], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            if node.name().endswith("Error"):
                remedy = (
                    "let its backward be differentiable, or use what needs fewer derivatives, as gradient_norm does"
                )
                raise LossError("a loss with second derivatives", "a function marked @once_differentiable", remedy)
            seen.add(node)
            nodes += [before for before, _ in node.next_functions]


def check_scalar(value: object) -> Tensor:
    """`value` when it is a scalar tensor.

    Raises:
        LossError: otherwise.
    """
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
        got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        remedy = "reduce it, for example with .mean()"
        if not isinstance(value, Tensor):
            remedy = "return the tensor itself, without .item(), .numpy() or what else comes with it"
        raise LossError("a real scalar tensor as the loss", got, remedy)
    return value.reshape(())


def hvp(loss: Loss, params: Params, vector: Params) -> Params:
    """The Hessian of the loss at `params` times `vector`, by differentiating the gradient along `vector`.

    Raises:
        ShapeError: when `vector` does not have the names and shapes of `params`.

    >>> hvp(lambda p: (p["w"] ** 3).sum(), {"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([1.0, 0.0])})
    {'w': tensor([6., 0.])}
    """
    for name, p in params.items():
        if name not in vector or vector[name].shape != p.shape:
            got = tuple(vector[name].shape) if name in vector else None
            raise ShapeError(f"vector[{name!r}]", tuple(p.shape), got, "pass a vector that is shaped like params")
    points = {name: p.detach().requires_grad_() for name, p in params.items()}
    with session(loss), unfused_attention(), torch.enable_grad():
        _, grads = value_and_grad(loss, points, create_graph=True)
        slope = dot(grads, vector)
        if not slope.requires_grad:  # a linear loss
            return {name: torch.zeros_like(p) for name, p in params.items()}
        check_complete(grads.values())
        rows = gradients(slope, [*points.values()])
    return {n: torch.zeros_like(p) if row is None else row for (n, p), row in zip(points.items(), rows, strict=True)}


def dot(a: Params, b: Params) -> Tensor:
    """The inner product of all entries together.

    >>> dot({"a": torch.tensor([1.0, 2.0])}, {"a": torch.tensor([3.0, 4.0])})
    tensor(11.)
    """
    return as_vector([(a[name] * b[name]).sum() for name in a]).sum()


def norm(params: Params) -> Tensor:
    """The Euclidean norm of all entries together.

    >>> norm({"a": torch.tensor([3.0]), "b": torch.tensor([[4.0]])})
    tensor(5.)
    """
    return entry_norms(params).norm()


def generator_for(params: Params, generator: torch.Generator | None) -> torch.Generator:
    """`generator`, or one where `params` are, begun at random: evaluations put the global random state back."""
    if generator := check_generator(generator):
        return generator
    return torch.Generator(next(iter(params.values())).device).manual_seed(int(torch.randint(2**62, ())))


def normal_like(params: Params, generator: torch.Generator) -> Params:
    """Normal random numbers for each parameter, drawn where the generator lives."""

    def draw_normal(p: Tensor) -> Tensor:
        drawn = torch.randn(p.shape, generator=generator, dtype=p.dtype, device=generator.device)
        return drawn.to(p.device, non_blocking=True)

    return {name: draw_normal(p) for name, p in params.items()}


def entry_norms(params: Params) -> Tensor:
    """The Euclidean norm of each entry of the dictionary: a vector.

    >>> entry_norms({"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([[1.0]])})
    tensor([5., 1.])
    """
    return as_vector([torch.linalg.vector_norm(p) for p in params.values()])


def as_vector(numbers: Sequence[Tensor]) -> Tensor:
    """Numbers of any types and devices as a vector, of the widest type, where the first one is."""
    dtype = functools.reduce(torch.promote_types, [x.dtype for x in numbers])
    return torch.stack([x.to(numbers[0].device, dtype) for x in numbers])
