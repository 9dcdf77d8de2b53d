"""Tables for people: rows about layers, alike ones folded into one line. Knows nothing but strings."""

from __future__ import annotations

import re
from collections.abc import Sequence
from io import StringIO

ROOT = "(the model itself)"
"""What stands for the empty path, that of the whole model, where people read it."""

_MIN_WIDTH = 120


def fold(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """Fold rows that differ only in the numbers of their path (first column), or in their mode (third column).

    >>> fold([("layers.0.norm", "RMSNorm", "training", "k"), ("layers.1.norm", "RMSNorm", "training", "k")])
    [['layers.*.norm (2)', 'RMSNorm', 'training', 'k']]
    """
    by_path: dict[tuple[str, ...], list[str]] = {}
    for path, name, mode, *rest in rows:
        modes = by_path.setdefault((path, name, *rest), [])
        if mode not in modes:
            modes.append(mode)
    groups: dict[tuple[str, ...], list[str]] = {}
    for (path, name, *rest), modes in by_path.items():
        pattern = re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", path)
        groups.setdefault((pattern, name, " + ".join(modes), *rest), []).append(path)
    folded = []
    for (pattern, *rest), paths in groups.items():
        label = paths[0] if len(paths) == 1 else f"{pattern} ({len(paths)})"
        folded.append([label or ROOT, *rest])
    return folded


def render(headers: Sequence[str], rows: Sequence[Sequence[str]], *, notes: Sequence[str] = ()) -> str:
    """Return a table as text, as wide as the terminal (at least 120 columns).

    The last column holds reasons: each stands once below the table, and the cell holds its number. A column that is
    empty is left out; one that is the same in every row is said in one line above the table.
    """
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    text = StringIO()
    console = Console(file=text, width=max(_MIN_WIDTH, Console().width), color_system=None, highlight=False)
    folded = fold(rows)
    reasons = list(dict.fromkeys(row[-1] for row in folded if row[-1]))
    for row in folded:
        row[-1] = str(reasons.index(row[-1]) + 1) if row[-1] else ""
    constant = {
        index: folded[0][index]
        for index in range(2, len(headers) - 1)
        if len({row[index] for row in folded}) == 1 and len(folded) > 1
    }
    said = [f"{headers[index]}: {value}" for index, value in constant.items() if value]
    if said:
        console.print("; ".join(said), markup=False)
    shown = [index for index in range(len(headers)) if index not in constant and any(row[index] for row in folded)]
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for index in shown:
        table.add_column(headers[index], overflow="fold")
    for row in folded:
        table.add_row(*(row[index].replace("[", r"\[") for index in shown))
    console.print(table if folded else "no layers", soft_wrap=not folded)
    for number, reason in enumerate(reasons, start=1):
        console.print(f" {number}  {reason}", markup=False, soft_wrap=True)
    for note in notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())
