"""Prove: a plan → the same plan without the kernels that are not proven. The step between plan and apply.

Nothing goes in unproven unless the user says so. Builtin kernels ship with their proof: the tests of Kernelwise hold each
to the accuracy rule, and the content hash says which files that were. Any other kernel is first imported in the worker, and
then checked there on inputs made for its layer. What was proven is remembered in the user's cache: by the content of the
kernel, the versions of the libraries, the machine, and the layer's signature. A look-up costs less than a microsecond for
each layer, because layers alike share one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kernelwise import _results
from kernelwise._alike import function_code, traits_of
from kernelwise._cache import cache_directory
from kernelwise._data import Check, Decision, Kernel, KernelRef, Plan, Recognition, from_json, to_json
from kernelwise._errors import KernelLoadError, PlanError
from kernelwise._verifying._check import AT_DEFAULTS, Options, own_code
from kernelwise._verifying._groups import Group
from kernelwise._verifying._verify import check_group, checks_within
from kernelwise._verifying._worker import MEMORY, Worker, WorkerError, WorkerStartError
from kernelwise._verifying._worker import SECONDS as LIMIT

SECONDS = 120.0
"""How long the checks of one kernel on one kind of layer may take in all; what is not done by then is not proven."""

PROVEN = "proven"
ON_TRUST = "unproven (verify=False)"
NOT_ASKED = "unproven (apply)"

_log = logging.getLogger("kernelwise")
_remembered: dict[tuple[Any, ...], str | None] = {}
"""What this process knows, by `_Kind.key`: None for proven, or why not. Answers that disk has too are only read once."""


class ImportFailedError(KernelLoadError):
    """A kernel's import ended the process that tried it. `status` says how, as in a check."""

    def __init__(self, ref: KernelRef, error: WorkerError) -> None:
        reason = f"its import was tried in another process first: {error.status}: {error.detail}"
        super().__init__(str(ref), reason, fix="name another kernel; verify=False imports it here all the same")
        self.kernel, self.status, self.detail = str(ref), error.status, error.detail

    @property
    def check(self) -> Check:
        """The same as evidence."""
        return Check("", (), self.kernel, ("inference", "training"), "import", self.status, self.detail)


@dataclass(frozen=True, slots=True)
class _Kind:
    """A kernel and a kind of layer: what one proof speaks for. `traits` are what `_alike.traits_of` returned.

    `training` says for which of inference (False) and training (True): a kernel may ask for `self.training`.
    """

    key: tuple[Any, ...]
    traits: tuple[Any, ...]
    training: tuple[bool, ...]
    decisions: list[Decision]


