"""Bind: a kernel and a layer → the function that runs in place of the layer's own code.

The function is written as source for the layer's own signature and compiled once per distinct layer, so that a call costs
no argument packing. What can go wrong at a call is looked at there and goes to the layer's own code, counted: an input of
another dtype or device than the kernel takes, a tensor subclass, a gradient that the kernel cannot give.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from types import CellType, FunctionType
from typing import Any

import torch

from kernelwise._data import Binding, Kernel, Layer, Limits, Parameter, Recognition
from kernelwise._discover import STATE, mark_dispatcher, unwrap
from kernelwise._errors import ApplyError
from kernelwise._signature import bind, source

Call = Callable[..., Any]

_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})
INPUT = "the input has a dtype, device or tensor class that the kernel does not take"
NO_BACKWARD = "a gradient was needed and the kernel has no backward"
LOST_GRADIENT = "the kernel gave an output without gradient"


def needs_grad(module: torch.nn.Module | None, *arguments: Any) -> bool:
    """Return whether a gradient can flow into any of the arguments or into a parameter of the module."""
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            if argument.requires_grad:
                return True
        elif isinstance(argument, (tuple, list)):
            if needs_grad(None, *argument):
                return True
        elif isinstance(argument, dict) and needs_grad(None, *argument.values()):
            return True
    return module is not None and any(parameter.requires_grad for parameter in module.parameters())


def carries_grad(output: Any) -> bool:
    """Return whether some floating tensor of an output is part of the graph (True where there is no such tensor)."""
    tensors = (
        [output] if isinstance(output, torch.Tensor) else list(output) if isinstance(output, (tuple, list)) else []
    )
    floating = [t for t in tensors if isinstance(t, torch.Tensor) and t.is_floating_point()]
    return not floating or any(tensor.requires_grad for tensor in floating)


def run_own(self: torch.nn.Module, why: str | None, *args: Any, **kwargs: Any) -> Any:
    """Run the layer's own code in place of its kernel and count why; never counts while compiling."""
    return getattr(self, STATE).run_own(self, why, args, kwargs)


def layer_call(layer: Layer, kernel: Kernel, mode: str) -> Call:
    """Return the function `(self, ...)`, in the layer's own signature, that runs the kernel for this layer.

    Raises:
        ApplyError: the plan was made by hand and the kernel cannot be bound.
    """
    if kernel.function is None:
        raise ApplyError(f"{kernel.ref} is described, not loaded; plan on the machine that the model is on")
    return _compile(
        kernel.function,
        layer.signature,
        kernel.signature,
        layer.computes(mode) if kernel.op is not None else None,
        kernel.limits,
        kernel.has_backward,
        kernel.can_torch_compile,
        True,
    )(run_own)


def function_call(layer: Layer, kernel: Kernel, mode: str, original: Call, fallbacks: Counter[str]) -> Call:
    """Return the function that runs the kernel in place of a function `original` that a forward calls."""
    if kernel.function is None:
        raise ApplyError(f"{kernel.ref} is described, not loaded; plan on the machine that the model is on")

    def run_original(why: str | None, *args: Any, **kwargs: Any) -> Any:
        if why is not None and not torch.compiler.is_compiling():
            fallbacks[why] += 1
        return original(*args, **kwargs)

    function = kernel.function
    if kernel.op is None:
        function = function.__get__(original)  # the forward of a kernel's layer class, with the wrapper as its self
    call = _compile(
        function,
        layer.signature,
        kernel.signature,
        layer.computes(mode) if kernel.op is not None else None,
        kernel.limits,
        kernel.has_backward,
        kernel.can_torch_compile,
        False,
    )(run_original)
    plain = type(original).forward if isinstance(original, torch.nn.Module) else original
    _copy_defaults(call, plain, skip=0)
    return call


