"""Deciding, with plain values: no model, no torch, no kernel is loaded."""

from __future__ import annotations

import random
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernelwise._data import Binding, Kernel, KernelRef, Layer, Limits, Parameter, Recognition, Target
from kernelwise._errors import PlanError
from kernelwise._mapping import parse_mapping
from kernelwise._plan import choose_rule, make_plan, reasons_against

X = Parameter("x", "positional_or_keyword")
BOTH = ("inference", "training")
NORM = Recognition("rms_norm", (("x", Binding("argument", "x")),), (("offset", 0.0), ("cast", "before")))
ROLES = (X, Parameter("offset", "keyword_only", True), Parameter("cast", "keyword_only", True))
CPU = Target("cpu")


def layer(path: str, name: str = "RMSNorm", **options: Any) -> Layer:
    known = {"device": "cpu", "dtypes": ("float32",), "signature": (X,), "paths": (path,)} | options
    return Layer(path=path, name=name, class_name=f"m.{name}", how="registered", **known)


def loaded(ref: KernelRef, **options: Any) -> Kernel:
    return Kernel(ref, **{"signature": (X,)} | options)


def decide(
    layers: list[Layer], mapping: dict[Any, Any], *, kernels: Any = None, defaults: Any = None, **options: Any
) -> Any:
    rules, problems = parse_mapping(mapping)
    assert problems == ()
    refs = [rule.ref for rule in rules if rule.ref] + [ref for refs in (defaults or {}).values() for ref in refs]
    devices = {layer.device for layer in layers}
    table: dict[Any, Any] = {(ref, device): loaded(ref) for ref in refs for device in devices}
    table.update(kernels or {})
    options = {"target": CPU, "modes": BOTH, "defaults": defaults or {}} | options
    return make_plan(layers, rules, table, **options)


def chosen(plan: Any) -> dict[tuple[str, str], str | None]:
    return {(d.layer.path, d.mode): d.kernel.ref.layer if d.kernel else None for d in plan.decisions}


A, B, C = "builtin:A", "builtin:B", "builtin:C"


def test_a_rule_for_a_path_beats_one_for_the_name() -> None:
    for mapping in ({"RMSNorm": A, "RMSNorm@b.*": B}, {"RMSNorm@b.*": B, "RMSNorm": A}):
        assert chosen(decide([layer("a.n"), layer("b.n")], mapping, modes=("inference",))) == {
            ("a.n", "inference"): "A",
            ("b.n", "inference"): "B",
        }


def test_a_rule_for_a_path_beats_one_for_device_and_mode() -> None:
    mapping = {"RMSNorm": {"cpu": {"inference": A, "training": C}}, "RMSNorm@b.*": B}
    plan = decide([layer("a.n"), layer("b.n")], mapping)
    assert chosen(plan) == {
        ("a.n", "inference"): "A",
        ("a.n", "training"): "C",
        ("b.n", "inference"): "B",
        ("b.n", "training"): "B",
    }


def test_none_keeps_the_own_code_and_says_who_wants_it() -> None:
    plan = decide([layer("a"), layer("b")], {"RMSNorm": A, "RMSNorm@b": None})
    decision = next(d for d in plan.decisions if d.layer.path == "b")
    assert decision.kernel is None
    assert "rule 2" in decision.asked_by
    assert "own code" in decision.reason


def test_two_path_rules_of_one_kind_are_an_error_that_names_both() -> None:
    with pytest.raises(PlanError) as error:
        decide([layer("a.n")], {"RMSNorm@a.*": A, "RMSNorm@*.n": B})
    assert "rule 1" in str(error.value)
    assert "rule 2" in str(error.value)
    assert "a.n" in str(error.value)


def test_two_path_rules_for_two_devices_or_modes_do_not_conflict() -> None:
    mapping = {"RMSNorm@a.*": {"cpu": A}, "RMSNorm@*.n": {"cuda": B}}
    assert chosen(decide([layer("a.n")], mapping, modes=("inference",))) == {("a.n", "inference"): "A"}
    mapping = {"RMSNorm@a.*": {"inference": A}, "RMSNorm@*.n": {"training": B}}
    assert chosen(decide([layer("a.n")], mapping)) == {("a.n", "inference"): "A", ("a.n", "training"): "B"}


def test_a_shared_module_is_matched_by_any_of_its_paths() -> None:
    shared = layer("first", paths=("first", "second"))
    assert chosen(decide([shared], {"RMSNorm@second": A}, modes=("inference",))) == {("first", "inference"): "A"}
    with pytest.raises(PlanError, match="two rules claim"):
        decide([shared], {"RMSNorm@second": A, "RMSNorm@first": B})


