"""How the heads of a token are cut up, for rotary embedding: configurations found by measurement, as data, and defaults.

`python benchmarks/gpu_sweep.py` measures candidates for the tables, which are keyed by architecture. An entry is (elements
of the queries of one token, most tokens it is for, configuration); the first that fits is taken. For queries and keys that
are normalised as well, backward, it is (width of a head, most tokens, configuration); the defaults there follow what was best
for 32 and 8 heads of 128 and for 8 and 4 of 256.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from ._launch import device_name, power_of_2


class HeadConfig(NamedTuple):
    """Into how many programs the heads of a token are cut, and the warps of each; backward with norms: programs per
    multiprocessor and pipeline stages."""

    shares: int
    warps: int
    programs: int = 0
    stages: int = 1


Table = dict[str, list[tuple[int, int, HeadConfig]]]

_ANY = 1 << 62
_SIZES = (16, 128, 1024, _ANY)  # configurations change at these numbers of tokens
_SHARES_FEW = 8
_WARPS = 8  # of the backward pass with norms, on each multiprocessor

ROTARY: Table = {
    "sm_90": [
        (1024, 16, HeadConfig(8, 1)),
        (1024, 128, HeadConfig(2, 4)),
        (1024, _ANY, HeadConfig(2, 1)),
        (4096, 16, HeadConfig(8, 4)),
        (4096, 128, HeadConfig(2, 4)),
        (4096, 1024, HeadConfig(1, 2)),
    ]
}
ROTARY_BACKWARD: Table = {
    "sm_90": [
        (1024, 128, HeadConfig(4, 1)),
        (1024, 1024, HeadConfig(2, 1)),
        (1024, _ANY, HeadConfig(2, 2)),
        (4096, 128, HeadConfig(8, 1)),
        (4096, _ANY, HeadConfig(1, 2)),
    ]
}
QK_NORM_ROTARY_BACKWARD: Table = {}


def size_class(num_tokens: Any) -> int:
    """The number of tokens that stands for `num_tokens` in the tables; a symbolic one (while compiling) is large."""
    if isinstance(num_tokens, int):
        for size in _SIZES:
            if num_tokens <= size:
                return size
    return _ANY


def _find(table: Table, device: str, elements: int, tokens: int) -> HeadConfig | None:
    for entry_elements, most_tokens, config in table.get(device, ()):
        if entry_elements == elements and tokens <= most_tokens:
            return config
    return None


@functools.cache
def rotary_config(
    device: int, q_heads: int, k_heads: int, width: int, size: int, many: bool, backward: bool
) -> HeadConfig:
    """For `size` tokens (their `size_class`); `many` of them keep every multiprocessor busy with whole tokens."""
    table = ROTARY_BACKWARD if backward else ROTARY
    found = _find(table, device_name(device), q_heads * width, size)
    if found is not None:
        return found
    shares = 1 if many else min(_SHARES_FEW, power_of_2(max(q_heads, k_heads)))
    elements = power_of_2(-(-q_heads // shares)) * power_of_2(width // 2)  # of each half of the queries
    return HeadConfig(shares, max(1, min(4, elements // 256), min(16, elements // 1024)))


@functools.cache
def qk_norm_rotary_backward_config(device: int, q_heads: int, k_heads: int, width: int, size: int) -> HeadConfig:
    """For heads of `width`; a program takes all heads of a token."""
    found = _find(QK_NORM_ROTARY_BACKWARD, device_name(device), width, size)
    if found is not None:
        return found
    elements = (power_of_2(q_heads) + power_of_2(k_heads)) * power_of_2(
        width // 2
    )  # of one half, and so of each gradient
    warps = min(16, power_of_2(max(1, elements // 512) + 1) // 2)  # rounded down
    return HeadConfig(1, warps, programs=max(1, _WARPS // warps), stages=3)
