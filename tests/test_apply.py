"""What applying changes, what it must leave alone, and that undoing is exact."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from types import MethodType
from typing import Any

import models
import pytest
import torch
from models import IDS, Snapshot, kernel, marked, only, tiny
from torch import Tensor, nn

import kernelwise as kw
from kernelwise._applying import _apply
from kernelwise._data import Kernel, KernelRef, Plan, Target
from kernelwise._discover import STATE

NORM = only({"RMSNorm": kernel(models.MarkedNorm)})
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
    assert torch.equal(model(X) - models.MARK, (own + models.MARK) - models.MARK)
    assert kw.unkernelize(model) is model
    assert before.differences(model) == []
    assert torch.equal(model(X), own)


def test_a_whole_model_with_functions_computes_the_same_and_undoes_exactly() -> None:
    model = tiny()
    before, own = Snapshot(model), model(IDS)
    config = only({"RMSNorm": kernel(models.GoodNorm), "rotary_pos_emb": kernel(models.GoodRotary)})
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
        (models.Affine, "Affine", models.MarkedAffine, (X,), {}),
        (models.Affine, "Affine", models.MarkedAffine, (X, 5.0), {}),
        (models.Affine, "Affine", models.MarkedAffine, (), {"x": X, "scale": 5.0, "shift": 7.0}),
        (models.KeywordOnly, "KeywordOnly", models.MarkedKeywordOnly, (), {"left": X, "right": X * 3}),
        (models.PositionalOnly, "PositionalOnly", models.MarkedPositionalOnly, (X, X * 3), {}),
        (models.PositionalOnly, "PositionalOnly", models.MarkedPositionalOnly, (X, X * 3), {"scale": 3.0}),
        (models.Anything, "Anything", models.MarkedAnything, (X, X, X), {"more": X, "self_": X}),
        (models.Undecorated, "Undecorated", models.MarkedAnyArguments, (X,), {}),
        (models.Undecorated, "Undecorated", models.MarkedAnyArguments, (), {"x": X}),
        (models.Clashing, "Clashing", models.MarkedClashing, (X,), {}),
        (models.Clashing, "Clashing", models.MarkedClashing, (X, 1.0, 2.0, 3.0), {"state": 9.0, "needs_grad": 1.5}),
    ],
)
def test_arguments_reach_the_kernel_as_they_reached_the_layer(
    layer: type[nn.Module], name: str, of_kernel: type[nn.Module], args: Any, kwargs: Any
) -> None:
    model = layer()
    own = model(*args, **kwargs)
    config = only({name: kernel(of_kernel)})
    kw.kernelize(model, config, device="cpu")
    torch.testing.assert_close(model(*args, **kwargs) - models.MARK, own, atol=1e-3, rtol=0)


def test_the_defaults_are_the_layers_not_the_kernels() -> None:
    model = models.Affine()
    own = model(X)
    kw.kernelize(model, only({"Affine": kernel(models.MarkedAffine)}))  # its defaults are 7 and 11
    torch.testing.assert_close(model(X) - models.MARK, own, atol=1e-3, rtol=0)


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
    kw.kernelize(model, only({"Widened": kernel(models.MarkedPlusOne)}), device="cpu", on_miss="keep")
    layer(X)
    assert torch.equal(layer(X, verbose=True), own[1])
    kw.unkernelize(model)
    functions = models.DecoratedForward()
    own = functions(X), functions(X, verbose=True)
    kw.kernelize(functions, only({"double": kernel(models.MarkedDouble)}), device="cpu")
    torch.testing.assert_close(functions(X) - models.MARK, own[0], atol=1e-3, rtol=0)
    torch.testing.assert_close(functions(X, verbose=True) - 2 * models.MARK, own[1], atol=1e-3, rtol=0)


# ------------------------------------------------------------------------------------------------------ several layers


def test_a_shared_module_is_one_layer_with_several_paths() -> None:
    model = models.Shared()
    before, own = Snapshot(model), model(X)
    layers = [layer for layer in kw.discover(model) if layer.name == "RMSNorm"]
    assert [layer.paths for layer in layers] == [("first", "second"), ("third",)]
    kw.kernelize(model, only({"RMSNorm@second": kernel(models.MarkedNorm)}))
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
        kw.kernelize(model, only({"RMSNorm@first": kernel(models.MarkedNorm)}))
        kw.kernelize(model, only({"RMSNorm@third": kernel(models.TwiceMarkedNorm)}))
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
        kw.kernelize(model, only({"RMSNorm": kernel(models.MarkedNorm)}))
        kw.kernelize(
            model,
            only({"RMSNorm@layers.1": kernel(models.TwiceMarkedNorm), "Activation": kernel(models.MarkedActivation)}),
        )
        torch.testing.assert_close(first(X) - models.MARK, own, atol=1e-3, rtol=0)
        torch.testing.assert_close(second(X) - 2 * models.MARK, own, atol=1e-3, rtol=0)
        assert ran(activation, X)
        kw.kernelize(model, only({"RMSNorm@layers.0": None}))
        assert torch.equal(first(X), own)
        torch.testing.assert_close(second(X) - 2 * models.MARK, own, atol=1e-3, rtol=0)
    kw.unkernelize(model)
    assert before.differences(model) == []


def test_a_default_of_the_second_config_does_not_displace_what_the_first_asked_for() -> None:
    model = models.Stack(models.Norm(), models.Activation())
    kw.kernelize(model, only({"RMSNorm": kernel(models.MarkedNorm)}))
    inherits = kw.KernelConfig({"Activation": kernel(models.MarkedActivation)}, verify=False)
    kw.kernelize(model, inherits)
    assert ran(model.layers[0], X)


def test_the_second_config_speaks_of_one_mode_only() -> None:
    model = models.Stack(models.Norm())
    norm = model.layers[0]
    kw.kernelize(model, only({"RMSNorm": kernel(models.MarkedNorm)}))
    kw.kernelize(model, only({"RMSNorm": {"inference": None}}))
    assert not ran(model.eval(), X)
    assert ran(model.train(), X)
    assert norm.training


def test_overlapping_blocks() -> None:
    model = models.Shared()
    before, own = Snapshot(model), model(X)
    first = kw.kernelized(model, only({"RMSNorm": kernel(models.MarkedNorm)}))
    second = kw.kernelized(model, only({"RMSNorm@first": kernel(models.TwiceMarkedNorm)}))
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
    with kw.kernelized(model, only({"RMSNorm": kernel(models.TwiceMarkedNorm)})):
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
    bad = kw.plan(model, only({"RMSNorm": kernel(models.TooFewArguments)}), on_miss="keep").decisions
    assert all(decision.kernel is None for decision in bad)
    broken = Kernel(KernelRef("package", "models", "TooFewArguments"), function=models.TooFewArguments.forward)
    decisions = list(plan.decisions)
    decisions[with_kernel[-1]] = replace(decisions[with_kernel[-1]], kernel=broken)
    with pytest.raises(kw.ApplyError, match="hidden_states"):
        kw.apply(model, replace(plan, decisions=tuple(decisions)))
    assert before.differences(model) == []
    assert torch.equal(model(IDS), own)


def test_an_error_while_modules_change_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    kw.kernelize(model, only({"RMSNorm@norm": kernel(models.MarkedNorm)}))
    before = Snapshot(model)
    put_in, calls = _apply._put_in, []

    def fails_at_the_last(*args: Any) -> None:
        calls.append(args)
        put_in(*args)
        if len(calls) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(_apply, "_put_in", fails_at_the_last)
    with pytest.raises(KeyboardInterrupt):
        kw.kernelize(model, only({"RMSNorm": kernel(models.TwiceMarkedNorm)}))
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
        model, only({"RMSNorm": {"inference": kernel(models.MarkedNorm), "training": kernel(models.TwiceMarkedNorm)}})
    )
    assert len(loads) == 2
    with torch.no_grad():
        inference = model.first(X)
        model.first.train()
        training = model.first(X)
        assert (training - inference - models.MARK).abs().max() < 1e-3
        assert torch.equal(model.third(X), inference)  # it has the same weights, and was not switched
        model.eval()
        assert torch.equal(model.first(X), inference)
    assert len(loads) == 2


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_a_fixed_mode_serves_train_and_eval(mode: str) -> None:
    model = models.Stack(models.Norm())
    kw.kernelize(
        model,
        only({"RMSNorm": {"inference": kernel(models.MarkedNorm), "training": kernel(models.TwiceMarkedNorm)}}),
        mode=mode,
    )
    with torch.no_grad():
        outputs = [model.train()(X), model.eval()(X)]
    assert torch.equal(*outputs)
    assert (outputs[0] > 1.5 * models.MARK).all() == (mode == "training")


# --------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("of_kernel", [models.ForwardOnlyNorm, models.LyingNorm])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("needs_grad", [False, True])
def test_gradients_are_never_lost(of_kernel: type[nn.Module], frozen: bool, needs_grad: bool) -> None:
    model = models.Stack(models.Norm()).requires_grad_(not frozen)
    x = X.clone().requires_grad_(needs_grad)
    own = model(x)
    kw.kernelize(model, only({"RMSNorm": kernel(of_kernel)}))
    output = model(x)
    if frozen and not needs_grad:
        assert marked(output)
        assert kw.report(model).rows[0].fallbacks == ()
        return
    assert torch.equal(output, own)
    output.sum().backward()
    assert frozen or model.layers[0].weight.grad is not None
    assert not needs_grad or x.grad is not None
    assert sum(count for _, count in kw.report(model).rows[0].fallbacks) == 1


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("of_kernel", [models.ForwardOnlyNorm, models.LyingNorm])
def test_without_gradients_the_kernel_runs(of_kernel: type[nn.Module], context: Any) -> None:
    model = kw.kernelize(models.Stack(models.Norm()), only({"RMSNorm": kernel(of_kernel)}))
    with context():
        assert marked(model(X))
    assert all(row.fallbacks == () for row in kw.report(model).rows)


@pytest.mark.parametrize("where", ["tuple", "list", "nested", "dict"])
def test_a_kernel_without_backward_never_sees_a_gradient_inside_a_container(where: str) -> None:
    leaf = X.clone().requires_grad_()
    both: Any = (leaf, X) if where != "list" else [X, leaf]
    extra = None
    if where == "nested":
        both = (X, X)
        extra = {"a": [leaf]}
        model: nn.Module = models.Pair()
        with pytest.raises(TypeError):
            model(both, extra)  # the layer itself cannot use it; the kernel must not be asked instead
    elif where == "dict":
        both, extra = (X, X), {"a": leaf}
    model = models.Pair()
    kw.kernelize(model, only({"Pair": kernel(models.ForwardOnlyPair)}), device="cpu")
    if where == "nested":
        with pytest.raises(TypeError):
            model(both, extra)
        return
    outputs = model(both, extra)
    assert any(output.requires_grad for output in outputs)
    assert not marked(outputs[0])
    assert marked(model((X, X))[0])


def test_one_of_two_outputs_without_gradient_is_a_lost_gradient() -> None:
    model = kw.kernelize(models.Pair(), only({"Pair": kernel(models.HalfLyingPair)}), device="cpu")
    x = X.clone().requires_grad_()
    left, right = model((x, x))
    assert left.requires_grad
    assert right.requires_grad


@pytest.mark.parametrize("of_kernel", [models.ForwardOnlyDouble, models.LyingDouble])
def test_function_kernels_never_lose_gradients(of_kernel: type[nn.Module]) -> None:
    model = kw.kernelize(models.TwoFunctions(), only({"double": kernel(of_kernel)}), device="cpu")
    x = X.clone().requires_grad_()
    output = model(x)
    output.sum().backward()
    assert torch.equal(x.grad, torch.full_like(X, 5.0))
    with torch.no_grad():
        assert marked(model(x))
    counts = [row.fallbacks for row in kw.report(model).rows if row.kernel]
    assert [sum(count for _, count in fallbacks) for fallbacks in counts] == [1, 1]


def test_a_layer_with_a_lying_kernel_and_clashing_names_keeps_its_arguments() -> None:
    for of_kernel in (models.LyingClashing, models.ForwardOnlyClashing):
        model = models.Clashing()
        own = model(X, 1.0, own=5.0)
        kw.kernelize(model, only({"Clashing": kernel(of_kernel)}))
        assert torch.equal(model(X, 1.0, own=5.0), own)


# --------------------------------------------------------------------------------------------- copies, files, threads


def test_a_deep_copy_is_kernelized_reportable_and_undoable_apart() -> None:
    model = tiny()
    own = model(IDS)
    kw.kernelize(model, only({"RMSNorm": kernel(models.MarkedNorm), "rotary_pos_emb": kernel(models.GoodRotary)}))
    twin = copy.deepcopy(model)
    assert twin.norm.forward.__self__ is twin.norm
    assert ran(twin.norm, X)
    assert str(kw.report(twin)) == str(kw.report(model))
    assert twin.norm.weight is not model.norm.weight
    with torch.no_grad():
        twin.norm.weight.zero_()
        assert not torch.equal(twin.norm(X), model.norm(X))
    kw.unkernelize(twin)
    assert STATE not in twin.norm.__dict__
    assert "forward" not in twin.norm.__dict__
    assert not ran(twin.norm, X)
    assert ran(model.norm, X)
    kw.unkernelize(model)
    assert torch.equal(model(IDS), own)


def test_a_deep_copy_counts_its_own_fallbacks() -> None:
    model = kw.kernelize(models.Stack(models.Norm()), only({"RMSNorm": kernel(models.ForwardOnlyNorm)}))
    model(X)
    twin = copy.deepcopy(model)
    twin(X)
    twin(X)
    assert [sum(n for _, n in row.fallbacks) for row in kw.report(model).rows] == [1, 1]
    assert [sum(n for _, n in row.fallbacks) for row in kw.report(twin).rows] == [2, 2]


def test_a_deep_copy_of_a_part_is_kernelized() -> None:
    model = kw.kernelize(tiny(), NORM)
    twin = copy.deepcopy(model.blocks[0])
    assert ran(twin.norm1, X)
    kw.unkernelize(twin)
    assert not ran(twin.norm1, X)
    assert not [key for module in twin.modules() for key in module.__dict__ if key == STATE]


def test_tied_weights_stay_tied_in_a_deep_copy() -> None:
    model = tiny()
    model.head.weight = model.embed.weight = nn.Parameter(torch.randn(16, 8))
    twin = copy.deepcopy(kw.kernelize(model, NORM))
    assert twin.head.weight is twin.embed.weight
    shared = copy.deepcopy(kw.kernelize(models.Shared(), NORM))
    assert shared.first is shared.second


def test_a_shallow_copy_runs_its_own_code_and_leaves_the_original_alone() -> None:
    """Its parameters are the original's very own; its forward cannot be, which is bound to the original."""
    model = models.Norm()
    before, own = Snapshot(model), model(X)
    kw.kernelize(model, NORM)
    twin = copy.copy(model)
    assert torch.equal(twin(X), own)
    assert twin.weight is model.weight
    kw.unkernelize(twin)
    assert ran(model, X)
    kw.unkernelize(model)
    assert before.differences(model) == []
    assert torch.equal(twin(X), own)


