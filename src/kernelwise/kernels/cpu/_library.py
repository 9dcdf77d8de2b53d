"""The compiled library: where it is, why it cannot be used, and what torch must know about its operators.

The library registers its operators with torch's dispatcher when it is loaded. Here they get what only Python can give:
the shapes and dtypes of their results without data (`_shapes`), so that `torch.compile` and fake tensors see through them.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ._shapes import SHAPES

FILE = Path(__file__).with_name("_kernels" + {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so"))
_BUILD = "pip install --no-build-isolation --force-reinstall --no-deps kernelwise"


def is_available() -> bool:
    """Whether the CPU kernels can be used here."""
    return not why_unavailable()


def why_unavailable() -> str:
    """Return what is missing, as one sentence with the command that mends it, or an empty string."""
    return _loaded()


def isa() -> str:
    """Return the instruction set in use: baseline, avx2 or avx512. ATEN_CPU_CAPABILITY can lower it, as in torch."""
    name: str = load().cpu_isa.default()
    return name


def load() -> Any:
    """Return `torch.ops.kernelwise`, loading the library on the first call.

    Raises:
        ImportError: the library was not built or does not fit the torch that is installed.
    """
    if reason := _loaded():
        raise ImportError(reason)
    return torch.ops.kernelwise


def direct(operator: Any) -> Any:
    """Return what an operator of `load()` calls when it is called: 0.25 us less of Python. Dynamo knows the operator alone."""
    return getattr(operator, "_op", operator)


@functools.cache
def _loaded() -> str:
    if not FILE.exists():
        return f"the C++ library of the CPU kernels was not built (no C++17 compiler, or torch was missing): {_BUILD}"
    try:
        torch.ops.load_library(str(FILE))  # type: ignore[no-untyped-call]
    except OSError as error:
        return f"the C++ library of the CPU kernels does not load with torch {torch.__version__} ({error}): {_BUILD}"
    if missing := [name for name in SHAPES if not hasattr(torch.ops.kernelwise, name)]:
        return f"the C++ library of the CPU kernels was built from other sources (it has no {missing[0]}): {_BUILD}"
    if other := [name for name, shapes in SHAPES.items() if _arguments(name) != _parameters(shapes)]:
        return f"the C++ library of the CPU kernels was built from other sources ({other[0]} takes other arguments): {_BUILD}"
    for name, shapes in SHAPES.items():
        torch.library.register_fake(f"kernelwise::{name}", shapes)
    return ""


def _arguments(name: str) -> list[tuple[str, Any]]:
    """Return the names and defaults of what an operator takes."""
    found = getattr(torch.ops.kernelwise, name).default._schema.arguments
    return [(one.name, one.default_value if one.has_default_value() else inspect.Parameter.empty) for one in found]


def _parameters(shapes: Callable[..., Any]) -> list[tuple[str, Any]]:
    return [(one.name, one.default) for one in inspect.signature(shapes).parameters.values()]
