"""From a build on disk to a loaded kernel: what the Hub source and the path source have in common.

The order is what makes it safe: static checks first, the import after them, checks on the class last, and nothing
stays in the process when one of them fails.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from functools import partial
from typing import Any

from kernelwise._data import Kernel, KernelRef, Limits
from kernelwise.sources import _kernels_compat
from kernelwise.sources._explain import failure, no_such_layer
from kernelwise.sources._import import imported
from kernelwise.sources._kernels_compat import Installed
from kernelwise.sources._layer_class import class_problem, kernel_of
from kernelwise.sources._repository import layer_names, metadata_problem, static_problem


def check_statically(ref: KernelRef, installed: Installed) -> None:
    """Check a build without running its code.

    Raises:
        KernelLoadError: its metadata is not valid, it has no such layer, or the layer cannot be a kernel.
    """
    problem = metadata_problem(installed.variant)
    if problem is not None:
        raise failure(ref, problem, fix="build the kernel again, or name another version")
    names = layer_names(installed.variant)
    if names is not None and ref.layer not in names:
        raise no_such_layer(ref, names)
    problem = static_problem(installed.variant, ref.layer)
    if problem is not None:
        raise failure(ref, problem, fix="name another layer")


def load_layer(
    ref: KernelRef,
    installed: Installed,
    *,
    device: str,
    revision: str | None,
    before_import: Callable[[Kernel, str], None] | None = None,
) -> Kernel:
    """Import a checked build and return its layer as a kernel; `revision` is the commit of a Hub kernel.

    Raises:
        KernelLoadError: its code cannot be imported, or the class cannot be a kernel. Nothing of it stays loaded.
    """
    layer: Any
    ask = None if before_import is None else partial(before_import, Kernel(ref, revision=revision))
    with imported(installed, immutable=revision is not None, before_import=ask) as (module, content_hash):
        layers = getattr(module, "layers", None)
        if layers is None:
            raise failure(ref, "its module has no `layers`", fix="its __init__.py must have: from . import layers")
        layer = inspect.getattr_static(layers, ref.layer, None) or getattr(layers, ref.layer, None)
        if layer is None:
            raise no_such_layer(ref, {name for name, value in vars(layers).items() if isinstance(value, type)})
        problem = class_problem(layer, ref.layer)
        if problem is not None:
            raise failure(ref, problem, fix="name another layer")
        limits = _limits(installed, device=device)
        return kernel_of(ref, layer, limits=limits, content_hash=content_hash, revision=revision)


def _limits(installed: Installed, *, device: str) -> Limits:
    metadata = _kernels_compat.read_metadata(installed.variant)
    parsed = [re.match(r"(\d+)\.(\d+)", arch) for arch in metadata.backend.archs or ()]
    oldest = min(((int(m[1]), int(m[2])) for m in parsed if m), default=None)
    return Limits(
        devices=() if installed.variant.name == "torch-universal" else (device,),
        min_arch=f"sm_{oldest[0]}{oldest[1]}" if oldest and device == "cuda" else None,
        requires=tuple(metadata.python_depends),
    )
