"""Attention in C++ against torch's own, in every shape and with every mask."""

from __future__ import annotations

import pytest
import torch
from exact import assert_as_exact

cpu = pytest.importorskip("kernelwise.kernels.cpu.attention", exc_type=ImportError)
library = pytest.importorskip("kernelwise.kernels.cpu._library")

pytestmark = pytest.mark.skipif(library.isa() == "baseline", reason="there is no such kernel without AVX2")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def inputs(dtype, *, batch=2, heads=(6, 2), positions=5, keys=None, width=32, value_width=None):
    torch.manual_seed(0)
    keys = positions if keys is None else keys
    return {
        "q": torch.randn(batch, heads[0], positions, width, dtype=dtype),
        "k": torch.randn(batch, heads[1], keys, width, dtype=dtype),
        "v": torch.randn(batch, heads[1], keys, value_width or width, dtype=dtype),
    }


def check(given, *, scales=(1.0,), grad=False, kernel=None, **options):
    """In float32, torch's own is also what the operator is compared with where `attention` would leave it to torch."""

    def own(q, k, v, mask=None):
        return cpu.plain(q, k, v, mask, options.get("causal", False), options.get("scale"))

    def operator(q, k, v, mask=None):
        scale = options.get("scale")
        return cpu._forward(q, k, v, scale, mask, options.get("causal", False))

    assert_as_exact(own, operator, given, scales=scales, grad=False)
    assert_as_exact(
        own, lambda *args, **named: cpu.attention(*args, **named, **options), given, scales=scales, grad=grad
    )


@DTYPES
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_exact_at_every_scale(dtype, causal, scale):
    check(inputs(dtype, positions=9), scales=(1e-2, 1.0, 1e2), grad=True, causal=causal, scale=scale)


@DTYPES
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "shape",
    [
        {"width": 1},
        {"width": 7, "value_width": 20},
        {"width": 80, "value_width": 33, "positions": 40},
        {"width": 128, "positions": 100},
        {"positions": 1, "keys": 1},
        {"positions": 1, "keys": 97},
        {"positions": 2, "keys": 300},
        {"positions": 3, "heads": (6, 6), "keys": 11},
        {"positions": 130, "keys": 70},
        {"positions": 70, "keys": 230},
        {"positions": 300, "heads": (3, 1), "batch": 1},
        {"positions": 7, "heads": (200, 1), "batch": 1, "width": 16},
        {"batch": 0},
        {"positions": 0},
    ],
    ids=str,
)
def test_exact_for_every_shape(dtype, causal, shape):
    check(inputs(dtype, **shape), causal=causal)


@DTYPES
@pytest.mark.parametrize("kind", ["bool", "own", "float32"])
@pytest.mark.parametrize("shape", [(2, 1, 40, 120), (1, 6, 40, 120), (2, 6, 1, 120), (1, 1, 1, 120)], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_exact_with_every_mask(dtype, kind, shape, causal):
    given = inputs(dtype, positions=40, keys=120)
    mask = torch.rand(shape) > 0.4 if kind == "bool" else torch.randn(shape, dtype=dtype if kind == "own" else None)
    if kind == "float32":
        mask = mask.to(dtype).float()  # torch rounds it first
    check(given | {"mask": mask}, causal=causal)


@DTYPES
def test_exact_for_every_layout(dtype):
    given = inputs(dtype, positions=20)
    packed = torch.randn(2, 20, 10, 32, dtype=dtype)
    for case in (
        {
            "q": packed[:, :, :6].transpose(1, 2),
            "k": packed[:, :, 6:8].transpose(1, 2),
            "v": packed[:, :, 8:].transpose(1, 2),
        },
        {"q": torch.randn(2, 6, 32, 20, dtype=dtype).transpose(2, 3), "v": torch.randn(2, 2, 32, 20, dtype=dtype).mT},
        {"k": torch.randn(2, 1, 20, 32, dtype=dtype).expand(2, 2, 20, 32)},
        {"mask": torch.rand(20, 40)[:, ::2].expand(2, 1, 20, 20) > 0.4},
    ):
        check(given | case)


@DTYPES
@pytest.mark.parametrize("positions", [1, 30])
def test_rows_that_see_nothing_are_zero(dtype, positions):
    given = inputs(dtype, positions=positions, keys=120)
    mask = torch.ones(2, 1, positions, 120, dtype=torch.bool)
    mask[1, :, -1] = False
    y = cpu.attention(**given, mask=mask)
    assert (y[1, :, -1] == 0).all()
    assert (y[0] != 0).any(-1).all()
    added = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    assert torch.equal(cpu._forward(*given.values(), 0.1, added), cpu._forward(*given.values(), 0.1, mask))


@DTYPES
@pytest.mark.parametrize("positions", [1, 30])
def test_nan_stays_in_the_rows_that_see_it(dtype, positions):
    given = inputs(dtype, positions=positions, keys=120)
    given["q"][0, 1, 0, 3] = float("nan")
    given["k"][1, 0, 5, 2] = float("nan")
    y = cpu._forward(*given.values(), 0.2).isnan().any(-1)
    assert y[0, 1, 0]
    assert y[1, :3].all()
    assert y.sum() == 1 + 3 * positions


def test_what_is_not_seen_does_not_count():
    given = inputs(torch.float32, positions=40)
    alone = cpu.attention(**given, causal=True)
    given["k"][:, :, 25:], given["v"][:, :, 25:] = float("nan"), 1e30
    assert torch.equal(cpu.attention(**given, causal=True)[:, :, :25], alone[:, :, :25])


@DTYPES
def test_a_row_is_the_same_whatever_other_heads_there_are(dtype):
    given = inputs(dtype, positions=30, heads=(6, 3), batch=1)
    y = cpu._forward(*given.values(), 0.2, None, True)
    one = {"q": given["q"][:, 2:4], "k": given["k"][:, 1:2], "v": given["v"][:, 1:2]}
    assert torch.equal(cpu._forward(*one.values(), 0.2, None, True), y[:, 2:4])


@DTYPES
@pytest.mark.parametrize("causal", [False, True])
def test_few_rows_are_the_same_with_every_number_of_threads(dtype, causal):
    given = inputs(dtype, positions=2, keys=700, heads=(4, 1), batch=1, width=64)
    before = torch.get_num_threads()
    found = []
    try:
        for num in (1, 2, 3, 16):
            torch.set_num_threads(num)
            found.append(cpu._forward(*given.values(), 0.2, None, causal))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(y, found[0]) for y in found)


