"""KernelConfig against models and the `kernels` library."""

from __future__ import annotations

import copy
import json
import pickle
import sys
import textwrap
from pathlib import Path

import kernels
import pytest
import torch
from kernels import LayerRepository, LocalLayerRepository, Mode
from torch import nn

from kernelwise._configuring._config import KernelConfig
from kernelwise._errors import KernelConfigError

HUB = "kernels-community/layer_norm:LlamaRMSNorm"


@kernels.use_kernel_forward_from_hub("RMSNorm")
class Norm(nn.Module):
    def __init__(self, size: int = 4) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x


@kernels.use_kernel_forward_from_hub("SiLU")
class Act(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.silu(x)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = Norm()
        self.act = Act()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.norm(x))


def write_repository(root: Path, *, number: int, device: str = "cpu", layer: str = "TenTimes") -> Path:
    """Write a local kernel repository whose layer multiplies its input by `number`."""
    variant = root / "build" / f"torch-{device}"
    variant.mkdir(parents=True)
    metadata = {
        "name": "ten-times",
        "id": f"ten_times_{number}_{abs(hash(str(root)))}",
        "version": 1,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": device},
    }
    (variant / "metadata.json").write_text(json.dumps(metadata))
    (variant / "__init__.py").write_text("from . import layers\n\n__all__ = ['layers']\n")
    code = f"""
        import torch
        from torch import nn


        class {layer}(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return {number} * x
    """
    (variant / "layers.py").write_text(textwrap.dedent(code))
    return root


@pytest.fixture
def repository(tmp_path):
    return write_repository(tmp_path / "ten_times", number=10)


def problems_of(config: KernelConfig, model: object) -> list[str]:
    with pytest.raises(KernelConfigError) as caught:
        config.sanitize_kernel_mapping(model)
    assert isinstance(caught.value, ValueError)
    assert all(problem.fix for problem in caught.value.problems)
    return [f"{problem.where}: {problem.what}" for problem in caught.value.problems]


# --- checking against a model


def test_a_good_config_passes_for_many_models_and_stays_as_written(repository):
    mapping = {
        "RMSNorm": {"cpu": f"{repository}:TenTimes", "cuda": {Mode.INFERENCE: HUB, "training": None}},
        "SiLU": ("kernels-community/activation:SiLU", {"version": 1, "trust_remote_code": False}),
    }
    config = KernelConfig(mapping)
    before = copy.deepcopy(mapping)
    for model in (Model(), nn.Sequential(Model(), Act()), Model().train(), Model().eval()):
        config.sanitize_kernel_mapping(model)
        config.create_compatible_mapping(model)
        config.rules()
        config.to_dict()
        repr(config)
    assert config.kernel_mapping is mapping
    assert mapping == before
    assert vars(config) == vars(KernelConfig(before))


def test_an_unknown_layer_is_told_the_nearest_one():
    (line,) = problems_of(KernelConfig({"RMSNrom": HUB}), Model())
    assert line == "rule 1 ('RMSNrom'): the model has no layer 'RMSNrom'; did you mean 'RMSNorm'?"
    (line,) = problems_of(KernelConfig({"Experts@model.*": HUB}), Model())
    assert line.endswith("the model has no layer 'Experts'; known: LinearActivation, RMSNorm, SiLU")


def test_the_layers_may_be_given_instead_of_discovered():
    with pytest.raises(KernelConfigError, match="no layer 'RMSNorm'"):
        KernelConfig({"RMSNorm": HUB}).sanitize_kernel_mapping(Model(), layers=[])


def test_problems_of_form_of_layer_and_of_path_are_listed_together(tmp_path):
    mapping = {
        "RMSNrom": ("kernels-community/layer_norm:LlamaRMSNorm", {"versoin": 1}),
        "SiLU": f"{tmp_path / 'missing'}:SiLU",
        "RMSNorm": {"gpu": HUB},
    }
    config = KernelConfig(mapping, use_local_kernel="yes", inherit_mapping=0, on_miss="ignore", verify="no")
    lines = problems_of(config, Model())
    for said in (
        "use_local_kernel is 'yes', and must be a bool",
        "inherit_mapping is 0, and must be a bool",
        "on_miss is 'ignore'",
        "verify is 'no'",
        "did you mean 'version'?",
        "has no layer 'RMSNrom'; did you mean 'RMSNorm'?",
        "does not exist",
        "did you mean 'cuda' or 'rocm'?",
    ):
        assert sum(said in line for line in lines) == 1, (said, lines)


