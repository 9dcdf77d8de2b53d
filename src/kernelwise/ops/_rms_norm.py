"""Root-mean-square normalisation in the forms in which models compute it."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from kernelwise.ops._operation import Operation, Role, Variant


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, *, offset: float = 0.0, cast: str = "before") -> Tensor:
    """Return `x / sqrt(mean(x ** 2, -1) + eps)`, computed in float32, times `offset + weight`.

    x: [..., H]; weight: [H] or None. `cast` says where numbers are rounded: "before" the weight to the dtype of x;
    "after" the weight to the dtype of x; "after_offset" the same, with the offset added in the weight's own dtype;
    "weight": before the weight to its dtype if that is narrow, else not at all; "to_weight": before the weight to its
    dtype, whatever it is; "root": the root to the dtype of x, and the division is done in it.
    """
    wide = x.to(torch.float32)
    root = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    hat = x * root.to(x.dtype) if cast == "root" else wide * root
    if weight is None:
        return hat.to(x.dtype)
    if cast in ("after", "after_offset"):
        scale = weight if cast == "after_offset" else weight.float()
        return ((offset + scale if offset else scale).float() * hat).to(x.dtype)
    scale = offset + weight if offset else weight
    if cast == "before":
        hat = hat.to(x.dtype)
    elif cast == "to_weight" or (cast == "weight" and weight.dtype in (torch.float16, torch.bfloat16)):
        hat = hat.to(weight.dtype)
    return scale * hat


RMS_NORM = Operation(
    name="rms_norm",
    reference=rms_norm,
    roles=(
        Role("x", "argument", lambda n: (n["B"], n["S"], n["H"])),
        Role("weight", "attribute", lambda n: (n["H"],)),
        Role("eps", "number"),
    ),
    variants=(
        *(
            Variant((("offset", offset), ("cast", cast)))
            for offset, cast in itertools.product((0.0, 1.0), ("before", "after", "weight", "to_weight", "root"))
        ),
        Variant((("offset", 1.0), ("cast", "after_offset"))),
        *(Variant((("offset", 0.0), ("cast", cast)), (("weight", None),)) for cast in ("before", "root")),
    ),
    operators=(("rsqrt",), ("mean",), ("add",)),
    layer_names={(): "RMSNorm"},
)


def rms_norm_prescaled(x: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0) -> Tensor:
    """Return the norm without weight of `(offset + weight) * x`, a product in float32 that is rounded to the dtype of x."""
    scaled = (x.float() * (offset + weight if offset else weight).float()).to(x.dtype).float()
    return (scaled * torch.rsqrt(scaled.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


RMS_NORM_PRESCALED = Operation(
    name="rms_norm_prescaled",
    reference=rms_norm_prescaled,
    roles=RMS_NORM.roles,
    variants=tuple(Variant((("offset", offset),)) for offset in (0.0, 1.0)),
    operators=RMS_NORM.operators,
    layer_names={(): "PrescaledRMSNorm"},
)


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """Return `1 / sqrt(mean(x ** 2, -1) + eps)` [..., 1], computed in float32 and rounded to the dtype of x."""
    return torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps).to(x.dtype)


INVERSE_RMS = Operation(
    name="inverse_rms",
    reference=inverse_rms,
    roles=(RMS_NORM.roles[0], RMS_NORM.roles[2]),
    variants=(Variant(),),
    operators=RMS_NORM.operators,
    layer_names={(): "InverseRMS"},
)
