"""Check: one layer with one kernel → a check for every case. The inner step of verify, which knows nothing of models.

The layer's own code runs here, once as it is and once in float64; the kernel runs here if it is ours and in a worker if
it is not. What both gave and did is compared, and the first thing that is wrong is the status of the case.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch
from torch import nn

from kernelwise._data import Check, Decision, Kernel, Layer, Status
from kernelwise._errors import said
from kernelwise._forwards import globals_called, own_forward
from kernelwise._verifying._calls import Call, kernel_call, own_call
from kernelwise._verifying._capture import MEMORY as CAPTURED
from kernelwise._verifying._cases import batch_slice, beyond, cases
from kernelwise._verifying._copies import bare_copy
from kernelwise._verifying._given import Case
from kernelwise._verifying._groups import holds_others
from kernelwise._verifying._inputs import Sample, with_defaults
from kernelwise._verifying._judge import compare_calls, judge
from kernelwise._verifying._observe import Observed, growth, observe
from kernelwise._verifying._worker import MEMORY, SECONDS, Worker, WorkerError, failure_of

_FREE_TO_REFUSE = ("inputs with gaps", "transposed inputs", "inputs of ", "rows 2^31", "width ")
"""Cases that the model at hand does not have. A kernel may refuse them aloud; it may not compute them wrongly."""

_AS_GIVEN = {True: "as given, in training", False: "as given, in evaluation"}
"""The case of the other mode, where one check speaks for both: a kernel may ask for `self.training`."""

_FOR_ANY = ("as given", "the model's gradients", "scale ", "random weights", "no gradients", "NaN ")
_FOR_COMPILED = (*_FOR_ANY, "one row")
"""Cases for a kernel that is compiled anew for every kind of input: those of other kinds would check other kernels."""

_FOR_WHOLE = (*_FOR_ANY, "rows of different sizes", "only ", "inputs with gaps", "backward twice", "second ")
"""Cases for a layer of layers: what it is called with belongs together (masks, angles) and cannot be cut or resized."""

_DEADLY = ("crashed", "exited", "timed_out", "out_of_memory", "load_failed", "setting_changed")
"""Statuses after which no further case is tried."""

_NOISE = 64 << 10
"""Bytes by which a process may grow whatever it runs."""

_MOST, _NOISE_OF_ANSWER = 8, 64 << 20
"""How many times what the layer's own code gives a kernel's results may take, in bytes, and how much besides."""

NOT_BATCH_INVARIANT = "a row's result depends on the batch"
NO_BACKWARD = "no backward"
AT_DEFAULTS = "checked only with the default of"
ONE_BACKWARD = "one backward for each forward"


class _Runner(Protocol):
    """Where a kernel runs: in this process, or in a worker. What it fails with is a `WorkerError`."""

    def observe(self, case: Case, *, most: int | None = None) -> Observed: ...

    def growth(self, case: Case) -> tuple[int, int]: ...


class Here:
    """Runs a kernel in this process: for those that come with Kernelwise."""

    def __init__(self, layer: Layer, kernel: Kernel, mode: str, *, call: Call | None = None) -> None:
        self._call = kernel_call(layer, kernel, mode) if call is None else call

    def observe(self, case: Case, *, most: int | None = None) -> Observed:
        try:
            return observe(self._call, case)
        except Exception as error:
            raise failure_of(error) from error
        finally:
            if (case.strides or case.tiled) and torch.cuda.is_available():
                torch.cuda.empty_cache()  # gigabytes that the user's own process would go on holding

    def growth(self, case: Case) -> tuple[int, int]:
        return growth(self._call, case)


@dataclass(frozen=True, slots=True)
class Options:
    """How thorough a verification is. `seconds` and `memory` (bytes) limit each case in the worker, `capture_memory` what is
    kept of the model's tensors."""

    compile: bool = False
    isolate: bool | None = None  # None: all but builtin kernels
    seconds: float = SECONDS
    memory: int = MEMORY
    seed: int = 0
    capture_memory: int = CAPTURED  # bytes of the model's tensors that are kept at a time
    as_given: bool = False  # only the case "as given": of inputs for which all others would take too long


USUAL = Options()


def own_code(module: nn.Module, layer: Layer) -> Callable[..., Any]:
    """Return what a layer runs without us: its class's forward, or the function that a forward calls."""
    forward = own_forward(module)
    if layer.function is None:
        return forward
    called: Callable[..., Any] = globals_called(forward)[layer.function]
    return called


def defaults_of(own: Callable[..., Any]) -> dict[str, Any]:
    """Return the default values of a forward's or a function's parameters, and nothing for `*args` and `**kwargs`."""
    plain = type(own).forward if isinstance(own, nn.Module) else own
    found: dict[str, Any] = {}
    for parameter in inspect.signature(plain).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            found[parameter.name] = ()
        elif parameter.kind is parameter.VAR_KEYWORD:
            found[parameter.name] = {}
        elif parameter.default is not parameter.empty:
            found[parameter.name] = parameter.default
    return found


