"""Configurations found by measurement, as data: `python benchmarks/gpu_ops.py --tune` prints them.

Keyed by operation, then architecture. An entry of a norm is (width, most rows it is for, configuration); the first that
fits a call is taken. A call that none fits gets the defaults of the operation's module.
"""

from __future__ import annotations

from typing import NamedTuple


class NormConfig(NamedTuple):
    """How a norm is cut up: rows per program, warps, programs per multiprocessor (backward), pipeline stages."""

    rows: int
    warps: int
    programs: int = 0
    stages: int = 1


_ANY = 1 << 62

NORM_FORWARD: dict[str, list[tuple[int, int, NormConfig]]] = {}
NORM_BACKWARD: dict[str, list[tuple[int, int, NormConfig]]] = {
    "sm_90": [
        (1024, _ANY, NormConfig(1, 2, 4, 4)),
        (2048, _ANY, NormConfig(1, 4, 3, 3)),
        (2304, _ANY, NormConfig(1, 4, 2, 3)),
        (4096, 8192, NormConfig(1, 16, 1, 4)),
        (4096, _ANY, NormConfig(1, 4, 2, 5)),
        (5120, _ANY, NormConfig(1, 16, 1, 4)),
        (8192, _ANY, NormConfig(1, 16, 1, 3)),
        (16384, _ANY, NormConfig(1, 16, 1, 2)),
    ]
}


def find(table: dict[str, list[tuple[int, int, NormConfig]]], device: str, width: int, rows: int) -> NormConfig | None:
    """The first configuration of `device` for this width, else for the power of two above, for at least `rows` rows."""
    for wanted in (width, 1 << max(0, width - 1).bit_length()):
        for entry_width, most_rows, config in table.get(device, ()):
            if entry_width == wanted and rows <= most_rows:
                return config
    return None
