"""Prove: a plan → the same plan without the kernels that are wrong. The step between plan and apply.

Builtin kernels ship with their proof. Any other is checked before it goes in, on inputs made for its layer, and a proof is
remembered in the user's cache: by the hash of the kernel's files, the versions of the libraries, and the layer.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kernelwise._cache import cache_directory
from kernelwise._capture import Group, group, module_of
from kernelwise._data import Check, Decision, Kernel, Plan, to_json
from kernelwise._errors import PlanError
from kernelwise._verify import Options, check_group

SECONDS = 120.0
"""How long the checks of one kernel on one kind of layer may take in all. What passed until then is the proof."""


def prove(model: nn.Module, plan: Plan, *, on_miss: str) -> Plan:
    """Check every kernel of a plan that is not builtin and not proven yet; return the plan without those that failed.

    Raises:
        PlanError: a kernel that the user asked for failed, and `on_miss` is "raise". The model is untouched.
    """
    refuted: dict[tuple[Kernel, str], str] = {}
    for found in group(model, plan):
        kernel = found.decision.kernel
        if kernel is None or kernel.ref.scheme == "builtin" or kernel.function is None:
            continue
        file = _file_of(model, found, kernel)
        if file is not None and file.is_file():
            continue
        checks = _check(model, found)
        problem = next((check for check in checks if check.failed), None)
        if problem is None and any(check.status == "passed" for check in checks):
            if file is not None:
                _remember(file, checks)
            continue
        problem = problem or checks[0]
        refuted |= {(kernel, path): f"it was checked and is not proven: {problem}" for path in found.paths}
    decisions = [_without_refuted(decision, refuted) for decision in plan.decisions]
    lost = [
        d for d, before in zip(decisions, plan.decisions, strict=True) if d is not before and d.asked_by != "default"
    ]
    if lost and on_miss == "raise":
        raise PlanError(_explain(lost))
    return replace(plan, decisions=tuple(decisions))


def _check(model: nn.Module, found: Group) -> list[Check]:
    """Check until the first failure or until the time is up."""
    checks: list[Check] = []
    end = time.monotonic() + SECONDS
    running = check_group(model, found, None, Options())
    for check in running:
        checks.append(check)
        if check.failed or time.monotonic() > end:
            break
    running.close()
    return checks


def _without_refuted(decision: Decision, refuted: dict[tuple[Kernel, str], str]) -> Decision:
    if decision.kernel is None or (decision.kernel, decision.layer.path) not in refuted:
        return decision
    reason = refuted[decision.kernel, decision.layer.path]
    rejected = (*decision.rejected, (str(decision.kernel.ref), (reason,)))
    return replace(decision, kernel=None, reason=reason, rejected=rejected)


def _explain(lost: list[Decision]) -> str:
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
            '  go on      kernelwise.verify shows all checks; on_miss="keep" leaves it out, verify=False takes your word',
        ]
    )


def _file_of(model: nn.Module, found: Group, kernel: Kernel) -> Path | None:
    """The file that holds the proof of a kernel for a layer; None for a kernel whose content is not known."""
    if kernel.content_hash is None:
        return None
    layer, module = found.decision.layer, module_of(model, found.decision.layer)
    shapes = [] if layer.function else [(n, list(p.shape), str(p.dtype)) for n, p in module.named_parameters()]
    identity: list[Any] = [
        kernel.content_hash,
        str(kernel.ref),
        _versions(),
        [layer.class_name, layer.function, layer.device, list(layer.dtypes), to_json(layer.signature)],
        to_json(layer.computes(found.decision.mode)),
        shapes,
    ]
    name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return cache_directory() / "proofs" / f"{name}.json"


def _versions() -> list[str]:
    found = [f"python {sys.version_info.major}.{sys.version_info.minor}", f"torch {torch.__version__}"]
    for package in ("kernelwise", "triton", "transformers"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return found


def _remember(file: Path, checks: list[Check]) -> None:
    """Write a proof, whole or not at all. A cache that cannot be written costs the next run its time and nothing else."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(to_json(checks)))
        partial.replace(file)
    except OSError:
        pass
