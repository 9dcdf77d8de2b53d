"""A language model from end to end on the CPU, own code and kernels side by side: `python benchmarks/cpu_e2e.py`.

The model has the shape of SmolLM2-135M (30 layers, random weights). Contenders: `eager`, transformers as it comes (SDPA
attention, growing cache); `ours`, the same after `kernelwise.kernelize` with a rule for the head with its loss;
`ours-loss`, without that rule; `compile`, torch.compile of the whole model, in decoding with
transformers' static cache; `ours+compile`. Transformers' own kernels are not among them: it fetches them from the Hub, and
has none for CPUs.

Work: `prefill` of 1 x 512 tokens; `decode` of 16 tokens after 128, one row; `decode8`, the same for 8 rows; `train`, a step
of 2 x 256 tokens, forward and backward. Contenders take turns, so that whatever else the machine does meets them alike;
a result is the median over the rounds of (time of eager / time of the contender), with the quartiles. The time until a
contender's first result (for torch.compile: compiling) is given beside it. What no time was left for is named in the file.

    python benchmarks/cpu_e2e.py                                            # eager and ours, about 3 minutes
    python benchmarks/cpu_e2e.py --contenders eager ours compile --dtypes float32 --work prefill decode

To see what another processor would gain, limit what torch, oneDNN and MKL may use:
    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 python benchmarks/cpu_e2e.py
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import os
import resource
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("USE_HUB_KERNELS", "NO")

import torch
import transformers
from cpu_ops import DTYPES, machine
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

import kernelwise

PREFILL, PROMPT, STEPS, TRAIN = 512, 128, 16, (2, 256)
CONTENDERS = ("eager", "ours", "ours-loss", "compile", "ours+compile")
WORK = ("prefill", "decode", "decode8", "train")


@dataclass(frozen=True, slots=True)
class Result:
    work: str
    dtype: str
    contender: str
    eager_ms: float
    contender_ms: float
    speedup: float
    speedup_quartiles: tuple[float, float]
    rounds: int
    first_result_s: float


def build(layers: int, dtype: torch.dtype, contenders: list[str]) -> Any:
    """The model of eager, and kernelized ones with the same numbers."""
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        use_cache=False,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
    models = {
        "eager": model,
        "ours": kernelwise.kernelize(copy.deepcopy(model), {"LinearCrossEntropy": "builtin:LinearCrossEntropy"}),
    }
    if "ours-loss" in contenders:
        models["ours-loss"] = kernelwise.kernelize(copy.deepcopy(model))
    return models


def call_of(work: str, contender: str, models: dict[str, Any]) -> Callable[[], float]:
    """A function that does the work once and returns its seconds, set-up not counted."""
    model = models[contender.removesuffix("+compile").replace("compile", "eager")]
    compiled = "compile" in contender
    run = torch.compile(model) if compiled else model
    torch.manual_seed(1)

    def prefill() -> float:
        with torch.no_grad():
            start = time.perf_counter()
            run(tokens, logits_to_keep=1)
            return time.perf_counter() - start

    def decode() -> float:
        rows = len(tokens)
        with torch.no_grad():
            length = PROMPT + STEPS + 8
            cache = StaticCache(config=model.config, max_cache_len=length) if compiled else DynamicCache()
            model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
            token = torch.ones(rows, 1, dtype=torch.long)
            start = time.perf_counter()
            for _ in range(STEPS):
                token = run(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
            return time.perf_counter() - start

    def train() -> float:
        model.zero_grad()
        start = time.perf_counter()
        run(tokens, labels=tokens).loss.backward()
        return time.perf_counter() - start

    shape = {"prefill": (1, PREFILL), "decode": (1, PROMPT), "decode8": (8, PROMPT), "train": TRAIN}[work]
    tokens = torch.randint(0, 49152, shape)
    return {"prefill": prefill, "decode": decode, "decode8": decode, "train": train}[work]


def race(work: str, dtype: str, models: dict[str, Any], contenders: list[str], seconds: float) -> list[Result]:
    """Time the contenders of one piece of work in turns, for at most so many seconds after each one's first result."""
    torch._dynamo.reset()
    calls = {name: call_of(work, name, models) for name in contenders}
    first = {}
    for name, call in calls.items():
        start = time.perf_counter()
        call()
        first[name] = time.perf_counter() - start
        if "compile" in name:
            call()  # a second shape or a second graph may be compiled then
    times: dict[str, list[float]] = {name: [] for name in calls}
    start = time.perf_counter()
    while len(times["eager"]) < 3 or (time.perf_counter() - start < seconds and len(times["eager"]) < 30):
        for name, call in calls.items():
            times[name].append(call())
    results = []
    for name in contenders[1:]:
        ratios = sorted(a / b for a, b in zip(times["eager"], times[name], strict=True))
        quartiles = statistics.quantiles(ratios, n=4)
        results.append(
            Result(
                work,
                dtype,
                name,
                eager_ms=round(statistics.median(times["eager"]) * 1e3, 1),
                contender_ms=round(statistics.median(times[name]) * 1e3, 1),
                speedup=round(statistics.median(ratios), 3),
                speedup_quartiles=(round(quartiles[0], 3), round(quartiles[2], 3)),
                rounds=len(ratios),
                first_result_s=round(first[name], 1),
            )
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=["eager", "ours"])
    parser.add_argument("--work", nargs="+", choices=WORK, default=list(WORK))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--threads", type=int, help="threads of torch (default: torch's own choice)")
    parser.add_argument("--seconds", type=float, default=15, help="at most, for each piece of work, after warming up")
    parser.add_argument("--limit", type=float, default=330, help="start no further piece of work after so many seconds")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "cpu_e2e.json")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    contenders = ["eager", *(name for name in options.contenders if name != "eager")]

    begin = time.perf_counter()
    about = machine() | {"transformers": transformers.__version__, "layers": options.layers}
    results: list[Result] = []
    skipped = []
    for dtype in options.dtypes:
        models = build(options.layers, DTYPES[dtype], contenders)
        for work in options.work:
            if time.perf_counter() - begin > options.limit:
                skipped.append(f"{work} {dtype}")
                continue
            for model in models.values():
                model.train(work == "train")
            for r in race(work, dtype, models, contenders, options.seconds):
                results.append(r)
                print(
                    f"{r.work:9}{r.dtype:10}{r.contender:13}{r.eager_ms:10.1f} ms {r.contender_ms:10.1f} ms "
                    f"{r.speedup:7.2f} x  ({r.speedup_quartiles[0]:.2f}-{r.speedup_quartiles[1]:.2f}), {r.rounds} rounds, "
                    f"first result after {r.first_result_s} s",
                    flush=True,
                )
    if skipped:
        print(f"no time was left for: {', '.join(skipped)}")
    written = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "benchmarks/cpu_e2e.py", *sys.argv[1:]]),
        "machine": about,
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "skipped": skipped,
        "results": [asdict(r) for r in results],
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
