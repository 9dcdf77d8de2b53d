"""Contenders: a model and a name → a copy of it that runs that way, sharing its weights.

Each says plainly why it cannot run. What others patch into the whole process (Liger replaces functions of transformers) is
in place during their own calls alone, so that contenders can take turns.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import nn

from kernelwise._applying import _apply
from kernelwise._decide import Config, decide
from kernelwise._discover import model_device
from kernelwise._errors import KernelwiseError, PlanError, said
from kernelwise._evidence import AND_COMPILED, BUILTIN, COMPILED, EAGER, LIGER, TRANSFORMERS, Run
from kernelwise._measuring._race import Contender, sharing_copy
from kernelwise._reference import did_you_mean

CONTENDERS = (EAGER, BUILTIN, COMPILED, TRANSFORMERS, LIGER)

MAX_COMPILATIONS = 32
"""Of one function: more, and torch.compile would silently run the rest eagerly."""

DRIFT = 1.25
"""How many times as long own code may take in one race as in another before the times of the two say nothing together."""

_HUB_SECONDS = 5.0
_MISSING = object()

_Patch = tuple[Any, str, Any, Any]  # whose attribute, its name, what stood there, what stands there


class UnavailableError(KernelwiseError):
    """A contender cannot run here; the message says why."""


def check_names(names: tuple[str, ...], configs: Mapping[str, Any]) -> None:
    """Raise `PlanError` for a name that is no contender, or a config with the name of another contender."""
    taken = next((name for name in configs if name in CONTENDERS or name.endswith(AND_COMPILED)), None)
    if taken is not None:
        raise PlanError(f"{taken!r} is a contender of its own\n  go on      give the config another name")
    for name in names:
        if name not in CONTENDERS and name.removesuffix(AND_COMPILED) not in (BUILTIN, *configs):
            known = (*CONTENDERS, BUILTIN + AND_COMPILED, *configs)
            raise PlanError(
                f"{name!r} is no contender{did_you_mean(name, known)}\n  go on      name some of {', '.join(known)}"
            )


def contender(base: nn.Module, name: str, *, training: bool, configs: Mapping[str, Config]) -> Contender:
    """Return a contender for a model that has no kernels.

    Args:
        name: one of `CONTENDERS`, a name in `configs`, or "builtin" or such a name with "+compile" after it.
        training: what it is for; kernels of others are chosen by it.
        configs: by name, what `kernelize` is to be given.

    Raises:
        UnavailableError: it cannot run here. KernelwiseError: `kernelize` fails.
    """
    if name == EAGER:
        return Contender(sharing_copy(base))
    if name == COMPILED:
        return _compiled(sharing_copy(base))
    if name == TRANSFORMERS:
        return _transformers(base, training)
    if name == LIGER:
        return liger(base)
    plain = name.removesuffix(AND_COMPILED)
    model = sharing_copy(base)
    mode = ("training" if training else "inference") + name.removeprefix(plain)
    plan = decide(model, None if plain == BUILTIN else configs[plain], mode=mode)
    if not any(decision.kernel is not None for decision in plan.decisions):
        raise UnavailableError(
            f"it has no kernel for any layer of this model in {mode}: it would be the own code again"
        )
    _apply.apply(model, plan)
    return _compiled(model) if name != plain else Contender(model)


def is_compiled(name: str) -> bool:
    """Whether torch.compile runs the contender of that name."""
    return name == COMPILED or name.endswith(AND_COMPILED)


def caveats(runs: Sequence[Run]) -> tuple[str, ...]:
    """Say what there is to know beside the figures of contenders."""
    notes = []
    if any(run.workload == "decode" and run.comparison is not None for run in runs if is_compiled(run.contender)):
        notes.append("in decode, torch.compile has transformers' static cache; the others have the growing one")
    eager: dict[str, list[float]] = {}
    for run in runs:
        if run.comparison is not None:
            eager.setdefault(run.workload, []).append(run.comparison.own_us)
    apart = [name for name, times in eager.items() if max(times) > DRIFT * min(times)]
    if apart:
        notes.append(
            f"in {', '.join(apart)} the machine was not equally fast in all races: compare what is times eager, not the times"
        )
    return tuple(notes)


def _compiled(model: nn.Module) -> Contender:
    return Contender(model, call=torch.compile(model), static_cache=True)


@contextmanager
def compile_limits() -> Iterator[None]:
    """Let torch.compile fail where it would otherwise give up and run the own code, which would then be timed as compiled."""
    config: Any = torch._dynamo.config
    with config.patch(recompile_limit=MAX_COMPILATIONS, fail_on_recompile_limit_hit=True):
        yield


def _transformers(base: nn.Module, training: bool) -> Contender:
    """The kernels that transformers itself names for its models, from the Hub."""
    if not hasattr(base, "set_use_kernels"):
        raise UnavailableError("it is not a model of transformers that can use kernels")
    try:
        from kernels import use_kernel_mapping
    except ImportError as error:
        raise UnavailableError(f"the kernels library is missing: pip install kernels ({said(error)})") from error
    _reach_hub()
    model: Any = sharing_copy(base).train(training)
    with use_kernel_mapping({}, inherit_mapping=True):  # what transformers registers is gone afterwards
        model.set_use_kernels(True)
    model._use_kernels = False  # or changing its mode would look for kernels again
    parts = [part for module in model.modules() for part in (module, *getattr(module, "_kernel_funcs", {}).values())]
    if not any(_is_replaced(part) for part in parts):
        device = model_device(base)
        raise UnavailableError(
            f"no kernel that transformers names for its layers could be loaded for this model on {device}"
        )
    return Contender(model)


def _is_replaced(part: Any) -> bool:
    """Say whether another function runs than that of the part's class: where none could be loaded, that one is put there."""
    forward = getattr(part, "__dict__", {}).get("forward")
    return forward is not None and getattr(forward, "__func__", forward) is not type(part).forward


