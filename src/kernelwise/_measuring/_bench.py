"""Bench: contenders for a whole model end to end, side by side, with one table and a plot in it.

What stands here joins: `_workload` says what is done with the model, `_contenders` who does it, `_race` who is how fast.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from torch import nn

from kernelwise._applying import _apply
from kernelwise._configuring._config import KernelConfig
from kernelwise._decide import Config, current_target
from kernelwise._device_lock import alone_on
from kernelwise._discover import model_device
from kernelwise._errors import KernelwiseError, PlanError, said
from kernelwise._evidence import EAGER, Run, Tuning
from kernelwise._measuring._contenders import CONTENDERS, caveats, check_names, compile_limits, contender
from kernelwise._measuring._measure import environment
from kernelwise._measuring._race import Contender, race, sharing_copy
from kernelwise._measuring._workload import STEPS, Workload, workloads_of
from kernelwise._units import digits, duration, size
from kernelwise._weights import load_inputs, load_with_weights, make_inputs

_BAR_WIDTH = 24

Progress = Callable[[str, float], None]


def bench(
    model: nn.Module,
    inputs: Any,
    *,
    contenders: Sequence[str] | None = None,
    configs: Mapping[str, Config] | None = None,
    workloads: Sequence[str] | None = None,
    steps: int = STEPS,
    seconds: float = 20.0,
    progress: Progress | None = None,
) -> tuple[Run, ...]:
    """Run contenders on a model side by side and return a run of each on each workload, eager first.

    Every contender is a copy that shares the model's weights; the model itself is not changed, and its gradients, buffers,
    mode and random states are afterwards as before. A contender that is not available, fails, or does not compute what eager
    computes, is a run with an error.

    Args:
        model: with or without kernels; "eager" is the model without them.
        inputs: what the model is called with: a dict, a tuple, or one argument.
        contenders: names of `CONTENDERS` and of `configs`; with "+compile" after "builtin" or the name of a config, the
            kernelized model is compiled. None: all of `CONTENDERS` and all configs.
        configs: by name, what `kernelize` is to be given.
        workloads, steps: see `workloads_of`.
        seconds: how long the turns on one workload may take. First calls, compiling above all, come on top.
        progress: told what is done now, and which part of all is done, 0 to 1.

    Raises:
        PlanError: a name is unknown, the inputs do not allow a workload, the weights are on meta, or the model cannot be
            copied.
    """
    configs = configs or {}
    names = (*CONTENDERS, *configs) if contenders is None else tuple(contenders)
    names = tuple(dict.fromkeys((EAGER, *names)))
    check_names(names, configs)
    device = _device_of(model)
    base = sharing_copy(model)
    _apply.remove(base)
    wanted = workloads_of(base, inputs, workloads, steps=steps)
    built: dict[tuple[str, bool], Contender | str] = {}
    runs: list[Run] = []
    tell: Progress = progress or (lambda text, part: None)
    for number, workload in enumerate(wanted):
        for name in names:
            tell(f"{workload.name}: making {name} ready", number / len(wanted))
            if (name, workload.training) not in built:
                built[name, workload.training] = _build(base, name, workload.training, configs)

        def waits(what: str, number: int = number) -> None:
            tell(what, number / len(wanted))

        def first_call(name: str, number: int = number, workload: Workload = workload) -> None:
            tell(f"{workload.name}: first call of {name}", number / len(wanted))

        def turns(done: float, number: int = number, workload: Workload = workload) -> None:
            tell(f"{workload.name}: in turns", (number + done) / len(wanted))

        there = {name: built[name, workload.training] for name in names}
        ready = {name: found for name, found in there.items() if isinstance(found, Contender)}
        with alone_on(device, waits), compile_limits():
            raced = race(ready, workload, device=device, seconds=seconds, begin=first_call, progress=turns)
        ran = {run.contender: run for run in raced}
        for name, found in there.items():
            runs.append(Run(name, workload.name, None, workload.tokens, found) if isinstance(found, str) else ran[name])
    return tuple(runs)


def _build(base: nn.Module, name: str, training: bool, configs: Mapping[str, Config]) -> Contender | str:
    """Return a contender, or why there is none. Without eager there is nothing to compare with: that is raised."""
    try:
        return contender(base, name, training=training, configs=configs)
    except Exception as error:
        if name == EAGER:
            raise
        return said(error)


def _device_of(model: nn.Module) -> str:
    tensors = [*model.parameters(), *model.buffers()]
    if any(tensor.is_meta for tensor in tensors):
        raise PlanError(
            "the model has weights on the meta device, so it cannot run\n"
            "  go on      load its weights; models that are offloaded from memory cannot be compared"
        )
    return str(tensors[0].device) if tensors else "cpu"


def evidence(
    model: nn.Module, runs: Sequence[Run], *, name: str, seconds: float = 0.0, notes: Sequence[str] = ()
) -> Tuning:
    """Return runs as the evidence that reports show and JSON holds: without choices, as nothing was tuned."""
    kind = model_device(model) or "cpu"
    return Tuning(
        model=name,
        target=current_target(kind),
        objective="latency",
        workloads=tuple(dict.fromkeys(run.workload for run in runs)),
        choices=(),
        runs=tuple(runs),
        environment=environment(_device_of(model)),
        notes=(*notes, *caveats(runs)),
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        seconds=seconds,
    )


def bench_command(
    spec: str,
    *,
    config: Path | None = None,
    inputs: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    full: bool = False,
    layers: int | None = None,
    batch: int = 1,
    tokens: int = 128,
    steps: int = STEPS,
    workloads: Sequence[str] = (),
    contenders: Sequence[str] = (),
    seconds: float = 20.0,
    progress: Progress | None = None,
) -> Tuning:
    """Load MODEL with weights, make its inputs, run the contenders and return what was found: `kernelwise bench`.

    Args:
        spec, device, dtype, full, layers: see `load_with_weights`.
        config: a file with a kernel mapping, which is a contender with the file's name.
        inputs: `module:factory` of what the model is called with; None: random tokens or images, see `make_inputs`.
        batch, tokens: of those, `[batch, tokens]`.
        workloads: see `workloads_of`; none: as there, and "training" only where it is asked for.
        contenders: see `bench`; none: all.
    """
    began = time.perf_counter()
    configs = {} if config is None else {config.stem: KernelConfig.load(config)}
    if contenders:
        check_names(tuple(contenders), configs)
    named = load_with_weights(spec, dtype=dtype, device=device, full=full, layers=layers)
    given = make_inputs(named.model, batch=batch, tokens=tokens) if inputs is None else load_inputs(inputs, named.model)
    runs = bench(
        named.model,
        given,
        contenders=contenders or None,
        configs=configs,
        workloads=workloads or None,
        steps=steps,
        seconds=seconds,
        progress=progress,
    )
    kinds = {str(p.dtype).removeprefix("torch.") for p in named.model.parameters() if p.is_floating_point()}
    parameters = sum(parameter.numel() for parameter in named.model.parameters())
    notes = [*named.notes, f"{digits(parameters / 1e6)} M parameters in {', '.join(sorted(kinds))}"]
    if inputs is None:
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in given.items())
        notes.append(f"random inputs: {shapes}; a run of decode is {steps} tokens for each row")
        if all(run.comparison is None for run in runs):
            notes.append("the inputs may be at fault: --inputs module:factory gives others")
    return evidence(named.model, runs, name=spec, seconds=time.perf_counter() - began, notes=notes)


def show(found: Tuning, *, width: int | None = None) -> str:
    """Return the runs of a bench as a table for a terminal, a bar for each: how many times as fast as eager it is."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    text = StringIO()
    console = Console(file=text, width=width or max(120, Console().width), color_system=None, highlight=False)
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    headers = ("workload", "contender", "time", "tokens/s", "x eager", "95 % interval", "", "peak memory", "first call")
    peaks = any(run.comparison is not None and run.comparison.peak is not None for run in found.runs)
    tokens = any(run.tokens for run in found.runs)
    shown = [h for h in headers if (h != "peak memory" or peaks) and (h != "tokens/s" or tokens)]
    for header in shown:
        words = header in ("workload", "contender", "")
        table.add_column(header, justify="left" if words else "right", no_wrap=True)
    fastest = max((run.comparison.speedup for run in found.runs if run.comparison is not None), default=1.0)
    failed: dict[tuple[str, str | None], list[str]] = {}
    for workload in found.workloads:
        label = workload
        for run in (run for run in found.runs if run.workload == workload):
            if run.comparison is None:
                failed.setdefault((run.contender, run.error), []).append(workload)
                continue
            cells = dict(zip(headers, _cells(run, label, fastest), strict=True))
            table.add_row(*(cells[header] for header in shown))
            label = ""
        table.add_section()
    console.print(f"{found.model} on {found.target.device}", markup=False)
    console.print(table if table.row_count else "no contender ran")
    if any(_is_unclear(run) for run in found.runs):
        console.print(" ?  no clear difference", markup=False)
    for (name, error), of in failed.items():
        console.print(f"not run: {name} ({', '.join(of)}): {error}", markup=False, soft_wrap=True)
    for note in found.notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def _cells(run: Run, label: str, fastest: float) -> tuple[str, ...]:
    compared = run.comparison
    if compared is None:
        raise KernelwiseError(f"{run.contender} has no figures: {run.error}")
    own = run.contender == EAGER
    rate = run.tokens_per_s
    return (
        label,
        run.contender,
        f"{duration(compared.us / run.tokens)}/token"
        if run.workload == "decode" and run.tokens
        else duration(compared.us),
        "" if rate is None else digits(rate),
        "1" if own else digits(compared.speedup),
        "" if own else f"{digits(compared.low)} to {digits(compared.high)}",
        _bar(compared.speedup / fastest) + (" ?" if _is_unclear(run) else ""),
        "" if compared.peak is None else size(compared.peak),
        "" if compared.first_s is None else duration(compared.first_s * 1e6),
    )


def _is_unclear(run: Run) -> bool:
    return run.contender != EAGER and run.comparison is not None and run.comparison.verdict == "no clear difference"


def _bar(part: float) -> str:
    eighths = int(_BAR_WIDTH * 8 * min(1.0, part))
    rest = ("", "▏", "▎", "▍", "▌", "▋", "▊", "▉")[eighths % 8]
    return "█" * (eighths // 8) + rest
