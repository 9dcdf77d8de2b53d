"""Configurations found by measurement, as data: `python benchmarks/gpu_ops.py --tune` prints them.

Keyed by architecture, then operation. An entry of a norm is (width, most rows it is for, rows per program, warps,
programs per multiprocessor, stages); the first that fits a call is taken. What no entry fits gets the defaults of the
operation's module.
"""

from __future__ import annotations

from typing import NamedTuple


class NormConfig(NamedTuple):
    """How a norm is cut up: rows per program, warps, programs per multiprocessor (backward), pipeline stages."""

    rows: int
    warps: int
    programs: int = 0
    stages: int = 1


NORM_FORWARD: dict[str, list[tuple[int, int, NormConfig]]] = {}
NORM_BACKWARD: dict[str, list[tuple[int, int, NormConfig]]] = {}


def find(table: dict[str, list[tuple[int, int, NormConfig]]], device: str, width: int, rows: int) -> NormConfig | None:
    """The first configuration of `device` for this width whose bound is at least `rows`."""
    for entry_width, most_rows, config in table.get(device, ()):
        if entry_width == width and rows <= most_rows:
            return config
    return None
