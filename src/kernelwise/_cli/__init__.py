"""Command line: reads arguments, calls the stages, prints. `kernelwise layers | plan | verify | bench | tune | demo | doctor`.

`_looking` has the commands that say what a model is and what would go into it, `_running` those that run it, `_upkeep` those
without a model, `_app` the options that they share.

Exit codes: 0, 1 for an error of Kernelwise (its message, no traceback) or something that does not fit, 2 for usage.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from kernelwise._cli import _looking, _running, _upkeep  # noqa: F401  # each adds its commands to the application
from kernelwise._cli._app import app
from kernelwise._errors import KernelwiseError


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
