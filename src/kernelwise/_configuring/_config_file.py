"""A mapping as plain data and as a file: TOML and JSON, both ways, without loss. Part of the config stage.

The file says the same as the Python object, in the same words. Three things alone have no form in TOML and JSON: `None`
is written `"none"`, a tuple of a name and its metadata is an array, and a key that fuses is an entry of the array
`fuse`, because a key must be a string there.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import tomli_w

from kernelwise._errors import KernelConfigError, Problem
from kernelwise._mapping import mode_name
from kernelwise._reference import nearest, show

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SUFFIXES = (".toml", ".json")

_FUSE_FORM = (
    'layers = [["RMSNorm", "model.layers.*.norm"], ["MLP", "model.layers.*.mlp"]] and kernel = "org/repo:Layer"'
)


def canonical(value: object) -> Any:
    """Return a mapping or a value of one in the spelling that a file gives back: `"none"`, modes by name."""
    if isinstance(value, dict):
        return {mode_name(key) or key: canonical(item) for key, item in value.items()}
    return "none" if value is None else value


def to_plain(mapping: dict[Any, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Return a well-formed mapping and the options that are not the default as dicts, lists and scalars."""
    plain = {**options, "kernels": {key: _thaw(value) for key, value in mapping.items() if isinstance(key, str)}}
    fusions = [(key, value) for key, value in mapping.items() if isinstance(key, tuple)]
    if fusions:
        plain["fuse"] = [{"layers": [list(pair) for pair in key], "kernel": _thaw(value)} for key, value in fusions]
    return plain


def from_plain(data: object, *, options: tuple[str, ...], file: str | None) -> tuple[dict[Any, Any], dict[str, Any]]:
    """Return the mapping and the options that stand in what `to_plain` wrote.

    Raises:
        KernelConfigError: the data does not have that shape. What is inside a rule is not looked at.
    """
    where = file or "the config"
    if not isinstance(data, dict):
        raise KernelConfigError(
            [Problem(where, f"is {show(data)}, and must be a table", "write [kernels] and its rules")]
        )
    known = ("kernels", "fuse", *options)
    problems = [
        Problem(
            where, f"has the unknown entry {show(key)}{nearest(str(key), known)}", "rules stand in the table kernels"
        )
        for key in data
        if key not in (*known, "$schema")
    ]
    kernels, fusions = data.get("kernels", {}), data.get("fuse", [])
    if not isinstance(kernels, dict):
        problems.append(
            Problem(where, f"kernels is {show(kernels)}, and must be a table", 'write RMSNorm = "org/repo:Layer"')
        )
        kernels = {}
    if not isinstance(fusions, list):
        problems.append(
            Problem(where, f"fuse is {show(fusions)}, and must be an array of tables", f"write {_FUSE_FORM}")
        )
        fusions = []
    mapping: dict[Any, Any] = {key: _freeze(value) for key, value in kernels.items()}
    for number, entry in enumerate(fusions, start=1):
        place = f"fuse {number}{f' ({file})' if file else ''}"
        key = _fusion_key(entry)
        if key is None:
            problems.append(
                Problem(place, f"is {show(entry)}, which does not say what is fused", f"write {_FUSE_FORM}")
            )
        elif key in mapping:
            problems.append(Problem(place, "fuses the same layers as an entry before it", "keep one of the two"))
        else:
            mapping[key] = _freeze(entry["kernel"])
    if problems:
        raise KernelConfigError(problems)
    return mapping, {name: data[name] for name in options if name in data}


def read_file(file: Path) -> object:
    """Return what stands in a TOML or JSON file.

    Raises:
        KernelConfigError: the file cannot be read, or is not TOML or JSON; the message has the line.
    """
    check_suffix(file)
    try:
        text = file.read_bytes().decode("utf-8-sig")
        if file.suffix.lower() == ".toml":
            return tomllib.loads(text)
        return json.loads(text, object_pairs_hook=_unique_keys)
    except FileNotFoundError:
        problem = Problem(str(file), "there is no such file", "check the path; KernelConfig.save(file) writes one")
    except OSError as error:
        problem = Problem(str(file), f"cannot be read: {error.strerror}", "name a file that you can read")
    except UnicodeDecodeError as error:
        problem = Problem(str(file), f"is not UTF-8 (byte {error.start})", "save the file as UTF-8")
    except (ValueError, RecursionError) as error:
        kind = file.suffix[1:].upper()
        problem = Problem(str(file), f"is not {kind}: {error}", f"mend the {kind} there")
    raise KernelConfigError([problem])


def write_file(file: Path, data: dict[str, Any]) -> None:
    """Write plain data as TOML or JSON, by the suffix of the file. Raises `OSError` where it cannot be written."""
    check_suffix(file)
    if file.suffix.lower() == ".toml":
        file.write_bytes(tomli_w.dumps(data).encode())
    else:
        file.write_bytes((json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode())


def check_suffix(file: Path) -> None:
    """Raise `KernelConfigError` for a file that is neither TOML nor JSON by its name."""
    if file.suffix.lower() not in SUFFIXES:
        what = f"has the suffix {file.suffix!r}, and a config is a .toml or a .json file"
        raise KernelConfigError([Problem(str(file), what, f"name it {file.stem}.toml or {file.stem}.json")])


def _thaw(value: Any) -> Any:
    """Write tuples as lists, `None` as `"none"` and modes by name."""
    if isinstance(value, dict):
        return {mode_name(key) or key: _thaw(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_thaw(item) for item in value]
    return "none" if value is None else value


def _freeze(value: Any) -> Any:
    """Read lists as tuples."""
    if isinstance(value, dict):
        return {key: _freeze(item) for key, item in value.items()}
    return tuple(_freeze(item) for item in value) if isinstance(value, list) else value


def _fusion_key(entry: object) -> tuple[tuple[str, ...], ...] | None:
    if not isinstance(entry, dict) or set(entry) != {"layers", "kernel"} or not isinstance(entry["layers"], list):
        return None
    pairs = entry["layers"]
    if not all(isinstance(pair, list) and all(isinstance(item, str) for item in pair) for pair in pairs):
        return None
    return tuple(tuple(pair) for pair in pairs)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data: dict[str, Any] = {}
    for key, value in pairs:
        if key in data:
            raise ValueError(f"the key {show(key)} stands twice in one object")
        data[key] = value
    return data
