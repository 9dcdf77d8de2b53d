"""`kw.verify`: what it checks and says, what it leaves alone, and that it rejects nothing that is right."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import faults_in_gradients
import faults_in_values
import gallery
import pytest
import torch
from checking import checks_of, decision
from torch import nn

import kernelwise as kw
from kernelwise._data import STATUSES, Check, Checks, Plan, Target, from_json
from kernelwise._decide import current_target
from kernelwise._plan import reasons_against
from kernelwise._process import settings
from kernelwise._verifying import _cases
from kernelwise._verifying._calls import own_call
from kernelwise._verifying._capture import capture
from kernelwise._verifying._cases import beyond, cases
from kernelwise._verifying._check import Here, Options, _one_case, check_kernel, own_code
from kernelwise._verifying._groups import group
from kernelwise._verifying._inputs import Sample
from kernelwise._verifying._observe import growth, observe
from kernelwise._verifying._verify import _made
from kernelwise.sources import builtin_refs, load

LAYERS = (gallery.Norm, gallery.LateNorm, gallery.MLP, gallery.Attention, gallery.PlainLayerNorm)
ALSO_RIGHT = {gallery.Norm: gallery.GoodInTwoPasses, gallery.PlainLayerNorm: gallery.GoodLayerNormInTwoPasses}


class OwnRotary(nn.Module):
    def forward(self, q, k, cos, sin, unsqueeze_dim=1):
        return gallery.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim)


DTYPES = (torch.bfloat16, torch.float32)


def _assert_nothing_rejected(seed: int, as_kernel: Any, dtypes: Sequence[torch.dtype]) -> None:
    """Builtin kernels, and the layers' own code as its own kernel."""
    for index, layer in enumerate(LAYERS):
        for dtype in dtypes or DTYPES[index % 2 :][:1]:
            torch.manual_seed(seed)
            module = layer().to(dtype)
            own = as_kernel(OwnRotary if layer is gallery.Attention else layer)
            decided, _ = decision(module, own)
            op = decided.layer.recognition.op
            others = [as_kernel(ALSO_RIGHT[layer])] if layer in ALSO_RIGHT else []
            kernels = [own, *others, *(load(ref, device="cpu") for ref in builtin_refs(op, device="cpu"))]
            for kernel in kernels:
                if reasons_against(decided.layer, kernel, current_target("cpu"), "inference"):
                    continue
                decided, _ = decision(module, kernel)
                checks = list(checks_of(decided, module, seed=seed))
                assert [f"{layer.__name__} {dtype} {c}" for c in checks if c.failed] == []
                assert sum(check.status == "passed" for check in checks) > 15


def test_nothing_right_is_rejected(as_kernel):
    _assert_nothing_rejected(0, as_kernel, ())


@pytest.mark.long
@pytest.mark.parametrize("seed", range(1, 21))
def test_nothing_right_is_rejected_with_other_seeds(seed, as_kernel):
    _assert_nothing_rejected(seed, as_kernel, DTYPES)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = gallery.Norm(64)
        self.attention = gallery.Attention()
        self.mlp = gallery.MLP(64, 80)

    def forward(self, x, cos, sin):
        x = x + self.attention(self.norm(x), cos, sin)
        return x + self.mlp(x)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x, cos, sin):
        for block in self.blocks:
            x = block(x, cos, sin)
        return x


def _inputs(rows: int = 5) -> dict[str, torch.Tensor]:
    return {"x": torch.randn(2, rows, 64), "cos": torch.randn(1, rows, 16), "sin": torch.randn(1, rows, 16)}


def test_verify_checks_each_kind_of_layer_once_and_changes_nothing():
    model = Model().eval()
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    checks = kw.verify(model, kw.plan(model, {"Linear": "none"}), _inputs())
    assert checks.ok, str(checks)
    assert {check.layer for check in checks.checks} == {
        "blocks.0.norm", "blocks.0.attention.rotary_pos_emb", "blocks.0.mlp"
    }  # fmt: skip
    assert {check.paths for check in checks.checks if check.layer == "blocks.0.norm"} == {
        ("blocks.0.norm", "blocks.1.norm")
    }
    assert {check.modes for check in checks.checks} == {("inference", "training")}
    assert {name: dict(module.__dict__) for name, module in model.named_modules()} == before
    assert all(parameter.grad is None for parameter in model.parameters())


