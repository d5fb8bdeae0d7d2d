"""The private copy of a model that discovery runs: in float64 on the CPU, each run from the same state."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._python_dispatch import TorchDispatchMode

from teleport_lite.discovery.draws import seed_everything
from teleport_lite.discovery.float64 import Float64, float64_default
from teleport_lite.discovery.inputs import Arguments
from teleport_lite.discovery.watch import Watch
from teleport_lite.functional import Params
from teleport_lite.host import copy_of
from teleport_lite.outputs import arguments_of, tensors_of
from teleport_lite.runtime import eager_mode, kept_random_state


class Probe:
    """A copy of `model`, with parameters that may be written to.

    Attributes:
        params: the parameters themselves, by the names that they have in `model`.
        values: where they stand between two runs.
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
        self.attributes = [
            (m, {k: _kept(v) for k, v in m.__dict__.items()})
            for m in self.module.modules()
            if not isinstance(m, torch.jit.ScriptModule)
        ]
        self.generators = [
            (v, v.get_state())
            for m in self.module.modules()
            for v in m.__dict__.values()
            if isinstance(v, torch.Generator)
        ]
        self.values: Params = {name: p.detach().clone() for name, p in self.params.items()}

    def perturb(self, generator: torch.Generator) -> None:
        """Move everything off special values: nothing must hold only because a number happens to be 0 or 1."""
        with torch.no_grad():
            for p in self.params.values():
                if p.is_floating_point() or p.is_complex():
                    p.add_(p.abs().square().mean().sqrt().clamp(min=0.1) * normal(p, generator))
            for module in self.module.modules():
                if isinstance(module, _NormBase) and module.running_mean is not None and module.running_var is not None:
                    module.running_mean.add_(0.1 * normal(module.running_mean, generator))
                    module.running_var.mul_((0.1 * normal(module.running_var, generator)).exp())
        self.buffers = {b: b.clone() for b in self.buffers}
        self.values = {name: p.detach().clone() for name, p in self.params.items()}

    def run(
        self, call: Arguments, training: bool = False, seed: int = 0, modes: tuple[TorchDispatchMode, ...] = ()
    ) -> Any:
        """What the copy returns, from its first state; `modes` see its operators, the last one first."""
        self._restore()
        self.module.train(training)
        seed_everything(seed)
        call = call.fresh()
        with ExitStack() as stack:
            for mode in (*modes, *((self.mode,) if self.mode else ())):
                if isinstance(mode, Watch):
                    mode.look_at(call.tensors())
                stack.enter_context(mode)
            return self.module(*call.args, **call.kwargs)

    def outputs(
        self, call: Arguments, training: bool = False, seed: int = 0, modes: tuple[TorchDispatchMode, ...] = ()
    ) -> list[Tensor]:
        """The tensors of what `run` returns."""
        found = tensors_of(self.run(call, training, seed, modes), self.arguments)
        if self.of == "outputs":
            return found
        with ExitStack() as stack:
            for mode in modes:
                stack.enter_context(mode)
            real = (t.is_floating_point() and t.ndim > 1 for t in found)
            return [t.log_softmax(1 if t.ndim > 3 else -1) if r else t for t, r in zip(found, real, strict=True)]

    def unsettle(self, generator: torch.Generator) -> bool:
        """Move buffers that the last run has changed off their values, for a state may be anything; whether any is."""
        moved = False
        for module, attributes in self.attributes:
            for name, b in attributes["_buffers"].items():
                if b is None or not b.is_floating_point() or b.layout is not torch.strided:
                    continue
                if id(module._buffers.get(name)) != id(b) or not torch.equal(b, self.buffers[b]):
                    self.buffers[b] += self.buffers[b].abs().mean().clamp(min=1.0) * normal(b, generator)
                    moved = True
        return moved

    def _restore(self) -> None:
        """Give back to the modules what they held at first; a run may have changed it."""
        for module, attributes in self.attributes:
            module.__dict__.clear()
            module.__dict__.update({k: _kept(v) for k, v in attributes.items()})
        with torch.no_grad():
            for b, value in self.buffers.items():
                b.copy_(value)
        for g, state in self.generators:
            g.set_state(state)

    @contextmanager
    def at(self, params: Params) -> Iterator[None]:
        """A context in which the copy stands at `params`."""
        moved = [name for name, p in params.items() if p is not self.values[name]]
        try:
            self._write({name: params[name] for name in moved})
            yield
        finally:
            self._write({name: self.values[name] for name in moved})

    def _write(self, params: Params) -> None:
        with torch.no_grad():
            for name, value in params.items():
                self.params[name].copy_(value)


def _kept(value: Any) -> Any:
    return copy.copy(value) if type(value) in (list, dict, OrderedDict, set) else value


def normal(like: Tensor, generator: torch.Generator) -> Tensor:
    """Normal random numbers of the shape, type and device of `like`."""
    return torch.randn(like.shape, generator=generator, dtype=like.dtype).to(like.device)


@contextmanager
def laboratory(module: nn.Module) -> Iterator[None]:
    """All that is set while a copy is run, and set back afterwards.

    No gradients, no compilation, no autocast, no fused kernels (each operation can be seen), float64 and the CPU by
    default; random states are kept.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    with (
        torch.no_grad(), kept_random_state(module), eager_mode("cpu"), float64_default(),
        sdpa_kernel(SDPBackend.MATH), torch.device("cpu"),
    ):  # fmt: skip
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
