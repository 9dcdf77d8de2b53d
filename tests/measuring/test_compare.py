"""Timing in turns. The clock of most tests is not the machine's: a call moves it by what the call is to take."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable
from fractions import Fraction
from itertools import combinations
from math import comb

import pytest
import torch

from kernelwise._evidence import Comparison
from kernelwise._measuring import _compare
from kernelwise._measuring._compare import compare, interval


class Machine:
    """A machine whose time passes only while calls run: each as long as it says, times what the machine does meanwhile."""

    def __init__(self, noise: float = 0.0, drift: Callable[[float], float] = lambda now: 1.0, seed: int = 0) -> None:
        self.now, self.noise, self.drift = 0.0, noise, drift
        self.random = random.Random(seed)

    def call(self, seconds: float) -> Callable[[], None]:
        def run() -> None:
            self.now += seconds * self.drift(self.now) * (1 + self.random.uniform(0, self.noise))

        return run


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Machine]:
    def made(**how: object) -> Machine:
        found = Machine(**how)  # type: ignore[arg-type]
        monkeypatch.setattr(_compare, "perf_counter", lambda: found.now)
        return found

    return made


def verdicts(found: dict[str, Comparison | str]) -> dict[str, str]:
    return {name: one if isinstance(one, str) else one.verdict for name, one in found.items()}


def test_says_how_much_faster_and_slower(machine: Callable[..., Machine]) -> None:
    here = machine(noise=0.1)
    calls = {"own": here.call(2e-3), "twice as fast": here.call(1e-3), "slower": here.call(3e-3)}
    found = compare(calls, own="own", device="cpu", seconds=2.0)
    assert verdicts(found) == {"own": "no clear difference", "twice as fast": "faster", "slower": "slower"}
    fast = found["twice as fast"]
    assert isinstance(fast, Comparison)
    assert fast.low < 2.0 < fast.high
    assert fast.speedup == pytest.approx(2.0, rel=0.02)
    assert (fast.own_us, fast.us) == (pytest.approx(2100, rel=0.05), pytest.approx(1050, rel=0.05))
    assert fast.peak is None
    assert fast.own_peak is None


@pytest.mark.parametrize("seed", range(10))
def test_equal_calls_have_no_clear_difference(machine: Callable[..., Machine], seed: int) -> None:
    here = machine(noise=0.5, seed=seed)
    found = compare({"own": here.call(1e-3), "same": here.call(1e-3)}, own="own", device="cpu", seconds=1.0)
    same = found["same"]
    assert isinstance(same, Comparison)
    assert same.low < 1.02
    assert same.high > 0.98


def test_stopping_early_does_not_find_differences_where_there_are_none(machine: Callable[..., Machine]) -> None:
    wrong = 0
    for seed in range(100):
        here = machine(noise=0.5, seed=seed)
        found = compare({"own": here.call(1e-3), "same": here.call(1e-3)}, own="own", device="cpu", seconds=0.1)
        wrong += verdicts(found)["same"] != "no clear difference"
    assert wrong <= 10  # an interval of 95 % is wrong 5 times in 100, and 11 times in one of 90 such tests


def test_a_machine_that_slows_down_makes_none_win(machine: Callable[..., Machine]) -> None:
    here = machine(drift=lambda now: 1 + 30 * now)  # each turn is 3 % slower than the one before
    calls = {name: here.call(1e-3) for name in ("first", "own", "last")}
    found = compare(calls, own="own", device="cpu", seconds=0.5)
    assert set(verdicts(found).values()) == {"no clear difference"}
    found = compare({name: here.call(1e-3) for name in ("own", "last")}, own="own", device="cpu", seconds=20.0)
    assert set(verdicts(found).values()) == {"no clear difference"}


def test_a_call_that_slows_down_the_next_one_does_so_to_all(machine: Callable[..., Machine]) -> None:
    """It leaves cold caches, or a hot processor. In a fixed order, and its reverse, it would always be the same one's."""
    here = machine(noise=0.001)
    last = ""

    def call(name: str) -> Callable[[], None]:
        def run() -> None:
            nonlocal last
            if name == "dirty":
                here.now += here.random.uniform(1e-4, 1e-3)  # so that nothing is clear about it, and it goes on
            else:
                here.call(1e-3 * (1.2 if last == "dirty" else 1.0))()
            last = name

        return run

    ratios = []
    for order in (("own", "same", "dirty"), ("same", "own", "dirty"), ("dirty", "own", "same")):
        found = compare({n: call(n) for n in order}, own="own", device="cpu", seconds=2.0)
        same = found["same"]
        assert isinstance(same, Comparison)
        assert same.verdict == "no clear difference"
        ratios.append(same.speedup)
    assert ratios == pytest.approx([1.0] * 3, abs=0.01)


