"""Gated feed-forward blocks, with gate and up as two children or as one, and the plain block without a gate."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from kernelwise.ops._activations import ACTIVATIONS, VARIANTS
from kernelwise.ops._operation import Operation, Role, Variant

Module = Callable[[Tensor], Tensor]
_X = Role("x", "argument", lambda n: (n["B"], n["S"], n["H"]))
_DOWN = Role("down", "child", lambda n: (n["B"], n["S"], n["H"]))


def gated_mlp(x: Tensor, gate: Module, up: Module, down: Module, *, activation: str = "silu") -> Tensor:
    """Return `down(activation(gate(x)) * up(x))`. x: [..., H]; `gate`, `up` and `down` are the layer's own children."""
    return down(ACTIVATIONS[activation][0](gate(x)) * up(x))


def _gated_mlp_otherwise(x: Tensor, gate: Module, up: Module, down: Module, *, activation: str = "silu") -> Tensor:
    return down(ACTIVATIONS[activation][-1](gate(x)) * up(x))


GATED_MLP = Operation(
    name="gated_mlp",
    reference=gated_mlp,
    forms=(_gated_mlp_otherwise,),
    roles=(
        _X,
        Role("gate", "child", lambda n: (n["B"], n["S"], n["I"])),
        Role("up", "child", lambda n: (n["B"], n["S"], n["I"])),
        _DOWN,
    ),
    variants=VARIANTS,
    operators=(("call",), ("mul",)),
    layer_names={
        (): "GatedMLP",
        (("activation", "silu"),): "SwiGLUMLP",
        (("activation", "gelu"),): "GEGLUMLP",
        (("activation", "gelu_tanh"),): "GEGLUMLP",
        (("activation", "relu"),): "ReGLUMLP",
    },
)


def gated_mlp_packed(
    x: Tensor, gate_up: Module, down: Module, *, activation: str = "silu", order: str = "gate_up"
) -> Tensor:
    """Return `down(activation(gate) * up)` where `gate_up(x)` is [..., 2 I] and holds both, the gate first or last."""
    first, second = gate_up(x).chunk(2, dim=-1)
    gate, up = (first, second) if order == "gate_up" else (second, first)
    return down(ACTIVATIONS[activation][0](gate) * up)


GATED_MLP_PACKED = Operation(
    name="gated_mlp_packed",
    reference=gated_mlp_packed,
    roles=(_X, Role("gate_up", "child", lambda n: (n["B"], n["S"], 2 * n["I"])), _DOWN),
    variants=tuple(
        Variant((("activation", name), ("order", order))) for order in ("gate_up", "up_gate") for name in ACTIVATIONS
    ),
    operators=(("call",), ("mul",), ("slice",)),
    layer_names={
        (): "PackedGatedMLP",
        (("activation", "silu"),): "PackedSwiGLUMLP",
        (("activation", "gelu"),): "PackedGEGLUMLP",
        (("activation", "gelu_tanh"),): "PackedGEGLUMLP",
    },
)


def mlp(x: Tensor, up: Module, down: Module, *, activation: str) -> Tensor:
    """Return `down(activation(up(x)))`. x: [..., H]; `up` and `down` are the layer's own children."""
    return down(ACTIVATIONS[activation][0](up(x)))


def _mlp_otherwise(x: Tensor, up: Module, down: Module, *, activation: str) -> Tensor:
    return down(ACTIVATIONS[activation][-1](up(x)))


MLP = Operation(
    name="mlp",
    reference=mlp,
    forms=(_mlp_otherwise,),
    roles=(_X, Role("up", "child", lambda n: (n["B"], n["S"], n["I"])), _DOWN),
    variants=VARIANTS,
    operators=(("call",),),
    layer_names={(): "MLP"},
)
