"""Look at a layer class: whether it can serve as a kernel, and what its forward takes and reads."""

from __future__ import annotations

import dis
import inspect
from collections.abc import Callable, Iterator
from functools import lru_cache
from types import CodeType, FunctionType
from typing import Any

from kernelwise._data import Kernel, KernelRef, Limits, Parameter

_MEMBERS = frozenset({"can_torch_compile", "has_backward"})
"""The only members that a kernel's layer class may add to `torch.nn.Module`."""


def class_problem(cls: object, name: str) -> str | None:
    """Return why a loaded object is not a stateless layer class, by the rules of the `kernels` library, or None."""
    from torch import nn

    problem = forward_problem(cls, name)
    if problem is not None or not isinstance(cls, type):
        return problem
    if inspect.getattr_static(cls, "__init__") is not inspect.getattr_static(nn.Module, "__init__"):
        return f"its class {name} defines __init__; a kernel has no state of its own"
    extra = sorted({member for member, _ in inspect.getmembers(cls)} - set(dir(nn.Module)) - _MEMBERS)
    if extra:
        return f"its class {name} has members besides forward: {', '.join(extra)}; a kernel's forward calls no methods"
    return None


def forward_problem(cls: object, name: str) -> str | None:
    """Return why a loaded object is no layer class with a forward of its own, or None."""
    from torch import nn

    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        return f"{name} is no torch.nn.Module class, but {_what(cls)}"
    if cls.forward is nn.Module.forward:
        return f"its class {name} has no forward"
    if not isinstance(inspect.getattr_static(cls, "forward"), FunctionType):
        return f"the forward of its class {name} is no plain function"
    return None


def kernel_of(
    ref: KernelRef, cls: Any, *, limits: Limits, content_hash: str | None, revision: str | None = None
) -> Kernel:
    """Describe a checked layer class as a `Kernel` whose function is the class's forward."""
    return Kernel(
        ref=ref,
        limits=limits,
        has_backward=bool(getattr(cls, "has_backward", True)),
        can_torch_compile=bool(getattr(cls, "can_torch_compile", False)),
        revision=revision,
        content_hash=content_hash,
        signature=signature(cls.forward)[1:],
        reads=attributes_read(cls.forward),
        function=cls.forward,
    )


def signature(function: Callable[..., Any]) -> tuple[Parameter, ...]:
    """Return the parameters of a function, their kinds as `inspect` names them in lower case.

    Raises:
        ValueError: Python cannot tell the signature.
    """
    parameters = inspect.signature(function).parameters.values()
    return tuple(Parameter(p.name, p.kind.name.lower(), p.default is not p.empty) for p in parameters)


@lru_cache(maxsize=1024)
def attributes_read(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Return the names that a forward needs on `self`, sorted, as its bytecode shows them.

    Of `self.a.b` that is `a`. A method that it calls counts, and so does `getattr(self, "a")`; `getattr` with a default
    does not, for the forward can do without. `super()` stands as `"super()"`, which no layer has: a forward that calls
    its parent's cannot work on a module of another class. Where `self` is handed to another function, what that
    function reads is not seen.

    >>> def forward(self, x):
    ...     return self.norm.weight * x + self.bias
    >>> attributes_read(forward)
    ('bias', 'norm')
    """
    code = getattr(inspect.unwrap(forward), "__code__", None)
    if not isinstance(code, CodeType) or not code.co_varnames:
        return ()
    return tuple(sorted(set(_reads(code, code.co_varnames[0]))))


def _reads(code: CodeType, owner: str) -> Iterator[str]:
    steps = [step for step in dis.get_instructions(code) if step.opname not in ("CACHE", "EXTENDED_ARG", "NOP")]
    for index, step in enumerate(steps):
        if step.opname == "LOAD_GLOBAL" and step.argval == "super":
            yield "super()"
        if not _pushes_last(step, owner):
            continue
        before, after = steps[max(index - 2, 0) : index], steps[index + 1 : index + 4]
        if (after and after[0].opname in ("LOAD_ATTR", "LOAD_METHOD")) or _is_getattr_call(before, after):
            yield str(after[0].argval)
    for constant in code.co_consts:
        if isinstance(constant, CodeType) and owner in constant.co_freevars:
            yield from _reads(constant, owner)


def _pushes_last(step: dis.Instruction, name: str) -> bool:
    """Whether an instruction leaves the variable on top of the stack (from Python 3.13 one may load two)."""
    if not step.opname.startswith(("LOAD_FAST", "LOAD_DEREF", "STORE_FAST_LOAD_FAST")):
        return False
    loaded = step.argval[-1] if isinstance(step.argval, tuple) else step.argval
    return bool(loaded == name)


def _is_getattr_call(before: list[dis.Instruction], after: list[dis.Instruction]) -> bool:
    """`getattr(self, "name")`: the function before, a constant name after, and a call of exactly two arguments."""
    if len(after) < 2 or after[0].opname != "LOAD_CONST" or not isinstance(after[0].argval, str):
        return False
    called = next((step for step in after[1:] if step.opname.startswith("CALL")), None)
    return any(s.opname == "LOAD_GLOBAL" and s.argval == "getattr" for s in before) and (
        called is not None and called.arg == 2 and after[1].opname.startswith(("CALL", "PRECALL"))
    )


def _what(value: object) -> str:
    return f"the class {value.__qualname__}" if isinstance(value, type) else f"of type {type(value).__qualname__}"
