"""Cross-entropy in C++, of logits and of a linear layer, against PyTorch's own."""

from __future__ import annotations

import math

import pytest
import torch
from exact import assert_as_exact
from torch.nn import functional as F

whole = pytest.importorskip("kernelwise.kernels.cpu.cross_entropy", exc_type=ImportError)
chunked = pytest.importorskip("kernelwise.kernels.cpu.linear_cross_entropy", exc_type=ImportError)
cross_entropy, linear_cross_entropy = whole.cross_entropy, chunked.linear_cross_entropy

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
OPTIONS = pytest.mark.parametrize(
    "options",
    [
        {},
        {"label_smoothing": 0.1},
        {"softcap": 30.0},
        {"softcap": 1.5, "label_smoothing": 0.3},
        {"z_loss": 1e-3},
        {"z_loss": 0.1, "softcap": 5.0, "label_smoothing": 0.05},
        {"reduction": "sum"},
        {"reduction": "none", "z_loss": 0.1},
        {"num_items": 7},
        {"num_items": torch.tensor(3), "reduction": "sum"},
        {"ignore_index": 2},
    ],
    ids=str,
)
WAYS = pytest.mark.parametrize("way", ["logits", "hidden"])


@pytest.fixture(autouse=True)
def _kernel_for_few_numbers_too(request, monkeypatch):
    if "plain" not in request.node.name:
        monkeypatch.setattr(whole, "_PLAIN_BELOW", 0)
        monkeypatch.setattr(chunked, "_FEW_ROWS", 0)


def test_few_rows_with_gradients_are_plain(monkeypatch):
    logits, labels = torch.randn(3, 50, requires_grad=True), torch.tensor([1, -100, 49])
    assert type(cross_entropy(logits, labels, reduction="none").grad_fn).__name__ == "NllLossBackward0"
    hidden, weight = torch.randn(3, 8, requires_grad=True), torch.randn(50, 8)
    monkeypatch.setattr(chunked, "_op", None)
    assert torch.allclose(linear_cross_entropy(hidden, weight, labels), own(hidden @ weight.t(), labels))
    monkeypatch.setattr(whole, "_PLAIN_BELOW", 150)
    assert "_CrossEntropy" in type(cross_entropy(logits, labels, reduction="none").grad_fn).__name__


def own(logits, labels, *, softcap=None, z_loss=0.0, num_items=None, reduction="mean", ignore_index=-100, **options):
    wide = logits.float()
    if softcap is not None:
        wide = softcap * torch.tanh(wide / softcap)
    losses = F.cross_entropy(wide, labels, reduction="none", ignore_index=ignore_index, **options)
    counts = labels != ignore_index
    if z_loss:
        losses = losses + z_loss * torch.logsumexp(wide, -1).square() * counts
    if reduction == "none":
        return losses
    return losses.sum() / (num_items or counts.sum()) if num_items or reduction == "mean" else losses.sum()


def labels_for(rows, classes, *, ignored=-100):
    labels = torch.randint(0, classes, (rows,), generator=torch.Generator().manual_seed(rows))
    labels[1::4] = ignored
    return labels


def check_logits(logits, labels, *, scales=(1.0,), **options):
    for more in ({}, {"consume_logits": True}):
        assert_as_exact(
            lambda x: own(x * 1, labels, **options),
            lambda x, more=more: cross_entropy(x * 1, labels, **options, **more),
            (logits,),
            scales=scales,
        )


def check_hidden(hidden, weight, labels, bias=None, *, scales=(1.0,), chunk_bytes=None, **options):
    inputs = {"hidden": hidden, "weight": weight} | ({} if bias is None else {"bias": bias})
    assert_as_exact(
        lambda hidden, weight, bias=None: own(F.linear(hidden, weight, bias), labels, **options),
        lambda hidden, weight, bias=None: linear_cross_entropy(
            hidden, weight, labels, bias=bias, chunk_bytes=chunk_bytes, **options
        ),
        inputs,
        scales=scales,
    )


@DTYPES
@OPTIONS
@WAYS
def test_exact_for_every_option(dtype, options, way):
    torch.manual_seed(0)
    labels = labels_for(11, 77, ignored=options.get("ignore_index", -100))
    if way == "logits":
        check_logits(torch.randn(11, 77, dtype=dtype), labels, scales=(1e-2, 1.0, 30.0), **options)
    else:
        hidden, weight = torch.randn(11, 24, dtype=dtype), torch.randn(77, 24, dtype=dtype) / 4
        check_hidden(hidden, weight, labels, torch.randn(77, dtype=dtype), scales=(1e-2, 1.0, 10.0), **options)


