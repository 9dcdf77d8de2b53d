"""Rotary position embedding by angles that every sequence of a batch shares, as vision models apply it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kernelwise.ops._operation import Operation, Role, Shape, Variant
from kernelwise.ops._rotary import turn


def rotary_shared(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, unsqueeze_dim: int = 1, tokens: str = "all", **options: Any
) -> tuple[Tensor, Tensor]:
    """Return q and k turned by the angles that cos and sin [S, R] belong to, the same ones in every sequence.

    unsqueeze_dim 1: q, k [..., H, S, D]; 2: [..., S, H, D]. tokens: all S of them are turned ("all"), or the last S,
    and q and k may hold P more in front, the same number in both ("last"). The other options are those of `rotary_one`.
    """
    length, positions = cos.shape[-2], -1 - unsqueeze_dim
    if unsqueeze_dim == 2:
        cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)

    def turned(x: Tensor) -> Tensor:
        if tokens == "all":
            return turn(x, cos, sin, **options)
        before, x = torch.split(x, [x.shape[positions] - length, length], dim=positions)
        return torch.cat((before, turn(x, cos, sin, **options)), dim=positions)

    return turned(q), turned(k)


def _heads(name: str) -> Any:
    def shape(n: Mapping[str, Any]) -> Shape:
        length = n["S"] + (n["P"] if n.get("tokens") == "last" else 0)
        heads_first = n.get("unsqueeze_dim", 1) == 1
        return (n["B"], n[name], length, n["D"]) if heads_first else (n["B"], length, n[name], n["D"])

    return shape


def _angles(n: Mapping[str, Any]) -> Shape:
    return (n["S"], n["D"] if n.get("part", "all") == "all" else n["R"])


ROTARY_SHARED = Operation(
    name="rotary_shared",
    reference=rotary_shared,
    roles=(
        Role("q", "argument", _heads("Hq")),
        Role("k", "argument", _heads("Hk")),
        Role("cos", "argument", _angles, follows="parameters"),
        Role("sin", "argument", _angles, follows="parameters"),
    ),
    choices={"unsqueeze_dim": (1, 2)},
    variants=tuple(
        Variant((("layout", layout), ("angles", "full"), ("dtype", dtype), ("part", part), ("tokens", tokens)))
        for (part, tokens), layout, dtype in itertools.product(
            (("first", "all"), ("all", "last"), ("all", "all")), ("half", "interleaved"), ("promoted", "float32")
        )
    ),
    operators=(("mul",), ("cat",)),
    layer_names={(): "rotary_pos_emb_shared"},
    function=True,
)


def rotary_complex_shared(q: Tensor, k: Tensor, turns: Tensor, *, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """Return `rotary_complex` of q and k with `turns` [S, D/2], the same ones in every sequence."""
    length, half = q.shape[-1 - unsqueeze_dim], q.shape[-1] // 2
    turns = turns.view(length, half) if unsqueeze_dim == 1 else turns.view(length, 1, half)

    def turned(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * turns).flatten(-2).type_as(x)

    return turned(q), turned(k)


ROTARY_COMPLEX_SHARED = Operation(
    name="rotary_complex_shared",
    reference=rotary_complex_shared,
    roles=(
        *ROTARY_SHARED.roles[:2],
        Role("turns", "argument", lambda n: (n["S"], n["D"] // 2), follows="complex"),
    ),
    choices={"unsqueeze_dim": (1, 2)},
    variants=(Variant(),),
    operators=(("mul", "mul.Tensor"), ("view_as_complex.default",)),
    layer_names={(): "rotary_pos_emb_complex_shared"},
    function=True,
)
