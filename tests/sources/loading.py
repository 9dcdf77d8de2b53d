"""What the tests of loading share: a kernel's source, and what of the process a load may change."""

from __future__ import annotations

import sys
from pathlib import Path

from kernelwise.sources import _import, _kernels_compat

NORM = """
import torch
from torch import nn


class RMSNorm(nn.Module):
    can_torch_compile = True
    weight: torch.Tensor
    variance_epsilon: float

    def forward(self, hidden_states):
        variance = hidden_states.float().pow(2).mean(-1, keepdim=True)
        return self.weight * (hidden_states.float() * torch.rsqrt(variance + self.variance_epsilon)).to(hidden_states)
"""


def process_state(folder: Path) -> object:
    """What loading a kernel may change in the process: modules from below a folder, and the registries."""
    modules = {n for n, m in list(sys.modules.items()) if str(folder) in str(getattr(m, "__file__", None) or "")}
    registry = dict(_kernels_compat.loaded_kernels())
    return modules, registry, dict(_import._imported), sys.pycache_prefix, sys.dont_write_bytecode, list(sys.path)
