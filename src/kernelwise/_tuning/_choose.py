"""Choose: what was found out about candidates → one of them for each kind of layers, or the layers' own code. Pure."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence

from kernelwise._evidence import AND_COMPILED, Candidate, Comparison, Objective, Timing
from kernelwise._tuning._candidates import Kind

MARGIN = 0.02
"""By which part of the layers' own time a candidate must be better than one that was offered before it."""

VISIBLE = 0.01
"""And by which part of a whole run in a workload: less nobody could see, and another tuning may find the opposite.

So much a kernel must also save of the own code's run, with all kinds of layers for which it is chosen in a mode.

Not under torch.compile, where nobody knows yet how long runs are: there all choices together are judged in the whole.
"""


def choose_all(
    tried: Mapping[Kind, Sequence[Candidate]], objective: Objective, run_s: Mapping[str, float], *, notes: list[str]
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
        visible = 0.0 if by_memory or kind.mode.endswith(AND_COMPILED) else VISIBLE
        kernel, reasons[kind] = choose(found, objective, run_s, by_memory=by_memory, visible=visible)
        if any(candidate.timings for candidate in found):
            chosen[kind] = kernel
    if not by_memory:
        unseen = {kind: why for kind, why in _unseen(chosen, tried, run_s) if not kind.mode.endswith(AND_COMPILED)}
        chosen |= dict.fromkeys(unseen)
        reasons |= unseen
    for kind, kernel in chosen.items():  # a kernel that computes what its child is for does not call that child
        above = next((other for other in chosen if chosen[other] is not None and _is_part_of(kind, other)), None)
        if kernel is not None and above is not None:
            chosen[kind], reasons[kind] = None, f"{chosen[above]} computes it for {above.layer.path}"
    return chosen, reasons


def _unseen(
    chosen: Mapping[Kind, str | None], tried: Mapping[Kind, Sequence[Candidate]], run_s: Mapping[str, float]
) -> Iterator[tuple[Kind, str]]:
    """The kinds whose kernel saves less of every run than can be seen, with all kinds it is chosen for in a mode; and why."""
    saved: dict[tuple[str, str | None], dict[str, float]] = {}
    for kind, kernel in chosen.items():
        parts = saved.setdefault((kind.mode, kernel), {})
        for timing in (t for one in tried[kind] if one.kernel == kernel for t in one.timings):
            parts[timing.workload] = parts.get(timing.workload, 0.0) + _part_of_a_run(timing, run_s)
    for kind, kernel in chosen.items():
        most = max(saved[kind.mode, kernel].values(), default=0.0)
        if kernel is not None and most < VISIBLE:
            yield kind, f"all that {kernel} would save is {most:.1%} of a run at most, which nobody could see"


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
    tried: Sequence[Candidate],
    objective: Objective,
    run_s: Mapping[str, float],
    *,
    by_memory: bool = False,
    visible: float = VISIBLE,
) -> tuple[str | None, str]:
    """Return the best of what was tried, or None for the own code, and why."""
    best: tuple[float, Candidate] | None = None
    unseen: list[str] = []
    for candidate in tried:
        if not candidate.timings:
            continue
        gain = _memory_gain(candidate) if by_memory else _time_gain(candidate, objective, run_s)
        lead = gain - best[0] if best else gain
        if lead <= (MARGIN if best else 0.0):
            continue
        if best and visible and _lead_in_a_run(candidate, best[1], run_s) < visible:
            unseen.append(candidate.kernel)
            continue
        best, unseen = (gain, candidate), []
    if best is None:
        if not tried:
            return None, "nothing was tried in time"
        if not any(candidate.timings for candidate in tried):
            return None, "every candidate is out" if all(c.out for c in tried) else "no candidate could be timed"
        return None, "no candidate needs less memory" if by_memory else "no candidate is clearly faster"
    why = ", ".join(f"{_words(t.comparison)} in {t.workload}" for t in best[1].timings)
    if unseen:
        why += f"; what {' or '.join(unseen)} would save besides is less than {visible:.0%} of a run"
    return best[1].kernel, why


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


def _lead_in_a_run(candidate: Candidate, other: Candidate, run_s: Mapping[str, float]) -> float:
    """Which part of a whole run one candidate saves more than another, in the workload in which that is the most."""
    known = {timing.workload: _part_saved(timing.comparison) for timing in other.timings}
    return max(_part_of_a_run(timing, run_s, known.get(timing.workload, 0.0)) for timing in candidate.timings)


def _part_of_a_run(timing: Timing, run_s: Mapping[str, float], known: float = 0.0) -> float:
    """Which part of a whole run is saved beyond a `known` part of the layers' time."""
    own = timing.calls * timing.comparison.own_us / 1e6 / run_s[timing.workload]
    return own * (_part_saved(timing.comparison) - known)


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