@lru_cache(maxsize=4096)
def _compile(
    function: Call,
    layer: tuple[Parameter, ...],
    kernel: tuple[Parameter, ...],
    recognition: Recognition | None,
    limits: Limits,
    has_backward: bool,
    can_torch_compile: bool,
    has_self: bool,
) -> Callable[[Call], Call]:
    """Write and compile one adapter. Returns a function that takes what to run for the layer's own code."""
    declared, passed = source(layer)
    names = ", ".join(p.name for p in layer)
    self_ = "self, " if has_self else ""
    module = "self" if has_self else "None"
    own = f"return own({self_}{{why}}, {passed})"
    lines = [f"def call({self_}{declared}):"]
    if not can_torch_compile:
        lines += ["    if is_compiling():", "        " + own.format(why="None")]
    if recognition is not None:
        arguments = ", ".join(_role_arguments(recognition, kernel))
        weight = _weight(recognition)
        if weight:
            # The dict first: a parameter found through nn.Module.__getattr__ costs several times as much.
            lines += [
                "    parameters = self._parameters",
                f'    weight = parameters["{weight}"] if "{weight}" in parameters else self.{weight}',
            ]
        guard = _guard(recognition, limits)
        if guard:
            lines += [f"    if not ({guard}):", "        " + own.format(why="INPUT")]
    else:
        arguments, reasons = bind(layer, kernel)
        if reasons:
            raise ApplyError(f"{function.__qualname__} cannot be bound: {'; '.join(reasons)}")
        if has_self:
            arguments = f"self, {arguments}" if arguments else "self"
    if not has_backward:
        lines += [
            f"    if is_grad_enabled() and needs_grad({module}, {names}):",
            "        " + own.format(why="NO_BACKWARD"),
        ]
    if has_backward and recognition is None:
        lines += [
            f"    output = kernel({arguments})",
            f"    if is_grad_enabled() and not carries_grad(output) and needs_grad({module}, {names}):",
            "        " + own.format(why="LOST_GRADIENT"),
            "    return output",
        ]
    else:
        lines += [f"    return kernel({arguments})"]
    body = "\n".join("    " + line for line in lines)
    namespace: dict[str, Any] = {
        "kernel": function,
        "plain": _PLAIN,
        "dtypes": frozenset(getattr(torch, name) for name in limits.dtypes),
        "is_compiling": torch.compiler.is_compiling,
        "is_grad_enabled": torch.is_grad_enabled,
        "needs_grad": needs_grad,
        "carries_grad": carries_grad,
        "INPUT": INPUT,
        "NO_BACKWARD": NO_BACKWARD,
        "LOST_GRADIENT": LOST_GRADIENT,
    }
    exec(f"def make(own):\n{body}\n    return call", namespace)
    make: Callable[[Call], Call] = namespace["make"]
    return lru_cache(maxsize=1)(make) if has_self else make


def _role_arguments(recognition: Recognition, kernel: tuple[Parameter, ...]) -> list[str]:
    taken = {p.name for p in kernel}
    weight = _weight(recognition)
    arguments = [
        f"{role}={'weight' if role == 'weight' and weight else _expression(binding)}"
        for role, binding in recognition.roles
        if not taken or role in taken
    ]
    return arguments + [f"{name}={value!r}" for name, value in recognition.options if not taken or name in taken]


def _expression(binding: Binding) -> str:
    if binding.kind == "argument":
        return str(binding.value)
    return f"self.{binding.value}" if binding.kind in ("attribute", "child") else repr(binding.value)


def _guard(recognition: Recognition, limits: Limits) -> str:
    """The condition under which an operation's kernel may see its input: plain tensors of its dtypes, on its device."""
    first = next((str(b.value) for _, b in recognition.roles if b.kind == "argument"), None)
    if first is None:
        return ""
    tests = [f"type({first}) in plain"]
    if limits.dtypes:
        tests.append(f"{first}.dtype in dtypes")
    if limits.devices:
        flags = {"cpu": "is_cpu", "cuda": "is_cuda", "rocm": "is_cuda", "xpu": "is_xpu", "mps": "is_mps"}
        known = sorted({flags[device] for device in limits.devices if device in flags})
        if known:
            tests.append("(" + " or ".join(f"{first}.{flag}" for flag in known) + ")")
    if _weight(recognition):
        tests.append("type(weight) in plain")
    return " and ".join(tests)


