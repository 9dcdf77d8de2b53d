"""Attention as transformers' "sdpa" calls it, with each of PyTorch's backends: `python benchmarks/gpu_attention.py`.

It says what is left to gain there: which kernel runs by default at the shapes of gpu_e2e.py, and how long each backend takes,
forward and backward. Times are as in gpu_ops.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from gpu_about import about, in_a_line
from gpu_ops import gpu_time_us
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

SHAPES = {  # tokens, heads of queries, heads of keys, width of a head
    "Llama-3-8B, Qwen3-8B": (4096, 32, 8, 128),
    "the same, 2,048 tokens": (2048, 32, 8, 128),
    "the same, 512 tokens": (512, 32, 8, 128),
    "Gemma-3-4B, full": (4096, 8, 4, 256),
}
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


def main() -> None:
    print(in_a_line(about()), flush=True)
    torch.cuda.set_stream(torch.cuda.Stream())  # the default stream cannot be captured
    for name, (tokens, q_heads, k_heads, width) in SHAPES.items():
        q, k, v = (
            torch.randn(1, tokens, heads, width, device="cuda", dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
            for heads in (q_heads, k_heads, k_heads)
        )
        attend = functools.partial(F.scaled_dot_product_attention, q, k, v, is_causal=True, enable_gqa=True)
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            attend()
            torch.cuda.synchronize()
        longest = max(seen.key_averages(), key=lambda row: row.self_device_time_total)
        print(f"{name}: by default {longest.key[:100]}", flush=True)
        flops = 2 * tokens * tokens * q_heads * width  # two products, half of each hidden by the mask
        for backend, which in {"default": None, **BACKENDS}.items():
            try:
                forward, backward = times(attend, (q, k, v), which)
            except RuntimeError as error:
                print(f"  {backend:8s} {str(error).splitlines()[0][:100]}", flush=True)
                continue
            rates = f"{flops / forward / 1e6:5.0f} and {2.5 * flops / backward / 1e6:5.0f} TFLOP/s"
            print(f"  {backend:8s} forward {forward:8.1f} us, backward {backward:8.1f} us, {rates}", flush=True)


def times(attend: Callable[[], torch.Tensor], inputs: Any, which: SDPBackend | None) -> tuple[float, float]:
    """Return the microseconds of forward and of backward with a backend, or with PyTorch's own choice."""

    def run() -> torch.Tensor:
        if which is None:
            return attend()
        with sdpa_kernel(which):
            return attend()

    with torch.no_grad():
        forward = gpu_time_us([run])
    y = run()
    upstream = torch.randn_like(y)
    backward = gpu_time_us([functools.partial(torch.autograd.grad, y, inputs, upstream, retain_graph=True)])
    return forward, backward


if __name__ == "__main__":
    main()
