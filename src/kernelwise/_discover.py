"""Discover: model → layers. Only looks; nothing of the model is called, moved or changed.

A layer has its name from one of three places, in this order: its class is registered (`kernel_layer_name`, with
`kernel_condition`; function kernels in `_kernel_funcs` or `_hidden_kernels`), the user named its class with
`register_layer`, or its graph is recognised. A subclass that overrides `forward` does not inherit a name, because the name
speaks of what the parent's forward computes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from kernelwise import ops
from kernelwise._data import Layer, Parameter, Recognition
from kernelwise._errors import PlanError
from kernelwise._forwards import globals_called, innermost_slot, own_forward, parameters_of, signature, wrapping
from kernelwise._recognize import NOTHING, Entry, Recognizer, recognize_functions
from kernelwise._recognize._losses import LABELS, find_head, joins

STATE = "_kernelwise"
"""The one attribute in which Kernelwise keeps what it knows about a module it changed."""

OURS = (STATE, "__reduce_ex__", "__deepcopy__", "_replicate_for_data_parallel")
"""All that stands in the `__dict__` of a module it changed, besides the forward."""

JOINED = "self.loss_function"
"""What a head with its loss has as `Layer.function`: no global name, but the method that a model calls on its logits."""

_MOST_KINDS = 64  # kinds of one class that a look compares a module with

_class_of: Callable[[nn.Module], Any] = type  # mypy takes a class of modules for unhashable

_named: weakref.WeakKeyDictionary[type, str] = weakref.WeakKeyDictionary()


def register_layer(cls: type[nn.Module], name: str) -> type[nn.Module]:
    """Give every instance of a class a layer name, so that a mapping can refer to it.

    The class itself is not changed. A subclass that overrides `forward` is not covered. Returns the class.

    Raises:
        TypeError: `cls` is not a class of modules, or `name` is not an identifier.
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"register_layer takes a class of torch.nn.Module, got {cls!r}")
    if not (isinstance(name, str) and name.isidentifier()):
        raise TypeError(f"a layer name is a Python identifier, got {name!r}")
    _named[cls] = name
    return cls


def device_type(device: torch.device | str) -> str:
    """Return the device type that mappings use: ROCm is told apart from CUDA."""
    kind = torch.device(device).type if not isinstance(device, str) or ":" in device else device
    return "rocm" if kind == "cuda" and torch.version.hip is not None else kind


def model_device(model: nn.Module) -> str | None:
    """Return the device type of the first parameter or buffer; None for a model that has neither.

    A module that accelerate offloads has its weights on meta between calls; its device is the one it runs on.
    """
    stack, seen = [model], set()
    while stack:  # in the order of `modules()`, at a fraction of the cost
        module = stack.pop()
        for tensors in (module._parameters, module._buffers):
            for tensor in tensors.values():
                if tensor is not None:
                    hook = module.__dict__.get("_hf_hook")
                    runs_on = getattr(hook, "execution_device", None) if tensor.device.type == "meta" else None
                    return _device_name(tensor.device if runs_on is None else torch.device(runs_on))
        seen.add(module)
        stack.extend(child for child in reversed(module._modules.values()) if child is not None and child not in seen)
    return None


