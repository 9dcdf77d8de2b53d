"""Import a build of a kernel, so that each content has one module and a failure leaves no trace.

The `kernels` library keeps imported kernels by folder and puts them into `sys.modules` under the id of their metadata.
A folder whose files were edited, or another build with the same id, would get the first one's module. Here the content
decides: what was imported with this content is shared, also with the `kernels` library; where the id is taken by other
content, the module gets a name of its own and the one that stands there keeps working.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import re
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType

from kernelwise.sources import _kernels_compat
from kernelwise.sources._kernels_compat import Installed
from kernelwise.sources._repository import content_hash

_lock = threading.RLock()
_imported: dict[str, ModuleType] = {}


@contextlib.contextmanager
def imported(
    installed: Installed, *, immutable: bool, before_import: Callable[[str], None] | None = None
) -> Iterator[tuple[ModuleType, str]]:
    """Yield the module of a build and its content hash.

    Where the import or the body of the `with` fails, all modules that newly came in are taken out again.

    Args:
        immutable: the folder's files never change (a snapshot of a Hub commit), so that a module which the `kernels`
            library has already imported from that folder still is its content.
        before_import: called with the content's hash where its code is not in this process yet.

    Raises whatever the kernel's code, or `before_import`, raises.
    """
    with _lock:
        builds = tuple(installed.builds())
        hashes = {build.variant: content_hash(build.variant) for build in builds}
        registry = _kernels_compat.loaded_kernels()
        known, names, folders = set(_imported), set(sys.modules), set(registry)
        digest = _digest(installed, hashes)
        if before_import is not None and digest not in known and not (immutable and installed.variant in registry):
            before_import(digest)
        try:
            yield _import(installed, hashes, immutable=immutable), hashes[installed.variant]
        except BaseException:
            _forget(builds, hashes, since=names)
            for digest in set(_imported) - known:
                del _imported[digest]
            for folder in set(hashes) - folders:
                registry.pop(folder, None)
            raise


def _import(installed: Installed, hashes: Mapping[Path, str], *, immutable: bool) -> ModuleType:
    digest = _digest(installed, hashes)
    if digest not in _imported:
        dependencies = {name: _import(build, hashes, immutable=True) for name, build in installed.dependencies}
        variant, name = installed.variant, _id(installed)
        loaded = _kernels_compat.loaded_kernels().get(variant)
        with _without_bytecode():
            if loaded is not None and immutable:
                _imported[digest] = loaded.module
            elif loaded is None and not _is_taken(name):
                _imported[digest] = _kernels_compat.import_from_path(variant, dependencies)
            else:
                _imported[digest] = _import_as(_own_name(name, digest), variant, dependencies)
    return _imported[digest]


def _import_as(name: str, variant: Path, dependencies: Mapping[str, ModuleType]) -> ModuleType:
    file = variant / "__init__.py"
    if not file.is_file():
        file = variant / _kernels_compat.read_metadata(variant).name.python_name / "__init__.py"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None or not file.is_file():
        raise FileNotFoundError(f"no Python module in {variant}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    with _kernels_compat.kernel_dependencies(dependencies):
        spec.loader.exec_module(module)
    return module


def _forget(builds: tuple[Installed, ...], hashes: Mapping[Path, str], *, since: set[str]) -> None:
    """Take out of `sys.modules` what belongs to these builds and was not there before."""
    tops = {_id(build) for build in builds} | {_own_name(_id(build), _digest(build, hashes)) for build in builds}
    for name in set(sys.modules) - since:
        if any(name == top or name.startswith(f"{top}.") for top in tops):
            del sys.modules[name]


def _id(installed: Installed) -> str:
    return str(_kernels_compat.read_metadata(installed.variant).id)


def _own_name(name: str, digest: str) -> str:
    return f"{re.sub(r'[^0-9A-Za-z_]', '_', name)}_{digest[:16]}"


def _is_taken(name: str) -> bool:
    """Whether a module of that name is loaded or could be: a kernel must not stand in the way of a package."""
    return "." in name or name in sys.modules or importlib.util.find_spec(name) is not None


def _digest(installed: Installed, hashes: Mapping[Path, str]) -> str:
    """A build is the same only with the same dependencies."""
    parts = [hashes[installed.variant]]
    parts.extend(f"{name} {_digest(build, hashes)}" for name, build in installed.dependencies)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@contextlib.contextmanager
def _without_bytecode() -> Iterator[None]:
    """Import from source alone: cached bytecode is matched by whole seconds and size, and an edit can keep both."""
    before = sys.pycache_prefix, sys.dont_write_bytecode
    with tempfile.TemporaryDirectory() as empty:
        sys.pycache_prefix, sys.dont_write_bytecode = empty, True
        importlib.invalidate_caches()
        try:
            yield
        finally:
            sys.pycache_prefix, sys.dont_write_bytecode = before
