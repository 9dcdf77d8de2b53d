"""What the report page shows, as values: figures are text here, and percent of a scale. The template has no arithmetic."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from kernelwise._evidence import EAGER, OWN_CODE, TUNED, Candidate, Choice, Comparison, Run, Tuning
from kernelwise._table import fold
from kernelwise._units import duration, ratio, size

_PATTERNS = 8  # of the places where a kind of layer stands, in its heading; the rest is counted


@dataclass(frozen=True, slots=True)
class Speed:
    """A comparison as text, and as a bar: `value`, `low`, `high` and `one` (own code) are percent of the bar's width."""

    comparison: Comparison
    value: float
    low: float
    high: float
    one: float

    @property
    def ratio(self) -> str:
        """The speed-up, `"1.42×"`."""
        return f"{ratio(self.comparison.speedup)}\N{MULTIPLICATION SIGN}"

    @property
    def interval(self) -> str:
        """Its 95 % interval, `"1.38 to 1.46"`."""
        return f"{ratio(self.comparison.low)} to {ratio(self.comparison.high)}"

    @property
    def times(self) -> str:
        """Before and after."""
        return f"{duration(self.comparison.own_us)} → {duration(self.comparison.us)}"

    @property
    def memory(self) -> str | None:
        """Peak memory before and after; None where it was not counted."""
        before, after = self.comparison.own_peak, self.comparison.peak
        if before is None or after is None:
            return None
        change = (
            f" ({100 * (after - before) / before:+.0f}\N{NARROW NO-BREAK SPACE}%)".replace("-", "\N{MINUS SIGN}")
            if before
            else ""
        )
        return f"{size(before)} → {size(after)}{change}"

    @property
    def tone(self) -> str:
        """The verdict as a class of the style."""
        return {"faster": "faster", "slower": "slower"}.get(self.comparison.verdict, "unclear")


@dataclass(frozen=True, slots=True)
class Card:
    """One workload in the summary: the tuned model, or the fastest contender where nothing was tuned."""

    workload: str
    run: Run
    speed: Speed | None
    own_rate: float | None
    rival: Run | None


@dataclass(frozen=True, slots=True)
class Row:
    """One candidate in the table of its kind of layer, with a cell for each workload."""

    candidate: Candidate
    status: str
    why: str
    speeds: tuple[Speed | None, ...]
    own_times: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Kind:
    """One choice as a section of the page: `columns` are the workloads that were timed for it.

    `place` tells kinds of layers with one name apart; it is None where the name is enough.
    """

    choice: Choice
    anchor: str
    places: tuple[str, ...]
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    speeds: tuple[Speed | None, ...]
    place: str | None = None

    @property
    def count(self) -> int:
        """How many layers it stands for."""
        return len(self.choice.paths) or 1

    @property
    def layers(self) -> str:
        """How many layers, in words."""
        return "1 layer" if self.count == 1 else f"{self.count} layers"

    @property
    def changed(self) -> bool:
        """Whether a kernel goes in."""
        return self.choice.chosen != OWN_CODE


def _scale(comparisons: Iterable[Comparison]) -> float:
    """Return the speed-up at the end of a bar, so that every bar fits and one wide interval does not squeeze the others."""
    found = [*comparisons]
    longest = max((one.speedup for one in found), default=1.0)
    widest = max((one.high for one in found), default=1.0)
    return max(1.0, longest, min(widest, 1.5 * longest)) * 1.04


def _speed(comparison: Comparison, scale: float) -> Speed:
    value, low, high, one = (
        round(min(100.0, max(0.0, 100.0 * number / scale)), 2)
        for number in (comparison.speedup, comparison.low, comparison.high, 1.0)
    )
    return Speed(comparison, value, low, high, one)


def _winner(tuning: Tuning, workload: str) -> Run | None:
    """Return the run that the summary speaks of: the tuned model's, else the fastest."""
    runs = [run for run in tuning.runs if run.workload == workload]
    tuned = next((run for run in runs if run.contender == TUNED), None)
    return tuned or _fastest(runs)


def _fastest(runs: Iterable[Run]) -> Run | None:
    ran = [run for run in runs if run.comparison is not None and run.contender != EAGER]
    return max(ran, key=lambda run: run.comparison.speedup if run.comparison else 0.0, default=None)


def _workloads(tuning: Tuning) -> list[str]:
    return list(dict.fromkeys([*tuning.workloads, *(run.workload for run in tuning.runs)]))


def headline(tuning: Tuning) -> str:
    """Say in a sentence or two what is to be gained."""
    speeds: list[str] = []
    unclear: dict[str, list[str]] = {}
    peaks: dict[str, list[str]] = {}
    for workload in _workloads(tuning):
        run = _winner(tuning, workload)
        if run is None:
            continue
        found = run.comparison
        who = "" if run.contender == TUNED else f" with {run.contender}"
        if found is None:
            speeds.append(f"{workload} did not run{who}")
            continue
        if found.verdict == "no clear difference":
            unclear.setdefault(who, []).append(workload)
        else:
            speeds.append(f"{workload} is {ratio(found.speedup)} times as fast{who}")
        if found.own_peak and found.peak is not None and abs(change := found.peak / found.own_peak - 1) >= 0.01:
            by = f"{100 * abs(change):.0f}\N{NARROW NO-BREAK SPACE}% {'higher' if change > 0 else 'lower'}"
            peaks.setdefault(by, []).append(workload)
    for who, workloads in unclear.items():
        speeds.append(f"{_listed(workloads)} show{'s' if len(workloads) == 1 else ''} no clear difference{who}")
    if not speeds:
        return "The whole model was not timed."
    text = f"Against the model's own code, {_listed(speeds)}."
    changes = [f"{by} in {_listed(workloads)}" for by, workloads in peaks.items()]
    return f"{text} Peak memory is {_listed(changes)}." if changes else text


