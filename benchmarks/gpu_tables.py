"""The end-to-end tables of docs/gpu.md, written from the results of gpu_e2e.py: `python benchmarks/gpu_tables.py`."""

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


if __name__ == "__main__":
    main()
