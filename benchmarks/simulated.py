"""A simulated accelerator, for machines without one: `with simulated() as device:` makes the device type "sim" work.

A tensor on it is a `DeviceTensor`: PyTorch, C++ included, is told that it lives on sim:0, while its numbers lie in an
ordinary tensor, `host`, on which each operator is carried out. PyTorch lets such a backend be written in Python
(`torch.utils.backend_registration`). Like a GPU it

- refuses to meet tensors of the CPU, but for single numbers in elementwise operators, indices, and copies; the CPU
  takes the part of a second device;
- draws random numbers of its own, from generators of its own;
- lets the host wait where CUDA does (`waits`, by operator), counts operators (`operators`), follows the bytes in use;
- has autocast, fused cells of recurrent nets, and, when asked for, products in TF32, no float64, and sums whose last
  bits change from call to call (`atomics`).

Not simulated are streams, graphs, compilation, the rounding of real kernels, cuDNN, and fused attention.
Import it before the first backward pass: PyTorch starts a thread for each device then.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten, Plain = torch.ops.aten, torch.Generator
SIM, CPU = "sim", torch.device("cpu")
USABLE = torch.__version__.startswith("2.13.") and torch.accelerator.current_accelerator() is None

# How often the host waits inside an operator: to learn a number or a size, or for the error code of a solver.
WAITS = {
    **dict.fromkeys(("_local_scalar_dense", "nonzero", "masked_select", "equal", "_linalg_check_errors"), 1),
    **dict.fromkeys(("_unique2", "unique_dim", "unique_consecutive", "bincount", "_linalg_eigh"), 1),
    **dict.fromkeys(("_linalg_svd", "linalg_matrix_exp"), 2),
}
COPIES = ("_to_copy", "copy_")
SILENT = ("_unsafe_view", "lift_fresh", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
INDEXED = ("index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_")
NUMBERS_WELCOME = ("fill_", "where", "masked_fill", "masked_fill_", "lerp_")  # beside what is tagged pointwise
TENSOR_CORES = {"mm": 2, "bmm": 2, "addmm": 3, "baddbmm": 3, "convolution": 2, "convolution_backward": 3}  # operands
SUMS = ("index_add", "index_add_", "scatter_add", "scatter_add_", "embedding_dense_backward")


class DeviceTensor(Tensor):
    """A tensor on the device."""

    host: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, host: Tensor):
        facts = {"strides": host.stride(), "storage_offset": host.storage_offset(), "dtype": host.dtype}
        new = Tensor._make_wrapper_subclass(cls, host.shape, device=torch.device(SIM, 0), **facts)
        new.host, new.block = host, Block.of(host)
        return new

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return Device.now.run(func, args, kwargs or {})

    def __tensor_flatten__(self):  # lets Module.to change parameters in place
        return ["host"], None

    @staticmethod
    def __tensor_unflatten__(inner, context, size, stride):
        return DeviceTensor(inner["host"])

    def __deepcopy__(self, memo):
        if not self.is_leaf:
            raise RuntimeError("only leaves support deepcopy")
        if id(self) not in memo:
            new = self.detach().clone().requires_grad_(self.requires_grad)
            new.__dict__.update({k: v for k, v in self.__dict__.items() if k not in ("host", "block")})
            memo[id(self)] = new
        return memo[id(self)]

    def tolist(self):
        return self.detach().cpu().tolist()

    def __repr__(self, *, tensor_contents=None):
        return f"DeviceTensor({self.host})"


class Block:
    """The bytes of one storage, in use while a tensor holds it."""

    alive: ClassVar[weakref.WeakValueDictionary[int, Block]] = weakref.WeakValueDictionary()
    used = peak = 0

    def __init__(self, size: int) -> None:
        self.size = size
        Block.used += size
        Block.peak = max(Block.peak, Block.used)

    @staticmethod
    def of(host: Tensor) -> Block:
        storage = host.untyped_storage()
        return Block.alive.get(storage._cdata) or Block.alive.setdefault(storage._cdata, Block(storage.nbytes()))

    def __del__(self) -> None:
        Block.used -= self.size


class _Kind(type):
    def __instancecheck__(cls, g) -> bool:
        return isinstance(g, Plain)


class Generator(metaclass=_Kind):
    """Stands in for torch.Generator, which knows no generators of the device."""

    def __new__(cls, device: Any = "cpu"):
        return DeviceGenerator() if torch.device(device).type == SIM else Plain(device)


class DeviceGenerator(Plain):
    known: ClassVar[dict[int, Plain]] = {}  # all of them, by what C++ knows them by
    device = property(lambda self: torch.device(SIM, 0))

    def __init__(self) -> None:
        DeviceGenerator.known[self._cdata] = self

    def manual_seed(self, seed: int):
        super().manual_seed(~seed % 2**62)  # other numbers than the CPU draws
        return self


class Device(TorchDispatchMode):
    """The device, and the mode that carries out its operators.

    Args:
        tf32: products in TF32, where `torch.backends` allows it, as Ampere does.
        float64: whether there is float64.
        atomics: whether sums change in their last bit from call to call.

    Attributes:
        waits: of the host, by operator, since they were cleared.
        operators: those that launch something, since they were cleared.
    """

    now: Any = None
    _should_skip_dynamo = classmethod(lambda cls: False)  # which takes seconds to import

    def __init__(self, *, tf32: bool = False, float64: bool = True, atomics: bool = False) -> None:
        super().__init__()
        self.tf32, self.float64, self.atomics = tf32, float64, atomics
        self.waits: Counter[str] = Counter()
        self.operators: Counter[str] = Counter()
        self.generator = DeviceGenerator().manual_seed(0)
        self.noise = Plain().manual_seed(1)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.run(func, args, kwargs or {})

    def used(self) -> int:
        """The bytes in use; `peak` counts from here on."""
        Block.peak = Block.used
        return Block.used

    def peak(self) -> int:
        """The most bytes that were in use since `used` was called."""
        return Block.peak

    def run(self, func, args, kwargs):
        """One operator; one that another mode asks for may have to be taken apart first."""
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        name = func._schema.name.partition("::")[2]
        leaves = tree_leaves((args, kwargs))
        tensors = [t for t in leaves if isinstance(t, Tensor)]
        mine = [t for t in tensors if isinstance(t, DeviceTensor)]
        asked = None if kwargs.get("device") is None else torch.device(kwargs["device"]).type
        if not mine and asked != SIM:
            return func(*args, **kwargs)
        here = asked == SIM if asked else isinstance(args[0], DeviceTensor) if name in COPIES else True
        if not func.is_view and name not in SILENT:
            self.operators[name] += 1
        self._check(func, name, args, tensors)
        self._count_waits(name, args, kwargs, here)
        if torch.Tag.inplace_view in func.tags:
            with torch.utils._mode_utils.no_dispatch():
                func(*args, **kwargs)
        wide = self._rounded(name, args)
        inner, named = tree_map(_host, (wide, {k: v for k, v in kwargs.items() if k not in ("device", "pin_memory")}))
        if asked:
            named["device"] = CPU if here else kwargs["device"]
        out = self._drawn(func, name, inner, named, leaves)
        if self.atomics and name in SUMS:
            eps = torch.finfo(out.dtype).eps if out.is_floating_point() else 0
            out.mul_(1 + eps * torch.randint(-1, 2, out.shape, generator=self.noise).to(out.dtype))
        given = {id(_host(t)): t for t in tensors}  # what is written is what was given

        def wrapped(t: Any) -> Any:
            if not isinstance(t, Tensor) or id(t) in given:
                return given.get(id(t), t)
            if not self.float64 and t.dtype in (torch.float64, torch.complex128):  # on the way to the CPU neither
                raise TypeError("the device has no float64")
            return DeviceTensor(t) if here else t

        return tree_map(wrapped, out)

    def _check(self, func, name: str, args, tensors: list[Tensor]) -> None:
        """Refuse tensors of the CPU beside those of the device."""
        if name in COPIES:
            return
        if name in INDEXED:  # the indices may be on the CPU
            tensors = [args[0], *(t for t in args[2:3] if isinstance(t, Tensor))]
        pairs = name.startswith("_foreach")
        loose = pairs or torch.Tag.pointwise in func.tags or name in NUMBERS_WELCOME or name in INDEXED
        for k, t in enumerate(tensors):
            writes = k == 0 and func._schema.arguments[0].alias_info is not None
            if not isinstance(t, DeviceTensor) and (t.ndim or not loose or (writes and not pairs)):
                found = ", ".join(f"{t.device} {tuple(t.shape)}" for t in tensors)
                raise RuntimeError(f"Expected all tensors to be on the same device, in {func}: {found}")

    def _count_waits(self, name: str, args, kwargs, here: bool) -> None:
        times = WAITS.get(name, 0)
        if name in COPIES:
            source = args[name == "copy_"]
            crosses = isinstance(source, DeviceTensor) != here and source.numel() > 0
            times = int(crosses and not (kwargs.get("non_blocking") or args[2:3] == (True,)))
        elif name in INDEXED:
            indices = [t for t in args[1] if t is not None]
            times = sum(t.dtype == torch.bool or not isinstance(t, DeviceTensor) for t in indices)
        if times:
            self.waits[name] += times

    def _rounded(self, name: str, args: tuple) -> tuple:
        """The operands of float32 products with ten bits of mantissa."""
        place = torch.backends.cudnn.conv if "convolution" in name else torch.backends.cuda.matmul
        if name not in TENSOR_CORES or not self.tf32 or place.fp32_precision != "tf32":
            return args
        count = TENSOR_CORES[name]
        first = count - 2 if name in ("addmm", "baddbmm") else 0
        return tuple(_tf32(_host(x)) if first <= k < count else x for k, x in enumerate(args))

    def _drawn(self, func, name: str, args, kwargs, leaves) -> Any:
        """The result; random numbers come from the generator of the device."""
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return SPECIAL.get(name, func)(*args, **kwargs)
        given = next((g for g in leaves if isinstance(g, Plain)), None)
        if given is not None:
            if given._cdata not in DeviceGenerator.known:
                raise RuntimeError("Expected a 'sim' device type for generator but found 'cpu'")
            return func(*args, **kwargs)
        before = torch.get_rng_state()
        torch.set_rng_state(self.generator.get_state())
        try:
            return func(*args, **kwargs)
        finally:
            self.generator.set_state(torch.get_rng_state())
            torch.set_rng_state(before)


@contextmanager
def simulated(**how: Any) -> Iterator[Device]:
    """A context in which the device is there; arguments as for `Device`."""
    Device.now, torch.Generator = Device(**how), Generator
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=) makes its tensor on the CPU first
    try:
        with Device.now as device:
            yield device
    finally:
        Device.now, torch.Generator = None, Plain
        torch._C._set_only_lift_cpu_tensors(False)


def _host(t: Any) -> Any:
    return t.host if isinstance(t, DeviceTensor) else t


def _tf32(x: Any) -> Any:
    """Rounded to nearest, ties to even.

    >>> _tf32(torch.tensor([1 + 2**-10, 1 + 2**-11, 1 + 3 * 2**-11])) - 1
    tensor([0.0010, 0.0000, 0.0020])
    """
    if not isinstance(x, Tensor) or x.dtype != torch.float32:
        return x
    bits = x.contiguous().view(torch.int32)
    return (bits + 4095 + (bits >> 13 & 1) & -8192).view(torch.float32)


# -- operators that the CPU lacks


def _lstm(*parts):
    cx, gates = parts[2], sum(x for k, x in enumerate(parts) if k != 2 and x is not None)
    i, f, g, o = gates.chunk(4, 1)
    cy = f.sigmoid() * cx + i.sigmoid() * g.tanh()
    return o.sigmoid() * cy.tanh(), cy, gates


def _lstm_backward(dh, dc, cx, cy, gates, has_bias):
    i, f, g, o = gates.chunk(4, 1)
    i, f, g, o, t = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid(), cy.tanh()
    dh = torch.zeros_like(cy) if dh is None else dh
    dc = dh * o * (1 - t * t) + (0 if dc is None else dc)
    d = torch.cat([dc * g * i * (1 - i), dc * cx * f * (1 - f), dc * i * (1 - g * g), dh * t * o * (1 - o)], 1)
    return d, dc * f, d.sum(0) if has_bias else None


def _gru(x, h, hx, x_bias=None, h_bias=None):
    x, h = (a if b is None else a + b for a, b in ((x, x_bias), (h, h_bias)))
    (xr, xz, xn), (hr, hz, hn) = x.chunk(3, 1), h.chunk(3, 1)
    r, z = (xr + hr).sigmoid(), (xz + hz).sigmoid()
    n = (xn + r * hn).tanh()
    return n + z * (hx - n), torch.cat([r, z, n, hx, hn], 1)


def _gru_backward(d, saved, has_bias):
    r, z, n, hx, hn = saved.chunk(5, 1)
    dn, dz = d * (1 - z) * (1 - n * n), d * (hx - n) * z * (1 - z)
    dr = dn * hn * r * (1 - r)
    x, h = torch.cat([dr, dz, dn], 1), torch.cat([dr, dz, dn * r], 1)
    return x, h, d * z, *((x.sum(0), h.sum(0)) if has_bias else (None, None))


SPECIAL = {
    "_thnn_fused_lstm_cell": _lstm,
    "_thnn_fused_lstm_cell_backward_impl": _lstm_backward,
    "_thnn_fused_gru_cell": _gru,
    "_thnn_fused_gru_cell_backward": _gru_backward,
    "_efficientzerotensor": torch.zeros,
}


# -- what PyTorch has to know of the device


class Module:
    """torch.sim, as torch.cuda is for CUDA."""

    is_available = is_initialized = staticmethod(lambda: Device.now is not None)
    current_device = staticmethod(lambda: 0)
    device_count = staticmethod(lambda: 1)
    _is_in_bad_fork = staticmethod(lambda: False)
    manual_seed = manual_seed_all = staticmethod(lambda seed: Device.now and Device.now.generator.manual_seed(seed))
    get_rng_state = staticmethod(lambda device=SIM: Device.now.generator.get_state())
    set_rng_state = staticmethod(lambda state, device=SIM: Device.now.generator.set_state(state))
    get_amp_supported_dtype = staticmethod(lambda: [torch.float16, torch.bfloat16])


def _cast(op, coarse: bool):
    """An operator under autocast."""
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def run(*args, **kwargs):
        dtype = torch.get_autocast_dtype(SIM) if coarse else torch.float32

        def to(x: Any) -> Any:
            return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() and x.device.type == SIM else x

        with torch._C._ExcludeDispatchKeyGuard(key):
            return op(*tree_map(to, args), **kwargs)

    return run


COARSE = ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "conv1d", "conv2d", "scaled_dot_product_attention")
FINE = (
    "mse_loss",
    "nll_loss",
    "cross_entropy_loss",
    "layer_norm",
    "pow.Tensor_Scalar",
    "log_softmax.int",
    "softmax.int",
)

if USABLE:
    backend_registration._setup_privateuseone_for_python_backend(SIM, Module())
    LIBRARY, REST = torch.library.Library("aten", "IMPL"), torch.library.Library("_", "IMPL")
    REST.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for name in (*COARSE, *FINE):
        packet, _, overload = name.partition(".")
        operator = getattr(getattr(aten, packet), overload or "default")
        LIBRARY.impl(operator, _cast(operator, name in COARSE), "AutocastPrivateUse1")
