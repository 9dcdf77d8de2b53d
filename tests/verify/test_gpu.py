"""Verify on a GPU: a layer of Llama-3-8B's shape, CUDA graphs, sizes beyond 2^31, and illegal accesses in the worker."""

from __future__ import annotations

import dataclasses
import time

import gallery
import pytest
import torch
from checking import checks_of, decision

import kernelwise as kw
from kernelwise import KernelRef
from kernelwise._verify import Options
from kernelwise.sources import load

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def test_a_layer_of_llama_3_8b_is_checked_within_a_minute():
    """With a real loss: the inputs, strides and gradients of each kind of layer are those of the model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=2048, hidden_size=4096, intermediate_size=14336, num_hidden_layers=1, num_attention_heads=32,
        num_key_value_heads=8,
    )  # fmt: skip
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
        ids = torch.randint(0, 2048, (2, 128))
    decided = kw.plan(model)
    torch.cuda.reset_peak_memory_stats()
    start = time.monotonic()
    checks = kw.verify(model, decided, {"input_ids": ids, "labels": ids})
    took, peak = time.monotonic() - start, torch.cuda.max_memory_allocated() / 1e9
    print(f"\na layer of Llama-3-8B: {len(checks.checks)} checks in {took:.1f} s, {peak:.1f} GB at the peak", checks)
    assert checks.ok, str(checks)
    done = {check.case for check in checks.checks if check.status == "passed"}
    assert {"cuda graph", "the model's gradients", "rows 2^31 elements apart", "more than 2^31 elements"} <= done
    assert took < 60


def package(name: str, source: str, tmp_path, monkeypatch) -> None:
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)


LAYERS = """
import torch
import triton
import triton.language as tl
from torch import nn


class Asserts(nn.Module):
    def forward(self, hidden_states):
        index = torch.full((1000,), 1 << 40, device=hidden_states.device)
        out = hidden_states.detach().flatten()[index]
        torch.cuda.synchronize()
        return hidden_states * out[0]


class ReadsAnywhere(nn.Module):
    def forward(self, hidden_states):
        out = torch.empty(1, device=hidden_states.device)
        read[(1,)](hidden_states, out)
        torch.cuda.synchronize()
        return hidden_states * out


@triton.jit
def read(x, out):
    tl.store(out, tl.load(x + tl.program_id(0).to(tl.int64) + (1 << 42)).to(tl.float32))


class Norm32(nn.Module):
    def forward(self, hidden_states):
        return run(hidden_states, self.weight, self.variance_epsilon, False)


class Norm64(nn.Module):
    def forward(self, hidden_states):
        return run(hidden_states, self.weight, self.variance_epsilon, True)


def run(hidden_states, weight, eps, wide):
    x = hidden_states.contiguous()
    y = torch.empty_like(x)
    if x.numel():
        norm[(x.numel() // x.shape[-1],)](x, weight, y, x.shape[-1], eps, triton.next_power_of_2(x.shape[-1]), wide)
    return y


@triton.jit
def norm(x, weight, y, width: tl.constexpr, eps, block: tl.constexpr, wide: tl.constexpr):
    row = tl.program_id(0)
    if wide:
        row = row.to(tl.int64)
    columns = tl.arange(0, block)
    mask = columns < width
    values = tl.load(x + row * width + columns, mask=mask, other=0.0).to(tl.float32)
    values *= tl.rsqrt(tl.sum(values * values) / width + eps)
    values = values.to(x.dtype.element_ty) * tl.load(weight + columns, mask=mask, other=0.0)
    tl.store(y + row * width + columns, values, mask=mask)
"""


@pytest.mark.parametrize("name", ["Asserts", "ReadsAnywhere"])
def test_an_illegal_access_leaves_this_process_its_gpu(name, tmp_path, monkeypatch):
    package("illegal_layers", LAYERS, tmp_path, monkeypatch)
    kernel = load(KernelRef("package", "illegal_layers", name), device="cuda")
    decided, module = decision(gallery.Norm().cuda(), kernel)
    (check,) = checks_of(decided, module, options=Options())
    print(check)
    assert check.status == "crashed", str(check)
    assert torch.ones(3, device="cuda").sum().item() == 3


def test_indices_of_32_bits_are_found(tmp_path, monkeypatch):
    """The two kernels differ in one conversion, which only shows beyond 2^31 elements."""
    package("index_layers", LAYERS, tmp_path, monkeypatch)
    for name, wanted in (("Norm64", []), ("Norm32", ["more than 2^31 elements"])):
        kernel = dataclasses.replace(
            load(KernelRef("package", "index_layers", name), device="cuda"), has_backward=False
        )
        decided, module = decision(gallery.Norm().to("cuda", torch.bfloat16), kernel)
        checks = {check.case: check for check in checks_of(decided, module, options=Options())}
        failed = [case for case, check in checks.items() if check.failed]
        assert failed == wanted, str([str(check) for check in checks.values() if check.failed])
        assert checks["more than 2^31 elements"].status in ("passed", "wrong_values", "non_finite", "crashed")
        print(checks["more than 2^31 elements"])


def test_another_device_of_this_process_is_pinned_in_the_worker(tmp_path, monkeypatch):
    """A kernel that is started without saying where runs on the device of its tensors, also where that is not the first."""
    package("pinned_layers", LAYERS, tmp_path, monkeypatch)
    device = f"cuda:{torch.cuda.device_count() - 1}"
    kernel = dataclasses.replace(
        load(KernelRef("package", "pinned_layers", "Norm64"), device="cuda"), has_backward=False
    )
    decided, module = decision(gallery.Norm().to(device, torch.bfloat16), kernel)
    assert not [str(check) for check in checks_of(decided, module, options=Options()) if check.failed]
