"""Rivals of a tuned model: what is better than it is raced where that can be, and never kept quiet about."""

from __future__ import annotations

import functools
import time
from dataclasses import replace

import pytest
import torch
from torch import nn

import kernelwise as kw
from kernelwise._demo import _slower
from kernelwise._errors import PlanError
from kernelwise._evidence import EAGER, Comparison, Run, Tuning
from kernelwise._measuring import _contenders
from kernelwise._measuring._workload import Workload
from kernelwise._models import load_model
from kernelwise._reporting._page import page
from kernelwise._tuning import _races, _rivals, _session, _tune
from kernelwise._tuning._confirm import Confirmation
from kernelwise._tuning._races import Course

X = torch.randn(2, 8, 48)
SPEEDS = dict[str, dict[str, float | str]]  # by workload and contender; a string is why it fails


def ratio(speedup: float, spread: float = 0.01) -> Comparison:
    return Comparison(1e3, 1e3 / speedup, speedup, speedup * (1 - spread), speedup * (1 + spread), 20)


pytestmark = pytest.mark.usefixtures("empty_cache")


@pytest.fixture
def course() -> Course:
    model = nn.Sequential(nn.Linear(48, 48), nn.GELU()).eval()
    workloads = tuple(Workload(name, (X,)) for name in ("prefill", "decode"))
    took = dict.fromkeys(("prefill", "decode"), 0.001)
    until = time.monotonic() + 60
    layers = kw.discover(model)
    course = Course(model, layers, ("inference",), workloads, "cpu", [], took, until, lambda what: None)
    return replace(course, others=("torch.compile",))


def planted(monkeypatch: pytest.MonkeyPatch, speeds: SPEEDS) -> list[tuple[str, tuple[str, ...]]]:
    """Plant what races find, and return who will have been raced in which workload."""
    seen: list[tuple[str, tuple[str, ...]]] = []

    def race(contenders, workload, **options):
        seen.append((workload.name, tuple(contenders)))
        found = {name: speeds[workload.name].get(name, 1.0) for name in contenders}
        return tuple(
            Run(name, workload.name, None, 0, by) if isinstance(by, str) else Run(name, workload.name, ratio(by))
            for name, by in found.items()
        )

    monkeypatch.setattr(_races, "race", race)
    return seen


def faced(course: Course, tuned: dict[str, float], runs: tuple[Run, ...] = ()) -> tuple[Confirmation, Tuning]:
    found = Confirmation({}, [Run("tuned", workload, ratio(by)) for workload, by in tuned.items()] + [*runs])
    _rivals.face_rivals(course, found)
    workloads = tuple(workload.name for workload in course.workloads)
    return found, Tuning("m", kw.Target("cpu"), "latency", workloads, (), tuple(found.runs), best=found.best)


def test_where_a_rival_is_better_the_evidence_says_so_and_how_to_get_it(course, monkeypatch):
    seen = planted(monkeypatch, {"prefill": {"torch.compile": 1.5}, "decode": {"torch.compile": 1.4}})
    found, tuning = faced(course, {"prefill": 1.2, "decode": 1.3})
    assert seen == [(name, (EAGER, "torch.compile")) for name in ("prefill", "decode")]
    assert found.best == "torch.compile"
    (said,) = tuning.better()
    assert "torch.compile is better than the tuned config. Times as fast as the model's own code: " in said
    assert "1.50 in prefill (tuned 1.20), 1.40 in decode (tuned 1.30)" in said
    assert "torch.compile(model) runs it" in said
    assert said in str(tuning)
    assert said.partition(". Times")[0] in page(tuning)
    assert len(_slower(tuning)) == 2


def test_where_a_rival_is_better_in_one_workload_that_is_said_too(course, monkeypatch):
    planted(monkeypatch, {"prefill": {"torch.compile": 1.4}, "decode": {"torch.compile": 0.5}})
    found, tuning = faced(course, {"prefill": 1.2, "decode": 1.3})
    assert found.best == "tuned"
    (said,) = tuning.better()
    assert "is better than the tuned config in a part. " in said
    assert "in prefill" in said
    assert "decode" not in said


@pytest.mark.parametrize("rival", [1.2, 1.205, 1.0, "it fails"])
def test_where_none_is_better_nothing_is_said(course, monkeypatch, rival):
    planted(monkeypatch, {name: {"torch.compile": rival} for name in ("prefill", "decode")})
    found, tuning = faced(course, {"prefill": 1.2, "decode": 1.2})
    assert found.best == "tuned"
    assert tuning.better() == ()


def test_a_rival_that_failed_in_one_workload_is_not_best(course, monkeypatch):
    planted(monkeypatch, {"prefill": {"torch.compile": 9.0}, "decode": {"torch.compile": "its outputs differ"}})
    found, tuning = faced(course, {"prefill": 1.2, "decode": 1.3})
    assert found.best == "tuned"
    assert "9.00 in prefill" in tuning.better()[0]


def test_what_only_seems_better_is_said_to_seem_so(course, monkeypatch):
    planted(monkeypatch, {"prefill": {"torch.compile": 1.26}, "decode": {"torch.compile": 1.31}})
    found, tuning = faced(course, {"prefill": 1.24, "decode": 1.29})
    assert found.best == "torch.compile"
    assert "torch.compile seems better than the tuned config. " in tuning.better()[0]


