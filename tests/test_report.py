"""The report says what runs now, where, by whose wish, and what did not."""

from __future__ import annotations

import json

import fakes
import models
import torch
from fakes import kernel, only
from models import tiny
from torch import nn

import kernelwise as kw
from kernelwise._table import fold, render

X = torch.linspace(-1, 1, 8)
NORM = only({"RMSNorm": kernel(fakes.MarkedNorm)})


def kernels_of(model: nn.Module) -> dict[tuple[str, str], str | None]:
    return {(row.path, row.mode): row.kernel for row in kw.report(model).rows}


def test_a_model_that_was_never_kernelized_says_so() -> None:
    model = tiny()
    report = kw.report(model)
    assert report.rows == ()
    assert "no kernels" in str(report)
    kw.kernelize(model, NORM)
    kw.unkernelize(model)
    assert "no kernels" in str(kw.report(model))
    assert kw.report(nn.Module()).rows == ()


def test_every_layer_has_a_row_per_mode_with_its_kernel_or_the_reason_for_none() -> None:
    model = kw.kernelize(tiny(), only({"RMSNorm": kernel(fakes.MarkedNorm), "RMSNorm@norm": None}))
    rows = {(row.path, row.mode): row for row in kw.report(model).rows}
    assert {path for path, _ in rows} == {layer.path for layer in kw.discover(model)}
    for (path, _), row in rows.items():
        assert (row.kernel is None) == (row.reason is not None)
        if row.name == "RMSNorm" and path != "norm":
            assert row.kernel == kernel(fakes.MarkedNorm)
            assert "rule 1" in row.asked_by
            assert row.content_hash
    assert "own code" in str(rows["norm", "inference"].reason)
    assert "rule 2" in rows["norm", "inference"].asked_by


def test_as_json_it_is_only_plain_values() -> None:
    model = kw.kernelize(tiny(), only({"RMSNorm": {"cpu": kernel(fakes.ForwardOnlyNorm), "cuda": "a/b:C"}}))
    model.norm(X)
    written = kw.report(model).to_json()
    assert json.loads(json.dumps(written)) == written
    row = next(row for row in written["rows"] if row["path"] == "norm")
    assert row["fallbacks"] == [["a gradient was needed and the kernel has no backward", 1]]


def test_calls_that_fell_back_are_counted_by_reason() -> None:
    model = kw.kernelize(models.Stack(models.Norm(), models.Norm()), only({"RMSNorm": kernel(fakes.ForwardOnlyNorm)}))
    for _ in range(3):
        model.layers[0](X)
    with torch.no_grad():
        model.layers[0](X)
    counts = {row.path: dict(row.fallbacks) for row in kw.report(model).rows}
    assert list(counts["layers.0"].values()) == [3]
    assert counts["layers.1"] == {}
    assert "3x" in str(kw.report(model))


def test_it_follows_partial_undoing() -> None:
    model = kw.kernelize(models.Stack(models.Norm(), models.Norm()), NORM)
    kw.unkernelize(model, paths=["layers.0"])
    found = kernels_of(model)
    assert found["layers.0", "inference"] is None
    assert found["layers.1", "inference"] == kernel(fakes.MarkedNorm)
    assert "taken out" in str(kw.report(model))


def test_it_says_what_runs_of_several_kernelizations() -> None:
    model = models.Stack(models.Norm(), models.Norm())
    kw.kernelize(model, NORM)
    kw.kernelize(model, only({"RMSNorm@layers.0": {"inference": kernel(fakes.TwiceMarkedNorm)}}))
    found = kernels_of(model)
    assert found["layers.0", "inference"] == kernel(fakes.TwiceMarkedNorm)
    assert found["layers.0", "training"] == kernel(fakes.MarkedNorm)
    assert found["layers.1", "inference"] == kernel(fakes.MarkedNorm)
    with kw.kernelized(model, only({"RMSNorm": None})):
        assert set(kernels_of(model).values()) == {None}
    assert kernels_of(model) == found


def test_parts_that_were_kernelized_have_their_paths_in_the_whole() -> None:
    model = tiny()
    for block in model.blocks:
        kw.kernelize(block, NORM)
    with_kernel = {path for (path, _), name in kernels_of(model).items() if name}
    assert with_kernel == {f"blocks.{i}.norm{j}" for i in (0, 1) for j in (1, 2)}
    assert {path for (path, _), name in kernels_of(model.blocks[1]).items() if name} == {"norm1", "norm2"}
    kw.unkernelize(model, paths=["blocks.1.norm1"])
    assert {path for (path, _), name in kernels_of(model).items() if name} == with_kernel - {"blocks.1.norm1"}


def test_a_part_of_a_kernelized_model_reports_what_runs_in_it() -> None:
    model = kw.kernelize(tiny(), NORM)
    report = kw.report(model.blocks[0])
    assert {row.path for row in report.rows if row.kernel} == {"norm1", "norm2"}
    assert "no kernels" not in str(report)
    kw.unkernelize(model.blocks[0], paths=["norm1"])
    assert not fakes.marked(model.blocks[0].norm1(X))
    assert fakes.marked(model.blocks[0].norm2(X))


def test_shared_modules_have_one_row_with_all_paths() -> None:
    model = kw.kernelize(models.Shared(), NORM)
    row = next(row for row in kw.report(model).rows if row.path == "first")
    assert row.paths == ("first", "second")


def test_the_text_folds_alike_layers_and_names_every_reason_once() -> None:
    model = kw.kernelize(tiny(num_blocks=12), only({"RMSNorm": kernel(fakes.MarkedNorm)}))
    text = str(kw.report(model))
    assert "blocks.*.norm1 (12)" in text
    assert "inference + training" in text
    assert text.count("was not recognised") <= 2
    assert max(map(len, text.splitlines()), default=0) < 400


def test_a_plan_prints_its_reasons_and_who_asked() -> None:
    text = str(kw.plan(models.Stack(models.Norm(), models.Activation()), NORM))
    assert "rule 1" in text
    assert "no rule asks for it" in text
    assert kernel(fakes.MarkedNorm) in text.replace("\n", "")


def test_fold_keeps_what_differs_apart() -> None:
    rows = [
        ("a.0.n", "N", "inference", "k", ""),
        ("a.1.n", "N", "inference", "k", ""),
        ("a.0.n", "N", "training", "k", ""),
        ("a.1.n", "N", "training", "other", ""),
    ]
    folded = fold(rows)
    assert sorted(row[0] for row in folded) == ["a.0.n", "a.1.n", "a.1.n"]
    assert sorted(row[2] for row in folded) == ["inference", "inference + training", "training"]


def test_a_table_of_nothing_and_of_odd_text() -> None:
    assert "no layers" in render(("layer", "name", "mode", "kernel", "why"), [])
    text = render(
        ("layer", "name", "mode"), [("a[0]", "[bold]x[/bold]", "m"), ("", "y", "m")], notes=["[red]note[/red]"]
    )
    assert "[bold]x[/bold]" in text
    assert "a[0]" in text
    assert "[red]note[/red]" in text
    assert "(the model itself)" in text
