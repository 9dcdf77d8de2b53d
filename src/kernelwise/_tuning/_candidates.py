"""Candidates: a model → kinds of layers, and for each kind the kernels that could go in. The first half of tuning.

Layers alike are tuned once: those with the same code, options and shapes of weights. What is offered to a kind is all that
anybody has for it: the builtin kernels for its operation, those of other backends that are never put in unasked, what
installed packages have, what the config asks for, and what the caller names.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from glob import escape
from typing import Any

from torch import nn

from kernelwise import sources
from kernelwise._alike import function_code, traits_of
from kernelwise._data import Decision, Kernel, KernelRef, Layer
from kernelwise._errors import KernelConfigError, KernelLoadError, Problem
from kernelwise._mapping import Rule
from kernelwise._reference import read_metadata, read_reference, show
from kernelwise._verifying._check import own_code
from kernelwise._verifying._groups import Group, module_of

PACKAGES: dict[str, tuple[str, ...]] = {
    "rms_norm": ("package:liger_kernel.transformers.rms_norm:LigerRMSNorm",),
    "layer_norm": ("package:liger_kernel.transformers.layer_norm:LigerLayerNorm",),
    "gated_mlp": (
        "package:liger_kernel.transformers.swiglu:LigerSwiGLUMLP",
        "package:liger_kernel.transformers.geglu:LigerGEGLUMLP",
    ),
}
"""What packages have for an operation, as layer classes. All of these are written in Triton, so they are for GPUs."""

EVERY = "*"
"""In the place of a layer's name: every layer of a repository."""

Given = Mapping[str, Any] | Sequence[Any]
"""Kernels that a caller names: for every layer that they fit, or by the name of the layer that they are for."""


@dataclass(frozen=True, slots=True)
class Kind:
    """Alike layers in one mode. `layer` is the first of those at `paths`; `traits` say what they have in common.

    `aliases` are all places at which the model has them, as one layer may stand at several.
    """

    layer: Layer
    paths: tuple[str, ...]
    mode: str
    traits: str
    aliases: tuple[str, ...] = ()

    @property
    def op(self) -> str:
        """The operation that the layers compute in this mode, "" where that was not recognised."""
        found = self.layer.computes(self.mode)
        return found.op if found else ""

    @property
    def key(self) -> tuple[str, str, str]:
        """What stands for the kind in tables of this process."""
        return self.layer.path, self.layer.function or "", self.mode

    def group(self, kernel: Kernel | None = None) -> Group:
        """The kind as what capturing, checking and measuring take."""
        return Group(Decision(self.layer, self.mode, kernel, "tune"), self.paths, (self.mode,))


def kinds_of(model: nn.Module, layers: Iterable[Layer], modes: Sequence[str]) -> tuple[Kind, ...]:
    """Group the layers into which a kernel can go, for each mode. Those that are blocked or excluded are left out.

    So are wholes: see `_wholes`.
    """
    found: dict[tuple[Any, ...], list[Layer]] = {}
    for layer in layers:
        there = [mode for mode in modes if not is_whole(layer, mode)]
        if layer.blocked or layer.excluded or not there:
            continue
        module = module_of(model, layer)
        traits = (function_code(own_code(module, layer)),) if layer.function else traits_of(module, None, {})
        for mode in there:
            found.setdefault((*looks(layer, mode), layer.dtypes, mode, repr(traits)), []).append(layer)
    return tuple(kind_of(alike, key[-2], key[-1]) for key, alike in found.items())


def is_whole(layer: Layer, mode: str) -> bool:
    """Whether a layer holds others to which it passes things, or is a head with its loss."""
    computes = layer.computes(mode)
    if layer.function is not None and not layer.function.isidentifier():
        return True
    return computes is not None and computes.holds_layers


def looks(layer: Layer, mode: str) -> tuple[Any, ...]:
    """What layers of one kind have in common, besides their weights and their code."""
    return layer.name, layer.class_name, layer.function, layer.device, layer.computes(mode)


