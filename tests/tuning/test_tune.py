"""Tuning: what is right and fast is chosen, what is not is out with its reason, and nothing measured is lost."""

from __future__ import annotations

import functools
import json
import time

import pytest
import torch
from planted import FAST, Model, SleepyNorm, X, of, races, ratio, write
from sorting import Sorting, register_sorting
from torch import nn

import kernelwise as kw
from kernelwise._cli import main
from kernelwise._errors import KernelConfigError, PlanError
from kernelwise._evidence import EAGER, OWN_CODE, Tuning, load
from kernelwise._register import unregister_op
from kernelwise._tuning import _races, _trials, _tune

pytestmark = pytest.mark.usefixtures("few_sizes", "one_cache")


@pytest.fixture(scope="module")
def tuned(repository, one_cache, few_sizes) -> kw.KernelConfig:
    """One tuning of a model with every kernel that is planted."""
    model = Model().eval()
    before = {name: (value, value.clone()) for name, value in model.state_dict(keep_vars=True).items()}
    modules = {path: dict(module.__dict__) for path, module in model.named_modules()}
    refs = [f"{repository}:{name}" for name in ("Wrong", "Slow", "Fast")]
    told: list[float] = []
    config = _tune.tune(
        model, X, candidates={"SleepyNorm": refs}, seconds=200, progress=lambda what, part: told.append(part)
    )
    assert told == sorted(told)
    assert told[-1] == 1.0
    for name, (value, copy) in before.items():
        assert model.state_dict(keep_vars=True)[name] is value
        assert torch.equal(value, copy)
        assert value.grad is None
    assert modules == {path: dict(module.__dict__) for path, module in model.named_modules()}
    return config


def test_the_right_and_fast_kernel_is_chosen(tuned, repository):
    assert tuned.kernel_mapping == {"SleepyNorm": {"inference": f"{repository}:Fast"}}
    (choice,) = [choice for choice in of(tuned).choices if choice.name == "SleepyNorm"]
    assert choice.chosen == f"{repository}:Fast"
    assert choice.paths == ("norms.0", "norms.1")
    assert "times as fast in forward" in choice.reason
    runs = {run.contender: run for run in of(tuned).runs}
    assert list(runs)[:1] == [EAGER]
    assert runs["tuned"].comparison is not None
    assert runs["tuned"].comparison.verdict == "faster"


def test_what_is_slow_or_wrong_is_never_chosen_and_says_why(tuned):
    (choice,) = [choice for choice in of(tuned).choices if choice.name == "SleepyNorm"]
    found = {candidate.kernel.rpartition(":")[2]: candidate for candidate in choice.candidates}
    assert (found["Wrong"].out or "").startswith("as given: wrong_values")
    assert found["Wrong"].timings == ()
    (timing,) = found["Slow"].timings
    assert found["Slow"].out is None
    assert timing.comparison.verdict == "slower"
    (timing,) = found["Fast"].timings
    assert timing.calls == 2
    assert found["Fast"].checks > 5


def test_what_hangs_costs_its_time_limit_and_no_more(repository):
    told: list[tuple[float, str]] = []
    config = _tune.tune(
        Model().eval(),
        X,
        candidates={"SleepyNorm": f"{repository}:Hangs"},
        seconds=60,
        limit_s=3,
        progress=lambda what, part: told.append((time.monotonic(), what)),
    )
    (choice,) = [choice for choice in of(config).choices if choice.name == "SleepyNorm"]
    assert choice.chosen == OWN_CODE
    assert choice.reason == "every candidate is out"
    assert choice.candidates[0].out == "as given: timed_out: no answer after 3 s"
    at = next(index for index, (_, what) in enumerate(told) if "Hangs" in what)
    assert 3 < told[at + 1][0] - told[at][0] < 3 + 20, "starting its process comes on top"


def test_the_evidence_is_no_part_of_the_config(tuned, tmp_path):
    tuned.save(tmp_path / "kernels.toml")
    loaded = kw.KernelConfig.load(tmp_path / "kernels.toml")
    assert loaded == tuned
    assert loaded.evidence is None
    assert (tmp_path / "kernels.toml").read_text() == of(tuned).config
    assert Tuning.from_json(json.loads(json.dumps(of(tuned).to_json()))) == of(tuned)
    assert "SleepyNorm" in str(of(tuned))


