"""Reads one kernel reference: where a kernel comes from, as a string, and its metadata. Part of the config stage.

Pure: whether a repository, a directory or a module exists is looked at later. A fault is a pair: what is wrong, and how
to fix it; where it stands is known to the caller alone.
"""

from __future__ import annotations

import difflib
import keyword
import re
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import PurePath, PurePosixPath, PureWindowsPath

from kernelwise._data import KernelRef

Fault = tuple[str, str]

METADATA_KEYS = ("version", "revision", "trust_remote_code")
BUILTIN_BACKENDS = ("torch", "inductor")
"""What may stand before a builtin layer: PyTorch's own operators, or what Inductor compiles."""

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://+(.*)", re.DOTALL)
_DRIVE = re.compile(r"[A-Za-z]:[\\/]")
_VERSION = re.compile("v([0-9]{1,9})")
_HUB_PART = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?")
_REVISION = re.compile(r"[^\s~^:?*\[\\\x00-\x1f\x7f-\x9f\ud800-\udfff]+")


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 200


def show(value: object) -> str:
    """Return the repr of a value for a message, cut where it is long and safe where it fails."""
    return _REPR.repr(value)


def nearest(name: str, known: Iterable[str]) -> str:
    """Return what to append to a message about an unknown name: the nearest known one, or all when they are few."""
    names = sorted(set(known))
    few = f"; known: {', '.join(names)}" if 0 < len(names) <= 10 else ""
    return did_you_mean(name, names) or few


def did_you_mean(name: str, known: Iterable[str], hints: Mapping[str, str] | None = None) -> str:
    """Return what to append to a message that lists the known names itself: the nearest one, or nothing.

    `hints` are for what people write where the nearest spelling would mislead; they come first.
    """
    folded = {item.casefold(): item for item in known}
    meant = (hints or {}).get(name.casefold())
    if meant is None:
        close = difflib.get_close_matches(name.casefold(), folded, n=1, cutoff=0.6)
        meant = repr(folded[close[0]]) if close else None
    return f"; did you mean {meant}?" if meant else ""


def read_reference(text: str, *, local: bool = False) -> tuple[KernelRef | None, list[Fault]]:
    """Read a string such as `"org/repo@v1:Layer"`; return the reference, or what is wrong with it.

    A Hub name without a pin means version 1. With `local`, a name without a scheme is a path.
    """
    if not text.strip():
        return None, [("the kernel's name is empty", 'write "org/repo:Layer", or None to keep the model\'s own code')]
    if _CONTROL.search(text):
        return None, [(f"{show(text)} holds a control character", "remove it")]
    if text != text.strip():
        return None, [(f"{show(text)} has spaces around it", f"write {text.strip()!r}")]
    if url := _URL.fullmatch(text):
        return None, [_url_fault(text, url[1], url[2])]
    scheme, _, rest = text.partition(":")
    if scheme == "builtin":
        return _read_builtin(rest)
    if scheme == "package":
        return _read_package(rest)
    if text.startswith(("/", "\\\\")) or _DRIVE.match(text):
        return _read_path(text)
    if text.startswith((".", "~")):
        how = "starts with '~'" if text[0] == "~" else "is relative"
        return None, [(f"the path {show(text)} {how}, and a local path must be absolute", _absolute_fix(text))]
    if local:
        what = f"use_local_kernel=True reads {show(text)} as a path, and it is not absolute"
        return None, [(what, f"{_absolute_fix(text)}; for a kernel of the Hub leave use_local_kernel out")]
    return _read_hub(text)


