"""Rotary position embedding, applied to queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor

from kernelwise.ops._operation import Operation, Role, Variant


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, layout: str) -> Tensor:
    if layout == "half":
        half = x.shape[-1] // 2
        turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    else:
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    return x * cos + turned * sin


def rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, unsqueeze_dim: int = 1, layout: str = "half"
) -> tuple[Tensor, Tensor]:
    """Return q and k with their pairs of elements turned by the angles that cos and sin belong to.

    unsqueeze_dim 1: q [B, Hq, S, D], k [B, Hk, S, D]; 2: [B, S, Hq, D], [B, S, Hk, D]. cos, sin: [B, S, D]. Pairs are
    elements i and i + D/2 (layout "half") or 2i and 2i + 1 ("interleaved").
    """
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return _rotate(q, cos, sin, layout), _rotate(k, cos, sin, layout)


ROTARY = Operation(
    name="rotary",
    reference=rotary,
    roles=(
        Role("q", "argument", lambda n: _heads(n, "Hq")),
        Role("k", "argument", lambda n: _heads(n, "Hk")),
        Role("cos", "argument", lambda n: (n["B"], n["S"], n["D"])),
        Role("sin", "argument", lambda n: (n["B"], n["S"], n["D"])),
    ),
    choices={"unsqueeze_dim": (1, 2)},
    variants=(Variant((("layout", "half"),)), Variant((("layout", "interleaved"),))),
    operators=(("mul",), ("cat",)),
    layer_names={(): "rotary_pos_emb_interleaved", (("layout", "half"),): "rotary_pos_emb"},
    function=True,
)


def _heads(sizes: object, name: str) -> tuple[int, ...]:
    n: dict[str, int] = sizes  # type: ignore[assignment]
    return (n["B"], n[name], n["S"], n["D"]) if n.get("unsqueeze_dim", 1) == 1 else (n["B"], n["S"], n[name], n["D"])
