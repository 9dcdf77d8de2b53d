"""Bind: a kernel and a layer → the function that runs in place of the layer's own code.

The function is written as source for the layer's own signature and compiled once per distinct layer, so that a call costs
no argument packing. What can go wrong at a call is looked at there and goes to the layer's own code, counted: an input of
another dtype or device than the kernel takes, a tensor subclass, a gradient that the kernel cannot give.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any

import torch
from torch.autograd import forward_ad

from kernelwise._applying import _guards
from kernelwise._applying._fuse import REFUSALS, Passing, first
from kernelwise._applying._guards import CHANGED, holding, run_own
from kernelwise._data import Binding, Kernel, Layer, Limits, Parameter, Recognition
from kernelwise._discover import STATE
from kernelwise._errors import ApplyError
from kernelwise._forwards import mark_dispatcher
from kernelwise._recognize import condition
from kernelwise._signature import bind, source

Call = Callable[..., Any]

_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})


def reach(module: str, path: str) -> str:
    """Return the expression for what stands at a path of a module; what is in a `ModuleList` has a number for a name."""
    names = tuple(path.split("."))
    return f"{module}.{path}" if all(map(str.isidentifier, names)) else f"_kw_follow({module}, {names!r})"


def layer_call(
    layer: Layer,
    kernel: Kernel,
    mode: str,
    own: Call,
    parameters: tuple[str, ...] = (),
    children: tuple[str, ...] = (),
    passing: Passing | None = None,
) -> Call:
    """Return the function `(self, ...)`, in the layer's own signature, that runs the kernel for this layer.

    `own` is the forward of the layer's class. Where its decorators take keywords that its signature does not tell of, a
    call with such a keyword goes to the own code. `parameters` names those of the layer's own that a layer class reads,
    `children` its submodules. `passing` says how the kernel of a whole layer calls them.

    Raises:
        ApplyError: the plan was made by hand and the kernel cannot be bound.
    """
    if kernel.function is None:
        raise ApplyError(f"{kernel.ref} is described, not loaded; plan on the machine that the model is on")
    call = _compile(
        kernel.function,
        layer.signature,
        kernel.signature,
        layer.computes(mode) if kernel.op is not None else None,
        kernel.limits,
        kernel.has_backward,
        kernel.can_torch_compile,
        True,
        parameters=parameters,
        takes_more=_takes_any_keyword(own) and all(p.kind != "var_keyword" for p in layer.signature),
        children=children,
        passing=passing,
    )(run_own)
    call.kernel_function = kernel.function  # type: ignore[attr-defined]  # a kernel that stands for this one asks
    return call


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
    parameters = list(inspect.signature(plain).parameters.values())
    _set_defaults(call, parameters[1:] if isinstance(original, torch.nn.Module) else parameters)
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
    parameters: tuple[str, ...] = (),
    takes_more: bool = False,
    children: tuple[str, ...] = (),
    passing: Passing | None = None,
) -> Callable[[Call], Call]:
    """Write and compile one adapter. Returns a function that takes what to run for the layer's own code.

    Everything that is not the layer's own stands under a name with the prefix `_kw_`, which no forward gives a parameter.
    """
    declared, passed = source(layer)
    self_ = "self" if has_self else ""
    needs = " or ".join([_needs_grad(p.name) for p in layer] + ["_kw_has_trained(self)"] * has_self) or "False"

    def own(why: str, more: str = "") -> str:
        return f"        return _kw_own({', '.join(filter(None, (self_, why, passed, more)))})"

    holds = holding(recognition) if recognition is not None and has_self else None
    more = "**_kw_more" if takes_more else ""
    lines = [f"def _kw_call({', '.join(filter(None, (self_, declared, more)))}):"]
    if takes_more:
        lines += ["    if _kw_more:", own("_kw_MORE", more)]
    if not can_torch_compile:
        lines += ["    if _kw_is_compiling():", own("None")]
    if hasattr(forward_ad, "_current_level"):  # private to PyTorch, and the only thing that is quick to look at
        lines += ["    if _kw_forward_ad._current_level >= 0:", own("_kw_FORWARD_AD")]
    if recognition is not None:
        arguments = ", ".join(_role_arguments(recognition, kernel, passing))
        if children or passing is not None or any(binding.kind == "child" for _, binding in recognition.roles):
            lines += ["    _kw_children = self._modules"]  # once: every attribute of a module costs 40 ns
        weight = _weight(recognition)
        if weight:
            # The dict first: a parameter found through nn.Module.__getattr__ costs several times as much.
            lines += [
                "    _kw_parameters = self._parameters",
                f'    _kw_weight = _kw_parameters["{weight}"] if "{weight}" in _kw_parameters else {reach("self", weight)}',
            ]
        guard = _guard(recognition, limits)
    else:
        arguments, reasons = bind(layer, kernel)
        if reasons:
            raise ApplyError(f"{function.__qualname__} cannot be bound: {'; '.join(reasons)}")
        if has_self:
            arguments = f"self, {arguments}" if arguments else "self"
        guard = _plain_guard(layer, parameters)
    if guard:
        lines += [f"    if not ({guard}):", own("_kw_INPUT")]
    fits = condition(recognition) if recognition is not None else None
    if fits:
        lines += [f"    if not ({fits}):", own("_kw_UNPROVEN")]
    if recognition is not None and has_self:
        for test in _tests_for_changes(recognition, children, looks_inside=holds is not None):
            lines += [*test, own("_kw_CHANGED")]
    if passing is not None:
        if passing.least:
            hidden = dict(recognition.roles)["x"].value if recognition is not None else ""
            lines += [f"    if {hidden}.numel() < {passing.least}:", own("None")]
        if passing.refused is not None:
            lines += [f"    if {passing.refused} is not None:", own("None")]
    if not has_backward:
        lines += [f"    if _kw_is_grad_enabled() and ({needs}):", own("_kw_NO_BACKWARD")]
    if recognition is not None and passing is None:
        # Kernels by roles never write their inputs, so the own code can run after one that does not take them.
        lines += ["    try:", f"        return _kw_kernel({arguments})", "    except _kw_OutOfMemory:", "        raise"]
        lines += ["    except _kw_refusals:", "        pass", own("_kw_REFUSED").removeprefix("    ")]
    elif recognition is None and has_backward:
        lines += [
            f"    _kw_output = _kw_kernel({arguments})",
            # By far the most frequent case first; what looks into the output last, as it costs most.
            "    if _kw_is_grad_enabled() and not (type(_kw_output) is _kw_Tensor and _kw_output.requires_grad) and "
            f"({needs}) and not _kw_carries_grad(_kw_output):",
            own("_kw_LOST_GRADIENT"),
            "    return _kw_output",
        ]
    else:
        # Children of a whole layer have run when it fails, and may have written to a cache: nothing can be run again.
        lines += [f"    return _kw_kernel({arguments})"]
    namespace = _KNOWN | {
        "_kw_kernel": function,
        "_kw_dtypes": frozenset(getattr(torch, name) for name in limits.dtypes),
        "_kw_holds": holds,
        "_kw_sum_norm": None if passing is None else passing.sum_norm,
    }
    body = "\n".join("    " + line for line in lines)
    exec(f"def make(_kw_own):\n{body}\n    return _kw_call", namespace)
    make: Callable[[Call], Call] = namespace["make"]
    return lru_cache(maxsize=1)(make) if has_self else make


_KNOWN: dict[str, Any] = {
    "_kw_plain": _PLAIN,
    "_kw_plain_or_none": _PLAIN | {type(None)},
    "_kw_Tensor": torch.Tensor,
    "_kw_is_compiling": torch.compiler.is_compiling,
    "_kw_is_grad_enabled": torch.is_grad_enabled,
    "_kw_needs_grad": _guards.needs_grad,
    "_kw_has_trained": _guards.has_trained,
    "_kw_carries_grad": _guards.carries_grad,
    "_kw_unchanged": _guards.unchanged,
    "_kw_follow": _guards.follow,
    "_kw_OutOfMemory": torch.OutOfMemoryError,
    "_kw_refusals": REFUSALS,
    "_kw_CHANGED": CHANGED,
    "_kw_REFUSED": _guards.REFUSED,
    "_kw_INPUT": _guards.INPUT,
    "_kw_UNPROVEN": _guards.UNPROVEN,
    "_kw_MORE": _guards.MORE,
    "_kw_FORWARD_AD": _guards.FORWARD_AD,
    "_kw_forward_ad": forward_ad,
    "_kw_NO_BACKWARD": _guards.NO_BACKWARD,
    "_kw_LOST_GRADIENT": _guards.LOST_GRADIENT,
    "_kw_first": first,
}
"""What every function that is written here may name, besides what is its own."""


def _tests_for_changes(
    recognition: Recognition, children: tuple[str, ...], *, looks_inside: bool
) -> Iterator[list[str]]:
    """Yield the lines that test whether something that a recognition depends on was replaced, or a child hooked."""
    for name in recognition.depends:
        if name in children:  # by far the most frequent case, without a call
            yield [
                f"    _kw_state, _kw_child = self.__dict__.get({STATE!r}), _kw_children.get({name!r})",
                f"    if _kw_state is None or _kw_child is not _kw_state.pins.get({name!r}) or _kw_child._forward_hooks or "
                "_kw_child._forward_pre_hooks or _kw_child._backward_hooks or _kw_child._backward_pre_hooks:",
            ]
    if set(recognition.depends) - set(children):
        yield ["    if not _kw_unchanged(self):"]
    if recognition.of_class:
        there = " or ".join(f"{name!r} in self.__dict__" for name in recognition.of_class)
        yield [f"    if {there}:"]
    if looks_inside:
        yield ["    if not _kw_holds(self):"]


def _role_arguments(
    recognition: Recognition, kernel: tuple[Parameter, ...], passing: Passing | None = None
) -> list[str]:
    taken = {p.name for p in kernel}
    weight = _weight(recognition)
    called = dict(passing.children) if passing is not None else {}
    if weight:
        called["weight"] = "_kw_weight"
    arguments = [
        f"{role}={called.get(role) or expression(binding, children='_kw_children')}"
        for role, binding in recognition.roles
        if not taken or role in taken
    ]
    if passing is not None and passing.sum_norm is not None:
        arguments.append("sum_norm=lambda _kw_added, _kw_x: _kw_sum_norm(self, _kw_added, _kw_x)")
    return arguments + [f"{name}={value!r}" for name, value in recognition.options if not taken or name in taken]


def expression(binding: Binding, module: str = "self", children: str | None = None) -> str:
    """Return the expression for what fills a role, in a function that has `_kw_follow` and the module under a name.

    `children` is a name that stands for the module's dict of children, where the function has one.
    """
    if binding.kind == "argument":
        return str(binding.value)
    if binding.kind == "child":  # as the weight: through nn.Module.__getattr__ it costs several times as much
        name, children = str(binding.value), children or f"{module}._modules"
        return f'({children}["{name}"] if "{name}" in {children} else {reach(module, name)})'
    return reach(module, str(binding.value)) if binding.kind == "attribute" else repr(binding.value)


def _guard(recognition: Recognition, limits: Limits) -> str:
    """The condition under which an operation's kernel may see its input: plain tensors of its dtypes, on its device."""
    given = [str(b.value) for _, b in recognition.roles if b.kind == "argument"]
    if not given:
        return ""
    first, *others = given
    tests = [f"type({first}) in _kw_plain"]
    if limits.dtypes:
        tests.append(f"{first}.dtype in _kw_dtypes")
    if limits.devices:
        flags = {"cpu": "is_cpu", "cuda": "is_cuda", "rocm": "is_cuda", "xpu": "is_xpu", "mps": "is_mps"}
        known = sorted({flags[device] for device in limits.devices if device in flags})
        if known:
            tests.append("(" + " or ".join(f"{first}.{flag}" for flag in known) + ")")
    if _weight(recognition):
        tests.append("type(_kw_weight) in _kw_plain" + " and _kw_weight.dtype in _kw_dtypes" * bool(limits.dtypes))
    return " and ".join([*tests, *map(_is_plain, others)])


