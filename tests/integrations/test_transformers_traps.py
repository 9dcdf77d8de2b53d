"""What goes wrong with transformers' own kernel config, one test a trap: here it must not."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from fakehub import FakeHub, kernel_files
from tiny import ACCEPTED, IDS, LAYERS, build, logits, only, repository
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama

import kernelwise as kw
from kernelwise.integrations.transformers import KernelConfig


def test_kernel_lost_after_train(llama: Path, norm: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama, kernel_config=only({"RMSNorm": norm + "MarkedNorm"}))
    on = logits(model)
    for _ in range(2):
        model.train()
        assert torch.equal(logits(model), on)
        model.eval()
        assert torch.equal(logits(model), on)


def test_a_config_works_once(llama: Path, norm: str) -> None:
    """One object for many models, of many kinds, on both ways in; it stays as it was written."""
    config = only({"RMSNorm": {"cpu": norm + "MarkedNorm", "cuda": "good/norm:Norm"}})
    written, mapping = copy.deepcopy(config.kernel_mapping), config.kernel_mapping
    models = [AutoModelForCausalLM.from_pretrained(llama, use_kernels=True, kernel_config=config) for _ in range(2)]
    for model_type in ("llama", "qwen3", "mistral"):
        models.append(build(model_type))
        models[-1].set_use_kernels(True, config)
    for model in models:
        assert model.kernel_config is config
        norms = [row for row in kw.report(model).rows if row.name == "RMSNorm"]
        assert all(row.kernel == norm + "MarkedNorm" for row in norms)
        assert len(norms) >= 10
    assert config.kernel_mapping is mapping
    assert mapping == written
    assert torch.equal(logits(models[0]), logits(models[1]))


def test_documented_multi_device_dict_raises(llama: Path, norm: str) -> None:
    config = only({"RMSNorm": {"cuda": "good/norm:Norm", "rocm": "good/norm:Norm", "cpu": norm + "MarkedNorm"}})
    model = AutoModelForCausalLM.from_pretrained(llama, use_kernels=True, kernel_config=config)
    assert {row.kernel for row in kw.report(model).rows if row.name == "RMSNorm"} == {norm + "MarkedNorm"}


def test_cuda_entry_applied_on_another_device(llama: Path, hub: FakeHub) -> None:
    hub.add("good/norm", {"v1": kernel_files(layers=LAYERS)})
    own = logits(AutoModelForCausalLM.from_pretrained(llama))
    config = only({"RMSNorm": {"cuda": ("good/norm:MarkedNorm", {"version": 1})}})
    model = AutoModelForCausalLM.from_pretrained(llama, use_kernels=True, kernel_config=config)
    assert torch.equal(logits(model), own)
    assert hub.requests == []


def test_local_kernels_through_from_pretrained_always_raise(llama: Path, norm: str) -> None:
    own = logits(AutoModelForCausalLM.from_pretrained(llama))
    for use_local_kernel in (True, False):
        config = only({"RMSNorm": norm + "GoodNorm"}, use_local_kernel=use_local_kernel)
        model = AutoModelForCausalLM.from_pretrained(llama, use_kernels=True, kernel_config=config)
        assert model.use_kernels
        torch.testing.assert_close(logits(model), own)


def test_hooks_destroyed_even_when_nothing_is_replaced(norm: str) -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Count(ModelHook):
        calls = 0

        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            Count.calls += 1
            return args, kwargs

    model = build()
    for module in model.modules():
        add_hook_to_module(module, Count())
    forwards = {name: module.__dict__["forward"] for name, module in model.named_modules()}
    logits(model)
    expected, Count.calls = Count.calls, 0
    model.set_use_kernels(True, only({"RMSNorm": {"cuda": "good/norm:Norm"}}))
    assert {name: module.__dict__["forward"] for name, module in model.named_modules()} == forwards
    logits(model)
    assert Count.calls == expected
    Count.calls = 0
    model.set_use_kernels(True, only({"RMSNorm": norm + "MarkedNorm"}))
    model.train()
    model.eval()
    logits(model)
    assert Count.calls == expected


def test_kernelizing_model_a_changes_model_b(norm: str) -> None:
    a, b = build(), build()
    own = logits(b)
    wrapper = modeling_llama.apply_rotary_pos_emb
    a.set_use_kernels(True, only({"rotary_pos_emb": norm + "MarkedRotary", "RMSNorm": norm + "MarkedNorm"}))
    assert not torch.allclose(logits(a), own)
    assert torch.equal(logits(b), own)
    assert torch.equal(logits(build()), own)
    assert modeling_llama.apply_rotary_pos_emb is wrapper
    b.set_use_kernels(True, only({"rotary_pos_emb": norm + "MarkedRotary"}))
    a.use_kernels = False
    assert torch.equal(logits(a), own)
    assert not torch.allclose(logits(b), own)


@pytest.mark.parametrize("model_type", ["gpt_oss", "llama", "gemma"])
def test_wrong_tag_rms_norm_classes(model_type: str) -> None:
    """One name, three formulas: GptOss rounds after the weight, Llama before, Gemma multiplies by one plus the weight.

    With a kernel that rounds at the other place a quarter of the elements differ in bf16; `w` for `1 + w` changes all.
    """
    model = build(model_type).to(torch.bfloat16)
    layer = model.model.norm
    x = torch.randn(4, 64, 32, dtype=torch.bfloat16)
    own = layer(x)
    model.set_use_kernels(True, KernelConfig({"RMSNorm": "builtin:RMSNorm"}, inherit_mapping=False))
    assert {row.kernel for row in kw.report(model).rows if row.name == "RMSNorm"} == {"builtin:RMSNorm"}
    differing = (layer(x) != own).float().mean()
    assert differing < 0.01, f"{differing:.1%} of the elements differ"


def test_subclass_that_overrides_forward_gets_its_parents_kernel(norm: str) -> None:
    class Doubled(modeling_llama.LlamaRMSNorm):  # type: ignore[misc]
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = torch.sinh(super().forward(hidden_states))
            return output

    class Same(modeling_llama.LlamaRMSNorm):  # type: ignore[misc]
        pass

    model = build()
    model.model.norm = Doubled(32).eval()
    model.model.layers[0].input_layernorm = Same(32).eval()
    model.set_use_kernels(True, only({"RMSNorm": norm + "MarkedNorm"}))
    paths = {row.path for row in kw.report(model).rows if row.kernel}
    assert "model.norm" not in paths
    assert "model.layers.0.input_layernorm" in paths


@pytest.mark.parametrize("kernel", ["LosesGradient", "ForwardOnly"])
def test_gradients_lost_without_a_word(norm: str, kernel: str) -> None:
    model, reference = build(), build()
    model.set_use_kernels(True, only({"RMSNorm": norm + kernel}))
    assert not torch.allclose(logits(model), logits(reference))  # without gradients the kernel runs
    for each in (model, reference):
        each.train()
        each(IDS, labels=IDS).loss.backward()
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert ours.grad is not None, name
        torch.testing.assert_close(ours.grad, theirs.grad)
    assert any(count > 0 for row in kw.report(model).rows for _, count in row.fallbacks)


@pytest.mark.parametrize("fault", ["raise ImportError('no such library')", "raise OSError('wrong architecture')"])
def test_a_load_failure_leaves_the_model_half_changed(tmp_path: Path, norm: str, fault: str) -> None:
    broken = repository(tmp_path, "broken", layers=fault + "\n" + LAYERS)
    model = build()
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    with pytest.raises(kw.KernelLoadError, match=r"no such library|wrong architecture"):
        model.set_use_kernels(True, only({"RMSNorm": norm + "GoodNorm", "rotary_pos_emb": f"{broken}:MarkedRotary"}))
    assert {name: module.__dict__ for name, module in model.named_modules()} == before
    assert not model.use_kernels


@pytest.mark.parametrize(
    "mapping",
    [
        ["RMSNorm"],
        {"RMSNorm": ("good/norm:Norm", {"version": 1, "revision": "main"})},
        {"RMSNorm": ("good/norm:Norm", {"version": True})},
        {"RMSNorm": ("good/norm:Norm", {"versoin": 1})},
        {"RMSNorm": ("good/norm:Norm", {})},
        {"RMSNorm": "good/norm:"},
        {"RMSNorm": "good/norm:Norm:extra"},
        {"RMSNorm": "https://host/good/norm:Norm"},
        {"RMSNorm": {"gpu": "good/norm:Norm"}},
        {"RMSNorm": "../..:Norm"},
        {"NoSuchLayer": "builtin:RMSNorm"},
        {"RMSNorm": "/no/such/directory:Norm"},
    ],
)
def test_bad_entries_pass_the_check_and_fail_later(llama: Path, hub: FakeHub, mapping: Any) -> None:
    with pytest.raises(kw.KernelConfigError):
        AutoModelForCausalLM.from_pretrained(llama, use_kernels=True, kernel_config=KernelConfig(mapping))
    model = build()
    with pytest.raises(kw.KernelConfigError):
        model.set_use_kernels(True, KernelConfig(mapping))
    assert model.kernel_config is None
    assert hub.requests == []


def test_the_signature_is_not_checked_for_a_second_class(tmp_path: Path) -> None:
    """Two classes under one name, with other signatures: a kernel that fits the first must not go into the second."""
    layers = LAYERS + "\n\nclass NoArgument(nn.Module):\n    def forward(self):\n        return self.weight\n"
    path = repository(tmp_path, layers=layers)

    class Gated(modeling_llama.LlamaRMSNorm):  # type: ignore[misc]
        def forward(self, hidden_states: torch.Tensor, *, gate: torch.Tensor) -> torch.Tensor:
            return hidden_states * gate

    kw.register_layer(Gated, "RMSNorm")
    model = build()
    model.model.norm = Gated(32)
    with pytest.raises(kw.PlanError, match="gate"):
        model.set_use_kernels(True, only({"RMSNorm": f"{path}:MarkedNorm"}))
    assert not model.use_kernels


def test_mappings_are_invisible_in_worker_threads(llama: Path, norm: str) -> None:
    config = only({"RMSNorm": norm + "MarkedNorm"})
    models: list[Any] = []

    def work() -> None:
        models.append(AutoModelForCausalLM.from_pretrained(llama, use_kernels=True, kernel_config=config))
        models[-1].train()
        models[-1].eval()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    here = AutoModelForCausalLM.from_pretrained(llama, use_kernels=True, kernel_config=config)
    assert torch.equal(logits(models[0]), logits(here))
    assert models[0].use_kernels


def test_a_kernel_edited_on_disk_is_not_reloaded(tmp_path: Path) -> None:
    path = repository(tmp_path)
    config = only({"RMSNorm": f"{path}:MarkedNorm"})
    model = build()
    model.set_use_kernels(True, config)
    before = logits(model)
    repository(tmp_path, layers=LAYERS.replace("+ 1000", "- 500"))
    model.use_kernels = False
    model.use_kernels = True
    assert not torch.allclose(logits(model), before)


def test_use_kernels_false_does_nothing(norm: str) -> None:
    model = build()
    own = logits(model)
    model.set_use_kernels(True, only({"RMSNorm": norm + "MarkedNorm"}))
    model.use_kernels = False
    assert torch.equal(logits(model), own)


def test_another_version_of_the_kernels_library_turns_everything_off(norm: str) -> None:
    """Where transformers rejects the installed kernels library, its decorators do nothing; the layers are recognised."""
    model = build()
    assert hasattr(type(model.model.norm), "kernel_layer_name") == ACCEPTED
    model.set_use_kernels(True, only({"RMSNorm": norm + "GoodNorm", "rotary_pos_emb": norm + "MarkedRotary"}))
    rows = [row for row in kw.report(model).rows if row.kernel and row.mode == "inference"]
    assert len(rows) == 7


def test_named_modules_hides_shared_layers(norm: str) -> None:
    """A module that stands in two places is one layer with two paths, and is changed and undone once."""
    model = build()
    model.model.layers[1].input_layernorm = model.model.layers[0].input_layernorm
    own = logits(model)
    model.set_use_kernels(True, only({"RMSNorm": norm + "MarkedNorm"}))
    shared = [row for row in kw.report(model).rows if len(row.paths) == 2 and row.mode == "inference"]
    assert [row.paths for row in shared] == [("model.layers.0.input_layernorm", "model.layers.1.input_layernorm")]
    model.use_kernels = False
    assert torch.equal(logits(model), own)
