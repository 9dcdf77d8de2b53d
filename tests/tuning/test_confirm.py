"""Confirming choices on the whole model: races are planted, and what is kept follows from them."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
from planted import SleepyNorm, X, races, ratio
from torch import nn

import kernelwise as kw
from kernelwise._data import KernelRef
from kernelwise._evidence import COMPILED, EAGER, LIGER, Candidate, Comparison, Run, Timing
from kernelwise._tuning import _choose, _confirm, _races, _session

pytestmark = pytest.mark.usefixtures("empty_cache")

BESIDE = (EAGER, "builtin", "tuned", COMPILED)
"""What is raced with a model that is compiled with choices."""


@pytest.fixture
def course_and_choices(repository):
    model = nn.Sequential(SleepyNorm(), nn.GELU(), nn.Tanh()).eval()
    layers = kw.discover(model)
    kinds = {kind.layer.name: kind for kind in _session.kinds_of(model, layers, ("inference",))}
    workloads = _session.workloads_of(model, X)
    until = time.monotonic() + 60
    course = _races.Course(
        model, layers, ("inference",), workloads, "cpu", [], {"forward": 0.0}, until, lambda what: None
    )
    return course, {kinds["SleepyNorm"]: f"{repository}:Fast", kinds["GeLU"]: "builtin:GeLU"}


def test_a_choice_that_does_not_hold_end_to_end_is_taken_back(course_and_choices, monkeypatch):
    course, chosen = course_and_choices
    seen = races(monkeypatch, {"SleepyNorm": 0.9, "GeLU": 1.2, "tuned": 1.2})
    found = _confirm.confirm(course, chosen)
    norm, gelu = chosen
    assert found.chosen == {norm: None, gelu: "builtin:GeLU"}
    assert "slower" in found.taken_back[norm] or "0.9" in found.taken_back[norm]
    assert seen[0] == (EAGER, "builtin", "tuned", "SleepyNorm", "GeLU")
    assert seen[1] == (EAGER, "SleepyNorm")  # what seemed slower had a race of its own
    assert seen[2] == (EAGER, "builtin", "tuned")  # what is left was raced again
    assert [run.contender for run in found.runs] == [EAGER, "builtin", "tuned", "SleepyNorm", "GeLU"]


def raced_alone(monkeypatch, speedup: float | str) -> None:
    """Plant another result for races of one choice alone."""
    planted = _races.race

    def race(contenders, workload, **options):
        runs = planted(contenders, workload, **options)
        if len(contenders) > 2 or "tuned" in contenders:
            return runs
        if isinstance(speedup, str):
            return tuple(
                run if run.contender == EAGER else replace(run, comparison=None, error=speedup) for run in runs
            )
        return tuple(replace(run, comparison=ratio(speedup)) for run in runs)

    monkeypatch.setattr(_races, "race", race)


def test_a_choice_that_was_slower_in_one_race_of_many_alone_is_kept(course_and_choices, monkeypatch):
    course, chosen = course_and_choices
    seen = races(monkeypatch, {"SleepyNorm": 0.95, "GeLU": 1.2, "tuned": 1.2})
    raced_alone(monkeypatch, 1.0)
    found = _confirm.confirm(course, chosen)
    assert found.chosen == chosen
    assert seen == [(EAGER, "builtin", "tuned", "SleepyNorm", "GeLU"), (EAGER, "SleepyNorm")]
    norm = [run.comparison.speedup for run in found.runs if run.contender == "SleepyNorm"]
    assert norm == [1.0], "the evidence has the race that decided"


def test_a_choice_that_fails_in_a_race_of_its_own_is_taken_back(course_and_choices, monkeypatch):
    course, chosen = course_and_choices
    races(monkeypatch, {"SleepyNorm": 0.95, "GeLU": 1.2, "tuned": 1.2})
    raced_alone(monkeypatch, "its outputs differ")
    found = _confirm.confirm(course, chosen)
    assert "its outputs differ" in found.taken_back[next(iter(chosen))]


def test_without_time_for_another_race_the_first_decides(course_and_choices, monkeypatch):
    course, chosen = course_and_choices
    course = replace(course, seconds={"forward": 1.3}, until=time.monotonic() + 20)  # two contenders would take 23 s
    seen = races(monkeypatch, {"SleepyNorm": 0.95, "GeLU": 1.2, "tuned": 1.2})
    raced_alone(monkeypatch, 1.0)
    monkeypatch.setattr(_confirm, "_alone", lambda course, found: {"SleepyNorm": course.config(chosen)})
    assert _confirm.confirm(course, chosen).taken_back
    assert (EAGER, "SleepyNorm") not in seen


def test_a_second_look_may_take_of_the_time_that_is_kept_for_compiling(course_and_choices, monkeypatch):
    course, chosen = course_and_choices
    seen = races(monkeypatch, {"SleepyNorm": 0.95, "GeLU": 1.2, "tuned": 1.2})
    raced_alone(monkeypatch, 1.0)
    alone = {"SleepyNorm": course.config(chosen)}
    monkeypatch.setattr(_confirm, "_alone", lambda course, found: alone)
    spent = replace(course, until=time.monotonic() - 1)
    assert _confirm.confirm(spent, chosen, until=time.monotonic() + 60).chosen == chosen
    assert (EAGER, "SleepyNorm") in seen


@pytest.mark.parametrize(
    ("objective", "speeds", "better"),
    [
        ("latency", [(1.3, 1.2), (1.0, 1.0)], True),
        ("latency", [(1.205, 1.2), (1.0, 1.0)], False),  # the intervals overlap
        ("latency", [(1.3, 1.2), (1.0, 1.2)], False),
        ("memory", [(1.0, 1.2), (1.0, 1.2)], True),  # the planted peaks decide
        ("throughput", [(1.3, 1.2), (1.0, 1.2)], True),  # the first takes ten times as long
    ],
)
def test_one_contender_leads_another_where_their_intervals_lie_apart(course_and_choices, objective, speeds, better):
    course = replace(course_and_choices[0], objective=objective)
    runs = [
        Run(name, f"case {number}", replace(ratio(speed), own_us=10.0 ** (2 - number), own_peak=1000, peak=peak))
        for number, pair in enumerate(speeds)
        for name, speed, peak in zip(("tuned+compile", COMPILED), pair, (500, 900), strict=True)
    ]
    assert (_confirm._why_not_compiled(course, runs) is None) is better


@pytest.fixture
def compiled_course(course_and_choices, monkeypatch):
    """A course with modes under compile, their kinds with the norm's choice, and what was raced: planted speeds."""
    course, chosen = course_and_choices
    norm = next(iter(chosen))
    kinds = {mode: replace(norm, mode=mode) for mode in ("inference+compile", "training+compile")}
    speeds = {"prefill": {COMPILED: 1.5, "tuned+compile": 1.4}, "training": {COMPILED: 1.2, "tuned+compile": 1.4}}
    workloads = [replace(course.workloads[0], name=name) for name in speeds]
    raced = []

    def race_all(course, contenders, least_s):
        raced.append((*(one.name for one in course.workloads), *contenders))
        return [
            Run(name, one.name, ratio(speeds[one.name].get(name, 1.0)))
            for one in course.workloads
            for name in contenders
        ]

    monkeypatch.setattr(_confirm, "race_all", race_all)
    found = _confirm.Confirmation(dict.fromkeys(kinds.values(), chosen[norm]))
    return replace(course, modes=(*course.modes, "training", *kinds), workloads=workloads), kinds, found, raced