def test_an_entry_for_another_device_is_a_note_and_no_error() -> None:
    plan = decide([layer("a")], {"RMSNorm": {"cuda": A}})
    assert chosen(plan) == {("a", "inference"): None, ("a", "training"): None}
    (note,) = plan.notes
    assert "cuda" in note
    assert "rule 1" in note
    assert "cpu" in note


def test_an_entry_for_another_mode_is_a_note_and_no_error() -> None:
    plan = decide([layer("a")], {"RMSNorm": {"training+compile": A}})
    assert chosen(plan) == {("a", "inference"): None, ("a", "training"): None}
    assert "training+compile" in plan.notes[0]


def test_modes_of_a_dict_reach_only_their_mode() -> None:
    mapping = {"RMSNorm": {"inference": A, "training": B, "inference+compile": C}}
    assert chosen(decide([layer("a")], mapping)) == {("a", "inference"): "A", ("a", "training"): "B"}
    plan = decide(
        [layer("a")],
        mapping,
        modes=("inference+compile",),
        kernels={(KernelRef("builtin", "", "C"), "cpu"): loaded(KernelRef("builtin", "", "C"), can_torch_compile=True)},
    )
    assert chosen(plan) == {("a", "inference+compile"): "C"}


def test_a_demand_that_cannot_be_met_lists_every_layer_and_every_reason() -> None:
    ref = KernelRef("builtin", "", "A")
    bad = loaded(
        ref,
        limits=Limits(devices=("cuda",), dtypes=("bfloat16",), min_arch="sm_90"),
        signature=(),
        reads=("gain",),
        function=print,
    )
    with pytest.raises(PlanError) as error:
        decide(
            [layer("a"), layer("b"), layer("c")],
            {"RMSNorm": A},
            kernels={(ref, "cpu"): bad},
            target=Target("cpu", "sm_80", (("torch", "2.13"),)),
        )
    text = str(error.value)
    for word in (
        "a and 2 more",
        "RMSNorm",
        "rule 1",
        "torch 2.13",
        "builtin:A",
        "not on cpu",
        "bfloat16; the layer has float32",
        "sm_90",
        "self.gain",
        "`x`",
        "go on",
        "on_miss",
    ):
        assert word in text, word


def test_on_miss_keep_turns_demands_into_wishes() -> None:
    ref = KernelRef("builtin", "", "A")
    plan = decide([layer("a")], {"RMSNorm": A}, kernels={(ref, "cpu"): "it is not there"}, on_miss="keep")
    for decision in plan.decisions:
        assert decision.kernel is None
        assert decision.rejected == (("builtin:A", ("it is not there",)),)
        assert "it is not there" in decision.reason
        assert "rule 1" in decision.asked_by


def test_a_wish_that_cannot_be_met_says_why() -> None:
    refs = (KernelRef("builtin", "", "A"), KernelRef("builtin", "", "B"))
    plan = decide(
        [layer("a", recognition=NORM, recognition_in_training=NORM)],
        {},
        defaults={("rms_norm", "cpu"): refs},
        kernels={
            (refs[0], "cpu"): "it cannot be imported",
            (refs[1], "cpu"): loaded(refs[1], op="rms_norm", limits=Limits(dtypes=("bfloat16",))),
        },
    )
    for decision in plan.decisions:
        assert decision.kernel is None
        assert decision.asked_by == "default"
        assert [name for name, _ in decision.rejected] == ["builtin:A", "builtin:B"]
        assert "it cannot be imported" in decision.reason
        assert "bfloat16" in decision.reason


def test_the_first_default_that_can_run_is_taken_and_the_ones_before_it_keep_their_reasons() -> None:
    refs = (KernelRef("builtin", "", "A"), KernelRef("builtin", "", "B"))
    plan = decide(
        [layer("a", recognition=NORM, recognition_in_training=NORM)],
        {},
        defaults={("rms_norm", "cpu"): refs},
        kernels={(refs[0], "cpu"): "no", (refs[1], "cpu"): loaded(refs[1], op="rms_norm", signature=ROLES)},
    )
    assert {d.kernel.ref.layer for d in plan.decisions} == {"B"}
    assert plan.decisions[0].rejected == (("builtin:A", ("no",)),)


