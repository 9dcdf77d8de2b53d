"""Tune models of given shapes on one GPU, several times, and race each result.

    python benchmarks/gpu_tune.py [--shapes llama qwen3 gemma3] [--runs 3]

The models of gpu_e2e.py (8 layers, random bfloat16 weights). For each, and for each of `--runs` runs with an empty cache:
`kernelwise.tune` on 1 x 2048 tokens for prefill, decoding and a training step, eager and under torch.compile, then all
contenders side by side, the tuned model among them (with `--race 0`, as the tuning itself raced them). Written as JSON: the
evidence of each tuning and the runs of its race; and the report page of the first. At the end: how fast the tuned model is as
a part of the best contender in each workload and run (1.00 or more, within 3 %), eager or compiled, whichever is faster; and
where the runs chose different kernels, with the runs that found no clear difference between the two.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from gpu_e2e import MODULES, build

import kernelwise
from kernelwise._data import to_json
from kernelwise._evidence import AND_COMPILED, BUILTIN, COMPILED, EAGER, LIGER, OWN_CODE, TUNED, Choice, Run, Tuning
from kernelwise._measuring._bench import bench
from kernelwise._reporting._page import save

TUNED_AND_COMPILED = TUNED + AND_COMPILED
OTHERS = (EAGER, BUILTIN, COMPILED, LIGER)
CONTENDERS = (*OTHERS, TUNED, TUNED_AND_COMPILED)
WORKLOADS = ("prefill", "decode", "training")
NOISE = 0.03
NO_KERNEL = "it has no kernel for any layer"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=tuple(MODULES), default=list(MODULES))
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=300, help="for each tuning")
    parser.add_argument(
        "--race", type=float, default=8, help="seconds for each workload of the race; 0: the tuning's own"
    )
    parser.add_argument(
        "--eager", action="store_true", help="do not tune for torch.compile, which takes most of the time"
    )
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for shape in options.shapes:
        model = build(shape, options.layers)
        ids = torch.randint(0, model.config.vocab_size, (1, options.tokens), device=model.device)
        found = [one_run(model, ids, shape, number, options) for number in range(options.runs)]
        print(f"== {shape}: the tuned model as a part of the best other contender")
        for number, (_, runs) in enumerate(found):
            print(f"  run {number}: {', '.join(of_the_best(runs))}")
        print("  decisions: " + ("; ".join(disagreements([tuning for tuning, _ in found])) or "agree"), flush=True)
        del model
        torch.cuda.empty_cache()


def one_run(
    model: Any, ids: torch.Tensor, shape: str, number: int, options: argparse.Namespace
) -> tuple[Tuning, tuple[Run, ...]]:
    """Tune with an empty cache, race the result, and write both down."""
    began = last = time.perf_counter()

    def told(what: str, part: float) -> None:
        nonlocal last
        if time.perf_counter() - last > 10:
            last = time.perf_counter()
            print(f"  {last - began:5.0f} s {part:.2f} {what}", flush=True)

    with tempfile.TemporaryDirectory() as cache:
        os.environ["KERNELWISE_CACHE"] = cache
        given = {"input_ids": ids}
        config = kernelwise.tune(
            model,
            given,
            workload=WORKLOADS,
            seconds=options.seconds,
            contenders=[] if options.race else [LIGER],
            compile=not options.eager,
            progress=told,
        )
        evidence = config.evidence
        assert evidence is not None
        print(f"== {shape}, run {number}: tuned in {time.perf_counter() - began:.0f} s\n{evidence}", flush=True)
        runs = evidence.runs
        if options.race:
            names, configs = options.contenders, {TUNED: config}
            runs = bench(model, given, contenders=names, configs=configs, workloads=WORKLOADS, seconds=options.race)
    name = shape if number == 0 else f"{shape}_{number}"
    (options.out / f"gpu_tune_h100_{name}.json").write_text(json.dumps(evidence.to_json(), indent=1) + "\n")
    (options.out / f"gpu_bench_h100_{name}.json").write_text(json.dumps(to_json(runs), indent=1) + "\n")
    if number == 0:
        save(evidence, options.out / f"gpu_tune_h100_{shape}.html")
    for run in runs:
        shown = run.error
        if run.comparison is not None:
            c = run.comparison
            shown = f"{c.us / 1e3:9.2f} ms {c.speedup:6.3f} x ({c.low:.3f}-{c.high:.3f})"
        print(f"  {run.workload:9}{run.contender:16}{shown}", flush=True)
    return evidence, runs


def of_the_best(runs: Sequence[Run]) -> Iterator[str]:
    """Say for each workload how fast the tuned model is as a part of the fastest other contender, eager among them.

    A config that has no kernel for torch.compile is torch.compile of the model's own code.
    """
    for workload in dict.fromkeys(run.workload for run in runs):
        mine = [run for run in runs if run.workload == workload]
        speeds = {run.contender: run.comparison.speedup for run in mine if run.comparison}
        if COMPILED in speeds and any(
            run.contender == TUNED_AND_COMPILED and NO_KERNEL in (run.error or "") for run in mine
        ):
            speeds[TUNED_AND_COMPILED] = speeds[COMPILED]
        ours = max((TUNED, TUNED_AND_COMPILED), key=lambda name: speeds.get(name, 0.0))
        others = {name: speeds[name] for name in OTHERS if name in speeds}
        best = max(others, key=lambda name: others[name], default=EAGER)
        if ours not in speeds or best not in others:
            yield f"{workload} did not run"
            continue
        part = speeds[ours] / others[best]
        yield f"{workload} {part:.3f} of {best} ({ours})" + (" SLOWER" if part < 1 - NOISE else "")


def disagreements(tunings: Sequence[Tuning]) -> Iterator[str]:
    """Say where two runs chose different kernels for a kind of layers, and whether one of them found no clear difference."""
    for (number, one), (index, other) in combinations(enumerate(tunings), 2):
        theirs = {(choice.layer, choice.name, choice.mode): choice for choice in other.choices}
        for choice in one.choices:
            rival = theirs.get((choice.layer, choice.name, choice.mode))
            if rival is None or rival.chosen == choice.chosen:
                continue
            unclear = [
                str(run)
                for run, found in ((number, choice), (index, rival))
                if is_unclear(found, choice.chosen, rival.chosen)
            ]
            why = f"no clear difference in run {' and '.join(unclear)}" if unclear else "CLEAR in both"
            yield f"{choice.layer} {choice.name} ({choice.mode}): {choice.chosen} or {rival.chosen}, {why}"


def is_unclear(choice: Choice, one: str, other: str) -> bool:
    """Whether a run found no clear difference between two kernels for a kind of layers: in the model, or in the layer."""
    in_the_model = choice.chosen == OWN_CODE and " clear" in choice.reason
    return in_the_model or not differ_clearly(choice, one, other)


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
