from __future__ import annotations

import gc
import os
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fakehub import kernel_files, write_files
from loading import NORM
from torch import nn

from kernelwise._data import KernelRef
from kernelwise._errors import KernelLoadError
from kernelwise.sources import load

Refuse = Callable[..., KernelLoadError]
DOUBLE = NORM.replace("self.weight *", "2 * self.weight *")
TRIPLE = NORM.replace("self.weight *", "3 * self.weight *")


def at(path: object, layer: str = "RMSNorm") -> KernelRef:
    return KernelRef("path", str(path), layer)


def run(kernel: Any, weight: float = 1.0) -> float:
    module = nn.Module()
    module.weight, module.variance_epsilon = torch.full((4,), weight), 0.0
    return float(kernel.function(module, torch.ones(2, 4))[0, 0])


@pytest.mark.parametrize("place", ["", "build", "build/torch-universal", "build/"])
def test_each_place_of_a_repository(tmp_path: Path, place: str) -> None:
    write_files(tmp_path / "norm", kernel_files(layers=NORM))
    kernel = load(at(f"{tmp_path}/norm/{place}"), device="cpu")
    assert run(kernel) == 1.0
    assert kernel.revision is None
    assert len(kernel.content_hash or "") == 64


def test_a_symbolic_link_and_a_trailing_slash_are_the_same_kernel(tmp_path: Path) -> None:
    write_files(tmp_path / "norm", kernel_files(layers=NORM))
    (tmp_path / "link").symlink_to(tmp_path / "norm")
    functions = {load(at(tmp_path / name), device="cpu").function for name in ("norm", "norm/", "link")}
    assert len(functions) == 1


def test_a_link_that_moves_is_followed(tmp_path: Path) -> None:
    write_files(tmp_path / "one", kernel_files(layers=NORM))
    write_files(tmp_path / "two", kernel_files(layers=DOUBLE))
    link = tmp_path / "current"
    link.symlink_to(tmp_path / "one")
    first = load(at(link), device="cpu")
    link.unlink()
    link.symlink_to(tmp_path / "two")
    assert (run(load(at(link), device="cpu")), run(first)) == (2.0, 1.0)


def test_the_old_layout(tmp_path: Path) -> None:
    files = kernel_files(layers=NORM)
    files = {path.replace("universal/__init__", "universal/norm/__init__"): data for path, data in files.items()}
    files = {path.replace("universal/layers", "universal/norm/layers"): data for path, data in files.items()}
    write_files(tmp_path, files)
    assert run(load(at(tmp_path), device="cpu")) == 1.0


def test_wrong_paths(tmp_path: Path, refused: Refuse) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    write_files(tmp_path / "cuda", kernel_files(layers=NORM, variants=["torch-cuda"], backend="cuda"))
    assert "no absolute path" in refused(at("norm")).reason
    assert "is a file" in refused(at(tmp_path / "file")).reason
    assert "there is no directory" in refused(at(tmp_path / "missing")).reason
    assert "holds no kernel" in refused(at(tmp_path / "empty")).reason
    assert "torch-cuda: backend (cuda) does not match" in refused(at(tmp_path / "cuda")).reason
    assert "torch-cuda: backend (cuda) does not match" in refused(at(tmp_path / "cuda/build/torch-cuda")).reason
    assert "not for neuron" in refused(at(tmp_path / "cuda"), device="neuron").reason
    assert "null" in refused(at(f"{tmp_path}\0")).reason or "directory" in refused(at(f"{tmp_path}\0")).reason


def test_a_wrong_layer_and_wrong_metadata(tmp_path: Path, refused: Refuse) -> None:
    write_files(tmp_path / "norm", kernel_files(layers="raise RuntimeError('must not run')\n" + NORM))
    assert refused(at(tmp_path / "norm", "RmsNorm")).fix == "name RMSNorm"
    write_files(tmp_path / "bad", kernel_files(layers=NORM, metadata={"name": "Not Valid"}))
    assert "metadata.json" in refused(at(tmp_path / "bad")).reason
    write_files(tmp_path / "wants", kernel_files(layers=NORM, metadata={"python-depends": ["unheard-of"]}))
    assert "unheard-of" in refused(at(tmp_path / "wants")).reason