def _plain_guard(layer: tuple[Parameter, ...], parameters: tuple[str, ...]) -> str:
    """The condition under which a layer class may see its input: no tensor of a subclass, given or read from the module."""
    given = [_is_plain(p.name) for p in layer if not p.kind.startswith("var_")]
    read = [f'type(self._parameters.get("{name}")) in _kw_plain_or_none' for name in parameters]
    return " and ".join([*given, *read])


def _needs_grad(name: str) -> str:
    """The condition under which a gradient may flow into an argument; without a call for a plain tensor."""
    return f"({name}.requires_grad if type({name}) in _kw_plain else {name} is not None and _kw_needs_grad({name}))"


def _is_plain(name: str) -> str:
    return f"(type({name}) in _kw_plain or not isinstance({name}, _kw_Tensor))"


def _weight(recognition: Recognition) -> str | None:
    """Return the attribute that holds the layer's weight, if it has one."""
    binding = dict(recognition.roles).get("weight")
    return str(binding.value) if binding is not None and binding.kind == "attribute" else None


@lru_cache(maxsize=4096)
def dispatcher(own: Call) -> Call:
    """Return the forward that is put on an instance: it runs what the module's state holds for its mode.

    It takes what `own` takes with its decorators. Whoever keeps it longer than the state lasts gets the own code.
    """
    parameters = _accepted(own)
    declared, passed = source([Parameter(p.name, p.kind.name.lower(), p.default is not p.empty) for p in parameters])
    namespace: dict[str, Any] = {"_kw_own": own, "_kw_run_own": run_own, "_kw_CHANGED": CHANGED}
    exec(
        f"def forward(self, {declared}):\n"
        "    try:\n"
        f"        _kw_state = self.{STATE}\n"
        "    except AttributeError:\n"
        f"        return _kw_own(self, {passed})\n"
        "    if self.__class__.forward is not _kw_own:\n"
        f"        return _kw_run_own(self, _kw_CHANGED, {passed})\n"
        f"    return (_kw_state.training if self.training else _kw_state.inference)(self, {passed})",
        namespace,
    )
    forward: Call = namespace["forward"]
    _set_defaults(forward, parameters)
    mark_dispatcher(forward)
    forward.__doc__ = own.__doc__
    forward.__qualname__ = getattr(own, "__qualname__", "forward")
    forward.__module__ = getattr(own, "__module__", __name__)
    forward.__annotations__ = dict(getattr(own, "__annotations__", {}))
    # Trainers ask which arguments a model takes, and are told what its decorators let them see.
    with suppress(TypeError, ValueError):
        forward.__signature__ = inspect.signature(own)  # type: ignore[attr-defined]
    return forward