def test_progress_is_told_check_by_check_or_drawn(monkeypatch, capsys):
    model = nn.Sequential(gallery.Norm(), gallery.MLP())
    told: list[Check] = []
    plan = kw.plan(model, {"Linear": "none"})
    checks = kw.verify(model, plan, progress=told.append)
    assert tuple(told) == checks.checks
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    kw.verify(model, plan, progress=True)
    drawn = capsys.readouterr()
    assert "0/2" in drawn.err
    assert "1/2" in drawn.err
    assert "builtin:SwiGLUMLP on 1" in drawn.err
    assert drawn.out == ""


def test_compiled_calls_are_checked_where_that_is_asked_for():
    checks = kw.verify(nn.Sequential(gallery.Norm()), compile=True)
    assert [check.status for check in checks.checks if check.case == "compile"] == ["passed"]
    assert checks.ok, str(checks)


def test_while_layers_are_checked_other_threads_see_nothing_of_it():
    """Default dtype, deterministic algorithms and random numbers belong to the whole process."""
    seen: set[tuple[Any, ...]] = set()
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            state = hash(torch.get_rng_state().numpy().tobytes())
            seen.add((torch.ones(1).dtype, str(settings()), torch.empty(3).isnan().all().item(), state))

    model = nn.Sequential(gallery.Norm(), gallery.MLP())
    threads = torch.get_num_threads()
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        checks = kw.verify(model)
    finally:
        done.set()
        watcher.join()
    assert checks.ok, str(checks)
    assert torch.get_num_threads() == threads
    assert len({(dtype, found, state) for dtype, found, _, state in seen}) == 1, seen


def test_checks_print_and_survive_json():
    model = nn.Sequential(gallery.Norm())
    checks = kw.verify(model)
    data = json.loads(json.dumps(checks.to_json(), allow_nan=False))
    assert data.pop("ok") is True
    assert from_json(Checks, data) == checks
    assert "builtin:RMSNorm" in str(checks)


def test_layers_of_another_option_are_checked_apart():
    model = nn.Sequential(gallery.Norm(), gallery.Norm(), gallery.Norm(eps=1e-5))
    groups = group(model, kw.plan(model))
    assert [found.paths for found in groups] == [("0", "1"), ("2",)]


def test_a_fault_fails_and_the_table_says_what(as_kernel):
    module = gallery.Norm()
    decided, _ = decision(module, as_kernel(faults_in_values.IgnoresWeight))
    checks = Checks(Target("cpu"), tuple(checks_of(decided, module)))
    assert not checks.ok
    worst = checks.failures[0]
    assert (worst.what, worst.status) == ("output 0", "wrong_values")
    assert len(worst.place) == 3
    assert float(worst.got) != float(worst.expected)
    assert worst.ratio > 1000
    assert "wrong_values" in str(checks)
    assert "times what is allowed" in str(checks)


def test_what_a_layer_is_given_is_captured_with_its_strides_and_within_a_bound():
    model = Model().eval()
    groups = group(model, kw.plan(model))
    inputs = _inputs(rows=50)
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    samples = capture(model, groups, inputs, rows=8)
    assert {name: dict(module.__dict__) for name, module in model.named_modules()} == before
    assert torch.equal(samples["blocks.0.norm"].arguments["hidden_states"], inputs["x"][:, :8])
    rotary = samples["blocks.0.attention.rotary_pos_emb"].arguments
    assert rotary["q"].shape == (2, 4, 8, 16)
    assert rotary["q"].stride()[-2:] == (64, 1)  # a transposed view, as the layer makes it
    assert rotary["q"].untyped_storage().nbytes() == 2 * 4 * 8 * 16 * 4  # what was cut off is not kept
    assert rotary["cos"].shape == (1, 8, 16)
    assert capture(model, groups, inputs, memory=10) == {}
    some = capture(model, groups, inputs, rows=8, memory=5000)
    assert set(some) == {"blocks.0.norm"}


class WithLoss(Model):
    """Returns what transformers' models do where they are given labels: the mean over many tokens, so small gradients."""

    def forward(self, x, cos, sin, labels=None):
        hidden = super().forward(x, cos, sin)
        loss = None if labels is None else (hidden - labels).pow(2).mean() * 1e-6
        return {"loss": loss, "hidden": hidden}


