"""KernelConfig in files: a file says the same as the object, and one that is wrong is an error that names it."""

from __future__ import annotations

import json

import pytest

from kernelwise._configuring._config import KernelConfig
from kernelwise._data import KernelRef
from kernelwise._errors import KernelConfigError

HUB = "kernels-community/layer_norm:LlamaRMSNorm"

TOML = """
on_miss = "keep"

[kernels]
RMSNorm = "kernels-community/layer_norm@v1:LlamaRMSNorm"
"RMSNorm@model.layers.0.*" = "none"
SiLU = ["kernels-community/activation:SiLU", { revision = "main", trust_remote_code = true }]
MLP = { cuda = { inference = "builtin:SwiGLUMLP" }, cpu = "/opt/kernels/mine:MyMLP" }

[[fuse]]
layers = [["RMSNorm", "model.layers.*.norm"], ["MLP", "model.layers.*.mlp"]]
kernel = "org/repo:NormMLP"
"""


def test_a_file_says_the_same_as_the_object(tmp_path):
    file = tmp_path / "kernels.toml"
    file.write_text(TOML)
    config = KernelConfig.load(file)
    assert config == KernelConfig(
        {
            "RMSNorm": "kernels-community/layer_norm@v1:LlamaRMSNorm",
            "RMSNorm@model.layers.0.*": None,
            "SiLU": ("kernels-community/activation:SiLU", {"revision": "main", "trust_remote_code": True}),
            "MLP": {"cuda": {"inference": "builtin:SwiGLUMLP"}, "cpu": "/opt/kernels/mine:MyMLP"},
            (("RMSNorm", "model.layers.*.norm"), ("MLP", "model.layers.*.mlp")): "org/repo:NormMLP",
        },
        on_miss="keep",
    )
    assert config.file == file
    assert [rule.where for rule in config.rules()][-2:] == [
        "rule 4 (kernels.toml: 'MLP' → cpu)",
        "rule 5 (kernels.toml: 'RMSNorm' + 'MLP')",
    ]
    assert repr(config).endswith("on_miss='keep', file='kernels.toml')")
    other = tmp_path / "KERNELS.JSON"
    config.save(str(other))
    assert KernelConfig.load(str(other)) == config
    assert KernelConfig.from_dict(config.to_dict()) == config


def test_a_config_that_is_not_well_formed_is_not_written(tmp_path):
    file = tmp_path / "kernels.toml"
    with pytest.raises(KernelConfigError, match="names no layer"):
        KernelConfig({"RMSNorm": "org/repo"}).save(file)
    with pytest.raises(KernelConfigError, match=r"suffix '\.yaml'"):
        KernelConfig({"RMSNorm": HUB}).save(tmp_path / "kernels.yaml")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("k.toml", "[kernels\n", "k.toml: is not TOML: .*line 1"),
        ("k.toml", '[kernels]\nA = "a/b:L"\nA = "a/b:L"\n', "is not TOML: .*line 3"),
        ("k.json", '{"kernels": {\n"A": }}', "is not JSON: .*line 2"),
        ("k.json", '{"kernels": {"A": "a/b:L", "A": "none"}}', "is not JSON: the key 'A' stands twice"),
        ("k.json", "[" * 100_000, "is not JSON"),
        ("k.json", "[]", r"k.json: is \[\], and must be a table"),
        ("k.json", "null", "and must be a table"),
        ("k.yaml", "kernels: {}", "suffix '.yaml'"),
        ("k.toml", b"\xff\xfe", "is not UTF-8"),
        ("k.toml", '[kernel]\nA = "a/b:L"', "unknown entry 'kernel'; did you mean 'kernels'?"),
        ("k.toml", 'kernels = "a/b:L"', "kernels is 'a/b:L', and must be a table"),
        ("k.toml", 'fuse = "a/b:L"', "fuse is 'a/b:L', and must be an array of tables"),
        ("k.toml", '[[fuse]]\nkernel = "a/b:L"', r"fuse 1 \(k.toml\): .* does not say what is fused"),
        ("k.toml", '[[fuse]]\nlayers = ["A", "B"]\nkernel = "a/b:L"', r"fuse 1 \(k.toml\)"),
        ("k.toml", '[[fuse]]\nlayers = [["A", "a"]]\nkernel = "a/b:L"', "rule 1 .*at least two"),
        ("k.toml", '[kernels]\nA = "a/b:L"\nB = "a/b"', r"rule 2 \(k.toml: 'B'\): 'a/b' names no layer"),
        ("k.toml", '[kernels]\nA = ["a/b:L", { version = 1 }, 3]', "is a tuple of 3"),
        ("k.toml", "[kernels]\nA = 2026-01-01", "is the date"),
        ("k.toml", 'on_miss = "ignore"', "k.toml: on_miss is 'ignore'"),
        ("k.toml", "inherit_mapping = 1", "inherit_mapping is 1, and must be a bool"),
    ],
)
def test_a_bad_file_is_an_error_that_names_it(tmp_path, name, text, said):
    file = tmp_path / name
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(KernelConfigError, match=said):
        KernelConfig.load(file)


def test_the_same_layers_fused_twice(tmp_path):
    entry = '[[fuse]]\nlayers = [["A", "a"], ["B", "b"]]\nkernel = "a/b:L"\n'
    (tmp_path / "k.toml").write_text(entry + entry)
    with pytest.raises(KernelConfigError, match=r"fuse 2 \(k.toml\): fuses the same layers"):
        KernelConfig.load(tmp_path / "k.toml")


def test_a_missing_file_and_a_directory(tmp_path):
    with pytest.raises(KernelConfigError, match="there is no such file"):
        KernelConfig.load(tmp_path / "kernels.toml")
    (tmp_path / "dir.toml").mkdir()
    with pytest.raises(KernelConfigError, match="cannot be read"):
        KernelConfig.load(tmp_path / "dir.toml")


def test_a_byte_order_mark_and_a_schema_line_are_read_over(tmp_path):
    file = tmp_path / "kernels.json"
    file.write_bytes(
        b"\xef\xbb\xbf" + json.dumps({"$schema": "config-schema.json", "kernels": {"A": "a/b:L"}}).encode()
    )
    assert KernelConfig.load(file) == KernelConfig({"A": "a/b:L"})


def test_rules_of_a_loaded_config_are_those_of_the_object(tmp_path):
    config = KernelConfig({"RMSNorm": {"cuda": ("org/repo:Norm", {"version": 2}), "cpu": None}})
    config.save(tmp_path / "kernels.toml")
    loaded = KernelConfig.load(tmp_path / "kernels.toml")
    refs = [(rule.device, rule.ref) for rule in loaded.rules()]
    assert refs == [("cuda", KernelRef("hub", "org/repo", "Norm", version=2)), ("cpu", None)]
