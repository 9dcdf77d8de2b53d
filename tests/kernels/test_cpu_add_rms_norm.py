"""Residual addition and RMSNorm in C++ against the two steps in plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from exact import assert_as_exact

cpu = pytest.importorskip("kernelwise.kernels.cpu.add_rms_norm", exc_type=ImportError)
add_rms_norm = cpu.add_rms_norm

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
EPS = 1e-6


def own(x, residual, weight=None, *, offset=0.0, cast="before"):
    total = x + residual
    wide = total.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    if weight is None:
        return wide.to(x.dtype), total
    if cast == "before":
        return (weight if offset == 0 else offset + weight) * wide.to(x.dtype), total
    return ((offset + weight.float()) * wide).to(x.dtype), total


def check(x, residual, weight=None, *, scales=(1.0,), **options):
    inputs = {"x": x, "residual": residual} | ({} if weight is None else {"weight": weight})
    assert_as_exact(
        lambda x, residual, weight=None: own(x, residual, weight, **options),
        lambda x, residual, weight=None: add_rms_norm(x, residual, weight, EPS, **options),
        inputs,
        scales=scales,
        scaled=("x", "residual"),
    )


@DTYPES
@pytest.mark.parametrize("width", [1, 7, 33, 100, 577, 2304, 5120])
def test_exact_at_every_width(dtype, width):
    torch.manual_seed(width)
    x, residual = torch.randn(3, width).to(dtype), torch.randn(3, width).to(dtype)
    check(x, residual, torch.randn(width).to(dtype), scales=(1e-2, 1.0, 1e2))
    assert torch.equal(add_rms_norm(x, residual, None, EPS)[1], x + residual)


@DTYPES
@pytest.mark.parametrize("options", [{}, {"cast": "after"}, {"cast": "after", "offset": 1.0}, {"offset": 1.0}], ids=str)
@pytest.mark.parametrize("weight_dtype", ["same", "float32", "none"])
def test_exact_for_every_variant(dtype, options, weight_dtype):
    torch.manual_seed(0)
    weight = (
        None if weight_dtype == "none" else torch.randn(300, dtype=dtype if weight_dtype == "same" else torch.float32)
    )
    check(torch.randn(2, 5, 300, dtype=dtype), torch.randn(2, 5, 300, dtype=dtype), weight, **options)


@DTYPES
@pytest.mark.parametrize("shape", [(64,), (1, 64), (700, 64), (0, 64)], ids=str)
def test_exact_for_every_number_of_rows(dtype, shape):
    torch.manual_seed(0)
    check(torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype), torch.randn(64, dtype=dtype))


@DTYPES
def test_exact_for_layouts_that_differ(dtype):
    torch.manual_seed(0)
    packed = torch.randn(4, 6, 96, dtype=dtype)
    for x, residual in (
        (packed.transpose(0, 1), torch.randn(6, 4, 96, dtype=dtype)),
        (packed[..., :48], packed[..., 48:]),
        (packed.transpose(1, 2), packed.transpose(1, 2)),
        (packed[:1].expand(4, 6, 96), packed[:, ::2].repeat(1, 2, 1)),
    ):
        check(x, residual, torch.randn(x.shape[-1], dtype=dtype))


@pytest.mark.parametrize("used", [0, 1])
def test_one_result_alone_has_the_gradient_of_its_own(used):
    tensors = (torch.randn(5, 12), torch.randn(5, 12), torch.randn(12))
    assert_as_exact(lambda *t: own(*t)[used], lambda *t: add_rms_norm(*t, EPS)[used], tensors)


@pytest.mark.parametrize("needed", ["x", "residual", "weight"])
def test_only_gradients_that_are_needed(needed):
    tensors = {"x": torch.randn(5, 12), "residual": torch.randn(5, 12), "weight": torch.randn(12)}
    tensors[needed].requires_grad_()
    add_rms_norm(**tensors, eps=EPS)[0].sum().backward()
    assert [name for name, t in tensors.items() if t.grad is not None] == [needed]


def test_a_residual_that_does_not_fit_is_an_error():
    x = torch.randn(2, 8)
    with pytest.raises(RuntimeError, match="one shape"):
        add_rms_norm(x, x[:1], None, EPS)
    with pytest.raises(RuntimeError, match="one dtype"):
        add_rms_norm(x, x.half(), None, EPS)
