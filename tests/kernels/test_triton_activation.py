"""Activations by themselves against the formulas that models write out, on the GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from exact import assert_as_exact

from kernelwise.ops._activations import ACTIVATIONS

pytestmark = pytest.mark.gpu

NAMES = ("silu", "gelu", "gelu_tanh", "gelu_new", "gelu_fast", "gelu_python", "quick_gelu")


@pytest.fixture
def activation() -> Callable[..., torch.Tensor]:
    from kernelwise.kernels.triton.activation import activation

    return activation


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_every_form(activation: Callable[..., torch.Tensor], dtype: torch.dtype, name: str) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    wide = torch.randn(40, 6 * 577, device="cuda", generator=generator).to(dtype)
    for x in (wide[:1, :19], wide[:3, :33], wide.view(8, 5, -1).transpose(0, 1), wide[:, 5:100], wide[:, ::2], wide):
        kernel = lambda x, name=name: activation(x, activation=name)  # noqa: E731
        assert_as_exact(ACTIVATIONS[name][0], kernel, (x,), scales=(1e-2, 1.0, 10.0))


def test_nan_infinity_and_nothing_pass(activation: Callable[..., torch.Tensor]) -> None:
    x = torch.tensor([float("nan"), float("inf"), 0.0, -80.0], device="cuda")
    for name in NAMES:
        torch.testing.assert_close(activation(x, activation=name), ACTIVATIONS[name][0](x), equal_nan=True)
        assert activation(x[:0], activation=name).shape == (0,)


def test_what_is_refused(activation: Callable[..., torch.Tensor]) -> None:
    x = torch.randn(8, device="cuda")
    activation(x)
    with pytest.raises(ValueError, match="float64"):
        activation(x.double())
    with pytest.raises(ValueError, match="activation is one of"):
        activation(x, activation="relu")


def test_more_elements_than_32_bits_count(activation: Callable[..., torch.Tensor]) -> None:
    x = torch.empty(75_000, 28_672, device="cuda", dtype=torch.bfloat16).normal_()
    assert torch.equal(activation(x, activation="gelu_new")[-3:], activation(x[-3:].clone(), activation="gelu_new"))


def test_second_derivatives(activation: Callable[..., torch.Tensor]) -> None:
    def penalty(function: Callable[..., torch.Tensor]) -> torch.Tensor:
        x = torch.linspace(-3, 3, 9, device="cuda", requires_grad=True)
        first = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)[0]
        return torch.autograd.grad(first.square().sum(), x)[0]

    for name in NAMES:
        new = penalty(lambda x, name=name: activation(x, activation=name))
        torch.testing.assert_close(new, penalty(ACTIVATIONS[name][0]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles(activation: Callable[..., torch.Tensor], dynamic: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: activation((x + 1).transpose(0, 1), activation="quick_gelu") * 2, fullgraph=True, dynamic=dynamic
    )
    for rows in (3, 500):
        x = torch.randn(rows, 577, device="cuda").bfloat16()
        assert_as_exact(
            lambda x: ACTIVATIONS["quick_gelu"][0]((x + 1).transpose(0, 1)) * 2, compiled, (x,), scales=(1.0,)
        )


def test_is_a_sound_operation() -> None:
    from kernelwise.kernels.triton import activation

    x = torch.randn(3, 100, device="cuda", requires_grad=True)
    torch.library.opcheck(activation._operation, (x, "gelu_new"))
