"""Kernels that take the process with them: each becomes a status, and this process goes on."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import gallery
import pytest
import torch
from checking import checks_of, decision
from torch import nn

import kernelwise as kw
from kernelwise._data import KernelRef
from kernelwise._process import settings
from kernelwise._verifying import _worker
from kernelwise._verifying._check import Options
from kernelwise._verifying._description import describe, rebuild
from kernelwise._verifying._worker import Worker, WorkerStartError
from kernelwise.sources import load

LAYERS = """
import ctypes, os, sys, threading, time
import torch
from torch import nn


def norm(x, weight, eps):
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


class Loud(nn.Module):
    def forward(self, hidden_states):
        print("o" * 3_000_000)
        print("e" * 3_000_000, file=sys.stderr)
        os.write(1, b"raw" * 100_000)
        return norm(hidden_states, self.weight, self.variance_epsilon)


class ReadsInput(nn.Module):
    def forward(self, hidden_states):
        sys.stdin.read()
        return norm(hidden_states, self.weight, self.variance_epsilon)


class Segfaults(nn.Module):
    def forward(self, hidden_states):
        ctypes.string_at(0)


class Aborts(nn.Module):
    def forward(self, hidden_states):
        print("the last words")
        sys.stdout.flush()
        os.abort()


class Exits(nn.Module):
    def forward(self, hidden_states):
        os._exit(0)


class SysExits(nn.Module):
    def forward(self, hidden_states):
        sys.exit(3)


class Hangs(nn.Module):
    def forward(self, hidden_states):
        while True:
            pass


class HangsInC(nn.Module):
    def forward(self, hidden_states):
        ctypes.PyDLL(None).sleep(1000)


class Hogs(nn.Module):
    def forward(self, hidden_states):
        kept = []
        while True:
            kept.append(torch.ones(4 << 20))


class AsksForEverything(nn.Module):
    def forward(self, hidden_states):
        return torch.ones(1 << 42)


class Unpicklable(nn.Module):
    def forward(self, hidden_states):
        class Odd(Exception):
            def __init__(self):
                self.lock = threading.Lock()

            def __str__(self):
                raise ValueError("no message")

        raise Odd


class Forks(nn.Module):
    # The copy of the process would answer and take requests too.

    def forward(self, hidden_states):
        os.fork()
        return norm(hidden_states, self.weight, self.variance_epsilon)


class LeavesAChildAndExits(nn.Module):
    # The child holds the channel open after its parent has gone.

    def forward(self, hidden_states):
        if os.fork() == 0:
            time.sleep(1000)
        os._exit(7)


class LeavesAChild(nn.Module):
    def forward(self, hidden_states):
        if os.fork() == 0:
            while True:
                time.sleep(1)
        return norm(hidden_states, self.weight, self.variance_epsilon)


class GivesFarTooMuch(nn.Module):
    def forward(self, hidden_states):
        return hidden_states.new_zeros(120 << 18)


class SegfaultsInBackward(nn.Module):
    def forward(self, hidden_states):
        y = norm(hidden_states, self.weight, self.variance_epsilon)
        if y.requires_grad:
            y.register_hook(lambda grad: ctypes.string_at(0))
        return y
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    variant = tmp_path_factory.mktemp("deadly") / "build" / "torch-universal"
    variant.mkdir(parents=True)
    metadata = {"name": "deadly", "id": "deadly", "version": 1, "license": "MIT", "python-depends": []}
    (variant / "metadata.json").write_text(json.dumps(metadata | {"backend": {"type": "cpu"}}))
    (variant / "__init__.py").write_text("from . import layers\n")
    (variant / "layers.py").write_text(LAYERS)
    return variant.parents[1]


def run(repository: Path, name: str, **limits) -> list:
    kernel = load(KernelRef("path", str(repository), name), device="cpu")
    decided, module = decision(gallery.Norm(), kernel)
    return list(checks_of(decided, module, options=Options(**limits)))


