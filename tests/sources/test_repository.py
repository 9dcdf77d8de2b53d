from __future__ import annotations

import sys
from pathlib import Path

import pytest
from fakehub import kernel_files, write_files

from kernelwise.sources._repository import (
    all_variants,
    content_hash,
    find_variant,
    layer_names,
    metadata_problem,
    static_problem,
)

CLASS = "from torch import nn\nclass RMSNorm(nn.Module):\n    def forward(self, x):\n        return x\n"
BOMB = "raise RuntimeError('this code must not run')\n"


def variant_of(folder: Path, **arguments: object) -> Path:
    write_files(folder, kernel_files(**arguments))  # type: ignore[arg-type]
    return folder / "build" / "torch-universal"


@pytest.mark.parametrize("place", ["", "build", "build/torch-universal"])
def test_a_variant_is_found_from_each_of_the_three_places(tmp_path: Path, place: str) -> None:
    variant = variant_of(tmp_path, layers=CLASS)
    assert find_variant(tmp_path / place, device="cpu") == variant


def test_the_preference_is_that_of_the_kernels_library(tmp_path: Path) -> None:
    import torch
    from kernels.variants import get_variants_local, resolve_variant

    major, minor = torch.__version__.split(".")[:2]
    names = [
        "torch-universal",
        "torch-cpu",
        f"torch{major}{minor}-cpu-x86_64-linux",
        "torch-stable-abi29-cpu-x86_64-linux",
    ]
    for name in names:
        write_files(tmp_path, kernel_files(layers=CLASS, variants=[name]))
        best, _ = resolve_variant(get_variants_local(tmp_path / "build"), "cpu")
        expected = tmp_path / "build" / best.variant_str
        assert find_variant(tmp_path, device="cpu") == expected
    assert expected.name != "torch-universal"


def test_no_variant(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    write_files(tmp_path / "cuda", kernel_files(layers=CLASS, variants=["torch-cuda"], backend="cuda"))
    for path in (tmp_path, tmp_path / "missing", file, tmp_path / "cuda", tmp_path / "cuda/build/torch-cuda"):
        assert find_variant(path, device="cpu") is None
    assert all_variants(tmp_path / "cuda") == (tmp_path / "cuda/build/torch-cuda",)


def test_a_device_that_this_pytorch_was_not_built_for_has_no_variant(tmp_path: Path) -> None:
    variant_of(tmp_path, layers=CLASS)
    assert find_variant(tmp_path, device="neuron") is None


def test_a_directory_with_any_name_can_be_the_variant(tmp_path: Path) -> None:
    variant = variant_of(tmp_path / "repo", layers=CLASS).rename(tmp_path / "layer_norm")
    assert find_variant(variant, device="cpu") == variant


def test_looking_runs_no_code(tmp_path: Path) -> None:
    variant = variant_of(tmp_path, init=BOMB, layers=BOMB + CLASS)
    before = set(sys.modules)
    assert find_variant(tmp_path, device="cpu") == variant
    assert layer_names(variant) == {"RMSNorm"}
    assert static_problem(variant, "RMSNorm") is None
    assert metadata_problem(variant) is None
    assert not {name for name in set(sys.modules) - before if "norm" in name}


@pytest.mark.parametrize(
    ("layers", "extra", "names"),
    [
        (CLASS, {}, {"RMSNorm"}),
        (CLASS + "Other = RMSNorm\n", {}, {"RMSNorm", "Other"}),
        ("from .norm import RMSNorm as Norm, helper\n", {"norm.py": CLASS + "def helper(): ...\n"}, {"Norm"}),
        ("from .norm import *\n", {"norm.py": CLASS}, {"RMSNorm"}),
        ("try:\n    import triton\nexcept ImportError:\n    class A: ...\nelse:\n    class B: ...\n", {}, {"A", "B"}),
        ("EPS = float('1e-6')\nfrom math import sqrt\n" + CLASS, {}, {"RMSNorm"}),
        ("class A:\n    class Inner: ...\ndef make():\n    class Local: ...\n", {}, {"A"}),
        ("from os.path import *\n", {}, None),
        ("RMSNorm = make_class()\n", {}, None),
        ("globals()['RMSNorm'] = 1\n", {}, None),
        ("def __getattr__(name): ...\n", {}, None),
        ("from .missing import RMSNorm\n", {}, None),
        ("class broken(:\n", {}, None),
    ],
)
def test_layer_names(tmp_path: Path, layers: str, extra: dict[str, str], names: set[str] | None) -> None:
    assert layer_names(variant_of(tmp_path, layers=layers, extra=extra)) == names


def test_layer_names_of_other_layouts(tmp_path: Path) -> None:
    nested = variant_of(tmp_path / "class", init="class layers:\n    class A: ...\n    class B: ...\n")
    assert layer_names(nested) == {"A", "B"}
    package = variant_of(tmp_path / "package", init="from . import layers\n", extra={"layers/__init__.py": CLASS})
    assert layer_names(package) == {"RMSNorm"}
    assert layer_names(variant_of(tmp_path / "none", init="x = 1\n")) == frozenset()
    assert layer_names(variant_of(tmp_path / "value", init="layers = make()\n")) is None
    old = variant_of(tmp_path / "old", extra={"norm/__init__.py": "from . import layers\n", "norm/layers.py": CLASS})
    (old / "__init__.py").unlink()
    assert layer_names(old) == {"RMSNorm"}


def test_init_of_a_layer_is_seen_without_running_it(tmp_path: Path) -> None:
    stateful = CLASS + "class Bad(nn.Module):\n    def __init__(self): ...\n    def forward(self, x): ...\n"
    variant = variant_of(tmp_path, layers=stateful)
    assert static_problem(variant, "RMSNorm") is None
    assert "__init__" in (static_problem(variant, "Bad") or "")


def test_content_hash_follows_names_and_bytes_and_nothing_else(tmp_path: Path) -> None:
    variant = variant_of(tmp_path / "a", layers=CLASS)
    first = content_hash(variant)
    assert first == content_hash(variant_of(tmp_path / "b", layers=CLASS))
    write_files(variant, {"__pycache__/layers.cpython-311.pyc": b"x", "layers.pyc": b"y"})
    assert content_hash(variant) == first
    (variant / "layers.py").write_text(CLASS + "#")
    edited = content_hash(variant)
    assert edited != first
    (variant / "layers.py").rename(variant / "layer.py")
    assert content_hash(variant) not in (first, edited)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"id": None}, "id"),
        ({"name": "Bad Name"}, "name"),
        ({"version": -1}, "-1"),
        ({"backend": {"type": "abacus"}}, "abacus"),
    ],
)
def test_metadata_that_is_not_valid(tmp_path: Path, metadata: dict[str, object], message: str) -> None:
    variant = variant_of(tmp_path, layers=CLASS, metadata=metadata)
    assert message in (metadata_problem(variant) or "")


def test_metadata_that_cannot_be_read(tmp_path: Path) -> None:
    variant = variant_of(tmp_path, layers=CLASS)
    (variant / "metadata.json").write_text("{")
    assert "cannot be read" in (metadata_problem(variant) or "")
    (variant / "metadata.json").unlink()
    assert "no metadata.json" in (metadata_problem(variant) or "")
