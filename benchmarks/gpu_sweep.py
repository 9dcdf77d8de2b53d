"""Candidates for the tables of configurations in kernels/triton (`_norm_configs.py`, `_head_configs.py`), measured.

    python benchmarks/gpu_sweep.py [--only WORD,...] [--seconds 200] [--workers 14] [--out FOLDER]

For each piece of work, an operation at a table entry's shapes, every candidate is run, compared with the result of the
entry as it is (which is checked against float64), and timed as in `gpu_ops.py`; the best are timed again in turns with
the entry as it is and with the best peers of that row. Kernels are compiled first, by several processes at once.
"""

from __future__ import annotations

import argparse
import functools
import gc
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config

sys.path.insert(0, str(Path(__file__).resolve().parent))

from gpu_about import about, in_a_line
from gpu_cases import Case, add_norm_case, exact_of, layer_norm_case, norm_case, qk_case, rotary_case
from gpu_ops import as_tuple, backward_calls, copy_bandwidth, error_of, forward_calls, gpu_time_us, relative_error

from kernelwise.kernels.triton import _head_configs as heads
from kernelwise.kernels.triton import _norm_configs as norms
from kernelwise.kernels.triton import add_rms_norm, layer_norm, qk_norm_rotary, rms_norm, rotary
from kernelwise.kernels.triton._head_configs import HeadConfig
from kernelwise.kernels.triton._launch import Launchers, power_of_2
from kernelwise.kernels.triton._norm_configs import NormConfig

START = time.time()
ANY = 1 << 62
SHARED_BYTES = 224 << 10  # of a multiprocessor
FINALISTS = 5


@dataclass(frozen=True)
class Work:
    """The entry (key, bound, configuration) of one table, and what it is measured on."""

    name: str
    table: dict[str, list[Any]]
    key: int
    bound: int
    cases: tuple[Case, ...]
    backward: bool
    candidates: tuple[Any, ...]
    peers: tuple[str, ...] = ()


