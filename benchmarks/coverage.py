"""Which layers of transformers are recognised: builds every model type, writes docs/coverage.md.

    python benchmarks/coverage.py                  # build, recognise, write docs/coverage.md
    python benchmarks/coverage.py --summary        # the same, but for the table by model type, in a fifth of the time
    python benchmarks/coverage.py llama bert       # only print what is recognised in these model types
    python benchmarks/coverage.py --agree          # run every recognised layer against the reference of its operation
    python benchmarks/coverage.py --undecided      # what the modeling files hold that the lists say nothing about
    python benchmarks/coverage.py --without-kernels  # as if the kernels library were not installed; only the summary

The denominators are the lists in coverage_lists.json: classes and functions of each kind, found by searching the modeling
files and decided by reading them. "not counted" holds what looked like one and is none, with the reason. What is not
recognised, or stands in no model that can be built here, counts as missed. With another version of transformers in front
(`PYTHONPATH=.venv/other/transformers-5.13.0`) only the names count that this version has, and only the summary is written.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

if "--without-kernels" in sys.argv:
    sys.modules["kernels"] = None  # type: ignore[assignment]

import coverage_models as models
import torch
import transformers

HERE = Path(__file__).parent
LISTS = HERE / "coverage_lists.json"
RESULTS = HERE / "coverage_results.json"
PAGE = HERE.parent / "docs" / "coverage.md"
_LAYERS = ("decoder_layer", "decoder_layer_inline", "decoder_layer_cross", "decoder_layer_cross_inline")
_NORMS = ("rms_norm", "rms_norm_gated", "rms_norm_gated_grouped", "rms_norm_prescaled", "inverse_rms")
KINDS = {
    "RMSNorm": _NORMS,
    "RMSNorm by another name": _NORMS,
    "gated MLP": ("gated_mlp", "gated_mlp_packed", "gated_mlp_clamped", "gated_mlp_normed", "gated_mlp_cast"),
    "rotary": ("rotary", "rotary_one", "rotary_vision", "rotary_shared", "rotary_complex", "rotary_complex_shared"),
    "pre-norm decoder layer": _LAYERS,
    "pre-norm encoder layer": _LAYERS,
    "LayerNorm": ("layer_norm",),
    "plain MLP": ("mlp", "mlp_cast"),
}  # fmt: skip
Names = dict[str, list[str]]  # kind → `model.Name`


# ---------------------------------------------------------------------------------------------------------------------
# Lists
# ---------------------------------------------------------------------------------------------------------------------


def counted() -> Names:
    """The lists, without what this version of transformers does not have."""
    here = {f"{file}:{node.name}" for file, node in definitions()}
    lists = json.loads(LISTS.read_text())["lists"]
    return {
        kind: [name_in(file, name) for file, names in files.items() for name in names if f"{file}:{name}" in here]
        for kind, files in lists.items()
    }


def definitions() -> list[tuple[str, Any]]:
    """Every class and function of the modeling files, with the file it stands in."""
    root = Path(transformers.__file__).parent / "models"
    return [
        (str(file.relative_to(root)), node)
        for file in sorted(root.glob("*/modeling_*.py"))
        for node in ast.parse(file.read_text()).body
        if isinstance(node, (ast.ClassDef, ast.FunctionDef))
    ]


def name_in(file: str, name: str) -> str:
    return f"{Path(file).stem.removeprefix('modeling_')}.{name}"


def undecided() -> Names:
    """What looks like one of a kind and is neither counted nor left out by the lists."""
    data = json.loads(LISTS.read_text())
    decided = {
        f"{file}:{name}"
        for files in (*data["lists"].values(), *data["not counted"].values())
        for file, names in files.items()
        for name in names
    }
    found: Names = {}
    for file, node in definitions():
        kind = looks_like(node)
        if kind is not None and f"{file}:{node.name}" not in decided:
            found.setdefault(kind, []).append(name_in(file, node.name))
    return found


def looks_like(node: ast.ClassDef | ast.FunctionDef) -> str | None:
    """The kind that a definition may be of, by its name and its text: what has to be read when the version changes."""
    if isinstance(node, ast.FunctionDef):
        return "rotary" if re.match(r"_?(vision_)?apply_.*(rot|rope)", node.name) else None
    if "RMSNorm" in node.name:
        return "RMSNorm"
    if node.name.endswith("LayerNorm"):
        return "LayerNorm"
    if node.name.endswith(("Layer", "Block")):
        return f"pre-norm {'decoder' if node.name.endswith('DecoderLayer') else 'encoder'} layer"
    text = ast.unparse(node)
    children = set(re.findall(r"self\.(\w+) = (?:nn\.)?(?:\w*Linear|Conv1D)\(", text))
    forward = next((f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == "forward"), None)
    if forward is None or "act" not in ast.unparse(forward).lower() or "Expert" in node.name:
        return None
    multiplies = any(isinstance(n, ast.BinOp) and isinstance(n.op, ast.Mult) for n in ast.walk(forward))
    if multiplies and len(children) in (2, 3) and re.search(r"MLP|Mlp|FeedForward|FFN|GLU|GatedActDense", node.name):
        return "gated MLP"
    if len(children) == 2 and re.search(r"MLP|Mlp|FeedForward|FFN|DenseActDense", node.name):
        return "plain MLP"
    return None


def left_out(kind: str) -> list[str]:
    """Why definitions that look like one of a kind are not counted, with their number, the commonest reason first."""
    files = json.loads(LISTS.read_text())["not counted"][kind].values()
    reasons = Counter(reason for names in files for reason in names.values())
    return [f"- {number}: {reason}" for reason, number in reasons.most_common()]


# ---------------------------------------------------------------------------------------------------------------------
# Counting
# ---------------------------------------------------------------------------------------------------------------------


class Count:
    """What of each kind is recognised, missed and not reached."""

    def __init__(self, lists: Names, results: list[models.Look]) -> None:
        answers: dict[str, set[str | None]] = defaultdict(set)
        self.reasons: dict[str, str] = {}
        self.registered = models.registered([name for names in lists.values() for name in names])

        def add(rows: list[models.Row]) -> None:
            for row in rows:
                answers[row.name].add(row.op)
                if row.reason is not None:
                    self.reasons.setdefault(row.name, row.reason)

        for _, rows, _ in results:
            add(rows)
        add(models.functions_alone(lists["rotary"]))
        add(models.classes_alone([n for names in lists.values() for n in names if n not in answers]))
        self.lists = lists
        self.found = {
            kind: [n for n in names if answers.get(n, set()) & {*KINDS[kind]}] for kind, names in lists.items()
        }
        self.missed = {
            kind: [n for n in names if n in answers and n not in self.found[kind]] for kind, names in lists.items()
        }
        self.unbuilt = {kind: [n for n in names if n not in answers] for kind, names in lists.items()}

    def table(self) -> list[str]:
        lines = [
            "| kind | in the modeling files | recognised | registered by transformers | not recognised | not built |",
            "|---|---|---|---|---|---|",
        ]
        return lines + [
            f"| {kind} | {len(names)} | {len(self.found[kind])} ({percent(len(self.found[kind]), len(names))}) "
            f"| {sum(n in self.registered for n in names)} | {len(self.missed[kind])} | {len(self.unbuilt[kind])} |"
            for kind, names in self.lists.items()
        ]


def percent(part: int, whole: int) -> str:
    return f"{int(1000 * part / whole) / 10}%" if whole else ""  # never rounded up


def remember(key: str, value: object) -> None:
    """Keep a result beside the lists, for the sections of the page that other runs fill."""
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    kept[key] = value
    RESULTS.write_text(json.dumps(dict(sorted(kept.items())), indent=1) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# The page
# ---------------------------------------------------------------------------------------------------------------------


_BY_TYPE = "## By model type"


def page(count: Count, by_type: str) -> str:
    lines = [
        "# What is recognised",
        "",
        f"transformers {transformers.__version__}, torch {torch.__version__}. Written by `python benchmarks/coverage.py`:",
        "every model type is built from its default config on the meta device. The denominators are the classes and",
        "functions of each kind in the modeling files, found by searching and decided by reading",
        "(`benchmarks/coverage_lists.json`, with what was left out and why); one that stands in no model built here, and",
        "cannot be built alone either, counts as missed.",
        "",
        *count.table(),
        "",
        "A pre-norm layer is one in whose forward the sum of the residual stream and of what a sub-layer gave is normed by a",
        "child and goes on as the residual stream; here of a decoder, and of an encoder of text, images or sound. Every other",
        "class whose name ends in Layer or Block is left out for one of these reasons, by the norms and the attention among",
        "its children and the order in which its forward calls them, and by reading where these do not decide:",
        "",
        *left_out("pre-norm decoder layer"),
        "",
        *elsewhere(),
        "## Not recognised",
        "",
    ]
    for kind in count.lists:
        lines += [f"{kind}:", ""]
        lines += [f"- {name}: {reason_of(count, name)}" for name in count.missed[kind]] or ["- none"]
        lines += [*(f"- {name}: it stands in no model built here" for name in count.unbuilt[kind]), ""]
    return "\n".join([*lines, by_type])


def reason_of(count: Count, name: str) -> str:
    """Why something is not recognised, in one line; or as what else."""
    reason = count.reasons.get(name, "recognised as something of another kind")
    return (reason if len(reason) <= 200 else f"{reason[:200]}...").replace("\n", " ")


def by_model_type(results: list[models.Look]) -> str:
    liger = json.loads(LISTS.read_text())["Liger"]
    built = [(name, rows) for name, rows, error in results if error is None or error.startswith(models.CRASHED)]
    crashes = sum((error or "").startswith(models.CRASHED) for _, _, error in results)
    lines = [
        _BY_TYPE,
        "",
        f"{len(built)} of {len(results)} model types could be built in the last run over all of them; recognition failed",
        f"with an error in {crashes or 'none'}. Columns count the classes and functions that are recognised, `tags` those that",
        f"transformers registers for kernels; `Liger` says whether Liger {liger['version']} patches the model type.",
        "",
        "| model type | RMSNorm | gated MLP | rotary | layer | LayerNorm | MLP | activation | linear | tags | Liger |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    columns = ("RMSNorm", "gated MLP", "rotary", "pre-norm decoder layer", "LayerNorm", "plain MLP")
    for model_type, rows in built:
        ops = Counter(op for name, op in {(row.name, row.op) for row in rows} if op)
        cells = [sum(ops[op] for op in KINDS[kind]) for kind in columns]
        cells += [ops["activation"], ops["linear"], len({row.name for row in rows if row.tagged})]
        lines.append(
            f"| {model_type} | {' | '.join(str(c) if c else '' for c in cells)} "
            f"| {'yes' if model_type in liger['model types'] else ''} |"
        )
    failed = [(name, error) for name, _, error in results if error is not None]
    lines += ["", "## Not built", "", *(f"- {name}: {error}" for name, error in failed), ""]
    return "\n".join(lines)


_ELSEWHERE = "## Other versions, and agreement"


def elsewhere() -> list[str]:
    """The section about other versions of transformers and about agreement with the references, from earlier runs."""
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    versions = {key: value for key, value in kept.items() if key != "agreement"}
    kinds = list(KINDS)
    lines = [
        _ELSEWHERE,
        "",
        "Recognised, of what each version has of the lists, in the last run with it (`-`: not counted then); `kernels` says",
        "whether that version of transformers uses the installed kernels library.",
        "",
        f"| transformers | kernels | {' | '.join(kinds)} |",
        f"|---|---|{'---|' * len(kinds)}",
    ]
    for key, counts in versions.items():
        version, _, kernels = key.partition(" ")
        lines.append(
            f"| {version} | {kernels} | {' | '.join('/'.join(map(str, counts.get(kind, ('-',)))) for kind in kinds)} |"
        )
    agreement = kept.get("agreement")
    if agreement:
        lines += [
            "",
            f"`--agree` with transformers {agreement['transformers']} ran {agreement['compared']} recognised layers and",
            f"functions of {agreement['model types']} model types beside their references, on random inputs and weights, in",
            "float64 (to 1e-10), bf16 and fp16 (to the rounding of one operation): "
            f"{len(agreement['wrong']) or 'none'} differ{':' if agreement['wrong'] else '.'}",
            *(f"- {line}" for line in agreement["wrong"]),
        ]
    return [*lines, ""]


def refresh() -> None:
    """Write the section that other runs fill into the page as it is."""
    before, _, rest = PAGE.read_text().partition(_ELSEWHERE)
    _, heading, after = rest.partition("\n## ")
    PAGE.write_text(before + "\n".join(elsewhere()) + heading + after)


def kernels_used() -> str:
    """Whether this transformers uses the kernels library that is installed."""
    from transformers.utils.import_utils import is_kernels_available

    return "used" if is_kernels_available() else "not used"


# ---------------------------------------------------------------------------------------------------------------------
# Commands
# ---------------------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="only print these model types")
    parser.add_argument("--undecided", action="store_true", help="print what the lists say nothing about")
    parser.add_argument("--agree", action="store_true", help="run what was recognised against its reference")
    parser.add_argument("--without-kernels", action="store_true", help="hide the kernels library from transformers")
    parser.add_argument("--summary", action="store_true", help="leave the table by model type as it is")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="with --agree: only every N-th model type")
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.undecided:
        for kind, names in undecided().items():
            print(f"{kind}: {', '.join(names)}")
        return
    types = models.model_types()
    if arguments.agree:
        names = arguments.types or list(types)[:: arguments.every]
        agree({name: types[name] for name in names}, arguments.jobs, whole=not arguments.types)
    elif arguments.types:
        for name in arguments.types:
            _, rows, error = models.look(name, types[name])
            print(f"{name}: {error or ''}")
            for row in rows:
                print("   ", *row)
    else:
        cover(types, arguments.jobs, summary=arguments.summary)


def cover(types: dict[str, tuple[str, ...]], jobs: int, *, summary: bool) -> None:
    lists = counted()
    here = transformers.__version__ == json.loads(LISTS.read_text())["transformers"] and kernels_used() == "used"
    if summary or not here:  # the models of what cannot be built and recognised alone are enough
        # What a layer norm is depends on how its model makes it: of most, over the last dimension or over the channels.
        kinds = [kind for kind in lists if kind not in ("rotary", "LayerNorm")]
        alone = models.classes_alone([name for kind in kinds for name in lists[kind]])
        alone += models.functions_alone(lists["rotary"])
        known = {row.name: row.op for row in alone}
        open_still = {n for kind, names in lists.items() for n in names if not {known.get(n)} & {*KINDS[kind]}}
        folders = {Path(file).parent.name for file, node in definitions() if name_in(file, node.name) in open_still}
        types = {name: classes for name, classes in types.items() if models.folder_of(classes[0]) in folders}
        print(f"{len(open_still)} to be looked for in {len(types)} models", file=sys.stderr)
    models.look("llama", ("LlamaForCausalLM",))  # references traced here are there in every process
    results = models.run(models.look, types, jobs)
    if summary or not here:
        results.append(("alone", alone, None))
    count = Count(lists, results)
    remember(
        f"{transformers.__version__} {kernels_used()}",
        {kind: [len(count.found[kind]), len(names)] for kind, names in lists.items()},
    )
    print("\n".join(count.table()))
    crashed = [f"{name}: {error}" for name, _, error in results if error and error.startswith(models.CRASHED)]
    print(f"{len(crashed)} crashes in {len(results)} models", *crashed, sep="\n")
    if here:
        kept = _BY_TYPE + PAGE.read_text().partition(_BY_TYPE)[2]
        PAGE.write_text(page(count, kept if summary else by_model_type(results)))
    else:
        print(*(f"{n}: {reason_of(count, n)}" for names in count.missed.values() for n in names), sep="\n")
        refresh()


def agree(types: dict[str, tuple[str, ...]], jobs: int, *, whole: bool) -> None:
    results = models.run(models.disagreements, types, jobs)
    compared = [(name, number, wrong) for name, number, wrong in results if isinstance(number, int)]
    wrong = [f"{name}: {line}" for name, _, lines in compared for line in lines]
    total = sum(number for _, number, _ in compared)
    print(*wrong, f"{total} layers and functions compared", sep="\n")
    print(*(f"{name}: {error}" for name, number, error in results if not isinstance(number, int)), sep="\n")
    if whole:
        remember(
            "agreement",
            {
                "transformers": transformers.__version__,
                "compared": total,
                "model types": sum(number > 0 for _, number, _ in compared),
                "wrong": wrong,
            },
        )
        refresh()


if __name__ == "__main__":
    main()
