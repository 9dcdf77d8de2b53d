"""The arithmetic of the Triton kernels without a GPU: the same code in Triton's interpreter, in another process.

Only float32: the interpreter truncates bfloat16 where GPUs round.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

CASES = ("rms_norm", "add_rms_norm", "gated_activation", "rotary")


@pytest.mark.parametrize("case", CASES)
def test_in_the_interpreter(case: str) -> None:
    pytest.importorskip("triton")
    here = Path(__file__).resolve()
    path = os.pathsep.join([str(here.parents[2] / "src"), str(here.parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, str(here), case], env=environment, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr[-3000:]


def _rms_norm() -> None:
    from exact import assert_as_exact

    from kernelwise.kernels.triton import rms_norm as module
    from kernelwise.kernels.triton.rms_norm import rms_norm

    def own(x: torch.Tensor, weight: torch.Tensor | None = None, offset: float = 0.0) -> torch.Tensor:
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return wide if weight is None else (offset + weight) * wide

    for shape, few_rows in (((3, 33), 9), ((2, 5, 64), 99), ((1, 600), 9), ((70, 3), 99), ((70, 3), 0)):
        module._FEW_ROWS = few_rows  # both forms of the backward pass
        x, weight = torch.randn(shape), torch.randn(shape[-1])
        given = {"x": x, "weight": weight}
        assert_as_exact(own, lambda x, weight: rms_norm(x, weight, 1e-6), given)
        assert_as_exact(
            lambda x, weight: own(x, weight, 1.0),
            lambda x, weight: rms_norm(x, weight, 1e-6, offset=1.0, cast="after"),
            given,
        )
        assert_as_exact(own, lambda x: rms_norm(x, None, 1e-6), {"x": x})
    packed = torch.randn(4, 96)
    assert_as_exact(
        own,
        lambda x, weight: rms_norm(x, weight, 1e-6),
        {"x": packed[:, 32:64], "weight": torch.randn(32)},
        scales=(1.0,),
    )


def _add_rms_norm() -> None:
    from exact import assert_as_exact

    from kernelwise.kernels.triton import rms_norm as module
    from kernelwise.kernels.triton.add_rms_norm import add_rms_norm

    def own(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        total = x + residual
        return weight * (total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + 1e-6)), total

    for shape, few_rows in (((3, 33), 9), ((2, 5, 64), 99), ((70, 3), 0)):
        module._FEW_ROWS = few_rows
        given = {"x": torch.randn(shape), "residual": torch.randn(shape), "weight": torch.randn(shape[-1])}
        assert_as_exact(own, lambda x, residual, weight: add_rms_norm(x, residual, weight, 1e-6), given)


def _gated_activation() -> None:
    from exact import assert_as_exact

    from kernelwise.kernels.triton.gated_activation import gated_activation

    own = {
        "silu": lambda gate, up: F.silu(gate) * up,
        "gelu": lambda gate, up: F.gelu(gate) * up,
        "gelu_tanh": lambda gate, up: F.gelu(gate, approximate="tanh") * up,
    }
    packed = torch.randn(3, 4, 2 * 100)
    for activation, function in own.items():
        for gate, up in ((torch.randn(3, 33), torch.randn(3, 33)), packed.chunk(2, -1), torch.randn(2, 1, 4096)):
            kernel = lambda gate, up, name=activation: gated_activation(gate, up, activation=name)  # noqa: E731
            assert_as_exact(function, kernel, {"gate": gate, "up": up}, scales=(1.0, 30.0))


def _rotary() -> None:
    from exact import assert_as_exact

    from kernelwise.kernels.triton.rotary import _plain, rotary

    for heads, tokens, width, batch in (((4, 2), 3, 16, 1), ((3, 1), 1, 6, 2), ((5, 5), 40, 8, 1)):
        q, k = (torch.randn(2, tokens, n, width).transpose(1, 2) for n in heads)
        phase = torch.randn(batch, tokens, width)
        for dim in (1, 2):
            given = {"q": q, "k": k} if dim == 1 else {"q": q.transpose(1, 2), "k": k.transpose(1, 2)}
            assert_as_exact(
                lambda q, k, p=phase, d=dim: _plain(q, k, p.to(q.dtype).cos(), p.to(q.dtype).sin(), d),
                lambda q, k, p=phase, d=dim: rotary(q, k, p.cos(), p.sin(), unsqueeze_dim=d),
                given,
                scaled=("q", "k"),
            )


if __name__ == "__main__":
    torch.manual_seed(0)
    cases = (_rms_norm, _add_rms_norm, _gated_activation, _rotary)
    dict(zip(CASES, cases, strict=True))[sys.argv[1]]()
