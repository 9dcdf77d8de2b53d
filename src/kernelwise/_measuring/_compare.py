"""Compare: things that do the same work, timed in turns → how much faster each is, and how sure that is.

Times on a machine that does other things too drift, jump and repeat badly. So nothing is timed alone: in every round each
contender has its turn, in an order that changes, and only ratios within a round count. What is said is the median of those
ratios with a confidence interval that assumes nothing about how they scatter.
"""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from random import Random
from time import perf_counter

import torch

from kernelwise._errors import said
from kernelwise._evidence import Comparison
from kernelwise._process import user_random_state

MIN_ROUNDS = 5
"""Fewer rounds say nothing. Six are needed for an interval of 95 %; with five it is all that was seen."""

NARROW = 0.02
"""An interval this wide, as a part of its speed-up, needs no further rounds."""

SLOW = 0.8
"""Nor does a speed-up that is surely below this."""

_TURN_S = {"cpu": 200e-6}
_TURN_ON_DEVICE_S = 1e-3
"""How long a turn takes at least: so long that reading the clock, or starting a first kernel, is lost in it."""

_AHEAD = 32
"""The most calls that are started while the device is kept waiting: its queue takes about a thousand kernels."""

_WAIT_S = 0.05
"""The longest that it is kept waiting for one turn: a first call may take seconds to start."""

_CYCLES_PER_S = 3e9
"""At least as many as a device has: it may be kept waiting for longer than it is told."""

_SURE = 20
"""The interval misses the true median once in so many times at most."""


@dataclass(slots=True)
class _Contender:
    """A call and what is known of it. `times` are seconds of one call, by the number of the round.

    `spent_s` is what its turns have taken, `best_s` the shortest time of a call that was seen, warming up included, and
    `start_s` the shortest that it took to start one.
    """

    name: str
    call: Callable[[], object]
    repeats: int = 1
    first_s: float = 0.0
    peak: int | None = None
    spent_s: float = 0.0
    best_s: float = math.inf
    start_s: float = math.inf
    times: dict[int, float] = field(default_factory=dict)
    done: bool = False
    error: str | None = None


def compare(
    calls: Mapping[str, Callable[[], object]],
    *,
    own: str,
    device: str,
    seconds: float,
    min_rounds: int = MIN_ROUNDS,
    hide_starts: bool = False,
    before: Callable[[str], object] | None = None,
    progress: Callable[[float], None] | None = None,
) -> dict[str, Comparison | str]:
    """Time calls in turns and return each one's comparison with the call named `own`, or why it has none.

    The result has every name, `own` too: its comparison is with itself, for its time, memory and first call. A call that
    raises is out, with the error as a string, and the others go on. Where `own` raises, no call has a comparison.

    Of CUDA devices the own clock is read, around so many calls that starting them is hidden where it can be; a call that
    cannot be started fast enough costs what starting it costs. Of others it is the time until the device is done. A call
    that is to find cold caches cycles through copies of its inputs itself.

    A call that never returns cannot be stopped in this process. Kernels of others have been called in a worker with a time
    limit by then, when they were checked.

    The user's random state stays as it is, and gradients are the calls' business. Memory is counted where CUDA's allocator
    counts it, in a call that is not timed; this resets PyTorch's peak statistics of that device.

    Args:
        calls: what to time, by name. Each does the same work at every call.
        own: the name of the call that the others are compared with.
        device: where the work is done, such as "cpu", "cuda", "cuda:1" or "rocm".
        seconds: how long the rounds may take in all. First calls and warming up come on top, and so does what is missing
            for `min_rounds`. Rounds end before that when all intervals are narrow; a call about which enough is known rests.
        hide_starts: keep a CUDA device waiting until the calls of a turn are started, so that its own time alone counts, as
            in a model that gives it more to do than it can. Other devices are timed as ever.
        min_rounds: how many rounds there are whatever they take. A call that never took less than twice as long as `own`
            has fewer where its turns alone took longer than `seconds`.
        before: called with a call's name before each of its turns, outside of what is timed. A turn is then one call.
        progress: told which part of the rounds is done, 0 to 1.

    Raises:
        KeyError: there is no call named `own`.
    """
    found = {name: _Contender(name, call) for name, call in calls.items()}
    base = found[own]
    with on_device(device), user_random_state(), _no_garbage_collection():
        turn = _Turn(device, before, hide_starts)
        turn.warm_up(base)
        if base.error is None:
            for one in found.values():
                if one is not base:
                    turn.warm_up(one)
            _rounds(base, found, turn, seconds, min_rounds, progress)
    if base.error is not None:
        why = f"there is nothing to compare it with: {own} fails: {base.error}"
        return {name: one.error or why for name, one in found.items()}
    return {name: one.error or _compared(base, one) for name, one in found.items()}


