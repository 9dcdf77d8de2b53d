"""Device lock: who measures on a device does so alone, as two that measure at once would find each other's noise.

The lock is the system's, on a file in the cache directory, so a process that is killed leaves none behind. Where a file cannot
be locked (Windows, some network file systems), nobody waits.
"""

from __future__ import annotations

import logging
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import IO

import torch

from kernelwise._cache import cache_directory

_LOOK_AGAIN_S = 0.2

_log = logging.getLogger("kernelwise")


@contextmanager
def alone_on(device: str, waiting: Callable[[str], object]) -> Iterator[None]:
    """Hold the lock of a device ("cpu", "cuda:1") for the length of a `with` block, once it is free.

    Args:
        waiting: told, once, which process has it, where it is not free. The log says it too.
    """
    file = cache_directory() / "locks" / f"{_name(device)}.lock"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        held = file.open("a+b", buffering=0)
    except OSError:  # a cache that cannot be written has said so elsewhere
        yield
        return
    with held:
        told = False
        while not _take(held):
            if not told:
                held.seek(0)
                said = f"waiting for process {held.read().decode(errors='replace').strip() or '?'}, which measures on {device}"
                _log.warning("%s (%s)", said, file)
                waiting(said)
                told = True
            time.sleep(_LOOK_AGAIN_S)
        with suppress(OSError):  # a full disk: who waits is not told for whom
            held.truncate(0)
            held.write(str(os.getpid()).encode())
        yield


def _take(held: IO[bytes]) -> bool:
    """Whether the lock is ours now; closing the file gives it back."""
    if sys.platform == "win32":
        return True
    import fcntl

    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _name(device: str) -> str:
    """What a device is called on every process of this machine: a GPU by its own number, as each process counts its own."""
    kind, _, index = device.partition(":")
    if kind in ("cuda", "rocm") and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(int(index) if index else torch.cuda.current_device())
        device = f"{kind}-{getattr(properties, 'uuid', index)}"
    return re.sub(r"[^\w.-]", "-", f"{platform.node()}-{device}")
