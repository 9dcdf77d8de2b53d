"""The plot of docs/cpu.md, from results of cpu_ops.py: how many times as fast as the layer's own code each kernel is.

    python benchmarks/cpu_plots.py [benchmarks/results/cpu_ops_cpu_time.json ...] [--out docs/cpu_ops.svg]

A bar is the geometric mean over variants and numbers of rows, its whisker the range of these; variants that `kernelize` leaves
alone are among them.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

matplotlib.rcParams["svg.hashsalt"] = "kernelwise"  # the same figures give the same file

HERE = Path(__file__).parent
FILES = [HERE / "results" / name for name in ("cpu_ops_cpu_time.json", "cpu_ops_linear.json")]
COLOURS = {"float32": "#4c72b0", "bfloat16": "#dd8452", "float16": "#55a868"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, default=FILES)
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs" / "cpu_ops.svg")
    args = parser.parse_args()
    results: list[dict[str, Any]] = [r for file in args.files for r in json.loads(file.read_text())["results"]]
    results = [r for r in results if r["contender"] == "kernel"]
    ops = list(dict.fromkeys(r["op"] for r in results))
    dtypes = [dtype for dtype in COLOURS if any(r["dtype"] == dtype for r in results)]
    figure, panels = plt.subplots(1, 2, figsize=(9, 0.45 * len(ops) + 1.2), sharey=True)
    for axes, training in zip(panels, (False, True), strict=True):
        for at, dtype in enumerate(dtypes):
            for place, op in enumerate(ops):
                found = [r["speedup"] for r in results if (r["op"], r["dtype"], r["training"]) == (op, dtype, training)]
                if found:
                    mean = statistics.geometric_mean(found)
                    y = place + 0.8 / len(dtypes) * at
                    label = dtype if place == 0 else None
                    axes.barh(y, mean, 0.75 / len(dtypes), color=COLOURS[dtype], label=label)
                    axes.plot([min(found), max(found)], [y, y], color="#333333", linewidth=0.8)
        axes.axvline(1, color="#888888", linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_title("with backward" if training else "forward", fontsize=9)
        axes.set_xlabel("times as fast as the layer's own code", fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks([place + 0.4 * (len(dtypes) - 1) / len(dtypes) for place in range(len(ops))], ops, fontsize=8)
    panels[0].invert_yaxis()
    panels[0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(args.out, metadata={"Date": None})


if __name__ == "__main__":
    main()
