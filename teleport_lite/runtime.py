"""What a model is run as: unwrapped, eager, its random state kept, other tensors in the places of its parameters."""

from __future__ import annotations

import inspect
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from teleport_lite.errors import TeleportError

LossFn = Callable[[Any], Tensor]  # of the model
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
OPS = ("matmul", "conv", "rnn")
Inputs = tuple  # the positional arguments of one call of the model


class Call(NamedTuple):
    """The arguments of one call of a model."""

    args: tuple
    kwargs: dict[str, Any]


class Stage:
    """`model` with other tensors in the places of its parameters, and fresh copies of its buffers in theirs.

    A place is an entry of the `_parameters` or `_buffers` of a module. Places are found by identity, so a parameter
    that is registered twice, or whose module is, is replaced wherever it stands. Invariant: after `put_back` each place
    holds the very object that it held when the stage was made, and each module the very attributes.

    Raises:
        TeleportError: when a module is compiled by TorchScript, whose places Python does not reach.

    >>> model = nn.Linear(1, 1, bias=False)
    >>> stage, weight = Stage(model), model.weight
    >>> stage.put({"weight": torch.tensor([[2.0]])})
    >>> model(torch.ones(1)), stage.put_back(), model.weight is weight
    (tensor([2.]), None, True)
    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        if any(isinstance(module, torch.jit.ScriptModule) for module in modules):
            remedy = "pass the module that was scripted, and script it again afterwards"
            raise TeleportError("a module of Python", "a ScriptModule", remedy)
        names = {id(t): name for name, t in named_tensors(model).items()}
        homes: tuple[list[dict], ...] = [m._parameters for m in modules], [m._buffers for m in modules]
        self._parameters, self._buffers = (
            [(places, key, t, names[id(t)]) for places in home for key, t in places.items() if t is not None]
            for home in homes
        )
        self._attributes = [(vars(module), dict(vars(module))) for module in modules]
        self._sparse = [vars(module) for module in modules if getattr(module, "sparse", False) is True]

    def put(self, params: dict[str, Tensor], buffers: dict[str, Tensor] | None = None) -> None:
        """Let `params` stand in their places, the model's own parameters in all others, and buffers be as at first.

        Those among `buffers` begin as copies of these.
        """
        self._restore_attributes()
        for attributes in self._sparse:  # sparse gradients cannot be carried through what made the parameters
            attributes["sparse"] = False
        buffers = buffers or {}
        copies = {id(b): buffers.get(name, b).clone() for _, _, b, name in self._buffers}
        for places, key, p, name in self._parameters:
            places[key] = params.get(name, p)
        for places, key, b, _ in self._buffers:
            places[key] = copies[id(b)]

    def put_back(self) -> None:
        """Let all stand where it stood."""
        self._restore_attributes()
        for places, key, p, _ in self._parameters:
            places[key] = p
        for places, key, b, _ in self._buffers:
            places[key] = b

    def _restore_attributes(self) -> None:
        """What a forward pass keeps in a module, an activation or a count, is undone."""
        for now, then in self._attributes:
            if len(now) != len(then) or any(now.get(key, now) is not value for key, value in then.items()):
                for key in now.keys() - then.keys():
                    del now[key]
                now.update(then)


class RandomState:
    """The global random states that a model can draw from: of torch, of the devices it lives on, of Python and numpy.

    >>> state, first = RandomState(nn.Linear(1, 1)), torch.rand(3)
    >>> state.restore()
    >>> torch.equal(first, torch.rand(3))
    True
    """

    def __init__(self, module: nn.Module) -> None:
        self.torch, self.python = torch.get_rng_state(), random.getstate()
        devices = {p.device for p in module.parameters() if p.device.type not in ("cpu", "meta")}
        self.devices = {d: getattr(torch, d.type).get_rng_state(*_random_devices(d)) for d in devices}
        numpy: Any = getattr(sys.modules.get("numpy"), "random", None)
        self.numpy = None if numpy is None else (numpy, numpy.get_state())

    def differs(self) -> bool:
        """Whether torch has drawn since."""
        pairs = [(torch.get_rng_state(), self.torch)]
        pairs += [(getattr(torch, d.type).get_rng_state(*_random_devices(d)), s) for d, s in self.devices.items()]
        return not all(torch.equal(a, b) for a, b in pairs)

    def restore(self) -> None:
        """Let all draws be again those that followed."""
        torch.set_rng_state(self.torch)
        random.setstate(self.python)
        for device, state in self.devices.items():
            getattr(torch, device.type).set_rng_state(state, *_random_devices(device))
        if self.numpy is not None:
            self.numpy[0].set_state(self.numpy[1])


def _random_devices(device: torch.device) -> tuple[torch.device, ...]:
    return () if device.type == "mps" else (device,)  # of which there is one


@contextmanager
def kept_random_state(module: nn.Module) -> Iterator[RandomState]:
    """A context that leaves the global random state, of the devices that `module` lives on, as it was."""
    state = RandomState(module)
    try:
        yield state
    finally:
        state.restore()


def coarsest_dtype(dtypes: list[torch.dtype]) -> torch.dtype:
    """The floating-point type with the largest machine epsilon.

    >>> coarsest_dtype([torch.float32, torch.bfloat16, torch.float64])
    torch.bfloat16
    """
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def widest_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 on a device without it, such as those of Apple.

    >>> widest_dtype(torch.device("cpu"))
    torch.float64
    """
    try:
        return torch.zeros((), dtype=torch.float64, device=device).dtype
    except (RuntimeError, TypeError):
        return torch.float32