def test_a_layer_too_small_to_gain_gets_a_kernel_only_where_a_rule_asks() -> None:
    ref = KernelRef("builtin", "", "A")
    limits = Limits(gains_from=(("float32", 100),))
    kernels = {(ref, "cpu"): loaded(ref, op="rms_norm", limits=limits, signature=ROLES)}
    known = {"recognition": NORM, "recognition_in_training": NORM}
    sizes = {"none": 0, "small": 99, "large": 100}
    layers = [layer(path, numel=numel, **known) for path, numel in sizes.items()]
    layers.append(layer("half", numel=99, **known | {"dtypes": ("bfloat16",)}))
    defaults = {("rms_norm", "cpu"): (ref,)}
    plan = decide(layers, {}, kernels=kernels, defaults=defaults, modes=("inference",))
    assert {path for (path, _), kernel in chosen(plan).items() if kernel} == {"large", "half"}
    reason = next(d.reason for d in plan.decisions if d.layer.path == "small")
    assert reason == "is not always faster in float32 with fewer than 100 numbers; the layer has 99"
    asked = decide(layers, {"RMSNorm": A}, kernels=kernels, modes=("inference",))
    assert set(chosen(asked).values()) == {"A"}


def test_a_rule_that_no_layer_matches_is_an_unmet_demand() -> None:
    with pytest.raises(PlanError, match=r"nowhere\.\*"):
        decide([layer("a")], {"RMSNorm@nowhere.*": A})
    plan = decide([layer("a")], {"RMSNorm@nowhere.*": A}, on_miss="keep")
    assert "nowhere.*" in plan.notes[0]


def test_a_rule_that_others_decide_everywhere_says_so() -> None:
    shared = layer("first", paths=("first", "second"))
    plan = decide([shared], {"RMSNorm": A, "RMSNorm@second": B}, on_miss="keep")
    assert "other rules decide" in plan.notes[0]


def test_an_excluded_layer_is_no_unmet_demand() -> None:
    plan = decide([layer("a", excluded="the author says no"), layer("b")], {"RMSNorm": A}, modes=("inference",))
    assert chosen(plan) == {("a", "inference"): None, ("b", "inference"): "A"}
    assert "the author says no" in plan.decisions[0].reason


def test_a_blocked_layer_is_an_unmet_demand() -> None:
    with pytest.raises(PlanError, match="somebody replaced it"):
        decide([layer("a", blocked="somebody replaced it")], {"RMSNorm": A})


@pytest.mark.parametrize(
    ("kernel", "of_layer", "target", "mode", "word"),
    [
        ({"limits": Limits(devices=("cuda", "rocm"))}, {}, CPU, "inference", "not on cpu"),
        ({"limits": Limits(dtypes=("bfloat16",))}, {"dtypes": ("bfloat16", "float64")}, CPU, "inference", "float64"),
        ({"limits": Limits(min_arch="sm_90")}, {}, Target("cuda", "sm_89"), "inference", "sm_90"),
        ({"limits": Limits(min_arch="sm_90")}, {}, Target("cuda", "sm_100"), "inference", None),
        ({"limits": Limits(min_arch="sm_80")}, {}, Target("cuda", "sm_80"), "inference", None),
        ({"limits": Limits(min_arch="sm_80")}, {}, Target("cuda", None), "inference", None),
        ({"limits": Limits(min_arch="sm_90")}, {}, Target("cuda", "sm_90a"), "inference", None),
        ({}, {}, CPU, "inference+compile", "torch.compile"),
        ({"can_torch_compile": True}, {}, CPU, "inference+compile", None),
        ({"reads": ("gain",)}, {}, CPU, "inference", "self.gain"),
        ({"reads": ("gain",)}, {"attributes": frozenset({"gain"})}, CPU, "inference", None),
        ({"signature": (X, replace(X, name="y"))}, {}, CPU, "inference", "`y`"),
        ({"op": "rms_norm"}, {}, CPU, "inference", "not recognised"),
        ({"op": "rotary"}, {"recognition": NORM}, CPU, "inference", "computes rms_norm"),
        ({"op": "rms_norm", "signature": ROLES}, {"recognition": NORM}, CPU, "inference", None),
        ({"op": "rms_norm", "signature": ROLES[:2]}, {"recognition": NORM}, CPU, "inference", "option cast"),
        ({"op": "rms_norm", "signature": ROLES[1:]}, {"recognition": NORM}, CPU, "inference", "no place for the x"),
        ({"op": "rms_norm", "signature": ()}, {"recognition": NORM}, CPU, "inference", None),
        (
            {"op": "rms_norm", "signature": ROLES, "limits": Limits(options=(("cast", ("after",)),))},
            {"recognition": NORM},
            CPU,
            "inference",
            "cast after",
        ),
        (
            {"op": "rms_norm", "signature": ROLES, "limits": Limits(options=(("cast", ("after", "before")),))},
            {"recognition": NORM},
            CPU,
            "inference",
            None,
        ),
    ],
)
def test_reasons(kernel: Any, of_layer: Any, target: Target, mode: str, word: str | None) -> None:
    if "recognition" in of_layer:
        of_layer = of_layer | {"recognition_in_training": of_layer["recognition"]}
    reasons = reasons_against(layer("a", **of_layer), loaded(KernelRef("builtin", "", "A"), **kernel), target, mode)
    if word is None:
        assert reasons == ()
    else:
        assert len(reasons) == 1
        assert word in reasons[0]