class Prover:
    """Tries imports and proves plans, with one worker for each kernel. Use it as a context manager.

    `seconds` and `memory` (bytes) limit each request of a worker: an import, or a case.
    """

    def __init__(self, *, seconds: float = LIMIT, memory: int = MEMORY) -> None:
        self._seconds, self._memory = seconds, memory
        self._stack = ExitStack()
        self._workers: dict[tuple[KernelRef, str], Worker] = {}

    def __enter__(self) -> Prover:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def before_import(self, device: str, kernel: Kernel, content: str) -> None:
        """Import a kernel in its worker, unless that has gone well on this machine before. A `sources.BeforeImport`.

        Raises:
            ImportFailedError: the worker did not survive, or the import changes a setting of the process. A mere exception is
                left to the import here, which explains it. WorkerStartError: there is no worker.
        """
        file = _file("imports", [str(kernel.ref), kernel.revision, device, content, *_versions(())])
        if content and file.is_file():
            return
        try:
            self.worker(kernel, device).start()
        except WorkerError as error:
            if error.status != "load_failed":
                raise ImportFailedError(kernel.ref, error) from error
            return
        if content:
            _write(file, {"kernel": str(kernel.ref)})

    def worker(self, kernel: Kernel, device: str) -> Worker:
        """Return the worker of a kernel, which need not have started yet."""
        known = self._workers.get((kernel.ref, device))
        if known is None:
            known = self._stack.enter_context(Worker(kernel, device, seconds=self._seconds, memory=self._memory))
            self._workers[kernel.ref, device] = known
        known.kernel = kernel  # before its import only the reference was known
        return known

    def prove(self, model: nn.Module, plan: Plan, *, on_miss: str) -> Plan:
        """Check what is not builtin and not proven yet; return the plan without the kernels that are not proven then.

        Raises:
            PlanError: a kernel that the user asked for is not proven, and `on_miss` is "raise". The model is untouched.
        """
        refuted: dict[int, str] = {}
        for kind in _kinds(model, plan):
            reason = self._reason_against(model, kind, plan)
            if reason is not None:
                refuted |= {id(decision): reason for decision in kind.decisions}
        if not refuted:
            return _with_proofs(plan, PROVEN)
        lost = [_without(d, refuted[id(d)]) for d in plan.decisions if id(d) in refuted and d.asked_by != "default"]
        if lost and on_miss == "raise":
            raise PlanError(_explain(lost))
        decisions = [_without(d, refuted[id(d)]) if id(d) in refuted else d for d in plan.decisions]
        return _with_proofs(replace(plan, decisions=tuple(decisions)), PROVEN)

    def _reason_against(self, model: nn.Module, kind: _Kind, plan: Plan) -> str | None:
        """Return why a kernel is not proven for a kind of layer, or None. Asks memory, then disk, then the worker."""
        if kind.key not in _remembered:
            file = _proof_file(kind, plan)
            known = _read(file)
            if _is_wrong(known):
                _remembered[kind.key] = _judge(known, done=True)
            elif _judge(known, done=True) is not None:
                try:
                    checks, done = self._check(model, kind)
                except WorkerStartError as error:
                    return f"it is not proven: {error.reason}"
                reason = _judge(checks, done=done)
                if reason is not None and not _is_definite(checks):
                    return reason
                if reason is None and file is not None:
                    _write(file, to_json(checks))
                _remembered[kind.key] = reason
            else:
                _remembered[kind.key] = None
        return _remembered[kind.key]

    def _check(self, model: nn.Module, kind: _Kind) -> tuple[list[Check], bool]:
        """Check until the first failure or until the time is up; say whether everything was checked."""
        decisions = kind.decisions
        kernel, layer = decisions[0].kernel, decisions[0].layer
        assert kernel is not None
        paths = tuple(dict.fromkeys(decision.layer.path for decision in decisions))
        found = Group(decisions[0], paths, tuple(dict.fromkeys(decision.mode for decision in decisions)))
        _log.info("checking %s on %s (%s), once on this machine", kernel.ref, layer.path, layer.class_name)
        end = time.monotonic() + SECONDS
        worker = self.worker(kernel, layer.device)
        running = check_group(model, found, None, Options(), worker)
        return checks_within(running, worker, end, lambda check: check.failed or bool(_left_at_defaults([check])))


def needs_proof(ref: KernelRef) -> bool:
    """Return whether a kernel must be proven on this machine: others' kernels, and what is compiled here."""
    return ref.scheme != "builtin" or ref.location == "inductor"


def on_trust(plan: Plan) -> Plan:
    """Return a plan that says that nobody has asked for proofs."""
    return _with_proofs(plan, ON_TRUST)


def recall(model: nn.Module, plan: Plan) -> Plan:
    """Return a plan that says which of its kernels are proven on this machine. Checks nothing.

    A plan for another model is returned as it is: what applies it says what does not fit.
    """
    unproven = set()
    try:
        kinds = _kinds(model, plan)
    except (AttributeError, KeyError):
        return plan
    for kind in kinds:
        if kind.key not in _remembered:
            if _judge(_read(_proof_file(kind, plan)), done=True) is not None:
                unproven.add(_ref(kind))
                continue
            _remembered[kind.key] = None
        if _remembered[kind.key] is not None:
            unproven.add(_ref(kind))
    return _with_proofs(plan, PROVEN, but=dict.fromkeys(unproven, NOT_ASKED))


def remember(model: nn.Module, plan: Plan, checks: Sequence[Check]) -> None:
    """Take the checks of a whole plan for proofs, so that what `verify` has shown need not be shown again.

    A kernel that they show to be wrong loses the proof that it had, for inputs of the model may show what made ones do not.
    """
    for kind in _kinds(model, plan):
        paths = {decision.layer.path for decision in kind.decisions}
        about = [check for check in checks if check.kernel == _ref(kind) and paths & set(check.paths)]
        spoken_for = {path for check in about if check.status == "passed" for path in check.paths}
        reason = _judge(about, done=True)
        if _is_wrong(about) or (paths <= spoken_for and reason is None):
            _remembered[kind.key] = reason
            file = _proof_file(kind, plan)
            if file is not None:
                _write(file, to_json(about))


