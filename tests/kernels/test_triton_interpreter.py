"""The arithmetic of the Triton kernels without a GPU: the same code in Triton's interpreter, in another process.

Only float32: the interpreter truncates bfloat16 where GPUs round.
"""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

CASES = (
    "rms_norm", "add_rms_norm", "gated_activation", "rotary", "cross_entropy", "linear_cross_entropy", "layer_norm",
    "add_layer_norm", "qk_norm_rotary", "activation", "second_derivatives", "configurations",
)  # fmt: skip


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


def _second_derivatives() -> None:
    """Also where one input was computed from another: the way from one to the other is counted once."""
    from kernelwise.kernels.triton.add_rms_norm import add_rms_norm
    from kernelwise.kernels.triton.gated_activation import gated_activation
    from kernelwise.kernels.triton.layer_norm import layer_norm
    from kernelwise.kernels.triton.rms_norm import rms_norm

    def own_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)

    def own_add(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        total = x + x.sin()
        return own_norm(total, weight) * total

    def add(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        normed, total = add_rms_norm(x, x.sin(), weight, 1e-6)
        return normed * total

    pairs = (
        (own_norm, lambda x, w: rms_norm(x, w, 1e-6)),
        (own_add, add),
        (lambda x, w: F.layer_norm(x, (33,), w, w, 1e-6), lambda x, w: layer_norm(x, w, w, 1e-6)),
        (
            lambda x, w: F.silu(x) * w.expand_as(x).cos(),
            lambda x, w: gated_activation(x, w.expand_as(x).cos().contiguous()),
        ),
    )
    leaf = torch.randn(33, requires_grad=True)
    direction = torch.randn(3, 33)
    for own, kernel in pairs:
        found = []
        for function in (own, kernel):
            x = torch.randn(3, 33, generator=torch.Generator().manual_seed(1)) * leaf.exp()
            loss = (function(x, leaf).tanh() * direction).sum()  # the inputs depend on one another
            (first,) = torch.autograd.grad(loss, leaf, create_graph=True)
            (second,) = torch.autograd.grad(first.square().sum(), leaf)
            found.append((first.detach(), second))
        torch.testing.assert_close(found[1], found[0], rtol=2e-4, atol=2e-4)


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
    _gated_mlp_without_gradients()


def _gated_mlp_without_gradients() -> None:
    """What gate and up gave is gone when the last projection runs, as in the layer's own code."""
    from kernelwise.kernels.triton.gated_mlp import gated_mlp

    given: list[weakref.ref[torch.Tensor]] = []

    def projection(x: torch.Tensor) -> torch.Tensor:
        y = 2 * x
        given.append(weakref.ref(y))
        return y

    def down(x: torch.Tensor) -> torch.Tensor:
        assert [tensor() for tensor in given] == [None, None]
        return x + 1

    x = torch.randn(3, 33)
    torch.testing.assert_close(gated_mlp(x, projection, projection, down), F.silu(2 * x) * 2 * x + 1)
    assert len(given) == 2


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


def _own_loss(
    logits: torch.Tensor, labels: torch.Tensor, *, softcap: float | None = None, z_loss: float = 0.0, **options: Any
) -> torch.Tensor:
    num_items = options.pop("num_items", None)
    x = logits.float()
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    losses = F.cross_entropy(x, labels, **{**options, "reduction": "none"})
    counted = labels != options.get("ignore_index", -100)
    losses = losses + z_loss * x.logsumexp(-1).square() * counted
    if options.get("reduction") == "none":
        return losses
    if num_items is None:
        num_items = 1 if options.get("reduction") == "sum" else counted.sum()
    return losses.sum() / num_items


LOSSES: tuple[dict[str, Any], ...] = (
    {},
    {"label_smoothing": 0.1, "reduction": "sum"},
    {"softcap": 30.0, "z_loss": 1e-3, "num_items": 7},
    {"reduction": "none", "ignore_index": 2, "label_smoothing": 0.2, "softcap": 5.0, "z_loss": 0.01},
)


def _cross_entropy() -> None:
    from exact import assert_as_exact

    from kernelwise.kernels.triton import cross_entropy as module
    from kernelwise.kernels.triton.cross_entropy import cross_entropy

    module._FORWARD = module._CONSUMING = module._UNALIGNED = (1024, 2, 16)
    for rows, width in ((8, 32), (9, 33), (1, 7), (4, 2500), (2, 4096)):
        for options in LOSSES:
            labels = torch.randint(0, width, (rows,))
            labels[rows // 2] = options.get("ignore_index", -100) if rows > 1 else 3
            assert_as_exact(
                lambda logits, options=options, labels=labels: _own_loss(logits, labels, **options),
                lambda logits, options=options, labels=labels: cross_entropy(logits, labels, **options),
                {"logits": torch.randn(rows, width)},
                scales=(1e-2, 1.0, 10.0),
            )
    logits, labels = torch.randn(3, 70)[:, 3:63], torch.tensor([5, 0, 59])
    assert_as_exact(lambda x: _own_loss(x, labels), lambda x: cross_entropy(x, labels), (logits,))

    for options in LOSSES[:3]:  # consumed: the logits hold the gradient afterwards, scaled by what comes from above
        given = torch.randn(4, 100)
        labels = torch.tensor([1, -100, 99, 0])
        wide = given.double().requires_grad_()
        expected = torch.autograd.grad(2.5 * _own_loss(wide.float(), labels, **options), wide)[0]
        leaf = given.clone().requires_grad_()
        logits = leaf * 1
        loss = cross_entropy(logits, labels, consume_logits=True, **options)
        torch.testing.assert_close(loss, _own_loss(given, labels, **options))
        (2.5 * loss).backward()
        torch.testing.assert_close(leaf.grad.double(), expected)
        assert not torch.equal(logits.detach(), given)
    assert cross_entropy(torch.randn(2, 5), torch.tensor([5, 1])).isnan()
    assert cross_entropy(torch.randn(2, 5), torch.tensor([-100, -100])).isnan()


def _linear_cross_entropy() -> None:
    from exact import assert_as_exact

    from kernelwise.kernels.triton.linear_cross_entropy import linear_cross_entropy

    given = {"hidden": torch.randn(21, 16), "weight": torch.randn(90, 16), "bias": torch.randn(90)}
    for options in LOSSES:
        labels = torch.randint(3, 90, (21,))
        labels[7] = options.get("ignore_index", -100)
        for chunk_bytes in (None, 8 * 128 * 4):
            assert_as_exact(
                lambda hidden, weight, bias, y=labels, options=options: _own_loss(
                    F.linear(hidden, weight, bias), y, **options
                ),
                lambda hidden, weight, bias, y=labels, options=options, chunk_bytes=chunk_bytes: linear_cross_entropy(
                    hidden, weight, y, bias=bias, chunk_bytes=chunk_bytes, **options
                ),
                given,
                scales=(0.1, 1.0),
            )
    labels = torch.randint(0, 90, (21,))
    hidden, weight = given["hidden"].clone().requires_grad_(), given["weight"].clone().requires_grad_()
    loss = 3 * linear_cross_entropy(hidden, weight, labels)
    wanted = torch.autograd.grad(3 * _own_loss(F.linear(hidden, weight), labels), (hidden, weight))
    for _ in range(2):  # the second time through the chunks again
        for actual, expected in zip(
            torch.autograd.grad(loss, (hidden, weight), retain_graph=True), wanted, strict=True
        ):
            torch.testing.assert_close(actual, expected)
    frozen = linear_cross_entropy(hidden, weight.detach(), labels)
    torch.testing.assert_close(torch.autograd.grad(frozen, hidden)[0] * 3, wanted[0])


def _layer_norm() -> None:
    from exact import assert_as_exact

    from kernelwise.kernels.triton import layer_norm as module
    from kernelwise.kernels.triton.layer_norm import layer_norm

    def own(x: torch.Tensor, weight: Any = None, bias: Any = None) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-5)

    for shape, few_rows in (((3, 33), 9), ((2, 5, 64), 99), ((1, 600), 9), ((70, 3), 99), ((70, 3), 0)):
        module._FEW_ROWS = few_rows  # both forms of the backward pass
        given = {
            "x": torch.randn(shape) + (shape[-1] > 3),
            "weight": torch.randn(shape[-1]),
            "bias": torch.randn(shape[-1]),
        }
        assert_as_exact(own, lambda x, weight, bias: layer_norm(x, weight, bias, 1e-5), given)
        del given["bias"]
        assert_as_exact(
            lambda x, weight: own(x, 1 + weight), lambda x, weight: layer_norm(x, weight, None, 1e-5, offset=1.0), given
        )
        assert_as_exact(own, lambda x: layer_norm(x, None, None, 1e-5), {"x": given["x"]})
    given = {"x": torch.randn(4, 96)[:, 32:64], "weight": torch.randn(32), "bias": torch.randn(32)}
    assert_as_exact(own, lambda x, weight, bias: layer_norm(x, weight, bias, 1e-5), given, scales=(1.0,))


def _add_layer_norm() -> None:
    from exact import assert_as_exact

    from kernelwise.kernels.triton import layer_norm as module
    from kernelwise.kernels.triton.add_layer_norm import add_layer_norm

    def own(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> Any:
        total = x + residual
        return F.layer_norm(total, total.shape[-1:], weight, bias, 1e-5), total

    for shape, few_rows in (((3, 33), 9), ((2, 5, 64), 99), ((70, 3), 0)):
        module._FEW_ROWS = few_rows
        given = {"x": torch.randn(shape), "residual": torch.randn(shape)}
        given |= {"weight": torch.randn(shape[-1]), "bias": torch.randn(shape[-1])}
        assert_as_exact(own, lambda x, residual, weight, bias: add_layer_norm(x, residual, weight, bias, 1e-5), given)


def _qk_norm_rotary() -> None:
    from exact import assert_as_exact

    from kernelwise.kernels.triton.qk_norm_rotary import _plain, qk_norm_rotary

    for heads, tokens, width, batch in (((4, 2), 3, 16, 1), ((3, 1), 1, 6, 2), ((5, 4), 40, 24, 1)):
        q, k = (torch.randn(2, tokens, n, width).transpose(1, 2) for n in heads)
        phase = torch.randn(batch, tokens, width)
        for dim, offset, cast in ((1, 0.0, "before"), (2, 1.0, "after")):
            given = {"q": q, "k": k} if dim == 1 else {"q": q.transpose(1, 2), "k": k.transpose(1, 2)}
            given |= {"q_weight": torch.randn(width), "k_weight": torch.randn(width)}
            assert_as_exact(
                lambda q, k, q_weight, k_weight, p=phase, d=dim, o=offset, c=cast: _plain(
                    q, k, q_weight, k_weight, p.to(q.dtype).cos(), p.to(q.dtype).sin(), 1e-6, o, c, d
                ),
                lambda q, k, q_weight, k_weight, p=phase, d=dim, o=offset, c=cast: qk_norm_rotary(
                    q, k, q_weight, k_weight, p.cos(), p.sin(), 1e-6, offset=o, cast=c, unsqueeze_dim=d
                ),
                given,
                scaled=("q", "k"),
            )


def _activation() -> None:
    from exact import assert_as_exact

    from kernelwise.kernels.triton.activation import MEANING, activation
    from kernelwise.ops._activations import ACTIVATIONS

    for name in MEANING:
        for x in (torch.randn(3, 33), torch.randn(2, 4, 5).transpose(1, 2), torch.randn(4, 96)[:, 3:40]):
            kernel = lambda x, name=name: activation(x, activation=name)  # noqa: E731
            assert_as_exact(ACTIVATIONS[name][0], kernel, (x,), scales=(1e-2, 1.0, 10.0))


def _defaults_of_heads() -> None:
    """Of heads of any number: what a thread of the backward pass holds fits its registers, and all programs the processor."""
    from kernelwise.kernels.triton import _head_configs as heads
    from kernelwise.kernels.triton._launch import power_of_2

    for q_heads, k_heads, width in product((1, 4, 5, 16, 32, 64, 128), (1, 4, 8, 16, 128), (2, 64, 80, 128, 256, 1024)):
        config = heads.qk_norm_rotary_backward_config(0, q_heads, k_heads, width, 1024)
        assert config.warps in (1, 2, 4, 8, 16)
        assert 1 <= config.programs * config.warps <= 16
        elements = (power_of_2(q_heads) + power_of_2(k_heads)) * power_of_2(width // 2)
        assert config.warps == 16 or elements <= 24 * 32 * config.warps
        turned = heads.rotary_config(0, q_heads, k_heads, width, 1024, True, False)
        assert turned.warps in (1, 2, 4, 8, 16)


def _configurations() -> None:
    """What the tables may say changes no result: forms that no default has."""
    from exact import assert_as_exact

    from kernelwise.kernels.triton import _head_configs as heads
    from kernelwise.kernels.triton import _norm_configs as norms
    from kernelwise.kernels.triton import layer_norm as layer
    from kernelwise.kernels.triton.layer_norm import layer_norm
    from kernelwise.kernels.triton.qk_norm_rotary import qk_norm_rotary
    from kernelwise.kernels.triton.rotary import _plain, rotary

    _defaults_of_heads()
    layer._FEW_ROWS = 0
    any_number = 1 << 62
    here = ""  # the architecture of the interpreter
    norms.FORWARD["layer_norm"][here] = [(33, any_number, norms.NormConfig(2, 4))]
    norms.FORWARD_FEW["layer_norm"][here] = [(33, any_number, norms.NormConfig(1, 1))]
    norms.BACKWARD["layer_norm"][here] = [(33, any_number, norms.NormConfig(2, 4, 3, 2, columns=8))]
    for rows in (1, 17):
        given = {"x": torch.randn(rows, 33), "weight": torch.randn(33), "bias": torch.randn(33)}
        assert_as_exact(
            lambda x, weight, bias: F.layer_norm(x, (33,), weight, bias, 1e-5),
            lambda x, weight, bias: layer_norm(x, weight, bias, 1e-5),
            given,
            scales=(1.0,),
        )
    heads.ROTARY[here] = heads.ROTARY_BACKWARD[here] = [
        (30, any_number, heads.HeadConfig(8, 1)), (64, any_number, heads.HeadConfig(1, 2))
    ]  # fmt: skip
    heads.QK_NORM_ROTARY_BACKWARD[here] = [(6, any_number, heads.HeadConfig(1, 2, programs=2, stages=2))]
    for q_heads, k_heads, width in ((5, 3, 6), (4, 2, 16)):
        q, k = (torch.randn(2, 3, n, width).transpose(1, 2) for n in (q_heads, k_heads))
        phase = torch.randn(1, 3, width)
        assert_as_exact(
            lambda q, k, p=phase: _plain(q, k, p.to(q.dtype).cos(), p.to(q.dtype).sin(), 1),
            lambda q, k, p=phase: rotary(q, k, p.cos(), p.sin()),
            {"q": q, "k": k},
            scales=(1.0,),
        )
    q, k, weight, phase = torch.randn(2, 4, 9, 6), torch.randn(2, 2, 9, 6), torch.ones(6), torch.randn(1, 9, 6)

    def own(q: torch.Tensor, k: torch.Tensor) -> Any:
        normed = (F.rms_norm(t, (6,), weight.to(t.dtype), 1e-6) for t in (q, k))
        return _plain(*normed, phase.to(q.dtype).cos(), phase.to(q.dtype).sin(), 1)

    assert_as_exact(
        own,
        lambda q, k: qk_norm_rotary(q, k, weight, weight, phase.cos(), phase.sin(), 1e-6),
        {"q": q, "k": k},
        scales=(1.0,),
    )


if __name__ == "__main__":
    torch.manual_seed(0)
    cases = (
        _rms_norm, _add_rms_norm, _gated_activation, _rotary, _cross_entropy, _linear_cross_entropy, _layer_norm,
        _add_layer_norm, _qk_norm_rotary, _activation, _second_derivatives, _configurations,
    )  # fmt: skip
    dict(zip(CASES, cases, strict=True))[sys.argv[1]]()
