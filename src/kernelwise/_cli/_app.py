"""What the commands share: the application that they belong to, options, JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from kernelwise._data import to_json
from kernelwise._models import DTYPES
from kernelwise._reference import did_you_mean

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="The right kernel for every layer of a PyTorch model.",
)


def one_of(names: Sequence[str], hints: Mapping[str, str] | None = None) -> Callable[[str | None], str | None]:
    """Return a check of an option that takes one of some names; `hints` are for what people write instead."""

    def check(value: str | None) -> str | None:
        if value is not None and value not in names:
            raise typer.BadParameter(f"{value!r} is not one of {', '.join(names)}{did_you_mean(value, names, hints)}")
        return value

    return check


MODEL_HELP = (
    "A local directory, a Hub id, module:factory, or a transformers model type (llama, qwen3 ...), built small."
)
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
DtypeOption = Annotated[
    str | None,
    typer.Option("--dtype", metavar="DTYPE", callback=one_of(DTYPES), help=f"Build it in {', '.join(DTYPES)}."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
ConfigOption = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="A kernel mapping in TOML or JSON.")
]


def print_json(data: dict[str, Any]) -> None:
    """Print nouns, or dicts and lists of them, as JSON."""
    print(json.dumps(to_json(data), indent=2))
