"""For authors of kernels: one kernel → every kind of layer that it could serve, checked.

No model is named: layers are looked for in small models with random weights, of the architectures that between them have
the variants that share a name (where a norm rounds, whether it adds 1 to its weight).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import nn

from kernelwise import sources
from kernelwise._capture import Group
from kernelwise._config import KernelConfig
from kernelwise._data import Check, Checks, Decision, Kernel, KernelRef, Layer
from kernelwise._decide import current_target, plan_safely
from kernelwise._discover import discover
from kernelwise._errors import KernelwiseError
from kernelwise._models import load_model
from kernelwise._plan import reasons_against
from kernelwise._prove import ImportFailedError, Prover
from kernelwise._verify import Options, check_group, verify_plan

MODELS: tuple[str, ...] = ("llama", "gemma2", "gpt_oss", "olmo2", "phi3", "gpt_neox")
ISOLATED = Options(isolate=True)


def read_reference(text: str, *, trust_remote_code: bool = False) -> KernelRef:
    """Turn `DIR:Layer`, `org/repo@v1:Layer`, `package:module:Layer` or `builtin:Layer` into a reference.

    Raises:
        KernelConfigError: it is none of these.
    """
    location, colon, layer = text.rpartition(":")
    if colon and Path(location).expanduser().is_dir():
        text = f"{Path(location).expanduser().resolve()}:{layer}"
    ref = KernelConfig({"Kernel": text}).rules()[0].ref
    if ref is None:
        raise KernelwiseError(f"{text!r} names no kernel\n  go on      write DIR:Layer or org/repo@v1:Layer")
    return replace(ref, trust_remote_code=True) if trust_remote_code and ref.scheme == "hub" else ref


def layers_for(
    kernel: Kernel, models: Sequence[str] = MODELS, *, dtype: str | None = None
) -> Iterator[tuple[nn.Module, Layer]]:
    """Yield each kind of layer in some models that a kernel could serve, with its model.

    A kernel that reads nothing from the layer would fit any forward with as many arguments: it serves those of its name.
    """
    seen: set[tuple[object, ...]] = set()
    for name in models:
        model = load_model(name, dtype=dtype).model
        for layer in discover(model):
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
    options: Options = ISOLATED,
    on_check: Callable[[Check], None] = lambda check: None,
) -> Checks:
    """Check a kernel on every kind of layer that it could serve.

    Raises:
        KernelLoadError: it cannot be loaded. KernelwiseError: no layer of these models fits it.
    """
    checks: list[Check] = []
    with Prover(seconds=options.seconds, memory=options.memory) as prover:
        try:
            kernel = sources.load(ref, device="cpu", before_import=partial(prover.before_import, "cpu"))
        except ImportFailedError as error:
            return Checks(current_target("cpu"), (error.check,))
        worker = prover.worker(kernel, "cpu")
        for model, layer in layers_for(kernel, models, dtype=dtype):
            place = f"{layer.class_name}: {layer.path}"
            found = Group(Decision(layer, "inference", kernel, "author"), (place,), ("inference", "training"))
            for check in check_group(model, found, None, options, worker):
                checks.append(replace(check, layer=place))
                on_check(checks[-1])
    if not checks:
        reads = ", ".join(f"self.{name}" for name in kernel.reads) or "nothing of the layer"
        raise KernelwiseError(
            f"no layer of {', '.join(models)} fits {ref}\n  tried      a forward with its arguments, on a layer that has what "
            f"it reads ({reads})\n  go on      name a model that has such a layer: kernelwise verify MODEL --kernel {ref}"
        )
    return Checks(current_target("cpu"), tuple(checks))


def verify_command(
    model: str | None,
    config: Path | None,
    kernel: str | None,
    *,
    trust_remote_code: bool,
    dtype: str | None,
    compiled: bool,
    seconds: float,
    seed: int,
) -> Checks:
    """Run `kernelwise verify` with a line on standard error that says how far it is, where somebody looks."""
    from rich.console import Console

    with Console(stderr=True).status("loading") as status:

        def show(check: Check) -> None:
            status.update(f"{check.kernel} on {check.layer}: {check.case} {check.status}")

        options = Options(compile=compiled, seconds=seconds, seed=seed, isolate=True if kernel else None)
        if kernel is not None:
            ref = read_reference(kernel, trust_remote_code=trust_remote_code)
            return verify_kernel(
                ref, models=MODELS if model is None else (model,), dtype=dtype, options=options, on_check=show
            )
        assert model is not None
        named = load_model(model, dtype=dtype)
        device = "cpu" if any(parameter.is_meta for parameter in named.model.parameters()) else None
        try:
            decided = plan_safely(named.model, None if config is None else KernelConfig.load(config), device=device)
        except ImportFailedError as error:
            return Checks(current_target(device or "cpu"), (error.check,))
        return verify_plan(named.model, decided, options=options, on_check=show)
