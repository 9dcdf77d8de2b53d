"""The report page as text, the evidence as tables and as JSON. `page/test_browser.py` opens the page in a browser."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import math
import re
import time
from dataclasses import replace
from html.parser import HTMLParser
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from samples import bench_sample, compared, sample

from kernelwise import _evidence
from kernelwise._cli import main
from kernelwise._data import Target
from kernelwise._errors import KernelwiseError
from kernelwise._evidence import EAGER, OWN_CODE, Candidate, Choice, Comparison, Run, Tuning
from kernelwise._reporting._page import page
from kernelwise._reporting._tree import tree

SCHEMA = json.loads(files("kernelwise").joinpath("evidence-schema.json").read_text())
VOID = {"meta", "link", "input", "wbr"}


class Parsed(HTMLParser):
    """A page taken apart: elements with their attributes, the text of each, and whether every tag is closed."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.rows: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs), f"an attribute stands twice on {tag}: {attrs}"
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in {*self.open}:
            self.texts.setdefault(tag, []).append(data)
        if "tr" in self.open:
            self.rows[-1] += data

    def text(self, tag: str) -> str:
        return " ".join("".join(self.texts.get(tag, [])).split())

    def values(self, *attributes: str) -> list[str]:
        found = (attributes_.get(name) for _, attributes_ in self.elements for name in attributes)
        return [value for value in found if value is not None]


def parsed(tuning: Tuning) -> Parsed:
    found = Parsed(page(tuning))
    assert found.open == []
    return found


EMPTY = Tuning("m", Target("cpu"), "latency", (), (), ())
ODD = {
    "nothing at all": EMPTY,
    "runs that failed": replace(bench_sample(), runs=tuple(Run(EAGER, name, None, 0, "no") for name in "ab")),
    "no runs": replace(sample(), runs=(), workloads=()),
    "the tuned model failed": replace(
        sample(), runs=tuple(replace(run, comparison=None, error="out of memory") for run in sample().runs)
    ),
    "no error said": replace(EMPTY, runs=(Run("x", "forward", None),)),
    "figures out of bounds": replace(
        EMPTY, runs=(Run("x", "forward", Comparison(1e9, 1e-9, 1e18, 0.0, math.inf, 2, 0, 0, 0.0)),)
    ),
    "the model itself, never checked": replace(
        sample(), choices=(Choice("", ("",), "A", "A", "", "training", "k", "r", (Candidate("k", None, math.inf),)),)
    ),
    "own code among the candidates": replace(
        sample(),
        choices=tuple(
            replace(choice, candidates=(Candidate(OWN_CODE), *choice.candidates)) for choice in sample().choices
        ),
    ),
}


@pytest.mark.parametrize("tuning", [sample(), bench_sample(), *ODD.values()], ids=["tune", "bench", *ODD])
def test_it_is_one_file_whose_tags_links_and_labels_fit(tuning: Tuning) -> None:
    found = parsed(tuning)
    ids = found.values("id")
    assert len(ids) == len(set(ids))
    assert all(re.fullmatch(r"[a-z][a-z0-9-]*", name) for name in ids)
    for name in found.values("aria-labelledby", "data-filters", "data-copy", "for"):
        assert name in ids
    for link in found.values("href", "src"):
        assert link == "data:," or link.removeprefix("#") in ids
    assert not re.search(r"https?:|//\w|@import|url\(", found.text("style") + found.text("script"))
    assert not re.search("None|Undefined", found.text("body"))
    headings = [int(tag[1]) for tag, _ in found.elements if re.fullmatch(r"h[1-6]", tag)]
    assert headings[0] == 1
    assert all(later - earlier <= 1 for earlier, later in pairwise(headings))


def test_every_candidate_has_a_row_with_its_error_and_the_reason_why_it_is_out() -> None:
    tuning, rows = sample(), parsed(sample()).rows
    for choice in tuning.choices:
        for candidate in choice.candidates:
            (row,) = [row for row in rows if candidate.kernel in row]
            assert candidate.out is None or candidate.out in row
            assert (candidate.out is not None) == ("out" in row.split())
            assert (candidate.kernel == choice.chosen) == ("chosen" in row.split())
            for timing in candidate.timings:
                assert f"{timing.comparison.speedup:.2f}\N{MULTIPLICATION SIGN}" in row
        assert choice.reason in parsed(tuning).text("p")
    assert sum(OWN_CODE in row for row in rows) >= len(tuning.choices)


