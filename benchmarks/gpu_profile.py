"""Where the time and the memory of a training step go on one GPU: `python benchmarks/gpu_profile.py [--shape llama]`.

A model of `gpu_e2e.py`, kernelized, its head fused with its loss by hand. Prints the kernels by their share of a step, and the
memory held after forward and at the peaks of forward and backward, in bytes beyond the weights.
"""

from __future__ import annotations

import argparse

import torch
from gpu_e2e import SHAPES, TOKENS, build
from torch.profiler import ProfilerActivity, profile

import kernelwise
from kernelwise.kernels.triton.linear_cross_entropy import linear_cross_entropy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama")
    parser.add_argument("--layers", type=int, default=8)
    arguments = parser.parse_args()
    model = kernelwise.kernelize(build(arguments.shape, arguments.layers)).train()
    ids = torch.randint(0, model.config.vocab_size, (1, TOKENS), device="cuda")

    def forward() -> torch.Tensor:
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        return linear_cross_entropy(hidden[0, :-1], model.lm_head.weight, ids[0, 1:])

    for _ in range(3):
        forward().backward()
        model.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    base = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss = forward()
    held, peak = torch.cuda.memory_allocated() - base, torch.cuda.max_memory_allocated() - base
    torch.cuda.reset_peak_memory_stats()
    loss.backward()
    print(f"GB after forward {held / 2**30:.2f}, peak of forward {peak / 2**30:.2f}", end=", ")
    print(f"peak of backward {(torch.cuda.max_memory_allocated() - base) / 2**30:.2f}", end=", ")
    print(f"gradients {(torch.cuda.memory_allocated() - base) / 2**30:.2f}")
    model.zero_grad(set_to_none=True)
    del loss
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen:
        forward().backward()
        torch.cuda.synchronize()
    rows = sorted(seen.key_averages(), key=lambda row: -row.self_device_time_total)
    total = sum(row.self_device_time_total for row in rows)
    print(f"GPU busy {total / 1e3:.1f} ms a step")
    for row in rows[:40]:
        if row.self_device_time_total:
            print(f"{row.self_device_time_total / 1e3:9.2f} ms {row.count:5d}  {row.key[:110]}")


if __name__ == "__main__":
    main()
