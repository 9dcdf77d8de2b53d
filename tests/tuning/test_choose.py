"""Choosing among candidates whose checks and timings are known."""

from __future__ import annotations

from collections.abc import Sequence

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


def choose_all(
    *tried: Sequence[Candidate], objective: str = "latency", modes: Sequence[str] = ("inference",)
) -> tuple[list[str | None], list[str]]:
    """What is chosen for kinds of which these were tried, in each mode, and why."""
    layers = kw.discover(nn.Sequential(*(nn.LayerNorm(8 * number) for number in range(1, 1 + len(tried)))))
    kinds = {
        Kind(layer, (layer.path,), mode, ""): found
        for mode in modes
        for layer, found in zip(layers, tried, strict=True)
    }
    chosen, reasons = _choose.choose_all(kinds, objective, RUNS, notes=[])  # type: ignore[arg-type]
    return [chosen[kind] for kind in kinds], [reasons[kind] for kind in kinds]


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
    (chosen,), (why,) = choose_all([first, second], objective=objective)
    assert chosen == "a"
    assert "b would save 0.90% of a run more, which nobody could see" in why
    first, second = candidate("a", ("prefill", 5.0, 1100)), candidate("b", ("prefill", 10.0, 1100))
    (chosen,), (why,) = choose_all([first, second], objective=objective)
    assert chosen == "b"
    assert "would save" not in why


def test_a_lead_in_one_workload_alone_can_be_seen():
    # In decode all of them are the same, which weighs ten thousand times as much for throughput.
    first = candidate("a", ("prefill", 5.0, 1100), ("decode", 2.0, 1))
    second = candidate("b", ("prefill", 10.0, 1100), ("decode", 2.0, 1))
    assert choose_all([first, second])[0] == ["b"]
    third = candidate("c", ("prefill", 30.0, 1100), ("decode", 2.0, 1))
    assert choose_all([first, candidate("small", ("prefill", 5.5, 1100), ("decode", 2.0, 1)), third])[0] == ["c"]


def test_under_torch_compile_a_lead_of_the_layers_time_is_enough():
    tried = [candidate("a", ("prefill", 5.0, 900)), candidate("b", ("prefill", 10.0, 900))]
    assert choose_all(tried, modes=["inference", "inference+compile"])[0] == ["a", "b"]
    small = [candidate("a", ("prefill", 2.0, 90))]
    assert choose_all(small, modes=["inference", "inference+compile"])[0] == [None, "a"]


def test_own_code_stays_where_all_that_kernels_would_save_in_a_mode_could_not_be_seen():
    def twice_as_fast(name: str, calls: int) -> list[Candidate]:
        """Half of 100 us is saved at each call, of a second."""
        return [candidate(name, ("prefill", 2.0, calls))]

    chosen, reasons = choose_all(twice_as_fast("a", 90), twice_as_fast("b", 90))  # 0.45 % each
    assert chosen == [None, None]
    assert reasons[0] == "a would save 0.45% of a run more, which nobody could see"
    # 0.60, 0.55 and 0.30 %: without the last two 0.85 % are lost, with the first it would be 1.45 %.
    tried = [twice_as_fast(name, calls) for name, calls in (("a", 120), ("b", 110), ("c", 60))]
    assert choose_all(*tried, modes=["inference", "training"])[0] == ["a", None, None] * 2
    assert choose_all(*tried, objective="memory")[0] == ["a", None, None]  # which nobody counts here


def test_each_workload_is_looked_at_by_itself():
    prefill, decode = candidate("a", ("prefill", 2.0, 120)), candidate("b", ("decode", 1 / 0.94, 1))  # 0.6 % each
    assert choose_all([prefill], [decode])[0] == [None, None]
    both = candidate("c", ("prefill", 2.0, 120), ("decode", 1 / 0.94, 1))
    assert choose_all([both])[0] == [None]
    much = candidate("d", ("prefill", 2.0, 120), ("decode", 1 / 0.8, 1))
    assert choose_all([much])[0] == ["d"]


def test_a_candidate_that_can_be_seen_does_not_give_way_to_own_code_for_one_that_cannot():
    # 0.5 % and 1.3 %: of the second 0.8 % are lost.
    assert choose_all([candidate("a", ("prefill", 2.0, 100)), candidate("b", ("prefill", 10.0, 145))])[0] == ["a"]
    assert choose_all([candidate("a", ("prefill", 1.2, 100)), candidate("b", ("prefill", 10.0, 145))])[0] == ["b"]


def test_where_time_could_not_be_seen_memory_decides():
    less = candidate("less", ("prefill", 2.0, 90), peak=500)
    assert choose_all([less])[0] == ["less"]
    slower = candidate("slower", ("prefill", 0.9, 90), peak=500)  # 0.1 %
    (chosen,), (why,) = choose_all([slower])
    assert chosen == "slower"
    assert why.startswith(
        "0.9 (0.891-0.909) times as fast in prefill, with less memory; own code would save 0.10% of a"
    )
    assert choose_all([candidate("slow", ("prefill", 0.5, 110), peak=500)])[0] == [None]  # 1.1 %
    assert choose_all([candidate("more", ("prefill", 2.0, 90), peak=1500)])[0] == [None]
    assert choose_all([less, candidate("least", ("prefill", 1.5, 90), peak=400)])[0] == ["least"]
    assert choose_all([less, candidate("fast", ("prefill", 100.0, 230), peak=900)])[0] == ["fast"]


def test_what_another_kernel_computes_keeps_its_kernel_where_that_one_gives_way(monkeypatch):
    monkeypatch.setattr(_choose, "_is_part_of", lambda kind, other: (kind.paths, other.paths) == (("1",), ("0",)))
    child = [candidate("child", ("prefill", 2.0, 900))]
    assert choose_all([candidate("whole", ("prefill", 2.0, 900))], child)[0] == ["whole", None]
    assert choose_all([candidate("whole", ("prefill", 2.0, 90))], child)[0] == [None, "child"]


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
