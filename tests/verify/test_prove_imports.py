"""Before a proof, a kernel is imported in another process: what kills that one, or is not there, is said."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import checking  # noqa: F401  (names the layers of the gallery)
import gallery
import pytest
from proving import write_repository
from torch import nn

import kernelwise as kw
from kernelwise._verifying import _prove, _worker

pytestmark = pytest.mark.usefixtures("empty_cache", "few_sizes")

DEADLY = """
import os, time
open({trace!r}, "a").write(f"{{os.getpid()}}\\n")
{deed}
from . import layers
"""


@pytest.mark.parametrize(
    ("deed", "said"),
    [
        ("import ctypes; ctypes.string_at(0)", "crashed: the process died of SIGSEGV"),
        pytest.param("os._exit(5)", "exited: the process left with exit code 5", marks=pytest.mark.long),
        ("time.sleep(1000)", "timed_out: no answer after 1 s"),
        pytest.param("kept = [bytearray(1 << 26) for _ in range(1000)]", "out_of_memory", marks=pytest.mark.long),
    ],
    ids=["crashes", "exits", "hangs", "hogs"],
)
def test_a_kernel_that_kills_who_imports_it_is_not_imported_here(deed, said, tmp_path, monkeypatch, capsys):
    if "sleep" in deed:
        monkeypatch.setattr(_prove.Prover.__init__, "__kwdefaults__", {"seconds": 1.0, "memory": 8 << 30})
    if "kept" in deed:
        monkeypatch.setattr(_prove.Prover.__init__, "__kwdefaults__", {"seconds": 60.0, "memory": 300 << 20})
    trace = tmp_path / "trace"
    repository = write_repository(tmp_path / "deadly", DEADLY.format(trace=str(trace), deed=deed))
    model, mapping = nn.Sequential(gallery.Norm()), {"RMSNorm": f"{repository}:Right"}
    with pytest.raises(kw.KernelLoadError, match=said) as found:
        kw.kernelize(model, mapping)
    assert "asked by" in str(found.value)
    kw.kernelize(model, mapping, on_miss="keep")
    assert said in str(kw.report(model))
    if deed.startswith("import ctypes"):  # for an author, it is a check that failed
        from kernelwise._cli import main

        with pytest.raises(SystemExit) as left:
            main(["verify", "--kernel", f"{repository}:Right", "--json"])
        assert left.value.code == 1
        (check,) = json.loads(capsys.readouterr().out)["checks"]
        assert (check["case"], check["status"]) == ("import", "crashed")
    pids = [int(line) for line in trace.read_text().split()]
    assert pids
    assert os.getpid() not in pids


def test_an_import_is_tried_once_on_a_machine(tmp_path, monkeypatch):
    repository = write_repository(tmp_path / "tried", "from . import layers  # content that nobody has imported yet\n")
    started = []
    real = _worker.Worker.start
    monkeypatch.setattr(_worker.Worker, "start", lambda self: started.append(self.kernel.ref.layer) or real(self))
    mapping = {"RMSNorm": f"{repository}:Right"}
    kw.kernelize(nn.Sequential(gallery.Norm()), mapping)
    assert started == ["Right"]  # one process for the import and for the checks
    kw.kernelize(nn.Sequential(gallery.Norm()), mapping)
    script = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import checking, gallery, kernelwise as kw
from kernelwise._verifying import _worker
from torch import nn
_worker.Worker.start = lambda self: sys.exit("a process was started")
kw.kernelize(nn.Sequential(gallery.Norm()), {mapping!r})
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert started == ["Right"]


def test_a_kernel_that_cannot_be_imported_says_why_as_without_a_worker(tmp_path):
    repository = write_repository(tmp_path / "broken", "import no_such_package_anywhere\n")
    with pytest.raises(kw.KernelLoadError, match="no_such_package_anywhere, which is not installed"):
        kw.kernelize(nn.Sequential(gallery.Norm()), {"RMSNorm": f"{repository}:Right"})


def test_the_users_main_is_never_imported_in_the_worker(repository, tmp_path):
    trace = tmp_path / "trace"
    script = tmp_path / "script.py"
    script.write_text(f"""
import os
open({str(trace)!r}, "a").write(f"{{os.getpid()}}\\n")
import torch
from torch import nn
import kernelwise as kw


class Inner(nn.Module):  # a child of a class that stands in __main__
    def forward(self, x):
        return x * 2


class Mine(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 48))
        self.variance_epsilon = 1e-6
        self.inner = Inner()

    def forward(self, x):
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * wide.to(x.dtype)


kw.register_layer(Mine, "Mine")
model = kw.kernelize(nn.Sequential(Mine()), {{"Mine": {f"{repository}:Right"!r}}})
print(kw.report(model).rows[0].proof)
""")
    command = [sys.executable, str(script)]
    ran = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert ran.stdout.split() == ["proven"], ran.stderr
    assert len(trace.read_text().split()) == 1