def _rounds(
    base: _Contender,
    found: Mapping[str, _Contender],
    turn: _Turn,
    seconds: float,
    min_rounds: int,
    progress: Callable[[float], None] | None,
) -> None:
    """Give every contender its turn until all is clear or the time is over. One about which all is clear rests."""
    random, began, number, look = Random(0), perf_counter(), 0, min_rounds
    collected = began
    order: list[_Contender] = []
    while True:
        rivals = [one for one in found.values() if one is not base and one.error is None and not one.done]
        if number >= max(1, min_rounds) and (not rivals or perf_counter() - began >= seconds):
            break
        # Each order is followed by its reverse, so that no call stands behind the same other one all the time.
        if number % 2 == 0:
            order = list(found.values())
            random.shuffle(order)
        else:
            order.reverse()
        for one in order:
            if one is base and not turn.take(one, number):
                return
            if one in rivals:
                turn.take(one, number)
        number += 1
        if perf_counter() - collected > 1.0:
            gc.collect(0)  # what the calls have left, which may hold much memory; older things would take their time
            collected = perf_counter()
        look_closely = number >= look
        look = math.ceil(number * 1.25) if look_closely else look
        for one in rivals:
            if one.error is None:
                hopeless = one.spent_s > seconds and one.best_s > 2 * max(base.times.values())
                one.done = hopeless or (look_closely and _is_clear(_ratios(base, one)))
        if progress is not None:
            progress(min(1.0, (perf_counter() - began) / seconds) if seconds > 0 else 1.0)
    if progress is not None:
        progress(1.0)


