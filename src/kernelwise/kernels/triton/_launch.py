"""How a Triton kernel is started: the usual way first, bound and direct from then on.

`kernel[grid](...)` binds, specialises and hashes every argument again at each call, which costs several times what the
launch itself does. All of that has the same outcome for calls of one kind (same device, dtypes, constants and 16-byte
alignment), so a `Launcher` belongs to one such kind and keeps the compiled kernel. How a compiled kernel is started is
private to Triton: the direct way is taken only for the version whose layout is known here, on CUDA; everything else,
and every call that differs in alignment or device, goes the usual way.
"""
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import functools
import operator
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import triton

_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")  # as Triton reads it
_DIRECT = triton.__version__.startswith("3.6.") and torch.version.cuda is not None and not _INTERPRETED
_data_ptr = torch.Tensor.data_ptr
_MAX_LAUNCHERS = 4096  # per operation; a guard against kinds that never repeat, far above what models need

MOST_Y = 65_535  # programs along the second axis of a grid, on CUDA

# The names of a kernel repository's package are unique, so an exported copy of this folder does not clash with this one.
NAMESPACE = re.sub(r"\W", "_", __name__.rpartition(".")[0])


class Launcher:
    """One kernel with its constants chosen, for calls of one kind.

    `constants` are all its constexpr parameters (with none left to a default: Inductor drops those and then calls its
    launcher with too few arguments) and the compiler options `num_warps` and `num_stages`. `size` is the number of
    rows, tokens or elements that one program handles.
    """

    __slots__ = ("constants", "direct", "kernel", "size")

    def __init__(self, kernel: Any, size: int, **constants: Any) -> None:
        self.kernel = kernel
        self.size = size
        self.constants = constants
        self.direct: tuple[Any, ...] | None = None

    def __call__(
        self, grid_x: int, grid_y: int, tensors: Sequence[torch.Tensor], numbers: Sequence[int], traced: Any = None
    ) -> None:
        """Start the kernel. Its parameters are, in order, tensors, integers that are not specialised, constants.

        `traced` is the kernel wrapped for a tracer (`torch.library.wrap_triton`), which then gets the call.
        """
        if traced is not None:
            traced[(grid_x, grid_y)](*tensors, *numbers, **self.constants)
            return
        if self.direct is not None:
            device, launch, function, metadata, tail = self.direct
            pointers = [*map(_data_ptr, tensors)]
            if not functools.reduce(operator.or_, pointers) & 15 and device == torch._C._cuda_getDevice():
                stream = torch._C._cuda_getCurrentRawStream(device)
                launch(
                    grid_x, grid_y, 1, stream, function, 0, 0, None, None, metadata, None, None, None,
                    *pointers, *numbers, *tail,
                )  # fmt: skip
                return
        self._usual(grid_x, grid_y, tensors, numbers)

    def _usual(self, grid_x: int, grid_y: int, tensors: Sequence[torch.Tensor], numbers: Sequence[int]) -> None:
        tensor = tensors[0]
        if _INTERPRETED or not tensor.is_cuda:
            self.kernel[(grid_x, grid_y)](*tensors, *numbers, **self.constants)
            return
        with torch.cuda.device(tensor.device):
            compiled = self.kernel[(grid_x, grid_y)](*tensors, *numbers, **self.constants)
        if _DIRECT and self.direct is None and all(t.data_ptr() % 16 == 0 for t in tensors):
            run = compiled.run
            if not run.global_scratch_size and not run.profile_scratch_size:
                tail = (None,) * sum(p.is_constexpr for p in self.kernel.params)  # parsed, never read
                self.direct = (tensor.get_device(), run.launch, compiled.function, compiled.packed_metadata, tail)


class Launchers(dict[tuple[Any, ...], Launcher]):
    """The launchers of one kernel by kind of call."""

    def __setitem__(self, key: tuple[Any, ...], launcher: Launcher) -> None:
        if len(self) >= _MAX_LAUNCHERS:
            self.clear()
        super().__setitem__(key, launcher)


def watched(*tensors: torch.Tensor | None) -> bool:
    """Whether the call must be a registered operation: under a compiler, a dispatch mode, or on tensor subclasses.

    They see operations only; a kernel that is started directly would be invisible to them.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return True
    for tensor in tensors:
        kind = type(tensor)
        if kind is not torch.Tensor and kind is not torch.nn.Parameter and tensor is not None:
            return True
    return False


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd records a call with these inputs."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """`x` as [rows, width] with unit last stride; a copy only where no view has that form."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] <= 1 else rows.contiguous()


def unit_of(*counts: int) -> int:
    """16 where it divides all of `counts`, else 1.

    Strides and sizes are passed in these units and multiplied back in the kernel, so that the compiler knows their
    divisibility (which 16-byte accesses need) without specialising on their values.
    """
    for count in counts:
        if count % 16:
            return 1
    return 16


def fresh(like: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> torch.Tensor:
    """A contiguous tensor on the device of `like`; several times cheaper for the host than `torch.empty`."""
    strides, stride = [], 1
    for size in reversed(shape):
        strides.append(stride)
        stride = stride * size
    return like.new_empty_strided(shape, strides[::-1], dtype=dtype)


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least `n`."""
    return 1 << max(0, n - 1).bit_length()


@functools.cache
def num_processors(device: int) -> int:
    """How many multiprocessors (compute units, Xe cores) device number `device` has; 4 for the interpreter."""
    if device < 0:
        return 4
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(device).multi_processor_count
    return int(torch.get_device_module().get_device_properties(device).max_compute_units)


@functools.cache
def device_name(device: int) -> str:
    """The architecture that tables of configurations are kept by: `sm_90`, `gfx942`, or an empty string."""
    if device < 0 or not torch.cuda.is_available():
        return ""
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0])
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def check(condition: bool, what: Callable[[], str]) -> None:
    """Raise ValueError with the text of `what` unless `condition` holds."""
    if not condition:
        raise ValueError(what())


def batches(batch: Any, most: int, *tensors: torch.Tensor) -> Iterator[tuple[int, tuple[torch.Tensor, ...]]]:
    """Cut tensors along their first dimension into parts of at most `most`, those of length 1 excepted, which all share."""
    if batch <= most:
        yield batch, tensors
        return
    for start in range(0, batch, most):
        stop = min(start + most, batch)
        yield stop - start, tuple(t if t.shape[0] == 1 else t[start:stop] for t in tensors)
