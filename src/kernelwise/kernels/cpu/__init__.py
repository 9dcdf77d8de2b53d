"""Kernels in C++ for CPUs, one module per operation: `kernelwise.kernels.cpu.rms_norm.rms_norm` and so on.

Importing this package loads nothing; the module of an operation loads the compiled library when it is first imported.
"""

from __future__ import annotations

from ._library import is_available, isa, why_unavailable

__all__ = ["is_available", "isa", "why_unavailable"]
