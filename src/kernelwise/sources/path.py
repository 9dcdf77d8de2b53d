"""Kernels from a directory of this machine: `/abs/path:Layer`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from kernelwise._data import Kernel, KernelRef
from kernelwise.sources import _kernels_compat
from kernelwise.sources._explain import failure
from kernelwise.sources._repository import all_variants, find_variant, metadata_problem, rejected_variants
from kernelwise.sources._variant import check_statically, load_layer


def load(ref: KernelRef, *, device: str, before_import: Callable[[Kernel, str], None] | None = None) -> Kernel:
    """Load a layer of a local kernel repository; a kernel whose files changed since the last load is read again.

    Raises:
        KernelLoadError: no such directory, no build for this machine, or a kernel that cannot be loaded.
    """
    path = Path(ref.location)
    if not path.is_absolute():
        raise failure(ref, f"{ref.location!r} is no absolute path", fix=f"write {path.resolve()}")
    if path.is_file():
        raise failure(ref, f"{path} is a file, not a directory", fix=f"name the directory: {path.parent}")
    if not path.is_dir():
        raise failure(ref, f"there is no directory {path}", fix="look at the path")
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
    installed = _kernels_compat.install(
        str(variant), revision=None, backend=backend, trust_remote_code=ref.trust_remote_code
    )
    check_statically(ref, installed)
    return load_layer(ref, installed, device=device, revision=None, before_import=before_import)
