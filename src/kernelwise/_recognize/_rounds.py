"""Rounds: the ways in which a layer or a function is traced, so that a branch on a size or a dtype shows.

The first one finds what fills each role; the others prove it: more ranks, sizes and dtypes, sizes that code names, sizes that
are the same. What no round can be about, arguments that do not fit together, is looked at by every call (`_fit`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from kernelwise._recognize._conditions import FIXED, Sizes, Tree, parts_of
from kernelwise._recognize._record import Widths
from kernelwise.ops import Operation, Role, Variant

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
_BEFORE = 6


@dataclass(frozen=True, slots=True)
class Round:
    """One way to trace: the leading dimensions of the inputs, the dtypes, and the arguments that are None.

    `width` is the last dimension of a module's inputs, where that is not the one it was first traced with; `sizes` are
    sizes of an operation's arguments (D: the width of a head) that are not the usual ones. `shared`: angles have a batch
    of one and broadcast.
    """

    lead: tuple[int, ...]
    widths: Widths
    absent: frozenset[str] = frozenset()
    width: int | None = None
    sizes: tuple[tuple[str, int], ...] = ()
    shared: bool = False

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return self.lead[0] if self.lead else 1

    @property
    def length(self) -> int:
        """Number of positions."""
        return self.lead[-1] if self.lead else 1

    @property
    def before(self) -> int:
        """Number of positions in front of those, where an operation has some: there may be none."""
        return _BEFORE if self.length > 1 else 0

    def __str__(self) -> str:
        activations, parameters = (
            str(d).removeprefix("torch.") for d in (self.widths.activations, self.widths.parameters)
        )
        where = f"on inputs of {len(self.lead) + 1} dimensions {self.lead} in {activations}, parameters in {parameters}"
        where += ", children that give another dtype" if self.widths.leaves else ""
        where += "".join(f", {name} giving {str(dtype).removeprefix('torch.')}" for name, dtype in self.widths.odd)
        where += f", {self.width} elements wide" if self.width else ""
        where += "".join(f", {name} {size}" for name, size in self.sizes)
        return where + (", one sequence of angles for all" if self.shared else "")


# Primes that no width of a model is: a leading dimension is never mistaken for another one.
FIRST = Round((11, 13), Widths(BF16, BF16))
ROUNDS = (
    Round((1031, 8209), Widths(BF16, BF16)),
    Round((1, 1), Widths(F16, F16)),
    Round((17,), Widths(F32, F32)),
    Round((7, 19, 23), Widths(F32, F32)),
    Round((11, 13), Widths(BF16, F32)),
    Round((11, 13), Widths(F32, BF16)),
    Round((11, 13), Widths(F16, F16)),
    Round((11, 13), Widths(BF16, BF16, F32)),
)
# For code that looks at sizes and decides something: it may ask for a number of dimensions.
ROUNDS_OF_RANKS = (Round((), FIRST.widths), Round((2, 3, 5, 7), FIRST.widths))
# For code that looks at dtypes and decides something: those that are not among the usual ones.
ROUNDS_OF_DTYPES = tuple(
    Round((11, 13), Widths(*dtypes))
    for dtypes in (
        *((F16, F32), (F32, F16), (F16, BF16), (BF16, F16)),
        *((F32, F32, F16), (F32, F32, BF16), (F16, F16, F32), (F16, F16, BF16), (BF16, BF16, F16)),
    )
)


def rounds_of_children(names: Iterable[str]) -> tuple[Round, ...]:
    """Rounds in which one child, at a path, gives another dtype than the others."""
    return tuple(
        Round((11, 13), Widths(dtype, dtype, odd=((name, other),)))
        for name in names
        for dtype, other in itertools.permutations((BF16, F32, F16), 2)
    )


def at_roles(at: Round, roles: Mapping[str, str]) -> Round:
    """The round for a reference, whose children have roles for names."""
    odd = tuple((roles[name], dtype) for name, dtype in at.widths.odd)
    return replace(at, widths=replace(at.widths, odd=odd)) if odd else at


def rounds_of_heads(widths: Iterable[int]) -> tuple[Round, ...]:
    """Rounds in which heads have another width, of which half or all may be turned."""
    even = dict.fromkeys(width for width in widths if width % 4 == 0)
    return tuple(replace(FIRST, sizes=(("D", width), ("R", width // 2))) for width in even)


# Sizes that are the same where a function may ask: as many heads of keys as of queries, one head, all of a head turned;
# and the angles of one sequence for all.
ROUNDS_OF_FUNCTIONS = (
    *(replace(FIRST, sizes=sizes) for sizes in ((("Hk", 3),), (("Hk", 1),), (("Hq", 1), ("Hk", 1)), (("R", 46),))),
    replace(FIRST, shared=True),
)


def sizes_of_module(width: int, is_fixed: bool, at: Round) -> Sizes:
    """The sizes of the inputs of a module, by name; its width is its own choice where it has parameters."""
    return {**{str(place): size for place, size in enumerate(at.lead)}, FIXED if is_fixed else "W": at.width or width}


def sizes_of_function(at: Round) -> Sizes:
    """The sizes of the arguments of a function, by name."""
    heads = {name: _DEFAULT_SIZES[name] for name in ("D", "R", "Hq", "Hk")}
    return {"B": at.batch, "S": at.length, **heads, **dict(at.sizes)}


def names_of(sizes: Sizes) -> dict[int, Tree | None]:
    """What a size in a trace is: one of these, a product of neighbours, half a head, with a prefix; None if unclear."""
    values = list(sizes.values())
    names: dict[int, Tree] = {size: ("size", name) for name, size in sizes.items()}
    for place, (name, size) in enumerate(sizes.items()):
        tree: Tree = ("size", name)
        for other in list(sizes)[place + 1 :]:
            size, tree = size * sizes[other], ("mul", tree, ("size", other))
            names.setdefault(size, tree)
        if name in ("D", "R"):
            names.setdefault(sizes[name] // 2, ("floordiv", ("size", name), ("number", 2)))
            names.setdefault(sizes["D"] - sizes["R"], ("sub", ("size", "D"), ("size", "R")))
        elif name == "S":
            names.setdefault(sizes[name] + _BEFORE, ("add", ("size", name), ("number", _BEFORE)))
    unclear = {size for size in values if size < 2 or values.count(size) > 1}
    return {
        size: None if unclear & {sizes[name] for name in parts_of(tree, "size")} else tree
        for size, tree in names.items()
        if size > 1
    }


def with_size(sizes: Sizes, name: str, size: int) -> Sizes | None:
    """Sizes with one of them changed, and those that go with it; None where there are no such arguments."""
    if name == FIXED:
        return None
    if name in ("D", "R"):  # of a head all or a half is turned
        return {**sizes, "D": size, "R": size if size % 4 else size // 2} if name == "D" and size % 2 == 0 else None
    return {**sizes, name: size}


def round_at(at: Round, sizes: Sizes) -> Round:
    """The round that has these sizes."""
    if "B" in sizes:
        heads = ((name, size) for name, size in sizes.items() if name not in "BS")
        rest = tuple((name, size) for name, size in heads if size != _DEFAULT_SIZES[name])
        return replace(at, lead=(sizes["B"], sizes["S"]), sizes=rest)
    lead = tuple(sizes[str(place)] for place in range(len(at.lead)))
    return replace(at, lead=lead, width=sizes.get("W", at.width))


_DEFAULT_SIZES = {"B": 11, "S": 13, "H": 34, "I": 58, "D": 46, "R": 28, "Hq": 3, "Hk": 5}
SIZE_NAMES = frozenset(_DEFAULT_SIZES)


def arguments_of(op: Operation) -> list[Role]:
    """The roles of an operation that are filled by what a layer is called with."""
    return [role for role in op.roles if role.kind == "argument"]


def sizes_of(at: Round, variant: Variant, fixed: dict[str, int]) -> dict[str, Any]:
    """The sizes of an operation's tensors in one round, and what else their shapes depend on."""
    return {
        **_DEFAULT_SIZES,
        **dict(at.sizes),
        "lead": at.lead,
        "B": at.batch,
        "S": at.length,
        "P": at.before,
        **dict(variant.options),
        **fixed,
    }


def shape_of(role: Role, at: Round, variant: Variant, fixed: dict[str, int]) -> tuple[int, ...]:
    """The shape of an argument in one round."""
    sizes = sizes_of(at, variant, fixed)
    shape = role.shape(sizes)
    return (1, *shape[1:]) if at.shared and is_shared(role, shape, sizes) else shape


def is_shared(role: Role, shape: tuple[int, ...], sizes: Mapping[str, Any]) -> bool:
    """Whether a role is one of the angles that may be those of one sequence for all."""
    return role.follows in ("parameters", "complex") and len(shape) > 2 and shape[0] == sizes["B"]


def dtype_of(role: Role, at: Round) -> torch.dtype:
    """The dtype of what fills a role in one round."""
    if role.follows == "complex":
        return torch.complex64
    wide = role.kind == "attribute" or role.follows == "parameters"
    return at.widths.parameters if wide else at.widths.activations
