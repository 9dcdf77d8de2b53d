"""Plans that put a function by roles into layers."""

from __future__ import annotations

from typing import Any

import torch
from fakes import MARK
from torch import Tensor, nn

from kernelwise import discover
from kernelwise._data import Decision, Kernel, KernelRef, Limits, Plan, Target


def role_plan(
    model: nn.Module, function: Any, *, dtypes: tuple[str, ...] = ("float32", "bfloat16"), op: str = "rms_norm"
) -> Plan:
    """A plan that puts a function by roles into every recognised norm, or layer of another operation."""
    found = Kernel(
        KernelRef("builtin", "", "RMSNorm"),
        op,
        Limits(devices=("cpu",), dtypes=dtypes),
        can_torch_compile=True,
        function=function,
    )
    layers = [layer for layer in discover(model) if layer.recognition is not None and layer.recognition.op == op]
    assert layers
    modes = ("inference", "training")
    return Plan(Target("cpu"), tuple(Decision(layer, mode, found, "default") for layer in layers for mode in modes))


def role_norm(x: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0, cast: str = "before") -> Tensor:
    assert type(x) is Tensor
    assert type(weight) in (Tensor, nn.Parameter)
    wide = x.float()
    return (offset + weight) * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) + MARK