def test_under_compile_kernels_stay_in_the_modes_in_which_the_compiled_model_is_better(compiled_course):
    course, kinds, found, raced = compiled_course
    before = dict(found.chosen)
    found.runs = [Run("tuned", "prefill", ratio(9.0)), Run("GeLU", "prefill", ratio(1.1))]
    _confirm.confirm_compiled(course, found, {})
    both = [BESIDE, (*BESIDE, "tuned+compile")]
    assert raced == [(name, *contenders) for name in ("prefill", "training") for contenders in both]
    assert found.chosen[kinds["training+compile"]] == before[kinds["training+compile"]]
    assert found.chosen[kinds["inference+compile"]] is None
    assert "worse with it" in found.taken_back[kinds["inference+compile"]]
    off = {(kind.layer.name, kind.mode) for kind, why in found.taken_back.items() if why.startswith("turned off")}
    assert off == {("GeLU", "inference+compile")}  # what it gets by default
    assert tuned_and_compiled(found) == {"prefill": 1.5, "training": 1.4}  # without kernels it is torch.compile
    there = [(run.contender, run.workload) for run in found.runs]
    assert sorted(there) == sorted(
        [
            ("GeLU", "prefill"),
            *((name, work) for name in (*BESIDE, "tuned+compile") for work in ("prefill", "training")),
        ]
    )
    tuned = next(run for run in found.runs if (run.contender, run.workload) == ("tuned", "prefill"))
    assert tuned.comparison.speedup == 1.0, "of the race beside torch.compile"


