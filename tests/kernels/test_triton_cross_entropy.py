"""Cross-entropy, alone and fused with the head, against PyTorch's own, on the GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from exact import assert_as_exact
from torch.nn import functional as F

pytestmark = pytest.mark.gpu

OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"label_smoothing": 0.1, "reduction": "sum"},
    {"softcap": 30.0, "z_loss": 1e-3, "num_items": 700},
    {"reduction": "none", "ignore_index": 2, "label_smoothing": 0.2, "softcap": 5.0, "z_loss": 0.01},
)


@pytest.fixture
def cross_entropy() -> Callable[..., torch.Tensor]:
    from kernelwise.kernels.triton.cross_entropy import cross_entropy

    return cross_entropy


@pytest.fixture
def linear_cross_entropy() -> Callable[..., torch.Tensor]:
    from kernelwise.kernels.triton.linear_cross_entropy import linear_cross_entropy

    return linear_cross_entropy


def own(
    logits: torch.Tensor, labels: torch.Tensor, *, softcap: float | None = None, z_loss: float = 0.0, **options: Any
) -> torch.Tensor:
    num_items = options.pop("num_items", None)
    x = logits.float()
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    losses = F.cross_entropy(x, labels, **{**options, "reduction": "none"})
    counted = labels != options.get("ignore_index", -100)
    if z_loss:
        losses = losses + z_loss * x.logsumexp(-1).square() * counted
    if options.get("reduction") == "none":
        return losses
    if num_items is None:
        num_items = 1 if options.get("reduction") == "sum" else counted.sum()
    return losses.sum() / num_items


def own_linear(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, bias: torch.Tensor | None = None, **options: Any
) -> torch.Tensor:
    return own(F.linear(hidden, weight, bias), labels, **options)


def normal(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(sum(shape))
    return torch.randn(shape, device="cuda", generator=generator).to(dtype)


def some_labels(rows: int, vocabulary: int, options: dict[str, Any]) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(rows)
    labels = torch.randint(0, vocabulary, (rows,), device="cuda", generator=generator)
    if rows > 1:
        labels[:: max(2, rows // 3)] = options.get("ignore_index", -100)
    return labels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 40), (60, 7), (33, 577), (300, 50257), (40, 128256), (700, 2048)])
def test_every_form(cross_entropy: Any, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    logits = normal(*shape, dtype=dtype)
    for options in OPTIONS if shape[1] < 100_000 else OPTIONS[:1]:
        labels = some_labels(*shape, options)
        assert_as_exact(
            lambda logits, labels=labels, options=options: own(logits, labels, **options),
            lambda logits, labels=labels, options=options: cross_entropy(logits, labels, **options),
            {"logits": logits},
            scales=(1e-2, 1.0, 10.0),
        )


@pytest.mark.parametrize("bend", [4.0, 8.0, 12.0])
def test_the_slope_of_a_capped_logit_is_exact_where_the_cap_is_near(cross_entropy: Any, bend: float) -> None:
    logits = torch.full((5, 64), -bend * 20.0, device="cuda", requires_grad=True)
    labels = torch.arange(5, device="cuda")
    cross_entropy(logits, labels, softcap=20.0).backward()
    slope = 1 / torch.cosh(torch.tensor(bend, dtype=torch.float64)) ** 2  # 1 - tanh squared is 0 in float32 beyond 9
    own = torch.full((5, 64), slope / 64 / 5, dtype=torch.float64)
    own[torch.arange(5), torch.arange(5)] -= slope / 5
    torch.testing.assert_close(logits.grad.cpu().double(), own, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(33, 577), (300, 50257), (40, 128256)])
@pytest.mark.parametrize("factor", [1.0, 2.5])
def test_consumed(cross_entropy: Any, dtype: torch.dtype, shape: tuple[int, int], factor: float) -> None:
    given = 3 * normal(*shape, dtype=dtype)
    for options in OPTIONS[:3]:
        labels = some_labels(*shape, options)
        results = {}
        for consume in (False, True):
            leaf = given.clone().requires_grad_()
            logits = leaf * 1
            loss = cross_entropy(logits, labels, consume_logits=consume, **options)
            (factor * loss).backward()
            results[consume] = loss.detach(), leaf.grad
            assert torch.equal(logits.detach(), given) != consume
        torch.testing.assert_close(results[True][0], results[False][0])
        largest = float(results[False][1].abs().max())
        rounding = 2**-7 if dtype is torch.bfloat16 else 1e-5
        torch.testing.assert_close(results[True][1], results[False][1], rtol=rounding, atol=1e-6 * largest)


def test_consumed_logits_cannot_be_used_again(cross_entropy: Any) -> None:
    leaf = normal(4, 64, dtype=torch.bfloat16).requires_grad_()
    logits = leaf.exp()  # whose backward pass reads its result
    loss = cross_entropy(logits, torch.arange(4, device="cuda"), consume_logits=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    logits = leaf * 1
    loss = cross_entropy(logits, torch.arange(4, device="cuda"), consume_logits=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="consumed"):
        loss.backward()


def test_a_number_of_items_on_the_device(cross_entropy: Any) -> None:
    logits, labels = normal(40, 1000, dtype=torch.bfloat16), some_labels(40, 1000, {})
    expected = cross_entropy(logits, labels, num_items=11)
    assert torch.equal(cross_entropy(logits, labels, num_items=torch.tensor(11, device="cuda")), expected)
    assert torch.equal(cross_entropy(logits, labels, num_items=torch.tensor(11)), expected)


def test_strides(cross_entropy: Any) -> None:
    wide = normal(30, 3 * 512, dtype=torch.bfloat16)
    for logits in (wide[:, 16:528], wide[:, 5:517], wide[:, 1:778], wide[::2], wide.T[:512], wide[:, ::2]):
        labels = some_labels(*logits.shape, {})
        assert_as_exact(
            lambda x, y=labels: own(x, y), lambda x, y=labels: cross_entropy(x, y), (logits,), scales=(1.0,)
        )
    labels = some_labels(60, 700, {})
    logits = normal(30, 700, dtype=torch.bfloat16)
    assert torch.equal(cross_entropy(logits, labels[::2]), cross_entropy(logits, labels[::2].clone()))


def test_odd_numbers(cross_entropy: Any) -> None:
    logits = normal(4, 777, dtype=torch.float32)
    labels = torch.tensor([1, 776, 5, -100], device="cuda")
    assert cross_entropy(logits, torch.full_like(labels, -100)).isnan()
    assert cross_entropy(logits, torch.full_like(labels, -100), reduction="sum") == 0
    assert cross_entropy(logits[:0], labels[:0]).isnan()
    for bad in (777, -1, 2**32 + 1):  # as on the CPU no number comes of it; but without waiting to say so
        leaf = logits.clone().requires_grad_()
        loss = cross_entropy(leaf, torch.tensor([1, bad, 5, -100], device="cuda"))
        assert loss.isnan()
        assert torch.autograd.grad(loss, leaf)[0][1].isnan().all()
    lowest = torch.finfo(torch.float32).min
    logits[0] = float("-inf")
    logits[0, 1] = 3.0
    logits[1] = lowest
    logits[2, :700] = lowest
    kernel = lambda x: cross_entropy(x, labels, reduction="none")  # noqa: E731
    assert_as_exact(lambda x: own(x, labels, reduction="none"), kernel, (logits,), scales=(1.0,))
    logits[1, 4] = float("inf")
    logits[2, 3] = float("nan")
    assert_as_exact(lambda x: own(x, labels, reduction="none"), kernel, (logits,), scales=(1.0,))
    logits[3] = float("nan")  # a row that is not counted is not read
    leaf = logits.clone().requires_grad_()
    assert not torch.autograd.grad(kernel(leaf).sum(), leaf)[0][3].any()


def test_more_elements_than_32_bits_count(cross_entropy: Any) -> None:
    logits = torch.empty(17_000, 128_256, device="cuda", dtype=torch.bfloat16).normal_()
    labels = some_labels(17_000, 128_256, {})
    whole = cross_entropy(logits, labels, reduction="none")
    assert torch.equal(whole[-3:], cross_entropy(logits[-3:].clone(), labels[-3:], reduction="none"))
    last = logits[-3:].clone().requires_grad_()
    logits.requires_grad_()
    gradient = torch.autograd.grad(cross_entropy(logits, labels, reduction="sum"), logits)[0]
    assert torch.equal(gradient[-3:], torch.autograd.grad(cross_entropy(last, labels[-3:], reduction="sum"), last)[0])


def test_what_is_refused(cross_entropy: Any, linear_cross_entropy: Any) -> None:
    logits, labels = normal(4, 8, dtype=torch.float32), torch.arange(4, device="cuda")
    for match, changed in (
        ("float64", {"logits": logits.double()}),
        ("rows, vocabulary", {"logits": logits[None]}),
        ("int64", {"labels": labels.int()}),
        ("labels on", {"labels": labels.cpu()}),
        ("one for each row", {"labels": labels[:3]}),
        ("reduction", {"reduction": "average"}),
        ("num_items", {"reduction": "none", "num_items": 3}),
        ("label_smoothing", {"label_smoothing": 1.5}),
        ("softcap", {"softcap": -1.0}),
        ("z_loss", {"z_loss": -1.0}),
    ):
        with pytest.raises(ValueError, match=match):
            cross_entropy(**{"logits": logits, "labels": labels} | changed)
    hidden, weight = normal(4, 16, dtype=torch.float32), normal(8, 16, dtype=torch.float32)
    for match, changed in (
        ("have shapes", {"weight": weight[:, :4]}),
        ("weight torch.float16", {"weight": weight.half()}),
        ("bias has shape", {"bias": weight[0]}),
        ("chunk_bytes", {"chunk_bytes": 0}),
    ):
        with pytest.raises(ValueError, match=match):
            linear_cross_entropy(**{"hidden": hidden, "weight": weight, "labels": labels} | changed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunks", [1, 3, 8])
def test_linear(linear_cross_entropy: Any, dtype: torch.dtype, chunks: int) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    rows, width, vocabulary = 1024, 256, 5003
    hidden, weight = normal(rows, width, dtype=dtype), normal(vocabulary, width, dtype=dtype) / 16
    bias = normal(vocabulary, dtype=dtype)
    chunk_bytes = rows // chunks * 5056 * hidden.element_size()
    for options in OPTIONS:
        labels = some_labels(rows, vocabulary, options)
        assert_as_exact(
            lambda hidden, weight, bias, y=labels, options=options: own_linear(hidden, weight, y, bias, **options),
            lambda hidden, weight, bias, y=labels, options=options: linear_cross_entropy(
                hidden, weight, y, bias=bias, chunk_bytes=chunk_bytes, **options
            ),
            {"hidden": hidden, "weight": weight, "bias": bias},
            scales=(1.0,),
        )


def test_linear_with_a_gradient_from_above_and_twice(linear_cross_entropy: Any) -> None:
    hidden, weight = normal(300, 64, dtype=torch.bfloat16), normal(1000, 64, dtype=torch.bfloat16) / 8
    labels = some_labels(300, 1000, {})
    assert_as_exact(
        lambda hidden, weight: 7 * own_linear(hidden, weight, labels).square(),
        lambda hidden, weight: 7 * linear_cross_entropy(hidden, weight, labels, chunk_bytes=1 << 18).square(),
        (hidden, weight),
        scales=(1.0,),
    )
    hidden.requires_grad_()
    weight.requires_grad_()
    loss = 7 * linear_cross_entropy(hidden, weight, labels)
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    for one, two in zip(first, torch.autograd.grad(loss, (hidden, weight)), strict=True):
        torch.testing.assert_close(one, two, rtol=2**-6, atol=2**-8 * float(one.abs().max()))


def test_linear_with_a_frozen_head_or_frozen_layers(linear_cross_entropy: Any) -> None:
    hidden, weight = normal(300, 64, dtype=torch.bfloat16), normal(1000, 64, dtype=torch.bfloat16) / 8
    labels = some_labels(300, 1000, {})
    for of in (0, 1):
        leaves = [t.detach().requires_grad_(i == of) for i, t in enumerate((hidden, weight))]
        both = [t.detach().requires_grad_() for t in (hidden, weight)]
        expected = torch.autograd.grad(linear_cross_entropy(*both, labels), both)[of]
        assert torch.equal(torch.autograd.grad(linear_cross_entropy(*leaves, labels), leaves[of])[0], expected)


def test_linear_needs_little_memory_and_no_answer_from_the_device(linear_cross_entropy: Any) -> None:
    rows, width, vocabulary = 4096, 512, 64_000
    hidden = normal(rows, width, dtype=torch.bfloat16).requires_grad_()
    weight = (normal(vocabulary, width, dtype=torch.bfloat16) / 20).requires_grad_()
    labels = some_labels(rows, vocabulary, {})
    linear_cross_entropy(hidden, weight, labels).backward()
    hidden.grad = weight.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_cross_entropy(hidden, weight, labels, chunk_bytes=64 << 20).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    used = torch.cuda.max_memory_allocated() - before
    assert used < (64 << 20) + hidden.nbytes + weight.nbytes + (8 << 20)  # the logits alone are 500 MiB


def test_linear_under_autocast(linear_cross_entropy: Any) -> None:
    hidden, weight = normal(30, 64, dtype=torch.float32), normal(100, 64, dtype=torch.float32)
    labels = some_labels(30, 100, {})
    leaves = [t.clone().requires_grad_() for t in (hidden, weight)]
    others = [t.clone().requires_grad_() for t in (hidden, weight)]
    with torch.autocast("cuda", torch.bfloat16):
        loss, wanted = linear_cross_entropy(*leaves, labels), own_linear(*others, labels)
    torch.testing.assert_close(loss, wanted, rtol=1e-2, atol=1e-2)
    for new, old in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(wanted, others), strict=True):
        assert new.dtype == old.dtype == torch.float32
        torch.testing.assert_close(new, old, rtol=5e-2, atol=5e-3)


def test_second_derivatives(cross_entropy: Any, linear_cross_entropy: Any) -> None:
    labels = torch.tensor([1, -100, 3], device="cuda")

    def penalty(function: Callable[..., torch.Tensor], shapes: tuple[tuple[int, int], ...]) -> Any:
        leaves = [normal(*shape, dtype=torch.float32).requires_grad_() for shape in shapes]
        first = torch.autograd.grad(function(*leaves, labels), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    for function, reference, shapes in (
        (cross_entropy, own, ((3, 9),)),
        (linear_cross_entropy, own_linear, ((3, 8), (9, 8))),
    ):
        for new, old in zip(penalty(function, shapes), penalty(reference, shapes), strict=True):
            torch.testing.assert_close(new, old, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles(cross_entropy: Any, linear_cross_entropy: Any, dynamic: bool) -> None:
    def layer(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, loss: Any, linear: Any) -> Any:
        plain = (
            loss(2 * (hidden @ weight.T), labels, label_smoothing=0.1)
            + loss(hidden @ weight.T, labels, reduction="none").square().mean()
        )
        return plain, linear(hidden * 2, weight, labels, softcap=20.0), linear(hidden, weight, labels, reduction="none")

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic)
    for rows in (64, 300):
        hidden, weight = normal(rows, 64, dtype=torch.bfloat16), normal(1003, 64, dtype=torch.bfloat16) / 8
        labels = some_labels(rows, 1003, {})
        assert_as_exact(
            lambda hidden, weight, labels=labels: layer(hidden, weight, labels, own, own_linear),
            lambda hidden, weight, labels=labels: compiled(hidden, weight, labels, cross_entropy, linear_cross_entropy),
            {"hidden": hidden, "weight": weight},
            scales=(1.0,),
        )


def test_are_sound_operations() -> None:
    from kernelwise.kernels.triton import cross_entropy, linear_cross_entropy

    logits, labels = normal(5, 70, dtype=torch.float32).requires_grad_(), some_labels(5, 70, {})
    for reduction in ("mean", "none"):
        arguments = (logits, labels, None, -100, 0.0, 0.0, 0.0, reduction)
        torch.library.opcheck(cross_entropy._operation, arguments)
    hidden, weight = normal(5, 16, dtype=torch.float32), normal(70, 16, dtype=torch.float32)
    leaves = (hidden.requires_grad_(), weight.requires_grad_(), None)
    for reduction, wanted in (("mean", [True, True, False]), ("none", [False, False, False])):
        arguments = (*leaves, labels, None, -100, 0.0, 0.0, 0.0, reduction, 0, wanted)
        torch.library.opcheck(linear_cross_entropy._operation, arguments)


def test_captures_in_a_graph(cross_entropy: Any, linear_cross_entropy: Any) -> None:
    hidden = normal(64, 128, dtype=torch.bfloat16).requires_grad_()
    weight = (normal(1000, 128, dtype=torch.bfloat16) / 11).requires_grad_()
    labels = some_labels(64, 1000, {})

    def step() -> tuple[torch.Tensor, ...]:
        logits = hidden @ weight.T
        loss = 3 * linear_cross_entropy(hidden, weight, labels) + cross_entropy(logits, labels, consume_logits=True)
        return loss, *torch.autograd.grad(loss, (hidden, weight))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = step()
    with torch.no_grad():
        hidden.normal_()
    graph.replay()
    for old, new in zip(captured, step(), strict=True):
        torch.testing.assert_close(old, new)
