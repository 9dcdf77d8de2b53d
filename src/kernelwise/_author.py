"""For authors of kernels: one kernel → every kind of layer that it could serve, checked.

No model is named: layers are looked for in small models with random weights, of the architectures that between them have
the variants that share a name (where a norm rounds, whether it adds 1 to its weight).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from kernelwise import sources
from kernelwise._configuring._config import KernelConfig
from kernelwise._data import Check, Checks, Decision, Kernel, KernelRef, Layer, Plan
from kernelwise._decide import current_target, plan_safely
from kernelwise._discover import device_type, discover
from kernelwise._errors import KernelwiseError
from kernelwise._models import load_model
from kernelwise._plan import reasons_against
from kernelwise._reporting._progress import progress_of
from kernelwise._verifying._check import Options
from kernelwise._verifying._groups import Group, group
from kernelwise._verifying._prove import ImportFailedError, Prover, remember
from kernelwise._verifying._verify import check_group, verify_plan

MODELS: tuple[str, ...] = ("llama", "gemma2", "gpt_oss", "olmo2", "phi3", "gpt_neox")
ISOLATED = Options(isolate=True)


def read_reference(text: str, *, trust_remote_code: bool = False) -> KernelRef:
    """Turn `DIR:Layer`, `org/repo@v1:Layer`, `package:module:Layer` or `builtin:Layer` into a reference.

    Raises:
        KernelConfigError: it is none of these.
    """
    location, colon, layer = text.rpartition(":")
    place = Path(location).expanduser()
    if colon and place.is_dir():
        text = f"{place.resolve()}:{layer}"
    elif colon and location.startswith((".", "~")):
        raise KernelwiseError(f"there is no directory {place.resolve()}\n  go on      give the one that holds build/")
    ref = KernelConfig({"Kernel": text}).rules()[0].ref
    if ref is None:
        raise KernelwiseError(f"{text!r} names no kernel\n  go on      write DIR:Layer or org/repo@v1:Layer")
    return replace(ref, trust_remote_code=True) if trust_remote_code and ref.scheme == "hub" else ref


def layers_for(
    kernel: Kernel, models: Sequence[str] = MODELS, *, dtype: str | None = None, device: str = "cpu"
) -> Iterator[tuple[nn.Module, Layer]]:
    """Yield each kind of layer in some models that a kernel could serve, with its model.

    A kernel that reads nothing from the layer would fit any forward with as many arguments: it serves those of its name.
    """
    seen: set[tuple[object, ...]] = set()
    for name in models:
        model = _on_device(load_model(name, dtype=dtype).model, device)
        for layer in discover(model):
            layer = replace(layer, device=device)  # a model on the meta device gets its weights there
            kind = (layer.class_name, layer.function, layer.recognition, layer.name)
            if kind in seen or not (kernel.op or kernel.reads or layer.name == kernel.ref.layer):
                continue
            if not reasons_against(layer, kernel, current_target(layer.device), "inference"):
                seen.add(kind)
                yield model, layer


def verify_kernel(
    ref: KernelRef,
    *,
    models: Sequence[str] = MODELS,
    dtype: str | None = None,
    device: str = "cpu",
    options: Options = ISOLATED,
    on_check: Callable[[Check], None] = lambda check: None,
) -> Checks:
    """Check a kernel on every kind of layer that it could serve. What is proven counts for `kernelize`.

    Raises:
        KernelLoadError: it cannot be loaded. KernelwiseError: no layer of these models fits it, or there is no such device.
    """
    _check_device(device)
    target, checks = current_target(device), []
    with Prover(seconds=options.seconds, memory=options.memory) as prover:
        try:
            kernel = sources.load(ref, device=device, before_import=partial(prover.before_import, device))
        except ImportFailedError as error:
            return Checks(target, (error.check,))
        worker = prover.worker(kernel, device)
        for model, layer in layers_for(kernel, models, dtype=dtype, device=device):
            both = tuple(Decision(layer, mode, kernel, "author") for mode in ("inference", "training"))
            found = Group(both[0], (layer.path,), ("inference", "training"))
            about: list[Check] = []
            for check in check_group(model, found, None, options, worker):
                about.append(check)
                place = f"{layer.class_name}: {layer.path}"
                checks.append(replace(check, layer=place, paths=(place,)))
                on_check(checks[-1])
            remember(model, Plan(target, both), about)
    if not checks:
        reads = ", ".join(f"self.{name}" for name in kernel.reads) or "nothing of the layer"
        raise KernelwiseError(
            f"no layer of {', '.join(models)} fits {ref}\n  tried      a forward with its arguments, on a layer that has what "
            f"it reads ({reads})\n  go on      name a model that has such a layer: kernelwise verify MODEL --kernel {ref}"
        )
    return Checks(target, tuple(checks))


def _check_device(device: str) -> None:
    found = torch.accelerator.current_accelerator(check_available=True)
    here = ["cpu"] if found is None else ["cpu", device_type(found)]
    if device not in here:
        raise KernelwiseError(
            f"this machine has no {device}: kernels for it can be planned here, not run\n"
            f"  go on      run this where there is one, or name one of {', '.join(here)}"
        )


def _on_device(model: nn.Module, device: str) -> nn.Module:
    """Move a model to a device; one without weights stays on meta, and its layers get theirs on the device."""
    if device == "cpu" or any(parameter.is_meta for parameter in model.parameters()):
        return model
    return model.to("cuda" if device == "rocm" else device)


def verify_command(
    model: str | None,
    config: Path | None,
    kernel: str | None,
    *,
    trust_remote_code: bool,
    device: str | None,
    dtype: str | None,
    compiled: bool,
    seconds: float,
    seed: int,
) -> Checks:
    """Run `kernelwise verify`, with a bar on standard error that says how far it is, where somebody looks."""
    options = Options(compile=compiled, seconds=seconds, seed=seed, isolate=True if kernel else None)
    if kernel is not None:
        ref = read_reference(kernel, trust_remote_code=trust_remote_code)
        with progress_of(True) as show:
            return verify_kernel(
                ref,
                models=MODELS if model is None else (model,),
                dtype=dtype,
                device=device or "cpu",
                options=options,
                on_check=show,
            )
    assert model is not None
    named = load_model(model, dtype=dtype)
    if device is not None:
        _check_device(device)
        named = replace(named, model=_on_device(named.model, device))
    elif named.is_nowhere:
        device = "cpu"
    try:
        decided = plan_safely(named.model, None if config is None else KernelConfig.load(config), device=device)
    except ImportFailedError as error:
        return Checks(current_target(device or "cpu"), (error.check,))
    with progress_of(True, total=len(group(named.model, decided))) as show:
        checks = verify_plan(named.model, decided, options=options, on_check=show)
    remember(named.model, decided, checks.checks)
    return checks
