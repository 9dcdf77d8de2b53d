"""A model of a given shape (8 layers, random bfloat16 weights) from end to end on one GPU.

    python benchmarks/gpu_e2e.py [--shape llama] [--variants eager,ours,...] [--layers 8] [--seconds 400] [--out FOLDER]

Shapes: `llama` (Llama-3-8B), `qwen3` (Qwen3-8B, with norms of q and k), `gemma3` (Gemma-3-4B: heads of 256, GEGLU, norms with
`1 + w`, half of the attention in windows, a vocabulary of 262,208 shared with the head).

Variants: `eager`; `ours` (`kernelwise.kernelize`: RMS norm, gated MLP, rotary embedding, and by a rule the head with its
loss); `ours-loss` (what goes in unasked: with its own head and loss); `ours+add` (as `ours`, and the second norm of a layer
fused with the addition before it, by hand, for llama); `compile` (torch.compile of the model); `ours+compile`; `liger`
(apply_liger_kernel_to_llama without its fused loss, and with it as `liger+loss`). Each measures prefill of 1 x 4096 tokens,
decoding with a dynamic cache (a Python loop; `ours` with a `GrowingCache` too) and with a static cache and the whole step in
one CUDA graph, and a training step (forward and backward) of 1 x 4096. Logits, loss and gradient norms are compared with those
of `eager`.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("USE_HUB_KERNELS", "NO")
sys.path.insert(0, str(Path(__file__).resolve().parent))

from gpu_about import about, in_a_line
from transformers import DynamicCache, Gemma3TextConfig, LlamaConfig, Qwen3Config, StaticCache
from transformers.models.gemma3 import modeling_gemma3 as gemma3
from transformers.models.llama import modeling_llama as llama
from transformers.models.qwen3 import modeling_qwen3 as qwen3

import kernelwise
from kernelwise.integrations.transformers import GrowingCache
from kernelwise.kernels.triton.add_rms_norm import add_rms_norm

START = time.time()
TOKENS = 4096
PROMPT = 512  # tokens before decoding
STEPS = 64
MODULES = {"llama": llama, "qwen3": qwen3, "gemma3": gemma3}
WATCHED = ("lm_head.weight", "model.norm.weight", "model.layers.0.mlp.gate_proj.weight")


def build(shape: str, layers: int) -> Any:
    common = {"num_hidden_layers": layers, "max_position_embeddings": 8192}
    if shape == "gemma3":
        config: Any = Gemma3TextConfig(
            hidden_size=2560,
            intermediate_size=10240,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=256,
            vocab_size=262208,
            sliding_window=1024,
            layer_types=["sliding_attention", "full_attention"] * (layers // 2),
            **common,
        )
        cls: Any = gemma3.Gemma3ForCausalLM
    elif shape == "qwen3":
        config = Qwen3Config(
            hidden_size=4096,
            intermediate_size=12288,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            vocab_size=151936,
            rms_norm_eps=1e-6,
            **common,
        )
        cls = qwen3.Qwen3ForCausalLM
    else:
        config = LlamaConfig(
            hidden_size=4096,
            intermediate_size=14336,
            num_attention_heads=32,
            num_key_value_heads=8,
            vocab_size=128256,
            rms_norm_eps=1e-5,
            **common,
        )
        config.rope_parameters = {"rope_type": "default", "rope_theta": 500000.0}
        cls = llama.LlamaForCausalLM
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = cls._from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    return model.eval()


def fused_layer(
    self: Any, hidden_states: Any, attention_mask: Any = None, position_ids: Any = None, past_key_values: Any = None,
    use_cache: Any = False, position_embeddings: Any = None, **kwargs: Any,
) -> Any:  # fmt: skip
    """LlamaDecoderLayer.forward with the first addition in the second norm."""
    attended, _ = self.self_attn(
        hidden_states=self.input_layernorm(hidden_states),
        attention_mask=attention_mask,
        position_ids=position_ids,
        past_key_values=past_key_values,
        use_cache=use_cache,
        position_embeddings=position_embeddings,
        **kwargs,
    )
    norm = self.post_attention_layernorm
    normed, residual = add_rms_norm(attended, hidden_states, norm.weight, norm.variance_epsilon)
    return residual + self.mlp(normed)


@contextmanager
def patched(variant: str, shape: str) -> Iterator[None]:
    """The module of transformers that has the shape's classes as `variant` has it, and back as it was."""
    module = MODULES[shape]
    classes = {name: value for name, value in vars(module).items() if isinstance(value, type)}
    forwards = {name: vars(cls)["forward"] for name, cls in classes.items() if "forward" in vars(cls)}
    functions = {name: value for name, value in vars(module).items() if callable(value) and name not in classes}
    if "add" in variant:
        llama.LlamaDecoderLayer.forward = fused_layer
    elif variant.startswith("liger"):
        import liger_kernel.transformers as liger

        names = {"llama": "llama", "qwen3": "qwen3", "gemma3": "gemma3_text"}
        patch = getattr(liger, f"apply_liger_kernel_to_{names[shape]}")
        patch(fused_linear_cross_entropy="loss" in variant, cross_entropy=False)
    try:
        yield
    finally:
        for name, value in {**classes, **functions}.items():
            setattr(module, name, value)
        for name, forward in forwards.items():
            classes[name].forward = forward


