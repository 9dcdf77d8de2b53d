"""Tune models of given shapes on one GPU, and race the result: `python benchmarks/gpu_tune.py [--shapes llama qwen3 gemma3]`.

The models of gpu_e2e.py (8 layers, random bfloat16 weights). For each: `kernelwise.tune` on 1 x 2048 tokens for prefill,
decoding and a training step, then all contenders side by side, the tuned model among them. Writes the evidence of each tuning
and the runs as JSON, and the report page of the first.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from gpu_e2e import MODULES, build

import kernelwise
from kernelwise._bench import bench
from kernelwise._data import to_json
from kernelwise._page import save

CONTENDERS = ("eager", "builtin", "liger", "tuned")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=tuple(MODULES), default=list(MODULES))
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--seconds", type=float, default=150, help="for each tuning")
    parser.add_argument("--race", type=float, default=8, help="seconds for each workload of the race")
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for number, shape in enumerate(options.shapes):
        model = build(shape, options.layers)
        ids = torch.randint(0, model.config.vocab_size, (1, options.tokens), device="cuda")
        workloads = ("prefill", "decode", "training")
        began = time.perf_counter()
        last = [0.0]

        def told(what: str, part: float, began: float = began, last: list[float] = last) -> None:
            if time.perf_counter() - last[0] > 10:
                last[0] = time.perf_counter()
                print(f"  {last[0] - began:5.0f} s {part:.2f} {what}", flush=True)

        config = kernelwise.tune(model, {"input_ids": ids}, workload=workloads, seconds=options.seconds, progress=told)
        print(f"== {shape}: tuned in {time.perf_counter() - began:.0f} s\n{config.evidence}", flush=True)
        evidence = config.evidence
        assert evidence is not None
        (options.out / f"gpu_tune_h100_{shape}.json").write_text(json.dumps(evidence.to_json(), indent=1) + "\n")
        if number == 0:
            save(evidence, options.out / f"gpu_tune_h100_{shape}.html")
        runs = bench(
            model,
            {"input_ids": ids},
            contenders=options.contenders,
            configs={"tuned": config},
            workloads=workloads,
            seconds=options.race,
        )
        for run in runs:
            shown = run.error
            if run.comparison is not None:
                c = run.comparison
                shown = f"{c.us / 1e3:9.2f} ms {c.speedup:6.3f} x ({c.low:.3f}-{c.high:.3f})"
            print(f"  {run.workload:9}{run.contender:16}{shown}", flush=True)
        (options.out / f"gpu_bench_h100_{shape}.json").write_text(json.dumps(to_json(runs), indent=1) + "\n")
        del model, config, runs
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
