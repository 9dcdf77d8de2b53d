"""`kernelize(..., verify="auto")`: nothing of others goes in unproven, and a proof is asked for once."""

from __future__ import annotations

import json
import time

import checking  # noqa: F401  (names the layers of the gallery)
import gallery
import pytest
import torch
from proving import LAYERS, another_process
from torch import nn

import kernelwise as kw
from kernelwise._data import Check, Kernel, KernelRef, from_json
from kernelwise._reporting._report import Report
from kernelwise._verifying import _prove, _verify, _worker

pytestmark = pytest.mark.usefixtures("empty_cache", "few_sizes")


@pytest.fixture
def checked(monkeypatch) -> list[tuple[str, ...]]:
    """The paths of every check that is made, in order."""
    found: list[tuple[str, ...]] = []
    real = _prove.check_group

    def noted(model, group, *args):
        found.append(group.paths)
        return real(model, group, *args)

    monkeypatch.setattr(_prove, "check_group", noted)
    return found


def test_a_kernel_that_is_wrong_does_not_go_in(repository):
    model = nn.Sequential(gallery.Norm(), gallery.Norm())
    before = [dict(module.__dict__) for module in model.modules()]
    mapping = {"RMSNorm": f"{repository}:Wrong"}
    with pytest.raises(
        kw.PlanError, match=r"not put into 0 and 1 more\n.*as given: wrong_values.*\n.*asked by"
    ) as found:
        kw.kernelize(model, mapping)
    assert "verify=False puts the kernel in unproven" in str(found.value)
    assert [dict(module.__dict__) for module in model.modules()] == before
    with pytest.raises(kw.PlanError, match="wrong_values"), kw.kernelized(model, mapping):
        pass
    assert [dict(module.__dict__) for module in model.modules()] == before
    kw.kernelize(model, mapping, on_miss="keep")
    assert "own code" in str(kw.report(model))
    assert "not proven" in str(kw.report(model))
    kw.unkernelize(model)
    x = torch.randn(2, 48)
    expected = model(x)
    kw.kernelize(model, mapping, verify=False)  # the user's own word
    assert not torch.allclose(model(x), expected, atol=0.5)


def test_a_proof_is_remembered_until_the_kernel_changes(repository, monkeypatch, tmp_path, checked):
    mapping = {"RMSNorm": f"{repository}:Right"}
    for _ in range(2):
        kw.kernelize(nn.Sequential(gallery.Norm(), gallery.Norm()), mapping)
        another_process(monkeypatch)
    assert checked == [("0", "1")]
    (proof,) = (tmp_path / "cache" / "proofs").iterdir()
    assert {check["status"] for check in json.loads(proof.read_text())} <= {"passed", "skipped"}
    kw.kernelize(nn.Sequential(gallery.Norm()), mapping)
    proof.unlink()
    kw.kernelize(nn.Sequential(gallery.Norm()), mapping)  # this process knows it without the disk
    assert len(checked) == 1
    file = repository / "build" / "torch-universal" / "layers.py"
    file.write_text(LAYERS + "\n# another version\n")
    kw.kernelize(nn.Sequential(gallery.Norm()), mapping)
    assert len(checked) == 2


def test_what_the_time_does_not_suffice_for_is_not_proven(repository, monkeypatch, checked):
    monkeypatch.setattr(_prove, "SECONDS", 0.0)
    mapping, model = {"RMSNorm": f"{repository}:Right"}, nn.Sequential(gallery.Norm())
    with pytest.raises(kw.PlanError, match=r"within 0 s \(0 cases passed\)(.|\n)*verify=False"):
        kw.kernelize(model, mapping)
    kw.kernelize(model, mapping, on_miss="keep")
    assert kw.report(model).rows[0].kernel is None
    assert len(checked) == 2  # a machine that was busy says nothing about the next time
    kw.verify(model, kw.plan(nn.Sequential(gallery.Norm()), mapping))  # takes its time, and counts
    kw.kernelize(model, mapping)
    assert {row.proof for row in kw.report(model).rows} == {"proven"}


def test_what_cannot_be_checked_is_not_proven_until_inputs_are_given(repository, monkeypatch):
    class Two(nn.Module):
        def forward(self, a, b):
            return a + b

    kw.register_layer(Two, "TwoInputs")
    model = nn.Sequential(Two())
    mapping = {"TwoInputs": f"{repository}:TwoInputs"}
    with pytest.raises(kw.PlanError, match=r"no inputs could be made for it(.|\n)*verify=False"):
        kw.kernelize(model, mapping, device="cpu")
    model.forward = lambda x: model[0](x, x * 2)
    assert kw.verify(model, kw.plan(model, mapping, device="cpu"), torch.randn(3, 4)).ok
    kw.kernelize(model, mapping, device="cpu")
    another_process(monkeypatch)
    kw.kernelize(model, mapping, device="cpu")


def test_a_config_can_say_it_too_and_true_overrules_it(repository, checked):
    config = kw.KernelConfig({"RMSNorm": f"{repository}:Right"}, verify=False)
    kw.kernelize(nn.Sequential(gallery.Norm()), config)
    with kw.kernelized(nn.Sequential(gallery.Norm()), config):
        pass
    assert checked == []
    kw.kernelize(nn.Sequential(gallery.Norm()), config, verify=True)
    assert checked == [("0",)]