def test_a_disturbance_at_regular_intervals_hits_all_alike(machine: Callable[..., Machine]) -> None:
    here = machine(noise=0.02, drift=lambda now: 3.0 if int(now / 2e-3) % 2 else 1.0)
    found = compare({"own": here.call(1e-3), "same": here.call(1e-3)}, own="own", device="cpu", seconds=1.0)
    assert verdicts(found)["same"] == "no clear difference"


def test_rounds_end_when_all_is_clear_and_rest_once_it_is(machine: Callable[..., Machine]) -> None:
    here = machine(noise=0.01)
    calls = {"own": here.call(1e-3), "fast": here.call(5e-4), "slow": here.call(1e-1)}
    found = compare(calls, own="own", device="cpu", seconds=1000.0)
    fast, slow = found["fast"], found["slow"]
    assert isinstance(fast, Comparison)
    assert isinstance(slow, Comparison)
    assert here.now < 10
    assert fast.high - fast.low < 0.05
    assert slow.rounds < 20


def test_a_difference_that_matters_to_nobody_ends_too(machine: Callable[..., Machine]) -> None:
    here = machine(noise=0.004)
    found = compare({"own": here.call(1e-3), "near": here.call(1.003e-3)}, own="own", device="cpu", seconds=1000.0)
    assert verdicts(found)["near"] == "no clear difference"
    assert here.now < 1.0


def test_the_time_is_kept_and_no_fewer_than_the_least_rounds_run(machine: Callable[..., Machine]) -> None:
    here = machine(noise=0.5)
    found = compare({"own": here.call(0.01), "other": here.call(0.011)}, own="own", device="cpu", seconds=3.0)
    assert here.now < 4.0
    found = compare({"own": here.call(10.0), "other": here.call(8.0)}, own="own", device="cpu", seconds=3.0)
    other = found["other"]
    assert isinstance(other, Comparison)
    assert other.rounds == 5


def test_what_is_far_too_slow_does_not_take_its_time_in_every_round(machine: Callable[..., Machine]) -> None:
    here = machine()
    calls = {"own": here.call(0.01), "slow": here.call(60.0), "fast": here.call(0.005)}
    found = compare(calls, own="own", device="cpu", seconds=3.0)
    slow, fast = found["slow"], found["fast"]
    assert isinstance(slow, Comparison)
    assert isinstance(fast, Comparison)
    assert (slow.rounds, slow.verdict) == (1, "slower")
    assert (fast.rounds, fast.verdict) == (5, "faster")


def test_one_long_turn_does_not_make_a_call_hopeless(machine: Callable[..., Machine]) -> None:
    here = machine()
    times = iter([0.01] * 2 + [60.0] + [0.01] * 50)  # after the first call and one to warm up, something comes between

    def other() -> None:
        here.now += next(times)

    found = compare({"own": here.call(0.02), "other": other}, own="own", device="cpu", seconds=3.0)
    one = found["other"]
    assert isinstance(one, Comparison)
    assert one.rounds >= 5
    assert one.speedup == pytest.approx(2.0)


def test_with_five_rounds_only_agreement_of_all_is_clear(machine: Callable[..., Machine]) -> None:
    here = machine()
    times = iter([0.5] * 4 + [2.0] + [0.5] * 50)  # one first call, one to warm up, then the rounds

    def other() -> None:
        here.now += 2 * next(times)

    found = compare({"own": here.call(2.0), "other": other}, own="own", device="cpu", seconds=1.0)
    one = found["other"]
    assert isinstance(one, Comparison)
    assert (one.rounds, one.low, one.high) == (5, 0.5, 2.0)
    assert one.verdict == "no clear difference"


def test_a_short_call_is_repeated_until_a_turn_is_long_enough(machine: Callable[..., Machine]) -> None:
    here = machine()
    ran = {"own": 0, "other": 0}

    def counted(name: str) -> Callable[[], None]:
        def run() -> None:
            ran[name] += 1
            here.now += 1e-6

        return run

    found = compare({n: counted(n) for n in ran}, own="own", device="cpu", seconds=0.0)
    assert min(ran.values()) >= 5 * 200
    other = found["other"]
    assert isinstance(other, Comparison)
    assert other.us == pytest.approx(1.0)


