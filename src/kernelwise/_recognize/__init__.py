"""Stage: module or function → canonical graph → operation with its roles and options.

Recognition looks only at what a forward computes, traced on fake tensors built from metadata. Answers are remembered by
the code of the forward and by every value that it has read, so a second layer of the same kind costs microseconds.
"""

from __future__ import annotations

import functools
import threading
import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from kernelwise._data import Recognition
from kernelwise._recognize._children import find
from kernelwise._recognize._code import global_names
from kernelwise._recognize._compare import forget_references
from kernelwise._recognize._explain import NearMiss, near_miss
from kernelwise._recognize._fit import condition
from kernelwise._recognize._memory import Entry, found_at, modes
from kernelwise._recognize._reach import is_library, not_only_of_its_inputs, plain_function
from kernelwise._recognize._reads import MISSING, OF_THE_MODULE, PLAIN, SCALARS, Reads, has_hooks, is_child_token, said
from kernelwise._recognize._record import Untraceable
from kernelwise._recognize._search import Finding, find_function
from kernelwise._recognize._trace import innermost_forward
from kernelwise.ops import OPERATIONS, Operation


@dataclass(frozen=True, slots=True)
class Unknown:
    """No operation was recognised: why, and the canonical graph if there is one."""

    reason: str
    graph: str | None = None


def recognize(module: nn.Module, *, training: bool | None = None) -> Recognition | Unknown:
    """Return what `module` computes, or why that is not known.

    `training` asks about the module as if `train()` or `eval()` had been called on it; without it, as it is. The module
    is neither called nor changed. Safe to call from several threads.
    """
    try:
        forward = innermost_forward(module)
    except Untraceable as reason:
        return Unknown(str(reason))
    with _lock:
        recognizer = Recognizer()  # before its answers are looked up: it forgets those of other operations
        entries = _entries_for(forward, type(module), training)
        answer: Recognition | Unknown = recognizer.entry(module, training, entries).answer
        return answer


class Recognizer:
    """Recognises the modules of one model, one after the other.

    What the answers about many modules depend on together, the code that they run, is compared once.
    """

    def __init__(self) -> None:
        self._code_holds: dict[Entry, bool] = {}
        with _lock:
            _forget_if_operations_changed()

    def both(self, module: nn.Module) -> tuple[Entry, Entry]:
        """Return the answers for `module` in inference and in training; `NOTHING` where another forward stands on it."""
        try:
            forward = innermost_forward(module)
        except Untraceable:
            return NOTHING, NOTHING
        with _lock:
            inference = self.entry(module, False, _entries_for(forward, type(module), False))
            if not inference.reads_training:
                return inference, inference
            return inference, self.entry(module, True, _entries_for(forward, type(module), True))

    def entry(self, module: nn.Module, training: bool | None, entries: _Entries) -> Entry:
        """Return the answer for a module among those remembered, or trace it. The lock is held."""
        for entry in entries:
            if entry.holds(module):
                holds = self._code_holds.get(entry)
                if holds is None:
                    holds = self._code_holds[entry] = entry.code_holds()
                if holds:
                    return entry
        forward = innermost_forward(module)
        # Before a trace too, which would run it.
        problem = not_only_of_its_inputs(Reads(), (forward,), type(module))
        finding = find(module, training=training) if problem is None else Finding(None, problem, None, Reads())
        answer = _answer(finding, forward, type(module))
        if isinstance(answer, Recognition):
            answer = _with_what_it_depends_on(answer, module, finding.reads)
        flags = modes(module, finding.reads)
        other = next((path for path, agrees in flags if not agrees), None)
        if other is not None:
            answer = Unknown(f"its child {'.'.join(other)} is in another mode (training) than itself", finding.graph)
        entry = Entry(answer, finding.reads, (forward,), flags, type(module))
        self._code_holds[entry] = True
        entries.insert(0, entry)
        del entries[_MOST_ENTRIES:]
        return entry


def _entries_for(forward: Callable[..., Any], cls: type[nn.Module], training: bool | None) -> _Entries:
    by_class = _modules.get(forward)
    if by_class is None:
        by_class = _modules[forward] = weakref.WeakKeyDictionary()
    known = by_class.get(cls)
    if known is None:
        known = by_class[cls] = {}
    return known.setdefault(training, [])


def _with_what_it_depends_on(answer: Recognition, module: nn.Module, reads: Reads) -> Recognition:
    """Add what the trace has read of the module itself, besides what fills a role: a call must find the same."""
    bound = {str(binding.value) for _, binding in answer.roles if binding.kind in ("attribute", "child")}
    depends, of_class, held, modes = set(), set(), {}, []
    for path, value in reads.tokens.items():
        name, *below = path
        if name in ("training", "forward") or ".".join(path) in bound or (name in bound and path not in reads.asked):
            continue  # what fills a role is read at each call; a child is called, whatever it is
        if name not in bound and value is not MISSING:
            if isinstance(value, tuple) and value[0] == "tensor" and name not in module.__dict__:
                held[name] = said(found_at(module, (name,)))
            elif any(name in kept for kept in _own(module)):
                depends.add(name)
            elif not (isinstance(value, tuple) and value[0] == "property"):
                of_class.add(name)
        if not all(type(part) is str and part and "." not in part for part in path):
            continue
        if value is OF_THE_MODULE:
            modes.append(".".join(path[:-1]))
        elif is_child_token(value):
            if value[2]:  # a container that was looked into: by names and classes
                held[".".join((*path, "_modules"))] = kinds_of(_child(module, path)._modules)
        elif value is MISSING:
            held[".".join(path)] = MISSING
        elif isinstance(value, tuple) and value[0] in SCALARS:
            if below:
                held[".".join(path)] = value[1]
        elif path in reads.asked or (
            isinstance(value, tuple) and (below or value[0] in _CONTAINERS) and _is_plain(value)
        ):
            held[".".join(path)] = said(found_at(module, path))
    return replace(
        answer,
        depends=tuple(sorted(depends)),
        held=tuple(sorted(held.items())),
        modes=tuple(sorted(modes)),
        of_class=tuple(sorted(of_class)),
    )


