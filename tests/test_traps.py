"""One test for each trap that the peers of this library fall into and that concerns the core."""

from __future__ import annotations

import copy
import pickle
import threading
from pathlib import Path
from typing import Any

import fakes
import models
import pytest
import torch
from fakes import kernel, marked, only
from models import IDS, tiny
from snapshot import Snapshot
from torch import Tensor, nn

import kernelwise as kw
from kernelwise._data import Decision, Kernel, KernelRef, Limits, Plan, Target

X = torch.linspace(-1, 1, 16).view(2, 8)

LAYERS = """
import torch
from torch import nn


class RMSNorm(nn.Module):
    can_torch_compile = True

    def forward(self, hidden_states):
        return hidden_states * self.weight + {mark}
"""


def repository(folder: Path, layers: str, *, backend: str = '{"type": "cpu"}', variant: str = "torch-cpu") -> Path:
    """Write a kernel repository of one layer."""
    build = folder / "build" / variant
    build.mkdir(parents=True, exist_ok=True)
    (build / "__init__.py").write_text("from . import layers\n")
    (build / "layers.py").write_text(layers)
    (build / "metadata.json").write_text(
        f'{{"name": "{folder.name}", "id": "_{folder.name.replace("-", "_")}", "version": 1, "license": "MIT", '
        f'"python-depends": [], "backend": {backend}}}'
    )
    return folder


def test_gradients_lost_without_a_word() -> None:
    """A kernel claims a backward by default; where it has none, the peers train with gradients that are None."""
    model = models.Stack(models.Norm(), models.Norm())
    own = torch.autograd.grad(model(X).sum(), list(model.parameters()))
    kw.kernelize(model, only({"RMSNorm": kernel(fakes.LyingNorm)}))
    model(X).sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    assert all(g is not None and torch.equal(g, o) for g, o in zip(gradients, own, strict=True))


def test_hooks_of_accelerate_are_destroyed_even_when_nothing_is_replaced() -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Counting(ModelHook):
        calls = 0

        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            Counting.calls += 1
            return args, kwargs

    model = models.Stack(models.Norm(), models.Norm())
    for layer in model.layers:
        add_hook_to_module(layer, Counting())
    before = Snapshot(model)
    kw.kernelize(model, only({"RMSNorm": None}))
    model(X)
    assert Counting.calls == 2
    kw.kernelize(model, only({"RMSNorm@layers.0": kernel(fakes.MarkedNorm)}))
    model(X)
    assert Counting.calls == 4
    kw.unkernelize(model)
    assert before.differences(model) == []


def test_a_function_kernel_is_one_object_so_kernelizing_one_model_changes_another() -> None:
    first, second = tiny(), tiny()
    own = second(IDS)
    kw.kernelize(first, only({"rotary_pos_emb": kernel(fakes.MarkedRotary)}))
    assert not torch.allclose(first(IDS), own)
    assert torch.equal(second(IDS), own)
    assert "forward" not in models.apply_rotary_pos_emb.__dict__


@pytest.mark.parametrize(
    ("layers", "options"),
    [
        ("import not_installed_anywhere\n", {}),
        ("raise OSError('libcuda.so.1: cannot open shared object file')\n", {}),
        ("raise RuntimeError('no kernel image is available')\n", {}),
        ("raise SystemExit(1)\n", {}),
        (LAYERS.format(mark=0), {"variant": "torch-cuda", "backend": '{"type": "cuda", "archs": ["9.0"]}'}),
        ("class Other: pass\n", {}),
        (LAYERS.format(mark=0) + "    def __init__(self):\n        super().__init__()\n", {}),
        (LAYERS.format(mark=0).replace("(self, hidden_states)", "(self, hidden_states, other)"), {}),
    ],
)
def test_an_error_while_loading_leaves_the_model_half_changed(tmp_path: Path, layers: str, options: Any) -> None:
    """The kernel that fails belongs to the last layer, after others have loaded."""
    bad = repository(tmp_path / "bad-kernel", layers, **options)
    model = models.Stack(models.Norm(), models.Affine(), models.Norm())
    before, own = Snapshot(model), model(X)
    mapping = {"Affine": kernel(fakes.MarkedAffine), "RMSNorm": kernel(fakes.MarkedNorm)}
    with pytest.raises(kw.KernelwiseError):
        kw.kernelize(model, only(mapping | {"RMSNorm@layers.2": f"{bad}:RMSNorm"}))
    assert before.differences(model) == []
    assert torch.equal(model(X), own)