def test_a_kernel_edited_on_disk_is_read_again_and_the_old_one_keeps_working(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    folder = write_files(tmp_path / "norm", kernel_files(layers=NORM, metadata={"id": "_norm_fixed"}))
    file = folder / "build/torch-universal/layers.py"
    first = load(at(folder), device="cpu")
    stamp = file.stat().st_mtime
    file.write_text(DOUBLE)
    os.utime(file, (stamp, stamp))
    second = load(at(folder), device="cpu")
    file.write_text(TRIPLE)  # the same size in the same second, which cached bytecode cannot tell apart
    os.utime(file, (stamp, stamp))
    third = load(at(folder), device="cpu")
    assert [run(kernel) for kernel in (first, second, third)] == [1.0, 2.0, 3.0]
    assert len({kernel.content_hash for kernel in (first, second, third)}) == 3
    file.write_text(NORM)
    assert load(at(folder), device="cpu").function is first.function
    assert not list(folder.rglob("__pycache__"))


def test_an_edited_part_and_a_late_import_belong_to_their_own_kernel(tmp_path: Path) -> None:
    lazy = NORM.replace("        variance =", "        from .part import FACTOR\n        variance =").replace(
        "self.weight *", "FACTOR * self.weight *"
    )
    files = kernel_files(layers=lazy, extra={"part.py": "FACTOR = 1\n"}, metadata={"id": "_norm_fixed"})
    folder = write_files(tmp_path / "norm", files)
    first = load(at(folder), device="cpu")
    assert run(first) == 1.0
    (folder / "build/torch-universal/part.py").write_text("FACTOR = 5\n")
    second = load(at(folder), device="cpu")
    assert (run(second), run(first)) == (5.0, 1.0)


def test_two_builds_with_one_metadata_id_are_two_kernels(tmp_path: Path) -> None:
    for name, layers in (("one", NORM), ("two", DOUBLE)):
        write_files(tmp_path / name, kernel_files(layers=layers, metadata={"id": "_norm_same"}))
    one, two = load(at(tmp_path / "one"), device="cpu"), load(at(tmp_path / "two"), device="cpu")
    assert (run(one), run(two)) == (1.0, 2.0)
    assert load(at(tmp_path / "one"), device="cpu").function is one.function


def test_an_id_that_is_the_name_of_a_package_does_not_hide_it(tmp_path: Path) -> None:
    write_files(tmp_path / "norm", kernel_files(layers=NORM, metadata={"id": "colorsys"}))
    sys.modules.pop("colorsys", None)
    load(at(tmp_path / "norm"), device="cpu")
    import colorsys

    assert colorsys.rgb_to_hsv(0, 0, 0) == (0.0, 0.0, 0)


def test_a_broken_edit_leaves_the_loaded_kernel_alone(tmp_path: Path, refused: Refuse) -> None:
    folder = write_files(tmp_path / "norm", kernel_files(layers=NORM, metadata={"id": "_norm_fixed"}))
    kernel = load(at(folder), device="cpu")
    (folder / "build/torch-universal/layers.py").write_text(
        "import sys\nsys.modules[__name__]\nraise OSError('gone')\n" + NORM
    )
    assert "gone" in refused(at(folder)).reason
    assert run(kernel) == 1.0
    (folder / "build/torch-universal/layers.py").write_text(DOUBLE)
    assert run(load(at(folder), device="cpu")) == 2.0


def test_a_copy_that_is_deleted_leaves_its_kernel_working(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "norm", kernel_files(layers=NORM))
    kernel = load(at(folder), device="cpu")
    shutil.rmtree(folder)
    gc.collect()
    assert run(kernel) == 1.0


def test_a_kernel_that_compiles_still_does_after_an_edit(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "norm", kernel_files(layers=NORM, metadata={"id": "_norm_fixed"}))
    load(at(folder), device="cpu")
    (folder / "build/torch-universal/layers.py").write_text(DOUBLE)
    kernel = load(at(folder), device="cpu")
    module = nn.Module()
    module.weight, module.variance_epsilon = torch.ones(4), 0.0
    compiled = torch.compile(kernel.function, backend="eager", fullgraph=True)  # type: ignore[arg-type]
    assert float(compiled(module, torch.ones(2, 4))[0, 0]) == 2.0


def test_operators_that_are_registered_already_ask_for_a_new_python(tmp_path: Path, refused: Refuse) -> None:
    registering = "library = torch.library.Library('kernelwise_test_operators', 'DEF')\n"
    layers = NORM.replace("class RMSNorm", f"{registering}class RMSNorm")
    folder = write_files(tmp_path / "norm", kernel_files(layers=layers, metadata={"id": "_norm_fixed"}))
    kernel = load(at(folder), device="cpu")
    (folder / "build/torch-universal/layers.py").write_text(layers + "\n")
    error = refused(at(folder))
    assert "registered by another build" in error.reason
    assert "start Python again" in (error.fix or "")
    assert run(kernel) == 1.0


def test_loading_from_a_worker_thread(tmp_path: Path) -> None:
    write_files(tmp_path / "norm", kernel_files(layers=NORM))
    results: list[float] = []
    thread = threading.Thread(target=lambda: results.append(run(load(at(tmp_path / "norm"), device="cpu"))))
    thread.start()
    thread.join()
    assert results == [1.0]
