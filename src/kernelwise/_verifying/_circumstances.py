"""Circumstances: what a call is observed under besides its inputs, and what it leaves of the memory.

Memory that is filled where nobody wrote it, inference mode, a CUDA graph; and the bytes in use.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from kernelwise._process import draw_from, random_states
from kernelwise._verifying._calls import Call


@contextmanager
def filled_memory(value: float, natively: bool) -> Iterator[None]:
    """Fill memory that is allocated without being written, with NaN or 0.

    A mode of this thread sees what Python code allocates. What compiled code allocates within an operator, only the setting
    for deterministic algorithms fills, with NaN; it is one of the process.
    """
    if not natively or value == 0:
        with _Filled(value):
            yield
        return
    was: Any = torch.utils.deterministic
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        was.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    was.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        was.fill_uninitialized_memory = before[2]


class _Filled(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, value: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.value = value

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if not func.overloadpacket.__name__.startswith(("empty", "new_empty")) or not isinstance(made, torch.Tensor):
            return made
        if made.layout != torch.strided or made.is_quantized:
            return made
        if self.value == 0 or made.is_floating_point() or made.is_complex():
            return made.fill_(self.value)
        return made if made.dtype == torch.bool else made.fill_(torch.iinfo(made.dtype).max)


def in_inference_mode(call: Call) -> Call:
    """Call it as servers do: in inference mode, with inputs that were made there, which have no version."""

    def inferred(module: nn.Module | None, **arguments: Any) -> Any:
        with torch.inference_mode():
            made = tree_map(lambda v: v.clone() if isinstance(v, torch.Tensor) else v, arguments)
            return call(module, **made)

    return inferred


def in_cuda_graph(call: Call) -> Call:
    """Capture a call in a CUDA graph, replay it, and give what the replay wrote.

    A replay draws from the state that the random numbers then have: it is given the one that this call found.
    """

    def replayed(module: nn.Module | None, **arguments: Any) -> Any:
        states = random_states()
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # what is set up on first use must not be captured
                call(module, **arguments)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call(module, **arguments)
        for output in tree_flatten(captured)[0]:
            if isinstance(output, torch.Tensor):
                output.fill_(0)  # what the capture left there is no evidence
        draw_from(states)
        graph.replay()
        torch.cuda.synchronize()
        return captured

    return replayed


def bytes_in_use(on_gpu: bool) -> int:
    """The bytes in use: what the allocator has given out, or where it does not tell, what the process has."""
    if on_gpu:
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()
    try:
        libc = ctypes.CDLL(None)
        libc.mallinfo2.restype = _MallInfo
        found = libc.mallinfo2()
        return int(found.uordblks + found.hblkhd)
    except (AttributeError, OSError, TypeError):  # another C library
        pass
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096
    except OSError:  # nothing can be told on this system
        return 0


class _MallInfo(ctypes.Structure):
    """What `mallinfo2` of the GNU C library returns: ten sizes, of which two are the bytes in use."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "ford", "keep")
    )
