"""Command line: reads arguments, calls the stages, prints. `kernelwise layers | plan | verify | bench | tune | demo | doctor`.

Exit codes: 0, 1 for an error of Kernelwise (its message, no traceback) or something that does not fit, 2 for usage.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from kernelwise._data import DEVICE_TYPES, MODES, Decision, Layer, Plan, Target, to_json
from kernelwise._errors import KernelwiseError
from kernelwise._evidence import Objective, Tuning
from kernelwise._mapping import DEVICE_HINTS, MISS_HINTS, MODE_HINTS
from kernelwise._models import DTYPES, NamedModel, load_model
from kernelwise._reference import did_you_mean, nearest
from kernelwise._table import ROOT, render

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="The right kernel for every layer of a PyTorch model.",
)


def _one_of(names: Sequence[str], hints: Mapping[str, str] | None = None) -> Callable[[str | None], str | None]:
    def check(value: str | None) -> str | None:
        if value is not None and value not in names:
            raise typer.BadParameter(f"{value!r} is not one of {', '.join(names)}{did_you_mean(value, names, hints)}")
        return value

    return check


_MODEL_HELP = (
    "A local directory, a Hub id, module:factory, or a transformers model type (llama, qwen3 ...), built small."
)
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help=_MODEL_HELP)]
DtypeOption = Annotated[
    str | None,
    typer.Option("--dtype", metavar="DTYPE", callback=_one_of(DTYPES), help=f"Build it in {', '.join(DTYPES)}."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
ConfigOption = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="A kernel mapping in TOML or JSON.")
]

# Of the commands that run a model.
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
_OTHER_FILE = "  go on      name a file in a directory that exists and can be written"
JsonFileOption = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write what was found as JSON.")]
HtmlFileOption = Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write what was found as a page.")]


@app.command("layers")
def layers_command(
    model: ModelArgument,
    dtype: DtypeOption = None,
    explain: Annotated[
        str | None,
        typer.Option(
            "--explain",
            metavar="PATH",
            help="What the layer at a path computes; if that is unknown, beside the operation that it looks most like.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List the layers of MODEL where a kernel can go, what each computes, and the layers of which that is not known."""
    from kernelwise._discover import discover
    from kernelwise._unknown import explain as explanations
    from kernelwise._unknown import explanation_text, unknown_layers

    named = load_model(model, dtype=dtype)
    if explain is not None:
        explained = explanations(named.model, explain)
        if as_json:
            _print_json({"explained": to_json(explained), "notes": named.notes})
        else:
            print(explanation_text(explained))
        return
    found, unknown = discover(named.model), unknown_layers(named.model)
    if as_json:
        _print_json({"layers": to_json(found), "unknown": to_json(unknown), "notes": named.notes})
    else:
        print(_layers_table(found, named))
        if unknown:
            print("\nNot recognised; a PATH after --explain shows more.")
            rows = [(layer.path, layer.name, "", layer.like or "", layer.reason) for layer in unknown]
            print(render(("layer", "class", "", "looks like", "why"), rows))


