"""The CPU attention kernel as an attention implementation of transformers."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AttentionInterface, DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

import kernelwise
from kernelwise.integrations import _attention
from kernelwise.integrations import transformers as integration
from kernelwise.kernels import cpu

NAME = _attention.NAME
needs_kernel = pytest.mark.skipif(
    bool(cpu.why_unavailable()) or cpu.isa() == "baseline", reason="there is no such kernel here"
)


def build(dtype=torch.bfloat16, **options):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=200, **options,
    )  # fmt: skip
    return LlamaForCausalLM._from_config(config, dtype=dtype, attn_implementation="sdpa").eval()


@pytest.fixture
def count(monkeypatch):
    """Counts how often the kernel is asked."""
    asked = []
    kernel = _attention._kernel()

    def counting(*args, **kwargs):
        asked.append(kwargs)
        return kernel(*args, **kwargs)

    monkeypatch.setattr(_attention, "_kernel", lambda: counting)
    return asked


TOKENS = torch.arange(14).reshape(2, 7)
PADDING = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("given", [{}, {"attention_mask": PADDING}], ids=["causal", "padded"])
def test_a_model_gives_what_it_gives_with_sdpa(dtype, given, count):
    model = build(dtype)
    with torch.no_grad():
        before = model(TOKENS, **given).logits
        model.set_attn_implementation(NAME)
        after = model(TOKENS, **given).logits
        model.set_attn_implementation("sdpa")
        again = model(TOKENS, **given).logits
    assert len(count) == 2
    assert torch.equal(again, before)
    seen = given.get("attention_mask", torch.ones(2, 7)).bool()
    torch.testing.assert_close(after[seen], before[seen], atol=3e-2 if dtype == torch.bfloat16 else 1e-4, rtol=1e-2)
    assert not torch.equal(after, before) or dtype == torch.float32


@needs_kernel
@pytest.mark.parametrize("cache", [DynamicCache, StaticCache])
def test_generation_with_either_cache_is_that_of_sdpa(cache, count):
    model = build(torch.float32)
    found = []
    for name in ("sdpa", NAME):
        model.set_attn_implementation(name)
        options = {"max_cache_len": 16} if cache is StaticCache else {}
        kept = cache(config=model.config, **options)
        made = model.generate(TOKENS[:1], past_key_values=kept, max_new_tokens=6, do_sample=False, pad_token_id=0)
        found.append(made)
    assert torch.equal(*found)
    assert len(count) == 12


@needs_kernel
def test_training_gives_the_gradients_of_sdpa(count):
    model = build(torch.bfloat16).train()
    gradients = []
    for name in ("sdpa", NAME):
        model.set_attn_implementation(name)
        model.zero_grad()
        model(TOKENS.repeat(1, 2), labels=TOKENS.repeat(1, 2)).loss.backward()
        gradients.append([p.grad.float() for p in model.parameters()])
    assert len(count) == 2
    for a, b in zip(*gradients, strict=True):
        assert (a - b).norm() <= 3e-2 * a.norm() + 1e-6


@needs_kernel
@pytest.mark.parametrize(
    "given",
    [{"dropout": 0.1}, {"position_bias": torch.zeros(1, 4, 7, 7)}, {"output_attentions": True}],
    ids=lambda given: next(iter(given)),
)
def test_what_the_kernel_does_not_take_goes_to_sdpa(given, count):
    q, k, v = torch.randn(3, 1, 4, 7, 16)
    y, none = _attention.attention_forward(torch.nn.Module(), q, k, v, None, **given)
    assert not count
    assert y.shape == (1, 7, 4, 16)
    assert none is None
    _attention.attention_forward(torch.nn.Module(), q, k, v, None, output_attentions=False)
    assert len(count) == 1


def test_without_the_library_it_is_sdpa(monkeypatch):
    monkeypatch.setattr(_attention, "_kernel", lambda: None)
    model = build()
    with torch.no_grad():
        before = model(TOKENS).logits
        model.set_attn_implementation(NAME)
        assert torch.equal(model(TOKENS).logits, before)


def test_a_model_that_cannot_run_with_sdpa_refuses_it():
    class Other(LlamaForCausalLM):
        _supports_sdpa = False

    with pytest.raises(ValueError, match="scaled_dot_product_attention"):
        Other(build().config).set_attn_implementation(NAME)
    with pytest.raises(ValueError, match="scaled_dot_product_attention"):
        Other._from_config(build().config, attn_implementation=NAME)


def test_a_saved_model_does_not_name_it(tmp_path):
    model = build()
    model.save_pretrained(tmp_path / "before")
    model.set_attn_implementation(NAME)
    model.save_pretrained(tmp_path / "after")
    assert json.loads((tmp_path / "after/config.json").read_text()) == json.loads(
        (tmp_path / "before/config.json").read_text()
    )
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "after", attn_implementation=NAME)
    assert loaded.config._attn_implementation == NAME


def test_it_stays_known_when_the_rest_is_taken_out():
    try:
        integration.unpatch()
        assert NAME in AttentionInterface().valid_keys()
    finally:
        integration.patch()


@needs_kernel
def test_beside_kernels_of_layers(count):
    model = build()
    with torch.no_grad():
        before = model(TOKENS).logits
        kernelwise.kernelize(model)
        model.set_attn_implementation(NAME)
        during = model(TOKENS).logits
        kernelwise.unkernelize(model)
        model.set_attn_implementation("sdpa")
        assert torch.equal(model(TOKENS).logits, before)
    assert len(count) == 2
    torch.testing.assert_close(during, before, atol=5e-2, rtol=2e-2)