def test_the_gradients_of_the_models_own_loss_are_captured():
    model = WithLoss().eval()
    groups = group(model, kw.plan(model))
    inputs = _inputs(rows=50) | {"labels": torch.randn(2, 50, 64)}
    wanted: dict[str, torch.Tensor] = {}
    hooks = [
        module.register_full_backward_hook(lambda module, _, grads, path=path: wanted.update({path: grads[0]}))
        for path, module in model.named_modules()
        if path in ("blocks.0.norm", "blocks.0.mlp")
    ]
    model(**inputs)["loss"].backward()
    for hook in hooks:
        hook.remove()
    model.zero_grad(set_to_none=True)
    samples = capture(model, groups, inputs, rows=8)
    assert all(parameter.grad is None for parameter in model.parameters())
    for path, gradient in wanted.items():
        (found,) = samples[path].upstream
        torch.testing.assert_close(found, gradient[:, :8])
    q, k = samples["blocks.0.attention.rotary_pos_emb"].upstream
    assert q.shape == k.shape == (2, 4, 8, 16)
    assert float(q.abs().max()) > 0
    assert all(sample.upstream == () for sample in capture(model, groups, _inputs()).values())


def test_a_backward_that_loses_small_gradients_is_rejected_on_those_of_a_real_loss(as_kernel):
    model = WithLoss()
    decided, norm = decision(model.blocks[0].norm, as_kernel(faults_in_gradients.FlushesSmallGradients))
    assert not any(check.failed for check in checks_of(decided, norm))  # made gradients are not small
    (found,) = [d for d in kw.plan(model).decisions if d.layer.path == "blocks.0.norm" and d.mode == "training"]
    plan = Plan(Target("cpu"), (dataclasses.replace(found, kernel=decided.kernel),))
    samples = capture(model, group(model, plan), _inputs() | {"labels": torch.randn(2, 5, 64)})
    own = own_code(norm, decided.layer)
    failed = [
        c for c in check_kernel(decided, own, samples["blocks.0.norm"], options=Options(isolate=False)) if c.failed
    ]
    assert [(check.case, check.status) for check in failed] == [("the model's gradients", "wrong_gradient")]


class Keeps(nn.Module):
    """Writes to an object that it is given, as attention does to its cache of keys."""

    def forward(self, x, kept):
        kept.append(x * 2)
        return sum(kept)


def test_objects_that_a_layer_writes_to_are_captured_as_they_were_and_copied_for_each_call(as_kernel):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.keeps = Keeps()

        def forward(self, x):
            return self.keeps(x, kept=[torch.ones(3, 4)])

    kw.register_layer(Keeps, "Keeps")
    model = Model()
    decided, _ = decision(model.keeps, as_kernel(Keeps))
    plan = Plan(Target("cpu"), tuple(kw.plan(model, {"Keeps": "none"}, device="cpu").decisions[:1]))
    plan = Plan(Target("cpu"), (dataclasses.replace(plan.decisions[0], kernel=decided.kernel),))
    sample = capture(model, group(model, plan), torch.randn(3, 4))["keeps"]
    assert len(sample.arguments["kept"]) == 1
    own = own_code(model.keeps, decided.layer)
    first = next(check_kernel(decided, own, sample, options=Options(isolate=False)))
    assert first.status == "passed", str(first)
    assert len(sample.arguments["kept"]) == 1


def test_a_layer_whose_own_code_fails_on_made_inputs_is_one_line_and_no_evidence(as_kernel):
    class Picky(nn.Module):
        def forward(self, x):
            raise RuntimeError("not these inputs")

    kw.register_layer(Picky, "Picky")
    decided, module = decision(Picky(), as_kernel(Picky))
    (check,) = checks_of(decided, module)
    assert check.status == "skipped"
    assert "not these inputs" in check.detail


