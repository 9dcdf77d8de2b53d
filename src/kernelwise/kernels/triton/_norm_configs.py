"""How a norm is cut up: configurations found by measurement, as data, and defaults for what was not measured.

`python benchmarks/gpu_sweep.py` measures candidates for the tables.

Tables are keyed by operation and architecture. An entry is (width, most rows it is for, configuration); the first that
fits is taken.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from ._launch import device_name, power_of_2

_SHARED_BYTES = {"sm_90": 160 << 10, "sm_100": 160 << 10}  # for pipelined rows; elsewhere little is taken for granted


class NormConfig(NamedTuple):
    """How a norm is cut up: rows per program and warps; backward also programs per multiprocessor and pipeline stages,
    and how many columns of the weight's gradient a program of the second kernel adds up."""

    rows: int
    warps: int
    programs: int = 0
    stages: int = 1
    columns: int = 32


Table = dict[str, list[tuple[int, int, NormConfig]]]


_ANY = 1 << 62
_SIZES = (1024, 8192, _ANY)  # configurations of the backward pass change at these numbers of rows

FORWARD: dict[str, Table] = {
    "rms_norm": {},
    "add_rms_norm": {},
    "layer_norm": {"sm_90": [(1024, _ANY, NormConfig(4, 4)), (8192, _ANY, NormConfig(1, 8))]},
    "add_layer_norm": {},
}
# So few rows that whole ones leave multiprocessors idle.
FORWARD_FEW: dict[str, Table] = {
    "rms_norm": {},
    "add_rms_norm": {"sm_90": [(4096, _ANY, NormConfig(1, 4))]},
    "layer_norm": {},
    "add_layer_norm": {},
}
BACKWARD: dict[str, Table] = {
    "rms_norm": {
        "sm_90": [
            (128, _ANY, NormConfig(32, 8, 2, 1, columns=16)),
            (1024, _ANY, NormConfig(1, 2, 4, 4)),
            (2048, _ANY, NormConfig(1, 4, 3, 3)),
            (2304, 8192, NormConfig(1, 8, 2, 4, columns=16)),
            (2304, _ANY, NormConfig(1, 4, 2, 3)),
            (2880, _ANY, NormConfig(1, 8, 1, 5, columns=16)),
            (4096, 8192, NormConfig(1, 16, 1, 4)),
            (4096, _ANY, NormConfig(1, 4, 2, 5)),
            (5120, _ANY, NormConfig(1, 16, 1, 4)),
            (8192, _ANY, NormConfig(1, 16, 1, 3)),
            (16384, 1024, NormConfig(1, 16, 1, 1)),
            (16384, _ANY, NormConfig(1, 16, 1, 2)),
        ]
    },
    "layer_norm": {  # what is not found here is looked up for RMS norm
        "sm_90": [
            (768, 8192, NormConfig(2, 4, 2, 4, columns=16)),
            (1024, _ANY, NormConfig(2, 4, 2, 4, columns=16)),
        ]
    },
}


def _find(table: Table, device: str, width: int, rows: int) -> NormConfig | None:
    """The first configuration of `device` for this width, else for the power of two above, for at least `rows` rows."""
    for wanted in (width, power_of_2(width)):
        for entry_width, most_rows, config in table.get(device, ()):
            if entry_width == wanted and rows <= most_rows:
                return config
    return None


def _warps(block: int, elements: int) -> int:
    """Warps such that each thread holds `elements` of a row of `block`."""
    return max(1, min(32, block // (32 * elements)))


@functools.cache
def forward_config(device: int, width: int, many: bool, operation: str) -> NormConfig:
    """For rows of `width`; `many` of them keep every multiprocessor busy with whole rows."""
    block = power_of_2(width)
    found = _find((FORWARD if many else FORWARD_FEW)[operation], device_name(device), width, _ANY)
    if found is not None:
        return found
    if block <= 512:  # several short rows per program
        return NormConfig(rows=max(1, 2048 // block), warps=4)
    if many and block <= 2048:
        return NormConfig(rows=4096 // block, warps=8)
    elements = 16 if block == width else 32  # of a padded row, up to half are not there
    return NormConfig(rows=1, warps=min(16, max(4, _warps(block, elements))))


def size_class(num_rows: Any) -> int:
    """The number of rows that stands for `num_rows` in the tables; a symbolic one (while compiling) is large."""
    if isinstance(num_rows, int):
        for size in _SIZES:
            if num_rows <= size:
                return size
    return _ANY


@functools.cache
def backward_config(device: int, width: int, size: int, operation: str) -> NormConfig:
    """For rows of `width`; `size` is the `size_class` of their number."""
    block = power_of_2(width)
    for table in (BACKWARD[operation], BACKWARD["rms_norm"]):
        found = _find(table, device_name(device), width, size)
        if found is not None:
            return found
    if block <= 512:
        return NormConfig(rows=max(1, 2048 // block), warps=4, programs=4, stages=1)
    if block >= 16384:
        return NormConfig(rows=1, warps=32, programs=1, stages=1)
    warps = _warps(block, 32)
    return NormConfig(rows=1, warps=warps, programs=max(1, min(4, 8 // warps)), stages=3)


def stages(wanted: int, device: int, stage_bytes: int) -> int:
    """As many pipeline stages as `wanted`, or as shared memory holds."""
    memory = _SHARED_BYTES.get(device_name(device), 48 << 10)
    return max(1, min(wanted, 1 + memory // stage_bytes))
