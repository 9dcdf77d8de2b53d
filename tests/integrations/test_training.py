"""FSDP2, DDP, gradient checkpointing and LoRA: what they do to a model and what we do to it do not disturb each other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny import IDS, build, logits, only
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

import kernelwise as kw
from kernelwise.integrations.transformers import KernelConfig


@pytest.fixture
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    file = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", store=dist.FileStore(str(file), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def step(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """One training step: the loss and every gradient."""
    model.train()
    loss = model(IDS, labels=IDS).loss
    loss.backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        assert gradient is not None, f"{name} has no gradient"
        gradients[name.removeprefix("module.")] = (
            gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        )
    model.zero_grad()  # now: after a forward without gradients FSDP2 shows other parameters than those that hold them
    return loss.detach(), gradients


def assert_same_step(model: Any, reference: Any) -> None:
    (loss, gradients), (expected, expected_gradients) = step(model), step(reference)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-4, atol=1e-6)


def shard(model: Any) -> None:
    mesh = init_device_mesh("cpu", (1,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def builtin_in(model: nn.Module) -> set[str]:
    return {row.kernel for row in kw.report(model).rows if row.kernel is not None}


@pytest.mark.parametrize("order", ["shard first", "kernels first"])
def test_fsdp2(process_group: None, order: str) -> None:
    model = build()
    own = logits(model)
    if order == "shard first":
        shard(model)
        model.set_use_kernels(True, KernelConfig())
    else:
        model.set_use_kernels(True, KernelConfig())
        shard(model)
    assert isinstance(model, FSDPModule)
    assert {"builtin:RMSNorm", "builtin:SwiGLUMLP", "builtin:rotary_pos_emb"} <= builtin_in(model)
    assert_same_step(model, build())
    model.eval()
    torch.testing.assert_close(logits(model), own)
    ran = {row.path: row.fallbacks for row in kw.report(model).rows if row.name == "RMSNorm" and row.fallbacks}
    assert ran == {}, "the norms ran their own code"
    model.use_kernels = False
    assert isinstance(model, FSDPModule)
    assert torch.equal(logits(model), own)
    assert_same_step(model, build())


@pytest.mark.parametrize("order", ["shard first", "kernels first"])
def test_fsdp2_with_a_kernel_without_backward(process_group: None, norm: str, order: str) -> None:
    model = build()
    config = only({"RMSNorm": norm + "ForwardOnly"})
    if order == "shard first":
        shard(model)
        model.set_use_kernels(True, config)
    else:
        model.set_use_kernels(True, config)
        shard(model)
    assert_same_step(model, build())


@pytest.mark.parametrize("order", ["ddp first", "kernels first"])
def test_ddp(process_group: None, order: str) -> None:
    model = build()
    if order == "ddp first":
        wrapped = DistributedDataParallel(model)
        model.set_use_kernels(True, KernelConfig())
    else:
        model.set_use_kernels(True, KernelConfig())
        wrapped = DistributedDataParallel(model)
    assert "builtin:RMSNorm" in builtin_in(wrapped.module)
    assert_same_step(wrapped, build())
    wrapped.eval()
    assert model.use_kernels


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("order", ["checkpointing first", "kernels first"])
def test_gradient_checkpointing(order: str, use_reentrant: bool) -> None:
    model = build()
    options = {"gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
    if order == "checkpointing first":
        model.gradient_checkpointing_enable(**options)
        model.set_use_kernels(True, KernelConfig())
    else:
        model.set_use_kernels(True, KernelConfig())
        model.gradient_checkpointing_enable(**options)
    assert model.is_gradient_checkpointing
    if use_reentrant:
        model.enable_input_require_grads()
    assert_same_step(model, build())


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("kernel", ["LosesGradient", "ForwardOnly"])
def test_gradient_checkpointing_keeps_gradients(norm: str, kernel: str, use_reentrant: bool) -> None:
    """The first pass of a reentrant checkpoint runs without gradients, the second with them."""
    model = build()
    model.set_use_kernels(True, only({"RMSNorm": norm + "GoodNorm", "RMSNorm@model.norm": norm + kernel}))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()
    assert_same_step(model, build())


class LoraLinear(nn.Module):
    """A linear layer with a low-rank addition, as PEFT puts it in the place of the layer."""

    def __init__(self, base_layer: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.lora_A = nn.Linear(base_layer.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base_layer.out_features, bias=False)
        with torch.no_grad():
            self.lora_A.weight.copy_(torch.linspace(-1, 1, self.lora_A.weight.numel()).view_as(self.lora_A.weight))
            self.lora_B.weight.copy_(torch.linspace(-0.2, 0.3, self.lora_B.weight.numel()).view_as(self.lora_B.weight))

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


def with_lora(model: Any) -> Any:
    model.requires_grad_(False)
    for layer in model.model.layers:
        layer.mlp.gate_proj = LoraLinear(layer.mlp.gate_proj)
        layer.mlp.down_proj = LoraLinear(layer.mlp.down_proj)
        layer.self_attn.q_proj = LoraLinear(layer.self_attn.q_proj)
    return model.eval()


@pytest.mark.parametrize("order", ["lora first", "kernels first"])
def test_lora(order: str) -> None:
    """An MLP kernel that reads its linears' weights would leave the low-rank part out."""
    reference = with_lora(build())
    own = logits(reference)
    model = build()
    assert (own - logits(model)).abs().max() > 1e-3, "the low-rank part must matter"
    if order == "lora first":
        with_lora(model).set_use_kernels(True, KernelConfig())
    else:
        model.set_use_kernels(True, KernelConfig())
        with_lora(model)
    assert "builtin:RMSNorm" in builtin_in(model)
    torch.testing.assert_close(logits(model), own)
    for each in (model, reference):
        each.train()
        each(IDS, labels=IDS).loss.backward()
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 12
    for name, parameter in model.named_parameters():
        expected = reference.get_parameter(name)
        assert (parameter.grad is None) == (expected.grad is None), name
        if parameter.grad is not None and expected.grad is not None:
            torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-4, atol=1e-6)


def test_frozen_model_with_a_forward_only_kernel_gives_input_gradients(norm: str) -> None:
    """Nothing of the layer needs a gradient, its input does: an adapter sits below it."""
    model, reference = with_lora(build()), with_lora(build())
    # The second layer's: what comes before the first adapter needs no gradient, and there the kernel may run.
    model.set_use_kernels(True, only({"RMSNorm@model.layers.1.*": norm + "ForwardOnly"}))
    for each in (model, reference):
        each.train()
        each(IDS, labels=IDS).loss.backward()
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("order", ["compile first", "kernels first"])
def test_torch_compile_of_the_whole_model(order: str) -> None:
    model = build()
    own = logits(model)
    if order == "compile first":
        model.compile(backend="eager")
        model.set_use_kernels(True, KernelConfig())
    else:
        model.set_use_kernels(True, KernelConfig())
        model.compile(backend="eager")
    torch.testing.assert_close(logits(model), own)
    model.use_kernels = False
    torch.testing.assert_close(logits(model), own)
