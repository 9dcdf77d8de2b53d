"""Every Triton kernel against its peers on one GPU, in one run: correctness first, then time.

    python benchmarks/gpu_ops.py [--only NAME,...] [--without compile,quack] [--seconds 400] [--out FOLDER]

Time is that of the GPU for one call: a CUDA graph holds many calls that rotate over enough inputs and outputs to leave
the second-level cache cold; the median of its replays, divided by the number of calls. `%` is the share of the copy
bandwidth (measured first, in the same run) that a contender reaches when only the bytes are counted that the operation
must move: each input read once, each output written once. Contenders: `ours`; `torch` (F.rms_norm), `eager` (the layer
as transformers writes it), `compile` (torch.compile of that), `liger` (Liger's Triton kernels) and `quack`, where
installed. A contender that errs too much is reported and not timed. All of these stand in `gpu_cases.py`.
"""

from __future__ import annotations

import argparse
import collections
import functools
import gc
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config
from gpu_about import about, in_a_line
from gpu_cases import BF16, Case, Tensors, cases, exact_of, gated_case, norm_case, rotary_case
from gpu_rows import LARGE, PEERS

START = time.time()


# ---------------------------------------------------------------- time


def rotation(num_bytes: int) -> int:
    """How many sets of inputs overflow the second-level cache three times over."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(1, min(24, math.ceil(3 * cache / num_bytes)))


def gpu_time_us(calls: Sequence[Callable[[], Any]]) -> float:
    """Microseconds of one call on the GPU; see the module's docstring."""
    kept: collections.deque[Any] = collections.deque(maxlen=len(calls))
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for call in calls[:3]:
        kept.append(call())
    begin.record()
    for call in calls[:2]:
        kept.append(call())
    end.record()
    torch.cuda.synchronize()
    one_ms = max(2e-3, begin.elapsed_time(end) / min(2, len(calls)))
    count = min(240, max(len(calls), int(1.5 / one_ms), 120 if one_ms < 0.15 else 1))
    count = -(-count // len(calls)) * len(calls)
    graph = torch.cuda.CUDAGraph()
    kept.clear()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for i in range(count):
            kept.append(calls[i % len(calls)]())
    for _ in range(2):
        graph.replay()
    times: list[float] = []
    while len(times) < 7 or (len(times) < 40 and sum(times) * count < 8e3):
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / count)
    return statistics.median(times)


def loop_time_us(call: Callable[[], Any]) -> float:
    """Microseconds of one call that takes long and may wait for the GPU: the median of single calls, without a graph.

    The GPU sleeps for about half a millisecond first, so what the host does counts only where a call waits for the GPU.
    """
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(3):
        call()
    times: list[float] = []
    while len(times) < 9 or (len(times) < 60 and sum(times) < 4e5):
        torch.cuda._sleep(1_000_000)
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return statistics.median(times)