@DTYPES
@pytest.mark.parametrize("shape", [(1, 1), (1, 577), (3, 2), (40, 2304), (5, 49152), (0, 8)], ids=str)
def test_exact_for_every_shape(dtype, shape):
    torch.manual_seed(0)
    labels = labels_for(*shape)
    check_logits(torch.randn(shape, dtype=dtype), labels, reduction="sum")
    check_logits(torch.randn(shape, dtype=dtype) * 5, labels, reduction="none")


@DTYPES
@pytest.mark.parametrize("rows_at_once", [1, 3, 8, 1000])
@pytest.mark.parametrize("with_bias", [False, True])
def test_exact_in_chunks_of_any_size(dtype, rows_at_once, with_bias):
    torch.manual_seed(0)
    hidden, weight = torch.randn(29, 20, dtype=dtype), torch.randn(130, 20, dtype=dtype)
    bias = torch.randn(130, dtype=dtype) if with_bias else None
    check_hidden(hidden, weight, labels_for(29, 130), bias, chunk_bytes=rows_at_once * 130 * 4)


@DTYPES
@pytest.mark.parametrize("rows", [64, 1000])
def test_exact_where_many_rows_share_a_label(dtype, rows):
    """The gradient of the bias is a long sum of numbers of one sign there."""
    torch.manual_seed(0)
    labels = torch.full((rows,), 7)
    labels[::5] = 3
    hidden, weight, bias = (torch.randn(*shape, dtype=dtype) for shape in ((rows, 24), (50, 24), (50,)))
    check_hidden(hidden, weight / 4, labels, bias, scales=(0.1, 1.0), chunk_bytes=128 * 50 * 4)


@DTYPES
def test_exact_where_the_weight_takes_more_than_one_block(dtype):
    """Half-precision weights are made float32 in blocks of 2^20 numbers."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(9, 600, dtype=dtype) / 10, torch.randn(4000, 600, dtype=dtype) / 10
    check_hidden(hidden, weight, labels_for(9, 4000), chunk_bytes=4 * 4000 * 4)


@DTYPES
def test_exact_for_every_layout(dtype):
    torch.manual_seed(0)
    big = torch.randn(3, 9, 100, dtype=dtype)
    labels = labels_for(9, 40)
    check_logits(big[1, :, 30:70], labels)
    check_logits(big[0, :, ::2][:, :40], labels)
    check_logits(torch.randn(40, 9, dtype=dtype).t(), labels)
    check_logits(torch.randn(1, 40, dtype=dtype).expand(9, 40), labels.repeat(2)[::2])
    weight = torch.randn(20, 40, dtype=dtype).t()
    check_hidden(big[1, :, 30:50], weight, labels)
    check_hidden(torch.randn(20, 9, dtype=dtype).t(), weight, labels)


@DTYPES
@WAYS
def test_no_row_that_counts(dtype, way):
    labels = torch.full((4,), -100)
    x, weight = torch.randn(4, 6, dtype=dtype, requires_grad=True), torch.randn(9, 6, dtype=dtype, requires_grad=True)
    loss = cross_entropy if way == "logits" else lambda x, labels, **kw: linear_cross_entropy(x, weight, labels, **kw)
    assert math.isnan(loss(x, labels).item())
    total = loss(x, labels, reduction="sum")
    total.backward()
    assert total == 0
    assert not x.grad.any()
    if way == "hidden":
        assert not weight.grad.any()


@WAYS
def test_infinite_and_nan_logits_are_as_in_torch(way):
    logits = torch.randn(5, 9)
    logits[0, 3] = logits[1, 2] = -math.inf
    logits[2, 1], logits[3, 1] = math.inf, math.nan
    labels = torch.tensor([1, 2, 3, 4, 5])
    expected = F.cross_entropy(logits, labels, reduction="none")
    if way == "logits":
        found = cross_entropy(logits, labels, reduction="none")
    else:  # what the logits are is all in the bias
        found = torch.stack(
            [
                linear_cross_entropy(torch.zeros(1, 4), torch.zeros(9, 4), labels[i : i + 1], bias=logits[i])
                for i in range(5)
            ]
        )
    assert torch.allclose(found, expected, equal_nan=True)


def test_masked_classes_get_no_gradient():
    logits = torch.randn(3, 9)
    logits[:, 4:] = -math.inf
    labels = torch.tensor([0, 1, 2])
    assert_as_exact(lambda x: own(x, labels), lambda x: cross_entropy(x, labels), (logits,))


def test_consumed_logits_hold_the_gradient_and_no_second_backward_is_had():
    x, labels = torch.randn(6, 50, requires_grad=True), labels_for(6, 50)
    logits = x * 1
    loss = cross_entropy(logits, labels, consume_logits=True)
    (grad,) = torch.autograd.grad(loss, logits, retain_graph=True)
    assert grad.data_ptr() == logits.data_ptr()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, logits)


@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_a_second_backward_of_the_linear_loss_gives_the_same_again(factor):
    hidden, weight = torch.randn(20, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    total = linear_cross_entropy(hidden, weight, labels_for(20, 50)) * factor
    first, second = (torch.autograd.grad(total, (hidden, weight), retain_graph=True) for _ in range(2))
    expected = torch.autograd.grad(own(hidden @ weight.t(), labels_for(20, 50)) * factor, (hidden, weight))
    for a, b, c in zip(first, second, expected, strict=True):
        assert torch.equal(a, b)
        assert torch.allclose(a, c, atol=1e-6)


def test_kept_logits_give_the_same_gradient_twice():
    x, labels = torch.randn(6, 50, requires_grad=True), labels_for(6, 50)
    loss = cross_entropy(x, labels)
    first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("needed", ["hidden", "weight", "bias"])
def test_only_gradients_that_are_needed(needed, reduction, monkeypatch):
    tensors = {"hidden": torch.randn(6, 8), "weight": torch.randn(20, 8), "bias": torch.randn(20)}
    tensors[needed].requires_grad_()
    operator, asked = chunked._op, []
    monkeypatch.setattr(chunked, "_op", lambda *args: asked.append(args[-3:]) or operator(*args))
    linear_cross_entropy(**tensors, labels=labels_for(6, 20), reduction=reduction).sum().backward()
    assert [name for name, t in tensors.items() if t.grad is not None] == [needed]
    assert asked[-1] == tuple(name == needed for name in tensors)


def test_the_logits_never_exist_as_a_whole():
    """Peak memory as torch's allocator sees it: far less than the logits of all rows."""
    rows, width, classes = 512, 16, 20000
    hidden, weight = torch.randn(rows, width, requires_grad=True), torch.randn(classes, width, requires_grad=True)
    labels = labels_for(rows, classes)
    with torch.profiler.profile(profile_memory=True) as profile:
        linear_cross_entropy(hidden, weight, labels, chunk_bytes=1 << 20).backward()
    sizes = [event.cpu_memory_usage for event in profile.key_averages() if event.cpu_memory_usage > 0]
    assert max(sizes) < rows * classes * 4 / 4


