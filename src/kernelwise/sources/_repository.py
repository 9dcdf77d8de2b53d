"""What can be known of a kernel repository on disk without running any of its code.

A repository is a directory with `build/<variant>/metadata.json`, one variant for each platform, and Python files beside
it; its layers are classes in `layers.py` (see `docs/sources.md`). A local path may name the repository, its `build`
directory or the variant itself. Everything here reads files and syntax trees; nothing is imported.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from kernelwise.sources import _kernels_compat

_REBINDING = frozenset({"exec", "globals", "setattr", "vars"})
"""Functions with which a module can bind names that its syntax tree does not show."""


def find_variant(path: Path, *, device: str) -> Path | None:
    """Return the variant folder that fits a device type on this machine, or None where there is none.

    The order of preference is that of the `kernels` library. `path` may be the repository, its `build` folder or the
    variant folder itself. A path that does not exist or is a file holds no variant.
    """
    try:
        backend = _kernels_compat.backend_of(device)
    except ValueError:
        return None
    for folder in (path, path / "build"):
        accepted, _ = _kernels_compat.local_variants(folder, backend=backend)
        if accepted:
            return folder / accepted[0]
    return path if _is_variant(path) and not _foreign(path, backend=backend) else None


def all_variants(path: Path) -> tuple[Path, ...]:
    """Return every variant folder of a local repository, whatever machine it is for, in the order of their names."""
    folders = [folder for parent in (path, path / "build") if parent.is_dir() for folder in parent.iterdir()]
    return tuple(sorted(folder for folder in [path, *folders] if _is_variant(folder)))


def rejected_variants(path: Path, *, device: str) -> tuple[tuple[str, str], ...]:
    """Return the variants of a local repository that do not fit this machine, each with its reason.

    Raises:
        ValueError: the installed PyTorch was not built for that device type.
    """
    backend = _kernels_compat.backend_of(device)
    foreign = _foreign(path, backend=backend) if _is_variant(path) else []
    return (*(pair for folder in (path, path / "build") for pair in _rejected(folder, backend)), *foreign)


def content_hash(variant: Path) -> str:
    """Return the SHA-256 (hex) over the relative names and the bytes of all files of a variant, without bytecode."""
    digest = hashlib.sha256()
    for name, file in sorted((file.relative_to(variant).as_posix(), file) for file in _files(variant)):
        data = file.read_bytes()
        digest.update(f"{len(name.encode())} {len(data)} {name}".encode())
        digest.update(data)
    return digest.hexdigest()


def layer_names(variant: Path) -> frozenset[str] | None:
    """Return the names of the layer classes of a variant, or None where they cannot be told without running code.

    The layers are the classes of `layers.py` (or `layers/__init__.py`, or a class `layers` in `__init__.py`), defined
    there or imported from a file beside it.
    """
    scope = _layers_scope(variant)
    return None if scope is None or scope.open_ended else frozenset(scope.classes)


def static_problem(variant: Path, layer: str) -> str | None:
    """Return why a layer class cannot be a kernel, as far as its syntax tree tells; None where nothing does."""
    scope = _layers_scope(variant)
    node = scope.classes.get(layer) if scope is not None else None
    if node is None:
        return None
    if any(isinstance(item, (ast.FunctionDef, ast.AsyncFunctionDef)) and item.name == "__init__" for item in node.body):
        return f"its class {layer} defines __init__; a kernel has no state of its own"
    return None


def metadata_problem(variant: Path) -> str | None:
    """Return what is wrong with `metadata.json`, in one line, or None."""
    file = variant / "metadata.json"
    try:
        json.loads(file.read_bytes())
    except FileNotFoundError:
        return f"{variant.name} has no metadata.json"
    except (OSError, ValueError) as error:
        return f"metadata.json of {variant.name} cannot be read: {error}"
    try:
        _kernels_compat.read_metadata(variant)
    except ValueError as error:
        return f"metadata.json of {variant.name} is not valid: {' '.join(str(error).split())}"
    return None


def _is_variant(path: Path) -> bool:
    return (path / "metadata.json").is_file()


def _rejected(folder: Path, backend: str) -> list[tuple[str, str]]:
    return _kernels_compat.local_variants(folder, backend=backend)[1]


def _foreign(variant: Path, *, backend: str) -> list[tuple[str, str]]:
    """A variant folder that is named directly: the reason against it, where its name says it is for another machine."""
    return [pair for pair in _rejected(variant.resolve().parent, backend) if pair[0] == variant.resolve().name]


def _files(variant: Path) -> Iterator[Path]:
    for file in variant.rglob("*"):
        if file.is_file() and "__pycache__" not in file.relative_to(variant).parts and file.suffix != ".pyc":
            yield file


@dataclass(slots=True)
class _Scope:
    """The classes that a module binds at its top level. Open-ended: running its code could bind others."""

    classes: dict[str, ast.ClassDef] = field(default_factory=dict)
    open_ended: bool = False


def _layers_scope(variant: Path) -> _Scope | None:
    package = variant if (variant / "__init__.py").is_file() else _old_layout(variant)
    if package is None:
        return None
    for file in (package / "layers.py", package / "layers" / "__init__.py"):
        if file.is_file():
            return _scope(file, seen=frozenset())
    scope = _scope(package / "__init__.py", seen=frozenset())
    holder = scope.classes.get("layers")
    if holder is None:
        return _Scope(open_ended=scope.open_ended or _binds_layers(package / "__init__.py"))
    return _Scope({node.name: node for node in holder.body if isinstance(node, ast.ClassDef)})


def _old_layout(variant: Path) -> Path | None:
    """Older builds keep their Python files in a folder that is named like the kernel."""
    try:
        name = str(json.loads((variant / "metadata.json").read_bytes())["name"]).replace("-", "_")
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return variant / name if (variant / name / "__init__.py").is_file() else None


def _binds_layers(file: Path) -> bool:
    tree = _parse(file)
    return tree is None or any(
        (isinstance(node, ast.Name) and node.id == "layers" and isinstance(node.ctx, ast.Store))
        or (isinstance(node, ast.alias) and (node.asname or node.name) == "layers")
        for node in ast.walk(tree)
    )


def _parse(file: Path) -> ast.Module | None:
    try:
        return _tree(file.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return None


@lru_cache(maxsize=256)
def _tree(source: bytes) -> ast.Module:
    return ast.parse(source)


@lru_cache(maxsize=256)
def _rebinds(tree: ast.Module) -> bool:
    return any(isinstance(node, ast.Name) and node.id in _REBINDING for node in ast.walk(tree))


def _scope(file: Path, *, seen: frozenset[Path]) -> _Scope:
    tree = _parse(file)
    scope = _Scope()
    if tree is None or file in seen:
        scope.open_ended = True
        return scope
    scope.open_ended = _rebinds(tree)
    for node in _statements(tree.body):
        if isinstance(node, ast.ClassDef):
            scope.classes[node.name] = node
        elif isinstance(node, ast.FunctionDef) and node.name == "__getattr__":
            scope.open_ended = True
        elif isinstance(node, ast.ImportFrom) and node.level == 1:
            _import_names(scope, node, file, seen=seen | {file})
        elif isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names):
            scope.open_ended = True
        elif isinstance(node, ast.Assign):
            _assign_names(scope, node)
    return scope


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a module, with those inside `if`, `try` and `with`, which run in the same scope."""
    for node in body:
        yield node
        for part in ("body", "orelse", "finalbody"):
            if not isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                yield from _statements(getattr(node, part, []))
        for handler in getattr(node, "handlers", []):
            yield from _statements(handler.body)