def _weight(recognition: Recognition) -> str | None:
    """Return the attribute that holds the layer's weight, if it has one."""
    binding = dict(recognition.roles).get("weight")
    return str(binding.value) if binding is not None and binding.kind == "attribute" else None


@lru_cache(maxsize=4096)
def dispatcher(own: Call) -> Call:
    """Return the forward that is put on an instance: it runs what the module's state holds for its mode."""
    parameters = tuple(
        Parameter(p.name, p.kind.name.lower(), p.default is not p.empty)
        for p in inspect.signature(own).parameters.values()
    )[1:]
    declared, passed = source(parameters)
    namespace: dict[str, Any] = {}
    exec(
        f"def forward(self, {declared}):\n"
        f"    return (self.{STATE}.training if self.training else self.{STATE}.inference)(self, {passed})",
        namespace,
    )
    forward: Call = namespace["forward"]
    _copy_defaults(forward, own, skip=1)
    mark_dispatcher(forward)
    forward.__doc__ = own.__doc__
    forward.__qualname__ = getattr(own, "__qualname__", "forward")
    forward.__module__ = getattr(own, "__module__", __name__)
    forward.__annotations__ = dict(getattr(own, "__annotations__", {}))
    return forward


def _copy_defaults(function: Call, own: Call, *, skip: int) -> None:
    """Give a generated function the default values of the forward whose signature it repeats."""
    parameters = list(inspect.signature(own).parameters.values())
    if isinstance(own, FunctionType) and not skip and parameters and parameters[0].name == "self":
        parameters = parameters[1:]
    positional = [p.default for p in parameters if p.default is not p.empty and p.kind is not p.KEYWORD_ONLY]
    keyword = {p.name: p.default for p in parameters if p.default is not p.empty and p.kind is p.KEYWORD_ONLY}
    function.__defaults__ = tuple(positional) or None
    function.__kwdefaults__ = keyword or None


def rebuild(forward: Call, replacements: dict[str, Call]) -> Call | None:
    """Return a copy of a forward that sees other values behind some of its global names; None where that is not possible.

    The copy has globals of its own, so no other model is changed. Decorators made with `functools.wraps` are copied around
    it: each must hold the function it wraps in exactly one closure cell.
    """
    inner = unwrap(forward)
    if inner is None or "__name__" in inner.__code__.co_names:
        return None
    # Without a module name, torch.compile takes the values from these globals and not from the module they came from.
    scope = {name: value for name, value in inner.__globals__.items() if name != "__name__"} | replacements
    rebuilt = _copy_function(inner, scope, inner.__closure__)
    chain: list[FunctionType] = []
    outer: Any = forward
    while outer is not inner:
        if not isinstance(outer, FunctionType):
            return None
        chain.append(outer)
        outer = outer.__wrapped__  # type: ignore[attr-defined]
    wrapped: FunctionType = inner
    for outer in reversed(chain):
        cells = outer.__closure__ or ()
        holds = [index for index, cell in enumerate(cells) if _contents(cell) is wrapped]
        if len(holds) != 1:
            return None
        closure = tuple(CellType(rebuilt) if index == holds[0] else cell for index, cell in enumerate(cells))
        wrapped, rebuilt = outer, _copy_function(outer, outer.__globals__, closure)
        rebuilt.__wrapped__ = closure[holds[0]].cell_contents  # type: ignore[attr-defined]
    return rebuilt


def _contents(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # an empty cell
        return None


def _copy_function(function: FunctionType, scope: dict[str, Any], closure: tuple[CellType, ...] | None) -> FunctionType:
    copied = FunctionType(function.__code__, scope, function.__name__, function.__defaults__, closure)
    copied.__kwdefaults__ = function.__kwdefaults__
    copied.__dict__.update(function.__dict__)
    copied.__qualname__, copied.__doc__ = function.__qualname__, function.__doc__
    copied.__annotations__, copied.__module__ = function.__annotations__, function.__module__
    return copied
