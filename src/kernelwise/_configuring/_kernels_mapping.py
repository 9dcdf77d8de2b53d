"""Rules → the mapping that the `kernels` library takes. Part of the config stage.

That library chooses a kernel by layer name, device type and mode, and knows repositories of the Hub and local ones.
What a rule says beyond that is refused where leaving it out would change what happens to other layers, and left out
with a warning where it would not.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kernelwise._data import KernelRef
from kernelwise._errors import KernelConfigError, Problem
from kernelwise._mapping import Rule


def kernels_mapping(rules: Sequence[Rule], home: str, mode: str) -> dict[str, dict[str, dict[Any, Any]]]:
    """Return `{layer: {device: {kernels.Mode: repository}}}`. Imports `kernels`; downloads nothing.

    Args:
        home: the device type for rules that name none.
        mode: the mode of `MODES` for rules that name none, and the one in which the mapping will be used.

    Raises:
        KernelConfigError: a rule names a module path: the library would put its kernel into every layer of that name.
    """
    from kernels import Mode

    scoped = [rule for rule in rules if rule.path is not None]
    if scoped:
        what = "names a module path, which a mapping of the kernels library cannot express"
        fix = "use kernelwise.kernelize(model, config), or a key without '@'"
        raise KernelConfigError([Problem(rule.where, what, fix) for rule in scoped])

    modes = {
        "inference": Mode.INFERENCE,
        "training": Mode.TRAINING,
        "inference+compile": Mode.INFERENCE | Mode.TORCH_COMPILE,
        "training+compile": Mode.TRAINING | Mode.TORCH_COMPILE,
    }
    mapping: dict[str, dict[str, dict[Any, Any]]] = {}
    left_out: list[Rule] = []
    silent: dict[
        tuple[str, str], bool
    ] = {}  # where the library must put nothing in this mode; True: say so in the mapping
    for rule in rules:
        device = rule.device or home
        now = rule.mode in (None, mode)
        if rule.ref is not None and (rule.fuses or rule.ref.scheme in ("builtin", "package")):
            left_out.append(rule)
            if now and not rule.fuses:
                silent[rule.layer, device] = False
        elif rule.ref is None:
            if now and not rule.fuses:
                silent[rule.layer, device] = True
        else:
            mapping.setdefault(rule.layer, {}).setdefault(device, {})[modes[rule.mode or mode]] = _repository(rule.ref)
    for (layer, device), say_so in silent.items():
        # Another mode's kernel would stand in for this mode: the library falls back from one mode to another.
        mapping.setdefault(layer, {}).pop(device, None)
        if say_so:
            mapping[layer][device] = {}
        if not mapping[layer]:
            del mapping[layer]
    if left_out:
        places = "; ".join(f"{rule.where}: {rule.ref}" for rule in left_out)
        message = f"left out, because the kernels library has no repository for it: {places}"
        warnings.warn(message + "; kernelwise.kernelize(model, config) puts it in", stacklevel=3)
    return mapping


def _repository(ref: KernelRef) -> Any:
    """Return the reference as an object of the `kernels` library. Nothing is downloaded before it is loaded."""
    from kernels import LayerRepository, LocalLayerRepository

    if ref.scheme == "hub":
        pin = {"version": ref.version} if ref.version is not None else {"revision": ref.revision}
        trust = ref.trust_remote_code
        return LayerRepository(ref.location, layer_name=ref.layer, trust_remote_code=trust, **pin)
    path = Path(ref.location)
    takes_package = "package_name" in inspect.signature(LocalLayerRepository).parameters
    package = {"package_name": path.name} if takes_package else {}
    return LocalLayerRepository(repo_path=path, layer_name=ref.layer, **package)
