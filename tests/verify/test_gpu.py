"""Verify on a GPU: a layer of Llama-3-8B's shape, CUDA graphs, compiled calls, sizes beyond 2^31, illegal accesses.

python -m pytest -m gpu tests/verify/test_gpu.py -s
"""

from __future__ import annotations

import dataclasses
import json
import time

import faults_in_effects
import faults_in_form
import gallery
import pytest
import torch
from checking import checks_of, decision
from torch import nn

import kernelwise as kw
from kernelwise._data import KernelRef
from kernelwise._verifying._check import Options, check_kernel, own_code
from kernelwise._verifying._inputs import Sample
from kernelwise.sources import load

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.alone
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


def small_llama(**options):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    with torch.device("cuda"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=256, num_hidden_layers=1, **sizes, **options)).to(
            torch.bfloat16
        )
        return model, torch.randint(0, 256, (2, 64))


@pytest.mark.usefixtures("little_memory")
def test_compiled_calls_are_checked():
    model, ids = small_llama()
    checks = kw.verify(model, kw.plan(model), {"input_ids": ids}, compile=True)
    assert checks.ok, str(checks)
    compiled = {check.kernel for check in checks.checks if (check.case, check.status) == ("compile", "passed")}
    assert {"builtin:RMSNorm", "builtin:SwiGLUMLP", "builtin:rotary_pos_emb"} <= compiled


def test_a_decoder_layer_is_checked_as_a_whole():
    model, ids = small_llama(attention_dropout=0.1)
    config = kw.KernelConfig({"DecoderLayer": "builtin:DecoderLayer"}, inherit_mapping=True)
    checks = kw.verify(model, kw.plan(model, config), {"input_ids": ids, "labels": ids})
    assert checks.ok, str(checks)
    done = {
        check.case for check in checks.checks if check.kernel == "builtin:DecoderLayer" and check.status == "passed"
    }
    assert {"as given", "as given, in training", "the model's gradients", "random weights"} <= done


@pytest.mark.usefixtures("little_memory")
def test_the_command_line_checks_on_the_gpu(capsys):
    from kernelwise._cli import main

    with pytest.raises(SystemExit) as left:
        main(["verify", "llama", "--device", "cuda", "--dtype", "bfloat16", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (left.value.code, found["ok"], found["target"]["device"]) == (0, True, "cuda")


class Drops(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 64))

    def forward(self, x):
        return nn.functional.dropout(x * self.weight, 0.5, self.training)


class DropsOthers(nn.Module):
    def forward(self, x):
        return nn.functional.dropout((x * self.weight).flip(0), 0.5, self.training).flip(0)


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_is_left_out_by_dropout(dtype, as_kernel):
    """Of the layer, of the layer in float64 and of the kernel, though their dtypes differ."""
    kw.register_layer(Drops, "Drops")
    for kernel, wanted in ((Drops, None), (DropsOthers, "wrong_values")):
        decided, module = decision(Drops().to("cuda", dtype), as_kernel(kernel), mode="training")
        sample = Sample({"x": torch.randn(4, 6, 64, device="cuda", dtype=dtype)}, module.train())
        before = torch.cuda.get_rng_state()
        own = own_code(module, decided.layer)
        checks = check_kernel(decided, own, sample, modes=("training",), options=Options(isolate=False))
        failed = next((check for check in checks if check.failed), None)
        assert (failed.status if failed else None) == wanted, str(failed)
        assert torch.equal(torch.cuda.get_rng_state(), before)


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize(
    ("fault", "status"),
    [
        (faults_in_effects.Leaks, "leaks_memory"),
        (faults_in_effects.LeavesOneUnwritten, "not_written"),
        (faults_in_effects.WritesBeyondTheRow, "input_overwritten"),
        (faults_in_form.ReturnsTransposed, "wrong_layout"),
        (faults_in_effects.SetsDefaultDtype, "setting_changed"),
    ],
)
def test_faults_are_found_on_the_gpu_too(fault, status, as_kernel):
    decided, module = decision(gallery.Norm().cuda(), as_kernel(fault))
    failed = next((c for c in checks_of(decided, module) if c.failed), None)
    assert failed is not None, "the checker is blind to it"
    assert failed.status == status, str(failed)


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


@pytest.mark.alone
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


@pytest.mark.alone
def test_another_device_of_this_process_is_pinned_in_the_worker(tmp_path, monkeypatch):
    """A kernel that is started without saying where runs on the device of its tensors, also where that is not the first."""
    package("pinned_layers", LAYERS, tmp_path, monkeypatch)
    device = f"cuda:{torch.cuda.device_count() - 1}"
    kernel = dataclasses.replace(
        load(KernelRef("package", "pinned_layers", "Norm64"), device="cuda"), has_backward=False
    )
    decided, module = decision(gallery.Norm().to(device, torch.bfloat16), kernel)
    assert not [str(check) for check in checks_of(decided, module, options=Options()) if check.failed]
