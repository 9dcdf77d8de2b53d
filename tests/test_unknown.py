"""What was not recognised: listed for a whole model, and shown beside the operation it looks most like."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from models import Activation, Norm, apply_rotary_pos_emb
from torch import Tensor, nn

import kernelwise as kw
from kernelwise._cli import main
from kernelwise._data import Layer
from kernelwise._models import load_model
from kernelwise._unknown import explain, explanation_text, unknown_layers


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


def text_of(model: nn.Module, pattern: str) -> str:
    return explanation_text(explain(model, pattern))


def test_a_near_miss_is_explained_by_two_graphs() -> None:
    text = text_of(make(), "0")
    assert text.startswith("0 (WithoutEps) is unknown: no known operation has this graph")
    assert "nearest  rms_norm (offset=0.0, cast=before)" in text
    marked = [line for line in text.splitlines() if line.startswith("*")]
    assert "add(" in marked[0]
    assert text_of(make(), "2.mix.backwards").count("\n*") > 1


def test_what_is_known_is_explained_by_its_roles() -> None:
    expected = "2.mix.rotary_pos_emb (apply_rotary_pos_emb()) is rotary (layout=half"
    for path in ("2.mix.apply_rotary_pos_emb", "2.mix.rotary_pos_emb", "rotary_pos_emb", "apply_rotary_pos_emb()"):
        assert text_of(make(), path).startswith(expected)
    whole = text_of(make(), "2.mix")
    assert whole.startswith("2.mix (Attention) is unknown: ")
    assert expected in whole
    assert "2.mix.backwards" in whole


def test_a_function_of_the_whole_model_has_two_names() -> None:
    for name in ("rotary_pos_emb", "apply_rotary_pos_emb"):
        assert [(item.paths, item.recognition is not None) for item in explain(Attention(), name)] == [
            (("rotary_pos_emb",), True)
        ]


def test_every_path_and_name_that_is_printed_is_understood() -> None:
    norm, head = Norm(), load_model("llama").model
    model = nn.ModuleDict({"a": norm, "b": nn.Sequential(norm, Activation(wants_kernel=False)), "c": make()})
    for whole in (model, head):
        for layer in (*kw.discover(whole), *unknown_layers(whole)):
            paths = layer.paths if isinstance(layer, Layer) else (layer.path,)
            for place in (*paths, layer.name):
                assert any(set(paths) <= set(item.paths) for item in explain(whole, place)), place
    assert explain(model, "a") == explain(model, "b.0")
    assert explain(model, "(the model itself)") == explain(model, "")
    assert "no kernel can go here: the kernel_condition" in text_of(model, "b.1")


def test_a_pattern_explains_alike_layers_once() -> None:
    model = nn.ModuleDict({"one": nn.Sequential(Norm(), Norm()), "two": nn.Sequential(*(Norm() for _ in range(4)))})
    (found,) = explain(model, "*.[0-3]")
    assert found.paths == ("one.0", "one.1", "two.0", "two.1", "two.2", "two.3")
    assert str(found).startswith("one.0, one.1, two.0 and 3 more (Norm) is rms_norm")
    assert [item.paths for item in explain(model, "two.1")] == [("two.1",)]
    assert explain(model, "*") == (found,)  # containers compute nothing


def test_a_container_is_explained_where_it_is_asked_for() -> None:
    assert text_of(make(), "") == (
        "(the model itself) (Sequential) is unknown: it only holds other modules, and each of them has a path of its own"
    )


def test_roles_that_a_layer_does_not_have_are_left_out() -> None:
    text = text_of(nn.Linear(4, 8, bias=False), "")
    assert "weight" in text
    assert "bias" not in text
    assert "bias" in text_of(nn.Linear(4, 8), "")


def test_where_nothing_is_near_the_graph_and_the_way_to_add_it_are_shown() -> None:
    text = text_of(nn.Conv1d(13, 4, 3), "")
    assert "nothing known is near" in text
    assert "convolution" in text
    assert "register_op" in text.splitlines()[-1]
    assert "register_op" not in text_of(nn.Linear(4, 8), "")
    (page,) = re.findall(r"docs/(\w+\.md), \"(.*)\"", text)
    assert f"## {page[1]}\n" in (Path(__file__).parent.parent / "docs" / page[0]).read_text()


def test_a_path_where_nothing_stands_names_the_nearest_and_how_to_go_on() -> None:
    with pytest.raises(kw.KernelwiseError, match=r"nothing at '2\.mx'; did you mean '2\.mix'"):
        explain(make(), "2.mx")
    with pytest.raises(kw.KernelwiseError, match=r"nothing at 'xyz'; known: Linear\n  go on +kernelwise layers MODEL"):
        explain(nn.Linear(4, 8), "xyz")


@pytest.mark.parametrize("model", [nn.Sequential(Norm(), nn.LazyLinear(3)), nn.LazyLinear(3)])
def test_a_lazy_layer_is_one_error(model: nn.Module) -> None:
    for ask in (unknown_layers, lambda model: explain(model, "*")):
        with pytest.raises(kw.PlanError, match=r"LazyLinear.*has no shape yet"):
            ask(model)


class Block(nn.Module):
    """Nearly a decoder layer: its second norm is none."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.mix, self.second, self.dense = Norm(), Mixer(), nn.Linear(8, 8), nn.Linear(8, 8)
        self.last = Norm()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.mix(self.first(x), mask)[0]
        return x + self.dense(self.second(x))


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 8)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, None]:
        return self.proj(x.cumsum(-2)), None


class NormedMlp(nn.Module):
    """A gated MLP with a norm, but for one dtype. It has a norm among its children as decoder layers have."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.norm, self.down = nn.Linear(8, 8), nn.Linear(8, 8), Norm(), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(self.norm(nn.functional.silu(self.gate(x)) * self.up(x)))
        return y * 2 if x.dtype == torch.float16 else y


class NormTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.dense = Norm(), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(self.norm(self.norm(x)))


def test_the_reason_is_that_of_the_nearest_operation() -> None:
    def reason(layer: nn.Module) -> str:
        (found,) = explain(layer, "")
        assert found.graph is not None
        return str(found.reason)

    assert reason(Block()) == "looks like decoder_layer, but its mlp_norm (child second) is not known to be a norm"
    assert reason(NormedMlp()).startswith("is gated_mlp_normed {'activation': 'silu'} in bfloat16, but not")
    assert reason(NormTwice()) == "no known operation has this graph"


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
    assert text_of(make(), "0") in run("--explain", "0")
    assert '"like": "rms_norm"' in run("--json")
    (explained,) = json.loads(run("--json", "--explain", "0"))["explained"]
    assert (explained["paths"], explained["name"], explained["near"]["op"]) == (["0"], "WithoutEps", "rms_norm")


def test_layers_are_not_changed() -> None:
    model = make()
    before = [dict(module.__dict__) for module in model.modules()]
    unknown_layers(model)
    explain(model, "0")
    assert [dict(module.__dict__) for module in model.modules()] == before