def check_kernel(
    decision: Decision,
    own: Callable[..., Any],
    sample: Sample,
    *,
    paths: Sequence[str] = (),
    modes: Sequence[str] = (),
    options: Options = USUAL,
    worker: Worker | None = None,
) -> Iterator[Check]:
    """Yield a check for every case of one layer and the kernel decided for it, as each is done.

    `own` is what `own_code` returns. `worker` runs this kernel already; None: one is started where one is needed. After the
    process that runs the kernel has died, no further case is tried.
    """
    kernel = decision.kernel
    assert kernel is not None
    sample = with_defaults(sample, defaults_of(own))
    base = Check(
        layer=decision.layer.path,
        paths=tuple(paths) or (decision.layer.path,),
        kernel=str(kernel.ref),
        modes=tuple(modes) or (decision.mode,),
        case="",
        status="passed",
        content_hash=kernel.content_hash,
    )
    isolate = options.isolate if options.isolate is not None else kernel.ref.scheme != "builtin"
    if not isolate:
        yield from all_cases(Here(decision.layer, kernel, decision.mode), decision, own, sample, base, options)
        return
    with ExitStack() as stack:
        if worker is None:
            worker = Worker(kernel, decision.layer.device, seconds=options.seconds, memory=options.memory)
            stack.enter_context(worker)
        worker.serve(decision.layer, decision.mode)
        yield from all_cases(worker, decision, own, sample, base, options)


def all_cases(
    runner: _Runner, decision: Decision, own: Callable[..., Any], sample: Sample, base: Check, options: Options
) -> Iterator[Check]:
    kernel, layer = decision.kernel, decision.layer
    assert kernel is not None
    call = own_call(layer, own)
    generator = torch.Generator().manual_seed(options.seed)
    training, whole = decision.mode.startswith("training"), holds_others(decision)
    given, sample = sample, _in_mode(sample, training)
    for index, case in enumerate(cases(layer, sample, decision.mode, generator=generator)):
        if kernel.ref.location == "inductor":
            if not case.name.startswith(_FOR_COMPILED):
                continue
            case = _changed(case, fill=None)  # what fills memory is a mode, under which compiled code does not run
        if whole and not case.name.startswith(_FOR_WHOLE):
            continue
        if not kernel.has_backward and case.grad != "none":
            case = _without_gradients(case)
            if (
                case.second
                or case.retain
                or case.between
                or case.name.startswith(("only ", "transposed grad", "one grad"))
            ):
                continue
        check = _one_case(runner, call, case, base, repeated=index == 0)
        if index == 0:
            found = () if kernel.has_backward else (NO_BACKWARD,)
            check = replace(check, marks=(*check.marks, *found, *_left_at_defaults(layer, sample, decision.mode)))
        yield check
        if options.as_given or check.status in _DEADLY:
            return
        if index == 0 and check.status == "skipped":  # no inputs for this layer, no evidence
            return
        if index == 0 and sample.module is not None and any(m.startswith("training") != training for m in base.modes):
            other = _changed(case, module=_in_mode(given, not training).module, name=_AS_GIVEN[not training])
            check = _one_case(runner, call, other, base)
            yield check
            if check.status in _DEADLY:
                return
    if whole:
        return
    yield from _properties(runner, decision, sample, base)
    if _on_gpu(sample) and (many := beyond(layer, sample, decision.mode)):
        check = _one_case(runner, call, many, base)
        yield check
        if check.status in _DEADLY:
            return
    for how in _ways(kernel, sample, options):
        case = Case(how, sample.arguments, sample.module, grad="none", how=how)  # type: ignore[arg-type]
        check = _one_case(runner, call, case, base)
        if check.status in ("raised", "wrong_values"):
            status: Status = "does_not_compile" if how == "compile" else "no_cuda_graph"
            check = replace(check, status=status)
        yield check


def _left_at_defaults(layer: Layer, sample: Sample, mode: str) -> Iterator[str]:
    """A mark where inputs were made for a layer that nothing recognises: what its optional arguments do is not known."""
    optional = [p.name for p in layer.signature if p.has_default and not p.kind.startswith("var_")]
    if optional and not sample.captured and layer.computes(mode) is None:
        yield f"{AT_DEFAULTS} {', '.join(optional)}"


def _in_mode(sample: Sample, training: bool) -> Sample:
    """The sample with a module that is set for training or for inference, whatever the model is set for now."""
    if sample.module is None:
        return sample
    module = bare_copy(sample.module, lambda tensor: tensor)
    for part in module.modules():
        part.training = training
    return replace(sample, module=module)


