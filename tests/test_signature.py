"""Binding one forward to another by position: what is said to fit is called right, and no value ends in another's place."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernelwise._data import Parameter
from kernelwise._signature import bind, source


def parameters(declaration: str) -> tuple[Parameter, ...]:
    """Read a parameter list as Python writes it."""
    namespace: dict[str, Any] = {}
    exec(f"def f({declaration}): pass", namespace)
    found = inspect.signature(namespace["f"]).parameters.values()
    return tuple(Parameter(p.name, p.kind.name.lower(), p.default is not p.empty) for p in found)


@pytest.mark.parametrize(
    ("layer", "kernel", "call"),
    [
        ("hidden_states", "x", "hidden_states"),
        ("x", "x, eps=1e-6", "x"),
        ("x, residual=None", "x, residual=None", "x, residual"),
        ("a, b, /", "x, y", "a, b"),
        ("x, *, scale", "x, *, scale", "x, scale=scale"),
        ("x, *, scale", "x, scale", "x, scale=scale"),
        ("x, *, scale=1", "x, scale=2", "x, scale=scale"),
        ("*, a, b", "*, b, a", "a=a, b=b"),
        ("x, *args", "x, *rest", "x, *args"),
        ("x, **kwargs", "x, **more", "x, **kwargs"),
        ("*args, **kwargs", "*args, **kwargs", "*args, **kwargs"),
        ("", "", ""),
        ("", "eps=1e-6", ""),
    ],
)
def test_what_fits(layer: str, kernel: str, call: str) -> None:
    assert bind(parameters(layer), parameters(kernel)) == (call, ())


@pytest.mark.parametrize(
    ("layer", "kernel", "word"),
    [
        ("x", "", "no argument for the layer's `x`"),
        ("x, y", "x", "`y`"),
        ("x", "x, y", "needs `y`"),
        ("x", "x, *, y", "needs `y`"),
        ("x, y", "y, x", "`y`"),
        ("x, residual", "x, eps=1e-6, residual=None", "`residual`"),
        ("x, *, scale", "scale, x=None", "`scale`"),
        ("x, *, scale", "scale, x=None, **more", "`scale`"),
        ("x, *, scale", "x", "`scale`"),
        ("x, *args", "x", "`*args`"),
        ("x, *args", "x, eps=1e-6, *rest", "`*args`"),
        ("x, **kwargs", "x", "`**kwargs`"),
    ],
)
def test_what_would_be_a_guess_is_refused_with_the_name(layer: str, kernel: str, word: str) -> None:
    _, reasons = bind(parameters(layer), parameters(kernel))
    assert reasons
    assert word in " ".join(reasons)


@st.composite
def declarations(draw: st.DrawFn) -> str:
    """A legal parameter list over a few names, every kind of parameter in it."""
    names = draw(st.permutations(["a", "b", "c", "d"]))[: draw(st.integers(0, 4))]
    kinds = sorted(draw(st.sampled_from([0, 1, 3])) for _ in names)
    parts: list[str] = []
    needs_default = False
    star = draw(st.booleans())
    for index, (name, kind) in enumerate(zip(names, kinds, strict=True)):
        if kind == 3 and (index == 0 or kinds[index - 1] != 3):
            parts.append("*rest" if star else "*")
        default = draw(st.booleans()) or (needs_default and kind != 3)
        needs_default = needs_default or (default and kind != 3)
        parts.append(f"{name}='default of {name}'" if default else name)
        if kind == 0 and (index + 1 == len(kinds) or kinds[index + 1] != 0):
            parts.append("/")
    if star and 3 not in kinds:
        parts.append("*rest")
    if draw(st.booleans()):
        parts.append("**more")
    return ", ".join(parts)


@settings(max_examples=200, deadline=None)
@given(declarations(), declarations())
def test_no_value_ends_in_the_place_of_another(layer: str, kernel: str) -> None:
    """Where `bind` has no reason against it, the call works and each value is where its position or name belongs."""
    of_layer, of_kernel = parameters(layer), parameters(kernel)
    call, reasons = bind(of_layer, of_kernel)
    if reasons:
        return
    namespace: dict[str, Any] = {}
    exec(f"def kernel({kernel}): return locals()", namespace)
    values = {p.name: f"value of {p.name}" for p in of_layer}
    for p in of_layer:
        if p.kind == "var_positional":
            values[p.name] = ("more", "values")  # type: ignore[assignment]
        elif p.kind == "var_keyword":
            values[p.name] = {"unheard": "of"}  # type: ignore[assignment]
    received = eval(f"kernel({call})", namespace | values)
    shared = {p.name for p in of_layer} & {p.name for p in of_kernel} - {"rest", "more"}
    for name in shared:
        assert received[name] == values[name], f"{name} holds {received[name]!r}"
    if any(p.kind == "var_positional" for p in of_layer):
        assert received["rest"][-2:] == ("more", "values")
    if any(p.kind == "var_keyword" for p in of_layer):
        assert received["more"]["unheard"] == "of"
    arrived = [value for name, value in received.items() if name not in ("rest", "more")]
    arrived += [*received.get("rest", ()), *received.get("more", {}).values()]
    for p in of_layer:
        if not p.kind.startswith("var_"):
            assert arrived.count(values[p.name]) == 1


@settings(max_examples=100, deadline=None)
@given(declarations())
def test_the_source_of_a_signature_declares_and_passes_all_of_it(declaration: str) -> None:
    """A function with the declared parameters that passes everything on is the same as the function itself."""
    found = parameters(declaration)
    declared, passed = source(found)
    namespace: dict[str, Any] = {}
    exec(f"def inner({declaration}): return locals()", namespace)
    exec(f"def outer({declared}): return inner({passed})", namespace)
    values = [p for p in found if p.kind in ("positional_only", "positional_or_keyword")]
    keywords = {p.name: p.name for p in found if p.kind == "keyword_only"}
    arguments = [p.name for p in values]
    if any(p.kind == "var_positional" for p in found):
        arguments += ["extra"]
    if any(p.kind == "var_keyword" for p in found):
        keywords["unheard"] = "of"
    assert namespace["outer"](*arguments, **keywords) == namespace["inner"](*arguments, **keywords)
    kinds = [p.kind.name.lower() for p in inspect.signature(namespace["outer"]).parameters.values()]
    assert kinds == [p.kind for p in found]