def test_what_somebody_kept_of_the_forward_works_after_undoing() -> None:
    model = models.Norm()
    own = model(X)
    kw.kernelize(model, NORM)
    kept = model.forward
    assert marked(kept(X))
    kw.unkernelize(model)
    assert torch.equal(kept(X), own)
    kw.kernelize(model, NORM)
    assert marked(kept(X))


LOADS = """
import sys
sys.path.insert(0, {tests!r})
import torch
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "kernelwise":
            raise ImportError("Kernelwise is not installed here")
sys.meta_path.insert(0, Finder())
import types
fake = types.ModuleType("kernelwise"); fake.KernelConfig = None
sys.modules["kernelwise"] = fake
import models
del sys.modules["kernelwise"]
model = torch.load({file!r}, weights_only=False)
ours = [k for m in model.modules() for k in m.__dict__ if k in ("forward", "_kernelwise", "__reduce_ex__", "__deepcopy__")]
print(ours, model(torch.load({x!r})).detach().double().sum().item(), "kernelwise" in sys.modules)
"""


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_a_file_loads_without_kernelwise_and_runs_the_models_own_code(tmp_path: Path, how: str) -> None:
    model = models.Stack(models.Norm(), models.Norm())
    own = model(X)
    kw.kernelize(model, NORM)
    file, x = tmp_path / "model.pt", tmp_path / "x.pt"
    if how == "torch":
        torch.save(model, file)
    else:
        loaded = pickle.loads(pickle.dumps(model))
        assert torch.equal(loaded(X), own)
        torch.save(loaded, file)
    torch.save(X, x)
    assert b"kernelwise" not in file.read_bytes()
    code = LOADS.format(tests=str(Path(__file__).parent), file=str(file), x=str(x))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False, env={"PATH": ""}
    )
    assert done.returncode == 0, done.stderr
    ours, total, known = done.stdout.rsplit(" ", 2)
    assert (ours, known.strip()) == ("[]", "False")
    assert float(total) == pytest.approx(own.double().sum().item(), abs=1e-6)
    assert ran(model, X)  # saving changed nothing


