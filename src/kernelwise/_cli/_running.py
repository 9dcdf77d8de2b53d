"""The commands that run a model, and print or write what was measured."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, get_args

import typer

from kernelwise._cli._app import DtypeOption, ModelArgument, app, one_of
from kernelwise._errors import KernelwiseError
from kernelwise._evidence import Objective, Tuning

RunDeviceOption = Annotated[
    str | None,
    typer.Option("--device", metavar="DEVICE", help="Where to run it. Default: the accelerator, else cpu."),
]
FullOption = Annotated[bool, typer.Option("--full", help="Build a model type in the sizes of its defaults, not small.")]
LayersOption = Annotated[
    int | None, typer.Option("--layers", metavar="N", min=1, help="Build it with N hidden layers.")
]
TokensOption = Annotated[int, typer.Option("--tokens", metavar="N", min=1, help="Length of the prompt.")]
BatchOption = Annotated[int, typer.Option("--batch", metavar="N", min=1, help="Rows of the inputs.")]
NewTokensOption = Annotated[
    int, typer.Option("--new-tokens", metavar="N", min=1, help="Tokens that a run of decode computes for each row.")
]
InputsOption = Annotated[
    str | None,
    typer.Option("--inputs", metavar="MODULE:FACTORY", help="What gives the inputs. Default: random ones."),
]
WorkloadOption = Annotated[
    list[str] | None,
    typer.Option("--workload", metavar="NAME", help="forward, prefill, decode or training. Can be given again."),
]
JsonFileOption = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write what was found as JSON.")]
HtmlFileOption = Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write what was found as a page.")]

_OTHER_FILE = "  go on      name a file in a directory that exists and can be written"


@app.command("bench")
def bench_command(
    model: ModelArgument,
    device: RunDeviceOption = None,
    dtype: DtypeOption = None,
    full: FullOption = False,
    layers: LayersOption = None,
    tokens: TokensOption = 128,
    batch: BatchOption = 1,
    new_tokens: NewTokensOption = 16,
    inputs: InputsOption = None,
    workload: WorkloadOption = None,
    contender: Annotated[
        list[str] | None,
        typer.Option(
            "--contender",
            metavar="NAME",
            help="builtin, torch.compile, transformers, liger, builtin+compile, or the name of --config. Can be given again.",
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", metavar="FILE", help="A kernel mapping in TOML or JSON: one more contender."),
    ] = None,
    seconds: Annotated[
        float, typer.Option("--seconds", metavar="S", min=0.0, help="How long the turns on one workload may take.")
    ] = 20.0,
    json_file: JsonFileOption = None,
    html_file: HtmlFileOption = None,
) -> None:
    """Time MODEL end to end, all contenders side by side. Exit code 1: not even its own code ran."""
    from kernelwise._measuring._bench import bench_command as run
    from kernelwise._measuring._bench import show

    _check_files(json_file, html_file)
    with _progress() as progress:
        found = run(
            model,
            config=config,
            inputs=inputs,
            device=device,
            dtype=dtype,
            full=full,
            layers=layers,
            batch=batch,
            tokens=tokens,
            steps=new_tokens,
            workloads=workload or (),
            contenders=contender or (),
            seconds=seconds,
            progress=progress,
        )
    print(show(found))
    _write_evidence(found, json_file, html_file)
    raise typer.Exit(0 if any(run.comparison is not None for run in found.runs) else 1)


@contextmanager
def _progress() -> Iterator[Callable[[str, float], None]]:
    """Show what is done and how much of it, on a terminal alone."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("starting", total=1.0)
        yield lambda text, part: bar.update(task, description=text, completed=part)


