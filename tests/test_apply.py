"""What applying changes, what it must leave alone, and that undoing is exact."""

from __future__ import annotations

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
from kernelwise._applying import _apply
from kernelwise._data import Kernel, KernelRef, Plan, Target

NORM = only({"RMSNorm": kernel(fakes.MarkedNorm)})
X = torch.randn(2, 3, 8)


def ran(model: nn.Module, *args: Any, **kwargs: Any) -> bool:
    """Whether a marked kernel ran."""
    with torch.no_grad():
        return marked(model(*args, **kwargs))


# ------------------------------------------------------------------------------------------------- in and out again


def test_a_kernel_runs_and_undoing_is_exact() -> None:
    model = models.Stack(models.Norm())
    before, own = Snapshot(model), model(X)
    assert kw.kernelize(model, NORM) is model
    assert ran(model, X)
    assert torch.equal(model(X) - fakes.MARK, (own + fakes.MARK) - fakes.MARK)
    assert kw.unkernelize(model) is model
    assert before.differences(model) == []
    assert torch.equal(model(X), own)


def test_a_whole_model_with_functions_computes_the_same_and_undoes_exactly() -> None:
    model = tiny()
    before, own = Snapshot(model), model(IDS)
    config = only({"RMSNorm": kernel(fakes.GoodNorm), "rotary_pos_emb": kernel(fakes.GoodRotary)})
    kw.kernelize(model, config)
    assert len(_apply.entries_of(model)) == 7
    torch.testing.assert_close(model(IDS), own)
    kw.unkernelize(model)
    assert before.differences(model) == []
    assert torch.equal(model(IDS), own)


def test_unkernelize_twice_and_on_a_model_that_never_was() -> None:
    model = tiny()
    before = Snapshot(model)
    kw.unkernelize(model)
    kw.kernelize(model, NORM)
    kw.unkernelize(model)
    kw.unkernelize(model)
    assert before.differences(model) == []


def test_parameters_names_and_classes_stay() -> None:
    model = tiny()
    names, types = list(model.state_dict()), [type(m) for m in model.modules()]
    pointers = [p.data_ptr() for p in model.parameters()]
    kw.kernelize(model, NORM)
    assert list(model.state_dict()) == names
    assert [type(m) for m in model.modules()] == types
    assert [p.data_ptr() for p in model.parameters()] == pointers
    model.load_state_dict(model.state_dict())


def test_the_model_itself_can_be_the_layer() -> None:
    norm = models.Norm()
    before = Snapshot(norm)
    kw.kernelize(norm, NORM)
    assert ran(norm, X)
    kw.unkernelize(norm)
    assert before.differences(norm) == []


@pytest.mark.parametrize(
    ("layer", "name", "of_kernel", "args", "kwargs"),
    [
        (models.Affine, "Affine", fakes.MarkedAffine, (X,), {}),
        (models.Affine, "Affine", fakes.MarkedAffine, (X, 5.0), {}),
        (models.Affine, "Affine", fakes.MarkedAffine, (), {"x": X, "scale": 5.0, "shift": 7.0}),
        (models.KeywordOnly, "KeywordOnly", fakes.MarkedKeywordOnly, (), {"left": X, "right": X * 3}),
        (models.PositionalOnly, "PositionalOnly", fakes.MarkedPositionalOnly, (X, X * 3), {}),
        (models.PositionalOnly, "PositionalOnly", fakes.MarkedPositionalOnly, (X, X * 3), {"scale": 3.0}),
        (models.Anything, "Anything", fakes.MarkedAnything, (X, X, X), {"more": X, "self_": X}),
        (models.Undecorated, "Undecorated", fakes.MarkedAnyArguments, (X,), {}),
        (models.Undecorated, "Undecorated", fakes.MarkedAnyArguments, (), {"x": X}),
        (models.Clashing, "Clashing", fakes.MarkedClashing, (X,), {}),
        (models.Clashing, "Clashing", fakes.MarkedClashing, (X, 1.0, 2.0, 3.0), {"state": 9.0, "needs_grad": 1.5}),
    ],
)
def test_arguments_reach_the_kernel_as_they_reached_the_layer(
    layer: type[nn.Module], name: str, of_kernel: type[nn.Module], args: Any, kwargs: Any
) -> None:
    model = layer()
    own = model(*args, **kwargs)
    config = only({name: kernel(of_kernel)})
    kw.kernelize(model, config, device="cpu")
    torch.testing.assert_close(model(*args, **kwargs) - fakes.MARK, own, atol=1e-3, rtol=0)


