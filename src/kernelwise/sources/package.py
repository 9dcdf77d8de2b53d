"""Layer classes of installed packages: `package:module:Layer`. Only the class's forward is used.

Such a class may have an `__init__` and methods, for it was written to be built, not to replace. Its forward is called
with the replaced module as `self`, so `Kernel.reads` names all that it needs there, methods and `super()` too, and a
plan refuses it where the module lacks one of them.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

from kernelwise._data import Kernel, KernelRef, Limits
from kernelwise.sources._explain import failure, no_such_layer
from kernelwise.sources._layer_class import forward_problem, kernel_of


def load(ref: KernelRef, *, device: str, before_import: Callable[[Kernel, str], None] | None = None) -> Kernel:
    """Load a layer class of an installed package.

    Raises:
        KernelLoadError: the package is not installed or fails to import, or the class has no forward of its own.
    """
    top = ref.location.split(".")[0]
    if not all(part.isidentifier() for part in ref.location.split(".")):
        raise failure(ref, f"{ref.location!r} is no module name", fix="write package:<module>:<Layer>")
    if top not in sys.modules and importlib.util.find_spec(top) is None:
        hint = top.replace("_", "-")
        raise failure(ref, f"the package {top} is not installed", fix=f"pip install {hint}")
    if before_import is not None and ref.location not in sys.modules:
        before_import(Kernel(ref), _package_hash(top) or "")
    with _forgotten_on_error(top):
        try:
            module = importlib.import_module(ref.location)
        except ModuleNotFoundError as error:
            if error.name is None or not (ref.location + ".").startswith(error.name + "."):
                raise
            raise failure(
                ref, f"the package {top} has no module {error.name}", fix="look at the module's name"
            ) from error
        layer = getattr(module, ref.layer, None)
        if layer is None:
            raise no_such_layer(ref, {name for name, value in vars(module).items() if isinstance(value, type)})
        problem = forward_problem(layer, ref.layer)
        if problem is not None:
            raise failure(ref, problem, fix="name a class of torch.nn.Module")
        return kernel_of(ref, layer, limits=Limits(requires=(top,)), content_hash=_package_hash(top))


@contextlib.contextmanager
def _forgotten_on_error(top: str) -> Iterator[None]:
    """Take the package's newly imported modules out again when the body fails."""
    before = set(sys.modules)
    try:
        yield
    except BaseException:
        if top not in before:
            for name in set(sys.modules) - before:
                if name.split(".")[0] == top:
                    del sys.modules[name]
        raise


def _package_hash(top: str) -> str | None:
    """Return the hash of all Python files and libraries of a package, without importing it; None where it has none.

    A layer's code is more than the file of its class: helpers and compiled parts stand beside it. Of the packages that these
    import, the version counts too where one is installed, and else their files.
    """
    digest = hashlib.sha256()
    left, seen = [top], {top, *_PINNED, *sys.stdlib_module_names}
    while left:
        name = left.pop()
        installed = None if name == top else _version_of(name)
        found = [] if installed else _files_of(name)
        if name == top and not found:
            return None
        digest.update(f"{name} {installed}\n".encode())
        imported: set[str] = set()
        for relative, file in found:
            state = file.stat()
            digest.update(f"{relative} {_file_hash(file, state.st_mtime_ns, state.st_size)}\n".encode())
            if file.suffix == ".py":
                imported |= _imports_of(file, state.st_mtime_ns, state.st_size)
        left = sorted({*left, *(imported - seen)}, reverse=True)
        seen |= imported
    return digest.hexdigest()


_PINNED = ("torch", "triton", "transformers", "kernelwise", "numpy")
"""Packages of which a proof names the version, or on which no result depends."""


def _files_of(top: str) -> list[tuple[str, Path]]:
    """The files of a package's code with their names in it; none where it is not here."""
    try:
        spec = importlib.util.find_spec(top)
    except ValueError:  # a module that was made by hand
        spec = None
    if spec is None:
        return []
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    if not folders and spec.origin and Path(spec.origin).is_file():
        return [(Path(spec.origin).name, Path(spec.origin))]
    return sorted((file.relative_to(folder).as_posix(), file) for folder in folders for file in _code_files(folder))


def _version_of(top: str) -> str | None:
    """The version of an installed package, by the name it is imported by; None for one whose files may change by the hour."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError, ImportError, ValueError):
        spec = importlib.util.find_spec(top)
        if spec is not None and {"site-packages", "dist-packages"} & set(Path(spec.origin or "").parts):
            return importlib.metadata.version(top)
    return None


@lru_cache(maxsize=1 << 16)
def _imports_of(file: Path, modified: int, size: int) -> frozenset[str]:
    """The names of the packages that a file as it was at a time imports somewhere."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):  # code for another version of Python, which cannot be imported either
        return frozenset()
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found.add(node.module.partition(".")[0])
    return frozenset(found)


def _code_files(folder: Path) -> Iterator[Path]:
    for pattern in ("*.py", "*.so", "*.pyd"):
        yield from (file for file in folder.rglob(pattern) if file.is_file())


@lru_cache(maxsize=1 << 16)
def _file_hash(file: Path, modified: int, size: int) -> str:
    """The hash of a file as it was at a time; it is read once."""
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while part := opened.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()
