"""Activations in C++ against the formulas of the operation that they stand for."""

from __future__ import annotations

import pytest
import torch
from exact import assert_as_exact

from kernelwise.ops._activations import ACTIVATIONS

cpu = pytest.importorskip("kernelwise.kernels.cpu.activation", exc_type=ImportError)
activation, CODES = cpu.activation, cpu.CODES

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
EVERY = pytest.mark.parametrize("name", CODES)


@pytest.fixture(autouse=True)
def _kernel_for_few_numbers_too(request, monkeypatch):
    if "plain" not in request.node.name:
        monkeypatch.setattr(cpu, "_PLAIN_BELOW", 0)


def test_few_numbers_with_gradients_are_plain():
    for num, plain in ((cpu._PLAIN_BELOW - 1, True), (cpu._PLAIN_BELOW, False)):
        y = activation(torch.randn(num, requires_grad=True))
        assert (type(y.grad_fn).__name__ == "GeluBackward0") == plain


@pytest.mark.parametrize(
    ("name", "dtype", "num", "torchs"),
    [
        ("gelu", torch.bfloat16, 32769, True),
        ("gelu", torch.float16, 32769, True),
        ("gelu", torch.bfloat16, 32768, False),
        ("gelu", torch.float32, 32769, False),
        ("gelu_python", torch.bfloat16, 32769, False),
    ],
)
def test_many_half_precision_numbers_go_to_the_gelu_of_torch(monkeypatch, name, dtype, num, torchs):
    kernel, called = cpu._forward, []
    monkeypatch.setattr(cpu, "_direct", lambda *args: called.append(args) or kernel(*args))
    activation(torch.randn(num, dtype=dtype), activation=name)
    assert bool(called) != torchs


def check(name, x, *, scales=(1.0,), grad=True):
    assert_as_exact(ACTIVATIONS[name][0], lambda x: activation(x, activation=name), (x,), scales=scales, grad=grad)


@DTYPES
@EVERY
@pytest.mark.parametrize("shape", [(), (3, 1), (5, 7), (33,), (2, 3, 100), (1, 577), (40, 520), (0, 8)], ids=str)
def test_exact_for_every_shape(dtype, name, shape):
    torch.manual_seed(0)
    check(name, torch.randn(shape, dtype=dtype), scales=(1e-2, 1.0, 1e2) if shape else (1.0,))


@DTYPES
@EVERY
def test_exact_over_the_whole_range(dtype, name):
    check(name, torch.linspace(-12, 12, 4001).to(dtype))
    check(name, torch.linspace(-700, 700, 1001).to(dtype))


@EVERY
def test_small_numbers_keep_their_digits(name):
    x = torch.linspace(-1, 1, 2001) * 1e-3
    exact = ACTIVATIONS[name][0](x.double())
    assert ((activation(x, activation=name) - exact).abs() <= 4e-7 * exact.abs()).all()


@DTYPES
@pytest.mark.parametrize("case", ["packed", "packed rows", "transposed", "last dimension", "sliced", "expanded"])
def test_exact_for_every_layout(dtype, case):
    torch.manual_seed(0)
    x = torch.randn(4, 6, 90, dtype=dtype)
    x = {
        "packed": x.chunk(2, -1)[1],
        "packed rows": x.chunk(2, 1)[1],
        "transposed": x.transpose(0, 1),
        "last dimension": x.transpose(1, 2),
        "sliced": x[1:, ::2, 3:50],
        "expanded": x[:1].expand(5, 6, 90),
    }[case]
    check("gelu", x)


def test_the_result_lies_in_memory_as_the_layers_own():
    x = torch.randn(4, 6, 90)
    for view in (x, x.transpose(0, 1), x.transpose(1, 2), x.permute(2, 0, 1)):
        assert activation(view).stride() == torch.nn.functional.gelu(view).stride()


@DTYPES
@EVERY
def test_nan_and_infinity_pass_through(dtype, name):
    check(name, torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0, 0.0], dtype=dtype), grad=False)
    check(name, torch.tensor([float("nan")], dtype=dtype))


def test_wrong_arguments_are_errors():
    with pytest.raises(KeyError, match="relu"):
        activation(torch.randn(2, 8), activation="relu")
    with pytest.raises(RuntimeError, match="float32, bfloat16 or float16"):
        activation(torch.randn(2, 8).double())