def test_the_defaults_are_the_layers_not_the_kernels() -> None:
    model = models.Affine()
    own = model(X)
    kw.kernelize(model, only({"Affine": kernel(fakes.MarkedAffine)}))  # its defaults are 7 and 11
    torch.testing.assert_close(model(X) - fakes.MARK, own, atol=1e-3, rtol=0)


def test_a_wrong_call_fails_as_it_did() -> None:
    model = kw.kernelize(models.Norm(), NORM)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'hidden_states'"):
        model()
    with pytest.raises(TypeError, match="unexpected keyword argument 'foo'"):
        model(X, foo=1)


def test_a_decorator_that_takes_more_than_the_forward_says_still_takes_it() -> None:
    model = models.Stack(models.Widened())
    layer = model.layers[0]
    own = layer(X), layer(X, verbose=True)
    kw.kernelize(model, only({"Widened": kernel(fakes.MarkedPlusOne)}), device="cpu", on_miss="keep")
    layer(X)
    assert torch.equal(layer(X, verbose=True), own[1])
    kw.unkernelize(model)
    functions = models.DecoratedForward()
    own = functions(X), functions(X, verbose=True)
    kw.kernelize(functions, only({"double": kernel(fakes.MarkedDouble)}), device="cpu")
    torch.testing.assert_close(functions(X) - fakes.MARK, own[0], atol=1e-3, rtol=0)
    torch.testing.assert_close(functions(X, verbose=True) - 2 * fakes.MARK, own[1], atol=1e-3, rtol=0)


# ------------------------------------------------------------------------------------------------------ several layers


def test_a_shared_module_is_one_layer_with_several_paths() -> None:
    model = models.Shared()
    before, own = Snapshot(model), model(X)
    layers = [layer for layer in kw.discover(model) if layer.name == "RMSNorm"]
    assert [layer.paths for layer in layers] == [("first", "second"), ("third",)]
    kw.kernelize(model, only({"RMSNorm@second": kernel(fakes.MarkedNorm)}))
    assert model.first.forward is model.second.forward or model.first is model.second
    assert ran(model.first, X)
    assert not ran(model.third, X)
    kw.unkernelize(model, paths=["second"])
    assert before.differences(model) == []
    assert torch.equal(model(X), own)


def test_two_kernelizations_undone_in_either_order() -> None:
    for first, second in (("first", "third"), ("third", "first")):
        model = models.Shared()
        before, own = Snapshot(model), model(X)
        kw.kernelize(model, only({"RMSNorm@first": kernel(fakes.MarkedNorm)}))
        kw.kernelize(model, only({"RMSNorm@third": kernel(fakes.TwiceMarkedNorm)}))
        kw.unkernelize(model, paths=[first])
        assert before.differences(model) != []
        kw.unkernelize(model, paths=[second])
        assert before.differences(model) == []
        assert torch.equal(model(X), own)


def test_the_second_config_wins_where_it_speaks_and_the_first_remains_elsewhere() -> None:
    model = models.Stack(models.Norm(), models.Norm(), models.Activation())
    first, second, activation = model.layers
    before = Snapshot(model)
    with torch.no_grad():
        own = first(X)
        kw.kernelize(model, only({"RMSNorm": kernel(fakes.MarkedNorm)}))
        kw.kernelize(
            model,
            only({"RMSNorm@layers.1": kernel(fakes.TwiceMarkedNorm), "Activation": kernel(fakes.MarkedActivation)}),
        )
        torch.testing.assert_close(first(X) - fakes.MARK, own, atol=1e-3, rtol=0)
        torch.testing.assert_close(second(X) - 2 * fakes.MARK, own, atol=1e-3, rtol=0)
        assert ran(activation, X)
        kw.kernelize(model, only({"RMSNorm@layers.0": None}))
        assert torch.equal(first(X), own)
        torch.testing.assert_close(second(X) - 2 * fakes.MARK, own, atol=1e-3, rtol=0)
    kw.unkernelize(model)
    assert before.differences(model) == []


