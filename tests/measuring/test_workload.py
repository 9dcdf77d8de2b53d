"""Workloads: the same work at every call, what is computed is right, and nothing of it stays on the model."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kernelwise._errors import PlanError
from kernelwise._measuring._workload import _CacheState, run_of, undisturbed, workloads_of
from kernelwise._models import load_model

LENGTH, STEPS = 12, 4


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(4, 250, (2, LENGTH), generator=torch.Generator().manual_seed(1))


class Plain(nn.Module):
    """A model that keeps statistics and draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.dropout = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.dropout(self.norm(self.linear(x)))
        return out


# ---------------------------------------------------------------------------------------------------- which there are


def test_a_language_model_has_prefill_and_decode(llama: Any, ids: Tensor) -> None:
    prefill, decode = workloads_of(llama, {"input_ids": ids}, steps=STEPS)
    assert (prefill.name, prefill.tokens) == ("prefill", 2 * LENGTH)
    assert (decode.name, decode.tokens, decode.steps) == ("decode", 2 * STEPS, STEPS)
    assert prefill.inputs["logits_to_keep"] == 1  # type: ignore[call-overload]


@pytest.mark.parametrize("form", ["tensor", "tuple", "dict"])
def test_inputs_can_be_given_in_any_form(llama: Any, ids: Tensor, form: str) -> None:
    inputs = {"tensor": ids, "tuple": (ids, torch.ones_like(ids)), "dict": {"input_ids": ids}}[form]
    (prefill, _) = workloads_of(llama, inputs)
    assert prefill.inputs["input_ids"] is ids  # type: ignore[call-overload]


def test_training_is_there_for_labels_or_in_training_mode(llama: Any, ids: Tensor) -> None:
    labels = ids.clone()
    *_, training = workloads_of(llama, {"input_ids": ids, "labels": labels})
    assert training.name == "training"
    assert training.inputs["labels"] is labels
    model = copy.deepcopy(llama).train()
    assert [w.name for w in workloads_of(model, {"input_ids": ids})] == ["prefill", "decode", "training"]
    plain = Plain()
    assert [w.name for w in workloads_of(plain, torch.ones(2, 4))] == ["forward", "training"]
    assert [w.name for w in workloads_of(plain.eval(), torch.ones(2, 4))] == ["forward"]


def test_labels_leave_out_padding(llama: Any, ids: Tensor) -> None:
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    (training,) = workloads_of(llama, {"input_ids": ids, "attention_mask": mask}, ["training"])
    labels = training.inputs["labels"]  # type: ignore[call-overload]
    assert (labels[0, :3] == -100).all()
    assert torch.equal(labels[mask == 1], ids[mask == 1])


@pytest.mark.parametrize(
    ("model", "inputs", "name", "said"),
    [
        (Plain(), torch.ones(2, 4), "decode", "does not generate text"),
        (Plain(), torch.ones(2, 4), "prefil", "did you mean 'prefill'"),
        (Plain().requires_grad_(False), torch.ones(2, 4), "training", "no parameter of the model requires one"),
    ],
)
def test_what_cannot_be_done_is_said(model: nn.Module, inputs: Any, name: str, said: str) -> None:
    with pytest.raises(PlanError, match=said):
        workloads_of(model, inputs, [name])


def test_decoding_needs_token_ids(llama: Any) -> None:
    with pytest.raises(PlanError, match="input_ids"):
        workloads_of(llama, {"inputs_embeds": torch.ones(1, 4, 64)}, ["decode"])


# ----------------------------------------------------------------------------------------------------- what they compute


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "qwen3_next", "mamba"])
@pytest.mark.parametrize("static_cache", [False, True])
def test_every_decoding_is_the_same_and_right(model_type: str, static_cache: bool, ids: Tensor) -> None:
    """Growing caches, caches that slide, states that are written in place: each run starts from the prompt again."""
    model: Any = load_model(model_type).model
    (decode,) = workloads_of(model, {"input_ids": ids}, ["decode"], steps=STEPS)
    with undisturbed(model, training=False):
        run = run_of(model, decode, static_cache=static_cache)
        found = [run().clone() for _ in range(3)]
        with torch.no_grad():
            expected = model(torch.cat([ids, ids[:, :STEPS]], dim=1)).logits[:, -1]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[1], found[2])
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-5)


