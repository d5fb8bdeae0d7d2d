r"""What a teleport improves: objectives by name, or any callable on parameters.

An objective turns a `Problem` (a loss at a point) and a symmetry into a function of the coordinates `xi`. Where one
gradient tells the whole orbit, `gradient_norm` needs no further pass over the data: see *Gradient transport* in the
chapter *Teleporting*.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor

from teleport_lite.errors import LossError, TeleportError, UnknownNameError
from teleport_lite.functional import (
    Params,
    as_vector,
    check_complete,
    check_scalar,
    dot,
    gradients,
    hvp,
    norm,
    value_and_grad,
)
from teleport_lite.geometry import (
    RADII,
    Directions,
    goes_one_by_one,
    mean_kappa,
    mean_loss_around,
    sample_curves,
    sign_probes,
)
from teleport_lite.problem import AlongOrbit, Problem
from teleport_lite.symmetries.base import Symmetry


@dataclass(repr=False, eq=False)
class Objective:
    """What a teleport improves, as a function on the orbit.

    Args:
        name: how reports call it.
        along: (problem, symmetry) -> function of xi, differentiable in xi.
        quadratic: "params" or "gradient" when the objective is the norm of the moved parameters or of the transported
            gradient, so that closed forms apply.
        maximize: its natural direction, taken by a teleport that is not told another.
        transports: whether it takes gradients along the orbit instead of computing them there.
    """

    name: str
    along: Callable[[Problem, Symmetry], AlongOrbit]
    _: KW_ONLY
    quadratic: str | None = None
    maximize: bool = True
    transports: bool = False

    def before(self, problem: Problem, symmetry: Symmetry) -> Tensor:
        """The objective at the identity, without graph."""
        if self.quadratic is None:
            return problem.along(self, symmetry)(symmetry.zeros(problem.params)).detach()
        return norm(problem.gradient if self.quadratic == "gradient" else problem.params)

    def goes_up(self, maximize: object) -> bool:
        """The direction that `maximize` asks for; None is the natural one.

        Raises:
            TeleportError: when it is neither a bool nor None.

        >>> OBJECTIVES["weight_norm"].goes_up(None)
        False
        """
        if maximize is None:
            return self.maximize
        if isinstance(maximize, bool):
            return maximize
        remedy = "pass maximize=True to go up, maximize=False to go down"
        raise TeleportError("True, False or None as maximize", repr(maximize), remedy)

    def __repr__(self) -> str:
        return f"Objective({self.name})"


def _gradient_at(problem: Problem, symmetry: Symmetry, xi: Any) -> Params:
    """The gradient at the moved parameters, differentiable in xi: transported when exact, differentiated otherwise."""
    if symmetry.exact:
        return symmetry.transport(problem.gradient, xi, None if symmetry.linear else problem.params)
    return value_and_grad(problem.loss, problem.moved(symmetry, xi), create_graph=True)[1]


def _gradient_norm(problem: Problem, symmetry: Symmetry) -> AlongOrbit:
    return lambda xi: norm(_gradient_at(problem, symmetry, xi))


def _weight_norm(problem: Problem, symmetry: Symmetry) -> AlongOrbit:
    return lambda xi: norm(problem.moved(symmetry, xi))


def one_step_loss(lr: float = 0.1) -> Objective:
    r"""The loss after one gradient step of size `lr` from the moved point; minimise it.

    $L(g \cdot w - \eta \nabla L(g \cdot w))$ as a function of g.

    Raises:
        TeleportError: when `lr` is not positive.

    >>> one_step_loss(lr=0.01)
    Objective(one_step_loss)
    """
    if not lr > 0:
        raise TeleportError("a positive lr", lr, "pass the learning rate of the optimizer")

    def bind_to_orbit(problem: Problem, symmetry: Symmetry) -> AlongOrbit:
        def stepped_loss(xi):
            moved, grads = problem.moved(symmetry, xi), _gradient_at(problem, symmetry, xi)
            return check_scalar(problem.loss({name: moved[name] - lr * grads[name] for name in moved}))

        return stepped_loss

    return Objective("one_step_loss", bind_to_orbit, maximize=False, transports=True)


def sharpness(
    radii: Sequence[float] = RADII,
    directions: int = 100,
    *,
    generator: torch.Generator | None = None,
    chunk_size: int | None = None,
) -> Objective:
    r"""The mean loss around the moved point, in the same directions everywhere on the orbit; see `geometry.sharpness`.

    Without a `generator` the directions are those of seed 0.

    >>> sharpness(radii=[0.1], directions=10)
    Objective(sharpness)
    """

    def bind_to_orbit(problem: Problem, symmetry: Symmetry) -> AlongOrbit:
        drawn = Directions(problem.params, directions, generator=_generator_or_seed(generator))
        around = drawn if chunk_size else drawn[:]
        one_by_one = goes_one_by_one(problem.local, problem.params, radii, chunk_size, slopes=True)

        def local_sharpness(params: Params) -> Tensor:
            return mean_loss_around(problem.local, params, around, radii, chunk_size=chunk_size, one_by_one=one_by_one)

        mean = problem.mean(local_sharpness)
        return lambda xi: mean(problem.moved(symmetry, xi))

    return Objective("sharpness", bind_to_orbit, maximize=False)


def curvature(samples: int = 10, *, generator: torch.Generator | None = None) -> Objective:
    """The mean curvature of the orbit at the moved point, of the same curves everywhere; see `geometry.curvature`.

    Without a `generator` the curves are those of seed 0. The loss is not looked at.

    >>> curvature(samples=5)
    Objective(curvature)
    """

    def bind_to_orbit(problem: Problem, symmetry: Symmetry) -> AlongOrbit:
        curves = sample_curves(problem.params, symmetry, samples, generator=_generator_or_seed(generator))
        return lambda xi: mean_kappa(problem.moved(symmetry, xi), symmetry, curves)

    return Objective("curvature", bind_to_orbit)


def hessian_trace(samples: int = 10, *, generator: torch.Generator | None = None) -> Objective:
    r"""An estimate of the trace of the Hessian at the moved point, from the same probes everywhere.

    For an exact linear action the Hessian moves by $\rho^{-\top} H \rho^{-1}$, so that $z^\top H(g \cdot w)\, z$ is
    $v^\top H(w)\, v$ with $v = \rho^{-1} z$: the loss is differentiated at w alone. Without a `generator` the probes
    are those of seed 0.

    >>> hessian_trace(samples=5)
    Objective(hessian_trace)
    """

    def bind_to_orbit(problem: Problem, symmetry: Symmetry) -> AlongOrbit:
        probes = [*sign_probes(problem.params, samples, generator=_generator_or_seed(generator))]
        zero = {name: torch.zeros_like(p) for name, p in problem.params.items()}

        def along_vectors(entries: Params) -> Tensor:
            vectors = [{name: entries[f"{k}/{name}"] for name in zero} for k in range(samples)]
            images = [hvp(problem.local, problem.params, {n: x.detach() for n, x in v.items()}) for v in vectors]
            values = torch.stack([dot(v, h) for v, h in zip(vectors, images, strict=True)])
            return (2 * values - values.detach()).mean()  # v.Hv, and its derivative 2 Hv.dv

        mean = problem.mean(along_vectors)

        def trace_by_transport(xi):
            back = torch.func.vjp(lambda g: symmetry.transport(g, xi), zero)[1]
            return mean({f"{k}/{name}": x for k, z in enumerate(probes) for name, x in back(z)[0].items()})

        def trace_at_moved(xi):
            point = problem.moved(symmetry, xi)
            point = {n: p.view_as(p) if p.requires_grad else p.detach().requires_grad_() for n, p in point.items()}
            _, grads = value_and_grad(problem.loss, point, create_graph=True)
            return torch.stack([_quadratic_form(grads, point, z) for z in probes]).mean()

        return trace_by_transport if symmetry.exact and symmetry.linear else trace_at_moved

    return Objective("hessian_trace", bind_to_orbit, maximize=False, transports=True)


def _quadratic_form(grads: Params, point: Params, z: Params) -> Tensor:
    """z.Hz, differentiable, from the gradient at a point."""
    slope = dot(grads, z)
    check_complete(grads.values())
    rows = gradients(slope, [*point.values()], create_graph=True) if slope.requires_grad else [None] * len(point)
    terms = [(z[name] * row).sum() for name, row in zip(point, rows, strict=True) if row is not None]
    return as_vector(terms).sum() if terms else torch.zeros_like(slope)


def _generator_or_seed(generator: torch.Generator | None) -> torch.Generator:
    return torch.Generator().manual_seed(0) if generator is None else generator


OBJECTIVES: dict[str, Objective] = {
    "gradient_norm": Objective("gradient_norm", _gradient_norm, quadratic="gradient", transports=True),
    "weight_norm": Objective("weight_norm", _weight_norm, quadratic="params", maximize=False),
    "one_step_loss": one_step_loss(),
    "sharpness": sharpness(),
    "curvature": curvature(),
    "hessian_trace": hessian_trace(),
}


def as_objective(objective: object) -> Objective:
    """The objective of that name, an `Objective` as it is, or any callable on parameters as one to be maximised.

    Raises:
        UnknownNameError: for an unknown name.
        TeleportError: for anything else.

    >>> as_objective("gradient_norm")
    Objective(gradient_norm)
    >>> as_objective(lambda params: params["weight"].abs().max())
    Objective(<lambda>)
    """
    if isinstance(objective, Objective):
        return objective
    if isinstance(objective, str):
        if objective not in OBJECTIVES:
            raise UnknownNameError("objective", objective, OBJECTIVES)
        return OBJECTIVES[objective]
    if not callable(objective):
        known = ", ".join(OBJECTIVES)
        raise TeleportError("the name of an objective or a callable on params", objective, f"pass one of {known}")

    def bind_to_orbit(problem: Problem, symmetry: Symmetry) -> AlongOrbit:
        def checked_value(params: Params) -> Tensor:
            try:
                value: object = objective(params)
            except (TypeError, AttributeError, KeyError) as error:
                named = isinstance(error, KeyError) and error.args[0] not in params
                if not named and "'dict' object" not in str(error):
                    raise
                remedy = "take weights by name, and call the net as torch.func.functional_call(model, params, x)"
                raise LossError(
                    "an objective of params, a dictionary", f"{type(error).__name__}: {error}", remedy
                ) from error
            if not isinstance(value, Tensor) or value.numel() != 1:
                got = type(value).__name__
                raise LossError("a scalar tensor from the objective", got, "return a tensor of one entry")
            return value.reshape(())

        mean = problem.mean(checked_value)
        return lambda xi: mean(problem.moved(symmetry, xi))

    return Objective(getattr(objective, "__name__", type(objective).__name__), bind_to_orbit)
