"""The order in which a result lies in memory is that of its input, under torch.compile with symbolic strides too."""

from __future__ import annotations

import pytest
import torch

from kernelwise.kernels._layout import by_stride, inverse, leading_order


@pytest.mark.parametrize("compiled", [False, True])
def test_order_by_stride(compiled: bool) -> None:
    x = torch.randn(2, 3, 4, 8)
    moved = x.permute(1, 2, 0, 3)
    order = torch.compile(lambda x: x.permute(by_stride(x, 4)), backend="eager", fullgraph=True, dynamic=True)
    place = order if compiled else lambda x: x.permute(by_stride(x, 4))
    for given in (x, moved, x.transpose(2, 3)):
        assert place(given).is_contiguous()
    assert by_stride(torch.zeros(1, 1, 1).expand(2, 3, 4), 3) == (0, 1, 2)
    assert moved.permute(by_stride(moved, 4)).permute(inverse(by_stride(moved, 4))).stride() == moved.stride()


def test_leading_order_of_symbolic_strides() -> None:
    def same(x: torch.Tensor) -> torch.Tensor:
        order = leading_order(x)
        return x * 2 if order is None else (x.permute(order) * 2).permute(inverse(order))

    compiled = torch.compile(same, backend="eager", fullgraph=True, dynamic=True)
    for tokens in (3, 5):
        x = torch.randn(2, tokens, 4, 8)
        for given in (x, x.transpose(1, 2), x.transpose(2, 3)):
            torch.testing.assert_close(compiled(given), given * 2, rtol=0, atol=0)
    assert leading_order(x) is None
    assert leading_order(x.transpose(1, 2)) == (0, 2, 1, 3)
    assert leading_order(x.transpose(2, 3)) is None  # its last dimension is not the innermost


@pytest.mark.parametrize("name", ["rms_norm", "layer_norm", "activation"])
def test_cpu_kernels_compile_with_symbolic_strides(name: str) -> None:
    kernel = getattr(pytest.importorskip(f"kernelwise.kernels.cpu.{name}", exc_type=ImportError), name)
    arguments = {
        "rms_norm": (torch.ones(8), 1e-6),
        "layer_norm": (torch.ones(8), torch.ones(8), 1e-6),
        "activation": (),
    }

    def call(x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = kernel(x, *arguments[name])
        return result

    compiled = torch.compile(call, backend="eager", fullgraph=True, dynamic=True)
    for tokens in (3, 5):
        x = torch.randn(2, tokens, 4, 8).transpose(1, 2)
        torch.testing.assert_close(compiled(x), call(x))
