"""A proof on disk speaks for one combination of kernel, libraries, machine and layer: whatever changes, it is not found."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import checking  # noqa: F401  (names the layers of the gallery)
import gallery
import pytest
import torch
from torch import nn

import kernelwise as kw
from kernelwise._data import Kernel, KernelRef, Limits, Parameter, Plan, Target
from kernelwise._verifying import _prove
from kernelwise.sources._layer_class import kernel_of

KERNEL = kernel_of(KernelRef("path", "/gallery", "Good"), gallery.Good, limits=Limits(), content_hash="a" * 64)


def planned(model: nn.Module, kernel: Kernel, modes: tuple[str, ...] = ("inference", "training")) -> Plan:
    found = {decision.mode: decision for decision in kw.plan(model).decisions}
    return Plan(Target("cpu"), tuple(replace(found[mode], kernel=kernel) for mode in modes))


def norm(**options: Any) -> nn.Module:
    return nn.Sequential(gallery.Norm(**options)).eval()


def name_of(model: nn.Module, plan: Plan) -> str:
    (kind,) = _prove._kinds(model, plan)
    file = _prove._proof_file(kind, plan)
    assert file is not None
    return file.name


def of_layers(plan: Plan, **changes: Any) -> Plan:
    return replace(plan, decisions=tuple(replace(d, layer=replace(d.layer, **changes)) for d in plan.decisions))


def of_options(plan: Plan) -> Plan:
    found = plan.decisions[0].layer.recognition
    other = replace(found, options=tuple((name, 1.0 if name == "offset" else value) for name, value in found.options))
    assert other != found
    return of_layers(plan, recognition=other, recognition_in_training=other)


class OtherCode(gallery.Norm):
    def forward(self, hidden_states):
        return super().forward(hidden_states) + 0


OtherCode.__qualname__, OtherCode.__module__ = gallery.Norm.__qualname__, gallery.Norm.__module__

CHANGES: dict[str, Callable[[], str]] = {
    "content hash": lambda: name_of(model := norm(), planned(model, replace(KERNEL, content_hash="b" * 64))),
    "reference": lambda: name_of(
        model := norm(), planned(model, replace(KERNEL, ref=replace(KERNEL.ref, layer="Other")))
    ),
    "architecture": lambda: name_of(model := norm(), replace(planned(model, KERNEL), target=Target("cpu", "sm_90"))),
    "signature": lambda: name_of(
        model := norm(), of_layers(planned(model, KERNEL), signature=(Parameter("x", "positional_or_keyword"),))
    ),
    "options of the operation": lambda: name_of(model := norm(), of_options(planned(model, KERNEL))),
    "dtypes": lambda: name_of(model := norm(), of_layers(planned(model, KERNEL), dtypes=("bfloat16",))),
    "device": lambda: name_of(model := norm(), of_layers(planned(model, KERNEL), device="cuda")),
    "traits: a number that is read": lambda: name_of(model := norm(eps=1e-5), planned(model, KERNEL)),
    "traits: a shape": lambda: name_of(model := norm(width=64), planned(model, KERNEL)),
    "traits: the code": lambda: name_of(model := nn.Sequential(OtherCode()).eval(), planned_like(model)),
    "training": lambda: name_of(model := norm(), planned(model, KERNEL, modes=("inference",))),
}


def planned_like(model: nn.Module) -> Plan:
    """The plan of the usual layer, for a model whose layer has other code and everything else alike."""
    return planned(norm(), KERNEL)


@pytest.fixture(autouse=True)
def versions_asked_anew():
    yield
    _prove._versions.cache_clear()
    _prove._processor.cache_clear()


def usual() -> str:
    _prove._versions.cache_clear()
    _prove._processor.cache_clear()
    model = norm()
    return name_of(model, planned(model, KERNEL))


@pytest.mark.parametrize("changed", CHANGES)
def test_another_kernel_or_layer_is_another_proof(changed):
    assert usual() == usual()
    assert CHANGES[changed]() != usual()


@pytest.mark.parametrize("package", ["kernelwise", "triton", "transformers"])
def test_another_version_is_another_proof(package, monkeypatch):
    before = usual()
    real = _prove.version
    monkeypatch.setattr(_prove, "version", lambda name: "99.0" if name == package else real(name))
    assert usual() != before


def test_another_torch_python_or_processor_is_another_proof(monkeypatch):
    found = {usual()}
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "99.0")
        found.add(usual())
    with monkeypatch.context() as patch:
        patch.setattr(_prove.sys, "version_info", type("Info", (), {"major": 3, "minor": 99})())
        found.add(usual())
    with monkeypatch.context() as patch:
        patch.setattr(_prove.platform, "machine", lambda: "another")
        found.add(usual())
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "another")
        found.add(usual())
    assert len(found) == 5


def test_a_kernel_without_a_content_hash_is_never_remembered_on_disk():
    model = norm()
    plan = planned(model, replace(KERNEL, content_hash=None))
    (kind,) = _prove._kinds(model, plan)
    assert _prove._proof_file(kind, plan) is None


def test_a_proof_under_another_name_is_not_found(tmp_path: Path, monkeypatch):
    """What the names are for: the file of one combination proves nothing for the next."""
    monkeypatch.setenv("KERNELWISE_CACHE", str(tmp_path))
    monkeypatch.setattr(_prove, "_remembered", {})
    model = norm()
    plan = planned(model, KERNEL)
    passed = {"layer": "0", "paths": ["0"], "kernel": str(KERNEL.ref), "modes": ["inference"], "case": "as given"}
    file = tmp_path / "proofs" / name_of(model, plan)
    file.parent.mkdir()
    file.write_text(json.dumps([{**passed, "status": "passed"}]))
    assert dict(_prove.recall(model, plan).proofs) == {str(KERNEL.ref): "proven"}
    other = norm(eps=1e-5)
    assert dict(_prove.recall(other, planned(other, KERNEL)).proofs) == {str(KERNEL.ref): "unproven (apply)"}
