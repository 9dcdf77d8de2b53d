"""Loss functions are recognised by what they compute; look-alikes are told apart."""

from __future__ import annotations

import contextlib

import pytest
import torch
from exact import float64_mode
from torch import nn
from torch.nn import functional as F

from kernelwise import ops
from kernelwise._data import Recognition
from kernelwise._recognize._losses import find_loss
from kernelwise.ops._cross_entropy import cross_entropy

loss_utils = pytest.importorskip("transformers.loss.loss_utils")


def named(answer):
    assert isinstance(answer, Recognition), answer
    return {role: binding.value for role, binding in answer.roles}


def test_loss_of_transformers():
    answer = find_loss(loss_utils.ForCausalLMLoss)
    assert named(answer) == {
        "logits": "logits", "labels": "labels", "num_items": "num_items_in_batch", "shifted": "shift_labels",
        "ignore_index": "ignore_index",
    }  # fmt: skip
    assert dict(answer.options) == {"shift": "labels", "upcast": True}
    assert ops.layer_name(answer) == "ForCausalLMLoss"
    masked = find_loss(loss_utils.ForMaskedLMLoss)
    assert named(masked)["shifted"] is None
    assert dict(masked.options) == {"shift": "none", "upcast": True}


@pytest.mark.parametrize("items", [None, 7, torch.tensor(7)])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_agrees_with_the_reference(items, given, dtype):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 9, 31, generator=generator).to(dtype)
    labels = torch.randint(0, 31, (2, 9), generator=generator)
    labels[0, 3:5] = -100
    shifted = torch.randint(0, 31, (2, 9), generator=generator) if given else None

    def both():
        own = loss_utils.ForCausalLMLoss(logits, labels, 31, num_items_in_batch=items, shift_labels=shifted)
        return own, cross_entropy(logits, labels, items, shifted)

    if dtype == torch.float64:
        with float64_mode():
            own, reference = both()
        assert abs(own - reference) <= 1e-10
    else:
        own, reference = both()
        assert torch.equal(own, reference)
        assert own.dtype == reference.dtype


def by_hand(scores, targets, denominator=None, skip=-100):
    """The way it is written in older models, under other names."""
    scores = scores[..., :-1, :].contiguous()
    targets = targets[..., 1:].contiguous()
    scores, targets = scores.view(-1, scores.size(-1)), targets.view(-1)
    if denominator is None:
        return nn.functional.cross_entropy(scores, targets, ignore_index=skip)
    return nn.functional.cross_entropy(scores, targets, ignore_index=skip, reduction="sum") / denominator


def test_loss_under_other_names():
    answer = find_loss(by_hand)
    assert named(answer) == {
        "logits": "scores", "labels": "targets", "num_items": "denominator", "shifted": None, "ignore_index": "skip",
    }  # fmt: skip
    assert dict(answer.options) == {"shift": "logits", "upcast": False}


def smoothed(logits, labels, num_items=None, ignore_index=-100):
    rows = logits.float().view(-1, logits.size(-1))
    return F.cross_entropy(rows, labels.view(-1), ignore_index=ignore_index, label_smoothing=0.1)


def another_index(logits, labels, ignore_index=-100):
    return F.cross_entropy(logits.float().view(-1, logits.size(-1)), labels.view(-1), ignore_index=-100)


def shifted_twice(logits, labels, ignore_index=-100):
    labels = F.pad(labels, (0, 2), value=ignore_index)[..., 2:]
    return F.cross_entropy(logits.float().view(-1, logits.size(-1)), labels.reshape(-1), ignore_index=ignore_index)


def wrong_way(logits, labels, ignore_index=-100):
    labels = F.pad(labels, (1, 0), value=ignore_index)[..., :-1]
    return F.cross_entropy(logits.float().view(-1, logits.size(-1)), labels.reshape(-1), ignore_index=ignore_index)


