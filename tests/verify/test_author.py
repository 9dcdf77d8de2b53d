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
