"""RMS norm in Triton against the norms of transformers, on the GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from exact import assert_as_exact

pytestmark = pytest.mark.gpu

EPS = 1e-6
WIDTHS = (1, 7, 33, 100, 577, 2304, 5120, 16384)
HALF = (torch.bfloat16, torch.float16)


@pytest.fixture
def rms_norm() -> Callable[..., torch.Tensor]:
    from kernelwise.kernels.triton.rms_norm import rms_norm

    return rms_norm


def before(x: torch.Tensor, weight: torch.Tensor, eps: float = EPS) -> torch.Tensor:
    """LlamaRMSNorm."""
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def after(x: torch.Tensor, weight: torch.Tensor, offset: float = 0.0, eps: float = EPS) -> torch.Tensor:
    """GptOssRMSNorm; with offset 1, GemmaRMSNorm."""
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return ((offset + weight.to(torch.float32)) * wide).to(x.dtype)


def without(x: torch.Tensor, eps: float = EPS) -> torch.Tensor:
    wide = x.to(torch.float32)
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def inputs(*shape: int, dtype: torch.dtype, weight: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(sum(shape))
    x = torch.randn(shape, device="cuda", generator=generator)
    w = 1 + 0.3 * torch.randn(shape[-1], device="cuda", generator=generator)
    return {"x": x.to(dtype), "weight": w.to(weight or dtype)}


@pytest.mark.parametrize("width", WIDTHS)
def test_every_width(rms_norm: Callable[..., torch.Tensor], width: int) -> None:
    given = inputs(3, 5, width, dtype=torch.bfloat16)
    assert_as_exact(before, lambda x, weight: rms_norm(x, weight, EPS), given)


@pytest.mark.parametrize("width", [100, 2048])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_every_form(rms_norm: Callable[..., torch.Tensor], width: int, dtype: torch.dtype) -> None:
    given = inputs(9, width, dtype=dtype)
    assert_as_exact(before, lambda x, weight: rms_norm(x, weight, EPS), given)
    assert_as_exact(after, lambda x, weight: rms_norm(x, weight, EPS, cast="after"), given)
    assert_as_exact(
        lambda x, weight: after(x, weight, 1.0),
        lambda x, weight: rms_norm(x, weight, EPS, offset=1.0, cast="after"),
        given,
    )
    assert_as_exact(without, lambda x: rms_norm(x, None, EPS), {"x": given["x"]})


@pytest.mark.parametrize("dtype", HALF)
def test_float32_weight_with_half_input(rms_norm: Callable[..., torch.Tensor], dtype: torch.dtype) -> None:
    given = inputs(17, 576, dtype=dtype, weight=torch.float32)
    assert rms_norm(**given, eps=EPS).dtype == torch.float32
    assert_as_exact(before, lambda x, weight: rms_norm(x, weight, EPS), given)
    assert rms_norm(**given, eps=EPS, cast="after").dtype == dtype
    assert_as_exact(after, lambda x, weight: rms_norm(x, weight, EPS, cast="after"), given)


@pytest.mark.parametrize(
    "shape", [(1, 4096), (600, 4096), (1500, 4096), (1300, 5120), (40, 64, 128), (2, 700, 24, 128)]
)
def test_every_way_of_cutting(rms_norm: Callable[..., torch.Tensor], shape: tuple[int, ...]) -> None:
    """One row, few rows, many rows, many short rows: each has kernels or configurations of its own."""
    given = inputs(*shape, dtype=torch.bfloat16)
    assert_as_exact(before, lambda x, weight: rms_norm(x, weight, EPS), given, scales=(1.0,))


@pytest.mark.parametrize("width", [3072, 4096, 8192, 16384, 32768])
def test_wide_float32_rows(rms_norm: Callable[..., torch.Tensor], width: int) -> None:
    """Twice the shared memory of half-precision rows."""
    given = inputs(4100 if width == 4096 else 1000, width, dtype=torch.float32)
    assert_as_exact(before, lambda x, weight: rms_norm(x, weight, EPS), given, scales=(1.0,))


@pytest.mark.parametrize("rows", [2000, 50_000])
def test_weight_gradient_over_many_rows(rms_norm: Callable[..., torch.Tensor], rows: int) -> None:
    """Thousands of terms in one sum: the order of summation must not cost accuracy."""
    given = inputs(rows, 96, dtype=torch.float32)
    assert_as_exact(before, lambda x, weight: rms_norm(x, weight, EPS), given, scales=(1.0,))


@pytest.mark.parametrize("rows", [4, 1100])
def test_rows_that_are_not_adjacent(rms_norm: Callable[..., torch.Tensor], rows: int) -> None:
    given = inputs(rows, 3 * 128, dtype=torch.bfloat16)
    packed, weight = given["x"], given["weight"][:128]
    for x in (packed[:, 128:256], packed[:, 1:129], packed[::2, :128], packed.view(rows, 3, 128).transpose(0, 1)):
        assert_as_exact(before, lambda x, weight: rms_norm(x, weight, EPS), {"x": x, "weight": weight}, scales=(1.0,))


@pytest.mark.parametrize("rows", [5, 1100])
def test_frozen_weight_and_frozen_input(rms_norm: Callable[..., torch.Tensor], rows: int) -> None:
    given = inputs(rows, 512, dtype=torch.bfloat16)
    dy = torch.randn_like(given["x"])
    both = [given[n].clone().requires_grad_() for n in ("x", "weight")]
    dx, dweight = torch.autograd.grad(rms_norm(*both, EPS), both, dy)
    x, weight = (given[n].clone().requires_grad_(n == "x") for n in ("x", "weight"))
    assert torch.equal(torch.autograd.grad(rms_norm(x, weight, EPS), x, dy)[0], dx)
    x, weight = (given[n].clone().requires_grad_(n == "weight") for n in ("x", "weight"))
    assert torch.equal(torch.autograd.grad(rms_norm(x, weight, EPS), weight, dy)[0], dweight)


def test_no_rows(rms_norm: Callable[..., torch.Tensor]) -> None:
    given = inputs(4, 64, dtype=torch.bfloat16)
    x, weight = given["x"][:0].requires_grad_(), given["weight"].requires_grad_()
    y = rms_norm(x, weight, EPS)
    assert y.shape == (0, 64)
    dx, dweight = torch.autograd.grad(y, (x, weight), torch.empty_like(y))
    assert dx.shape == (0, 64)
    assert not dweight.any()


def test_nan_and_infinity_pass(rms_norm: Callable[..., torch.Tensor]) -> None:
    given = inputs(4, 100, dtype=torch.bfloat16)
    given["x"][0, 3] = float("nan")
    given["x"][1, 7] = float("inf")
    given["weight"][9] = float("inf")
    assert_as_exact(before, lambda x, weight: rms_norm(x, weight, EPS), given, scales=(1.0,))


def test_more_elements_than_32_bits_count(rms_norm: Callable[..., torch.Tensor]) -> None:
    x = torch.empty(70_000, 32_768, device="cuda", dtype=torch.bfloat16).normal_()
    weight = torch.randn(32_768, device="cuda", dtype=torch.bfloat16)
    assert torch.equal(rms_norm(x, weight, EPS)[-3:], rms_norm(x[-3:].clone(), weight, EPS))


def test_no_state_between_calls(rms_norm: Callable[..., torch.Tensor]) -> None:
    """The same kind of call again, with other sizes, misaligned memory and another eps: no launcher is used wrongly."""
    given = inputs(64, 256, dtype=torch.bfloat16)
    memory = torch.randn(65 * 256 + 1, device="cuda").to(torch.bfloat16)
    for rows, start in ((64, 0), (3, 0), (17, 1), (64, 1), (5, 8), (1, 0)):
        x = memory[start : start + rows * 256].view(rows, 256)
        for eps in (1e-6, 1.0):
            expected = before(x.double(), given["weight"].double(), eps)
            actual = rms_norm(x, given["weight"], eps).double()
            assert (actual - expected).abs().max() <= 2**-7 * expected.abs().max()


def test_what_is_refused(rms_norm: Callable[..., torch.Tensor]) -> None:
    x, weight = inputs(2, 8, dtype=torch.bfloat16).values()
    rms_norm(x, weight, EPS)  # what was checked for one call says nothing of the next of its kind
    with pytest.raises(ValueError, match="is on"):
        rms_norm(x, weight.cpu(), EPS)
    with pytest.raises(ValueError, match="float64"):
        rms_norm(x.double(), None, EPS)
    with pytest.raises(ValueError, match="weight"):
        rms_norm(x, weight.half(), EPS)
    with pytest.raises(ValueError, match="shape"):
        rms_norm(x, weight[:4], EPS)
    with pytest.raises(ValueError, match="cast"):
        rms_norm(x, weight, EPS, cast="never")


def test_second_derivatives(rms_norm: Callable[..., torch.Tensor]) -> None:
    def penalty(norm: Callable[..., torch.Tensor]) -> tuple[torch.Tensor, ...]:
        x, weight = (t.requires_grad_() for t in inputs(2, 8, dtype=torch.float32).values())
        dx, dweight = torch.autograd.grad(norm(x, weight).square().sum(), (x, weight), create_graph=True)
        return torch.autograd.grad(dx.square().sum() + dweight.square().sum(), (x, weight))

    for own, new in zip(penalty(before), penalty(lambda x, weight: rms_norm(x, weight, EPS)), strict=True):
        torch.testing.assert_close(new, own)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("width", [577, 1024])
def test_compiles(rms_norm: Callable[..., torch.Tensor], width: int, dynamic: bool) -> None:
    torch._dynamo.reset()

    def layer(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return rms_norm(x * 2, weight, EPS, offset=1.0, cast="after") + rms_norm(x, None, EPS)

    def own(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return after(x * 2, weight, 1.0) + without(x)

    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic)
    for rows in (6, 1030):
        assert_as_exact(own, compiled, inputs(rows, width, dtype=torch.bfloat16), scales=(1.0,))


def test_compiles_on_views(rms_norm: Callable[..., torch.Tensor]) -> None:
    """Strides as q/k norms have them: what the compiler lays out must be what the kernel reads."""
    torch._dynamo.reset()

    def layer(x: torch.Tensor, weight: torch.Tensor, norm: Callable[..., torch.Tensor]) -> torch.Tensor:
        q = torch.cat([x, x * 2], -1).view(2, 12, 8, 64)[:, :, 1:5].transpose(1, 2)
        return norm(q, weight).transpose(1, 2).reshape(2, 12, 256)

    given = {
        "x": torch.randn(2, 12, 256, device="cuda").bfloat16(),
        "weight": torch.randn(64, device="cuda").bfloat16(),
    }
    compiled = torch.compile(lambda x, weight: layer(x, weight, lambda q, w: rms_norm(q, w, EPS)), fullgraph=True)
    assert_as_exact(lambda x, weight: layer(x, weight, before), compiled, given, scales=(1.0,))


def test_is_a_sound_operation() -> None:
    from kernelwise.kernels.triton import rms_norm

    for rows in (3, 2000):
        x, weight = (t.requires_grad_() for t in inputs(rows, 64, dtype=torch.float32).values())
        torch.library.opcheck(rms_norm._operation, (x, weight, EPS, 0.0, "before"))
        torch.library.opcheck(rms_norm._operation, (x, None, EPS, 0.0, "after"))


def test_captures_in_a_graph(rms_norm: Callable[..., torch.Tensor]) -> None:
    x, weight = (t.requires_grad_() for t in inputs(33, 512, dtype=torch.bfloat16).values())
    dy = torch.randn_like(x)

    def step() -> tuple[torch.Tensor, ...]:
        y = rms_norm(x, weight, EPS)
        return y, *torch.autograd.grad(y, (x, weight), dy)

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


def test_is_visible_to_dispatch_modes(rms_norm: Callable[..., torch.Tensor]) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    given = inputs(3, 64, dtype=torch.bfloat16)
    expected = rms_norm(**given, eps=EPS)
    with Seen():
        assert torch.equal(rms_norm(**given, eps=EPS), expected)
    assert any("rms_norm" in name for name in seen)
