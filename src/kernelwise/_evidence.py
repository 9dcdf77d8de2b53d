"""Evidence of speed: what measuring and tuning found, as frozen values. Imports no torch.

`Comparison` is what timing two things in turns gives. A `Timing` is one of a kernel with its layer's own code, a `Run` one of
a whole model with its eager self. A `Tuning` holds all of it, with what was chosen and why; it is the evidence that a tuned
`KernelConfig` carries, and what the report shows.
"""

from __future__ import annotations

import json
import math
import os
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from kernelwise._data import Target, from_json, to_json
from kernelwise._errors import KernelwiseError
from kernelwise._table import render
from kernelwise._units import duration, ratio, size

OWN_CODE = "own code"
EAGER = "eager"
TUNED = "tuned"
BUILTIN, COMPILED, TRANSFORMERS, LIGER = "builtin", "torch.compile", "transformers", "liger"
AND_COMPILED = "+compile"

_INSTEAD = {
    COMPILED: "A config cannot hold it: torch.compile(model) runs it, and tuning with compile=True (--compile) finds the "
    "kernels that go with it",
    TRANSFORMERS: "The config does not hold it: model.set_use_kernels(True) runs it, and candidates= (--candidate) names its "
    "kernels to a tuning",
    LIGER: "The config does not hold it: Liger's patch for models of this type runs it",
    TUNED
    + AND_COMPILED: 'The config holds it: kernelize(model, config, mode="inference+compile"), or "training+compile", and '
    "torch.compile(model) run it",
    BUILTIN
    + AND_COMPILED: 'kernelize(model, mode="inference+compile"), or "training+compile", and torch.compile(model) run it',
}
"""How to get a contender that was better than the tuned config."""

FEW_ROUNDS = 6
"""With fewer rounds than these, the bounds of a comparison are hardly known."""

Verdict = Literal["faster", "slower", "no clear difference"]
Objective = Literal["latency", "throughput", "memory"]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two things that did the same work, timed in turns.

    `own_us` and `us` are medians in microseconds: of what was there before, and of what might replace it. `speedup` is the
    median over the rounds of their ratio, above 1 where the newcomer is faster; `low` and `high` are the bounds of its 95 %
    confidence interval. Peaks are bytes of memory allocated during the work beyond what was held before; None where the
    device does not count them. `first_s` is how long the newcomer's first call took, compiling included.
    """

    own_us: float
    us: float
    speedup: float
    low: float
    high: float
    rounds: int
    own_peak: int | None = None
    peak: int | None = None
    first_s: float | None = None

    @property
    def verdict(self) -> Verdict:
        """Which one is faster; where the interval holds 1, or the gain is within a hundredth, nobody can say."""
        if self.low > 1.0 and self.speedup > 1.01:
            return "faster"
        if self.high < 1.0 and self.speedup < 0.99:
            return "slower"
        return "no clear difference"

    @property
    def in_a_hurry(self) -> bool:
        """Whether more time could say more: nothing is clear yet, or the rounds are too few for bounds that hold."""
        return self.verdict == "no clear difference" or self.rounds < FEW_ROUNDS


@dataclass(frozen=True, slots=True)
class Timing:
    """One candidate for one kind of layer, against the layer's own code on what the layer is given in one workload.

    `layer` is the first of the `paths` it speaks for. `mode` is one of `kernelwise._data.MODES`: in training a call is
    forward and backward, with `+compile` both are compiled. `graph` says that both ran inside a CUDA graph. `calls` is how
    often the model calls a layer of this kind in the workload, all paths together.
    """

    layer: str
    paths: tuple[str, ...]
    candidate: str
    mode: str
    workload: str
    comparison: Comparison
    calls: int = 1
    graph: bool = False

    @property
    def case(self) -> str:
        """The workload, and whether it ran inside a CUDA graph."""
        return f"{self.workload} (CUDA graph)" if self.graph else self.workload


@dataclass(frozen=True, slots=True)
class Run:
    """One contender on one workload of a whole model, against the model's own eager code in turns.

    `tokens` is how many tokens one run computes (0 where the inputs are not tokens). `error` says why there is no comparison.
    """

    contender: str
    workload: str
    comparison: Comparison | None
    tokens: int = 0
    error: str | None = None

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens a second of this contender; None where the inputs are not tokens, or it failed."""
        return self.tokens / self.comparison.us * 1e6 if self.comparison is not None and self.tokens else None


