"""Gated feed-forward blocks, with gate and up as two children or as one, and the plain block without a gate."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from kernelwise.ops._activations import ACTIVATIONS, VARIANTS
from kernelwise.ops._operation import Operation, Role, Variant

Module = Callable[[Tensor], Tensor]
_X = Role("x", "argument", lambda n: (n["B"], n["S"], n["H"]))
_DOWN = Role("down", "child", lambda n: (n["B"], n["S"], n["H"]))


def gated_mlp(
    x: Tensor, gate: Module, up: Module, down: Module, *, activation: str = "silu", rounding: str = "each"
) -> Tensor:
    """Return `down(activation(gate(x)) * up(x))`. x: [..., H]; `gate`, `up` and `down` are the layer's own children.

    `rounding` "each": after the activation and after the product; "once": after the product alone.
    """
    if rounding == "once":
        g, u = gate(x), up(x)
        return down((ACTIVATIONS[activation][0](g.float()) * u.float()).to(g.dtype))
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
    variants=(
        *VARIANTS,
        *(Variant((("activation", name), ("rounding", "once"))) for name in ("silu", "gelu", "gelu_tanh")),
    ),
    operators=(("call",), ("mul",)),
    layer_names={
        (): "GatedMLP",
        (("activation", "silu"),): "SwiGLUMLP",
        (("activation", "gelu"),): "GEGLUMLP",
        (("activation", "gelu_tanh"),): "GEGLUMLP",
        (("activation", "relu"),): "ReGLUMLP",
    },
)


def gated_mlp_cast(x: Tensor, gate: Module, up: Module, down: nn.Linear, *, activation: str = "silu") -> Tensor:
    """Return the gated block with the input of `down` in the dtype of its weight, which may be wider (T5)."""
    return cast_call(down, ACTIVATIONS[activation][0](gate(x)) * up(x))


def cast_call(child: nn.Linear, x: Tensor) -> Tensor:
    """Call a child with x in the dtype of its weight."""
    y: Tensor = child(x.to(child.weight.dtype))
    return y


GATED_MLP_CAST = Operation(
    name="gated_mlp_cast",
    reference=gated_mlp_cast,
    roles=GATED_MLP.roles,
    variants=VARIANTS,
    operators=(("call",), ("mul",)),
    layer_names={(): "CastGatedMLP"},
)


def gated_mlp_clamped(
    x: Tensor, gate: Module, up: Module, down: Module, limit: float, *, activation: str = "silu", clamp: str = "before"
) -> Tensor:
    """Return the gated block with up(x) within `limit` of zero and the gate at most `limit`.

    `clamp` says whether the gate is clamped "before" or "after" the activation.
    """
    bounded = up(x).clamp(min=-limit, max=limit)
    if clamp == "after":
        return down(ACTIVATIONS[activation][0](gate(x)).clamp(max=limit) * bounded)
    return down(ACTIVATIONS[activation][0](gate(x).clamp(max=limit)) * bounded)


GATED_MLP_CLAMPED = Operation(
    name="gated_mlp_clamped",
    reference=gated_mlp_clamped,
    roles=(*GATED_MLP.roles, Role("limit", "number")),
    variants=tuple(
        Variant((("activation", name), *clamp))
        for clamp in ((), (("clamp", "after"),))
        for name in ("silu", "gelu", "gelu_tanh")
    ),
    operators=(("call",), ("mul",), ("clamp.default",)),
    layer_names={(): "ClampedGatedMLP"},
)


def gated_mlp_normed(
    x: Tensor, gate: Module, up: Module, norm: Module, down: Module, *, activation: str = "silu"
) -> Tensor:
    """Return the gated block with a norm, a child like the others, before the way down."""
    return down(norm(ACTIVATIONS[activation][0](gate(x)) * up(x)))


GATED_MLP_NORMED = Operation(
    name="gated_mlp_normed",
    reference=gated_mlp_normed,
    roles=(*GATED_MLP.roles[:3], Role("norm", "child", lambda n: (n["B"], n["S"], n["I"])), _DOWN),
    variants=VARIANTS,
    operators=(("call",), ("mul",)),
    layer_names={(): "NormedGatedMLP"},
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


def mlp_cast(x: Tensor, up: Module, down: nn.Linear, *, activation: str) -> Tensor:
    """Return the plain block with the input of `down` in the dtype of its weight, which may be wider (T5)."""
    return cast_call(down, ACTIVATIONS[activation][0](up(x)))


MLP_CAST = Operation(
    name="mlp_cast",
    reference=mlp_cast,
    roles=MLP.roles,
    variants=VARIANTS,
    operators=(("call",),),
    layer_names={(): "CastMLP"},
)


def linear_activation(x: Tensor, linear: Module, *, activation: str) -> Tensor:
    """Return `activation(linear(x))`: the first half of a block whose second half is a layer of its own."""
    return ACTIVATIONS[activation][0](linear(x))


LINEAR_ACTIVATION = Operation(
    name="linear_activation",
    reference=linear_activation,
    roles=(_X, Role("linear", "child", lambda n: (n["B"], n["S"], n["I"]))),
    variants=VARIANTS,
    operators=(("call",),),
    layer_names={(): "LinearActivation"},
)
