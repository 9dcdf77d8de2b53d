"""Where Kernelwise keeps files between runs."""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory() -> Path:
    """Return where Kernelwise keeps files between runs: `KERNELWISE_CACHE`, else `kernelwise` in the user's cache."""
    chosen = os.environ.get("KERNELWISE_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "kernelwise"
