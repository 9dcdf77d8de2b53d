"""What Python code says about itself: the names it looks up, what it asks for that a trace cannot answer, sizes it names.

A trace shows what a forward does on one kind of input, on objects that stand for others. What code could do elsewhere is
read from its bytecode: a global that it looks up may change, a list that it appends to is somebody else's, a number next
to a size may be the size at which it does something else.
"""

from __future__ import annotations

import dis
import functools
import itertools
import types
from collections.abc import Iterator
from typing import Any

import torch

from kernelwise._recognize._device import ATTRIBUTES, COMPARISONS, SKIPPED, uses_device

Chain = tuple[str, ...]  # a global name and the attributes that are looked up on it

_SHARED = frozenset({"LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF", "LOAD_CLASSDEREF"})  # what outlives a call

# What a trace answers in one way, and a call may answer in another one: where it runs, in which mode, how a tensor lies.
ASKED = frozenset(
    {"is_cuda", "is_cpu", "is_mps", "is_xpu", "is_meta", "get_device", "environ", "getenv", "random", "is_compiling"}
    | {"is_grad_enabled", "is_inference", "is_inference_mode_enabled", "requires_grad", "is_leaf", "retain_grad"}
    | {"is_contiguous", "stride", "storage_offset", "data_ptr", "cpu", "cuda"}
)
_WRITES = frozenset(
    {"append", "appendleft", "extend", "insert", "add", "update", "setdefault", "pop", "popitem", "popleft", "remove"}
    | {"discard", "clear", "write", "put", "__setitem__", "__setattr__"}
)
# The same of a tensor itself, and of the process; in the model's own code alone, as libraries may look at such things.
_ASKED_OF_TENSORS = frozenset(
    {"is_nested", "is_sparse", "is_quantized", "is_mkldnn", "is_shared", "is_pinned", "is_neg", "is_conj", "layout"}
    | {"names", "Parameter", "Buffer", "_version", "_base", "_is_view", "grad", "grad_fn", "output_nr", "retains_grad"}
    | {"untyped_storage", "storage", "get_num_threads", "get_num_interop_threads", "get_default_dtype"}
    | {"is_deterministic_algorithms_warn_only_enabled", "are_deterministic_algorithms_enabled", "backends", "nbytes"}
    | {"get_float32_matmul_precision", "is_tracing", "is_initialized", "get_rank", "get_world_size"}
    | {"_get_tracing_state", "is_in_onnx_export", "is_dynamo_compiling", "is_exporting", "maybe_current_level"}
    | {"_backward_hooks", "requires_grad_", "is_anomaly_enabled", "initial_seed"}
)
_SIZES = frozenset({"shape", "size", "numel", "nelement", "len", "dim", "ndim", "ndimension"})
_DTYPES = frozenset({"dtype", "half", "float16", "finfo", "itemsize", "element_size", "is_floating_point"})


@functools.lru_cache(maxsize=4096)
def instructions(code: types.CodeType) -> tuple[dis.Instruction, ...]:
    """The instructions of code that do something, in order."""
    return tuple(i for i in dis.get_instructions(code) if i.opname not in SKIPPED)