@dataclass(frozen=True, slots=True)
class Candidate:
    """One kernel that was offered for a kind of layer, and what was found: `out` says why it may not go in.

    `error` is its worst error as a multiple of what is allowed. Timings exist only for what passed its checks.
    """

    kernel: str
    out: str | None = None
    error: float | None = None
    checks: int = 0
    timings: tuple[Timing, ...] = ()


@dataclass(frozen=True, slots=True)
class Choice:
    """What was chosen for one kind of layer in one mode: a reference, or `"own code"`, with the reason and all candidates."""

    layer: str
    paths: tuple[str, ...]
    name: str
    class_name: str
    op: str
    mode: str
    chosen: str
    reason: str
    candidates: tuple[Candidate, ...] = ()


@dataclass(frozen=True, slots=True)
class Tuning:
    """All that tuning a model found. Prints as tables, serialises.

    `runs` are the whole model's: every contender, the tuned model among them as `"tuned"`, and each choice alone by its name.
    `best` is the contender that was best over all workloads: `"tuned"`, unless something was better that runs the whole model
    in another way, such as `"torch.compile"`; it is empty where that is not known. `environment` are pairs of a name and what
    it is here (versions, device, driver, threads). `config` is the tuned config as TOML. `seconds` is how long it took.
    """

    model: str
    target: Target
    objective: Objective
    workloads: tuple[str, ...]
    choices: tuple[Choice, ...]
    runs: tuple[Run, ...]
    environment: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    config: str = ""
    date: str = ""
    seconds: float = 0.0
    best: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the evidence as plain dicts, lists and scalars. An error that is not finite is null: JSON has no infinity."""
        data: dict[str, Any] = to_json(self)
        for candidate in (candidate for choice in data["choices"] for candidate in choice["candidates"]):
            if candidate["error"] is not None and not math.isfinite(candidate["error"]):
                candidate["error"] = None
        return data

    def is_part(self, run: Run) -> bool:
        """Whether a run is one of a choice alone: a part of the tuned model, and no contender beside it."""
        return any(run.contender == choice.name for choice in self.choices)

    def label(self, run: Run) -> str:
        """Say who ran: `"RMSNorm alone"` for one choice, else the contender."""
        return f"{run.contender} alone" if self.is_part(run) else run.contender

    def better(self) -> tuple[str, ...]:
        """Say in sentences what was better than the tuned config, as a whole or in one workload, and how to get it."""
        tuned = {run.workload: run.comparison for run in self.runs if run.contender == TUNED}
        found: dict[str, list[tuple[str, bool]]] = {}
        for run in self.runs:
            ours, theirs = tuned.get(run.workload), run.comparison
            if ours is None or theirs is None or self.is_part(run) or run.contender in (TUNED, EAGER):
                continue
            figures = f"{ratio(theirs.speedup)} in {run.workload} (tuned {ratio(ours.speedup)})"
            clear = theirs.low > ours.high
            if clear or run.contender == self.best:
                found.setdefault(run.contender, []).append((figures, clear))
        return tuple(
            f"{name} {'is' if any(clear for _, clear in those) else 'seems'} better than the tuned config"
            + ("" if name == self.best else " in a part")
            + f". Times as fast as the model's own code: {', '.join(figures for figures, _ in those)}"
            + (f". {_INSTEAD[name]}" if name in _INSTEAD else "")
            for name, those in found.items()
        )

    @classmethod
    def from_json(cls, data: Any) -> Tuning:
        """Build the evidence from what `to_json` gave.

        Raises:
            KernelwiseError: the data is not such evidence; the message says where it is not.
        """
        try:
            found = from_json(cls, data)
        except (TypeError, KeyError) as error:
            raise KernelwiseError(f"this is no evidence of a tuning: {error}\n{_GO_ON}") from None
        wrong = next(misfits(found, cls, cls.__name__), None)
        if wrong is not None:
            raise KernelwiseError(f"this is no evidence of a tuning: {wrong}\n{_GO_ON}")
        return found

    def __str__(self) -> str:
        took = f" in {duration(self.seconds * 1e6)}" if self.seconds else ""
        what = f"tuned for {self.objective}" if self.choices else "measured"
        parts = [f"{self.model} on {self.target.device}, {what}{took}", *_runs_tables(self)]
        if self.choices:
            parts.append(_choices_table(self.choices).strip("\n"))
        parts += self.better()
        return "\n\n".join(parts) + "".join(f"\nnote: {note}" for note in self.notes)


def load(file: str | os.PathLike[str]) -> Tuning:
    """Read the evidence that a file holds as JSON.

    Raises:
        KernelwiseError: the file cannot be read, or what it holds is no such evidence.
    """
    try:
        data = json.loads(Path(file).read_bytes())
    except OSError as error:
        raise KernelwiseError(f"cannot read {file}: {error.strerror or error}\n{_GO_ON}") from None
    except ValueError as error:
        raise KernelwiseError(f"{file} is not JSON: {error}\n{_GO_ON}") from None
    try:
        return Tuning.from_json(data)
    except KernelwiseError as error:
        raise KernelwiseError(f"{file}: {error}") from None


_GO_ON = "  go on      give a file that `kernelwise tune --json FILE` or `kernelwise bench --json FILE` wrote"


def _runs_tables(tuning: Tuning) -> Iterator[str]:
    """Return tables with a line for each contender and two columns for each workload, two workloads at a time."""
    workloads = list(dict.fromkeys(run.workload for run in tuning.runs))
    for first in range(0, len(workloads), 2):
        yield _runs_table(tuning, workloads[first : first + 2]).strip("\n")


def _runs_table(tuning: Tuning, workloads: list[str]) -> str:
    runs = [run for run in tuning.runs if run.workload in workloads]
    rows = []
    for contender in dict.fromkeys(map(tuning.label, runs)):
        own = {run.workload: run for run in runs if tuning.label(run) == contender}
        found = [run.comparison for run in own.values() if run.comparison is not None]
        cells = [cell for workload in workloads for cell in _run_cells(own.get(workload))]
        peak = max((one.peak for one in found if one.peak is not None), default=None)
        first = max((one.first_s for one in found if one.first_s is not None), default=None)
        why = "; ".join(dict.fromkeys(run.error for run in own.values() if run.error))
        ends = (size(peak) if peak is not None else "", duration(first * 1e6) if first is not None else "", why)
        rows.append((contender, "", "", *cells, *ends))
    columns = [header for workload in workloads for header in (workload, "x eager")]
    notes = (
        ["? says that there is no clear difference"] if any("?" in cell for row in rows for cell in row[3:-1]) else []
    )
    return render(("contender", "", "", *columns, "peak memory", "first call", "why not"), rows, notes=notes)


def _run_cells(run: Run | None) -> tuple[str, str]:
    if run is None or run.comparison is None:
        return "", ""
    found = run.comparison
    if run.contender == EAGER:
        return duration(found.us), ""
    unclear = " ?" if found.verdict == "no clear difference" else ""
    return duration(found.us), f"{ratio(found.speedup)} ({ratio(found.low)}-{ratio(found.high)}){unclear}"


def _choices_table(choices: tuple[Choice, ...]) -> str:
    rows = []
    for choice in choices:
        chosen = next((found for found in choice.candidates if found.kernel == choice.chosen), None)
        timings = chosen.timings if chosen is not None and choice.chosen != OWN_CODE else ()
        out = sum(found.out is not None for found in choice.candidates)
        rows.append(
            (
                choice.layer,
                choice.name,
                choice.mode,
                str(len(choice.paths)),
                choice.chosen,
                ", ".join(f"{timing.case} {ratio(timing.comparison.speedup)}" for timing in timings),
                ratio(chosen.error) if chosen is not None and chosen.error is not None else "",
                f"{len(choice.candidates)}" + (f", {out} out" if out else ""),
                choice.reason,
            )
        )
    headers = ("layer", "name", "mode", "alike", "chosen", "x own code", "error / allowed", "candidates", "reason")
    return render(headers, rows)


def misfits(value: Any, hint: Any, where: str) -> Iterator[str]:
    """Say where a value that was read is not of the type that its field has; nouns and their tuples were seen to already."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if is_dataclass(value):
        hints = typing.get_type_hints(type(value))
        for item in fields(value):
            yield from misfits(getattr(value, item.name), hints[item.name], f"{where}.{item.name}")
    elif origin is tuple:
        for index, item in enumerate(value):
            yield from misfits(item, args[0] if args[-1] is Ellipsis else args[index], f"{where}[{index}]")
    elif origin is Literal:
        if value not in args:
            yield f"{where} is {value!r}, not one of {', '.join(args)}"
    else:
        allowed = args if origin in (types.UnionType, typing.Union) else (hint,)
        allowed = (*allowed, int) if float in allowed else allowed
        if type(value) not in allowed:
            names = " or ".join(getattr(kind, "__name__", str(kind)) for kind in allowed)
            yield f"{where} is {value!r}, not {names}"
