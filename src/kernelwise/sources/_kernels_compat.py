"""What Kernelwise uses of the `kernels` library beyond its public interface, for kernels 0.16 and 0.17.

Tested with 0.16.2, 0.17.0 and 0.17.2.

Where each name lives:

| used here                          | kernels 0.16                  | kernels 0.17                  |
|------------------------------------|-------------------------------|-------------------------------|
| `_loaded_kernels`, `_import_from_path` | `kernels.utils`           | `kernels.importer`            |
| `get_variants_local`, `resolve_variants` | `kernels.variants`      | `kernels.variants`            |
| `_supported_backends`              | `kernels.backends`            | `kernels.backends`            |
| `validate_dependencies`            | `kernels.deps`                | `kernels.python_deps`         |
| `_check_arch_incompatibility`      | `kernels.archs` (from 0.16.2) | `kernels.archs`               |
| `CACHE_DIR`                        | `kernels.utils`               | `kernels.hf_hub`              |
| dependencies between kernels       | none                          | `kernels.deps`, `kernels.resolver` |

Nothing here imports `kernels` before it is called: `import kernelwise` must not load the Hub client.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import json
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

BACKENDS = {"npu": "cann", "mps": "metal"}
"""The backend that the `kernels` library means by a device type, where the two names differ."""


@dataclass(frozen=True, slots=True)
class Installed:
    """A build of a kernel on this machine's disk, with the builds that it depends on by repository."""

    variant: Path
    dependencies: tuple[tuple[str, Installed], ...] = ()

    def builds(self) -> Iterator[Installed]:
        """Yield this build and all that it depends on."""
        yield self
        for _, dependency in self.dependencies:
            yield from dependency.builds()


def _has(module: str) -> bool:
    return importlib.util.find_spec(f"kernels.{module}") is not None


def loaded_kernels() -> MutableMapping[Path, Any]:
    """Return the registry in which the `kernels` library keeps imported kernels, by variant folder."""
    registry: MutableMapping[Path, Any] = _importer()._loaded_kernels
    return registry


def cache_folder() -> str | None:
    """Return the folder that the `kernels` library downloads to, or None where it uses the Hub client's own."""
    folder: str | None = importlib.import_module("kernels.hf_hub" if _has("hf_hub") else "kernels.utils").CACHE_DIR
    return folder


def _importer() -> ModuleType:
    return importlib.import_module("kernels.importer" if _has("importer") else "kernels.utils")


def import_from_path(variant: Path, dependencies: Mapping[str, ModuleType]) -> ModuleType:
    """Import a variant folder as the `kernels` library does: under its metadata id, kept in `loaded_kernels()`."""
    importer = _importer()
    arguments = (dict(dependencies),) if _has("importer") else ()
    module: ModuleType = importer._import_from_path(variant, *arguments)
    return module


@contextlib.contextmanager
def kernel_dependencies(dependencies: Mapping[str, ModuleType]) -> Iterator[None]:
    """Let `kernels.get_kernel_dep` find these modules while a kernel is imported."""
    if not _has("resolver"):
        yield
        return
    from kernels.deps import use_kernel_deps

    with use_kernel_deps(dict(dependencies)):
        yield


def backend_of(device: str) -> str:
    """Return the backend name of a device type.

    Raises:
        ValueError: the installed PyTorch was not built for that device type.
    """
    from kernels.backends import _supported_backends

    backend = BACKENDS.get(device, device)
    supported = _supported_backends()
    if backend not in supported:
        built_for = " and ".join(sorted(supported))
        raise ValueError(f"the installed PyTorch is built for {built_for}, not for {device}")
    return backend


def local_variants(folder: Path, *, backend: str) -> tuple[list[str], list[tuple[str, str]]]:
    """Return the variants that fit this machine, the best one first, and the others with the reason against each."""
    from kernels.variants import VariantRejected, get_variants_local, resolve_variants

    accepted, trace = resolve_variants(get_variants_local(folder), backend)
    rejected = [(d.variant.variant_str, d.reason) for d in trace if isinstance(d, VariantRejected)]
    return [variant.variant_str for variant in accepted], sorted(rejected)


def read_metadata(variant: Path) -> Any:
    """Return the `kernels.Metadata` of a variant folder. Raises `ValueError` where the file is missing or not valid."""
    from kernels import Metadata

    return Metadata.read_from_file(variant / "metadata.json")


def install(location: str, *, revision: str | None, backend: str, trust_remote_code: bool) -> Installed:
    """Put a kernel and what it depends on onto the disk and check it against this machine, without importing anything.

    Args:
        location: a Hub repository whose publisher the caller has checked, or the variant folder of a local kernel.
        revision: the full commit of the Hub repository; None for a folder.
        trust_remote_code: whether dependencies may come from organisations that are not trusted publishers.

    Raises what the `kernels` library and the Hub client raise.
    """
    if _has("resolver"):
        return _install_tree(location, revision=revision, backend=backend, trust_remote_code=trust_remote_code)
    if revision is None:
        variant = Path(location)
    else:
        import kernels

        variant = kernels.install_kernel(location, revision=revision, backend=backend)
        # kernels 0.16 follows a redirect that the repository itself declares; its publisher has not been checked.
        if f"kernels--{location.replace('/', '--')}" not in variant.parts:
            raise ValueError(f"{location} redirects to another repository, whose publisher was not checked")
    _check_machine(variant)
    return Installed(variant)


def _check_machine(variant: Path) -> None:
    """Check a folder against this machine as kernels 0.17 does, where the library (0.16) leaves it to its callers."""
    from kernels.backends import _backend
    from kernels.deps import validate_dependencies
    from packaging.version import parse

    metadata = read_metadata(variant)
    stated = json.loads((variant / "metadata.json").read_bytes())
    oldest = stated.get("kernels-minver", "0.17") if stated.get("kernel-depends") else stated.get("kernels-minver", "0")
    if parse(oldest) > parse(importlib.metadata.version("kernels")):
        raise RuntimeError(f"the kernel needs kernels >= {oldest}; mend it with: pip install --upgrade kernels")
    validate_dependencies(metadata.name.python_name, metadata.python_depends, _backend())
    if _has("archs"):
        from kernels.archs import _check_arch_incompatibility

        _check_arch_incompatibility(metadata, variant.name)


def _install_tree(location: str, *, revision: str | None, backend: str, trust_remote_code: bool) -> Installed:
    from kernels._rust import KernelDependency, KernelVersion
    from kernels.deps import resolve_kernel_tree
    from kernels.hf_hub import _get_hf_api
    from kernels.resolver import HubResolver, RepoPathsResolver, SequentialResolver
    from kernels.validate import AllValidator, ArchValidator, default_metadata_validators

    hub = HubResolver(trust_remote_code=True if trust_remote_code else [location])
    local = RepoPathsResolver(local_kernels={} if revision is not None else {location: Path(location)})
    version = KernelVersion.Version(0) if revision is None else KernelVersion.Revision(revision)
    api = _get_hf_api()
    tree = resolve_kernel_tree(
        api=api,
        backend=backend,
        kernel=KernelDependency(repo_id=location, version=version),
        resolver=SequentialResolver(resolvers=[local, hub]),
    )
    tree.validate_metadata(AllValidator(validators=[*default_metadata_validators(), ArchValidator()]))
    return _flatten(tree.install(api=api))


def _flatten(node: Any) -> Installed:
    return Installed(
        node.location.variant_path, tuple((repository, _flatten(child)) for repository, child in node.deps.items())
    )