def _reach_hub() -> None:
    """Fail within seconds where the Hub cannot be reached; the kernels library would try again and again for each layer."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=_HUB_SECONDS)
    except Exception as error:
        raise UnavailableError(
            f"its kernels are on the Hub, which cannot be reached ({said(error)}); with HF_HUB_OFFLINE=1 those that were "
            "downloaded before are tried"
        ) from error


def liger(base: nn.Module, **options: bool) -> Contender:
    """Liger's patch for the model's type, with its defaults besides `options`: in training they fuse the head with the loss.

    Raises:
        UnavailableError: it cannot run here.
    """
    if not _runs_triton(base):
        raise UnavailableError("Liger's kernels are written in Triton, which runs on GPUs alone")
    try:
        patches: Any = importlib.import_module("liger_kernel.transformers.monkey_patch")
    except ImportError as error:
        raise UnavailableError(f"it is not installed: pip install liger-kernel ({said(error)})") from error
    model_type = getattr(getattr(base, "config", None), "model_type", None)
    if model_type not in patches.MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise UnavailableError(f"it has no patch for models of type {model_type!r}")
    model = sharing_copy(base)
    before = _attributes_of_others()
    try:
        patches._apply_liger_kernel_to_instance(model=model, **options)
    finally:
        changes = list(_changes(before))
        _put(changes, new=False)
    return Contender(model, call=_only_during_calls(model, changes))


def _runs_triton(model: nn.Module) -> bool:
    return model_device(model) in ("cuda", "rocm", "xpu")


def _attributes_of_others() -> list[tuple[Any, dict[str, Any]]]:
    """Return what stands in the modules that a patch of transformers may change, and in their classes."""
    found: list[tuple[Any, dict[str, Any]]] = []
    for name, module in list(sys.modules.items()):
        if isinstance(module, ModuleType) and (
            name.startswith(("transformers.models.", "transformers.loss.")) or name == "torch.nn.functional"
        ):
            found.append((module, dict(vars(module))))
            classes = [value for value in vars(module).values() if isinstance(value, type) and value.__module__ == name]
            found += [(cls, dict(vars(cls))) for cls in classes]
    return found


def _changes(before: list[tuple[Any, dict[str, Any]]]) -> Iterator[_Patch]:
    for owner, attributes in before:
        now = vars(owner)
        for name in attributes.keys() | now.keys():
            old, new = attributes.get(name, _MISSING), now.get(name, _MISSING)
            if old is not new:
                yield owner, name, old, new


def _put(changes: list[_Patch], *, new: bool) -> None:
    for owner, name, before, after in changes:
        value = after if new else before
        if value is not _MISSING:
            setattr(owner, name, value)
        elif name in vars(owner):
            delattr(owner, name)


def _only_during_calls(model: nn.Module, changes: list[_Patch]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        _put(changes, new=True)
        try:
            return model(*args, **kwargs)
        finally:
            _put(changes, new=False)

    return call
