"""Layer classes of installed packages: `package:module:Layer`. Only the class's forward is used.

Such a class may have an `__init__` and methods, for it was written to be built, not to replace. Its forward is called
with the replaced module as `self`, so `Kernel.reads` names all that it needs there, methods and `super()` too, and a
plan refuses it where the module lacks one of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
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
        before_import(Kernel(ref), _file_hash(ref.location))
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
        return kernel_of(ref, layer, limits=Limits(requires=(top,)), content_hash=_source_hash(layer))


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


def _file_hash(location: str) -> str:
    """The hash of a module's file and of its package's version, without importing either; "" where there is no file."""
    top, *rest = location.split(".")
    spec = importlib.util.find_spec(top)
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    files = [Path(folder, *rest, "__init__.py") for folder in folders]
    files += [Path(folder, *rest[:-1], f"{rest[-1]}.py") for folder in folders if rest]
    files += [Path(spec.origin)] if spec is not None and spec.origin and not rest else []
    found = next((file for file in files if file.is_file()), None)
    if found is None:
        return ""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        top = importlib.metadata.version(top)
    return hashlib.sha256(top.encode() + found.read_bytes()).hexdigest()


def _source_hash(layer: type) -> str | None:
    """The hash of the file that defines the class; None where there is no such file."""
    try:
        file = inspect.getsourcefile(inspect.unwrap(layer.forward))  # type: ignore[attr-defined]
        return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else None
    except (OSError, TypeError):
        return None