def kind_of(alike: Sequence[Layer], mode: str, traits: str) -> Kind:
    """Make a kind of layers that are alike in a mode."""
    return Kind(
        alike[0],
        tuple(dict.fromkeys(layer.path for layer in alike)),
        mode,
        traits,
        tuple(dict.fromkeys(place for layer in alike for place in layer.places)),
    )


def offered(
    kind: Kind, rules: Sequence[Rule], given: Mapping[str | None, Sequence[KernelRef]]
) -> tuple[KernelRef, ...]:
    """Return every kernel that is offered to a kind of layers, each once: the user's first, then ours, then packages'.

    A builtin kernel for another variant of the operation (the MLP with another activation) is none of these.
    """
    layer = kind.layer
    asked = [
        rule.ref
        for rule in rules
        if rule.ref is not None
        and not rule.fuses
        and rule.layer == layer.name
        and rule.device in (None, layer.device)
        and rule.mode in (None, kind.mode)
        and (rule.path is None or any(fnmatchcase(path, rule.path) for path in kind.aliases or kind.paths))
    ]
    named = [*asked, *given.get(layer.name, ()), *given.get(None, ())]
    ours = [ref for ref in sources.every_builtin_ref(kind.op, layer.name, device=layer.device) if _is_for(kind, ref)]
    return tuple(dict.fromkeys([*named, *ours, *_of_packages(kind.op, layer.device)]))


def _is_for(kind: Kind, ref: KernelRef) -> bool:
    """Whether a builtin kernel is for the options of a kind of layers, as far as it says which it supports."""
    known, found = sources.describe(ref, device=kind.layer.device), kind.layer.computes(kind.mode)
    if known is None or found is None:
        return known is None
    limits = dict(known.limits.options)
    return all(name not in limits or value in limits[name] for name, value in found.options)


def _of_packages(op: str, device: str) -> tuple[KernelRef, ...]:
    if device not in ("cuda", "rocm"):
        return ()
    refs = [read_reference(text)[0] for text in PACKAGES.get(op, ())]
    return tuple(ref for ref in refs if ref is not None and importlib.util.find_spec(ref.location.split(".")[0]))


def read_given(candidates: Given) -> dict[str | None, tuple[KernelRef, ...]]:
    """Read the kernels that a caller names: references or strings, or a dict from layer name to one or several of them.

    A tuple of a string and its metadata, as in a mapping, is one of them too. The key None holds those that are for every
    layer that they fit. `"/path:*"` and `"org/repo@v1:*"` name all layers of a repository: see `spread_out`.

    Raises:
        KernelConfigError: one of them is no reference. It lists all that are not.
    """
    by_name: Mapping[Any, Any] = candidates if isinstance(candidates, Mapping) else {None: candidates}
    problems: list[Problem] = []
    found: dict[str | None, tuple[KernelRef, ...]] = {}
    for name, several in by_name.items():
        refs: list[KernelRef] = []
        for item in [several] if isinstance(several, (str, KernelRef)) or _is_pinned(several) else several:
            ref, faults = (item, []) if isinstance(item, KernelRef) else _read(item)
            problems += [Problem(f"candidates{f' for {name}' if name else ''}", *fault) for fault in faults]
            refs += [ref] if ref is not None else []
        found[name] = tuple(refs)
    if problems:
        raise KernelConfigError(problems)
    return found


def spread_out(
    given: Mapping[str | None, Sequence[KernelRef]], *, device: str, notes: list[str]
) -> dict[str | None, tuple[KernelRef, ...]]:
    """Put all layers of a repository in the place of a reference to every one of them. What cannot be listed is noted."""
    found: dict[str | None, tuple[KernelRef, ...]] = {}
    for name, refs in given.items():
        for ref in refs:
            listed: tuple[KernelRef, ...] = (ref,)
            if ref.layer == EVERY:
                try:
                    listed = sources.refs_in(ref, device=device)
                except KernelLoadError as error:
                    listed = ()
                    notes.append(f"no layer of {ref} was tried: {error.reason}")
            found[name] = found.get(name, ()) + listed
    return found


def _is_pinned(item: object) -> bool:
    return isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str) and isinstance(item[1], dict)


