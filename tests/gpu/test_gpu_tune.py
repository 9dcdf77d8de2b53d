"""Tuning on a GPU: what is chosen is right, goes in as it is, and is not slower than what there was before."""

from __future__ import annotations

import pytest
import torch

import kernelwise as kw

transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.alone,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("KERNELWISE_CACHE", str(tmp_path))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text"])
def test_a_tuned_model_is_right_and_not_slower(kind):
    config = transformers.AutoConfig.for_model(
        kind,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=2,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=128,
        vocab_size=32000,
    )
    with torch.device("cuda"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    ids = torch.randint(0, 32000, (2, 512), device="cuda")
    workloads = ["prefill", "decode", "training"]
    tuned = kw.tune(model, {"input_ids": ids}, workload=workloads, contenders=[], seconds=50)
    evidence = tuned.evidence
    assert evidence is not None
    print(evidence)
    assert evidence.seconds < 100  # the least that is raced, and a candidate that was begun, come on top
    found = {run.workload: run for run in evidence.runs if run.contender == "tuned"}
    assert set(found) == {"prefill", "decode", "training"}
    for run in found.values():
        assert run.comparison is not None, run.error
        assert run.comparison.speedup > 0.97
    assert any(candidate.timings for choice in evidence.choices for candidate in choice.candidates)
    with torch.no_grad():
        own = model(ids).logits
        kw.kernelize(model, tuned)
        assert torch.allclose(model(ids).logits.float(), own.float(), atol=0.1, rtol=0.05)
