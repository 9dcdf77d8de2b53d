"""The report page: what tuning found as one HTML file, which needs no network and no other file.

The last stage of all: it takes a `Tuning` and decides nothing. `_page_views` turns figures into text and percent of a scale,
and the template (`page/page.html`, with its style and script) puts them down. Everything that comes from the model, its
layers and its kernels is escaped by the template engine, and the page's own policy lets no script run but its own.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
from collections.abc import Iterable
from datetime import datetime
from importlib.resources import files
from pathlib import Path

from markupsafe import Markup

from kernelwise._errors import KernelwiseError
from kernelwise._evidence import EAGER, OWN_CODE, TUNED, Tuning
from kernelwise._reporting import _page_views as views
from kernelwise._reporting._tree import Node, tree
from kernelwise._units import digits, duration, ratio, size

_UNFOLDED = 40  # lines of the tree up to which all of it is shown


def page(tuning: Tuning) -> str:
    """Return a page about a tuning, or about a bench (a tuning with runs alone), as the text of one HTML file."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("kernelwise", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(duration=duration, size=size, digits=digits, ratio=ratio, breakable=_breakable)
    style, script = (files("kernelwise").joinpath("page", name).read_text("utf-8") for name in ("page.css", "page.js"))
    branches = tree(tuning.choices)
    return environment.get_template("page.html").render(
        tuning=tuning,
        style=Markup(style),
        script=Markup(script),
        policy=f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}",
        meta=_meta(tuning),
        headline=views.headline(tuning),
        cards=views.cards(tuning),
        kinds=views.kinds(tuning),
        facts=views.facts(tuning),
        panels=views.panels(tuning),
        tree=branches,
        unfolded=_size(branches) <= _UNFOLDED,
        EAGER=EAGER,
        OWN_CODE=OWN_CODE,
        TUNED=TUNED,
    )


def save(tuning: Tuning, file: str | os.PathLike[str]) -> None:
    """Write the page to a file.

    Raises:
        KernelwiseError: the file cannot be written.
    """
    text = page(tuning)
    try:
        Path(file).write_text(text, encoding="utf-8")
    except OSError as error:
        raise KernelwiseError(
            f"cannot write the report to {file}: {error.strerror or error}\n"
            "  go on      give a file in a directory that exists and can be written"
        ) from None


def _breakable(text: str) -> Markup:
    """Let a long reference or path break after its separators, where it is read best."""
    return Markup("<wbr>").join(re.split(r"(?<=[:/@.])(?=[^:/@.])", text))


def _size(nodes: Iterable[Node]) -> int:
    return sum(1 + _size(node.children) for node in nodes)


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _meta(tuning: Tuning) -> list[str]:
    """Say for what, on what, when, and how long it took."""
    found = dict(tuning.environment)
    target = tuning.target
    on = found.get("device", "") if found.get("device") != target.device else found.get("processor", "")
    try:
        date = datetime.fromisoformat(tuning.date).strftime("%d %b %Y, %H:%M %Z").strip()
    except ValueError:
        date = tuning.date
    said = (
        f"for {tuning.objective}" if tuning.choices else "",
        " ".join(filter(None, ("on", target.device, target.arch))),
        on,
        date,
        f"took {duration(tuning.seconds * 1e6)}" if tuning.seconds else "",
    )
    return [part for part in said if part]