def _judge(checks: Sequence[Check], *, done: bool) -> str | None:
    """Return why checks are no proof, or None where they are."""
    problem = next((check for check in checks if check.failed), None)
    if problem is not None:
        return f"it is not proven: {problem}"
    if left := _left_at_defaults(checks):
        return f"it is not proven: {left}, as its inputs were made; inputs of the model say what the layer is given"
    passed = sum(check.status == "passed" for check in checks)
    if not done:
        return f"it is not proven: not everything could be checked within {SECONDS:.0f} s ({passed} cases passed)"
    if not passed:
        return f"it is not proven, for it could not be checked: {checks[0] if checks else 'there is no case for it'}"
    return None


def _left_at_defaults(checks: Sequence[Check]) -> str:
    return next((mark for check in checks for mark in check.marks if mark.startswith(AT_DEFAULTS)), "")


def _is_definite(checks: Sequence[Check]) -> bool:
    """Return whether checks refute a kernel for good: a machine that was busy or full says nothing about the next time."""
    return any(check.failed and check.status not in ("timed_out", "out_of_memory") for check in checks)


def _is_wrong(checks: Sequence[Check]) -> bool:
    """Return whether a kernel gave something else than its layer, on whatever machine: that is worth remembering."""
    return any(check.status.startswith("wrong_") or check.status in _WRONG for check in checks)


_WRONG = ("missing_gradient", "non_finite", "not_written")


# -------------------------------------------------------------------------------------------------------------- kinds


def _kinds(model: nn.Module, plan: Plan) -> list[_Kind]:
    """Group the decisions whose kernels are not builtin by everything that a proof depends on.

    Values that `discover` and `plan` share between layers stand by their identity, and what is alike mostly comes in a row:
    a layer costs one or two microseconds, of which reading its shape is the most.
    """
    children: dict[str, dict[str, nn.Module | None]] = {}
    codes: dict[tuple[str, str], tuple[Any, ...]] = {}
    classes: dict[Any, str] = {}
    alike: dict[tuple[Any, ...], list[Decision]] = {}
    kernel: Kernel | None = None
    computes: Recognition | None = None
    read: tuple[str, ...] | None = None
    asks = False
    last: tuple[Any, ...] = ()
    current: list[Decision] = []
    for decision in plan.decisions:
        layer, found = decision.layer, decision.layer.recognition
        if found is not layer.recognition_in_training and decision.mode.startswith("training"):
            found = layer.recognition_in_training
        if decision.kernel is not kernel or found is not computes:
            kernel, computes = decision.kernel, found
            asks = kernel is not None and needs_proof(kernel.ref) and kernel.function is not None
            read = _names_read(kernel, computes) if kernel is not None and asks else None
        if not asks:
            continue
        above, _, name = layer.path.rpartition(".")
        if layer.function is not None:
            traits = codes.get((above, layer.function))
            if traits is None:
                own = own_code(model.get_submodule(above), layer)
                traits = codes[above, layer.function] = (function_code(own),)
        else:
            siblings = children.get(above)
            if siblings is None:
                siblings = children[above] = model.get_submodule(above)._modules
            traits = traits_of(siblings[name] if name else model, read, classes)
        key = (
            traits,
            layer.class_name,
            layer.function,
            layer.device,
            layer.dtypes,
            id(layer.signature),
            id(kernel),
            id(computes),
        )
        if key != last:
            last, current = key, alike.setdefault(key, [])
        current.append(decision)
    return [_kind(decisions, key[0]) for key, decisions in alike.items()]


def _names_read(kernel: Kernel, computes: Recognition | None) -> tuple[str, ...] | None:
    """The attributes that decide what a layer and its kernel compute; None where the layer is not recognised: all may.

    A kernel need not read what its layer reads: with a fixed epsilon it is right for one layer and wrong for the next.
    """
    if computes is None:
        return None
    names = {str(binding.value) for _, binding in computes.roles if binding.kind == "attribute"}
    return tuple(sorted(names.union(computes.depends, kernel.reads if kernel.op is None else ())))


