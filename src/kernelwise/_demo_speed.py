"""Speed of the demo: own code and kernels in turns, so that what else the machine does hits both alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich import box
from rich.table import Table
from torch import nn

from kernelwise._api import apply, unkernelize
from kernelwise._data import Plan

PREFILL_TOKENS = 512
DECODE_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Speed:
    """One phase in one dtype, from interleaved pairs of runs. Times are in seconds, ratios are own time / kernel time."""

    dtype: str
    phase: str
    num_tokens: int
    own_s: tuple[float, ...]
    kernel_s: tuple[float, ...]
    expected: float | None = None

    @property
    def ratios(self) -> tuple[float, ...]:
        """Return how many times as fast the kernels were, pair by pair, sorted."""
        return tuple(sorted(own / kernel for own, kernel in zip(self.own_s, self.kernel_s, strict=True)))

    @property
    def ratio(self) -> float:
        """Return the median of the ratios."""
        return statistics.median(self.ratios)

    @property
    def missed(self) -> str | None:
        """Say that the ratio is below what is expected, or None."""
        if self.expected is None or self.ratio >= self.expected:
            return None
        return (
            f"{self.dtype} {self.phase} is {self.ratio:.2f}x as fast, expected at least {self.expected:.2f}x (single pairs: "
            f"{self.ratios[0]:.2f} to {self.ratios[-1]:.2f}). A busy machine can do this: run it again when it is quiet"
        )


def measure(
    model: nn.Module,
    decided: Plan,
    ids: torch.Tensor,
    dtype: str,
    *,
    seconds: float,
    expected: dict[str, float],
    begin: Callable[[str], None],
    part: Callable[[float], None],
) -> list[Speed]:
    """Time prefill and decode of a causal language model with and without kernels, in turns.

    Args:
        ids: token ids `[1, length]`, repeated to a prompt.
        seconds: how long to measure each phase.
        expected: by phase, how many times as fast the kernels should be.
        begin: told what is timed now. part: told how much of it is done, 0 to 1.
    """
    repeats = -(-PREFILL_TOKENS // ids.shape[1])
    prompt = ids.repeat(1, repeats)[:, :PREFILL_TOKENS]
    phases: dict[str, tuple[int, Callable[[], float]]] = {
        "prefill": (PREFILL_TOKENS, lambda: _prefill_s(model, prompt)),
        "decode": (DECODE_TOKENS, lambda: _decode_s(model, prompt[:, :64])),
    }
    speeds = []
    for phase, (num_tokens, run_once) in phases.items():
        begin(f"timing {phase} in {dtype}")
        own_s, kernel_s = _pairs(model, decided, run_once, seconds, part)
        speeds.append(Speed(dtype, phase, num_tokens, own_s, kernel_s, expected.get(phase)))
    return speeds


def _pairs(
    model: nn.Module, decided: Plan, run_once: Callable[[], float], seconds: float, part: Callable[[float], None]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the times of runs without and with kernels, in pairs whose order alternates; the first pair only warms up."""
    own_s: list[float] = []
    kernel_s: list[float] = []
    started = time.perf_counter()
    while (
        len(own_s) < 2
        or (elapsed := time.perf_counter() - started) < seconds
        or (len(own_s) < 4 and elapsed < 3 * seconds)
    ):
        for with_kernels in (False, True) if len(own_s) % 2 else (True, False):
            if with_kernels:
                apply(model, decided)
                kernel_s.append(run_once())
                unkernelize(model)
            else:
                own_s.append(run_once())
        part((time.perf_counter() - started) / seconds)
    return tuple(own_s[1:]), tuple(kernel_s[1:])


def _prefill_s(model: nn.Module, prompt: torch.Tensor) -> float:
    started = time.perf_counter()
    model(prompt, use_cache=True, logits_to_keep=1)
    return time.perf_counter() - started


def _decode_s(model: nn.Module, prompt: torch.Tensor) -> float:
    out = model(prompt, use_cache=True, logits_to_keep=1)
    started = time.perf_counter()
    for _ in range(DECODE_TOKENS):
        token = out.logits[:, -1:].argmax(-1)
        out = model(token, past_key_values=out.past_key_values, use_cache=True)
    return time.perf_counter() - started


def speed_table(speeds: list[Speed]) -> Table:
    """Return the speeds as a table for a terminal."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for header in ("dtype", "phase"):
        table.add_column(header)
    for header in ("own tokens/s", "kernels tokens/s", "ratio", "pairs", "expected"):
        table.add_column(header, justify="right")
    for speed in speeds:
        own, kernels = (speed.num_tokens / statistics.median(times) for times in (speed.own_s, speed.kernel_s))
        table.add_row(
            speed.dtype,
            speed.phase,
            f"{own:.1f}",
            f"{kernels:.1f}",
            f"{speed.ratio:.2f}",
            f"{speed.ratios[0]:.2f}-{speed.ratios[-1]:.2f} ({len(speed.ratios)})",
            "" if speed.expected is None else f">= {speed.expected:.2f}",
        )
    return table
