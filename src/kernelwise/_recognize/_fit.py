"""What has to be true of the arguments of a call for an answer to speak of it.

A proof traces a function with arguments that fit together: queries and keys of one dtype, angles for every position. What
the function does with others may be something else than the operation, and no number of traces can tell. So a call of
which the proof does not speak runs the function's own code.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from kernelwise._data import Recognition
from kernelwise._recognize._rounds import FIRST, arguments_of, is_shared, sizes_of
from kernelwise.ops import OPERATIONS, Operation, Role, Variant

PLAIN = "_kw_plain"
"""The name under which the classes of plain tensors stand where these conditions are evaluated."""


@functools.lru_cache(maxsize=1024)
def condition(answer: Recognition) -> str | None:
    """Return Python source that is true of the arguments that an answer speaks of; None where it speaks of them all.

    It names the arguments as the layer does. Ranks, sizes that must be the same, dtypes of arguments that belong together,
    and the values of an integer argument that were tried.
    """
    op = OPERATIONS.get(answer.op)
    if op is None or op.norms or op.loss:
        return None
    bound = {role: str(binding.value) for role, binding in answer.roles if binding.kind == "argument"}
    given = [role for role in arguments_of(op) if role.name in bound]
    if len(given) < 2 and not op.function:
        return None
    if not op.function:
        return " and ".join(_alike(given, bound)) or None
    variant = Variant(answer.options)
    choice, values = next(iter(op.choices.items()), ("", ()))
    filled = dict(answer.roles).get(choice)
    if filled is None:
        fits = _fits(op, variant, {}, given, bound)
    elif filled.kind == "argument":
        name = filled.value
        each = (f"{name} == {value} and {_fits(op, variant, {choice: value}, given, bound)}" for value in values)
        fits = f"type({name}) is int and ({' or '.join(each)})"
    else:
        fits = _fits(op, variant, {choice: int(filled.value or 0)}, given, bound)
    plain = [f"type({bound[role.name]}) in {PLAIN}" for role in given]
    return " and ".join([*plain, *_of_one_dtype(given, bound), f"({fits})"])


def _alike(given: list[Role], bound: dict[str, str]) -> list[str]:
    """Arguments of a module, of which some may be None: those of one kind have one dtype, and the shape if it is the same."""
    sizes = sizes_of(FIRST, Variant(), {})
    first, *others = given
    x, tests = bound[first.name], []
    for role in others:
        y, parts = bound[role.name], []
        if role.follows == first.follows:
            parts.append(f"{y}.dtype == {x}.dtype")
        with_groups = {**sizes, "group_size": sizes["H"]}
        if role.shape(with_groups) == first.shape(with_groups):
            parts.append(f"{y}.shape == {x}.shape")
        if parts:
            tests.append(f"({y} is None or type({y}) in {PLAIN} and {' and '.join(parts)})")
    return tests


def _of_one_dtype(given: list[Role], bound: dict[str, str]) -> list[str]:
    first: dict[str, str] = {}
    tests = []
    for role in given:
        name = bound[role.name]
        if first.setdefault(role.follows, name) != name:
            tests.append(f"{name}.dtype == {first[role.follows]}.dtype")
    return tests


def _fits(op: Operation, variant: Variant, fixed: dict[str, int], given: list[Role], bound: dict[str, str]) -> str:
    """The ranks of the arguments, and the sizes that are the same ones."""
    sizes = sizes_of(FIRST, variant, fixed)
    num_lead = len(FIRST.lead) if op.any_rank else 0
    there: dict[int, str] = {}  # size → the first expression that has it
    shapes: dict[tuple[int, ...], str] = {}
    ranks, tests, lead = [], [], None
    for index, role in enumerate(given):
        shape, own = role.shape(sizes), f"_kw_s{index}"
        read = f"({own} := {bound[role.name]}.shape)"
        if shape in shapes:
            tests.append(f"{bound[role.name]}.shape == {shapes[shape]}")
            continue
        shapes[shape] = own
        if op.any_rank:
            tail = len(shape) - num_lead
            ranks.append(f"{tail} < len({read}) <= {tail + 3}")  # as many leading dimensions as are tried
            if lead is not None:
                tests.append(f"{own}[:-{tail}] == {lead}")
            lead = lead or f"{own}[:-{tail}]"
        else:
            ranks.append(f"len({read}) == {len(shape)}")
        for dim in range(num_lead, len(shape)):
            place = f"{own}[{dim - len(shape)}]"
            if dim == 0 and is_shared(role, shape, sizes) and shape[0] in there:
                tests.append(f"({place} == 1 or {place} == {there[shape[0]]})")
            elif shape[dim] in there:
                tests.append(f"{place} == {there[shape[dim]]}")
            else:
                tests += _relation(place, shape[dim], sizes, there)
                there[shape[dim]] = place
    return " and ".join([*ranks, *tests])


def _relation(place: str, size: int, sizes: Mapping[str, Any], there: dict[int, str]) -> list[str]:
    """How a size that no argument before has stands to those that they have."""
    width, part, length, before = (sizes[name] for name in ("D", "R", "S", "P"))
    if 2 * size in there:
        return [f"2 * {place} == {there[2 * size]}"]
    if size in (part, part // 2) and width in there:
        return [f"{place if size == part else f'2 * {place}'} <= {there[width]}"]
    if size == length and length + before in there:
        return [f"{place} <= {there[length + before]}"]
    return []
