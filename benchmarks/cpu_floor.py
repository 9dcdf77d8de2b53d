"""How far a CPU lets a model go: `python benchmarks/cpu_floor.py`.

The model of cpu_e2e.py with kernels, with and without its linear layers (which then return memory as it is): what is left is
what everything else takes, the difference is what the products take, and (time of eager / time of the products) is the most
that any kernels besides the products could reach. Then the products by themselves: with many rows in GFLOP/s beside torch's
float32 product, with one row in GB/s beside a plain sum over the same numbers. All in processor time of one thread, in turns,
the least of the rounds, so that other processes hardly change it.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from cpu_e2e import DTYPES, build, call_of, machine
from torch import nn
from torch.nn import functional as F

from kernelwise.kernels.cpu.linear import linear

SHAPES = ((576, 1536), (1536, 576), (576, 576), (576, 192))  # of SmolLM2-135M


class Nothing(nn.Module):
    """Stands where a linear layer was and takes no time."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.out_features, self.weight = layer.out_features, layer.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(()).expand(*x.shape[:-1], self.out_features).clone()


def without_products(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, Nothing(child))
    return model


def least(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds of each call, the least of so many rounds, by each call's own count or by the processor's clock."""
    found = dict.fromkeys(calls, float("inf"))
    for _ in range(rounds + 1):
        for name, call in calls.items():
            start = time.process_time()
            own = call()
            found[name] = min(found[name], own if isinstance(own, float) else time.process_time() - start)
    return found


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    parser.add_argument("--work", nargs="+", choices=("prefill", "decode"), default=["prefill", "decode"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: list[dict[str, object]] = []

    def show(**row: object) -> None:
        results.append(row)
        print("  ".join(f"{k} {v:.3g}" if isinstance(v, float) else str(v) for k, v in row.items()), flush=True)

    for dtype in options.dtypes:
        models = build(None, DTYPES[dtype])
        models["nothing"] = without_products(models["ours"])
        for work in options.work:
            calls = {name: call_of(work, name, models, time.process_time) for name in models}
            s = least(calls, options.rounds)
            products = s["ours"] - s["nothing"]
            show(
                work=work,
                dtype=dtype,
                eager_s=s["eager"],
                ours_s=s["ours"],
                products_s=products,
                rest_s=s["nothing"],
                speedup=s["eager"] / s["ours"],
                speedup_if_the_rest_were_free=s["eager"] / products,
            )
        del models
    for rows, unit in ((512, "GFLOP/s"), (1, "GB/s")):
        for width, out in SHAPES:
            num = max(1, 40_000_000 // (width * out)) if rows == 1 else 1  # more than the caches hold
            wide = [torch.randn(out, width) for _ in range(num)]
            half = [w.bfloat16() for w in wide]
            x = torch.randn(rows, width)
            y = x.bfloat16()
            calls = {
                "torch_float32": lambda x=x, wide=wide: [F.linear(x, w) for w in wide],
                "torch_bfloat16": lambda y=y, half=half: [F.linear(y, w) for w in half],
                "ours_bfloat16": lambda y=y, half=half: [linear(y, w) for w in half],
            }
            if rows == 1:
                calls["sum_float32"] = lambda wide=wide: [w.sum() for w in wide]
            per = {
                name: num * width * out * (2 * rows if rows > 1 else 4 if "float32" in name else 2) / 1e9 / seconds
                for name, seconds in least(calls, 10).items()
            }
            show(rows=rows, shape=f"{width}->{out}", unit=unit, **per)
    if options.out:
        about = {
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "command": shlex.join(["python", "benchmarks/cpu_floor.py", *sys.argv[1:]]),
            "machine": machine(),
            "results": results,
        }
        options.out.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