def host_time_us(call: Callable[[], Any], count: int = 100) -> float:
    """Microseconds of the host for one call, the GPU kept from falling behind; the best of twenty rounds."""
    best = math.inf
    for _ in range(20):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(count):
            call()
        best = min(best, (time.perf_counter() - begin) / count)
        torch.cuda.synchronize()
    return best * 1e6


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a large copy: the best of the ways PyTorch has to make one."""
    source = torch.empty(1 << 29, device="cuda", dtype=BF16).normal_()
    target = torch.empty_like(source)
    ways = (lambda: target.copy_(source), lambda: torch.neg(source, out=target))
    return max(2 * source.nbytes / (gpu_time_us([way]) * 1e-6) for way in ways)


def least_us() -> float:
    """Microseconds of a kernel for one number: what none can go below, and what small shapes are beside it."""
    one = torch.ones(1, device="cuda")
    return gpu_time_us([functools.partial(torch.neg, one, out=one)])


# ---------------------------------------------------------------- one case


def as_tuple(value: Any) -> Tensors:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def relative_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    return float((actual.double() - exact).norm() / exact.norm().clamp_min(1e-300))


def error_of(function: Callable[..., Any], case: Case, exact: Callable[..., Any]) -> float:
    """The largest relative error (in norm) of outputs and gradients against `exact` in float64; NaN never passes."""
    inputs = case.make()
    wide = [t.double().requires_grad_(i < case.num_grads) if t.is_floating_point() else t for i, t in enumerate(inputs)]
    narrow = [t.clone().requires_grad_(i < case.num_grads) for i, t in enumerate(inputs)]
    expected, actual = as_tuple(exact(*wide)), as_tuple(function(*narrow))
    errors = [relative_error(a.detach(), e.detach()) for a, e in zip(actual, expected, strict=True)]
    upstream = [torch.randn_like(a) for a in actual]
    leaves_wide, leaves = wide[: case.num_grads], narrow[: case.num_grads]
    wanted = torch.autograd.grad(expected, leaves_wide, [u.double() for u in upstream])
    given = torch.autograd.grad(actual, leaves, [u.clone() for u in upstream])
    errors += [relative_error(g, w) for g, w in zip(given, wanted, strict=True)]
    return max(e if math.isfinite(e) else math.inf for e in errors)


@dataclass
class Row:
    name: str
    shape: str
    direction: str
    num_bytes: int
    median_us: dict[str, float] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)

    def line(self, bandwidth: float) -> str:
        parts = []
        for who, us in self.median_us.items():
            note = f"{100 * self.num_bytes / (us * 1e-6) / bandwidth:.0f}%"
            if who in self.peak_bytes:
                note = f"{self.peak_bytes[who] / 1e9:.2f} GB"
            parts.append(f"{who} {us:.1f} ({note})")
        return f"{self.name:12s} {self.direction} {self.shape:20s} " + "  ".join(parts)


def forward_calls(function: Callable[..., Any], case: Case) -> list[Callable[[], Any]]:
    return [functools.partial(function, *case.make()) for _ in range(rotation(case.forward_bytes))]


def backward_calls(function: Callable[..., Any], case: Case) -> list[Callable[[], Any]]:
    calls = []
    for _ in range(rotation(case.backward_bytes)):
        inputs = [t.requires_grad_(i < case.num_grads) for i, t in enumerate(t.detach() for t in case.make())]
        outputs = as_tuple(function(*inputs))
        upstream = [torch.randn_like(o) for o in outputs]
        calls.append(
            functools.partial(torch.autograd.grad, outputs, inputs[: case.num_grads], upstream, retain_graph=True)
        )
    return calls


def loss_step(function: Callable[..., Any], case: Case) -> tuple[float, int]:
    """Time of forward and backward together in microseconds, and the memory they take beside their inputs in bytes."""
    inputs = [t.requires_grad_(i < case.num_grads) for i, t in enumerate(case.make())]

    def step() -> Any:
        loss = function(*inputs)
        return None if loss is None else torch.autograd.grad(loss, inputs[: case.num_grads])

    torch.cuda.synchronize()
    step()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = step()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del kept
    return loop_time_us(step), peak


def run_case(case: Case, without: set[str], problems: list[str], compile_too: bool) -> list[Row]:
    rows = [
        Row(case.name, case.shape, "forward ", case.forward_bytes),
        Row(case.name, case.shape, "together" if case.is_loss else "backward", case.backward_bytes),
    ]
    few_tokens = case.forward_bytes < 2_000_000  # nobody trains on that few; one direction is enough
    for who, function in case.contenders.items():
        if who in without or (who == "compile" and not (compile_too and case.compiled)):
            continue
        where = f"{case.name} {case.shape} {who}"
        try:
            if who == "compile":
                torch._dynamo.reset()
                function = torch.compile(function, dynamic=False)
            sizes = case.shape.split("x")
            fits = int(sizes[0]) * int(sizes[-1]) < 1 << 30 if case.is_loss else case.backward_bytes < 1 << 29
            checked = who != "products" and fits  # beyond that, float64 does not fit
            if checked and (error := error_of(function, case, exact_of(case))) > 8e-3:
                problems.append(f"{where}: relative error {error:.1e}, not timed")
                continue
            if case.is_loss:
                if "linear" not in case.name and who not in ("consume", "compile"):
                    with torch.no_grad():
                        rows[0].median_us[who] = loop_time_us(functools.partial(function, *case.make()))
                rows[1].median_us[who], rows[1].peak_bytes[who] = loss_step(function, case)
                continue
            with torch.no_grad():
                rows[0].median_us[who] = gpu_time_us(forward_calls(function, case))
            if not few_tokens:
                rows[1].median_us[who] = gpu_time_us(backward_calls(function, case))
        except Exception as error:  # a peer that fails is a finding, not the end of the run
            problems.append(f"{where}: {type(error).__name__}: {str(error).strip().splitlines()[:1]}")
        finally:
            gc.collect()
            torch.cuda.empty_cache()
    return [row for row in rows if row.median_us]


# ---------------------------------------------------------------- the host's share


def host_costs() -> dict[str, float]:
    """Microseconds of the host for one call at one token."""
    table = {}
    for case in (norm_case(1, 4096), gated_case(1, 14336), gated_case(1, 14336, packed=True), rotary_case(1, 1)):
        inputs = case.make()
        for who, function in case.contenders.items():
            if who == "compile":
                torch._dynamo.reset()
                function = torch.compile(function, dynamic=False)
            try:
                with torch.no_grad():
                    function(*inputs)
                    table[f"{case.name} {who}"] = host_time_us(functools.partial(function, *inputs))
                if who in ("ours", "eager"):
                    leaves = [t.detach().clone().requires_grad_() for t in inputs[: case.num_grads]]
                    call = functools.partial(function, *leaves, *inputs[case.num_grads :])
                    table[f"{case.name} {who}, recorded by autograd"] = host_time_us(call)
            except Exception as error:
                print(f"host cost of {case.name} {who}: {type(error).__name__}: {str(error)[:100]}")
    x = torch.empty(1, 4096, device="cuda", dtype=BF16)
    table["torch.empty_like"] = host_time_us(lambda: torch.empty_like(x))
    return table


# ---------------------------------------------------------------- summary


def summary(rows: list[Row], bandwidth: float) -> list[str]:
    """Geometric means of (peer's time / ours) by operation, large and small apart, and where ours is not ahead."""
    lines = []
    groups: dict[tuple[str, str, str], list[Row]] = collections.defaultdict(list)
    for row in rows:
        size = "large" if row.num_bytes >= LARGE else "small"
        groups[row.name, row.direction, size].append(row)
    for (name, direction, size), members in groups.items():
        ratios: dict[str, list[float]] = collections.defaultdict(list)
        shares = []
        for row in members:
            if (ours := row.median_us.get("ours")) is None:
                continue
            shares.append(100 * row.num_bytes / (ours * 1e-6) / bandwidth)
            for who, us in row.median_us.items():
                if who != "ours":
                    ratios[who].append(us / ours)
        means = "  ".join(f"{who} {statistics.geometric_mean(values):.2f}" for who, values in ratios.items())
        lines.append(f"{name:12s} {direction} {size}: {means}  (ours {statistics.mean(shares):.0f}% of copy)")
    for row in rows:
        ours = row.median_us.get("ours", math.inf)
        ahead = {who: us for who, us in row.median_us.items() if who in PEERS and us < 0.97 * ours}
        if ahead:
            lines.append(f"not ahead: {row.line(bandwidth)}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="comma-separated names of operations")
    parser.add_argument("--without", default="", help="comma-separated contenders to leave out")
    parser.add_argument("--seconds", type=float, default=400, help="stop starting new cases after this long")
    parser.add_argument("--out", type=Path, default=None, help="folder for gpu_ops.json and gpu_ops.txt")
    parser.add_argument(
        "--small", action="store_true", help="tiny shapes, ours alone, no timing: for compute-sanitizer"
    )
    arguments = parser.parse_args()
    torch.manual_seed(0)
    # Backward runs on the stream of its forward, and the default stream cannot be captured.
    torch.cuda.set_stream(torch.cuda.Stream())
    # A compiled backward that is timed runs many times over one forward, so it must not reuse that forward's memory.
    torch._functorch.config.donated_buffer = False
    if arguments.small:
        print(in_a_line(about()), flush=True)
        for case in cases(small=True):
            error = error_of(case.contenders["ours"], case, exact_of(case))
            print(f"{case.name} {case.shape} relative error {error:.1e}")
            assert error < 8e-3
        return
    without = set(filter(None, arguments.without.split(",")))
    only = set(filter(None, arguments.only.split(",")))
    lines: list[str] = []

    def show(line: str) -> None:
        lines.append(line)
        print(line, flush=True)

    said = about()
    show(in_a_line(said))
    bandwidth = copy_bandwidth()
    least = least_us()
    show(
        f"copy bandwidth {bandwidth / 1e9:.0f} GB/s (read and written); times in microseconds, of one number {least:.2f}"
    )
    hosts = host_costs() if not only or "host" in only else {}
    for what, us in hosts.items():
        show(f"host cost, one token: {what:40s} {us:.1f}")
    rows: list[Row] = []
    problems: list[str] = []
    skipped = 0
    for case in cases(small=False):
        if only and case.name not in only:
            continue
        left = arguments.seconds - (time.time() - START)
        if left < 15:
            skipped += 1
            continue
        for row in run_case(case, without, problems, compile_too=left > 60):
            rows.append(row)
            show(row.line(bandwidth))
    for line in [*summary(rows, bandwidth), *problems]:
        show(line)
    show(f"{skipped} cases skipped for lack of time; {time.time() - START:.0f} s")
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        result = {
            **said,
            "copy_bytes_per_second": bandwidth,
            "least_us": least,
            "host_us": hosts,
            "rows": [vars(row) for row in rows],
            "problems": problems,
            "skipped": skipped,
        }
        (arguments.out / "gpu_ops.json").write_text(json.dumps(result, indent=1) + os.linesep)
        (arguments.out / "gpu_ops.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
