"""The public functions joined: what a user sees, and every way in which it can go wrong."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import fakes
import models
import pytest
import torch
from fakes import kernel, marked, only
from models import IDS, tiny
from snapshot import Snapshot
from torch import nn

import kernelwise as kw
from kernelwise._data import Plan, Target, from_json

X = torch.linspace(-1, 1, 8)
NORM = only({"RMSNorm": kernel(fakes.MarkedNorm)})


def test_kernelize_gives_the_model_back() -> None:
    model = tiny()
    assert kw.kernelize(model, NORM) is model
    assert kw.apply(model, kw.plan(model, NORM)) is model
    assert kw.unkernelize(model) is model
    with kw.kernelized(model, NORM) as same:
        assert same is model


def test_a_mapping_can_stand_for_a_config() -> None:
    model = models.Stack(models.Norm())
    kw.kernelize(model, {"RMSNorm": kernel(fakes.MarkedNorm)}, verify=False)
    assert marked(model(X))


def test_one_config_serves_many_models_and_stays_as_it_was() -> None:
    mapping = {"RMSNorm": {"cpu": kernel(fakes.MarkedNorm), "cuda": ("a/b:C", {"version": 1})}}
    config = kw.KernelConfig(mapping)
    before = json.dumps(mapping)
    for model in (tiny(), models.Stack(models.Norm()), models.Shared()):
        kw.kernelize(model, config, verify=False)
        kw.unkernelize(model)
    assert json.dumps(mapping) == before
    assert config.kernel_mapping is mapping


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("model", [None, 3, "model", nn.Linear, [nn.Linear(1, 1)]])
def test_what_is_no_model_is_refused_with_one_error(model: Any) -> None:
    for call in (kw.plan, kw.kernelize):
        with pytest.raises(kw.KernelConfigError, match=r"torch\.nn\.Module"):
            call(model)


@pytest.mark.parametrize(
    "mapping", [[], "RMSNorm", 3, {"RMSNorm": "not a reference"}, {"Unknown": "a/b:C"}, {3: "a/b:C"}]
)
def test_a_bad_mapping_is_one_error_and_the_model_is_untouched(mapping: Any) -> None:
    model = tiny()
    before = Snapshot(model)
    with pytest.raises(kw.KernelConfigError):
        kw.kernelize(model, mapping)
    assert before.differences(model) == []


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(kw.KernelConfigError, match="RMSNorm"):
        kw.kernelize(tiny(), {"RMSnorm": kernel(fakes.MarkedNorm)})


@pytest.mark.parametrize("mode", ["train", "", 3, "compile", "INFERENCE", object()])
def test_an_unknown_mode_is_refused(mode: Any) -> None:
    with pytest.raises(kw.PlanError, match="inference"):
        kw.plan(tiny(), mode=mode)


def test_modes_of_the_kernels_library() -> None:
    model = models.Stack(models.Norm())
    for mode, name in (
        (kw.Mode.INFERENCE, "inference"),
        (kw.Mode.TRAINING, "training"),
        (kw.Mode.TRAINING | kw.Mode.TORCH_COMPILE, "training+compile"),
        ("inference+compile", "inference+compile"),
    ):
        assert {d.mode for d in kw.plan(model, NORM, mode=mode).decisions} == {name}
    for mode in (kw.Mode.TORCH_COMPILE, kw.Mode.FALLBACK):
        with pytest.raises(kw.PlanError):
            kw.plan(model, NORM, mode=mode)


@pytest.mark.parametrize("device", ["gpu", "gpu:0", "", "cuda:x", 3, torch.device("meta"), "meta", torch.nn])
def test_an_unknown_device_is_refused(device: Any) -> None:
    with pytest.raises(kw.KernelwiseError, match="cuda"):
        kw.kernelize(models.Activation(), device=device)


@pytest.mark.parametrize("device", ["cpu", "cpu:0", torch.device("cpu"), torch.device("cpu", 0)])
def test_the_ways_to_name_a_device(device: Any) -> None:
    model = models.Activation()
    kw.kernelize(model, only({"Activation": kernel(fakes.MarkedActivation)}), device=device)
    assert marked(model(X))


@pytest.mark.parametrize("call", [kw.kernelize, lambda model, **options: kw.kernelized(model, **options).__enter__()])
def test_kernels_for_a_device_that_the_model_is_not_on_are_refused(call: Any) -> None:
    model = tiny()
    before = Snapshot(model)
    with pytest.raises(kw.PlanError, match=r"(?s)is on cpu, not on (cuda|rocm).*model\.to\("):
        call(model, device="cuda")
    assert before.differences(model) == []
    assert kw.plan(model, device="cuda", on_miss="keep").target.device in ("cuda", "rocm")


def test_on_rocm_a_model_is_moved_to_what_torch_calls_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.0")
    with pytest.raises(kw.PlanError, match=r'(?s)not on rocm.*model\.to\("cuda"\)'):
        kw.kernelize(tiny(), device="cuda:0")


def test_a_device_for_a_model_spread_over_several_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from kernelwise import _discover

    model = tiny()
    kinds = itertools.cycle(["cpu", "xpu"])  # every other parameter
    monkeypatch.setattr(_discover, "device_type", lambda device: device if isinstance(device, str) else next(kinds))
    with pytest.raises(kw.PlanError, match=r"(?s)cpu and xpu, not on cpu alone.*leave device out"):
        kw.kernelize(model, device="cpu")


@pytest.mark.parametrize("layer", [nn.LazyLinear(4), nn.LazyBatchNorm1d()])
def test_a_lazy_layer_is_named_before_its_first_input(layer: nn.Module) -> None:
    model = nn.Sequential(layer)
    with pytest.raises(kw.PlanError, match=rf"(?s)0 \({type(layer).__name__}\).*run one batch first"):
        kw.plan(model)
    model(torch.ones(2, 8))
    kw.plan(model)


def test_what_is_no_model_no_plan_and_no_target_is_refused() -> None:
    for call in (kw.report, kw.unkernelize):
        for value in (None, "model", nn.Linear):
            with pytest.raises(kw.PlanError, match=r"takes a torch\.nn\.Module"):
                call(value)  # type: ignore[operator]
    with pytest.raises(kw.PlanError, match=r"takes a torch\.nn\.Module"), kw.expose_hidden_kernels(None):  # type: ignore[type-var]
        pass
    model = tiny()
    for arguments in ((model, None), (model, model), (None, kw.plan(model))):
        with pytest.raises(kw.ApplyError, match=r"apply\(model, plan\(model\)\)"):
            kw.apply(*arguments)  # type: ignore[type-var]
    with pytest.raises(kw.PlanError, match=r"verify\(model, plan\(model\), inputs\)"):
        kw.verify(model, IDS)  # type: ignore[arg-type]
    with pytest.raises(kw.PlanError, match=r'Target\("xpu"\)'):
        kw.plan(model, target="xpu")  # type: ignore[arg-type]
    with pytest.raises(kw.PlanError, match=r"(?s)did you mean 'cuda' or 'rocm'.*neuron"):
        kw.plan(model, target=Target("gpu"))


@pytest.mark.parametrize("file", ["kernels.toml", Path("conf/kernels.json"), Path("kernels")])
def test_a_file_in_place_of_a_config_says_how_to_load_it(file: Any) -> None:
    for call in (kw.kernelize, kw.plan):
        with pytest.raises(kw.KernelConfigError) as error:
            call(tiny(), file)
        assert f'KernelConfig.load("{file}")' in str(error.value)


@pytest.mark.parametrize(
    ("options", "meant"),
    [
        ({"mode": "eval"}, "'inference'"),
        ({"mode": "train"}, "'training'"),
        ({"device": "gpu"}, "'cuda' or 'rocm'"),
        ({"device": "cudda"}, "'cuda'"),
        ({"on_miss": "skip"}, "'keep'"),
    ],
)
def test_a_word_that_is_not_known_gets_the_one_that_is_meant(options: Any, meant: str) -> None:
    with pytest.raises(kw.PlanError, match=rf"(?s)did you mean {meant}\?.*\n  go on      "):
        kw.kernelize(tiny(), **options)


def test_a_model_without_parameters_asks_for_a_device() -> None:
    model = models.Stack(models.Activation())
    before = Snapshot(model)
    with pytest.raises(kw.PlanError, match="device="):
        kw.kernelize(model, only({"Activation": kernel(fakes.MarkedActivation)}))
    assert before.differences(model) == []


def test_on_miss_is_one_of_two_words() -> None:
    for bad in ("ignore", "", 0):
        with pytest.raises(kw.KernelwiseError, match="keep"):
            kw.kernelize(tiny(), on_miss=bad)  # type: ignore[arg-type]


def test_paths_that_have_no_kernel_are_an_error() -> None:
    model = kw.kernelize(tiny(), NORM)
    for path in ("nowhere", "blocks.0.mlp", "norm.weight", "nor", "blocks.9"):
        with pytest.raises(kw.PlanError, match="report"):
            kw.unkernelize(model, paths=[path])
    assert marked(model.norm(X))
    kw.unkernelize(model, paths="blocks.0")  # a single path is no sequence of letters
    assert not marked(model.blocks[0].norm1(X))
    assert marked(model.blocks[1].norm1(X))


def test_a_path_that_is_wrong_undoes_none_of_the_right_ones() -> None:
    model = kw.kernelize(tiny(), NORM)
    with pytest.raises(kw.PlanError):
        kw.unkernelize(model, paths=["norm", "nowhere"])
    assert marked(model.norm(X))


# --------------------------------------------------------------------------------------------------- demand and wish


def test_a_demand_that_cannot_be_met_raises_with_every_reason_and_changes_nothing() -> None:
    model = tiny()
    before, own = Snapshot(model), model(IDS)
    with pytest.raises(kw.PlanError) as error:
        kw.kernelize(model, only({"RMSNorm": kernel(fakes.ReadsMore), "rotary_pos_emb": kernel(fakes.TooFewArguments)}))
    text = str(error.value)
    for part in ("self.gain", "and 2 more", "`q`", "`sin`", "rule 1", "rule 2", "package:fakes:ReadsMore"):
        assert part in text, part
    assert before.differences(model) == []
    assert torch.equal(model(IDS), own)


def test_keep_puts_in_what_can_be_had_and_reports_the_rest() -> None:
    model = tiny()
    config = only({"RMSNorm": kernel(fakes.ReadsMore), "rotary_pos_emb": kernel(fakes.MarkedRotary)}, on_miss="keep")
    kw.kernelize(model, config)
    rows = kw.report(model).rows
    assert {row.kernel for row in rows if row.name == "RMSNorm"} == {None}
    assert all("self.gain" in str(row.reason) for row in rows if row.name == "RMSNorm")
    assert {row.kernel for row in rows if row.name == "rotary_pos_emb"} == {kernel(fakes.MarkedRotary)}


def test_the_argument_beats_the_config_about_misses() -> None:
    model = tiny()
    config = only({"RMSNorm": kernel(fakes.ReadsMore)}, on_miss="keep")
    with pytest.raises(kw.PlanError):
        kw.kernelize(model, config, on_miss="raise")
    kw.kernelize(model, only({"RMSNorm": kernel(fakes.ReadsMore)}), on_miss="keep")


def test_a_kernel_that_does_not_load_is_an_error_of_a_demand_and_a_reason_of_a_keep(tmp_path: Path) -> None:
    model = models.Stack(models.Norm())
    before = Snapshot(model)
    for reference in ("package:not_installed_anywhere:Norm", "package:fakes:NotThere", "builtin:NotThere"):
        config = only({"RMSNorm": reference})
        with pytest.raises(kw.KernelLoadError, match="rule 1"):
            kw.kernelize(model, config)
        assert before.differences(model) == []
        kw.kernelize(model, config, on_miss="keep")
        assert all(row.kernel is None and row.reason for row in kw.report(model).rows)
        kw.unkernelize(model)
        assert before.differences(model) == []


def test_an_entry_for_another_device_is_a_note() -> None:
    model = models.Stack(models.Norm())
    kw.kernelize(model, only({"RMSNorm": {"cuda": "package:not_installed_anywhere:Norm"}}))
    report = kw.report(model)
    assert "cuda" in " ".join(report.notes)
    assert all(row.kernel is None for row in report.rows)


def test_entries_for_other_devices_and_modes_are_not_loaded() -> None:
    missing = "package:not_installed_anywhere:Norm"
    model = models.Stack(models.Norm())
    mapping = {"cpu": {"inference": kernel(fakes.MarkedNorm), "training": missing}, "cuda": missing}
    kw.kernelize(model, only({"RMSNorm": mapping}), mode="inference")
    assert marked(model(X))
    with pytest.raises(kw.KernelLoadError):
        kw.kernelize(model, only({"RMSNorm": mapping}))


def test_inherit_mapping_false_uses_only_what_the_config_names() -> None:
    model = tiny()
    kw.kernelize(model, only({"RMSNorm@norm": kernel(fakes.MarkedNorm)}))
    assert {row.path for row in kw.report(model).rows if row.kernel} == {"norm"}


@pytest.mark.parametrize(
    ("mapping", "error", "said"),
    [
        ({"RMSNorm@blocks.*": "X", "RMSNorm@*.norm1": "X"}, kw.PlanError, "two rules claim blocks.0.norm1"),
        ({"RMSNorm@norm": "X", "RMSNorm@nowhere": "X"}, kw.PlanError, "no RMSNorm stands at nowhere"),
        ({"RMSNorm@norm": "X", "RMSNorm@blocks.*": "builtin:Nope"}, kw.KernelLoadError, "Nope"),
    ],
)
def test_what_is_wrong_with_rules_is_found_before_a_kernel_is_loaded(
    monkeypatch: pytest.MonkeyPatch, mapping: dict[str, str], error: Any, said: str
) -> None:
    from kernelwise import sources

    asked: list[str] = []
    load = sources.load
    monkeypatch.setattr(sources, "load", lambda ref, **options: (asked.append(str(ref)), load(ref, **options))[1])
    mapping = {key: kernel(fakes.MarkedNorm) if value == "X" else value for key, value in mapping.items()}
    with pytest.raises(error, match=said):
        kw.plan(tiny(), only(mapping))
    assert kernel(fakes.MarkedNorm) not in asked
    with pytest.raises(error, match=said):  # a plan for another machine finds the same
        kw.plan(tiny(), only(mapping), target=Target("cuda", "sm_90"))


def test_without_defaults_the_plan_says_that_nobody_asked() -> None:
    for mapping in ({}, {"RMSNorm@norm": "none"}):
        plan = kw.plan(tiny(), only(mapping))
        others = {d.reason for d in plan.decisions if d.layer.path != "norm"}
        assert others == {"no rule asks for it (inherit_mapping=False)"}


# --------------------------------------------------------------------------------------------------------------- plans


def test_a_plan_can_be_made_for_a_machine_that_is_not_this_one() -> None:
    model = tiny()
    before = Snapshot(model)
    plan = kw.plan(model, target=Target("cuda", "sm_90"))
    kernels = {d.layer.name: str(d.kernel.ref) for d in plan.decisions if d.kernel}
    assert kernels["RMSNorm"] == "builtin:RMSNorm"
    assert plan.target == Target("cuda", "sm_90")
    assert before.differences(model) == []
    too_old = kw.plan(model, target=Target("cuda", "sm_70"))
    assert not [d for d in too_old.decisions if d.kernel]
    assert "sm_80" in str(too_old)
    with pytest.raises(kw.ApplyError):
        kw.apply(model, plan)
    assert before.differences(model) == []


def test_a_plan_for_another_machine_loads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from kernelwise import sources

    monkeypatch.setattr(sources, "load", lambda *args, **kwargs: pytest.fail("it was loaded"))
    mapping = {"RMSNorm": ("kernels-community/layer_norm:LlamaRMSNorm", {"version": 1})}
    plan = kw.plan(tiny(), kw.KernelConfig(mapping), target=Target("cuda", "sm_90"))
    refs = {str(d.kernel.ref) for d in plan.decisions if d.kernel and d.layer.name == "RMSNorm"}
    assert refs == {"kernels-community/layer_norm@v1:LlamaRMSNorm"}


def test_a_plan_survives_json_and_says_the_same() -> None:
    plan = kw.plan(tiny(), NORM)
    read = from_json(Plan, json.loads(json.dumps(plan.to_json())))
    assert read == plan
    assert str(read) == str(plan)


def test_a_plan_read_from_json_has_no_functions_and_cannot_be_applied() -> None:
    model = tiny()
    before = Snapshot(model)
    read = from_json(Plan, kw.plan(model, NORM).to_json())
    with pytest.raises(kw.ApplyError, match="not loaded"):
        kw.apply(model, read)
    assert before.differences(model) == []


def test_a_plan_can_be_applied_twice_and_to_a_twin() -> None:
    model, twin = tiny(), tiny()
    before = Snapshot(model)
    plan = kw.plan(model, NORM)
    kw.apply(model, plan)
    kw.apply(model, plan)
    kw.apply(twin, plan)
    assert marked(model.norm(X))
    assert marked(twin.norm(X))
    kw.unkernelize(model)
    assert before.differences(model) == []
    assert marked(twin.norm(X))


# ------------------------------------------------------------------------------------------------------ hidden kernels


def test_expose_hidden_kernels_for_the_length_of_a_block() -> None:
    model = tiny()
    before = Snapshot(model)
    with kw.expose_hidden_kernels(model) as same:
        assert same is model
        exposed = [path for path, module in model.named_modules() if module is models.apply_rotary_pos_emb]
        assert len(exposed) >= 1
        assert list(model.state_dict()) == list(tiny().state_dict())
    assert before.differences(model) == []
    with pytest.raises(ZeroDivisionError), kw.expose_hidden_kernels(model):
        raise ZeroDivisionError
    assert before.differences(model) == []


def test_expose_hidden_kernels_lets_the_kernels_library_find_them() -> None:
    from kernels import Mode, kernelize, use_kernel_mapping

    model = models.TwoFunctions()
    before = Snapshot(model)
    with kw.expose_hidden_kernels(model), use_kernel_mapping({}, inherit_mapping=False):
        assert {type(m).__name__ for m in model.children()} == {"Func"}
        kernelize(model, mode=Mode.INFERENCE, device="cpu")
    for wrapper in (models.double, models.triple):
        wrapper.__dict__.pop("forward", None)  # which that library leaves behind
    assert before.differences(model) == []


def test_builtin_kernels_reach_recognised_layers() -> None:
    """Whatever builtin kernels can be had here: outputs stay, and undoing is exact."""
    model = tiny()
    before, own = Snapshot(model), model(IDS)
    kw.kernelize(model)
    torch.testing.assert_close(model(IDS), own, atol=1e-4, rtol=1e-4)
    kw.unkernelize(model)
    assert before.differences(model) == []
    assert torch.equal(model(IDS), own)
