"""Every Triton kernel against its peers on one GPU, in one run: correctness first, then time.

    python benchmarks/gpu_ops.py [--only NAME,...] [--without compile,quack] [--seconds 400] [--out FOLDER]

Time is that of the GPU for one call: a CUDA graph holds many calls that rotate over enough inputs and outputs to leave
the second-level cache cold; the median of its replays, divided by the number of calls. `%` is the share of the copy
bandwidth (measured first, in the same run) that a contender reaches when only the bytes are counted that the operation
must move: each input read once, each output written once. Contenders: `ours`; `torch` (F.rms_norm), `eager` (the layer
as transformers writes it), `compile` (torch.compile of that), `liger` (Liger's Triton kernels) and `quack`, where
installed. A contender that errs too much is reported and not timed.
"""

from __future__ import annotations

import argparse
import collections
import functools
import gc
import importlib
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config
from torch.nn import functional as F

from kernelwise.kernels.triton.activation import activation as own_activation
from kernelwise.kernels.triton.add_layer_norm import add_layer_norm
from kernelwise.kernels.triton.add_rms_norm import add_rms_norm
from kernelwise.kernels.triton.cross_entropy import cross_entropy
from kernelwise.kernels.triton.gated_activation import gated_activation
from kernelwise.kernels.triton.layer_norm import layer_norm
from kernelwise.kernels.triton.linear_cross_entropy import linear_cross_entropy
from kernelwise.kernels.triton.qk_norm_rotary import qk_norm_rotary
from kernelwise.kernels.triton.rms_norm import rms_norm
from kernelwise.kernels.triton.rotary import rotary
from kernelwise.ops._activations import ACTIVATIONS

START = time.time()
BF16 = torch.bfloat16
EPS = 1e-6
Tensors = tuple[torch.Tensor, ...]


# ---------------------------------------------------------------- the layers as transformers writes them


def eager_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * wide.to(x.dtype)


def eager_silu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(gate) * up


def eager_gelu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.gelu(gate, approximate="tanh") * up


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def eager_rotary(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Tensors:
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


def eager_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.float(), labels)


def eager_linear_loss(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), labels)


