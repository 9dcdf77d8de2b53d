"""The table of the README, from the results of models end to end: `python benchmarks/summary.py` writes it there.

    python benchmarks/summary.py [--plot docs/gains.svg]

Every figure is a ratio to the model's own code in the same run, of medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gpu_tables import times_eager

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
BEGIN, END = "<!-- benchmarks/summary.py writes this -->\n", "<!-- to here -->"

GPU = {
    "Llama-3-8B shape": "gpu_e2e_h100.json",
    "Qwen3-8B shape": "gpu_e2e_h100_qwen3.json",
    "Gemma-3-4B shape": "gpu_e2e_h100_gemma3.json",
}
RACES = {  # of tunings, where torch.compile decodes too
    ("Llama-3-8B shape", "decode"): "gpu_tune_h100_llama*.json",
    ("Qwen3-8B shape", "decode"): "gpu_tune_h100_qwen3*.json",
    ("Gemma-3-4B shape", "decode"): "gpu_tune_h100_gemma3*.json",
}
CPU = ("cpu_e2e_avx2_two_threads.json", "cpu_e2e_avx2_two_threads_train_bfloat16.json")
WORK = {"prefill": "prefill_ms", "decode": "decode_dynamic_ms", "training": "train_ms"}
CPU_WORK = {"prefill": "prefill", "decode": "decode", "training": "train"}
VARIANTS = {"Kernelwise": ("ours", "ours-loss"), "torch.compile": ("compile",), "Liger": ("liger", "liger+loss")}
RACED = {"Kernelwise": ("tuned", "tuned+compile"), "torch.compile": ("torch.compile",), "Liger": ("liger",)}


def speedups() -> dict[tuple[str, str], dict[str, float]]:
    """Return contender → times as fast as the model's own code, by model and work."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for model, file in GPU.items():
        variants = _read(file)["variants"]
        for work, column in WORK.items():
            ratios = {
                contender: max(
                    times_eager(variants, name, column) for name in (names if work == "training" else names[:1])
                )
                for contender, names in VARIANTS.items()
            }
            found[model, work] = {contender: ratio for contender, ratio in ratios.items() if ratio}
    for model, work in RACES:
        raced = _raced(model, work)
        found[model, work] = {
            contender: max(raced[name] for name in names if name in raced) for contender, names in RACED.items()
        }
    for result in [result for file in CPU for result in _read(file)["results"]]:
        if result["dtype"] == "bfloat16":
            for work, name in CPU_WORK.items():
                if result["work"] == name:
                    contender = "Kernelwise" if result["contender"] == "ours" else result["contender"]
                    shown = {"compile": "torch.compile"}.get(contender, contender)
                    found.setdefault(("SmolLM2-135M", work), {})[shown] = result["speedup"]
    return found


def table() -> str:
    """Return the table as Markdown."""
    gpu, cpu = _read(next(iter(GPU.values()))), _read(CPU[0])
    dates = _dates(CPU)
    lines = [
        f"| times as fast as the model's own code | | {' | '.join(VARIANTS)} |",
        "|---|---|" + "---|" * len(VARIANTS),
    ]
    for (model, work), ratios in speedups().items():
        best = max(ratios.values())
        cells = []
        for contender in VARIANTS:
            ratio = ratios.get(contender)
            said = "" if ratio is None else f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}"
            cells.append(f"**{said}**" if ratio is not None and ratio >= 0.97 * best else said)
        where = "CPU" if model == "SmolLM2-135M" else "H100"
        lines.append(f"| {model}, {where} | {work} | {' | '.join(cells)} |")
    cores, limit = cpu["machine"]["cores"], cpu["machine"]["limits"].get("ATEN_CPU_CAPABILITY", "").upper()
    on = f"{cores} cores{f' limited to {limit}' if limit else ''}"
    tuned_on = _dates(path.name for glob in RACES.values() for path in (HERE / "results").glob(glob))
    decode = ", ".join(f"{_raced(*raced)['tuned']:.2f}" for raced in RACES)
    note = (
        f"bfloat16; bold is the best, or within 3 % of it; an empty cell was not run. GPU: one {gpu['device']}, torch "
        f"{gpu['torch']}, {gpu['date'][:10]}; 8 layers with random weights, prefill and training 1 x 4096. "
        "Training there is the faster of with and without the head and its loss in one, for Kernelwise "
        "(where a rule asks for it) and Liger. Decoding is the median of the tunings of "
        f"{tuned_on}, with 2,048 tokens, each contender beside eager, in races between which the host's speed may change: "
        "torch.compile has a static cache there, and Kernelwise is the faster of tuned and tuned for "
        f"torch.compile (equal figures: tuning left all to it); without it {decode}. CPU: {on}, "
        f"torch {cpu['machine']['torch']}, {dates}; prefill of 512 tokens, "
        f"decoding of one row, a training step of 2 x 256 with {_read(CPU[1])['machine']['layers']} of its 30 layers."
    )
    return "\n".join([*lines, "", textwrap.fill(note, 120), ""])


def _dates(files: Iterable[str]) -> str:
    """Return the days on which the results were measured, in their order."""
    return " and ".join(sorted({_read(file)["date"][:10] for file in files}))


def _raced(model: str, work: str) -> dict[str, float]:
    """Return how many times as fast as eager each contender was, the median of all tunings."""
    found: dict[str, list[float]] = {}
    for path in sorted((HERE / "results").glob(RACES[model, work])):
        for run in json.loads(path.read_text())["runs"]:
            if run["workload"] == work and run["comparison"]:
                found.setdefault(run["contender"], []).append(run["comparison"]["speedup"])
    return {contender: statistics.median(speeds) for contender, speeds in found.items()}


def plot(file: Path) -> None:
    """Draw what was measured on GPUs as bars."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "kernelwise"  # the same figures give the same file
    import matplotlib.pyplot as plt

    colours = {"Kernelwise": "#4c72b0", "torch.compile": "#dd8452", "Liger": "#55a868"}
    rows = [(name, ratios) for name, ratios in speedups().items() if name[0] in GPU]
    figure, axes = plt.subplots(figsize=(8, 0.5 * len(rows) + 1))
    for at, contender in enumerate(VARIANTS):
        places = [i + 0.26 * at for i, (_, ratios) in enumerate(rows) if contender in ratios]
        values = [ratios[contender] for _, ratios in rows if contender in ratios]
        bars = axes.barh(places, values, 0.24, label=contender, color=colours[contender])
        axes.bar_label(bars, [f"{value:.2f}" for value in values], padding=2, fontsize=7)
    axes.axvline(1, color="#888888", linewidth=0.8)
    axes.set_yticks([i + 0.26 for i in range(len(rows))], [f"{model}, {work}" for (model, work), _ in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("times as fast as the model's own code")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})


def _read(name: str) -> Any:
    found: Any = json.loads((HERE / "results" / name).read_text())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plot", type=Path, help="draw it too, as an SVG file")
    args = parser.parse_args()
    before, _, rest = README.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    README.write_text(before + BEGIN + table() + END + after)
    if args.plot:
        plot(args.plot)


if __name__ == "__main__":
    main()
