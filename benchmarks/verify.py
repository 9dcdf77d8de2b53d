"""What verifying costs: the plan of a SmolLM2-135M on this CPU, and looking up proofs that are remembered.

    python benchmarks/verify.py [--cases]

The model has the shape of SmolLM2-135M in float32 with random weights, 32 tokens and labels, so that the model's own
gradients are captured too. Memory is the resident size of the process, sampled every 10 ms, with the model's own in it.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import kernelwise as kw
from kernelwise._verifying import _prove
from kernelwise._verifying._check import Options
from kernelwise._verifying._groups import group
from kernelwise._verifying._verify import verify_plan

KERNEL = """
import torch
from torch import nn


class Norm(nn.Module):
    def forward(self, x):
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)
"""
METADATA = (
    '{"name": "norm", "id": "_norm", "version": 1, "license": "MIT", "python-depends": [], "backend": {"type": "cpu"}}'
)


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(64)), 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


def resident() -> int:
    """The resident memory of this process, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def smollm2() -> nn.Module:
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, rms_norm_eps=1e-5, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def measure_verify(show_cases: bool) -> None:
    model = smollm2()
    ids = torch.randint(0, 49152, (1, 32))
    model_bytes = sum(parameter.nbytes for parameter in model.parameters())
    decided = kw.plan(model)
    before = peak = resident()
    done = threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.wait(0.01):
            peak = max(peak, resident())

    watcher = threading.Thread(target=sample)
    watcher.start()
    spent: dict[str, float] = defaultdict(float)
    last = start = time.monotonic()
    start_cpu = time.process_time()

    def on_check(check: object) -> None:
        nonlocal last
        now = time.monotonic()
        spent[f"{check.kernel} {check.case}"] += now - last  # type: ignore[attr-defined]
        last = now

    inputs = {"input_ids": ids, "labels": ids}
    checks = verify_plan(model, decided, inputs, options=Options(), on_check=on_check)
    took, cpu = time.monotonic() - start, time.process_time() - start_cpu
    done.set()
    watcher.join()
    print(f"verify SmolLM2-135M: ok={checks.ok}, {len(checks.checks)} checks of {len(group(model, decided))} kinds")
    load, threads = os.getloadavg()[0], torch.get_num_threads()
    print(f"  {took:.1f} s, {cpu:.1f} s of processor time; load {load:.1f}, {threads} threads of torch")
    print(
        f"  the model has {model_bytes / 1e6:.0f} MB; the process {before / 1e6:.0f} MB before, {peak / 1e6:.0f} MB at the peak"
    )
    print(f"  more memory than before: {(peak - before) / model_bytes:.2f} times the model's own")
    if show_cases:
        for case, seconds in sorted(spent.items(), key=lambda item: -item[1])[:20]:
            print(f"  {seconds:6.2f} s  {case}")


def measure_look_up(num_layers: int = 1000, repeats: int = 50) -> None:
    kw.register_layer(Norm, "TimedNorm")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["KERNELWISE_CACHE"] = str(Path(folder) / "cache")
        build = Path(folder) / "norm" / "build" / "torch-cpu"
        build.mkdir(parents=True)
        for name, text in (
            ("metadata.json", METADATA),
            ("__init__.py", "from . import layers\n"),
            ("layers.py", KERNEL),
        ):
            (build / name).write_text(text)
        model = nn.Sequential(*(Norm() for _ in range(num_layers))).eval()
        config = kw.KernelConfig({"TimedNorm": f"{folder}/norm:Norm"})
        start = time.monotonic()
        kw.kernelize(model, config, mode="inference")
        first = time.monotonic() - start
        kw.unkernelize(model)
        plan = kw.plan(model, config, mode="inference")
        with _prove.Prover() as prover:
            taken = []
            for _ in range(repeats):
                start_cpu = time.process_time()
                prover.prove(model, plan, on_miss="raise")
                taken.append(time.process_time() - start_cpu)
    taken.sort()
    median, least = taken[repeats // 2] * 1e3, taken[0] * 1e3
    print(f"first kernelize of {num_layers} alike layers, with the import and the checks in the worker: {first:.1f} s")
    print(f"looking up what is proven, {num_layers} layers: {median:.2f} ms (median), {least:.2f} least")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", action="store_true", help="Show what took longest.")
    arguments = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {sys.version.split()[0]}, torch {torch.__version__}")
    measure_look_up()
    measure_verify(arguments.cases)
