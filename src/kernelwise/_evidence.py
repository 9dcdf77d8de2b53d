"""Evidence of speed: what measuring and tuning found, as frozen values. Imports no torch.

`Comparison` is what timing two things in turns gives. A `Timing` is one of a kernel with its layer's own code, a `Run` one of
a whole model with its eager self. A `Tuning` holds all of it, with what was chosen and why; it is the evidence that a tuned
`KernelConfig` carries, and what the report shows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from kernelwise._data import Target, to_json

OWN_CODE = "own code"
EAGER = "eager"

Verdict = Literal["faster", "slower", "no clear difference"]
Objective = Literal["latency", "throughput", "memory"]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two things that did the same work, timed in turns.

    `own_us` and `us` are medians in microseconds: of what was there before, and of what might replace it. `speedup` is the
    median over the rounds of their ratio, above 1 where the newcomer is faster; `low` and `high` are the bounds of its 95 %
    confidence interval. Peaks are bytes of memory allocated during the work beyond what was held before; None where the
    device does not count them. `first_s` is how long the newcomer's first call took, compiling included.
    """

    own_us: float
    us: float
    speedup: float
    low: float
    high: float
    rounds: int
    own_peak: int | None = None
    peak: int | None = None
    first_s: float | None = None

    @property
    def verdict(self) -> Verdict:
        """Which one is faster; where the interval holds 1, or the gain is within a hundredth, nobody can say."""
        if self.low > 1.0 and self.speedup > 1.01:
            return "faster"
        if self.high < 1.0 and self.speedup < 0.99:
            return "slower"
        return "no clear difference"


@dataclass(frozen=True, slots=True)
class Timing:
    """One candidate for one kind of layer, against the layer's own code on what the layer is given in one workload.

    `layer` is the first of the `paths` it speaks for. `mode` is one of `kernelwise._data.MODES`: in training a call is
    forward and backward, with `+compile` both are compiled. `graph` says that both ran inside a CUDA graph. `calls` is how
    often the model calls a layer of this kind in the workload, all paths together.
    """

    layer: str
    paths: tuple[str, ...]
    candidate: str
    mode: str
    workload: str
    comparison: Comparison
    calls: int = 1
    graph: bool = False


@dataclass(frozen=True, slots=True)
class Run:
    """One contender on one workload of a whole model, against the model's own eager code in turns.

    `tokens` is how many tokens one run computes (0 where the inputs are not tokens). `error` says why there is no comparison.
    """

    contender: str
    workload: str
    comparison: Comparison | None
    tokens: int = 0
    error: str | None = None

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens a second of this contender; None where the inputs are not tokens, or it failed."""
        return self.tokens / self.comparison.us * 1e6 if self.comparison is not None and self.tokens else None


@dataclass(frozen=True, slots=True)
class Candidate:
    """One kernel that was offered for a kind of layer, and what was found: `out` says why it may not go in.

    `error` is its worst error as a multiple of what is allowed. Timings exist only for what passed its checks.
    """

    kernel: str
    out: str | None = None
    error: float | None = None
    checks: int = 0
    timings: tuple[Timing, ...] = ()


@dataclass(frozen=True, slots=True)
class Choice:
    """What was chosen for one kind of layer in one mode: a reference, or `"own code"`, with the reason and all candidates."""

    layer: str
    paths: tuple[str, ...]
    name: str
    class_name: str
    op: str
    mode: str
    chosen: str
    reason: str
    candidates: tuple[Candidate, ...] = ()


@dataclass(frozen=True, slots=True)
class Tuning:
    """All that tuning a model found. Prints as tables, serialises.

    `runs` are the whole model's: every contender, the tuned model among them as `"tuned"`, and each choice alone.
    `environment` are pairs of a name and what it is here (versions, device, driver, threads). `config` is the tuned config
    as TOML. `seconds` is how long it took.
    """

    model: str
    target: Target
    objective: Objective
    workloads: tuple[str, ...]
    choices: tuple[Choice, ...]
    runs: tuple[Run, ...]
    environment: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    config: str = ""
    date: str = ""
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Return the evidence as plain dicts, lists and scalars."""
        data: dict[str, Any] = to_json(self)
        return data
