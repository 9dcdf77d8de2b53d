"""What a call of each CPU kernel costs besides its arithmetic, in a bare loop: `python benchmarks/cpu_calls.py`.

The least time of a call over many rounds, one thread, without gradients: with nothing to compute (one row of the least width);
at one token of SmolLM2-135M; and that without its arithmetic, as two tokens take it twice (2 t(1) - t(2); not for linear and
attention, whose work does not grow so). The call of a Python function, 0.1 us, is taken off. Beside it, what PyTorch takes for
one operator and for results alone. Writes a JSON file that names hardware, versions, date and command, and prints a table.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

import cpu_ops
import torch

LEAST = {"HIDDEN": 2, "INNER": 2, "HEADS": 1, "KV_HEADS": 1, "HEAD_DIM": 2, "LINEAR_SHAPES": ((2, 2),), "PROMPT": 1}
SMOLLM2 = {name: getattr(cpu_ops, name) for name in LEAST}
OPS = [op for op in cpu_ops.EVERY if "cross_entropy" not in op]
GROWS_OTHERWISE = ("linear", "attention")


Call = tuple[Callable[..., object], tuple[torch.Tensor, ...]]


def calls(rows: int, dtype: torch.dtype, sizes: dict[str, object]) -> dict[tuple[str, str], Call]:
    """One call of each kernel, by operation and variant; the first shape of linear, and attention that is not causal."""
    vars(cpu_ops).update(sizes)
    found: dict[tuple[str, str], Call] = {}
    for op, variant, _, kernel, tensors in cpu_ops._made(OPS, rows, dtype):
        shape = variant.split()[0] if "activation" in op else ""
        found.setdefault((op, shape), (kernel, tensors))
    x = torch.randn(1, rows, cpu_ops.HIDDEN, dtype=dtype)
    found["PyTorch's SiLU", ""] = lambda x: torch.nn.functional.silu(x), (x,)
    found["two results of PyTorch", ""] = lambda x: (torch.empty_like(x), torch.empty_like(x)), (x,)
    return found


def least(functions: dict[object, Call], rounds: int, number: int) -> dict[object, float]:
    """The least time of a call in microseconds, without that of a function that does nothing; they take turns."""
    empty = {("empty", name): (lambda *_: None, tensors) for name, (_, tensors) in functions.items()}
    best = dict.fromkeys(functions | empty, float("inf"))
    for _ in range(rounds):
        for name, (function, tensors) in (functions | empty).items():
            start = time.perf_counter()
            for _ in range(number):
                function(*tensors)
            best[name] = min(best[name], (time.perf_counter() - start) / number * 1e6)
    return {name: best[name] - best["empty", name] for name in functions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=cpu_ops.DTYPES, default="bfloat16")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "cpu_calls.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    about, dtype = cpu_ops.machine(), cpu_ops.DTYPES[options.dtype]
    functions = {}
    with torch.no_grad():
        for column, rows, sizes in (("nothing", 1, LEAST), ("one", 1, SMOLLM2), ("two", 2, SMOLLM2)):
            functions |= {(name, column): call for name, call in calls(rows, dtype, sizes).items()}
        times = least(functions, options.rounds, 2000)
    results = []
    print(f"{'':27}{'nothing to compute':>20}{'one token':>12}{'without arithmetic':>20}   us")
    for name in dict.fromkeys(name for name, _ in functions):
        nothing, one, two = (times[name, column] for column in ("nothing", "one", "two"))
        over = None if name[0] in GROWS_OTHERWISE else round(2 * one - two, 2)
        results.append(
            {"op": " ".join(name).strip(), "nothing_us": round(nothing, 2), "one_us": round(one, 2), "over_us": over}
        )
        print(f"{results[-1]['op']:27}{nothing:20.2f}{one:12.2f}{'' if over is None else over:>20}")
    written = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "benchmarks/cpu_calls.py", *sys.argv[1:]]),
        "machine": about | {"dtype": options.dtype},
        "results": results,
    }
    options.out.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
