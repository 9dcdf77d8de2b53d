"""A model of a given shape (8 layers, random bfloat16 weights) from end to end on one GPU, all contenders in turns.

    python benchmarks/gpu_e2e.py [--shape llama] [--only eager,ours,...] [--layers 8] [--seconds 12] [--out FOLDER]

Shapes: `llama` (Llama-3-8B), `qwen3` (Qwen3-8B, with norms of q and k), `gemma3` (Gemma-3-4B: heads of 256, GEGLU, norms with
`1 + w`, half of the attention in windows, a vocabulary of 262,208 shared with the head).

Contenders share one set of weights: `eager` (transformers' own code); `ours` (`kernelwise.kernelize` with the rule for the head
and its loss); `ours-loss` (without that rule: what goes in unasked); `liger` (Liger's patch without its fused loss) and
`liger+loss` (as it is by default); `compile` (torch.compile of the model) and `ours+compile`. In every round each of them has
its turn, so a machine that is slower for a while is so for all: prefill of 1 x 4096 tokens, a training step (forward and
backward) of as many, 32 tokens decoded after 512 with a dynamic cache (`ours` with a `GrowingCache` too, as
`ours+growing`), and one step of decoding with a static cache in a CUDA graph. Who does not compute what eager computes is not
timed; the graphs hold what was compared in the races. `ours+compile` has no rule for the loss, which is for eager code. Written
are medians, and how many times as fast as eager each is, with the bounds of its 95 % confidence interval.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("USE_HUB_KERNELS", "NO")

from gpu_about import about, in_a_line
from transformers import Gemma3TextConfig, LlamaConfig, Qwen3Config, StaticCache
from transformers.models.gemma3.modeling_gemma3 import Gemma3ForCausalLM
from transformers.models.llama.modeling_llama import LlamaForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3ForCausalLM

from kernelwise._evidence import Comparison
from kernelwise._measuring._compare import compare
from kernelwise._measuring._contenders import compile_limits, contender, liger
from kernelwise._measuring._race import Contender, race
from kernelwise._measuring._workload import Workload, workloads_of
from kernelwise.integrations.transformers import GrowingCache

TOKENS = 4096
PROMPT = 512  # tokens before decoding
STEPS = 32
CONFIGS = {"ours": {"LinearCrossEntropy": "builtin:LinearCrossEntropy"}, "ours-loss": {}}
CONTENDERS = ("eager", "ours", "ours-loss", "ours+growing", "liger", "liger+loss", "compile", "ours+compile")
COMPILED = ("compile", "ours+compile")

_SHAPES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (
        LlamaForCausalLM,
        LlamaConfig,
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        },
    ),
    "qwen3": (
        Qwen3ForCausalLM,
        Qwen3Config,
        {
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151936,
            "rms_norm_eps": 1e-6,
        },
    ),
    "gemma3": (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        {
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "vocab_size": 262208,
            "sliding_window": 1024,
        },
    ),
}
SHAPES = tuple(_SHAPES)


def build(shape: str, layers: int, device: str = "cuda", **sizes: Any) -> Any:
    cls, config_cls, of_shape = _SHAPES[shape]
    options = {**of_shape, "num_hidden_layers": layers, "max_position_embeddings": 8192, **sizes}
    if shape == "gemma3":
        options["layer_types"] = ["sliding_attention", "full_attention"] * (layers // 2)
    torch.manual_seed(0)
    with torch.device(device):
        model = cls._from_config(config_cls(**options), dtype=torch.bfloat16, attn_implementation="sdpa")
    return model.eval()


def made(model: Any, name: str, *, training: bool) -> Contender:
    if name == "ours+growing":
        found = contender(model, "ours-loss", training=training, configs=CONFIGS)
        return Contender(with_growing_cache(found.model))
    if name == "liger":
        return liger(model, fused_linear_cross_entropy=False, cross_entropy=False)
    if name in COMPILED:
        known = {"compile": "torch.compile"}
        return contender(model, known.get(name, name), training=training, configs={"ours": {}})
    return contender(model, name.removesuffix("+loss"), training=training, configs=CONFIGS)


def with_growing_cache(model: Any) -> Any:
    """The model, which makes itself a cache with room where it is given none."""
    own = model.forward

    def forward(*args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        if past_key_values is None:
            past_key_values = GrowingCache(config=model.config)
        return own(*args, past_key_values=past_key_values, **kwargs)

    model.forward = forward
    return model


def raced(model: Any, workload: Workload, names: Iterable[str], seconds: float, device: str) -> dict[str, Any]:
    """What each contender takes for a workload, or why it has no figures."""
    ready: dict[str, Contender] = {}
    found: dict[str, Any] = {}
    for name in names:
        try:
            ready[name] = made(model, name, training=workload.training)
        except Exception as error:  # a peer that fails is a finding, not the end of the run
            found[name] = f"{type(error).__name__}: {error}"[:300]
    with compile_limits():
        runs = race(ready, workload, device=device, seconds=seconds, own="eager")
    found |= {run.contender: run.comparison or str(run.error) for run in runs}
    torch._dynamo.reset()
    return found


def decoding_in_a_graph(model: Any, ids: torch.Tensor, names: Iterable[str], seconds: float) -> dict[str, Any]:
    """One step of decoding with a static cache, each contender's in a CUDA graph of its own."""
    found: dict[str, Any] = {}
    calls: dict[str, Callable[[], object]] = {}
    kept = []
    for name in names:
        try:
            one = made(model, name, training=False)
            calls[name] = captured(one.call or one.model, one.model.config, ids)
            kept.append(one)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"[:300]
    return {**compare(calls, own="eager", device="cuda", seconds=seconds), **found}


