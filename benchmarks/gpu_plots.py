"""Plots of the results of gpu_ops.py, as SVG files for the docs: `python benchmarks/gpu_plots.py [--out docs]`.

One figure for each direction: for each operation, how many times as long as ours every contender takes (the geometric
mean over its shapes, large shapes alone where there are any); and one of the share of the copy bandwidth that ours reach.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from gpu_rows import RESULTS, Measured, means, measured

matplotlib.use("svg")
import matplotlib.pyplot as plt

CONTENDERS = {"torch": "#c44e52", "compile": "#dd8452", "liger": "#55a868", "quack": "#8172b3", "eager": "#937860"}


def plot_ratios(found: Sequence[Measured], directions: dict[str, str], title: str, file: Path) -> None:
    groups: dict[str, dict[str, float]] = {}
    for direction, label in directions.items():
        here = [one for one in found if one.direction == direction]
        for name in dict.fromkeys(one.name for one in here):
            some = [one for one in here if one.name == name]
            groups[f"{name}\n{label}"] = means([one for one in some if one.size == "large"] or some)
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


def plot_bandwidth(found: Sequence[Measured], title: str, file: Path) -> None:
    figure, axes = plt.subplots(figsize=(10, 4.5))
    names = list(dict.fromkeys(one.name for one in found if one.direction == "forward"))
    for direction, marker in (("forward", "o"), ("backward", "s")):
        for index, name in enumerate(names):
            some = [one for one in found if (one.name, one.direction) == (name, direction)]
            axes.plot(
                [one.num_bytes / 1e6 for one in some],
                [100 * one.share for one in some],
                marker=marker,
                markersize=4,
                linestyle="none",
                color=plt.get_cmap("tab20")(index),
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
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent.parent / "docs")
    arguments = parser.parse_args()
    found = measured()
    runs = [json.loads(path.read_text()) for path in RESULTS.glob("gpu_ops_h100*.json")]
    dates = sorted({run["date"][:10] for run in runs})
    about = f"{runs[0]['device']}, torch {runs[0]['torch']}, Triton {runs[0]['triton']}, bfloat16, {', '.join(dates)}"
    plt.rcParams["svg.hashsalt"] = "kernelwise"
    plot_ratios(found, {"forward": "forward"}, about, arguments.out / "gpu_forward.svg")
    plot_ratios(
        found,
        {"backward": "backward", "together": "forward and backward"},
        about,
        arguments.out / "gpu_backward.svg",
    )
    plot_bandwidth(found, about, arguments.out / "gpu_bandwidth.svg")


if __name__ == "__main__":
    main()
