from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from kernelwise._data import KernelRef
from kernelwise._errors import KernelLoadError
from kernelwise.sources import builtin, builtin_refs, describe, load
from kernelwise.sources._export import export
from kernelwise.sources._layer_class import class_problem

Refuse = Callable[..., KernelLoadError]


def of(layer: str) -> KernelRef:
    return KernelRef("builtin", "", layer)


@pytest.mark.parametrize(
    ("op", "device", "layers"),
    [
        ("rms_norm", "cpu", ["RMSNorm"]),
        ("rms_norm", "cuda", ["RMSNorm"]),
        ("gated_mlp", "cuda", ["SwiGLUMLP", "GEGLUMLP"]),
        ("rotary", "cpu", ["rotary_pos_emb"]),
        ("linear", "cpu", ["Linear"]),
        ("linear", "cuda", []),
        ("rms_norm", "mps", []),
        ("unheard_of", "cpu", []),
    ],
)
def test_builtin_refs(op: str, device: str, layers: list[str]) -> None:
    assert [ref.layer for ref in builtin_refs(op, device=device)] == layers


@pytest.mark.parametrize("layer", ["RMSNorm", "SwiGLUMLP", "GEGLUMLP", "rotary_pos_emb"])
def test_a_loaded_kernel_is_what_was_described(layer: str) -> None:
    kernel, described = load(of(layer), device="cpu"), describe(of(layer), device="cpu")
    assert described is not None
    assert (kernel.op, kernel.limits, kernel.has_backward, kernel.can_torch_compile) == (
        described.op,
        described.limits,
        True,
        True,
    )
    assert described.function is None
    assert kernel.function is not None
    assert len(kernel.content_hash or "") == 64


def test_a_builtin_kernel_takes_the_roles_of_its_operation() -> None:
    kernel = load(of("RMSNorm"), device="cpu")
    assert [p.name for p in kernel.signature] == ["x", "weight", "eps", "offset", "cast"]
    x, weight = torch.randn(3, 8), torch.randn(8)
    assert kernel.function is not None
    expected = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * weight
    torch.testing.assert_close(kernel.function(x, weight, 1e-5), expected)


def test_the_two_gated_mlps_differ_in_their_activations() -> None:
    silu, gelu = describe(of("SwiGLUMLP"), device="cpu"), describe(of("GEGLUMLP"), device="cpu")
    assert silu is not None
    assert gelu is not None
    assert dict(silu.limits.options) == {"activation": ("silu",)}
    assert dict(gelu.limits.options) == {"activation": ("gelu", "gelu_tanh")}


def test_describing_for_another_machine_needs_nothing_of_it() -> None:
    kernel = describe(of("RMSNorm"), device="cuda")
    assert kernel is not None
    assert kernel.limits.devices == ("cuda",)
    assert kernel.limits.min_arch == "sm_80"
    assert describe(of("Linear"), device="cuda") is None
    assert describe(KernelRef("path", "/kernels/norm", "RMSNorm"), device="cuda") is None


def test_unknown_names_and_devices(refused: Refuse) -> None:
    error = refused(of("RmsNorm"))
    assert error.fix.startswith("name RMSNorm")
    assert "cpu, cuda, not on mps" in refused(of("RMSNorm"), device="mps").reason
    assert "cpu, not on cuda" in refused(of("Linear"), device="cuda").reason


def test_without_triton(refused: Refuse, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("kernelwise.kernels.triton.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)
    error = refused(of("RMSNorm"), device="cuda")
    assert "triton" in error.reason
    assert error.fix == "pip install triton"


def test_without_the_library(refused: Refuse, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from kernelwise.kernels.cpu import _library

    monkeypatch.delitem(sys.modules, "kernelwise.kernels.cpu.rms_norm", raising=False)
    monkeypatch.setattr(_library, "FILE", tmp_path / "_kernels.so")
    _library._loaded.cache_clear()
    try:
        error = refused(of("RMSNorm"))
    finally:
        _library._loaded.cache_clear()
    assert "not built" in error.reason
    assert (error.fix or "").startswith("pip install --no-build-isolation")


def test_linear_is_loaded_for_the_dtypes_that_this_processor_is_slow_in(
    refused: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kernelwise.kernels.cpu import linear

    monkeypatch.setattr(linear, "why_not_worthwhile", lambda dtype: "it is fast" if dtype == torch.float16 else None)
    assert load(of("Linear"), device="cpu").limits.dtypes == ("float32", "bfloat16")
    native = "this processor multiplies matrices natively"
    monkeypatch.setattr(linear, "why_not_worthwhile", lambda dtype: native)
    assert native in refused(of("Linear")).reason
    monkeypatch.setattr(linear, "why_not_worthwhile", lambda dtype: None)
    monkeypatch.setattr(linear, "gains_in_training", lambda dtype: dtype != torch.bfloat16)
    kernel = load(of("Linear"), device="cpu")
    assert kernel.limits.dtypes == ("float32", "bfloat16", "float16")
    assert kernel.limits.inference_only == ("float32", "bfloat16")
    assert kernel.limits.gains_from == (("float32", linear.gains_from(torch.float32)),)
    assert [p.name for p in kernel.signature] == ["x", "weight", "bias"]


def test_the_hash_follows_the_files_of_the_backend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = load(of("RMSNorm"), device="cpu").content_hash
    assert load(of("SwiGLUMLP"), device="cpu").content_hash == before
    monkeypatch.setattr(builtin, "__file__", str(tmp_path / "sources" / "builtin.py"))
    (tmp_path / "kernels" / "cpu").mkdir(parents=True)
    for name in ("_layout.py", "_autograd.py", "_recompute.py"):
        (tmp_path / "kernels" / name).touch()
    builtin._backend_hash.cache_clear()
    assert load(of("RMSNorm"), device="cpu").content_hash != before
    builtin._backend_hash.cache_clear()


def test_the_layer_classes_follow_the_rules_of_the_kernels_library() -> None:
    from kernelwise.kernels import layers

    for name in ("RMSNorm", "SwiGLUMLP", "Linear", "rotary_pos_emb"):
        assert class_problem(getattr(layers, name), name) is None


def test_an_exported_repository_loads_in_the_kernels_library_and_here(tmp_path: Path) -> None:
    variant = export(tmp_path / "kernelwise", backend="cpu")
    assert variant.name.startswith("torch-stable-abi210-cpu-")
    code = """
import sys, torch
from pathlib import Path
import kernels
from kernelwise._data import KernelRef
from kernelwise.sources import load
theirs = kernels.get_local_kernel(Path(sys.argv[1])).layers.RMSNorm
kernel = load(KernelRef("path", sys.argv[1], "RMSNorm"), device="cpu")
module = torch.nn.Module()
module.weight, module.variance_epsilon = torch.randn(16), 1e-5
x = torch.randn(4, 16)
expected = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * module.weight
torch.testing.assert_close(kernel.function(module, x), expected)
torch.testing.assert_close(theirs.forward(module, x), expected)
print(kernel.reads)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "kernelwise")], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "('variance_epsilon', 'weight')", done.stderr


def test_an_mlp_layer_class_calls_the_children() -> None:
    from kernelwise.kernels.layers import SwiGLUMLP

    module = nn.Module()
    module.gate_proj, module.up_proj, module.down_proj = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
    x = torch.randn(2, 8)
    expected = module.down_proj(torch.nn.functional.silu(module.gate_proj(x)) * module.up_proj(x))
    torch.testing.assert_close(SwiGLUMLP.forward(module, x), expected)  # type: ignore[arg-type]
