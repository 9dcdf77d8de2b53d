"""Loss functions: recognised by what they compute, whatever their arguments are called.

A loss takes logits and labels, and often the size of the vocabulary, by what to divide, which label does not count, labels
that are shifted already. What each argument is for is found by trying: the graphs of the function and of the reference must
be the same with every mix of the optional ones, for other sizes and dtypes, and for another label that does not count.

A head with its loss is found by its parts: a model that takes labels, has one linear layer that widens, and calls a loss that
is known. How it joins them is looked at when it runs, by logits that are computed only when they are read.
"""

from __future__ import annotations

import inspect
import itertools
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from kernelwise._data import Binding, Recognition
from kernelwise._recognize._graph import Graph
from kernelwise._recognize._match import match
from kernelwise._recognize._memory import Entry
from kernelwise._recognize._reach import looks_into_keywords, not_only_of_its_inputs
from kernelwise._recognize._reads import Reads
from kernelwise._recognize._record import Failed, Recorder, Source, Untraceable, Widths
from kernelwise._recognize._rounds import names_of
from kernelwise._recognize._sizes import Watch
from kernelwise._recognize._stand_in import Stage
from kernelwise._recognize._trace import trace
from kernelwise.ops import OPERATIONS, Operation, Variant

LABELS = "labels"
"""The argument by which a model is asked for its loss. It decides when logits need not be computed, not what they are."""

_VOCABULARY = 58
_LARGE = 200_003
_SIZES = ((11, 13), (1, 2), (7, 257))
_DTYPES = (torch.bfloat16, torch.float32, torch.float16)
_OPTIONAL = ("num_items", "shifted")


@dataclass(frozen=True, slots=True)
class _Signature:
    """What the arguments of a function may be: two tensors, the size of the vocabulary, some that may be None, an int."""

    tensors: tuple[str, str]
    vocabulary: str | None
    optional: tuple[str, ...]
    ignored: str | None
    default: int


def find_loss(function: Callable[..., Any]) -> Recognition | str:
    """Return what a loss function computes, or why that is not known."""
    signature = _signature(function)
    if isinstance(signature, str):
        return signature
    asks = not_only_of_its_inputs(Reads(), (function,))
    if asks is not None:
        return asks
    if looks_into_keywords(function):
        return "it looks into its further keywords"
    problem = "no known loss has this graph"
    for op in OPERATIONS.values():
        for variant, names in itertools.product(op.variants if op.loss else (), _namings(signature)):
            why_not = _differs(function, signature, op, variant, names)
            if why_not is None:
                roles = [(role.name, _binding(names.get(role.name))) for role in op.roles]
                ignored = (
                    Binding("argument", signature.ignored)
                    if signature.ignored
                    else Binding("constant", signature.default)
                )
                return Recognition(op.name, (*roles, ("ignore_index", ignored)), variant.options)
            problem = why_not or problem
    return problem


def _binding(name: str | None) -> Binding:
    return Binding("constant", None) if name is None else Binding("argument", name)


def _signature(function: Callable[..., Any]) -> _Signature | str:
    try:
        parameters = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]
    except (TypeError, ValueError):
        return "its arguments are not known"
    if any(p.kind in (p.VAR_POSITIONAL, p.POSITIONAL_ONLY) for p in parameters):
        return "its arguments have no names"
    needed = [p.name for p in parameters if p.default is p.empty]
    optional = tuple(p.name for p in parameters if p.default is None)
    numbers = [p for p in parameters if type(p.default) is int]
    if not 2 <= len(needed) <= 3 or len(optional) > 2 or len(numbers) > 1:
        return f"it takes {', '.join(needed)} and {len(optional) + len(numbers)} more arguments"
    if len(needed) + len(optional) + len(numbers) != len(parameters):
        return "it takes an argument that is neither a tensor nor a number"
    number = numbers[0] if numbers else None
    return _Signature(
        (needed[0], needed[1]),
        needed[2] if len(needed) == 3 else None,
        optional,
        number.name if number else None,
        number.default if number else -100,
    )


def _namings(signature: _Signature) -> Iterator[dict[str, str]]:
    """Every way in which the optional arguments of a function can be those of the reference."""
    tensors = dict(zip(("logits", "labels"), signature.tensors, strict=True))
    for roles in itertools.permutations(_OPTIONAL, len(signature.optional)):
        yield tensors | dict(zip(roles, signature.optional, strict=True))


def _differs(
    function: Callable[..., Any], signature: _Signature, op: Operation, variant: Variant, names: dict[str, str]
) -> str | None:
    """Return where a function is not this variant (empty: nowhere near it), or None."""
    optional = [role for role in _OPTIONAL if role in names]
    mixes = [frozenset(mix) for n in range(len(optional) + 1) for mix in itertools.combinations(optional, n)]
    first = True
    for size, dtype in zip(_SIZES, _DTYPES, strict=True):
        for mix, counts, ignored in itertools.product(
            mixes, (torch.int64, torch.float32, None), (signature.default, 5)
        ):
            if (counts is not torch.int64 and "num_items" not in mix) or (ignored == 5 and signature.ignored is None):
                continue
            given = _Given(size, dtype, mix, counts, ignored)
            try:
                own = _graph(function, given, signature, {role: names[role] for role in names})
            except Untraceable as reason:
                return str(reason) if first else f"is {op.name}, but not always: {reason}"
            reference = _graph(
                op.reference, given, None, {role: role for role in ("logits", "labels", *_OPTIONAL)}, variant
            )
            found = match(reference, own, {})
            if found is None or any(
                names.get(role) != getattr(bound, "name", None) for role, bound in found.roles.items()
            ):
                return "" if first else f"is {op.name} {dict(variant.options)}, but not for {dtype} and {sorted(mix)}"
            first = False
    return _differs_by_vocabulary(function, signature, op, variant, names)


