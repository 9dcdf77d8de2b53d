"""The lock of a device: who comes second waits, says so, and is let in when the first is done, however it ended."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import kernelwise as kw
from kernelwise import _device_lock
from kernelwise._cache import cache_directory
from kernelwise._device_lock import alone_on
from kernelwise._measuring import _bench
from kernelwise._tuning import _tune

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="nobody waits on Windows")

HOLDS = """
import fcntl, os, sys, time
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
print(os.getpid(), file=file, flush=True)
print("has it", flush=True)
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KERNELWISE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def holder() -> subprocess.Popen[str]:
    """Start a process that has the lock of the processor."""
    with alone_on("cpu", pytest.fail):  # which makes the file
        (file,) = (cache_directory() / "locks").iterdir()
    process = subprocess.Popen([sys.executable, "-c", HOLDS, str(file)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "has it\n"
    return process


def test_who_comes_second_waits_says_so_and_goes_on_when_the_first_is_killed(caplog):
    first = holder()
    told: list[str] = []

    def waiting(what: str) -> None:
        told.append(what)
        first.kill()  # the system gives the lock back

    try:
        with alone_on("cuda:7" if torch.cuda.is_available() else "mps", waiting):
            assert told == [], "another device is free"
        with alone_on("cpu", waiting):
            assert first.wait(10) != 0
    finally:
        first.kill()
    assert told == [f"waiting for process {first.pid}, which measures on cpu"]
    assert told[0] in caplog.text


@pytest.mark.parametrize("run", ["tune", "bench"])
def test_tuning_and_benching_hold_it_while_they_measure(run, monkeypatch):
    def look(*args: object, **options: object) -> None:
        with alone_on("cpu", lambda what: held.append(what) or 1 / 0):  # who waits gives up here
            pytest.fail("the lock is free")

    held: list[str] = []
    monkeypatch.setattr(_tune, "_look", look)
    monkeypatch.setattr(_bench, "race", look)
    model, x = nn.Sequential(nn.GELU()).eval(), torch.randn(2, 4)
    with pytest.raises(ZeroDivisionError):
        (kw.tune if run == "tune" else _bench.bench)(model, x)
    assert held == [f"waiting for process {os.getpid()}, which measures on cpu"]
    with alone_on("cpu", pytest.fail):  # it was given back, whatever happened
        pass


def test_the_time_that_tuning_may_take_begins_when_the_wait_is_over(monkeypatch):
    first = holder()

    def progress(what: str, part: float) -> None:
        if what.startswith("waiting"):
            time.sleep(1.0)
            first.kill()

    began = time.monotonic()
    monkeypatch.setattr(_tune, "_tuned", lambda session, refs, of_wholes: session.began)
    try:
        assert kw.tune(nn.Sequential(nn.GELU()).eval(), torch.randn(2, 4), progress=progress) > began + 1.0
    finally:
        first.kill()


def test_a_cache_that_cannot_be_written_makes_nobody_wait(cache):
    cache.write_text("a file")
    with alone_on("cpu", pytest.fail), alone_on("cpu", pytest.fail):
        pass


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_is_no_reason_to_fail(cache):
    (cache / "locks").mkdir(parents=True)
    (cache / "locks" / f"{_device_lock._name('cpu')}.lock").symlink_to("/dev/full")
    with alone_on("cpu", pytest.fail):
        pass


def test_a_gpu_has_the_same_lock_whatever_number_a_process_gives_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=f"GPU-{index % 2}"))
    assert _device_lock._name("cuda:3") == _device_lock._name("cuda:1") == _device_lock._name("cuda")
    assert _device_lock._name("cuda:0") != _device_lock._name("cuda:1")
    assert "/" not in _device_lock._name("cuda:1")
