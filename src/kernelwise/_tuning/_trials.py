"""Trials: candidates for kinds of layers → what is known of each: proven or not, and how fast. The second part of tuning.

A candidate is loaded, compared with what the layer needs, checked on what the model gives the layer, and only then timed on
it. What fails is out, with its reason. Every check and every timing is remembered as soon as it is done, under all that it
depends on, so that a tuning that was interrupted goes on where it was.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from kernelwise import _results, sources
from kernelwise._data import Check, Decision, Kernel, KernelRef, Plan, Target, to_json
from kernelwise._errors import KernelLoadError
from kernelwise._evidence import AND_COMPILED, Candidate, Timing
from kernelwise._measuring._measure import measure_group
from kernelwise._measuring._workload import Workload, undisturbed
from kernelwise._plan import reasons_against
from kernelwise._tuning._candidates import Kind
from kernelwise._tuning._shares import Share
from kernelwise._units import size
from kernelwise._verifying import _prove
from kernelwise._verifying._capture import capture
from kernelwise._verifying._check import Options
from kernelwise._verifying._groups import Group
from kernelwise._verifying._inputs import Sample
from kernelwise._verifying._verify import check_group, checks_within

CHECK_S = 120.0
"""How long the checks of one candidate on one kind of layer may take in all."""

BUILTIN_CHECK_S = 1.0
"""The same for a kernel that ships with its proof: what is seen here is that it holds for this model too."""

TIMING_S = 1.0
"""How long the rounds of one timing may take; clear differences end them before."""

MEMORY = 4 << 30
"""Bytes of whole inputs that are held at a time."""


@dataclass(frozen=True, slots=True)
class _Checked:
    """The checks of a kernel on a kind of layers; `done` says whether all cases were tried."""

    checks: tuple[Check, ...]
    done: bool


@dataclass(frozen=True, slots=True)
class _Timed:
    """A timing, and how many seconds its rounds were allowed."""

    timing: Timing
    seconds: float


class OutOfTimeError(Exception):
    """The time that tuning may take is over: what is not done by now is not known."""


@dataclass(slots=True)
class Trials:
    """Tries candidates, with all that they share: loaded kernels, captured inputs, one worker for each foreign kernel.

    `until` is a reading of `time.monotonic`: nothing is begun after it. `about` is what every result depends on besides
    the candidate and the layer (the machine, versions).
    """

    model: nn.Module
    target: Target
    workloads: Sequence[Workload]
    kinds: Sequence[Kind]
    prover: _prove.Prover
    about: Any
    until: float
    shares: Mapping[tuple[str, tuple[str, str, str]], Share] = field(default_factory=dict)
    device_bound: Collection[str] = ()  # the workloads that wait for the device
    _kernels: dict[tuple[KernelRef, str], Kernel | str] = field(default_factory=dict)
    _inputs: dict[tuple[str, bool], dict[str, Sample]] = field(default_factory=dict)
    _checked: dict[tuple[Any, ...], _Checked] = field(default_factory=dict)
    _shown: dict[tuple[Any, ...], set[str]] = field(default_factory=dict)

    def candidate(self, kind: Kind, ref: KernelRef) -> Candidate:
        """Try one candidate for one kind of layers.

        Raises:
            OutOfTimeError: the time is over before all is known.
        """
        self._in_time()
        kernel = self.load(ref, kind.layer.device)
        if isinstance(kernel, str):
            return Candidate(str(ref), out=kernel)
        reasons = reasons_against(kind.layer, kernel, self.target, kind.mode)
        if reasons:
            return Candidate(str(ref), out="; ".join(reasons))
        try:
            checked = self._check(kind, kernel)
        except KernelLoadError as error:  # there is no process to check it in
            return Candidate(str(ref), out=error.reason)
        checks = checked.checks
        errors = [check.ratio for check in checks if check.ratio is not None]
        found = Candidate(
            str(ref),
            out=None
            if checked.done or not _prove.needs_proof(ref)
            else f"not everything could be checked within {CHECK_S:.0f} s",
            error=max(errors, default=None),
            checks=sum(check.status == "passed" for check in checks),
        )
        failed = next((check for check in checks if check.failed), None)
        if failed is not None:
            found = replace(found, out=str(failed))
        elif found.out is None and not found.checks:
            found = replace(found, out=f"it could not be checked: {checks[0] if checks else 'there is no case for it'}")
        if found.out is not None:
            return found
        timings: list[Timing] = []
        for workload in self.workloads:
            if not self._of(kind, workload).calls:
                continue
            sample = self._samples(workload, whole=True).get(kind.layer.path) or self._one_sample(kind, workload)
            if sample is None:
                why = "what the layer is given there is too large to be held"
                return replace(found, out=f"it cannot be timed in {workload.name}: {why}")
            if _prove.needs_proof(ref):
                wrong = self._wrong_at_size(kind, kernel, sample)
                if wrong is not None:
                    return replace(found, out=f"on all that the layer is given in {workload.name}: {wrong}")
            timing = self._time(kind, kernel, workload, sample)
            if isinstance(timing, str):
                return replace(found, out=f"it cannot be timed in {workload.name}: {timing}")
            timings.append(timing)
        if checked.done and _prove.needs_proof(ref):
            self._remember(kind, kernel, checks)
        return replace(found, timings=tuple(timings))

    def load(self, ref: KernelRef, device: str) -> Kernel | str:
        """Return the loaded kernel, or why it cannot be loaded. Others' are imported in a process of their own first."""
        if (ref, device) not in self._kernels:
            try:
                loaded: Kernel | str = sources.load(
                    ref, device=device, before_import=partial(self.prover.before_import, device)
                )
            except KernelLoadError as error:
                loaded = error.reason
            self._kernels[ref, device] = loaded
        return self._kernels[ref, device]

    def _in_time(self) -> None:
        if time.monotonic() >= self.until:
            raise OutOfTimeError

    def _of(self, kind: Kind, workload: Workload) -> Share:
        return self.shares.get((workload.name, kind.key), Share())

    # ------------------------------------------------------------------------------------------------------- checking

    def _check(self, kind: Kind, kernel: Kernel) -> _Checked:
        """Check a kernel for all modes in which the layers compute the same, once; say whether all cases were tried."""
        modes = self._modes_alike(kind)
        samples = self._samples(self.workloads[0], whole=False)
        sample = samples.get(kind.layer.path)
        key = ["check", *self._key(kind, kernel), modes, looks_of(sample.arguments if sample else {})]
        known = (kernel, kind.layer.path, modes)
        if known not in self._checked:
            options = Options(compile=kind.mode.endswith(AND_COMPILED))
            self._checked[known] = self._recalled_checks(key, kind, kernel, modes, sample, options)
        return self._checked[known]

    def _modes_alike(self, kind: Kind) -> tuple[str, ...]:
        """The modes in which the layers of a kind compute what they compute in its own, compiled or not as in that one."""
        alike = [
            other
            for other in self.kinds
            if (other.layer, other.traits) == (kind.layer, kind.traits)
            and other.mode.endswith(AND_COMPILED) == kind.mode.endswith(AND_COMPILED)
            and other.layer.computes(other.mode) == kind.layer.computes(kind.mode)
        ]
        return tuple(dict.fromkeys(other.mode for other in alike)) or (kind.mode,)

    def _wrong_at_size(self, kind: Kind, kernel: Kernel, sample: Sample) -> str | None:
        """Check a kernel once on whole inputs, as it may be wrong only where there are many rows; say what is wrong."""
        cut = self._samples(self.workloads[0], whole=False).get(kind.layer.path)
        if cut is not None and looks_of(cut.arguments) == looks_of(sample.arguments):
            return None  # all of it was checked
        need, free = _needed(sample), _free_memory()
        if kind.layer.device == "cpu" and free is not None and need > free:
            return f"skipped, as float64 of it takes about {size(need)} and {size(free)} of memory is free"
        key = ["whole check", *self._key(kind, kernel), kind.mode, looks_of(sample.arguments)]
        found = self._recalled_checks(key, kind, kernel, (kind.mode,), sample, Options(as_given=True))
        if found.checks and found.checks[0].status == "passed":
            return None
        self._remember(kind, kernel, found.checks)
        return str(found.checks[0]) if found.checks else f"no result within {CHECK_S:.0f} s"

    def _recalled_checks(
        self, key: Any, kind: Kind, kernel: Kernel, modes: tuple[str, ...], sample: Sample | None, options: Options
    ) -> _Checked:
        found = _results.recall(key, _Checked) if kernel.content_hash else None
        if found is None:
            found = self._run_checks(kind, kernel, modes, sample, options)
            final = found.done or any(c.failed for c in found.checks) or not _prove.needs_proof(kernel.ref)
            if kernel.content_hash and final and not any(check.status in _PASSING for check in found.checks):
                _results.put(key, to_json(found))
        return found

    def _run_checks(
        self, kind: Kind, kernel: Kernel, modes: tuple[str, ...], sample: Sample | None, options: Options
    ) -> _Checked:
        foreign = _prove.needs_proof(kernel.ref)
        end = time.monotonic() + (CHECK_S if foreign else BUILTIN_CHECK_S)
        worker = self.prover.worker(kernel, kind.layer.device)
        found = Group(Decision(kind.layer, kind.mode, kernel, "tune"), kind.paths, modes)
        running = check_group(self.model, found, sample, options, worker)
        checks, done = checks_within(running, worker, min(end, self.until), lambda check: check.failed)
        if not done:
            self._in_time()
        return _Checked(tuple(checks), done)

    def _remember(self, kind: Kind, kernel: Kernel, checks: Sequence[Check]) -> None:
        """Let what was shown here count when the kernel is put in: as proof, or against it.

        A proof is for this mode, and for all modes together once all were shown.
        """
        alike = self._modes_alike(kind)
        shown = self._shown.setdefault((kernel, kind.layer.path, alike), set())
        shown.add(kind.mode)
        places = [replace(kind.layer, path=path, paths=(path,)) for path in kind.paths]
        all_shown = shown >= {*alike} or any(check.failed for check in checks)
        for some in {(kind.mode,), alike} if all_shown else {(kind.mode,)}:
            decisions = tuple(Decision(layer, mode, kernel, "tune") for layer in places for mode in some)
            _prove.remember(self.model, Plan(self.target, decisions), checks)

    # --------------------------------------------------------------------------------------------------------- timing

    def _time(self, kind: Kind, kernel: Kernel, workload: Workload, sample: Sample) -> Timing | str:
        share = self._of(kind, workload)
        # A compiled model is one call: how long it takes to start one compiled layer says nothing.
        hidden = workload.name in self.device_bound or kind.mode.endswith(AND_COMPILED)
        key = ["timing", *self._key(kind, kernel), kind.mode, workload.name, hidden, looks_of(sample.arguments)]
        seconds = min(TIMING_S, max(0.05, self.until - time.monotonic()))
        stored = _results.recall(key, _Timed) if kernel.content_hash else None
        if stored is not None and not (stored.timing.comparison.in_a_hurry and seconds >= 2 * stored.seconds):
            return replace(stored.timing, layer=kind.layer.path, paths=kind.paths, calls=share.calls)
        self._in_time()
        found = measure_group(
            self.model,
            kind.group(kernel),
            sample,
            kernel,
            mode=kind.mode,
            workload=workload.name,
            seconds=seconds,
            calls=share.calls,
            hide_starts=hidden,
        )
        if kernel.content_hash and isinstance(found, Timing):
            _results.put(key, to_json(_Timed(found, seconds)))
        return found

    def _key(self, kind: Kind, kernel: Kernel) -> list[Any]:
        layer = kind.layer
        return [
            str(kernel.ref),
            kernel.content_hash,
            self.about,
            [layer.class_name, layer.function, layer.device, list(layer.dtypes), to_json(layer.signature)],
            to_json(layer.computes(kind.mode)),
            kind.traits,
        ]

    def _samples(self, workload: Workload, *, whole: bool) -> dict[str, Sample]:
        """Capture what all kinds are given in a workload: whole tensors for timing, some rows of each for checking."""
        known = self._inputs.get((workload.name, whole))
        if known is None:
            if whole:  # those of one workload at a time
                self._inputs = {key: value for key, value in self._inputs.items() if not key[1]}
            known = self._capture(workload, list(self.kinds), whole)
            self._inputs[workload.name, whole] = known
        return known

    def _one_sample(self, kind: Kind, workload: Workload) -> Sample | None:
        """Capture one kind alone, where all together are too large."""
        return self._capture(workload, [kind], True).get(kind.layer.path)

    def _capture(self, workload: Workload, kinds: Sequence[Kind], whole: bool) -> dict[str, Sample]:
        groups = [kind.group() for kind in kinds]
        with undisturbed(self.model, training=workload.training):
            given = step_inputs(self.model, workload) if workload.name == "decode" and whole else workload.inputs
            if whole:
                return capture(self.model, groups, given, memory=MEMORY, rows=None)
            return capture(self.model, groups, given)


