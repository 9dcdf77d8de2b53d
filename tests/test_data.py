"""The nouns: what goes to JSON comes back equal, and what does not fit is refused."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernelwise._data import (
    Binding,
    Decision,
    Kernel,
    KernelRef,
    Layer,
    Limits,
    Parameter,
    Plan,
    Recognition,
    Target,
    from_json,
    to_json,
)

words = st.text("abcdefgh_.αβ", min_size=1, max_size=8)
maybe = st.one_of(st.none(), words)
scalars = st.one_of(st.none(), st.booleans(), st.integers(-9, 9), st.floats(-2, 2), words)


def tuples(of: st.SearchStrategy[Any]) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.lists(of, max_size=3).map(tuple)


refs = st.builds(
    KernelRef,
    st.sampled_from(["hub", "path", "package", "builtin"]),
    words,
    words,
    st.one_of(st.none(), st.integers(0, 9)),
    maybe,
    st.booleans(),
)
bindings = st.builds(Binding, st.sampled_from(["argument", "attribute", "child", "constant"]), scalars)
recognitions = st.builds(Recognition, words, tuples(st.tuples(words, bindings)), tuples(st.tuples(words, scalars)))
parameters = st.builds(Parameter, words, words, st.booleans())
layers = st.builds(
    Layer,
    words,
    words,
    words,
    st.sampled_from(["registered", "named", "recognised"]),
    words,
    tuples(words),
    tuples(words),
    tuples(parameters),
    st.frozensets(words, max_size=3),
    maybe,
    st.one_of(st.none(), recognitions),
    maybe,
    maybe,
)
limits = st.builds(
    Limits, tuples(words), tuples(words), maybe, tuples(st.tuples(words, tuples(scalars))), tuples(words)
)
kernels = st.builds(
    Kernel, refs, maybe, limits, st.booleans(), st.booleans(), maybe, maybe, tuples(parameters), tuples(words)
)
targets = st.builds(Target, words, maybe, tuples(st.tuples(words, words)))
decisions = st.builds(
    Decision,
    layers,
    words,
    st.one_of(st.none(), kernels),
    words,
    tuples(st.tuples(words, tuples(words))),
    maybe,
)
plans = st.builds(Plan, targets, tuples(decisions), tuples(words))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.one_of(refs, recognitions, layers, limits, kernels, targets, decisions, plans))
def test_a_noun_survives_json(noun: Any) -> None:
    written = json.loads(json.dumps(to_json(noun)))
    read = from_json(type(noun), written)
    assert read == noun
    assert hash(read) == hash(noun)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"layer": "x"}, "KernelRef lacks scheme, location"),
        ({"odd": 1}, "KernelRef has no field odd"),
        ([], "expected"),
    ],
)
def test_json_of_something_else_is_refused(data: Any, said: str) -> None:
    with pytest.raises(TypeError, match=said):
        from_json(KernelRef, data)


def test_the_function_of_a_kernel_is_left_out_and_the_function_of_a_layer_is_kept() -> None:
    kernel = Kernel(KernelRef("builtin", "", "RMSNorm"), function=len)
    assert "function" not in to_json(kernel)
    assert from_json(Kernel, to_json(kernel)) == kernel
    layer = Layer("a.rotary", "rotary", "m.A", "registered", "cpu", function="apply_rotary")
    assert to_json(layer)["function"] == "apply_rotary"


def test_a_plan_as_json_is_only_plain_values() -> None:
    kernel = Kernel(KernelRef("hub", "a/b", "L", version=1), function=len)
    layer = Layer("norm", "RMSNorm", "m.Norm", "registered", "cpu", attributes=frozenset({"b", "a"}))
    written = Plan(Target("cpu"), (Decision(layer, "inference", kernel, "rule 1"),)).to_json()
    assert json.loads(json.dumps(written)) == written
    assert written["decisions"][0]["layer"]["attributes"] == ["a", "b"]


@pytest.mark.parametrize(
    ("cls", "data"),
    [
        (KernelRef, {"scheme": "hub"}),
        (KernelRef, {"scheme": "hub", "location": "a/b", "layer": "L", "verison": 1}),
        (KernelRef, []),
        (KernelRef, "hub"),
        (KernelRef, None),
        (Plan, {"target": {"device": "cpu"}}),
        (Plan, {"target": None, "decisions": []}),
        (Plan, {"target": {"device": "cpu"}, "decisions": None}),
        (Plan, {"target": {"device": "cpu"}, "decisions": 3}),
        (Plan, {"target": {"device": "cpu"}, "decisions": [], "notes": "one note"}),
        (Target, {"device": "cpu", "versions": [["torch"]]}),
    ],
)
def test_data_that_does_not_fit_is_refused(cls: type, data: Any) -> None:
    with pytest.raises((TypeError, KeyError)):
        from_json(cls, data)


@pytest.mark.parametrize(
    ("ref", "text"),
    [
        (KernelRef("hub", "org/repo", "L", version=0), "org/repo@v0:L"),
        (KernelRef("hub", "org/repo", "L", revision="abc"), "org/repo@abc:L"),
        (KernelRef("path", "/opt/k", "L"), "/opt/k:L"),
        (KernelRef("package", "liger.rms", "L"), "package:liger.rms:L"),
        (KernelRef("builtin", "", "L"), "builtin:L"),
    ],
)
def test_a_reference_prints_as_a_user_writes_it(ref: KernelRef, text: str) -> None:
    assert str(ref) == text


def test_nouns_cannot_be_changed() -> None:
    for cls in (KernelRef, Binding, Recognition, Parameter, Layer, Limits, Target, Kernel, Decision, Plan):
        params = cls.__dataclass_params__  # type: ignore[attr-defined]
        assert params.frozen, cls
        assert "__slots__" in cls.__dict__ or cls is Layer, cls  # of which many are copied
        assert not [f.name for f in dataclasses.fields(cls) if f.default_factory is not dataclasses.MISSING], cls
