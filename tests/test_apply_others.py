"""A kernelized model that is copied, saved, used by several threads, and changed by others too."""

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

import fakes
import models
import pytest
import torch
from fakes import kernel, marked, only
from models import IDS, tiny
from snapshot import Snapshot
from test_apply import ran
from torch import Tensor, nn

import kernelwise as kw
from kernelwise._discover import STATE

NORM = only({"RMSNorm": kernel(fakes.MarkedNorm)})
X = torch.randn(2, 3, 8)


# --------------------------------------------------------------------------------------------- copies, files, threads


def test_a_deep_copy_is_kernelized_reportable_and_undoable_apart() -> None:
    model = tiny()
    own = model(IDS)
    kw.kernelize(model, only({"RMSNorm": kernel(fakes.MarkedNorm), "rotary_pos_emb": kernel(fakes.GoodRotary)}))
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
    model = kw.kernelize(models.Stack(models.Norm()), only({"RMSNorm": kernel(fakes.ForwardOnlyNorm)}))
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
                    model, only({"RMSNorm": kernel(fakes.MarkedNorm), "rotary_pos_emb": kernel(fakes.GoodRotary)})
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
        config = only({"RMSNorm": kernel(fakes.GoodNorm)})
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
        torch.testing.assert_close(model(X) - fakes.MARK, plain * 3, atol=1e-3, rtol=0)
        twin = copy.deepcopy(model)
        torch.testing.assert_close(twin(X) - fakes.MARK, plain * 3, atol=1e-3, rtol=0)
        if when == "removed in between":
            parametrize.remove_parametrizations(norm, "weight", leave_parametrized=False)
            torch.testing.assert_close(model(X) - fakes.MARK, plain, atol=1e-3, rtol=0)
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