def read_metadata(
    metadata: dict[object, object], ref: KernelRef | None, *, pinned_by_name: bool
) -> tuple[KernelRef | None, list[Fault]]:
    """Return `ref` with the pin and the trust that stand in `metadata`, or what is wrong with them.

    `ref` is `None` where the name itself is wrong; the metadata is read all the same. `pinned_by_name` says that a
    version or a revision stands in the name already.
    """
    faults: list[Fault] = []
    for key in metadata:
        if key not in METADATA_KEYS:
            guess = nearest(key, METADATA_KEYS) if isinstance(key, str) else ""
            what = f"the metadata has the unknown key {show(key)}{guess}"
            faults.append((what, f"use only {', '.join(METADATA_KEYS)}"))
    if ref is not None and ref.scheme != "hub":
        what = f"metadata stands beside {str(ref)!r}, which is no kernel of the Hub"
        return None, [*faults, (what, f"write the string alone: {str(ref)!r}")]
    version, revision = metadata.get("version"), metadata.get("revision")
    trust = metadata.get("trust_remote_code", False)
    if "version" in metadata and "revision" in metadata:
        faults.append(("the metadata has both a version and a revision", "keep the one that is meant"))
    if "version" not in metadata and "revision" not in metadata:
        faults.append(("the metadata has neither a version nor a revision", 'add one: {"version": 1}'))
    elif ref is not None and pinned_by_name:
        faults.append(("the kernel is pinned twice, in its name (after '@') and in the metadata", "keep one pin"))
    if "version" in metadata and (not isinstance(version, int) or isinstance(version, bool) or version < 0):
        faults.append((f"version is {show(version)}, and must be an int of 0 or more", 'write {"version": 1}'))
    if "revision" in metadata and (not isinstance(revision, str) or not _is_revision(revision)):
        what = f"revision is {show(revision)}, and must be the name of a branch, tag or commit"
        faults.append((what, 'write {"revision": "main"}'))
    if not isinstance(trust, bool):
        fix = "write True or False; lists of repositories that are trusted belong in a policy"
        faults.append((f"trust_remote_code is {show(trust)}, and must be a bool", fix))
    if ref is None or faults:
        return None, faults
    assert isinstance(trust, bool)
    if isinstance(version, int):
        return replace(ref, version=version, revision=None, trust_remote_code=trust), []
    assert isinstance(revision, str)
    return replace(ref, version=None, revision=revision, trust_remote_code=trust), []


def _read_hub(text: str) -> tuple[KernelRef | None, list[Fault]]:
    """Read `org/repo:Layer`, `org/repo@v1:Layer` or `org/repo@revision:Layer`, where a revision may hold slashes."""
    repo, at, pin = text.partition("@")
    if text.count(":") != 1:
        count = text.count(":")
        if text.casefold() == "none":
            return None, [(f"{show(text)} names no kernel", 'write "none" to keep the model\'s own code')]
        what = f"{show(text)} names no layer" if count == 0 else f"{show(text)} has {count} colons, and must have one"
        return None, [(what, f'write "{repo.split(":")[0]}:Layer"')]
    if at:
        pin, _, layer = pin.partition(":")
    else:
        repo, _, layer = text.partition(":")
    faults: list[Fault] = []
    if ":" in repo:
        fix = f'write the pin first: "{repo.replace(":", f"@{pin}:")}"'
        return None, [(f"{show(text)} has its pin after the layer", fix)]
    if repo.count("/") != 1:
        slashes = repo.count("/")
        fix = f'write "org/{repo or "repo"}:{layer or "Layer"}"' if not slashes else 'write "org/repo:Layer"'
        if not slashes and repo:
            fix += f'; for an installed package "package:{repo}:{layer}", for a builtin kernel "builtin:{layer}"'
        number = "no slash" if not slashes else f"{slashes} slashes"
        scheme = difflib.get_close_matches(repo.casefold(), ("builtin", "package"), n=1, cutoff=0.7)
        guess = f"; did you mean the scheme {scheme[0]!r}?" if scheme else ""
        faults.append((f"{show(text)} has {number} in the repository, and must have one{guess}", fix))
    elif bad := [part for part in repo.split("/") if not _is_hub_part(part)]:
        what = f"{show(text)}: the Hub does not allow the name {show(bad[0])}"
        fix = "a name has 1 to 96 of A-Z a-z 0-9 - _ . and neither starts nor ends with - or ., nor holds -- or .."
        faults.append((what, fix))
    faults += _layer_faults(layer, text, '"org/repo:RMSNorm"')
    if at and not _is_revision(pin):
        fix = 'write "org/repo@v1:Layer" for a version, "org/repo@main:Layer" for a branch, tag or commit'
        faults.append((f"{show(text)}: {show(pin)} is neither a version nor a revision", fix))
    if faults:
        return None, faults
    version = _VERSION.fullmatch(pin) if at else None
    if at and not version:
        return KernelRef("hub", repo, layer, revision=pin), []
    return KernelRef("hub", repo, layer, version=int(version[1]) if version else 1), []