def test_a_pickle_holds_what_the_plain_model_holds() -> None:
    model = models.Stack(models.Norm(), models.OtherNorm())
    plain = pickle.dumps(model)
    kw.kernelize(model, NORM)
    assert pickle.dumps(model) == plain
    buffer = io.BytesIO()
    torch.save(model, buffer)
    assert b"kernelwise" not in buffer.getvalue()


def test_different_models_kernelized_by_several_threads() -> None:
    errors: list[BaseException] = []
    originals = [tiny() for _ in range(4)]
    before = [Snapshot(model) for model in originals]

    def work(model: nn.Module) -> None:
        try:
            for _ in range(5):
                kw.kernelize(
                    model, only({"RMSNorm": kernel(models.MarkedNorm), "rotary_pos_emb": kernel(models.GoodRotary)})
                )
                assert ran(model.norm, X)
                kw.unkernelize(model)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(model,)) for model in originals]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert [snapshot.differences(model) for snapshot, model in zip(before, originals, strict=True)] == [[]] * 4


def test_calls_go_on_while_another_thread_kernelizes_and_undoes() -> None:
    model = models.Stack(*(models.Norm() for _ in range(4)))
    own = model(X)
    errors: list[BaseException] = []
    stop = threading.Event()

    def call() -> None:
        try:
            while not stop.is_set():
                with torch.no_grad():
                    torch.testing.assert_close(model(X), own.detach())
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=call) for _ in range(2)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        config = only({"RMSNorm": kernel(models.GoodNorm)})
        plan = kw.plan(model, config)
        for _ in range(150):
            kw.apply(model, plan)
            kw.unkernelize(model)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(interval)
    assert errors == []


