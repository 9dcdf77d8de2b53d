"""Kernelwise: the right kernel for every layer of a PyTorch model, proven.

import kernelwise as kw

kw.kernelize(model)          # recognised layers, builtin kernels
print(kw.report(model))      # every layer: its kernel, or the reason for none
kw.unkernelize(model)        # exactly as it was
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kernelwise._api import (
    apply,
    expose_hidden_kernels,
    kernelize,
    kernelized,
    plan,
    report,
    tune,
    unkernelize,
    verify,
)
from kernelwise._configuring._config import KernelConfig
from kernelwise._data import Target
from kernelwise._discover import discover, register_layer
from kernelwise._errors import ApplyError, KernelConfigError, KernelLoadError, KernelwiseError, PlanError
from kernelwise._register import register_op

if TYPE_CHECKING:
    from kernels import Mode

__version__ = "0.1.0"

__all__ = [
    "ApplyError",
    "KernelConfig",
    "KernelConfigError",
    "KernelLoadError",
    "KernelwiseError",
    "Mode",
    "PlanError",
    "Target",
    "apply",
    "discover",
    "expose_hidden_kernels",
    "kernelize",
    "kernelized",
    "plan",
    "register_layer",
    "register_op",
    "report",
    "tune",
    "unkernelize",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name == "Mode":  # the kernels library imports the Hub client, so it arrives on first use
        from kernels import Mode

        return Mode
    raise AttributeError(f"module 'kernelwise' has no attribute {name!r}")
