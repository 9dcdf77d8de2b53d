"""The linear layer, every way that it takes, against plain PyTorch: half-precision weights, and few rows in float32."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from exact import assert_as_exact

cpu = pytest.importorskip("kernelwise.kernels.cpu.linear", exc_type=ImportError)

HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
WAYS = {"ours": cpu._Choice(most=1 << 62, training=0), "torch": cpu._Choice(most=-1, training=0)}


@pytest.fixture
def way(request, monkeypatch):
    monkeypatch.setattr(cpu, "_chosen", dict.fromkeys((torch.bfloat16, torch.float16), WAYS[request.param]))
    return request.param


EVERY_WAY = pytest.mark.parametrize("way", WAYS, indirect=True)


def given(dtype, *, rows=(3,), width=40, out=24, bias=True):
    torch.manual_seed(0)
    inputs = {"x": torch.randn(*rows, width, dtype=dtype), "weight": torch.randn(out, width, dtype=dtype) / 8}
    return inputs | ({"bias": torch.randn(out, dtype=dtype)} if bias else {})


def check(inputs, *, scales=(1.0,)):
    assert_as_exact(torch.nn.functional.linear, cpu.linear, inputs, scales=scales)


@HALVES
@EVERY_WAY
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [3, 6])
def test_exact_at_every_scale(dtype, way, bias, rows):
    check(given(dtype, rows=(rows,), bias=bias), scales=(1e-2, 1.0, 1e2))


@HALVES
@EVERY_WAY
@pytest.mark.parametrize(
    "shape",
    [
        {"width": 1},
        {"width": 7, "out": 1},
        {"width": 33, "out": 100},
        {"width": 577, "out": 7},
        {"width": 2304, "out": 5},
        {"width": 5120, "out": 3},
        {"rows": ()},
        *({"rows": (rows,), "width": 70, "out": 51} for rows in (1, 2, 3, 4, 5, 7, 8, 9, 13, 64)),
        *({"rows": (6,), "width": width, "out": out} for width, out in ((1, 1), (15, 48), (577, 49), (1300, 100))),
        {"rows": (2, 3, 4)},
        {"rows": (130,), "width": 700, "out": 51},
        {"rows": (2, 100), "width": 290, "out": 49},
        {"rows": (0,)},
        *({"rows": (rows,), "width": 0} for rows in (1, 3, 9, 200)),
        *({"rows": (rows,), "out": 0} for rows in (1, 9)),
    ],
    ids=str,
)
def test_exact_for_every_shape(dtype, way, shape):
    check(given(dtype, **shape))


@HALVES
@pytest.mark.parametrize("way", ["ours"], indirect=True)
def test_exact_over_several_blocks_of_weights_and_of_rows(dtype, way):
    """More than 192 numbers of a row, 2^20 of the weight, 1024 rows: sums go on from block to block."""
    check(given(dtype, rows=(1100,), width=72, out=40))
    check(given(dtype, rows=(9,), width=4096, out=600))


@HALVES
@EVERY_WAY
def test_exact_for_every_layout(dtype, way):
    inputs = given(dtype, rows=(4, 6))
    check(inputs | {"x": torch.randn(6, 4, 40, dtype=dtype).transpose(0, 1)})
    check(inputs | {"x": torch.randn(4, 6, 80, dtype=dtype)[:, :, 20:60]})
    check(inputs | {"weight": torch.randn(40, 24, dtype=dtype).t(), "bias": torch.randn(48, dtype=dtype)[::2]})


@HALVES
@EVERY_WAY
@pytest.mark.parametrize("rows", [4, 6])
def test_nan_and_infinity_pass_through(dtype, way, rows):
    inputs = given(dtype, rows=(rows,))
    inputs["x"][1, 2], inputs["weight"][3, 5] = float("nan"), float("inf")
    assert_as_exact(torch.nn.functional.linear, cpu.linear, inputs, scales=(1.0,), grad=False)


@EVERY_WAY
@pytest.mark.parametrize("needed", ["x", "weight", "bias"])
def test_only_gradients_that_are_needed(way, needed):
    inputs = given(torch.bfloat16)
    inputs[needed].requires_grad_()
    cpu.linear(**inputs).sum().backward()
    assert [name for name, t in inputs.items() if t.grad is not None] == [needed]


@EVERY_WAY
def test_a_frozen_weight_keeps_no_input_for_the_backward_pass(way):
    inputs = given(torch.bfloat16)
    inputs["x"].requires_grad_()
    y = cpu.linear(**inputs)
    assert y.grad_fn.saved_tensors[0] is None


@pytest.mark.parametrize(("rows", "ours"), [(7, False), (8, True)])
def test_few_rows_with_gradients_are_torchs(monkeypatch, rows, ours):
    monkeypatch.setitem(cpu._chosen, torch.bfloat16, cpu._Choice(most=64, training=8))
    inputs = given(torch.bfloat16, rows=(rows,))
    inputs["weight"].requires_grad_()
    assert (type(cpu.linear(**inputs).grad_fn).__name__ == "_LinearBackward") == ours


def test_other_dtypes_are_torchs():
    x, weight = torch.randn(3, 8).double(), torch.randn(5, 8).double()
    assert torch.equal(cpu.linear(x, weight), torch.nn.functional.linear(x, weight))
    weight.requires_grad_()
    assert type(cpu.linear(x, weight).grad_fn).__name__ != "_LinearBackward"
    with pytest.raises(RuntimeError):
        cpu.linear(x, weight.bfloat16())


LEAST = {name: getattr(cpu, name) for name in ("_VECTORS", "_SMALL")}


@pytest.fixture
def wide(monkeypatch):
    """Products of up to 8 rows in float32 of any size, whatever this processor is chosen for; and what goes to torch."""
    if cpu.isa() == "baseline":
        pytest.skip("there are no products in float32 without AVX2")
    monkeypatch.setitem(cpu._chosen, torch.float32, cpu._Choice(most=8, training=1 << 62))
    for name in LEAST:
        monkeypatch.setattr(cpu, name, int(name == "_VECTORS"))
    theirs = []
    monkeypatch.setattr(cpu, "_own", lambda *args: theirs.append(args) or torch.nn.functional.linear(*args))
    return theirs


@pytest.mark.parametrize("rows", range(10))
@pytest.mark.parametrize(
    "shape",
    [(1, 1), (7, 1), (8, 3), (15, 9), (16, 8), (31, 33), (40, 24), (577, 50), (16401, 5), (0, 5), (5, 0)],
    ids=str,
)
def test_float32_of_few_rows(wide, rows, shape):
    width, out = shape
    for bias in (True, False):
        inputs = given(torch.float32, rows=(rows,), width=width, out=out, bias=bias)
        assert_as_exact(torch.nn.functional.linear, cpu.linear, inputs, scales=(1e-2, 1.0, 1e2), grad=False)
    assert bool(wide) == (rows > 8 and width > 0)


def test_float32_for_every_layout(wide):
    inputs = given(torch.float32, rows=(2, 3))
    for changed in (
        {"x": torch.randn(3, 2, 40).transpose(0, 1)},
        {"x": torch.randn(2, 3, 80)[:, :, 20:60]},
        {"x": torch.randn(5, 80)[::2, ::2]},
        {"x": torch.randn(40)},
        {"x": torch.randn(1, 40).expand(4, 40)},
        {"weight": torch.randn(40, 24).t(), "bias": torch.randn(48)[::2]},
        {"weight": torch.randn(24, 80)[:, 40:]},
    ):
        assert_as_exact(torch.nn.functional.linear, cpu.linear, inputs | changed, scales=(1.0,), grad=False)
    assert not wide


@pytest.mark.parametrize("rows", [1, 3, 4, 7])
def test_nan_and_infinity_pass_through_float32(wide, rows):
    inputs = given(torch.float32, rows=(rows,), width=45)
    inputs["x"][0, 44], inputs["weight"][3, 5], inputs["weight"][4, 41] = float("nan"), float("inf"), float("-inf")
    assert_as_exact(torch.nn.functional.linear, cpu.linear, inputs, scales=(1.0,), grad=False)
    assert not wide


@pytest.mark.parametrize("rows", [1, 2, 4, 5, 8])
def test_float32_is_the_same_with_every_number_of_threads(wide, rows):
    inputs = given(torch.float32, rows=(rows,), width=577, out=1003)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 16):
            torch.set_num_threads(threads)
            results.append(cpu.linear(**inputs))
    finally:
        torch.set_num_threads(before)
    assert not wide
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("rows", [1, 4, 8])
def test_a_row_in_float32_does_not_see_the_others(wide, rows):
    inputs = given(torch.float32, rows=(rows,), width=50, out=30)
    whole = cpu.linear(**inputs)
    inputs["x"][rows // 2 :] = float("nan")
    assert torch.equal(cpu.linear(**inputs)[: rows // 2], whole[: rows // 2])
    assert not wide


@pytest.mark.parametrize(
    ("most", "rows", "width", "out", "is_ours"),
    [
        (8, 1, 576, 1536, True),
        (8, 1, 128, 128, True),
        (8, 1, 64, 64, False),
        (8, 2, 128, 128, True),
        (8, 2, 64, 64, False),
        (8, 2, 100, 1000, False),
        (1, 1, 576, 1536, True),
        (1, 1, 112, 112, False),
        (1, 2, 576, 1536, False),
    ],
)
def test_small_float32_weights_and_odd_widths_are_torchs(most, rows, width, out, is_ours, wide, monkeypatch):
    monkeypatch.setitem(cpu._chosen, torch.float32, cpu._Choice(most=most, training=1 << 62))
    for name, value in LEAST.items():
        monkeypatch.setattr(cpu, name, value)
    cpu.linear(**given(torch.float32, rows=(rows,), width=width, out=out))
    assert bool(wide) != is_ours


def test_float32_with_gradients_and_under_autocast_is_torchs(wide):
    inputs = given(torch.float32, rows=(1,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert cpu.linear(**inputs).dtype == torch.bfloat16
    assert len(wide) == 1
    inputs["weight"].requires_grad_()
    assert type(cpu.linear(**inputs).grad_fn).__name__ == "AddmmBackward0"
    assert len(wide) == 2
    with torch.no_grad():
        cpu.linear(**inputs)
    assert len(wide) == 2


@pytest.mark.parametrize("rows", [1, 9])
def test_float32_traces_in_one_graph(wide, rows):
    inputs = given(torch.float32, rows=(rows,))
    compiled = torch.compile(cpu.linear, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(**inputs), cpu.linear(**inputs))


def test_under_autocast_torch_casts_first():
    x, weight = torch.randn(3, 8), torch.randn(5, 8, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(cpu.linear(x, weight), torch.nn.functional.linear(x, weight))


def test_the_operators_refuse_what_does_not_fit():
    operators = torch.ops.kernelwise
    x, weight = torch.randn(3, 8).bfloat16(), torch.randn(5, 8).bfloat16()
    for call, complaint in (
        (lambda: operators.linear(torch.randn(9, 8), weight.float(), None), "at most 8 rows"),
        (lambda: operators.linear_grad_x(torch.randn(3, 5), weight.float()), "weight must be bfloat16 or float16"),
        (lambda: operators.linear_grad_weight(torch.randn(3, 5), x.float()), "grad must be bfloat16 or float16"),
        (lambda: operators.linear(x[:, :7], weight, None), "does not fit"),
        (lambda: operators.linear(x, weight, torch.randn(4).bfloat16()), "bias must be"),
        (lambda: operators.linear(x, weight.half(), None), "one dtype"),
        (lambda: operators.linear_grad_x(x, weight), "does not fit"),
        (lambda: operators.linear_grad_weight(x, weight), "does not fit"),
    ):
        with pytest.raises(RuntimeError, match=complaint):
            call()


@HALVES
@EVERY_WAY
def test_a_row_is_the_same_among_others(dtype, way):
    """Whatever the number of rows: not one of them sees the others, nor memory beyond its own."""
    inputs = given(dtype, rows=(9,), width=50, out=30)
    whole = cpu.linear(**inputs)
    inputs["x"][5:] = float("nan")
    assert torch.equal(cpu.linear(**inputs)[:5], whole[:5])


@pytest.mark.parametrize(("rows", "ours"), [(32, True), (33, False)])
def test_more_rows_than_it_is_chosen_for_are_torchs(monkeypatch, rows, ours):
    monkeypatch.setitem(cpu._chosen, torch.bfloat16, cpu._Choice(most=32, training=0))
    called = []
    monkeypatch.setattr(cpu, "_own", lambda *args: called.append(args) or torch.nn.functional.linear(*args))
    cpu.linear(**given(torch.bfloat16, rows=(rows,)))
    assert bool(called) != ours


@pytest.mark.parametrize(
    ("names", "isa", "unit"),
    [
        ("", "avx512", "none"),
        ("avx512_bf16", "avx512", "vector"),
        ("avx512_bf16", "avx2", "none"),
        ("avx512_bf16 avx512_bf16_at_double_rate", "avx512", "fast vector"),
        ("avx512_bf16 avx512_bf16_at_double_rate", "avx2", "fast vector"),
        ("avx512_bf16 avx512_fp16 amx_bf16", "avx512", "matrix"),
        ("avx512_bf16 avx512_fp16 amx_bf16", "avx2", "matrix"),
    ],
)
def test_what_a_processor_multiplies_bfloat16_with(monkeypatch, names, isa, unit):
    monkeypatch.setattr(cpu, "_ops", SimpleNamespace(cpu_half_products=SimpleNamespace(default=lambda: names)))
    monkeypatch.setattr(cpu, "isa", lambda: isa)
    assert cpu.units(torch.bfloat16) == unit
    assert cpu.units(torch.float32) == "none"


@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_where_bfloat16_is_multiplied_at_double_rate_torch_does_it_for_all_but_a_few_rows(monkeypatch, isa):
    monkeypatch.setitem(cpu._chosen, torch.bfloat16, cpu._CHOICES[isa, torch.bfloat16, "fast vector"])
    assert not cpu.gains_in_training(torch.bfloat16)
    called = []
    monkeypatch.setattr(cpu, "_own", lambda *args: called.append(args) or torch.nn.functional.linear(*args))
    for rows, grad, torchs in (
        (1, False, False),
        (3, False, False),
        (4, False, True),
        (512, False, True),
        (1, True, True),
    ):
        called.clear()
        inputs = given(torch.bfloat16, rows=(rows,))
        cpu.linear(inputs["x"].requires_grad_(grad), inputs["weight"], inputs["bias"])
        assert bool(called) == torchs, rows


@pytest.mark.parametrize(
    ("limit", "left"),
    [
        ("AVX2", ""),
        ("avx512_core_vnni", ""),
        ("AVX512_CORE_BF16", "avx512_bf16"),
        ("AVX512_CORE_FP16", "avx512_bf16 avx512_fp16"),
        ("AVX512_CORE_AMX", "avx512_bf16 avx512_fp16 amx_bf16"),
        ("ALL", "avx512_bf16 avx512_fp16 amx_bf16 amx_fp16"),
    ],
)
def test_what_onednn_may_not_use_does_not_count(limit, left):
    assert names_limited_to(limit) == [name for name in names_limited_to(None) if name in left.split()]


@functools.cache
def names_limited_to(limit):
    """What a process has for products in half precision, where oneDNN may use no more than a limit allows."""
    code = "import torch; from kernelwise.kernels.cpu import linear; print(torch.ops.kernelwise.cpu_half_products())"
    limits = {} if limit is None else {"ONEDNN_MAX_CPU_ISA": limit}
    found = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | limits, capture_output=True, text=True, check=True
    )
    return [name for name in found.stdout.split() if name != "avx512_bf16_at_double_rate"]


def test_a_reason_where_it_is_not_worthwhile(monkeypatch):
    assert "float64" in cpu.why_not_worthwhile(torch.float64)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert (cpu.why_not_worthwhile(dtype) is None) == (cpu._chosen[dtype] is not None)
    monkeypatch.setattr(cpu, "_chosen", {torch.float32: None, torch.bfloat16: None, torch.float16: None})
    monkeypatch.setattr(cpu, "units", lambda dtype: "matrix")
    assert "multiplies bfloat16 matrices natively (amx_bf16)" in cpu.why_not_worthwhile(torch.bfloat16)
    monkeypatch.setattr(cpu, "units", lambda dtype: "none")
    assert "not measured" in cpu.why_not_worthwhile(torch.float16)
    assert "not measured" in cpu.why_not_worthwhile(torch.float32)
    inputs = given(torch.bfloat16)
    assert torch.equal(cpu.linear(**inputs), torch.nn.functional.linear(**inputs))
