"""The head with its loss on a GPU: as exact as the own code, without the memory of the logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import kernelwise as kw
from kernelwise._applying._lazy_logits import READ, LazyLogits
from kernelwise._applying._logit_source import KEPT

pytestmark = pytest.mark.gpu

VOCABULARY, TOKENS = 32064, 2048
RULE = {"LinearCrossEntropy": "builtin:LinearCrossEntropy"}


def build(dtype: torch.dtype, **options: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=512, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, **options,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to("cuda", dtype).train()


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(VOCABULARY, (2, TOKENS // 2), generator=torch.Generator().manual_seed(1)).cuda()
    labels = ids.clone()
    labels[0, :100] = -100
    return {"input_ids": ids, "labels": labels}


def step(model: Any, **more: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss = model(**batch(), **more).loss
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad.clone() for name, p in model.named_parameters()}}


def fallbacks(model: Any) -> dict[str, int]:
    (row,) = (r for r in kw.report(model).rows if r.name == "LinearCrossEntropy" and r.mode == "training")
    assert row.kernel == "builtin:LinearCrossEntropy"
    return dict(row.fallbacks)


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact.double()).norm() / exact.double().norm())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("more", [{}, {"num_items_in_batch": 1901}], ids=["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_is_as_exact_as_without(dtype: torch.dtype, more: dict[str, Any], tied: bool) -> None:
    model = build(dtype, tie_word_embeddings=tied)
    own = step(model, **more)
    exact = step(build(dtype, tie_word_embeddings=tied).double(), **more)
    kw.kernelize(model, {**RULE, "RMSNorm": "none", "SwiGLUMLP": "none"})
    found = step(model, **more)
    assert fallbacks(model) == {}
    for name, value in found.items():
        floor = 1e-6 if dtype is torch.float32 else 1e-3
        assert error(value, exact[name]) <= max(2 * error(own[name], exact[name]), floor), name


def test_the_logits_take_no_memory() -> None:
    model = build(torch.bfloat16)

    def peak() -> int:
        step(model)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(model)
        return torch.cuda.max_memory_allocated() - before

    in_float32 = VOCABULARY * TOKENS * 4
    assert peak() > 2 * in_float32
    kw.kernelize(model, RULE)
    assert peak() < in_float32


def test_logits_are_those_of_the_head_when_they_are_read() -> None:
    model = build(torch.bfloat16)
    kw.kernelize(model, RULE)
    hidden = model.model(batch()["input_ids"]).last_hidden_state
    expected = model.lm_head(hidden)
    found = model(**batch())
    assert type(found.logits) is LazyLogits
    assert found.logits.is_cuda
    torch.testing.assert_close(found.logits.argmax(-1), expected.argmax(-1))
    assert torch.equal(found.logits.cpu(), expected.cpu())
    assert fallbacks(model) == {READ: 1}
    held = model(**batch())
    held.loss.backward()
    torch.optim.AdamW(model.parameters(), lr=1.0, fused=True).step()
    assert torch.equal(held.logits, expected)
    assert fallbacks(model) == {READ: 1, KEPT: 1}


def test_a_scaler_for_float16_works() -> None:
    model = build(torch.float32)
    model.lm_head.half()
    model.model.half()
    own = model(**batch()).loss
    (expected,) = torch.autograd.grad(own * 1024, model.lm_head.weight)
    kw.kernelize(model, RULE)
    (found,) = torch.autograd.grad(model(**batch()).loss * 1024, model.lm_head.weight)
    assert fallbacks(model) == {}
    assert error(found, expected) < 1e-2


def test_compiled_models_run_the_own_code() -> None:
    torch._dynamo.reset()
    model = build(torch.bfloat16)
    kw.kernelize(model, RULE)
    found = torch.compile(model, fullgraph=True)(**batch(), use_cache=False)
    assert type(found.logits) is torch.Tensor
    assert error(found.loss, model(**batch()).loss) < 1e-2
