"""Choosing among candidates whose checks and timings are known."""

from __future__ import annotations

from kernelwise._evidence import Candidate, Comparison, Timing
from kernelwise._tuning import _choose


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
    runs = {"prefill": 1.0, "decode": 0.001}  # seconds of the whole model
    return _choose.choose(tried, objective, runs, by_memory=by_memory)[0]  # type: ignore[arg-type]


def test_own_code_stays_unless_something_is_clearly_faster():
    assert choose(candidate("a", ("prefill", 1.5, 1))) == "a"
    assert choose(candidate("a", ("prefill", 1.5, 1), sure=False)) is None
    assert choose(candidate("a", ("prefill", 0.9, 1))) is None
    assert choose(Candidate("a", out="wrong")) is None
    assert choose() is None


def test_what_was_offered_first_stays_unless_another_is_better_by_a_margin():
    first, second = candidate("a", ("prefill", 2.0, 1)), candidate("b", ("prefill", 2.02, 1))
    assert choose(first, second) == "a"
    assert choose(second, first) == "b"
    assert choose(first, candidate("b", ("prefill", 2.5, 1))) == "b"


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
