"""How a result lies in memory, where that is to be as the layer's own code has it."""

from __future__ import annotations

import torch


def leading_order(x: torch.Tensor) -> tuple[int, ...] | None:
    """Return the order of dimensions in which `x` [..., H] lies in memory, where that is not the order they are named in.

    None where the dimensions descend, or where the last one is not the innermost. Elementwise code of PyTorch gives its
    result the order of its input, and callers may rely on it (`.transpose(1, 2).view(...)`).
    """
    strides = x.stride()
    if x.dim() < 3 or strides[-1] != 1:
        return None
    leading = list(range(x.dim() - 1))
    order = sorted(leading, key=lambda dim: -strides[dim])
    return None if order == leading else (*order, x.dim() - 1)


def inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    """Return the permutation that undoes `order`."""
    return tuple(sorted(range(len(order)), key=order.__getitem__))