def test_a_default_of_the_second_config_does_not_displace_what_the_first_asked_for() -> None:
    model = models.Stack(models.Norm(), models.Activation())
    kw.kernelize(model, only({"RMSNorm": kernel(fakes.MarkedNorm)}))
    inherits = kw.KernelConfig({"Activation": kernel(fakes.MarkedActivation)}, verify=False)
    kw.kernelize(model, inherits)
    assert ran(model.layers[0], X)


def test_the_second_config_speaks_of_one_mode_only() -> None:
    model = models.Stack(models.Norm())
    norm = model.layers[0]
    kw.kernelize(model, only({"RMSNorm": kernel(fakes.MarkedNorm)}))
    kw.kernelize(model, only({"RMSNorm": {"inference": None}}))
    assert not ran(model.eval(), X)
    assert ran(model.train(), X)
    assert norm.training


def test_overlapping_blocks() -> None:
    model = models.Shared()
    before, own = Snapshot(model), model(X)
    first = kw.kernelized(model, only({"RMSNorm": kernel(fakes.MarkedNorm)}))
    second = kw.kernelized(model, only({"RMSNorm@first": kernel(fakes.TwiceMarkedNorm)}))
    with torch.no_grad():
        first.__enter__()
        once = model.first(X)
        second.__enter__()
        twice = model.first(X)
        first.__exit__(None, None, None)
        assert torch.equal(model.first(X), twice)
        assert not ran(model.third, X)
        second.__exit__(None, None, None)
    assert not torch.equal(once, twice)
    assert before.differences(model) == []
    assert torch.equal(model(X), own)


def test_a_block_undoes_after_an_exception() -> None:
    model = tiny()
    before = Snapshot(model)
    with kw.kernelized(model, NORM) as same:
        assert same is model
    with pytest.raises(ZeroDivisionError), kw.kernelized(model, NORM):
        raise ZeroDivisionError
    assert before.differences(model) == []


def test_a_block_leaves_an_older_kernelization_alone() -> None:
    model = models.Shared()
    kw.kernelize(model, NORM)
    with_first = Snapshot(model)
    with kw.kernelized(model, only({"RMSNorm": kernel(fakes.TwiceMarkedNorm)})):
        pass
    assert with_first.differences(model) == []
    assert ran(model, X)


def test_a_part_of_a_model_can_be_kernelized_and_undone() -> None:
    model = tiny()
    before = Snapshot(model)
    kw.kernelize(model.blocks[0], NORM)
    assert ran(model.blocks[0].norm1, X)
    assert not ran(model.blocks[1].norm1, X)
    kw.unkernelize(model)
    assert before.differences(model) == []
    kw.kernelize(model, NORM)
    kw.unkernelize(model.blocks[0])
    assert not ran(model.blocks[0].norm1, X)
    assert ran(model.blocks[1].norm1, X)
    kw.unkernelize(model)
    assert before.differences(model) == []


# ---------------------------------------------------------------------------------------------------------- transactions


def plan_of(model: nn.Module, config: kw.KernelConfig, **options: Any) -> Plan:
    return kw.plan(model, config, **options)


def test_an_error_in_the_last_layer_leaves_the_model_as_it_was() -> None:
    """The last decision names a kernel that cannot be bound: a plan that was made by hand."""
    from dataclasses import replace

    model = tiny()
    before, own = Snapshot(model), model(IDS)
    plan = plan_of(model, NORM)
    with_kernel = [index for index, decision in enumerate(plan.decisions) if decision.kernel]
    bad = kw.plan(model, only({"RMSNorm": kernel(fakes.TooFewArguments)}), on_miss="keep").decisions
    assert all(decision.kernel is None for decision in bad)
    broken = Kernel(KernelRef("package", "models", "TooFewArguments"), function=fakes.TooFewArguments.forward)
    decisions = list(plan.decisions)
    decisions[with_kernel[-1]] = replace(decisions[with_kernel[-1]], kernel=broken)
    with pytest.raises(kw.ApplyError, match="hidden_states"):
        kw.apply(model, replace(plan, decisions=tuple(decisions)))
    assert before.differences(model) == []
    assert torch.equal(model(IDS), own)


