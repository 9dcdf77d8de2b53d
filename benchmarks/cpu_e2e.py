"""A language model from end to end on the CPU, own code and kernels side by side: `python benchmarks/cpu_e2e.py`.

The model has the shape of SmolLM2-135M (30 layers, random weights), or with `--shape 1b` that of Llama 3.2 1B (16 layers).
Contenders: `eager`, transformers as it comes (SDPA attention, growing cache); `ours`, the same after `kernelwise.kernelize`
with a rule for the head with its loss, `set_attn_implementation("kernelwise_sdpa")` and, in decoding, a `GrowingCache`;
`ours-loss`, without that rule; `ours-sdpa`, without that attention; `ours-cache`, without that cache; `compile`, torch.compile
of the whole model, in decoding with transformers' static cache; `ours+compile`. Transformers' own kernels are not among them:
it fetches them from the Hub, and has none for CPUs.

Work: `prefill` of 1 x 512 tokens (1b: 256); `decode` of 16 tokens after 128 (`--prompt`), one row; `decode8`, 8 rows;
`train`, a step of 2 x 256 tokens, forward and backward. Contenders take turns, so that whatever else the machine does meets
them alike; a result is the median over the rounds of (time of eager / time of the contender), with the quartiles. The time
until a contender's first result (for torch.compile: compiling) is given beside it. What no time was left for is named in the
file. On Linux, one more call of each contender without gradients says how much its memory grows at the most beyond what it
holds between calls.

Where other processes take the cores, two threads wait for each other most of the time. `--cpu-time` counts the processor
time of one thread instead of seconds, which they hardly change (caches and memory are still shared with them).

    python benchmarks/cpu_e2e.py                                            # eager and ours, about 3 minutes
    python benchmarks/cpu_e2e.py --contenders eager ours compile --dtypes float32 --work prefill decode

To see what another processor would gain, limit what torch, oneDNN and MKL may use:
    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 python benchmarks/cpu_e2e.py
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import datetime
import json
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
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
from kernelwise.integrations.transformers import GrowingCache

PREFILL, PROMPT, STEPS, TRAIN = 512, 128, 16, (2, 256)
SHAPES = {
    "135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
    },
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}
LENGTHS = {"135m": PREFILL, "1b": 256}
CONTENDERS = ("eager", "ours", "ours-loss", "ours-sdpa", "ours-cache", "compile", "ours+compile")
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
    eager_growth_mib: int | None  # of memory, beyond what is there between calls; None where it is not known
    contender_growth_mib: int | None


def build(layers: int | None, dtype: torch.dtype, contenders: Sequence[str] = (), shape: str = "135m") -> Any:
    """The model of eager, and kernelized ones with the same numbers."""
    given = SHAPES[shape] | ({} if layers is None else {"num_hidden_layers": layers})
    config = LlamaConfig(
        **given,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        use_cache=False,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
    rule = {"LinearCrossEntropy": "builtin:LinearCrossEntropy"}
    models = {"eager": model, "ours": kernelwise.kernelize(copy.deepcopy(model), rule)}
    if "ours-loss" in contenders:
        models["ours-loss"] = kernelwise.kernelize(copy.deepcopy(model))
    for ours in models.values():
        if ours is not model:
            ours.set_attn_implementation("kernelwise_sdpa")
    if "ours-sdpa" in contenders:
        models["ours-sdpa"] = kernelwise.kernelize(copy.deepcopy(model), rule)
    return models


def call_of(
    work: str,
    contender: str,
    models: dict[str, Any],
    clock: Callable[[], float] = time.perf_counter,
    length: int = PREFILL,
    prompt: int = PROMPT,
) -> Callable[[], float]:
    """A function that does the work once and returns its seconds by `clock`, set-up not counted."""
    model = models[contender.removesuffix("+compile").replace("compile", "eager").replace("-cache", "")]
    compiled = "compile" in contender
    run = torch.compile(model) if compiled else model
    torch.manual_seed(1)

    def prefill() -> float:
        with torch.no_grad():
            start = clock()
            run(tokens, logits_to_keep=1)
            return clock() - start

    def decode() -> float:
        rows = len(tokens)
        with torch.no_grad():
            if compiled:
                cache: Any = StaticCache(config=model.config, max_cache_len=prompt + STEPS + 8)
            else:
                cache = DynamicCache() if contender in ("eager", "ours-cache") else GrowingCache()
            models["ours"](tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)  # the quickest
            token = torch.ones(rows, 1, dtype=torch.long)
            start = clock()
            for _ in range(STEPS):
                token = run(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
            return clock() - start

    def train() -> float:
        model.zero_grad()
        start = clock()
        run(tokens, labels=tokens).loss.backward()
        return clock() - start

    shape = {"prefill": (1, length), "decode": (1, prompt), "decode8": (8, prompt), "train": TRAIN}[work]
    tokens = torch.randint(0, model.config.vocab_size, shape)
    return {"prefill": prefill, "decode": decode, "decode8": decode, "train": train}[work]


def growth(call: Callable[[], object]) -> int | None:
    """MiB by which the memory of this process grows at most during a call."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what earlier calls left behind is given back first
        Path("/proc/self/clear_refs").write_text("5")  # the highest mark becomes what is in use
        before = _memory("VmRSS:")
        call()
        return max(0, _memory("VmHWM:") - before) // 1024
    except (OSError, AttributeError):
        return None


