"""Choosing among candidates whose checks and timings are known."""

from __future__ import annotations

import pytest
from torch import nn

import kernelwise as kw
from kernelwise._evidence import Candidate, Comparison, Timing
from kernelwise._tuning import _choose
from kernelwise._tuning._candidates import Kind

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
    assert choose(first, candidate("b", ("decode", 3.0, 1))) == "b"


@pytest.mark.parametrize("objective", ["latency", "throughput"])
def test_what_was_offered_first_stays_unless_another_is_better_by_what_can_be_seen_in_a_run(objective):
    # Ten times as fast against five times saves a tenth of the layers' time: 0.9 % of a run of prefill, or 1.1 %.
    first, second = candidate("a", ("prefill", 5.0, 900)), candidate("b", ("prefill", 10.0, 900))
    assert choose(first, second, objective=objective) == "a"
    assert "what b would save besides is less than 1% of a run" in reason(first, second, objective=objective)
    first, second = candidate("a", ("prefill", 5.0, 1100)), candidate("b", ("prefill", 10.0, 1100))
    assert choose(first, second, objective=objective) == "b"
    assert "would save" not in reason(first, second, objective=objective)


def test_a_lead_in_one_workload_alone_can_be_seen():
    # In decode all of them are the same, which weighs ten thousand times as much for throughput.
    first = candidate("a", ("prefill", 5.0, 1100), ("decode", 2.0, 1))
    second = candidate("b", ("prefill", 10.0, 1100), ("decode", 2.0, 1))
    assert choose(first, second) == "b"
    third = candidate("c", ("prefill", 30.0, 1100), ("decode", 2.0, 1))
    assert choose(first, candidate("small", ("prefill", 5.5, 1100), ("decode", 2.0, 1)), third) == "c"
    assert "would save" not in reason(first, candidate("small", ("prefill", 5.5, 1100)), third, objective="latency")


def test_under_torch_compile_a_lead_of_the_layers_time_is_enough():
    tried = [candidate("a", ("prefill", 5.0, 900)), candidate("b", ("prefill", 10.0, 900))]
    layer = kw.discover(nn.LayerNorm(8))[0]
    for mode, best in (("inference", "a"), ("inference+compile", "b")):
        kind = Kind(layer, (layer.path,), mode, "")
        chosen, _ = _choose.choose_all({kind: tried}, "latency", RUNS, notes=[])
        assert chosen == {kind: best}


def test_own_code_stays_where_what_a_kernel_saves_of_all_layers_could_not_be_seen():
    layers = kw.discover(nn.Sequential(nn.LayerNorm(8), nn.LayerNorm(16)))

    def chosen(calls: int, objective: str = "latency", mode: str = "inference") -> dict[str, str | None]:
        # Twice as fast: half of 100 us for each call is saved, of a second.
        kinds = [Kind(layer, (layer.path,), mode, "") for layer in layers]
        tried = {kind: [candidate("a", ("prefill", 2.0, calls), ("decode", 1.0, 1), peak=500)] for kind in kinds}
        found, reasons = _choose.choose_all(tried, objective, RUNS, notes=[])  # type: ignore[arg-type]
        assert all(("nobody could see" in reasons[kind]) == (found[kind] is None) for kind in kinds)
        return {kind.layer.path: kernel for kind, kernel in found.items()}

    assert chosen(90) == {"0": None, "1": None}  # 0.45 % in each of two kinds
    assert chosen(110) == {"0": "a", "1": "a"}  # 0.55 %
    assert chosen(90, mode="inference+compile") == {"0": "a", "1": "a"}
    assert chosen(90, objective="memory") == {"0": "a", "1": "a"}  # half of the memory


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
