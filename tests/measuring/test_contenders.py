"""Contenders that change a model as a whole, by torch.compile or by kernels of others: seen, and gone after their turns."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from types import MethodType, ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from fakehub import kernel_files, write_files
from racing import SECONDS, found_in
from torch import Tensor, nn

from kernelwise._measuring import _contenders
from kernelwise._measuring._bench import bench, evidence
from kernelwise._measuring._race import sharing_copy
from kernelwise._models import load_model

# ------------------------------------------------------------------------------------------------------------ torch.compile


@pytest.fixture
def quick_compile(monkeypatch: pytest.MonkeyPatch, fresh_compiler: None) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))


def test_compiled_contenders_decode(llama: Any, inputs: Any, quick_compile: None) -> None:
    runs = bench(
        llama, inputs, contenders=["torch.compile", "builtin+compile"], workloads=["decode"], steps=3, seconds=SECONDS
    )
    assert [run.error for run in runs] == [None] * 3
    first = [run.comparison.first_s or 0.0 for run in runs if run.comparison is not None]
    assert first[1] > first[0]  # compiling is in it
    found = evidence(llama, runs, name="llama")
    assert any("static cache" in note for note in found.notes)


def test_compiling_again_and_again_is_an_error(monkeypatch: pytest.MonkeyPatch, quick_compile: None) -> None:
    monkeypatch.setattr(_contenders, "MAX_COMPILATIONS", 2)

    class EverNew(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.key = nn.Linear(2, 2), ""

        def forward(self, input: Tensor) -> Tensor:
            self.key = self.key + "a"
            out: Tensor = self.linear(input)
            return out + len(self.key) * 0

    runs = bench(EverNew(), torch.ones(1, 2), contenders=["torch.compile"], workloads=["forward"], seconds=SECONDS)
    assert "recompile" in (found_in(runs, "torch.compile").error or "").lower()


# -------------------------------------------------------------------------------------------------- kernels of others


@pytest.fixture
def fake_liger(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A package that patches like Liger: functions of transformers for everybody, layers of the given model."""
    from transformers.models.llama import modeling_llama

    seen = SimpleNamespace(rotations=0, norms=0, was=modeling_llama.apply_rotary_pos_emb, module=modeling_llama)

    def rotate(*args: Any, **kwargs: Any) -> Any:
        seen.rotations += 1
        return seen.was(*args, **kwargs)

    def patch(model: Any) -> None:
        seen.module.apply_rotary_pos_emb = rotate
        seen.module.LlamaMLP.forward, seen.mlp = (lambda self, x: mlp(self, x)), seen.module.LlamaMLP.forward
        norm = model.model.norm

        def forward(self: Any, x: Tensor) -> Any:
            seen.norms += 1
            return type(self).forward(self, x)

        norm.forward = MethodType(forward, norm)

    mlp = modeling_llama.LlamaMLP.forward
    package, transformers, patches = (ModuleType(n) for n in ("liger_kernel", "liger_kernel.transformers", "patches"))
    patches.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": patch}  # type: ignore[attr-defined]
    patches._apply_liger_kernel_to_instance = patch  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", transformers)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", patches)
    monkeypatch.setattr(_contenders, "_runs_triton", lambda model: True)
    seen.mlp = mlp
    yield seen
    modeling_llama.apply_rotary_pos_emb, modeling_llama.LlamaMLP.forward = seen.was, mlp


def test_liger_is_there_during_its_own_turns_alone(llama: Any, inputs: Any, fake_liger: SimpleNamespace) -> None:
    seen: list[bool] = []
    llama.model.embed_tokens.register_forward_hook(
        lambda *_: seen.append(fake_liger.module.apply_rotary_pos_emb is fake_liger.was)
    )
    try:
        runs = bench(llama, inputs, contenders=["builtin", "liger"], workloads=["prefill"], seconds=SECONDS)
    finally:
        llama.model.embed_tokens._forward_hooks.clear()
    assert [run.error for run in runs] == [None] * 3
    assert fake_liger.norms
    assert fake_liger.rotations
    assert True in seen
    assert False in seen
    assert fake_liger.module.apply_rotary_pos_emb is fake_liger.was
    assert fake_liger.module.LlamaMLP.forward is fake_liger.mlp
    assert "forward" not in vars(llama.model.norm)


def test_liger_has_no_patch_for_every_model(inputs: Any, fake_liger: SimpleNamespace) -> None:
    model = load_model("gpt2").model
    runs = bench(model, inputs, contenders=["liger"], workloads=["prefill"], seconds=SECONDS)
    assert "no patch for models of type 'gpt2'" in (found_in(runs, "liger").error or "")


def test_transformers_runs_its_kernels(llama: Any, inputs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What transformers puts in is seen, on the copy alone; that it put in nothing is said."""
    model: Any = sharing_copy(llama)
    calls: list[bool] = []

    def kernel(self: Any, hidden_states: Tensor) -> Any:
        calls.append(self.training)
        return type(self).forward(self, hidden_states)

    def use_kernels(self: Any, wanted: bool) -> None:
        for module in self.modules():
            if type(module).__name__ == "LlamaRMSNorm":
                module.forward = MethodType(kernel, module)
            elif type(module).__name__ == "LlamaMLP":
                module.forward = MethodType(type(module).forward, module)  # as where none could be loaded

    monkeypatch.setattr(type(model), "set_use_kernels", use_kernels)
    runs = bench(model, inputs, contenders=["transformers"], workloads=["prefill", "training"], seconds=SECONDS)
    assert [run.error for run in runs] == [None] * 4
    assert set(calls) == {True, False}
    assert "forward" not in vars(model.model.norm)
    monkeypatch.undo()


def test_kernels_that_transformers_loads_are_seen(llama: Any, inputs: Any, tmp_path: Path) -> None:
    """With the libraries as they are, and a repository of kernels on this machine."""
    from kernels import LocalLayerRepository, Mode, use_kernel_mapping
    from kernels.layer.kernelize import _KERNEL_MAPPING

    source = (
        "import torch\nfrom torch import nn\n"
        "class RMSNorm(nn.Module):\n"
        "    has_backward = True\n"
        "    def forward(self, hidden_states):\n"
        "        return torch.rms_norm(hidden_states, (hidden_states.shape[-1],), self.weight, self.variance_epsilon)FAULT\n"
    )
    found = {}
    for name, fault in (("right", ""), ("wrong", " * 1.01")):
        folder = write_files(tmp_path / name, kernel_files("norm", layers=source.replace("FAULT", fault)))
        repository = LocalLayerRepository(repo_path=folder, layer_name="RMSNorm")
        with use_kernel_mapping({"RMSNorm": {"cpu": {Mode.INFERENCE: repository}}}):
            known = set(_KERNEL_MAPPING.get())  # other tests may have had transformers register its own for good
            runs = bench(llama, inputs, contenders=["transformers"], workloads=["prefill"], seconds=SECONDS)
            assert set(_KERNEL_MAPPING.get()) == known  # what transformers registers is gone
        found[name] = found_in(runs, "transformers").error
    assert found["right"] is None
    assert "differ from eager's" in (found["wrong"] or "")
    assert "forward" not in vars(llama.model.norm)


def test_transformers_without_kernels_for_this_machine(llama: Any, inputs: Any) -> None:
    if torch.cuda.is_available():
        pytest.skip("there may be kernels in the cache of this machine")
    runs = bench(llama, inputs, contenders=["transformers"], workloads=["prefill"], seconds=SECONDS)
    assert "could be loaded for this model on cpu" in (found_in(runs, "transformers").error or "")
