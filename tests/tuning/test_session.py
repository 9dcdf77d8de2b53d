"""Before anything is measured: what results depend on, the order of what is tried, and the time that is set aside."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace

import pytest
import torch
from planted import Model, SleepyNorm, X
from torch import nn

import kernelwise as kw
from kernelwise._errors import PlanError
from kernelwise._reference import read_reference
from kernelwise._tuning import _session, _tune

pytestmark = pytest.mark.usefixtures("few_sizes", "one_cache")


def begin(model: nn.Module) -> _session.Session:
    request = _session.Request("latency", None, kw.KernelConfig(), (), (), 16, 10, False, 60, None)
    return _session.begin(model, X, request, lambda what, part: None)


def test_what_runs_depend_on_is_part_of_what_results_stand_under(monkeypatch):
    def about(model: nn.Module) -> str:
        return json.dumps(begin(model).about)

    model = Model().eval()
    torch.set_float32_matmul_precision("highest")
    first = about(model)
    assert about(Model().eval()) == first
    with torch.autocast("cpu", torch.bfloat16):
        assert about(model) != first
    torch.set_float32_matmul_precision("medium")
    try:
        assert about(model) != first
    finally:
        torch.set_float32_matmul_precision("highest")
    torch.use_deterministic_algorithms(True)
    try:
        assert about(model) != first
    finally:
        torch.use_deterministic_algorithms(False)
    assert about(model) == first
    model.head.weight.requires_grad_(False)
    frozen = about(model)
    assert frozen != first
    hook = model.head.register_forward_hook(lambda module, args, output: None)
    assert about(model) not in (first, frozen)
    hook.remove()
    assert about(model) == frozen
    forward = model.head.forward
    model.head.forward = lambda x: forward(x)  # type: ignore[method-assign]
    assert about(model) != frozen


def test_a_model_is_tuned_on_its_own_device_and_no_other(monkeypatch):
    seen: list[str] = []
    monkeypatch.setattr(_session, "place", lambda model: "cuda:1")
    monkeypatch.setattr(_session, "environment", lambda device: (seen.append(device), ())[1])
    monkeypatch.setattr(_session, "on_device", lambda device: (seen.append(device), contextlib.nullcontext())[1])
    session = begin(Model().eval())
    assert session.device == "cuda:1"
    assert seen == ["cuda:1", "cuda:1"]
    monkeypatch.undo()
    assert _session.place(Model()) == "cpu"
    assert _session.place(nn.ReLU()) == "cpu"
    spread = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    with pytest.raises(PlanError, match="spread over cpu, meta"):
        _session.place(spread)


def test_quick_candidates_have_their_turn_first():
    refs = ["builtin:inductor:RMSNorm", "org/repo@v1:Norm", "builtin:torch:RMSNorm", "builtin:RMSNorm", "/a:Norm"]
    found = [ref for text in refs if (ref := read_reference(text)[0]) is not None]
    eager = begin(Model().eval()).kinds[0]
    compiled = replace(eager, mode="inference+compile")
    order = sorted(((kind, ref) for ref in found for kind in (compiled, eager)), key=_tune._turn)
    names = [(str(ref), kind.mode.endswith("+compile")) for kind, ref in order]
    in_turn = [(3, False), (3, True), (2, False), (2, True), (1, False), (4, False), (1, True), (4, True)]
    assert names == [(refs[number], late) for number, late in (*in_turn, (0, False), (0, True))]


def test_time_for_compiling_the_model_is_set_aside(monkeypatch):
    session = begin(Model().eval())
    assert _tune._to_compile(session) == 0
    session.request = replace(session.request, compile=True, seconds=300)
    monkeypatch.setattr(_tune, "compile_seconds", lambda model, workload: 20.0)
    assert _tune._to_compile(session) == 40  # with its own code, and with what was chosen
    session.request = replace(session.request, seconds=60)
    assert _tune._to_compile(session) == 36


def test_notes_say_for_which_mode_layers_were_not_tuned():
    model = nn.Sequential(SleepyNorm(), nn.GELU()).train()
    kinds = _session.kinds_of(model, kw.discover(model), ("inference", "training"))
    gelu = [kind for kind in kinds if kind.layer.name == "GeLU"]
    assert _tune._listed(gelu) == "1 (inference, training)"
    assert _tune._listed(gelu[:1]) == "1 (inference)"
