"""Demo: every stage on a real language model, on the CPU, with what a newcomer wants to know about it.

Plan, the same text with and without kernels, the same perplexity, tuning for this machine with its files, the report, and the
way back. A wrong result makes the demo fail; a speed below what is expected is said clearly, but may be a busy machine.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import nn

from kernelwise._api import apply, kernelize, plan, report, tune, unkernelize
from kernelwise._configuring._config import KernelConfig
from kernelwise._data import Plan
from kernelwise._demo_text import TEXT
from kernelwise._evidence import EAGER, TUNED, Tuning
from kernelwise._models import load_smollm2
from kernelwise._reporting._page import save

PROMPT = "The capital of France is"
CONTINUES = " Paris."
MAX_PERPLEXITY_DIFFERENCE = 1e-3
PREFILL_TOKENS = 512
CONFIG_FILE, PAGE_FILE = "kernels.toml", "report.html"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a demo found. `failures` are wrong results; speeds below what is expected (`slower`) are no failures."""

    failures: tuple[str, ...]
    slower: tuple[str, ...]
    evidence: Tuning


class _Screen:
    """A progress bar at the bottom, results above it."""

    def __init__(self, console: Console, num_steps: int) -> None:
        self.console = console
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console, transient=True
        )
        self._task = self._progress.add_task("starting", total=num_steps)
        self._steps = 0

    def step(self, title: str) -> None:
        """Begin a step: the ones before it are done."""
        self._progress.update(self._task, description=title, completed=self._steps)
        self._steps += 1

    def part(self, fraction: float, what: str) -> None:
        """Show how much of the current step is done, and what comes next."""
        self._progress.update(self._task, completed=self._steps - 1 + min(1.0, fraction), description=what)

    @contextmanager
    def running(self) -> Iterator[None]:
        with self._progress:
            yield

    def head(self, text: str) -> None:
        self.console.print(f"\n[bold]{text}[/bold]", highlight=False)

    def say(self, text: str, style: str = "") -> None:
        self.console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def main(console: Console | None = None) -> int:
    """Run the demo on SmolLM2-135M-Instruct and return the exit code: 1 where a result is wrong.

    Raises:
        MissingDependencyError: what holds the model, or what reads it, is not installed.
    """
    console = console or Console()
    console.print(
        "[bold]Kernelwise demo[/bold]: SmolLM2-135M-Instruct with its real weights, on the CPU", highlight=False
    )
    console.print("loading it (the first time it is converted into the cache, which takes a minute)")
    model, tokenizer = load_smollm2()
    outcome = run(model, tokenizer, console=console, continues=CONTINUES)
    return 1 if outcome.failures else 0


