"""Layer normalisation."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.nn import functional as F

from kernelwise._data import Scalar
from kernelwise.ops._operation import Operation, Role, Variant


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, offset: float = 0.0, dtype: str = "own"
) -> Tensor:
    """Return `(x - mean) / sqrt(var + eps) * (offset + weight) + bias` over the last dimension.

    x: [..., H]; weight, bias: [H] or None. `dtype` "own": as `F.layer_norm` takes them; "float32": all of them in
    float32, and the result rounded to the dtype of x.
    """
    width = x.shape[-1:]
    if offset and weight is not None:
        weight = offset + weight
    if dtype == "own":
        return F.layer_norm(x, width, weight, bias, eps)
    wide = F.layer_norm(
        x.float(), width, None if weight is None else weight.float(), None if bias is None else bias.float(), eps
    )
    return wide.to(x.dtype)


def _by_hand(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, offset: float, dtype: str) -> Tensor:
    if offset or dtype != "float32":
        raise NotImplementedError("written out, a narrow dtype rounds after every step")
    wide = x.to(torch.float32)
    centred = wide - wide.mean(-1, keepdim=True)
    hat = centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + eps)
    if weight is not None:
        hat = weight.to(hat.dtype) * hat
    if bias is not None:
        hat = hat + bias.to(hat.dtype)
    return hat.to(x.dtype)


_NONE: tuple[tuple[tuple[str, Scalar], ...], ...] = ((), (("bias", None),), (("weight", None), ("bias", None)))
LAYER_NORM = Operation(
    name="layer_norm",
    reference=layer_norm,
    forms=(_by_hand,),
    roles=(
        Role("x", "argument", lambda n: (n["B"], n["S"], n["H"])),
        Role("weight", "attribute", lambda n: (n["H"],)),
        Role("bias", "attribute", lambda n: (n["H"],)),
        Role("eps", "number"),
    ),
    variants=tuple(
        Variant((("offset", offset), ("dtype", dtype)), constants)
        for offset, dtype, constants in itertools.product((0.0, 1.0), ("own", "float32"), _NONE)
        if offset == 0.0 or constants != _NONE[-1]
    ),
    operators=(("native_layer_norm.default", "rsqrt"),),
    layer_names={(): "LayerNorm"},
)
