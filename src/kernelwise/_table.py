"""Tables for people: rows about layers, alike ones folded into one line. Knows nothing but strings."""

from __future__ import annotations

import re
from collections.abc import Sequence
from io import StringIO

MERGED_MODES = " + "


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
        groups.setdefault((pattern, name, MERGED_MODES.join(modes), *rest), []).append(path)
    folded = []
    for (pattern, *rest), paths in groups.items():
        label = paths[0] if len(paths) == 1 else f"{pattern} ({len(paths)})"
        folded.append([label or "(the model itself)", *rest])
    return folded


def render(headers: Sequence[str], rows: Sequence[Sequence[str]], *, notes: Sequence[str] = (), width: int | None = None) -> str:
    """Return a table as text, as wide as the terminal (at least 100 columns); empty columns are left out."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    folded = fold(rows)
    shown = [index for index in range(len(headers)) if any(row[index] for row in folded)]
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for index in shown:
        table.add_column(headers[index], overflow="fold")
    for row in folded:
        table.add_row(*(row[index].replace("[", r"\[") for index in shown))
    text = StringIO()
    console = Console(file=text, width=width or max(100, Console().width), color_system=None, highlight=False)
    console.print(table if folded else "no layers")
    for note in notes:
        console.print(f"note: {note}", markup=False)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())