@pytest.mark.parametrize(
    "around",
    [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16), lambda: torch.device("meta")],
    ids=["no_grad", "inference_mode", "autocast", "default device"],
)
def test_what_is_seen_does_not_depend_on_what_the_user_does_around(around, as_kernel):
    """The worker knows nothing of it, so that own code and kernel would be seen in different ways."""
    decided, module = decision(gallery.MLP(), as_kernel(faults_in_values.SwapsGateAndUp))
    layer, call = decided.layer, own_call(decided.layer, own_code(module, decided.layer))
    seen = []
    for surroundings in (nullcontext, around):
        with surroundings():
            sample = _made(layer, module, "inference", 0)
            found = {
                case.name: case
                for case in cases(layer, sample, "inference", generator=torch.Generator().manual_seed(0))
            }
            names = ("as given", "another call in between", "no gradients", "random weights", "width 577")
            seen.append([observe(call, found[name], wide=wide) for name in names for wide in (False, True)])
            grown = growth(call, found["as given"])
        assert grown[1] > 0
    for one, other in zip(*seen, strict=True):
        assert all(map(torch.equal, one.outputs, other.outputs))
        assert one.gradients.keys() == other.gradients.keys()
        assert all(torch.equal(gradient, other.gradients[name]) for name, gradient in one.gradients.items())


def test_running_means_are_as_they_were_after_a_capture():
    model = nn.Sequential(nn.BatchNorm1d(48), gallery.Norm()).train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    capture(model, group(model, kw.plan(model)), torch.randn(8, 48))
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_buffers_and_counts_that_the_model_exchanges_are_as_they_were_after_a_capture():
    class Counts(gallery.Norm):
        def __init__(self) -> None:
            super().__init__()
            self.calls, self.seen = 0, 0.0
            self.register_buffer("mean", torch.zeros(48))

        def forward(self, x):
            self.calls, self.seen = self.calls + 1, float(x.shape[0])
            self.mean = self.mean * 0.9 + x.mean(0) * 0.1
            return super().forward(x)

    model = nn.Sequential(Counts(), gallery.Norm())
    mean = model[0].mean
    capture(model, group(model, kw.plan(model)), torch.randn(8, 48))
    assert (model[0].calls, model[0].seen) == (0, 0.0)
    assert model[0].mean is mean
    assert not mean.any()


class WrongBeyondFar(nn.Module):
    def forward(self, hidden_states):
        y = gallery.rms_norm(hidden_states, self.weight, self.variance_epsilon)
        return torch.cat((y.flatten()[: _cases.FAR], y.flatten()[_cases.FAR :] * 0)).view_as(y)


def on_repeated_rows(kernel, as_kernel, monkeypatch) -> Check:
    """Check the case of very many elements, of which there are 2^15 here."""
    monkeypatch.setattr(_cases, "FAR", 1 << 15)
    decided, module = decision(gallery.Norm(), as_kernel(kernel))
    sample = _made(decided.layer, module, "inference", 0)
    case = beyond(decided.layer, sample, "inference")
    assert case.copies * sample.arguments["hidden_states"].numel() > 1 << 15
    runner = Here(decided.layer, decided.kernel, "inference")
    base = Check("0", ("0",), "k", ("inference",), "", "passed")
    return _one_case(runner, own_call(decided.layer, own_code(module, decided.layer)), case, base)


@pytest.mark.parametrize(("kernel", "status"), [(gallery.Good, "passed"), (WrongBeyondFar, "wrong_values")])
def test_what_is_wrong_beyond_so_many_elements_is_found_on_repeated_rows(kernel, status, as_kernel, monkeypatch):
    check = on_repeated_rows(kernel, as_kernel, monkeypatch)
    assert check.status == status, str(check)


def test_where_rows_cannot_be_repeated_for_lack_of_memory_nothing_is_held_against_the_kernel(as_kernel, monkeypatch):
    def repeat(tensor, *times):
        raise torch.OutOfMemoryError("another process has taken it")

    monkeypatch.setattr(torch.Tensor, "repeat", repeat)
    check = on_repeated_rows(gallery.Good, as_kernel, monkeypatch)
    assert (check.status, check.failed) == ("skipped", False), str(check)


def test_two_small_inputs_are_no_leak(as_kernel):
    class Two(nn.Module):
        def forward(self, a, b):
            return a + b

    kw.register_layer(Two, "Sum")
    decided, module = decision(Two(), as_kernel(Two))
    own = own_code(module, decided.layer)
    sample = Sample({"a": torch.randn(3, 4), "b": torch.randn(3, 4)}, module)
    for _ in range(5):
        checks = {c.case: c.status for c in check_kernel(decided, own, sample, options=Options(isolate=False))}
        assert checks["many calls"] == "passed"


