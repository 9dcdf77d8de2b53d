"""Rotary embedding in C++ against the formula that transformers uses."""

from __future__ import annotations

import pytest
import torch
from exact import assert_as_exact

cpu = pytest.importorskip("kernelwise.kernels.cpu.rotary", exc_type=ImportError)
rotary = cpu.rotary

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def rotate_half(x):
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def own(q, k, cos, sin, *, unsqueeze_dim=1):
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


def inputs(dtype, *, batch=2, positions=5, heads=(6, 2), width=32, cos_batch=None, cos_dtype=None, unsqueeze_dim=1):
    torch.manual_seed(0)
    states = [torch.randn(batch, positions, h, width, dtype=dtype) for h in heads]
    if unsqueeze_dim == 1:
        states = [x.transpose(1, 2) for x in states]  # as a projection's view leaves them
    angles = [torch.randn(cos_batch or batch, positions, width, dtype=cos_dtype or dtype) for _ in range(2)]
    return dict(zip(("q", "k", "cos", "sin"), (*states, *angles), strict=True))


def check(given, *, scales=(1.0,), unsqueeze_dim=1):
    """cos and sin are closed over: with a gradient of their own another code path would be taken."""
    angles = {name: given[name] for name in ("cos", "sin")}
    assert_as_exact(
        lambda q, k: own(q, k, **angles, unsqueeze_dim=unsqueeze_dim),
        lambda q, k: rotary(q, k, **angles, unsqueeze_dim=unsqueeze_dim),
        {"q": given["q"], "k": given["k"]},
        scales=scales,
        scaled=("q", "k"),
    )


@DTYPES
@pytest.mark.parametrize("unsqueeze_dim", [1, 2])
@pytest.mark.parametrize("cos_dtype", ["same", "float32"])
@pytest.mark.parametrize("cos_batch", [1, 2])
def test_exact_for_every_variant(dtype, unsqueeze_dim, cos_dtype, cos_batch):
    angles = dtype if cos_dtype == "same" else torch.float32
    given = inputs(dtype, cos_batch=cos_batch, cos_dtype=angles, unsqueeze_dim=unsqueeze_dim)
    check(given, scales=(1e-2, 1.0, 1e2), unsqueeze_dim=unsqueeze_dim)


@DTYPES
@pytest.mark.parametrize(
    "shape",
    [
        {"width": 2},
        {"width": 66},
        {"width": 640},
        {"positions": 1},
        {"positions": 300},
        {"positions": 0},
        {"batch": 0},
        {"batch": 1, "heads": (1, 1)},
        {"heads": (33, 3)},
    ],
    ids=str,
)
def test_exact_for_every_shape(dtype, shape):
    check(inputs(dtype, **shape))


@DTYPES
@pytest.mark.parametrize("case", ["contiguous", "packed", "last dimension", "sliced angles", "expanded"])
def test_exact_for_every_layout(dtype, case):
    given = inputs(dtype)
    if case == "contiguous":
        given |= {name: given[name].contiguous() for name in ("q", "k")}
    elif case == "packed":
        both = torch.randn(2, 5, 4, 64, dtype=dtype).transpose(1, 2)
        given |= {"q": both[..., :32], "k": both[..., 32:]}
    elif case == "last dimension":
        given["q"] = torch.randn(2, 6, 32, 5, dtype=dtype).transpose(2, 3)
    elif case == "sliced angles":
        given |= {name: torch.randn(2, 9, 40, dtype=dtype)[:, 2:7, 4:36] for name in ("cos", "sin")}
    else:
        given |= {"q": given["q"][:1].expand(2, 6, 5, 32), "cos": given["cos"][:1].expand(2, 5, 32)}
    check(given)


def test_the_second_half_of_cos_and_sin_counts():
    given = inputs(torch.float32)
    changed = given | {"cos": given["cos"].clone(), "sin": given["sin"].clone()}
    changed["cos"][..., 16:] += 1
    changed["sin"][..., :16] += 1
    assert not torch.allclose(rotary(**given)[0], rotary(**changed)[0])
    check(changed)


@DTYPES
def test_nan_and_infinity_pass_through(dtype):
    given = inputs(dtype)
    given["q"][0, 0, 0, 0], given["q"][0, 1, 2, 20], given["k"][1, 0, 3, 5] = float("nan"), float("inf"), -float("inf")
    check(given)


def test_gradients_of_cos_and_sin():
    assert_as_exact(own, rotary, inputs(torch.float32))


@pytest.mark.parametrize("needed", ["q", "k"])
def test_only_gradients_that_are_needed(needed):
    given = inputs(torch.float32)
    given[needed].requires_grad_()
    q, k = rotary(**given)
    (q.sum() + k.sum()).backward()
    assert [name for name, t in given.items() if t.grad is not None] == [needed]


def test_a_result_that_is_not_used_has_no_gradient_to_give():
    given = inputs(torch.float32)
    given["q"].requires_grad_()
    given["k"].requires_grad_()
    rotary(**given)[0].sum().backward()
    assert not given["k"].grad.any()


def test_wrong_arguments_are_errors():
    given = inputs(torch.float32)
    odd = inputs(torch.float32, width=33)
    for bad, complaint in (
        (given | {"q": given["q"][0]}, "four dimensions"),
        (given | {"q": given["q"].bfloat16()}, "one dtype"),
        (given | {"cos": given["cos"].bfloat16(), "sin": given["sin"].bfloat16()}, "q's dtype or float32"),
        (given | {"cos": given["cos"][..., :16], "sin": given["sin"][..., :16]}, "width must be even and that of cos"),
        (given | {"cos": given["cos"][:, :3], "sin": given["sin"][:, :3]}, "for q's positions"),
        (odd, "width must be even"),
    ):
        with pytest.raises(RuntimeError, match=complaint):
            rotary(**bad)


@DTYPES
def test_exact_against_transformers(dtype):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    given = inputs(dtype)
    q, k, cos, sin = (given[name] for name in ("q", "k", "cos", "sin"))
    assert_as_exact(
        lambda q, k: llama.apply_rotary_pos_emb(q, k, cos, sin), lambda q, k: rotary(q, k, cos, sin), (q, k)
    )