@WAYS
@pytest.mark.parametrize(
    ("labels", "complaint"),
    [
        (torch.tensor([0, 9]), "label 9 is out of bounds for 9 classes"),
        (torch.tensor([-1, 0]), "label -1 is out of bounds"),
        (torch.tensor([0, 1, 2]), r"labels must be \[rows\] in int64"),
        (torch.tensor([0, 1], dtype=torch.int32), r"labels must be \[rows\] in int64"),
    ],
)
def test_labels_that_do_not_fit_are_errors(labels, complaint, way):
    x, weight = torch.randn(2, 9), torch.randn(9, 9)
    with pytest.raises(RuntimeError, match=complaint):
        _ = cross_entropy(x, labels) if way == "logits" else linear_cross_entropy(x, weight, labels)


def test_wrong_arguments_are_errors():
    labels = torch.tensor([0, 1])
    with pytest.raises(RuntimeError, match="float32, bfloat16 or float16"):
        cross_entropy(torch.randn(2, 9).double(), labels)
    with pytest.raises(RuntimeError, match=r"logits must be \[rows, classes\]"):
        cross_entropy(torch.randn(1, 2, 9), labels)
    with pytest.raises(RuntimeError, match="hidden and weight must have one dtype"):
        linear_cross_entropy(torch.randn(2, 9), torch.randn(5, 9).half(), labels)
    with pytest.raises(RuntimeError, match=r"weight \[classes, in\]"):
        linear_cross_entropy(torch.randn(2, 9), torch.randn(5, 8), labels)
    for loss in (cross_entropy, lambda x, labels, **kw: linear_cross_entropy(x, torch.randn(5, 9), labels, **kw)):
        with pytest.raises(ValueError, match="num_items divides a sum"):
            loss(torch.randn(2, 9), labels, reduction="none", num_items=3)
