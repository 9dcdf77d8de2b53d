"""Each CPU kernel against the code it replaces, side by side in one run: `python benchmarks/cpu_ops.py`.

Contenders take turns, call by call, so that whatever else the machine does meets them alike; a result is the median
over the rounds of (time of the own code / time of the contender), with the quartiles. Shapes are those of
SmolLM2-135M. Writes a JSON file that names hardware, versions, date and command, and prints a table. Where other processes
take the cores, `--cpu-time` counts the processor time of one thread instead of seconds.

"linear" calls one layer again and again, whose weight may lie in the cache; "linear_from_memory" calls layers in turn whose
weights together take 512 MiB, as those of a model do that does not fit the cache.

A kernel's function leaves to plain PyTorch what that does as fast; such calls are marked (`kernel_ran`). The mean at the end
counts the operations that `kernelize` puts in unasked (`PUT_IN`), with and without those calls.

To see what another processor would gain, limit what torch, oneDNN and MKL may use:
    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 python benchmarks/cpu_ops.py linear
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import math
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from kernelwise.kernels import cpu
from kernelwise.kernels.cpu import linear as linear_module
from kernelwise.kernels.cpu.activation import activation
from kernelwise.kernels.cpu.add_layer_norm import add_layer_norm
from kernelwise.kernels.cpu.add_rms_norm import add_rms_norm
from kernelwise.kernels.cpu.attention import attention
from kernelwise.kernels.cpu.cross_entropy import cross_entropy
from kernelwise.kernels.cpu.gated_activation import gated_activation
from kernelwise.kernels.cpu.layer_norm import layer_norm
from kernelwise.kernels.cpu.linear import linear
from kernelwise.kernels.cpu.linear_cross_entropy import linear_cross_entropy
from kernelwise.kernels.cpu.qk_norm_rotary import qk_norm_rotary
from kernelwise.kernels.cpu.rms_norm import rms_norm
from kernelwise.kernels.cpu.rotary import rotary

HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM = 576, 1536, 9, 3, 64
LINEAR_SHAPES = ((576, 576), (576, 192), (576, 1536), (1536, 576))
VOCABULARY = 49152
MEMORY_BYTES = 256 << 20  # of the weights of each contender, which no cache holds beside those of the other
PROMPT = 256  # keys that one row of attention sees
MOST_ATTENTION_ROWS = 512  # the own code's backward pass in bfloat16 takes seconds with more
MOST_LOSS_ROWS = 512  # the own code's float32 copies of more rows of logits take gigabytes
EVERY = (
    "rms_norm", "add_rms_norm", "layer_norm", "add_layer_norm", "activation", "gated_activation", "rotary",
    "qk_norm_rotary", "cross_entropy", "linear_cross_entropy", "linear", "linear_from_memory", "attention",
)  # fmt: skip
# What `kernelize` puts in unasked, by operation and the first word of the variant (None: all). See docs/cpu.md.
PUT_IN = {
    "rms_norm": None,
    "gated_activation": None,
    "activation": ("gelu", "gelu_tanh", "gelu_new", "quick_gelu"),
    "rotary": None,
    "linear": None,
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LIMITS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "OMP_NUM_THREADS")


@dataclass(frozen=True, slots=True)
class Case:
    op: str
    variant: str
    dtype: str
    rows: int
    training: bool
    own: Callable[..., object]
    kernel: Callable[..., object]
    tensors: tuple[torch.Tensor, ...]


@dataclass(frozen=True, slots=True)
class Result:
    op: str
    variant: str
    dtype: str
    rows: int
    training: bool
    contender: str
    own_us: float
    contender_us: float
    contender_least_us: float
    speedup: float
    speedup_quartiles: tuple[float, float]
    rounds: int
    kernel_ran: bool  # and not plain PyTorch, to which the kernel's function may leave a call


class Operators(TorchDispatchMode):
    """Notes the namespaces of the operators that are called."""

    def __init__(self):
        super().__init__()
        self.namespaces = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.namespaces.add(func.namespace)
        return func(*args, **(kwargs or {}))


def own_rms_norm(x, weight):
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return weight * wide.to(x.dtype)


def own_rotary(q, k, cos, sin):
    def rotate_half(x):
        half = x.shape[-1] // 2
        return torch.cat((-x[..., half:], x[..., :half]), dim=-1)

    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


def own_add_rms_norm(x, residual, weight):
    total = x + residual
    return own_rms_norm(total, weight), total


def own_add_layer_norm(x, residual, weight, bias):
    total = x + residual
    return F.layer_norm(total, (HIDDEN,), weight, bias, 1e-5), total


def own_qk_norm_rotary(q, k, q_weight, k_weight, cos, sin):
    return own_rotary(own_rms_norm(q, q_weight), own_rms_norm(k, k_weight), cos, sin)


ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_new": lambda x: 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0)))),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


def cases(ops: list[str], rows: list[int], dtypes: list[str]) -> Iterator[Case]:
    """Every case asked for; a training case runs forward and backward."""
    torch.manual_seed(0)
    for name in dtypes:
        dtype = DTYPES[name]
        for num in rows:
            made = list(_made(ops, num, dtype))
            for training in (False, True):
                for op, variant, own, kernel, tensors in made:
                    vocabulary = op == "linear" and variant.endswith(str(VOCABULARY))
                    if not (training and (vocabulary or op == "linear_from_memory")):
                        yield Case(op, variant, name, num, training, own, kernel, tensors)


def _made(ops, num, dtype):
    def randn(*shape):
        return torch.randn(*shape, dtype=dtype)

    if "rms_norm" in ops:
        yield (
            "rms_norm",
            str(HIDDEN),
            own_rms_norm,
            lambda x, w: rms_norm(x, w, 1e-6),
            (randn(1, num, HIDDEN), randn(HIDDEN)),
        )
    if "gated_activation" in ops:
        gate_up = randn(1, num, INNER), randn(1, num, INNER)
        for name in ("silu", "gelu", "gelu_tanh"):
            yield (
                "gated_activation",
                name,
                lambda g, u, f=ACTIVATIONS[name]: f(g) * u,
                lambda g, u, a=name: gated_activation(g, u, activation=a),
                gate_up,
            )
    if "activation" in ops:
        for name, function in ACTIVATIONS.items():
            yield "activation", name, function, lambda x, a=name: activation(x, activation=a), (randn(1, num, INNER),)
    if "add_rms_norm" in ops:
        yield (
            "add_rms_norm",
            str(HIDDEN),
            own_add_rms_norm,
            lambda x, r, w: add_rms_norm(x, r, w, 1e-6),
            (randn(1, num, HIDDEN), randn(1, num, HIDDEN), randn(HIDDEN)),
        )
    if "layer_norm" in ops:
        yield (
            "layer_norm",
            str(HIDDEN),
            lambda x, w, b: F.layer_norm(x, (HIDDEN,), w, b, 1e-5),
            lambda x, w, b: layer_norm(x, w, b, 1e-5),
            (randn(1, num, HIDDEN), randn(HIDDEN), randn(HIDDEN)),
        )
    if "add_layer_norm" in ops:
        yield (
            "add_layer_norm",
            str(HIDDEN),
            own_add_layer_norm,
            lambda x, r, w, b: add_layer_norm(x, r, w, b, 1e-5),
            (randn(1, num, HIDDEN), randn(1, num, HIDDEN), randn(HIDDEN), randn(HIDDEN)),
        )
    if "rotary" in ops:
        q, k = (randn(1, num, heads, HEAD_DIM).transpose(1, 2) for heads in (HEADS, KV_HEADS))
        cos, sin = randn(1, num, HEAD_DIM), randn(1, num, HEAD_DIM)
        yield (
            "rotary",
            f"{HEADS}+{KV_HEADS} heads",
            lambda q, k: own_rotary(q, k, cos, sin),
            lambda q, k: rotary(q, k, cos, sin),
            (q, k),
        )
    if "qk_norm_rotary" in ops:
        q, k = (randn(1, num, heads, HEAD_DIM).transpose(1, 2) for heads in (HEADS, KV_HEADS))
        cos, sin = randn(1, num, HEAD_DIM), randn(1, num, HEAD_DIM)
        yield (
            "qk_norm_rotary",
            f"{HEADS}+{KV_HEADS} heads",
            lambda q, k, qw, kw: own_qk_norm_rotary(q, k, qw, kw, cos, sin),
            lambda q, k, qw, kw: qk_norm_rotary(q, k, qw, kw, cos, sin, 1e-6),
            (q, k, randn(HEAD_DIM), randn(HEAD_DIM)),
        )
    if "attention" in ops:
        # One row decodes: it sees as many keys as there are in a prompt. More rows are a prompt themselves.
        keys = PROMPT if num == 1 else num
        if num <= MOST_ATTENTION_ROWS:
            q, k, v = (
                randn(1, n, heads, HEAD_DIM).transpose(1, 2)
                for n, heads in ((num, HEADS), (keys, KV_HEADS), (keys, KV_HEADS))
            )
            for causal in (False, True) if num > 1 else (False,):
                yield (
                    "attention",
                    "causal" if causal else "full",
                    lambda q, k, v, c=causal: F.scaled_dot_product_attention(q, k, v, is_causal=c, enable_gqa=True),
                    lambda q, k, v, c=causal: attention(q, k, v, causal=c),
                    (q, k, v),
                )
    labels = torch.arange(num) * 7 % VOCABULARY
    if "cross_entropy" in ops and num <= MOST_LOSS_ROWS:
        yield (
            "cross_entropy",
            "49152 classes",
            lambda x: F.cross_entropy(x.float(), labels),
            lambda x: cross_entropy(x, labels),
            (randn(num, VOCABULARY),),
        )
    if "linear_cross_entropy" in ops and num <= MOST_LOSS_ROWS:
        yield (
            "linear_cross_entropy",
            f"{HIDDEN}->49152",
            lambda h, w: F.cross_entropy(F.linear(h, w).float(), labels),
            lambda h, w: linear_cross_entropy(h, w, labels),
            (randn(num, HIDDEN), randn(VOCABULARY, HIDDEN) / math.sqrt(HIDDEN)),
        )
    if "linear" in ops:
        for width, out in (*LINEAR_SHAPES, *([(HIDDEN, VOCABULARY)] if num <= 8 else [])):
            yield (
                "linear",
                f"{width}->{out}",
                F.linear,
                linear,
                (randn(num, width), randn(out, width) / math.sqrt(width)),
            )
    if "linear_from_memory" in ops:
        pools = [randn(MEMORY_BYTES // dtype.itemsize) for _ in range(2)]
        for width, out in LINEAR_SHAPES:
            size = out * width
            own, kernel = (
                itertools.cycle(pool[: pool.numel() // size * size].view(-1, out, width).unbind()) for pool in pools
            )
            yield (
                "linear_from_memory",
                f"{width}->{out}",
                lambda x, weights=own: F.linear(x, next(weights)),
                lambda x, weights=kernel: linear(x, next(weights)),
                (randn(num, width),),
            )


def race(
    case: Case, *, compiled: bool, seconds: float, clock: Callable[[], float] = time.perf_counter
) -> Iterator[Result]:
    """Time the contenders of one case in turns."""
    contenders = {"own": case.own, "kernel": case.kernel}
    if compiled:
        torch._dynamo.reset()
        contenders["torch.compile"] = torch.compile(case.own, fullgraph=True)
    calls = {name: _call(function, case) for name, function in contenders.items()}
    with torch.set_grad_enabled(case.training):
        with Operators() as seen:
            calls["kernel"]()
        once = max(_time(call, 1, clock) for call in [*calls.values(), *calls.values()])  # the first turn warms up
        number = max(1, int(2e-4 / once))
        times: dict[str, list[float]] = {name: [] for name in calls}
        start = time.perf_counter()
        while len(times["own"]) < 5 or (time.perf_counter() - start < seconds and len(times["own"]) < 500):
            for name, call in calls.items():
                times[name].append(_time(call, number, clock))
    for name in calls:
        if name == "own":
            continue
        ratios = sorted(a / b for a, b in zip(times["own"], times[name], strict=True))
        quartiles = statistics.quantiles(ratios, n=4)
        yield Result(
            case.op,
            case.variant,
            case.dtype,
            case.rows,
            case.training,
            name,
            own_us=round(statistics.median(times["own"]) * 1e6, 2),
            contender_us=round(statistics.median(times[name]) * 1e6, 2),
            contender_least_us=round(min(times[name]) * 1e6, 2),
            speedup=round(statistics.median(ratios), 3),
            speedup_quartiles=(round(quartiles[0], 3), round(quartiles[2], 3)),
            rounds=len(ratios),
            kernel_ran=name == "kernel" and "kernelwise" in seen.namespaces,
        )


def _call(function: Callable[..., object], case: Case) -> Callable[[], object]:
    if not case.training:
        return lambda: function(*case.tensors)
    leaves = [t.detach().requires_grad_() for t in case.tensors]
    with torch.no_grad():
        outputs = case.own(*case.tensors)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    upstream = [torch.randn_like(o) for o in outputs]

    def forward_and_backward() -> object:
        results = function(*leaves)
        return torch.autograd.grad(results, leaves, upstream)

    return forward_and_backward


def _print_mean(name: str, results: list[Result]) -> None:
    for which, chosen in (("", results), (", where the kernel ran", [r for r in results if r.kernel_ran])):
        speedups = [r.speedup for r in chosen if r.contender == "kernel"]
        if speedups:
            print(
                f"{name}{which}: geometric mean {statistics.geometric_mean(speedups):.2f} x, least {min(speedups):.2f} x, "
                f"{len(speedups)} cases"
            )


def _time(call: Callable[[], object], number: int, clock: Callable[[], float]) -> float:
    """Seconds of one call, averaged over `number` calls in a row."""
    start = clock()
    for _ in range(number):
        call()
    return (clock() - start) / number


def machine() -> dict[str, object]:
    """What the figures were measured on."""
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": cpu.isa(),
        "half_products": torch.ops.kernelwise.cpu_half_products(),
        "limits": {name: os.environ[name] for name in LIMITS if name in os.environ},
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "load_at_start": os.getloadavg()[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", default=EVERY, help=f"of {', '.join(EVERY)}")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 512, 4096])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--threads", type=int, help="threads of torch (default: torch's own choice)")
    parser.add_argument("--cpu-time", action="store_true", help="processor time of one thread instead of seconds")
    parser.add_argument("--compile", action="store_true", help="race torch.compile too (compiles every case first)")
    parser.add_argument("--always", action="store_true", help="linear: the kernel where torch's product is chosen, too")
    parser.add_argument("--seconds", type=float, default=0.5, help="at most, for each case")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "cpu_ops.json")
    options = parser.parse_args()
    if options.threads or options.cpu_time:
        torch.set_num_threads(1 if options.cpu_time else options.threads)

    if options.always:
        halves = (torch.bfloat16, torch.float16)
        linear_module._chosen.update(dict.fromkeys(halves, linear_module._Choice(most=1 << 62, training=0)))

    about = machine() | {"clock": "processor time" if options.cpu_time else "seconds"}
    clock = time.process_time if options.cpu_time else time.perf_counter
    results = []
    for case in cases(options.ops, options.rows, options.dtypes):
        for r in race(case, compiled=options.compile, seconds=options.seconds, clock=clock):
            results.append(r)
            print(
                f"{r.op:21}{r.variant:14}{r.dtype:9}{r.rows:6} {'train' if r.training else 'infer':6}{r.contender:14}"
                f"{r.own_us:11.1f} us {r.contender_us:11.1f} us {r.speedup:7.2f} x  "
                f"({r.speedup_quartiles[0]:.2f}-{r.speedup_quartiles[1]:.2f})",
                flush=True,
            )
    for op in dict.fromkeys(r.op for r in results):
        _print_mean(op, [r for r in results if r.op == op])
    put_in = [r for r in results if r.op in PUT_IN and r.variant.split()[0] in (PUT_IN[r.op] or [r.variant.split()[0]])]
    if put_in:
        _print_mean("what kernelize puts in", put_in)
    written = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "benchmarks/cpu_ops.py", *sys.argv[1:]]),
        "machine": about,
        "results": [asdict(r) for r in results],
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
