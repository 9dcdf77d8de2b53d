"""What others' loaders stumble over, one test for each trap, named after it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path

import kernels
import pytest
from fakehub import FakeHub, kernel_files, write_files
from loading import NORM

from kernelwise._data import KernelRef
from kernelwise._errors import KernelLoadError
from kernelwise.sources import load
from kernelwise.sources._repository import find_variant

Refuse = Callable[..., KernelLoadError]
REF = KernelRef("hub", "good/norm", "RMSNorm", version=1)


def test_the_hub_is_asked_about_an_untrusted_repository_before_the_trust_check(hub: FakeHub, refused: Refuse) -> None:
    refused(KernelRef("hub", "stranger/norm", "RMSNorm", version=1))
    assert hub.asked("") == ["/api/organizations/stranger/overview"]


@pytest.mark.parametrize("error", ["ImportError", "OSError", "RuntimeError", "SystemExit", "FileNotFoundError"])
def test_only_file_not_found_falls_back(hub: FakeHub, refused: Refuse, error: str) -> None:
    hub.add("good/norm", {"v1": kernel_files(layers=f"raise {error}('no')\n" + NORM)})
    refused(REF)


def test_version_resolution_is_memoised_per_process(hub: FakeHub) -> None:
    repository = hub.add("good/norm", {"v1": kernel_files(layers=NORM)})
    first = load(REF, device="cpu").revision
    repository.commit(kernel_files(layers=NORM + "\n"), branch="v1")
    assert load(REF, device="cpu").revision not in (None, first)


def test_an_error_while_loading_leaves_half_a_kernel_in_the_process(hub: FakeHub, refused: Refuse) -> None:
    """A later import must not find the parts that came before the error."""
    parts = {"part.py": "VALUE = 1\n", "late.py": "raise OSError('cannot open shared object file')\n"}
    init = "from . import part, late\n"
    hub.add("good/norm", {"v1": kernel_files(layers=NORM, init=init, extra=parts, metadata={"id": "_norm_broken"})})
    refused(REF)
    hub.add(
        "good/norm", {"v1": kernel_files(layers=NORM, init="from . import part\n", extra={"part.py": "VALUE = 2\n"})}
    )
    kernel = load(REF, device="cpu")
    assert kernel.function is not None
    package = sys.modules[kernel.function.__module__.rpartition(".")[0]]
    assert package.part.VALUE == 2


def test_the_signature_is_looked_at_only_for_the_first_class(hub: FakeHub) -> None:
    hub.add("good/norm", {"v1": kernel_files(layers=NORM)})
    signatures = [load(REF, device="cpu").signature for _ in range(2)]
    assert signatures[0] == signatures[1]
    assert [parameter.name for parameter in signatures[1]] == ["hidden_states"]


def test_a_local_kernel_with_a_path_that_is_a_string(tmp_path: Path) -> None:
    write_files(tmp_path / "norm", kernel_files(layers=NORM))
    assert load(KernelRef("path", f"{tmp_path}/norm", "RMSNorm"), device="cpu").reads


def test_active_mappings_are_invisible_in_worker_threads(hub: FakeHub) -> None:
    hub.add("good/norm", {"v1": kernel_files(layers=NORM)})
    seen: list[object] = []
    with kernels.use_kernel_mapping({}, inherit_mapping=False):
        thread = threading.Thread(target=lambda: seen.append(load(REF, device="cpu").function))
        thread.start()
        thread.join()
        assert seen == [load(REF, device="cpu").function]


def test_a_kernel_edited_on_disk_is_not_reloaded(tmp_path: Path) -> None:
    ref = KernelRef("path", str(tmp_path / "norm"), "RMSNorm")
    write_files(tmp_path / "norm", kernel_files(layers=NORM, metadata={"id": "_norm_fixed"}))
    theirs = kernels.get_local_kernel(tmp_path / "norm").layers.RMSNorm
    before = load(ref, device="cpu")
    edited = NORM.replace("can_torch_compile = True", "has_backward = False")
    write_files(tmp_path / "norm", kernel_files(layers=edited, metadata={"id": "_norm_fixed"}))
    after = load(ref, device="cpu")
    assert (before.can_torch_compile, before.has_backward) == (True, True)
    assert (after.can_torch_compile, after.has_backward) == (False, False)
    assert theirs.can_torch_compile


def test_has_backward_defaults_to_true(hub: FakeHub) -> None:
    """The default is the kernels library's; whether it is true is for the check before use to find out."""
    hub.add("good/norm", {"v1": kernel_files(layers=NORM)})
    hub.add(
        "good/inference", {"v1": kernel_files(layers=NORM.replace("can_torch_compile = True", "has_backward = False"))}
    )
    assert load(REF, device="cpu").has_backward
    assert not load(KernelRef("hub", "good/inference", "RMSNorm", version=1), device="cpu").has_backward


def test_offline_a_downloaded_kernel_cannot_be_loaded(hub: FakeHub, tmp_path: Path, refused: Refuse) -> None:
    """It can: its variant folder is a local kernel."""
    hub.add("good/norm", {"v1": kernel_files(layers=NORM)})
    downloaded = load(REF, device="cpu")
    with hub.patched(tmp_path / "cache", offline=True):
        refused(REF)
        snapshot = next((tmp_path / "cache").glob("hub/kernels--good--norm/snapshots/*"))
        local = load(KernelRef("path", str(snapshot), "RMSNorm"), device="cpu")
    assert local.content_hash == downloaded.content_hash
    assert local.function is downloaded.function
    assert find_variant(snapshot, device="cpu") is not None


def test_all_ones_weights_hide_a_kernel_that_ignores_its_weight(hub: FakeHub) -> None:
    """What the forward does not read shows without running it."""
    hub.add("good/norm", {"v1": kernel_files(layers=NORM.replace("self.weight * ", ""))})
    assert load(REF, device="cpu").reads == ("variance_epsilon",)


def test_misspelt_members_pass_as_flags(hub: FakeHub, refused: Refuse) -> None:
    hub.add("good/norm", {"v1": kernel_files(layers=NORM.replace("can_torch_compile", "can_torch_compiled"))})
    assert "can_torch_compiled" in refused(REF).reason


def test_a_class_level_parameter_is_state(hub: FakeHub, refused: Refuse) -> None:
    stateful = NORM.replace("    weight: torch.Tensor\n", "    weight = nn.Parameter(torch.ones(4))\n")
    hub.add("good/norm", {"v1": kernel_files(layers=stateful)})
    assert "weight" in refused(REF).reason
