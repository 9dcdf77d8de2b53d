"""Conditions on sizes: how their sides come about, and at which sizes they have the other outcome.

A trace writes down every condition that it meets as a tree over named sizes and numbers. Sizes are looked for near those
numbers, then near their powers, one size changed at a time, then two.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

Tree = tuple[Any, ...]
"""How a value comes about: `("size", "B")`, `("number", 40)`, or an operator with its operands.

`("unnamed", 12)` is a size of a tensor of which nobody knows where it comes from.
"""
FIXED = "the width"
"""The size that a module has chosen itself, by its parameters: it is the same in every trace."""
Decisions = Mapping[Tree, bool]
Sizes = dict[str, int]

LARGEST = 1 << 22
"""The largest size that is tried: a forward that cuts its input into pieces must come to an end."""

OPERATORS = ("add", "sub", "mul", "floordiv", "mod", "pow", "truediv", "lshift", "rshift", "and_", "or_", "xor")
COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")
OF_ONE: dict[str, Callable[..., Any]] = {
    "neg": operator.neg,
    "pos": operator.pos,
    "invert": operator.invert,
    "abs": operator.abs,
    "floor": math.floor,
    "ceil": math.ceil,
    "trunc": math.trunc,
}
COMPUTE: dict[str, Callable[..., Any]] = {
    **{name: getattr(operator, name) for name in (*OPERATORS, *COMPARISONS)},
    **OF_ONE,
    "round": round,
}
MOST_PARTS = 64
"""A number that is computed from more than this is not followed: trees are walked again and again."""


def value_of(tree: Tree, sizes: Mapping[str, int]) -> Any:
    """What a tree is at other sizes. Raises `ArithmeticError` and `ValueError` as the code would."""
    if tree[0] == "size":
        return sizes[tree[1]]
    if tree[0] in ("number", "unnamed"):
        return tree[1]
    operands = [value_of(part, sizes) for part in tree[1:]]
    if tree[0] in ("pow", "lshift") and operands[1] > MOST_PARTS:
        raise OverflowError(tree[0])
    return COMPUTE[tree[0]](*operands)


def parts_of(tree: Tree, kind: str) -> Iterator[Any]:
    """The names of the sizes, the numbers, or the unnamed sizes that a tree is made of."""
    if tree[0] == kind:
        yield tree[1]
    elif tree[0] not in ("size", "number", "unnamed"):
        for part in tree[1:]:
            yield from parts_of(part, kind)


def sizes_otherwise(
    tree: Tree, decisions: Decisions, at: Sizes, change: Callable[[Sizes, str, int], Sizes | None]
) -> Sizes | None:
    """Sizes at which a decision has the other outcome, if possible with those that were made before it as they were.

    `change(sizes, name, size)` gives sizes with one of them changed, or None where there are none.
    """
    before = list(itertools.takewhile(lambda one: one != tree, decisions))
    fallback = None
    for numbers_near in (_numbers_near, _numbers_further):
        for sizes in _near(tree, at, change, numbers_near):
            if _outcome(tree, sizes) is not (not decisions[tree]):
                continue
            if all(_outcome(one, sizes) is decisions[one] for one in before):
                return sizes
            fallback = fallback or sizes
    return fallback


def _outcome(tree: Tree, sizes: Sizes) -> bool | None:
    try:
        return bool(value_of(tree, sizes))
    except (ArithmeticError, ValueError, TypeError, KeyError):
        return None


def _near(
    tree: Tree,
    at: Sizes,
    change: Callable[[Sizes, str, int], Sizes | None],
    numbers_near: Callable[[frozenset[int]], tuple[int, ...]],
) -> Iterator[Sizes]:
    """Sizes next to the numbers that a decision is about: one of them changed, then two."""
    names = list(dict.fromkeys(parts_of(tree, "size")))
    numbers = frozenset(int(n) for n in parts_of(tree, "number") if type(n) is int or math.isfinite(n))
    tried = numbers_near(numbers | {at[name] for name in names})
    starts = [at]
    starts += [there for name in names for small in (1, 2, 3) if (there := change(at, name, small)) is not None]
    for start, name, size in itertools.product(starts, names, tried):
        sizes = change(start, name, size)
        if sizes is not None:
            yield sizes


@functools.lru_cache(maxsize=1024)
def _numbers_near(numbers: Iterable[int]) -> tuple[int, ...]:
    found = {abs(number) for number in numbers}
    for a, b in itertools.permutations(found, 2):
        found |= {a + b, a * b, abs(a - b), a // b if b else a}
    near = {number + step for number in found for step in (-1, 0, 1)} | {*range(1, 65)}
    # One comes last: where a size is one, it is not told from others and nothing more is followed.
    return tuple(sorted((number for number in near if 1 <= number <= LARGEST), key=lambda n: (n == 1, n)))


@functools.lru_cache(maxsize=1024)
def _numbers_further(numbers: Iterable[int]) -> tuple[int, ...]:
    """Where no number near those of the code has the other outcome: their powers, and steps up to the largest size."""
    found = {a * (b + 1) for a, b in itertools.product(map(abs, numbers), repeat=2)} | {n * n for n in numbers}
    found |= {step << power for step in (1, 3) for power in range(LARGEST.bit_length())}
    near = {number + step for number in found for step in (-1, 0, 1)}
    return tuple(sorted(number for number in near if 1 <= number <= LARGEST))
