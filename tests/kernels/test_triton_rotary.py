"""Rotary embedding in Triton against `apply_rotary_pos_emb` of transformers, on the GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from exact import assert_as_exact

pytestmark = pytest.mark.gpu


@pytest.fixture
def rotary() -> Callable[..., Any]:
    from kernelwise.kernels.triton.rotary import rotary

    return rotary


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def own(q, k, cos, sin, unsqueeze_dim=1):  # type: ignore[no-untyped-def]
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


def angles(batch: int, tokens: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """General: the second half does not repeat the first."""
    phase = 7 * torch.randn(batch, tokens, width, device="cuda")
    return phase.cos().to(dtype), phase.sin().to(dtype)


def compare(rotary: Any, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, **kwargs: Any) -> None:
    kwargs.setdefault("scales", (1.0,))
    unsqueeze_dim = kwargs.pop("unsqueeze_dim", 1)
    assert_as_exact(
        lambda q, k: own(q, k, cos.to(q.dtype) if q.dtype == torch.float64 else cos, sin, unsqueeze_dim),
        lambda q, k: rotary(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim),
        {"q": q, "k": k},
        scaled=("q", "k"),
        **kwargs,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [2, 6, 64, 80, 96, 128, 256])
def test_every_width(rotary: Any, dtype: torch.dtype, width: int) -> None:
    q = torch.randn(2, 5, 6, width, device="cuda").to(dtype).transpose(1, 2)
    k = torch.randn(2, 5, 2, width, device="cuda").to(dtype).transpose(1, 2)
    compare(rotary, q, k, *angles(1, 5, width, dtype), scales=(1e-2, 1.0, 1e2))


@pytest.mark.parametrize("heads", [(1, 1), (32, 8), (14, 2), (9, 3), (40, 40), (71, 1)])
@pytest.mark.parametrize("tokens", [1, 2000])
def test_every_way_of_cutting(rotary: Any, heads: tuple[int, int], tokens: int) -> None:
    q, k = (torch.randn(1, tokens, n, 64, device="cuda").bfloat16().transpose(1, 2) for n in heads)
    compare(rotary, q, k, *angles(1, tokens, 64, torch.bfloat16))


@pytest.mark.parametrize("of_each", [False, True])
def test_more_sequences_than_a_grid_is_high(rotary: Any, of_each: bool) -> None:
    q, k = (torch.randn(70_000, 2, n, 8, device="cuda").transpose(1, 2) for n in (2, 1))
    compare(rotary, q, k, *angles(70_000 if of_each else 1, 2, 8, torch.float32))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("unsqueeze_dim", [1, 2])
def test_layouts(rotary: Any, batch: int, unsqueeze_dim: int) -> None:
    packed = torch.randn(3, 7, 12, 64, device="cuda").bfloat16()
    q, k = packed[:, :, :8], packed[:, :, 8:10]
    if unsqueeze_dim == 1:
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    for q_, k_ in ((q, k), (q.contiguous(), k.contiguous()), (q[..., ::2], k[..., ::2])):
        cos, sin = angles(batch, 7, q_.shape[-1], torch.bfloat16)
        compare(rotary, q_, k_, cos, sin, unsqueeze_dim=unsqueeze_dim)
    cos, sin = angles(1, 7, 64, torch.bfloat16)
    compare(rotary, q, k, cos.expand(3, -1, -1), sin.expand(3, -1, -1), unsqueeze_dim=unsqueeze_dim)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_angles_with_half_inputs(rotary: Any, dtype: torch.dtype) -> None:
    q, k = (torch.randn(2, 5, n, 128, device="cuda").to(dtype).transpose(1, 2) for n in (6, 2))
    cos, sin = angles(1, 5, 128, torch.float32)
    assert rotary(q, k, cos, sin)[0].dtype == torch.float32
    compare(rotary, q, k, cos, sin)


def test_gradients_of_the_angles(rotary: Any) -> None:
    q, k = (torch.randn(2, n, 5, 16, device="cuda") for n in (3, 1))
    cos, sin = angles(2, 5, 16, torch.float32)
    assert_as_exact(own, rotary, {"q": q, "k": k, "cos": cos, "sin": sin})


def test_one_gradient_alone(rotary: Any) -> None:
    q, k = (torch.randn(1, n, 5, 16, device="cuda", requires_grad=True) for n in (3, 1))
    cos, sin = angles(1, 5, 16, torch.float32)
    expected = torch.autograd.grad(own(q, k, cos, sin)[1].sum(), k)[0]
    torch.testing.assert_close(torch.autograd.grad(rotary(q, k, cos, sin)[1].sum(), k)[0], expected)


def test_second_derivatives(rotary: Any) -> None:
    cos, sin = angles(1, 5, 16, torch.float32)

    def penalty(rotate: Any, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs = rotate(q, k, cos, sin)
        grads = torch.autograd.grad(sum((o**3).sum() for o in outputs), (q, k), create_graph=True)
        return torch.autograd.grad(sum((g**2).sum() for g in grads), (q, k))

    q, k = (torch.randn(1, n, 5, 16, device="cuda", requires_grad=True) for n in (3, 1))
    for expected, actual in zip(penalty(own, q, k), penalty(rotary, q, k), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())  # of sums


def test_no_tokens(rotary: Any) -> None:
    q, k = (torch.randn(2, n, 0, 16, device="cuda", requires_grad=True) for n in (3, 1))
    q_out, k_out = rotary(q, k, *angles(1, 0, 16, torch.float32))
    assert q_out.shape == q.shape
    assert torch.autograd.grad(k_out.sum(), k)[0].shape == k.shape


def test_what_is_refused(rotary: Any) -> None:
    q, k = (torch.randn(1, n, 5, 16, device="cuda") for n in (3, 1))
    cos, sin = angles(1, 5, 16, torch.float32)
    rotary(q, k, cos, sin)  # what was checked for one call says nothing of the next of its kind
    with pytest.raises(ValueError, match="float64"):
        rotary(q.double(), k.double(), cos.double(), sin.double())
    with pytest.raises(ValueError, match="are on"):
        rotary(q, k, cos.cpu(), sin)
    with pytest.raises(ValueError, match="number of heads"):
        rotary(q, k[:, :, :4], cos, sin)
    with pytest.raises(ValueError, match="do not fit"):
        rotary(q, k, cos[:, :4], sin[:, :4])


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles(rotary: Any, dynamic: bool) -> None:
    torch._dynamo.reset()

    def layer(x: torch.Tensor, phase: torch.Tensor, rotate: Any) -> torch.Tensor:
        cos, sin = phase.cos(), phase.sin()
        q, k = (x * 2).view(*x.shape[:2], 6, 64).split((4, 2), dim=2)
        q, k = rotate(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
        return torch.matmul(q, k[:, :1].transpose(2, 3))

    compiled = torch.compile(lambda x, phase: layer(x, phase, rotary), fullgraph=True, dynamic=dynamic)
    for tokens in (5, 1700):
        x = torch.randn(2, tokens, 6 * 64, device="cuda").bfloat16()
        phase = torch.randn(1, tokens, 64, device="cuda").bfloat16()
        assert_as_exact(
            lambda x, phase=phase: layer(x, phase.to(x.dtype), own),
            lambda x, phase=phase: compiled(x, phase),
            {"x": x},
            scales=(1.0,),
        )


def test_is_a_sound_operation() -> None:
    from kernelwise.kernels.triton import rotary

    q, k = (torch.randn(2, n, 5, 16, device="cuda", requires_grad=True) for n in (3, 1))
    torch.library.opcheck(rotary._operation, (q, k, *angles(1, 5, 16, torch.float32), 1))
