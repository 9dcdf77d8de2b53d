"""Norm and rotary embedding of queries and keys in one launch against the layer's steps, on the GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from exact import assert_as_exact

pytestmark = pytest.mark.gpu

EPS = 1e-6
NAMES = ("q", "k", "q_weight", "k_weight")


@pytest.fixture
def qk_norm_rotary() -> Callable[..., Any]:
    from kernelwise.kernels.triton.qk_norm_rotary import qk_norm_rotary

    return qk_norm_rotary


def own_norm(x: torch.Tensor, weight: torch.Tensor, offset: float, cast: str) -> torch.Tensor:
    wide = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + EPS)
    if cast == "before":
        return (offset + weight) * wide.to(x.dtype)
    return ((offset + weight.float()) * wide).to(x.dtype)


def own(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    offset: float = 0.0,
    cast: str = "before",
    dim: int = 1,
) -> Any:
    cos, sin = cos.unsqueeze(dim), sin.unsqueeze(dim)

    def turned(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat((-second, first), -1) * sin

    return turned(own_norm(q, q_weight, offset, cast)), turned(own_norm(k, k_weight, offset, cast))


def inputs(
    batch: int, tokens: int, heads: tuple[int, int], width: int, dtype: torch.dtype, weights: Any = None
) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator("cuda").manual_seed(tokens)
    draw = lambda *shape: torch.randn(shape, device="cuda", generator=generator)  # noqa: E731
    q, k = (draw(batch, tokens, n, width).to(dtype).transpose(1, 2) for n in heads)
    phase = 7 * draw(1, tokens, width)
    scale = [(1 + 0.3 * draw(width)).to(weights or dtype) for _ in range(2)]
    return q, k, *scale, phase.cos().to(dtype), phase.sin().to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "width"),
    [
        (1, 1, (32, 8), 128),
        (2, 7, (5, 3), 80),
        (2, 700, (16, 8), 64),
        (3, 333, (8, 4), 256),
        (1, 4, (1, 1), 6),
        (70_000, 1, (2, 1), 8),
    ],
)
def test_every_form(
    qk_norm_rotary: Any, dtype: torch.dtype, batch: int, tokens: int, heads: tuple[int, int], width: int
) -> None:
    *given, cos, sin = inputs(batch, tokens, heads, width, dtype)
    for options in ({}, {"offset": 1.0, "cast": "after"}):
        assert_as_exact(
            lambda q, k, q_weight, k_weight, o=options: own(
                q, k, q_weight, k_weight, cos.to(q.dtype), sin.to(q.dtype), **o
            ),
            lambda q, k, q_weight, k_weight, o=options: qk_norm_rotary(q, k, q_weight, k_weight, cos, sin, EPS, **o),
            dict(zip(NAMES, given, strict=True)),
            scaled=("q", "k"),
        )


@pytest.mark.parametrize("cast", ["before", "after"])
def test_float32_weights_and_tokens_first(qk_norm_rotary: Any, cast: str) -> None:
    q, k, *weights, cos, sin = inputs(2, 9, (4, 2), 64, torch.bfloat16, torch.float32)
    assert_as_exact(
        lambda q, k, q_weight, k_weight: own(q, k, q_weight, k_weight, cos, sin, cast=cast, dim=2),
        lambda q, k, q_weight, k_weight: qk_norm_rotary(
            q, k, q_weight, k_weight, cos, sin, EPS, cast=cast, unsqueeze_dim=2
        ),
        dict(zip(NAMES, (q.transpose(1, 2), k.transpose(1, 2), *weights), strict=True)),
        scaled=("q", "k"),
    )


def test_strides(qk_norm_rotary: Any) -> None:
    *_, q_weight, k_weight, cos, sin = inputs(2, 9, (4, 2), 64, torch.bfloat16)
    packed = torch.randn(2, 9, 8 * 64 + 3, device="cuda").bfloat16()
    for start in (0, 3):
        q = packed[..., start : start + 256].view(2, 9, 4, 64).transpose(1, 2)
        k = packed[..., start + 256 : start + 384].view(2, 9, 2, 64).transpose(1, 2)
        assert_as_exact(
            lambda q, k, q_weight, k_weight: own(q, k, q_weight, k_weight, cos, sin),
            lambda q, k, q_weight, k_weight: qk_norm_rotary(q, k, q_weight, k_weight, cos, sin, EPS),
            dict(zip(NAMES, (q, k, q_weight, k_weight), strict=True)),
            scales=(1.0,),
        )


def test_gradients_of_the_angles_and_second_derivatives(qk_norm_rotary: Any) -> None:
    def results(function: Callable[..., Any]) -> Any:
        leaves = [t.detach().clone().requires_grad_() for t in inputs(1, 3, (2, 1), 8, torch.float32)]
        angles = torch.autograd.grad(sum(r.square().sum() for r in function(*leaves)), leaves)
        fixed = [*leaves[:4], *(t.detach() for t in leaves[4:])]
        first = torch.autograd.grad(sum(r.pow(3).sum() for r in function(*fixed)), leaves[:4], create_graph=True)
        return *angles, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves[:4])

    for new, old in zip(results(lambda *a: qk_norm_rotary(*a, EPS)), results(own), strict=True):
        torch.testing.assert_close(new, old, rtol=1e-3, atol=1e-3)


def test_no_tokens_and_what_is_refused(qk_norm_rotary: Any) -> None:
    q, k, q_weight, k_weight, cos, sin = inputs(2, 3, (4, 2), 16, torch.bfloat16)
    empty = qk_norm_rotary(q[:, :, :0], k[:, :, :0], q_weight, k_weight, cos[:, :0], sin[:, :0], EPS)
    assert [tuple(r.shape) for r in empty] == [(2, 4, 0, 16), (2, 2, 0, 16)]
    qk_norm_rotary(q, k, q_weight, k_weight, cos, sin, EPS)
    for match, arguments in (
        ("q_weight is", (q, k, q_weight[:4], k_weight, cos, sin)),
        ("both weights", (q, k, q_weight, k_weight.float(), cos, sin)),
        ("one dtype", (q, k.half(), q_weight, k_weight, cos, sin)),
        ("do not fit", (q, k, q_weight, k_weight, cos[:, :2], sin[:, :2])),
    ):
        with pytest.raises(ValueError, match=match):
            qk_norm_rotary(*arguments, EPS)
    with pytest.raises(ValueError, match="cast"):
        qk_norm_rotary(q, k, q_weight, k_weight, cos, sin, EPS, cast="never")


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles(qk_norm_rotary: Any, dynamic: bool) -> None:
    torch._dynamo.reset()

    def layer(x: torch.Tensor, q_weight: torch.Tensor, k_weight: torch.Tensor, angles: Any, function: Any) -> Any:
        q, k = (x * 2).view(2, -1, 6, 64).transpose(1, 2).split((4, 2), 1)
        q, k = function(q, k, q_weight, k_weight, *angles)
        return q.transpose(1, 2).flatten(2) * 2, k + 1

    compiled = torch.compile(
        lambda x, a, b, angles: layer(x, a, b, angles, lambda *given: qk_norm_rotary(*given, EPS)),
        fullgraph=True,
        dynamic=dynamic,
    )
    for tokens in (5, 300):
        *_, q_weight, k_weight, cos, sin = inputs(2, tokens, (4, 2), 64, torch.bfloat16)
        x = torch.randn(2, tokens, 384, device="cuda").bfloat16()
        assert_as_exact(
            lambda x, a, b, angles=(cos, sin): layer(x, a, b, angles, own),
            lambda x, a, b, angles=(cos, sin): compiled(x, a, b, angles),
            (x, q_weight, k_weight),
            scales=(1.0,),
        )


def test_is_a_sound_operation() -> None:
    from kernelwise.kernels.triton import qk_norm_rotary

    *given, cos, sin = inputs(1, 3, (2, 1), 16, torch.float32)
    leaves = [t.detach().requires_grad_() for t in given]
    torch.library.opcheck(qk_norm_rotary._operation, (*leaves, cos, sin, EPS, 0.0, "before", 1))


def test_captures_in_a_graph(qk_norm_rotary: Any) -> None:
    *given, cos, sin = inputs(2, 33, (4, 2), 64, torch.bfloat16)
    leaves = [t.detach().requires_grad_() for t in given]

    def step() -> tuple[torch.Tensor, ...]:
        q, k = qk_norm_rotary(*leaves, cos, sin, EPS)
        return q, k, *torch.autograd.grad((q, k), leaves, (torch.ones_like(q), torch.ones_like(k)))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = step()
    with torch.no_grad():
        leaves[0].normal_()
    graph.replay()
    for old, new in zip(captured, step(), strict=True):
        assert torch.equal(old, new)
