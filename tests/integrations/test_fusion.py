"""Kernels that change how the model is built: transformers' own mechanism, entered with our config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fakehub import FakeHub, kernel_files
from tiny import ACCEPTED, IDS, build, logits, only, repository
from transformers import AutoModelForCausalLM, conversion_mapping, monkey_patching

import kernelwise as kw
from kernelwise.integrations.transformers import KernelConfig

FUSED = """
import torch
from torch import nn
from transformers.core_model_loading import WeightRenaming


class NormMLP(nn.Module):
    def forward(self, hidden_states):
        return self.mlp(self.norm(hidden_states))


class NormMLPLayout(nn.Module):
    conversion_mapping = [
        WeightRenaming(r"post_attention_layernorm\\.weight", "post_attention_layernorm.norm.weight"),
        WeightRenaming(r"\\.mlp\\.", ".post_attention_layernorm.mlp."),
    ]

    def __init__(self, norm, mlp):
        super().__init__()
        self.norm, self.mlp = norm, mlp


class WholeMLP(nn.Module):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) + 1000


class WholeMLPLayout(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
"""

KEY = (("RMSNorm", "model.layers.*.post_attention_layernorm"), ("MLP", "model.layers.*.mlp"))


@pytest.fixture
def fused(tmp_path: Path) -> str:
    return f"{repository(tmp_path, 'fused', layers=FUSED)}:"


def load(llama: Path, config: KernelConfig) -> Any:
    """Load with the config where transformers can fuse; elsewhere check that it says so, and return None."""
    if ACCEPTED:
        return AutoModelForCausalLM.from_pretrained(llama, use_kernels=True, kernel_config=config)
    with pytest.raises(kw.PlanError, match="does not accept the installed kernels library"):
        AutoModelForCausalLM.from_pretrained(llama, use_kernels=True, kernel_config=config)
    return None


def test_layers_are_fused_and_others_get_their_kernels(llama: Path, fused: str, norm: str, tmp_path: Path) -> None:
    own = logits(AutoModelForCausalLM.from_pretrained(llama))
    config = only({KEY: fused + "NormMLP", "RMSNorm": norm + "GoodNorm"})
    written = dict(config.kernel_mapping)
    for _ in range(2):  # the config serves again
        model = load(llama, config)
        if model is None:
            continue
        kernels = {row.path: row.kernel for row in kw.report(model).rows if row.mode == "inference"}
        assert kernels["model.layers.1.post_attention_layernorm"] == fused + "NormMLP"
        assert kernels["model.layers.1.input_layernorm"] == norm + "GoodNorm"
        torch.testing.assert_close(logits(model), own)
        model.train()
        model(IDS, labels=IDS).loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        model.eval()
        assert model.kernel_config is config
        model.save_pretrained(tmp_path / "saved")
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), own)
        assert "NormMLP" in config.registered_layer_names.values()
    assert config.kernel_mapping == written


def test_other_models_are_not_fused(llama: Path, fused: str) -> None:
    plain = AutoModelForCausalLM.from_pretrained(llama)
    own, names = logits(plain), [name for name, _ in plain.named_modules()]
    weights = conversion_mapping.get_checkpoint_conversion_mapping("llama")
    load(llama, only({KEY: fused + "NormMLP"}))
    assert monkey_patching.get_patch_mapping() == {}
    assert conversion_mapping.get_checkpoint_conversion_mapping("llama") == weights
    assert "llama" not in conversion_mapping.USER_REGISTERED_MAPPINGS
    after = AutoModelForCausalLM.from_pretrained(llama)
    assert [name for name, _ in after.named_modules()] == names
    assert torch.equal(logits(after), own)


def test_a_patch_of_the_users_own_survives(llama: Path, fused: str) -> None:
    class Other(torch.nn.Module):
        pass

    monkey_patching.register_patch_mapping({"NoSuchClassAnywhere": Other})
    try:
        load(llama, only({KEY: fused + "NormMLP"}))
        assert monkey_patching.get_patch_mapping() == {"NoSuchClassAnywhere": Other}
    finally:
        monkey_patching.clear_patch_mapping()


def test_layers_built_for_a_kernel_cannot_do_without(llama: Path, fused: str) -> None:
    model = load(llama, only({KEY: fused + "NormMLP"}))
    if model is not None:
        before = logits(model)
        with pytest.raises(kw.ApplyError, match="built for them"):
            model.use_kernels = False
        assert model.use_kernels
        assert torch.equal(logits(model), before)


def test_a_layout_with_a_forward_can_be_turned_off(llama: Path, fused: str) -> None:
    own = logits(AutoModelForCausalLM.from_pretrained(llama))
    model = load(llama, only({"LlamaMLP": fused + "WholeMLP"}))
    if model is not None:
        assert type(model.model.layers[0].mlp).__name__ == "WholeMLPLayout"
        assert not torch.allclose(logits(model), own)
        model.use_kernels = False
        torch.testing.assert_close(logits(model), own)
        model.use_kernels = True
        assert not torch.allclose(logits(model), own)


def test_layers_cannot_be_fused_in_a_model_that_stands(fused: str) -> None:
    model = build()
    with pytest.raises(kw.PlanError, match="from_pretrained with kernel_config"):
        model.set_use_kernels(True, only({KEY: fused + "NormMLP"}))
    assert not model.use_kernels


def test_one_kernel_a_fusion(llama: Path, fused: str) -> None:
    config = only({KEY: {"cpu": fused + "NormMLP", "cuda": "good/norm@v1:NormMLP"}})
    with pytest.raises(kw.KernelConfigError, match="before the model has a device"):
        AutoModelForCausalLM.from_pretrained(llama, use_kernels=True, kernel_config=config)


def test_fusions_of_the_hub_and_of_paths_do_not_mix(llama: Path, fused: str) -> None:
    key = (("RMSNorm", "model.layers.*.input_layernorm"), ("Attention", "model.layers.*.self_attn"))
    config = only({KEY: fused + "NormMLP", key: "good/norm@v1:NormMLP"})
    with pytest.raises(kw.KernelConfigError, match="of local paths alone"):
        AutoModelForCausalLM.from_pretrained(llama, use_kernels=True, kernel_config=config)


def test_a_fusion_from_the_hub(llama: Path, hub: FakeHub) -> None:
    hub.add("good/fused", {"v1": kernel_files("fused", layers=FUSED)})
    own = logits(AutoModelForCausalLM.from_pretrained(llama))
    model = load(llama, only({KEY: "good/fused@v1:NormMLP"}))
    if model is not None:
        torch.testing.assert_close(logits(model), own)
        kernels = {row.kernel for row in kw.report(model).rows}
        assert "good/fused@v1:NormMLP" in kernels
