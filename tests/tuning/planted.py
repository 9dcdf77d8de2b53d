"""A norm of no known kind, slow or not, kernels planted for it, and races whose results are planted too."""

from __future__ import annotations

import time
from pathlib import Path

import fakehub
import torch
from torch import nn

import kernelwise as kw
from kernelwise._applying import _apply
from kernelwise._evidence import EAGER, Comparison, Run, Tuning
from kernelwise._tuning import _races

FAST = """
import time
import torch
from torch import nn


def norm(x, weight, eps):
    return weight * x / torch.sqrt(torch.mean(x * x, -1, keepdim=True) + eps) + torch.tanh(x)


class Fast(nn.Module):
    def forward(self, hidden_states):
        return norm(hidden_states, self.weight, self.variance_epsilon)
"""

KERNELS = f"""{FAST}

class Slow(nn.Module):
    def forward(self, hidden_states):
        time.sleep(0.03)  # so slow that it shows on a busy machine
        return norm(hidden_states, self.weight, self.variance_epsilon)


class Wrong(nn.Module):
    def forward(self, hidden_states):
        return hidden_states * self.weight


class Hangs(nn.Module):
    def forward(self, hidden_states):
        while True:
            time.sleep(0.1)
"""


class TanhNorm(nn.Module):
    """A norm of no known kind."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, width))
        self.variance_epsilon = 1e-6

    def forward(self, hidden_states):
        rms = torch.sqrt(torch.mean(hidden_states * hidden_states, -1, keepdim=True) + self.variance_epsilon)
        return self.weight * hidden_states / rms + torch.tanh(hidden_states)


class SleepyNorm(TanhNorm):
    """The same, slow on any machine."""

    def forward(self, hidden_states):
        time.sleep(0.002)
        return super().forward(hidden_states)


class Model(nn.Module):
    def __init__(self, *, widths: tuple[int, ...] = (48, 48)) -> None:
        super().__init__()
        self.norms = nn.ModuleList(SleepyNorm(width) for width in widths)
        self.head = nn.PReLU()  # which no kernel is for

    def forward(self, x):
        for norm in self.norms:
            x = norm(x[..., : norm.weight.shape[0]])
        return self.head(x)


kw.register_layer(TanhNorm, "TanhNorm")
kw.register_layer(SleepyNorm, "SleepyNorm")
X = torch.randn(2, 8, 48)


def example_inputs() -> torch.Tensor:
    return X


def write(folder: Path, kernels: str = KERNELS) -> str:
    """Write a repository of kernels, and return its path."""
    return str(fakehub.write_files(folder, fakehub.kernel_files("planted", layers=kernels)))


def of(config: kw.KernelConfig) -> Tuning:
    assert config.evidence is not None
    return config.evidence


def ratio(speedup: float) -> Comparison:
    return Comparison(100.0, 100.0 / speedup, speedup, speedup * 0.99, speedup * 1.01, 20)


def races(monkeypatch, speedups: dict[str, float | str]) -> list[tuple[str, ...]]:
    """Plant what races find: how much faster each contender is, or why it fails."""
    seen: list[tuple[str, ...]] = []

    def race(contenders, workload, *, device, seconds, own=EAGER, begin=None, progress=None):
        seen.append(tuple(contenders))
        kernels = _apply.kernelized_paths(contenders["tuned"].model) if "tuned" in contenders else ()
        base = speedups.get(own, 1.0)
        runs = []
        for name in contenders:
            found = speedups.get(name, 1.0)
            if name == "tuned" and not kernels:
                found = 1.0  # whatever was planted, this is own code
            if isinstance(found, str):
                runs.append(Run(name, workload.name, None, 0, found))
            else:
                runs.append(Run(name, workload.name, ratio(found / base)))
        return tuple(runs)

    monkeypatch.setattr(_races, "race", race)
    monkeypatch.setattr(_races._results, "get", lambda key: None)
    monkeypatch.setattr(_races._results, "put", lambda key, value: None)
    return seen
