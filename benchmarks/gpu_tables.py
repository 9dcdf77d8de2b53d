"""The tables of docs/gpu.md, from the results of gpu_ops.py, gpu_e2e.py and gpu_tune.py: `python benchmarks/gpu_tables.py`."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from gpu_rows import PEERS, RESULTS, Measured, means, measured

from kernelwise._evidence import (
    AND_COMPILED,
    BUILTIN,
    COMPILED,
    EAGER,
    LIGER,
    OWN_CODE,
    TUNED,
    Choice,
    Run,
    Tuning,
    load,
)

FILES = {
    "Llama-3-8B": "gpu_e2e_h100.json",
    "Qwen3-8B": "gpu_e2e_h100_qwen3.json",
    "Gemma-3-4B": "gpu_e2e_h100_gemma3.json",
}
TUNED_AND_COMPILED = TUNED + AND_COMPILED
OTHERS = (EAGER, BUILTIN, COMPILED, LIGER)
CONTENDERS = (*OTHERS, TUNED, TUNED_AND_COMPILED)
NOISE = 0.03
COLUMNS = ("prefill_ms", "decode_dynamic_ms", "decode_graph_ms", "train_ms", "train_extra_gb")
NAMES = {
    "eager": "as in transformers",
    "ours": '`kernelize(model, {"LinearCrossEntropy": "builtin:LinearCrossEntropy"})`',
    "ours-loss": "`kernelize(model)`: the head with its own loss, else the same",
    "ours+growing": "`kernelize(model)` and a cache with room",
    "liger": "Liger",
    "liger+loss": "Liger with its fused loss, else the same",
    "compile": "torch.compile",
    "ours+compile": "torch.compile of ours",
}


def main() -> None:
    found = measured()
    print(*operations(found), *losses(found), sep="\n")
    for shape, name in FILES.items():
        variants = json.loads((RESULTS / name).read_text())["variants"]
        print(
            f"\n| {shape} shape | prefill 1 x 4096 | decode, dynamic cache | decode, CUDA graph | training step | its memory |"
        )
        print("|---|---|---|---|---|---|")
        for variant, found in variants.items():
            cells = []
            for column in COLUMNS:
                value, ratio = found.get(column), times_eager(variants, variant, column)
                unit = " GB" if column.endswith("gb") else ""
                shown = f" ({ratio:.2f} x)" if variant != "eager" else ""
                cells.append(f"{value:.3g}{unit}{shown}" if value else "")
            print(f"| {NAMES[variant]} | {' | '.join(cells)} |")
    for shape in ("llama", "qwen3", "gemma3"):
        print("\n".join(tuned(shape, tunings(shape))))


def times_eager(variants: Mapping[str, Mapping[str, Any]], name: str, column: str) -> float:
    """How many times as good as eager a contender of gpu_e2e.py is, in turns where it was measured so; 0: it has no figure."""
    found = variants.get(name, {})
    in_turns = found.get(f"{column.removesuffix('_ms')}_speedup")
    if in_turns:
        return float(in_turns[0])
    value = found.get(column)
    return variants["eager"][column] / value if value else 0.0


def operations(found: Sequence[Measured]) -> Iterator[str]:
    """Say how many times as long as ours every peer takes: the geometric means of large and of small shapes."""
    columns = (*PEERS.values(), "% of copy bandwidth", "% of limit")
    yield f"| | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}"
    for name, direction in dict.fromkeys((one.name, one.direction) for one in found):
        for size in ("large", "small"):
            some = [one for one in found if (one.name, one.direction, one.size) == (name, direction, size)]
            if not some or name == "linear_cross_entropy":
                continue
            ratios = means(some)
            cells = [_short(ratios[who]) if who in ratios else "" for who in PEERS]
            share = f"{100 * statistics.mean(one.share for one in some):.0f}" if size == "large" else ""
            both = "forward and backward" if direction == "together" else direction
            limit = f"{100 * statistics.mean(one.limit for one in some):.0f}"
            yield f"| {name} {both}, {size} | {' | '.join(cells)} | {share} | {limit} |"


def losses(found: Sequence[Measured]) -> Iterator[str]:
    """Say how long losses take with their gradients, and which memory."""
    columns = {"ours": "ours", "consume": "ours, consuming", **PEERS, "products": "products"}
    some = [one for one in found if one.direction == "together"]
    names = {who: columns[who] for who in columns if any(who in one.times for one in some)}
    yield f"\n| ms (GB) | {' | '.join(names.values())} |\n|---|{'---|' * len(names)}"
    for one in some:
        cells = [
            f"{one.times[who] / 1e3:.3g}" + (f" ({one.peaks[who] / 1e9:.2f})" if who != "products" else "")
            if who in one.times
            else ""
            for who in names
        ]
        kind = "linear, " if one.name == "linear_cross_entropy" else ""
        yield f"| {kind}{one.shape.replace('x', ' x ')} | {' | '.join(cells)} |"


def _short(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 5 else f"{ratio:.1f}"


def tunings(shape: str, folder: Path = RESULTS) -> list[Tuning]:
    """Return the evidence of each tuning of a shape."""
    return [load(path) for path in sorted(folder.glob(f"gpu_tune_h100_{shape}*.json"), key=lambda path: path.stem)]


def tuned(shape: str, found: Sequence[Tuning]) -> Iterator[str]:
    """Say what tunings found: the versions, a table of least and most of all runs, and what they must show."""
    if not found:
        return
    facts = dict(found[0].environment)
    yield f"\n{shape}: {', '.join(f'{name} {value}' for name, value in facts.items())}; {found[0].date}\n"
    speeds: dict[str, dict[str, list[float]]] = {}
    for run in (run for tuning in found for run in tuning.runs):
        if run.comparison and run.contender in CONTENDERS and run.contender != EAGER:
            speeds.setdefault(run.workload, {}).setdefault(run.contender, []).append(run.comparison.speedup)
    names = [name for name in CONTENDERS if any(name in by_name for by_name in speeds.values())]
    yield f"| times eager | {' | '.join(names)} |\n|---|{'---|' * len(names)}"
    for workload, by_name in speeds.items():
        bounds = [(min(by_name[name]), max(by_name[name])) if name in by_name else () for name in names]
        cells = [" to ".join(dict.fromkeys(f"{speed:.2f}" for speed in some)) for some in bounds]
        yield f"| {workload} | {' | '.join(cells)} |"
    yield ""
    for number, tuning in enumerate(found):
        yield f"run {number}, {tuning.seconds:.0f} s: {', '.join(of_the_best(tuning.runs))}"
    yield "decisions: " + ("; ".join(disagreements(found)) or "agree")
    for number, tuning in enumerate(found):
        untried = sum(choice.chosen != OWN_CODE and not choice.candidates for choice in tuning.choices)
        if untried:
            yield f"run {number}: {untried} kinds of layers have their kernel by default, as no time was left to try it"


def of_the_best(runs: Sequence[Run]) -> Iterator[str]:
    """Say for each workload how fast the tuned model is as a part of the fastest other contender, eager among them.

    Where tuning left all to torch.compile, the runs of both are the same.
    """
    for workload in dict.fromkeys(run.workload for run in runs):
        mine = [run for run in runs if run.workload == workload]
        speeds = {run.contender: run.comparison.speedup for run in mine if run.comparison}
        ours = max((TUNED, TUNED_AND_COMPILED), key=lambda name: speeds.get(name, 0.0))
        others = {name: speeds[name] for name in OTHERS if name in speeds}
        best = max(others, key=lambda name: others[name], default=EAGER)
        if ours not in speeds or best not in others:
            yield f"{workload} did not run"
            continue
        part = speeds[ours] / others[best]
        yield f"{workload} {part:.3f} of {best} ({ours})" + (" SLOWER" if part < 1 - NOISE else "")


def disagreements(tunings: Sequence[Tuning]) -> Iterator[str]:
    """Say where two runs chose different kernels for a kind of layers, and what each of them knew of the two."""
    for (number, one), (index, other) in combinations(enumerate(tunings), 2):
        mine, theirs = ({(c.layer, c.name, c.mode): c for c in tuning.choices} for tuning in (one, other))
        for key in {**mine, **theirs}:
            pair = [(number, mine.get(key)), (index, theirs.get(key))]
            kernels = ["not tuned" if choice is None else choice.chosen for _, choice in pair]
            if kernels[0] != kernels[1]:
                known = ", ".join(f"{what_is_known(choice, kernels)} in run {run}" for run, choice in pair)
                yield f"{key[0]} {key[1]} ({key[2]}): {kernels[0]} or {kernels[1]}, {known}"


def what_is_known(choice: Choice | None, kernels: Sequence[str]) -> str:
    """Say what a run knew of the difference between two kernels for a kind of layers, one of which may be its own code."""
    candidates = {c.kernel: c for c in choice.candidates} if choice is not None else {}
    asked = [candidates.get(kernel) for kernel in kernels if kernel != OWN_CODE]
    if choice is None or any(one is None or not (one.timings or one.out) for one in asked):
        return "not tried" if choice is not None else "not tuned"
    if any(one is not None and one.out for one in asked):
        return "one is out"
    if "no clear difference to" in choice.reason or not differ_clearly(choice, *kernels):
        return "no clear difference"
    return "CLEAR"


def differ_clearly(choice: Choice, one: str, other: str) -> bool:
    """Whether the intervals of two kernels lie apart in a workload. Own code is 1."""
    bounds: list[dict[str, tuple[float, float]]] = [
        {
            t.case: (t.comparison.low, t.comparison.high)
            for c in choice.candidates
            if c.kernel == name
            for t in c.timings
        }
        for name in (one, other)
    ]
    cases = set(bounds[0]) | set(bounds[1])
    for found, name in zip(bounds, (one, other), strict=True):
        if name == OWN_CODE:
            found.update(dict.fromkeys(cases, (1.0, 1.0)))
    both = [case for case in cases if all(case in found for found in bounds)]
    return any(bounds[0][case][0] > bounds[1][case][1] or bounds[1][case][0] > bounds[0][case][1] for case in both)


if __name__ == "__main__":
    main()