def test_classes_of_one_registered_name_compute_different_things() -> None:
    """A norm that rounds after the weight, under the name of one that rounds before: a kernel by roles is told so."""

    class After(models.Norm):
        kernel_layer_name = "RMSNorm"

        def forward(self, hidden_states: Tensor) -> Tensor:
            wide = hidden_states.to(torch.float32)
            wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
            return (self.weight.to(torch.float32) * wide).to(hidden_states.dtype)

    def rms_norm(x: Tensor, weight: Tensor, eps: float, *, offset: float, cast: str) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        return (weight.float() * wide).to(x.dtype) if cast == "after" else weight * wide.to(x.dtype)

    model = models.Stack(models.Norm(512), After(512)).to(torch.bfloat16).eval()
    x = torch.randn(64, 512, dtype=torch.bfloat16)
    own = [layer(x) for layer in model.layers]
    assert not torch.equal(*own)
    by_roles = Kernel(KernelRef("builtin", "", "RMSNorm"), "rms_norm", Limits(("cpu",)), function=rms_norm)
    decisions = [
        Decision(layer, mode, by_roles, "default")
        for layer in kw.discover(model)
        for mode in ("inference", "training")
        if layer.name == "RMSNorm"
    ]
    kw.apply(model, Plan(Target("cpu"), tuple(decisions)))
    assert [torch.equal(layer(x), output) for layer, output in zip(model.layers, own, strict=True)] == [True, True]


def test_a_subclass_that_overrides_forward_still_gets_its_parents_kernel() -> None:
    model = models.Stack(models.OtherNorm(), models.Norm())
    own = model.layers[0](X)
    kw.kernelize(model, only({"RMSNorm": kernel(fakes.MarkedNorm)}))
    assert torch.equal(model.layers[0](X), own)
    assert marked(model.layers[1](X))


def test_the_documented_multi_device_dict_raises() -> None:
    model = models.Stack(models.Norm())
    kw.kernelize(model, only({"RMSNorm": {"cuda": "a/b:C", "rocm": "a/d:C", "cpu": kernel(fakes.MarkedNorm)}}))
    assert marked(model(X))


def test_an_entry_for_cuda_is_applied_on_another_device() -> None:
    model = models.Stack(models.Norm())
    own = model(X)
    kw.kernelize(model, only({"RMSNorm": {"cuda": kernel(fakes.MarkedNorm)}}))
    assert torch.equal(model(X), own)


def test_a_config_works_once() -> None:
    config = only({"RMSNorm": kernel(fakes.MarkedNorm)})
    for _ in range(3):
        model = tiny()
        kw.kernelize(model, config)
        kw.kernelize(model, copy.deepcopy(config))
        assert marked(model.norm(X))
        kw.unkernelize(model)
        assert not marked(model.norm(X))


def test_the_kernel_is_lost_after_train() -> None:
    model = kw.kernelize(models.Stack(models.Norm()), only({"RMSNorm": kernel(fakes.MarkedNorm)}))
    for mode in (True, False, True):
        assert marked(model.train(mode)(X))


