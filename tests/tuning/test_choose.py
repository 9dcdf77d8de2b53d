"""Choosing among candidates whose checks and timings are known."""

from __future__ import annotations

import pytest

from kernelwise._evidence import Candidate, Comparison, Timing
from kernelwise._tuning import _choose

RUNS = {"prefill": 1.0, "decode": 0.001}
"""Seconds of one run of the whole model."""


def candidate(name: str, *found: tuple[str, float, int], peak: int | None = None, sure: bool = True) -> Candidate:
    """A candidate that is so much faster in each workload, of so many calls of 100 us."""
    timings = [
        Timing(
            "norm",
            ("norm",),
            name,
            "inference",
            workload,
            Comparison(100.0, 100.0 / by, by, by * 0.99 if sure else 0.5, by * 1.01 if sure else 2.0, 20, 1000, peak),
            calls,
        )
        for workload, by, calls in found
    ]
    return Candidate(name, checks=10, timings=tuple(timings))


def choose(*tried: Candidate, objective: str = "latency", by_memory: bool = False) -> str | None:
    return _choose.choose(tried, objective, RUNS, by_memory=by_memory)[0]  # type: ignore[arg-type]


def reason(*tried: Candidate, objective: str) -> str:
    return _choose.choose(tried, objective, RUNS)[1]  # type: ignore[arg-type]


def test_own_code_stays_unless_something_is_clearly_faster():
    assert choose(candidate("a", ("prefill", 1.5, 1))) == "a"
    assert choose(candidate("a", ("prefill", 1.5, 1), sure=False)) is None
    assert choose(candidate("a", ("prefill", 0.9, 1))) is None
    assert choose(Candidate("a", out="wrong")) is None
    assert choose() is None


def test_what_was_offered_first_stays_unless_another_is_better_by_a_margin():
    first, second = candidate("a", ("decode", 2.0, 1)), candidate("b", ("decode", 2.02, 1))
    assert choose(first, second) == "a"
    assert choose(second, first) == "b"
    assert choose(first, candidate("b", ("decode", 2.5, 1))) == "b"


@pytest.mark.parametrize("objective", ["latency", "throughput"])
def test_what_was_offered_first_stays_unless_another_is_better_by_what_can_be_seen_in_the_whole(objective):
    # Ten times as fast against five times saves a tenth of the layers' time: that is a hundredth of the run, or all of it.
    first, second = candidate("a", ("prefill", 5.0, 100)), candidate("b", ("prefill", 10.0, 100))
    assert choose(first, second, objective=objective) == "a"
    assert "b would save" in reason(first, second, objective=objective)
    first, second = candidate("a", ("prefill", 5.0, 10_000)), candidate("b", ("prefill", 10.0, 10_000))
    assert choose(first, second, objective=objective) == "b"
    assert "would save" not in reason(first, second, objective=objective)


def test_the_objective_says_which_workload_counts_how_much():
    # In prefill 50 us of 1 s are saved, in decode 100 us of 1 ms are lost, or the other way round.
    prefill = candidate("prefill", ("prefill", 2.0, 100), ("decode", 0.5, 1))
    decode = candidate("decode", ("prefill", 0.5, 100), ("decode", 2.0, 1))
    assert choose(prefill, decode) == "decode"
    assert choose(prefill, decode, objective="throughput") == "prefill"


def test_memory_counts_at_the_worst_peak():
    small, large = candidate("small", ("prefill", 0.9, 1), peak=500), candidate("large", ("prefill", 2.0, 1), peak=2000)
    assert choose(small, large, objective="memory", by_memory=True) == "small"
    assert choose(large, objective="memory", by_memory=True) is None
