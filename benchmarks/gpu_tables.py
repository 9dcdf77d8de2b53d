"""The end-to-end tables of docs/gpu.md, from the results of gpu_e2e.py and gpu_tune.py: `python benchmarks/gpu_tables.py`."""

from __future__ import annotations

import json
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
FILES = {
    "Llama-3-8B": "gpu_e2e_h100.json",
    "Qwen3-8B": "gpu_e2e_h100_qwen3.json",
    "Gemma-3-4B": "gpu_e2e_h100_gemma3.json",
}
COLUMNS = ("prefill_ms", "decode_dynamic_ms", "decode_graph_ms", "train_ms", "train_extra_gb")
NAMES = {
    "eager": "as in transformers",
    "ours": "`kernelwise.kernelize(model)`",
    "ours+add": "and add + norm fused by hand",
    "ours-loss": "without the head and its loss",
    "ours+loss": "and the head with its loss",
    "liger": "Liger",
    "liger+loss": "Liger with its fused loss",
    "compile": "torch.compile",
    "ours+compile": "torch.compile of ours",
}


def main() -> None:
    for shape, name in FILES.items():
        variants = json.loads((RESULTS / name).read_text())["variants"]
        eager = variants["eager"]
        print(
            f"\n| {shape} shape | prefill 1 x 4096 | decode, dynamic cache | decode, CUDA graph | training step | its memory |"
        )
        print("|---|---|---|---|---|---|")
        for variant, found in variants.items():
            cells = []
            for column in COLUMNS:
                value = found.get(column)
                unit = " GB" if column.endswith("gb") else ""
                ratio = f" ({eager[column] / value:.2f} x)" if value and variant != "eager" else ""
                cells.append(f"{value:.3g}{unit}{ratio}" if value else "")
            print(f"| {NAMES[variant]} | {' | '.join(cells)} |")
    for shape in ("llama", "qwen3", "gemma3"):
        races(shape)


def races(shape: str) -> None:
    """Print how many times as fast as eager each contender was in the races after tuning: the least and most of all runs."""
    found: dict[str, dict[str, list[float]]] = {}
    for path in sorted(RESULTS.glob(f"gpu_bench_h100_{shape}*.json")):
        for run in json.loads(path.read_text()):
            if run["comparison"] and run["contender"] != "eager":
                speeds = found.setdefault(run["workload"], {}).setdefault(run["contender"], [])
                speeds.append(run["comparison"]["speedup"])
    names = list(dict.fromkeys(name for by_name in found.values() for name in by_name))
    if names:
        print(f"\n{shape}, tuned and raced\n\n| | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
    for workload, by_name in found.items():
        bounds = [(min(by_name[name]), max(by_name[name])) if name in by_name else () for name in names]
        cells = [" to ".join(dict.fromkeys(f"{speed:.2f}" for speed in some)) for some in bounds]
        print(f"| {workload} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
