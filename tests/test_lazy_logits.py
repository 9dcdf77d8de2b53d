"""Logits that nobody has computed: what is asked of them, what changes them, and how long they are held."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.loss.loss_utils import ForCausalLMLoss
from writers import (
    VOCABULARY,
    WIDTH,
    assert_same,
    batch,
    both,
    fallbacks,
    gradients,
    is_lazy,
    join,
    writer,
)

import kernelwise as kw
from kernelwise._applying._lazy_logits import READ, LazyLogits, lazy_logits
from kernelwise._applying._logit_source import KEPT, Source
from kernelwise.kernels.cpu.linear_cross_entropy import linear_cross_entropy


def test_what_is_asked_of_the_logits_without_their_values_computes_nothing() -> None:
    model, own, found = both()
    logits = found.logits
    assert isinstance(logits, Tensor)
    for name in ("shape", "dtype", "device", "layout", "requires_grad", "is_leaf", "ndim", "is_cuda", "nbytes"):
        assert getattr(logits, name) == getattr(own.logits, name), name
    assert logits.grad_fn is not None
    assert logits.size() == own.logits.size()
    assert logits.stride() == own.logits.stride()
    assert (logits.dim(), logits.numel(), len(logits)) == (3, own.logits.numel(), 2)
    assert logits.is_contiguous()
    assert is_lazy(logits)
    assert fallbacks(model) == {}


USES: dict[str, Any] = {
    "argmax": lambda t: t.argmax(-1),
    "float": lambda t: t.float() + 1,
    "double": lambda t: t.double(),
    "softmax": lambda t: F.softmax(t, -1),
    "detach": lambda t: t.detach(),
    "data": lambda t: t.data,
    "row": lambda t: t[0],
    "last": lambda t: t[:, -1, :],
    "slice of the vocabulary": lambda t: t[..., 3:7],
    "mask": lambda t: t[t > 0],
    "view": lambda t: t.view(-1)[5:],
    "cat": lambda t: torch.cat([t, t], 0),
    "numpy": lambda t: torch.from_numpy(t.detach().float().numpy().copy()),
    "tolist": lambda t: torch.tensor(t.tolist()),
    "item": lambda t: torch.tensor(t.sum().item()),
    "comparison": lambda t: t == t.max(),
    "arithmetic": lambda t: 2 * t - t / 3,
    "iteration": lambda t: torch.stack(list(t)),
    "clone": lambda t: t.clone() * 1,
    "shifted": lambda t: t[..., :-1, :].contiguous() * 1,
    "flattened": lambda t: t.reshape(-1, t.shape[-1]).sum(0),
    "other cross entropy": lambda t: F.cross_entropy(t[:, :5].reshape(-1, VOCABULARY), torch.ones(10, VOCABULARY)),
    "nll": lambda t: F.nll_loss(F.log_softmax(t[:, 0], -1), torch.tensor([3, 4])),
    "save": lambda t: _saved(t),
    "pickle": lambda t: pickle.loads(pickle.dumps(t.detach())),
    "copy": lambda t: copy.deepcopy(t.detach()),
    "operator": lambda t: torch.ops.aten.relu.default(t),
    "text": lambda t: torch.tensor(list(str(t.detach()).encode())),
    "memory": lambda t: torch.tensor(t.untyped_storage().nbytes()),
    "own function": lambda t: Doubled.apply(t),
    "topk": lambda t: t.topk(3).values,
}


def _saved(logits: Tensor) -> Tensor:
    file = io.BytesIO()
    torch.save({"logits": logits}, file)
    file.seek(0)
    loaded = torch.load(file)["logits"]
    assert type(loaded) is Tensor
    return loaded


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_use_gets_the_logits_with_their_graph(use: Any, dtype: torch.dtype) -> None:
    model = writer(bias=True).to(dtype)
    ids, labels = batch()
    expected = use(model(ids, labels).logits)
    join(model, {"Linear": "none"})  # whose kernel for CPUs rounds otherwise
    found = use(model(ids, labels).logits)
    assert torch.equal(found, expected)
    assert type(found) is type(expected)
    assert found.requires_grad == expected.requires_grad
    if found.requires_grad and found.grad_fn is not None:
        torch.manual_seed(1)
        upstream = torch.randn_like(expected)
        own = gradients_of(expected, upstream, model)
        assert_same(gradients_of(found, upstream, model), own)


def gradients_of(output: Tensor, upstream: Tensor, model: nn.Module, **options: Any) -> dict[str, Tensor]:
    model.zero_grad()
    output.backward(upstream, **options)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_reading_the_logits_is_counted_and_computed_once() -> None:
    model, own, found = both()
    for _ in range(3):
        assert torch.equal(found.logits.argmax(-1), own.logits.argmax(-1))
    assert fallbacks(model) == {READ: 1}


def test_loss_and_logits_can_be_used_together() -> None:
    model, own, found = both()
    expected = gradients(model, own.loss + own.logits.logsumexp(-1).mean())
    assert_same(gradients(model, found.loss + found.logits.logsumexp(-1).mean()), expected)


CHANGES: dict[str, Any] = {
    "method": lambda t: t.div_(2.0),
    "item": lambda t: t.__setitem__((slice(None), 0), 1.5),
    "view": lambda t: t[:, 1].mul_(3.0),
    "operator": lambda t: torch.ops.aten.mul_.Tensor(t, 2.0),
    "below": lambda t: _without_subclasses(t),
    "mask": lambda t: t.masked_fill_(t > 0, 0.0),
    "after a step": lambda t: (t.view(-1, VOCABULARY), t.div_(2.0)),
    "of a step": lambda t: t.view(-1, VOCABULARY).div_(2.0),
}


def _without_subclasses(t: Tensor) -> None:
    with torch._C.DisableTorchFunctionSubclass():
        t.mul_(0.5)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_logits_that_are_changed_in_place_give_the_loss_of_what_they_are_then(change: Any) -> None:
    """The change comes before the loss; no kernel may compute it from what the logits were."""

    def changed_first(logits: Tensor, labels: Tensor, vocab_size: int, **options: Any) -> Tensor:
        before = logits.float().clone()
        change(logits)
        return ForCausalLMLoss(logits, labels, vocab_size) + 0 * before.sum() + logits.mean()

    model = writer()
    ids, labels = batch()
    join(model)
    model.loss_function = changed_first
    found = model(ids, labels)
    mine = gradients(model, found.loss)
    kw.unkernelize(model)
    own = model(ids, labels)
    torch.testing.assert_close(found.loss, own.loss)
    assert_same(mine, gradients(model, own.loss))
    assert torch.equal(found.logits, own.logits)


def test_rows_that_were_taken_before_a_change_give_the_loss_of_what_they_are_then() -> None:
    model, own, found = both()
    labels = batch()[1].view(-1).clamp_min(0)

    def loss(logits: Tensor) -> tuple[Tensor, Tensor]:
        rows, copied = logits.view(-1, VOCABULARY), logits.clone().view(-1, VOCABULARY)
        logits.div_(2.0)
        return F.cross_entropy(rows, labels), F.cross_entropy(copied, labels)

    for mine, theirs in zip(loss(found.logits), loss(own.logits), strict=True):
        torch.testing.assert_close(mine, theirs)
        assert_same(
            gradients_of(mine, torch.ones(()), model, retain_graph=True),
            gradients_of(theirs, torch.ones(()), model, retain_graph=True),
        )


def test_a_copy_keeps_what_the_logits_were() -> None:
    _, own, found = both()
    half = found.logits.clone()
    assert is_lazy(half)
    found.logits.mul_(2)
    assert torch.equal(half, own.logits)
    assert torch.equal(found.logits, own.logits * 2)


def test_the_gradient_of_the_logits_can_be_had() -> None:
    model, own, found = both()
    own.logits.retain_grad()
    expected = gradients(model, own.loss)
    found.logits.retain_grad()
    assert_same(gradients(model, found.loss), expected)
    torch.testing.assert_close(found.logits.grad, own.logits.grad)

    seen: list[Tensor] = []
    again = model(*batch())
    again.logits.register_hook(lambda grad: seen.append(grad))
    again.loss.backward()
    assert seen[0].shape == again.logits.shape

    ids, labels = batch()
    third = model(ids, labels)
    (gradient,) = torch.autograd.grad(third.loss, third.logits)
    kw.unkernelize(model)
    plain = model(ids, labels)
    torch.testing.assert_close(gradient, torch.autograd.grad(plain.loss, plain.logits)[0])


def test_the_gradient_of_the_logits_can_be_had_from_their_node() -> None:
    _, own, found = both()
    (expected,) = torch.autograd.grad(own.loss, torch.autograd.graph.get_gradient_edge(own.logits))
    (gradient,) = torch.autograd.grad(found.loss, torch.autograd.graph.get_gradient_edge(found.logits))
    torch.testing.assert_close(gradient, expected)


def test_backward_from_the_logits_under_no_grad() -> None:
    model, own, found = both()
    upstream = torch.randn_like(own.logits)

    def backward(logits: Tensor) -> dict[str, Tensor]:
        model.zero_grad()
        with torch.no_grad():
            torch.autograd.backward([logits], [upstream])
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    assert_same(backward(found.logits), backward(own.logits))


class Copied(torch.autograd.Function):
    """A step that logits stay lazy through, with a gradient of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 10


