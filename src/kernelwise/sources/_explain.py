"""Turn whatever went wrong while a kernel was loaded into one line of reason and one line that says how to go on."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from kernelwise._data import KernelRef
from kernelwise._errors import KernelLoadError

_LONGEST = 400


def failure(ref: KernelRef, reason: str, *, fix: str | None = None) -> KernelLoadError:
    """Build the error for a reference."""
    return KernelLoadError(str(ref), reason, fix=fix)


def explain(ref: KernelRef, error: BaseException) -> KernelLoadError:
    """Build the error for a reference from an exception of the Hub client, the `kernels` library or a kernel's code."""
    reason, fix = _of_hub(ref, error) or _of_kernel(error)
    return failure(ref, reason, fix=fix)


def no_such_layer(ref: KernelRef, names: Iterable[str]) -> KernelLoadError:
    """Build the error for a layer that a kernel does not have, with the nearest names."""
    known = sorted(names)
    if not known:
        return failure(ref, "it has no layers", fix="a kernel's classes stand in `layers`, imported by its __init__.py")
    near = difflib.get_close_matches(ref.layer, known, n=3, cutoff=0.5)
    listed = ", ".join(known[:20]) + (", ..." if len(known) > 20 else "")
    fix = f"name {' or '.join(near)}" if near else "name one of these"
    return failure(ref, f"it has no layer {ref.layer}; it has {listed}", fix=fix)


def one_line(text: object) -> str:
    """Collapse a message to one line of bounded length."""
    line = " ".join(str(text).split())
    return line if len(line) <= _LONGEST else line[: _LONGEST - 3] + "..."


def _of_hub(ref: KernelRef, error: BaseException) -> tuple[str, str] | None:
    """Errors of the Hub client and of the connection to it. None for any other error."""
    from huggingface_hub import errors

    again = "look at the network and at HF_ENDPOINT, or try again later; what was downloaded is kept"
    if isinstance(error, errors.GatedRepoError):
        return f"the repository {ref.location} is gated", "accept its terms on the Hub, then: hf auth login"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"the Hub has no kernel repository {ref.location} that you may read",
            "look at its name; for a private one: hf auth login",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{ref.location} has no revision {ref.revision!r}", "name a branch, a tag or a full commit that it has"
    if isinstance(error, (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError)):
        cause = error.__cause__ and _of_hub(ref, error.__cause__)
        return cause or (f"the Hub cannot be reached: {one_line(error)}", again)
    if isinstance(error, errors.EntryNotFoundError):
        return "the repository has no `build` folder with kernels", "name a repository of built kernels"
    if isinstance(error, errors.HfHubHTTPError):
        response = getattr(error, "response", None)
        status = getattr(response, "status_code", "an error")
        return f"the Hub answered {status}: {one_line(error)}", again
    from_client = type(error).__module__.split(".")[0] in ("httpx", "httpx2")
    if from_client or (ref.scheme == "hub" and isinstance(error, (ConnectionError, TimeoutError))):
        return f"the connection to the Hub failed ({type(error).__name__}): {one_line(error)}", again
    return None


def _of_kernel(error: BaseException) -> tuple[str, str | None]:
    text = str(error)
    named = f"{type(error).__name__}: {one_line(text)}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if isinstance(error, FileNotFoundError) and text.startswith("Cannot find a build variant"):
        builds = "; ".join(re.sub(r"\s+", " ", line) for line in lines[1:]) or "it has no builds at all"
        return f"it has no build for this machine: {builds}", "name a version with a build for this machine"
    if "TORCH_LIBRARY" in text:
        return (
            f"its operators are registered by another build already: {named}",
            "start Python again to load this build",
        )
    if isinstance(error, SystemExit):
        return f"its code asked Python to exit ({error.code}) while it was imported", None
    if command := re.search(r"pip install (?:--upgrade )?[\w.-]+", text):
        return named, command[0]
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"it needs the Python package {error.name.split('.')[0]}, which is not installed", (
            f"pip install {error.name.split('.')[0]}"
        )
    if isinstance(error, ImportError):
        return f"it cannot be imported: {named}", "name a version that was built for this PyTorch"
    return named, None