@torch.no_grad()
def run(
    model: nn.Module,
    tokenizer: Any,
    *,
    console: Console,
    continues: str = "",
    seconds: float = 90.0,
    folder: Path | None = None,
) -> Outcome:
    """Show all stages on a causal language model in float32 on the CPU; afterwards it is in bfloat16, without kernels.

    Args:
        tokenizer: `encode` gives token ids for a text, `decode` the text of token ids.
        continues: what the greedy continuation of the prompt must start with.
        seconds: how long tuning may take, about.
        folder: where the tuned config and the report page are written; None: the current directory.
    """
    started = time.perf_counter()
    folder = Path.cwd() if folder is None else folder
    screen = _Screen(console, num_steps=5)
    ids = torch.tensor([tokenizer.encode(TEXT)])
    failures: list[str] = []
    with screen.running():
        screen.step("planning")
        screen.say(_machine(model))
        decided = plan(model)
        screen.head("1  Plan: which kernel goes where, float32")
        screen.say(str(decided))

        found, before = _state(model), _settled(model, ids)
        screen.step("generating text")
        failures += _same_text(screen, model, tokenizer, decided, continues)
        screen.step("perplexity")
        failures += _same_perplexity(screen, model, decided, ids, before)
        failures += _not_undone(model, ids, "float32", found, before)

        screen.step("tuning")
        model.to(torch.bfloat16)  # as it is published
        found, before = _state(model), _settled(model, ids)
        config, evidence = _tuned(screen, model, ids, seconds)
        screen.head("4  Tune: every kernel proven and timed here, the best chosen; bfloat16, as the model is published")
        screen.say(str(evidence))
        config_file, page_file = folder / CONFIG_FILE, folder / PAGE_FILE
        config.save(config_file)
        save(evidence, page_file)
        screen.say(f"written: {config_file.name} (kernelize(model, KernelConfig.load(...))) and {page_file.name}")

        screen.step("report and undo")
        kernelize(model, config)
        model(ids)
        screen.head("5  Report: what runs now, tuned")
        screen.say(str(report(model)))
        unkernelize(model)
        failures += _not_undone(model, ids, "bfloat16", found, before)

    if not any("undo" in failure for failure in failures):
        screen.head("6  Undo: every module is as it was, and the logits are bit-identical to those before")
    screen.say("")
    slower = _slower(evidence)
    for line in slower:
        screen.say(
            f"slower than expected: {line}. A busy machine can do this: run it again when it is quiet", "bold yellow"
        )
    for failure in failures:
        screen.say(f"WRONG: {failure}", style="bold red")
    verdict = f"{len(failures)} wrong" if failures else f"everything agrees; tuned: {_speeds(evidence)}"
    screen.say(f"{verdict}; {time.perf_counter() - started:.0f} s", style="bold red" if failures else "bold green")
    return Outcome(tuple(failures), slower, evidence)


