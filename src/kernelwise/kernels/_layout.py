"""How a result lies in memory, where that is to be as the layer's own code has it."""

from __future__ import annotations

import torch


def by_stride(x: torch.Tensor, count: int) -> tuple[int, ...]:
    """Return the first `count` dimensions of `x` by their strides, the largest first; equal ones as they are named.

    Not by `sorted`: torch.compile takes its keys only where they are constants, and strides may be symbolic.
    """
    strides = x.stride()
    order: list[int] = []
    for dim in range(count):
        place = len(order)
        while place and strides[order[place - 1]] < strides[dim]:
            place -= 1
        order.insert(place, dim)
    return tuple(order)


def leading_order(x: torch.Tensor) -> tuple[int, ...] | None:
    """Return the order of dimensions in which `x` [..., H] lies in memory, where that is not the order they are named in.

    None where the dimensions descend, or where the last one is not the innermost. Elementwise code of PyTorch gives its
    result the order of its input, and callers may rely on it (`.transpose(1, 2).view(...)`).
    """
    if x.dim() < 3 or x.stride(-1) != 1:
        return None
    order = by_stride(x, x.dim() - 1)
    return None if order == tuple(range(x.dim() - 1)) else (*order, x.dim() - 1)


def inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    """Return the permutation that undoes `order`."""
    return tuple(sorted(range(len(order)), key=order.__getitem__))
