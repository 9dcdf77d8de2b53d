"""What `torch.compile` makes of an operation: `builtin:inductor:RMSNorm` is the reference of that operation, compiled.

The reference says what the layer computes, by its roles, so that one compiled function serves every class of that
operation. It is compiled at the first call with tensors of a new kind, which takes seconds.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import inspect
import os
import shutil
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from kernelwise._alike import function_code
from kernelwise._data import Kernel, KernelRef, Limits, Parameter
from kernelwise.ops import OPERATIONS, Operation
from kernelwise.sources._explain import failure, no_such_layer
from kernelwise.sources._layer_class import signature
from kernelwise.sources._repository import content_hash

BACKEND = "inductor"
DEVICES = ("cpu", "cuda")
RECOMPILES = 64
"""Kinds of inputs (dtype, rank, strides, gradients) that one kernel is compiled for; further ones run the layer's own code."""

_NOTHING_TO_FUSE = ("linear",)


def refs(op: str, layer: str) -> tuple[KernelRef, ...]:
    """Return the reference for an operation under a layer name, where there is something to compile."""
    found = _find(layer)
    return (KernelRef("builtin", BACKEND, layer),) if found is not None and found.name == op else ()


def describe(ref: KernelRef) -> Kernel | None:
    """Return the kernel as data, without its function; None where no operation has that name."""
    op = _find(ref.layer)
    return None if op is None else _kernel(ref, op)


def load(ref: KernelRef, *, device: str) -> Kernel:
    """Make the kernel. Nothing is compiled yet.

    Raises:
        KernelLoadError: no operation has that name, or what Inductor needs for the device is missing.
    """
    op = _find(ref.layer)
    if op is None:
        names = {name for known in OPERATIONS.values() if _compilable(known) for name in known.layer_names.values()}
        raise no_such_layer(ref, names)
    if device not in DEVICES:
        raise failure(ref, f"it runs on {', '.join(DEVICES)}, not on {device}", fix="leave the layer its own code")
    missing = _missing(device)
    if missing is not None:
        raise failure(ref, missing[0], fix=missing[1])
    return _kernel(ref, op, _compiled(op.reference))


def _find(layer: str) -> Operation | None:
    return next((op for op in OPERATIONS.values() if layer in op.layer_names.values() and _compilable(op)), None)


def _compilable(op: Operation) -> bool:
    return bool(op.variants) and not op.norms and not op.loss and op.name not in _NOTHING_TO_FUSE


def _missing(device: str) -> tuple[str, str] | None:
    """What Inductor cannot do without on a device type, and how to get it; None where everything is there."""
    if device == "cuda":
        found = importlib.util.find_spec("triton") is not None
        return None if found else ("it needs Triton, which is not installed", "pip install triton")
    if os.environ.get("CXX") or any(map(shutil.which, ("g++", "clang++", "c++", "cl"))):
        return None
    return "it needs a C++ compiler, and there is none on the path", "install g++, or name one in CXX"


def _kernel(ref: KernelRef, op: Operation, function: Callable[..., Any] | None = None) -> Kernel:
    options: dict[str, list[Any]] = {}
    for key, name in op.layer_names.items():
        if name == ref.layer:
            for option, value in key:
                options.setdefault(option, []).append(value)
    return Kernel(
        ref=ref,
        op=op.name,
        limits=Limits(devices=DEVICES, options=tuple((name, tuple(values)) for name, values in options.items())),
        content_hash=None if function is None else _hash(op.reference),
        signature=() if function is None else _signature(op.reference),
        function=function,
    )


@lru_cache(maxsize=256)
def _compiled(reference: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a reference with a cache of its own, so that nobody else's calls of it count towards its limit."""
    import torch
    from torch._dynamo import exc

    known = inspect.signature(torch.compile).parameters  # newer versions have both
    own = {"recompile_limit": RECOMPILES, "isolate_recompiles": True}
    compiled = torch.compile(reference, fullgraph=True, **{name: v for name, v in own.items() if name in known})  # type: ignore[call-overload]
    too_many = getattr(exc, "FailOnRecompileLimitHit", ())

    @functools.wraps(reference)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return compiled(*args, **kwargs)
        except too_many as error:
            raise RuntimeError(f"it was compiled for {RECOMPILES} kinds of inputs and this is one more") from error

    return call


def _signature(reference: Callable[..., Any]) -> tuple[Parameter, ...]:
    """The parameters of a reference; none where it hands on any keyword, which a plan reads as taking everything."""
    found = signature(reference)
    return () if any(parameter.kind == "var_keyword" for parameter in found) else found


def _hash(reference: Callable[..., Any]) -> str:
    """The hash of a reference with the files of all operations: they share helpers."""
    files = content_hash(Path(__file__).parents[1] / "ops")
    return hashlib.sha256(f"{files} {function_code(reference)}".encode()).hexdigest()
