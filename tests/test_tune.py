"""Tuning: what is right and fast is chosen, what is not is out with its reason, and nothing measured is lost."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from tuning import FAST, Model, SleepyNorm, X, of, races, ratio, write

import kernelwise as kw
from kernelwise._cli import main
from kernelwise._configuring._config_file import tomllib
from kernelwise._errors import KernelConfigError, PlanError
from kernelwise._evidence import EAGER, OWN_CODE, Choice, Run, Tuning, load
from kernelwise._reference import read_reference
from kernelwise._register import unregister_op
from kernelwise._tuning import _confirm, _ranks, _trials, _tune
from kernelwise._verifying import _inputs


@pytest.fixture(scope="module", autouse=True)
def few_sizes() -> Iterator[None]:
    """These tests are about what is done with checks and times, not about these."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_inputs, "_SIZES", ())
        patch.setattr(_inputs, "_MANY_ROWS", {**_inputs._MANY_ROWS, "S": 101})
        patch.setattr(_confirm, "MOST_S", 1.0)
        patch.setattr(_trials, "TIMING_S", 0.2)
        patch.setattr(_tune, "_rivals_of", lambda model: ())  # compiling takes seconds
        yield


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> str:
    return write(tmp_path_factory.mktemp("kernels") / "planted")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("KERNELWISE_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def tuned(repository, cache, few_sizes) -> kw.KernelConfig:
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
    for module, name in ((_trials, "measure_group"), (_trials, "check_group"), (_confirm, "race")):
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


# ---------------------------------------------------------------------------------------------------------------- compile


def sorting(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """A norm of no known kind, with some work that nobody needs."""
    for _ in range(2):
        torch.sort(x, dim=-1)
    return weight * x / torch.sqrt(torch.mean(x * x, -1, keepdim=True) + eps) + torch.tanh(x)


def straight(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    if torch.compiler.is_compiling():
        for _ in range(40):  # so slow that it shows on a busy machine
            x = x + 0 * torch.sort(x, dim=-1).values
    return weight * x / torch.sqrt(torch.mean(x * x, -1, keepdim=True) + eps) + torch.tanh(x)


def crooked(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    for _ in range(8):
        torch.sort(x, dim=-1)
    return straight(x, weight, eps)


straight.can_torch_compile = True  # type: ignore[attr-defined]


class Sorting(nn.Module):
    def __init__(self, eps: float = 1e-3) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(256) + 0.5)
        self.eps = eps

    def forward(self, x):
        return sorting(x, self.weight, self.eps)


def register_sorting() -> None:
    """Two functions for these layers, which are checked and timed in this process: that is quick."""
    kw.register_op(
        sorting,
        roles={"x": "argument B S H", "weight": "attribute H", "eps": "number"},
        name="sorting_norm",
        layer_name="SortingNorm",
        kernels=[straight, crooked],
    )


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
    assert chosen["inference"].chosen == "builtin:straight"
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


# ------------------------------------------------------------------------------------------------------ several processes

TUNING = """
    import os, sys
    import torch
    sys.path.insert(0, {tests!r})
    from test_tune import Sorting, _confirm, _inputs, _trials, _tune, kw, nn, register_sorting
    _inputs._SIZES, _confirm.MOST_S, _trials.TIMING_S, _tune._rivals_of = (), 1.0, 0.2, lambda model: ()
    import kernelwise.sources._inductor as inductor
    inductor.DEVICES = ()
    register_sorting()
    torch.manual_seed(0)
    x = torch.randn(2, 32, 256)
    real, log = _trials.measure_group, os.environ["MEASURED"]

    def measured(*args, **options):
        with open(log, "a") as file:
            print("measured", file=file)
        return real(*args, **options)

    _trials.measure_group = measured
"""


def script(then: str) -> list[str]:
    text = textwrap.dedent(TUNING).format(tests=str(Path(__file__).parent))
    return [sys.executable, "-c", text + textwrap.dedent(then)]


def test_a_tuner_that_was_killed_goes_on_where_it_was(tmp_path):
    command = script(
        """
        model = nn.Sequential(Sorting(), Sorting(1e-2)).eval()
        print(_tune.tune(model, x, seconds=200).kernel_mapping, "done")
        """
    )
    log = tmp_path / "log"
    env = {**os.environ, "KERNELWISE_CACHE": str(tmp_path / "cache"), "MEASURED": str(log), "OMP_NUM_THREADS": "1"}
    first = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
    end = time.monotonic() + 60
    while not log.exists() or log.read_text().count("measured") < 3:
        assert time.monotonic() < end
        assert first.poll() is None
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    before = log.read_text().count("measured")
    finished = subprocess.run(command, env=env, capture_output=True, text=True, timeout=100, check=False)
    assert "{'SortingNorm': {'inference': 'builtin:straight'}} done" in finished.stdout, finished.stderr
    all_in_all = log.read_text().count("measured")
    assert before >= 3
    assert all_in_all <= 4 + 1, "two kinds with two candidates each, and the one in flight again"


RANKS = """
    import json
    import torch.distributed as dist

    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", world_size=2, rank=rank)
    model = nn.Sequential(Sorting()).eval()
    try:
        kw.tune(model if rank == 0 else nn.Sequential(Sorting(1e-2)), x, seconds=100)
    except kw.PlanError as error:
        print("different:", str(error).splitlines()[0])
    _tune.kinds_of, kinds_of = (lambda *args: 1 / 0), _tune.kinds_of
    try:
        kw.tune(model, x, seconds=100)
    except kw.KernelwiseError as error:
        print("failed:", str(error))
    _tune.kinds_of = kinds_of
    _tune.hash_of, hash_of = (lambda model: 1 / 0) if rank == 1 else _tune.hash_of, _tune.hash_of
    try:
        kw.tune(model, x, seconds=100)
    except kw.KernelwiseError as error:
        print("lost:", str(error))
    _tune.hash_of = hash_of
    config = kw.tune(model, x, seconds=100)
    print("chosen:", json.dumps([config.to_dict(), config.evidence.to_json()], sort_keys=True))
    dist.destroy_process_group()
"""


def test_all_ranks_take_the_same_decision_or_all_raise(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    base = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    ranks = []
    for rank in (0, 1):
        own = {
            "RANK": str(rank),
            "KERNELWISE_CACHE": str(tmp_path / f"cache{rank}"),
            "MEASURED": str(tmp_path / f"{rank}"),
        }
        process = subprocess.Popen(
            script(RANKS), env={**base, **own}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        ranks.append(process)
    said = []
    for process in ranks:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        said.append(dict(line.split(": ", 1) for line in out.splitlines() if ": " in line))
    for what in ("different", "failed", "lost", "chosen"):
        assert said[0][what] == said[1][what], what
    assert "different models" in said[0]["different"]
    assert "1 of 2 ranks failed" in said[0]["failed"]  # the one that measures
    assert "1 of 2 ranks failed" in said[0]["lost"]  # the other one
    assert '{"inference": "builtin:straight"}' in said[0]["chosen"]
    assert (tmp_path / "0").exists()
    assert not (tmp_path / "1").exists(), "one rank measures"


def found_on(chosen: dict[tuple[str, str], str], kernels: dict[str, object]) -> dict[str, object]:
    """What tuning gives on one kind of device: choices by name and mode, and the rules of its config."""
    choices = [
        Choice(name.lower(), (name.lower(),), name, f"x.{name}", "", mode, ref, "it is fast")
        for (name, mode), ref in chosen.items()
    ]
    names = (EAGER, "builtin", "tuned", "tuned+compile", *dict.fromkeys(name for name, _ in chosen))
    runs = [Run(name, "prefill", ratio(1.5)) for name in names]
    evidence = Tuning("m", kw.Target("cuda"), "latency", ("prefill",), tuple(choices), tuple(runs))
    return {"config": {"kernels": kernels, "on_miss": "keep"}, "evidence": evidence.to_json()}


def test_kinds_of_devices_that_differ_leave_layers_their_own_code():
    modes = ("inference", "training")
    one = found_on(
        {**{("RMSNorm", mode): "builtin:RMSNorm" for mode in modes}, **{("SiLU", mode): "a/b@v1:C" for mode in modes}},
        {"RMSNorm": "builtin:RMSNorm", "SiLU": "a/b@v1:C", "GeLU": "none"},
    )
    other = found_on(
        {
            **{("RMSNorm", mode): "builtin:RMSNorm" for mode in modes},
            ("SiLU", "inference"): "a/b@v1:C",
            ("SiLU", "training"): "own code",
        },
        {"RMSNorm": "builtin:RMSNorm", "SiLU": {"inference": "a/b@v1:C", "training": "none"}, "GeLU": "none"},
    )
    joined = _ranks.join({"H100": one, "A100": other})
    assert joined["config"] == {
        "kernels": {
            "RMSNorm": "builtin:RMSNorm",
            "SiLU": {"inference": "a/b@v1:C", "training": "none"},
            "GeLU": "none",
        },
        "on_miss": "keep",
    }
    evidence = Tuning.from_json(joined["evidence"])
    chosen = {(choice.name, choice.mode): choice.chosen for choice in evidence.choices}
    assert chosen == {
        ("RMSNorm", "inference"): "builtin:RMSNorm",
        ("RMSNorm", "training"): "builtin:RMSNorm",
        ("SiLU", "inference"): "a/b@v1:C",
        ("SiLU", "training"): OWN_CODE,
    }
    assert "devices differ" in next(choice.reason for choice in evidence.choices if choice.chosen == OWN_CODE)
    assert [run.contender for run in evidence.runs] == [EAGER, "builtin"], "nobody has run the joined config"
    assert "SiLU (training)" in evidence.notes[0]
    assert tomllib.loads(evidence.config) == joined["config"]
    assert _ranks.join({"H100": one}) is one


def test_modes_that_nobody_tuned_are_not_turned_off_where_devices_differ():
    one = found_on({("RMSNorm", "inference"): "builtin:RMSNorm"}, {"RMSNorm": {"inference": "builtin:RMSNorm"}})
    other = found_on(
        {("RMSNorm", "inference"): "a/b@v1:N"},
        {"RMSNorm@layers.*": {"inference": "a/b@v1:N"}, "RMSNorm@norm": {"inference": "none"}},
    )
    joined = _ranks.join({"H100": one, "A100": other})
    assert joined["config"]["kernels"] == {"RMSNorm": {"inference": "none"}}
    assert [choice["chosen"] for choice in joined["evidence"]["choices"]] == [OWN_CODE]


# ------------------------------------------------------------------------------------------- what a result depends on


def begin(model: nn.Module) -> _tune._Session:
    request = _tune._Request("latency", None, kw.KernelConfig(), (), (), 16, 10, False, 60, None)
    return _tune._begin(model, X, request, lambda what, part: None)


def test_what_runs_depend_on_is_part_of_what_results_stand_under(monkeypatch):
    def about(model: nn.Module) -> str:
        return json.dumps(begin(model).about)

    model = Model().eval()
    torch.set_float32_matmul_precision("highest")
    first = about(model)
    assert about(Model().eval()) == first
    with torch.autocast("cpu", torch.bfloat16):
        assert about(model) != first
    torch.set_float32_matmul_precision("medium")
    try:
        assert about(model) != first
    finally:
        torch.set_float32_matmul_precision("highest")
    torch.use_deterministic_algorithms(True)
    try:
        assert about(model) != first
    finally:
        torch.use_deterministic_algorithms(False)
    assert about(model) == first
    model.head.weight.requires_grad_(False)
    frozen = about(model)
    assert frozen != first
    hook = model.head.register_forward_hook(lambda module, args, output: None)
    assert about(model) not in (first, frozen)
    hook.remove()
    assert about(model) == frozen
    forward = model.head.forward
    model.head.forward = lambda x: forward(x)  # type: ignore[method-assign]
    assert about(model) != frozen


def test_a_model_is_tuned_on_its_own_device_and_no_other(monkeypatch):
    seen: list[str] = []
    monkeypatch.setattr(_tune, "place", lambda model: "cuda:1")
    monkeypatch.setattr(_tune, "environment", lambda device: (seen.append(device), ())[1])
    monkeypatch.setattr(_tune, "on_device", lambda device: (seen.append(device), contextlib.nullcontext())[1])
    session = begin(Model().eval())
    assert session.device == "cuda:1"
    assert seen == ["cuda:1", "cuda:1"]
    monkeypatch.undo()
    assert _tune.place(Model()) == "cpu"
    assert _tune.place(nn.ReLU()) == "cpu"
    spread = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    with pytest.raises(PlanError, match="spread over cpu, meta"):
        _tune.place(spread)


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


def test_quick_candidates_have_their_turn_first():
    refs = ["builtin:inductor:RMSNorm", "org/repo@v1:Norm", "builtin:torch:RMSNorm", "builtin:RMSNorm", "/a:Norm"]
    found = [ref for text in refs if (ref := read_reference(text)[0]) is not None]
    eager = begin(Model().eval()).kinds[0]
    compiled = replace(eager, mode="inference+compile")
    order = sorted(((kind, ref) for ref in found for kind in (compiled, eager)), key=_tune._turn)
    names = [(str(ref), kind.mode.endswith("+compile")) for kind, ref in order]
    in_turn = [(3, False), (3, True), (2, False), (2, True), (1, False), (4, False), (1, True), (4, True)]
    assert names == [(refs[number], late) for number, late in (*in_turn, (0, False), (0, True))]


def test_time_for_compiling_the_model_is_set_aside(monkeypatch):
    session = begin(Model().eval())
    assert _tune._to_compile(session) == 0
    session.request = replace(session.request, compile=True, seconds=300)
    monkeypatch.setattr(_tune, "compile_seconds", lambda model, workload: 20.0)
    assert _tune._to_compile(session) == 40  # with its own code, and with what was chosen
    session.request = replace(session.request, seconds=60)
    assert _tune._to_compile(session) == 30


def test_notes_say_for_which_mode_layers_were_not_tuned():
    model = nn.Sequential(SleepyNorm(), nn.GELU()).train()
    kinds = _tune.kinds_of(model, kw.discover(model), ("inference", "training"))
    gelu = [kind for kind in kinds if kind.layer.name == "GeLU"]
    assert _tune._listed(gelu) == "1 (inference, training)"
    assert _tune._listed(gelu[:1]) == "1 (inference)"


def inputs() -> torch.Tensor:
    return X


def test_the_command_writes_the_config_and_its_evidence(tmp_path, capsys):
    repository = write(tmp_path / "planted", FAST)
    files = {name: tmp_path / name for name in ("kernels.toml", "evidence.json", "report.html")}
    options = ["--out", "kernels.toml", "--json", "evidence.json", "--html", "report.html"]
    options = [str(files.get(option, option)) for option in options]
    command = ["tune", "test_tune:Model", "--inputs", "test_tune:inputs", "--device", "cpu", "--seconds", "120"]
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
