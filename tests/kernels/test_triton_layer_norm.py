"""Layer norm, alone and after an addition, against PyTorch's own, on the GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from exact import assert_as_exact
from torch.nn import functional as F

pytestmark = pytest.mark.gpu

EPS = 1e-5


@pytest.fixture(autouse=True)
def never_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few elements are left to PyTorch; here the kernel has to show what it does."""
    from kernelwise.kernels.triton import layer_norm

    monkeypatch.setattr(layer_norm, "_SMALL", 0)
    monkeypatch.setattr(layer_norm, "_SMALL_RECORDED", 0)


@pytest.fixture
def layer_norm() -> Callable[..., torch.Tensor]:
    from kernelwise.kernels.triton.layer_norm import layer_norm

    return layer_norm


@pytest.fixture
def add_layer_norm() -> Callable[..., Any]:
    from kernelwise.kernels.triton.add_layer_norm import add_layer_norm

    return add_layer_norm


def own(x: torch.Tensor, weight: torch.Tensor | None = None, bias: torch.Tensor | None = None) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, EPS)


def own_add(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> Any:
    total = x + residual
    return own(total, weight, bias), total


def in_float32(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return own(x.float(), weight.float(), bias.float()).to(x.dtype)


def inputs(
    *shape: int, dtype: torch.dtype, parameters: torch.dtype | None = None, residual: bool = False
) -> dict[str, torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(sum(shape))
    x, other = (0.5 + torch.randn(shape, device="cuda", generator=generator).to(dtype) for _ in range(2))
    weight, bias = (torch.randn(shape[-1], device="cuda", generator=generator) for _ in range(2))
    found = {"x": x, "residual": other} if residual else {"x": x}
    return found | {"weight": (1 + 0.3 * weight).to(parameters or dtype), "bias": bias.to(parameters or dtype)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(5, 7), (3, 5, 577), (9, 2048), (1500, 128), (5000, 96), (2, 100)])
def test_every_form(layer_norm: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    given = inputs(*shape, dtype=dtype)
    assert_as_exact(own, lambda x, weight, bias: layer_norm(x, weight, bias, EPS), given)
    pair = {"x": given["x"], "weight": given["weight"]}
    assert_as_exact(own, lambda x, weight: layer_norm(x, weight, None, EPS), pair, scales=(1.0,))
    assert_as_exact(
        lambda x, weight: own(x, 1.0 + weight),
        lambda x, weight: layer_norm(x, weight, None, EPS, offset=1.0),
        pair,
        scales=(1.0,),
    )
    assert_as_exact(own, lambda x: layer_norm(x, None, None, EPS), {"x": given["x"]}, scales=(1.0,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 64), (3, 5, 577), (9, 2048), (1500, 128), (5000, 96)])
def test_after_an_addition(add_layer_norm: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    given = inputs(*shape, dtype=dtype, residual=True)
    kernel = lambda x, residual, weight, bias: add_layer_norm(x, residual, weight, bias, EPS)  # noqa: E731
    assert_as_exact(own_add, kernel, given, scaled=("x", "residual"))


@pytest.mark.parametrize("shape", [(4100, 4096), (9000, 1024), (1100, 5120), (1100, 12288), (600, 16384), (3, 32768)])
def test_wide_rows(layer_norm: Any, shape: tuple[int, ...]) -> None:
    given = inputs(*shape, dtype=torch.bfloat16)
    assert_as_exact(own, lambda x, weight, bias: layer_norm(x, weight, bias, EPS), given, scales=(1.0,))


def test_float32_parameters(layer_norm: Any) -> None:
    given = inputs(17, 576, dtype=torch.bfloat16, parameters=torch.float32)
    assert_as_exact(in_float32, lambda x, weight, bias: layer_norm(x, weight, bias, EPS), given)


def test_strides(layer_norm: Any) -> None:
    packed = inputs(40, 384, dtype=torch.bfloat16)["x"]
    weight, bias = torch.randn(2, 128, device="cuda").bfloat16()
    for x in (packed[:, 1:129], packed[:, 128:256], packed.view(4, 10, 3, 128).transpose(1, 2), packed[:128].T[:40]):
        given = {"x": x, "weight": weight[: x.shape[-1]], "bias": bias[: x.shape[-1]]}
        assert_as_exact(own, lambda x, weight, bias: layer_norm(x, weight, bias, EPS), given, scales=(1.0,))
    transposed = packed.view(4, 10, 3, 128).transpose(1, 2)
    assert layer_norm(transposed, weight, bias, EPS).stride() == transposed.clone().stride()


def test_no_rows_and_what_passes(layer_norm: Any) -> None:
    given = inputs(4, 64, dtype=torch.bfloat16)
    x, weight, bias = given["x"][:0].requires_grad_(), given["weight"].requires_grad_(), given["bias"].requires_grad_()
    gradients = torch.autograd.grad(layer_norm(x, weight, bias, EPS).sum(), (x, weight, bias))
    assert [tuple(g.shape) for g in gradients] == [(0, 64), (64,), (64,)]
    assert not gradients[1].any()
    given = inputs(4, 100, dtype=torch.bfloat16)
    given["x"][0, 3] = float("nan")
    given["x"][1, 7] = float("inf")
    given["weight"][9] = float("inf")
    assert_as_exact(own, lambda x, weight, bias: layer_norm(x, weight, bias, EPS), given, scales=(1.0,))


def test_only_what_needs_a_gradient_gets_one(layer_norm: Any) -> None:
    x, weight, bias = inputs(50, 256, dtype=torch.float32).values()
    for needs in ((True, False, False), (False, True, False), (False, False, True), (True, False, True)):
        leaves = [t.detach().requires_grad_(n) for t, n in zip((x, weight, bias), needs, strict=True)]
        wanted = [t for t in leaves if t.requires_grad]
        for new, old in zip(
            torch.autograd.grad(layer_norm(*leaves, EPS).square().sum(), wanted),
            torch.autograd.grad(own(*leaves).square().sum(), wanted),
            strict=True,
        ):
            torch.testing.assert_close(new, old, rtol=1e-4, atol=1e-4)


def test_what_is_refused(layer_norm: Any, add_layer_norm: Any) -> None:
    x, weight, bias = inputs(2, 8, dtype=torch.bfloat16).values()
    layer_norm(x, weight, bias, EPS)  # what was checked for one call says nothing of the next of its kind
    with pytest.raises(ValueError, match="the bias on"):
        layer_norm(x, weight, bias.cpu(), EPS)
    with pytest.raises(ValueError, match="float64"):
        layer_norm(x.double(), None, None, EPS)
    with pytest.raises(ValueError, match="weight"):
        layer_norm(x, weight.half(), bias, EPS)
    with pytest.raises(ValueError, match="shape"):
        layer_norm(x, weight, bias[:4], EPS)
    with pytest.raises(ValueError, match="alike"):
        add_layer_norm(x, x[:1], weight, bias, EPS)
    with pytest.raises(ValueError, match="alike"):
        add_layer_norm(x, x.half(), weight, bias, EPS)


def test_second_derivatives(layer_norm: Any) -> None:
    def penalty(norm: Callable[..., torch.Tensor]) -> tuple[torch.Tensor, ...]:
        leaves = [t.requires_grad_() for t in inputs(2, 8, dtype=torch.float32).values()]
        first = torch.autograd.grad(norm(*leaves).square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    for new, old in zip(penalty(lambda *a: layer_norm(*a, EPS)), penalty(own), strict=True):
        torch.testing.assert_close(new, old, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles(layer_norm: Any, add_layer_norm: Any, dynamic: bool) -> None:
    torch._dynamo.reset()

    def layer(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, norm: Any, add: Any) -> Any:
        y, total = add(x * 2, norm(x, weight, bias), weight, bias)
        return y + norm(total, weight, None), total * 2

    compiled = torch.compile(
        lambda x, weight, bias: layer(
            x, weight, bias, lambda *a: layer_norm(*a, EPS), lambda *a: add_layer_norm(*a, EPS)
        ),
        fullgraph=True,
        dynamic=dynamic,
    )
    for rows in (6, 5000):
        given = inputs(rows, 320, dtype=torch.bfloat16)
        assert_as_exact(lambda x, weight, bias: layer(x, weight, bias, own, own_add), compiled, given, scales=(1.0,))


def test_are_sound_operations() -> None:
    from kernelwise.kernels.triton import layer_norm

    for rows in (3, 5000):
        x, residual, weight, bias = inputs(rows, 64, dtype=torch.float32, residual=True).values()
        leaves = [t.requires_grad_() for t in (x, residual, weight, bias)]
        torch.library.opcheck(layer_norm._operation, (leaves[0], *leaves[2:], EPS, 0.0))
        torch.library.opcheck(layer_norm._add_operation, (*leaves, EPS, 0.0))


def test_few_elements_are_left_to_pytorch(layer_norm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from kernelwise.kernels.triton import layer_norm as module

    x, weight, bias = inputs(4, 64, dtype=torch.bfloat16).values()
    seen: list[int] = []
    monkeypatch.setattr(module, "_forward", lambda *given: seen.append(1) or (x, x, x))
    monkeypatch.setattr(module, "_SMALL", 256)
    assert torch.equal(layer_norm(x, weight, bias, EPS), own(x, weight, bias))
    assert not seen
    for more in (x.repeat(2, 1), x.repeat(2, 1)[::2].float()):
        layer_norm(more, weight, bias, EPS)
    assert len(seen) == 2


def test_captures_in_a_graph(layer_norm: Any) -> None:
    x, weight, bias = (t.requires_grad_() for t in inputs(33, 512, dtype=torch.bfloat16).values())
    dy = torch.randn_like(x)

    def step() -> tuple[torch.Tensor, ...]:
        y = layer_norm(x, weight, bias, EPS)
        return y, *torch.autograd.grad(y, (x, weight, bias), dy)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = step()
    with torch.no_grad():
        x.normal_()
    graph.replay()
    for old, new in zip(captured, step(), strict=True):
        assert torch.equal(old, new)
