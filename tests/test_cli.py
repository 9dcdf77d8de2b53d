"""The command line, run in this process as a user would type it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kernelwise import __version__
from kernelwise._cli import main
from kernelwise._errors import KernelwiseError
from kernelwise._errors import said as in_a_line
from kernelwise._models import load_model

pytestmark = pytest.mark.usefixtures("offline")


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    """Return exit code, standard output and standard error."""
    with pytest.raises(SystemExit) as exit_:
        main(args)
    captured = capsys.readouterr()
    code = exit_.value.code
    return (0 if code is None else int(code)), captured.out, captured.err


def test_layers_lists_name_how_operation_and_options(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "layers", "gemma")
    assert code == 0
    norm = next(line for line in out.splitlines() if "model.norm " in line)
    assert [word for word in norm.split() if "rms" in word.lower()] == ["RMSNorm", "rms_norm"]
    assert "offset=1.0" in norm
    assert "small GemmaForCausalLM with random weights" in out


def test_layers_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "layers", "llama", "--json")
    layers = {layer["path"]: layer for layer in json.loads(out)["layers"]}
    assert code == 0
    assert layers["model.norm"]["recognition"]["op"] == "rms_norm"
    assert layers["model.layers.1.mlp"]["name"] == "SwiGLUMLP"


def test_plan_for_a_device_that_is_not_here(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "plan", "qwen3", "--device", "cuda", "--dtype", "bfloat16")
    assert code == 0
    assert "builtin:RMSNorm" in out
    assert torch.cuda.is_available() or "no cuda on this machine" in out


def test_plan_as_json_in_one_mode(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "plan", "llama", "--json", "--mode", "inference", "--dtype", "float16")
    data = json.loads(out)
    assert code == 0
    assert {decision["mode"] for decision in data["decisions"]} == {"inference"}
    assert data["target"]["device"] == "cpu"
    norm = next(decision["layer"] for decision in data["decisions"] if decision["layer"]["path"] == "model.norm")
    assert norm["dtypes"] == ["float16"]


def test_plan_follows_a_config_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "kernels.toml"
    file.write_text('[kernels]\nRMSNorm = "none"\n')
    code, out, _ = run(capsys, "plan", "llama", "--config", str(file), "--explain", "model.norm")
    assert code == 0
    assert "model.norm  RMSNorm, registered" in out
    assert "own code, asked by rule 1 (kernels.toml" in out
    assert "model.layers" not in out


@pytest.mark.parametrize(
    ("text", "said"),
    [('[kernels]\nRMSNrom = "none"\n', "RMSNorm"), ("[kernels\n", "TOML"), (None, "no such file")],
)
def test_a_wrong_config_is_one_error_without_a_traceback(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str | None, said: str
) -> None:
    file = tmp_path / "kernels.toml"
    if text is not None:
        file.write_text(text)
    code, out, err = run(capsys, "plan", "llama", "--config", str(file))
    assert code == 1
    assert out == ""
    assert err.startswith("error: ")
    assert said in err
    assert "Traceback" not in err


def test_a_demand_that_cannot_be_met_fails_unless_kept(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "kernels.toml"
    file.write_text('[kernels]\nRMSNorm = "builtin:SwiGLUMLP"\n')
    arguments = ("plan", "llama", "--config", str(file), "--device", "cuda")
    code, _, err = run(capsys, *arguments)
    assert code == 1
    assert "computes gated_mlp" in err
    code, out, _ = run(capsys, *arguments, "--on-miss", "keep")
    assert code == 0
    assert "computes gated_mlp" in out


def test_explain_shows_every_rejected_candidate(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "kernels.json"
    file.write_text(json.dumps({"kernels": {"RMSNorm": "builtin:SwiGLUMLP"}, "on_miss": "keep"}))
    asked = ("plan", "llama", "--config", str(file), "--device", "cuda", "--explain", "model.layers.*.input_layernorm")
    code, out, _ = run(capsys, *asked)
    assert code == 0
    assert out.count("rejected builtin:SwiGLUMLP: computes gated_mlp; LlamaRMSNorm computes rms_norm") == 2
    assert out.count("inference + training: own code") == 2


def test_explain_takes_what_is_below_a_path(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "plan", "llama", "--device", "cuda", "--json", "--explain", "model.layers.1")
    paths = {decision["layer"]["path"] for decision in json.loads(out)["decisions"]}
    assert {"model.layers.1.mlp", "model.layers.1.input_layernorm"} < paths
    assert all(f"{path}.".startswith("model.layers.1.") for path in paths)


def test_explain_of_an_unknown_path_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "plan", "llama", "--explain", "model.nrm")
    assert code == 1
    assert "model.norm" in err


@pytest.mark.parametrize(
    "arguments",
    [
        ("plan",),
        ("plan", "llama", "--device", "cudda"),
        ("plan", "llama", "--mode", "fast"),
        ("plan", "llama", "--dtype", "int8"),
        ("plan", "llama", "--on-miss", "ignore"),
        ("plan", "llama", "--no-such-option"),
        ("tune", "llama", "--objective", "speed"),
        ("tune", "llama", "--seconds", "-1"),
        ("bench", "llama", "--seconds", "-1"),
        ("verify", "llama", "--seconds", "-1"),
        ("verify",),
        ("fly",),
    ],
)
def test_usage_errors_exit_with_2(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]) -> None:
    code, out, err = run(capsys, *arguments)
    assert code == 2
    assert out == ""
    assert "Usage" in err


@pytest.mark.parametrize(
    ("option", "value", "meant"),
    [("--device", "gpu", "'cuda' or 'rocm'"), ("--mode", "eval", "'inference'"), ("--on-miss", "skip", "'keep'")],
)
def test_usage_errors_name_what_is_meant_and_the_choices_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, option: str, value: str, meant: str
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    _, _, err = run(capsys, "plan", "llama", option, value)
    assert f"did you mean {meant}?" in err
    assert "known:" not in err
    assert err.count("training+compile") == (option == "--mode")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version")[:2] == (0, f"{__version__}\n")


def test_a_factory_in_the_working_directory(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_factory_of_models.py").write_text(
        "import torch\n"
        "def make():\n"
        "    return torch.nn.Sequential(torch.nn.RMSNorm(8, eps=1e-6))\n"
        "def fail():\n"
        "    raise RuntimeError('no weights today')\n"
        "number = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    code, out, _ = run(capsys, "layers", "my_factory_of_models:make", "--dtype", "bfloat16", "--json")
    assert code == 0
    assert [layer["dtypes"] for layer in json.loads(out)["layers"]] == [["bfloat16"]]
    for name, said in (("fail", "no weights today"), ("number", "int"), ("missing", "has no 'missing'")):
        code, _, err = run(capsys, "layers", f"my_factory_of_models:{name}")
        assert code == 1
        assert said in err


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("qwen33", "did you mean"),
        ("no.such.module:make", "cannot import 'no.such.module'"),
        ("nobody/nothing", "cannot read the config of 'nobody/nothing'"),
        ("reformer", "no small reformer can be built"),
    ],
)
def test_a_model_that_is_not_there_is_one_error(capsys: pytest.CaptureFixture[str], model: str, said: str) -> None:
    code, _, err = run(capsys, "layers", model)
    assert code == 1
    assert said in err
    assert "go on" in err


@pytest.mark.parametrize(
    "model", ["./nope", "../nope", "/nope", "~/nope", "~nobody-here/x", "nope/", "a/b/c", "a\\\\b"]
)
def test_a_directory_that_is_not_there_is_no_hub_id(capsys: pytest.CaptureFixture[str], model: str) -> None:
    code, _, err = run(capsys, "plan", model)
    assert code == 1
    assert "no such directory" in err
    assert "go on" in err


def test_a_file_is_no_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    code, _, err = run(capsys, "plan", str(tmp_path / "config.json"))
    assert code == 1
    assert "must be a directory" in err


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module of factories in the working directory."""
    text = """
import torch
from torch import nn

class Doubles(nn.Module):
    def forward(self, x):
        return x * 2

def doubles():
    return nn.Sequential(Doubles())

def tensor():
    return torch.ones(2, 3)

def linear():
    return nn.Sequential(nn.Linear(4, 4))

def lazy():
    return nn.Sequential(nn.LazyLinear(3))

def norm():
    return nn.RMSNorm(8, eps=1e-6)

def weightless():
    return nn.RMSNorm(8, eps=1e-6, elementwise_affine=False)

def meta():
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(4, 4))
"""
    (tmp_path / "factories_of_models.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "factories_of_models"


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("", "MODEL is empty"),
        (".", "there is no config.json in it"),
        ("factories_of_models.py", "it is a file, and must be a directory"),
        ("factories_of_models:", "not of the form module:factory"),
        (":linear", "not of the form module:factory"),
        ("factories_of_models:linaer", "did you mean 'linear'?"),
    ],
)
def test_a_model_that_is_misspelt_is_one_error(
    capsys: pytest.CaptureFixture[str], factories: str, model: str, said: str
) -> None:
    code, _, err = run(capsys, "layers", model)
    assert code == 1
    assert said in err
    assert "go on" in err


