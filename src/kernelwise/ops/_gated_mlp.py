"""The gated feed-forward block: `down(act(gate(x)) * up(x))`."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from kernelwise.ops._activations import ACTIVATIONS
from kernelwise.ops._operation import Operation, Role, Variant

Module = Callable[[Tensor], Tensor]


def gated_mlp(x: Tensor, gate: Module, up: Module, down: Module, *, activation: str = "silu") -> Tensor:
    """Return `down(activation(gate(x)) * up(x))`. x: [..., H]; `gate`, `up` and `down` are the layer's own children."""
    return down(ACTIVATIONS[activation][0](gate(x)) * up(x))


def _other_formula(x: Tensor, gate: Module, up: Module, down: Module, *, activation: str = "silu") -> Tensor:
    return down(ACTIVATIONS[activation][-1](gate(x)) * up(x))


GATED_MLP = Operation(
    name="gated_mlp",
    reference=gated_mlp,
    forms=(_other_formula,),
    roles=(
        Role("x", "argument", lambda n: (n["B"], n["S"], n["H"])),
        Role("gate", "child", lambda n: (n["B"], n["S"], n["I"])),
        Role("up", "child", lambda n: (n["B"], n["S"], n["I"])),
        Role("down", "child", lambda n: (n["B"], n["S"], n["H"])),
    ),
    variants=tuple(Variant((("activation", name),)) for name in ACTIVATIONS),
    operators=(("call",), ("mul",)),
    layer_names={
        (): "GatedMLP",
        (("activation", "silu"),): "SwiGLUMLP",
        (("activation", "gelu"),): "GEGLUMLP",
        (("activation", "gelu_tanh"),): "GEGLUMLP",
        (("activation", "relu"),): "ReGLUMLP",
    },
)
