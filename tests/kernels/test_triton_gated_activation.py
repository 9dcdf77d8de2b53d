"""Gated activations in Triton against the MLPs of transformers, on the GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from exact import assert_as_exact
from torch.nn import functional as F

pytestmark = pytest.mark.gpu

OWN = {
    "silu": lambda gate, up: F.silu(gate) * up,
    "gelu": lambda gate, up: F.gelu(gate) * up,
    "gelu_tanh": lambda gate, up: F.gelu(gate, approximate="tanh") * up,
}


@pytest.fixture
def gated_activation() -> Callable[..., torch.Tensor]:
    from kernelwise.kernels.triton.gated_activation import gated_activation

    return gated_activation


def inputs(*shape: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(sum(shape))
    return {n: (2 * torch.randn(shape, device="cuda", generator=generator)).to(dtype) for n in ("gate", "up")}


@pytest.mark.parametrize("activation", list(OWN))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_form(gated_activation: Callable[..., torch.Tensor], activation: str, dtype: torch.dtype) -> None:
    for shape in ((3, 5, 577), (2, 2048)):
        assert_as_exact(
            OWN[activation],
            lambda gate, up: gated_activation(gate, up, activation=activation),
            inputs(*shape, dtype=dtype),
            scales=(1e-2, 1.0, 30.0),
        )


@pytest.mark.parametrize("width", [1, 7, 33, 100, 2304, 5120])
def test_every_width(gated_activation: Callable[..., torch.Tensor], width: int) -> None:
    for rows in (1, 130):
        assert_as_exact(OWN["silu"], gated_activation, inputs(rows, width, dtype=torch.bfloat16), scales=(1.0,))


@pytest.mark.parametrize("width", [33, 512, 1408, 4096])
def test_packed_and_other_strides(gated_activation: Callable[..., torch.Tensor], width: int) -> None:
    packed = torch.randn(3, 20, 2 * width, device="cuda").bfloat16()
    gate, up = packed.chunk(2, dim=-1)
    for given in (
        {"gate": gate, "up": up},
        {"gate": gate, "up": up.contiguous()},
        {"gate": packed[..., ::2], "up": packed[..., 1::2]},
        {"gate": gate.transpose(0, 1), "up": up.transpose(0, 1)},
    ):
        assert_as_exact(OWN["silu"], gated_activation, given, scales=(1.0,))


def test_gradient_of_a_packed_projection(gated_activation: Callable[..., torch.Tensor]) -> None:
    given = {"packed": torch.randn(6, 200, device="cuda").bfloat16()}
    assert_as_exact(
        lambda packed: OWN["silu"](*packed.chunk(2, -1)), lambda packed: gated_activation(*packed.chunk(2, -1)), given
    )


def test_expanded_gradient(gated_activation: Callable[..., torch.Tensor]) -> None:
    """`sum` hands back a gradient whose strides are all zero."""
    for given in (inputs(5, 64, dtype=torch.float32), {"gate": torch.randn(5, 128, device="cuda")[:, :64]}):
        gate = given["gate"].requires_grad_()
        up = torch.randn(5, 64, device="cuda", requires_grad=True)
        dgate, dup = torch.autograd.grad(gated_activation(gate, up).sum(), (gate, up))
        own_dgate, own_dup = torch.autograd.grad(OWN["silu"](gate, up).sum(), (gate, up))
        torch.testing.assert_close(dgate, own_dgate)
        torch.testing.assert_close(dup, own_dup)


@pytest.mark.parametrize("activation", list(OWN))
def test_nan_and_infinity_pass(gated_activation: Callable[..., torch.Tensor], activation: str) -> None:
    given = inputs(4, 100, dtype=torch.float32)
    given["gate"][0, :4] = torch.tensor([float("nan"), float("inf"), float("-inf"), -200.0])
    given["up"][0, 4:7] = torch.tensor([float("nan"), float("inf"), float("-inf")])
    kernel = lambda gate, up: gated_activation(gate, up, activation=activation)  # noqa: E731
    assert_as_exact(OWN[activation], kernel, given, scales=(1.0,), grad=False)


def test_second_derivatives(gated_activation: Callable[..., torch.Tensor]) -> None:
    def penalty(act: Callable[..., torch.Tensor]) -> tuple[torch.Tensor, ...]:
        gate, up = (t.requires_grad_() for t in inputs(2, 8, dtype=torch.float32).values())
        (dgate,) = torch.autograd.grad(act(gate, up).square().sum(), gate, create_graph=True)
        return torch.autograd.grad(dgate.square().sum(), (gate, up))

    for activation, function in OWN.items():
        kernel = lambda gate, up, name=activation: gated_activation(gate, up, activation=name)  # noqa: E731
        for own, new in zip(penalty(function), penalty(kernel), strict=True):
            torch.testing.assert_close(new, own)


def test_no_elements(gated_activation: Callable[..., torch.Tensor]) -> None:
    gate, up = (t[:0].requires_grad_() for t in inputs(2, 8, dtype=torch.bfloat16).values())
    y = gated_activation(gate, up)
    assert y.shape == (0, 8)
    assert torch.autograd.grad(y, gate, torch.empty_like(y))[0].shape == (0, 8)


def test_more_elements_than_32_bits_count(gated_activation: Callable[..., torch.Tensor]) -> None:
    gate, up = (torch.empty(75_000, 28_672, device="cuda", dtype=torch.bfloat16).normal_() for _ in range(2))
    assert torch.equal(gated_activation(gate, up)[-3:], gated_activation(gate[-3:].clone(), up[-3:].clone()))
    assert torch.equal(
        gated_activation(gate[:, :14_336], up[:, 14_336:])[-3:],
        gated_activation(gate[-3:, :14_336].clone(), up[-3:, 14_336:].clone()),
    )


def test_no_state_between_calls(gated_activation: Callable[..., torch.Tensor]) -> None:
    memory = torch.randn(2, 9000, device="cuda").to(torch.bfloat16)
    for size, start in ((8192, 0), (2048, 0), (2048, 1), (1, 0), (16, 0), (17, 0), (1, 3), (4096, 8), (8000, 0)):
        gate, up = memory[0, start : start + size], memory[1, start : start + size]
        expected = OWN["silu"](gate.double(), up.double())
        actual = gated_activation(gate, up).double()
        assert (actual - expected).abs().max() <= 2**-8 * expected.abs().max()


def test_what_is_refused(gated_activation: Callable[..., torch.Tensor]) -> None:
    gate, up = inputs(2, 8, dtype=torch.bfloat16).values()
    gated_activation(gate, up)  # what was checked for one call says nothing of the next of its kind
    with pytest.raises(ValueError, match="is on"):
        gated_activation(gate, up.cpu())
    with pytest.raises(ValueError, match="float64"):
        gated_activation(gate.double(), up.double())
    with pytest.raises(ValueError, match="one dtype"):
        gated_activation(gate, up.half())
    with pytest.raises(ValueError, match="shape"):
        gated_activation(gate, up[:1])
    with pytest.raises(ValueError, match="activation"):
        gated_activation(gate, up, activation="relu")


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("width", [577, 1024])
def test_compiles(gated_activation: Callable[..., torch.Tensor], width: int, dynamic: bool) -> None:
    torch._dynamo.reset()

    def layer(x: torch.Tensor, act: Callable[..., torch.Tensor]) -> torch.Tensor:
        return act(*(x + 1).chunk(2, -1)) + act(x[..., :width] * 2, x[..., width:] * 3)

    compiled = torch.compile(lambda x: layer(x, gated_activation), fullgraph=True, dynamic=dynamic)
    for rows in (3, 50):
        given = {"x": torch.randn(2, rows, 2 * width, device="cuda").bfloat16()}
        assert_as_exact(lambda x: layer(x, OWN["silu"]), compiled, given, scales=(1.0,))


def test_is_a_sound_operation() -> None:
    from kernelwise.kernels.triton import gated_activation

    gate, up = (t.requires_grad_() for t in inputs(3, 100, dtype=torch.float32).values())
    torch.library.opcheck(gated_activation._operation, (gate, up, "gelu"))


def test_mlp_calls_its_modules() -> None:
    from kernelwise.kernels.triton.gated_mlp import gated_mlp

    gate, up = (torch.nn.Linear(32, 48, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    down = torch.nn.Linear(48, 32, device="cuda", dtype=torch.bfloat16)
    called = []
    for module in (gate, up, down):
        module.register_forward_hook(lambda module, _, __: called.append(module))
    given = {"x": torch.randn(2, 5, 32, device="cuda").bfloat16()}
    assert_as_exact(lambda x: down(F.silu(gate(x)) * up(x)), lambda x: gated_mlp(x, gate, up, down), given)
    called.clear()
    gated_mlp(given["x"], gate, up, down)
    assert called == [gate, up, down]