def test_what_was_tuned_goes_in_without_being_proven_again(tuned, monkeypatch):
    from kernelwise._verifying import _prove

    monkeypatch.setattr(_prove, "check_group", lambda *args: pytest.fail("it is proven already"))
    model = kw.kernelize(Model().eval(), tuned)
    kernels = {row.path: (row.kernel, row.proof) for row in kw.report(model).rows if row.name == "SleepyNorm"}
    assert all(kernel.endswith(":Fast") and proof == "proven" for kernel, proof in kernels.values() if kernel)
    began = time.perf_counter()
    model(X)
    assert time.perf_counter() - began < 0.05


def test_tuning_again_measures_nothing(tuned, repository, monkeypatch):
    for module, name in ((_trials, "measure_group"), (_trials, "check_group"), (_races, "race")):
        monkeypatch.setattr(module, name, lambda *args, name=name, **options: pytest.fail(f"{name} was called again"))
    refs = [f"{repository}:{name}" for name in ("Wrong", "Slow", "Fast")]
    again = _tune.tune(Model().eval(), X, candidates={"SleepyNorm": refs}, seconds=200)
    assert again == tuned
    assert of(again).runs == of(tuned).runs


def test_kinds_of_one_name_get_what_is_best_for_each(repository):
    model = Model(widths=(48, 32)).eval()
    asked = {"SleepyNorm@norms.1": {"inference": f"{repository}:Fast"}}
    config = _tune.tune(model, X, config=asked, seconds=120)
    assert config.kernel_mapping == {"SleepyNorm@norms.1": {"inference": f"{repository}:Fast"}}


def test_training_is_tuned_forward_and_backward(repository):
    model = Model().train()
    config = _tune.tune(model, X, candidates={"SleepyNorm": f"{repository}:Fast"}, seconds=120)
    assert of(config).workloads == ("forward", "training")
    assert config.kernel_mapping == {"SleepyNorm": f"{repository}:Fast"}
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training


def test_what_the_time_does_not_suffice_for_is_said(repository, tmp_path, monkeypatch):
    monkeypatch.setenv("KERNELWISE_CACHE", str(tmp_path))
    config = _tune.tune(Model().eval(), X, candidates={"SleepyNorm": f"{repository}:Fast"}, seconds=0.01)
    assert config.kernel_mapping == {}
    assert any("not tried within" in note and "Fast" in note for note in of(config).notes)


def test_what_becomes_slow_under_compile_is_not_chosen_for_it(monkeypatch, fresh_compiler):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))  # building takes seconds
    monkeypatch.setattr("kernelwise.sources._inductor.DEVICES", ())
    register_sorting()
    try:
        model = nn.Sequential(Sorting(), Sorting()).eval()
        config = _tune.tune(model, torch.randn(2, 32, 256), compile=True, seconds=60)
    finally:
        unregister_op("sorting_norm")
    chosen = {choice.mode: choice for choice in of(config).choices}
    assert chosen["inference"].chosen == "builtin:straight", chosen["inference"].reason
    assert chosen["inference+compile"].chosen == OWN_CODE
    candidate = next(one for one in chosen["inference+compile"].candidates if one.kernel == "builtin:straight")
    assert candidate.timings[0].comparison.verdict == "slower"
    assert config.kernel_mapping == {"SortingNorm": {"inference": "builtin:straight", "inference+compile": "none"}}


# ------------------------------------------------------------------------------------------------------------ whole model


def test_where_the_defaults_win_the_evidence_says_what_they_are(monkeypatch):
    races(monkeypatch, {"builtin": 1.5, "tuned": 1.2})
    monkeypatch.setattr("kernelwise.sources._inductor.DEVICES", ())
    config = _tune.tune(nn.Sequential(nn.PReLU(), nn.GELU()).eval(), X, seconds=120)
    assert config.kernel_mapping == {"GeLU": {"inference": "builtin:GeLU"}}
    choice = next(choice for choice in of(config).choices if choice.name == "GeLU")
    assert choice.chosen == "builtin:GeLU"
    assert "defaults" in choice.reason
    assert any("builtin is the result" in note for note in of(config).notes)


@pytest.mark.parametrize("planted", [{"builtin": 0.8, "tuned": 0.9}, {"builtin": "it fails", "tuned": "it fails"}])
def test_where_eager_wins_no_kernel_goes_in_unasked(repository, monkeypatch, planted):
    seen = races(monkeypatch, planted)
    # The activation is not tuned, and gets a kernel by default.
    monkeypatch.setattr(_tune, "_worth_tuning", lambda session: [k for k in session.kinds if k.layer.name != "GeLU"])
    model = nn.Sequential(SleepyNorm(), nn.GELU()).eval()
    config = _tune.tune(model, X, candidates={"SleepyNorm": f"{repository}:Fast"}, seconds=60)
    assert config.kernel_mapping == {"SleepyNorm": {"inference": "none"}, "GeLU": {"inference": "none"}}
    assert {(choice.name, choice.chosen) for choice in of(config).choices} == {
        ("SleepyNorm", OWN_CODE),
        ("GeLU", OWN_CODE),
    }
    assert not any(row.kernel for row in kw.report(kw.kernelize(model, config, mode="inference")).rows)
    assert seen[-1] == (EAGER, "tuned")
    assert next(run for run in of(config).runs if run.contender == "tuned").comparison == ratio(1.0)