def test_an_error_while_modules_change_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    kw.kernelize(model, only({"RMSNorm@norm": kernel(fakes.MarkedNorm)}))
    before = Snapshot(model)
    put_in, calls = _apply._put_in, []

    def fails_at_the_last(*args: Any) -> None:
        calls.append(args)
        put_in(*args)
        if len(calls) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(_apply, "_put_in", fails_at_the_last)
    with pytest.raises(KeyboardInterrupt):
        kw.kernelize(model, only({"RMSNorm": kernel(fakes.TwiceMarkedNorm)}))
    assert len(calls) == 5
    assert before.differences(model) == []
    assert ran(model.norm, X)


def test_a_plan_for_another_model_is_refused() -> None:
    plan = plan_of(tiny(num_blocks=3), NORM)
    model = tiny(num_blocks=2)
    before = Snapshot(model)
    with pytest.raises(kw.ApplyError, match=r"blocks\.2\.norm1"):
        kw.apply(model, plan)
    assert before.differences(model) == []


def test_a_plan_for_a_model_with_other_layers_there_is_refused() -> None:
    plan = plan_of(models.Stack(models.Norm(), models.Norm()), NORM)
    model = models.Stack(models.Norm(), models.Affine())
    before = Snapshot(model)
    with pytest.raises(kw.ApplyError, match=r"layers\.1"):
        kw.apply(model, plan)
    assert before.differences(model) == []


def test_a_plan_for_another_machine_cannot_be_applied() -> None:
    model = tiny()
    plan = kw.plan(model, NORM, target=Target("cuda", "sm_90"))
    with pytest.raises(kw.ApplyError):
        kw.apply(model, plan)


def test_a_meta_model_can_be_planned_and_says_so_when_applied() -> None:
    with torch.device("meta"):
        model = models.Stack(models.Norm(), models.Norm())
    before = Snapshot(model)
    kw.plan(model)
    for device in (None, "cpu"):
        plan = kw.plan(model, NORM, device=device, on_miss="keep") if device else kw.plan(model)
        assert len(plan.decisions) == 4
    with pytest.raises(kw.ApplyError, match="meta"):
        kw.kernelize(model, NORM, device="cpu")
    with pytest.raises(kw.KernelwiseError, match="meta"):
        kw.kernelize(model, NORM)
    assert before.differences(model) == []


# ------------------------------------------------------------------------------------------------------------- modes


def test_train_and_eval_on_a_part_switch_at_once_without_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    from kernelwise import sources

    model = models.Shared().eval()
    loads: list[Any] = []
    real = sources.load
    monkeypatch.setattr(sources, "load", lambda *args, **kwargs: (loads.append(args), real(*args, **kwargs))[1])
    kw.kernelize(
        model, only({"RMSNorm": {"inference": kernel(fakes.MarkedNorm), "training": kernel(fakes.TwiceMarkedNorm)}})
    )
    assert len(loads) == 2
    with torch.no_grad():
        inference = model.first(X)
        model.first.train()
        training = model.first(X)
        assert (training - inference - fakes.MARK).abs().max() < 1e-3
        assert torch.equal(model.third(X), inference)  # it has the same weights, and was not switched
        model.eval()
        assert torch.equal(model.first(X), inference)
    assert len(loads) == 2


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_a_fixed_mode_serves_train_and_eval(mode: str) -> None:
    model = models.Stack(models.Norm())
    kw.kernelize(
        model,
        only({"RMSNorm": {"inference": kernel(fakes.MarkedNorm), "training": kernel(fakes.TwiceMarkedNorm)}}),
        mode=mode,
    )
    with torch.no_grad():
        outputs = [model.train()(X), model.eval()(X)]
    assert torch.equal(*outputs)
    assert (outputs[0] > 1.5 * fakes.MARK).all() == (mode == "training")