def median_ms(step: Callable[[], Any], repeats: int = 5, warm: int = 2) -> float:
    for _ in range(warm):
        step()
    torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        step()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return statistics.median(times) * 1e3


def extra_gb(step: Callable[[], Any]) -> float:
    """Memory at its peak during `step`, over what was held before."""
    gc.collect()
    torch.cuda.empty_cache()
    base = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return float((torch.cuda.max_memory_allocated() - base) / 2**30)


def decode_dynamic_ms(model: Any, ids: torch.Tensor, kind: type[DynamicCache] = DynamicCache) -> float:
    def run(steps: int) -> float:
        cache, token = kind(config=model.config), ids[:, :1]
        model(input_ids=ids[:, :PROMPT], past_key_values=cache, use_cache=True, logits_to_keep=1)
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(steps):
            output = model(input_ids=token, past_key_values=cache, use_cache=True)
            token = output.logits[:, -1:].argmax(-1)
        torch.cuda.synchronize()
        return (time.perf_counter() - begin) / steps * 1e3

    run(4)
    return min(run(STEPS), run(STEPS), run(STEPS))


def decode_graph_ms(model: Any, ids: torch.Tensor) -> float:
    cache = StaticCache(config=model.config, max_cache_len=1024)
    model(input_ids=ids[:, :PROMPT], past_key_values=cache, use_cache=True, logits_to_keep=1)
    token = ids[:, :1].clone()
    position = torch.full((1, 1), PROMPT, device="cuda", dtype=torch.long)

    def step() -> torch.Tensor:
        output = model(input_ids=token, past_key_values=cache, position_ids=position, use_cache=True)
        return output.logits[:, -1:].argmax(-1)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step()
    return median_ms(graph.replay, repeats=40, warm=3)


def run_variant(variant: str, shape: str, layers: int, reference: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    compiled = "compile" in variant
    model = build(shape, layers)
    if variant.startswith("ours"):
        kernelwise.kernelize(
            model, None if variant == "ours-loss" else {"LinearCrossEntropy": "builtin:LinearCrossEntropy"}
        )
        found["kernels"] = sorted({row.kernel for row in kernelwise.report(model).rows if row.kernel})
    ids = torch.randint(
        0, model.config.vocab_size, (1, TOKENS), device="cuda", generator=torch.Generator("cuda").manual_seed(1)
    )

    def prepared() -> Any:
        torch._dynamo.reset()
        return torch.compile(model, dynamic=False) if compiled else model

    with torch.no_grad():
        call = prepared()

        def prefill() -> torch.Tensor:
            logits: torch.Tensor = call(input_ids=ids, use_cache=not compiled, logits_to_keep=1).logits
            return logits

        logits = prefill().float()
        expected = reference.setdefault("logits", logits)
        found["logits_relative_difference"] = float((logits - expected).norm() / expected.norm())
        found["prefill_ms"] = median_ms(prefill, repeats=20)
        found["prefill_extra_gb"] = extra_gb(prefill)
        if not compiled:
            found["decode_dynamic_ms"] = decode_dynamic_ms(model, ids)
            found["decode_graph_ms"] = decode_graph_ms(model, ids)
            if variant.startswith("ours"):
                found["decode_growing_ms"] = decode_dynamic_ms(model, ids, GrowingCache)
    model.train()
    call = prepared()

    def step() -> torch.Tensor:
        loss = call(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        return loss.detach()

    def train() -> None:
        step()
        model.zero_grad(set_to_none=True)

    found["loss"] = float(step())
    norms = {n: float(p.grad.float().norm()) for n, p in model.named_parameters() if n in WATCHED}
    model.zero_grad(set_to_none=True)
    expected = reference.setdefault("norms", norms)
    found["largest_gradient_norm_difference"] = max(abs(norms[n] / expected[n] - 1) for n in norms)
    found["train_ms"] = median_ms(train, repeats=10)
    found["train_extra_gb"] = extra_gb(train)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", default="eager,ours,ours-loss,ours+add,liger,liger+loss,compile,ours+compile")
    parser.add_argument("--shape", choices=tuple(MODULES), default="llama")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=400, help="stop starting new variants after this long")
    parser.add_argument("--out", type=Path, default=None, help="folder for gpu_e2e.json and gpu_e2e.txt")
    arguments = parser.parse_args()
    said = about()
    lines = [in_a_line(said)]
    print(lines[0], flush=True)
    reference: dict[str, Any] = {}
    results: dict[str, dict[str, Any]] = {}
    for variant in arguments.variants.split(","):
        if arguments.seconds - (time.time() - START) < (70 if "compile" in variant else 25):
            print(f"{variant}: skipped for lack of time")
            continue
        try:
            with patched(variant, arguments.shape):
                results[variant] = run_variant(variant, arguments.shape, arguments.layers, reference)
        except Exception as error:  # one variant that fails must not end the run
            results[variant] = {"error": f"{type(error).__name__}: {error}"[:300]}
        shown = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in results[variant].items())
        lines.append(f"{variant:13s} {shown}")
        print(lines[-1], flush=True)
        gc.collect()
        torch.cuda.empty_cache()
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "gpu_e2e.json").write_text(json.dumps({**said, "variants": results}, indent=1) + "\n")
        (arguments.out / "gpu_e2e.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