_PASSING = ("timed_out", "out_of_memory")
"""What a busy or full machine does to any kernel: it says nothing about the next time."""


def _needed(sample: Sample) -> int:
    """About how many bytes it takes to compute a layer in float64: what it is given, its weights, gradients, results."""
    tensors = [leaf for leaf in tree_leaves(sample.arguments) if isinstance(leaf, torch.Tensor)]
    tensors += [] if sample.module is None else sample.module.parameters()
    return 4 * 8 * sum(tensor.numel() for tensor in tensors)


def _free_memory() -> int | None:
    """Bytes that this machine has left; None where it does not tell."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError, ValueError):
        return None


def looks_of(arguments: Mapping[str, Any]) -> list[Any]:
    """Say what the time of a call depends on, of what it is given: shapes, strides and dtypes, as plain data."""
    return [
        [
            name,
            [
                [list(t.shape), list(t.stride()), str(t.dtype)]
                for t in tree_leaves(value)
                if isinstance(t, torch.Tensor)
            ],
        ]
        for name, value in sorted(arguments.items())
    ]


@torch.no_grad()
def step_inputs(model: nn.Module, workload: Workload) -> dict[str, Any]:
    """Return what the model is called with for the first token after the prompt of a "decode" workload."""
    assert isinstance(workload.inputs, Mapping)
    given = dict(workload.inputs)
    found = model(**given)
    name = next(name for name in ("past_key_values", "cache_params") if getattr(found, name, None) is not None)
    step = {"input_ids": given["input_ids"][:, :1].contiguous(), "use_cache": True, name: getattr(found, name)}
    mask = given.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.dim() == 2:
        step["attention_mask"] = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return step