def test_the_result_lies_in_memory_by_positions():
    y = cpu.attention(**inputs(torch.bfloat16, positions=9))
    assert y.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("needed", ["q", "k", "v"])
def test_only_gradients_that_are_needed(needed):
    given = inputs(torch.bfloat16, positions=9)
    given[needed].requires_grad_()
    cpu.attention(**given, causal=True).sum().backward()
    assert [name for name, t in given.items() if t.grad is not None] == [needed]


def test_a_mask_that_learns_gets_its_gradient():
    given = inputs(torch.bfloat16, positions=9)
    mask = torch.zeros(1, 6, 9, 9, dtype=torch.bfloat16, requires_grad=True)
    cpu.attention(**given, mask=mask).sum().backward()
    assert mask.grad.abs().max() > 0


def test_what_torch_does_as_fast_is_left_to_it(monkeypatch):
    def refuse(*_):
        raise AssertionError("the kernel ran")

    monkeypatch.setattr(cpu, "_direct", refuse)
    cpu.attention(**inputs(torch.float32, positions=130))
    cpu.attention(**inputs(torch.float32, positions=127), causal=True)
    cpu.attention(**inputs(torch.float64))
    given = inputs(torch.bfloat16, positions=2)
    given["q"].requires_grad_()
    cpu.attention(**given, causal=True)
    for options, causal in (({"positions": 128}, True), ({"positions": 1, "keys": 9}, False)):
        with pytest.raises(AssertionError, match="the kernel ran"):
            cpu.attention(**inputs(torch.float32, **options), causal=causal)


def test_a_reason_where_it_is_not_worthwhile(monkeypatch):
    assert cpu.why_not_worthwhile(torch.float32) is None
    monkeypatch.setattr(cpu, "units", lambda dtype: "matrix")
    assert "natively" in cpu.why_not_worthwhile(torch.bfloat16)
    assert cpu.why_not_worthwhile(torch.float32) is None
    monkeypatch.setattr(cpu, "isa", lambda: "baseline")
    assert "AVX2" in cpu.why_not_worthwhile(torch.float32)


def test_wrong_arguments_are_errors():
    given = inputs(torch.bfloat16, keys=8)
    q, k, v = given.values()
    for tensors, mask, complaint in (
        ((q[0], k, v), None, "must be \\[batch, heads"),
        ((q, k.half(), v), None, "one dtype"),
        ((q.int(), k.int(), v.int()), None, "must be float32"),
        ((q, k[:, :, :7], v), None, "must fit q"),
        ((q[:, :5], k, v), None, "must fit q"),
        ((q, k, v), torch.zeros(2, 1, 5, 7), "a mask must be"),
        ((q, k, v), torch.zeros(2, 1, 5, 8).half(), "a mask must be bool"),
    ):
        with pytest.raises(RuntimeError, match=complaint):
            cpu._forward(*tensors, 1.0, mask)
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(RuntimeError, match="must be \\[batch, heads"):
            cpu.attention(*(x[0].to(dtype) for x in (q, k, v)))
