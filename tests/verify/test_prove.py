"""`kernelize(..., verify="auto")`: nothing of others goes in unproven, and a proof is asked for once."""

from __future__ import annotations

import json
from pathlib import Path

import checking  # noqa: F401  (names the layers of the gallery)
import gallery
import pytest
import torch
from torch import nn

import kernelwise as kw
from kernelwise import _prove

LAYERS = """
import torch
from torch import nn


def norm(x, weight, eps):
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


class Right(nn.Module):
    def forward(self, hidden_states):
        return norm(hidden_states, self.weight, self.variance_epsilon)


class Wrong(nn.Module):
    def forward(self, hidden_states):
        return norm(hidden_states, self.weight, self.variance_epsilon) + 1
"""


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("KERNELWISE_CACHE", str(tmp_path / "cache"))
    variant = tmp_path / "proved" / "build" / "torch-universal"
    variant.mkdir(parents=True)
    metadata = {"name": "proved", "id": "proved", "version": 1, "license": "MIT", "python-depends": []}
    (variant / "metadata.json").write_text(json.dumps(metadata | {"backend": {"type": "cpu"}}))
    (variant / "__init__.py").write_text("from . import layers\n")
    (variant / "layers.py").write_text(LAYERS)
    return variant.parents[1]


def test_a_kernel_that_is_wrong_does_not_go_in(repository, monkeypatch):
    model = nn.Sequential(gallery.Norm(), gallery.Norm())
    before = [dict(module.__dict__) for module in model.modules()]
    mapping = {"RMSNorm": f"{repository}:Wrong"}
    with pytest.raises(kw.PlanError, match=r"not put into 0 and 1 more\n.*as given: wrong_values.*\n.*asked by"):
        kw.kernelize(model, mapping, verify="auto")
    assert [dict(module.__dict__) for module in model.modules()] == before
    kw.kernelize(model, mapping, verify="auto", on_miss="keep")
    assert "own code" in str(kw.report(model))
    assert "not proven" in str(kw.report(model))
    kw.unkernelize(model)
    x = torch.randn(2, 48)
    expected = model(x)
    kw.kernelize(model, mapping, verify=False)  # the user's own word
    assert not torch.allclose(model(x), expected, atol=0.5)


def test_a_proof_is_remembered_until_the_kernel_changes(repository, monkeypatch, tmp_path):
    checked = []
    real = _prove._check
    monkeypatch.setattr(_prove, "_check", lambda *a: checked.append(a[1].paths) or real(*a))
    mapping = {"RMSNorm": f"{repository}:Right"}
    for _ in range(2):
        kw.kernelize(nn.Sequential(gallery.Norm(), gallery.Norm()), mapping, verify="auto")
    assert checked == [("0", "1")]
    (proof,) = (tmp_path / "cache" / "proofs").iterdir()
    assert {check["status"] for check in json.loads(proof.read_text())} <= {"passed", "skipped"}
    kw.kernelize(nn.Sequential(gallery.Norm(eps=1e-5)), mapping, verify="auto")
    assert len(checked) == 1  # a number that the kernel reads when it is called
    file = repository / "build" / "torch-universal" / "layers.py"
    file.write_text(LAYERS + "\n# another version\n")
    kw.kernelize(nn.Sequential(gallery.Norm()), mapping, verify="auto")
    assert len(checked) == 2


def test_builtin_kernels_ship_with_their_proof(monkeypatch):
    monkeypatch.setattr(_prove, "_check", lambda *a: pytest.fail("it was checked"))
    model = kw.kernelize(nn.Sequential(gallery.Norm()), verify="auto")
    assert "builtin:RMSNorm" in str(kw.report(model))


def test_verify_is_auto_or_false():
    with pytest.raises(kw.PlanError, match="verify is"):
        kw.kernelize(nn.Sequential(gallery.Norm()), verify="always")
