"""Layers of a transformer: a mixer and a feed-forward block, each with a norm and a residual sum.

Children are leaves here. What a child gives besides its first result (attention weights, router logits) and what it is
called with besides the hidden states (masks, caches, positions) is no part of the meaning.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from kernelwise._data import Scalar
from kernelwise.ops._activations import ACTIVATIONS
from kernelwise.ops._operation import Operation, Role, Shape, Variant

Module = Callable[..., Tensor]


def decoder_layer(
    x: Tensor,
    input_norm: Module,
    attention: Module,
    attention_out: Module | None,
    mlp_norm: Module,
    mlp: Module,
    shared_mlp: Module | None,
    mlp_out: Module | None,
    last: Module | None,
    multiplier: float | None,
    x_scale: Tensor | None,
    h_scale: Tensor | None,
    *,
    returns: str = "tensor",
    clamp: str = "none",
    passing: str = "plain",
    norm: str | None = None,
) -> Tensor | tuple[Tensor]:
    """Return the pre-norm layer `h + mlp(mlp_norm(h))` with `h = x + attention(input_norm(x))`.

    x: [..., H]. `attention` is whatever mixes tokens. What `shared_mlp` gives is added to what `mlp`, which then is a
    mixture of experts, gives. `attention_out` and `mlp_out` are called on what the two blocks give, before it is added:
    a second pair of norms (Gemma 2), a scale for each channel (DINOv2). `multiplier` scales it (Granite); `x_scale` and
    `h_scale` [H] scale what it is added to. `last` is called on the result. `returns` "tuple": a tuple with the result
    first. `clamp` "float16": in that dtype the result is kept away from infinity. Two options say nothing of the result:
    `passing` is "plain" where children are all there is, and get the arguments as they come, whichever of them are None;
    `norm` is the operation that `mlp_norm` is, if it is one.
    """
    h = _weighted(x, x_scale) + _scaled(_after(attention_out, attention(input_norm(x))), multiplier)
    normed = mlp_norm(h)
    added = mlp(normed) if shared_mlp is None else mlp(normed) + shared_mlp(normed)
    y = _weighted(h, h_scale) + _scaled(_after(mlp_out, added), multiplier)
    return _given(_after(last, y), returns, clamp)


def _after(child: Module | None, y: Tensor) -> Tensor:
    return y if child is None else child(y)


def _scaled(y: Tensor, multiplier: float | None) -> Tensor:
    return y if multiplier is None else y * multiplier


def _weighted(y: Tensor, scale: Tensor | None) -> Tensor:
    return y if scale is None else y * scale


def _given(y: Tensor, returns: str, clamp: str) -> Tensor | tuple[Tensor]:
    if clamp == "float16" and y.dtype == torch.float16:
        limit = torch.finfo(y.dtype).max - 1000
        y = torch.clamp(y, min=-limit, max=limit)
    return y if returns == "tensor" else (y,)


def decoder_layer_inline(
    x: Tensor,
    input_norm: Module,
    attention: Module,
    mlp_norm: Module,
    up: Module,
    down: Module,
    *,
    activation: str,
    returns: str = "tensor",
    clamp: str = "none",
) -> Tensor | tuple[Tensor]:
    """Return the pre-norm layer whose feed-forward block is two children of its own: `down(activation(up(...)))`."""
    h = x + attention(input_norm(x))
    return _given(h + down(ACTIVATIONS[activation][0](up(mlp_norm(h)))), returns, clamp)


def _inline_in_rows(
    x: Tensor,
    input_norm: Module,
    attention: Module,
    mlp_norm: Module,
    up: Module,
    down: Module,
    *,
    activation: str,
    returns: str,
    clamp: str,
) -> Tensor | tuple[Tensor]:
    h = x + attention(input_norm(x))
    rows = h.reshape(-1, h.shape[-1])
    y = rows + down(ACTIVATIONS[activation][0](up(mlp_norm(rows))))
    return _given(y.view(h.shape), returns, clamp)


def decoder_layer_cross(
    x: Tensor,
    context: Tensor | None,
    input_norm: Module,
    attention: Module,
    attention_out: Module | None,
    cross_norm: Module,
    cross_attention: Module,
    cross_out: Module | None,
    mlp_norm: Module,
    mlp: Module,
    mlp_out: Module | None,
    *,
    always: bool = False,
    returns: str = "tensor",
    clamp: str = "none",
) -> Tensor | tuple[Tensor]:
    """Return the pre-norm layer with attention to a context [..., S', H] between its two blocks, where there is one.

    `always`: the context is one of the arguments that are handed on, and there is attention to it in any case.
    `attention_out`, `cross_out` and `mlp_out` are called on what the blocks give, before it is added.
    """
    h = x + _after(attention_out, attention(input_norm(x)))
    if always or context is not None:
        normed = cross_norm(h)
        h = h + _after(cross_out, cross_attention(normed) if context is None else cross_attention(normed, context))
    return _given(h + _after(mlp_out, mlp(mlp_norm(h))), returns, clamp)


def decoder_layer_cross_inline(
    x: Tensor,
    context: Tensor | None,
    input_norm: Module,
    attention: Module,
    cross_norm: Module,
    cross_attention: Module,
    mlp_norm: Module,
    up: Module,
    down: Module,
    *,
    activation: str,
    returns: str = "tensor",
    clamp: str = "none",
) -> Tensor | tuple[Tensor]:
    """Return `decoder_layer_inline` with attention to a context between its two blocks, where there is one."""
    h = x + attention(input_norm(x))
    if context is not None:
        h = h + cross_attention(cross_norm(h), context)
    return _given(h + down(ACTIVATIONS[activation][0](up(mlp_norm(h)))), returns, clamp)


def decoder_layer_parallel(
    x: Tensor, norm: Module, block: Module, other_norm: Module | None, other_block: Module, *, returns: str = "tensor"
) -> Tensor | tuple[Tensor]:
    """Return `x + block(norm(x)) + other_block(other_norm(x))`; without `other_norm` both blocks share one norm.

    Which of the blocks is the attention the sum does not tell.
    """
    normed = norm(x)
    y = x + block(normed) + other_block(normed if other_norm is None else other_norm(x))
    return _given(y, returns, "none")


def _parallel_added_first(
    x: Tensor, norm: Module, block: Module, other_norm: Module | None, other_block: Module, *, returns: str
) -> Tensor | tuple[Tensor]:
    normed = norm(x)
    y = x + (block(normed) + other_block(normed if other_norm is None else other_norm(x)))
    return _given(y, returns, "none")


def decoder_layer_normed_out(
    x: Tensor, attention: Module, attention_norm: Module, mlp: Module, mlp_norm: Module, *, returns: str = "tensor"
) -> Tensor | tuple[Tensor]:
    """Return `h + mlp_norm(mlp(h))` with `h = x + attention_norm(attention(x))`: only what is added is normed (OLMo 2)."""
    h = x + attention_norm(attention(x))
    return _given(h + mlp_norm(mlp(h)), returns, "none")


def decoder_layer_post_norm(
    x: Tensor, attention: Module, attention_norm: Module, mlp: Module, mlp_norm: Module, *, returns: str = "tensor"
) -> Tensor | tuple[Tensor]:
    """Return `mlp_norm(h + mlp(h))` with `h = attention_norm(x + attention(x))`: the sums are normed (BERT)."""
    h = attention_norm(x + attention(x))
    return _given(mlp_norm(h + mlp(h)), returns, "none")


def residual_block(x: Tensor, norm: Module, inner: Module, *, returns: str = "tensor") -> Tensor | tuple[Tensor]:
    """Return `x + inner(norm(x))`: half of a pre-norm layer, or all of one that has a mixer alone (Mamba, T5)."""
    return _given(x + inner(norm(x)), returns, "none")


def _hidden(n: Mapping[str, Any]) -> Shape:
    return (n["B"], n["S"], n["H"])


def _inner(n: Mapping[str, Any]) -> Shape:
    return (n["B"], n["S"], n["I"])


def _wide(n: Mapping[str, Any]) -> Shape:
    return (n["H"],)


_OTHERS = {
    "x": Role("x", "argument", _hidden),
    "context": Role("context", "argument", _hidden),
    "up": Role("up", "child", _inner),
    "multiplier": Role("multiplier", "number"),
    "x_scale": Role("x_scale", "attribute", _wide),
    "h_scale": Role("h_scale", "attribute", _wide),
}


def _roles(names: str) -> tuple[Role, ...]:
    return tuple(_OTHERS.get(name) or Role(name, "child", _hidden) for name in names.split())


def _each(*, clamps: bool, **options: tuple[Scalar, ...]) -> Iterator[tuple[tuple[str, Scalar], ...]]:
    every: dict[str, tuple[Scalar, ...]] = {**options, "returns": ("tensor", "tuple")}
    if clamps:
        every["clamp"] = ("none", "float16")
    for values in itertools.product(*every.values()):
        yield tuple(zip(every, values, strict=True))


def _without(*names: str) -> tuple[tuple[str, Scalar], ...]:
    return tuple((name, None) for name in names)


_ACTIVATIONS: tuple[Scalar, ...] = tuple(ACTIVATIONS)
# One of these stands in the graph of every activation.
_NONLINEAR = (
    "silu", "gelu.default", "sigmoid", "relu", "tanh", "erf", "hardtanh.default", "leaky_relu.default", "elu.default",
    "softplus.default", "mish.default", "hardswish.default", "hardsigmoid.default",
)  # fmt: skip

_EXTRAS = ("attention_out", "shared_mlp", "mlp_out", "last", "multiplier", "x_scale", "h_scale")
_SHAPES = tuple(
    _without(*(name for name in _EXTRAS if name not in there))
    for there in (
        (),
        ("attention_out", "mlp_out"),
        ("multiplier",),
        ("attention_out",),
        ("mlp_out",),
        ("shared_mlp",),
        ("shared_mlp", "multiplier"),
        ("last",),
        ("x_scale", "h_scale"),
    )
)
DECODER_LAYER = Operation(
    name="decoder_layer",
    reference=decoder_layer,
    roles=_roles(
        "x input_norm attention attention_out mlp_norm mlp shared_mlp mlp_out last multiplier x_scale h_scale"
    ),
    variants=tuple(Variant(options, absent) for options in _each(clamps=True) for absent in _SHAPES),
    operators=(("call",), ("add",)),
    layer_names={(): "DecoderLayer"},
    norms=("input_norm", "mlp_norm"),
)

DECODER_LAYER_INLINE = Operation(
    name="decoder_layer_inline",
    reference=decoder_layer_inline,
    forms=(_inline_in_rows,),
    roles=_roles("x input_norm attention mlp_norm up down"),
    variants=tuple(Variant(options) for options in _each(clamps=True, activation=_ACTIVATIONS)),
    operators=(("call",), ("add",), _NONLINEAR),
    layer_names={(): "InlineDecoderLayer"},
    norms=("input_norm", "mlp_norm"),
)

DECODER_LAYER_CROSS = Operation(
    name="decoder_layer_cross",
    reference=decoder_layer_cross,
    roles=_roles(
        "x context input_norm attention attention_out cross_norm cross_attention cross_out mlp_norm mlp mlp_out"
    ),
    variants=tuple(
        Variant(options, (*outs, *context))
        for always, context in ((False, _without()), (True, _without("context")))
        for outs in (_without("attention_out", "cross_out", "mlp_out"), _without())
        for options in _each(clamps=True, always=(always,))
    ),
    operators=(("call",), ("add",)),
    layer_names={(): "CrossDecoderLayer"},
    norms=("input_norm", "cross_norm", "mlp_norm"),
)

DECODER_LAYER_CROSS_INLINE = Operation(
    name="decoder_layer_cross_inline",
    reference=decoder_layer_cross_inline,
    roles=_roles("x context input_norm attention cross_norm cross_attention mlp_norm up down"),
    variants=tuple(Variant(options) for options in _each(clamps=True, activation=_ACTIVATIONS)),
    operators=(("call",), ("add",), _NONLINEAR),
    layer_names={(): "InlineCrossDecoderLayer"},
    norms=("input_norm", "cross_norm", "mlp_norm"),
)

DECODER_LAYER_PARALLEL = Operation(
    name="decoder_layer_parallel",
    reference=decoder_layer_parallel,
    forms=(_parallel_added_first,),
    roles=_roles("x norm block other_norm other_block"),
    variants=tuple(
        Variant(options, absent) for options in _each(clamps=False) for absent in (_without(), _without("other_norm"))
    ),
    operators=(("call",), ("add",)),
    layer_names={(): "ParallelDecoderLayer"},
    norms=("norm", "other_norm"),
)

DECODER_LAYER_NORMED_OUT = Operation(
    name="decoder_layer_normed_out",
    reference=decoder_layer_normed_out,
    roles=_roles("x attention attention_norm mlp mlp_norm"),
    variants=tuple(Variant(options) for options in _each(clamps=False)),
    operators=(("call",), ("add",)),
    layer_names={(): "NormedOutDecoderLayer"},
    norms=("attention_norm", "mlp_norm"),
)

DECODER_LAYER_POST_NORM = Operation(
    name="decoder_layer_post_norm",
    reference=decoder_layer_post_norm,
    roles=_roles("x attention attention_norm mlp mlp_norm"),
    variants=tuple(Variant(options) for options in _each(clamps=False)),
    operators=(("call",), ("add",)),
    layer_names={(): "PostNormDecoderLayer"},
    norms=("attention_norm", "mlp_norm"),
)

RESIDUAL_BLOCK = Operation(
    name="residual_block",
    reference=residual_block,
    roles=_roles("x norm inner"),
    variants=tuple(Variant(options) for options in _each(clamps=False)),
    operators=(("call",), ("add",)),
    layer_names={(): "ResidualBlock"},
    norms=("norm",),
)

LAYERS = (
    DECODER_LAYER,
    DECODER_LAYER_PARALLEL,
    DECODER_LAYER_NORMED_OUT,
    DECODER_LAYER_POST_NORM,
    DECODER_LAYER_CROSS,
    DECODER_LAYER_INLINE,
    DECODER_LAYER_CROSS_INLINE,
    RESIDUAL_BLOCK,
)
