"""Root-mean-square normalisation with a gate, as state-space and linear-attention layers use it."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from kernelwise.ops._operation import Operation, Role, Variant

_GATES: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "sigmoid": torch.sigmoid}


def rms_norm_gated(
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    eps: float,
    *,
    activation: str = "silu",
    order: str = "norm_first",
    cast: str = "before",
) -> Tensor:
    """Return the norm of x times the activation of the gate, or ("gate_first") the norm of their product.

    x, gate: [..., H]; weight: [H]; without a gate, the plain norm. All in float32 but for the weight: `cast` "before"
    rounds to the dtype of x before the weight, "after" after it. The result has the dtype of x, or, "gate_first" and
    "before", the one that the weight and x promote to.
    """
    wide = x.to(torch.float32)
    if gate is not None and order == "gate_first":
        wide = wide * _GATES[activation](gate.to(torch.float32))
    hat = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    y = weight * hat.to(x.dtype) if cast == "before" else weight.float() * hat
    if order == "gate_first":
        return y if cast == "before" else y.to(x.dtype)
    if gate is not None:
        y = y * _GATES[activation](gate.to(torch.float32))
    return y.to(x.dtype)


RMS_NORM_GATED = Operation(
    name="rms_norm_gated",
    reference=rms_norm_gated,
    roles=(
        Role("x", "argument", lambda n: (n["B"], n["S"], n["H"])),
        Role("gate", "argument", lambda n: (n["B"], n["S"], n["H"])),
        Role("weight", "attribute", lambda n: (n["H"],)),
        Role("eps", "number"),
    ),
    variants=tuple(
        Variant((("activation", activation), ("order", order), ("cast", cast)))
        for activation, order, cast in itertools.product(_GATES, ("norm_first", "gate_first"), ("before", "after"))
    ),
    operators=(("rsqrt",), ("mean",), ("silu", "sigmoid")),
    layer_names={(): "RMSNormGated"},
)


def rms_norm_gated_grouped(
    x: Tensor, gate: Tensor | None, weight: Tensor, eps: float, *, group_size: int, activation: str = "silu"
) -> Tensor:
    """Return `rms_norm_gated` with the gate first and the cast before the weight, each group of elements normed alone."""
    wide = x.to(torch.float32)
    if gate is not None:
        wide = wide * _GATES[activation](gate.to(torch.float32))
    groups = wide.view(*x.shape[:-1], x.shape[-1] // group_size, group_size)
    hat = groups * torch.rsqrt(groups.pow(2).mean(-1, keepdim=True) + eps)
    return weight * hat.view(x.shape).to(x.dtype)


RMS_NORM_GATED_GROUPED = Operation(
    name="rms_norm_gated_grouped",
    reference=rms_norm_gated_grouped,
    roles=(
        Role("x", "argument", lambda n: (n["B"], n["S"], 3 * n["group_size"])),
        Role("gate", "argument", lambda n: (n["B"], n["S"], 3 * n["group_size"])),
        Role("weight", "attribute", lambda n: (3 * n["group_size"],)),
        Role("eps", "number"),
    ),
    variants=tuple(Variant((("activation", activation),)) for activation in _GATES),
    operators=RMS_NORM_GATED.operators,
    layer_names={(): "GroupedRMSNormGated"},
    choices={"group_size": ()},
)
