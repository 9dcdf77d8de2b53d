"""The router of a mixture of experts: a linear layer, softmax, and the largest few."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kernelwise.ops._operation import Operation, Role, Variant


def softmax_router(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    top_k: int,
    *,
    order: str = "softmax_first",
    normalize: bool = True,
    dtype: str = "float32",
    rows: bool = True,
    dim: int = -1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the logits [N, E] of x [N, H], the weights [N, K] of the `top_k` experts of each row, and their indices.

    weight: [E, H]; bias: [E] or None. `order` "softmax_first": the largest probabilities, divided by their sum if
    `normalize`; "top_k_first": the probabilities of the largest logits among themselves. `dtype` of the probabilities:
    "float32"; "result": that, rounded to the dtype of the logits; "logits": the logits are in float32 too, and the weights
    rounded to the dtype of x; "own": that of the logits. `rows`: x may have more dimensions and is taken as rows.
    `dim`: the dimension of the softmax after the choice, where 1 is right for two dimensions alone.
    """
    logits = F.linear(x.reshape(-1, x.shape[-1]) if rows else x, weight, bias)
    if dtype == "logits":
        logits = logits.float()
    if order == "softmax_first":
        weights, indices = torch.topk(F.softmax(logits.float(), dim=-1), top_k, dim=-1)
        if normalize:
            weights = weights / weights.sum(dim=-1, keepdim=True)
    else:
        largest, indices = torch.topk(logits, top_k, dim=-1)
        weights = F.softmax(largest if dtype == "own" else largest.float(), dim=dim)
    return logits, weights.to(x.dtype) if dtype in ("result", "logits") else weights, indices


SOFTMAX_ROUTER = Operation(
    name="softmax_router",
    reference=softmax_router,
    roles=(
        Role("x", "argument", lambda n: (n["B"], n["S"], n["H"])),
        Role("weight", "attribute", lambda n: (n["I"], n["H"])),
        Role("bias", "attribute", lambda n: (n["I"],)),
    ),
    variants=tuple(
        Variant(tuple(zip(("order", "normalize", "dtype", "rows", "dim"), row, strict=True)), absent)
        for row in (
            ("softmax_first", True, "float32", True, -1),
            ("softmax_first", False, "float32", True, -1),
            ("softmax_first", True, "result", True, -1),
            ("softmax_first", False, "result", True, -1),
            ("top_k_first", False, "own", False, -1),
            ("top_k_first", False, "own", False, 1),
            ("top_k_first", False, "result", False, 1),
            ("top_k_first", False, "logits", False, -1),
        )
        for absent in ((("bias", None),), ())
    ),
    operators=(("topk.default",), ("_softmax.default",)),
    layer_names={(): "SoftmaxRouter"},
    choices={"top_k": ()},
)
