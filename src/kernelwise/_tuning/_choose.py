"""Choose: what was found out about candidates → one of them for each kind of layers, or the layers' own code. Pure."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence

from kernelwise._evidence import AND_COMPILED, Candidate, Comparison, Objective, Timing
from kernelwise._tuning._candidates import Kind

MARGIN = 0.02
"""By which part of the layers' own time a candidate must be better than one that was offered before it."""

VISIBLE = 0.01
"""Which part of a whole run of a workload could be seen: where time differs by less, memory decides, then own code stays.

Not under torch.compile, where nobody knows yet how long runs are: there all choices together are judged in the whole.
"""


def choose_all(
    tried: Mapping[Kind, Sequence[Candidate]],
    objective: Objective,
    run_s: Mapping[str, float],
    *,
    notes: list[str],
) -> tuple[dict[Kind, str | None], dict[Kind, str]]:
    """Return for each kind of layers the best kernel, or None for its own code, and the reasons.

    Kinds without a candidate that could be timed have a reason alone. `run_s` are the seconds of one run of each workload.
    """
    chosen: dict[Kind, str | None] = {}
    reasons: dict[Kind, str] = {}
    timings = [timing for found in tried.values() for candidate in found for timing in candidate.timings]
    by_memory = objective == "memory" and any(timing.comparison.peak is not None for timing in timings)
    if objective == "memory" and not by_memory:
        notes.append("memory is not counted on this device, so this is tuned for latency")
    for kind, found in tried.items():
        kernel, reasons[kind] = choose(found, objective, run_s, by_memory=by_memory)
        if any(candidate.timings for candidate in found):
            chosen[kind] = kernel
    # A kernel that computes what its child is for does not call that child.
    parts = [
        (kind, other) for kind in chosen for other in chosen if chosen[other] is not None and _is_part_of(kind, other)
    ]
    if not by_memory:
        of_parts = {kind for kind, _ in parts}
        wholes = {k: v for k, v in chosen.items() if k not in of_parts and not k.mode.endswith(AND_COMPILED)}
        for kind, kernel, why in _of_unseen(wholes, tried, run_s):
            chosen[kind], reasons[kind] = kernel, why
    for kind, other in parts:
        if chosen[kind] is not None and chosen[other] is not None:
            chosen[kind], reasons[kind] = None, f"{chosen[other]} computes it for {other.layer.path}"
    return chosen, reasons


def _of_unseen(
    chosen: Mapping[Kind, str | None], tried: Mapping[Kind, Sequence[Candidate]], run_s: Mapping[str, float]
) -> Iterator[tuple[Kind, str | None, str]]:
    """Return what takes the place of choices that time alone does not speak for, and why.

    That is what needs less memory, else the layers' own code, else a candidate that was offered before. All that it costs in a
    mode is less of every run than could be seen. Another tuning may find the opposite of such differences.
    """
    ways: list[tuple[float, int, Kind, str | None, dict[str, float]]] = []
    for kind, kernel in chosen.items():
        timed = [one for one in tried[kind] if one.timings]
        saved: dict[str | None, dict[str, float]] = {
            one.kernel: {timing.workload: _part_of_a_run(timing, run_s) for timing in one.timings} for one in timed
        }
        saved[None] = dict.fromkeys((workload for parts in saved.values() for workload in parts), 0.0)
        less = {one.kernel: _memory_gain(one) for one in timed}
        order = sorted([None, *(one.kernel for one in timed)], key=lambda name: -less.get(name or "", 0.0))
        for turn, other in enumerate(order[: order.index(kernel)]):
            costs = {workload: part - saved[other].get(workload, 0.0) for workload, part in saved[kernel].items()}
            ways.append((max(costs.values()), turn, kind, other, costs))
    lost: dict[tuple[str, str], float] = {}
    done: set[Kind] = set()
    for cost, _, kind, other, costs in sorted(ways, key=lambda way: (way[1], way[0])):
        after = {work: lost.get((kind.mode, work), 0.0) + max(0.0, part) for work, part in costs.items()}
        if kind not in done and max(after.values()) < VISIBLE:
            done.add(kind)
            lost |= {(kind.mode, work): part for work, part in after.items()}
            more = f"{chosen[kind] or 'own code'} would save {max(0.0, cost):.2%} of a run more, which nobody could see"
            one = next((candidate for candidate in tried[kind] if candidate.kernel == other), None)
            if one is not None:
                more = f"{_why(one)}{', with less memory' if _memory_gain(one) else ''}; {more}"
            yield kind, other, more


