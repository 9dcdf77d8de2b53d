"""Report: what runs in a model now, as values that print as a table and serialise. Never imports torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kernelwise._data import Decision, to_json
from kernelwise._table import render


@dataclass(frozen=True, slots=True)
class Row:
    """One layer in one mode: its kernel (with revision and content hash), or the reason for none, and calls that fell back.

    `proof` is "proven" on this machine, "builtin" for a kernel that ships with its proof, or "unproven" and why that is so.
    """

    path: str
    paths: tuple[str, ...]
    name: str
    class_name: str
    mode: str
    kernel: str | None
    revision: str | None
    content_hash: str | None
    asked_by: str
    reason: str | None
    rejected: tuple[tuple[str, tuple[str, ...]], ...]
    fallbacks: tuple[tuple[str, int], ...] = ()
    proof: str | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """Every layer of a model with its kernel, or the reason for none. `print` it, or `to_json()` it."""

    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain dicts, lists and scalars."""
        data: dict[str, Any] = to_json(self)
        return data

    def __str__(self) -> str:
        return render(
            ("layer", "name", "mode", "kernel", "proof", "asked by", "own code ran", "why not"),
            [
                (
                    row.path,
                    row.name,
                    row.mode,
                    _kernel(row),
                    row.proof or "",
                    row.asked_by,
                    _counts(row.fallbacks),
                    row.reason or "",
                )
                for row in self.rows
            ],
            notes=self.notes,
        )


def make_row(decision: Decision, fallbacks: Mapping[str, int], proof: str | None) -> Row:
    """Say of one decision what runs, and whether it is proven."""
    kernel, layer = decision.kernel, decision.layer
    return Row(
        path=layer.path,
        paths=layer.paths,
        name=layer.name,
        class_name=layer.class_name,
        mode=decision.mode,
        kernel=str(kernel.ref) if kernel else None,
        revision=kernel.revision if kernel else None,
        content_hash=kernel.content_hash if kernel else None,
        asked_by=decision.asked_by,
        reason=decision.reason,
        rejected=decision.rejected,
        fallbacks=tuple(sorted(fallbacks.items())) if kernel else (),
        proof=proof if kernel else None,
    )


def _kernel(row: Row) -> str:
    if row.kernel is None:
        return "own code"
    return f"{row.kernel} ({row.revision[:8]})" if row.revision else row.kernel


def _counts(fallbacks: Sequence[tuple[str, int]]) -> str:
    return "; ".join(f"{count}x: {why}" for why, count in fallbacks)