def test_a_model_without_weights_is_planned_and_verified_on_the_cpu(
    capsys: pytest.CaptureFixture[str], factories: str
) -> None:
    code, out, _ = run(capsys, "plan", f"{factories}:weightless", "--json")
    assert code == 0
    assert json.loads(out)["target"]["device"] == "cpu"
    code, out, _ = run(capsys, "plan", f"{factories}:doubles")
    assert code == 0
    assert f"none of its layers is registered or recognised: kernelwise layers {factories}:doubles says why" in out
    code, out, _ = run(capsys, "verify", f"{factories}:doubles")
    assert code == 0
    assert "there is nothing to check" in out


@pytest.mark.parametrize("command", ["layers", "plan", "verify"])
def test_a_lazy_model_is_one_error(capsys: pytest.CaptureFixture[str], factories: str, command: str) -> None:
    arguments = ("--explain", "0") if command != "verify" else ()
    code, _, err = run(capsys, command, f"{factories}:lazy", *arguments)
    assert code == 1
    assert err.startswith("error: 0 (LazyLinear) has no shape yet")


def test_plan_explains_layers_by_name_and_the_whole_model(capsys: pytest.CaptureFixture[str], factories: str) -> None:
    _, out, _ = run(capsys, "plan", "llama", "--json", "--explain", "RMSNorm")
    assert {decision["layer"]["name"] for decision in json.loads(out)["decisions"]} == {"RMSNorm"}
    for whole in ("", "(the model itself)"):
        code, out, _ = run(capsys, "plan", f"{factories}:norm", "--explain", whole)
        assert code == 0
        assert "(the model itself)  RMSNorm" in out
    code, _, err = run(capsys, "plan", "llama", "--explain", "model.layers.0.self_attn.o_prj")
    assert code == 1
    assert "did you mean 'model.layers.0.self_attn.o_proj'?" in err
    assert "kernelwise layers MODEL" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("tune", "{0}:linear", "--inputs", "{0}:tensor"), "Sequential fails on its inputs: RuntimeError: mat1"),
        (("tune", "{0}:linear", "--inputs", "{0}"), "not of the form module:factory\n  go on      --inputs"),
        (("bench", "{0}:linear", "--inputs", "{0}:tenser"), "did you mean 'tensor'?\n  go on      --inputs"),
        (("bench", "{0}:meta", "--inputs", "{0}:tensor"), "without weights (on the meta device)"),
        (("bench", "{0}:linear", "--json", "."), "cannot write .: it is a directory"),
        (("tune", "{0}:linear", "--out", "."), "cannot write .: it is a directory"),
        (("bench", "", "--seconds", "0"), "MODEL is empty"),
    ],
)
def test_what_cannot_be_run_or_written_is_one_error(
    capsys: pytest.CaptureFixture[str], factories: str, arguments: tuple[str, ...], said: str
) -> None:
    code, _, err = run(capsys, *(argument.format(factories) for argument in arguments))
    assert code == 1
    assert said in err
    assert "go on" in err


