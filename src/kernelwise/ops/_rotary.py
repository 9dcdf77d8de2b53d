"""Rotary position embedding, in every layout in which models apply it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kernelwise._data import Scalar
from kernelwise.ops._operation import Operation, Role, Shape, Variant


def _turned(x: Tensor, layout: str) -> Tensor:
    """The other member of each pair in the place of each element, the first members negated."""
    if layout == "half":
        half = x.shape[-1] // 2
        return torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    if layout == "half_backwards":
        half = x.shape[-1] // 2
        return torch.cat((x[..., half:], -x[..., :half]), dim=-1)
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, layout: str, angles: str) -> Tensor:
    if angles in ("half", "first_half"):  # one angle for each pair
        if angles == "first_half":
            cos, sin = cos[..., : cos.shape[-1] // 2], sin[..., : sin.shape[-1] // 2]
        first, second = x.chunk(2, dim=-1) if layout == "half" else (x[..., ::2], x[..., 1::2])
        turned = (first * cos - second * sin, second * cos + first * sin)
        if layout == "interleaved":
            return torch.stack(turned, dim=-1).flatten(-2)
        return torch.cat(turned, dim=-1)
    if angles == "doubled":
        cos = cos[..., : cos.shape[-1] // 2].repeat_interleave(2, dim=-1)
        sin = sin[..., : sin.shape[-1] // 2].repeat_interleave(2, dim=-1)
    return x * cos + _turned(x, layout) * sin


def rotary_one(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    unsqueeze_dim: int = 1,
    layout: str = "half",
    angles: str = "full",
    dtype: str = "promoted",
    part: str = "all",
) -> Tensor:
    """Return x with its pairs of elements turned by the angles that cos and sin belong to.

    unsqueeze_dim 1: x [B, H, S, D]; 2: [B, S, H, D]. cos, sin: [B, S, R].
    layout: pairs are elements i and i + D/2 ("half", or "half_backwards" where they turn the other way), or 2i and
    2i + 1 ("interleaved"), or those and the result in the half layout ("interleaved_to_half").
    angles: cos and sin hold one value for each element ("full"); one for each pair ("half"); their first half does
    ("first_half"); their first half does, repeated for its pair ("doubled").
    dtype: computed as PyTorch promotes ("promoted"), that rounded to the dtype of x ("result"), or all of it in float32
    and rounded to the dtype of x ("float32").
    part: every element of x is turned ("all"), or only the first R ("first") or the last R of them ("last").
    """
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return turn(x, cos, sin, layout=layout, angles=angles, dtype=dtype, part=part)


def turn(x: Tensor, cos: Tensor, sin: Tensor, *, layout: str, angles: str, dtype: str, part: str) -> Tensor:
    """Return `rotary_one` of x, with cos and sin that broadcast to it as they are."""
    own = x.dtype
    if dtype == "float32":
        x = x.float()
    width = cos.shape[-1] * (2 if angles == "half" else 1)
    if part == "first":
        y = torch.cat((_rotate(x[..., :width], cos, sin, layout, angles), x[..., width:]), dim=-1)
    elif part == "last":
        y = torch.cat((x[..., :-width], _rotate(x[..., -width:], cos, sin, layout, angles)), dim=-1)
    else:
        y = _rotate(x, cos, sin, layout, angles)
    return y if dtype == "promoted" else y.to(own)


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Return q and k turned as `rotary_one` turns one tensor; the options are those of `rotary_one`."""
    return rotary_one(q, cos, sin, **options), rotary_one(k, cos, sin, **options)


def _rotary_one_repeated(x: Tensor, cos: Tensor, sin: Tensor, **options: Any) -> Tensor:
    if options.pop("angles") != "half":
        raise NotImplementedError("only one angle for each pair can be repeated")
    if options["layout"] == "half":
        cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1)
    else:
        cos, sin = cos.repeat_interleave(2, dim=-1), sin.repeat_interleave(2, dim=-1)
    return rotary_one(x, cos, sin, angles="full", **options)


def _rotary_one_repeated_late(x: Tensor, cos: Tensor, sin: Tensor, *, unsqueeze_dim: int = 1, **options: Any) -> Tensor:
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    if options["layout"] != "interleaved" or options["angles"] != "half" or options["dtype"] != "promoted":
        raise NotImplementedError("only one angle for each pair can be repeated")
    cos, sin = cos.repeat_interleave(2, dim=-1), sin.repeat_interleave(2, dim=-1)
    return _rotate(x, cos, sin, "interleaved", "full")


