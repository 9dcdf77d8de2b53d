"""Given: a case → the tensors of calls on it, copied with their strides and gaps, so that every write to them shows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch.utils._pytree import tree_map

from kernelwise._verifying._copies import bare_copy, laid_out, lead_of, memory_of, other_values_of, with_tensors_of
from kernelwise._verifying._exact import NARROW_DTYPES


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """What a kernel is tried on: the arguments of the forward by name, and the module whose weights it reads.

    `grad` says which leaves need a gradient. `repeat` runs forward and backward once more without clearing the gradients,
    `retain` runs backward twice over one graph, `second` takes second gradients, `fill` is what new memory holds (NaN or 0;
    None: whatever it held), `how` wraps the call. `upstream` are gradients of the outputs, for those whose shape fits;
    `strides` are those that an argument gets in place of its own. `tiled` names arguments that are repeated, and along which
    dimension; `copies` is how often. `reused` lets a call on other values in the same memory come first, as the next batch
    finds memory that the last one has left. `between` lets another call come between a call and its backward, as the next
    layer's does. `handed` says how the gradients of the outputs lie in memory.
    """

    name: str
    arguments: dict[str, Any]
    module: nn.Module | None
    grad: Literal["all", "inputs", "weights", "none"] = "all"
    repeat: bool = False
    retain: bool = False
    second: bool = False
    fill: float | None = None
    how: Literal["eager", "compile", "cuda graph", "inference mode"] = "eager"
    tiled: dict[str, int] = field(default_factory=dict)
    copies: int = 1
    upstream: tuple[torch.Tensor | None, ...] = ()
    strides: dict[str, tuple[int, ...]] = field(default_factory=dict)
    reused: bool = False
    between: bool = False
    handed: Literal["contiguous", "transposed", "expanded"] = "contiguous"


class Given:
    """The tensors of a case, copied with their strides and the memory between their elements; sees writes to either."""

    def __init__(self, case: Case, *, wide: bool) -> None:
        self.memories: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.leaves: dict[str, torch.Tensor] = {}
        self.arguments = {name: self._value(name, value, case, wide) for name, value in case.arguments.items()}
        self.inputs = [now for now, _ in self.memories.values()]  # without weights: those do tell
        self.module: nn.Module | None = None
        self.held: dict[str, Any] = {}
        if case.module is not None:
            self.module = bare_copy(case.module, lambda tensor: _wide(tensor) if wide else tensor.clone())
            originals = dict(case.module.named_parameters()) | dict(case.module.named_buffers())
            for name, parameter in self.module.named_parameters():
                floating = parameter.is_floating_point()
                parameter.requires_grad_(floating and case.grad in ("all", "weights"))
                if parameter.requires_grad:
                    self.leaves[name] = parameter
                self.memories[name] = (parameter.detach(), originals[name].detach())
            self.memories |= {n: (b, originals[n]) for n, b in self.module.named_buffers()}
            self.held = _held(self.module)

    def _value(self, name: str, value: Any, case: Case, wide: bool) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)(self._value(f"{name}.{index}", item, case, wide) for index, item in enumerate(value))
        if isinstance(value, dict):
            return {key: self._value(f"{name}.{key}", item, case, wide) for key, item in value.items()}
        if not isinstance(value, torch.Tensor):
            return value
        if name in case.strides and not wide:
            tensor = laid_out(value, case.strides[name])
            if case.grad in ("all", "inputs"):
                self.leaves[name] = tensor.requires_grad_()
            self.memories[name] = (tensor, value)
            return tensor
        before = memory_of(value)
        memory = _wide(before) if wide else before.clone()
        tensor = memory.as_strided(value.shape, value.stride(), lead_of(value))
        if case.grad in ("all", "inputs") and (tensor.is_floating_point() or tensor.is_complex()):
            self.leaves[name] = tensor.requires_grad_()
        self.memories[name] = (memory, before)
        return tensor

    def for_call(self) -> dict[str, Any]:
        """The arguments for one call: the same tensors, and copies of all else."""
        return {name: with_tensors_of(value) for name, value in self.arguments.items()}

    def elsewhere(self) -> dict[str, Any]:
        """The arguments for another call: tensors with other values and memory of their own."""
        return {
            name: tree_map(lambda v: other_values_of(v) if isinstance(v, torch.Tensor) else v, with_tensors_of(value))
            for name, value in self.arguments.items()
        }

    @contextmanager
    def other_values(self) -> Iterator[None]:
        """Let the arguments hold other values, which their version counters do not tell: new tensors have none to tell."""
        memories = [memory for memory in self.inputs if memory.is_floating_point()]
        kept = [memory.detach().clone() for memory in memories]
        try:
            for memory in memories:
                memory.data.mul_(-0.5)
            yield
        finally:
            for memory, values in zip(memories, kept, strict=True):
                memory.data.copy_(values)

    def overwritten(self) -> list[str]:
        found = [name for name, (now, before) in self.memories.items() if not same_bits(now.detach(), before)]
        now = {} if self.module is None else _held(self.module)
        return found + [f"self.{name}" for name, value in self.held.items() if now.get(name, self) != value]

    def aliased(self, output: torch.Tensor) -> str | None:
        if output.numel() == 0:
            return None
        where = output.untyped_storage().data_ptr()
        return next((n for n, (m, _) in self.memories.items() if m.untyped_storage().data_ptr() == where), None)


def _held(module: nn.Module) -> dict[str, Any]:
    """What a module and its children hold besides the values of tensors: numbers, names, and which parameters they have."""
    found: dict[str, Any] = {}
    for path, part in module.named_modules():
        above = f"{path}." if path else ""
        plain = (bool, int, float, str, type(None))
        found |= {above + name: repr(value) for name, value in part.__dict__.items() if type(value) in plain}
        found |= {above + n: (id(p), p is not None and p.requires_grad) for n, p in part._parameters.items()}
    return found


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_complex():
        return tensor.to(torch.complex128)
    return tensor.to(torch.float64) if tensor.dtype in NARROW_DTYPES else tensor.clone()


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    one, other = one.contiguous().reshape(-1), other.contiguous().reshape(-1)
    bits = _BITS.get(one.element_size(), torch.uint8)
    return torch.equal(one.view(bits), other.view(bits))