@lru_cache(maxsize=4096)
def _accepted(own: Call) -> tuple[inspect.Parameter, ...]:
    """Return the parameters that a forward really takes after `self`: those of its outermost decorator."""
    try:
        if "__signature__" in getattr(own, "__dict__", {}):
            raise ValueError("a signature that was set by hand is a claim")
        parameters = tuple(inspect.signature(own, follow_wrapped=False).parameters.values())
    except (TypeError, ValueError):
        return (
            inspect.Parameter("args", inspect.Parameter.VAR_POSITIONAL),
            inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD),
        )
    return (
        parameters[1:] if parameters[:1] and parameters[0].kind is not inspect.Parameter.VAR_POSITIONAL else parameters
    )


def _takes_any_keyword(own: Call) -> bool:
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in _accepted(own))


def _set_defaults(function: Call, parameters: Sequence[inspect.Parameter]) -> None:
    """Give a generated function the default values of the parameters that it repeats."""
    positional = [p.default for p in parameters if p.default is not p.empty and p.kind is not p.KEYWORD_ONLY]
    keyword = {p.name: p.default for p in parameters if p.default is not p.empty and p.kind is p.KEYWORD_ONLY}
    function.__defaults__ = tuple(positional) or None
    function.__kwdefaults__ = keyword or None
