"""Planning and applying on a model of 1,000 layers, beside the kernels library with the same mapping.

Run as a script with a kernel repository, it measures and prints the least of each in seconds, as JSON. The test does so in
a fresh process, as a user's is: after thousands of other tests small objects lie scattered over a large heap.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest

import kernelwise as kw

NUM_LAYERS = 1000
REPEATS = 25
KERNEL = """
import torch
from torch import nn


class RMSNorm(nn.Module):
    can_torch_compile = True

    def forward(self, hidden_states):
        variance = hidden_states.float().pow(2).mean(-1, keepdim=True)
        return self.weight * (hidden_states.float() * torch.rsqrt(variance + self.variance_epsilon)).to(hidden_states)
"""
METADATA = """{"name": "timed-norm", "id": "_timed_norm", "version": 1, "license": "Apache-2.0", "python-depends": [],
"backend": {"type": "cpu"}}"""


def seconds(function: Callable[[], Any]) -> float:
    """Processor time, of which a busy machine takes none away."""
    start = time.process_time()
    function()
    return time.process_time() - start


def measure(repository: Path) -> dict[str, float]:
    """Return the least of interleaved runs, in seconds, with a kernel that is loaded already."""
    from kernels import LocalLayerRepository, Mode, kernelize, use_kernel_mapping

    model = models.Stack(*(models.Norm() for _ in range(NUM_LAYERS))).eval()
    config = kw.KernelConfig({"RMSNorm": f"{repository}:RMSNorm"})
    mapping = {"RMSNorm": {"cpu": {Mode.INFERENCE: LocalLayerRepository(repo_path=repository, layer_name="RMSNorm")}}}

    def ours() -> None:
        kw.kernelize(model, config, mode="inference")

    def theirs() -> None:
        with use_kernel_mapping(mapping):  # type: ignore[arg-type]
            kernelize(model, mode=Mode.INFERENCE)

    taken: dict[str, list[float]] = {"ours": [], "theirs": []}
    gc.freeze()  # what the imports have made is not gone through again each time
    for repeat in range(REPEATS):
        for name, function in (("ours", ours), ("theirs", theirs)):
            kw.unkernelize(model)
            for module in model.modules():
                module.__dict__.pop("forward", None)
            gc.collect()
            gc.disable()
            took = seconds(function)
            gc.enable()
            assert all("forward" in module.__dict__ for module in model.layers)
            if repeat:  # the first run loads and recognises
                taken[name].append(took)
    return {name: min(values) for name, values in taken.items()}


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KERNELWISE_CACHE", str(tmp_path / "cache"))
    build = tmp_path / "timed-norm" / "build" / "torch-cpu"
    build.mkdir(parents=True)
    (build / "metadata.json").write_text(METADATA)
    (build / "__init__.py").write_text("from . import layers\n")
    (build / "layers.py").write_text(KERNEL)
    return tmp_path / "timed-norm"


def test_planning_and_applying_take_at_most_twice_as_long_as_in_the_kernels_library(repository: Path) -> None:
    """A model of 1,000 registered layers.

    The kernels library looks at registered names alone; recognition, a decision with its reasons and an undo for each
    layer come on top of that.
    """
    ratios: list[float] = []
    while len(ratios) < 3 and min(ratios, default=3) > 2:  # a neighbour who takes the processor's cache is waited for
        ran = subprocess.run(
            [sys.executable, __file__, str(repository)],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert ran.returncode == 0, ran.stderr
        least = json.loads(ran.stdout.splitlines()[-1])
        ratios.append(least["ours"] / least["theirs"])
        print(
            f"\nplan and apply {NUM_LAYERS} layers: {least['ours'] * 1e3:.1f} ms; "
            f"kernels.kernelize: {least['theirs'] * 1e3:.1f} ms; ratio {ratios[-1]:.2f}"
        )
    assert min(ratios) <= 2


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]))))