def _listed(parts: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))


def cards(tuning: Tuning) -> list[Card]:
    """Return what the summary says of each workload."""
    found = []
    winners = [(workload, run) for workload in _workloads(tuning) if (run := _winner(tuning, workload)) is not None]
    scale = _scale(run.comparison for _, run in winners if run.comparison is not None)
    for workload, run in winners:
        others = [
            other
            for other in tuning.runs
            if other.workload == workload and other.contender != run.contender and not tuning.is_part(other)
        ]
        own = run.comparison.own_us if run.comparison is not None else 0.0
        found.append(
            Card(
                workload,
                run,
                _speed(run.comparison, scale) if run.comparison is not None else None,
                run.tokens / own * 1e6 if own and run.tokens else None,
                _fastest(others),
            )
        )
    return found


def facts(tuning: Tuning) -> list[str]:
    """Say what was proven of the kernels that go in, and how many were turned down."""
    if not tuning.choices:
        return []
    chosen = [
        found
        for choice in tuning.choices
        for found in choice.candidates
        if found.kernel == choice.chosen and found.kernel != OWN_CODE
    ]
    checks = sum(found.checks for found in chosen)
    errors = [found.error for found in chosen if found.error is not None]
    unchecked = sorted({found.kernel for found in chosen if not found.checks})
    candidates = [found for choice in tuning.choices for found in choice.candidates if found.kernel != OWN_CODE]
    out = sum(found.out is not None for found in candidates)
    said = []
    if checks:
        worst = f"; the largest error is {ratio(max(errors))} of what is allowed" if errors else ""
        said.append(f"The kernels that go in passed {checks:,} checks against the layers' own code{worst}.")
    if unchecked:
        said.append(f"Not checked in this run: {', '.join(unchecked)}.")
    if not chosen:
        said.append("No kernel goes in, so nothing had to be proven.")
    said.append(f"{out} of {len(candidates)} candidates {'is' if out == 1 else 'are'} out; each says why.")
    return said


def panels(tuning: Tuning) -> list[tuple[str, list[tuple[Run, Speed | None]]]]:
    """Return each workload with all its runs, on one scale; own code and the tuned model come first."""
    runs = sorted(tuning.runs, key=lambda run: (run.contender != EAGER, run.contender != TUNED))
    scale = _scale(run.comparison for run in tuning.runs if run.comparison is not None)
    return [
        (
            workload,
            [
                (run, _speed(run.comparison, scale) if run.comparison is not None else None)
                for run in runs
                if run.workload == workload
            ],
        )
        for workload in _workloads(tuning)
        if any(run.workload == workload for run in tuning.runs)
    ]


def kinds(tuning: Tuning) -> tuple[Kind, ...]:
    """Return all choices as sections of the page."""
    names = [(choice.name, choice.mode) for choice in tuning.choices]
    made = [_kind(choice, f"kind-{number}") for number, choice in enumerate(tuning.choices, start=1)]
    return tuple(
        replace(kind, place=kind.places[0]) if names.count(name) > 1 else kind
        for kind, name in zip(made, names, strict=True)
    )


def _kind(choice: Choice, anchor: str) -> Kind:
    """Return a choice with its candidates: the chosen one first, then own code, then what else passed, then what is out."""
    timings = [timing for candidate in choice.candidates for timing in candidate.timings]
    columns = tuple(dict.fromkeys(timing.case for timing in timings))
    scale = _scale(timing.comparison for timing in timings)
    rows = [_row(choice, candidate, columns, scale) for candidate in choice.candidates]
    if all(candidate.kernel != OWN_CODE for candidate in choice.candidates):
        own = {timing.case: duration(timing.comparison.own_us) for timing in timings}
        status, why = ("chosen", choice.reason) if choice.chosen == OWN_CODE else ("own code", "")
        own_times = tuple(own[column] for column in columns)
        rows.insert(0, Row(Candidate(OWN_CODE), status, why, (None,) * len(columns), own_times))
    rows.sort(key=lambda row: ("chosen", "own code", "passed", "not timed", "out").index(row.status))
    chosen = next((row.speeds for row in rows if row.status == "chosen"), ())
    patterns = [label for label, *_ in fold([(path, "", "") for path in choice.paths or (choice.layer,)])]
    more = [f"and {len(patterns) - _PATTERNS} more"] if len(patterns) > _PATTERNS else []
    return Kind(choice, anchor, (*patterns[:_PATTERNS], *more), columns, tuple(rows), tuple(chosen))


def _row(choice: Choice, candidate: Candidate, columns: Sequence[str], scale: float) -> Row:
    found = {timing.case: timing for timing in candidate.timings}
    speeds = tuple(_speed(found[column].comparison, scale) if column in found else None for column in columns)
    if candidate.kernel == choice.chosen:
        return Row(candidate, "chosen", choice.reason, speeds)
    if candidate.out is not None:
        return Row(candidate, "out", candidate.out, speeds)
    if not found:
        return Row(candidate, "own code" if candidate.kernel == OWN_CODE else "not timed", "", speeds)
    verdicts: dict[str, list[str]] = {}
    for timing in candidate.timings:
        verdicts.setdefault(timing.comparison.verdict, []).append(timing.case)
    why = "; ".join(f"{verdict} in {', '.join(cases)}" for verdict, cases in verdicts.items())
    return Row(candidate, "passed", why, speeds)
