"""LayerNorm in C++ against PyTorch's own, with and without a residual."""

from __future__ import annotations

import pytest
import torch
from exact import assert_as_exact
from torch.nn import functional as F

cpu = pytest.importorskip("kernelwise.kernels.cpu.layer_norm", exc_type=ImportError)
added = pytest.importorskip("kernelwise.kernels.cpu.add_layer_norm", exc_type=ImportError)
layer_norm, add_layer_norm = cpu.layer_norm, added.add_layer_norm

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
EPS = 1e-5


@pytest.fixture(autouse=True)
def _kernel_for_few_numbers_too(request, monkeypatch):
    if "plain" not in request.node.name:
        monkeypatch.setattr(added, "_PLAIN_BELOW", 0)


def test_few_numbers_with_gradients_and_a_residual_are_plain():
    for rows, plain in ((255, True), (256, False)):
        x = torch.randn(rows, 64, requires_grad=True)
        y, total = add_layer_norm(x, x, None, None, EPS)
        assert (type(y.grad_fn).__name__ == "NativeLayerNormBackward0") == plain
        assert torch.equal(total, x + x)
        assert torch.allclose(y, own(x + x), atol=1e-5)


def own(x, weight=None, bias=None, *, offset=0.0):
    scale = weight if weight is None or not offset else offset + weight
    return F.layer_norm(x, x.shape[-1:], scale, bias, EPS)


def check(x, weight=None, bias=None, *, scales=(1.0,), residual=None, grad=True, **options):
    named = {"x": x, "residual": residual, "weight": weight, "bias": bias}
    inputs = {name: t for name, t in named.items() if t is not None}

    def of_own(x, residual=None, weight=None, bias=None):
        if residual is None:
            return own(x, weight, bias, **options)
        return own(x + residual, weight, bias, **options), x + residual

    def of_kernel(x, residual=None, weight=None, bias=None):
        if residual is None:
            return layer_norm(x, weight, bias, EPS, **options)
        return add_layer_norm(x, residual, weight, bias, EPS, **options)

    assert_as_exact(of_own, of_kernel, inputs, scales=scales, grad=grad)


@DTYPES
@pytest.mark.parametrize("width", [1, 7, 33, 100, 577, 2304, 5120])
def test_exact_at_every_width(dtype, width):
    torch.manual_seed(width)
    x, weight, bias = torch.randn(3, width), torch.randn(width), torch.randn(width)
    check(x.to(dtype), weight.to(dtype), bias.to(dtype), scales=(1e-2, 1.0, 1e2))


@DTYPES
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("parameters", ["both", "weight", "bias", "neither"])
@pytest.mark.parametrize("parameter_dtype", ["same", "float32"])
def test_exact_for_every_variant(dtype, offset, parameters, parameter_dtype):
    torch.manual_seed(0)
    of = torch.float32 if parameter_dtype == "float32" and parameters != "bias" else dtype  # torch refuses that one
    weight = torch.randn(300, dtype=of) if parameters in ("both", "weight") else None
    bias = torch.randn(300, dtype=of) if parameters in ("both", "bias") else None
    check(torch.randn(2, 5, 300, dtype=dtype), weight, bias, offset=offset)


@DTYPES
@pytest.mark.parametrize("shape", [(64,), (1, 64), (700, 64), (2, 3, 5, 64), (0, 64), (2, 0, 64)], ids=str)
def test_exact_for_every_number_of_rows(dtype, shape):
    torch.manual_seed(0)
    check(torch.randn(shape, dtype=dtype), torch.randn(64, dtype=dtype), torch.randn(64, dtype=dtype))


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
    parameters = torch.randn(2 * x.shape[-1], 2, dtype=dtype)[::2].unbind(-1)
    check(x, *parameters)
    check(x, *parameters, residual=torch.randn(x.shape, dtype=dtype))


@pytest.mark.parametrize("width", [100, 5120])
@pytest.mark.parametrize("mean", [10.0, 1e4])
def test_exact_where_the_mean_is_far_from_zero(mean, width):
    """E[x^2] - E[x]^2 would have no digits left."""
    torch.manual_seed(0)
    check(torch.randn(5, width) + mean, torch.randn(width), torch.randn(width))


@DTYPES
@pytest.mark.parametrize("width", [7, 577, 5120])
def test_exact_with_a_residual(dtype, width):
    torch.manual_seed(0)
    x, residual = torch.randn(2, 9, width).to(dtype), torch.randn(2, 9, width).to(dtype)
    check(x, torch.randn(width).to(dtype), torch.randn(width).to(dtype), residual=residual, scales=(1e-2, 1.0, 1e2))
    check(x, residual=residual)
    assert torch.equal(add_layer_norm(x, residual, None, None, EPS)[1], x + residual)


@DTYPES
def test_nan_and_infinity_pass_through(dtype):
    x = torch.randn(4, 40, dtype=dtype)
    x[1, 3], x[2, 5], x[3, 7] = float("nan"), float("inf"), -float("inf")
    check(x, torch.randn(40, dtype=dtype), torch.randn(40, dtype=dtype))


@pytest.mark.parametrize("needed", ["x", "weight", "bias"])
def test_only_gradients_that_are_needed(needed):
    tensors = {"x": torch.randn(5, 12), "weight": torch.randn(12), "bias": torch.randn(12)}
    tensors[needed].requires_grad_()
    layer_norm(**tensors, eps=EPS).sum().backward()
    assert [name for name, t in tensors.items() if t.grad is not None] == [needed]


@pytest.mark.parametrize("needed", ["x", "residual", "weight", "bias"])
def test_only_gradients_that_are_needed_with_a_residual(needed):
    tensors = {
        "x": torch.randn(5, 12),
        "residual": torch.randn(5, 12),
        "weight": torch.randn(12),
        "bias": torch.randn(12),
    }
    tensors[needed].requires_grad_()
    add_layer_norm(**tensors, eps=EPS)[0].sum().backward()
    assert [name for name, t in tensors.items() if t.grad is not None] == [needed]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((torch.randn(2, 8).double(), None, None), "x must be float32"),
        ((torch.randn(2, 8), torch.randn(7), None), "weight must have the shape"),
        ((torch.randn(2, 8), None, torch.randn(9)), "bias must have the shape"),
        ((torch.randn(2, 8), torch.randn(8).half(), None), "weight must have x's dtype or float32"),
        ((torch.randn(2, 8).half(), torch.randn(8).half(), torch.randn(8)), "weight and bias must have one dtype"),
    ],
)
def test_unsupported_input_is_an_error(arguments, complaint):
    with pytest.raises(RuntimeError, match=complaint):
        layer_norm(*arguments, EPS)


def test_a_residual_that_does_not_fit_is_an_error():
    x = torch.randn(2, 8)
    with pytest.raises(RuntimeError, match="one shape"):
        add_layer_norm(x, x[:1], None, None, EPS)
    with pytest.raises(RuntimeError, match="one dtype"):
        add_layer_norm(x, x.half(), None, None, EPS)