def test_a_file_that_cannot_be_written_in_the_end_is_one_error(
    capsys: pytest.CaptureFixture[str], factories: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, text: str) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    command = ("bench", f"{factories}:doubles", "--inputs", f"{factories}:tensor", "--contender", "eager")
    code, out, err = run(capsys, *command, "--seconds", "0", "--json", "found.json")
    assert code == 1
    assert "eager" in out
    assert "cannot write found.json: No space left on device" in err


def write_config(directory: Path, **changes: Any) -> None:
    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 3, "vocab_size": 32000}
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", **sizes, **changes}
    (directory / "config.json").write_text(json.dumps(config))


def test_a_directory_is_looked_at_without_its_weights(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    write_config(tmp_path)
    code, out, _ = run(capsys, "plan", str(tmp_path), "--device", "cuda")
    assert code == 0
    assert "builtin:SwiGLUMLP" in out
    assert "weights were not read" in out


def test_weights_that_are_not_whole_are_one_error(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    write_config(tmp_path, hidden_size=8, intermediate_size=8, num_attention_heads=1, vocab_size=8)
    (tmp_path / "model.safetensors").write_bytes(b"half")
    code, _, err = run(capsys, "bench", str(tmp_path))
    assert code == 1
    assert "cannot load the weights" in err
    assert "go on      get them again" in err


def test_a_directory_keeps_class_and_dtype_of_its_config(tmp_path: Path) -> None:
    write_config(tmp_path, architectures=["LlamaForSequenceClassification"])
    model = load_model(str(tmp_path)).model
    assert type(model).__name__ == "LlamaForSequenceClassification"
    assert {(parameter.device.type, parameter.dtype) for parameter in model.parameters()} == {("meta", torch.bfloat16)}
    assert torch.get_default_dtype() == torch.float32


def test_a_quantised_checkpoint_says_what_is_not_shown(tmp_path: Path) -> None:
    write_config(tmp_path, quantization_config={"quant_method": "fp8"})
    assert any("quantised" in note for note in load_model(str(tmp_path)).notes)


def test_a_directory_without_config_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, _, err = run(capsys, "layers", str(tmp_path))
    assert code == 1
    assert "cannot read the config" in err


@pytest.mark.parametrize("model_type", ["llama", "qwen3_next", "deepseek_v3", "gpt2", "mixtral", "gemma3_text", "bert"])
def test_small_models_run(model_type: str) -> None:
    torch.set_num_threads(1)
    state = torch.get_rng_state()
    model = load_model(model_type).model
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        out = model(input_ids=torch.arange(4, 20).reshape(1, -1))
    assert out.logits.shape[:2] == (1, 16)
    assert out.logits.isfinite().all()
    assert sum(parameter.numel() for parameter in model.parameters()) < 3_000_000


def test_a_small_model_has_every_kind_of_layer() -> None:
    layers = load_model("qwen3_next").model.model.layers
    assert {hasattr(layer, "linear_attn") for layer in layers} == {True, False}


def test_an_error_of_ours_fits_in_a_line() -> None:
    error = KernelwiseError(
        "no kernel\n  tried      one   too wide\n             two\n  go on      wait\n    fix: this"
    )
    assert in_a_line(error) == "no kernel; tried: one too wide two; go on: wait; fix: this"
    assert in_a_line(ValueError("first\nsecond")) == "ValueError: first"
