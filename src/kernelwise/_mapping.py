"""Reads what a user wrote: every form a mapping may have becomes a flat list of rules. Part of the config stage.

Pure: it looks at no model, no file and no network, so that whatever is wrong with the form of a mapping is known, all
of it at once, before anything is opened. The later stages see rules only and never the forms.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import PurePath

from kernelwise._data import DEVICE_TYPES, MODES, KernelRef
from kernelwise._errors import Problem
from kernelwise._reference import Fault, did_you_mean, read_metadata, read_reference, show

# What people write, where the nearest spelling would mislead ("gpu" is one letter from "npu") or there is none.
DEVICE_HINTS = {"gpu": "'cuda' or 'rocm'", "nvidia": "'cuda'", "hip": "'rocm'", "amd": "'rocm'", "metal": "'mps'"}
MODE_HINTS = {
    "eval": "'inference'",
    "evaluation": "'inference'",
    "train": "'training'",
    "compile": "'inference+compile'",
}
MISS_HINTS = {"skip": "'keep'", "ignore": "'keep'", "warn": "'keep'", "error": "'raise'", "fail": "'raise'"}

_MAPPING_FORMS = '{"RMSNorm": "org/repo:Layer"} or {"RMSNorm": {"cuda": "org/repo@v1:Layer", "cpu": None}}'
_VALUE_FORMS = (
    'write "org/repo:Layer", ("org/repo:Layer", {"version": 1}), "/abs/path:Layer", "package:module:Layer", '
    '"builtin:Layer", None, or a dict from device type or mode to one of these'
)
_FUSION_FORM = 'write (("RMSNorm", "model.layers.*.norm"), ("MLP", "model.layers.*.mlp"))'


@dataclass(frozen=True, slots=True)
class Rule:
    """One thing that a user asked for: this kernel (or none) for this layer, on this device, in this mode.

    `path` is a glob over dotted module paths as `fnmatch.fnmatchcase` reads it: `*` crosses dots. `None` in `path`,
    `device` or `mode` means any; `None` in `ref` keeps the model's own code. A fusion key gives `fuses`, its pairs of
    name and path pattern, and `layer` joins their names with `+`. `where` places the rule for messages.
    """

    layer: str
    path: str | None
    device: str | None
    mode: str | None
    ref: KernelRef | None
    where: str
    fuses: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Key:
    """A key of a mapping that is well formed, read: see `Rule` for the fields."""

    layer: str
    path: str | None
    fuses: tuple[tuple[str, str], ...]
    where: str


@dataclass(frozen=True, slots=True)
class _Place:
    """Where in a mapping something stands."""

    number: int
    steps: tuple[str, ...]
    file: str | None

    def inside(self, step: str) -> _Place:
        return replace(self, steps=(*self.steps, step))

    def __str__(self) -> str:
        return f"rule {self.number} ({f'{self.file}: ' if self.file else ''}{' → '.join(self.steps)})"

    def problem(self, fault: Fault) -> Problem:
        return Problem(str(self), *fault)


@dataclass(frozen=True, slots=True)
class _Choice:
    """One value at the end of a nesting, with the device and the mode that led to it."""

    device: str | None
    mode: str | None
    ref: KernelRef | None
    place: _Place


def parse_mapping(
    mapping: object, *, use_local_kernel: bool = False, file: str | None = None
) -> tuple[tuple[Rule, ...], tuple[Problem, ...]]:
    """Return the rules that stand in `mapping`, and everything that is wrong with its form. Never raises.

    An entry with a problem gives no rule; the others do, so that they can be checked further. Rules are numbered from 1
    in the order of the keys. `use_local_kernel` reads `"x:Layer"` as a local path, as transformers does. `file` is the
    name of the file that the mapping was read from, for messages.
    """
    if not isinstance(mapping, dict):
        what = f"is {_describe(mapping)}, and must be a dict from layer name to kernel"
        fix = f"write {_MAPPING_FORMS}"
        if isinstance(mapping, PurePath) or (isinstance(mapping, str) and mapping.endswith((".toml", ".json"))):
            fix = f'to read a file, write KernelConfig.load("{mapping}")'
        return (), (Problem(file or "the mapping", what, fix),)
    rules: list[Rule] = []
    problems: list[Problem] = []
    claims: dict[object, str] = {}
    for number, (key, value) in enumerate(mapping.items(), start=1):
        place = _Place(number, (_label(key),), file)
        layer, path, fuses, faults = _read_key(key)
        problems += [place.problem(fault) for fault in faults]
        for entry in _read_value(value, place, None, None, use_local_kernel):
            if isinstance(entry, Problem):
                problems.append(entry)
                continue
            if faults:
                continue
            claim = (frozenset(fuses) or layer, path, entry.device, entry.mode)
            if claim in claims:
                problems.append(entry.place.problem((f"claims the same as {claims[claim]}", "keep one of the two")))
                continue
            claims[claim] = str(entry.place)
            rules.append(Rule(layer, path, entry.device, entry.mode, entry.ref, str(entry.place), fuses))
    return tuple(rules), tuple(problems)


def read_keys(mapping: object, *, file: str | None = None) -> tuple[Key, ...]:
    """Return the keys of `mapping` that are well formed, whatever their values are. `parse_mapping` names the rest."""
    keys: list[Key] = []
    for number, key in enumerate(mapping if isinstance(mapping, dict) else (), start=1):
        layer, path, fuses, faults = _read_key(key)
        if not faults:
            keys.append(Key(layer, path, fuses, str(_Place(number, (_label(key),), file))))
    return tuple(keys)


def mode_name(key: object) -> str | None:
    """Return the mode of `MODES` that `key` stands for: one of the names, or a `kernels.Mode`; else `None`.

    A `kernels.Mode` is known by the names of its flags, so that reading a mapping does not import that library.
    """
    if isinstance(key, str):
        return key if key in MODES else None
    if not isinstance(key, enum.Flag) or not {"INFERENCE", "TRAINING"} <= set(type(key).__members__):
        return None
    flags = {name for name, member in type(key).__members__.items() if member.value and member in key}
    by_flags = {frozenset(mode.upper().replace("COMPILE", "TORCH_COMPILE").split("+")): mode for mode in MODES}
    return by_flags.get(frozenset(flags))


def _read_value(
    value: object, place: _Place, device: str | None, mode: str | None, local: bool
) -> Iterator[_Choice | Problem]:
    """Walk down a value: dicts from device and from mode, in either order and each at most once, then a reference."""
    if not isinstance(value, dict):
        ref, faults = _read_leaf(value, local)
        yield from (place.problem(fault) for fault in faults)
        if not faults:
            yield _Choice(device, mode, ref, place)
        return
    if not value:
        fix = "name a device type or a mode in it, or leave it out"
        yield place.problem(("is an empty dict, which says nothing", fix))
    kinds: set[str] = set()
    modes: set[str] = set()
    for key, item in value.items():
        as_mode = mode_name(key)
        step = place.inside(as_mode or (key if isinstance(key, str) else show(key)))
        fault = _key_fault(key, as_mode, device, mode)
        if fault is not None:
            yield step.problem(fault)
            if len(step.steps) <= 3:  # no deeper than a mapping can go, as a dict may hold itself
                yield from (entry for entry in _read_value(item, step, None, None, local) if isinstance(entry, Problem))
        elif as_mode is not None and as_mode in modes:  # a mode has two spellings, so that a dict can hold it twice
            yield step.problem((f"names the mode {as_mode} a second time", "keep one of the two"))
        elif as_mode is not None:
            kinds.add("mode")
            modes.add(as_mode)
            yield from _read_value(item, step, device, as_mode, local)
        else:
            kinds.add("device")
            yield from _read_value(item, step, str(key), mode, local)
    if len(kinds) > 1:
        fix = 'nest them: {"cuda": {"inference": ..., "training": ...}}'
        yield place.problem(("mixes device types and modes in one dict", fix))


def _read_leaf(value: object, local: bool) -> tuple[KernelRef | None, list[Fault]]:
    """Read a value that is not a dict."""
    if value is None or (isinstance(value, str) and value == "none"):
        return None, []
    if isinstance(value, str):
        return read_reference(value, local=local)
    if not isinstance(value, tuple):
        return None, [(f"is {_describe(value)}, which is no way to name a kernel", _VALUE_FORMS)]
    fix = 'write ("org/repo:Layer", {"version": 1})'
    if len(value) != 2:
        return None, [(f"is a tuple of {len(value)}, and must be one of 2: a name and its metadata", fix)]
    name, metadata = value
    if not isinstance(name, str) or not isinstance(metadata, dict):
        return None, [(f"must be a tuple of a str and a dict, and is {_describe(value)}", fix)]
    ref, faults = read_reference(name, local=local)
    pinned, more = read_metadata(metadata, ref, pinned_by_name="@" in name)
    return pinned, [*faults, *more]


def _read_key(key: object) -> tuple[str, str | None, tuple[tuple[str, str], ...], list[Fault]]:
    """Return layer, path and fusion of a key of the mapping, and what is wrong with it."""
    if isinstance(key, tuple):
        pairs = [pair for pair in key if isinstance(pair, tuple) and len(pair) == 2]
        if len(key) < 2 or len(pairs) < len(key) or not all(isinstance(item, str) for pair in pairs for item in pair):
            return "", None, (), [("a key that fuses must be a tuple of at least two (name, path) pairs", _FUSION_FORM)]
        faults = [fault for name, path in pairs for fault in (*_name_faults(name), *_path_faults(path))]
        if len(set(pairs)) < len(pairs):
            faults.append(("fuses the same layer twice", "name every layer once"))
        return "+".join(name for name, _ in pairs), None, tuple(pairs), faults
    if not isinstance(key, str):
        fix = 'write the layer\'s name: "RMSNorm", or "RMSNorm@model.layers.0.*"'
        return "", None, (), [(f"the key is {_describe(key)}, and must be a str", fix)]
    name, at, path = key.partition("@")
    return name, path if at else None, (), [*_name_faults(name), *(_path_faults(path) if at else [])]


def _name_faults(name: str) -> list[Fault]:
    if not name.strip():
        return [("the layer name is empty", 'write the name the model gives the layer, as "RMSNorm"')]
    if name != name.strip() or not name.isprintable():
        return [(f"the layer name {show(name)} has spaces around it or a control character", "remove it")]
    return []


def _path_faults(path: str) -> list[Fault]:
    fix = 'write a glob over dotted module paths, as "model.layers.0.*"'
    if not path.strip():
        return [("the module path is empty", fix)]
    if path != path.strip() or not path.isprintable():
        return [(f"the module path {show(path)} has spaces around it or a control character", "remove it")]
    if "" in path.split("."):
        return [(f"the module path {show(path)} has an empty part (a dot too many)", fix)]
    if "@" in path or path.count("[") != path.count("]"):
        return [(f"the module path {show(path)} has an '@' or a bracket that is not closed", fix)]
    return []


def _key_fault(key: object, as_mode: str | None, device: str | None, mode: str | None) -> Fault | None:
    """Return what is wrong with a key of a nested dict, given the device and the mode that stand above it."""
    if as_mode is not None:
        return ("names a mode inside a mode", "give each kernel one mode") if mode is not None else None
    if isinstance(key, str) and key in DEVICE_TYPES:
        fault = "names a device type inside a device type", "give each kernel one device type"
        return fault if device is not None else None
    fix = f"device types: {', '.join(DEVICE_TYPES)}; modes: {', '.join(MODES)}"
    if not isinstance(key, str):
        return f"{show(key)} is neither a device type nor a mode", fix
    guess = did_you_mean(key, (*DEVICE_TYPES, *MODES), DEVICE_HINTS | MODE_HINTS)
    return f"{show(key)} is neither a device type nor a mode{guess}", fix


def _label(key: object) -> str:
    if isinstance(key, tuple) and all(isinstance(pair, tuple) and pair for pair in key):
        return " + ".join(show(pair[0]) for pair in key)
    return show(key)


def _describe(value: object) -> str:
    return "None" if value is None else f"the {type(value).__name__} {show(value)}"