class Viewed(Copied):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)


class Same(Copied):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize("function", [Copied, Viewed, Same])
def test_a_function_with_a_gradient_of_its_own_between_head_and_loss_keeps_it(function: Any) -> None:
    def loss(logits: Tensor, labels: Tensor, vocab_size: int, **options: Any) -> Tensor:
        return ForCausalLMLoss(function.apply(logits), labels, vocab_size)

    model = join(writer())
    model.loss_function = loss
    ids, labels = batch()
    found = gradients(model, model(ids, labels).loss)
    kw.unkernelize(model)
    assert_same(found, gradients(model, model(ids, labels).loss))


def test_logits_of_a_frozen_model_that_are_made_to_need_a_gradient_get_it() -> None:
    model = writer().requires_grad_(False)
    labels = batch()[1].view(-1)

    def gradient(logits: Tensor) -> Tensor | None:
        logits.requires_grad_()
        F.cross_entropy(logits.view(-1, VOCABULARY), labels).backward()
        return logits.grad

    torch.manual_seed(1)
    own = model(*batch())
    join(model)
    torch.manual_seed(1)
    torch.testing.assert_close(gradient(model(*batch()).logits), gradient(own.logits))


def test_a_loss_of_logits_that_were_read_is_of_what_they_are() -> None:
    """What is written to their memory behind autograd's back is not counted as a version."""
    _, own, found = both()
    labels = batch()[1].view(-1)

    def loss(logits: Tensor) -> Tensor:
        rows = logits.view(-1, VOCABULARY)
        logits.data.mul_(2)
        return F.cross_entropy(rows, labels)

    torch.testing.assert_close(loss(found.logits), loss(own.logits))


