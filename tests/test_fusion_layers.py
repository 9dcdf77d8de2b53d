"""Decoder layers with a residual sum and its norm in one kernel: same results, hooks and caches unharmed, exact undo."""

from __future__ import annotations

import copy
import enum
import functools

import pytest
import torch

import kernelwise as kw
from kernelwise._applying import _fuse
from kernelwise._data import Recognition
from kernelwise._recognize import recognize
from kernelwise.kernels.cpu import decoder_layer as kernels

transformers = pytest.importorskip("transformers")

SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 128, "pad_token_id": 0, "head_dim": 16,
}  # fmt: skip
IDS = torch.randint(1, 128, (2, 9), generator=torch.Generator().manual_seed(0))
LAYERS = {"DecoderLayer": "builtin:DecoderLayer"}


def build(model_type: str = "llama", **extra):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **{**SMALL, **extra})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, 1.0, 0.2)
    return model


@pytest.fixture
def fused(monkeypatch):
    """Counts the calls of the fused kernel."""
    counts = []
    norm, add = kernels.SUMS["rms_norm"]

    @functools.wraps(add)
    def counting(*args, **kwargs):
        counts.append(1)
        return add(*args, **kwargs)

    monkeypatch.setitem(kernels.SUMS, "rms_norm", (norm, counting))
    yield counts
    _fuse._together.cache_clear()


def logits(model, **given):
    with torch.no_grad():
        return model(IDS, **given).logits


def reasons(model) -> list[str]:
    states = [module._kernelwise for module in model.modules() if "_kernelwise" in module.__dict__]
    return [reason for state in states for reason in state.fallbacks]


MODELS = {
    "llama": {},
    "qwen3": {},
    "gemma2": {},
    "gemma3_text": {},
    "granite": {"residual_multiplier": 0.3},
    "mixtral": {"num_local_experts": 4},
}


@pytest.mark.parametrize("model_type", MODELS)
def test_same_results_and_exact_undo(model_type, fused):
    model = build(model_type, **MODELS[model_type])
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    own = logits(model)
    kw.kernelize(model, LAYERS)
    assert "builtin:DecoderLayer" in {row.kernel for row in kw.report(model).rows}
    torch.testing.assert_close(logits(model), own, rtol=1e-5, atol=1e-5)
    assert len(fused) == 2
    assert not reasons(model)
    kw.unkernelize(model)
    assert {name: dict(module.__dict__) for name, module in model.named_modules()} == before
    assert torch.equal(logits(model), own)


def test_gradients_and_checkpointing(fused):
    model = build().train()

    def gradients():
        model.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    own = gradients()
    kw.kernelize(model, LAYERS)
    ours = gradients()
    assert len(fused) == 2
    torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-6)
    model.gradient_checkpointing_enable()
    again = gradients()
    assert len(fused) == 2 + 4
    assert all(torch.equal(a, b) for a, b in zip(again, ours, strict=True))


def test_cache_and_masks(fused):
    model = build()
    mask = torch.ones_like(IDS)
    mask[1, :4] = 0
    given = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    own = model.generate(IDS, **given)
    masked = logits(model, attention_mask=mask)
    kw.kernelize(model, LAYERS)
    assert torch.equal(model.generate(IDS, **given), own)
    torch.testing.assert_close(logits(model, attention_mask=mask), masked, rtol=1e-5, atol=1e-5)
    assert fused


def test_hooks_on_children_are_called(fused):
    model = kw.kernelize(build(), LAYERS)
    layer = model.model.layers[0]
    seen = []
    for name in ("self_attn", "mlp", "input_layernorm"):
        layer.get_submodule(name).register_forward_hook(lambda module, args, result, name=name: seen.append(name))
    logits(model)
    assert seen == ["input_layernorm", "self_attn", "mlp"]
    assert len(fused) == 2
    layer.post_attention_layernorm.register_forward_pre_hook(lambda module, args: seen.append("norm"))
    logits(model)
    assert seen[3:] == ["input_layernorm", "self_attn", "norm", "mlp"]
    assert len(fused) == 3
    assert reasons(model) == [_fuse.APART]
    rows = [row for row in kw.report(model).rows if row.path == "model.layers.0"]
    assert any(_fuse.APART in str(row.fallbacks) for row in rows)


