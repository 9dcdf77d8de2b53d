"""What is captured of models that do not fit: in passes, with offloaded weights, on meta; and layers of layers as wholes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import accelerate
import gallery
import pytest
import torch
from checking import decision
from test_verify import Model, WithLoss, _inputs
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

import kernelwise as kw
from kernelwise._data import Check, Plan
from kernelwise._verifying import _cases, _judge, _verify
from kernelwise._verifying._capture import capture, capture_in_passes
from kernelwise._verifying._check import Options, check_kernel, own_code
from kernelwise._verifying._groups import group, group_wholes
from kernelwise._verifying._inputs import Sample
from kernelwise._verifying._verify import check_group


@pytest.fixture(autouse=True)
def few_sizes(monkeypatch) -> None:
    """These tests are about what layers are given."""
    monkeypatch.setattr(_cases, "_SIZES", ())
    monkeypatch.setattr(_cases, "_MANY_ROWS", {**_cases._MANY_ROWS, "S": 101})


def test_where_a_tensor_begins_in_its_memory_is_kept():
    """Kernels that read from the beginning of the memory, or as if every tensor were aligned, are wrong for views."""
    model = nn.Sequential(gallery.Norm()).eval()
    found = group(model, kw.plan(model))
    for first, kept in ((0, 0), (3, 3), (64, 64), (1000, 64 + 1000 % 64)):
        given = torch.randn(5000)[first:][: 48 * 48].view(48, 48)
        for rows in (4, None):
            (sample,) = capture(model, found, given, rows=rows).values()
            taken = sample.arguments["hidden_states"]
            assert torch.equal(taken, given[: rows or 48])
            assert taken.storage_offset() == kept
            assert taken.untyped_storage().nbytes() == 4 * (kept + taken.numel())


def size(sample: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(sample.arguments) if isinstance(leaf, torch.Tensor))


def test_layers_beyond_the_bound_are_captured_in_further_passes():
    model, notes = WithLoss().eval(), []
    groups = group(model, kw.plan(model))
    inputs = _inputs(rows=12) | {"labels": torch.randn(2, 12, 64)}
    runs = []
    model.register_forward_pre_hook(lambda *_: runs.append(1))
    memory = 2 * 12 * 64 * 4 + 1000
    passes = [
        ([found.decision.layer.path for found in done], {path: size(sample) for path, sample in samples.items()})
        for done, samples in capture_in_passes(model, groups, inputs, memory=memory, notes=notes)
    ]
    assert len(passes) > 1
    assert len(runs) == 2 * len(passes)  # once more for the gradients
    assert all(sum(sizes.values()) <= memory and set(sizes) == set(done) for done, sizes in passes)
    assert sorted(path for done, _ in passes for path in done) == sorted(found.decision.layer.path for found in groups)
    assert notes == []
    assert kw.verify(model, kw.plan(model), inputs, capture_memory=memory).ok


def test_a_layer_that_is_too_large_alone_is_cut_and_one_that_is_not_called_is_said():
    class Half(Model):
        def __init__(self):
            super().__init__()
            self.unused = gallery.Norm(80)

    model, notes = Half().eval(), []
    groups = group(model, kw.plan(model, {"Linear": "none"}))
    one_row = 64 * 4
    found = [
        (found.decision.layer.path, samples.get(found.decision.layer.path))
        for done, samples in capture_in_passes(model, groups, _inputs(rows=16), memory=3 * one_row, notes=notes)
        for found in done
    ]
    by_path = dict(found)
    assert (
        by_path["blocks.0.norm"].arguments["hidden_states"].shape == (1, 1, 64)
        or size(by_path["blocks.0.norm"]) <= 3 * one_row
    )
    assert by_path["unused"] is None
    assert notes == ["inputs were made for unused: the model does not call it on these inputs"]
    checks = kw.verify(model, kw.plan(model, {"Linear": "none"}), _inputs(rows=16), capture_memory=10)
    assert checks.ok, str(checks)
    assert sum("more than the 10 that may be kept" in note for note in checks.notes) == 3


def test_a_kernel_for_each_mode_is_checked_on_what_the_layer_was_given():
    model = WithLoss().eval()
    plan = kw.plan(model)
    decisions = tuple(
        replace(d, kernel=replace(d.kernel, can_torch_compile=False)) if d.mode == "training" else d
        for d in plan.decisions
        if d.kernel is not None and d.layer.path == "blocks.0.norm"
    )
    plan = replace(plan, decisions=decisions)
    checks = kw.verify(model, plan, _inputs() | {"labels": torch.randn(2, 5, 64)})
    found = {check.modes for check in checks.checks if check.case == "the model's gradients"}
    assert found == {("inference",), ("training",)}


def test_weights_that_accelerate_brings_in_are_those_that_are_checked(monkeypatch):
    torch.manual_seed(0)
    model = Model().eval()
    wanted = {name: parameter.clone() for name, parameter in model.named_parameters()}
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in model.parameters())
    plan, seen = kw.plan(model, {"Linear": "none"}), {}
    assert {decision.layer.path for decision in plan.decisions if decision.kernel} >= {"blocks.0.norm", "blocks.0.mlp"}
    real = _verify.check_kernel

    def noted(decided, own, sample, **options):
        if sample.module is not None:
            for name, parameter in sample.module.named_parameters():
                seen[f"{decided.layer.path}.{name}"] = parameter.detach().clone()
        return real(decided, own, sample, **options)

    monkeypatch.setattr(_verify, "check_kernel", noted)
    for inputs in (_inputs(), None):
        seen.clear()
        checks = kw.verify(model, plan, inputs)
        assert checks.ok, str(checks)
        assert checks.notes == ()
        assert len(seen) == 4
        assert all(torch.equal(wanted[name], found) for name, found in seen.items())
    assert all(parameter.is_meta for parameter in model.parameters())


def test_a_model_on_meta_gives_its_layers_shapes_and_strides(monkeypatch):
    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = gallery.Norm(64)

        def forward(self, x):
            return self.norm(x.transpose(1, 2))

    with torch.device("meta"):
        model = Views().eval()
    given: dict[str, torch.Tensor] = {}
    real = _verify.check_kernel

    def noted(decided, own, sample, **options):
        given.update(sample.arguments)
        return real(decided, own, sample, **options)

    monkeypatch.setattr(_verify, "check_kernel", noted)
    checks = kw.verify(model, kw.plan(model, device="cpu"), torch.randn(2, 64, 5))
    assert checks.ok, str(checks)
    assert (given["hidden_states"].shape, given["hidden_states"].stride()) == ((2, 5, 64), (320, 1, 5))
    assert float(given["hidden_states"].std()) > 0.5
    assert "contiguous inputs" in {check.case for check in checks.checks}  # only of inputs that are not
    assert "the model is on meta" in checks.notes[0]

    class Asks(Views):
        def forward(self, x):
            return self.norm(x) if x.sum() > 0 else x

    with torch.device("meta"):
        model = Asks().eval()
    with pytest.raises(kw.PlanError, match="meta device and does not run there"):
        kw.verify(model, kw.plan(model, device="cpu"), torch.randn(2, 5, 64))


def llama(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, vocab_size=64, **sizes, **options)).eval()


WHOLE = kw.KernelConfig({"DecoderLayer": "builtin:DecoderLayer"})


def of_wholes(model: nn.Module, plan: Plan) -> Iterator[Check]:
    ids = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    groups = group_wholes(model, plan)
    samples = capture(model, groups, {"input_ids": ids, "labels": ids})
    for found in groups:
        yield from check_group(model, found, samples[found.decision.layer.path], Options())


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.long)])
def test_the_decoder_layer_is_checked_on_what_the_model_gives_it(dtype):
    model = llama(attention_dropout=0.3).to(dtype)
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    checks = list(of_wholes(model, kw.plan(model, WHOLE)))
    assert [str(check) for check in checks if check.failed] == []
    assert {check.paths for check in checks} == {("model.layers.0", "model.layers.1")}
    done = {check.case for check in checks if check.status == "passed"}
    assert {"as given", "as given, in training", "the model's gradients", "random weights", "scale 0.01"} <= done
    assert {name: dict(module.__dict__) for name, module in model.named_modules()} == before


def test_a_decoder_layer_that_is_wrong_is_rejected():
    model = llama()
    plan = kw.plan(model, WHOLE)

    def without_a_residual(x, input_norm, attention, attention_out, mlp_norm, mlp, mlp_out, multiplier, *, sum_norm):
        normed, _ = sum_norm(attention(input_norm(x)), x)
        return x + mlp(normed)

    for wrong in (without_a_residual, lambda *args, **roles: None):
        decisions = tuple(
            replace(d, kernel=replace(d.kernel, function=wrong))
            if d.kernel is not None and str(d.kernel.ref) == "builtin:DecoderLayer"
            else d
            for d in plan.decisions
        )
        failed = next((c for c in of_wholes(model, replace(plan, decisions=decisions)) if c.failed), None)
        assert failed is not None
        assert failed.status in ("wrong_values", "wrong_structure"), str(failed)


def test_what_the_layers_own_code_computed_is_no_evidence_for_its_kernel(monkeypatch):
    model = llama()
    plan = kw.plan(model, WHOLE)
    (found, *_) = group_wholes(model, plan)
    monkeypatch.setattr(_verify._apply, "apply", lambda module, plan: None)
    monkeypatch.setattr(_verify._apply, "remove", lambda module, token: None)
    (check,) = of_wholes(model, plan)
    assert (check.status, "own code ran" in check.detail) == ("skipped", True)
    assert [inner.layer.path for inner in found.inside] == [
        "model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm"
    ]  # fmt: skip


def test_a_layer_of_layers_is_checked_with_inputs_and_said_to_be_left_out_without():
    model = llama()
    only = kw.KernelConfig({"DecoderLayer": "builtin:DecoderLayer"}, inherit_mapping=False)
    plan = kw.plan(model, only)
    checks = kw.verify(model, plan, {"input_ids": torch.randint(0, 64, (2, 9))})
    assert checks.ok, str(checks)
    assert {check.layer for check in checks.checks} == {"model.layers.0"}
    left_out = kw.verify(model, plan)
    assert left_out.checks == ()
    assert left_out.notes == ("model.layers.0 is not checked as a whole: that takes inputs of the model",)


class Drops(nn.Module):
    """Leaves out half of its numbers in training."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 48))

    def forward(self, x):
        return nn.functional.dropout(x * self.weight, 0.5, self.training)