@pytest.mark.parametrize("change", [lambda t: t.div_(4), lambda t: t.add_(0.1)], ids=["div", "add"])
def test_the_loss_can_be_changed_in_place(change: Any) -> None:
    model, own, found = both()
    expected = gradients(model, change(own.loss * 1))
    assert_same(gradients(model, change(found.loss)), expected)


def test_a_loss_that_is_kept_after_backward_holds_no_hidden_states() -> None:
    memory = np.random.default_rng(0).standard_normal((19, WIDTH), np.float32)
    weight = torch.randn(VOCABULARY, WIDTH, requires_grad=True)
    logits = lazy_logits(Source(torch.from_numpy(memory), weight, None, F.linear, linear_cross_entropy, Counter()))
    loss = F.cross_entropy(logits, torch.arange(19))
    alive = weakref.ref(memory)
    del memory, logits
    loss.backward()
    gc.collect()
    assert weight.grad is not None
    assert alive() is None


def test_the_address_of_lazy_logits_is_refused() -> None:
    """DLPack reads it without asking anybody, and would hand on a null pointer."""
    _, _, found = both()
    with pytest.raises(RuntimeError, match="data pointer"):
        torch.utils.dlpack.to_dlpack(found.logits.detach_())


def test_second_derivatives_are_those_of_the_own_code() -> None:
    model, own, found = both()

    def second(output: Any) -> dict[str, Tensor]:
        (first,) = torch.autograd.grad(output.loss, model.head.weight, create_graph=True)
        return gradients(model, first.pow(2).sum())

    expected = second(own)
    assert_same(second(found), expected)