@app.command("tune")
def tune_command(
    model: ModelArgument,
    device: RunDeviceOption = None,
    dtype: DtypeOption = None,
    full: FullOption = False,
    layers: LayersOption = None,
    tokens: TokensOption = 128,
    batch: BatchOption = 1,
    new_tokens: NewTokensOption = 16,
    inputs: InputsOption = None,
    workload: WorkloadOption = None,
    objective: Annotated[
        str,
        typer.Option(
            "--objective",
            metavar="NAME",
            callback=one_of(get_args(Objective)),
            help=f"{', '.join(get_args(Objective))}.",
        ),
    ] = "latency",
    config: Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help="A kernel mapping: its kernels are tried too.")
    ] = None,
    candidate: Annotated[
        list[str] | None,
        typer.Option(
            "--candidate",
            metavar="REF",
            help="One more kernel for all layers that it fits; /path:* is all of a repository. Can be given again.",
        ),
    ] = None,
    contender: Annotated[
        list[str] | None,
        typer.Option(
            "--contender",
            metavar="NAME",
            help="Race the result with torch.compile, transformers or liger, or with eager alone. Can be given again. "
            "Default: torch.compile where there is time for it, and liger on GPUs.",
        ),
    ] = None,
    seconds: Annotated[
        float, typer.Option("--seconds", metavar="S", min=0.0, help="How long it may take, about.")
    ] = 300.0,
    compiled: Annotated[bool, typer.Option("--compile", help="Tune for torch.compile too (slow).")] = False,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Write the config as TOML or JSON.")] = None,
    json_file: JsonFileOption = None,
    html_file: HtmlFileOption = None,
) -> None:
    """Find the kernels that are right and fastest for MODEL on this machine. Run again after an interruption, it goes on."""
    from kernelwise._configuring._config import KernelConfig
    from kernelwise._configuring._config_file import check_suffix
    from kernelwise._tuning._tune import tune
    from kernelwise._weights import check_runs, load_inputs, load_with_weights, make_inputs

    _check_files(out, json_file, html_file)
    if out is not None:
        check_suffix(out)
    named = load_with_weights(model, dtype=dtype, device=device, full=full, layers=layers)
    given = make_inputs(named.model, batch=batch, tokens=tokens) if inputs is None else load_inputs(inputs, named.model)
    check_runs(named.model, given)
    with _progress() as progress:
        tuned = tune(
            named.model,
            given,
            objective=objective,
            workload=workload or None,
            config=None if config is None else KernelConfig.load(config),
            candidates=candidate or (),
            contenders=contender or None,
            steps=new_tokens,
            seconds=seconds,
            compile=compiled,
            progress=progress,
            name=model,
        )
    assert tuned.evidence is not None
    evidence = replace(tuned.evidence, notes=(*named.notes, *tuned.evidence.notes))
    print(evidence)
    print(f"\n{evidence.config}", end="")
    if out is not None:
        with _writing(out):
            tuned.save(out)
    _write_evidence(evidence, json_file, html_file)


def _write_evidence(found: Tuning, json_file: Path | None, html_file: Path | None) -> None:
    if json_file is not None:
        with _writing(json_file):
            json_file.write_text(json.dumps(found.to_json(), indent=2) + "\n")
    if html_file is not None:
        from kernelwise._reporting._page import save

        save(found, html_file)


def _check_files(*files: Path | None) -> None:
    """Refuse files that cannot be written before anything takes its time."""
    for file in files:
        if file is None:
            continue
        if not file.absolute().parent.is_dir():
            raise KernelwiseError(f"cannot write {file}: its directory does not exist\n{_OTHER_FILE}")
        if file.is_dir():
            raise KernelwiseError(f"cannot write {file}: it is a directory\n{_OTHER_FILE}")


@contextmanager
def _writing(file: Path) -> Iterator[None]:
    """Say that a file could not be written in a line."""
    try:
        yield
    except OSError as error:
        raise KernelwiseError(f"cannot write {file}: {error.strerror or error}\n{_OTHER_FILE}") from None


@app.command("report")
def report_command(
    file: Annotated[Path, typer.Argument(metavar="FILE.json", help="What `tune --json` or `bench --json` wrote.")],
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write one page with everything, for any browser.")
    ] = None,
) -> None:
    """Show what tuning or benching found: as tables, or as a page that needs no network."""
    from kernelwise._evidence import load

    tuning = load(file)
    if html is None:
        print(tuning)
    else:
        from kernelwise._reporting._page import save

        save(tuning, html)
        print(f"wrote {html}")


@app.command("demo")
def demo_command() -> None:
    """Show everything on a small language model with real weights, on the CPU; five minutes on two cores at most."""
    from kernelwise._demo import main as run_demo

    raise typer.Exit(run_demo())