def test_what_was_tuned_for_compile_is_best_where_it_is_and_is_not_raced_again(course, monkeypatch):
    seen = planted(monkeypatch, {"prefill": {}, "decode": {}})
    compiled = {"tuned+compile": 1.5, "torch.compile": 1.4}
    runs = tuple(Run(name, workload, ratio(by)) for name, by in compiled.items() for workload in ("prefill", "decode"))
    found, tuning = faced(course, {"prefill": 1.2, "decode": 1.3}, runs)
    assert seen == []
    assert found.best == "tuned+compile"
    assert any("The config holds it" in said and 'mode="inference+compile"' in said for said in tuning.better())


def test_torch_compile_is_best_where_it_is_though_nobody_asked_for_a_rival(course, monkeypatch):
    seen = planted(monkeypatch, {"prefill": {}, "decode": {}})
    compiled = {"torch.compile": 1.6, "tuned+compile": 1.5}
    runs = tuple(Run(name, workload, ratio(by)) for name, by in compiled.items() for workload in ("prefill", "decode"))
    found, tuning = faced(replace(course, others=()), {"prefill": 1.2, "decode": 1.3}, runs)
    assert seen == []
    assert found.best == "torch.compile"
    assert tuning.better()[0].startswith("torch.compile is better than the tuned config.")


def test_times_of_races_on_a_machine_that_changed_are_said_not_to_compare():
    at = {1.0: [], 1.2: [], 4.0: []}
    for slower in at:
        runs = [Run(name, "prefill", ratio(1.5)) for name in (EAGER, "builtin")]
        late = ratio(1.5)
        at[slower] = [*runs, Run("tuned", "prefill", replace(late, own_us=late.own_us * slower, us=late.us * slower))]
    assert _contenders.caveats(at[1.0]) == _contenders.caveats(at[1.2]) == ()
    (note,) = _contenders.caveats(at[4.0])
    assert note.startswith("in prefill the machine was not equally fast in all races")


def test_there_must_be_time_to_compile(course, monkeypatch):
    seen = planted(monkeypatch, {"prefill": {}, "decode": {}})
    late = replace(course, until=time.monotonic() + _races.COMPILE_S)
    found, _ = faced(late, {"prefill": 1.2, "decode": 1.3})
    assert seen == []
    assert found.best == "tuned"
    rivals = [run for run in found.runs if run.contender == "torch.compile"]
    assert [run.workload for run in rivals] == ["prefill", "decode"]
    assert all("kernelwise bench MODEL --contender torch.compile" in (run.error or "") for run in rivals)
    training = replace(course.workloads[0], name="training")
    once = _races.compile_seconds(course.model, course.workloads[0])
    assert once == _races.COMPILE_S + 2 * _races.COMPILE_LAYER_S, "for each layer without parts"
    assert _races.compile_seconds(course.model, training) == 2 * once


def test_a_rival_that_cannot_be_had_says_why(course, monkeypatch):
    planted(monkeypatch, {"prefill": {}, "decode": {}})
    monkeypatch.setattr(_contenders, "_reach_hub", lambda: pytest.fail("there is no model of transformers"))
    found, _ = faced(replace(course, others=("liger", "transformers")), {"prefill": 1.2, "decode": 1.3})
    errors = {run.contender: run.error for run in found.runs if run.comparison is None}
    assert "Triton, which runs on GPUs alone" in (errors["liger"] or "")
    assert "not a model of transformers" in (errors["transformers"] or "")


def test_torch_compile_is_a_rival_of_a_real_model(monkeypatch, fresh_compiler):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))  # building takes seconds
    monkeypatch.setattr(_tune, "NEGLIGIBLE", 2.0)  # of all layers: this is about the whole model
    monkeypatch.setattr(_races, "MOST_S", 0.2)
    monkeypatch.setattr(_races, "LEAST_S", 0.2)
    monkeypatch.setattr(_rivals, "MOST_S", 0.2)
    model = load_model("llama").model.to_empty(device="cpu").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02)
    ids = torch.randint(0, 100, (1, 16))
    before = dict(vars(model))
    config = kw.tune(model, ids, seconds=60, steps=4)
    assert config.evidence is not None
    ran = {(run.contender, run.workload): run for run in config.evidence.runs}
    for workload in ("prefill", "decode"):
        assert ran["torch.compile", workload].comparison is not None, ran["torch.compile", workload].error
        assert ran["tuned", workload].comparison is not None
    assert ran["tuned", "decode"].tokens == 4
    assert config.evidence.best in ("tuned", "torch.compile")
    assert any("static cache" in note for note in config.evidence.notes)
    assert list(dict.fromkeys(name for name, _ in ran))[:4] == [EAGER, "builtin", "tuned", "torch.compile"]
    assert vars(model) == before


@pytest.mark.parametrize(
    ("device", "given", "raced"),
    [
        ("cpu", None, ("torch.compile",)),
        ("cuda", None, ("torch.compile", "liger")),
        ("cuda", [], ()),
        ("cpu", ["eager"], ()),
        ("cpu", ["transformers", "torch.compile"], ("transformers", "torch.compile")),
    ],
)
def test_who_is_raced(monkeypatch, device, given, raced):
    monkeypatch.setattr(_session, "model_device", lambda model: device)
    monkeypatch.setattr(_session, "current_target", kw.Target)
    request = _session.Request("latency", None, kw.KernelConfig(), (), given, 16, 10, False, 60, None)
    assert _session.begin(nn.Sequential(nn.GELU()).eval(), X, request, lambda what, part: None).rivals == raced


@pytest.mark.parametrize("given", ["torch.compile", ["torch_compile"], ["mine"]])
def test_other_names_are_refused(given):
    with pytest.raises(PlanError, match=r"contenders is a list of some of torch\.compile, transformers, liger"):
        kw.tune(nn.Sequential(nn.GELU()).eval(), X, contenders=given)
