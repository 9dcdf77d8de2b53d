"""Tune models of given shapes on one GPU, several times.

    python benchmarks/gpu_tune.py [--shapes llama qwen3 gemma3] [--runs 3] [--first 0] [--seconds 300]

The models of gpu_e2e.py (8 layers, random bfloat16 weights). For each, and for each of `--runs` runs with an empty cache of
Kernelwise (what PyTorch and Triton have compiled for an earlier run is there, as it is for a user who tunes again):
`kernelwise.tune` on 1 x 2048 tokens for prefill, decoding and a training step, eager and under torch.compile, raced with
torch.compile and Liger. Written are the evidence of each tuning as JSON, the report page of the first, and as text what
`gpu_tables.py` says of all: how fast the tuned model is as a part of the best other contender in each workload and run (1.00
or more, within 3 %), and where the runs chose different kernels.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch._dynamo.utils
from gpu_about import command
from gpu_e2e import SHAPES, build
from gpu_tables import RESULTS, tuned, tunings

import kernelwise
from kernelwise._evidence import COMPILED, LIGER, Tuning
from kernelwise._reporting._page import save

WORKLOADS = ("prefill", "decode", "training")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--first", type=int, default=0, help="number of the first run, where --out has those before it")
    parser.add_argument("--seconds", type=float, default=300, help="for each tuning")
    parser.add_argument(
        "--eager", action="store_true", help="do not tune for torch.compile, which takes most of the time"
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for shape in options.shapes:
        model = build(shape, options.layers)
        ids = torch.randint(0, model.config.vocab_size, (1, options.tokens), device=model.device)
        text = options.out / f"gpu_tune_h100_{shape}.txt"
        found = tunings(shape, options.out)[: options.first]
        said = text.read_text().splitlines() if found and text.exists() else []
        commands = [*(line for line in said if line.startswith("command ")), f"command {command(sys.argv)}"]
        for number in range(options.first, options.first + options.runs):
            found.append(one_run(model, ids, f"{shape}, run {number}", options))
            name = shape if number == 0 else f"{shape}_{number}"
            path = options.out / f"gpu_tune_h100_{name}.json"
            path.write_text(json.dumps(found[-1].to_json(), indent=1) + "\n")
            if number == 0:
                save(found[0], path.with_suffix(".html"))
            said = [*commands, *tuned(shape, found)]
            text.write_text("\n".join(said) + "\n")
        print(*said, sep="\n", flush=True)
        del model
        torch.cuda.empty_cache()


def one_run(model: Any, ids: torch.Tensor, name: str, options: argparse.Namespace) -> Tuning:
    """Tune with an empty cache."""
    began = since = time.perf_counter()
    doing = ""

    def told(what: str, part: float) -> None:
        nonlocal since, doing
        now = time.perf_counter()
        if now - since > 2:
            print(f"  {since - began:5.0f} s, {now - since:4.1f} s long: {doing}", flush=True)
        since, doing = now, what

    with tempfile.TemporaryDirectory() as cache:
        os.environ["KERNELWISE_CACHE"] = cache
        config = kernelwise.tune(
            model,
            {"input_ids": ids},
            workload=WORKLOADS,
            seconds=options.seconds,
            contenders=[COMPILED, LIGER],
            compile=not options.eager,
            progress=told,
        )
    evidence = config.evidence
    assert evidence is not None
    print(f"== {name}: tuned in {time.perf_counter() - began:.0f} s\n{evidence}", flush=True)
    print("compiling took, in this process so far:")
    print(torch._dynamo.utils.compile_times(repr="str", aggregate=True), flush=True)
    return evidence


if __name__ == "__main__":
    main()