def _ways(kernel: Kernel, sample: Sample, options: Options) -> Iterator[str]:
    if options.compile and kernel.can_torch_compile:
        yield "compile"
    if _on_gpu(sample):
        yield "cuda graph"


def _on_gpu(sample: Sample) -> bool:
    return any(isinstance(value, torch.Tensor) and value.is_cuda for value in sample.arguments.values())


def _without_gradients(case: Case) -> Case:
    return _changed(case, grad="none", repeat=False)


def _changed(case: Case, **changes: Any) -> Case:
    return Case(**{f.name: getattr(case, f.name) for f in fields(case)} | changes)


def _one_case(runner: _Runner, call: Any, case: Case, base: Check, *, repeated: bool = False) -> Check:
    """Judge one case. What is wrong is looked for in the order in which it explains the rest."""
    base = replace(base, case=case.name)
    plain = _changed(case, how="eager", fill=None, strides={}, tiled={}, reused=False)
    try:
        own = observe(call, plain)
        exact = observe(call, plain, wide=True)
        if own.overwritten and not own.outputs:
            raise RuntimeError(f"it overwrites {', '.join(own.overwritten)}, which needs a gradient")
    except Exception as error:
        return replace(base, status="skipped", detail=f"the layer's own code fails: {said(error)}")
    if case.tiled and own.draws:
        return replace(base, status="skipped", detail="it draws random numbers: others, where there are more elements")
    try:
        new = runner.observe(case, most=_MOST * own.nbytes + _NOISE_OF_ANSWER)
    except WorkerError as error:
        if error.status in ("raised", "out_of_memory") and case.name.startswith(_FREE_TO_REFUSE):
            return replace(base, status="skipped", detail=f"the kernel refuses it: {error.detail}")
        if error.status == "raised" and case.retain:
            return replace(
                base, status="skipped", detail=f"the kernel refuses it: {error.detail}", marks=(ONE_BACKWARD,)
            )
        return replace(base, status=error.status, detail=error.detail)
    check = judge(base, case, own, exact, new)
    if check.status == "non_finite" and case.fill is not None:
        check = _unwritten(runner, _changed(case, fill=0.0), own, exact, check)
    wrong = check.status in ("wrong_values", "wrong_gradient", "non_finite")
    if not wrong and (check.failed or not repeated):
        return check
    try:
        again = runner.observe(case)
    except WorkerError as error:
        return replace(base, status=error.status, detail=f"at the second call: {error.detail}")
    return compare_calls(check, judge(base, case, own, exact, again), new, again)


def _unwritten(runner: _Runner, case: Case, own: Observed, exact: Observed, check: Check) -> Check:
    """Tell NaN that the kernel computes from NaN that it has left of the memory it was given."""
    try:
        found = judge(check, case, own, exact, runner.observe(case))
    except WorkerError:
        return check
    if found.status == "non_finite":
        return check
    return replace(check, status="not_written", detail="it is NaN only where new memory is filled with NaN")


def _properties(runner: _Runner, decision: Decision, sample: Sample, base: Check) -> Iterator[Check]:
    """Whether a row's result depends on its batch (a mark), and whether memory grows with every call (a fault)."""
    full = Case("as given", sample.arguments, sample.module, grad="none")
    sliced = batch_slice(decision.layer, sample, decision.mode)
    backward = decision.kernel is not None and decision.kernel.has_backward
    try:
        if sliced is not None:
            alone, dimension = sliced
            one, all_rows = runner.observe(alone), runner.observe(full)
            same = all(
                torch.equal(a, b.narrow(dimension, 0, a.shape[dimension]))
                for a, b in zip(one.outputs, all_rows.outputs, strict=True)
                if b.dim() > dimension
            )
            yield replace(base, case=alone.name, marks=() if same else (NOT_BATCH_INVARIANT,))
        grown, given = runner.growth(_larger(_changed(full, grad="all" if backward else "none")))
    except WorkerError as error:
        yield replace(base, case="many calls", status=error.status, detail=error.detail)
        return
    leaks = grown > max(given // 2, _NOISE)
    detail = f"the process grew by {grown >> 10} KiB while calls gave {given >> 10} KiB" if leaks else ""
    yield replace(base, case="many calls", status="leaks_memory" if leaks else "passed", detail=detail)


def _larger(case: Case) -> Case:
    """The case with its first dimension repeated until a leak stands out of what a process does anyway."""
    tensors = [value for value in case.arguments.values() if isinstance(value, torch.Tensor)]
    largest = max((tensor.nbytes for tensor in tensors), default=0)
    if len(tensors) != 1 or not largest or tensors[0].dim() < 2:
        return case
    times = max(1, (512 << 10) // largest)
    return _changed(
        case,
        arguments={
            name: value.repeat(times, *(1,) * (value.dim() - 1)) if isinstance(value, torch.Tensor) else value
            for name, value in case.arguments.items()
        },
    )