def _memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def race(
    work: str,
    dtype: str,
    models: dict[str, Any],
    contenders: list[str],
    seconds: float,
    *,
    cpu_time: bool,
    length: int,
    prompt: int,
) -> list[Result]:
    """Time the contenders of one piece of work in turns, for at most so many seconds after each one's first result."""
    torch._dynamo.reset()
    clock = time.process_time if cpu_time else time.perf_counter
    calls = {name: call_of(work, name, models, clock, length, prompt) for name in contenders}
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
    grown = {name: growth(call) if work != "train" else None for name, call in calls.items()}
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
                eager_growth_mib=grown["eager"],
                contender_growth_mib=grown[name],
            )
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=["eager", "ours"])
    parser.add_argument("--work", nargs="+", choices=WORK, default=list(WORK))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    parser.add_argument("--shape", choices=SHAPES, default="135m")
    parser.add_argument("--prompt", type=int, default=PROMPT, help="tokens before decoding")
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument("--cpu-time", action="store_true", help="processor time of one thread instead of seconds")
    parser.add_argument("--threads", type=int, help="threads of torch (default: torch's own choice)")
    parser.add_argument("--seconds", type=float, default=15, help="at most, for each piece of work, after warming up")
    parser.add_argument("--limit", type=float, default=330, help="start no further piece of work after so many seconds")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "cpu_e2e.json")
    options = parser.parse_args()
    if options.threads or options.cpu_time:
        torch.set_num_threads(1 if options.cpu_time else options.threads)
    contenders = ["eager", *(name for name in options.contenders if name != "eager")]

    begin = time.perf_counter()
    about = machine() | {
        "transformers": transformers.__version__,
        "layers": options.layers or SHAPES[options.shape]["num_hidden_layers"],
        "clock": "processor time" if options.cpu_time else "seconds",
        "prompt": options.prompt,
        "malloc": {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")},
    }
    results: list[Result] = []
    skipped = []
    for dtype in options.dtypes:
        models = build(options.layers, DTYPES[dtype], contenders, options.shape)
        for work in options.work:
            if time.perf_counter() - begin > options.limit:
                skipped.append(f"{work} {dtype}")
                continue
            for model in models.values():
                model.train(work == "train")
            given = {"cpu_time": options.cpu_time, "length": LENGTHS[options.shape], "prompt": options.prompt}
            for r in race(work, dtype, models, contenders, options.seconds, **given):
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
        "weights_mib": sum(p.numel() * p.element_size() for p in models["eager"].parameters()) >> 20,
        "skipped": skipped,
        "results": [asdict(r) for r in results],
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