def three_products(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> None:
    """What every head with a loss must multiply: the floor of its time. All logits at once, no loss."""
    hidden, weight = hidden.detach(), weight.detach()
    logits = hidden @ weight.T
    torch.mm(logits, weight)
    torch.mm(logits.T, hidden)


# ---------------------------------------------------------------- cases


@dataclass(frozen=True)
class Case:
    """One operation at one shape. `make` gives fresh inputs; the first `num_grads` of them may need gradients."""

    name: str
    shape: str
    make: Callable[[], Tensors]
    contenders: dict[str, Callable[..., Any]]
    num_grads: int
    forward_bytes: int
    backward_bytes: int
    compiled: bool = True  # whether torch.compile, which takes seconds for each shape, is among the contenders
    is_loss: bool = False  # forward and backward are timed together, and memory is measured


def contender(module: str, *names: str) -> Any:
    """An attribute of an optional peer, or None where it is not installed or does not import."""
    try:
        value = importlib.import_module(module)
    except Exception:  # a peer may fail to import in any way; it is then absent from the table
        return None
    for name in names:
        value = getattr(value, name, None)
    return value


@functools.cache
def peers() -> dict[str, Any]:
    return {
        "liger_norm": contender("liger_kernel.ops", "LigerRMSNormFunction"),
        "liger_add_norm": contender("liger_kernel.ops", "LigerFusedAddRMSNormFunction"),
        "liger_silu": contender("liger_kernel.ops", "LigerSiLUMulFunction"),
        "liger_gelu": contender("liger_kernel.ops.geglu", "LigerGELUMulFunction"),
        "liger_rope": contender("liger_kernel.ops.rope", "LigerRopeFunction"),
        "liger_layer_norm": contender("liger_kernel.ops", "LigerLayerNormFunction"),
        "liger_loss": contender("liger_kernel.ops.cross_entropy", "LigerCrossEntropyFunction"),
        "liger_linear_loss": contender(
            "liger_kernel.ops.fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction"
        ),
        "quack_norm": contender("quack.rmsnorm", "rmsnorm"),
        "quack_loss": contender("quack.cross_entropy", "cross_entropy"),
    }


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda").to(BF16)


def norm_case(rows: int, width: int) -> Case:
    found = {
        "ours": lambda x, w: rms_norm(x, w, EPS),
        "torch": lambda x, w: F.rms_norm(x, (width,), w, EPS),
        "eager": eager_norm,
        "compile": eager_norm,
    }
    if peers()["liger_norm"]:
        found["liger"] = lambda x, w: peers()["liger_norm"].apply(x, w, EPS, 0.0, "llama", True, None)
    if peers()["quack_norm"] and rows in (1, 512, 4096, 131072):  # it compiles for seconds at each width
        found["quack"] = lambda x, w: peers()["quack_norm"](x, w, eps=EPS)
    return Case(
        "rms_norm",
        f"{rows}x{width}",
        lambda: (normal(rows, width), 1 + 0.1 * normal(width)),
        found,
        2,
        (2 * rows + 1) * width * 2,
        (3 * rows + 2) * width * 2,
        rows in (1, 4096, 131072),
    )


def add_norm_case(rows: int, width: int) -> Case:
    def two_steps(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Tensors:
        total = x + residual
        return F.rms_norm(total, (width,), weight, EPS), total

    def eager(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Tensors:
        total = x + residual
        return eager_norm(total, weight), total

    found = {"ours": lambda x, r, w: add_rms_norm(x, r, w, EPS), "torch": two_steps, "eager": eager, "compile": eager}
    if peers()["liger_add_norm"]:
        found["liger"] = lambda x, r, w: peers()["liger_add_norm"].apply(x, r, w, EPS, 0.0, "llama", False)
    return Case(
        "add_rms_norm",
        f"{rows}x{width}",
        lambda: (normal(rows, width), normal(rows, width), 1 + 0.1 * normal(width)),
        found,
        3,
        (4 * rows + 1) * width * 2,
        (4 * rows + 2) * width * 2,
        rows in (1, 4096),
    )


def layer_norm_case(rows: int, width: int, add: bool = False) -> Case:
    def own(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, (width,), weight, bias, EPS)

    def own_add(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> Tensors:
        total = x + residual
        return F.layer_norm(total, (width,), weight, bias, EPS), total

    found: dict[str, Callable[..., Any]]
    if add:
        found = {"ours": lambda x, r, w, b: add_layer_norm(x, r, w, b, EPS), "torch": own_add, "compile": own_add}
    else:
        found = {"ours": lambda x, w, b: layer_norm(x, w, b, EPS), "torch": own, "compile": own}
        if peers()["liger_layer_norm"]:
            found["liger"] = lambda x, w, b: peers()["liger_layer_norm"].apply(x, w, b, EPS)
    rows_in = 2 if add else 1
    return Case(
        "add_layer_norm" if add else "layer_norm",
        f"{rows}x{width}",
        lambda: (*(normal(rows, width) for _ in range(rows_in)), 1 + 0.1 * normal(width), normal(width)),
        found,
        rows_in + 2,
        (2 * rows_in * rows + 2) * width * 2,
        ((rows_in + 2) * rows + 3) * width * 2,
        rows in (1, 4096),
    )


def qk_case(batch: int, tokens: int, q_heads: int = 32, k_heads: int = 8, width: int = 128) -> Case:
    def two_steps(function: Any, turn: Any) -> Callable[..., Any]:
        return lambda q, k, a, b, cos, sin: turn(function(q, a), function(k, b), cos, sin)

    def make() -> Tensors:
        phase = 7 * torch.randn(1, tokens, width // 2, device="cuda").repeat(1, 1, 2)
        q, k = (normal(batch, tokens, n, width).transpose(1, 2) for n in (q_heads, k_heads))
        return q, k, 1 + 0.1 * normal(width), 1 + 0.1 * normal(width), phase.cos().to(BF16), phase.sin().to(BF16)

    found = {
        "ours": lambda q, k, a, b, cos, sin: qk_norm_rotary(q, k, a, b, cos, sin, EPS),
        "two steps": two_steps(lambda x, w: rms_norm(x, w, EPS), rotary),
        "eager": two_steps(eager_norm, eager_rotary),
        "compile": two_steps(eager_norm, eager_rotary),
    }
    if peers()["liger_norm"] and peers()["liger_rope"]:
        found["liger"] = two_steps(
            lambda x, w: peers()["liger_norm"].apply(x, w, EPS, 0.0, "llama", False, None), peers()["liger_rope"].apply
        )
    elements = batch * tokens * (q_heads + k_heads) * width
    shape = f"{batch}x{tokens}x{q_heads}/{k_heads}x{width}"
    return Case("qk_norm_rotary", shape, make, found, 4, 2 * elements * 2, 3 * elements * 2)


def activation_case(rows: int, width: int, name: str) -> Case:
    own = ACTIVATIONS[name][0]
    found = {"ours": lambda x: own_activation(x, activation=name), "eager": own, "compile": own}
    moved = rows * width * 2
    return Case(name, f"{rows}x{width}", lambda: (normal(rows, width),), found, 1, 2 * moved, 3 * moved, rows == 4096)


def some_labels(rows: int, vocabulary: int) -> torch.Tensor:
    labels = torch.randint(0, vocabulary, (rows,), device="cuda")
    labels[1] = -100
    return labels


def loss_case(rows: int, vocabulary: int) -> Case:
    found: dict[str, Callable[..., Any]] = {
        "ours": cross_entropy,
        "consume": lambda logits, labels: cross_entropy(logits, labels, consume_logits=True),
        "torch": F.cross_entropy,
        "eager": eager_loss,
        "compile": eager_loss,
    }
    if peers()["liger_loss"]:
        found["liger"] = lambda logits, labels: peers()["liger_loss"].apply(logits, labels, None)[0]
    if peers()["quack_loss"]:
        found["quack"] = lambda logits, labels: peers()["quack_loss"](logits, labels, reduction="mean")
    return Case(
        "cross_entropy",
        f"{rows}x{vocabulary}",
        lambda: (2 * normal(rows, vocabulary), some_labels(rows, vocabulary)),
        found,
        1,
        rows * vocabulary * 2,
        2 * rows * vocabulary * 2,
        vocabulary == 128256,
        True,
    )


def linear_loss_case(rows: int, width: int, vocabulary: int) -> Case:
    found: dict[str, Callable[..., Any]] = {
        "ours": linear_cross_entropy,
        "products": three_products,
        "eager": eager_linear_loss,
        "compile": eager_linear_loss,
    }
    if peers()["liger_linear_loss"]:
        found["liger"] = lambda hidden, weight, labels: peers()["liger_linear_loss"].apply(hidden, weight, labels)[0]
    moved = (2 * rows * width + 2 * vocabulary * width) * 2
    return Case(
        "linear_cross_entropy",
        f"{rows}x{width}x{vocabulary}",
        lambda: (normal(rows, width), normal(vocabulary, width) / width**0.5, some_labels(rows, vocabulary)),
        found,
        2,
        moved,
        moved,
        rows == 4096,
        True,
    )


def gated_case(rows: int, width: int, activation: str = "silu", packed: bool = False) -> Case:
    own = eager_silu if activation == "silu" else eager_gelu
    found = {
        "ours": lambda gate, up: gated_activation(gate, up, activation=activation),
        "eager": own,
        "compile": own,
    }
    liger = peers()["liger_silu" if activation == "silu" else "liger_gelu"]
    if liger and not packed:
        found["liger"] = lambda gate, up: liger.apply(gate, up)
    return Case(
        activation + ("_packed" if packed else ""),
        f"{rows}x{width}",
        lambda: tuple(normal(rows, 2 * width).chunk(2, -1)) if packed else (normal(rows, width), normal(rows, width)),
        found,
        2,
        3 * rows * width * 2,
        5 * rows * width * 2,
    )


def rotary_case(batch: int, tokens: int, q_heads: int = 32, k_heads: int = 8, width: int = 128) -> Case:
    def make() -> Tensors:
        phase = 7 * torch.randn(1, tokens, width // 2, device="cuda").repeat(1, 1, 2)
        q, k = (normal(batch, tokens, n, width).transpose(1, 2) for n in (q_heads, k_heads))
        return q, k, phase.cos().to(BF16), phase.sin().to(BF16)

    found = {"ours": rotary, "eager": eager_rotary, "compile": eager_rotary}
    if peers()["liger_rope"]:
        found["liger"] = lambda q, k, cos, sin: peers()["liger_rope"].apply(q, k, cos, sin)
    moved = (2 * batch * (q_heads + k_heads) + 2) * tokens * width * 2
    return Case("rotary", f"{batch}x{tokens}x{q_heads}/{k_heads}x{width}", make, found, 2, moved, moved)


def cases(small: bool) -> Iterator[Case]:
    if small:
        yield from (norm_case(r, w) for r, w in ((1, 64), (3, 577), (1100, 128), (40, 1024), (5000, 64), (1100, 16384)))
        yield from (add_norm_case(r, w) for r, w in ((3, 577), (5000, 64)))
        yield from (gated_case(3, w, a, p) for w in (33, 2048) for a in ("silu", "gelu_tanh") for p in (False, True))
        yield from (rotary_case(2, 3, 4, 2, w) for w in (64, 80))
        yield from (layer_norm_case(r, w, a) for r, w in ((3, 577), (5000, 64)) for a in (False, True))
        yield from (layer_norm_case(1100, 128), layer_norm_case(40, 1024))
        yield from (loss_case(r, v) for r, v in ((3, 577), (40, 2048), (5, 50257)))
        yield linear_loss_case(140, 64, 1003)
        yield from (qk_case(2, 3, 4, 2, w) for w in (64, 80))
        yield from (activation_case(3, w, "gelu_new") for w in (577, 2048))
        return
    yield from (linear_loss_case(4096, 4096, 128256), linear_loss_case(4096, 4096, 32000))
    yield linear_loss_case(16384, 4096, 128256)
    yield from (loss_case(4096, 128256), loss_case(4096, 32000), loss_case(4096, 50257), loss_case(1024, 151936))
    for rows, width in ((1, 1024), (16, 1024), (512, 1024), (4096, 1024), (16384, 1024), (512, 4096), (4096, 4096)):
        yield layer_norm_case(rows, width)
    yield from (layer_norm_case(r, w) for r, w in ((1, 4096), (4096, 768), (16384, 768), (4096, 5120), (4096, 8192)))
    yield from (layer_norm_case(r, w, True) for r, w in ((1, 1024), (512, 1024), (4096, 1024), (4096, 4096)))
    yield from (qk_case(1, t) for t in (1, 512, 4096))
    yield qk_case(1, 4096, 8, 4, 256)
    yield from (activation_case(r, 3072, "gelu_new") for r in (1, 512, 4096, 16384))
    yield activation_case(4096, 4096, "quick_gelu")
    for rows, width in (
        (1, 14336),
        (16, 14336),
        (512, 14336),
        (4096, 2816),
        (4096, 11008),
        (4096, 14336),
        (4096, 28672),
    ):
        yield gated_case(rows, width)
    yield from (
        gated_case(4096, 14336, packed=True),
        gated_case(1, 14336, packed=True),
        gated_case(4096, 14336, "gelu_tanh"),
    )
    yield from (rotary_case(b, t) for b, t in ((1, 1), (16, 1), (1, 512), (1, 4096), (4, 4096)))
    yield rotary_case(1, 4096, 16, 8, 64)
    for rows, width in ((1, 4096), (512, 4096), (4096, 4096), (4096, 8192), (16384, 2048), (4096, 5120)):
        yield add_norm_case(rows, width)
    yield from (norm_case(131072, 128), norm_case(1024, 128), norm_case(4096, 2304), norm_case(4096, 2880))
    for width in (4096, 5120, 2048, 8192, 1024, 16384):
        yield from (norm_case(rows, width) for rows in (1, 16, 512, 1024, 4096, 16384))


# ---------------------------------------------------------------- time


def rotation(num_bytes: int) -> int:
    """How many sets of inputs overflow the second-level cache three times over."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(1, min(24, math.ceil(3 * cache / num_bytes)))


def gpu_time_us(calls: Sequence[Callable[[], Any]]) -> float:
    """Microseconds of one call on the GPU; see the module's docstring."""
    kept: collections.deque[Any] = collections.deque(maxlen=len(calls))
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for call in calls[:3]:
        kept.append(call())
    begin.record()
    for call in calls[:2]:
        kept.append(call())
    end.record()
    torch.cuda.synchronize()
    one_ms = max(2e-3, begin.elapsed_time(end) / min(2, len(calls)))
    count = min(240, max(len(calls), int(1.5 / one_ms), 120 if one_ms < 0.15 else 1))
    count = -(-count // len(calls)) * len(calls)
    graph = torch.cuda.CUDAGraph()
    kept.clear()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for i in range(count):
            kept.append(calls[i % len(calls)]())
    for _ in range(2):
        graph.replay()
    times: list[float] = []
    while len(times) < 7 or (len(times) < 40 and sum(times) * count < 8e3):
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / count)
    return statistics.median(times)


def loop_time_us(call: Callable[[], Any]) -> float:
    """Microseconds of one call that takes long and may wait for the GPU: the median of single calls, without a graph."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(3):
        call()
    times: list[float] = []
    while len(times) < 9 or (len(times) < 60 and sum(times) < 4e5):
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return statistics.median(times)


def host_time_us(call: Callable[[], Any], count: int = 100) -> float:
    """Microseconds of the host for one call, the GPU kept from falling behind; the best of twenty rounds."""
    best = math.inf
    for _ in range(20):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(count):
            call()
        best = min(best, (time.perf_counter() - begin) / count)
        torch.cuda.synchronize()
    return best * 1e6


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a large copy: the best of the ways PyTorch has to make one."""
    source = torch.empty(1 << 29, device="cuda", dtype=BF16).normal_()
    target = torch.empty_like(source)
    ways = (lambda: target.copy_(source), lambda: torch.neg(source, out=target))
    return max(2 * source.nbytes / (gpu_time_us([way]) * 1e-6) for way in ways)


# ---------------------------------------------------------------- one case


def as_tuple(value: Any) -> Tensors:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def relative_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    return float((actual.double() - exact).norm() / exact.norm().clamp_min(1e-300))


def error_of(function: Callable[..., Any], case: Case, exact: Callable[..., Any]) -> float:
    """The largest relative error (in norm) of outputs and gradients against `exact` in float64; NaN never passes."""
    inputs = case.make()
    wide = [t.double().requires_grad_(i < case.num_grads) if t.is_floating_point() else t for i, t in enumerate(inputs)]
    narrow = [t.clone().requires_grad_(i < case.num_grads) for i, t in enumerate(inputs)]
    expected, actual = as_tuple(exact(*wide)), as_tuple(function(*narrow))
    errors = [relative_error(a.detach(), e.detach()) for a, e in zip(actual, expected, strict=True)]
    upstream = [torch.randn_like(a) for a in actual]
    leaves_wide, leaves = wide[: case.num_grads], narrow[: case.num_grads]
    wanted = torch.autograd.grad(expected, leaves_wide, [u.double() for u in upstream])
    given = torch.autograd.grad(actual, leaves, [u.clone() for u in upstream])
    errors += [relative_error(g, w) for g, w in zip(given, wanted, strict=True)]
    return max(e if math.isfinite(e) else math.inf for e in errors)


@dataclass
class Row:
    name: str
    shape: str
    direction: str
    num_bytes: int
    median_us: dict[str, float] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)

    def line(self, bandwidth: float) -> str:
        parts = []
        for who, us in self.median_us.items():
            note = f"{100 * self.num_bytes / (us * 1e-6) / bandwidth:.0f}%"
            if who in self.peak_bytes:
                note = f"{self.peak_bytes[who] / 1e9:.2f} GB"
            parts.append(f"{who} {us:.1f} ({note})")
        return f"{self.name:12s} {self.direction} {self.shape:20s} " + "  ".join(parts)


def forward_calls(function: Callable[..., Any], case: Case) -> list[Callable[[], Any]]:
    return [functools.partial(function, *case.make()) for _ in range(rotation(case.forward_bytes))]


def backward_calls(function: Callable[..., Any], case: Case) -> list[Callable[[], Any]]:
    calls = []
    for _ in range(rotation(case.backward_bytes)):
        inputs = [t.requires_grad_(i < case.num_grads) for i, t in enumerate(t.detach() for t in case.make())]
        outputs = as_tuple(function(*inputs))
        upstream = [torch.randn_like(o) for o in outputs]
        calls.append(
            functools.partial(torch.autograd.grad, outputs, inputs[: case.num_grads], upstream, retain_graph=True)
        )
    return calls


def exact_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * weight


def loss_step(function: Callable[..., Any], case: Case) -> tuple[float, int]:
    """Time of forward and backward together in microseconds, and the memory they take beside their inputs in bytes."""
    inputs = [t.requires_grad_(i < case.num_grads) for i, t in enumerate(case.make())]

    def step() -> Any:
        loss = function(*inputs)
        return None if loss is None else torch.autograd.grad(loss, inputs[: case.num_grads])

    torch.cuda.synchronize()
    step()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = step()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del kept
    return loop_time_us(step), peak


def exact_of(case: Case) -> Callable[..., Any]:
    if case.name == "add_rms_norm":
        return lambda x, r, w: (exact_norm(x + r, w), x + r)
    if case.name == "rms_norm":
        return exact_norm
    if "layer_norm" in case.name:
        return case.contenders["torch"]
    return case.contenders["eager"]


def run_case(case: Case, without: set[str], problems: list[str], compile_too: bool) -> list[Row]:
    rows = [
        Row(case.name, case.shape, "forward ", case.forward_bytes),
        Row(case.name, case.shape, "together" if case.is_loss else "backward", case.backward_bytes),
    ]
    few_tokens = case.forward_bytes < 2_000_000  # nobody trains on that few; one direction is enough
    for who, function in case.contenders.items():
        if who in without or (who == "compile" and not (compile_too and case.compiled)):
            continue
        where = f"{case.name} {case.shape} {who}"
        try:
            if who == "compile":
                torch._dynamo.reset()
                function = torch.compile(function, dynamic=False)
            sizes = case.shape.split("x")
            fits = int(sizes[0]) * int(sizes[-1]) < 1 << 30 if case.is_loss else case.backward_bytes < 1 << 29
            checked = who != "products" and fits  # beyond that, float64 does not fit
            if checked and (error := error_of(function, case, exact_of(case))) > 8e-3:
                problems.append(f"{where}: relative error {error:.1e}, not timed")
                continue
            if case.is_loss:
                if "linear" not in case.name and who not in ("consume", "compile"):
                    with torch.no_grad():
                        rows[0].median_us[who] = loop_time_us(functools.partial(function, *case.make()))
                rows[1].median_us[who], rows[1].peak_bytes[who] = loss_step(function, case)
                continue
            with torch.no_grad():
                rows[0].median_us[who] = gpu_time_us(forward_calls(function, case))
            if not few_tokens:
                rows[1].median_us[who] = gpu_time_us(backward_calls(function, case))
        except Exception as error:  # a peer that fails is a finding, not the end of the run
            problems.append(f"{where}: {type(error).__name__}: {str(error).strip().splitlines()[:1]}")
        finally:
            gc.collect()
            torch.cuda.empty_cache()
    return [row for row in rows if row.median_us]


# ---------------------------------------------------------------- the host's share


def host_costs() -> dict[str, float]:
    """Microseconds of the host for one call at one token."""
    table = {}
    for case in (norm_case(1, 4096), gated_case(1, 14336), gated_case(1, 14336, packed=True), rotary_case(1, 1)):
        inputs = case.make()
        for who, function in case.contenders.items():
            if who == "compile":
                torch._dynamo.reset()
                function = torch.compile(function, dynamic=False)
            try:
                with torch.no_grad():
                    function(*inputs)
                    table[f"{case.name} {who}"] = host_time_us(functools.partial(function, *inputs))
                if who in ("ours", "eager"):
                    leaves = [t.detach().clone().requires_grad_() for t in inputs[: case.num_grads]]
                    call = functools.partial(function, *leaves, *inputs[case.num_grads :])
                    table[f"{case.name} {who}, recorded by autograd"] = host_time_us(call)
            except Exception as error:
                print(f"host cost of {case.name} {who}: {type(error).__name__}: {str(error)[:100]}")
    x = torch.empty(1, 4096, device="cuda", dtype=BF16)
    table["torch.empty_like"] = host_time_us(lambda: torch.empty_like(x))
    return table


# ---------------------------------------------------------------- summary


def summary(rows: list[Row], bandwidth: float) -> list[str]:
    """Geometric means of (peer's time / ours) by operation, large and small apart, and where ours is not ahead."""
    lines = []
    groups: dict[tuple[str, str, str], list[Row]] = collections.defaultdict(list)
    for row in rows:
        size = "large" if row.num_bytes >= 50_000_000 else "small"
        groups[row.name, row.direction, size].append(row)
    for (name, direction, size), members in groups.items():
        ratios: dict[str, list[float]] = collections.defaultdict(list)
        shares = []
        for row in members:
            if (ours := row.median_us.get("ours")) is None:
                continue
            shares.append(100 * row.num_bytes / (ours * 1e-6) / bandwidth)
            for who, us in row.median_us.items():
                if who != "ours":
                    ratios[who].append(us / ours)
        means = "  ".join(f"{who} {statistics.geometric_mean(values):.2f}" for who, values in ratios.items())
        lines.append(f"{name:12s} {direction} {size}: {means}  (ours {statistics.mean(shares):.0f}% of copy)")
    for row in rows:
        ours = row.median_us.get("ours", math.inf)
        ahead = {who: us for who, us in row.median_us.items() if us < 0.97 * ours}
        if ahead:
            lines.append(f"not ahead: {row.line(bandwidth)}")
    return lines


def command(words: Sequence[str]) -> str:
    """The command line that made a result, without the folder it was written to."""
    kept = list(words)
    if "--out" in kept:
        del kept[kept.index("--out") : kept.index("--out") + 2]
    return " ".join(kept)


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version(), "device": torch.cuda.get_device_name(0)}
    for name in ("torch", "triton", "transformers", "liger-kernel", "quack-kernels"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="comma-separated names of operations")
    parser.add_argument("--without", default="", help="comma-separated contenders to leave out")
    parser.add_argument("--seconds", type=float, default=400, help="stop starting new cases after this long")
    parser.add_argument("--out", type=Path, default=None, help="folder for gpu_ops.json and gpu_ops.txt")
    parser.add_argument(
        "--small", action="store_true", help="tiny shapes, ours alone, no timing: for compute-sanitizer"
    )
    arguments = parser.parse_args()
    torch.manual_seed(0)
    # Backward runs on the stream of its forward, and the default stream cannot be captured.
    torch.cuda.set_stream(torch.cuda.Stream())
    # A compiled backward that is timed runs many times over one forward, so it must not reuse that forward's memory.
    torch._functorch.config.donated_buffer = False
    if arguments.small:
        for case in cases(small=True):
            error = error_of(case.contenders["ours"], case, exact_of(case))
            print(f"{case.name} {case.shape} relative error {error:.1e}")
            assert error < 8e-3
        return
    without = set(filter(None, arguments.without.split(",")))
    only = set(filter(None, arguments.only.split(",")))
    lines: list[str] = []

    def show(line: str) -> None:
        lines.append(line)
        print(line, flush=True)

    about = {**versions(), "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()), "command": command(sys.argv)}
    show(", ".join(f"{k} {v}" for k, v in about.items()))
    bandwidth = copy_bandwidth()
    show(f"copy bandwidth {bandwidth / 1e9:.0f} GB/s (read and written); times in microseconds")
    hosts = host_costs() if not only or "host" in only else {}
    for what, us in hosts.items():
        show(f"host cost, one token: {what:40s} {us:.1f}")
    rows: list[Row] = []
    problems: list[str] = []
    skipped = 0
    for case in cases(small=False):
        if only and case.name not in only:
            continue
        left = arguments.seconds - (time.time() - START)
        if left < 15:
            skipped += 1
            continue
        for row in run_case(case, without, problems, compile_too=left > 60):
            rows.append(row)
            show(row.line(bandwidth))
    for line in [*summary(rows, bandwidth), *problems]:
        show(line)
    show(f"{skipped} cases skipped for lack of time; {time.time() - START:.0f} s")
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        result = {
            **about,
            "copy_bytes_per_second": bandwidth,
            "host_us": hosts,
            "rows": [vars(row) for row in rows],
            "problems": problems,
            "skipped": skipped,
        }
        (arguments.out / "gpu_ops.json").write_text(json.dumps(result, indent=1) + os.linesep)
        (arguments.out / "gpu_ops.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
