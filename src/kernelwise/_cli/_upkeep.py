"""The commands that need no model: what is remembered between runs, what is installed."""

from __future__ import annotations

from typing import Annotated

import typer

from kernelwise._cli._app import JsonOption, app, one_of, print_json
from kernelwise._data import to_json

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
        print_json({"directory": str(cache_directory()), "remembered": found})
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

    check = one_of(tuple(_results.FOLDERS))
    for name in [check(name) or "" for name in names or _results.FOLDERS]:
        print(f"{name}: {_results.clear(name)} removed")


@app.command("doctor")
def doctor_command(as_json: JsonOption = False) -> None:
    """Say what is installed, what does not fit together, and the command that mends it."""
    from kernelwise._doctor import examine, gather, show

    facts = gather()
    findings = examine(facts)
    if as_json:
        print_json({"facts": to_json(facts), "findings": to_json(findings)})
    else:
        print(show(facts, findings))
    raise typer.Exit(1 if findings else 0)
