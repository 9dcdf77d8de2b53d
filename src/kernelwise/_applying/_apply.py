"""Apply: plan → model. With `_state` beside it, the only module that changes a model.

Every call is bound before the first module changes; an error halfway unwinds what was done. What changes is one entry of an
instance's `__dict__`: its innermost forward, which becomes a dispatcher that runs what the module's state (`_kernelwise`)
holds for its mode. Two more entries, `__reduce_ex__` and `__deepcopy__`, keep files free of us and copies kernelized.
Parameters, buffers, hooks, the class and the `state_dict` stay as they are.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from types import MethodType
from typing import Any

from torch import nn

from kernelwise._applying._bind import Call, dispatcher, function_call, layer_call
from kernelwise._applying._fuse import passing_of
from kernelwise._applying._join import around
from kernelwise._applying._state import SLOTS, Entry, ModuleState, Token, entries_of, rebuilt_around, state_of
from kernelwise._data import Decision, Layer, Plan
from kernelwise._discover import JOINED, OURS, STATE, class_name, model_device, places_of
from kernelwise._errors import ApplyError
from kernelwise._forwards import globals_called, innermost_slot, is_dispatcher, own_forward
from kernelwise._recognize._losses import LABELS

_lock = threading.RLock()

# What `eval()` and `train()` run, the modes that a rule asked for, a function's counts.
_Bound = tuple[Call | None, Call | None, frozenset[str], Counter[str] | None]


def apply(model: nn.Module, plan: Plan) -> Token:
    """Put every kernel of a plan into the model and return the token that undoes it.

    Raises:
        ApplyError: the model is on the meta device, a path of the plan is not in the model, or a kernel cannot be bound. The
            model is as it was.
    """
    token = Token()
    with _lock:
        prepared = _prepare(model, plan, token)
        try:
            for module, entry in prepared:
                _put_in(module, entry)
        except BaseException:
            for module, _ in prepared:
                _take_out(module, lambda entry: entry.token is token)
            raise
        state_of(model).plans[token] = plan
    return token


def _prepare(model: nn.Module, plan: Plan, token: Token) -> list[tuple[nn.Module, Entry]]:
    """Bind every call that the plan needs. Layers that no kernelization has a kernel for are left out."""
    by_layer: dict[str | tuple[str, str], tuple[Decision, ...]] = {}
    for decision in plan.decisions:
        layer = decision.layer
        place = layer.path if layer.function is None else (layer.path, layer.function)
        by_layer[place] = (*by_layer[place], decision) if place in by_layer else (decision,)
    bound: dict[tuple[Any, ...], _Bound] = {}  # alike layers share their calls
    found = {"": model}
    prepared: list[tuple[nn.Module, Entry]] = []
    for decisions in by_layer.values():
        layer = decisions[0].layer
        has_kernel = is_asked = False
        for decision in decisions:
            has_kernel = has_kernel or decision.kernel is not None
            is_asked = is_asked or decision.asked_by != "default"
        if not has_kernel and not is_asked:
            continue
        module = _find(layer, found)
        if not has_kernel and STATE not in module.__dict__:
            continue
        key = _what_binds(module, layer, decisions)
        calls = bound.get(key)
        if calls is None:
            calls = bound[key] = _bind(module, layer, decisions)
        inference, training, asked, fallbacks = calls
        prepared.append((module, Entry(token, layer, decisions, inference, training, asked, fallbacks)))
    return prepared


def _what_binds(module: nn.Module, layer: Layer, decisions: Sequence[Decision]) -> tuple[Any, ...]:
    """Everything that the calls of a layer depend on; what `discover` shares between layers stands by its identity."""
    held = module.__dict__
    first = decisions[0]
    return (
        id(own_forward(module)),
        id(layer.signature),
        id(layer.recognition),
        id(layer.recognition_in_training),
        layer.function,
        tuple(held["_parameters"]),
        tuple(held["_modules"]),
        id(first.kernel),
        first.mode,
        first.asked_by,
        None if len(decisions) == 1 else tuple([(id(d.kernel), d.mode, d.asked_by) for d in decisions[1:]]),
    )


def _bind(module: nn.Module, layer: Layer, decisions: Sequence[Decision]) -> _Bound:
    """Bind the kernels of one layer."""
    calls: dict[str, Call | None] = {}
    fallbacks: Counter[str] | None = Counter() if layer.function is not None else None
    for decision in decisions:
        calls[decision.mode] = None
        if decision.kernel is not None and layer.function == JOINED and fallbacks is not None:
            calls[decision.mode] = _joined(layer, decision, fallbacks)
        elif decision.kernel is not None and layer.function is not None and fallbacks is not None:
            original = globals_called(own_forward(module))[layer.function]
            call = function_call(layer, decision.kernel, decision.mode, original, fallbacks)
            rebuilt_around(module, {layer.function: call})  # what cannot be is known before any change
            calls[decision.mode] = call
        elif decision.kernel is not None:
            parameters = tuple(name for name in decision.kernel.reads if name in module._parameters)
            calls[decision.mode] = layer_call(
                layer,
                decision.kernel,
                decision.mode,
                own_forward(module),
                parameters,
                tuple(name for name, child in module._modules.items() if child is not None),
                passing_of(module, layer, decision.kernel, decision.mode),
            )
    asked = _modes(len(decisions) == 1, *(d.mode for d in decisions if d.asked_by != "default"))
    return *_in_both_modes(layer, calls), asked, fallbacks


def _joined(layer: Layer, decision: Decision, fallbacks: Counter[str]) -> Call:
    """Return what makes, of the forward of a model, one in which its head and its loss are joined by a kernel."""
    kernel, found = decision.kernel, layer.computes(decision.mode)
    if kernel is None or kernel.function is None or found is None or kernel.op != found.op:
        raise ApplyError(
            f"{kernel.ref if kernel else layer.path} is described, or for something else\n"
            "  go on      plan on the machine that the model is on"
        )
    position = next(at for at, parameter in enumerate(layer.signature) if parameter.name == LABELS)
    return partial(
        around,
        head=_head_of(layer),
        labels=LABELS,
        position=position,
        loss=kernel.function,
        limits=kernel.limits,
        fallbacks=fallbacks,
    )


def _head_of(layer: Layer) -> str:
    """Return the name of the child that is the head of a model with its loss."""
    found = layer.recognition
    assert found is not None
    return str(dict(found.roles)["weight"].value).rpartition(".")[0]


@lru_cache(maxsize=64)
def _modes(is_fixed: bool, *named: str) -> frozenset[str]:
    """Return which of `eval()` and `train()` some modes are about; a single fixed mode is about both."""
    return frozenset(
        m for m in ("inference", "training") if named and (is_fixed or any(n.startswith(m) for n in named))
    )


def _in_both_modes(layer: Layer, calls: dict[str, Call | None]) -> tuple[Call | None, Call | None]:
    """Return what runs in `eval()` and in `train()`: one fixed mode serves both, where the layer computes the same in both."""
    if len(calls) > 1:
        return calls["inference"], calls["training"]
    ((mode, call),) = calls.items()
    other = call if layer.recognition == layer.recognition_in_training else None
    return (other, call) if mode.startswith("training") else (call, other)


def _find(layer: Layer, found: dict[str, nn.Module]) -> nn.Module:
    """Return the module of a layer. `found` has the modules found before by their paths, the model itself by ""."""
    path = layer.path.rpartition(".")[0] if layer.function is not None else layer.path
    above, _, name = path.rpartition(".")
    try:
        module = _module_at(above, found)._modules[name] if name else found[""]
        if module is None:
            raise KeyError(path)
    except KeyError as error:
        raise ApplyError(
            f"the plan has a layer at {layer.path}, which this model does not have\n  go on      plan again for this model"
        ) from error
    its_class = class_name(module)
    if its_class != layer.class_name:
        raise ApplyError(
            f"the plan has a {layer.class_name} at {layer.path}, where this model has a {its_class}\n"
            "  go on      plan again for this model"
        )
    own = next(iter(module._parameters.values()), None)
    if (own is None or own.is_meta) and model_device(module) == "meta":
        raise ApplyError(
            f"{layer.path} is on the meta device: it can be planned, but kernels are put into a model that has its weights\n"
            "  go on      load the weights first (from_pretrained, or to_empty and load_state_dict), then kernelize"
        )
    return module


def _module_at(path: str, found: dict[str, nn.Module]) -> nn.Module:
    module = found.get(path)
    if module is None:
        above, _, name = path.rpartition(".")
        module = _module_at(above, found)._modules[name]
        if module is None:
            raise KeyError(path)
        found[path] = module
    return module


def _put_in(module: nn.Module, entry: Entry) -> None:
    state, layer = state_of(module), entry.layer
    state.entries.append(entry)
    found = layer.recognition or layer.recognition_in_training
    if found is not None and found.depends and layer.function is None:
        state.pins.update({name: module._modules.get(name, module.__dict__.get(name)) for name in found.depends})
    _install(module, state)
    if layer.function == JOINED:
        head = module._modules[_head_of(entry.layer)]
        assert head is not None
        of_head = state_of(head)
        of_head.joined = (*of_head.joined, entry.token)
        _install(head, of_head)


def _install(module: nn.Module, state: ModuleState) -> None:
    """Have a module run what its state chooses."""
    if not state.installed:
        held, slot = module.__dict__, innermost_slot(module)
        state.found = held.get(slot)
        state.refresh(module)
        held[slot] = MethodType(dispatcher(own_forward(module)), module)
        state.installed = True
    else:
        state.refresh(module)


def _take_out(module: nn.Module, gone: Callable[[Entry], bool]) -> int:
    """Remove entries from a module and return how many; restore the module when nothing of ours is left on it."""
    state: ModuleState | None = module.__dict__.get(STATE)
    if state is None:
        return 0
    kept = [entry for entry in state.entries if not gone(entry)]
    taken = [entry for entry in state.entries if entry not in kept]
    state.entries = kept
    state.refresh(module)
    if not state.entries:
        _restore(module, state)
    for entry in taken:
        if entry.layer.function == JOINED:
            _part(module._modules.get(_head_of(entry.layer)), entry.token)
    return len(taken)


def _part(head: nn.Module | None, token: Token | None) -> None:
    """Take a head apart from the loss of its model, for one kernelization or (None) for all."""
    state: ModuleState | None = None if head is None else head.__dict__.get(STATE)
    if head is not None and state is not None and state.joined:
        state.joined = tuple(other for other in state.joined if token is not None and other is not token)
        state.refresh(head)
        if not state.entries:
            _restore(head, state)


def _restore(module: nn.Module, state: ModuleState) -> None:
    """Put back the forward that was found. Where somebody wrapped our dispatcher, it stays inside as a pass-through."""
    if state.joined:
        return
    slot = next((name for name in SLOTS if is_dispatcher(module.__dict__.get(name))), None)
    if slot is not None:
        if state.found is not None:
            module.__dict__[slot] = state.found
        elif slot == "forward":
            del module.__dict__["forward"]
        else:  # accelerate put its hook around ours and calls what it keeps here
            module.__dict__[slot] = MethodType(own_forward(module), module)
        state.installed = False
    elif state.installed and "forward" not in module.__dict__:
        state.installed = False  # somebody took our dispatcher away
    if not state.installed and not state.plans:
        for name in OURS:
            module.__dict__.pop(name, None)
        module.__dict__.update(state.attributes)


def set_attribute(module: nn.Module, name: str, value: Any) -> None:
    """Change a plain attribute that a module has, until nothing of ours is left on it; a file holds what stood there."""
    with _lock:
        state_of(module).attributes.setdefault(name, module.__dict__[name])
        module.__dict__[name] = value


def remove(model: nn.Module, *, token: Token | None = None, paths: Sequence[str] | None = None) -> int:
    """Undo kernelizations and return how many layers got their own code back.

    Args:
        model: the model, or a part of it.
        token: undo only this kernelization.
        paths: undo only the layers at these paths, or below them.
    """

    with _lock:
        places = places_of(model) if paths is not None else {}

        def gone(module: nn.Module, entry: Entry) -> bool:
            if token is not None and entry.token is not token:
                return False
            return paths is None or is_below(layer_paths(places[module], entry.layer), paths)

        modules = list(model.modules())
        count = sum(_take_out(module, partial(gone, module)) for module in modules)
        if token is None and paths is None:
            for module in modules:
                _part(module, None)  # also the head of a model of which this is a part
        for module in modules:
            state: ModuleState | None = module.__dict__.get(STATE)
            if state is not None and state.plans:
                kept = {entry.token for _, entry in entries_of(module)}
                state.plans = {token: plan for token, plan in state.plans.items() if token in kept}
                if not state.entries:
                    _restore(module, state)
    return count


def is_below(places: Sequence[str], paths: Sequence[str]) -> bool:
    """Return whether one of a layer's places is one of these paths, or below it. The empty path is the model itself."""
    return any(path in ("", place) or place.startswith(path + ".") for place in places for path in paths)


