"""What gpu_ops.py measured on the H100, of all its runs that are kept: for each operation and shape the latest.

Every ratio is of two times of one run. A contender that was not in the latest run has that of the latest run with both.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
LARGE = 50_000_000
"""The bytes that a large shape moves at least."""
PEERS = {
    "torch": "torch",
    "eager": "layer as in transformers",
    "compile": "torch.compile",
    "liger": "Liger",
    "quack": "QuACK",
}
ORDER = (
    "rms_norm", "add_rms_norm", "layer_norm", "add_layer_norm", "rotary", "qk_norm_rotary",
    "silu", "silu_packed", "gelu_tanh", "gelu_new", "quick_gelu", "cross_entropy", "linear_cross_entropy",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Measured:
    """One operation on one shape: what ours takes, and how many times as long every peer (by its name in gpu_ops.py).

    `share` is the part of the copy bandwidth of that run, `limit` the part of our time that a kernel would take that starts as
    one of one number does and then moves the bytes at that bandwidth. `times` and `peaks` are those of every contender.
    """

    name: str
    direction: str
    shape: str
    num_bytes: int
    us: float
    share: float
    limit: float
    ratios: dict[str, float]
    times: dict[str, float]
    peaks: dict[str, int]

    @property
    def size(self) -> str:
        return "large" if self.num_bytes >= LARGE else "small"


def measured(folder: Path = RESULTS) -> list[Measured]:
    """Return every operation and shape of the results in a folder, in the order of the docs."""
    runs = [json.loads(path.read_text()) for path in folder.glob("gpu_ops_h100*.json")]
    starting = min(run["least_us"] for run in runs if "least_us" in run)  # older runs did not measure it
    found: dict[tuple[str, str, str], Measured] = {}
    for run in sorted(runs, key=lambda run: str(run["date"])):
        for row in run["rows"]:
            times, key = row["median_us"], (row["name"], row["direction"].strip(), row["shape"])
            if "ours" not in times:
                continue
            known = found[key].ratios if key in found else {}
            ratios = {who: us / times["ours"] for who, us in times.items() if who in PEERS}
            moving = row["num_bytes"] / run["copy_bytes_per_second"] * 1e6
            share, limit = moving / times["ours"], (run.get("least_us", starting) + moving) / times["ours"]
            found[key] = Measured(
                *key,
                row["num_bytes"],
                times["ours"],
                share,
                limit,
                {**known, **ratios},
                times,
                row.get("peak_bytes", {}),
            )
    return sorted(found.values(), key=lambda one: (ORDER.index(one.name), one.direction != "forward"))


def means(some: Iterable[Measured]) -> dict[str, float]:
    """Return the geometric mean of each peer's ratios, over the shapes in which it ran."""
    ratios: dict[str, list[float]] = {who: [] for who in PEERS}
    for one in some:
        for who, ratio in one.ratios.items():
            ratios[who].append(ratio)
    return {who: statistics.geometric_mean(values) for who, values in ratios.items() if values}