# ----------------------------------------------------------------------------------------------------- the user's config


def test_what_the_user_keeps_out_stays_out_and_all_other_rules_stay(repository, monkeypatch):
    monkeypatch.setattr("kernelwise.sources._inductor.DEVICES", ())
    model = nn.Sequential(SleepyNorm(), nn.GELU(), nn.Linear(48, 48)).eval()
    asked = kw.KernelConfig(
        {
            "SleepyNorm": f"{repository}:Fast",
            "GeLU": None,
            "Linear": {"inference": "none", "training": "builtin:Linear"},
        },
        inherit_mapping=False,
        on_miss="keep",
    )
    config = _tune.tune(model, X, config=asked, seconds=60)
    assert config == kw.KernelConfig(
        {
            "GeLU": None,
            "Linear": {"inference": "none", "training": "builtin:Linear"},
            "SleepyNorm": f"{repository}:Fast",  # tuned for inference; for all other modes as it was asked
        },
        inherit_mapping=False,
        on_miss="keep",
    )
    assert [choice.name for choice in of(config).choices] == ["SleepyNorm"]


def test_a_rule_whose_kernel_is_out_is_not_in_the_result(repository):
    config = _tune.tune(Model().eval(), X, config={"SleepyNorm": {"inference": f"{repository}:Wrong"}}, seconds=60)
    assert config.kernel_mapping == {"SleepyNorm": {"inference": "none"}}
    assert next(run for run in of(config).runs if run.contender == "tuned").error is None


def test_hooks_of_the_user_run_as_in_any_pass_and_stay(monkeypatch):
    monkeypatch.setattr(_tune, "NEGLIGIBLE", 2.0)  # of all layers: this is about the whole model
    model, calls = nn.Sequential(nn.GELU()).eval(), []
    hook = model[0].register_forward_hook(lambda module, args, output: calls.append(module))
    before = dict(model[0]._forward_hooks)
    _tune.tune(model, X, seconds=5)
    assert calls
    assert model[0] not in calls, "what runs are copies"
    assert dict(model[0]._forward_hooks) == before
    hook.remove()


# -------------------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"objective": "speed"}, "objective"),
        ({"seconds": 0}, "seconds"),
        ({"workload": "decode"}, "causal language models"),
        ({"model": nn.Linear(2, 2, device="meta")}, "meta"),
        ({"model": "llama"}, r"torch\.nn\.Module"),
    ],
)
def test_wrong_arguments_are_said_before_anything_is_done(change, what):
    with pytest.raises(PlanError, match=what):
        kw.tune(**{"model": Model().eval(), "inputs": X} | change)


def test_a_model_with_kernels_and_wrong_candidates_are_refused(repository):
    with pytest.raises(KernelConfigError, match="candidates"):
        kw.tune(Model().eval(), X, candidates=["no kernel"])
    model = kw.kernelize(Model().eval(), {"SleepyNorm": f"{repository}:Fast"}, verify=False)
    with pytest.raises(PlanError, match="unkernelize"):
        kw.tune(model, X)


def test_the_command_writes_the_config_and_its_evidence(tmp_path, capsys):
    repository = write(tmp_path / "planted", FAST)
    files = {name: tmp_path / name for name in ("kernels.toml", "evidence.json", "report.html")}
    options = ["--out", "kernels.toml", "--json", "evidence.json", "--html", "report.html"]
    options = [str(files.get(option, option)) for option in options]
    command = ["tune", "planted:Model", "--inputs", "planted:example_inputs", "--device", "cpu", "--seconds", "120"]
    with pytest.raises(SystemExit) as ended:
        main([*command, "--candidate", f"{repository}:*", *options])
    assert ended.value.code in (0, None)
    assert kw.KernelConfig.load(files["kernels.toml"]).kernel_mapping["SleepyNorm"] == {
        "inference": f"{repository}:Fast"
    }
    assert "SleepyNorm" in capsys.readouterr().out
    assert load(files["evidence.json"]).choices
    assert "<html" in files["report.html"].read_text()
    with pytest.raises(SystemExit):
        main([*command, "--out", str(tmp_path / "nowhere" / "kernels.toml")])
    assert "its directory does not exist" in capsys.readouterr().err