def inner(code: types.CodeType) -> Iterator[types.CodeType]:
    """Code, and that of every function defined inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from inner(constant)


@functools.lru_cache(maxsize=4096)
def global_names(code: types.CodeType) -> frozenset[str]:
    """Every name that code, or a function defined inside it, may look up in its globals or on an object."""
    return frozenset(name for part in inner(code) for name in part.co_names)


@functools.lru_cache(maxsize=4096)
def chains(code: types.CodeType) -> frozenset[Chain]:
    """Every global name that code looks up, with the attributes that it takes of it at once: `("settings", "SCALE")`."""
    found: set[Chain] = set()
    for part in inner(code):
        chain: Chain = ()
        for instruction in instructions(part):
            if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                chain = (str(instruction.argval),)
            elif chain and instruction.opname in ATTRIBUTES:
                chain = (*chain, str(instruction.argval))
            else:
                chain = ()
            if chain:
                found.add(chain)
    return frozenset(found)


@functools.lru_cache(maxsize=4096)
def imported(code: types.CodeType) -> frozenset[str]:
    """The top modules that code, or a function defined inside it, imports when it runs."""
    found = (i.argval for part in inner(code) for i in instructions(part) if i.opname == "IMPORT_NAME")
    return frozenset(str(name).partition(".")[0] for name in found)


@functools.lru_cache(maxsize=4096)
def looks_on_its_class(code: types.CodeType) -> bool:
    """Whether code looks names up on a class instead of on the object: `super()`, `type(self)`."""
    return any(name in ("super", "type", "__class__") for name in global_names(code)) or "__class__" in code.co_freevars


@functools.lru_cache(maxsize=4096)
def decides_by_size(code: types.CodeType) -> bool:
    """Whether code, or a function defined inside it, looks at sizes or at a number of dimensions and decides something."""
    return any(_SIZES & {*part.co_names} and _decides(part) for part in inner(code))


@functools.lru_cache(maxsize=4096)
def decides_by_dtype(code: types.CodeType) -> bool:
    """Whether code, or a function defined inside it, looks at dtypes and decides something."""
    return any(_DTYPES & {*part.co_names} and _decides(part) for part in inner(code))


def _decides(code: types.CodeType) -> bool:
    return any(("JUMP" in i.opname and "IF" in i.opname) or i.opname in COMPARISONS for i in instructions(code))


@functools.lru_cache(maxsize=4096)
def problem_of(code: types.CodeType) -> str | None:
    """Return why a trace cannot stand for code that is about something else than values, or None.

    It writes a global variable, asks which type an argument has, or whether it is this very object, or on what device.
    """
    for part in inner(code):
        known = instructions(part)
        first = part.co_varnames[:1]
        for index, instruction in enumerate(known):
            if instruction.opname in ("STORE_GLOBAL", "DELETE_GLOBAL"):
                return "it writes to a global variable"
            if _is_type_of(known, index):
                # A trace runs on an object of a subclass. What is looked up on the type is the same there.
                own = known[index + 1].argval in first
                if not own or known[min(index + 3, len(known) - 1)].opname not in ATTRIBUTES:
                    return "it asks for the type of " + ("its first argument" if own else "an argument")
            if instruction.opname == "IS_OP" and not _is_of_values(known, index, first):
                return "it asks whether a value is one very object"
            if _asks_what_it_has(known, index, first):
                return f"it asks which attributes an argument has ({instruction.argval})"
            if _counts_a_shape(known, index):
                return "it takes the number of elements of a shape, which cannot be followed"
            if _is_name_of_type(known, index):
                return "what it computes may depend on more than its inputs (type)"
        asked = sorted(_ASKED_OF_TENSORS & {i.argval for i in known if i.opname in ATTRIBUTES})
        if asked:
            return f"what it computes may depend on more than its inputs ({', '.join(asked)})"
        if uses_device(part):
            return "what it computes may depend on more than its inputs (device)"
    return None


def _counts_a_shape(known: tuple[dis.Instruction, ...], index: int) -> bool:
    """Whether code calls `numel` of a shape, or of what may be a part of one: `x.shape[:2].numel()`, `x.size().numel()`."""
    if known[index].opname not in ATTRIBUTES or known[index].argval != "numel" or index == 0:
        return False
    if not any(one.opname in ATTRIBUTES and one.argval in ("shape", "size") for one in known):
        return False
    value = known[index - 1]
    if not value.opname.startswith("LOAD_FAST"):
        return _may_be_a_shape(value)
    stored = (place for place, one in enumerate(known) if one.opname.startswith("STORE_FAST"))
    return any(known[place].argval == value.argval and _may_be_a_shape(known[place - 1]) for place in stored)


def _may_be_a_shape(value: dis.Instruction) -> bool:
    return value.opname.startswith(("BINARY_S", "CALL")) or (value.opname in ATTRIBUTES and value.argval == "shape")


@functools.lru_cache(maxsize=4096)
def asked_of_attributes(code: types.CodeType) -> frozenset[Chain]:
    """Attributes of the module of which code asks what only a look at the object itself tells, where they are tensors.

    Which class they have, which attributes, or for one that tensors do not have.
    """
    found: set[Chain] = set()
    for part in inner(code):
        known, first = instructions(part), part.co_varnames[:1]
        for index, instruction in enumerate(known):
            if not (instruction.opname.startswith("LOAD_FAST") and instruction.argval in first):
                continue
            following = itertools.takewhile(lambda one: one.opname in ATTRIBUTES, known[index + 1 :])
            chain = tuple(str(one.argval) for one in following)
            before = known[index - 1] if index else None
            if before is not None and before.opname == "LOAD_GLOBAL" and before.argval in _ASK_AN_OBJECT:
                behind = [one.argval for one in known[index + 1 + len(chain) :][:2]]
                if not (before.argval == "isinstance" and behind == ["torch", "Tensor"]):
                    found.add(chain)  # that it is a tensor at all is known
            found.update(
                chain[:end]
                for end in range(1, len(chain))
                if chain[end] in ("__class__", "__dict__") or not hasattr(torch.Tensor, chain[end])
            )
    return frozenset(found)


_ASK_AN_OBJECT = frozenset({"hasattr", "getattr", "isinstance", "type", "vars", "dir", "str", "repr"})


def _is_name_of_type(known: tuple[dis.Instruction, ...], index: int) -> bool:
    """Whether code calls `x.type()`, whose answer names the device too."""
    if known[index].opname not in ATTRIBUTES or known[index].argval != "type" or index + 1 >= len(known):
        return False
    return known[index + 1].opname.startswith("CALL") and known[index + 1].arg == 0


def _asks_what_it_has(known: tuple[dis.Instruction, ...], index: int, first: tuple[str, ...]) -> bool:
    """Whether code asks an argument, not the module itself, for an attribute that a tensor may have or not."""
    if known[index].opname != "LOAD_GLOBAL" or known[index].argval not in ("hasattr", "getattr", "vars", "id"):
        return False
    if known[index].argval == "id":  # one object may have two stand-ins
        return True
    value = known[index + 1] if index + 1 < len(known) else None
    return value is not None and value.opname.startswith("LOAD_FAST") and value.argval not in first


def _is_type_of(known: tuple[dis.Instruction, ...], index: int) -> bool:
    if known[index].opname != "LOAD_GLOBAL" or known[index].argval != "type" or index + 2 >= len(known):
        return False
    return known[index + 1].opname.startswith("LOAD_FAST") and known[index + 2].opname.startswith("CALL")


def _is_of_values(known: tuple[dis.Instruction, ...], index: int, first: tuple[str, ...]) -> bool:
    """Whether `a is b` compares with None, or what stands on the module with a constant, two globals, or dtypes.

    Two attributes of the module may be one object, and one of them a global, which have a stand-in each.
    """
    right, before = _operand(known, index - 1)
    if right is not None and right.opname == "LOAD_CONST" and right.argval is None:
        return True
    left, _ = _operand(known, before)
    if left is None or right is None:
        return False
    if left.opname == "LOAD_CONST" and left.argval is None:
        return True
    if known[index - 1].argval == "dtype" or known[before].argval == "dtype":
        return True
    if all(i.opname in ("LOAD_CONST", "LOAD_GLOBAL") for i in (left, right)):
        return True
    own = [i.opname.startswith("LOAD_FAST") and i.argval in first for i in (left, right)]
    own = [is_own and known[end].opname in ATTRIBUTES for is_own, end in zip(own, (before, index - 1), strict=True)]
    return any(own) and any(i.opname == "LOAD_CONST" for i in (left, right))


def _operand(known: tuple[dis.Instruction, ...], end: int) -> tuple[dis.Instruction | None, int]:
    """What an expression that ends at an instruction starts with, and the instruction before it; None for a call."""
    while end >= 0 and known[end].opname in ATTRIBUTES:
        end -= 1
    if end < 0 or not known[end].opname.startswith("LOAD"):
        return None, -1
    return known[end], end - 1


@functools.lru_cache(maxsize=4096)
def _written(code: types.CodeType) -> tuple[tuple[str, str, str], ...]:
    """Names outside of code that it calls a method on, or sets something on, which may change what they hold.

    (how the name is loaded, the name, what is done to it)
    """
    found = []
    for part in inner(code):
        known = instructions(part)
        for index, instruction in enumerate(known):
            if instruction.opname in ATTRIBUTES and instruction.argval in _WRITES:
                root, _ = _operand(known, index)
            elif instruction.opname in ("STORE_ATTR", "DELETE_ATTR"):
                root, _ = _operand(known, index - 1)
            elif instruction.opname in ("STORE_SUBSCR", "DELETE_SUBSCR") and index >= 2:
                root, _ = _operand(known, index - 2)  # container, key
            else:
                continue
            if root is not None and root.opname in _SHARED and root.argval != "__class__":
                found.append((root.opname, str(root.argval), str(instruction.argval or "an item")))
    return tuple(found)


def writes_to(function: types.FunctionType) -> str | None:
    """Return why a trace of a function would change an object that outlives the call, or None."""
    for how, name, what in _written(function.__code__):
        value = function.__globals__.get(name) if how in ("LOAD_GLOBAL", "LOAD_NAME") else None
        if not isinstance(value, types.ModuleType):
            return f"it may change {name}, which outlives the call ({what})"
    return None


def class_asked_for(frame: types.FrameType) -> type | None:
    """The class in `isinstance(<variable>, <class>)`, where that is what a frame runs just now; None for anything else."""
    known = instructions(frame.f_code)
    index = next((i for i, one in enumerate(known) if one.offset >= frame.f_lasti), 0)
    last, before = _operand(known, index - 1)
    variable, end = _operand(known, before)
    if last is None or variable is None or end < 0 or not variable.opname.startswith("LOAD_FAST"):
        return None
    if known[end].opname != "LOAD_GLOBAL" or known[end].argval != "isinstance" or last.opname != "LOAD_GLOBAL":
        return None
    value: Any = frame.f_globals.get(str(last.argval))
    for one in known[before + 2 : index]:
        value = getattr(value, str(one.argval), None)
    return value if isinstance(value, type) else None


@functools.lru_cache(maxsize=4096)
def only_passes_on(code: types.CodeType, name: str) -> bool:
    """Whether code does nothing with a dict but merge it into the arguments of calls."""
    known = instructions(code)
    for one, two in zip(known, [*known[1:], None], strict=True):
        names = one.argval if isinstance(one.argval, tuple) else (one.argval,)
        if name in names and (names[-1] != name or two is None or two.opname not in ("DICT_MERGE", "CALL_FUNCTION_EX")):
            return False
    return name not in (*code.co_cellvars, *code.co_freevars)
