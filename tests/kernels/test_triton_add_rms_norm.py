"""Addition and RMS norm in one kernel against the two steps of a decoder layer, on the GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from exact import assert_as_exact

pytestmark = pytest.mark.gpu

EPS = 1e-6


@pytest.fixture
def add_rms_norm() -> Callable[..., Any]:
    from kernelwise.kernels.triton.add_rms_norm import add_rms_norm

    return add_rms_norm


def own(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, cast: str = "before", offset: float = 0.0
) -> Any:
    total = x + residual
    wide = total.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    if cast == "before":
        return (offset + weight) * wide.to(x.dtype), total
    return ((offset + weight.to(torch.float32)) * wide).to(x.dtype), total


def inputs(*shape: int, dtype: torch.dtype, weight: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(sum(shape))
    x, residual = (torch.randn(shape, device="cuda", generator=generator).to(dtype) for _ in range(2))
    w = 1 + 0.3 * torch.randn(shape[-1], device="cuda", generator=generator)
    return {"x": x, "residual": residual, "weight": w.to(weight or dtype)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 64), (3, 5, 577), (9, 2048), (1500, 128), (5000, 96)])
def test_every_form(add_rms_norm: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    given = inputs(*shape, dtype=dtype)
    kernel = lambda x, residual, weight: add_rms_norm(x, residual, weight, EPS)  # noqa: E731
    assert_as_exact(own, kernel, given, scales=(1.0,))
    assert_as_exact(
        lambda x, residual, weight: own(x, residual, weight, "after", 1.0),
        lambda x, residual, weight: add_rms_norm(x, residual, weight, EPS, offset=1.0, cast="after"),
        given,
        scaled=("x", "residual"),
    )


@pytest.mark.parametrize("shape", [(4100, 4096), (1100, 5120), (1100, 16384)])
def test_wide_rows(add_rms_norm: Any, shape: tuple[int, ...]) -> None:
    given = inputs(*shape, dtype=torch.bfloat16)
    assert_as_exact(own, lambda x, residual, weight: add_rms_norm(x, residual, weight, EPS), given, scales=(1.0,))


def test_float32_weight(add_rms_norm: Any) -> None:
    given = inputs(17, 576, dtype=torch.bfloat16, weight=torch.float32)
    assert_as_exact(own, lambda x, residual, weight: add_rms_norm(x, residual, weight, EPS), given)


def test_strides_and_one_result_alone(add_rms_norm: Any) -> None:
    packed = inputs(40, 384, dtype=torch.bfloat16)["x"]
    weight = torch.randn(128, device="cuda").bfloat16()
    given = {"x": packed[:, 1:129], "residual": packed[:, 200:328], "weight": weight}
    assert_as_exact(own, lambda x, residual, weight: add_rms_norm(x, residual, weight, EPS), given, scales=(1.0,))
    for i in range(2):
        kernel = lambda x, residual, weight, i=i: add_rms_norm(x, residual, weight, EPS)[i]  # noqa: E731
        assert_as_exact(
            lambda x, residual, weight, i=i: own(x, residual, weight)[i] + (0 * weight.sum() if i else 0),
            lambda x, residual, weight, i=i, kernel=kernel: (
                kernel(x, residual, weight) + (0 * weight.sum() if i else 0)
            ),
            given,
            scales=(1.0,),
        )


def test_no_rows(add_rms_norm: Any) -> None:
    x, residual, weight = inputs(2, 8, dtype=torch.bfloat16).values()
    x = x[:0].requires_grad_()
    y, total = add_rms_norm(x, residual[:0], weight, EPS)
    assert y.shape == total.shape == (0, 8)
    assert torch.autograd.grad(y.sum() + total.sum(), x)[0].shape == (0, 8)


def test_what_is_refused(add_rms_norm: Any) -> None:
    x, residual, weight = inputs(2, 8, dtype=torch.bfloat16).values()
    add_rms_norm(x, residual, weight, EPS)
    with pytest.raises(ValueError, match="residual has"):
        add_rms_norm(x, residual[:1], weight, EPS)
    with pytest.raises(ValueError, match="one dtype"):
        add_rms_norm(x, residual.half(), weight, EPS)
    with pytest.raises(ValueError, match="residual on"):
        add_rms_norm(x, residual.cpu(), weight, EPS)
    with pytest.raises(ValueError, match="shape"):
        add_rms_norm(x, residual, weight[:4], EPS)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles(add_rms_norm: Any, dynamic: bool) -> None:
    torch._dynamo.reset()

    def layer(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, function: Any) -> Any:
        y, total = function(x * 2, residual.transpose(0, 1).contiguous().transpose(0, 1), weight)
        return y + 1, total * 2

    compiled = torch.compile(
        lambda x, residual, weight: layer(x, residual, weight, lambda *a: add_rms_norm(*a, EPS)),
        fullgraph=True,
        dynamic=dynamic,
    )
    for rows in (6, 5000):
        given = inputs(rows, 320, dtype=torch.bfloat16)
        assert_as_exact(lambda x, residual, weight: layer(x, residual, weight, own), compiled, given, scales=(1.0,))


def test_is_a_sound_operation() -> None:
    from kernelwise.kernels.triton import add_rms_norm

    x, residual, weight = (t.requires_grad_() for t in inputs(3, 64, dtype=torch.float32).values())
    torch.library.opcheck(add_rms_norm._operation, (x, residual, weight, EPS, 0.0, "before"))