def tuned_and_compiled(found: _confirm.Confirmation) -> dict[str, float]:
    return {run.workload: run.comparison.speedup for run in found.runs if run.contender == "tuned+compile"}


def test_under_compile_what_nobody_could_see_is_not_raced(compiled_course):
    course, kinds, found, raced = compiled_course
    # A run takes 100 us, and 1.2 times less where it is compiled: 0.8 us is less than 1 % of that, 0.9 us more.
    saved = {"inference+compile": {"prefill": 0.9e-6}, "training+compile": {"training": 0.8e-6}}
    _confirm.confirm_compiled(course, found, saved)
    assert raced == [
        ("prefill", *BESIDE),
        ("prefill", *BESIDE, "tuned+compile"),
        ("training", *BESIDE),
    ]
    assert "save at most 1.0% of a compiled run" in found.taken_back[kinds["training+compile"]]
    off = {(kind.layer.name, kind.mode) for kind, why in found.taken_back.items() if why.startswith("turned off")}
    assert off == {("GeLU", "inference+compile"), ("GeLU", "training+compile")}
    assert tuned_and_compiled(found) == {"prefill": 1.5, "training": 1.2}


@pytest.mark.parametrize(("training", "raced_with_choices"), [(1.29, True), (1.31, False)])
def test_under_compile_what_cannot_win_is_not_raced(compiled_course, monkeypatch, training, raced_with_choices):
    course, kinds, found, raced = compiled_course
    race_all = _confirm.race_all

    def faster(course, contenders, least_s):
        """The tuned model is faster in eager code than in inference compiled alone, and about as fast as it could be."""
        tuned = {"prefill": 1.6, "training": training}
        return [
            replace(run, comparison=ratio(tuned[run.workload])) if run.contender == "tuned" else run
            for run in race_all(course, contenders, least_s)
        ]

    monkeypatch.setattr(_confirm, "race_all", faster)
    # Of 83 us compiled 5 us would be saved: 1.2 (1.21 at most) times as fast would be 1.29.
    saved = {"inference+compile": {"prefill": 10e-6}, "training+compile": {"training": 5e-6}}
    _confirm.confirm_compiled(course, found, saved)
    with_choices = [names[0] for names in raced if "tuned+compile" in names]
    assert with_choices == ["prefill", *(["training"] if raced_with_choices else [])]
    why = found.taken_back.get(kinds["training+compile"], "")
    assert (
        "faster than the compiled one, of which all choices together save at most 6.0%" in why
    ) != raced_with_choices


def test_what_cannot_win_must_not_in_any_workload():
    def why(tuned: dict[str, float], saved: dict[str, float]) -> str | None:
        """Compiled alone both are twice as fast: 50 us."""
        runs = [Run("tuned", name, ratio(speed)) for name, speed in tuned.items()]
        return _confirm._in_vain([*runs, *(Run(COMPILED, name, ratio(2.0)) for name in tuned)], saved)

    saved = {"prefill": 10e-6, "decode": 1e-6}  # so 2.5 (2.53) and 2.04 (2.06) times as fast at most
    assert why({"prefill": 2.6, "decode": 2.1}, saved)
    assert why({"prefill": 2.4, "decode": 2.1}, saved) is None
    assert why({"prefill": 2.6, "decode": 2.0}, saved) is None
    assert why({"prefill": 2.6}, saved)
    assert why({"prefill": 2.6, "decode": 2.1}, {**saved, "decode": 10e-6}) is None


