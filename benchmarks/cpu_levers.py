"""What larger changes would gain on the CPU, each measured before it is built: `python benchmarks/cpu_levers.py`.

A model of SmolLM2-135M's shape (30 layers, random weights, kernelized) against the same with one change, in turns:
`merged` (q, k and v in one product, gate and up in one), `packed` (float32 weights laid out by MKL once), `static cache`
(transformers' cache that does not grow), `roomy cache` (`GrowingCache`, which has room for the next tokens), `all logits`
(prefill computes those of every token; elsewhere it computes the last alone, which `generate` asks for by itself). Work and
figures are those of cpu_e2e.py, and `decode long`: one row after 1,024 tokens. Whether malloc keeps its pages is set for a
whole process: run this twice, once with MALLOC_MMAP_THRESHOLD_=4294967296 and MALLOC_TRIM_THRESHOLD_=17179869184 in the
environment.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cpu_e2e import PREFILL, PROMPT, STEPS, build
from cpu_ops import DTYPES, machine
from torch import nn
from transformers import DynamicCache, StaticCache

from kernelwise.integrations.transformers import GrowingCache

LONG = 1024
WORK = ("prefill", "decode", "decode8", "decode long")


class _Part(nn.Module):
    """One of the products that were merged: it takes its columns of what the first one computed for the same input."""

    def __init__(self, merged: nn.Linear, start: int, stop: int, first: _Part | None) -> None:
        super().__init__()
        self.merged, self.columns, self.result = [merged], slice(start, stop), [torch.empty(0)]
        self.first = [first or self]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.first[0] is self:
            self.result[0] = self.merged[0](x)
        return self.first[0].result[0][..., self.columns]


def merge(model: nn.Module) -> None:
    for module in list(model.modules()):
        for names in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            parts = [getattr(module, name, None) for name in names]
            if not all(isinstance(part, nn.Linear) for part in parts):
                continue
            weight = torch.cat([part.weight.detach() for part in parts])
            merged = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
            merged.weight = nn.Parameter(weight)
            forward = type(parts[0]).forward if "forward" not in vars(parts[0]) else None
            if forward is None:  # the kernel for half-precision weights
                from kernelwise.kernels.cpu.linear import linear

                merged.forward = lambda x, merged=merged: linear(x, merged.weight)  # type: ignore[method-assign]
            first, start = None, 0
            for name, part in zip(names, parts, strict=True):
                stop = start + part.weight.shape[0]
                made = _Part(merged, start, stop, first)
                first, start = first or made, stop
                setattr(module, name, made)


class _Packed(nn.Module):
    """A float32 product whose weight MKL has laid out for so many rows."""

    def __init__(self, linear: nn.Linear, rows: int) -> None:
        super().__init__()
        self.rows, self.plain = rows, linear.weight.detach()
        self.packed = torch.ops.mkl._mkl_reorder_linear_weight(self.plain, rows)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkl._mkl_linear(x, self.packed, self.plain, None, self.rows)  # type: ignore[no-any-return]


def pack(model: nn.Module, rows: int) -> None:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and name != "lm_head":
                setattr(module, name, _Packed(child, rows))


def prefill(model: Any, *, last: int) -> Callable[[], float]:
    tokens = torch.randint(0, 49152, (1, PREFILL), generator=torch.Generator().manual_seed(1))

    def run() -> float:
        start = time.perf_counter()
        model(tokens, logits_to_keep=last)
        return time.perf_counter() - start

    return run


def decode(model: Any, *, rows: int, cache: str = "dynamic", prompt: int = PROMPT) -> Callable[[], float]:
    tokens = torch.randint(0, 49152, (rows, prompt), generator=torch.Generator().manual_seed(1))
    kinds = {
        "dynamic": DynamicCache,
        "roomy": GrowingCache,
        "static": lambda config: StaticCache(config=config, max_cache_len=prompt + STEPS + 8),
    }

    def run() -> float:
        held = kinds[cache](config=model.config)
        model(tokens, past_key_values=held, use_cache=True, logits_to_keep=1)
        token = torch.ones(rows, 1, dtype=torch.long)
        start = time.perf_counter()
        for _ in range(STEPS):
            token = model(token, past_key_values=held, use_cache=True).logits[:, -1:].argmax(-1)
        return time.perf_counter() - start

    return run


def race(calls: dict[str, Callable[[], float]], seconds: float) -> dict[str, dict[str, float]]:
    """Return for each call but the first how many times as fast as the first it is: median and quartiles over the rounds."""
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    start = time.perf_counter()
    while len(times["now"]) < 4 or time.perf_counter() - start < seconds:
        for name, call in calls.items():
            times[name].append(call())
    found = {}
    for name, taken in times.items():
        ratios = [a / b for a, b in zip(times["now"], taken, strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4)
        found[name] = {"ms": round(statistics.median(taken) * 1e3, 1), "gain": median, "low": low, "high": high}
    return found


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    parser.add_argument("--work", nargs="+", choices=WORK, default=WORK)
    parser.add_argument("--threads", type=int, help="threads of torch (default: torch's own choice)")
    parser.add_argument("--seconds", type=float, default=12, help="for each piece of work")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    results = []
    for dtype in options.dtypes:
        now = build(30, DTYPES[dtype])["ours"]
        merged = copy.deepcopy(now)
        merge(merged)
        packed = {rows: copy.deepcopy(now) for rows in (1, PREFILL)} if dtype == "float32" else {}
        for rows, model in packed.items():
            pack(model, rows)
        work: dict[str, dict[str, Callable[[], float]]] = {
            "prefill": {
                "now": prefill(now, last=1),
                "merged": prefill(merged, last=1),
                "all logits": prefill(now, last=0),
            },
            "decode": {
                "now": decode(now, rows=1),
                "merged": decode(merged, rows=1),
                "static cache": decode(now, rows=1, cache="static"),
                "roomy cache": decode(now, rows=1, cache="roomy"),
            },
            "decode8": {
                "now": decode(now, rows=8),
                "merged": decode(merged, rows=8),
                "static cache": decode(now, rows=8, cache="static"),
                "roomy cache": decode(now, rows=8, cache="roomy"),
            },
            "decode long": {
                "now": decode(now, rows=1, prompt=LONG),
                "static cache": decode(now, rows=1, cache="static", prompt=LONG),
                "roomy cache": decode(now, rows=1, cache="roomy", prompt=LONG),
            },
        }
        if packed:
            work["prefill"]["packed"] = prefill(packed[PREFILL], last=1)
            work["decode"]["packed"] = decode(packed[1], rows=1)
        for name in options.work:
            calls = work[name]
            for lever, found in race(calls, options.seconds).items():
                results.append({"work": name, "dtype": dtype, "lever": lever, **found})
                if lever != "now":
                    shown = f"{found['gain']:.3f} x  ({found['low']:.2f}-{found['high']:.2f})"
                    print(f"{name:12}{dtype:10}{lever:14}{found['ms']:9.1f} ms  {shown}", flush=True)
    if options.out:
        malloc = {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")}
        about = {
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "command": shlex.join(["python", "benchmarks/cpu_levers.py", *sys.argv[1:]]),
            "machine": machine() | malloc,
            "results": results,
        }
        options.out.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
