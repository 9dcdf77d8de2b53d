"""What layers compute: one small file per operation, with its reference in plain PyTorch, its roles and its options."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from kernelwise._data import Recognition, Scalar
from kernelwise.ops._activations import ACTIVATION
from kernelwise.ops._cross_entropy import CROSS_ENTROPY
from kernelwise.ops._decoder_layer import LAYERS
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
from kernelwise.ops._head_loss import LINEAR_CROSS_ENTROPY
from kernelwise.ops._layer_norm import LAYER_NORM
from kernelwise.ops._linear import LINEAR
from kernelwise.ops._operation import Operation, Role, Variant
from kernelwise.ops._register import operation
from kernelwise.ops._rms_norm import INVERSE_RMS, RMS_NORM, RMS_NORM_PRESCALED
from kernelwise.ops._rms_norm_gated import RMS_NORM_GATED, RMS_NORM_GATED_GROUPED
from kernelwise.ops._rotary import ROTARY, ROTARY_COMPLEX, ROTARY_ONE, ROTARY_VISION
from kernelwise.ops._rotary_shared import ROTARY_COMPLEX_SHARED, ROTARY_SHARED
from kernelwise.ops._router import SOFTMAX_ROUTER

OPERATIONS: dict[str, Operation] = {
    op.name: op
    for op in (
        RMS_NORM, RMS_NORM_PRESCALED, INVERSE_RMS, RMS_NORM_GATED, RMS_NORM_GATED_GROUPED, LAYER_NORM,
        GATED_MLP, GATED_MLP_PACKED, GATED_MLP_CLAMPED, GATED_MLP_NORMED, GATED_MLP_CAST,
        MLP, MLP_CAST, LINEAR_ACTIVATION, ACTIVATION, LINEAR,
        ROTARY_VISION, ROTARY, ROTARY_ONE, ROTARY_COMPLEX, ROTARY_SHARED, ROTARY_COMPLEX_SHARED,
        SOFTMAX_ROUTER, CROSS_ENTROPY, LINEAR_CROSS_ENTROPY, *LAYERS,
    )
}  # fmt: skip

# The layer names of the operations that come with Kernelwise; `layer_names()` has those of users too.
LAYER_NAMES: tuple[str, ...] = tuple(
    dict.fromkeys(name for op in OPERATIONS.values() for name in op.layer_names.values())
)


def layer_name(recognition: Recognition) -> str:
    """Return the name that a mapping may use for a recognised layer that nobody has registered (`"RMSNorm"`)."""
    return OPERATIONS[recognition.op].layer_name(recognition.options) or recognition.op


def layer_names() -> tuple[str, ...]:
    """Return every name that `layer_name` can give now."""
    return tuple(dict.fromkeys(name for op in OPERATIONS.values() for name in op.layer_names.values()))


def register_op(
    reference: Callable[..., Any],
    *,
    roles: Mapping[str, str],
    options: Mapping[str, tuple[Scalar, ...]] | None = None,
    name: str | None = None,
    layer_name: str | None = None,
    function: bool = False,
) -> Operation:
    """Add an operation to those that are recognised, and return it; the arguments are those of `operation`.

    Operations that were there before are looked for first. Raises ValueError if the name is taken by another one.
    """
    added = operation(reference, roles=roles, options=options, name=name, layer_name=layer_name, function=function)
    known = OPERATIONS.get(added.name)
    if known is not None and known.reference is not reference:
        raise ValueError(f"there is an operation {added.name} already; give this one another name")
    OPERATIONS[added.name] = added
    return added


def unregister_op(name: str) -> None:
    """Take out an operation that `register_op` has added. Raises ValueError for one that comes with Kernelwise."""
    if name in _BUILTIN:
        raise ValueError(f"{name} comes with Kernelwise and stays")
    OPERATIONS.pop(name, None)


_BUILTIN = frozenset(OPERATIONS)
__all__ = [
    "LAYER_NAMES",
    "OPERATIONS",
    "Operation",
    "Role",
    "Variant",
    "layer_name",
    "layer_names",
    "register_op",
    "unregister_op",
]
