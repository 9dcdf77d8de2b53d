"""Figures for people, in three digits: durations, sizes, ratios. Tables and the report page say them alike."""

from __future__ import annotations

import math


def duration(us: float) -> str:
    """Say microseconds in the unit that fits.

    >>> duration(8.7), duration(12_345), duration(192e6)
    ('8.70 µs', '12.3 ms', '3 min 12 s')
    """
    if us >= 60e6:
        minutes, seconds = divmod(round(us / 1e6), 60)
        return f"{minutes} min {seconds} s" if seconds else f"{minutes} min"
    return _scaled(us, ("µs", "ms", "s"), 1000)


def size(num_bytes: float) -> str:
    """Say bytes in the unit that fits.

    >>> size(512), size(3 * 2**20)
    ('512 B', '3.00 MiB')
    """
    if abs(num_bytes) < 1024:
        return f"{num_bytes:.0f} B"
    return _scaled(num_bytes / 1024, ("KiB", "MiB", "GiB", "TiB"), 1024)


def digits(value: float) -> str:
    """Say a number in three digits, never with an exponent below a million.

    >>> digits(1.4159), digits(117849.2), digits(0.00123)
    ('1.42', '117,849', '0.00123')
    """
    if not math.isfinite(value):
        return {math.inf: "∞", -math.inf: "-∞"}.get(value, "not a number")
    if value == 0:
        return "0"
    if abs(value) >= 1e9 or abs(value) < 1e-4:
        return f"{value:.2e}"
    places = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{places}f}"


def ratio(value: float) -> str:
    """Say how many times one thing is another, in two places.

    >>> ratio(1.4159), ratio(0.84), ratio(0.0123), ratio(38.24)
    ('1.42', '0.84', '0.012', '38.2')
    """
    if 0.0995 <= value < 9.995:
        return f"{value:.2f}"
    return f"{value:.2g}" if 1e-4 < value < 0.0995 else digits(value)


def _scaled(value: float, units: tuple[str, ...], step: int) -> str:
    for unit in units[:-1]:
        if abs(value) < step * 0.9995:  # what rounds up to the next unit is said in it
            return f"{digits(value)} {unit}"
        value /= step
    return f"{digits(value)} {units[-1]}"