# -------------------------------------------------------------------------------- others who change the same modules


def test_a_wrapper_put_around_ours_stays_and_ours_becomes_a_pass_through() -> None:
    model = models.Norm()
    own = model(X)
    kw.kernelize(model, NORM)
    inner = model.forward

    def twice(*args: Any, **kwargs: Any) -> Tensor:
        return inner(*args, **kwargs) * 2

    model.forward = twice
    assert ran(model, X)
    kw.unkernelize(model)
    assert model.forward is twice
    assert torch.equal(model(X), own * 2)
    kw.kernelize(model, NORM)
    assert ran(model, X)
    assert model.forward is twice
    kw.unkernelize(model)
    del model.forward
    kw.unkernelize(model)
    assert torch.equal(model(X), own)


def test_a_wrapper_made_with_functools_wraps_is_not_taken_for_ours() -> None:
    model = models.Norm()
    own = model(X)
    kw.kernelize(model, NORM)
    inner = model.forward

    @functools.wraps(inner)
    def twice(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        return inner(*args, **kwargs) * 2

    wrapper = MethodType(twice, model)
    model.forward = wrapper
    kw.unkernelize(model)
    assert model.__dict__["forward"] is wrapper
    assert torch.equal(model(X), own * 2)


def test_a_forward_replaced_before_is_reported_and_left_alone() -> None:
    model = models.Stack(models.Norm())
    norm = model.layers[0]
    norm.forward = lambda x: x * 5
    before = Snapshot(model)
    kw.kernelize(model)
    kw.kernelize(model, NORM, on_miss="keep")
    assert torch.equal(model(X), X * 5)
    assert "replaced" in str(kw.report(model))
    with pytest.raises(kw.PlanError, match="replaced"):
        kw.kernelize(model, NORM)
    kw.unkernelize(model)
    assert before.differences(model) == []


def test_forward_hooks_run_around_the_kernel() -> None:
    model = models.Stack(models.Norm())
    seen: list[str] = []
    norm = model.layers[0]
    norm.register_forward_pre_hook(lambda *_: seen.append("before"))
    kw.kernelize(model, NORM)
    handle = norm.register_forward_hook(lambda *_: seen.append("after"))
    backward = norm.register_full_backward_hook(lambda *_: seen.append("backward"))
    output = model(X.clone().requires_grad_())
    assert marked(output)
    output.sum().backward()
    assert seen == ["before", "after", "backward"]
    kw.unkernelize(model)
    model(X)
    assert seen == ["before", "after", "backward", "before", "after"]
    handle.remove()
    backward.remove()


class Times(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.factor


@pytest.mark.parametrize("when", ["before", "after", "removed in between"])
def test_parametrizations(when: str) -> None:
    from torch.nn.utils import parametrize

    model = models.Stack(models.Norm())
    norm = model.layers[0]
    with torch.no_grad():
        plain = norm(X)
        if when == "before":
            parametrize.register_parametrization(norm, "weight", Times(3.0))
            before = Snapshot(model)
        kw.kernelize(model, NORM)
        if when != "before":
            parametrize.register_parametrization(norm, "weight", Times(3.0))
        torch.testing.assert_close(model(X) - models.MARK, plain * 3, atol=1e-3, rtol=0)
        twin = copy.deepcopy(model)
        torch.testing.assert_close(twin(X) - models.MARK, plain * 3, atol=1e-3, rtol=0)
        if when == "removed in between":
            parametrize.remove_parametrizations(norm, "weight", leave_parametrized=False)
            torch.testing.assert_close(model(X) - models.MARK, plain, atol=1e-3, rtol=0)
        kw.unkernelize(model)
        assert torch.equal(model(X), plain if when == "removed in between" else norm(X))
        assert not ran(model, X)
        assert not {STATE, "forward", "__reduce_ex__", "__deepcopy__"} & set(norm.__dict__)
        if when == "before":
            assert before.differences(model) == []


def hook(seen: list[str]) -> Any:
    from accelerate.hooks import ModelHook

    class Seen(ModelHook):
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            seen.append("hook")
            return args, kwargs

    return Seen()


def test_a_hook_of_accelerate_before_ours_stays_outside() -> None:
    from accelerate.hooks import add_hook_to_module, remove_hook_from_module

    model, seen = models.Stack(models.Norm()), []
    norm = model.layers[0]
    own = model(X)
    add_hook_to_module(norm, hook(seen))
    before = Snapshot(model)
    kw.kernelize(model, NORM)
    assert ran(model, X)
    assert seen == ["hook"]
    kw.unkernelize(model)
    assert before.differences(model) == []
    assert torch.equal(model(X), own)
    assert seen == ["hook", "hook"]
    remove_hook_from_module(norm)
    assert torch.equal(model(X), own)


def test_a_hook_of_accelerate_after_ours_stays_outside() -> None:
    from accelerate.hooks import add_hook_to_module, remove_hook_from_module

    model, seen = models.Stack(models.Norm()), []
    norm = model.layers[0]
    own = model(X)
    kw.kernelize(model, NORM)
    add_hook_to_module(norm, hook(seen))
    assert ran(model, X)
    kw.unkernelize(model)
    assert torch.equal(model(X), own)
    assert seen == ["hook", "hook"]
    assert STATE not in norm.__dict__
    kw.kernelize(model, NORM)
    assert ran(model, X)
    assert seen == ["hook"] * 3
    remove_hook_from_module(norm)
    assert ran(model, X)
    kw.unkernelize(model)
    assert torch.equal(model(X), own)
    assert STATE not in norm.__dict__


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_hook_of_accelerate_removed_while_ours_is_in(when: str) -> None:
    from accelerate.hooks import add_hook_to_module, remove_hook_from_module

    model, seen = models.Stack(models.Norm()), []
    norm = model.layers[0]
    own = model(X)
    if when == "before":
        add_hook_to_module(norm, hook(seen))
    kw.kernelize(model, NORM)
    if when == "after":
        add_hook_to_module(norm, hook(seen))
    remove_hook_from_module(norm)
    assert ran(model, X)
    assert seen == []
    kw.unkernelize(model)
    assert torch.equal(model(X), own)
    assert not {STATE, "__reduce_ex__", "__deepcopy__", "_old_forward", "_hf_hook"} & set(norm.__dict__)
    if when == "after":
        assert "forward" not in norm.__dict__


def test_weights_that_accelerate_offloads() -> None:
    from accelerate import cpu_offload

    model = models.Stack(models.Norm(), models.Norm())
    own = model(X)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.layers[0].weight.device.type == "meta"
    before = Snapshot(model)
    kw.kernelize(model, NORM)
    kw.unkernelize(model)
    assert before.differences(model) == []
    kw.kernelize(model, NORM)
    assert ran(model, X)
    assert model.layers[0].weight.device.type == "meta"
    kw.unkernelize(model)
    assert torch.equal(model(X), own)


# ------------------------------------------------------------------------------------------------------------ tensors


class Wrapped(Tensor):
    """A tensor subclass as quantisation and sharding use them."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_function__(func, types, args, kwargs or {})


def role_plan(
    model: nn.Module, function: Any, *, dtypes: tuple[str, ...] = ("float32", "bfloat16"), op: str = "rms_norm"
) -> Plan:
    """A plan that puts a function by roles into every recognised norm, or layer of another operation."""
    from kernelwise._data import Decision, Limits

    found = Kernel(
        KernelRef("builtin", "", "RMSNorm"),
        op,
        Limits(devices=("cpu",), dtypes=dtypes),
        can_torch_compile=True,
        function=function,
    )
    layers = [layer for layer in kw.discover(model) if layer.recognition is not None and layer.recognition.op == op]
    assert layers
    modes = ("inference", "training")
    return Plan(Target("cpu"), tuple(Decision(layer, mode, found, "default") for layer in layers for mode in modes))


def role_norm(x: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0, cast: str = "before") -> Tensor:
    assert type(x) is Tensor
    assert type(weight) in (Tensor, nn.Parameter)
    wide = x.float()
    return (offset + weight) * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) + models.MARK


def test_a_kernel_by_roles_gets_the_layers_own_values() -> None:
    model = models.Stack(models.Norm(eps=0.25))
    own = model(X)
    kw.apply(model, role_plan(model, role_norm))
    torch.testing.assert_close(model(X) - models.MARK, own, atol=1e-3, rtol=0)
    model.layers[0].variance_epsilon = 4.0
    assert not torch.allclose(model(X) - models.MARK, own, atol=1e-3)


def test_tensor_subclasses_take_the_own_code_and_are_counted() -> None:
    model = models.Stack(models.Norm())
    kw.apply(model, role_plan(model, role_norm))
    with torch.no_grad():
        assert not marked(model(X.as_subclass(Wrapped)))
        model.layers[0].weight = nn.Parameter(model.layers[0].weight.detach().as_subclass(Wrapped))
        assert not marked(model(X))
    assert sum(count for _, count in kw.report(model).rows[0].fallbacks) == 2


def test_tensor_subclasses_take_the_own_code_for_layer_classes_too() -> None:
    model = models.Stack(models.Norm())
    kw.kernelize(model, NORM)
    with torch.no_grad():
        assert not marked(model(X.as_subclass(Wrapped)))
        model.layers[0].weight = nn.Parameter(model.layers[0].weight.detach().as_subclass(Wrapped))
        assert not marked(model(X))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_another_dtype_after_kernelize(dtype: torch.dtype) -> None:
    for config in (None, only({"RMSNorm": kernel(models.GoodNorm)})):
        model = models.Stack(models.Norm())
        expected = copy.deepcopy(model).to(dtype)(X.to(dtype))
        if config is None:
            kw.apply(model, role_plan(model, role_norm, dtypes=("float32",)))
        else:
            kw.kernelize(model, config)
        output = model.to(dtype)(X.to(dtype))
        assert output.dtype == dtype
        torch.testing.assert_close(output, expected)


def test_autocast() -> None:
    model = tiny()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        own = model(IDS)
        kw.kernelize(model, only({"RMSNorm": kernel(models.GoodNorm), "rotary_pos_emb": kernel(models.GoodRotary)}))
        assert torch.equal(model(IDS), own)


# ------------------------------------------------------------------------------------------------- function kernels


def test_a_function_kernel_changes_only_the_model_it_was_asked_for() -> None:
    one, other = models.TwoFunctions(), models.TwoFunctions()
    before, after = Snapshot(one), Snapshot(other)
    function = models.double
    wrapper = Snapshot(function)
    kw.kernelize(one, only({"double": kernel(models.MarkedDouble)}), device="cpu")
    assert ran(one, X)
    assert not ran(other, X)
    assert not ran(function, X)
    assert models.double is function
    assert after.differences(other) == []
    assert wrapper.differences(function) == []
    kw.unkernelize(one)
    assert before.differences(one) == []
    assert not ran(one, X)


def test_two_functions_in_one_forward_go_in_and_out_apart() -> None:
    model = models.TwoFunctions()
    before, own = Snapshot(model), model(X)
    kw.kernelize(model, only({"double": kernel(models.MarkedDouble)}), device="cpu")
    kw.kernelize(model, only({"triple": kernel(models.MarkedTriple)}), device="cpu")
    torch.testing.assert_close(model(X) - 3 * models.MARK, own, atol=1e-3, rtol=0)
    kw.unkernelize(model, paths=["double"])
    torch.testing.assert_close(model(X) - 2 * models.MARK, own, atol=1e-3, rtol=0)
    kw.unkernelize(model, paths=["triple"])
    assert before.differences(model) == []
    kw.kernelize(
        model, only({"triple": kernel(models.MarkedTriple), "double": kernel(models.MarkedDouble)}), device="cpu"
    )
    torch.testing.assert_close(model(X) - 3 * models.MARK, own, atol=1e-3, rtol=0)
    kw.unkernelize(model)
    assert before.differences(model) == []
    assert torch.equal(model(X), own)


def test_a_forward_decorated_with_wraps_is_rebuilt_with_its_decorator() -> None:
    model = models.DecoratedForward()
    before, own = Snapshot(model), model(X)
    kw.kernelize(model, only({"double": kernel(models.MarkedDouble)}), device="cpu")
    assert ran(model, X)
    assert not ran(models.DecoratedForward(), X)
    kw.unkernelize(model)
    assert before.differences(model) == []
    assert torch.equal(model(X), own)


def test_a_function_called_in_nested_code_is_changed_or_unknown() -> None:
    model = models.InsideComprehension()
    own = model(X)
    kw.kernelize(model, only({"double": kernel(models.MarkedDouble)}), device="cpu", on_miss="keep")
    rows = [row for row in kw.report(model).rows if row.name == "double"]
    assert rows
    assert ran(model, X) == (rows[0].kernel is not None)
    kw.unkernelize(model)
    assert torch.equal(model(X), own)


@pytest.mark.parametrize("cls", [models.ThroughHelper, models.UncopyableForward, models.WritesGlobal])
def test_a_forward_that_cannot_be_rebuilt_is_reported_unknown(cls: type[nn.Module]) -> None:
    model = cls()
    own = model(X)
    before = Snapshot(model)
    kw.kernelize(model, device="cpu")  # a wish is no error
    config = only({"double": kernel(models.MarkedDouble)})
    kw.kernelize(model, config, device="cpu", on_miss="keep")
    assert torch.equal(model(X), own)
    row = next(row for row in kw.report(model).rows if row.name == "double")
    assert row.kernel is None
    assert row.reason
    with pytest.raises(kw.PlanError, match="double"):
        kw.kernelize(model, config, device="cpu")
    kw.unkernelize(model)
    assert before.differences(model) == []


# ------------------------------------------------------------------------------------------------------ torch.compile


@pytest.mark.usefixtures("fresh_compiler")
class TestCompile:
    """With the graph whole (`fullgraph`), and no recompiling."""

    @staticmethod
    def counting(graphs: list[Any]) -> Any:
        def backend(graph: Any, inputs: Any) -> Any:
            graphs.append(graph)
            return graph.forward

        return backend

    def test_after(self) -> None:
        graphs: list[Any] = []
        model = tiny()
        own = model(IDS)
        kw.kernelize(model, only({"RMSNorm": kernel(models.GoodNorm), "rotary_pos_emb": kernel(models.MarkedRotary)}))
        expected = model(IDS)
        compiled = torch.compile(model, fullgraph=True, backend=self.counting(graphs))
        for _ in range(4):
            torch.testing.assert_close(compiled(IDS), expected)
        assert len(graphs) == 1
        assert not torch.allclose(expected, own)

    def test_before(self) -> None:
        graphs: list[Any] = []
        model = models.Stack(models.Norm(), models.Norm())
        compiled = torch.compile(model, fullgraph=True, backend=self.counting(graphs))
        own = compiled(X)
        kw.kernelize(model, NORM)
        for _ in range(3):
            assert marked(compiled(X))
        assert len(graphs) == 2
        kw.unkernelize(model)
        for _ in range(3):
            assert torch.equal(compiled(X), own)
        assert len(graphs) <= 3

    def test_functions_before(self) -> None:
        graphs: list[Any] = []
        model = models.TwoFunctions()
        compiled = torch.compile(model, fullgraph=True, backend=self.counting(graphs))
        own = compiled(X)
        kw.kernelize(model, only({"double": kernel(models.MarkedDouble)}), device="cpu")
        assert marked(compiled(X))
        kw.unkernelize(model)
        assert torch.equal(compiled(X), own)

    def test_undone_after_compiling_runs_the_own_code(self) -> None:
        graphs: list[Any] = []
        model = models.Stack(models.Norm(), models.Norm())
        own = model(X)
        kw.kernelize(model, NORM)
        compiled = torch.compile(model, fullgraph=True, backend=self.counting(graphs))
        assert marked(compiled(X))
        kw.unkernelize(model)
        assert torch.equal(compiled(X), own)

    def test_a_counter_does_not_recompile(self) -> None:
        """The kernel without backward falls back at every call in training, which is counted outside the graph only."""
        graphs: list[Any] = []
        model = models.Stack(models.Norm())
        own = model(X)
        kw.kernelize(model, only({"RMSNorm": kernel(models.ForwardOnlyNorm)}))
        compiled = torch.compile(model, fullgraph=True, backend=self.counting(graphs))
        for _ in range(12):
            torch.testing.assert_close(compiled(X), own)
        assert len(graphs) == 1
        for _ in range(3):
            model(X)  # counts, eagerly
            compiled(X)
        assert len(graphs) == 1

    def test_a_kernel_that_does_not_compile_leaves_the_graph_whole(self) -> None:
        graphs: list[Any] = []
        model = models.Stack(models.Norm())
        own = model(X)
        kw.kernelize(model, only({"RMSNorm": kernel(models.UncompilableNorm)}))
        assert marked(model(X))
        compiled = torch.compile(model, fullgraph=True, backend=self.counting(graphs))
        for _ in range(3):
            torch.testing.assert_close(compiled(X), own)
        assert len(graphs) == 1

    def test_train_and_eval_take_one_graph_each(self) -> None:
        graphs: list[Any] = []
        model = models.Stack(models.Norm())
        kw.kernelize(
            model,
            only({"RMSNorm": {"inference": kernel(models.MarkedNorm), "training": kernel(models.TwiceMarkedNorm)}}),
        )
        compiled = torch.compile(model, fullgraph=True, backend=self.counting(graphs))
        for _ in range(3):
            assert (compiled.eval()(X) < 1.5 * models.MARK).all()
            assert (compiled.train()(X) > 1.5 * models.MARK).all()
        assert len(graphs) == 2

    def test_compiled_in_place(self) -> None:
        graphs: list[Any] = []
        model = models.Stack(models.Norm())
        own = model(X)
        model.compile(fullgraph=True, backend=self.counting(graphs))
        kw.kernelize(model, NORM)
        assert marked(model(X))
        kw.unkernelize(model)
        assert torch.equal(model(X), own)

    def test_the_compiled_model_itself_can_be_kernelized(self) -> None:
        graphs: list[Any] = []
        model = models.Stack(models.Norm())
        compiled = torch.compile(model, fullgraph=True, backend=self.counting(graphs))
        own = compiled(X)
        before = Snapshot(compiled)
        kw.kernelize(compiled, NORM)
        assert marked(compiled(X))
        kw.unkernelize(compiled)
        assert torch.equal(compiled(X), own)
        assert before.differences(compiled) == []

    def test_a_kernel_by_roles(self) -> None:
        graphs: list[Any] = []
        model = models.Stack(models.Norm())

        def plain(x: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0, cast: str = "before") -> Tensor:
            return x * weight + models.MARK

        kw.apply(model, role_plan(model, plain))
        compiled = torch.compile(model, fullgraph=True, backend=self.counting(graphs))
        for _ in range(3):
            assert marked(compiled(X))
        assert len(graphs) == 1
