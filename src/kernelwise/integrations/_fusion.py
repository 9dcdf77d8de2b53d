"""What transformers alone can do with a kernel config: layers that are fused, or laid out anew, when the model is built.

A kernel with a companion class `<Kernel>Layout` needs other submodules or weights than the model has. transformers builds
the model with the layout class in place; the kernel is then put into it like any other. transformers sees a stand-in that
holds such entries only. Its replacements are global, so they are taken back when the model is built.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import transformers
from torch import nn
from transformers import conversion_mapping, monkey_patching
from transformers.integrations import hub_kernels

from kernelwise._configuring import _config
from kernelwise._data import KernelRef
from kernelwise._errors import ApplyError, KernelConfigError, PlanError, Problem
from kernelwise._mapping import Rule
from kernelwise._reference import read_reference
from kernelwise.sources._repository import all_variants, layer_names

Config = TypeVar("Config", bound=_config.KernelConfig)


class StandIn(transformers.KernelConfig):  # type: ignore[misc]
    """What transformers' `from_pretrained` sees of our config. `set_use_kernels` ignores it."""


@contextmanager
def stand_in(config: _config.KernelConfig) -> Iterator[StandIn]:
    """Yield what transformers must see while it builds a model, and take its global replacements back afterwards.

    Raises:
        KernelConfigError: an entry that changes how the model is built names several kernels, or such entries come from
            the Hub and from local paths both.
        PlanError: there is such an entry, and transformers does not accept the installed kernels library.
    """
    wanted: dict[Any, Rule] = {}
    problems: list[Problem] = []
    for rule in config.rules():
        if rule.ref is None or not (rule.fuses or (rule.path is None and _has_layout(rule.ref))):
            continue
        known = wanted.setdefault(rule.fuses or rule.layer, rule)
        if known.ref != rule.ref:
            what = "names several kernels, and transformers builds the layer before the model has a device"
            problems.append(Problem(rule.where, what, "name one kernel, and make one config for each kind of device"))
    refs = {rule.ref for rule in wanted.values() if rule.ref is not None}
    if len({ref.scheme == "path" for ref in refs}) > 1 or not {ref.scheme for ref in refs} <= {"path", "hub"}:
        where = "; ".join(rule.where for rule in wanted.values())
        what = "transformers fuses kernels of the Hub alone, or of local paths alone"
        problems.append(Problem(where, what, "name the directories of all of them"))
    if problems:
        raise KernelConfigError(problems)
    if wanted and not hub_kernels.is_kernels_available():
        raise PlanError(
            f"layers are fused by transformers, and transformers {transformers.__version__} does not accept the installed "
            "kernels library\n"
            f"  asked by   {'; '.join(rule.where for rule in wanted.values())}\n"
            "  go on      kernelwise doctor names versions that fit together; entries that fuse nothing work as they are"
        )
    shown = StandIn()
    shown.kernel_mapping = {key: _as_transformers_writes(rule.ref) for key, rule in wanted.items() if rule.ref}
    shown.use_local_kernel = any(ref.scheme == "path" for ref in refs)
    if not wanted:
        yield shown
        return
    with _registries_restored():
        yield shown


@contextmanager
def _registries_restored() -> Iterator[None]:
    """Take back which classes and weights transformers replaces everywhere; a second load would replace them twice."""
    patches = monkey_patching.get_patch_mapping()
    conversion_mapping.get_checkpoint_conversion_mapping("")  # fills the cache
    cache: dict[str, Any] = conversion_mapping._checkpoint_conversion_mapping_cache
    conversions, user_registered = dict(cache), set(conversion_mapping.USER_REGISTERED_MAPPINGS)
    try:
        yield
    finally:
        added = [key for key in monkey_patching.get_patch_mapping() if key not in patches]
        monkey_patching.unregister_patch_mapping(added)
        monkey_patching.register_patch_mapping(patches, overwrite=True)
        for key in [key for key, value in cache.items() if conversions.get(key) is not value]:
            del cache[key]
        cache.update(conversions)
        conversion_mapping.USER_REGISTERED_MAPPINGS.intersection_update(user_registered)


def with_fused_layers(model: nn.Module, config: Config) -> Config:
    """Return a config that names the fused layers of a model by their paths, in place of the entries that fused them."""
    layouts = _layouts(model)
    if not layouts:
        return config
    mapping: dict[Any, Any] = {}
    for key, value in config.kernel_mapping.items():
        kernels = {rule.ref.layer for rule in type(config)({key: value}).rules() if rule.ref is not None}
        paths = [f"{kernel}@{path}" for kernel in kernels for path in layouts.get(kernel, {})]
        mapping |= dict.fromkeys(paths or [key], value)
    renamed = copy.copy(config)
    renamed.kernel_mapping = mapping
    return renamed


def check_can_run_without(model: nn.Module) -> None:
    """Check that every layer of a model has code of its own to run.

    Raises:
        ApplyError: some were built for their kernel alone.
    """
    bare = [
        path
        for places in _layouts(model).values()
        for path, layout in places.items()
        if layout.forward.__code__.co_name == "_noop_forward"  # what transformers gives a layout without a forward
    ]
    if bare:
        raise ApplyError(
            f"the kernels cannot be taken out: {', '.join(bare[:3])}{', ...' if len(bare) > 3 else ''} were built for them\n"
            "  go on      load the model again without the entries of the mapping that fuse layers or change their layout"
        )


def trusting(config: Config) -> Config:
    """Return a copy of a config in which every kernel of the Hub is trusted, as `allow_all_kernels=True` asks."""
    trusted = copy.copy(config)
    trusted.kernel_mapping = _trusted(config.kernel_mapping)
    return trusted


def _trusted(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _trusted(item) for key, item in value.items()}
    if isinstance(value, str):
        ref, _ = read_reference(value)
        if ref is None or ref.scheme != "hub":
            return value
        pin = {"version": ref.version} if ref.version is not None else {"revision": ref.revision}
        return f"{ref.location}:{ref.layer}", pin | {"trust_remote_code": True}
    return (value[0], value[1] | {"trust_remote_code": True}) if isinstance(value, tuple) else value


def _as_transformers_writes(ref: KernelRef) -> Any:
    if ref.scheme == "path":
        return f"{ref.location}:{ref.layer}"
    pin = {"version": ref.version} if ref.version is not None else {"revision": ref.revision}
    return f"{ref.location}:{ref.layer}", pin | {"trust_remote_code": ref.trust_remote_code}


def _has_layout(ref: KernelRef) -> bool:
    """Whether a local kernel comes with a layout. Nothing of it is run; a kernel of the Hub is not downloaded for this."""
    if ref.scheme != "path" or not Path(ref.location).is_dir():
        return False
    return any(f"{ref.layer}Layout" in (layer_names(variant) or ()) for variant in all_variants(Path(ref.location)))


def _layouts(model: nn.Module) -> dict[str, dict[str, type[nn.Module]]]:
    """Return the classes of the model's layout modules by kernel name and module path."""
    found: dict[str, dict[str, type[nn.Module]]] = {}
    for path, module in model.named_modules():
        cls = type(module)
        kernel = cls.__name__.removesuffix("Layout")
        if kernel != cls.__name__ and getattr(cls, "kernel_layer_name", None) == kernel:
            found.setdefault(kernel, {})[path] = cls
    return found