@pytest.mark.parametrize(
    ("name", "status", "said"),
    [
        ("Segfaults", "crashed", "SIGSEGV"),
        pytest.param("Aborts", "crashed", "SIGABRT; it printed: the last words", marks=pytest.mark.long),
        ("Exits", "exited", "exit code 0"),
        ("LeavesAChildAndExits", "exited", "exit code 7"),
        ("Hangs", "timed_out", "no answer after 1 s"),
        pytest.param("HangsInC", "timed_out", "no answer after 1 s", marks=pytest.mark.long),
        ("Hogs", "out_of_memory", ""),
        pytest.param("SegfaultsInBackward", "crashed", "SIGSEGV", marks=pytest.mark.long),
    ],
)
def test_a_kernel_that_ends_its_process_is_a_status(name, status, said, repository):
    start = time.monotonic()
    (check,) = run(repository, name, seconds=1.0 if "Hang" in name else 20.0, memory=300 << 20)
    assert check.status == status, str(check)
    assert said in check.detail
    assert "RuntimeWarning" not in check.detail
    assert time.monotonic() - start < 60


@pytest.mark.parametrize(
    ("name", "status", "said"),
    [
        pytest.param("SysExits", "raised", "SystemExit: 3", marks=pytest.mark.long),
        ("Unpicklable", "raised", "Odd: (its message cannot be read)"),
        ("AsksForEverything", "out_of_memory", "allocate memory"),
    ],
)
def test_whatever_a_kernel_raises_is_a_status(name, status, said, repository):
    check = run(repository, name, memory=1 << 30)[0]
    assert check.status == status, str(check)
    assert said in check.detail