@pytest.fixture
def first_calls(compiled_course, monkeypatch):
    """The first call of the compiled model takes 20 s in prefill and half a second in training; later it is compiled."""
    planted, estimates = _confirm.race_all, {"prefill": 8.0, "training": 3.0}

    def race_all(course, contenders, least_s):
        took = {"prefill": 20.0, "training": 0.5}
        again = "tuned+compile" in contenders
        return [
            replace(run, comparison=replace(run.comparison, first_s=0.1 if again else took[run.workload]))
            for run in planted(course, contenders, least_s)
        ]

    monkeypatch.setattr(_confirm, "race_all", race_all)
    monkeypatch.setattr(_confirm, "compile_seconds", lambda model, workload: estimates[workload.name])


@pytest.mark.usefixtures("first_calls")
def test_under_compile_what_there_is_no_time_to_compile_is_left_to_the_compiler(compiled_course):
    course, kinds, found, raced = compiled_course
    course = replace(course, until=time.monotonic() + 15, seconds={"prefill": 0.01, "training": 0.02})
    _confirm.confirm_compiled(course, found, {})
    assert raced == [
        ("prefill", *BESIDE),
        ("training", *BESIDE),
        ("training", *BESIDE, "tuned+compile"),
    ]
    assert "no time was left" in found.taken_back[kinds["inference+compile"]]
    assert found.chosen[kinds["inference+compile"]] is None
    assert found.chosen[kinds["training+compile"]] is not None
    assert tuned_and_compiled(found) == {"prefill": 1.5, "training": 1.4}
    first = {run.workload: run.comparison.first_s for run in found.runs if run.contender == COMPILED}
    assert first == {"prefill": 20.0, "training": 0.5}, "of the race in which it was compiled"


def test_the_time_that_compiling_with_choices_takes(compiled_course, monkeypatch):
    """Prefill takes 8 s by the estimate, training 3; both of a race are compiled where the first was recalled."""
    course, _, _, _ = compiled_course
    prefill, training = (replace(course, workloads=[one], seconds={"prefill": 0.4}) for one in course.workloads)
    nothing = replace(course, workloads=[])
    estimates = {"prefill": 8.0, "training": 3.0}
    monkeypatch.setattr(_confirm, "compile_seconds", lambda model, workload: estimates[workload.name])
    alone = [Run(COMPILED, "prefill", replace(ratio(1.5), first_s=6.0))]

    def late(seconds, alone, course=prefill, later=nothing, *, recalled=False):
        course = replace(course, until=time.monotonic() + seconds)
        return _confirm._too_late(course, alone, later, recalled=recalled) is not None

    assert late(9.9, alone)  # 6 s and a race of 4
    assert not late(10.5, alone)
    assert late(15.9, alone, recalled=True)
    assert not late(16.5, alone, recalled=True)
    warm = [replace(alone[0], comparison=replace(alone[0].comparison, first_s=0.1))]
    assert late(7.9, warm), "half of the estimate, as the choices may not be warm"
    assert not late(8.5, warm)
    assert late(12.9, alone, later=training), "training is compiled alone, whatever is chosen for inference"
    assert not late(13.5, alone, later=training)
    compiled = replace(prefill, others=(COMPILED,))
    assert not late(10.5, alone, compiled), "that was raced already"
    with_liger = replace(prefill, others=(COMPILED, LIGER))
    assert late(10.5 + 9 * 2 * 0.4 - 1, alone, with_liger)
    assert not late(10.5 + 9 * 2 * 0.4, alone, with_liger), "in races of it and the own code"


