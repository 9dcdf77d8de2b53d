"""For authors: the command line and the pytest plugin, on kernels of one repository."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import kernelwise as kw
from kernelwise._author import layers_for, read_reference, verify_kernel
from kernelwise._cli import main
from kernelwise._models import load_model
from kernelwise._verifying import _cases, _prove, _worker
from kernelwise.sources import load

LAYERS = """
import torch
from torch import nn


def norm(x, weight, eps):
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


class MyNorm(nn.Module):
    def forward(self, hidden_states):
        return norm(hidden_states, self.weight, self.variance_epsilon)


class WrongNorm(nn.Module):
    def forward(self, hidden_states):
        return norm(hidden_states, self.weight, self.variance_epsilon) * 1.5


class Alien(nn.Module):
    def forward(self, hidden_states):
        return hidden_states * self.no_layer_has_this
"""


MODEL = """
import torch
from torch import nn


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))
        self.variance_epsilon = 1e-6

    def forward(self, x):
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * wide.to(x.dtype)
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    variant = tmp_path_factory.mktemp("mine") / "build" / "torch-universal"
    variant.mkdir(parents=True)
    metadata = {"name": "mine", "id": "mine", "version": 1, "license": "MIT", "python-depends": []}
    (variant / "metadata.json").write_text(json.dumps(metadata | {"backend": {"type": "cpu"}}))
    (variant / "__init__.py").write_text("from . import layers\n")
    (variant / "layers.py").write_text(LAYERS)
    return variant.parents[1]


def test_layers_that_a_kernel_could_serve_are_found(repository):
    kernel = load(read_reference(f"{repository}:MyNorm"), device="cpu")
    names = [layer.class_name.rpartition(".")[2] for _, layer in layers_for(kernel, ("llama", "gpt_oss"))]
    assert names == [LlamaRMSNorm.__name__, GptOssRMSNorm.__name__]


def test_a_norm_that_rounds_before_the_weight_is_wrong_for_gpt_oss(repository):
    checks = verify_kernel(read_reference(f"{repository}:MyNorm"), models=("gpt_oss",), dtype="bfloat16")
    assert {check.status for check in checks.failures} == {"wrong_values"}
    assert "rounds more often" in str(checks)


def test_a_relative_directory_is_a_kernel(repository, monkeypatch):
    monkeypatch.chdir(repository.parent)
    assert read_reference(f"{repository.name}:MyNorm").location == str(repository)
    assert str(read_reference("org/repo@v2:Layer", trust_remote_code=True)) == "org/repo@v2:Layer"
    assert read_reference("org/repo@v2:Layer", trust_remote_code=True).trust_remote_code
    with pytest.raises(kw.KernelwiseError, match="write DIR:Layer"):
        read_reference("none")
    with pytest.raises(kw.KernelwiseError, match=r"no directory .*not-there"):
        read_reference("./not-there:MyNorm")


def test_the_command_line_checks_a_kernel_and_exits_with_1(repository, capsys):
    with pytest.raises(SystemExit) as found:
        main(["verify", "llama", "--kernel", f"{repository}:WrongNorm", "--json"])
    data = json.loads(capsys.readouterr().out)
    assert found.value.code == 1
    assert data["ok"] is False
    assert data["checks"][0]["status"] == "wrong_values"
    with pytest.raises(SystemExit) as found:
        main(["verify", "llama", "--kernel", f"{repository}:Alien"])
    assert found.value.code == 1
    assert "no layer of llama fits" in capsys.readouterr().err


def test_a_device_that_is_not_here_is_an_error(repository, capsys):
    missing = "neuron"
    for arguments in (["llama"], ["--kernel", f"{repository}:MyNorm"]):
        with pytest.raises(SystemExit) as found:
            main(["verify", *arguments, "--device", missing])
        assert found.value.code == 1
        assert f"this machine has no {missing}" in capsys.readouterr().err


@pytest.fixture
def small_model(tmp_path, monkeypatch) -> str:
    (tmp_path / "small_author.py").write_text(MODEL)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "small_author", raising=False)
    return "small_author:Norm"


@pytest.mark.parametrize("as_kernel", [False, True])
def test_what_the_command_line_proves_is_remembered(as_kernel, repository, small_model, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("KERNELWISE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(_prove, "_remembered", {})
    monkeypatch.setattr(_cases, "_SIZES", ())
    kernel = f"{repository}:MyNorm"
    (tmp_path / "kernels.toml").write_text(f'[kernels]\nRMSNorm = "{kernel}"\n')
    asked = ["--kernel", kernel] if as_kernel else ["--config", str(tmp_path / "kernels.toml")]
    with pytest.raises(SystemExit) as found:
        main(["verify", small_model, *asked, "--device", "cpu"])
    assert found.value.code == 0, capsys.readouterr()
    monkeypatch.setattr(_prove, "_remembered", {})  # another process
    monkeypatch.setattr(_worker.Worker, "start", lambda self: pytest.fail("it was checked again"))
    model = load_model(small_model).model
    kw.kernelize(model, kw.KernelConfig.load(tmp_path / "kernels.toml"))
    assert {(row.kernel, row.proof) for row in kw.report(model).rows} == {(kernel, "proven")}


def test_a_kernel_that_does_not_load_is_a_test_that_fails_and_says_why(repository, tmp_path):
    (tmp_path / "small.py").write_text(MODEL)
    (tmp_path / "test_other.py").write_text("def test_other():\n    pass\n")
    command = [sys.executable, "-m", "pytest", "-p", "kernelwise._pytest_plugin", "-p", "no:cacheprovider", "-q"]
    kernels = ["--kernelwise", f"{repository}:NoSuchLayer", "--kernelwise", "/no/such/directory:Layer"]
    options = [*kernels, "--kernelwise-model", "small:Norm", "-rA", str(tmp_path)]
    ran = subprocess.run([*command, *options], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    said = ran.stdout + ran.stderr
    assert ran.returncode == 1, said
    assert "INTERNALERROR" not in said
    assert "2 failed, 1 passed" in said
    assert "NoSuchLayer" in ran.stdout
    assert "/no/such/directory" in ran.stdout


def test_the_plugin_gives_one_test_for_each_check(repository, tmp_path):
    (tmp_path / "small.py").write_text(MODEL)
    command = [sys.executable, "-m", "pytest", "-p", "kernelwise._pytest_plugin", "-p", "no:cacheprovider", "-q"]
    options = ["--kernelwise", f"{repository}:WrongNorm", "--kernelwise-model", "small:Norm", "-rA", str(tmp_path)]
    ran = subprocess.run([*command, *options], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert ran.returncode == 1, ran.stdout + ran.stderr
    assert "[no rows]" in ran.stdout
    assert "wrong_values" in ran.stdout
    assert " passed" in ran.stdout
    assert " failed" in ran.stdout