def few_rows(width: int) -> tuple[NormConfig, ...]:
    block = power_of_2(width)
    return tuple(NormConfig(1, w) for w in (1, 2, 4, 8, 16, 32) if 2 <= block // (32 * w) <= 64)


def many_rows(width: int) -> tuple[NormConfig, ...]:
    block = power_of_2(width)
    pairs = itertools.product((1, 2, 4, 8, 16), (1, 2, 4, 8, 16))
    return tuple(NormConfig(r, w) for r, w in pairs if 8 <= r * block // (32 * w) <= 64 and r * block <= 16384)


def norm_backward(width: int) -> tuple[NormConfig, ...]:
    block = power_of_2(width)
    all_rows, all_stages = ((8, 16, 32), (1, 2)) if block <= 512 else ((1, 2), (2, 3, 4))
    if block >= 4096:
        all_rows, all_stages = (1,), (2, 3, 4, 5)
    found = []
    for rows, warps, programs, stages in itertools.product(all_rows, (1, 2, 4, 8, 16), (1, 2, 3, 4, 6, 8), all_stages):
        tile = rows * block
        fits = programs * (stages - 1) * tile * 4 <= SHARED_BYTES
        if fits and 8 <= tile // (32 * warps) <= 32 and 8 <= warps * programs <= 48:
            found.append(NormConfig(rows, warps, programs, stages))
    return tuple(found)


def rotary_candidates(shares: tuple[int, ...]) -> tuple[HeadConfig, ...]:
    return tuple(HeadConfig(s, w) for s, w in itertools.product(shares, (1, 2, 4, 8)))


def qk_candidates(q_heads: int, width: int) -> tuple[HeadConfig, ...]:
    triples = itertools.product((1, 2, 4, 8, 16), (2, 3, 4, 6, 8, 12), (1, 2, 3))
    spills = 16  # with more than so many elements of each half in a thread, registers do not suffice
    return tuple(
        HeadConfig(1, w, p, s) for w, p, s in triples if 8 <= w * p <= 48 and q_heads * width // 2 // (32 * w) <= spills
    )


def works() -> Iterator[Work]:
    """Most valuable first."""
    both = ("compile", "liger")
    forward, forward_few, backward = norms.FORWARD, norms.FORWARD_FEW, norms.BACKWARD
    small = (layer_norm_case(4096, 768), layer_norm_case(16384, 768))
    large = tuple(layer_norm_case(r, 1024) for r in (512, 4096, 16384))
    yield Work("layer_norm forward", forward["layer_norm"], 1024, ANY, large, False, many_rows(1024), both)
    yield Work("layer_norm forward", forward["layer_norm"], 768, ANY, small, False, many_rows(768), both)
    for way, table in ((False, heads.ROTARY), (True, heads.ROTARY_BACKWARD)):
        word = "rotary backward" if way else "rotary forward"
        for elements, q_heads, width in ((4096, 32, 128), (1024, 16, 64), (2048, 8, 256)):
            for tokens in (4096, 512, 128):
                if elements == 2048 and tokens != 4096:
                    continue
                case = (rotary_case(1, tokens, q_heads, 4 if width == 256 else 8, width),)
                bound = heads.size_class(tokens)
                yield Work(word, table, elements, bound, case, way, rotary_candidates((1, 2, 4, 8)), both)
    one_token = (rotary_case(1, 1), rotary_case(16, 1))
    yield Work("rotary forward", heads.ROTARY, 4096, 16, one_token, False, rotary_candidates((4, 8, 16, 32)), both)
    qk = heads.QK_NORM_ROTARY_BACKWARD
    two = ("two steps",)
    yield Work(
        "qk_norm_rotary backward", qk, 256, ANY, (qk_case(1, 4096, 8, 4, 256),), True, qk_candidates(8, 256), two
    )
    yield Work("qk_norm_rotary backward", qk, 128, ANY, (qk_case(1, 4096),), True, qk_candidates(32, 128), two)
    yield Work(
        "qk_norm_rotary backward", qk, 128, ANY, (qk_case(1, 4096, 16, 8, 128),), True, qk_candidates(16, 128), two
    )
    yield Work(
        "qk_norm_rotary backward", qk, 256, ANY, (qk_case(1, 4096, 4, 1, 256),), True, qk_candidates(4, 256), two
    )
    few = (layer_norm_case(1, 1024), layer_norm_case(16, 1024))
    yield Work("layer_norm forward", forward_few["layer_norm"], 1024, ANY, few, False, few_rows(1024), both)
    few = (layer_norm_case(1, 4096),)
    yield Work("layer_norm forward", forward_few["layer_norm"], 4096, ANY, few, False, few_rows(4096), both)
    few = (add_norm_case(1, 4096),)
    yield Work("add_rms_norm forward", forward_few["add_rms_norm"], 4096, ANY, few, False, few_rows(4096), both)
    for width in (4096, 2304, 2880):
        rows = (norm_case(4096, width),)
        yield Work("rms_norm backward", backward["rms_norm"], width, 8192, rows, True, norm_backward(width))
    for rows_, width in ((4096, 1024), (4096, 4096), (4096, 768), (16384, 1024), (4096, 8192), (4096, 5120)):
        case = (layer_norm_case(rows_, width),)
        bound = norms.size_class(rows_)
        yield Work("layer_norm backward", backward["layer_norm"], width, bound, case, True, norm_backward(width))
    yield Work("qk_norm_rotary backward", qk, 128, 1024, (qk_case(1, 512),), True, qk_candidates(32, 128), two)
    for width in (2304, 2880):
        rows = (norm_case(4096, width),)
        yield Work("rms_norm forward", forward["rms_norm"], width, ANY, rows, False, many_rows(width), both)
    case = (norm_case(131072, 128),)
    yield Work("rms_norm backward", backward["rms_norm"], 128, ANY, case, True, norm_backward(128))
    case = (layer_norm_case(16384, 768),)
    yield Work("layer_norm backward", backward["layer_norm"], 768, ANY, case, True, norm_backward(768))


class Chosen:
    """A configuration put in the place of the table's own; None leaves the table as it is."""

    def __init__(self, work: Work, config: Any) -> None:
        self.work, self.config = work, config
        self.device = norms.device_name(0)
        self.own = work.table.get(self.device)

    def __enter__(self) -> None:
        if self.config is not None:
            self.work.table[self.device] = [(self.work.key, self.work.bound, self.config), *(self.own or ())]
        self.forget()

    def __exit__(self, *error: object) -> None:
        if self.own is None:
            self.work.table.pop(self.device, None)
        else:
            self.work.table[self.device] = self.own
        self.forget()

    def forget(self) -> None:
        for found in (
            norms.forward_config, norms.backward_config, heads.rotary_config, heads.qk_norm_rotary_backward_config
        ):  # fmt: skip
            found.cache_clear()
        for module in (add_rms_norm, layer_norm, qk_norm_rotary, rms_norm, rotary):
            for value in vars(module).values():
                if isinstance(value, Launchers):
                    value.clear()


def calls_of(work: Work, case: Case, function: Callable[..., Any]) -> list[Callable[[], Any]]:
    return backward_calls(function, case) if work.backward else forward_calls(function, case)


def compile_all(part: int, parts: int) -> None:
    """Run each kernel of this part once, so that it lies in Triton's cache; programs are no matter of the compiler."""
    seen = 0
    for work in works():
        calls: list[Callable[[], Any]] | None = None
        kernels = dict.fromkeys(c._replace(programs=1) for c in work.candidates)
        for config in (None, *kernels):
            seen += 1
            if seen % parts != part:
                continue
            try:
                with torch.set_grad_enabled(work.backward), Chosen(work, config):
                    calls = calls or calls_of(work, work.cases[0], work.cases[0].contenders["ours"])
                    calls[0]()
                    torch.cuda.synchronize()
            except Exception as error:
                print(f"{work.name} {config}: {type(error).__name__} {str(error)[:100]}", flush=True)
        for case, peer in itertools.product(work.cases, work.peers):
            seen += 5
            if peer == "compile" and seen // 5 % parts == part and case.compiled:
                with torch.set_grad_enabled(work.backward):
                    torch._dynamo.reset()
                    calls_of(work, case, torch.compile(case.contenders[peer], dynamic=False))[0]()


def sweep(work: Work) -> dict[str, Any]:
    """Time all candidates, and the best ones again."""
    calls, wanted, problems = [], [], []
    with torch.set_grad_enabled(work.backward), Chosen(work, None):
        for case in work.cases:
            if case.backward_bytes < 1 << 28:
                with torch.enable_grad():
                    error = error_of(case.contenders["ours"], case, exact_of(case))
                if error > 8e-3:
                    problems.append(f"{case.shape}: relative error {error:.1e}")
            calls.append(calls_of(work, case, case.contenders["ours"]))
            wanted.append([t.double() for t in as_tuple(calls[-1][0]())])

    def timed(config: Any) -> list[float]:
        with torch.set_grad_enabled(work.backward), Chosen(work, config):
            for one, expected in zip(calls, wanted, strict=True):
                off = max(relative_error(a, e) for a, e in zip(as_tuple(one[0]()), expected, strict=True))
                if not off < 5e-3:
                    raise ValueError(f"differs by {off:.1e}")
            return [gpu_time_us(one) for one in calls]

    def few_rows_kernel() -> list[float]:
        own = layer_norm._FEW_ROWS
        layer_norm._FEW_ROWS = 4096
        try:
            return timed(None)
        finally:
            layer_norm._FEW_ROWS = own

    now = timed(None)
    results = []
    for config in work.candidates:
        try:
            times = timed(config)
            results.append((statistics.geometric_mean(t / n for t, n in zip(times, now, strict=True)), config))
        except Exception as error:
            problems.append(f"{config}: {type(error).__name__} {str(error)[:120]}")
    results.sort()
    if work.backward and results and isinstance(results[0][1], NormConfig):
        for columns in (8, 16):
            config = results[0][1]._replace(columns=columns)
            times = timed(config)
            results.append((statistics.geometric_mean(t / n for t, n in zip(times, now, strict=True)), config))
        results.sort()
    racing: dict[str, Callable[[], list[float]]] = {"as it is": functools.partial(timed, None)}
    for _, config in results[:FINALISTS]:
        racing[str(tuple(config))] = functools.partial(timed, config)
    if work.name == "layer_norm backward" and work.cases[0].shape in ("4096x768", "4096x1024"):
        racing["kernel for few rows"] = few_rows_kernel
    for peer in work.peers:
        shown = [c for c in work.cases if peer in c.contenders and (peer != "compile" or c.compiled)]
        if not shown:
            continue
        functions = [c.contenders[peer] for c in shown]
        if peer == "compile":
            torch._dynamo.reset()
            functions = [torch.compile(f, dynamic=False) for f in functions]
        with torch.set_grad_enabled(work.backward):
            made = [calls_of(work, c, f) for c, f in zip(shown, functions, strict=True)]

        def peer_times(made: list[Any] = made) -> list[float]:
            with torch.set_grad_enabled(work.backward):
                return [gpu_time_us(one) for one in made]

        racing[peer + (" of " + " ".join(c.shape for c in shown) if shown != list(work.cases) else "")] = peer_times
    final: dict[str, list[list[float]]] = {name: [] for name in racing}
    for _ in range(3):
        for name, race in racing.items():
            try:
                final[name].append(race())
            except Exception as error:
                problems.append(f"{name}: {type(error).__name__} {str(error)[:120]}")
    return {
        "work": f"{work.name} {work.key} up to {'any' if work.bound == ANY else work.bound}",
        "shapes": [case.shape for case in work.cases],
        "bytes": [case.backward_bytes if work.backward else case.forward_bytes for case in work.cases],
        "final_us": {n: [statistics.median(t) for t in zip(*v, strict=True)] for n, v in final.items() if v},
        "all": [(ratio, tuple(config)) for ratio, config in results],
        "problems": problems,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="comma-separated words; works whose name holds one of them")
    parser.add_argument("--seconds", type=float, default=200, help="stop starting new works after this long")
    parser.add_argument("--workers", type=int, default=14, help="processes that compile")
    parser.add_argument("--part", type=int, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=None, help="folder for gpu_sweep.json and gpu_sweep.txt")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.cuda.set_stream(torch.cuda.Stream())
    torch._functorch.config.donated_buffer = False
    layer_norm._SMALL = layer_norm._SMALL_RECORDED = 0  # the kernel is what is measured
    if arguments.part is not None:
        compile_all(arguments.part, arguments.workers)
        return
    lines: list[str] = []

    def show(line: str) -> None:
        lines.append(line)
        print(line, flush=True)

    said = about()
    show(in_a_line(said))
    bandwidth = copy_bandwidth()
    torch.cuda.empty_cache()
    show(f"copy bandwidth {bandwidth / 1e9:.0f} GB/s; times in microseconds, medians of three")
    again = [sys.executable, __file__, "--workers", str(arguments.workers), "--part"]
    environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    parts = [subprocess.Popen([*again, str(i)], env=environment) for i in range(arguments.workers)]
    for process in parts:
        try:
            process.wait(max(1, arguments.seconds / 2 - (time.time() - START)))
        except subprocess.TimeoutExpired:
            process.kill()
    show(f"compiled after {time.time() - START:.0f} s")
    results = []
    words = [word for word in arguments.only.split(",") if word]
    for work in works():
        if words and not any(word in work.name for word in words):
            continue
        if time.time() - START > arguments.seconds:
            show(f"{work.name} {work.key}: skipped for lack of time")
            continue
        try:
            results.append(sweep(work))
        except Exception as error:
            show(f"{work.name} {work.key}: {type(error).__name__} {str(error)[:200]}")
            continue
        found = results[-1]
        show(
            f"{found['work']}: {' '.join(found['shapes'])}  ({len(found['all'])} candidates, {time.time() - START:.0f} s)"
        )
        for name, times in found["final_us"].items():
            of = (
                f"   {100 * found['bytes'][-1] / (times[-1] * 1e-6) / bandwidth:.0f}%"
                if len(times) == len(found["bytes"])
                else ""
            )
            show(f"    {name:28s} " + "  ".join(f"{us:8.2f}" for us in times) + of)
        for problem in found["problems"][:3]:
            show(f"    {problem}")
        gc.collect()
        torch.cuda.empty_cache()
        if arguments.out:
            arguments.out.mkdir(parents=True, exist_ok=True)
            written = {**said, "copy_bytes_per_second": bandwidth, "works": results}
            (arguments.out / "gpu_sweep.json").write_text(json.dumps(written, indent=1) + "\n")
            (arguments.out / "gpu_sweep.txt").write_text("\n".join(lines) + "\n")
    show(f"{time.time() - START:.0f} s")
    if arguments.out:
        (arguments.out / "gpu_sweep.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