def saved_under_compile(
    chosen: Mapping[Kind, str | None],
    tried: Mapping[Kind, Sequence[Candidate]],
    with_kernel: Container[tuple[str, str | None, str]],
) -> dict[str, dict[str, float]]:
    """Return how many seconds of each workload the choices for each mode under torch.compile save, added up.

    That is by the times of compiled layers alone. In a compiled model a layer is fused with what stands around it, so it is
    at least as fast there. Modes in which a kind gets a kernel by default that was not tried are left out: what that saves is
    not known.

    Args:
        with_kernel: path, function and mode of each layer that gets a kernel, chosen or not.
    """
    found: dict[str, dict[str, float]] = {}
    for mode in dict.fromkeys(kind.mode for kind in tried if kind.mode.endswith(AND_COMPILED)):
        mine = {kind: candidates for kind, candidates in tried.items() if kind.mode == mode}
        untried = [kind for kind, candidates in mine.items() if not any(c.timings or c.out for c in candidates)]
        if any((path, kind.layer.function, mode) in with_kernel for kind in untried for path in kind.paths):
            continue
        saved = found.setdefault(mode, {})
        for kind, candidates in mine.items():
            for timing in (t for c in candidates if c.kernel == chosen.get(kind) for t in c.timings):
                by = timing.calls * (timing.comparison.own_us - timing.comparison.us) / 1e6
                saved[timing.workload] = saved.get(timing.workload, 0.0) + by
    return found


def _is_part_of(kind: Kind, other: Kind) -> bool:
    found = other.layer.computes(other.mode)
    parts = {f"{path}.{name}" for path in other.paths for name in (found.depends if found else ())}
    return kind.mode == other.mode and set(kind.paths) <= parts


def choose(
    tried: Sequence[Candidate], objective: Objective, run_s: Mapping[str, float], *, by_memory: bool = False
) -> tuple[str | None, str]:
    """Return the best of what was tried, or None for the own code, and why."""
    best: tuple[float, Candidate] | None = None
    for candidate in tried:
        if not candidate.timings:
            continue
        gain = _memory_gain(candidate) if by_memory else _time_gain(candidate, objective, run_s)
        if gain > (best[0] + MARGIN if best else 0.0):
            best = gain, candidate
    if best is None:
        if not tried:
            return None, "nothing was tried in time"
        if not any(candidate.timings for candidate in tried):
            return None, "every candidate is out" if all(c.out for c in tried) else "no candidate could be timed"
        return None, "no candidate needs less memory" if by_memory else "no candidate is clearly faster"
    return best[1].kernel, _why(best[1])


def _why(candidate: Candidate) -> str:
    return ", ".join(f"{_words(timing.comparison)} in {timing.workload}" for timing in candidate.timings)


def _time_gain(candidate: Candidate, objective: Objective, run_s: Mapping[str, float]) -> float:
    """Which part of the layers' time a candidate saves over all workloads; differences that are not clear count nothing.

    For latency each workload counts as much as another, for throughput as much as it takes.
    """
    saved, own = 0.0, 0.0
    for timing in candidate.timings:
        weight = timing.calls * timing.comparison.own_us
        if objective != "throughput":
            weight /= run_s[timing.workload] * 1e6
        own += weight
        saved += weight * _part_saved(timing.comparison)
    return saved / own if own else 0.0


def _part_of_a_run(timing: Timing, run_s: Mapping[str, float]) -> float:
    """Which part of a whole run a candidate saves."""
    return timing.calls * timing.comparison.own_us / 1e6 / run_s[timing.workload] * _part_saved(timing.comparison)


def _part_saved(found: Comparison) -> float:
    return 0.0 if found.verdict == "no clear difference" else 1 - 1 / found.speedup


def _memory_gain(candidate: Candidate) -> float:
    """Which part of the layers' memory a candidate saves, at the worst of all workloads; less than a hundredth is none."""
    gains = [
        1 - t.comparison.peak / t.comparison.own_peak
        for t in candidate.timings
        if t.comparison.peak is not None and t.comparison.own_peak
    ]
    return min(gains) if gains and min(gains) > 0.01 else 0.0


def _words(found: Comparison) -> str:
    if found.verdict == "no clear difference":
        return found.verdict
    return f"{found.speedup:.3g} ({found.low:.3g}-{found.high:.3g}) times as fast"