def home_of_float64(device: torch.device) -> torch.device:
    """The device, or the CPU where it has no float64."""
    return device if widest_dtype(device) == torch.float64 else torch.device("cpu")


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of a model, by name.

    >>> list(named_tensors(nn.BatchNorm1d(1)))
    ['weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked']
    """
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def unwrap_compiled(model: nn.Module, names: Iterable[str] = ()) -> nn.Module:
    """The module in which `names` are those of parameters: inside of `torch.compile`, or as it is."""
    inner = getattr(model, "_orig_mod", None)
    if isinstance(inner, nn.Module) and set(names) <= dict(inner.named_parameters()).keys():
        return inner
    return model


@contextmanager
def eager_mode(device: str) -> Iterator[None]:
    """A context without compilation, without autocast, and with float32 products in full: TF32 is not exact enough."""
    compiled = "torch._dynamo" in sys.modules  # importing it takes seconds, so not before something is compiled
    stance = getattr(torch.compiler, "set_stance", None) if compiled else None  # torch >= 2.6
    autocast = torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
    with stance("force_eager") if stance else nullcontext(), autocast, float32_in_full():
        yield


@contextmanager
def float32_in_full() -> Iterator[None]:
    """A context without TF32, whichever of the two ways of torch it was allowed in: by flags, or for each operation."""
    backends: Any = torch.backends
    places = [getattr(b, op) for b in (backends.cuda, backends.cudnn, backends.mkldnn) for op in OPS if hasattr(b, op)]
    places = [place for place in places if hasattr(place, "fp32_precision")]  # torch >= 2.9
    precisions = [place.fp32_precision for place in places]
    flags: list[tuple[Callable, Any]] = []
    switches: tuple[tuple[Callable, Callable, Any], ...] = (
        (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest"),
        (lambda: backends.cudnn.allow_tf32, lambda on: setattr(backends.cudnn, "allow_tf32", on), False),
    )
    for read, write, off in switches:
        with suppress(RuntimeError):  # where the flag and the operations disagree
            flags.append((write, read()))
        write(off)
    for place in places:  # which may follow torch.backends.fp32_precision
        if place.fp32_precision not in ("none", "ieee"):
            place.fp32_precision = "ieee"
    try:
        yield
    finally:
        for write, value in flags:
            write(value)
        for place, precision in zip(places, precisions, strict=True):
            place.fp32_precision = precision


def unfused_attention() -> AbstractContextManager:
    """A context in which attention is computed by its parts: the fused kernels have no second derivative."""
    return sdpa_kernel(SDPBackend.MATH)


def as_inputs(example_inputs: object) -> Inputs:
    """The positional arguments that `example_inputs` stands for: a tuple or list as it is, anything else alone."""
    return tuple(example_inputs) if isinstance(example_inputs, (tuple, list)) else (example_inputs,)


def describe_value(value: object) -> str:
    """What a value is, in few words: arrays, containers and long texts are not printed.

    >>> describe_value("1"), describe_value([1.0, 2.0]), describe_value(TeleportError)
    ("'1'", 'list of length 2', 'class TeleportError')
    """
    if isinstance(value, type):
        return f"class {value.__name__}"
    name, shape = type(value).__name__, getattr(value, "shape", None)
    if isinstance(shape, tuple):
        return f"{name} of shape {tuple(shape)}"
    if isinstance(value, (tuple, list, dict, set)):
        return f"{name} of length {len(value)}"
    text = repr(value)
    return text if len(text) <= 40 and not text.startswith("<") else name


def check_model(model: object) -> None:
    """Refuse what is no module.

    Raises:
        TeleportError: when it is not.

    >>> check_model(nn.Linear)
    Traceback (most recent call last):
    teleport_lite.errors.TeleportError: expected a model, got class Linear; pass an instance of torch.nn.Module
    """
    if not isinstance(model, nn.Module):
        remedy = "pass an instance of torch.nn.Module"
        raise TeleportError("a model", describe_value(model), remedy)


def check_loss_fn(loss_fn: object) -> None:
    """Refuse what cannot be called with the net alone.

    Raises:
        TeleportError: when it cannot.

    >>> check_loss_fn(nn.MSELoss())
    Traceback (most recent call last):
    teleport_lite.errors.TeleportError: expected a function of the net, got MSELoss, which takes (input, target); \
pass lambda net: criterion(net(x), y)
    """
    got = describe_value(loss_fn)
    if callable(loss_fn):
        try:
            signature = inspect.signature(loss_fn.forward if isinstance(loss_fn, nn.Module) else loss_fn)
        except (TypeError, ValueError):  # of a builtin
            return
        try:
            signature.bind(None)
        except TypeError:
            name = getattr(loss_fn, "__name__", type(loss_fn).__name__)
            got = f"{name}, which takes ({', '.join(signature.parameters)})"
        else:
            return
    raise TeleportError("a function of the net", got, "pass lambda net: criterion(net(x), y)")


def check_generator(generator: object) -> torch.Generator | None:
    """`generator` when it is one, or None.

    Raises:
        TeleportError: otherwise.
    """
    if generator is None or isinstance(generator, torch.Generator):
        return generator
    seed = generator if isinstance(generator, int) else 0
    raise TeleportError("a torch.Generator", repr(generator), f"pass torch.Generator().manual_seed({seed})")
