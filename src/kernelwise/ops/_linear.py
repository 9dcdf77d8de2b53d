"""The dense layer: `x @ weight.T + bias`."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from kernelwise.ops._operation import Operation, Role, Variant


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `x @ weight.T + bias`. x: [..., K]; weight: [N, K]; bias: [N] or None."""
    return F.linear(x, weight, bias)


LINEAR = Operation(
    name="linear",
    reference=linear,
    roles=(
        Role("x", "argument", lambda n: (n["B"], n["S"], n["H"])),
        Role("weight", "attribute", lambda n: (n["I"], n["H"])),
        Role("bias", "attribute", lambda n: (n["I"],)),
    ),
    variants=(Variant(), Variant((), (("bias", None),))),
    operators=(("mm.default", "addmm.default"),),
    layer_names={(): "Linear"},
)