@pytest.mark.parametrize("model", [None, "llama", Model, lambda x: x], ids=["None", "str", "class", "function"])
def test_what_is_no_model_is_refused_by_every_method(model):
    config = KernelConfig({"RMSNorm": HUB})
    assert "must be a torch.nn.Module" in problems_of(config, model)[0]
    with pytest.raises(KernelConfigError, match=r"torch\.nn\.Module"):
        config.create_compatible_mapping(model)


def test_local_paths_must_hold_a_repository_with_the_layer(repository, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    (tmp_path / "empty").mkdir()
    where = "rule 1 ('RMSNorm'): "
    for path, said in {
        f"{repository}:TenTimes": None,
        f"{repository}/build:TenTimes": None,
        f"{repository}/build/torch-cpu/:TenTimes": None,
        f"{tmp_path}/missing:TenTimes": f"the local path '{tmp_path}/missing' does not exist",
        f"{file}:TenTimes": f"the local path '{file}' is a file, and must be a directory",
        f"{tmp_path}/empty:TenTimes": f"the local path '{tmp_path}/empty' holds no kernel repository",
        f"{repository}:TenTime": f"the kernel repository '{repository}' has no layer 'TenTime'; did you mean 'TenTimes'?",
    }.items():
        config = KernelConfig({"RMSNorm": path})
        if said is None:
            config.sanitize_kernel_mapping(Model())
        else:
            assert problems_of(config, Model()) == [where + said]
    windows = problems_of(KernelConfig({"RMSNorm": "C:\\kernels\\mine:Layer"}), Model())
    assert windows == [where + "the local path 'C:\\\\kernels\\\\mine' does not exist"]


def test_a_path_for_another_device_need_not_exist_here_but_must_be_right_where_it_does(repository):
    KernelConfig({"RMSNorm": {"cuda": "/not/here:Layer"}}).sanitize_kernel_mapping(Model())
    assert "does not exist" in problems_of(KernelConfig({"RMSNorm": {"cpu": "/not/here:Layer"}}), Model())[0]
    assert "no layer 'X'" in problems_of(KernelConfig({"RMSNorm": {"cuda": f"{repository}:X"}}), Model())[0]


def test_checking_neither_imports_nor_downloads(repository, tmp_path, monkeypatch):
    marker = tmp_path / "imported"
    for file in (repository / "build" / "torch-cpu").glob("*.py"):
        file.write_text(file.read_text() + f"\nopen({str(marker)!r}, 'w')\n")
    package = tmp_path / "site" / "some_kernels"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(f"open({str(marker)!r}, 'w')\nclass Norm: ...\n")
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a connection was opened"))
    config = KernelConfig(
        {
            "RMSNorm": {
                "cpu": f"{repository}:TenTimes",
                "cuda": "package:some_kernels:Norm",
                "xpu": "no-such-org/repo:Norm",
            }
        }
    )
    config.sanitize_kernel_mapping(Model())
    with pytest.warns(UserWarning, match="left out"):
        config.create_compatible_mapping(Model())
    assert "some_kernels" not in sys.modules
    assert not marker.exists()


def test_what_fuses_is_checked_by_its_paths():
    good = (("RMSNorm", "*.norm"), ("Act", "*.act"))
    KernelConfig({good: HUB}).sanitize_kernel_mapping(nn.Sequential(Model()))
    (line,) = problems_of(KernelConfig({(("RMSNorm", "0.norm"), ("Act", "0.actt")): HUB}), nn.Sequential(Model()))
    assert line.endswith("the model has no module at '0.actt', where 'Act' is to be fused; did you mean '0.act'?")


# --- the mapping of the kernels library


def test_the_mapping_of_the_kernels_library():
    config = KernelConfig(
        {
            "RMSNorm": {
                "cuda": {"inference": HUB, "training+compile": "org/repo@main:Norm"},
                "cpu": "org/repo@v3:Norm",
            },
            "SiLU": ("org/repo:SiLU", {"version": 2, "trust_remote_code": True}),
        }
    )
    norm = LayerRepository("kernels-community/layer_norm", layer_name="LlamaRMSNorm", version=1)
    expected = {
        "RMSNorm": {
            "cuda": {
                Mode.INFERENCE: norm,
                Mode.TRAINING | Mode.TORCH_COMPILE: LayerRepository("org/repo", layer_name="Norm", revision="main"),
            },
            "cpu": {Mode.INFERENCE: LayerRepository("org/repo", layer_name="Norm", version=3)},
        },
        "SiLU": {
            "cpu": {
                Mode.INFERENCE: LayerRepository("org/repo", layer_name="SiLU", version=2, trust_remote_code=True),
            }
        },
    }
    assert config.create_compatible_mapping(Model().eval()) == expected


@pytest.mark.parametrize(
    ("training", "compile", "mode"),
    [
        (False, False, Mode.INFERENCE),
        (True, False, Mode.TRAINING),
        (False, True, Mode.INFERENCE | Mode.TORCH_COMPILE),
        (True, True, Mode.TRAINING | Mode.TORCH_COMPILE),
    ],
)
def test_a_value_without_a_mode_gets_the_one_the_model_is_in(training, compile, mode):
    mapping = KernelConfig({"RMSNorm": HUB}).create_compatible_mapping(Model().train(training), compile)
    assert list(mapping["RMSNorm"]["cpu"]) == [mode]


def test_the_device_is_the_models_own_and_rocm_is_not_cuda(monkeypatch):
    config = KernelConfig({"SiLU": HUB})
    with pytest.raises(KernelConfigError, match=r'no parameters.*\n.*pass device="cuda"'):
        config.create_compatible_mapping(Act())
    with pytest.raises(KernelConfigError, match="meta device"):
        config.create_compatible_mapping(Model().to("meta"))
    with pytest.raises(KernelConfigError, match=r"'cudaa'.*did you mean 'cuda'"):
        config.create_compatible_mapping(Act(), device="cudaa")
    for device in ("cuda", "cuda:1", torch.device("cuda", 1)):
        assert list(config.create_compatible_mapping(Act(), device=device)["SiLU"]) == ["cuda"]
    monkeypatch.setattr(torch.version, "hip", "6.3")
    assert list(config.create_compatible_mapping(Act(), device=torch.device("cuda"))["SiLU"]) == ["rocm"]
    assert list(config.create_compatible_mapping(Act(), device="cpu")["SiLU"]) == ["cpu"]


def test_a_local_layer_repository_gets_its_package_name_where_it_takes_one(repository, monkeypatch):
    config = KernelConfig({"RMSNorm": f"{repository}:TenTimes"})
    made = config.create_compatible_mapping(Model().eval())["RMSNorm"]["cpu"][Mode.INFERENCE]
    assert made == LocalLayerRepository(repo_path=repository, layer_name="TenTimes")

    class Older:
        def __init__(self, repo_path: Path, *, package_name: str, layer_name: str) -> None:
            self.given = (repo_path, package_name, layer_name)

    monkeypatch.setattr(kernels, "LocalLayerRepository", Older)
    made = config.create_compatible_mapping(Model().eval())["RMSNorm"]["cpu"][Mode.INFERENCE]
    assert made.given == (repository, "ten_times", "TenTimes")


def test_what_the_kernels_library_cannot_express():
    with pytest.raises(KernelConfigError, match=r"rule 1 \('RMSNorm@0.\*'\): names a module path"):
        KernelConfig({"RMSNorm@0.*": None}).create_compatible_mapping(Model())
    config = KernelConfig({"RMSNorm": "builtin:RMSNorm", "SiLU": "package:a.b:SiLU", (("A", "a"), ("B", "b")): HUB})
    with pytest.warns(UserWarning, match="left out") as caught:
        assert config.create_compatible_mapping(Model()) == {}
    (warning,) = caught
    assert all(rule.where in str(warning.message) for rule in config.rules())
    assert warning.filename == __file__


def test_no_other_mode_stands_in_for_one_that_keeps_the_own_code():
    mapping = {"RMSNorm": {"inference": None, "training": HUB}, "SiLU": {"cpu": {"inference": None}, "cuda": HUB}}
    config = KernelConfig(mapping)
    hub = LayerRepository("kernels-community/layer_norm", layer_name="LlamaRMSNorm", version=1)
    assert config.create_compatible_mapping(Model().eval()) == {
        "RMSNorm": {"cpu": {}},
        "SiLU": {"cpu": {}, "cuda": {Mode.INFERENCE: hub}},
    }
    assert config.create_compatible_mapping(Model().train()) == {
        "RMSNorm": {"cpu": {Mode.TRAINING: hub}},
        "SiLU": {"cuda": {Mode.TRAINING: hub}},
    }
    builtin = KernelConfig({"RMSNorm": {"inference": "builtin:RMSNorm", "training": HUB}})
    with pytest.warns(UserWarning, match="left out"):
        assert builtin.create_compatible_mapping(Model().eval()) == {}
    with pytest.warns(UserWarning, match="left out"):
        assert builtin.create_compatible_mapping(Model().train()) == {"RMSNorm": {"cpu": {Mode.TRAINING: hub}}}


@pytest.mark.parametrize("training", [False, True])
def test_the_kernels_library_takes_the_mapping_as_it_is(repository, training):
    config = KernelConfig({"RMSNorm": f"{repository}:TenTimes"})
    x = torch.arange(4.0)
    for model in (Model().train(training), Model().train(training)):
        config.sanitize_kernel_mapping(model)
        mode = Mode.TRAINING if training else Mode.INFERENCE
        with kernels.use_kernel_mapping(config.create_compatible_mapping(model), inherit_mapping=False):
            kernels.kernelize(model, mode=mode, device="cpu")
        assert torch.equal(model.norm(x), 10 * x)
        assert torch.equal(model.act(x), nn.functional.silu(x))


def test_keeping_the_own_code_hides_an_inherited_mapping(repository):
    model = Model().eval()
    inherited = KernelConfig({"RMSNorm": f"{repository}:TenTimes"}).create_compatible_mapping(model)
    own = KernelConfig({"RMSNorm": None}).create_compatible_mapping(model)
    x = torch.arange(4.0)
    with kernels.use_kernel_mapping(inherited, inherit_mapping=False), kernels.use_kernel_mapping(own):
        kernels.kernelize(model, mode=Mode.INFERENCE, device="cpu")
        assert torch.equal(model.norm(x), x)
    with kernels.use_kernel_mapping(inherited, inherit_mapping=False):
        kernels.kernelize(model, mode=Mode.INFERENCE, device="cpu")
        assert torch.equal(model.norm(x), 10 * x)


# --- the object


def test_equality_copies_pickles_and_repr():
    config = KernelConfig({"RMSNorm": None, "A": {Mode.INFERENCE: HUB}, "B": HUB, "C": HUB}, on_miss="keep")
    same = KernelConfig({"RMSNorm": "none", "A": {"inference": HUB}, "B": HUB, "C": HUB}, on_miss="keep")
    assert config == same
    assert config != KernelConfig({"RMSNorm": "none", "A": {"inference": HUB}, "B": HUB, "C": HUB})
    assert config != KernelConfig({"RMSNorm": None}, on_miss="keep")
    assert config != {"RMSNorm": None}
    assert KernelConfig({"A": [HUB, {"version": 1}]}) != KernelConfig({"A": (HUB, {"version": 1})})
    deep = copy.deepcopy(config)
    assert deep == config
    assert deep.kernel_mapping is not config.kernel_mapping
    assert pickle.loads(pickle.dumps(config)) == config
    with pytest.raises(TypeError):
        hash(config)
    assert repr(config) == "KernelConfig('RMSNorm', 'A', 'B', and 1 more, on_miss='keep')"
    assert repr(KernelConfig()) == "KernelConfig()"
    assert repr(KernelConfig(["RMSNorm"])) == "KernelConfig(['RMSNorm'])"


def test_nothing_is_asked_of_an_empty_config():
    config = KernelConfig()
    assert config.kernel_mapping == {}
    assert config.rules() == ()
    config.sanitize_kernel_mapping(Model())
    assert config.create_compatible_mapping(Model()) == {}


@pytest.mark.parametrize("mapping", [[], ["RMSNorm"], "RMSNorm", 3])
def test_a_mapping_that_is_no_dict(mapping):
    config = KernelConfig(mapping)
    assert "must be a dict" in problems_of(config, Model())[0]
    for use in (config.rules, config.to_dict, lambda: config.create_compatible_mapping(Model())):
        with pytest.raises(KernelConfigError, match="must be a dict"):
            use()


def test_the_examples_of_the_docs_run(tmp_path, capsys):
    text = (Path(__file__).parent.parent / "docs" / "config.md").read_text()
    blocks = [block.partition("\n") for block in text.split("```")[1::2]]
    names: dict[str, object] = {}
    for language, _, code in blocks:
        if language == "python":
            exec(code, names)
        elif language == "toml":
            (tmp_path / "kernels.toml").write_text(code)
            assert len(KernelConfig.load(tmp_path / "kernels.toml").rules()) == 6
    assert [language for language, _, _ in blocks] == ["python", "python", "python", "toml"]
    assert "did you mean 'version'?" in capsys.readouterr().out
    table = text.split("## Values")[1].split("In place of")[0]
    forms = [form for row in table.splitlines()[4:] for form in row.split(" | ")[0].split("`")[1::2]]
    assert len(forms) == 12
    for form in forms:
        assert len(KernelConfig({"RMSNorm": eval(form)}).rules()) == 1