def _differs_by_vocabulary(
    function: Callable[..., Any], signature: _Signature, op: Operation, variant: Variant, names: dict[str, str]
) -> str | None:
    """Return where a function looks at the vocabulary that it is told of, or None: logits may be padded beyond it."""
    for width, said in ((_LARGE, _LARGE), (_VOCABULARY, _VOCABULARY - 1)) if signature.vocabulary else ():
        given = _Given(_SIZES[0], _DTYPES[0], frozenset(), torch.int64, signature.default, width, said)
        try:
            own = _graph(function, given, signature, names)
        except Failed:
            continue
        except Untraceable as reason:
            return f"is {op.name}, but not always: {reason}"
        reference = _graph(
            op.reference, given, None, {role: role for role in ("logits", "labels", *_OPTIONAL)}, variant
        )
        if match(reference, own, {}) is None:
            return f"is {op.name} {dict(variant.options)}, but not for {width} logits and a vocabulary of {said}"
    return None


@dataclass(frozen=True, slots=True)
class _Given:
    """One way to call a loss. `counts` is the dtype of the number of items; None: a plain number.

    `width` is the size of the vocabulary in the logits, `said` the one that the loss is given besides.
    """

    size: tuple[int, int]
    dtype: torch.dtype
    mix: frozenset[str]
    counts: torch.dtype | None
    ignored: int
    width: int = _VOCABULARY
    said: int = _VOCABULARY


def _graph(
    function: Callable[..., Any],
    given: _Given,
    signature: _Signature | None,
    names: dict[str, str],
    variant: Variant | None = None,
) -> Graph:
    """Trace a loss, or the reference (`variant`), on fake tensors. Raises `Untraceable`, also for what decides by sizes."""
    batch, length = given.size
    watch = Watch(names_of({"batch": batch, "length": length, "logits": given.width}))
    stage = Stage(Recorder(watch.cut), FakeTensorMode(), Widths(given.dtype, given.dtype), watch=watch)

    def make(role: str) -> Any:
        if role in _OPTIONAL and role not in given.mix:
            return None
        if role == "num_items" and given.counts is None:
            return 37
        if role == "num_items":
            tensor = stage.fake((), given.counts or torch.int64)
        elif role == "logits":
            tensor = stage.fake((*given.size, given.width), given.dtype)
        else:
            tensor = stage.fake(given.size, torch.int64)
        return stage.recorder.input(tensor, Source("argument", names[role]))

    arguments = {name: make(role) for role, name in names.items()}
    if variant is not None:
        arguments |= {"ignore_index": given.ignored, **dict(variant.options)}
    elif signature is not None:
        if signature.vocabulary is not None:
            arguments[signature.vocabulary] = given.said
        if signature.ignored is not None:
            arguments[signature.ignored] = given.ignored
    graph = trace(stage, function, (), arguments)
    if watch.failed:
        raise Untraceable("it goes on after PyTorch has raised an exception: it decides something by it")
    if watch.decisions:
        raise Untraceable("it decides something by the sizes of its tensors")
    return graph


_known: weakref.WeakKeyDictionary[Callable[..., Any], tuple[Entry, bool]] = weakref.WeakKeyDictionary()


def find_head(model: nn.Module) -> tuple[str, str | None] | None:
    """Return the child that gives a model its logits, and why it must run its own code; None where none is found.

    It is the only child with more outputs than inputs in a model whose `loss_function` is a cross-entropy.
    """
    wide = [name for name, child in model._modules.items() if child is not None and _widens(child)]
    if not wide or not _has_known_loss(model):
        return None
    head: Any = model._modules[wide[0]]
    if len(wide) > 1:
        return wide[0], f"it has several linear layers that widen: {', '.join(wide)}"
    if type(head) is not nn.Linear:
        return wide[0], f"its head {wide[0]} is a {type(head).__qualname__}, not a plain linear layer"
    return wide[0], None


def joins(head: nn.Module, name: str) -> Recognition:
    """Return what a head, the child of that name, computes with its loss."""
    bias = (
        Binding("attribute", f"{name}.bias") if getattr(head, "bias", None) is not None else Binding("constant", None)
    )
    roles = (
        ("weight", Binding("attribute", f"{name}.weight")),
        ("labels", Binding("argument", LABELS)),
        ("bias", bias),
    )
    return Recognition("linear_cross_entropy", roles)


def _widens(child: Any) -> bool:
    wide, narrow = getattr(child, "out_features", None), getattr(child, "in_features", None)
    return isinstance(wide, int) and isinstance(narrow, int) and wide > narrow


def _has_known_loss(model: Any) -> bool:
    try:
        function = model.loss_function
    except Exception:  # it has none, or its own code cannot say which
        return False
    if not inspect.isfunction(function):
        return False
    known = _known.get(function)
    if known is None or not known[0].code_holds():
        found = find_loss(function)
        answer = isinstance(found, Recognition) and found.op == "cross_entropy"
        # An entry stands for the code that was read; its answer is not looked at.
        known = _known[function] = Entry(Recognition("cross_entropy", ()), Reads(), (function,)), answer
    return known[1]
