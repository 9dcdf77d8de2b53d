"""RMSNorm in C++ against the code of the models that use it."""

from __future__ import annotations

import pytest
import torch
from exact import assert_as_exact

cpu = pytest.importorskip("kernelwise.kernels.cpu.rms_norm", exc_type=ImportError)
rms_norm = cpu.rms_norm

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
EPS = 1e-6


def own(x, weight, *, offset=0.0, cast="before"):
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    if weight is None:
        return wide.to(x.dtype)
    if cast == "before":
        return (weight if offset == 0 else offset + weight) * wide.to(x.dtype)
    return ((offset + weight.float()) * wide).to(x.dtype)


def check(x, weight, *, scales=(1.0,), **options):
    inputs = {"x": x} if weight is None else {"x": x, "weight": weight}
    assert_as_exact(
        lambda x, weight=None: own(x, weight, **options),
        lambda x, weight=None: rms_norm(x, weight, EPS, **options),
        inputs,
        scales=scales,
    )


@DTYPES
@pytest.mark.parametrize("width", [1, 7, 33, 100, 577, 2304, 5120])
def test_exact_at_every_width(dtype, width):
    torch.manual_seed(width)
    check(torch.randn(3, width, dtype=dtype), torch.randn(width, dtype=dtype), scales=(1e-2, 1.0, 1e2))


@DTYPES
@pytest.mark.parametrize("options", [{}, {"cast": "after"}, {"cast": "after", "offset": 1.0}, {"offset": 1.0}], ids=str)
@pytest.mark.parametrize("weight_dtype", ["same", "float32", "none"])
def test_exact_for_every_variant(dtype, options, weight_dtype):
    torch.manual_seed(0)
    weight = (
        None if weight_dtype == "none" else torch.randn(300, dtype=dtype if weight_dtype == "same" else torch.float32)
    )
    check(torch.randn(2, 5, 300, dtype=dtype), weight, scales=(1e-2, 1.0, 1e2), **options)


@DTYPES
@pytest.mark.parametrize("shape", [(64,), (1, 64), (700, 64), (2, 3, 5, 64), (0, 64), (2, 0, 64)], ids=str)
def test_exact_for_every_number_of_rows(dtype, shape):
    torch.manual_seed(0)
    check(torch.randn(shape, dtype=dtype), torch.randn(64, dtype=dtype))


@DTYPES
@pytest.mark.parametrize("case", ["transposed", "sliced", "packed", "every other", "expanded", "last dimension"])
def test_exact_for_every_layout(dtype, case):
    torch.manual_seed(0)
    x = torch.randn(4, 6, 96, dtype=dtype)
    x = {
        "transposed": x.transpose(0, 1),
        "sliced": x[:, 1:5, 10:80],
        "packed": x.chunk(3, -1)[1],
        "every other": x[:, ::2],
        "expanded": x[:1].expand(3, 6, 96),
        "last dimension": x.transpose(1, 2),
    }[case]
    check(x, torch.randn(2 * x.shape[-1], dtype=dtype)[::2])


@DTYPES
def test_nan_and_infinity_pass_through(dtype):
    x = torch.randn(4, 40, dtype=dtype)
    x[1, 3], x[2, 5], x[3, 7] = float("nan"), float("inf"), -float("inf")
    check(x, torch.randn(40, dtype=dtype))


def test_an_expanded_gradient_is_read_right():
    x, weight = torch.randn(5, 12), torch.randn(12)
    for reduce in (torch.sum, torch.mean):
        assert_as_exact(
            lambda x, weight, r=reduce: r(own(x, weight)),
            lambda x, weight, r=reduce: r(rms_norm(x, weight, EPS)),
            (x, weight),
        )


@pytest.mark.parametrize("needed", ["x", "weight"])
def test_only_gradients_that_are_needed(needed):
    tensors = {"x": torch.randn(5, 12), "weight": torch.randn(12)}
    tensors[needed].requires_grad_()
    rms_norm(**tensors, eps=EPS).sum().backward()
    assert [name for name, t in tensors.items() if t.grad is not None] == [needed]


def test_no_autograd_object_without_need():
    x, weight = torch.randn(2, 8), torch.randn(8, requires_grad=True)
    with torch.no_grad():
        assert rms_norm(x, weight, EPS).grad_fn is None
    with torch.inference_mode():
        assert rms_norm(x, weight, EPS).is_inference()
    assert rms_norm(x, weight.detach(), EPS).grad_fn is None


@pytest.mark.parametrize(
    ("x", "weight", "complaint"),
    [
        (torch.randn(2, 8, dtype=torch.float64), torch.randn(8), "x must be float32"),
        (torch.randn(2, 8), torch.randn(7), "weight must have the shape"),
        (torch.randn(2, 8), torch.randn(8).bfloat16(), "weight must have x's dtype or float32"),
        (torch.randn(()), None, "at least one dimension"),
    ],
)
def test_unsupported_input_is_an_error(x, weight, complaint):
    with pytest.raises(RuntimeError, match=complaint):
        rms_norm(x, weight, EPS)


@DTYPES
def test_exact_against_the_modules_of_transformers(dtype):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    gemma = pytest.importorskip("transformers.models.gemma.modeling_gemma")
    torch.manual_seed(0)
    for layer, options in (
        (llama.LlamaRMSNorm(96, eps=EPS), {}),
        (gemma.GemmaRMSNorm(96, eps=EPS), {"offset": 1.0, "cast": "after"}),
    ):
        x, weight = torch.randn(2, 7, 96, dtype=dtype), torch.randn(96, dtype=dtype)
        assert_as_exact(
            lambda x, weight, layer=layer: torch.func.functional_call(layer, {"weight": weight}, (x,)),
            lambda x, weight, options=options: rms_norm(x, weight, EPS, **options),
            (x, weight),
        )