def test_a_model_on_meta_is_checked_layer_by_layer_with_weights_made_for_it():
    with torch.device("meta"):
        model = nn.Sequential(gallery.Norm(), gallery.MLP())
    checks = kw.verify(model, kw.plan(model, device="cpu"))
    assert checks.ok, str(checks)
    assert all(parameter.is_meta for parameter in model.parameters())
    with pytest.raises(kw.PlanError, match="meta"):
        kw.verify(model, kw.plan(model, device="cpu"), torch.zeros(1))


def test_a_plan_for_another_machine_cannot_be_checked():
    model = nn.Sequential(gallery.Norm())
    with pytest.raises(kw.PlanError, match="described, not loaded"):
        kw.verify(model, kw.plan(model, target=Target("cuda", "sm_90")))


def test_a_layer_without_inputs_is_no_evidence(as_kernel):
    class Two(nn.Module):
        def forward(self, a, b):
            return a + b

    kw.register_layer(Two, "Two")
    model = nn.Sequential(Two())
    decided, _ = decision(model[0], as_kernel(Two))
    checks = kw.verify(model, Plan(Target("cpu"), (decided,)))
    assert [check.status for check in checks.checks] == ["skipped"]
    assert not checks.ok
    assert "pass inputs" in str(checks)
    assert not checks.failures


def test_an_honest_property_is_a_mark_and_no_fault(as_kernel):
    class Order(nn.Module):
        """Adds the rows' contributions in an order that depends on how many there are, and never in the same."""

        def forward(self, hidden_states):
            calls = gallery.STALE["calls"] = gallery.STALE.get("calls", 0) + 1
            y = gallery.rms_norm(hidden_states, self.weight, self.variance_epsilon)
            return y * (1 + 1.2e-7 * (calls % 3 == 0))

    module = gallery.Norm()
    decided, _ = decision(module, as_kernel(Order))
    checks = list(checks_of(decided, module))
    assert [str(check) for check in checks if check.failed] == []
    assert "results differ between calls" in {mark for check in checks for mark in check.marks}


def test_a_kernel_may_refuse_a_width_that_the_model_does_not_have_but_not_compute_it_wrongly(as_kernel):
    class Refuses(nn.Module):
        def forward(self, hidden_states):
            if hidden_states.shape[-1] % 8:
                raise ValueError("the width must be a multiple of 8")
            return gallery.rms_norm(hidden_states, self.weight, self.variance_epsilon)

    decided, module = decision(gallery.Norm(), as_kernel(Refuses))
    checks = {check.case: check for check in checks_of(decided, module)}
    assert checks["width 33"].status == "skipped"
    assert "multiple of 8" in checks["width 33"].detail
    assert checks["many rows"].status == "passed"
    assert not any(check.failed for check in checks.values())


def test_a_check_refuses_nonsense():
    fields: dict[str, Any] = {"layer": "a", "paths": ("a",), "kernel": "k", "modes": ("inference",), "case": "c"}
    with pytest.raises(ValueError, match="cannot pass"):
        Check(**fields, status="passed", error=2.0, allowed=1.0)
    with pytest.raises(ValueError, match="a status is one of"):
        Check(**fields, status="fine")
    assert {"passed", "timed_out"} < set(STATUSES)


def test_captured_inputs_are_what_is_checked(as_kernel):
    class WrongFromFive(nn.Module):
        def forward(self, hidden_states):
            y = gallery.rms_norm(hidden_states, self.weight, self.variance_epsilon)
            return y + (hidden_states > 1000).to(y.dtype)

    module = gallery.Norm()
    decided, _ = decision(module, as_kernel(WrongFromFive))
    own = own_code(module, decided.layer)
    assert not any(check.failed for check in checks_of(decided, module))
    groups = group(nn.Sequential(module), Plan(Target("cpu"), (decided,)))
    samples = capture(nn.Sequential(module), groups, torch.randn(1, 4, 48) * 3000)
    found = next(c for c in check_kernel(decided, own, samples["0"], options=Options(isolate=False)) if c.failed)
    assert (found.case, found.status) == ("as given", "wrong_values")