class _Turn:
    """Runs contenders and reads the clock of a device. What a contender raises is noted in it."""

    def __init__(self, device: str, before: Callable[[str], object] | None, hide_starts: bool) -> None:
        kind = device.partition(":")[0]
        self._cuda = kind in ("cuda", "rocm")
        self._waits = not self._cuda and kind != "cpu"
        self._least_s = _TURN_S.get(kind, _TURN_ON_DEVICE_S)
        self._before = before
        self._ahead = hide_starts and self._cuda
        if self._cuda:
            event: Callable[..., torch.cuda.Event] = torch.cuda.Event
            self._begin, self._end = event(enable_timing=True), event(enable_timing=True)

    def take(self, one: _Contender, number: int) -> bool:
        """Give one its turn; return whether that went well."""
        began = perf_counter()
        try:
            one.times[number] = self._time(one, one.repeats)
            one.best_s = min(one.best_s, one.times[number])
        except Exception as error:
            self._fail(one, error)
        one.spent_s += perf_counter() - began
        return one.error is None

    def warm_up(self, one: _Contender) -> None:
        """Call it until it is warm, note its first call and its memory, and find how many calls make a turn."""
        try:
            one.first_s = self._time(one, 1)
            began, number = perf_counter(), 0
            # A compiled call may compile once more, or be recorded, at its second and third call.
            while number < 1 or (perf_counter() - began < 1.0 and (number < 3 or perf_counter() - began < 0.02)):
                one.best_s = min(one.best_s, self._time(one, 1))
                number += 1
            if self._before is None:
                one.repeats = self._repeats(one.best_s)
                if one.repeats > 1:
                    one.repeats = self._repeats(self._time(one, one.repeats))
            if self._cuda:
                one.peak = self._peak(one)
        except Exception as error:
            self._fail(one, error)

    def _time(self, one: _Contender, repeats: int) -> float:
        """Return the seconds that one call takes, of `repeats` without a pause."""
        call = one.call
        if self._before is not None:
            self._before(one.name)
        self._wait()
        if self._ahead and one.start_s < math.inf:
            self._keep_waiting(1.5 * repeats * one.start_s)
        began = perf_counter()
        if self._cuda:
            self._begin.record()
        for _ in range(repeats):
            call()
        if self._cuda:
            self._end.record()
            one.start_s = min(one.start_s, (perf_counter() - began) / repeats)
            self._end.synchronize()
            taken: float = self._begin.elapsed_time(self._end) / 1e3
            return taken / repeats
        self._wait()
        return (perf_counter() - began) / repeats

    def _repeats(self, once_s: float) -> int:
        """How many calls make a turn."""
        return min(_AHEAD if self._ahead else 10_000, max(1, math.ceil(self._least_s / max(once_s, 1e-9))))

    def _keep_waiting(self, seconds: float) -> None:
        """Give the device nothing to do for a time, at least."""
        torch.cuda._sleep(int(_CYCLES_PER_S * min(seconds, _WAIT_S)))  # type: ignore[no-untyped-call]

    def _wait(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()
        elif self._waits:
            torch.accelerator.synchronize()

    def _peak(self, one: _Contender) -> int:
        if self._before is not None:
            self._before(one.name)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        one.call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - held

    def _fail(self, one: _Contender, error: Exception) -> None:
        one.error = said(error)
        if self._cuda and isinstance(error, torch.OutOfMemoryError):
            del error
            gc.collect()
            torch.cuda.empty_cache()  # or what it had taken is missing for the others


def _compared(base: _Contender, one: _Contender) -> Comparison:
    numbers = [number for number in one.times if number in base.times]
    ratios = _ratios(base, one)
    low, high = interval(ratios)
    return Comparison(
        own_us=statistics.median(base.times[n] for n in numbers) * 1e6,
        us=statistics.median(one.times[n] for n in numbers) * 1e6,
        speedup=statistics.median(ratios),
        low=low,
        high=high,
        rounds=len(numbers),
        own_peak=base.peak,
        peak=one.peak,
        first_s=one.first_s,
    )


def _ratios(base: _Contender, one: _Contender) -> list[float]:
    """How many times as fast it was, round by round."""
    return [max(base.times[n], 1e-12) / max(taken, 1e-12) for n, taken in one.times.items() if n in base.times]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the bounds of a confidence interval of 95 % for the median; of fewer than six values, the least and the most.

    Nothing is assumed about how the values scatter: how many of them are below the true median is a matter of tossing coins.

    >>> interval([1.3, 1.1, 1.2, 9.9, 1.4, 1.2, 1.3, 1.2])
    (1.1, 9.9)
    >>> interval([1.3, 1.1, 1.2, 9.9, 1.4, 1.2, 1.3, 1.2, 1.2])
    (1.2, 1.4)
    """
    ordered = sorted(values)
    left_out = max(0, _rank(len(ordered)) - 1)
    return ordered[left_out], ordered[-1 - left_out]


def _rank(count: int) -> int:
    """The rank, from either end, of the values that bound the median with 95 % certainty; 0 where they are too few."""
    rank, combinations, below = 0, 1, 0
    while 2 * (below + combinations) * _SURE <= 2**count:
        below += combinations
        combinations = combinations * (count - rank) // (rank + 1)
        rank += 1
    return rank


def _is_clear(ratios: Sequence[float]) -> bool:
    """Return whether more rounds would tell nothing that matters.

    How wide the interval is decides, not which side of 1 it is on: who stops as soon as there is a difference finds some
    where there are none. How much slower something slow is matters to nobody.
    """
    if _rank(len(ratios)) == 0:
        return False
    low, high = interval(ratios)
    return high < SLOW or high - low <= NARROW * statistics.median(ratios)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def on_device(device: str) -> torch.cuda.device | nullcontext[None]:
    """Make a GPU the current one, where it is one and has a number."""
    kind, _, index = device.partition(":")
    return torch.cuda.device(int(index)) if kind in ("cuda", "rocm") and index else nullcontext()
