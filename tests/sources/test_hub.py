"""Real downloads, from a Hub on the loopback interface."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import kernels
import pytest
import torch
from fakehub import FakeHub, forget_kernels, kernel_files
from loading import NORM, process_state
from torch import nn

from kernelwise._data import KernelRef
from kernelwise._errors import KernelLoadError
from kernelwise.sources import load

Refuse = Callable[..., KernelLoadError]
DOUBLE = NORM.replace("self.weight *", "2 * self.weight *")
HAS_DEPENDENCIES = hasattr(kernels, "get_kernel_dep")
"""Kernels depend on other kernels from kernels 0.17 on."""


def norm(**pin: object) -> KernelRef:
    if "revision" not in pin:
        pin.setdefault("version", 1)
    return KernelRef("hub", str(pin.pop("location", "good/norm")), str(pin.pop("layer", "RMSNorm")), **pin)  # type: ignore[arg-type]


def run(kernel: object, weight: float = 3.0) -> float:
    """Call a norm kernel on ones: the result is the weight, times two for the kernel that doubles."""
    module = nn.Module()
    module.weight, module.variance_epsilon = torch.full((4,), weight), 0.0
    return float(kernel.function(module, torch.ones(2, 4))[0, 0])  # type: ignore[attr-defined]


def test_a_version_is_loaded_and_says_its_commit(hub: FakeHub) -> None:
    repository = hub.add("good/norm", {"v1": kernel_files(layers=NORM), "v2": kernel_files(layers=DOUBLE)})
    kernel = load(norm(), device="cpu")
    assert run(kernel) == 3.0
    assert kernel.revision == repository.branches["v1"]
    assert kernel.reads == ("variance_epsilon", "weight")
    assert [p.name for p in kernel.signature] == ["hidden_states"]
    assert (kernel.has_backward, kernel.can_torch_compile, kernel.op) == (True, True, None)
    assert kernel.limits.devices == ()
    assert len(kernel.content_hash or "") == 64
    assert run(load(norm(version=2), device="cpu")) == 6.0
    assert run(kernel) == 3.0


@pytest.mark.parametrize("name", ["main", "fast", "release-1"])
def test_a_revision_can_be_a_branch_or_a_tag(hub: FakeHub, name: str) -> None:
    files = kernel_files(layers=NORM)
    repository = hub.add("good/norm", {"main": files, "fast": files}, tags={"release-1": files})
    kernel = load(norm(revision=name), device="cpu")
    assert kernel.revision == repository.resolve(name)


def test_a_commit_is_loaded_without_being_resolved(hub: FakeHub) -> None:
    repository = hub.add("good/norm", {"v1": kernel_files(layers=NORM)})
    commit = repository.branches["v1"]
    repository.commit(kernel_files(layers=DOUBLE), branch="v1")
    kernel = load(norm(revision=commit), device="cpu")
    assert kernel.revision == commit
    assert run(kernel) == 3.0
    assert not hub.asked(r"/refs|/revision/")


def test_a_moved_branch_is_noticed(hub: FakeHub) -> None:
    repository = hub.add("good/norm", {"v1": kernel_files(layers=NORM)})
    before = load(norm(), device="cpu")
    repository.commit(kernel_files(layers=DOUBLE), branch="v1")
    after = load(norm(), device="cpu")
    assert (run(before), run(after)) == (3.0, 6.0)
    assert before.revision != after.revision == repository.branches["v1"]


def test_the_same_commit_is_downloaded_and_imported_once(hub: FakeHub) -> None:
    hub.add("good/norm", {"v1": kernel_files(layers=NORM)})
    first = load(norm(), device="cpu")
    hub.requests.clear()
    second = load(norm(), device="cpu")
    assert second.function is first.function
    assert hub.asked("") == ["/api/organizations/good/overview", "/api/kernels/good/norm/refs"]


def test_a_second_process_finds_the_download_in_the_cache(hub: FakeHub, tmp_path: Path) -> None:
    hub.add("good/norm", {"v1": kernel_files(layers=NORM)})
    code = (
        "from kernelwise._data import KernelRef; from kernelwise.sources import load\n"
        "print(load(KernelRef('hub', 'good/norm', 'RMSNorm', version=1), device='cpu').revision)"
    )
    environment = {**os.environ, **hub.env(tmp_path / "shared")}
    for _ in range(2):
        hub.requests.clear()
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
        )
        assert done.stdout.strip() == hub.repositories["kernel", "good/norm"].branches["v1"], done.stderr
    assert not [request for request in hub.requests if request.method == "GET" and "/resolve/" in request.path]


def test_large_files_come_by_redirect_from_another_host(tmp_path: Path) -> None:
    with FakeHub(trusted={"good"}, lfs_over=100) as hub, hub.patched(tmp_path / "cache"):
        hub.add("good/norm", {"v1": kernel_files(layers=NORM)})
        assert run(load(norm(), device="cpu")) == 3.0
        assert hub.asked("/_large/")


def test_a_tree_of_several_pages(tmp_path: Path) -> None:
    with FakeHub(trusted={"good"}) as hub, hub.patched(tmp_path / "cache"):
        hub.page_size = 2
        hub.add("good/norm", {"v1": kernel_files(layers=NORM, extra={f"part{i}.py": "" for i in range(5)})})
        assert run(load(norm(), device="cpu")) == 3.0
        assert hub.asked("cursor=")


# Trust and form.


def test_nothing_of_a_repository_is_asked_for_before_its_publisher_is_trusted(hub: FakeHub, refused: Refuse) -> None:
    hub.add("stranger/norm", {"v1": kernel_files(layers=NORM)})
    error = refused(norm(location="stranger/norm"))
    assert "no trusted kernel publisher" in error.reason
    assert "trust_remote_code" in (error.fix or "")
    assert hub.asked("") == ["/api/organizations/stranger/overview"]


def test_a_person_is_no_trusted_publisher(hub: FakeHub, refused: Refuse) -> None:
    assert "no organisation" in refused(norm(location="somebody/norm")).reason
    assert hub.asked("") == ["/api/organizations/somebody/overview"]


def test_unknown_trust_is_no_trust(hub: FakeHub, refused: Refuse) -> None:
    hub.add("good/norm", {"v1": kernel_files(layers=NORM)})
    hub.fail("/overview", status=500)
    assert "unknown" in refused(norm()).reason
    assert not hub.asked("good/norm")


def test_the_users_word_is_enough(hub: FakeHub) -> None:
    hub.add("stranger/norm", {"v1": kernel_files(layers=NORM)})
    kernel = load(norm(location="stranger/norm", trust_remote_code=True), device="cpu")
    assert run(kernel) == 3.0
    assert not hub.asked("/overview")


def test_trust_in_a_kernel_is_no_trust_in_what_it_depends_on(hub: FakeHub, refused: Refuse) -> None:
    hub.add("stranger/base", {"v1": kernel_files("base", init="SCALE = 5")})
    depends = {"kernel-depends": [{"repo-id": "stranger/base", "version": 1}]}
    layers = "from kernels import get_kernel_dep\nSCALE = get_kernel_dep('stranger/base').SCALE\n" + NORM
    hub.add("good/norm", {"v1": kernel_files(layers=layers, metadata=depends)})
    assert ("stranger/base" if HAS_DEPENDENCIES else "needs kernels >= 0.17") in refused(norm()).reason
    assert not hub.asked("kernels/stranger")


def test_a_kernel_gets_what_it_depends_on(hub: FakeHub, refused: Refuse) -> None:
    hub.add("good/base", {"v1": kernel_files("base", init="SCALE = 5")})
    depends = {"kernel-depends": [{"repo-id": "good/base", "version": 1}]}
    layers = "from kernels import get_kernel_dep\nSCALE = get_kernel_dep('good/base').SCALE\n" + NORM.replace(
        "self.weight *", "SCALE * self.weight *"
    )
    hub.add("good/norm", {"v1": kernel_files(layers=layers, metadata=depends)})
    if HAS_DEPENDENCIES:
        assert run(load(norm(), device="cpu")) == 15.0
    else:
        assert refused(norm()).fix == "pip install --upgrade kernels"


@pytest.mark.parametrize(
    "ref",
    [
        norm(location="norm"),
        norm(location="good/norm/extra"),
        norm(location="https://huggingface.co/good/norm"),
        norm(location="../.."),
        norm(location="good/.."),
        norm(location="good/norm\0"),
        norm(location="/norm"),
        norm(layer=""),
        norm(layer="not a name"),
        norm(version=1, revision="main"),
        norm(revision=None, version=None),
        norm(version=True),
        norm(version=-1),
        norm(revision=""),
    ],
)
def test_a_wrong_form_is_refused_before_any_request(hub: FakeHub, refused: Refuse, ref: KernelRef) -> None:
    assert refused(ref).fix
    assert hub.asked("") == []


# What the Hub or the way to it can do.


def test_503(hub: FakeHub, refused: Refuse) -> None:
    hub.add("good/norm", {"v1": kernel_files(layers=NORM)})
    hub.fail("/refs", status=503)
    error = refused(norm())
    assert "503" in error.reason
    assert "try again" in (error.fix or "")
    hub.heal()
    assert run(load(norm(), device="cpu")) == 3.0


def test_503_in_the_middle_of_the_download(hub: FakeHub, refused: Refuse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    hub.add("good/norm", {"v1": kernel_files(layers=NORM)})
    hub.fail("/resolve/.*layers.py", status=503)
    assert "503" in refused(norm()).reason
    hub.heal()
    assert run(load(norm(), device="cpu")) == 3.0


def test_a_dropped_connection(hub: FakeHub, refused: Refuse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    hub.add("good/norm", {"v1": kernel_files(layers=NORM)})
    hub.fail("/resolve/.*layers.py", drop=True)
    assert "connection to the Hub failed" in refused(norm()).reason
    hub.heal()
    assert run(load(norm(), device="cpu")) == 3.0


def test_a_connection_that_drops_in_the_middle_of_a_file(
    hub: FakeHub, refused: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    hub.add("good/norm", {"v1": kernel_files(layers=NORM)})
    hub.cut("/resolve/.*layers.py", times=1)
    assert run(load(norm(), device="cpu")) == 3.0  # the Hub client asks again
    hub.add("good/other", {"v1": kernel_files("other", layers=NORM)})
    hub.cut("/resolve/.*layers.py")
    refused(norm(location="good/other"))
    hub.heal()
    assert run(load(norm(location="good/other"), device="cpu")) == 3.0


def test_no_server_at_all(hub: FakeHub, refused: Refuse, tmp_path: Path) -> None:
    with FakeHub(trusted={"good"}) as gone:
        pass
    with gone.patched(tmp_path / "other"):
        error = refused(norm(trust_remote_code=True))
    assert "connection to the Hub failed" in error.reason
    assert error.__cause__ is not None


@pytest.mark.parametrize("file", ["layers.py", "metadata.json"])
def test_wrong_bytes_are_noticed_before_they_run(hub: FakeHub, refused: Refuse, file: str) -> None:
    hub.add("good/norm", {"v1": kernel_files(layers=NORM)})
    hub.corrupt(f"/resolve/.*{file}", times=1)
    error = refused(norm())
    assert "damaged" in error.reason
    assert file in error.reason
    assert run(load(norm(), device="cpu")) == 3.0


def test_wrong_bytes_of_a_large_file(tmp_path: Path, refused: Refuse) -> None:
    with FakeHub(trusted={"good"}, lfs_over=100) as hub, hub.patched(tmp_path / "cache"):
        hub.add("good/norm", {"v1": kernel_files(layers=NORM)})
        hub.corrupt("/_large/.*layers.py", times=1)
        assert "damaged" in refused(norm()).reason
        assert run(load(norm(), device="cpu")) == 3.0


def test_offline(tmp_path: Path, refused: Refuse) -> None:
    with FakeHub(trusted={"good"}) as hub, hub.patched(tmp_path / "cache", offline=True):
        error = refused(norm())
        assert "offline" in error.reason
        assert "local path" in (error.fix or "")
        assert hub.asked("") == []


def test_missing_repository_version_revision_and_commit(hub: FakeHub, refused: Refuse) -> None:
    hub.add("good/norm", {"v1": kernel_files(layers=NORM), "v3": kernel_files(layers=NORM)})
    assert "no kernel repository good/other" in refused(norm(location="good/other")).reason
    assert "its versions: v1, v3" in refused(norm(version=2)).reason
    assert "no revision 'nightly'" in refused(norm(revision="nightly")).reason
    assert "no revision" in refused(norm(revision="0" * 40)).reason
    assert run(load(norm(), device="cpu")) == 3.0


def test_private_and_gated_repositories(hub: FakeHub, refused: Refuse) -> None:
    hub.add("good/norm", {"v1": kernel_files(layers=NORM)}, private=True)
    hub.add("good/gated", {"v1": kernel_files(layers=NORM)}, gated=True)
    assert "hf auth login" in (refused(norm()).fix or "")
    assert "gated" in refused(norm(location="good/gated")).reason


# What a repository can lack.


def test_no_build_for_this_machine_says_why_for_each_variant(hub: FakeHub, refused: Refuse) -> None:
    variants = ["torch213-cxx11-cu128-aarch64-linux", "torch-cuda"]
    hub.add("good/norm", {"v1": kernel_files(layers=NORM, variants=variants, backend="cuda")})
    reason = refused(norm()).reason
    assert "no build for this machine" in reason
    assert all(variant in reason for variant in variants)
    assert "does not match" in reason


def test_a_repository_without_builds(hub: FakeHub, refused: Refuse) -> None:
    hub.add("good/norm", {"v1": {"README.md": "nothing built"}})
    assert "build" in refused(norm()).reason


def test_a_device_that_this_pytorch_was_not_built_for(hub: FakeHub, refused: Refuse) -> None:
    hub.add("good/norm", {"v1": kernel_files(layers=NORM)})
    error = refused(norm(), device="neuron")
    assert "not for neuron" in error.reason


def test_a_layer_that_is_not_in_the_repository(hub: FakeHub, refused: Refuse) -> None:
    hub.add("good/norm", {"v1": kernel_files(layers="raise RuntimeError('this code must not run')\n" + NORM)})
    error = refused(norm(layer="LlamaRMSNorm"))
    assert "no layer LlamaRMSNorm; it has RMSNorm" in error.reason
    assert error.fix == "name RMSNorm"


@pytest.mark.parametrize(("metadata", "message"), [({"id": None}, "id"), ({"license": None}, "license")])
def test_metadata_that_is_not_valid(hub: FakeHub, refused: Refuse, metadata: dict[str, None], message: str) -> None:
    hub.add("good/norm", {"v1": kernel_files(layers=NORM, metadata=metadata)})
    assert message in refused(norm()).reason


def test_a_kernel_for_a_newer_kernels_library(hub: FakeHub, refused: Refuse) -> None:
    hub.add("good/norm", {"v1": kernel_files(layers=NORM, metadata={"kernels-minver": "99.0.0"})})
    error = refused(norm())
    assert "99.0" in error.reason
    assert error.fix == "pip install --upgrade kernels"


def test_a_missing_python_dependency_says_how_to_install_it(
    hub: FakeHub, refused: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "einops", None)
    hub.add("good/norm", {"v1": kernel_files(layers=NORM, metadata={"python-depends": ["einops"]})})
    assert refused(norm()).fix == "pip install einops"


@pytest.mark.parametrize(
    ("layers", "message", "fix"),
    [
        ("import einops_of_the_future\n", "einops_of_the_future", "pip install einops_of_the_future"),
        ("raise ImportError('libcudart.so.99: cannot open shared object file')\n", "libcudart.so.99", "name a version"),
        ("raise OSError('wrong ELF class')\n", "wrong ELF class", ""),
        ("raise RuntimeError('no kernel image is available')\n", "no kernel image", ""),
        ("raise SystemExit(3)\n", "asked Python to exit (3)", ""),
        ("import sys\nsys.exit()\n", "asked Python to exit", ""),
        ("class broken(:\n", "SyntaxError", ""),
        ("from . import missing_part\n", "missing_part", "name a version"),
        ("raise ValueError('first line\\nsecond line')\n", "first line second line", ""),
    ],
)
def test_code_that_cannot_be_imported(hub: FakeHub, refused: Refuse, layers: str, message: str, fix: str) -> None:
    hub.add("good/broken", {"v1": kernel_files("broken", layers=layers + NORM)})
    hub.add("good/norm", {"v1": kernel_files(layers=NORM)})
    error = refused(norm(location="good/broken"))
    assert message in error.reason
    assert (error.fix or "").startswith(fix)
    assert error.__cause__ is not None
    assert run(load(norm(), device="cpu")) == 3.0


def test_an_interrupt_passes_through_and_leaves_nothing(hub: FakeHub, tmp_path: Path) -> None:
    hub.add("good/norm", {"v1": kernel_files(layers="raise KeyboardInterrupt\n" + NORM)})
    before = process_state(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        load(norm(), device="cpu")
    assert process_state(tmp_path) == before


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("class RMSNorm(nn.Module):\n    def __init__(self): ...\n    def forward(self, x): ...\n", "__init__"),
        (
            "class Base(nn.Module):\n    def __init__(self): ...\nclass RMSNorm(Base):\n    def forward(self, x): ...\n",
            "__init__",
        ),
        ("class RMSNorm(nn.Module):\n    eps = 1\n    def forward(self, x): ...\n", "members besides forward: eps"),
        ("class RMSNorm(nn.Module): ...\n", "no forward"),
        ("class RMSNorm:\n    def forward(self, x): ...\n", "no torch.nn.Module class"),
        ("RMSNorm = print\nRMSNorm = __import__('functools').partial(print)\n", "no torch.nn.Module class"),
    ],
)
def test_a_class_that_is_no_stateless_layer(hub: FakeHub, refused: Refuse, body: str, message: str) -> None:
    hub.add("good/norm", {"v1": kernel_files(layers="from torch import nn\n" + body)})
    assert message in refused(norm()).reason


def test_a_layer_with_an_init_is_refused_before_its_code_runs(hub: FakeHub, refused: Refuse) -> None:
    body = "class RMSNorm(nn.Module):\n    def __init__(self): ...\n    def forward(self, x): ...\n"
    hub.add("good/norm", {"v1": kernel_files(layers="raise RuntimeError('this code must not run')\n" + body)})
    assert "__init__" in refused(norm()).reason


def test_a_module_that_does_not_import_its_layers(hub: FakeHub, refused: Refuse) -> None:
    hub.add("good/norm", {"v1": kernel_files(init="x = 1\n", extra={"layers.py": NORM})})
    assert "no `layers`" in refused(norm()).reason


def test_a_build_for_another_architecture(hub: FakeHub, refused: Refuse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.version.cuda", "12.8")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda *_: (7, 5))
    metadata = {"backend": {"type": "cuda", "archs": ["9.0", "9.0a"]}}
    hub.add("good/norm", {"v1": kernel_files(layers=NORM, variants=["torch-cuda"], metadata=metadata)})
    reason = refused(norm(), device="cuda").reason
    assert "7.5" in reason
    assert "9.0" in reason


def test_a_build_that_fits_states_its_oldest_architecture(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.version.cuda", "12.8")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda *_: (9, 0))
    metadata = {"backend": {"type": "cuda", "archs": ["9.0a", "8.0", "10.0"]}}
    hub.add("good/norm", {"v1": kernel_files(layers=NORM, variants=["torch-cuda"], metadata=metadata)})
    limits = load(norm(), device="cuda").limits
    assert (limits.devices, limits.min_arch) == (("cuda",), "sm_80")


# Threads.


def test_threads_that_load_one_reference_share_one_kernel(hub: FakeHub) -> None:
    hub.add("good/norm", {"v1": kernel_files(layers=NORM, init="import time; time.sleep(0.3)\n")})
    found: list[object] = []

    def work() -> None:
        try:
            found.append(load(norm(), device="cpu").function)
        except BaseException as error:
            found.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(set(found)) == 1
    assert callable(found[0])


def test_threads_that_load_bad_and_good_kernels_do_not_disturb_each_other(hub: FakeHub) -> None:
    hub.add("good/broken", {"v1": kernel_files("broken", layers="import time; time.sleep(0.01); raise OSError('x')\n")})
    hub.add("good/norm", {"v1": kernel_files(layers=NORM)})
    results: dict[int, object] = {}

    def work(index: int) -> None:
        try:
            results[index] = run(load(norm(location="good/norm" if index % 2 else "good/broken"), device="cpu"))
        except KernelLoadError:
            results[index] = "refused"

    threads = [threading.Thread(target=work, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {index: 3.0 if index % 2 else "refused" for index in range(6)}


def test_what_the_kernels_library_has_loaded_is_shared(hub: FakeHub) -> None:
    hub.add("good/norm", {"v1": kernel_files(layers=NORM)})
    theirs = kernels.get_kernel("good/norm", version=1).layers.RMSNorm
    assert load(norm(), device="cpu").function is theirs.forward
    forget_kernels()
    ours = load(norm(), device="cpu").function
    assert kernels.get_kernel("good/norm", version=1).layers.RMSNorm.forward is ours


def test_the_hash_names_the_content_not_the_commit(hub: FakeHub) -> None:
    repository = hub.add("good/norm", {"v1": kernel_files(layers=NORM)})
    first = load(norm(), device="cpu")
    repository.commit({**kernel_files(layers=NORM), "README.md": b"other words"}, branch="v1")
    second = load(norm(), device="cpu")
    assert first.revision != second.revision
    assert first.content_hash == second.content_hash
