"""Every exception that Kernelwise raises on purpose.

KernelwiseError
├── KernelConfigError (ValueError)     a mapping or a config file is wrong; lists every problem at once
├── KernelLoadError                    a kernel could not be found, trusted, downloaded, built for this machine or imported
├── PlanError                          a layer that the user asked a kernel for cannot have it
├── ApplyError                         the model cannot be changed (it is left as it was)
├── StaleLogitsError (RuntimeError)    logits are read that can no longer be computed, as their weight has changed
└── MissingDependencyError (ImportError)   an optional package is needed; the message has the command that installs it

A message has up to four parts: what is wrong, who asked for it, what was tried, how to go on.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


class KernelwiseError(Exception):
    """Base of all errors of this library."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with a config: where it stands, what it is, and how to fix it."""

    where: str
    what: str
    fix: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}\n    fix: {self.fix}"


class KernelConfigError(KernelwiseError, ValueError):
    """A mapping is wrong. `problems` holds every problem found, not only the first."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        count = len(self.problems)
        head = "1 problem in the kernel mapping" if count == 1 else f"{count} problems in the kernel mapping"
        super().__init__("\n".join([head, *(f"  {problem}" for problem in self.problems)]))


class KernelLoadError(KernelwiseError):
    """A kernel could not be loaded. `ref` is what was asked for, `reason` is why in one line."""

    def __init__(self, ref: str, reason: str, *, fix: str | None = None) -> None:
        self.ref, self.reason, self.fix = ref, reason, fix
        super().__init__(f"cannot load {ref}: {reason}" + (f"\n  go on      {fix}" if fix else ""))


class PlanError(KernelwiseError):
    """No kernel can run a layer that the user asked a kernel for."""


class ApplyError(KernelwiseError):
    """The model cannot be changed; it is as it was before the call."""


class StaleLogitsError(KernelwiseError, RuntimeError):
    """Logits were not computed while they could be: the weight that they come from has changed since."""


class MissingDependencyError(KernelwiseError, ImportError):
    """An optional package is missing. The message has the command that installs it."""


def said(error: BaseException) -> str:
    """Return an error as one line: all that ours say, what others are and their first line."""
    try:
        text = str(error).strip()
    except BaseException:  # an exception may fail at saying what it is
        text = "(its message cannot be read)"
    if isinstance(error, KernelwiseError):
        return "; ".join(_parts(text))
    return f"{type(error).__name__}: {text.splitlines()[0][:300]}" if text else type(error).__name__


def _parts(message: str) -> Iterator[str]:
    """The lines of a message of ours, with a colon behind what stands before a gap; a line may go on, indented, in the next."""
    for line in re.sub(r"\n {8,}", " ", message).splitlines():
        label, gap, rest = line.strip().partition("  ")
        yield " ".join(f"{label}: {rest}".split()) if gap else label