def _kind(decisions: list[Decision], traits: tuple[Any, ...]) -> _Kind:
    decision = decisions[0]
    layer, kernel = decision.layer, decision.kernel
    assert kernel is not None
    training = tuple(sorted({mode.startswith("training") for mode in {decision.mode for decision in decisions}}))
    key = (
        kernel,
        kernel.content_hash or id(kernel.function),
        layer.computes(decision.mode),
        layer.class_name,
        layer.function,
        layer.device,
        layer.dtypes,
        layer.signature,
        traits,
        training,
    )
    return _Kind(key, traits, training, decisions)


def _ref(kind: _Kind) -> str:
    kernel = kind.decisions[0].kernel
    assert kernel is not None
    return str(kernel.ref)


# -------------------------------------------------------------------------------------------------------------- words


def _with_proofs(plan: Plan, proof: str, *, but: dict[str, str] | None = None) -> Plan:
    kernels = {id(d.kernel): d.kernel for d in plan.decisions if d.kernel is not None}
    refs = sorted({str(kernel.ref) for kernel in kernels.values() if needs_proof(kernel.ref)})
    return replace(plan, proofs=tuple((ref, (but or {}).get(ref, proof)) for ref in refs)) if refs else plan


def _without(decision: Decision, reason: str) -> Decision:
    assert decision.kernel is not None
    rejected = (*decision.rejected, (str(decision.kernel.ref), (reason,)))
    return replace(decision, kernel=None, reason=reason, rejected=rejected)


def _explain(lost: Sequence[Decision]) -> str:
    by_reason: dict[tuple[str, str], list[str]] = {}
    for decision in lost:
        by_reason.setdefault((decision.rejected[-1][0], decision.reason or ""), []).append(decision.layer.path)
    lines = []
    for (ref, reason), found in by_reason.items():
        paths = list(dict.fromkeys(found))
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        lines += [f"{ref} is not put into {paths[0]}{more}", f"  tried      {reason}"]
    asked = ", ".join(dict.fromkeys(decision.asked_by for decision in lost))
    return "\n".join(
        [
            *lines,
            f"  asked by   {asked}",
            "  go on      kernelwise.verify(model, plan, inputs) shows all checks, takes its time, and what it proves counts\n"
            '             here; on_miss="keep" leaves the layer its own code; verify=False puts the kernel in unproven',
        ]
    )


# --------------------------------------------------------------------------------------------------------------- disk


def _proof_file(kind: _Kind, plan: Plan) -> Path | None:
    """The file that holds the proof for a kind; None for a kernel whose content is not known."""
    decision = kind.decisions[0]
    kernel, layer = decision.kernel, decision.layer
    assert kernel is not None
    if kernel.content_hash is None:
        return None
    return _file(
        "proofs",
        [
            kernel.content_hash,
            str(kernel.ref),
            *_versions(kernel.limits.requires),
            plan.target.arch or _processor(),
            [layer.class_name, layer.function, layer.device, list(layer.dtypes), to_json(layer.signature)],
            to_json(layer.computes(decision.mode)),
            kind.traits,
            kind.training,
        ],
    )


def _read(file: Path | None) -> list[Check]:
    """Return the checks that a file holds, if it holds any, and not what a full disk or another program has left of them."""
    try:
        return [] if file is None else [from_json(Check, check) for check in json.loads(file.read_text())]
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return []


def _file(folder: str, identity: list[Any]) -> Path:
    name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return cache_directory() / folder / f"{name}.json"


@lru_cache(maxsize=1)
def _processor() -> str:
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


@lru_cache(maxsize=64)
def _versions(requires: tuple[str, ...]) -> tuple[str, ...]:
    found = [f"python {sys.version_info.major}.{sys.version_info.minor}", f"torch {torch.__version__}"]
    distributions = packages_distributions() if requires else {}  # what is imported may be installed under another name
    names = [name for required in requires for name in distributions.get(required, [required])]
    for package in ("kernelwise", "triton", "transformers", *names):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:  # it has no version; the hash of its files is in the key
            continue
    return tuple(found)


def _write(file: Path, data: Any) -> None:
    """Write a file, whole or not at all. A cache that cannot be written costs the next run its time and nothing else."""
    with suppress(OSError):
        _results.write(file, data)