def _import_names(scope: _Scope, node: ast.ImportFrom, file: Path, *, seen: frozenset[Path]) -> None:
    """Names from a file beside this one count where they are classes there."""
    if node.module is None:
        return
    base = file.parent.joinpath(*node.module.split("."))
    source = base.with_suffix(".py") if base.with_suffix(".py").is_file() else base / "__init__.py"
    if not source.is_file():
        scope.open_ended = True
        return
    other = _scope(source, seen=seen)
    scope.open_ended |= other.open_ended and any(a.name == "*" or a.name not in other.classes for a in node.names)
    for alias in node.names:
        if alias.name == "*":
            scope.classes.update(other.classes)
        elif alias.name in other.classes:
            scope.classes[alias.asname or alias.name] = other.classes[alias.name]


def _assign_names(scope: _Scope, node: ast.Assign) -> None:
    """`Name = OtherClass` binds a class; a call whose result has a class's name may bind one."""
    for target in node.targets:
        if not isinstance(target, ast.Name):
            continue
        if isinstance(node.value, ast.Name) and node.value.id in scope.classes:
            scope.classes[target.id] = scope.classes[node.value.id]
        elif isinstance(node.value, ast.Call) and target.id[:1].isupper() and not target.id.isupper():
            scope.open_ended = True
