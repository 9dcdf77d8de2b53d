"""RMSNorm over heads and rotary embedding in one, in C++, against the two steps in plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from exact import assert_as_exact

cpu = pytest.importorskip("kernelwise.kernels.cpu.qk_norm_rotary", exc_type=ImportError)
qk_norm_rotary = cpu.qk_norm_rotary

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
EPS = 1e-6


def norm(x, weight, offset, cast):
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    if weight is None:
        return wide.to(x.dtype)
    if cast == "before":
        return (weight if offset == 0 else offset + weight) * wide.to(x.dtype)
    return ((offset + weight.float()) * wide).to(x.dtype)


def rotate_half(x):
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def own(q, k, q_weight, k_weight, cos, sin, *, unsqueeze_dim=1, offset=0.0, cast="before"):
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    q, k = norm(q, q_weight, offset, cast), norm(k, k_weight, offset, cast)
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


def inputs(dtype, *, batch=2, positions=5, heads=(6, 2), width=32, cos_batch=None, cos_dtype=None, unsqueeze_dim=1):
    torch.manual_seed(0)
    q, k = (torch.randn(batch, positions, h, width, dtype=dtype) for h in heads)
    if unsqueeze_dim == 1:
        q, k = q.transpose(1, 2), k.transpose(1, 2)  # as a projection's view leaves them
    cos, sin = (torch.randn(cos_batch or batch, positions, width, dtype=cos_dtype or dtype) for _ in range(2))
    weights = {name: torch.randn(width, dtype=dtype) for name in ("q_weight", "k_weight")}
    return {"q": q, "k": k, **weights, "cos": cos, "sin": sin}


def check(given, *, scales=(1.0,), **options):
    """cos and sin are closed over: with a gradient of their own another code path would be taken."""
    closed = {name: given[name] for name in given if name in ("cos", "sin") or given[name] is None}
    assert_as_exact(
        lambda **tensors: own(**tensors, **closed, **options),
        lambda **tensors: qk_norm_rotary(**tensors, **closed, eps=EPS, **options),
        {name: t for name, t in given.items() if name not in closed},
        scales=scales,
        scaled=("q", "k"),
    )


@DTYPES
@pytest.mark.parametrize("unsqueeze_dim", [1, 2])
@pytest.mark.parametrize("cos_dtype", ["same", "float32"])
@pytest.mark.parametrize("options", [{}, {"cast": "after"}, {"cast": "after", "offset": 1.0}, {"offset": 1.0}], ids=str)
@pytest.mark.parametrize("weights", ["same", "float32", "none", "of q"])
def test_exact_for_every_variant(dtype, unsqueeze_dim, cos_dtype, options, weights):
    angles = dtype if cos_dtype == "same" else torch.float32
    given = inputs(dtype, cos_batch=1, cos_dtype=angles, unsqueeze_dim=unsqueeze_dim)
    if weights == "float32":
        given |= {name: given[name].float() for name in ("q_weight", "k_weight")}
    elif weights != "same":
        given |= {"k_weight": None} | ({"q_weight": None} if weights == "none" else {})
    check(given, unsqueeze_dim=unsqueeze_dim, **options)


@DTYPES
@pytest.mark.parametrize(
    "shape",
    [
        {"width": 2},
        {"width": 66},
        {"width": 1024},
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
    check(inputs(dtype, **shape), scales=(1e-2, 1.0, 1e2))


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


@DTYPES
def test_nan_and_infinity_pass_through(dtype):
    given = inputs(dtype)
    given["q"][0, 0, 0, 0], given["q"][0, 1, 2, 20], given["k"][1, 0, 3, 5] = float("nan"), float("inf"), -float("inf")
    check(given)


def test_gradients_of_cos_and_sin():
    assert_as_exact(own, lambda **tensors: qk_norm_rotary(**tensors, eps=EPS), inputs(torch.float32))


@pytest.mark.parametrize("needed", ["q", "k", "q_weight", "k_weight"])
def test_only_gradients_that_are_needed(needed):
    given = inputs(torch.float32)
    given[needed].requires_grad_()
    q, k = qk_norm_rotary(**given, eps=EPS)
    (q.sum() + k.sum()).backward()
    assert [name for name, t in given.items() if t.grad is not None] == [needed]


def test_wrong_arguments_are_errors():
    given = inputs(torch.float32)
    for bad, complaint in (
        (given | {"q": given["q"][0]}, "four dimensions"),
        (given | {"q_weight": torch.randn(31)}, "a weight must have the shape of the last dimension"),
        (given | {"k_weight": torch.randn(32).half()}, "a weight must have the dtype of q and k or float32"),
        (given | {"cos": given["cos"].half(), "sin": given["sin"].half()}, "q's dtype or float32"),
        (inputs(torch.float32, width=1026), "at most 1024 wide"),
        (inputs(torch.float32, width=33), "width must be even"),
    ):
        with pytest.raises(RuntimeError, match=complaint):
            qk_norm_rotary(**bad, eps=EPS)
