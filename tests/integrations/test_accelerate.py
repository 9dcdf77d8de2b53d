"""accelerate needs no module of ours: its hooks stay outside of a kernel, whoever came first."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module, remove_hook_from_module
from accelerate.state import AcceleratorState
from tiny import IDS, build, logits, only
from torch import nn
from transformers import AutoModelForCausalLM

import kernelwise as kw
from kernelwise.integrations.transformers import KernelConfig


@pytest.fixture(autouse=True)
def no_accelerator_from_other_tests() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


class Recorder(ModelHook):
    """Adds 1 to the first argument and notes the call."""

    def __init__(self) -> None:
        self.calls = 0

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return (args[0] + 1, *args[1:]), kwargs


def norms(model: Any) -> list[nn.Module]:
    return [module for name, module in model.named_modules() if name.endswith("norm")]


def hooked(model: Any) -> list[Recorder]:
    hooks = [Recorder() for _ in norms(model)]
    for module, hook in zip(norms(model), hooks, strict=True):
        add_hook_to_module(module, hook)
    return hooks


@pytest.mark.parametrize("order", ["hooks first", "kernels first"])
def test_hooks_run_around_the_kernel(norm: str, order: str) -> None:
    model, plain = build(), build()
    plain_hooks = hooked(plain)
    with_hooks = logits(plain)
    config = only({"RMSNorm": norm + "MarkedNorm"})
    expected = build()
    expected.set_use_kernels(True, config)
    for module in norms(expected):
        module.register_forward_pre_hook(lambda _, args: (args[0] + 1, *args[1:]))
    if order == "hooks first":
        hooks = hooked(model)
        model.set_use_kernels(True, config)
    else:
        model.set_use_kernels(True, config)
        hooks = hooked(model)
    assert torch.equal(logits(model), logits(expected))
    assert [hook.calls for hook in hooks] == [hook.calls for hook in plain_hooks] == [1] * 5
    model.use_kernels = False
    assert torch.equal(logits(model), with_hooks)
    assert [hook.calls for hook in hooks] == [2] * 5


@pytest.mark.parametrize("order", ["hooks first", "kernels first"])
@pytest.mark.parametrize("first_out", ["hooks", "kernels"])
def test_everything_comes_off_in_any_order(norm: str, order: str, first_out: str) -> None:
    model = build()
    own = logits(model)
    config = only({"RMSNorm": norm + "MarkedNorm"})
    if order == "hooks first":
        hooked(model)
        kw.kernelize(model, config)
    else:
        kw.kernelize(model, config)
        hooked(model)
    if first_out == "hooks":
        remove_hook_from_module(model, recurse=True)
        marked = logits(model)
        assert not torch.allclose(marked, own)
        kw.unkernelize(model)
    else:
        kw.unkernelize(model)
        remove_hook_from_module(model, recurse=True)
    assert torch.equal(logits(model), own)
    assert not any("_kernelwise" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("order", ["offload first", "kernels first"])
def test_cpu_offload(norm: str, order: str) -> None:
    """The weights are on meta between calls; a kernel reads them inside the hook."""
    model = build()
    own = logits(model)
    reference = build()
    reference.set_use_kernels(True, only({"RMSNorm": norm + "MarkedNorm", "rotary_pos_emb": norm + "MarkedRotary"}))
    config = reference.kernel_config
    if order == "kernels first":
        model.set_use_kernels(True, config)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.model.norm.weight.device.type == "meta"
    if order == "offload first":
        model.set_use_kernels(True, config)
    assert torch.equal(logits(model), logits(reference))
    assert model.model.norm.weight.device.type == "meta"
    model.use_kernels = False
    assert torch.equal(logits(model), own)


def test_disk_offload_with_builtin_kernels(tmp_path: Path) -> None:
    model = build()
    own = logits(model)
    disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    model.set_use_kernels(True, KernelConfig())
    kernels = {row.kernel for row in kw.report(model).rows if row.kernel}
    assert {"builtin:RMSNorm", "builtin:SwiGLUMLP", "builtin:rotary_pos_emb"} <= kernels
    torch.testing.assert_close(logits(model), own)
    fallbacks = {row.path: row.fallbacks for row in kw.report(model).rows if row.fallbacks and "norm" in row.path}
    assert fallbacks == {}, "the norms ran their own code"
    model.use_kernels = False
    assert torch.equal(logits(model), own)


def test_a_module_whose_weights_arrive_with_the_call(norm: str) -> None:
    """`AlignDevicesHook` with a weights map, as `dispatch_model` uses it for a part of a model."""
    model = build()
    own = logits(model)
    layer = model.model.norm
    hook = AlignDevicesHook("cpu", offload=True, weights_map={"weight": layer.weight.detach().clone()})
    add_hook_to_module(layer, hook)
    assert layer.weight.device.type == "meta"
    model.set_use_kernels(True, only({"RMSNorm": norm + "GoodNorm"}))
    assert {row.path: row.kernel for row in kw.report(model).rows}["model.norm"] == norm + "GoodNorm"
    torch.testing.assert_close(logits(model), own)


def test_from_pretrained_with_disk_offload(llama: Path, norm: str, tmp_path: Path) -> None:
    """transformers puts its hooks in at the very end of `from_pretrained`; the kernels come after them."""
    device_map = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "disk",
                  "model.rotary_emb": "cpu", "lm_head": "cpu"}  # fmt: skip
    options: dict[str, Any] = {"device_map": device_map, "offload_folder": tmp_path / "offload"}
    own = logits(AutoModelForCausalLM.from_pretrained(llama, **options))
    config = only({"RMSNorm": norm + "GoodNorm"})
    model = AutoModelForCausalLM.from_pretrained(llama, use_kernels=True, kernel_config=config, **options)
    assert model.model.norm.weight.device.type == "meta"
    kernels = {row.path: row.kernel for row in kw.report(model).rows if row.name == "RMSNorm"}
    assert kernels["model.norm"] == norm + "GoodNorm"
    torch.testing.assert_close(logits(model), own)
    model.use_kernels = False
    assert torch.equal(logits(model), own)


def test_dispatch_model_after_kernelize(norm: str) -> None:
    model = build()
    model.set_use_kernels(True, only({"RMSNorm": norm + "MarkedNorm"}))
    on = logits(model)
    model = dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)
    assert torch.equal(logits(model), on)
    assert model.use_kernels


def test_accelerator_prepare_and_a_training_step() -> None:
    model, reference = build(), build()
    model.set_use_kernels(True, KernelConfig())
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    prepared.train()
    reference.train()
    plain = torch.optim.SGD(reference.parameters(), lr=0.1)
    for _ in range(2):
        loss = prepared(IDS, labels=IDS).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        reference(IDS, labels=IDS).loss.backward()
        plain.step()
        plain.zero_grad()
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_mixed_precision_autocast_keeps_its_wrapper() -> None:
    """`prepare` with bf16 puts a wrapper around the model's forward, and takes it off again."""
    model = build()
    model.set_use_kernels(True, KernelConfig())
    on = logits(model)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    prepared = accelerator.prepare(model)
    assert torch.isfinite(logits(prepared)).all()
    unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert torch.equal(logits(unwrapped), on)
