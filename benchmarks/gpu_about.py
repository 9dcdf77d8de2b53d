"""What every benchmark on a GPU says first: device, versions, date and command."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Sequence

import torch


def about() -> dict[str, str]:
    """What a result depends on besides the code, and how it was made."""
    return {**versions(), "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()), "command": command(sys.argv)}


def in_a_line(said: dict[str, str]) -> str:
    return ", ".join(f"{k} {v}" for k, v in said.items())


def command(words: Sequence[str]) -> str:
    """The command line that made a result, without the folder it was written to."""
    kept = list(words)
    if "--out" in kept:
        del kept[kept.index("--out") : kept.index("--out") + 2]
    return " ".join(kept)


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version(), "device": torch.cuda.get_device_name(0)}
    for name in ("torch", "triton", "transformers", "liger-kernel", "quack-kernels"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found
