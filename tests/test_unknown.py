"""What was not recognised: listed for a whole model, and shown beside the operation it looks most like."""

from __future__ import annotations

import pytest
import torch
from models import Norm, apply_rotary_pos_emb
from torch import Tensor, nn

import kernelwise as kw
from kernelwise._cli import main
from kernelwise._unknown import explain, unknown_layers


class WithoutEps(Norm):
    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        return self.weight * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True))).to(x.dtype)


def backwards(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    return apply_rotary_pos_emb(k, q, cos, -sin, unsqueeze_dim)


class Attention(nn.Module):
    def forward(self, q: Tensor, k: Tensor, angles: Tensor) -> Tensor:
        q, k = backwards(q, k, *angles)
        q, k = apply_rotary_pos_emb(q, k, *angles)
        return q @ k.mT


def make() -> nn.Module:
    return nn.Sequential(WithoutEps(), nn.Linear(8, 8), nn.ModuleDict({"mix": Attention()}))


def test_every_layer_is_either_recognised_or_listed_with_its_reason() -> None:
    found = unknown_layers(make())
    assert [(layer.path, layer.name, layer.like) for layer in found] == [
        ("0", "WithoutEps", "rms_norm"),
        ("2.mix", "Attention", None),
        ("2.mix.backwards", "backwards()", "rotary"),
    ]
    assert all(layer.reason for layer in found)
    assert {layer.path for layer in kw.discover(make())} == {"1", "2.mix.rotary_pos_emb"}


def test_a_near_miss_is_explained_by_two_graphs() -> None:
    text = explain(make(), "0")
    assert text.startswith("0 (WithoutEps) is unknown: no known operation has this graph")
    assert "nearest  rms_norm (offset=0.0, cast=before)" in text
    marked = [line for line in text.splitlines() if line.startswith("*")]
    assert "add(" in marked[0]
    assert explain(make(), "2.mix.backwards").count("\n*") > 1


def test_what_is_known_is_explained_by_its_roles() -> None:
    expected = "2.mix.apply_rotary_pos_emb (apply_rotary_pos_emb()) is rotary (layout=half"
    for path in ("2.mix.apply_rotary_pos_emb", "2.mix.rotary_pos_emb"):
        assert explain(make(), path).startswith(expected)
    whole = explain(make(), "2.mix")
    assert whole.startswith("2.mix (Attention) is unknown: ")
    assert expected in whole
    assert "2.mix.backwards" in whole


def test_a_path_where_nothing_stands_names_the_nearest() -> None:
    with pytest.raises(kw.KernelwiseError, match=r"nothing at '2\.mx'; did you mean '2\.mix'"):
        explain(make(), "2.mx")


def test_layers_on_the_command_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*more: str) -> str:
        with pytest.raises(SystemExit):
            main(("layers", "test_unknown:make", *more))
        return capsys.readouterr().out

    shown = run()
    known, _, unknown = shown.partition("Not recognised")
    assert "WithoutEps" not in known
    assert "WithoutEps" in unknown
    assert "no known operation has this graph" in unknown
    assert explain(make(), "0") in run("--explain", "0")
    assert '"like": "rms_norm"' in run("--json")


def test_layers_are_not_changed() -> None:
    model = make()
    before = [dict(module.__dict__) for module in model.modules()]
    unknown_layers(model)
    explain(model, "0")
    assert [dict(module.__dict__) for module in model.modules()] == before