def test_hook_that_changes_what_a_norm_gives(fused):
    model = build()
    norm = model.model.layers[0].post_attention_layernorm
    handle = norm.register_forward_hook(lambda module, args, result: result * 2)
    own = logits(model)
    kw.kernelize(model, LAYERS)
    torch.testing.assert_close(logits(model), own, rtol=1e-5, atol=1e-5)
    handle.remove()
    assert not torch.allclose(logits(model), own)


def test_global_hooks_see_the_norm(fused):
    model = kw.kernelize(build(), LAYERS)
    seen = []
    hook = torch.nn.modules.module.register_module_forward_hook(lambda module, args, result: seen.append(type(module)))
    try:
        logits(model)
    finally:
        hook.remove()
    assert sum(cls.__name__ == "LlamaRMSNorm" for cls in seen) == 5
    assert not fused


def test_norm_with_its_own_code_runs_its_own_code(fused):
    model = kw.kernelize(build(), {**LAYERS, "RMSNorm@model.layers.0.*": None})
    logits(model)
    assert len(fused) == 1
    kw.unkernelize(model, paths=["model.layers.1.post_attention_layernorm"])
    logits(model)
    assert len(fused) == 1


def test_replaced_norm_is_called(fused):
    class Doubled(torch.nn.Module):
        def forward(self, x):
            return 2 * x

    model = kw.kernelize(build(), LAYERS)
    other = build()
    for each in (model, other):
        each.model.layers[0].post_attention_layernorm = Doubled()
    torch.testing.assert_close(logits(model), logits(other), rtol=1e-5, atol=1e-5)


def test_forward_replaced_on_the_norm(fused):
    model = build()
    kw.kernelize(model, LAYERS)
    norm = model.model.layers[0].post_attention_layernorm
    norm.forward = lambda x: torch.zeros_like(x)
    other = build()
    other.model.layers[0].post_attention_layernorm.forward = lambda x: torch.zeros_like(x)
    torch.testing.assert_close(logits(model), logits(other), rtol=1e-5, atol=1e-5)
    assert len(fused) == 1


def test_layers_keep_their_own_code_where_told(fused):
    model = kw.kernelize(build(), {"DecoderLayer": None})
    logits(model)
    assert not fused


def test_named_in_a_mapping_alone(fused):
    model = kw.kernelize(build(), kw.KernelConfig(LAYERS, inherit_mapping=False))
    own = logits(build())
    torch.testing.assert_close(logits(model), own, rtol=1e-5, atol=1e-5)
    assert not fused  # the norms keep their own code, so the sum and the norm run apart
    assert _fuse.APART in reasons(model)


def test_copies_run_their_own_norms(fused):
    model = build()
    own = logits(model)
    kw.kernelize(model, LAYERS)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.model.layers[0].post_attention_layernorm.weight.zero_()
    torch.testing.assert_close(logits(model), own, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(copied), own)
    assert len(fused) == 4


def test_an_error_in_a_child_is_not_run_again(fused):
    model = kw.kernelize(build(), LAYERS)
    calls = []

    def fail(module, args, kwargs):
        calls.append(1)
        raise RuntimeError("no")

    model.model.layers[0].self_attn.register_forward_pre_hook(fail, with_kwargs=True)
    with pytest.raises(RuntimeError, match="no"):
        logits(model)
    assert len(calls) == 1


def test_attention_outputs_are_kept():
    model = build()
    model.config._attn_implementation = "eager"
    own = model(IDS, output_attentions=True, output_hidden_states=True)
    kw.kernelize(model, LAYERS)
    ours = model(IDS, output_attentions=True, output_hidden_states=True)
    assert len(ours.attentions) == len(own.attentions) == 2
    torch.testing.assert_close(ours.attentions, own.attentions, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.hidden_states, own.hidden_states, rtol=1e-5, atol=1e-5)


