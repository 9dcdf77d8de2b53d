"""Progress: how far a verification is, for somebody who waits for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kernelwise._data import Check

OnCheck = Callable[[Check], None]


@contextmanager
def progress_of(progress: bool | OnCheck, *, total: int | None = None) -> Iterator[OnCheck]:
    """Give a function that is to be called with every check as it is done.

    Args:
        progress: True draws a bar on standard error, where that is a terminal, which is gone afterwards. A function is
            called itself. False: nothing happens.
        total: how many kinds of layers there are to check; None where it is not known.
    """
    from rich.console import Console

    console = Console(stderr=True)
    if progress is not True or not (console.is_terminal or console.is_jupyter):
        yield progress if callable(progress) else _nothing
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("loading", total=total)
        begun: list[tuple[str, str]] = []

        def show(check: Check) -> None:
            if (check.layer, check.kernel) not in begun:
                begun.append((check.layer, check.kernel))
            said = f"{check.kernel} on {check.layer}: {check.case} {check.status}"
            bar.update(task, completed=len(begun) - 1, description=said)  # of the last one, more may come

        yield show
        bar.update(task, completed=total if total is not None else len(begun))


def _nothing(check: Check) -> None:
    pass
