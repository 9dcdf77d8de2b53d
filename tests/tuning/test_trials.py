"""What is known of candidates: checked at the size that they are for, remembered in a form that holds, and then let go of."""

from __future__ import annotations

import gc
import json
import time
import weakref
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from planted import FAST, TanhNorm, write
from torch import nn

import kernelwise as kw
from kernelwise._data import Check
from kernelwise._evidence import EAGER, Candidate, Comparison, Run, Timing
from kernelwise._measuring._workload import workloads_of
from kernelwise._reference import read_reference
from kernelwise._tuning import _races, _trials
from kernelwise._tuning._candidates import kinds_of
from kernelwise._tuning._shares import Share
from kernelwise._tuning._trials import Trials
from kernelwise._verifying import _capture, _cases, _prove

KERNELS = f"""{FAST}

class WrongLarge(nn.Module):
    def forward(self, hidden_states):
        out = norm(hidden_states, self.weight, self.variance_epsilon)
        return out * 1.02 if hidden_states.numel() > 2000 * 48 else out
"""


def model_of_one_norm() -> nn.Module:
    return nn.Sequential(TanhNorm()).eval()


@pytest.fixture(autouse=True)
def surroundings(empty_cache: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cases, "_SIZES", ())
    monkeypatch.setattr(_cases, "_MANY_ROWS", {**_cases._MANY_ROWS, "S": 101})
    monkeypatch.setattr(_trials, "TIMING_S", 0.1)
    monkeypatch.setattr(_races, "MOST_S", 1.0)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(tmp_path_factory.mktemp("kernels") / "planted", KERNELS)


@pytest.fixture
def prover() -> Iterator[_prove.Prover]:
    with _prove.Prover() as found:
        yield found


def trials(model: nn.Module, x: torch.Tensor, prover: _prove.Prover, seconds: float = 100.0) -> Trials:
    layers, workloads = kw.discover(model), workloads_of(model, x, None)
    kinds = kinds_of(model, layers, ("inference",))
    shares = {(one.name, kind.key): Share(calls=1) for one in workloads for kind in kinds}
    target = kw.plan(model, mode="inference").target
    return Trials(model, target, workloads, kinds, prover, ["here"], time.monotonic() + seconds, shares)


def tried(given: Trials, text: str) -> Candidate:
    ref = read_reference(text)[0]
    assert ref is not None
    return given.candidate(given.kinds[0], ref)


def proof(model: nn.Module, text: str) -> str:
    """What a plan says of a kernel's proof, when nobody checks it."""
    plan = _prove.recall(model, kw.plan(model, {"TanhNorm": text}, mode="inference"))
    return dict(plan.proofs)[text]


# --------------------------------------------------------------------------------------------------------------- checking


def test_a_kernel_that_is_wrong_at_the_size_of_the_model_only_is_out(repository, prover):
    model, x = model_of_one_norm().bfloat16(), torch.randn(8, 500, 48).bfloat16()
    kw.unkernelize(kw.kernelize(model, {"TanhNorm": f"{repository}:WrongLarge"}, mode="inference"))
    assert proof(model, f"{repository}:WrongLarge") == _prove.PROVEN, "on inputs that were made"
    found = tried(trials(model, x, prover), f"{repository}:WrongLarge")
    assert "on all that the layer is given in forward" in (found.out or "")
    assert "wrong_values" in (found.out or "")
    assert found.timings == ()
    for forget in (dict, _prove._remembered.clear):  # in this process, and in the next one
        forget()
        assert proof(model, f"{repository}:WrongLarge") == _prove.NOT_ASKED
        with pytest.raises(kw.PlanError, match="it is not proven: as given: wrong_values"):
            kw.kernelize(model, {"TanhNorm": f"{repository}:WrongLarge"}, mode="inference")
    found = tried(trials(model, x, prover), f"{repository}:Fast")
    assert found.out is None
    assert len(found.timings) == 1
    assert proof(model, f"{repository}:Fast") == _prove.PROVEN


def test_what_does_not_fit_in_memory_as_float64_is_skipped_with_the_reason(repository, prover, monkeypatch):
    monkeypatch.setattr(_trials, "_free_memory", lambda: 1 << 20)
    model, x = model_of_one_norm(), torch.randn(8, 500, 48)
    found = tried(trials(model, x, prover), f"{repository}:Fast")
    assert "skipped, as float64 of it takes about" in (found.out or "")
    assert tried(trials(model, x[:1, :8], prover), f"{repository}:Fast").out is None  # all of it was checked before


# ------------------------------------------------------------------------------------------------------------- remembered


