"""The commands that look at a model: its layers, which kernels would go into them, whether those are right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Annotated

import typer

from kernelwise._cli._app import (
    MODEL_HELP,
    ConfigOption,
    DtypeOption,
    JsonOption,
    ModelArgument,
    app,
    one_of,
    print_json,
)
from kernelwise._data import DEVICE_TYPES, MODES, Decision, Layer, Plan, Target, to_json
from kernelwise._errors import KernelwiseError
from kernelwise._mapping import DEVICE_HINTS, MISS_HINTS, MODE_HINTS
from kernelwise._models import NamedModel, load_model
from kernelwise._reference import nearest
from kernelwise._table import ROOT, render


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
            print_json({"explained": to_json(explained), "notes": named.notes})
        else:
            print(explanation_text(explained))
        return
    found, unknown = discover(named.model), unknown_layers(named.model)
    if as_json:
        print_json({"layers": to_json(found), "unknown": to_json(unknown), "notes": named.notes})
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
            callback=one_of(DEVICE_TYPES, DEVICE_HINTS),
            help=f"Plan for {', '.join(DEVICE_TYPES)}, on this machine or not. Default: cpu, or where the factory put it.",
        ),
    ] = None,
    mode: Annotated[
        str | None,
        typer.Option(
            "--mode",
            metavar="MODE",
            callback=one_of(MODES, MODE_HINTS),
            help=f"{', '.join(MODES)}. Default: inference and training.",
        ),
    ] = None,
    dtype: DtypeOption = None,
    on_miss: Annotated[
        str | None,
        typer.Option(
            "--on-miss",
            metavar="raise|keep",
            callback=one_of(("raise", "keep"), MISS_HINTS),
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
        print_json({**decided.to_json(), "model_notes": notes})
    elif explain is not None:
        print(_explanation(decided))
    else:
        print(decided)
        for note in notes:
            print(f"note: {note}")


@app.command("verify")
def verify_command(
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help=MODEL_HELP)] = None,
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
            callback=one_of(DEVICE_TYPES, DEVICE_HINTS),
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
        print_json(checks.to_json())
    else:
        print(checks)
    raise typer.Exit(0 if checks.ok else 1)


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
        or any(place == path or fnmatchcase(place, path) or place.startswith(below) for place in decision.layer.places)
    )
    if not found:
        known = {name for decision in decided.decisions for name in (decision.layer.path, decision.layer.name)}
        raise KernelwiseError(
            f"no layer where a kernel can go is at {path!r}{nearest(path, filter(None, known))}\n"
            "  go on      kernelwise layers MODEL lists all layers; with --explain PATH it says what one computes"
        )
    return found


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