@pytest.mark.parametrize(
    "value",
    [
        ("a/b:C", {"version": 1, "revision": "main"}),
        ("a/b:C", {}),
        ("a/b:C", {"version": True}),
        ("a/b:C", {"version": -1}),
        ("a/b:C", {"verison": 1}),
        ("a/b:C", {"version": 1, "trust_remote_code": ["a/b"]}),
        "a/b:",
        "a/b:L:extra",
        "a/../b:C",
        "https://huggingface.co/a/b:C",
        "a/b\0:C",
        "../..:C",
        ["a/b:C"],
        {},
        {"gpu": "a/b:C"},
    ],
)
def test_bad_references_pass_the_check_and_fail_later(value: Any) -> None:
    model = tiny()
    before = Snapshot(model)
    for call in (kw.plan, kw.kernelize):
        with pytest.raises(kw.KernelConfigError, match="RMSNorm"):
            call(model, kw.KernelConfig({"RMSNorm": value}))
    assert before.differences(model) == []


def test_the_signature_is_checked_for_the_first_class_only() -> None:
    """Two classes under one name: the kernel fits the first and not the second, also when it has been loaded before."""

    class Residual(nn.Module):
        kernel_layer_name = "RMSNorm"

        def __init__(self) -> None:
            super().__init__()
            self.weight, self.variance_epsilon = nn.Parameter(torch.ones(8)), 1e-6

        def forward(self, hidden_states: Tensor, residual: Tensor) -> Tensor:
            return hidden_states + residual

    config = only({"RMSNorm": kernel(fakes.MarkedNorm)})
    kw.kernelize(models.Stack(models.Norm()), config)
    model = models.Stack(models.Norm(), Residual())
    before = Snapshot(model)
    with pytest.raises(kw.PlanError, match="residual"):
        kw.kernelize(model, config)
    assert before.differences(model) == []


def test_the_names_of_arguments_are_never_checked() -> None:
    """The kernel takes the layer's arguments in another order: bound by position alone it would subtract the wrong way."""

    class Subtract(nn.Module):
        kernel_layer_name = "Subtract"

        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return left - right

    with pytest.raises(kw.PlanError, match="another position"):
        kw.kernelize(Subtract(), only({"Subtract": kernel(fakes.Swapped)}), device="cpu")


def test_active_mappings_are_invisible_in_worker_threads() -> None:
    model = tiny()
    worker = threading.Thread(target=kw.kernelize, args=(model, only({"RMSNorm": kernel(fakes.MarkedNorm)})))
    worker.start()
    worker.join()
    assert marked(model.norm(X))


def test_a_kernel_edited_on_disk_is_not_reloaded(tmp_path: Path) -> None:
    """The length of the file and its second of change may stay the same."""
    folder = repository(tmp_path / "edited-kernel", LAYERS.format(mark=1000.0))
    model = models.Stack(models.Norm())
    config = only({"RMSNorm": f"{folder}:RMSNorm"})
    kw.kernelize(model, config)
    assert marked(model(X))
    first = kw.report(model).rows[0].content_hash
    repository(folder, LAYERS.format(mark=2000.0))
    assert (model(X) < 1500).all()  # what runs does not change under its user
    kw.unkernelize(model)
    kw.kernelize(model, config)
    assert (model(X) > 1500).all()
    assert kw.report(model).rows[0].content_hash != first


def test_pickle_silently_drops_kernels() -> None:
    """It does so here as well, which the report says; a deep copy keeps them."""
    model = kw.kernelize(models.Stack(models.Norm()), only({"RMSNorm": kernel(fakes.MarkedNorm)}))
    loaded = pickle.loads(pickle.dumps(model))
    assert not marked(loaded(X))
    assert "no kernels" in str(kw.report(loaded))
    assert marked(copy.deepcopy(model)(X))


def test_named_modules_hides_shared_layers() -> None:
    model = models.Shared()
    (row, *_) = kw.report(kw.kernelize(model, only({"RMSNorm": kernel(fakes.MarkedNorm)}))).rows
    assert row.paths == ("first", "second")
    kw.unkernelize(model, paths=["second"])
    assert not marked(model.second(X))