def _read(item: object) -> tuple[KernelRef | None, list[tuple[str, str]]]:
    if isinstance(item, tuple) and _is_pinned(item):
        ref, faults = _read(item[0])
        ref, more = read_metadata(item[1], ref, pinned_by_name="@" in item[0])
        return ref, [*faults, *more]
    if not isinstance(item, str):
        return None, [(f"is {show(item)}, which names no kernel", 'write "org/repo@v1:Layer" or "/path:Layer"')]
    if not item.endswith(f":{EVERY}"):
        return read_reference(item)
    ref, faults = read_reference(item.removesuffix(EVERY) + "Layer")
    if ref is not None and ref.scheme not in ("hub", "path"):
        return None, [(f"is {show(item)}, and only repositories can be tried as a whole", "name a layer")]
    return ref and replace(ref, layer=EVERY), faults


# ---------------------------------------------------------------------------------------------------------- as a mapping


def mapping_of(chosen: Mapping[Kind, str | None], layers: Sequence[Layer], modes: Sequence[str]) -> dict[str, Any]:
    """Write choices as the mapping of a config: a reference for each kind of layers, or None for their own code.

    A name stands alone where every layer of that name gets the same, else each kind has its paths behind it. A value is a
    dict from mode where the modes differ, or where only some of inference and training were chosen for.
    """
    places: dict[str, dict[str, dict[str, str]]] = {}  # name → path → mode → kernel
    for kind, ref in chosen.items():
        for path in kind.paths:
            places.setdefault(kind.layer.name, {}).setdefault(path, {})[kind.mode] = ref or "none"
    mapping: dict[str, Any] = {}
    for name, by_path in places.items():
        named = {layer.path: layer.places for layer in layers if layer.name == name}
        alike: dict[tuple[tuple[str, str], ...], list[str]] = {}
        for path, by_mode in by_path.items():
            alike.setdefault(tuple(sorted(by_mode.items())), []).append(path)
        for by_mode_items, paths in alike.items():
            value = _value(dict(by_mode_items), modes)
            if set(paths) == set(named):
                mapping[name] = value
            else:
                mapping.update({f"{name}@{pattern}": value for pattern in patterns(paths, named)})
    return mapping


def _value(by_mode: Mapping[str, str], modes: Sequence[str]) -> Any:
    every = {"inference", "training"} <= set(by_mode) and set(by_mode) == set(modes)
    if every and len(set(by_mode.values())) == 1:
        return next(iter(by_mode.values()))
    return dict(by_mode)


def patterns(paths: Sequence[str], named: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """Return globs that match exactly these layers among all that are named; no layer is matched by two of them.

    `named` has all places of each layer: a rule is for a layer if it matches one of them.

    >>> patterns(["layers.0.norm", "layers.1.norm"], {path: [path] for path in ("layers.0.norm", "layers.1.norm", "norm")})
    ('layers.*.norm',)
    """
    found, left = [], list(paths)
    for pattern in dict.fromkeys(_without_numbers(path) for path in paths):
        matched = {path for path, places in named.items() if any(fnmatchcase(place, pattern) for place in places)}
        if pattern not in map(escape, paths) and matched <= set(left):
            found.append(pattern)
            left = [path for path in left if path not in matched]
    return (*found, *map(escape, left))


def _without_numbers(path: str) -> str:
    return ".".join("*" if part.isdigit() else escape(part) for part in path.split("."))


def with_trust(mapping: Mapping[str, Any], trusted: Mapping[str, KernelRef]) -> dict[str, Any]:
    """Write out the metadata of the kernels of a mapping that are trusted to run code from the Hub: their strings do not."""
    found: dict[str, Any] = {}
    for key, value in mapping.items():
        ref = trusted.get(value) if isinstance(value, str) else None
        if isinstance(value, dict):
            found[key] = with_trust(value, trusted)
        elif ref is None:
            found[key] = value
        else:
            pin = {"version": ref.version} if ref.version is not None else {"revision": ref.revision}
            found[key] = f"{ref.location}:{ref.layer}", {**pin, "trust_remote_code": True}
    return found
