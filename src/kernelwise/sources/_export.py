"""Write the builtin kernels as a kernel repository, which the `kernels` library and Kernelwise load like any other."""

from __future__ import annotations

import json
import platform
import shutil
from pathlib import Path

from kernelwise.sources._repository import content_hash

VARIANTS = {"cpu": ("cpu", "torch-stable-abi210-cpu-{machine}-{system}"), "triton": ("cuda", "torch-cuda")}
"""For each backend the type that the `kernels` library gives it, and the name of its build variant."""


def export(folder: Path, *, backend: str, version: int = 1) -> Path:
    """Write `build/<variant>` with one backend's kernels and their layer classes, and return the variant's folder.

    Args:
        folder: the repository; other variants in it stay.
        backend: `"cpu"` (with the C++ library that was built here) or `"triton"`.
        version: the major version that the metadata states.
    """
    kind, name = VARIANTS[backend]
    variant = folder / "build" / name.format(machine=platform.machine(), system=platform.system().lower())
    kernels = Path(__file__).parents[1] / "kernels"
    shutil.rmtree(variant, ignore_errors=True)
    unwanted = shutil.ignore_patterns("__pycache__", "csrc")
    shutil.copytree(kernels / backend, variant / backend, ignore=unwanted)
    for shared in ("layers.py", "_layout.py", "_autograd.py", "_recompute.py"):
        shutil.copy(kernels / shared, variant)
    (variant / "__init__.py").write_text(
        '"""Kernels of Kernelwise."""\n\nfrom . import layers\n\n__all__ = ["layers"]\n'
    )
    metadata = {
        "name": "kernelwise",
        "id": f"_kernelwise_{backend}_{content_hash(variant)[:12]}",
        "version": version,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": kind},
    }
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    return variant