class DropsAndErrs(nn.Module):
    def forward(self, x):
        return nn.functional.dropout(x * self.weight * (1 + 1e-5), 0.5, self.training)


class DropsOthers(nn.Module):
    def forward(self, x):
        return nn.functional.dropout((x * self.weight).flip(0), 0.5, self.training).flip(0)


class DropsLess(nn.Module):
    def forward(self, x):
        return nn.functional.dropout(x * self.weight, 0.4, self.training) * (0.6 / 0.5)


@pytest.mark.parametrize(
    ("kernel", "status"),
    [(Drops, None), (DropsAndErrs, "wrong_values"), (DropsOthers, "wrong_values"), (DropsLess, "wrong_values")],
)
def test_both_sides_leave_out_the_same_in_training(kernel, status, as_kernel):
    """With the same random numbers, a dropout is judged as exactly as everything else."""
    kw.register_layer(Drops, "Drops")
    decided, module = decision(Drops(), as_kernel(kernel), mode="training")
    sample = Sample({"x": torch.randn(4, 5, 48)}, module.train())
    options = Options(isolate=False)
    state = torch.get_rng_state()
    checks = check_kernel(decided, own_code(module, decided.layer), sample, modes=("training",), options=options)
    failed = next((check for check in checks if check.failed), None)
    assert (failed.status if failed else None) == status, str(failed)
    assert torch.equal(torch.get_rng_state(), state)


