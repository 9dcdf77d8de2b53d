"""The kernels that come with Kernelwise: functions by the roles of an operation, `builtin:RMSNorm`.

Two further backends are never offered unasked, only tried by tuning or named by a rule: PyTorch's own fused operators
(`builtin:torch:RMSNorm`), and what Inductor makes of an operation (`builtin:inductor:RMSNorm`).
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from kernelwise._data import Kernel, KernelRef, Limits, Scalar
from kernelwise.sources import _inductor, registered
from kernelwise.sources._explain import failure, no_such_layer, one_line
from kernelwise.sources._layer_class import signature
from kernelwise.sources._repository import content_hash

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class _Entry:
    """One builtin layer on one backend: the operation it computes and where it runs."""

    layer: str
    op: str
    backend: str
    options: tuple[tuple[str, tuple[Scalar, ...]], ...] = ()
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    inference_only: tuple[str, ...] = ()  # dtypes with which it would gain nothing in training
    gains_from: tuple[tuple[str, int], ...] = ()  # dtypes with which it would gain nothing in smaller layers
    compiles: bool = True
    unasked: bool = True  # whether it is offered to a layer of which no rule speaks


_DEVICES = {"cpu": ("cpu",), "triton": ("cuda",), "torch": ("cpu", "cuda")}
_MIN_ARCH = {"cpu": None, "triton": "sm_80", "torch": None}
_REQUIRES: dict[str, tuple[str, ...]] = {"cpu": (), "triton": ("triton",), "torch": ()}
_PACKAGES = {"cpu": "cpu", "triton": "triton", "torch": "torch_native"}
_LOCATIONS = {"torch": "torch"}  # the others are told apart by their device
_MEND = {
    "cpu": "pip install --no-build-isolation --force-reinstall --no-deps kernelwise",
    "triton": "pip install triton",
    "torch": "pip install --force-reinstall --no-deps kernelwise",
}

_SILU = (("activation", ("silu",)),)
_RMS = (("cast", ("before", "after")), ("offset", (0.0, 1.0)))
_ROTARY = (("layout", ("half",)), ("angles", ("full",)), ("dtype", ("promoted",)), ("part", ("all",)))
_GELU = (("activation", ("gelu", "gelu_tanh")),)
_PLAIN_LAYER = (
    ("returns", ("tensor",)), ("clamp", ("none",)), ("passing", ("plain",)), ("norm", ("rms_norm", "layer_norm")),
)  # fmt: skip
_LAYER = (("offset", (0.0, 1.0)), ("dtype", ("own", "float32")))

CATALOGUE: tuple[_Entry, ...] = (
    *(_Entry("RMSNorm", "rms_norm", backend, _RMS) for backend in ("cpu", "triton")),
    *(_Entry("SwiGLUMLP", "gated_mlp", backend, _SILU) for backend in ("cpu", "triton")),
    *(_Entry("GEGLUMLP", "gated_mlp", backend, _GELU) for backend in ("cpu", "triton")),
    *(_Entry("rotary_pos_emb", "rotary", backend, _ROTARY) for backend in ("cpu", "triton")),
    _Entry("LayerNorm", "layer_norm", "triton", _LAYER),
    # SiLU, and GELU on GPUs, are one operator of PyTorch and as fast there; the others are written out in several.
    _Entry("GeLU", "activation", "cpu", (("activation", ("gelu",)),)),
    _Entry("GeluTanh", "activation", "cpu", (("activation", ("gelu_tanh",)),)),
    *(_Entry("NewGELU", "activation", backend, (("activation", ("gelu_new",)),)) for backend in ("cpu", "triton")),
    *(_Entry("FastGELU", "activation", backend, (("activation", ("gelu_fast",)),)) for backend in ("cpu", "triton")),
    *(_Entry("QuickGELU", "activation", backend, (("activation", ("quick_gelu",)),)) for backend in ("cpu", "triton")),
    # Under torch.compile the layer's own code stays: the compiler takes the sum into the norm by itself. Not offered
    # unasked: end to end it was measured to gain nothing beyond noise.
    *(
        _Entry("DecoderLayer", "decoder_layer", b, _PLAIN_LAYER, compiles=False, unasked=False)
        for b in ("cpu", "triton")
    ),
    _Entry("Linear", "linear", "cpu", inference_only=("float32",)),
    # Not offered unasked: logits that a training loop still holds when the optimizer steps are computed then.
    *(
        _Entry("LinearCrossEntropy", "linear_cross_entropy", b, compiles=False, unasked=False)
        for b in ("cpu", "triton")
    ),
    # PyTorch's own operators, where models write them out. `torch.compile` finds them by itself.
    _Entry("RMSNorm", "rms_norm", "torch", (("cast", ("before", "after")), ("offset", (0.0,))), unasked=False),
    _Entry("LayerNorm", "layer_norm", "torch", (("offset", (0.0,)), ("dtype", ("own", "float32"))), unasked=False),
    *(
        _Entry(layer, "activation", "torch", (("activation", options),), unasked=False)
        for layer, options in (
            ("SiLU", ("silu",)), ("GeLU", ("gelu",)), ("GeluTanh", ("gelu_tanh",)), ("NewGELU", ("gelu_new",)),
            ("FastGELU", ("gelu_fast",)),
        )
    ),
)  # fmt: skip


def refs(op: str, *, device: str) -> tuple[KernelRef, ...]:
    """Return the kernels that are offered for an operation unasked on a device type: those that users registered, then ours."""
    found = [e.layer for e in CATALOGUE if e.op == op and device in _DEVICES[e.backend] and e.unasked]
    return (*registered.refs(op, device=device), *(KernelRef("builtin", "", layer) for layer in found))


def every_ref(op: str, layer: str, *, device: str) -> tuple[KernelRef, ...]:
    """Return all kernels for an operation on a device type, also those that are never offered unasked.

    `layer` is the name of a layer of that operation, under which Inductor's kernel goes.
    """
    found = [e for e in CATALOGUE if e.op == op and device in _DEVICES[e.backend]]
    ours = [KernelRef("builtin", _LOCATIONS.get(e.backend, ""), e.layer) for e in found]
    compiled = _inductor.refs(op, layer) if device in _inductor.DEVICES else ()
    return (*registered.refs(op, device=device), *ours, *compiled)


def describe(ref: KernelRef, *, device: str) -> Kernel | None:
    """Return a builtin kernel as data, without its function; None where there is none of that name for the device."""
    if ref.location == _inductor.BACKEND:
        return _inductor.describe(ref) if device in _inductor.DEVICES else None
    entry = _find(ref, device)
    if entry is not None:
        return _kernel(ref, entry)
    return None if ref.location else registered.find(ref.layer, device=device)


def load(ref: KernelRef, *, device: str) -> Kernel:
    """Import a builtin kernel.

    Raises:
        KernelLoadError: no such kernel, none for the device, what it runs on (Triton, the C++ library) is missing, or
            PyTorch's own code is as good on this processor.
    """
    if ref.location == _inductor.BACKEND:
        return _inductor.load(ref, device=device)
    entry = _find(ref, device)
    function = None if ref.location else registered.find(ref.layer, device=device)
    if entry is None and function is not None:
        return function
    if entry is None:
        beside = [e for e in CATALOGUE if _LOCATIONS.get(e.backend, "") == ref.location]
        devices = {name for e in beside if e.layer == ref.layer for name in _DEVICES[e.backend]}
        if not devices:
            raise no_such_layer(ref, {e.layer for e in beside})
        raise failure(
            ref, f"it runs on {', '.join(sorted(devices))}, not on {device}", fix="leave the layer its own code"
        )
    mend = _MEND[entry.backend]
    try:
        module = importlib.import_module(f"kernelwise.kernels.{_PACKAGES[entry.backend]}.{entry.op}")
    except (ImportError, OSError, RuntimeError) as error:
        reason = one_line(error).removesuffix(f": {mend}")
        raise failure(ref, f"it cannot be imported: {reason}", fix=mend) from error
    return _kernel(ref, _worthwhile(ref, entry, module), getattr(module, entry.op))


def _worthwhile(ref: KernelRef, entry: _Entry, module: ModuleType) -> _Entry:
    """Leave out the dtypes for which a kernel's module says that PyTorch's own code is as good on this processor.

    Where it says so of small layers or of training alone, that becomes a limit.
    """
    why_not: Callable[[torch.dtype], str | None] | None = getattr(module, "why_not_worthwhile", None)
    if why_not is None:
        return entry
    import torch

    reasons = {dtype: why_not(getattr(torch, dtype)) for dtype in entry.dtypes}
    dtypes = tuple(dtype for dtype, reason in reasons.items() if reason is None)
    if not dtypes:
        why = "; ".join(dict.fromkeys(reason for reason in reasons.values() if reason))
        raise failure(ref, f"it would gain nothing: {why}", fix="leave the layer its own code")
    gains_from: Callable[[torch.dtype], int] = getattr(module, "gains_from", lambda dtype: 0)
    sizes = ((dtype, gains_from(getattr(torch, dtype))) for dtype in dtypes)
    trains: Callable[[torch.dtype], bool] = getattr(module, "gains_in_training", lambda dtype: True)
    return replace(
        entry,
        dtypes=dtypes,
        inference_only=tuple(
            dtype for dtype in dtypes if dtype in entry.inference_only or not trains(getattr(torch, dtype))
        ),
        gains_from=tuple((dtype, size) for dtype, size in sizes if size),
    )


def _find(ref: KernelRef, device: str) -> _Entry | None:
    here = (e for e in CATALOGUE if _LOCATIONS.get(e.backend, "") == ref.location and device in _DEVICES[e.backend])
    return next((e for e in here if e.layer == ref.layer), None)


def _kernel(ref: KernelRef, entry: _Entry, function: Callable[..., Any] | None = None) -> Kernel:
    return Kernel(
        ref=ref,
        op=entry.op,
        limits=Limits(
            devices=_DEVICES[entry.backend],
            dtypes=entry.dtypes,
            min_arch=_MIN_ARCH[entry.backend],
            options=entry.options,
            requires=_REQUIRES[entry.backend],
            inference_only=entry.inference_only,
            gains_from=entry.gains_from,
        ),
        has_backward=True,
        can_torch_compile=entry.compiles,
        content_hash=None if function is None else _backend_hash(entry.backend),
        signature=() if function is None else signature(function),
        function=function,
    )


@lru_cache(maxsize=len(_DEVICES))
def _backend_hash(backend: str) -> str:
    """The hash over all of a backend's files: its kernels share helpers, and on the CPU one built library."""
    kernels = Path(__file__).parents[1] / "kernels"
    files = b"".join(
        [
            content_hash(kernels / _PACKAGES[backend]).encode(),
            *((kernels / name).read_bytes() for name in ("_layout.py", "_autograd.py", "_recompute.py")),
        ]
    )
    return hashlib.sha256(files).hexdigest()