def _read_path(text: str) -> tuple[KernelRef | None, list[Fault]]:
    """Read `/abs/path:Layer` or `C:\\path:Layer`. The layer follows the last colon, as a directory may have colons."""
    drive = text[:2] if _DRIVE.match(text) else ""
    body, colon, layer = text[len(drive) :].rpartition(":")
    if not colon:
        return None, [(f"the local path {show(text)} names no layer", f'write "{text}:Layer"')]
    windows = drive or text.startswith("\\\\")
    directory: PurePath = PureWindowsPath(drive + body) if windows else PurePosixPath(body)
    faults = _layer_faults(layer, text, f'"{directory}:RMSNorm"')
    if directory.name in ("", ".."):
        what = f"the local path {show(text)} does not end in the name of a package"
        faults.append((what, 'name the directory of the kernel repository: "/home/user/layer_norm:RMSNorm"'))
    return (None, faults) if faults else (KernelRef("path", str(directory), layer), [])


def _read_builtin(rest: str) -> tuple[KernelRef | None, list[Fault]]:
    """Read `builtin:Layer`, or `builtin:torch:Layer` and `builtin:inductor:Layer` for what is not ours."""
    backend, colon, layer = rest.rpartition(":")
    faults = _layer_faults(layer, f"builtin:{rest}", '"builtin:RMSNorm"')
    if colon and backend not in BUILTIN_BACKENDS:
        guess = did_you_mean(backend, BUILTIN_BACKENDS)
        what = f"{show(f'builtin:{rest}')}: there is no backend {show(backend)}{guess}"
        faults.insert(
            0, (what, f"write builtin:{layer or 'RMSNorm'}, or one of {', '.join(BUILTIN_BACKENDS)} before it")
        )
    return (None, faults) if faults else (KernelRef("builtin", backend, layer), [])


def _read_package(rest: str) -> tuple[KernelRef | None, list[Fault]]:
    module, _, layer = rest.rpartition(":")
    example = '"package:liger_kernel.transformers.rms_norm:LigerRMSNorm"'
    if rest.count(":") != 1:
        return None, [(f"{show(f'package:{rest}')} must have the form package:module:Layer", f"write {example}")]
    faults = _layer_faults(layer, f"package:{rest}", example)
    if not all(_is_name(part) for part in module.split(".")):
        faults.append((f"{show(f'package:{rest}')}: {show(module)} is not the name of a module", f"write {example}"))
    return (None, faults) if faults else (KernelRef("package", module, layer), [])


def _url_fault(text: str, scheme: str, rest: str) -> Fault:
    what = f"{show(text)} is a URL"
    if scheme.lower() == "file":
        return what, f'write the absolute path: "{rest if rest.startswith("/") else "/" + rest}"'
    host, _, name = rest.partition("/")
    name = name.removeprefix("kernels/")
    known = host in ("huggingface.co", "hf.co") and name.count("/") == 1
    return what, f'write "{name if ":" in name else name + ":Layer"}"' if known else 'write "org/repo:Layer"'


def _absolute_fix(text: str) -> str:
    path = text.rpartition(":")[0] or text
    call = "expanduser()" if text.startswith("~") else "resolve()"
    return f'write the whole path, as Path("{path}").{call} gives it'


def _layer_faults(layer: str, written: str, example: str) -> list[Fault]:
    if not layer:
        return [(f"{show(written)} names no layer", f"write the layer after the colon, as {example}")]
    if not _is_name(layer):
        what = f"{show(written)}: the layer {show(layer)} is not a Python identifier"
        return [(what, f"write the name of a class, as {example}")]
    return []


def _is_name(text: str) -> bool:
    return text.isidentifier() and not keyword.iskeyword(text)


def _is_hub_part(part: str) -> bool:
    return bool(_HUB_PART.fullmatch(part)) and "--" not in part and ".." not in part and not part.endswith(".git")


def _is_revision(text: str) -> bool:
    return bool(_REVISION.fullmatch(text)) and ".." not in text and "" not in text.split("/")
