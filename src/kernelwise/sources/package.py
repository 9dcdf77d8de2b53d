"""Layer classes of installed packages: `package:module:Layer`. Only the class's forward is used.

Such a class may have an `__init__` and methods, for it was written to be built, not to replace. Its forward is called
with the replaced module as `self`, so `Kernel.reads` names all that it needs there, methods and `super()` too, and a
plan refuses it where the module lacks one of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

from kernelwise._data import Kernel, KernelRef, Limits
from kernelwise.sources._explain import failure, no_such_layer
from kernelwise.sources._layer_class import forward_problem, kernel_of


def load(ref: KernelRef, *, device: str) -> Kernel:
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


def _source_hash(layer: type) -> str | None:
    """The hash of the file that defines the class; None where there is no such file."""
    try:
        file = inspect.getsourcefile(inspect.unwrap(layer.forward))  # type: ignore[attr-defined]
        return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else None
    except (OSError, TypeError):
        return None