def test_every_run_has_a_row_and_what_failed_says_why() -> None:
    for tuning in (sample(), bench_sample()):
        rows = [row.split("\n") for row in parsed(tuning).rows]
        for run in tuning.runs:
            fitting = [" ".join(row) for row in rows if row[1:3] == [tuning.label(run), run.workload]]
            assert len(fitting) == 1, run
            assert run.error is None or run.error in fitting[0]


HOSTILE = "<script>alert(1)</script>"


def test_names_from_a_model_are_text_and_never_markup() -> None:
    attribute = '"><img src=x onerror=alert(1)> onload="alert(1)'
    tuning = sample()
    choices = tuple(
        replace(
            choice,
            layer=f"model.{HOSTILE}",
            paths=(f"model.{HOSTILE}.{attribute}", f"model.0.{HOSTILE}"),
            name=HOSTILE,
            class_name=HOSTILE,
            op=attribute,
            mode=attribute,
            reason=HOSTILE,
            candidates=tuple(
                replace(
                    candidate,
                    kernel=attribute,
                    out=candidate.out and HOSTILE,
                    timings=tuple(replace(timing, workload=attribute) for timing in candidate.timings),
                )
                for candidate in choice.candidates
            ),
        )
        for choice in tuning.choices
    )
    runs = tuple(
        replace(run, contender=attribute, workload=HOSTILE, error=run.error and attribute) for run in tuning.runs
    )
    found = parsed(
        replace(
            tuning,
            model=f"</title>{HOSTILE}",
            choices=choices,
            runs=runs,
            workloads=(HOSTILE,),
            environment=((HOSTILE, attribute), ("device", HOSTILE)),
            notes=(HOSTILE,),
            config=f"</pre>{HOSTILE}",
            date=HOSTILE,
            target=Target(HOSTILE),
        )
    )
    tags = [tag for tag, _ in found.elements]
    assert tags.count("script") == 1
    assert "img" not in tags
    assert not any(name.startswith("on") for _, attributes in found.elements for name in attributes)
    for tag in ("h1", "h3", "pre", "dt", "dd", "li", "summary"):
        assert HOSTILE in found.text(tag), tag


