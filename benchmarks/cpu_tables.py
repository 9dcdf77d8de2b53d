"""The tables of docs/cpu.md: `python benchmarks/cpu_tables.py benchmarks/results/cpu_ops_linear.json ...`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def end_to_end(results: list[dict[str, Any]]) -> Iterator[str]:
    yield "| work | dtype | eager, ms | contender, ms | speed-up (quartiles) |"
    yield "|---|---|---|---|---|"
    for r in results:
        low, high = r["speedup_quartiles"]
        name = "" if r["contender"] == "ours" else f" ({r['contender']})"
        ratio = f"{r['speedup']:.2f} ({low:.2f}-{high:.2f})"
        yield f"| {r['work']}{name} | {r['dtype']} | {r['eager_ms']:.0f} | {r['contender_ms']:.0f} | {ratio} |"


def operations(results: list[dict[str, Any]]) -> Iterator[str]:
    columns = sorted({(r["training"], r["rows"]) for r in results})
    yield "| operation | dtype | " + " | ".join(f"{n}{', with backward' if t else ''}" for t, n in columns) + " |"
    yield "|---" * (2 + len(columns)) + "|"
    for op, variant, dtype in dict.fromkeys((r["op"], r["variant"], r["dtype"]) for r in results):
        found = {
            (r["training"], r["rows"]): f"{r['speedup']:.2g}"
            for r in results
            if (r["op"], r["variant"], r["dtype"], r["contender"]) == (op, variant, dtype, "kernel")
        }
        yield f"| {op} {variant} | {dtype} | " + " | ".join(found.get(c, "") for c in columns) + " |"


def calls(results: list[dict[str, Any]]) -> Iterator[str]:
    yield "| a call, µs | nothing to compute | one token | one token, without its arithmetic |"
    yield "|---|---|---|---|"
    for r in results:
        over = "" if r["over_us"] is None else f"{r['over_us']:.1f}"
        yield f"| {r['op']} | {r['nothing_us']:.1f} | {r['one_us']:.1f} | {over} |"


def limits(results: list[dict[str, Any]]) -> Iterator[str]:
    for kind in ("work", "shape"):
        rows = [r for r in results if kind in r]
        if not rows:
            continue
        names = list(dict.fromkeys(name for r in rows for name in r))
        yield "| " + " | ".join(name.replace("_", " ") for name in names) + " |"
        yield "|---" * len(names) + "|"
        for r in rows:
            cells = [r.get(name, "") for name in names]
            yield "| " + " | ".join(f"{c:.3g}" if isinstance(c, float) else str(c) for c in cells) + " |"
        yield ""


def main() -> None:
    for file in sys.argv[1:]:
        results = json.loads(Path(file).read_text())["results"]
        table = end_to_end if "work" in results[0] and "contender" in results[0] else limits
        if "op" in results[0]:
            table = calls if "over_us" in results[0] else operations
        print(f"\n{Path(file).name}\n", *table(results), sep="\n")


if __name__ == "__main__":
    main()