def _tuned(screen: _Screen, model: nn.Module, ids: torch.Tensor, seconds: float) -> tuple[KernelConfig, Tuning]:
    """Tune for prefill and decoding of one sequence."""
    repeats = -(-PREFILL_TOKENS // ids.shape[1])
    prompt = ids.repeat(1, repeats)[:, :PREFILL_TOKENS]

    def told(what: str, part: float) -> None:
        screen.part(part, what)

    config = tune(model, {"input_ids": prompt}, seconds=seconds, progress=told)
    assert config.evidence is not None
    return config, config.evidence


def _slower(evidence: Tuning) -> tuple[str, ...]:
    """Say where the tuned model is not faster than its own code, or clearly slower than another contender."""
    lines = []
    for workload in evidence.workloads:
        runs = {run.contender: run.comparison for run in evidence.runs if run.workload == workload}
        tuned = runs.get(TUNED)
        if tuned is None or tuned.verdict != "faster":
            shown = (
                "no result"
                if tuned is None
                else f"{tuned.speedup:.2f} times as fast ({tuned.low:.2f}-{tuned.high:.2f})"
            )
            lines.append(f"tuned against its own code in {workload}: {shown}")
            continue
        lines += [
            f"{name} is {other.speedup:.2f} times as fast as its own code in {workload}, tuned {tuned.speedup:.2f}"
            for name, other in runs.items()
            if name not in (EAGER, TUNED) and other is not None and other.low > tuned.high
        ]
    return tuple(lines)


def _speeds(evidence: Tuning) -> str:
    return ", ".join(
        f"{run.workload} {run.comparison.speedup:.2f} x"
        for run in evidence.runs
        if run.contender == TUNED and run.comparison is not None
    )


State = list[tuple[type[nn.Module], dict[str, object]]]


def _state(model: nn.Module) -> State:
    """Return the class and the attributes of every module."""
    return [(type(module), dict(vars(module))) for module in model.modules()]


def _settled(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Return the logits that two runs in a row agree on.

    On a busy machine single runs before and after an undo were once seen to differ, and never again; what differs from one
    run to the next says nothing about an undo.
    """
    logits: torch.Tensor = model(ids).logits
    for _ in range(4):
        last, logits = logits, model(ids).logits
        if torch.equal(last, logits):
            break
    return logits


def _not_undone(model: nn.Module, ids: torch.Tensor, dtype: str, found: State, before: torch.Tensor) -> list[str]:
    """Return what differs from the untouched model: attributes by identity, logits bit by bit."""
    now = _state(model)
    num_changed = sum(
        new_class is not old_class or new.keys() != old.keys() or any(new[name] is not old[name] for name in old)
        for (old_class, old), (new_class, new) in zip(found, now, strict=True)
    )
    wrong = []
    if num_changed:
        wrong.append(f"undo in {dtype} left {num_changed} of {len(now)} modules changed")
    after = _settled(model, ids)
    if not torch.equal(after, before):
        off = (after - before).abs()
        wrong.append(
            f"undo in {dtype} did not bring back the logits: {int(off.count_nonzero())} of {off.numel()} are off, by at "
            f"most {off.max().item():.3g}"
        )
    return wrong


def _same_text(screen: _Screen, model: nn.Module, tokenizer: Any, decided: Plan, continues: str) -> list[str]:
    prompt = torch.tensor([tokenizer.encode(PROMPT)])
    own = _greedy(model, prompt)
    apply(model, decided)
    kernels = _greedy(model, prompt)
    unkernelize(model)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    table.add_column(f"{PROMPT} ...", overflow="fold")
    for name, tokens in (("own code", own), ("kernels", kernels)):
        table.add_row(name, tokenizer.decode(tokens).replace("\n", " ").replace("[", r"\["))
    screen.head("2  Same text: greedy generation, float32")
    screen.console.print(table)
    failures = []
    if own != kernels:
        first = next(index for index, pair in enumerate(zip(own, kernels, strict=True)) if pair[0] != pair[1])
        failures.append(f"the generated tokens differ from token {first} on")
    if not tokenizer.decode(kernels).startswith(continues):
        failures.append(f"{PROMPT!r} does not go on with {continues!r}")
    return failures


def _greedy(model: nn.Module, prompt: torch.Tensor, num_tokens: int = 32) -> list[int]:
    """Return the most likely continuation of a prompt `[1, length]`, token by token."""
    tokens: list[int] = []
    out = model(prompt, use_cache=True)
    for _ in range(num_tokens):
        tokens.append(int(out.logits[0, -1].argmax()))
        out = model(torch.tensor([tokens[-1:]]), past_key_values=out.past_key_values, use_cache=True)
    return tokens


def _same_perplexity(
    screen: _Screen, model: nn.Module, decided: Plan, ids: torch.Tensor, own_logits: torch.Tensor
) -> list[str]:
    own = _perplexity(own_logits, ids)
    apply(model, decided)
    kernels = _perplexity(model(ids).logits, ids)
    unkernelize(model)
    difference = abs(kernels - own) / own
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for header in ("own code", "kernels", "relative difference", "allowed"):
        table.add_column(header, justify="right")
    table.add_row(f"{own:.5f}", f"{kernels:.5f}", f"{difference:.1e}", f"{MAX_PERPLEXITY_DIFFERENCE:.0e}")
    screen.head(f"3  Same quality: perplexity on {ids.shape[1]} tokens of prose, float32")
    screen.console.print(table)
    if difference < MAX_PERPLEXITY_DIFFERENCE:  # also false where it is not a number
        return []
    return [f"the perplexity changes by {difference:.1e}, allowed is {MAX_PERPLEXITY_DIFFERENCE:.0e}"]


def _perplexity(logits: torch.Tensor, ids: torch.Tensor) -> float:
    """Return exp of the mean loss of each next token; logits `[1, length, vocabulary]`, ids `[1, length]`."""
    return float(nn.functional.cross_entropy(logits[0, :-1].double(), ids[0, 1:]).exp())


def _machine(model: nn.Module) -> str:
    capability = torch.backends.cpu.get_cpu_capability()
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    return (
        f"{size:.1f} M parameters; {platform.machine()}, {capability}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}"
    )