def test_decoding_after_padding(llama: Any, ids: Tensor) -> None:
    """What is masked in the prompt stays masked: other tokens there change nothing, unmasked they would."""
    mask, other = torch.ones_like(ids), ids.clone()
    mask[:, 1:5] = 0
    other[:, 1:5] = 7

    def decoded(given: Tensor, mask: Tensor) -> Tensor:
        inputs = {"input_ids": given, "attention_mask": mask}
        (decode,) = workloads_of(llama, inputs, ["decode"], steps=1)
        found: Tensor = run_of(llama, decode)()
        return found

    torch.testing.assert_close(decoded(ids, mask), decoded(other, mask))
    assert not torch.allclose(decoded(ids, mask), decoded(other, torch.ones_like(ids)), atol=1e-3)


def test_prefill_gives_the_last_logits(llama: Any, ids: Tensor) -> None:
    (prefill,) = workloads_of(llama, {"input_ids": ids}, ["prefill"])
    with torch.no_grad():
        torch.testing.assert_close(run_of(llama, prefill)(), llama(ids).logits[:, -1])


def test_training_gives_loss_and_gradients_and_leaves_none(llama: Any, ids: Tensor) -> None:
    (training,) = workloads_of(llama, {"input_ids": ids}, ["training"])
    with undisturbed(llama, training=True):
        run = run_of(llama, training)
        loss, gradients = run()
        again, _ = run()
        assert torch.equal(loss, again)
        assert all(parameter.grad is None for parameter in llama.parameters())
        expected = llama(ids, labels=ids).loss
        expected.backward()
        torch.testing.assert_close(loss, expected.detach())
        for parameter, gradient in zip(llama.parameters(), gradients, strict=True):
            torch.testing.assert_close(gradient, parameter.grad)
    assert all(parameter.grad is None for parameter in llama.parameters())


def test_a_model_without_a_loss_is_trained_on_its_outputs() -> None:
    model = nn.Linear(4, 2)
    (training,) = workloads_of(model, torch.ones(3, 4), ["training"])
    loss, gradients = run_of(model, training)()
    torch.testing.assert_close(loss, model(torch.ones(3, 4)).detach().square().mean())
    assert gradients[0].abs().sum() > 0


def test_a_model_that_gives_no_cache(ids: Tensor) -> None:
    class NoCache(nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner, self.config, self.generate = inner, inner.config, inner.generate

        def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
            return self.inner(input_ids, use_cache=False)

    model = NoCache(load_model("llama").model)
    (decode,) = workloads_of(model, {"input_ids": ids}, ["decode"])
    with pytest.raises(PlanError, match="gives no cache"):
        run_of(model, decode)


# ------------------------------------------------------------------------------------------------------ nothing of it stays


def test_undisturbed_puts_everything_back() -> None:
    model = Plain()
    model.norm.eval()  # frozen, inside of a model in training
    model(torch.randn(8, 4)).sum().backward()
    model.linear.bias.grad = None
    gradient = model.linear.weight.grad
    kept = None if gradient is None else gradient.clone()
    state = copy.deepcopy(model.state_dict())
    statistics = model.norm.running_mean
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with undisturbed(model, training=True):
        assert model.norm.training
        assert model.linear.weight.grad is None
        model(torch.randn(8, 4)).sum().backward()
        model.norm.running_var = torch.zeros(4)  # another tensor in its place
        assert not torch.equal(model.state_dict()["norm.running_mean"], state["norm.running_mean"])
    assert model.training
    assert not model.norm.training
    assert model.linear.weight.grad is gradient
    assert kept is not None
    assert torch.equal(gradient, kept)
    assert model.linear.bias.grad is None
    assert model.norm.running_mean is statistics
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.rand(3), expected)


def test_undisturbed_puts_everything_back_after_an_error() -> None:
    model = Plain().eval()

    def fails() -> None:
        with undisturbed(model, training=True):
            model(torch.randn(8, 4)).sum().backward()
            raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        fails()
    assert not model.training
    assert model.linear.weight.grad is None
    assert int(model.norm.num_batches_tracked or 0) == 0


@dataclass(slots=True)
class Room:
    length: int
    whole: Tensor


def test_what_a_cache_keeps_in_slots_is_put_back() -> None:
    room = Room(3, torch.zeros(4))
    state = _CacheState(SimpleNamespace(rooms={"keys": room}))
    whole = room.whole
    room.length, room.whole = 5, torch.ones(4)
    whole[0] = 1.0
    state.put_back()
    assert room.length == 3
    assert room.whole is whole
    assert not whole.any()
