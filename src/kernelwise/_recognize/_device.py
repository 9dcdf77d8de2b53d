"""What code does with the device of a tensor: to hand it on decides nothing, whatever else is done with it may.

A trace runs on one device. So the bytecode is followed from where a device is read to what takes it. A function that is
handed a device shows by what it does: it takes a `type`, or compares something and names a device.
"""

from __future__ import annotations

import dis
import functools
import sys
import types

SKIPPED = frozenset({"CACHE", "PUSH_NULL", "PRECALL", "RESUME", "EXTENDED_ARG", "NOP", "COPY_FREE_VARS", "NOT_TAKEN"})
ATTRIBUTES = frozenset({"LOAD_ATTR", "LOAD_METHOD"})
COMPARISONS = frozenset({"COMPARE_OP", "CONTAINS_OP", "IS_OP"})

_PUSHES = ("LOAD_FAST", "LOAD_CONST", "LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF", "LOAD_CLOSURE", "LOAD_SMALL_INT")
_IDLE = SKIPPED | {"KW_NAMES"}
_ABOUT_AUTOCAST = frozenset({"is_autocast_enabled", "get_autocast_dtype", "autocast", "maybe_autocast"})
_NAMED = frozenset({"LOAD_GLOBAL", "LOAD_NAME", "LOAD_ATTR", "LOAD_METHOD"})
_KINDS = ("cuda", "cpu", "xpu", "hpu", "npu", "tpu", "xla", "hip")
_TELLS = frozenset({"str", "repr", "format", "hash", "print"})


@functools.lru_cache(maxsize=4096)
def uses_device(code: types.CodeType) -> bool:
    """Whether code does more with the device of a tensor than to hand it on to a call.

    Its type may also be handed on by code that asks for autocast, and be compared with "mps", on which no kernel of ours
    runs.
    """
    every = list(dis.get_instructions(code))
    if _names_device(code) and any(one.opname in COMPARISONS for one in every) and not _is_about_autocast(every):
        return True
    kept: set[str] = set()
    for index, one in enumerate(every):
        is_type = one.opname == "LOAD_ATTR" and one.argval == "type" and not _is_method(one)
        if is_type and not _is_handed_on(every, index, set()):
            return True
        if one.opname in ATTRIBUTES and one.argval == "device":
            root = _before(every, index)
            if root.opname == "LOAD_GLOBAL" and root.argval == "torch":
                continue
            if not _is_handed_on(every, index, kept):
                return True
    return any(
        one.opname.startswith("LOAD_FAST") and one.argval in kept and not _is_handed_on(every, index, kept)
        for index, one in enumerate(every)
    )


def _is_method(one: dis.Instruction) -> bool:
    """Whether an attribute is looked up to be called: `x.type(dtype)`."""
    return sys.version_info >= (3, 12) and bool((one.arg or 0) & 1)  # before, it has a name of its own


def _is_handed_on(every: list[dis.Instruction], index: int, kept: set[str]) -> bool:
    user = _user_of(every, index)
    if user is None:
        return False
    used = every[user]
    if used.opname.startswith("STORE_FAST") and isinstance(used.argval, str):
        kept.add(used.argval)
        return True
    is_part = every[index].argval == "type"
    if used.opname in ATTRIBUTES and used.argval in ("type", "index"):
        is_part, user = True, _user_of(every, user)
        if user is None:
            return False
        used = every[user]
    if is_part:
        if used.opname in COMPARISONS and any(i.argval == "mps" for i in every[user - 2 : user]):
            return True
        if not _is_about_autocast(every):
            return False
    if used.opname in ("BUILD_MAP", "BUILD_CONST_KEY_MAP", "DICT_MERGE"):
        return True
    return used.opname.startswith(("CALL", "PRECALL")) and not _is_told(every, index)


def _is_about_autocast(every: list[dis.Instruction]) -> bool:
    return any(one.opname in _NAMED and one.argval in _ABOUT_AUTOCAST for one in every)


def _names_device(code: types.CodeType) -> bool:
    constants = [item for one in code.co_consts for item in (one if isinstance(one, (tuple, frozenset)) else (one,))]
    return any(isinstance(item, str) and item.partition(":")[0] in _KINDS for item in constants)


def _is_told(every: list[dis.Instruction], index: int) -> bool:
    """Whether the value is an argument of `str` and the like: what is called stands right before what it is read from."""
    calls = [one for one in every[:index] if one.opname not in _IDLE and one.opname not in ATTRIBUTES][-2:]
    return any(one.opname in ("LOAD_GLOBAL", "LOAD_NAME") and one.argval in _TELLS for one in calls)


def _before(every: list[dis.Instruction], index: int) -> dis.Instruction:
    return next(one for one in every[index - 1 :: -1] if one.opname not in _IDLE)


def _user_of(every: list[dis.Instruction], index: int) -> int | None:
    """The instruction that takes the value which an instruction has left on the stack; None where a jump comes before."""
    depth = 0  # values above the one that is followed
    for place in range(index + 1, len(every)):
        one = every[place]
        if one.opname in _IDLE and one.opname not in ("PRECALL", "PUSH_NULL"):
            continue
        effect = dis.stack_effect(one.opcode, one.arg, jump=False)
        is_push = one.opname.startswith(_PUSHES) or one.opname == "PUSH_NULL"
        if not is_push and (depth == 0 or depth + effect <= 0):
            return place
        depth += effect
    return None
