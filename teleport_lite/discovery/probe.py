"""The private copy of a model that discovery runs: in float64 on the CPU, each run from the same state."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._python_dispatch import TorchDispatchMode

from teleport_lite.discovery.dispatch import ReadingsSeen
from teleport_lite.discovery.draws import seed_everything
from teleport_lite.discovery.float64 import Float64, float64_default
from teleport_lite.discovery.inputs import Arguments
from teleport_lite.discovery.memory import storage_key
from teleport_lite.discovery.watch import Watch
from teleport_lite.functional import Params
from teleport_lite.host import copy_of, unwrap_module
from teleport_lite.outputs import arguments_of, tensors_of
from teleport_lite.runtime import eager_mode, kept_random_state

REPEATED = 65537  # random numbers, of which no row of a matrix has the same as another one


class Probe:
    """A copy of `model`, with parameters that may be written to.

    Attributes:
        params: the parameters themselves, by the names that they have in `model`.
        values: where they stand between two runs.
        given: where they stood before all were moved off special values.
        movable: the buffers that may move along, by name.
        home: values of the parameters and of these buffers.
        of: what `outputs` gives: "outputs", or "loss" for their logarithmic softmax, which a cross-entropy sees.
    """

    def __init__(self, model: nn.Module) -> None:
        self.module = copy_of(model)
        for table in (m for m in self.module.modules() if isinstance(m, nn.Embedding)):
            table.padding_idx = None  # which hides a row from gradients alone
        self.arguments = arguments_of(self.module)
        self.params: Params = dict(self.module.named_parameters())
        self.mode: Float64 | None = Float64()
        self.of = "outputs"
        self.buffers = {b: b.clone() for b in self.module.buffers()}
        names = _movable_buffers(unwrap_module(model))
        self.movable: Params = {n: b for n, b in self.module.named_buffers() if n in names}
        self.attributes = [
            (m, {k: _copy_containers(v) for k, v in m.__dict__.items()})
            for m in self.module.modules()
            if not isinstance(m, torch.jit.ScriptModule)
        ]
        self.generators = [
            (v, v.get_state())
            for m in self.module.modules()
            for v in m.__dict__.values()
            if isinstance(v, torch.Generator)
        ]
        self._settle_home()
        self.given = self.values

    def _settle_home(self) -> None:
        self.values: Params = {name: p.detach().clone() for name, p in self.params.items()}
        self.home: Params = {**self.values, **{n: self.buffers[b] for n, b in self.movable.items()}}
        self.here = self.home

    def perturb_parameters(self, generator: torch.Generator) -> None:
        """Move everything off special values: nothing must hold only because a number happens to be 0 or 1."""
        with torch.no_grad():
            for p in self.params.values():
                if p.is_floating_point() or p.is_complex():
                    typical = p.abs().square_().mean().sqrt()
                    p.add_(randn_like(p, generator).mul_(typical.clamp(min=0.1)))
            for module in self.module.modules():
                if isinstance(module, _NormBase) and module.running_mean is not None and module.running_var is not None:
                    module.running_mean.add_(0.1 * randn_like(module.running_mean, generator))
                    module.running_var.mul_((0.1 * randn_like(module.running_var, generator)).exp())
        self.buffers = {b: b.clone() for b in self.buffers}
        self._settle_home()

    def outputs(
        self, call: Arguments, training: bool = False, seed: int = 0, modes: tuple[TorchDispatchMode, ...] = ()
    ) -> list[Tensor]:
        """The tensors that the copy returns, from its first state; `modes` see its operators, the last one first."""
        self._restore_modules()
        self.module.train(training)
        seed_everything(seed)
        call = call.fresh()
        with ExitStack() as stack:
            for mode in modes:
                if isinstance(mode, Watch):
                    mode.look_at(call.tensors())
                stack.enter_context(mode)
            stack.enter_context(ReadingsSeen() if modes else nullcontext())
            with self.mode or nullcontext():
                found = tensors_of(self.module(*call.args, **call.kwargs), self.arguments)
            if self.of == "outputs":
                return found
            real = (t.is_floating_point() and t.ndim > 1 for t in found)
            return [t.log_softmax(1 if t.ndim > 3 else -1) if r else t for t, r in zip(found, real, strict=True)]

    def perturb_buffers(self, generator: torch.Generator) -> bool:
        """Move buffers that the last run has changed off their values, for a state may be anything; whether any is."""
        moved = False
        for module, name, b in self._buffer_places():
            if not b.is_floating_point() or b.layout is not torch.strided:
                continue
            if id(module._buffers.get(name)) != id(b) or not torch.equal(b, self.buffers[b]):
                self.buffers[b] += self.buffers[b].abs().mean().clamp(min=1.0) * randn_like(b, generator)
                moved = True
        return moved

    def settle_buffers(self, call: Arguments) -> bool:
        """Let buffers be as a run in training mode leaves them, where some that no norm holds may move; whether so.

        A buffer of equal numbers that the model will write to would otherwise seem to be no leg.
        """
        normed = {b for m in self.module.modules() if isinstance(m, _NormBase) for b in m.buffers(recurse=False)}
        if normed.issuperset(self.movable.values()):
            return False
        try:
            self.outputs(call, training=True)
        except Exception:
            return False
        for b, now in [(b, module._buffers.get(name)) for module, name, b in self._buffer_places()]:
            if b not in normed and now is not None and now.shape == b.shape:
                self.buffers[b].copy_(now)
        return True

    def _buffer_places(self) -> Iterator[tuple[nn.Module, str, Tensor]]:
        """Where the buffers were at first."""
        for module, attributes in self.attributes:
            yield from ((module, name, b) for name, b in attributes["_buffers"].items() if b is not None)

    def buffers_left(self) -> Params:
        """What the last run has made of the buffers that may move along."""
        names = {b: n for n, b in self.movable.items()}
        now = {names[b]: module._buffers.get(name) for module, name, b in self._buffer_places() if b in names}
        return {n: b for n, b in now.items() if b is not None}

    def _restore_modules(self) -> None:
        """Give back to the modules what they held at first; a run may have changed it."""
        for module, attributes in self.attributes:
            module.__dict__.clear()
            module.__dict__.update({k: _copy_containers(v) for k, v in attributes.items()})
        with torch.no_grad():
            for b, value in self.buffers.items():
                b.copy_(value)
        for g, state in self.generators:
            g.set_state(state)

    @contextmanager
    def at(self, params: Params) -> Iterator[None]:
        """A context in which the copy stands at `params`, and where it stood before in all others."""
        here = self.here
        moved = {name: p for name, p in params.items() if p is not here[name]}
        try:
            self.here = {**here, **moved}
            self._write_parameters(moved)
            yield
        finally:
            self.here = here
            self._write_parameters({name: here[name] for name in moved})

    def _write_parameters(self, params: Params) -> None:
        with torch.no_grad():
            for name, value in params.items():
                if name in self.movable:
                    self.buffers[self.movable[name]] = value
                else:
                    self.params[name].copy_(value)


def _movable_buffers(model: nn.Module) -> set[str]:
    """The names of the buffers that hold several real numbers, are saved with the model, and share no memory."""
    modules = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
    saved = {id(b) for m in modules for key, b in m._buffers.items() if key not in m._non_persistent_buffers_set}
    holders = Counter(storage_key(t) for t in (*model.parameters(), *model.buffers()))
    real = {n: b for n, b in model.named_buffers() if id(b) in saved and b.is_floating_point() and b.numel() > 1}
    return {n for n, b in real.items() if holders[storage_key(b)] == 1 and all(b.stride())}


def _copy_containers(value: Any) -> Any:
    return value.copy() if type(value) in (list, dict, OrderedDict, set) else value


def randn_like(like: Tensor, generator: torch.Generator) -> Tensor:
    """Normal random numbers of the shape, type and device of `like`; those for large tensors repeat, which is cheap."""
    n = like.numel()
    drawn = torch.randn(min(n, REPEATED), generator=generator, dtype=like.dtype)
    return drawn.repeat(-(-n // REPEATED))[:n].view(like.shape).to(like.device)


def scattered(params: Params, spread: float, generator: torch.Generator) -> Params:
    """Each real entry times one plus `spread` times a normal number; those for large tensors repeat, which is cheap."""
    count = min(REPEATED, max((p.numel() for p in params.values()), default=0))
    factors = (1 + spread * torch.randn(count, generator=generator, dtype=torch.float64)).repeat(2)
    found = dict(params)
    for name, p in params.items():
        if p.is_floating_point() and (n := p.numel()):
            start, whole = int(torch.randint(count, (), generator=generator)), n // count * count
            own, flat, moved = factors[start : start + count].to(p.dtype), p.detach().reshape(-1), p.new_empty(n)
            torch.mul(flat[:whole].view(-1, count), own, out=moved[:whole].view(-1, count))
            torch.mul(flat[whole:], own[: n - whole], out=moved[whole:])
            found[name] = moved.view(p.shape)
    return found


@contextmanager
def run_settings(module: nn.Module) -> Iterator[None]:
    """All that is set while a copy is run, and set back afterwards.

    No gradients, no compilation, no autocast, no fused kernels (each operation can be seen), float64 and the CPU by
    default; random states are kept.
    """
    fast, here = torch.backends.mha.get_fastpath_enabled(), torch.get_default_device().type == "cpu"
    with (
        torch.no_grad(), kept_random_state(module), eager_mode("cpu"), float64_default(),
        sdpa_kernel(SDPBackend.MATH), nullcontext() if here else torch.device("cpu"),
    ):  # fmt: skip
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
