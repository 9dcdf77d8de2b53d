"""Verify on a GPU: the Triton kernels on layers of a Llama-3-8B's shape, CUDA graphs, and an illegal access in the worker."""

from __future__ import annotations

import time

import gallery
import pytest
import torch
from checking import checks_of, decision
from torch import nn

import kernelwise as kw
from kernelwise import KernelRef
from kernelwise._verify import Options
from kernelwise.sources import load

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def test_layers_of_llama_3_8b_are_checked_within_a_minute():
    with torch.device("cuda"):
        model = nn.Sequential(gallery.Norm(4096), gallery.MLP(4096, 14336)).to(torch.bfloat16)
    decided = kw.plan(model)
    start = time.monotonic()
    checks = kw.verify(model, decided, torch.randn(1, 64, 4096, device="cuda", dtype=torch.bfloat16))
    assert checks.ok, str(checks)
    assert "cuda graph" in {check.case for check in checks.checks}
    assert time.monotonic() - start < 60


LAYERS = """
import torch
from torch import nn


class Illegal(nn.Module):
    def forward(self, hidden_states):
        index = torch.full((1000,), 1 << 40, device=hidden_states.device)
        out = hidden_states.detach().flatten()[index]
        torch.cuda.synchronize()
        return hidden_states * out[0]
"""


def test_an_illegal_access_leaves_this_process_its_gpu(tmp_path, monkeypatch):
    (tmp_path / "illegal_layers.py").write_text(LAYERS)
    monkeypatch.syspath_prepend(tmp_path)
    kernel = load(KernelRef("package", "illegal_layers", "Illegal"), device="cuda")
    decided, module = decision(gallery.Norm().cuda(), kernel)
    (check,) = checks_of(decided, module, options=Options())
    assert check.status == "crashed", str(check)
    assert torch.ones(3, device="cuda").sum().item() == 3
