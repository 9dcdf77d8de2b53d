"""activation(gate) * up in C++ against plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from exact import assert_as_exact
from torch.nn import functional as F

cpu = pytest.importorskip("kernelwise.kernels.cpu.gated_activation", exc_type=ImportError)
mlp = pytest.importorskip("kernelwise.kernels.cpu.gated_mlp", exc_type=ImportError)
gated_activation = cpu.gated_activation

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}
EVERY = pytest.mark.parametrize("activation", ACTIVATIONS)


@pytest.fixture(autouse=True)
def _kernel_for_few_numbers_too(request, monkeypatch):
    if "plain" not in request.node.name:
        monkeypatch.setattr(cpu, "_PLAIN_BELOW", dict.fromkeys(ACTIVATIONS, 0))
        monkeypatch.setattr(cpu, "_PLAIN_BELOW_ELSE", 0)


@EVERY
def test_few_numbers_with_gradients_are_plain(activation):
    limit = cpu._PLAIN_BELOW.get(activation, cpu._PLAIN_BELOW_ELSE)
    for num, plain in ((limit - 1, True), (limit + 1, False)):
        if num > 0:
            gate = torch.randn(num, requires_grad=True)
            y = gated_activation(gate, torch.randn(num), activation=activation)
            assert (type(y.grad_fn).__name__ == "MulBackward0") == plain
            with torch.no_grad():
                own = ACTIVATIONS[activation](gate)
                assert torch.allclose(gated_activation(gate, torch.ones(num), activation=activation), own, atol=1e-6)


def check(activation, gate, up, *, scales=(1.0,), grad=True):
    assert_as_exact(
        lambda gate, up: ACTIVATIONS[activation](gate) * up,
        lambda gate, up: gated_activation(gate, up, activation=activation),
        {"gate": gate, "up": up},
        scales=scales,
        grad=grad,
    )


@DTYPES
@EVERY
@pytest.mark.parametrize("shape", [(3, 1), (5, 7), (33,), (2, 3, 100), (1, 577), (4, 2304), (40, 520), (0, 8)], ids=str)
def test_exact_for_every_shape(dtype, activation, shape):
    torch.manual_seed(0)
    gate, up = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
    check(activation, gate, up, scales=(1e-2, 1.0, 1e2))


@DTYPES
@EVERY
def test_exact_over_the_whole_range(dtype, activation):
    """Every region of the approximations, and far beyond: the products with one show each number's own error."""
    gate = torch.linspace(-12, 12, 4001).to(dtype)
    check(activation, gate, torch.ones_like(gate))
    gate = torch.linspace(-700, 700, 1001).to(dtype)
    check(activation, gate, torch.ones_like(gate))


@EVERY
def test_small_numbers_keep_their_digits(activation):
    gate = torch.linspace(-1, 1, 2001) * 1e-3
    exact = ACTIVATIONS[activation](gate.double())
    error = (gated_activation(gate, torch.ones_like(gate), activation=activation) - exact).abs()
    assert (error <= 4e-7 * exact.abs()).all()


@DTYPES
@EVERY
@pytest.mark.parametrize("case", ["packed", "packed rows", "transposed", "sliced", "one row each"])
def test_exact_for_every_layout(dtype, activation, case):
    torch.manual_seed(0)
    packed = torch.randn(4, 6, 90, dtype=dtype)
    gate, up = {
        "packed": packed.chunk(2, -1),
        "packed rows": packed.chunk(2, 1),
        "transposed": (packed.transpose(1, 2), torch.randn(4, 90, 6, dtype=dtype)),
        "sliced": (packed[1:, ::2, 3:50], torch.randn(3, 3, 47, dtype=dtype)),
        "one row each": (packed[:1, :1], packed[1:2, 1:2]),
    }[case]
    check(activation, gate, up)


@DTYPES
@EVERY
def test_nan_and_infinity_pass_through(dtype, activation):
    gate = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0, 1.0, 0.0, 0.0], dtype=dtype)
    up = torch.tensor([1.0, 2.0, 2.0, float("nan"), float("inf"), float("inf"), -1.0], dtype=dtype)
    check(activation, gate, up, grad=False)
    check(activation, torch.tensor([float("nan")], dtype=dtype), torch.ones(1, dtype=dtype))


def test_wrong_arguments_are_errors():
    x = torch.randn(2, 8)
    with pytest.raises(KeyError, match="relu"):
        gated_activation(x, x, activation="relu")
    with pytest.raises(RuntimeError, match="one shape"):
        gated_activation(x, x[:, :4])
    with pytest.raises(RuntimeError, match="one dtype"):
        gated_activation(x, x.bfloat16())
    with pytest.raises(RuntimeError, match="float32, bfloat16 or float16"):
        gated_activation(x.double(), x.double())


@pytest.mark.parametrize("needed", ["gate", "up"])
def test_only_gradients_that_are_needed(needed):
    tensors = {"gate": torch.randn(5, 12), "up": torch.randn(5, 12)}
    tensors[needed].requires_grad_()
    gated_activation(**tensors).sum().backward()
    assert [name for name, t in tensors.items() if t.grad is not None] == [needed]


def test_gated_mlp_calls_its_modules():
    torch.manual_seed(0)
    gate, up, down = torch.nn.Linear(16, 40), torch.nn.Linear(16, 40), torch.nn.Linear(40, 16)
    called = []
    up.register_forward_hook(lambda module, args, output: called.append(output.shape))
    x = torch.randn(3, 16)
    assert_as_exact(
        lambda x: down(F.gelu(gate(x)) * up(x)), lambda x: mlp.gated_mlp(x, gate, up, down, activation="gelu"), (x,)
    )
    assert called