def test_the_report_says_what_is_proven(repository):
    model = nn.Sequential(gallery.Norm(), gallery.Norm(96), gallery.MLP())
    mapping = {"RMSNorm@0": f"{repository}:Right", "RMSNorm@1": f"{repository}:Wrong"}
    kw.kernelize(model, kw.KernelConfig({"RMSNorm@0": f"{repository}:Right", "Linear": "none"}))
    kw.kernelize(model, kw.KernelConfig({"RMSNorm@1": f"{repository}:Wrong"}, inherit_mapping=False), verify=False)
    report = kw.report(model)
    proofs = {row.path: row.proof for row in report.rows if row.name != "Linear"}
    assert proofs == {"0": "proven", "1": "unproven (verify=False)", "2": "builtin"}
    assert from_json(Report, json.loads(json.dumps(report.to_json()))) == report
    for said in ("proof", "proven", "unproven (verify=False)", "builtin"):
        assert said in str(report)
    other = kw.apply(model := nn.Sequential(gallery.Norm(), gallery.Norm(96)), kw.plan(model, mapping))
    assert {row.path: row.proof for row in kw.report(other).rows} == {"0": "proven", "1": "unproven (apply)"}


def test_builtin_kernels_ship_with_their_proof(monkeypatch):
    monkeypatch.setattr(_prove, "check_group", lambda *a: pytest.fail("it was checked"))
    monkeypatch.setattr(_worker.Worker, "start", lambda self: pytest.fail("a process was started"))
    model = kw.kernelize(nn.Sequential(gallery.Norm()), verify="auto")
    assert "builtin:RMSNorm" in str(kw.report(model))


@pytest.mark.parametrize("verify", ["always", None, 1, 0])
def test_verify_is_auto_or_a_bool(verify):
    with pytest.raises(kw.PlanError, match="verify is"):
        kw.kernelize(nn.Sequential(gallery.Norm()), verify=verify)


@pytest.mark.parametrize("left", ["", "[]", "{}", "not json", '[{"layer": 1}]'])
def test_a_file_that_holds_no_checks_is_no_proof(left, repository, tmp_path, monkeypatch, checked):
    mapping = {"RMSNorm": f"{repository}:Right"}
    kw.kernelize(nn.Sequential(gallery.Norm()), mapping)
    (proof,) = (tmp_path / "cache" / "proofs").iterdir()
    proof.write_text(left)
    another_process(monkeypatch)
    model = nn.Sequential(gallery.Norm())
    assert set(dict(_prove.recall(model, kw.plan(model, mapping)).proofs).values()) == {"unproven (apply)"}
    kw.kernelize(model, mapping)
    assert len(checked) == 2


def test_a_request_ends_when_the_time_for_all_is_up(repository, monkeypatch):
    monkeypatch.setattr(_prove, "SECONDS", 3.0)
    start = time.monotonic()
    with pytest.raises(kw.PlanError, match=r"within 3 s"):
        kw.kernelize(nn.Sequential(gallery.Norm()), {"RMSNorm": f"{repository}:Slow"})
    assert time.monotonic() - start < 30  # a request alone may take 60


def test_what_failed_for_want_of_memory_is_tried_again(repository, tmp_path):
    mapping, full = {"RMSNorm": f"{repository}:FullOnce"}, tmp_path / "cache.full"
    full.write_text("")
    with pytest.raises(kw.PlanError, match="out_of_memory"):
        kw.kernelize(nn.Sequential(gallery.Norm()), mapping)
    full.unlink()
    kw.kernelize(nn.Sequential(gallery.Norm()), mapping)


def test_random_numbers_go_on_where_they_were(repository):
    model, mapping = nn.Sequential(gallery.Norm()), {"RMSNorm": f"{repository}:Right"}
    torch.manual_seed(1234)
    before = torch.get_rng_state()
    kw.kernelize(model, mapping)
    kw.unkernelize(model)
    kw.verify(model, None, torch.randn(2, 48, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_layer_of_layers_with_a_kernel_of_others_is_not_said_to_be_right(repository):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, vocab_size=64, **sizes)).eval()
    (name,) = {layer.name for layer in kw.discover(model) if layer.path == "model.layers.0"}
    config = kw.KernelConfig({name: f"{repository}:OtherDecoder"}, inherit_mapping=False)
    checks = kw.verify(model, kw.plan(model, config), {"input_ids": torch.randint(0, 64, (1, 8))})
    assert not checks.ok
    assert {check.status for check in checks.checks} == {"skipped"}
    with pytest.raises(kw.PlanError, match="could not be checked"):
        kw.kernelize(model, config)


@pytest.mark.parametrize(
    ("statuses", "each_s", "taken", "done"),
    [
        (["passed", "passed"], 0, 2, True),
        (["passed", "wrong_values", "passed"], 0, 2, True),  # one that failed is enough
        (["passed", "timed_out", "passed"], 0, 2, True),  # the time of one case was up
        (["passed", "passed", "passed"], 3, 2, False),  # the time of all is up after the second
        (["passed", "timed_out"], 5, 1, False),  # it was that of all that was up: nothing is known of this case
    ],
)
def test_checks_are_taken_until_one_is_enough_or_the_time_is_up(statuses, each_s, taken, done, monkeypatch):
    now, seen = 0.0, []
    worker = _worker.Worker(Kernel(KernelRef("path", "/somewhere", "Layer")), "cpu")
    monkeypatch.setattr(_verify.time, "monotonic", lambda: now)

    def running():
        nonlocal now
        try:
            for status in statuses:
                seen.append(worker.until)
                now += each_s
                yield Check("0", ("0",), "", ("inference",), "a case", status)
        finally:
            seen.append("closed")

    going = running()
    checks, was_done = _verify.checks_within(going, worker, 5.0, lambda check: check.failed)
    assert ([check.status for check in checks], was_done) == (statuses[:taken], done)
    assert set(seen[:-1]) == {5.0}
    assert seen[-1] == "closed"
    assert worker.until is None