def test_logits_taken_out_of_the_graph_give_a_loss_without_it() -> None:
    model, _, found = both()
    labels = batch()[1].view(-1).clamp_min(0)
    found.logits.detach_()
    assert not F.cross_entropy(found.logits.view(-1, VOCABULARY), labels).requires_grad
    other = model(*batch()).logits
    with torch.no_grad():
        rows = other.view(-1, VOCABULARY)
    loss = F.cross_entropy(rows, labels)
    assert torch.autograd.grad(loss, model.head.weight, allow_unused=True) == (None,)
    loss = F.cross_entropy(other.view(-1, VOCABULARY), labels)
    assert torch.autograd.grad(loss, model.head.weight)[0].any()


def test_logits_read_in_inference_mode_can_be_trained_on() -> None:
    model, own, found = both()
    expected = gradients(model, own.logits.pow(2).mean())
    copied = model(*batch()).logits.clone()
    with torch.inference_mode():
        assert found.logits.argmax(-1).shape == (2, 19)
        assert copied.argmax(-1).shape == (2, 19)
    assert_same(gradients(model, found.logits.pow(2).mean()), expected)
    assert gradients(model, copied.pow(2).mean()).keys() == expected.keys()


def test_threads_have_lazy_logits_of_their_own() -> None:
    """A thread that calls the head by itself gets logits, whatever another one does with the model meanwhile."""
    model = join(writer())
    seen: list[Any] = []

    def loss(logits: Tensor, labels: Tensor, vocab_size: int, **options: Any) -> Tensor:
        thread = threading.Thread(target=lambda: seen.append(model.head(torch.randn(3, WIDTH))))
        thread.start()
        thread.join()
        seen.append(model.head(torch.randn(3, WIDTH)))
        return ForCausalLMLoss(logits, labels, vocab_size)

    model.loss_function = loss
    model(*batch())
    assert [type(logits) for logits in seen] == [Tensor, LazyLogits]
    assert type(model.head(torch.randn(3, WIDTH))) is Tensor


# Weights that change


def test_logits_that_are_held_are_computed_before_an_optimizer_steps() -> None:
    model, own, found = both()
    expected = own.logits.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    found.loss.backward()
    assert is_lazy(found.logits)
    optimizer.step()
    assert torch.equal(found.logits, expected)
    assert fallbacks(model) == {KEPT: 1}


def test_logits_that_nobody_holds_are_never_computed() -> None:
    model = join(writer())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for _ in range(2):
        loss = model(*batch()).loss
        loss.backward()
        optimizer.step()
    assert fallbacks(model) == {}


def test_logits_of_a_frozen_head_wait_on() -> None:
    model = writer()
    model.head.requires_grad_(False)
    join(model)
    found = model(*batch())
    found.loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()
    assert is_lazy(found.logits)


def test_logits_whose_weight_was_changed_by_hand_are_refused_aloud() -> None:
    model, _, found = both()
    with torch.no_grad():
        model.head.weight.mul_(0.5)
    torch.optim.SGD(model.parameters(), lr=1.0).step()  # it must not fail for logits that nobody reads
    with pytest.raises(kw.KernelwiseError, match="read them before the weight changes"):
        found.logits.sum()
    assert found.logits.shape == (2, 19, VOCABULARY)


def test_a_model_that_moves_leaves_its_logits_as_they_were() -> None:
    model, own, found = both()
    model.to(torch.float64)
    assert torch.equal(found.logits, own.logits)


# Calls that are not for it