def test_the_policy_allows_its_own_style_and_script_and_nothing_else() -> None:
    text = page(sample())
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
    rules = dict(rule.strip().split(" ", 1) for rule in policy.replace("&#39;", "'").split(";"))
    assert rules["default-src"] == "'none'"
    for tag in ("style", "script"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert rules[f"{tag}-src"] == f"'sha256-{digest}'"
    assert "style" not in {name for _, attributes in Parsed(text).elements for name in attributes}


def test_the_summary_says_what_is_to_be_gained() -> None:
    text = " ".join(parsed(sample()).text("p").split())
    assert "Against the model's own code, prefill is 1.42 times as fast and decode is 1.18 times as fast." in text
    assert "Peak memory is 18 % lower in prefill and decode." in text
    assert "7 of 20 candidates are out" in parsed(sample()).text("li")
    assert "522 checks" in parsed(sample()).text("li")
    assert "0.64 of what is allowed" in parsed(sample()).text("li")
    # 1.09 times as fast in decode, but a part of the tuned model: no contender beside it
    assert parsed(sample()).text("dd").count("builtin, 1.36") == 1
    assert parsed(sample()).text("dd").count("builtin, 1.07") == 1


@pytest.mark.parametrize(
    ("speedup", "said"),
    [(1.001, "forward shows no clear difference"), (0.5, "forward is 0.50 times as fast"), (None, "did not run")],
)
def test_the_summary_claims_no_more_than_was_found(speedup: float | None, said: str) -> None:
    comparison = None if speedup is None else compared(1000.0, speedup)
    text = parsed(replace(EMPTY, runs=(Run("tuned", "forward", comparison),))).text("p")
    assert said in text
    assert "faster" not in text


def test_workloads_without_a_clear_difference_are_said_together() -> None:
    runs = tuple(Run("tuned", name, compared(1000.0, by)) for name, by in (("a", 1.001), ("b", 2.0), ("c", 1.002)))
    text = parsed(replace(EMPTY, runs=runs)).text("p")
    assert "b is 2.00 times as fast and a and c show no clear difference." in text


def test_what_was_better_than_the_tuned_config_stands_in_the_summary() -> None:
    assert parsed(sample()).text("p").count("better than the tuned config") == 0
    assert "torch.compile seems better than the tuned config. " in parsed(replace(sample(), best="torch.compile")).text(
        "p"
    )


def test_in_the_tree_modes_with_the_same_code_stand_together() -> None:
    inference = choices_at("norm", chosen=OWN_CODE)
    training = replace(inference, mode="training")
    both = page(replace(EMPTY, choices=(inference, training)))
    assert both.count('class="runs"') == 1
    apart = page(replace(EMPTY, choices=(inference, replace(training, chosen="k"))))
    assert [text.strip() for text in re.findall(r'class="runs"><span class="count">(.*?):</span>', apart)] == [
        "training",
        "inference",
    ]


def test_without_a_tuned_model_it_speaks_of_the_fastest() -> None:
    found = parsed(bench_sample())
    assert "prefill is 1.36 times as fast with builtin and decode is 1.07 times as fast with builtin" in found.text("p")
    assert "candidates" not in found.values("id")
    assert "config" not in found.values("id")


def test_a_large_model_gives_a_small_page_in_good_time() -> None:
    tuning = sample()
    experts = tuple(f"model.layers.{i}.mlp.experts.{j}.up_proj" for i in range(64) for j in range(128))
    choices = tuple(replace(tuning.choices[0], paths=experts, mode=mode) for mode in ("inference", "training") * 8)
    began = time.perf_counter()
    text = page(replace(tuning, choices=choices))
    assert time.perf_counter() - began < 20
    assert len(text) < 400_000
    assert len(page(tuning)) < 100_000


def choices_at(*paths: str, chosen: str = "k") -> Choice:
    return Choice(paths[0], paths, "A", "A", "a", "inference", chosen, "")


def test_the_tree_folds_what_is_alike_and_counts() -> None:
    norms = choices_at(*(f"model.layers.{i}.norm" for i in (0, 1, 2, 4)), "model.norm")
    mlps = choices_at("model.layers.0.mlp", "model.layers.1.mlp", "model.layers.2.mlp", chosen=OWN_CODE)
    (model,) = tree([norms, mlps])
    assert (model.label, model.layers, model.changed, model.choices) == ("model", 8, 5, ())
    layers, norm = model.children
    assert (norm.label, norm.choices, norm.alike) == ("norm", (0,), 1)
    alike, other = layers.children
    assert (alike.label, alike.alike, alike.layers, alike.changed) == ("0\N{EN DASH}2", 3, 6, 3)
    assert [child.label for child in alike.children] == ["norm", "mlp"]
    assert (other.label, other.choices) == ("4.norm", (0,))


def test_the_tree_keeps_apart_what_differs_and_joins_what_stands_alone() -> None:
    deep = tree([choices_at("a.b.0.c.0.d", "a.b.0.c.1.d", "a.b.1.c.0.d", "a.b.1.c.1.d")])
    assert [(node.label.replace("\N{EN DASH}", "-"), node.alike, node.layers) for node in deep] == [
        ("a.b.0-1.c.0-1.d", 4, 4)
    ]
    both = tree([choices_at("mlp", "mlp.act"), choices_at("mlp", chosen=OWN_CODE)])
    assert [(node.label, node.choices, node.layers, node.changed) for node in both] == [("mlp", (0, 1), 2, 2)]
    assert tree([choices_at("")])[0].label == "(the model itself)"
    assert tree([]) == ()


def test_as_text_it_has_a_line_for_each_contender_and_each_choice() -> None:
    tuning, text = sample(), str(sample())
    assert all(len(line) <= 121 for line in text.splitlines() if not line.startswith((" 1", "note")))
    line = next(line for line in text.splitlines() if line.startswith(" tuned"))
    for figure in ("593 ms", "1.42 (1.38-1.46)", "1.18 (1.15-1.21)", "498 MiB"):
        assert figure in line
    assert "1.01 (0.99-1.03) ?" in text
    assert "note: ? says that there is no clear difference" in text
    for choice in tuning.choices:
        assert choice.reason in text
    for note in tuning.notes:
        assert f"note: {note}" in text
    assert "Hub cannot be reached" in text
    assert "chosen" not in str(bench_sample())
    for odd in ODD.values():
        assert str(odd)


def test_json_gives_the_same_back_and_follows_its_schema() -> None:
    jsonschema.Draft7Validator.check_schema(SCHEMA)
    for tuning in (sample(), bench_sample(), EMPTY):
        data = json.loads(json.dumps(tuning.to_json()))
        jsonschema.validate(data, SCHEMA)
        assert Tuning.from_json(data) == tuning


def test_an_infinite_error_is_no_number_in_json() -> None:
    tuning = ODD["the model itself, never checked"]
    assert tuning.choices[0].candidates[0].error == math.inf
    data = json.loads(json.dumps(tuning.to_json(), allow_nan=False))
    assert Tuning.from_json(data).choices[0].candidates[0].error is None


def test_the_schema_has_the_fields_of_the_nouns() -> None:
    nouns = {"comparison": "Comparison", "timing": "Timing", "run": "Run", "candidate": "Candidate", "choice": "Choice"}
    parts = {name: (SCHEMA["definitions"][name], getattr(_evidence, noun)) for name, noun in nouns.items()}
    parts |= {"": (SCHEMA, Tuning), "target": (SCHEMA["properties"]["target"], Target)}
    for schema, noun in parts.values():
        fields = dataclasses.fields(noun)
        assert list(schema["properties"]) == [field.name for field in fields]
        assert schema["required"] == [field.name for field in fields if field.default is dataclasses.MISSING]


def spoilt(**changes: Any) -> dict[str, Any]:
    return json.loads(json.dumps(sample().to_json())) | changes


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ([], "expected the fields of a Tuning"),
        ({"model": "m"}, "choices"),
        (spoilt(model=3), "Tuning.model is 3, not str"),
        (spoilt(seconds="long"), "Tuning.seconds is 'long', not float or int"),
        (spoilt(objective="luck"), "Tuning.objective is 'luck', not one of latency, throughput, memory"),
        (spoilt(workloads="prefill"), "expected a list"),
        (
            spoilt(runs=[{"contender": "a", "workload": "b", "comparison": None, "tokens": True}]),
            "Tuning.runs[0].tokens",
        ),
        (spoilt(runs=[{"contender": "a", "workload": "b", "comparison": "none"}]), "Tuning.runs[0].comparison"),
        (spoilt(environment=[["a"]]), "expected a list of 2"),
        (spoilt(extra=1), "Tuning has no field extra"),
    ],
)
def test_what_is_no_evidence_is_refused_with_the_place(data: Any, said: str) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(data, SCHEMA)
    with pytest.raises(KernelwiseError) as error:
        Tuning.from_json(data)
    assert said in str(error.value)
    assert "go on" in str(error.value)


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit_:
        main(args)
    captured = capsys.readouterr()
    return int(exit_.value.code or 0), captured.out, captured.err