@app.command("plan")
def plan_command(
    model: ModelArgument,
    config: ConfigOption = None,
    device: Annotated[
        str | None,
        typer.Option(
            "--device",
            metavar="DEVICE",
            callback=_one_of(DEVICE_TYPES, DEVICE_HINTS),
            help=f"Plan for {', '.join(DEVICE_TYPES)}, on this machine or not. Default: cpu, or where the factory put it.",
        ),
    ] = None,
    mode: Annotated[
        str | None,
        typer.Option(
            "--mode",
            metavar="MODE",
            callback=_one_of(MODES, MODE_HINTS),
            help=f"{', '.join(MODES)}. Default: inference and training.",
        ),
    ] = None,
    dtype: DtypeOption = None,
    on_miss: Annotated[
        str | None,
        typer.Option(
            "--on-miss",
            metavar="raise|keep",
            callback=_one_of(("raise", "keep"), MISS_HINTS),
            help="Where a kernel that the config asks for cannot be had: fail, or keep the layer's own code.",
        ),
    ] = None,
    explain: Annotated[
        str | None,
        typer.Option(
            "--explain",
            metavar="PATH",
            help="Say of the layers at PATH, below it, of that name or that match the pattern, which candidates lost and why.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show which kernel goes into which layer of MODEL, and why not another. Nothing is changed."""
    from kernelwise._api import plan
    from kernelwise._configuring._config import KernelConfig

    named = load_model(model, dtype=dtype)
    wanted = device or ("cpu" if named.is_nowhere else None)
    here = wanted is None or wanted in _devices_here()
    decided = plan(
        named.model,
        None if config is None else KernelConfig.load(config),
        mode=mode,
        device=wanted if here else None,
        target=None if here or wanted is None else Target(wanted),
        on_miss=on_miss,
    )
    notes = named.notes if here else (*named.notes, f"no {wanted} on this machine: kernels are described, not loaded")
    if not decided.decisions:
        notes = (*notes, f"none of its layers is registered or recognised: kernelwise layers {model} says why")
    if explain is not None:
        decided = Plan(decided.target, _decisions_at(decided, explain), decided.notes)
    if as_json:
        _print_json({**decided.to_json(), "model_notes": notes})
    elif explain is not None:
        print(_explanation(decided))
    else:
        print(decided)
        for note in notes:
            print(f"note: {note}")


@app.command("verify")
def verify_command(
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help=_MODEL_HELP)] = None,
    config: ConfigOption = None,
    kernel: Annotated[
        str | None,
        typer.Option(
            "--kernel",
            metavar="DIR_OR_REPO:LAYER",
            help="Check this kernel on every layer that it could serve, in MODEL or in small models of several types.",
        ),
    ] = None,
    trust_remote_code: Annotated[
        bool,
        typer.Option("--trust-remote-code", help="Load --kernel from a publisher that the Hub does not vouch for."),
    ] = False,
    device: Annotated[
        str | None,
        typer.Option(
            "--device",
            metavar="DEVICE",
            callback=_one_of(DEVICE_TYPES, DEVICE_HINTS),
            help="Check there. Default: cpu, or where the factory put the model.",
        ),
    ] = None,
    dtype: DtypeOption = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Check under torch.compile too (slow).")] = False,
    seconds: Annotated[
        float, typer.Option("--seconds", metavar="S", min=0.0, help="The time limit of each case.")
    ] = 60.0,
    seed: Annotated[int, typer.Option("--seed", help="Of the inputs and weights that are made.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Check that the kernels for MODEL compute what its layers compute, on inputs made for them. Exit code 1: one does not."""
    from kernelwise._author import verify_command as run

    if model is None and kernel is None:
        raise typer.BadParameter("name a MODEL, or a kernel with --kernel")
    checks = run(
        model,
        config,
        kernel,
        trust_remote_code=trust_remote_code,
        device=device,
        dtype=dtype,
        compiled=compiled,
        seconds=seconds,
        seed=seed,
    )
    if as_json:
        _print_json(checks.to_json())
    else:
        print(checks)
    raise typer.Exit(0 if checks.ok else 1)


cache_app = typer.Typer(no_args_is_help=True, help="Show or clear what Kernelwise remembers between runs.")
app.add_typer(cache_app, name="cache")


@cache_app.command("show")
def cache_show_command(as_json: JsonOption = False) -> None:
    """Show what is remembered between runs: how much of it, and where."""
    from kernelwise import _results
    from kernelwise._cache import cache_directory
    from kernelwise._units import size

    remembered = {name: _results.size(name) for name in _results.FOLDERS}
    if as_json:
        found = {name: {"number": number, "bytes": nbytes} for name, (number, nbytes) in remembered.items()}
        _print_json({"directory": str(cache_directory()), "remembered": found})
        return
    print(cache_directory())
    for name, (number, nbytes) in remembered.items():
        print(f"  {name:8} {number:6} {size(nbytes):>10}  {_results.FOLDERS[name]}")


@cache_app.command("clear")
def cache_clear_command(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[results|proofs|imports]...", help="What to forget. Default: all.")
    ] = None,
) -> None:
    """Forget what is remembered; it is measured, checked and tried again when it is needed."""
    from kernelwise import _results

    check = _one_of(tuple(_results.FOLDERS))
    for name in [check(name) or "" for name in names or _results.FOLDERS]:
        print(f"{name}: {_results.clear(name)} removed")


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
            callback=_one_of(get_args(Objective)),
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

    _check_files(html)
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


@app.command("doctor")
def doctor_command(as_json: JsonOption = False) -> None:
    """Say what is installed, what does not fit together, and the command that mends it."""
    from kernelwise._doctor import examine, gather, show

    facts = gather()
    findings = examine(facts)
    if as_json:
        _print_json({"facts": to_json(facts), "findings": to_json(findings)})
    else:
        print(show(facts, findings))
    raise typer.Exit(1 if findings else 0)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        from kernelwise import __version__

        print(__version__)
        raise typer.Exit()


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line and leave the process with its exit code."""
    try:
        app(None if args is None else list(args), prog_name="kernelwise")
    except KernelwiseError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None


def _print_json(data: dict[str, Any]) -> None:
    print(json.dumps(to_json(data), indent=2))


def _devices_here() -> set[str]:
    import torch

    from kernelwise._discover import device_type

    found = torch.accelerator.current_accelerator(check_available=True)
    return {"cpu"} if found is None else {"cpu", device_type(found)}


def _layers_table(found: Sequence[Layer], named: NamedModel) -> str:
    rows = []
    for layer in found:
        known = layer.recognition
        options = ", ".join(f"{name}={value}" for name, value in known.options) if known else ""
        why_not = layer.blocked or layer.excluded or ""
        rows.append((layer.path, layer.name, layer.how, known.op if known else "", options, why_not))
    return render(("layer", "name", "how", "operation", "options", "no kernel can go here"), rows, notes=named.notes)


def _decisions_at(decided: Plan, path: str) -> tuple[Decision, ...]:
    """Return the decisions of the layers at a path, below it, of a name, or that match it as a pattern."""
    below = "" if path in ("", ROOT) else f"{path}."
    found = tuple(
        decision
        for decision in decided.decisions
        if decision.layer.name == path
        or any(
            place == path or fnmatchcase(place, path) or place.startswith(below) for place in _places(decision.layer)
        )
    )
    if not found:
        known = {name for decision in decided.decisions for name in (decision.layer.path, decision.layer.name)}
        raise KernelwiseError(
            f"no layer where a kernel can go is at {path!r}{nearest(path, filter(None, known))}\n"
            "  go on      kernelwise layers MODEL lists all layers; with --explain PATH it says what one computes"
        )
    return found


def _places(layer: Layer) -> tuple[str, ...]:
    return layer.paths or (layer.path,)


def _explanation(decided: Plan) -> str:
    """Say of every layer what was chosen, what lost and why; modes in which the same happens stand together."""
    by_layer: dict[Layer, dict[Decision, list[str]]] = {}
    for decision in decided.decisions:
        alike = by_layer.setdefault(decision.layer, {})
        alike.setdefault(replace(decision, mode=""), []).append(decision.mode)
    lines: list[str] = []
    for layer, decisions in by_layer.items():
        known = f"computes {layer.recognition.op}" if layer.recognition else "what it computes was not recognised"
        lines.append(f"{layer.path or ROOT}  {layer.name}, {layer.how}, {known} ({layer.class_name})")
        for decision, modes in decisions.items():
            kernel = str(decision.kernel.ref) if decision.kernel else "own code"
            lines.append(f"  {' + '.join(modes)}: {kernel}, asked by {decision.asked_by}")
            for ref, reasons in decision.rejected:
                lines.append(f"    rejected {ref}: {'; '.join(reasons)}")
            if decision.reason and not decision.rejected:
                lines.append(f"    {decision.reason}")
    return "\n".join([*lines, *(f"note: {note}" for note in decided.notes)])