def test_before_each_turn_what_must_be_ready_is_made_ready_untimed(machine: Callable[..., Machine]) -> None:
    here = machine()
    ready: list[str] = []

    def before(name: str) -> None:
        ready.append(name)
        here.now += 7.0

    def used(name: str) -> Callable[[], None]:
        def run() -> None:
            assert ready.pop() == name  # so it cannot be called twice either
            here.now += 1e-6

        return run

    found = compare({n: used(n) for n in ("own", "other")}, own="own", device="cpu", seconds=0.0, before=before)
    other = found["other"]
    assert isinstance(other, Comparison)
    assert other.us == pytest.approx(1.0, rel=1e-3)


def test_the_first_call_is_told_apart(machine: Callable[..., Machine]) -> None:
    here = machine()
    compiled = False

    def other() -> None:
        nonlocal compiled
        here.now += 0.01 if compiled else 30.0
        compiled = True

    found = compare({"own": here.call(0.02), "other": other}, own="own", device="cpu", seconds=1.0)
    one = found["other"]
    assert isinstance(one, Comparison)
    assert (one.first_s, one.us) == (pytest.approx(30.0), pytest.approx(10_000))
    assert one.verdict == "faster"


@pytest.mark.parametrize("after", [0, 1, 7])
def test_what_raises_is_out_and_the_others_go_on(machine: Callable[..., Machine], after: int) -> None:
    here = machine()
    calls = 0

    def failing() -> None:
        nonlocal calls
        calls += 1
        here.now += 1e-3
        if calls > after:
            raise ValueError("no such thing\nand more of it")

    found = compare(
        {"bad": failing, "own": here.call(1e-3), "good": here.call(5e-4)}, own="own", device="cpu", seconds=0.5
    )
    assert verdicts(found) == {
        "bad": "ValueError: no such thing",
        "own": "no clear difference",
        "good": "faster",
    }


@pytest.mark.parametrize("after", [0, 1, 7])
def test_without_own_code_there_is_nothing_to_compare_with(machine: Callable[..., Machine], after: int) -> None:
    here = machine()
    calls = 0

    def failing() -> None:
        nonlocal calls
        calls += 1
        here.now += 1e-3
        if calls > after:
            raise ValueError

    began = here.now
    found = compare({"other": here.call(1e-3), "own": failing}, own="own", device="cpu", seconds=0.5)
    assert after or here.now == began + 1e-3  # no other call is made then
    assert found == {"own": "ValueError", "other": "there is nothing to compare it with: own fails: ValueError"}


def test_when_all_others_fail_own_code_is_timed_all_the_same(machine: Callable[..., Machine]) -> None:
    here = machine()

    def failing() -> None:
        raise KeyError("x")

    found = compare({"own": here.call(1e-3), "other": failing}, own="own", device="cpu", seconds=9.0)
    own = found["own"]
    assert isinstance(own, Comparison)
    assert (own.rounds, own.us, own.speedup) == (5, pytest.approx(1000), 1.0)


def test_the_users_interrupt_is_not_taken_for_a_failure() -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare({"own": lambda: None, "other": interrupted}, own="own", device="cpu", seconds=0.1)
    assert gc.isenabled()


def test_random_numbers_and_the_collector_are_left_as_they_were() -> None:
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    collecting = []

    def chance() -> None:
        torch.rand(3)
        collecting.append(gc.isenabled())

    compare({"own": chance, "other": chance}, own="own", device="cpu", seconds=0.0)
    assert not any(collecting)
    assert gc.isenabled()
    assert torch.equal(torch.rand(1), expected)


def test_what_calls_leave_in_circles_does_not_pile_up(machine: Callable[..., Machine]) -> None:
    here = machine()
    alive = most = 0

    class Circle:
        def __init__(self) -> None:
            nonlocal alive, most
            alive += 1
            most = max(most, alive)
            self.itself = self

        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    def leaving() -> None:
        Circle()
        here.now += here.random.uniform(0.1, 0.3)

    compare({"own": here.call(0.2), "other": leaving}, own="own", device="cpu", seconds=60.0)
    assert most < 12


def test_progress_goes_up_to_one(machine: Callable[..., Machine]) -> None:
    here = machine(noise=0.5)
    seen: list[float] = []
    calls = {"own": here.call(0.01), "other": here.call(0.01)}
    compare(calls, own="own", device="cpu", seconds=1.0, progress=seen.append)
    assert seen == sorted(seen)
    assert seen[0] < 0.1
    assert seen[-1] == 1.0