def _rotary_by_matrices(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, unsqueeze_dim: int = 1, **options: Any
) -> tuple[Tensor, Tensor]:
    if tuple(options.values()) != ("interleaved", "first_half", "promoted", "all"):
        raise NotImplementedError("pairs of neighbours are multiplied by a matrix")
    cos, sin = cos[..., : cos.shape[-1] // 2], sin[..., : sin.shape[-1] // 2]
    matrices = torch.stack((cos, -sin, sin, cos), dim=-1).view(*cos.shape, 2, 2).unsqueeze(unsqueeze_dim)

    def turned(x: Tensor) -> Tensor:
        return (x.reshape(*x.shape[:-1], -1, 1, 2) * matrices).sum(-1).flatten(-2)

    return turned(q), turned(k)


def rotary_vision(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Return q and k [..., H, D] turned by cos and sin [..., D]; the options are those of `rotary_one`."""
    return rotary(q, k, cos, sin, unsqueeze_dim=-2, **options)


def rotary_complex(q: Tensor, k: Tensor, turns: Tensor, *, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """Return q and k with their neighbouring elements, taken as complex numbers, multiplied by `turns` [B, S, D/2].

    Computed in complex64 and rounded to the dtype of q and k, which are [B, H, S, D], or [B, S, H, D] for 2.
    """
    turns = turns.unsqueeze(unsqueeze_dim)

    def turned(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * turns).flatten(3).type_as(x)

    return turned(q), turned(k)


def _heads(name: str) -> Any:
    def shape(n: Mapping[str, Any]) -> Shape:
        heads_first = n.get("unsqueeze_dim", 1) == 1
        return (n["B"], n[name], n["S"], n["D"]) if heads_first else (n["B"], n["S"], n[name], n["D"])

    return shape


def _width(n: Mapping[str, Any]) -> int:
    width: int = n["D"] if n.get("part", "all") == "all" else n["R"]
    return width // 2 if n.get("angles") == "half" else width


def _angles(n: Mapping[str, Any]) -> Shape:
    return (n["B"], n["S"], _width(n))


def _variants(*rows: tuple[str, str, str, str]) -> tuple[Variant, ...]:
    return tuple(Variant(tuple(zip(("layout", "angles", "dtype", "part"), row, strict=True))) for row in rows)


_VARIANTS = _variants(
    ("half", "full", "promoted", "first"),
    ("half", "full", "promoted", "all"),
    ("half", "full", "result", "all"),
    ("half", "full", "float32", "first"),
    ("half", "full", "float32", "all"),
    ("half", "half", "promoted", "all"),
    ("interleaved_to_half", "first_half", "promoted", "all"),
    ("interleaved", "first_half", "promoted", "all"),
    ("interleaved", "full", "promoted", "first"),
    ("interleaved", "full", "promoted", "all"),
    ("interleaved", "full", "float32", "all"),
    ("interleaved", "doubled", "promoted", "first"),
    ("interleaved", "doubled", "promoted", "all"),
    ("interleaved", "doubled", "float32", "all"),
    ("interleaved", "half", "promoted", "all"),
    ("interleaved", "half", "float32", "last"),
    ("half_backwards", "full", "promoted", "all"),
)
_NAMES: dict[tuple[tuple[str, Scalar], ...], str] = {
    (): "rotary_pos_emb_variant",
    (("part", "first"),): "rotary_pos_emb_partial",
    (("layout", "interleaved"),): "rotary_pos_emb_interleaved",
    (("layout", "half"), ("angles", "full"), ("part", "all")): "rotary_pos_emb",
}
_COS_SIN = (
    Role("cos", "argument", _angles, follows="parameters"),
    Role("sin", "argument", _angles, follows="parameters"),
)

ROTARY = Operation(
    name="rotary",
    reference=rotary,
    forms=(_rotary_by_matrices,),
    roles=(Role("q", "argument", _heads("Hq")), Role("k", "argument", _heads("Hk")), *_COS_SIN),
    choices={"unsqueeze_dim": (1, 2)},
    variants=_VARIANTS,
    operators=(("mul",), ("cat",)),
    layer_names=_NAMES,
    function=True,
)

ROTARY_ONE = Operation(
    name="rotary_one",
    reference=rotary_one,
    forms=(_rotary_one_repeated, _rotary_one_repeated_late),
    roles=(Role("x", "argument", _heads("Hq")), *_COS_SIN),
    choices={"unsqueeze_dim": (1, 2)},
    variants=_VARIANTS,
    operators=(("mul",), ("cat",)),
    layer_names={key: f"{name}_one" for key, name in _NAMES.items()},
    function=True,
)

ROTARY_VISION = Operation(
    name="rotary_vision",
    reference=rotary_vision,
    roles=(
        Role("q", "argument", lambda n: (*n["lead"], n["Hq"], n["D"])),
        Role("k", "argument", lambda n: (*n["lead"], n["Hk"], n["D"])),
        Role("cos", "argument", lambda n: (*n["lead"], _width(n)), follows="parameters"),
        Role("sin", "argument", lambda n: (*n["lead"], _width(n)), follows="parameters"),
    ),
    variants=_variants(
        ("half", "full", "float32", "all"), ("half", "full", "promoted", "all"), ("half", "full", "result", "all")
    ),
    operators=(("mul",), ("cat",)),
    layer_names={(): "rotary_pos_emb_vision"},
    function=True,
    any_rank=True,
)

ROTARY_COMPLEX = Operation(
    name="rotary_complex",
    reference=rotary_complex,
    roles=(
        Role("q", "argument", _heads("Hq")),
        Role("k", "argument", _heads("Hk")),
        Role("turns", "argument", lambda n: (n["B"], n["S"], n["D"] // 2), follows="complex"),
    ),
    choices={"unsqueeze_dim": (1, 2)},
    variants=(Variant(),),
    operators=(("mul", "mul.Tensor"), ("view_as_complex.default",)),
    layer_names={(): "rotary_pos_emb_complex"},
    function=True,
)
