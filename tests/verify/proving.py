"""Kernels that are right or wrong in one way, as a repository on disk, and a process that knows nothing of them."""

from __future__ import annotations

import json
from pathlib import Path

from kernelwise._verifying import _prove

LAYERS = """
import os, time
import torch
from torch import nn


def norm(x, weight, eps):
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


class Right(nn.Module):
    def forward(self, hidden_states):
        return norm(hidden_states, self.weight, self.variance_epsilon)


class NotScaled(nn.Module):
    def forward(self, x, scale=None):
        return torch.sort(x, -1).values * self.weight


class ScaledToo(nn.Module):
    def forward(self, x, scale=None):
        y = torch.sort(x, -1).values * self.weight
        return y if scale is None else y * scale


class Wrong(nn.Module):
    def forward(self, hidden_states):
        return norm(hidden_states, self.weight, self.variance_epsilon) + 1


class FixedEpsilon(nn.Module):
    def forward(self, hidden_states):
        return norm(hidden_states, self.weight, 1e-5 + 0 * self.variance_epsilon)


class WrongAtWidth96(nn.Module):
    def forward(self, hidden_states):
        return norm(hidden_states, self.weight, self.variance_epsilon) * (1 + (hidden_states.shape[-1] == 96))


class EpsilonNotRead(nn.Module):
    def forward(self, hidden_states):
        return norm(hidden_states, self.weight, 1e-5)


class SortedDown(nn.Module):
    def forward(self, hidden_states):
        return torch.sort(hidden_states, -1, descending=True).values * self.weight


class SortedSilu(nn.Module):
    def forward(self, hidden_states):
        return torch.sort(nn.functional.silu(hidden_states), -1).values


class WrongInTraining(nn.Module):
    def forward(self, hidden_states):
        return norm(hidden_states, self.weight, self.variance_epsilon) * (1 + self.training)


class Slow(nn.Module):
    def forward(self, hidden_states):
        time.sleep(1000)


class FullOnce(nn.Module):
    def forward(self, hidden_states):
        if os.path.exists(os.environ["KERNELWISE_CACHE"] + ".full"):
            raise torch.OutOfMemoryError("others have the memory")
        return norm(hidden_states, self.weight, self.variance_epsilon)


class OtherDecoder(nn.Module):
    def forward(self, hidden_states, attention_mask=None, position_ids=None, past_key_values=None, use_cache=False,
                position_embeddings=None, **kwargs):
        return self.mlp(self.input_layernorm(hidden_states)) * 0


class TwoInputs(nn.Module):
    def forward(self, a, b):
        return a + b
"""


def write_repository(folder: Path, init: str = "from . import layers\n") -> Path:
    variant = folder / "build" / "torch-universal"
    variant.mkdir(parents=True)
    metadata = {"name": folder.name, "id": folder.name, "version": 1, "license": "MIT", "python-depends": []}
    (variant / "metadata.json").write_text(json.dumps(metadata | {"backend": {"type": "cpu"}}))
    (variant / "__init__.py").write_text(init)
    (variant / "layers.py").write_text(LAYERS)
    return folder


def another_process(monkeypatch) -> None:
    """Forget what this process knows, as a new one would."""
    monkeypatch.setattr(_prove, "_remembered", {})
