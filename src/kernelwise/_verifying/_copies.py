"""Copies of modules, of arguments, and of tensors with their strides, their gaps and the place where they begin."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from kernelwise._discover import OURS


class CannotTryError(Exception):
    """This machine cannot do what a case asks for."""


def bare_copy(module: nn.Module, convert: Callable[[torch.Tensor], torch.Tensor]) -> nn.Module:
    """Return a copy of a module tree with converted parameters and buffers, without hooks and without replaced forwards."""
    memo: dict[int, nn.Module] = {}

    def copy_of(found: nn.Module) -> nn.Module:
        if id(found) in memo:
            return memo[id(found)]
        new = memo[id(found)] = found.__class__.__new__(found.__class__)
        left_out = (*OURS, "forward", "_old_forward", "_hf_hook")
        for name, value in found.__dict__.items():
            if name not in left_out:
                new.__dict__[name] = OrderedDict() if name.endswith("_hooks") and isinstance(value, dict) else value
        new.__dict__["_parameters"] = {
            name: None if p is None else nn.Parameter(convert(p.detach()), requires_grad=p.requires_grad)
            for name, p in found._parameters.items()
        }
        new.__dict__["_buffers"] = {n: None if b is None else convert(b.detach()) for n, b in found._buffers.items()}
        new.__dict__["_modules"] = {n: None if m is None else copy_of(m) for n, m in found._modules.items()}
        return new

    return copy_of(module)


def with_tensors_of(value: Any) -> Any:
    """Return an argument that has the same tensors, and copies of all else."""
    if type(value) in (tuple, list):
        return type(value)(with_tensors_of(item) for item in value)
    if isinstance(value, dict):
        return {name: with_tensors_of(item) for name, item in value.items()}
    return value if isinstance(value, torch.Tensor) else copied(value)


def copied(value: Any) -> Any:
    """Return a copy of an argument that is no tensor: a cache of keys is written to by every call."""
    if value is None or isinstance(value, (bool, int, float, str, nn.Module)) or callable(value):
        return value
    try:
        return copy.deepcopy(value)
    except Exception:  # what cannot be copied can only be shared
        return value


def laid_out(tensor: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
    """Copy a tensor to memory with other strides. On the CPU, memory between the elements is never touched: it costs none."""
    needed = tensor.element_size() * (1 + sum((n - 1) * s for n, s in zip(tensor.shape, strides, strict=True)))
    if tensor.is_cuda and needed > 0.8 * torch.cuda.mem_get_info(tensor.device)[0]:
        raise CannotTryError(f"it needs {needed / 1e9:.1f} GB of the GPU's memory")
    try:
        return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
    except (RuntimeError, MemoryError) as error:
        raise CannotTryError(f"it needs {needed / 1e9:.1f} GB of addresses") from error


def memory_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return the memory that a strided tensor spans, gaps and `lead_of` elements before it included, as one dimension."""
    lead = lead_of(tensor)
    extent = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) if tensor.numel() else 0
    return tensor.detach().as_strided((lead + extent,), (1,), tensor.storage_offset() - lead)


def lead_of(tensor: torch.Tensor) -> int:
    """How many elements before a tensor are kept with it: so many that it does not begin its memory, and is as aligned."""
    offset = int(tensor.storage_offset())
    return offset if offset < _ALIGNED else _ALIGNED + offset % _ALIGNED


_ALIGNED = 64
"""Elements: no processor aligns to more."""


def clone_with_gaps(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a tensor with its strides, what lies between its elements, and the place in its memory where it begins."""
    return memory_of(tensor).clone().as_strided(tensor.shape, tensor.stride(), lead_of(tensor))


def other_values_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of the same form with other values, in memory of its own."""
    other = clone_with_gaps(tensor)
    if other.is_floating_point():
        other.mul_(-0.5)
    return other.requires_grad_(tensor.requires_grad)