def test_report_prints_tables_or_writes_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, html = tmp_path / "evidence.json", tmp_path / "report.html"
    file.write_text(json.dumps(sample().to_json()))
    code, out, _ = run(capsys, "report", str(file))
    assert (code, out.rstrip("\n")) == (0, str(sample()))
    assert run(capsys, "report", str(file), "--html", str(html))[0] == 0
    assert html.read_text("utf-8") == page(sample())


def test_report_says_what_is_wrong_with_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    good.write_text(json.dumps(sample().to_json()))
    for content in (b"{", b"\xff\xfe\x00", b'{"model": 1}'):
        bad.write_bytes(content)
        code, out, err = run(capsys, "report", str(bad))
        assert (code, out) == (1, "")
        assert "bad.json" in err
        assert "go on" in err
    for args in ((str(tmp_path / "none.json"),), (str(good), "--html", str(tmp_path / "none" / "page.html"))):
        code, out, err = run(capsys, "report", *args)
        assert (code, out) == (1, "")
        assert "No such file" in err


def test_kinds_of_one_name_are_told_apart_by_their_place() -> None:
    first, *rest = sample().choices
    other = replace(first, layer="head.norm", paths=("head.norm", "tail.norm"), chosen=OWN_CODE)
    text = parsed(replace(sample(), choices=(first, other, *rest))).text("summary")
    assert "RMSNorm model.layers.*.input_layernorm (30), 61 layers, inference" in text
    assert "RMSNorm head.norm, 2 layers, inference" in text
    assert "SwiGLUMLP 30 layers, inference" in text