names = st.sampled_from(["RMSNorm", "MLP", "Act"])
places = st.sampled_from(["a", "b", "c"])
layer_lists = st.lists(
    st.builds(
        lambda place, index, name, device, blocked: layer(
            f"{place}.{index}", name, device=device, paths=(f"{place}.{index}",), blocked=blocked
        ),
        places,
        st.integers(0, 30),
        names,
        st.sampled_from(["cpu", "cuda"]),
        st.sampled_from([None, None, None, "blocked"]),
    ),
    unique_by=lambda found: found.path,
    max_size=8,
)
values = st.sampled_from([A, B, None, {"cpu": A}, {"cuda": B, "cpu": None}, {"inference": A}, {"training": {"cpu": C}}])
mappings = st.dictionaries(
    st.one_of(names, st.builds(lambda name, place: f"{name}@{place}.*", names, places)), values, max_size=5
)


@settings(max_examples=150, deadline=None)
@given(layer_lists, mappings, st.randoms())
def test_shuffling_layers_or_rules_gives_the_same_plan(
    layers: list[Layer], mapping: dict[str, Any], shuffle: random.Random
) -> None:
    """Who comes first decides nothing: not among the layers, and not among the rules."""
    plan = decide(layers, mapping, on_miss="keep")
    other, keys = list(layers), list(mapping)
    shuffle.shuffle(other)
    shuffle.shuffle(keys)
    again = decide(other, mapping, on_miss="keep")
    assert set(again.decisions) == set(plan.decisions)
    assert again.notes == plan.notes or {n.split(" (")[0] for n in again.notes} == {
        n.split(" (")[0] for n in plan.notes
    }
    assert chosen(decide(layers, {key: mapping[key] for key in keys}, on_miss="keep")) == chosen(plan)


@settings(max_examples=150, deadline=None)
@given(layer_lists, mappings)
def test_a_layer_is_decided_as_if_it_were_alone(layers: list[Layer], mapping: dict[str, Any]) -> None:
    """What alike layers share in planning must not leak: each decision is what `choose_rule` and the limits say."""
    rules, _ = parse_mapping(mapping)
    plan = decide(layers, mapping, on_miss="keep")
    assert len(plan.decisions) == 2 * len(layers)
    for decision in plan.decisions:
        rule = choose_rule(decision.layer, rules, device=decision.layer.device, mode=decision.mode)
        expected = rule.ref if rule and rule.ref and not decision.layer.blocked else None
        assert (decision.kernel.ref if decision.kernel else None) == expected
        assert decision.asked_by == (rule.where if rule else "default")
        assert (decision.kernel is None) == (decision.reason is not None)


def test_deciding_imports_no_torch() -> None:
    code = (
        "import sys, types, pathlib\n"
        "package = types.ModuleType('kernelwise'); package.__path__ = [sys.argv[1]]; sys.modules['kernelwise'] = package\n"
        "import kernelwise._plan, kernelwise._reporting._report, kernelwise._mapping, kernelwise._signature, kernelwise._data\n"
        "print(sorted({'torch', 'transformers', 'triton', 'kernels', 'huggingface_hub'} & set(sys.modules)))"
    )
    import kernelwise._plan

    folder = str(kernelwise._plan.__file__).rpartition("/")[0]
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_config_without_defaults_says_so_where_nothing_is_asked_for() -> None:
    known = layer("a", recognition=NORM, recognition_in_training=NORM)
    for defaults, said in (
        ({}, "no rule asks for it, and no kernel is put in unasked for rms_norm on cpu"),
        (None, "no rule asks for it (inherit_mapping=False)"),
    ):
        plan = make_plan([known], (), {}, target=CPU, modes=BOTH, defaults=defaults)
        assert {decision.reason for decision in plan.decisions} == {said}