def _members(group: int) -> list[int]:
    """The processes of a group, as far as the system tells."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, _, pgrp = (folder / "stat").read_text().rpartition(")")[2].split()[:3]
        except OSError:  # it has ended meanwhile
            continue
        if int(pgrp) == group and state != "Z":
            found.append(int(folder.name))
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are counted in /proc")
def test_children_that_a_kernel_leaves_end_with_its_worker(repository):
    decided, module = decision(gallery.Norm(), load(KernelRef("path", str(repository), "LeavesAChild"), device="cpu"))
    with Worker(decided.kernel, "cpu") as worker:
        checks = checks_of(decided, module, worker=worker)
        assert [next(checks).status for _ in range(3)] == ["passed"] * 3
        group = worker._process.pid
        assert len(_members(group)) > 3
    deadline = time.monotonic() + 10
    while _members(group) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert _members(group) == []


@pytest.mark.parametrize("name", ["Loud", "ReadsInput", "Forks"])
def test_the_channel_is_not_the_kernels(name, repository):
    kernel = load(KernelRef("path", str(repository), name), device="cpu")
    decided, module = decision(gallery.Norm(), kernel)
    checks = checks_of(decided, module, options=Options())
    assert [str(check) for _ in range(3) if (check := next(checks)).status != "passed"] == []
    checks.close()


def test_a_kernel_whose_files_change_is_not_checked_as_the_one_that_was_loaded(repository):
    kernel = load(KernelRef("path", str(repository), "Loud"), device="cpu")
    file = repository / "build" / "torch-universal" / "layers.py"
    before = file.read_text()
    try:
        file.write_text(before + "\n# changed\n")
        decided, module = decision(gallery.Norm(), kernel)
        (check,) = checks_of(decided, module, options=Options())
    finally:
        file.write_text(before)
    assert check.status == "load_failed"
    assert "changed" in check.detail


def test_what_a_kernel_gives_need_not_fit_into_this_process(repository, monkeypatch):
    received: list[int] = []
    answer = _worker._answer_within
    monkeypatch.setattr(
        _worker, "_answer_within", lambda *a: (received.append(len(part)) or part for part in answer(*a))
    )
    kernel = replace(load(KernelRef("path", str(repository), "GivesFarTooMuch"), device="cpu"), has_backward=False)
    decided, module = decision(gallery.Norm(), kernel)
    first = next(checks_of(decided, module, options=Options()))
    assert (first.status, "takes 120 MiB" in first.detail) == ("wrong_shape", True), str(first)
    assert sum(received) < 1 << 20


class Holds(gallery.Norm):
    """What modules hold besides tensors: a kernel may read any of it."""

    kind = torch.float64
    names = ("first", 2)

    def __init__(self) -> None:
        super().__init__()
        self.sizes, self.shape, self.options = (3, 4), torch.Size([5]), {"scale": 2.0, "parts": [1, None]}
        self.bias, self.act, self.mine, self.lock = None, nn.functional.silu, lambda x: x, object()

    @property
    def twice(self) -> float:
        return 2 * self.variance_epsilon

    @property
    def fails(self) -> float:
        raise RuntimeError("not built yet")


def test_a_kernel_finds_what_the_layer_holds_in_the_other_process():
    module = Holds()
    read = ("kind", "names", "sizes", "shape", "options", "bias", "act", "twice", "variance_epsilon")
    for reads in (frozenset({*read, "mine", "lock", "fails", "nothing", "weight"}), None):
        described = describe(module, reads)
        buffer = io.BytesIO()
        torch.save(described, buffer)
        buffer.seek(0)
        built = rebuild(torch.load(buffer, weights_only=False), stub=True)
        for name in read:
            if reads is not None or name in module.__dict__:
                assert getattr(built, name) == getattr(module, name), name
        assert not {"mine", "fails", "nothing"} & built.__dict__.keys()
        assert torch.equal(built.weight, module.weight)


def test_the_process_ends_with_its_worker(repository):
    with Worker(load(KernelRef("path", str(repository), "Hangs"), device="cpu"), "cpu") as worker:
        worker.start()
        pid = worker._process.pid
        os.kill(pid, 0)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_process_that_stands_still_does_not_hold_this_one(repository):
    """More is sent to it than its pipe takes, and nobody reads there."""
    decided, module = decision(gallery.Norm(1 << 16), load(KernelRef("path", str(repository), "Loud"), device="cpu"))
    with Worker(decided.kernel, "cpu") as worker:
        worker.start()
        worker._seconds = 2.0
        os.kill(worker._process.pid, signal.SIGSTOP)
        start = time.monotonic()
        (first,) = checks_of(decided, module, worker=worker)
        assert (first.case, first.status) == ("as given", "timed_out")
        assert time.monotonic() - start < 30


@pytest.mark.parametrize("why", ["no such program", "a program that ends at once", "no more processes"])
def test_a_process_that_cannot_be_started_is_no_fault_of_the_kernel(why, repository, monkeypatch):
    model, mapping = nn.Sequential(gallery.Norm()), {"RMSNorm": f"{repository}:Loud"}
    plan = kw.plan(model, mapping)
    if why == "no such program":
        monkeypatch.setattr(sys, "executable", "/no/such/python")
    elif why == "a program that ends at once":
        monkeypatch.setattr(sys, "executable", shutil.which("false"))
    else:
        full = BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        monkeypatch.setattr(_worker.subprocess, "Popen", Mock(side_effect=full))
    with pytest.raises(WorkerStartError, match=r"cannot be started .*no fault of the kernel"):
        kw.verify(model, plan)
    with pytest.raises(kw.KernelwiseError, match="no fault of the kernel"):
        kw.kernelize(model, mapping)
    kw.kernelize(model, mapping, on_miss="keep")
    assert "no fault of the kernel" in str(kw.report(model))
    if why == "no such program":
        monkeypatch.undo()
        with Worker(plan.decisions[0].kernel, "cpu") as worker:
            worker.start()  # nothing was remembered against it


@pytest.mark.parametrize(
    ("deed", "said"),
    [
        ("torch.set_default_dtype(torch.float64)", "the default dtype (to torch.float64)"),
        ("torch.use_deterministic_algorithms(True)", "deterministic algorithms"),
        pytest.param("torch.set_num_threads(7)", "the number of threads (to 7)", marks=pytest.mark.long),
        ("torch.manual_seed(5)", ""),
    ],
)
def test_an_import_that_changes_the_process_is_refused_and_leaves_nothing_here(deed, said, tmp_path):
    variant = tmp_path / "sets" / "build" / "torch-universal"
    variant.mkdir(parents=True)
    metadata = {"name": "sets", "id": "sets", "version": 1, "license": "MIT", "python-depends": []}
    (variant / "metadata.json").write_text(json.dumps(metadata | {"backend": {"type": "cpu"}}))
    (variant / "__init__.py").write_text("from . import layers\n")
    (variant / "layers.py").write_text(LAYERS + f"\n\n{deed}\n")
    before = settings()
    model, mapping = nn.Sequential(gallery.Norm()), {"RMSNorm": f"{tmp_path / 'sets'}:Loud"}
    state = torch.get_rng_state()
    if said:
        with pytest.raises(kw.KernelLoadError, match="setting_changed: its import changes") as found:
            kw.kernelize(model, mapping)
        assert said in str(found.value)
    kw.kernelize(model, mapping, verify=False)  # imports it here, on the user's word
    assert settings() == before
    assert torch.equal(torch.get_rng_state(), state)
