"""The head of a language model with its loss: logits that are computed only when somebody reads them."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from exact import assert_as_exact
from snapshot import Snapshot
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.loss.loss_utils import ForCausalLMLoss, ForMaskedLMLoss
from writers import (
    RULE,
    VOCABULARY,
    WIDTH,
    Output,
    Writer,
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
from kernelwise._applying import _join
from kernelwise._applying._lazy_logits import lazy_logits
from kernelwise._applying._logit_source import Source
from kernelwise._discover import discover
from kernelwise.kernels.cpu.linear_cross_entropy import linear_cross_entropy


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
    inputs = (hidden, weight, torch.randn(VOCABULARY, dtype=dtype) if bias else None)
    # A gradient of hidden is a sum over the vocabulary, in whatever order the processor's product takes it.
    assert_as_exact(own, joined, inputs, scales=(0.1, 1.0), terms=VOCABULARY)
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
