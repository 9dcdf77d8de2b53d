"""Results: what was measured, remembered between runs in the user's cache directory.

One file for each result, named by the hash of its key, which holds everything that the result depends on. A file is written
under another name and then renamed, which happens at once or not at all: several processes may write at once, on several
machines too, and one that is killed leaves a file that nobody reads. A database in WAL mode would need locks, which network
file systems do not keep, and would lose everything by one bad page. A store that cannot be read or written costs time: it
says so once in the log, and never raises.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from kernelwise._cache import cache_directory
from kernelwise._data import from_json
from kernelwise._errors import KernelwiseError
from kernelwise._evidence import misfits

FOLDERS: dict[str, str] = {
    "results": "timings of kernels and models",
    "proofs": "checks of kernels that are not builtin",
    "imports": "kernels whose import has gone well",
}
"""What Kernelwise remembers, by the folder of the cache directory in which it stands."""

_OURS = re.compile(r"[0-9a-f]{64}\.(json|[0-9a-z.]+)")
"""The names of files that were written here: the cache directory may be one that has other files too."""

FORMAT = 2
"""How values are written. Results of another format are as good as none."""

Noun = TypeVar("Noun")

_log = logging.getLogger("kernelwise")
_told: set[str] = set()


def get(key: Any) -> Any | None:
    """Return what was put under a key, or None. `key` is plain data: dicts, lists or tuples, strings, numbers, None."""
    text = _canonical(key)
    file = _file(text)
    try:
        found = json.loads(file.read_text())
        if found["key"] != json.loads(text):
            raise ValueError("it is under another key")
        return found["value"]
    except FileNotFoundError:
        return None
    except OSError as error:
        _tell("cannot be read", file, error)
    except (ValueError, TypeError, KeyError) as error:
        _tell("does not hold a result any more and will be written again", file, error)
    return None


def recall(key: Any, cls: type[Noun]) -> Noun | None:
    """Return the noun that was put under a key as plain data; None where there is nothing, or something else."""
    value = get(key)
    if value is None:
        return None
    try:
        found = from_json(cls, value)
        wrong = next(misfits(found, cls, cls.__name__), None)
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        wrong = str(error)
    if wrong is None:
        return found
    _tell("does not hold a result any more and will be written again", _file(_canonical(key)), ValueError(wrong))
    return None


def put(key: Any, value: Any) -> None:
    """Remember a value, plain data too, under a key, in place of the one before. None is as good as nothing."""
    text = _canonical(key)
    file = _file(text)
    try:
        write(file, {"key": json.loads(text), "value": value})
    except OSError as error:
        _tell("cannot be written", file, error)


def write(file: Path, data: Any) -> None:
    """Write plain data to a file as JSON, whole or not at all, whoever else writes it.

    Raises:
        OSError: it cannot be written. Nothing of it stays behind.
    """
    partial = file.with_suffix(f".{secrets.token_hex(8)}.part")
    text = json.dumps(data)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text)
        partial.replace(file)
    except OSError:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def size(folder: str = "results") -> tuple[int, int]:
    """Return how many things are remembered in one of `FOLDERS`, and how many bytes its files hold."""
    number = nbytes = 0
    for file in _files(folder):
        with suppress(OSError):  # removed meanwhile
            nbytes += file.stat().st_size
            number += file.suffix == ".json"
    return number, nbytes


def clear(folder: str = "results") -> int:
    """Forget what is remembered in one of `FOLDERS`; return how many things that were. Other files there are left alone.

    Raises:
        KernelwiseError: a file cannot be removed.
    """
    number = 0
    for file in _files(folder):
        try:
            file.unlink(missing_ok=True)
        except OSError as error:
            raise KernelwiseError(
                f"{file} cannot be removed: {error.strerror}\n  go on      remove it as a user who may, or set KERNELWISE_CACHE"
            ) from error
        number += file.suffix == ".json"
    return number


def _canonical(key: Any) -> str:
    return json.dumps([FORMAT, key], sort_keys=True, separators=(",", ":"))


def _file(text: str) -> Path:
    return cache_directory() / "results" / f"{hashlib.sha256(text.encode()).hexdigest()}.json"


def _files(folder: str) -> list[Path]:
    if folder not in FOLDERS:
        raise ValueError(f"{folder!r} is not one of {', '.join(FOLDERS)}")
    try:
        return [file for file in (cache_directory() / folder).iterdir() if _OURS.fullmatch(file.name)]
    except (FileNotFoundError, NotADirectoryError):
        return []


def _tell(what: str, file: Path, error: Exception) -> None:
    """Say in the log, once for each kind of trouble, that results are not remembered."""
    if what not in _told:
        _told.add(what)
        _log.warning(
            "a remembered result %s: %s (%s). What it held is measured again when it is needed.", what, file, error
        )
