"""KernelConfig: which kernel a user wants in which layer. The first stage.

A config keeps what the user wrote, word by word. Everything else is derived from it on request: rules for the stages
that follow, a check against a model, a file, and the mapping that the `kernels` library takes. Checking downloads
nothing and imports nothing of a kernel's source.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kernelwise._configuring._config_file import canonical, check_suffix, from_plain, read_file, to_plain, write_file
from kernelwise._configuring._kernels_mapping import kernels_mapping
from kernelwise._data import DEVICE_TYPES, KernelRef, Layer
from kernelwise._discover import device_type, discover, model_device
from kernelwise._errors import KernelConfigError, Problem
from kernelwise._evidence import Tuning
from kernelwise._mapping import DEVICE_HINTS, MISS_HINTS, Key, Rule, parse_mapping, read_keys
from kernelwise._reference import did_you_mean, nearest, show
from kernelwise.sources._repository import all_variants, layer_names

_OPTIONS = {"use_local_kernel": False, "inherit_mapping": True, "on_miss": "raise", "verify": "auto"}


class KernelConfig:
    """Which kernel goes into which layer, on which device, in which mode.

    Args:
        kernel_mapping: a dict from layer name to kernel; every form is in `docs/config.md`. It is kept as it is.
        use_local_kernel: read `"/abs/path:Layer"` as a local path. An absolute path is read so without being told;
            with it a name that is no absolute path is an error.
        inherit_mapping: also offer the kernels that a layer gets by default where the mapping does not name it.
        on_miss: `"raise"` where a kernel that the mapping asks for cannot be had, or `"keep"` the model's own code.
        verify: `"auto"`, or False to put in kernels that were never proven on this machine without checking them first.

    What is wrong with the arguments is said when the config is checked or used, all of it at once.

    >>> config = KernelConfig({"RMSNorm": ("kernels-community/layer_norm:LlamaRMSNorm", {"version": 1})})
    >>> config.rules()[0].ref.location
    'kernels-community/layer_norm'
    """

    def __init__(
        self,
        kernel_mapping: dict[Any, Any] | None = None,
        use_local_kernel: bool = False,
        inherit_mapping: bool = True,
        *,
        on_miss: str = "raise",
        verify: bool | str = "auto",
    ) -> None:
        self.kernel_mapping: Any = {} if kernel_mapping is None else kernel_mapping
        self.use_local_kernel = use_local_kernel
        self.inherit_mapping = inherit_mapping
        self.on_miss = on_miss
        self.verify = verify
        self.file: Path | None = None
        """The file that the config was loaded from."""
        self.evidence: Tuning | None = None
        """What `tune` found that led to this config. It is no part of the config: neither of a file nor of equality."""

    def __eq__(self, other: object) -> bool:
        """Two configs are equal where they ask for the same in the same form, whatever file they come from."""
        if not isinstance(other, KernelConfig):
            return NotImplemented
        ours, theirs = canonical(self.kernel_mapping), canonical(other.kernel_mapping)
        return bool(ours == theirs) and self._options() == other._options()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        if isinstance(self.kernel_mapping, dict):
            keys = list(self.kernel_mapping)
            parts = [show(key) for key in keys[:3]] + ([f"and {len(keys) - 3} more"] if len(keys) > 3 else [])
        else:
            parts = [show(self.kernel_mapping)]
        parts += [f"{name}={show(value)}" for name, value in self._options().items() if value != _OPTIONS[name]]
        return f"KernelConfig({', '.join([*parts, *([f'file={self.file.name!r}'] if self.file else [])])})"

    def rules(self) -> tuple[Rule, ...]:
        """Return what the config asks for as flat rules.

        Raises:
            KernelConfigError: the mapping is not well formed. It lists every problem.
        """
        rules, problems = self._parse()
        if problems:
            raise KernelConfigError(problems)
        return rules

    def sanitize_kernel_mapping(self, model: nn.Module, *, layers: Sequence[Layer] | None = None) -> None:
        """Check the config against a model. Changes neither, and can be called with any number of models.

        The form of every entry is checked, that the model has each layer, and that a local path holds a kernel
        repository with the kernel's layer. A path for a device type that the model is not on need not exist here: one
        file serves a fleet.

        Args:
            layers: what `discover` found in the model, where that is known already.

        Raises:
            KernelConfigError: lists every problem, each with where it stands and how to fix it.
        """
        _check_module(model)
        rules, problems = self._parse()
        if self.kernel_mapping:
            names = {layer.name for layer in (discover(model) if layers is None else layers)}
            problems += _unknown_layers(read_keys(self.kernel_mapping, file=self._file_name()), names, model)
            problems += _missing_repositories(rules, model_device(model))
        if problems:
            raise KernelConfigError(problems)

    def create_compatible_mapping(
        self, model: nn.Module, compile: bool = False, device: str | torch.device | None = None
    ) -> dict[str, dict[str, dict[Any, Any]]]:
        """Return `{layer: {device: {kernels.Mode: repository}}}`, which `kernels.use_kernel_mapping` takes.

        A value without a device gets the model's, a value without a mode the one the model is in (with
        `Mode.TORCH_COMPILE` where `compile`). A layer that keeps its own code has an empty dict for its device, which
        hides what `use_kernel_mapping` would inherit. Builtin kernels, packages and layers that fuse are no
        repositories of that library: they are left out with a warning that names them.

        Args:
            device: the device type, for a model without parameters or one that is on another device yet.

        Raises:
            KernelConfigError: the mapping is not well formed, the device is not known, or a key names a module path:
                that library would put the kernel into the other layers of that name too.
        """
        _check_module(model)
        rules = self.rules()
        home = _device_of(model, device)
        return kernels_mapping(
            rules, home, ("training" if model.training else "inference") + "+compile" * bool(compile)
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the config as dicts, lists and scalars, as a file holds it. `from_dict` reads it.

        Raises:
            KernelConfigError: the mapping is not well formed.
        """
        self.rules()
        changed = {name: value for name, value in self._options().items() if value != _OPTIONS[name]}
        return to_plain(self.kernel_mapping, changed)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> KernelConfig:
        """Build the config from what `to_dict` returned.

        Raises:
            KernelConfigError: the data has another shape, or its mapping is not well formed.
        """
        return cls._from_plain(data, None)

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write the config to a `.toml` or `.json` file. `load` gives an equal config back.

        Raises:
            KernelConfigError: the mapping is not well formed, or the file has another suffix.
            OSError: the file cannot be written.
        """
        check_suffix(Path(file))
        write_file(Path(file), self.to_dict())

    @classmethod
    def load(cls, file: str | os.PathLike[str]) -> KernelConfig:
        """Read a config from a `.toml` or `.json` file. Messages about its rules name the file.

        Raises:
            KernelConfigError: the file cannot be read, or something in it is not well formed.
        """
        return cls._from_plain(read_file(Path(file)), Path(file))

    @classmethod
    def _from_plain(cls, data: object, file: Path | None) -> KernelConfig:
        mapping, options = from_plain(data, options=tuple(_OPTIONS), file=file.name if file else None)
        config = cls(mapping, **options)
        config.file = file
        config.rules()
        return config

    def _parse(self) -> tuple[tuple[Rule, ...], list[Problem]]:
        """Return the rules and everything that is wrong with the form of the config."""
        use_local = self.use_local_kernel is True
        rules, problems = parse_mapping(self.kernel_mapping, use_local_kernel=use_local, file=self._file_name())
        where = self._file_name() or "KernelConfig"
        flags = [name for name in ("use_local_kernel", "inherit_mapping") if not isinstance(getattr(self, name), bool)]
        wrong = [
            Problem(where, f"{name} is {show(getattr(self, name))}, and must be a bool", "write True or False")
            for name in flags
        ]
        if self.on_miss not in ("raise", "keep"):
            guess = did_you_mean(str(self.on_miss), ("raise", "keep"), MISS_HINTS)
            wrong.append(Problem(where, f"on_miss is {show(self.on_miss)}{guess}", 'write "raise" or "keep"'))
        if self.verify is not False and self.verify != "auto":
            wrong.append(Problem(where, f"verify is {show(self.verify)}", 'write "auto" or False'))
        return rules, [*wrong, *problems]

    def _options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _OPTIONS}

    def _file_name(self) -> str | None:
        return self.file.name if self.file else None


def _check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        what = f"is {show(model)}, and must be a torch.nn.Module"
        raise KernelConfigError([Problem("the model", what, "pass the model that the kernels are for")])


def _unknown_layers(keys: Sequence[Key], names: set[str], model: nn.Module) -> list[Problem]:
    """Check that the model has every layer that is named, and something at every path that is to be fused.

    The names in a key that fuses are labels, as they are for transformers, which fuses by the paths.
    """
    problems: list[Problem] = []
    for key in keys:
        if not key.fuses and key.layer not in names:
            what = f"the model has no layer {show(key.layer)}{nearest(key.layer, names)}"
            fix = "use a name that `kernelwise layers` lists, or name the layer's class with register_layer"
            problems.append(Problem(key.where, what, fix))
        for name, pattern in key.fuses:
            paths = [path for path, _ in model.named_modules(remove_duplicate=False)]
            if not any(fnmatchcase(path, pattern) for path in paths):
                what = f"the model has no module at {show(pattern)}, where {show(name)} is to be fused"
                problems.append(
                    Problem(key.where, what + nearest(pattern, paths), "write the path from the model's root")
                )
    return problems


def _missing_repositories(rules: Sequence[Rule], device: str | None) -> list[Problem]:
    """Check that every local path that is for this device, or is there, holds a repository with the layer."""
    problems: list[Problem] = []
    found: dict[KernelRef, tuple[str, str] | None] = {}
    for rule in rules:
        ref = rule.ref
        if ref is None or ref.scheme != "path":
            continue
        if rule.device not in (None, device) and not os.path.lexists(ref.location):
            continue
        if ref not in found:
            found[ref] = _repository_fault(Path(ref.location), ref.layer)
        fault = found[ref]
        if fault is not None:
            problems.append(Problem(rule.where, *fault))
    return problems


def _repository_fault(path: Path, layer: str) -> tuple[str, str] | None:
    where = f"the local path {str(path)!r}"
    try:
        if not path.exists():
            return f"{where} does not exist", "check the path"
        if not path.is_dir():
            return f"{where} is a file, and must be a directory", f"name the directory of the repository: {path.parent}"
        variants = all_variants(path)
    except OSError as error:
        return f"{where} cannot be read: {error.strerror}", "check the path and its permissions"
    if not variants:
        fix = "name a directory that has build/<variant>/metadata.json"
        return f"{where} holds no kernel repository", fix
    known: set[str] = set()
    for variant in variants:
        names = layer_names(variant)
        if names is None or layer in names:
            return None
        known |= names
    return (
        f"the kernel repository {str(path)!r} has no layer {layer!r}{nearest(layer, known)}",
        "use a layer that it has",
    )


def _device_of(model: nn.Module, device: object) -> str:
    """Return the device type that values without one are for. Raises `KernelConfigError` where it cannot be told."""
    if device is None:
        found = model_device(model)
        if found is None or found == "meta":
            why = "is on the meta device" if found else "has no parameters"
            problem = Problem(
                "the model", f"{why}, so its device cannot be told", 'pass device="cuda", or another type'
            )
            raise KernelConfigError([problem])
    elif isinstance(device, str):
        found = device_type(device.partition(":")[0])
    else:
        found = device_type(device) if isinstance(device, torch.device) else show(device)
    if found not in DEVICE_TYPES:
        guess = did_you_mean(found, DEVICE_TYPES, DEVICE_HINTS)
        what = f"the device type {show(found)} is not one that kernels are for{guess}"
        raise KernelConfigError([Problem("the device", what, f"use one of {', '.join(DEVICE_TYPES)}")])
    return found
