"""Kernels from the Hugging Face Hub: `org/repo@v1:Layer`.

In this order, and each step only when the one before went well: the form of the reference; trust in the publisher,
before anything of the repository is asked for; the commit; the download, without importing; static checks; the import.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kernelwise._data import Kernel, KernelRef
from kernelwise.sources import _kernels_compat
from kernelwise.sources._explain import explain, failure
from kernelwise.sources._kernels_compat import Installed
from kernelwise.sources._variant import check_statically, load_layer

_HUB_NAME = re.compile(r"[0-9A-Za-z_](?:[0-9A-Za-z._-]*[0-9A-Za-z_])?")
_FULL_COMMIT = re.compile(r"[0-9a-f]{40}")
_downloaded: dict[tuple[Path, str], Installed] = {}


def load(ref: KernelRef, *, device: str, before_import: Callable[[Kernel, str], None] | None = None) -> Kernel:
    """Download and load a layer of a Hub kernel; the kernel's `revision` is the full commit.

    Raises:
        KernelLoadError: the reference, the publisher, the download, the build or the kernel's code is at fault.
    """
    installed, commit = install(ref, device=device)
    check_statically(ref, installed)
    return load_layer(ref, installed, device=device, revision=commit, before_import=before_import)


def install(ref: KernelRef, *, device: str) -> tuple[Installed, str]:
    """Download the build of a kernel for a device type, without running it; return it and its full commit. Raises as `load`."""
    _check_form(ref)
    backend = _kernels_compat.backend_of(device)
    api = _api(ref)
    if not ref.trust_remote_code:
        _check_trust(ref, api)
    commit = _commit(ref, api)
    return _download(ref, commit, backend=backend), commit


def _check_form(ref: KernelRef) -> None:
    owner, slash, name = ref.location.partition("/")
    if not (slash and _HUB_NAME.fullmatch(owner) and _HUB_NAME.fullmatch(name)) or ".." in name or "--" in name:
        raise failure(ref, f"{ref.location!r} is no Hub repository", fix="write org/repo:Layer")
    if not ref.layer.isidentifier():
        raise failure(ref, f"{ref.layer!r} is no class name", fix="write org/repo:Layer")
    if (ref.version is None) == (ref.revision is None):
        raise failure(ref, "it needs a version or a revision, and not both", fix="write org/repo@v1:Layer")
    if ref.version is not None and (type(ref.version) is not int or ref.version < 0):
        raise failure(ref, f"{ref.version!r} is no version", fix="write org/repo@v1:Layer")
    if ref.revision is not None and not (isinstance(ref.revision, str) and ref.revision.strip()):
        raise failure(ref, f"{ref.revision!r} is no revision", fix="write org/repo@<branch, tag or commit>:Layer")


def _api(ref: KernelRef) -> Any:
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        raise failure(
            ref,
            "the Hub client is in offline mode (HF_HUB_OFFLINE)",
            fix="name the variant folder of a downloaded kernel as a local path, or unset HF_HUB_OFFLINE",
        )
    return HfApi(library_name="kernelwise")


def _check_trust(ref: KernelRef, api: Any) -> None:
    """Only an organisation that the Hub lists as a trusted kernel publisher is trusted without the user's word."""
    from huggingface_hub.errors import HfHubHTTPError

    publisher = ref.location.split("/")[0]
    fix = f"if you trust {publisher}, write trust_remote_code: true for this kernel"
    try:
        trusted = getattr(api.get_organization_overview(publisher), "trustedKernelPublisher", False)
    except HfHubHTTPError as error:
        if getattr(error.response, "status_code", None) != 404:
            raise failure(
                ref, f"whether {publisher} is trusted is unknown: {explain(ref, error).reason}", fix=fix
            ) from error
        raise failure(ref, f"{publisher} is no organisation, so nobody vouches for its kernels", fix=fix) from error
    if trusted is not True:
        raise failure(ref, f"{publisher} is no trusted kernel publisher", fix=fix)


def _commit(ref: KernelRef, api: Any) -> str:
    """The full commit that a reference means now. A full commit means itself, and the Hub is not asked."""
    if ref.revision is not None:
        if _FULL_COMMIT.fullmatch(ref.revision):
            return ref.revision
        return str(api.repo_info(ref.location, repo_type="kernel", revision=ref.revision).sha)
    branches = api.list_repo_refs(ref.location, repo_type="kernel").branches
    versions = {int(b.name[1:]): b.target_commit for b in branches if re.fullmatch(r"v[0-9]+", b.name)}
    if ref.version not in versions:
        listed = ", ".join(f"v{version}" for version in sorted(versions)) or "none"
        raise failure(ref, f"it has no version {ref.version}; its versions: {listed}", fix="name one of its versions")
    return str(versions[ref.version])


def _download(ref: KernelRef, commit: str, *, backend: str) -> Installed:
    """Download a commit and check the bytes; a commit that this process has is not asked for again."""
    snapshot = _snapshot(ref.location, commit)
    known = _downloaded.get((snapshot, backend))
    if known is not None and known.variant.is_dir():
        return known
    try:
        installed = _kernels_compat.install(
            ref.location, revision=commit, backend=backend, trust_remote_code=ref.trust_remote_code
        )
    except Exception:
        _check_bytes(ref, snapshot)
        raise
    for build in installed.builds():
        _check_bytes(ref, build.variant)
    if not installed.dependencies:  # what a commit depends on are versions, which can move
        _downloaded[snapshot, backend] = installed
    return installed


def _snapshot(repository: str, commit: str) -> Path:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    cache = _kernels_compat.cache_folder() or constants.HF_HUB_CACHE
    return Path(cache) / repo_folder_name(repo_id=repository, repo_type="kernel") / "snapshots" / commit


def _check_bytes(ref: KernelRef, folder: Path) -> None:
    """Check downloaded files against the hashes that name them in the Hub cache, and throw damaged ones away.

    The Hub client compares sizes alone. Where the cache cannot use symbolic links, the hashes are not there to compare.
    """
    damaged = [file for file in folder.rglob("*") if file.is_symlink() and file.is_file() and not _is_intact(file)]
    if not damaged:
        return
    for file in damaged:
        file.resolve().unlink()
        file.unlink()
    names = ", ".join(sorted(file.name for file in damaged))
    raise failure(ref, f"the download was damaged: {names}; the damaged files were thrown away", fix="load it again")


def _is_intact(file: Path) -> bool:
    expected, data = file.resolve().name, file.read_bytes()
    if re.fullmatch(r"[0-9a-f]{40}", expected):
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() == expected
    if re.fullmatch(r"[0-9a-f]{64}", expected):
        return hashlib.sha256(data).hexdigest() == expected
    return True
