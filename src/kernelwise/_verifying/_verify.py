"""Verify: a model and its plan → checks. Nothing is put into the model.

Layers alike are checked once, on what the model gives them or on inputs made for them; of layers that hold others, builtin
kernels are checked as a whole.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from kernelwise import _discover
from kernelwise._applying import _apply
from kernelwise._data import Check, Checks, Decision, Kernel, Layer, Plan, Target
from kernelwise._discover import JOINED
from kernelwise._errors import PlanError, said
from kernelwise._verifying._calls import own_call
from kernelwise._verifying._capture import NOT_CALLED, capture, capture_in_passes, with_weights
from kernelwise._verifying._check import USUAL, Here, Options, all_cases, check_kernel, defaults_of, own_code
from kernelwise._verifying._copies import CannotTryError, bare_copy
from kernelwise._verifying._groups import Group, group, group_wholes, holds_others, module_of
from kernelwise._verifying._inputs import Sample, made_real, make_sample, random_weight, with_defaults
from kernelwise._verifying._worker import Worker

_OF_OTHERS = "it calls the layer's children with arguments of its own, which cannot be made or cut"


def verify_plan(
    model: nn.Module,
    plan: Plan,
    inputs: Any = None,
    *,
    options: Options = USUAL,
    on_check: Callable[[Check], None] = lambda check: None,
) -> Checks:
    """Check every kernel of a plan, once for all layers alike. `inputs` are the model's; None: made for each layer.

    Raises:
        PlanError: a kernel of the plan is only described, or the model is on the meta device and does not run there.
        WorkerStartError: a kernel is not builtin, and there is no process to run it in.
    """
    groups, wholes = group(model, plan), group_wholes(model, plan)
    if described := next(
        (g.decision.kernel for g in groups if g.decision.kernel and not g.decision.kernel.function), None
    ):
        raise PlanError(
            f"{described.ref} is described, not loaded, so it cannot be checked\n"
            "  go on      plan on the machine that the model is on"
        )
    notes: list[str] = []
    checks: list[Check] = []
    workers: dict[tuple[Kernel | None, str], Worker] = {}
    running: Worker | None = None
    with ExitStack() as stack:
        for found, sample in _with_samples(model, (*groups, *wholes), inputs, options, notes):
            if found in wholes and sample is None:
                notes.append(f"{found.decision.layer.path} is not checked as a whole: that takes inputs of the model")
                continue
            key = found.decision.kernel, found.decision.layer.device
            if key not in workers:
                assert key[0] is not None
                worker = Worker(key[0], key[1], seconds=options.seconds, memory=options.memory)
                workers[key] = stack.enter_context(worker)
            if running is not workers[key] and running is not None:
                running.close()  # one process at a time; in a further pass it is started anew
            running = workers[key]
            for check in check_group(model, found, sample, options, running):
                checks.append(check)
                on_check(check)
    for decision in plan.decisions:
        if decision.kernel is not None and holds_others(decision) and decision.kernel.ref.scheme != "builtin":
            checks.append(_not_checked(decision, (decision.layer.path,), (decision.mode,), _OF_OTHERS))
            on_check(checks[-1])
    heads = {f"{d.layer.path} ({d.kernel.ref})" for d in plan.decisions if d.kernel and d.layer.function == JOINED}
    notes += [
        f"{head} is not checked here: a head with its loss is no call that could be captured" for head in sorted(heads)
    ]
    if not checks and not notes:
        notes.append("no kernels in the plan: there is nothing to check")
    return Checks(plan.target, tuple(checks), tuple(dict.fromkeys(notes)))


def _with_samples(
    model: nn.Module, groups: Sequence[Group], inputs: Any, options: Options, notes: list[str]
) -> Iterator[tuple[Group, Sample | None]]:
    """Yield each group with what its layer was given, those of one kernel together; None where inputs must be made."""
    if inputs is None:
        passes: Iterator[tuple[Sequence[Group], dict[str, Sample]]] = iter([(groups, {})])
    elif _discover.model_device(model) == "meta":
        passes = iter([_captured_on_meta(model, groups, inputs, options, notes)])
    else:
        passes = capture_in_passes(model, groups, inputs, memory=options.capture_memory, notes=notes)
    for found, samples in passes:
        by_kernel: dict[tuple[Kernel | None, str], list[Group]] = {}
        for one in found:
            by_kernel.setdefault((one.decision.kernel, one.decision.layer.device), []).append(one)
        for alike in by_kernel.values():
            for one in alike:
                yield one, samples.get(one.decision.layer.path)


def _captured_on_meta(
    model: nn.Module, groups: Sequence[Group], inputs: Any, options: Options, notes: list[str]
) -> tuple[Sequence[Group], dict[str, Sample]]:
    """Run a model on the meta device and give values to what its layers were given there."""
    layers = [found for found in groups if found.decision.layer.function is None and not holds_others(found.decision)]
    on_meta = tree_map(lambda value: value.to("meta") if isinstance(value, torch.Tensor) else value, inputs)
    try:
        samples = capture(model, layers, on_meta, memory=1 << 62)
    except Exception as error:
        raise PlanError(
            f"the model is on the meta device and does not run there: {said(error)}\n"
            "  go on      load the weights first, or give no inputs: both are then made for each layer"
        ) from error
    notes.append("the model is on meta: shapes and strides are what it gives its layers, values and weights were made")
    generator = torch.Generator().manual_seed(options.seed)
    for found in layers:
        layer, path = found.decision.layer, found.decision.layer.path
        if path in samples:
            device = torch.device("cuda" if layer.device == "rocm" else layer.device)
            samples[path] = made_real(samples[path], layer, found.decision.mode, device=device, generator=generator)
        else:
            notes.append(f"inputs were made for {path}: {NOT_CALLED}")
    return groups, samples


def check_group(
    model: nn.Module, found: Group, sample: Sample | None, options: Options, worker: Worker | None = None
) -> Generator[Check, None, None]:
    """Yield the checks of a group of alike layers. Without a sample, inputs are made. `worker` is for its kernel."""
    decision = found.decision
    module = module_of(model, decision.layer)
    own = own_code(module, decision.layer)
    with with_weights(module):
        sample = sample or _made(decision.layer, module, decision.mode, options.seed)
        if sample is not None and sample.module is not None:
            sample = replace(sample, module=_real_module(sample.module, decision.layer, options.seed))
    if sample is None:
        why = "no inputs could be made for it; pass inputs of the model"
        yield _not_checked(decision, found.paths, found.modes, why)
    elif not holds_others(decision):
        yield from check_kernel(
            decision, own, sample, paths=found.paths, modes=found.modes, options=options, worker=worker
        )
    elif decision.kernel is not None and decision.kernel.ref.scheme == "builtin":
        yield from _check_whole(found, own, sample, options)
    else:
        yield _not_checked(decision, found.paths, found.modes, _OF_OTHERS)


def checks_within(
    running: Generator[Check, None, None], worker: Worker, end: float, enough: Callable[[Check], bool]
) -> tuple[list[Check], bool]:
    """Take checks until one is enough, or until `end` of `time.monotonic`; say whether nothing was left for lack of time."""
    checks: list[Check] = []
    worker.until = end
    try:
        for check in running:
            if check.status == "timed_out" and time.monotonic() >= end:
                return checks, False  # what was over is the time for all
            checks.append(check)
            if enough(check):
                return checks, True
            if time.monotonic() > end:
                return checks, False
    finally:
        running.close()
        worker.until = None
    return checks, True


def _not_checked(decision: Decision, paths: tuple[str, ...], modes: tuple[str, ...], why: str) -> Check:
    return Check(decision.layer.path, paths, str(decision.kernel and decision.kernel.ref), modes, "", "skipped", why)


def _check_whole(found: Group, own: Callable[..., Any], sample: Sample, options: Options) -> Iterator[Check]:
    """Check a builtin kernel of a layer of layers: that layer's own code against itself with the kernel put in.

    Its children run as they are, but for the norm that the kernel takes in. There is no cache, which every call would change.
    """
    decision, kernel = found.decision, found.decision.kernel
    assert kernel is not None
    sample = replace(sample, arguments={n: _without_objects(value) for n, value in sample.arguments.items()})
    sample = with_defaults(sample, {n: v for n, v in defaults_of(own).items() if n not in sample.arguments})
    base = Check(
        decision.layer.path, found.paths, str(kernel.ref), found.modes, "", "passed", content_hash=kernel.content_hash
    )
    runner = Here(decision.layer, kernel, decision.mode, call=_put_in(found))
    yield from all_cases(runner, decision, own, sample, base, options)


def _without_objects(value: Any) -> Any:
    """Leave out what is no tensor, number, name or collection of those: a cache."""
    if isinstance(value, (tuple, list)):
        return type(value)(_without_objects(item) for item in value)
    if isinstance(value, dict):
        return {name: _without_objects(item) for name, item in value.items()}
    return value if value is None or isinstance(value, (torch.Tensor, bool, int, float, str)) else None


def _put_in(found: Group) -> Callable[..., Any]:
    """Return the call of a copy of a layer with its kernel put in; it counts as refused where the layer's own code ran."""
    layer, kernel = found.decision.layer, found.decision.kernel
    assert kernel is not None
    assert kernel.function is not None
    ran: list[bool] = []

    @functools.wraps(kernel.function)
    def noted(*args: Any, **kwargs: Any) -> Any:
        ran.append(True)
        return kernel.function(*args, **kwargs)  # type: ignore[misc]

    noted.LEAST = 0  # type: ignore[attr-defined]  # few elements say as much as many
    here = replace(found.decision, layer=replace(layer, path="", paths=("",)), kernel=replace(kernel, function=noted))
    below = [replace(d, layer=replace(d.layer, path=d.layer.path.removeprefix(f"{layer.path}."))) for d in found.inside]
    plan = Plan(Target(layer.device), (here, *below))

    def run(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        ran.clear()
        token = _apply.apply(module, plan)
        try:
            result = module(*args, **kwargs)
        finally:
            _apply.remove(module, token=token)
        if not ran:
            raise CannotTryError("the layer's own code ran, as the kernel does not take this")
        return result

    return own_call(layer, run)


def _real_module(module: nn.Module, layer: Layer, seed: int) -> nn.Module:
    """Copy a module whose weights are not here: those that are brought in just now, and random ones for those on meta."""
    first = next(iter(module.parameters()), None)
    if first is not None and first.is_meta:
        device = torch.device("cuda" if layer.device == "rocm" else layer.device)
        generator = torch.Generator().manual_seed(seed)
        return bare_copy(module, lambda t: random_weight(torch.empty_like(t, device=device), generator))
    if any("_hf_hook" in part.__dict__ for part in module.modules()):
        return bare_copy(module, torch.Tensor.clone)
    return module


def _made(layer: Layer, module: nn.Module, mode: str, seed: int) -> Sample | None:
    """Make a sample for a layer; one on the meta device gets random weights of its own, which no other layer holds."""
    first = next(iter(module.parameters()), None)
    generator = torch.Generator().manual_seed(seed)
    if first is not None and not first.is_meta:
        device = first.device
    else:
        device = torch.device("cuda" if layer.device == "rocm" else layer.device)
    if layer.function is not None:
        return make_sample(layer, None, mode, device=device, generator=generator)
    return make_sample(layer, _real_module(module, layer, seed), mode, device=device, generator=generator)