def _own(module: nn.Module) -> tuple[dict[str, Any], ...]:
    """Where a module keeps what is its own, and not of its class."""
    return module.__dict__, module._modules, module._parameters, module._buffers


_CONTAINERS = (list, tuple, dict)


def _is_plain(value: tuple[Any, ...]) -> bool:
    """Whether a token is that of a container, or of a value that is no object: no tensor, no method, no config."""
    return value[0] in _CONTAINERS or (isinstance(value[0], type) and issubclass(value[0], PLAIN))


def _child(module: nn.Module, path: tuple[str, ...]) -> nn.Module:
    for name in path:
        module = module._modules[name]  # type: ignore[assignment]
    return module


def kinds_of(children: dict[str, nn.Module | None]) -> tuple[str, ...]:
    """Names and classes of the children of a container, and which of them run more than the forward of their class."""
    return tuple(
        f"{name}: {type(child).__qualname__}{' with hooks' if child is not None and has_hooks(child) else ''}"
        for name, child in children.items()
    )


def recognize_functions(module: nn.Module) -> tuple[tuple[str, Recognition], ...]:
    """Return the functions that the module's forward calls through its globals and that are known operations.

    Each comes as its global name and what it computes: `(("apply_rotary_pos_emb", Recognition("rotary", ...)),)`.
    """
    return tuple((name, answer) for name, _, answer in functions_called(module) if isinstance(answer, Recognition))


def functions_called(
    module: nn.Module,
) -> tuple[tuple[str, types.FunctionType, Recognition | Unknown], ...]:
    """Return the functions that the module's forward calls through its globals: name, function, what it computes."""
    try:
        forward = plain_function(innermost_forward(module))
    except Untraceable:
        return ()
    if forward is None or is_library(forward):
        return ()
    found = []
    for name in _sorted_names(forward.__code__):
        value = forward.__globals__.get(name)
        function = plain_function(value) if callable(value) else None
        if function is not None and not is_library(function):
            found.append((name, function, _recognize_function(function)))
    return tuple(found)


@functools.lru_cache(maxsize=4096)
def _sorted_names(code: types.CodeType) -> tuple[str, ...]:
    return tuple(sorted(global_names(code)))


_MOST_ENTRIES = 256  # answers kept for one forward of one class: more kinds of layer than any model has
_Entries = list[Entry]
_lock = threading.RLock()
_modules: weakref.WeakKeyDictionary[
    Callable[..., Any], weakref.WeakKeyDictionary[type[nn.Module], dict[bool | None, _Entries]]
] = weakref.WeakKeyDictionary()
_functions: weakref.WeakKeyDictionary[Callable[..., Any], Entry] = weakref.WeakKeyDictionary()


NOTHING = Entry(Unknown("its forward was replaced on this instance"), Reads(), ())

_operations: list[tuple[Operation, ...]] = [tuple(OPERATIONS.values())]  # what the answers were found among


def _recognize_function(function: types.FunctionType) -> Recognition | Unknown:
    with _lock:
        _forget_if_operations_changed()
        entry = _functions.get(function)
        if entry is None or not entry.code_holds():
            problem = not_only_of_its_inputs(Reads(), (function,))
            finding = find_function(function) if problem is None else Finding(None, problem, None, Reads())
            entry = _functions[function] = Entry(_answer(finding, function), Reads(), (function,))
        known: Recognition | Unknown = entry.answer
        return known


def _forget_if_operations_changed() -> None:
    now = tuple(OPERATIONS.values())
    if _operations[0] != now:
        _modules.clear()
        _functions.clear()
        forget_references()
        _operations[0] = now


def _answer(finding: Finding, function: Callable[..., Any], cls: type | None = None) -> Recognition | Unknown:
    if finding.recognition is None:
        return Unknown(finding.reason or "no known operation has this graph", finding.graph)
    problem = not_only_of_its_inputs(finding.reads, (function,), cls)  # also of methods that the trace has found
    return finding.recognition if problem is None else Unknown(problem, finding.graph)


__all__ = [
    "NOTHING",
    "Entry",
    "NearMiss",
    "Recognizer",
    "Unknown",
    "condition",
    "found_at",
    "functions_called",
    "kinds_of",
    "near_miss",
    "plain_function",
    "recognize",
    "recognize_functions",
    "said",
]