def test_what_was_recalled_is_compiled_again(compiled_course, monkeypatch):
    """A race that took less than its first call had said: both are compiled in the next one."""
    course, _, found, _ = compiled_course
    seen = []
    monkeypatch.setattr(_confirm, "_first_s", lambda runs: 1e-9 if runs[0].workload == "training" else 5.0)
    monkeypatch.setattr(_confirm, "_too_late", lambda course, alone, later, *, recalled: seen.append(recalled))
    _confirm.confirm_compiled(course, found, {})
    assert seen == [True, False]


def test_under_compile_what_the_user_asks_for_stays_and_is_raced(compiled_course):
    course, kinds, found, raced = compiled_course
    course = replace(course, asked=kw.KernelConfig({"GeLU": "builtin:GeLU"}))
    _confirm.confirm_compiled(course, found, {mode: {} for mode in kinds})
    assert [names[1:] for names in raced if names[0] == "training"] == [
        BESIDE,
        (*BESIDE, "tuned+compile"),
    ]
    assert found.chosen == dict.fromkeys(kinds.values())
    assert tuned_and_compiled(found) == {"prefill": 1.4, "training": 1.4}, (
        "the config has a kernel, so this is its time"
    )


def test_a_model_without_kernels_is_compiled_once(compiled_course):
    course, _, _, raced = compiled_course
    course = replace(course, asked=kw.KernelConfig(inherit_mapping=False))
    found = _confirm.Confirmation({})
    _confirm.confirm_compiled(course, found, {})
    assert raced == [("prefill", *BESIDE), ("training", *BESIDE)]
    assert tuned_and_compiled(found) == {"prefill": 1.5, "training": 1.2}


def timed(kernel: str, own_us: float, us: float, calls: int, mode: str) -> Candidate:
    comparison = Comparison(own_us, us, own_us / us, own_us / us, own_us / us, 20)
    return Candidate(kernel, timings=(Timing("0", ("0",), kernel, mode, "forward", comparison, calls=calls),))


def test_what_choices_save_under_compile_is_added_up(course_and_choices):
    _, chosen = course_and_choices
    norm, gelu = (replace(kind, mode="inference+compile") for kind in chosen)
    tried = {
        norm: [timed("fast", 10, 8, 30, norm.mode), timed("faster", 10, 1, 30, norm.mode)],
        gelu: [timed("gelu", 10, 7, 20, gelu.mode)],
    }

    def saved(chosen, tried=tried, with_kernel=()):
        found = _choose.saved_under_compile(chosen, tried, with_kernel)
        return {mode: pytest.approx(by["forward"] * 1e6) for mode, by in found.items()}

    assert saved({norm: "fast", gelu: "gelu"}) == {"inference+compile": 120}
    assert saved({norm: "fast", gelu: None}) == {"inference+compile": 60}
    assert saved({norm: "faster", gelu: None}) == {"inference+compile": 270}
    gets_one = {(gelu.layer.path, gelu.layer.function, gelu.mode)}
    untried = {norm: tried[norm], gelu: []}
    assert saved({norm: "fast"}, untried, gets_one) == {}  # what it gets by default was not tried in time: who knows
    assert saved({norm: "fast"}, untried) == {"inference+compile": 60}, "it has its own code, which saves nothing"
    assert saved({norm: "fast"}, {norm: tried[norm], gelu: [Candidate("gelu", out="wrong")]}) == {
        "inference+compile": 60
    }
    assert saved({}, {replace(kind, mode="inference"): candidates for kind, candidates in tried.items()}) == {}


def test_a_choice_that_computes_something_else_end_to_end_is_taken_back(course_and_choices, monkeypatch):
    course, chosen = course_and_choices
    races(monkeypatch, {"SleepyNorm": "its outputs differ", "GeLU": 1.2, "tuned": 1.2})
    found = _confirm.confirm(course, chosen)
    assert "its outputs differ" in found.taken_back[next(iter(chosen))]