def test_half_precision_errs_no_more():
    wide = build().double()
    exact = logits(wide)
    model = build().bfloat16()
    own = (logits(model).double() - exact).abs().mean()
    kw.kernelize(model, LAYERS)
    assert (logits(model).double() - exact).abs().mean() <= 1.25 * own


def test_layers_that_cannot_be_taken_apart_keep_their_code():
    class Layer(torch.nn.Module):
        """Hands its second argument to its attention only where it is not None, and something else otherwise."""

        def __init__(self):
            super().__init__()
            self.before, self.after = torch.nn.RMSNorm(32), torch.nn.RMSNorm(32)
            self.attention, self.mlp = torch.nn.Identity(), torch.nn.Linear(32, 32)
            self.mix = Mix()

        def forward(self, x, mask=None):
            x = x + self.mix(self.before(x), mask if mask is not None else 3)
            return x + self.mlp(self.after(x))

    class Mix(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = torch.nn.Linear(32, 32)

        def forward(self, x, mask):
            return self.proj(x) * mask

    model = torch.nn.Sequential(Layer())
    (layer,) = [layer for layer in kw.discover(model) if layer.name == "DecoderLayer"]
    assert dict(layer.recognition.options)["passing"] == "other"
    decisions = [d for d in kw.plan(model, LAYERS, on_miss="keep").decisions if d.layer.name == "DecoderLayer"]
    assert all(d.kernel is None and "supports passing plain" in d.reason for d in decisions)


@pytest.mark.parametrize("constant", [float("inf"), enum.IntEnum("Kind", {"CAUSAL": 1}).CAUSAL])
def test_a_constant_that_source_cannot_say_keeps_the_layers_code(constant):
    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = torch.nn.Linear(32, 32)

        def forward(self, x, bound):
            return self.proj(x).clamp(max=float(bound))

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.before, self.after = torch.nn.RMSNorm(32), torch.nn.RMSNorm(32)
            self.attention, self.mlp = Attention(), torch.nn.Linear(32, 32)

        def forward(self, x):
            x = x + self.attention(self.before(x), bound=constant)
            return x + self.mlp(self.after(x))

    model = torch.nn.Sequential(Layer())
    x = torch.randn(2, 3, 32)
    own = model(x)
    (layer,) = [layer for layer in kw.discover(model) if layer.name == "DecoderLayer"]
    assert dict(layer.recognition.options)["passing"] == "other"
    kw.kernelize(model, LAYERS, on_miss="keep")
    torch.testing.assert_close(model(x), own)


def test_small_inputs_run_the_layers_own_code(fused, monkeypatch):
    monkeypatch.setattr(kernels, "LEAST", IDS.numel() * 64 + 1, raising=False)
    model = kw.kernelize(build(), LAYERS)
    logits(model)
    assert not fused
    assert not reasons(model)
    with torch.no_grad():
        model(torch.cat([IDS, IDS]))
    assert len(fused) == 2


@pytest.mark.parametrize("bias", [True, False])
def test_sum_and_layer_norm(monkeypatch, bias):
    class Holder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.LayerNorm(48, bias=bias)

    layer = Holder()
    torch.nn.init.normal_(layer.norm.weight)
    computes = recognize(layer.norm)
    assert isinstance(computes, Recognition)
    monkeypatch.setattr(_fuse, "runs", lambda norm, kernel: True)
    calls = []
    alone, add = kernels.SUMS["layer_norm"]

    def counting(x, residual, weight, bias, eps, *, offset=0.0):
        calls.append(1)
        return add(x, residual, weight, bias, eps, offset=offset)

    sum_norm = _fuse._together("norm", computes, alone, counting)
    added, x = torch.randn(2, 5, 48), torch.randn(2, 5, 48)
    normed, h = sum_norm(layer, added, x)
    assert calls == [1]
    torch.testing.assert_close(h, x + added)
    torch.testing.assert_close(normed, layer.norm(x + added), rtol=1e-5, atol=1e-5)