class Gpu:
    """A GPU that does what it is told later: a call puts seconds of work into its queue, and waiting lets them pass."""

    def __init__(self, here: Machine) -> None:
        self.here, self.queued, self.held, self.peak = here, 0.0, 7, 7

    def synchronize(self) -> None:
        self.here.now, self.queued = self.here.now + self.queued, 0.0

    def reset(self) -> None:
        self.peak = self.held

    def call(self, seconds: float, started_in: float, memory: int = 0) -> Callable[[], None]:
        def run() -> None:
            self.here.now += started_in
            self.queued = max(0.0, self.queued - started_in) + seconds
            self.peak = max(self.peak, self.held + memory)

        return run

    def event(self, enable_timing: bool) -> object:
        gpu = self

        class Event:
            at = 0.0

            def record(self) -> None:
                self.at = gpu.here.now + gpu.queued

            def synchronize(self) -> None:
                gpu.synchronize()

            def elapsed_time(self, end: Event) -> float:
                return (end.at - self.at) * 1e3

        return Event()


def test_of_a_gpu_the_own_clock_is_read_and_starting_is_hidden_where_it_can_be(
    machine: Callable[..., Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = machine()
    gpu = Gpu(here)
    monkeypatch.setattr(torch.cuda, "Event", gpu.event)
    monkeypatch.setattr(torch.cuda, "synchronize", gpu.synchronize)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: gpu.held)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: gpu.peak)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", gpu.reset)
    calls = {
        "own": gpu.call(20e-6, started_in=5e-6, memory=100),
        "half": gpu.call(10e-6, started_in=5e-6),
        "hard to start": gpu.call(2e-6, started_in=40e-6),
    }
    found = compare(calls, own="own", device="cuda", seconds=0.1)
    half, hard = found["half"], found["hard to start"]
    assert isinstance(half, Comparison)
    assert isinstance(hard, Comparison)
    assert (half.own_us, half.us) == (pytest.approx(20, rel=0.02), pytest.approx(10, rel=0.06))
    assert (hard.us, hard.verdict) == (pytest.approx(40, rel=0.06), "slower")
    assert (half.own_peak, half.peak) == (100, 0)


def test_of_a_gpu_its_own_time_alone_counts_where_that_is_asked_for(
    machine: Callable[..., Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = machine()
    gpu = Gpu(here)
    waits = []

    def sleep(cycles: int) -> None:
        waits.append(cycles / 3e9)  # of a device with as many cycles in a second as are counted on
        gpu.queued += waits[-1]

    monkeypatch.setattr(torch.cuda, "Event", gpu.event)
    monkeypatch.setattr(torch.cuda, "synchronize", gpu.synchronize)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: gpu.held)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: gpu.peak)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", gpu.reset)
    monkeypatch.setattr(torch.cuda, "_sleep", sleep)
    calls = {"own": gpu.call(20e-6, started_in=5e-6), "hard to start": gpu.call(2e-6, started_in=40e-6)}
    found = compare(calls, own="own", device="cuda", seconds=0.1, hide_starts=True)["hard to start"]
    assert isinstance(found, Comparison)
    assert (found.own_us, found.us) == (pytest.approx(20, rel=0.06), pytest.approx(2, rel=0.06))
    assert found.verdict == "faster"
    assert 0 < max(waits) <= 0.05
    waits.clear()
    compare(calls, own="own", device="cuda", seconds=0.1)
    assert not waits


def test_on_the_real_clock_a_call_that_sleeps_is_slower() -> None:
    x = torch.ones(16)

    def slow() -> None:
        x.sin()
        time.sleep(0.002)

    found = compare({"own": lambda: x.sin(), "slow": slow}, own="own", device="cpu", seconds=0.2)
    assert verdicts(found)["slow"] == "slower"


def test_the_interval_covers_the_median_as_often_as_it_says() -> None:
    for count in range(6, 200):
        rank = _compare._rank(count)
        missed = 2 * Fraction(sum(comb(count, k) for k in range(rank)), 2**count)
        wider = 2 * Fraction(sum(comb(count, k) for k in range(rank + 1)), 2**count)
        assert missed <= Fraction(1, 20) < wider
    assert _compare._rank(5) == 0
    assert interval([3.0, 1.0, 2.0, 5.0, 4.0]) == (1.0, 5.0)
    assert interval([3.0]) == (3.0, 3.0)


def test_the_interval_agrees_with_counting_all_samples_of_coins() -> None:
    """Of 8 values, which are below the true median is one of 256 equal chances; the interval must hold it in 95 %."""
    held = 0
    for below in range(9):
        for _ in combinations(range(8), below):
            values = [-1.0] * below + [1.0] * (8 - below)
            low, high = interval([v * (1 + i / 100) for i, v in enumerate(values)])
            held += low < 0 < high
    assert held / 256 >= 0.95
