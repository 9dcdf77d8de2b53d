"""The main job on a GPU: kernelize a transformers model, compare, train, compile, undo."""

from __future__ import annotations

import pytest
import torch

import kernelwise as kw

pytestmark = pytest.mark.gpu


@pytest.fixture
def model() -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=704, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    torch.manual_seed(0)
    built = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if "norm" in name:  # all-ones weights hide a kernel that ignores them
                parameter.uniform_(0.5, 1.5)
    return built.to("cuda", torch.bfloat16).eval()


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 512, (2, 64), generator=torch.Generator().manual_seed(1)).cuda()


def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(ids).logits
    return out


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def test_every_layer_gets_its_triton_kernel_and_undo_is_bit_exact(model: torch.nn.Module, ids: torch.Tensor) -> None:
    own = logits(model, ids)
    exact = logits(model.double(), ids)
    model.bfloat16()
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    kw.kernelize(model)
    rows = kw.report(model).rows
    kernels = {row.name: row.kernel for row in rows if row.kernel}
    assert kernels == {f"{n}": f"builtin:{n}" for n in ("RMSNorm", "SwiGLUMLP", "rotary_pos_emb")}
    with_kernels = logits(model, ids)
    assert not torch.equal(with_kernels, own)  # other code ran
    assert error(with_kernels, exact) <= 1.5 * error(own, exact)
    assert all(not row.fallbacks for row in kw.report(model).rows)
    kw.unkernelize(model)
    assert {name: dict(module.__dict__) for name, module in model.named_modules()} == before
    assert torch.equal(logits(model, ids), own)


def test_gradients_agree(model: torch.nn.Module, ids: torch.Tensor) -> None:
    model.train()

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    own = gradients()
    model.double()
    exact = gradients()
    model.bfloat16()
    with kw.kernelized(model):
        ours = gradients()
    assert ours.keys() == own.keys()
    worst = {name: error(ours[name], exact[name]) / max(error(own[name], exact[name]), 2e-3) for name in own}
    assert max(worst.values()) <= 2, max(worst, key=worst.get)


def test_compiles_without_a_graph_break_and_captures_in_a_graph(model: torch.nn.Module, ids: torch.Tensor) -> None:
    own = logits(model, ids)
    kw.kernelize(model)
    ours = logits(model, ids)
    compiled = torch.compile(model, fullgraph=True)
    assert error(logits(compiled, ids), ours) < 2 * max(error(ours, own), 1e-2)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), torch.no_grad():
        for _ in range(3):
            model(ids, use_cache=False)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = model(ids, use_cache=False).logits
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, ours)


def test_a_model_moved_to_the_cpu_afterwards_runs_its_own_code(model: torch.nn.Module, ids: torch.Tensor) -> None:
    kw.kernelize(model)
    model.cpu()
    assert torch.isfinite(logits(model, ids.cpu())).all()
    assert any(row.fallbacks for row in kw.report(model).rows)


def test_layer_norm_and_written_out_activations(ids: torch.Tensor) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    built = GPT2LMHeadModel(GPT2Config(vocab_size=512, n_positions=256, n_embd=128, n_layer=2, n_head=4))
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if "ln_" in name:
                parameter.add_(torch.rand_like(parameter))
    gpt = built.to("cuda", torch.bfloat16).eval()
    own = logits(gpt, ids)
    exact = logits(gpt.double(), ids)
    gpt.bfloat16()
    kw.kernelize(gpt)
    kernels = {row.name: row.kernel for row in kw.report(gpt).rows if row.kernel}
    assert kernels == {name: f"builtin:{name}" for name in ("LayerNorm", "NewGELU")}
    assert error(logits(gpt, ids), exact) <= 1.5 * error(own, exact)
    gpt.train()
    for module in gpt.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    gpt(ids, labels=ids).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in gpt.parameters() if p.requires_grad)
    assert all(not row.fallbacks for row in kw.report(gpt).rows)
    kw.unkernelize(gpt)
    gpt.eval()
    assert torch.equal(logits(gpt, ids), own)