def test_spoilt_results_are_measured_again(tmp_path, prover):
    model, x = nn.Sequential(nn.LayerNorm(64)).eval(), torch.randn(4, 8, 64)
    course = _races.Course(
        model,
        kw.discover(model),
        ("inference",),
        workloads_of(model, x, None),
        "cpu",
        "here",
        {},
        0.0,
        lambda what: None,
    )
    for _ in range(2):
        assert len(tried(trials(model, x, prover), "builtin:torch:LayerNorm").timings) == 1
        assert [run.error for run in _races.race_all(course, {EAGER: None, "builtin": kw.KernelConfig()})] == [None] * 2
        files = [*(tmp_path / "cache" / "results").glob("*.json")]
        assert len(files) == 3
        for file in files:
            file.write_text(json.dumps({**json.loads(file.read_text()), "value": {}}))


UNCLEAR = Comparison(2.0, 1.9, 1.05, 0.9, 1.2, 20)
CLEAR = replace(UNCLEAR, low=1.04, high=1.06)
SHORT = replace(CLEAR, rounds=5)


@pytest.mark.parametrize(("found", "times"), [(UNCLEAR, 2), (SHORT, 2), (CLEAR, 1)])
def test_a_timing_in_a_hurry_is_taken_again_where_there_is_twice_the_time(
    found, times, repository, prover, monkeypatch
):
    measured: list[float] = []

    def measure(model, group, sample, kernel, *, mode, workload, seconds, calls, hide_starts):
        measured.append(seconds)
        return Timing(group.decision.layer.path, group.paths, str(kernel.ref), mode, workload, found, calls)

    def checked(model, group, sample, options, worker):
        yield Check(group.decision.layer.path, group.paths, "", group.modes, "as given", "passed")

    monkeypatch.setattr(_trials, "measure_group", measure)
    monkeypatch.setattr(_trials, "check_group", checked)
    for seconds in (0.1, 0.15, 0.3, 0.35):
        monkeypatch.setattr(_trials, "TIMING_S", seconds)
        assert tried(trials(model_of_one_norm(), torch.randn(2, 8, 48), prover), f"{repository}:Fast").out is None
    assert measured == [0.1, 0.3][:times]


@pytest.mark.parametrize(
    ("mode", "device_bound", "hidden"),
    [("inference", (), False), ("inference", ("forward",), True), ("inference+compile", (), True)],
)
def test_starting_a_kernel_counts_where_a_model_waits_for_it(
    mode, device_bound, hidden, repository, prover, monkeypatch
):
    seen: list[bool] = []

    def measure(model, group, sample, kernel, *, mode, workload, seconds, calls, hide_starts):
        seen.append(hide_starts)
        return "not timed"

    monkeypatch.setattr(_trials, "measure_group", measure)
    given = replace(trials(model_of_one_norm(), torch.randn(2, 8, 48), prover), device_bound=device_bound)
    kind = replace(given.kinds[0], mode=mode)
    kernel = given.load(read_reference(f"{repository}:Fast")[0], "cpu")
    sample = given._samples(given.workloads[0], whole=True)[kind.layer.path]
    assert given._time(kind, kernel, given.workloads[0], sample) == "not timed"
    assert seen == [hidden]


@pytest.mark.parametrize(("found", "times"), [(UNCLEAR, 2), (SHORT, 2), (CLEAR, 1)])
def test_a_race_in_a_hurry_is_run_again_where_there_is_twice_the_time(found, times, monkeypatch):
    raced: list[float] = []

    def race(contenders, workload, *, device, seconds, own=EAGER, begin):
        raced.append(seconds)
        for name in contenders:
            begin(name)
        return tuple(Run(name, workload.name, CLEAR if name == own else found) for name in contenders)

    monkeypatch.setattr(_races, "race", race)
    model = model_of_one_norm()
    workloads = workloads_of(model, torch.randn(2, 8, 48), None)
    told: list[str] = []
    for seconds in (1.0, 1.5, 3.0, 3.5):
        monkeypatch.setattr(_races, "MOST_S", seconds)
        until = time.monotonic() + 100
        course = _races.Course(
            model, kw.discover(model), ("inference",), workloads, "cpu", "here", {}, until, told.append
        )
        _races.race_all(course, {EAGER: None, "builtin": kw.KernelConfig()})
    assert raced == [1.0, 3.0][:times]
    firsts = [f"the whole model: forward, first {name}" for name in (EAGER, "builtin")]
    assert [what for what in told if "first" in what] == firsts * times


# ------------------------------------------------------------------------------------------------------------------- memory


def test_inputs_that_were_captured_are_let_go_of():
    """A function that is recorded is put in as kernels are, and the code that is compiled for those is remembered."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=50
    )
    model = transformers.LlamaForCausalLM(config).eval()
    kinds = kinds_of(model, kw.discover(model), ("inference",))
    assert any(kind.layer.function for kind in kinds)
    ids = torch.randint(50, (2, 8))
    samples = _capture.capture(model, [k.group() for k in kinds], {"input_ids": ids, "labels": ids}, rows=None)
    kept = [weakref.ref(v) for s in samples.values() for v in s.arguments.values() if isinstance(v, torch.Tensor)]
    assert kept
    del samples
    gc.collect()
    assert [ref for ref in kept if ref() is not None] == []
