"""Kernels from a directory of this machine: `/abs/path:Layer`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from kernelwise._data import Kernel, KernelRef
from kernelwise.sources import _kernels_compat
from kernelwise.sources._explain import failure
from kernelwise.sources._kernels_compat import Installed
from kernelwise.sources._repository import all_variants, find_variant, metadata_problem, rejected_variants
from kernelwise.sources._variant import check_statically, load_layer

_Stamp = tuple[tuple[str, int, int, int, int], ...]
_loaded: dict[tuple[KernelRef, str], tuple[_Stamp, Kernel]] = {}
"""The last kernel that was loaded for a reference and a device, and what its files were then."""


def load(ref: KernelRef, *, device: str, before_import: Callable[[Kernel, str], None] | None = None) -> Kernel:
    """Load a layer of a local kernel repository; a kernel whose files changed since the last load is read again.

    Raises:
        KernelLoadError: no such directory, no build for this machine, or a kernel that cannot be loaded.
    """
    path = _directory(ref)
    stamp = tuple(sorted(_stamps(str(path.resolve() / "build"))))
    known = _loaded.get((ref, device))
    if known is not None and known[0] == stamp:
        return known[1]
    installed = install(ref, device=device)
    check_statically(ref, installed)
    kernel = load_layer(ref, installed, device=device, revision=None, before_import=before_import)
    if not installed.dependencies:  # which stand in other folders
        _loaded[ref, device] = stamp, kernel
    return kernel


def install(ref: KernelRef, *, device: str) -> Installed:
    """Find the build of a kernel for a device type, without running it. Raises as `load`."""
    path = _directory(ref)
    variant = find_variant(path.resolve(), device=device)
    if variant is None:
        rejected = rejected_variants(path.resolve(), device=device)
        if not rejected:
            found = "not for this machine" if all_variants(path) else "no build/<variant>/metadata.json in it"
            raise failure(ref, f"{path} holds no kernel: {found}", fix="name a directory that holds a built kernel")
        listed = "; ".join(f"{name}: {reason}" for name, reason in rejected)
        raise failure(ref, f"it has no build for this machine: {listed}", fix="build the kernel for this machine")
    if problem := metadata_problem(variant):
        raise failure(ref, problem, fix="build the kernel again")
    backend = _kernels_compat.backend_of(device)
    return _kernels_compat.install(
        str(variant), revision=None, backend=backend, trust_remote_code=ref.trust_remote_code
    )


def _directory(ref: KernelRef) -> Path:
    path = Path(ref.location)
    if not path.is_absolute():
        raise failure(ref, f"{ref.location!r} is no absolute path", fix=f"write {path.resolve()}")
    if path.is_file():
        raise failure(ref, f"{path} is a file, not a directory", fix=f"name the directory: {path.parent}")
    if not path.is_dir():
        raise failure(ref, f"there is no directory {path}", fix="look at the path")
    return path


def _stamps(folder: str) -> Iterator[tuple[str, int, int, int, int]]:
    """What changes when a file below a folder is written: the time of its last change is the system's, not the writer's."""
    try:
        entries = list(os.scandir(folder))
    except OSError:
        return
    for entry in entries:
        if entry.is_dir():
            yield from _stamps(entry.path)
        elif not entry.name.endswith(".pyc"):
            found = entry.stat()
            yield entry.path, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
