"""What `gpu_ops.py` and `gpu_sweep.py` run: operations at shapes of models, by our kernels and by their peers."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
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


# ---------------------------------------------------------------- what is right, in float64


def exact_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * weight


def exact_of(case: Case) -> Callable[..., Any]:
    if case.name == "add_rms_norm":
        return lambda x, r, w: (exact_norm(x + r, w), x + r)
    if case.name == "rms_norm":
        return exact_norm
    if "layer_norm" in case.name:
        return case.contenders["torch"]
    return case.contenders["eager"]