def layer_paths(places: Sequence[str], layer: Layer) -> tuple[str, ...]:
    """Return the paths of a layer whose module has these places: its own may be those in a part of the model."""
    if layer.function is None:
        return tuple(places)
    return tuple(f"{place}.{layer.name}" if place else layer.name for place in places)


def kernelized_paths(model: nn.Module) -> list[str]:
    """Return the paths in this model of every layer that a kernelization speaks of."""
    places = places_of(model)
    return [path for module, entry in entries_of(model) for path in layer_paths(places[module], entry.layer)]


def decided(model: nn.Module) -> tuple[list[tuple[Decision, Mapping[str, int], bool]], list[str]]:
    """Return what was decided about a model, and the notes of its plans, oldest first.

    Each decision comes with its counts of calls that fell back, and whether it is what runs. Of several about one layer
    and mode the one that runs is given, else the newest. Paths are those in this model, also where a part was kernelized.
    """
    places = places_of(model)
    found: dict[tuple[str, str | None, str], tuple[Decision, Mapping[str, int], bool]] = {}
    notes: list[str] = []
    for module, paths in places.items():
        state: ModuleState | None = module.__dict__.get(STATE)
        for plan in state.plans.values() if state is not None else ():
            notes += plan.notes
            for decision in plan.decisions:
                layer = decision.layer
                path = ".".join(filter(None, (paths[0], layer.path)))
                moved = replace(decision, layer=replace(layer, path=path)) if paths[0] else decision
                key = path, layer.function, decision.mode
                if key not in found or decision.asked_by != "default":
                    found[key] = moved, {}, False
    for module, entry in entries_of(model):
        state = module.__dict__[STATE]
        at = layer_paths(places[module], entry.layer)
        layer = replace(entry.layer, path=at[0], paths=at)
        for mode in ("inference", "training"):
            if state.chosen(layer.function, mode) is entry:
                counts = state.fallbacks if entry.fallbacks is None else entry.fallbacks
                for decision in entry.decisions:
                    if len(entry.decisions) == 1 or decision.mode.startswith(mode):
                        found[at[0], layer.function, decision.mode] = replace(decision, layer=layer), counts, True
    return list(found.values()), notes
