"""Sources: a reference → a loaded kernel. The only place that downloads or imports other people's code.

A reference names the Hub, a local directory, an installed package or a builtin kernel. Whichever it is, `load` either
returns a checked kernel or raises one `KernelLoadError` and leaves the process as it was: no half-imported module,
nothing in the registries of the `kernels` library. Settings of torch and random states are put back in either case.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from kernelwise._data import Kernel, KernelRef
from kernelwise._errors import KernelLoadError
from kernelwise._process import as_before
from kernelwise.sources import builtin, hub, package, path
from kernelwise.sources._explain import explain, failure
from kernelwise.sources._repository import layer_names

__all__ = ["BeforeImport", "builtin_refs", "describe", "every_builtin_ref", "load", "refs_in"]

BeforeImport = Callable[[Kernel, str], None]
"""Called with what is known of a kernel (its reference and commit) and a hash of its files, "" where there is none."""

_LOADERS = {"hub": hub.load, "path": path.load, "package": package.load}


def load(ref: KernelRef, *, device: str, before_import: BeforeImport | None = None) -> Kernel:
    """Load a kernel for a device type (`"cuda"`, `"cpu"` ...).

    Kernels of the same content are loaded once and shared. A version or branch of the Hub is resolved at every call.

    Args:
        before_import: called just before code that is not ours comes into this process for the first time; what it raises
            keeps the code out.

    Raises:
        KernelLoadError: always this, with the reason in one line, how to go on, and the cause chained.
    """
    if ref.scheme == "builtin":
        return _load_builtin(ref, device)
    with as_before():
        try:
            return _LOADERS[ref.scheme](ref, device=device, before_import=before_import)
        except KernelLoadError:
            raise
        except (Exception, SystemExit) as error:
            raise explain(ref, error) from error


def refs_in(ref: KernelRef, *, device: str) -> tuple[KernelRef, ...]:
    """Return a reference for each layer of the Hub repository or directory that a reference names, whatever layer it names.

    A repository of the Hub is downloaded. Code is read, and not run.

    Raises:
        KernelLoadError: as `load`; or its layers cannot be told without running its code.
    """
    any_layer = replace(ref, layer="layers")
    try:
        installed = (
            path.install(ref, device=device) if ref.scheme == "path" else hub.install(any_layer, device=device)[0]
        )
        names = layer_names(installed.variant)
    except KernelLoadError:
        raise
    except Exception as error:
        raise explain(ref, error) from error
    if names is None:
        raise failure(ref, "its layers cannot be told without running its code", fix="name one, after a colon")
    return tuple(replace(ref, layer=name) for name in sorted(names))


def _load_builtin(ref: KernelRef, device: str) -> Kernel:
    try:
        return builtin.load(ref, device=device)
    except KernelLoadError:
        raise
    except (Exception, SystemExit) as error:
        raise explain(ref, error) from error


def describe(ref: KernelRef, *, device: str) -> Kernel | None:
    """Return what is known of a kernel without loading it, for a plan of another machine.

    That is the limits of a builtin kernel; None for all others.
    """
    return builtin.describe(ref, device=device) if ref.scheme == "builtin" else None


def builtin_refs(op: str, *, device: str) -> tuple[KernelRef, ...]:
    """Return the builtin kernels that compute an operation on a device type."""
    return builtin.refs(op, device=device)


def every_builtin_ref(op: str, layer: str, *, device: str) -> tuple[KernelRef, ...]:
    """Return those and the ones that are never offered unasked, for a layer of that name: what tuning tries."""
    return builtin.every_ref(op, layer, device=device)
