"""Plots of the results of gpu_ops.py, as SVG files for the docs.

    python benchmarks/gpu_plots.py [--results benchmarks/results/gpu_ops_h100.json] [--out docs]

One figure for each direction: for each operation, how many times as long as ours every contender takes (the geometric
mean over its shapes, large shapes alone where there are any); and one of the share of the copy bandwidth that ours reach.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

LARGE = 50_000_000
CONTENDERS = {"torch": "#c44e52", "compile": "#dd8452", "liger": "#55a868", "quack": "#8172b3", "eager": "#937860"}
NOT_PEERS = ("ours", "consume", "products", "two steps")


def by_operation(rows: list[dict[str, Any]], direction: str) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if row["direction"].strip() == direction and "ours" in row["median_us"]:
            found[row["name"]].append(row)
    return found


def ratios(group: list[dict[str, Any]]) -> dict[str, float]:
    times: dict[str, list[float]] = defaultdict(list)
    for row in group:
        for who, us in row["median_us"].items():
            if who not in NOT_PEERS:
                times[who].append(us / row["median_us"]["ours"])
    return {who: statistics.geometric_mean(values) for who, values in times.items()}


def plot_ratios(rows: list[dict[str, Any]], directions: dict[str, str], title: str, file: Path) -> None:
    groups = {
        f"{name}\n{label}": ratios([row for row in group if row["num_bytes"] >= LARGE] or group)
        for direction, label in directions.items()
        for name, group in by_operation(rows, direction).items()
    }
    shown = [who for who in CONTENDERS if any(who in found for found in groups.values())]
    figure, axes = plt.subplots(figsize=(10, 0.6 * len(groups) + 1.2))
    height = 0.8 / len(shown)
    for i, who in enumerate(shown):
        places = [y for y, found in enumerate(groups.values()) if who in found]
        values = [found[who] for found in groups.values() if who in found]
        bars = axes.barh(
            [y + (i - (len(shown) - 1) / 2) * height for y in places], values, height, color=CONTENDERS[who], label=who
        )
        axes.bar_label(bars, fmt="%.2f", fontsize=6, padding=2)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_yticks(range(len(groups)), groups, fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("time of the contender / time of ours (more than 1: ours is faster)")
    axes.set_title(title)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})


def plot_bandwidth(rows: list[dict[str, Any]], bandwidth: float, title: str, file: Path) -> None:
    figure, axes = plt.subplots(figsize=(10, 4.5))
    names = sorted(by_operation(rows, "forward"))
    for direction, marker in (("forward", "o"), ("backward", "s")):
        for name, group in by_operation(rows, direction).items():
            speeds = {row["num_bytes"] / 1e6: row["num_bytes"] / row["median_us"]["ours"] * 1e6 for row in group}
            points = [(size, 100 * speed / bandwidth) for size, speed in speeds.items()]
            axes.plot(
                *zip(*points, strict=True),
                marker=marker,
                markersize=4,
                linestyle="none",
                color=plt.get_cmap("tab20")(names.index(name)),
                label=name if direction == "forward" else None,
            )
    axes.set_xscale("log")
    axes.set_xlabel("MB that the operation must move (circles: forward, squares: backward)")
    axes.set_ylabel("% of the copy bandwidth")
    axes.set_title(title)
    axes.legend(fontsize=7, ncol=2)
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = Path(__file__).resolve().parent
    parser.add_argument("--results", type=Path, default=here / "results" / "gpu_ops_h100.json")
    parser.add_argument("--out", type=Path, default=here.parent / "docs")
    arguments = parser.parse_args()
    found = json.loads(arguments.results.read_text())
    rows = found["rows"]
    about = f"{found['device']}, torch {found['torch']}, Triton {found['triton']}, bfloat16, {found['date'][:10]}"
    plt.rcParams["svg.hashsalt"] = "kernelwise"
    plot_ratios(rows, {"forward": "forward"}, about, arguments.out / "gpu_forward.svg")
    plot_ratios(
        rows,
        {"backward": "backward", "together": "forward and backward"},
        about,
        arguments.out / "gpu_backward.svg",
    )
    plot_bandwidth(rows, found["copy_bytes_per_second"], about, arguments.out / "gpu_bandwidth.svg")


if __name__ == "__main__":
    main()
