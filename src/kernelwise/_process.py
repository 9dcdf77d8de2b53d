"""What a whole process computes by: settings of torch, and the states of its random numbers.

A kernel that changes a setting changes every result of the process after it, in other threads too. So settings are read
before and after a kernel's import and each of its calls, and put back. What verify itself needs (float64, filled memory) it
gets from modes of its own thread.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


def _deterministic() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def _set_deterministic(value: tuple[bool, bool]) -> None:
    torch.use_deterministic_algorithms(value[0], warn_only=value[1])


def _flushes() -> bool:
    """Whether this thread takes numbers below the normal ones for zero, as code that is built with -ffast-math asks for."""
    return sys.float_info.min * _HALF == 0.0


_HALF = 0.5


def _flag(place: Any, name: str) -> tuple[Callable[[], Any], Callable[[Any], None]]:
    return (lambda: getattr(place, name)), (lambda value: setattr(place, name, value))


_SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "the default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "the default device": (lambda: str(torch.get_default_device()), torch.set_default_device),
    "the number of threads": (torch.get_num_threads, torch.set_num_threads),
    "deterministic algorithms": (_deterministic, _set_deterministic),
    "whether gradients are recorded": (torch.is_grad_enabled, torch.set_grad_enabled),
    "the precision of float32 products": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "the flushing of small numbers to zero": (_flushes, torch.set_flush_denormal),
    "anomaly detection": (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    "the filling of new memory": _flag(torch.utils.deterministic, "fill_uninitialized_memory"),
    "cudnn.benchmark": _flag(torch.backends.cudnn, "benchmark"),
    "cudnn.deterministic": _flag(torch.backends.cudnn, "deterministic"),
}


changed_by_imports: list[str] = []
"""What kernels have changed when they were imported into this process, and what was put back; the worker asks for it."""


def settings() -> dict[str, Any]:
    """Return every setting of torch that decides what code computes, by what it is called in a sentence."""
    return {name: _read(name) for name in _SETTINGS}


def _read(name: str) -> Any:
    try:
        return _SETTINGS[name][0]()
    except RuntimeError:  # the user has set by another of torch's ways what this one cannot tell
        return None


def put_back(before: dict[str, Any]) -> list[str]:
    """Set what is not as it was before, and say what that was: "the default dtype (to torch.bfloat16)"."""
    changed = []
    for name, (_, write) in _SETTINGS.items():
        now = _read(name)
        if now != before[name] and before[name] is not None:
            changed.append(f"{name} (to {now})")
            if name == "the default device" and before[name] == "cpu":
                write(None)  # a default that was set, even to "cpu", stands in the way of every function of torch
            else:
                write(before[name])
    return changed


@contextmanager
def as_before() -> Iterator[None]:
    """Put settings and random states back, whatever the code inside has changed: the import of a kernel."""
    before = settings()
    with user_random_state():
        try:
            yield
        finally:
            changed_by_imports.extend(put_back(before))


def random_states() -> list[torch.Tensor]:
    """Return the states of the random numbers: of the CPU, and of the GPUs where they are in use."""
    states = [torch.get_rng_state()]
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        states += torch.cuda.get_rng_state_all()
    return states


def draw_from(states: list[torch.Tensor]) -> None:
    """Go on from these states. Of GPUs that have come into use since, nothing is known."""
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state_all(states[1:])


@contextmanager
def user_random_state() -> Iterator[None]:
    """Give the user's random states back as they were, where something was drawn.

    Numbers that another thread draws from the same generators meanwhile are then drawn again.
    """
    before = random_states()
    try:
        yield
    finally:
        if drew_since(before):
            draw_from(before)


def drew_since(before: list[torch.Tensor]) -> bool:
    """Return whether random numbers were drawn, or a generator was seeded, since these were the states."""
    return any(not torch.equal(old, new) for old, new in zip(before, random_states(), strict=False))