class DrawsForNothing(gallery.Norm):
    def forward(self, hidden_states):
        torch.rand(3)
        return gallery.rms_norm(hidden_states, self.weight, self.variance_epsilon)


def test_random_numbers_that_only_the_kernel_draws_are_a_mark(as_kernel):
    decided, module = decision(gallery.Norm(), as_kernel(DrawsForNothing))
    sample = Sample({"hidden_states": torch.randn(4, 5, 48)}, module)
    own = own_code(module, decided.layer)
    first = next(iter(check_kernel(decided, own, sample, options=Options(isolate=False))))
    assert first.status == "passed"
    assert first.marks == (_judge.DRAWS,)


def test_a_whole_layer_is_checked_on_few_elements_too(monkeypatch):
    """On a GPU its kernel leaves few elements to the layer's own code, which would be no evidence."""
    from kernelwise.kernels.cpu import decoder_layer

    monkeypatch.setattr(decoder_layer, "LEAST", 1 << 20, raising=False)
    model = llama()
    first = next(of_wholes(model, kw.plan(model, WHOLE)))
    assert (first.case, first.status) == ("as given", "passed"), str(first)


def test_a_head_with_its_loss_is_said_not_to_be_checked():
    model = llama()
    rule = {"LinearCrossEntropy": "builtin:LinearCrossEntropy"}
    heads = tuple(d for d in kw.plan(model, rule).decisions if d.kernel is not None and d.kernel.ref.layer in rule)
    assert heads
    checks = kw.verify(model, Plan(kw.Target("cpu"), heads))
    assert checks.checks == ()
    assert "a head with its loss is no call that could be captured" in checks.notes[0]