@pytest.mark.parametrize(
    ("builtin", "further"),
    [
        (1.3, [("tuned", "builtin"), (EAGER, "tuned")]),  # a direct race decides, and what is written then is raced
        (1.205, []),  # so near that a direct race could not tell
        (1.1, []),
    ],
)
def test_the_defaults_are_the_result_where_they_are_clearly_faster(course_and_choices, monkeypatch, builtin, further):
    course, chosen = course_and_choices
    seen = races(monkeypatch, {"builtin": builtin, "SleepyNorm": 1.1, "GeLU": 1.1, "tuned": 1.2})
    found = _confirm.confirm(course, chosen)
    norm, gelu = chosen
    raced = (EAGER, "builtin", "tuned", "SleepyNorm", "GeLU")
    assert seen == [raced, *further]
    assert sorted(run.contender for run in found.runs) == sorted(raced), "one run of each: the last one of the result"
    if further:
        assert found.chosen == {norm: None, gelu: "builtin:GeLU"}
        assert "builtin is the result" in "".join(found.notes)
        assert "defaults" in found.taken_back[gelu]
    else:
        assert found.chosen == chosen
        assert not found.notes


def test_what_is_slower_than_eager_leaves_everything_its_own_code(course_and_choices, monkeypatch):
    course, chosen = course_and_choices
    races(monkeypatch, {"builtin": 0.8, "SleepyNorm": 1.0, "GeLU": 1.0, "tuned": 0.9})
    found = _confirm.confirm(course, chosen)
    assert set(found.chosen.values()) == {None}
    assert course.config(found.chosen).kernel_mapping == {
        "SleepyNorm": {"inference": "none"},
        "GeLU": {"inference": "none"},
    }


def scored(monkeypatch, course, speedups, peaks):
    """Plant how much memory contenders need, besides their speed, and confirm for memory."""
    races(monkeypatch, speedups)
    real = _races.race

    def race(contenders, workload, **options):
        own = peaks.get(options.get("own", EAGER), 1000)
        return tuple(
            replace(run, comparison=replace(run.comparison, own_peak=own, peak=peaks.get(run.contender, 1000)))
            for run in real(contenders, workload, **options)
        )

    monkeypatch.setattr(_races, "race", race)
    return replace(course, objective="memory")


def test_what_saves_memory_holds_end_to_end_though_it_is_slower(course_and_choices, monkeypatch):
    course, chosen = course_and_choices
    course = scored(
        monkeypatch, course, {"tuned": 0.5, "SleepyNorm": 0.5}, {"tuned": 500, "SleepyNorm": 600, "GeLU": 800}
    )
    assert _confirm.confirm(course, chosen).chosen == chosen


def test_what_needs_more_memory_end_to_end_is_taken_back(course_and_choices, monkeypatch):
    course, chosen = course_and_choices
    course = scored(
        monkeypatch, course, {"tuned": 2.0, "SleepyNorm": 2.0}, {"tuned": 800, "SleepyNorm": 1200, "GeLU": 800}
    )
    norm, gelu = chosen
    assert _confirm.confirm(course, chosen).chosen == {norm: None, gelu: "builtin:GeLU"}


def test_for_throughput_a_workload_counts_as_much_as_it_takes(course_and_choices):
    course, _ = course_and_choices
    long, short = (Comparison(own, own / by, by, by, by, 9) for own, by in ((1e6, 1.1), (1e3, 0.5)))
    runs = [Run("tuned", "prefill", long), Run("tuned", "decode", short)]
    assert _races.score(replace(course, objective="throughput"), runs, "tuned") > 0
    assert _races.score(course, runs, "tuned") < 0


def test_kernels_that_are_trusted_to_run_code_stay_trusted(course_and_choices):
    course, chosen = course_and_choices
    ref = KernelRef("hub", "org/repo", "Norm", version=1, trust_remote_code=True)
    kinds = dict.fromkeys(chosen, str(ref))
    written = course.config(kinds).rules(), replace(course, trusted={str(ref): ref}).config(kinds).rules()
    assert [{rule.ref.trust_remote_code for rule in rules if rule.ref} for rules in written] == [{False}, {True}]
