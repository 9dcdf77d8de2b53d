"""What layers compute: one small file per operation, with its reference in plain PyTorch, its roles and its options."""

from __future__ import annotations

from kernelwise._data import Recognition
from kernelwise.ops._activations import ACTIVATION
from kernelwise.ops._gated_mlp import (
    GATED_MLP,
    GATED_MLP_CAST,
    GATED_MLP_CLAMPED,
    GATED_MLP_NORMED,
    GATED_MLP_PACKED,
    LINEAR_ACTIVATION,
    MLP,
    MLP_CAST,
)
from kernelwise.ops._layer_norm import LAYER_NORM
from kernelwise.ops._linear import LINEAR
from kernelwise.ops._operation import Operation, Role, Variant
from kernelwise.ops._rms_norm import RMS_NORM
from kernelwise.ops._rms_norm_gated import RMS_NORM_GATED
from kernelwise.ops._rotary import ROTARY, ROTARY_COMPLEX, ROTARY_ONE, ROTARY_VISION

OPERATIONS: dict[str, Operation] = {
    op.name: op
    for op in (
        RMS_NORM, RMS_NORM_GATED, LAYER_NORM, GATED_MLP, GATED_MLP_PACKED, GATED_MLP_CLAMPED, GATED_MLP_NORMED,
        GATED_MLP_CAST, MLP, MLP_CAST, LINEAR_ACTIVATION, ACTIVATION, LINEAR,
        ROTARY, ROTARY_VISION, ROTARY_ONE, ROTARY_COMPLEX,
    )
}  # fmt: skip

LAYER_NAMES: tuple[str, ...] = tuple(
    dict.fromkeys(name for op in OPERATIONS.values() for name in op.layer_names.values())
)


def layer_name(recognition: Recognition) -> str:
    """Return the name that a mapping may use for a recognised layer that nobody has registered (`"RMSNorm"`)."""
    return OPERATIONS[recognition.op].layer_name(recognition.options) or recognition.op


__all__ = ["LAYER_NAMES", "OPERATIONS", "Operation", "Role", "Variant", "layer_name"]