@torch.no_grad()
def captured(call: Callable[..., Any], config: Any, ids: torch.Tensor) -> Callable[[], object]:
    cache = StaticCache(config=config, max_cache_len=1024)
    call(input_ids=ids[:, :PROMPT], past_key_values=cache, use_cache=True, logits_to_keep=1)
    token = ids[:, :1].clone()
    position = torch.full((1, 1), PROMPT, device=ids.device, dtype=torch.long)
    # A cache that counts on the device what it holds would be full after some replays.
    counts = [
        t for layer in cache.layers for t in vars(layer).values() if isinstance(t, torch.Tensor) and t.numel() == 1
    ]
    begun = [count.clone() for count in counts]

    def step() -> torch.Tensor:
        if counts:
            torch._foreach_copy_(counts, begun)
        output = call(input_ids=token, past_key_values=cache, position_ids=position, use_cache=True)
        best: torch.Tensor = output.logits[:, -1:].argmax(-1)
        return best

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step()

    def replay() -> object:
        graph.replay()
        return token, position, cache, counts, begun  # what it reads, which must not be freed before it

    return replay


def figures(work: str, found: Mapping[str, Any], calls: int = 1) -> dict[str, dict[str, Any]]:
    """Of each contender what the tables of the docs show of one kind of work; `calls` are those of one run."""
    shown: dict[str, dict[str, Any]] = {}
    for name, one in found.items():
        if not isinstance(one, Comparison):
            shown[name] = {f"{work}_error": one}
            continue
        shown[name] = {f"{work}_ms": one.us / 1e3 / calls, f"{work}_speedup": [one.speedup, one.low, one.high]}
        if one.peak is not None and calls == 1:
            shown[name][f"{work}_extra_gb"] = one.peak / 2**30
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(CONTENDERS), help="contenders, eager among them")
    parser.add_argument("--shape", choices=SHAPES, default="llama")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=12, help="for the turns of each kind of work")
    parser.add_argument("--out", type=Path, default=None, help="folder for gpu_e2e.json and gpu_e2e.txt")
    arguments = parser.parse_args()
    if "eager" not in arguments.only.split(","):
        parser.error("--only: eager must be among them, all are compared with it")
    said = about()
    lines = [in_a_line(said)]
    print(lines[0], flush=True)
    model = build(arguments.shape, arguments.layers)
    generator = torch.Generator("cuda").manual_seed(1)
    ids = torch.randint(0, model.config.vocab_size, (1, TOKENS), device="cuda", generator=generator)
    names = arguments.only.split(",")
    eager_ones = [name for name in names if name not in COMPILED]
    # "loss" of the contenders' names is of training alone, and decoding is compiled with other caches: kernelwise bench.
    alike = [name for name in names if name not in ("ours-loss", "liger+loss")]
    results: dict[str, dict[str, Any]] = {name: {} for name in names}

    def take(work: str, found: Mapping[str, Any], calls: int = 1) -> None:
        for name, figure in figures(work, found, calls).items():
            results[name] |= figure
            lines.append(f"{work:8s} {name:13s} " + "  ".join(f"{k} {_text(v)}" for k, v in figure.items()))
            print(lines[-1], flush=True)
        if arguments.out:
            arguments.out.mkdir(parents=True, exist_ok=True)
            (arguments.out / "gpu_e2e.json").write_text(json.dumps({**said, "variants": results}, indent=1) + "\n")
            (arguments.out / "gpu_e2e.txt").write_text("\n".join(lines) + "\n")

    of_all = {"seconds": arguments.seconds, "device": "cuda"}
    (prefill,) = workloads_of(model, ids, ["prefill"])
    take("prefill", raced(model, prefill, [n for n in alike if n != "ours+growing"], **of_all))
    (decode,) = workloads_of(model, ids[:, :PROMPT], ["decode"], steps=STEPS)
    take("decode_dynamic", raced(model, decode, [n for n in alike if n in eager_ones], **of_all), calls=STEPS)
    in_graphs = [name for name in alike if name in eager_ones and name != "ours+growing"]
    take("decode_graph", decoding_in_a_graph(model, ids, in_graphs, 3.0))
    (training,) = workloads_of(model, ids, ["training"])
    take("train", raced(model, training, [n for n in names if n != "ours+growing"], **of_all))


def _text(value: Any) -> str:
    if isinstance(value, list):
        return f"{value[0]:.3f} ({value[1]:.3f} to {value[2]:.3f})"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