def pads_with_zero(logits, labels, ignore_index=-100):
    labels = F.pad(labels, (0, 1), value=0)[..., 1:]
    return F.cross_entropy(logits.float().view(-1, logits.size(-1)), labels.reshape(-1), ignore_index=ignore_index)


def mean_over_items(logits, labels, num_items=None, ignore_index=-100):
    rows = logits.float().view(-1, logits.size(-1))
    loss = F.cross_entropy(rows, labels.view(-1), ignore_index=ignore_index)
    return loss if num_items is None else loss / num_items


def capped(logits, labels, ignore_index=-100):
    rows = torch.tanh(logits.float().view(-1, logits.size(-1)) / 30) * 30
    return F.cross_entropy(rows, labels.view(-1), ignore_index=ignore_index)


def only_in_bfloat16(logits, labels, ignore_index=-100):
    rows = logits.float() if logits.dtype == torch.bfloat16 else logits * 2
    return F.cross_entropy(rows.view(-1, logits.size(-1)), labels.view(-1), ignore_index=ignore_index)


def looks_at_data(logits, labels, ignore_index=-100):
    if (labels == ignore_index).all():
        return logits.sum() * 0
    return F.cross_entropy(logits.float().view(-1, logits.size(-1)), labels.view(-1), ignore_index=ignore_index)


def weighted_by_a_keyword(logits, labels, vocab_size, num_items_in_batch=None, ignore_index=-100, **kwargs):
    return loss_utils.ForCausalLMLoss(logits, labels, vocab_size, num_items_in_batch, ignore_index) * kwargs.get(
        "by", 1
    )


def of_the_vocabulary_alone(logits, labels, vocab_size, num_items_in_batch=None, ignore_index=-100):
    return loss_utils.ForCausalLMLoss(logits[..., :vocab_size], labels, vocab_size, num_items_in_batch, ignore_index)


def halved_for_large_ones(logits, labels, vocab_size, num_items_in_batch=None, ignore_index=-100):
    logits = logits / 2 if vocab_size > 100_000 else logits
    return loss_utils.ForCausalLMLoss(logits, labels, vocab_size, num_items_in_batch, ignore_index)


def doubled_where_long(logits, labels, ignore_index=-100):
    loss = F.cross_entropy(logits.float().view(-1, logits.size(-1)), labels.view(-1), ignore_index=ignore_index)
    return loss * 2 if labels.shape[-1] > 4096 else loss


def cut_where_long(logits, labels, ignore_index=-100):
    logits, labels = logits[:, :4096], labels[:, :4096]
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=ignore_index)


def halved_where_wide(logits, labels, ignore_index=-100):
    logits = logits / 2 if logits.shape[-1] > 300_000 else logits
    return F.cross_entropy(logits.float().view(-1, logits.size(-1)), labels.view(-1), ignore_index=ignore_index)


def goes_on_after_an_exception(logits, labels, ignore_index=-100):
    with contextlib.suppress(RuntimeError):
        torch.mm(logits, logits)
    return F.cross_entropy(logits.float().view(-1, logits.size(-1)), labels.view(-1), ignore_index=ignore_index)


BY_SIZES = [doubled_where_long, cut_where_long, halved_where_wide]


@pytest.mark.parametrize(
    "function",
    [
        smoothed,
        weighted_by_a_keyword,
        of_the_vocabulary_alone,
        halved_for_large_ones,
        another_index,
        shifted_twice,
        wrong_way,
        pads_with_zero,
        mean_over_items,
        capped,
        only_in_bfloat16,
        looks_at_data,
        loss_utils.ForSequenceClassificationLoss,
    ],
)
def test_look_alikes(function):
    answer = find_loss(function)
    assert isinstance(answer, str), answer
    assert answer


def test_why_it_is_unknown():
    assert "not for" in str(find_loss(mean_over_items))
    for function in BY_SIZES:
        assert "sizes of its tensors" in str(find_loss(function))
    assert "has raised an exception" in str(find_loss(goes_on_after_an_exception))
    assert "data" in str(find_loss(looks_at_data))
