"""The head of a language model with its loss: logits that are computed only when somebody reads them."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from exact import assert_as_exact
from models import Snapshot
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.loss.loss_utils import ForCausalLMLoss, ForMaskedLMLoss

import kernelwise as kw
from kernelwise._applying import _join
from kernelwise._applying._lazy_logits import READ, LazyLogits, lazy_logits
from kernelwise._applying._logit_source import KEPT, Source
from kernelwise._discover import discover
from kernelwise.kernels.cpu.linear_cross_entropy import linear_cross_entropy

WIDTH, VOCABULARY = 24, 331
RULE = {"LinearCrossEntropy": "builtin:LinearCrossEntropy"}


class Output(NamedTuple):
    loss: Any
    logits: Tensor


class Writer(nn.Module):
    """The least model of which the head can be joined with the loss."""

    def __init__(self, *, bias: bool = False, tied: bool = False, loss: Any = ForCausalLMLoss) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=bias)
        if tied:
            self.head.weight = self.embed.weight
        self.loss_function = loss

    def forward(self, ids: Tensor, labels: Tensor | None = None, **options: Any) -> Any:
        logits = self.head(torch.tanh(self.mix(self.embed(ids))))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=VOCABULARY, **options)
        return Output(loss, logits)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def join(model: nn.Module, rules: dict[str, str] | None = None) -> nn.Module:
    return kw.kernelize(model, RULE | (rules or {}))


def writer(**options: Any) -> Writer:
    return Writer(**options).train()


def batch(rows: int = 2, tokens: int = 19) -> tuple[Tensor, Tensor]:
    ids = torch.randint(VOCABULARY, (rows, tokens))
    labels = ids.clone()
    labels[0, 3:8] = -100
    return ids, labels


def fallbacks(model: nn.Module) -> dict[str, int]:
    (row,) = (r for r in kw.report(model).rows if r.name == "LinearCrossEntropy" and r.mode.startswith("training"))
    assert row.kernel == "builtin:LinearCrossEntropy"
    return dict(row.fallbacks)


def is_lazy(logits: Any) -> bool:
    """Whether these are logits without values. (Asking whether they are is no use of them.)"""
    return type(logits) is LazyLogits and logits._pending.values is None


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], msg=lambda text, name=name: f"{name}: {text}")


# The loss


def old_loss(logits: Tensor, labels: Tensor, vocab_size: int, **options: Any) -> Tensor:
    """As models had it in themselves: the logits are shifted, and float16 and bfloat16 are not made float32."""
    shifted = logits[..., :-1, :].contiguous()
    return nn.CrossEntropyLoss()(shifted.view(-1, vocab_size), labels[..., 1:].contiguous().view(-1))


def shifted_rows(logits: Tensor, labels: Tensor, vocab_size: int, **options: Any) -> Tensor:
    rows = logits[:, :-1].reshape(-1, vocab_size).to(torch.float32)
    return F.cross_entropy(rows, labels[:, 1:].flatten(), label_smoothing=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("loss", "options"),
    [
        (ForCausalLMLoss, {}),
        (ForCausalLMLoss, {"num_items_in_batch": torch.tensor(29)}),
        (ForCausalLMLoss, {"num_items_in_batch": 17}),
        (ForCausalLMLoss, {"ignore_index": 5}),
        (ForCausalLMLoss, {"shift_labels": torch.arange(38).view(2, 19)}),
        (ForMaskedLMLoss, {}),
        (old_loss, {}),
        (shifted_rows, {}),
    ],
)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_loss_and_gradients_are_as_exact_as_those_of_the_logits(
    loss: Any, options: dict[str, Any], dtype: torch.dtype, bias: bool
) -> None:
    labels = batch()[1]
    if "ignore_index" in options:
        labels[labels == -100] = 5
    seen: list[bool] = []

    def own(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        result: Tensor = loss(F.linear(hidden, weight, bias), labels, VOCABULARY, **options)
        return result

    def joined(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        logits = lazy_logits(Source(hidden * 1, weight, bias, F.linear, linear_cross_entropy, Counter()))
        result: Tensor = loss(logits, labels, VOCABULARY, **options)
        seen.append(is_lazy(logits))
        return result

    hidden = torch.randn(2, 19, WIDTH, dtype=dtype)
    weight = torch.randn(VOCABULARY, WIDTH, dtype=dtype) * 0.2
    assert_as_exact(
        own, joined, (hidden, weight, torch.randn(VOCABULARY, dtype=dtype) if bias else None), scales=(0.1, 1.0)
    )
    assert seen
    assert all(seen)


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("frozen", [(), ("head",), ("embed", "mix")], ids=str)
def test_a_model_trains_as_without(tied: bool, frozen: tuple[str, ...]) -> None:
    model = writer(tied=tied, bias=True)
    for name in frozen:
        model.get_submodule(name).requires_grad_(False)
    ids, labels = batch()
    own = model(ids, labels=labels)
    expected = gradients(model, own.loss)
    join(model)
    found = model(ids, labels)
    assert is_lazy(found.logits)
    torch.testing.assert_close(found.loss, own.loss)
    assert_same(gradients(model, found.loss), expected)
    assert is_lazy(found.logits)
    assert fallbacks(model) == {}


def tiny_llama(**options: Any) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCABULARY, **options,
    )  # fmt: skip
    return LlamaForCausalLM(config).train()


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
def test_a_model_of_transformers_trains_as_without(tied: bool) -> None:
    model = tiny_llama(tie_word_embeddings=tied)
    model.gradient_checkpointing_enable()
    ids, labels = batch()
    own = model(input_ids=ids, labels=labels, output_hidden_states=True, use_cache=False)
    expected = gradients(model, own.loss)
    join(model)
    found = model(input_ids=ids, labels=labels, output_hidden_states=True, use_cache=False)
    assert is_lazy(found.logits)
    assert_same(gradients(model, found.loss), expected)
    torch.testing.assert_close(found.hidden_states, own.hidden_states)
    loss, logits = model(input_ids=ids, labels=labels, return_dict=False, use_cache=False)[:2]
    torch.testing.assert_close(loss, own.loss)
    torch.testing.assert_close(logits, own.logits)


def test_generation_and_calls_without_labels_are_left_alone() -> None:
    model = tiny_llama().eval()
    ids = batch()[0]
    expected = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    join(model)
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0), expected)
    assert type(model(ids).logits) is Tensor
    assert type(model.train()(ids).logits) is Tensor
    assert fallbacks(model) == {}


def test_the_logits_never_exist() -> None:
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not clear.exists():
        pytest.skip("the peak of memory is read from Linux")

    def kilobytes(name: str) -> int:
        (line,) = (line for line in status.read_text().splitlines() if line.startswith(name))
        return int(line.split()[1])

    def peak(model: nn.Module, ids: Tensor) -> int:
        before = kilobytes("VmRSS")
        clear.write_text("5")  # the peak starts anew
        model(ids, labels=ids).loss.backward()
        return (kilobytes("VmHWM") - before) * 1024

    vocabulary, tokens = 49152, 2048
    model = writer()
    model.embed, model.head = nn.Embedding(vocabulary, WIDTH), nn.Linear(WIDTH, vocabulary, bias=False)
    model.loss_function = lambda logits, labels, vocab_size, **_: ForCausalLMLoss(logits, labels, vocabulary)
    whole = vocabulary * tokens * 4
    ids = torch.randint(vocabulary, (1, tokens))
    assert peak(model, ids) > whole
    model.loss_function = ForCausalLMLoss
    join(model)
    model.loss_function = lambda logits, labels, vocab_size, **_: ForCausalLMLoss(logits, labels, vocabulary)
    assert peak(model, ids) < whole / 2


def test_labels_out_of_bounds_are_refused_as_without() -> None:
    model = join(writer())
    ids, labels = batch()
    for wrong in (VOCABULARY, -5):
        labels[1, 2] = wrong
        with pytest.raises(IndexError, match="out of bounds"):
            model(ids, labels)


# The logits


def both(**options: Any) -> tuple[Writer, Any, Any]:
    """A kernelized model, and what it gave without its kernel and with it."""
    model = writer(**options)
    ids, labels = batch()
    own = model(ids, labels)
    join(model)
    return model, own, model(ids, labels)


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


class Wide(nn.Linear):
    pass


@pytest.mark.parametrize(
    ("prepare", "why"),
    [
        (lambda m: m.head.register_forward_hook(lambda *_: None), _join.HOOKED),
        (lambda m: m.head.register_forward_pre_hook(lambda *_: None), _join.HOOKED),
        (lambda m: m.head.register_full_backward_hook(lambda *_: None), _join.HOOKED),
        (lambda m: nn.utils.parametrizations.weight_norm(m.head), _join.HOOKED),
        (lambda m: setattr(m, "head", Wide(WIDTH, VOCABULARY)), _join.HOOKED),
        (lambda m: m.head.compile(backend="eager"), _join.HOOKED),
        (lambda m: m.head.double() and m.mix.double() and m.embed.double(), _join.INPUT),
    ],
    ids=["hook", "pre-hook", "backward hook", "parametrized", "replaced", "compiled", "float64"],
)
def test_a_head_that_is_not_plain_any_more_runs_its_own_code(prepare: Any, why: str) -> None:
    model = join(writer())
    prepare(model)
    found = model(*batch())
    assert type(found.logits) is Tensor
    found.loss.backward()
    assert fallbacks(model) == {why: 1}


class Checkpointed(Writer):
    """A model that computes its head anew in backward, or its head and its loss."""

    with_loss, reentrant = False, False

    def forward(self, ids: Tensor, labels: Tensor | None = None, **options: Any) -> Any:
        def rest(hidden: Tensor) -> tuple[Any, Tensor]:
            logits = self.head(hidden)
            if labels is None or not self.with_loss:
                return None, logits
            return self.loss_function(logits=logits, labels=labels, vocab_size=VOCABULARY), logits

        hidden = torch.tanh(self.mix(self.embed(ids)))
        loss, logits = checkpoint(rest, hidden, use_reentrant=self.reentrant)
        if labels is not None and loss is None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=VOCABULARY)
        return Output(loss, logits)


@pytest.mark.parametrize("with_loss", [False, True], ids=["head", "head and loss"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_model_that_checkpoints_its_head_trains_as_without(with_loss: bool, reentrant: bool) -> None:
    model = Checkpointed().train()
    model.with_loss, model.reentrant = with_loss, reentrant
    ids, labels = batch()
    expected = gradients(model, model(ids, labels).loss)
    join(model)
    assert_same(gradients(model, model(ids, labels).loss), expected)
    if not reentrant:
        assert fallbacks(model) == {_join.SAVED: 1}


def test_a_checkpoint_around_the_model_keeps_the_kernel() -> None:
    model = writer()
    ids, labels = batch()
    expected = gradients(model, model(ids, labels).loss)
    join(model)
    loss, logits = checkpoint(model, ids, labels, use_reentrant=False)
    assert is_lazy(logits)
    assert_same(gradients(model, loss), expected)
    assert fallbacks(model) == {}


def test_a_capture_into_a_cuda_graph_runs_the_own_code(monkeypatch: pytest.MonkeyPatch) -> None:
    model = join(writer())
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    found = model(*batch())
    monkeypatch.undo()
    assert type(found.logits) is Tensor
    assert fallbacks(model) == {_join.TRACED: 1}


def test_autocast_inference_mode_and_tracing_run_the_own_code() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = join(writer())
    ids, labels = batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(ids, labels).logits.dtype is torch.bfloat16
    with torch.inference_mode():
        assert type(model(ids, labels).logits) is Tensor
    with FlopCounterMode(display=False) as flops:
        assert type(model(ids, labels).logits) is Tensor
    assert flops.get_total_flops() == 2 * ids.numel() * WIDTH * (WIDTH + VOCABULARY)
    parameters = dict(model.named_parameters())
    grads = torch.func.grad(lambda p: torch.func.functional_call(model, p, (ids, labels)).loss)(parameters)
    assert fallbacks(model) == {_join.TRACED: 2, _join.HOOKED: 2}  # the last two hook modules and replace parameters
    assert_same(grads, gradients(model, model(ids, labels).loss))


@pytest.mark.parametrize("training", [True, False])
def test_under_no_grad_the_loss_is_had_without_logits_too(training: bool) -> None:
    model, _, _ = both()
    model.train(training)
    with torch.no_grad():
        found = model(*batch())
        assert is_lazy(found.logits)
        assert not found.loss.requires_grad
        assert not found.logits.sum().requires_grad


def test_compiled_models_run_the_own_code() -> None:
    torch._dynamo.reset()
    model, _, _ = both()
    ids, labels = batch()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    found = compiled(ids, labels)
    assert type(found.logits) is Tensor
    torch.testing.assert_close(found.loss, model(ids, labels).loss)
    assert fallbacks(model) == {}


def test_logits_go_into_compiled_code_as_plain_ones() -> None:
    torch._dynamo.reset()
    _, own, found = both()
    entropy = torch.compile(lambda t: torch.distributions.Categorical(logits=t).entropy(), backend="eager")
    torch.testing.assert_close(entropy(found.logits), entropy(own.logits))


def test_ddp_and_fsdp() -> None:
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    model, _, _ = both()
    ids, labels = batch()
    expected = gradients(model, model(ids, labels).loss)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for options in ({}, {"find_unused_parameters": True}, {"static_graph": True}):
            copied = copy.deepcopy(model)
            parallel = DistributedDataParallel(copied, **options)
            found = parallel(ids, labels)
            assert found.loss.requires_grad
            assert_same(gradients(copied, found.loss), expected)
        fully_shard(model)  # it frees the weights between calls
        sharded = model(ids, labels)
        assert type(sharded.logits) is Tensor
        sharded.loss.backward()
        assert fallbacks(model) == {_join.HOOKED: 1}
    finally:
        dist.destroy_process_group()


# What is put in, and taken out


def test_it_is_a_layer_with_a_decision_for_each_mode() -> None:
    model = join(writer())
    rows = {row.mode: row for row in kw.report(model).rows if row.name == "LinearCrossEntropy"}
    assert {mode: (row.path, row.kernel) for mode, row in rows.items()} == dict.fromkeys(
        ("inference", "training"), ("LinearCrossEntropy", "builtin:LinearCrossEntropy")
    )
    compiled = kw.plan(model, RULE, mode="training+compile", on_miss="keep").decisions
    (reason,) = (d.reason for d in compiled if d.layer.name == "LinearCrossEntropy")
    assert reason == "does not work under torch.compile"


def test_it_goes_in_only_where_a_rule_asks_for_it() -> None:
    model = kw.kernelize(writer())
    assert type(model(*batch()).logits) is Tensor
    assert "forward" not in model.__dict__
    kw.unkernelize(model)
    model = kw.kernelize(writer(), {"LinearCrossEntropy": "none"})
    assert type(model(*batch()).logits) is Tensor
    kw.unkernelize(model)
    kw.kernelize(model, {"LinearCrossEntropy": {"training": "builtin:LinearCrossEntropy", "inference": "none"}})
    assert is_lazy(model(*batch()).logits)
    assert type(model.eval()(*batch()).logits) is Tensor
    kw.unkernelize(model)
    with pytest.raises(kw.PlanError, match="takes a kernel by roles"):
        kw.kernelize(model, {"LinearCrossEntropy": "package:kernelwise.kernels.layers:Linear"}, verify=False)


def test_undo_is_exact() -> None:
    model = writer()
    before = Snapshot(model)
    join(model)
    model(*batch()).loss.backward()
    model.zero_grad()
    kw.unkernelize(model)
    assert before.differences(model) == []


def test_parts_can_be_undone_in_any_order() -> None:
    model = writer().to(torch.bfloat16)
    before = Snapshot(model)
    join(model)
    kw.unkernelize(model, paths=["LinearCrossEntropy"])
    assert type(model(*batch()).logits) is Tensor
    kw.unkernelize(model)
    assert before.differences(model) == []

    join(model)
    kw.unkernelize(model.head)
    assert type(model(*batch()).logits) is Tensor
    kw.unkernelize(model)
    assert before.differences(model) == []

    with kw.kernelized(model, RULE):
        with kw.kernelized(model, RULE):
            assert is_lazy(model(*batch()).logits)
        assert is_lazy(model(*batch()).logits)
    assert before.differences(model) == []


def test_copies_are_joined_too_and_files_are_clean() -> None:
    model = join(writer())
    copied = copy.deepcopy(model)
    kw.unkernelize(model)
    assert type(model(*batch()).logits) is Tensor
    found = copied(*batch())
    assert is_lazy(found.logits)
    found.loss.backward()
    assert model.head.weight.grad is None
    assert copied.head.weight.grad is not None
    with kw.kernelized(copied, RULE):
        pass
    assert is_lazy(copied(*batch()).logits)
    loaded = pickle.loads(pickle.dumps(copied))
    assert not any("_kernelwise" in module.__dict__ or "forward" in module.__dict__ for module in loaded.modules())
    assert type(loaded(*batch()).logits) is Tensor
    kw.unkernelize(copied)
    assert "forward" not in copied.head.__dict__


def mean_squares(logits: Tensor, labels: Tensor, vocab_size: int, **options: Any) -> Tensor:
    return (logits.float() - labels.unsqueeze(-1)).pow(2).mean()


def blocked(model: nn.Module) -> list[str | None]:
    return [layer.blocked for layer in discover(model) if layer.name == "LinearCrossEntropy"]


def test_only_a_head_that_widens_with_a_known_loss_is_listed() -> None:
    assert blocked(writer()) == [None]
    assert blocked(writer(loss=ForMaskedLMLoss)) == [None]
    assert blocked(writer(loss=mean_squares)) == []
    model = writer()
    del model.loss_function
    assert blocked(model) == []
    model = writer()
    model.head = nn.Linear(WIDTH, 2)
    assert blocked(model) == []


def test_a_head_that_cannot_be_joined_is_listed_with_the_reason() -> None:
    model = writer()
    model.head = Wide(WIDTH, VOCABULARY)
    assert blocked(model) == ["its head head is a Wide, not a plain linear layer"]
    kw.kernelize(model, RULE, on_miss="keep")
    assert type(model(*batch()).logits) is Tensor
    model = writer()
    model.second = nn.Linear(WIDTH, VOCABULARY)
    assert blocked(model) == ["it has several linear layers that widen: head, second"]
    model = writer()
    model.forward = lambda *args, **kwargs: Writer.forward(model, *args, **kwargs)
    assert "replaced on this instance" in (blocked(model)[0] or "")
    model = writer()
    model.head.forward = lambda x: x
    assert "replaced on this instance" in (blocked(model)[0] or "")


def test_the_trainer_trains_without_logits(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": row, "labels": row} for row in torch.randint(VOCABULARY, (4, 12))]
    losses = []
    for kernelized in (False, True):
        torch.manual_seed(0)
        model = tiny_llama()
        if kernelized:
            join(model)
        arguments = TrainingArguments(
            str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to=[], save_strategy="no", use_cpu=True,
            disable_tqdm=True, gradient_accumulation_steps=2,
        )  # fmt: skip
        losses.append(Trainer(model=model, args=arguments, train_dataset=rows).train().training_loss)
        if kernelized:
            assert fallbacks(model) == {}
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