def places_of(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Return every module of a model with all of its paths, in the order of `model.modules()`."""
    places: dict[nn.Module, list[str]] = {}
    _add_places(model, "", places, ())
    return places


def _add_places(module: nn.Module, path: str, places: dict[nn.Module, list[str]], above: tuple[nn.Module, ...]) -> None:
    # `named_modules(remove_duplicate=False)` would do, at several times the cost, and does not end on a cycle.
    known = places.get(module)
    if known is None:
        places[module] = [path]
    elif module in above:
        return
    else:
        known.append(path)
    if module._modules:
        above = (*above, module)
        for name, child in module._modules.items():
            if child is not None:
                _add_places(child, f"{path}.{name}" if path else name, places, above)


def discover(model: nn.Module) -> tuple[Layer, ...]:
    """Return every layer of a model that has a name, in the order of its module tree.

    A module that stands in several places is one layer with several `paths`. Functions called by a module's forward
    follow that module.

    Raises:
        PlanError: a lazy layer has no shape yet.
    """
    look = _Look(model_device(model) or "cpu")
    places = places_of(model)
    if any(issubclass(cls, LazyModuleMixin) for cls in set(map(_class_of, places))):
        for module, paths in places.items():
            if isinstance(module, LazyModuleMixin):
                _check_shape(module, paths[0])
    for module, paths in places.items():
        look.add(module, tuple(paths))
    return tuple(look.layers)


def _check_shape(module: Any, path: str) -> None:
    """Refuse a layer such as `LazyLinear` before its first input: what it computes is open until then."""
    if module.has_uninitialized_params():
        place = f"{path} ({type(module).__name__})" if path else f"the model, a {type(module).__name__},"
        raise PlanError(
            f"{place} has no shape yet: a lazy layer takes it from its first input\n"
            "  go on      run one batch first: model(batch)"
        )


@dataclass(frozen=True, slots=True)
class _Class:
    """What all modules of one class have in common, looked up once for a model."""

    name: str
    registered: str | None
    named: str | None
    signature: tuple[Parameter, ...]
    shared: str | None
    condition: Callable[[nn.Module], Any] | None
    functions: tuple[tuple[str, Recognition], ...]
    takes_labels: bool
    kinds: list[_Kind]


def _facts_of(module: nn.Module) -> _Class:
    cls: Any = type(module)
    registered = _inherited(cls, lambda base: base.__dict__.get("kernel_layer_name"))
    try:
        parameters = signature(own_forward(module))
    except AttributeError:  # a scripted module's class has no forward to look at
        parameters = ()
    return _Class(
        name=class_name(module),
        registered=registered,
        named=None if registered else _inherited(cls, _named.get),
        signature=parameters,
        shared=_shared_function(module),
        condition=getattr(cls, "kernel_condition", None),
        functions=recognize_functions(module),
        takes_labels=any(parameter.name == LABELS for parameter in parameters),
        kinds=[],
    )


@dataclass(frozen=True, slots=True)
class _Kind:
    """What a look has found out about a module, and all that another one of its class must share to be alike."""

    inference: Entry
    training: Entry
    layer: Layer | None = None  # without a place; None where the module has no name
    names: tuple[str, ...] = ()
    tensors: _Tensors = (None, ())
    excluded: str | None = None


_Tensors = tuple[str | None, tuple[torch.dtype, ...]]  # the device type and the dtypes of a module's parameters


class _Look:
    """One look over a model. What alike modules have in common is found once: models repeat their layers."""

    def __init__(self, fallback_device: str) -> None:
        self.layers: list[Layer] = []
        self._fallback_device = fallback_device
        self._recognizer = Recognizer()
        self._classes: dict[type[nn.Module], _Class] = {}
        self._known_tensors: dict[nn.Module, _Tensors] = {}
        self._functions: dict[tuple[Any, ...], tuple[Layer, ...]] = {}

    def add(self, module: nn.Module, paths: tuple[str, ...]) -> None:
        """Add the layer that a module is, if it has a name, and the functions that its forward calls."""
        facts = self._classes.get(type(module))
        if facts is None:
            facts = self._classes[type(module)] = _facts_of(module)
        d = module.__dict__
        replaced: str | None = None
        if "forward" in d or STATE in d:
            replaced = _replaced_forward(module)
            layer = self._kind(module, facts, replaced).layer
        else:
            layer = self._alike(module, facts)
        if layer is not None:
            self.layers.append(layer.at(paths, _numel(module)))
        if facts.functions or "_kernel_funcs" in d or "_hidden_kernels" in d:
            self._add_functions(module, facts, paths, replaced)
        if facts.takes_labels:
            self._add_head(module, facts, paths, replaced)

    def _alike(self, module: nn.Module, facts: _Class) -> Layer | None:
        """Return what is known of a module of this class that is like this one, or find it out."""
        for kind in facts.kinds:
            inference, training, layer = kind.inference, kind.training, kind.layer
            if inference.holds(module) and (training is inference or training.holds(module)):
                if layer is None:
                    return None
                d = module.__dict__  # on which nothing of ours stands
                if (
                    kind.names == (*d, *d["_parameters"], *(d["_buffers"] or ()), *(d["_modules"] or ()))
                    and kind.tensors == self._tensors(module)
                    and (facts.condition is None or kind.excluded == _condition(module))
                ):
                    return layer
        kind = self._kind(module, facts, None)
        facts.kinds.insert(0, kind)
        del facts.kinds[_MOST_KINDS:]
        return kind.layer

    def _kind(self, module: nn.Module, facts: _Class, replaced: str | None) -> _Kind:
        inference, training = self._recognizer.both(module) if replaced is None else (NOTHING, NOTHING)
        found = inference.recognition or training.recognition
        name = facts.registered or facts.named or (ops.layer_name(found) if found else None)
        if name is None:
            return _Kind(inference, training)
        device, dtypes = tensors = self._tensors(module)
        excluded = _condition(module) if facts.condition is not None else None
        layer = Layer(
            path="",
            name=name,
            class_name=facts.name,
            how="registered" if facts.registered else "named" if facts.named else "recognised",
            device=device or self._fallback_device,
            dtypes=_names_of(dtypes),
            signature=facts.signature,
            attributes=_attributes(module),
            recognition=inference.recognition,
            recognition_in_training=training.recognition,
            blocked=replaced or facts.shared,
            excluded=excluded,
        )
        return _Kind(inference, training, layer, _names(module), tensors, excluded)

    def _tensors(self, module: nn.Module) -> _Tensors:
        """Return the device type of a module and the dtypes of its parameters, its children's included."""
        d = module.__dict__
        device: str | None = None
        dtypes: tuple[torch.dtype, ...] = ()
        for parameter in d["_parameters"].values():
            if parameter is not None:
                dtype = parameter.dtype
                if device is None:
                    device, dtypes = _device_name(parameter.device), (dtype,)
                elif dtype not in dtypes:
                    dtypes += (dtype,)
        if not d["_modules"]:
            return (model_device(module) if device is None or device == "meta" else device), dtypes
        known = self._known_tensors.get(module)
        if known is None:
            for child in d["_modules"].values():
                if child is not None:
                    its_device, its_dtypes = self._tensors(child)
                    device = device or its_device
                    if its_dtypes != dtypes:
                        dtypes = tuple(dict.fromkeys(dtypes + its_dtypes))
            if device is None or device == "meta":
                device = model_device(module)
            known = self._known_tensors[module] = device, dtypes
        return known

    def _add_functions(self, module: nn.Module, facts: _Class, paths: tuple[str, ...], replaced: str | None) -> None:
        wrappers = _wrappers(module)
        device, dtypes = self._tensors(module)
        each = tuple((type(wrapper), _names(wrapper), _condition(wrapper)) for wrapper in wrappers)
        key = (type(module), each, device, dtypes, replaced)
        functions = self._functions.get(key)
        if functions is None:
            functions = _functions_of(
                module, facts, wrappers, device or self._fallback_device, _names_of(dtypes), replaced
            )
            self._functions[key] = functions
        for layer in functions:
            self.layers.append(layer.at(tuple(f"{path}.{layer.name}" if path else layer.name for path in paths)))

    def _add_head(self, module: nn.Module, facts: _Class, paths: tuple[str, ...], replaced: str | None) -> None:
        """Add the head of a model with its loss, where it has one and the loss is known."""
        found = find_head(module)
        if found is None:
            return
        name, problem = found
        head = module._modules[name]
        assert head is not None
        blocked = replaced or problem or _replaced_forward(head)
        device, dtypes = self._tensors(head)
        recognition = joins(head, name)
        its_name = ops.layer_name(recognition)
        self.layers.append(
            Layer(
                path="",
                name=its_name,
                class_name=facts.name,
                how="recognised",
                device=device or self._fallback_device,
                dtypes=_names_of(dtypes),
                signature=facts.signature,
                function=JOINED,
                recognition=recognition,
                recognition_in_training=recognition,
                blocked=blocked,
            ).at(tuple(f"{path}.{its_name}" if path else its_name for path in paths), _numel(head))
        )


def _wrappers(module: nn.Module) -> tuple[nn.Module, ...]:
    """Return the registered functions that the kernels library has hung on a module, each once."""
    found: dict[int, nn.Module] = {}
    for attribute in ("_kernel_funcs", "_hidden_kernels"):
        for wrapper in (module.__dict__.get(attribute) or {}).values():
            if isinstance(wrapper, nn.Module) and hasattr(type(wrapper), "kernel_layer_name"):
                found[id(wrapper)] = wrapper
    return tuple(found.values())


def _functions_of(
    module: nn.Module,
    facts: _Class,
    wrappers: Iterable[nn.Module],
    device: str,
    dtypes: tuple[str, ...],
    replaced: str | None,
) -> tuple[Layer, ...]:
    """Return the functions that a module's forward calls, as layers without a place.

    The registered wrappers come first, then what was recognised.
    """
    recognised = dict(facts.functions) if replaced is None else {}
    own = own_forward(module)
    called = globals_called(own)
    copyable = wrapping(own)
    uncopyable = copyable if isinstance(copyable, str) else None
    entries: dict[str, tuple[str, Recognition | None, str | None, Any]] = {}
    for wrapper in wrappers:
        wrapper_class: Any = type(wrapper)
        name = str(wrapper_class.kernel_layer_name)
        # By class, of which each function has its own: a deep copy of a model holds copies of the wrappers.
        name_in_forward = next((key for key, value in called.items() if type(value) is wrapper_class), None)
        blocked = replaced
        if name_in_forward is None:
            blocked = blocked or (
                f"the forward of {type(module).__name__} does not call it by a global name, so it cannot be changed for "
                "this model alone"
            )
        blocked = blocked or uncopyable
        key = name_in_forward if name_in_forward is not None else f"?{name}"
        entries[key] = (name, recognised.pop(name_in_forward or "", None), blocked, wrapper)
    for key, found in recognised.items():
        entries[key] = (ops.layer_name(found), found, uncopyable, called.get(key))
    return tuple(
        Layer(
            path="",
            name=name,
            class_name=facts.name,
            how="registered" if isinstance(value, nn.Module) else "recognised",
            device=device,
            dtypes=dtypes,
            signature=_function_signature(value),
            attributes=_attributes(value) if isinstance(value, nn.Module) else frozenset(),
            function=key,
            recognition=recognition,
            recognition_in_training=recognition,
            blocked=blocked,
            excluded=_condition(value) if isinstance(value, nn.Module) else None,
        )
        for key, (name, recognition, blocked, value) in entries.items()
    )


def _inherited(cls: type, lookup: Callable[[type], Any]) -> str | None:
    """Return the name that `lookup` finds along the MRO, unless a class before it overrides `forward`."""
    for base in cls.__mro__:
        name = lookup(base)
        if name:
            return str(name)
        if "forward" in base.__dict__:
            return None
    return None


def _condition(module: nn.Module) -> str | None:
    condition = getattr(type(module), "kernel_condition", None)
    if condition is None:
        return None
    try:
        return None if condition(module) else f"the kernel_condition of {type(module).__name__} says no"
    except Exception as error:
        return f"the kernel_condition of {type(module).__name__} failed: {error!r}"


def _shared_function(module: nn.Module) -> str | None:
    """A decorated function that a module holds as a submodule is one object for every model that holds it."""
    if type(module).__qualname__.endswith("_create_func_module.<locals>.Func"):
        return "it is one object shared by every model that holds this function, so it cannot be changed for one model alone"
    return None


def _replaced_forward(module: nn.Module) -> str | None:
    """Say who replaced the forward of this instance, if somebody other than Kernelwise or accelerate's hooks did."""
    state = module.__dict__.get(STATE)
    current = module.__dict__.get(innermost_slot(module))
    if state is not None and state.installed:
        current = state.found  # ours stands there, or inside a wrapper that somebody put around it
    if current is None:
        return None
    if isinstance(current, MethodType) and current.__self__ is module and current.__func__ is own_forward(module):
        return None
    who = getattr(current, "__qualname__", None) or repr(current)
    return f"its forward was replaced on this instance by {who}"


def _function_signature(value: Any) -> tuple[Parameter, ...]:
    if isinstance(value, nn.Module):
        return signature(type(value).forward)
    return parameters_of(value) if callable(value) else ()


def _numel(module: nn.Module) -> int:
    """Return how many numbers a module's own parameters hold."""
    found = 0
    for parameter in module.__dict__["_parameters"].values():
        if parameter is not None:
            found += parameter.numel()
    return found


def _names(module: nn.Module) -> tuple[str, ...]:
    """Return the names of what stands on a module itself, and nothing of ours."""
    d = module.__dict__
    names = (*d, *d["_parameters"], *d["_buffers"], *d["_modules"])
    return tuple(name for name in names if name not in OURS) if STATE in d else names


def _attributes(module: nn.Module) -> frozenset[str]:
    return frozenset(dir(type(module))).union(_names(module))


@lru_cache(maxsize=64)
def _device_name(device: torch.device) -> str:
    return device_type(device)


@lru_cache(maxsize=64)
def _names_of(dtypes: tuple[torch.dtype, ...]) -> tuple[str, ...]:
    return tuple(str(dtype).removeprefix("torch.") for dtype in dtypes)


def class_name(module: nn.Module) -> str:
    """Return the full name of a module's class, as `Layer.class_name` has it."""
    return _class_name(_class_of(module))


@lru_cache(maxsize=4096)
def _class_name(cls: Any) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
