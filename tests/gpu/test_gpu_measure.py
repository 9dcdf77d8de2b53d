"""Timing on a GPU: its own clock, its memory, CUDA graphs."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kernelwise
from kernelwise._evidence import Comparison, Timing
from kernelwise._measuring._compare import compare
from kernelwise._measuring._environment import environment
from kernelwise._measuring._measure import measure_group
from kernelwise._verifying._capture import capture
from kernelwise._verifying._groups import group

pytestmark = pytest.mark.gpu


def sleeping(cycles: int) -> Callable[[], object]:
    return lambda: torch.cuda._sleep(cycles)


@pytest.mark.alone
@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_the_devices_time_is_what_counts(device: str) -> None:
    found = compare(
        {"own": sleeping(200_000), "half": sleeping(100_000), "same": sleeping(200_000)},
        own="own",
        device=device,
        seconds=1.0,
    )
    half, same = found["half"], found["same"]
    assert isinstance(half, Comparison)
    assert isinstance(same, Comparison)
    assert half.speedup == pytest.approx(2.0, rel=0.1)
    assert half.own_us == pytest.approx(2 * half.us, rel=0.1)
    assert 50 < half.own_us < 500
    assert same.verdict == "no clear difference"


@pytest.mark.alone
def test_what_it_costs_to_start_a_call_is_hidden_where_that_is_asked_for() -> None:
    def late(cycles: int, seconds: float) -> Callable[[], object]:
        return lambda: (time.sleep(seconds), torch.cuda._sleep(cycles))

    calls = {"own": late(100_000, 1e-3), "quick": late(100_000, 0.0), "half": late(50_000, 1e-3)}
    hidden = compare(calls, own="own", device="cuda", seconds=1.0, hide_starts=True)
    shown = compare(calls, own="own", device="cuda", seconds=1.0)
    found = {name: (one.speedup, shown[name].speedup) for name, one in hidden.items()}  # type: ignore[union-attr]
    assert found["quick"][0] == pytest.approx(1.0, rel=0.1)
    assert found["half"][0] == pytest.approx(2.0, rel=0.1)
    assert found["quick"][1] > 5
    assert found["half"][1] == pytest.approx(1.0, rel=0.1)


def test_memory_beyond_what_was_held_is_counted() -> None:
    held = torch.empty(64 << 20, dtype=torch.uint8, device="cuda")
    found = compare(
        {"own": lambda: held.clone(), "none": lambda: held.zero_(), "twice": lambda: (held.clone(), held.clone())},
        own="own",
        device="cuda",
        seconds=0.1,
    )
    peaks = {name: one.peak for name, one in found.items() if isinstance(one, Comparison)}
    assert peaks == {"own": 64 << 20, "none": 0, "twice": 128 << 20}
    twice = found["twice"]
    assert isinstance(twice, Comparison)
    assert twice.own_peak == 64 << 20


@pytest.mark.alone
def test_what_does_not_fit_is_out_and_leaves_its_memory_to_the_others() -> None:
    torch.cuda.empty_cache()  # what tests before this one have left in the cache is free too
    free = torch.cuda.mem_get_info()[0]

    def too_large() -> object:
        half = torch.empty(free // 2, dtype=torch.uint8, device="cuda")
        return half, torch.empty(free, dtype=torch.uint8, device="cuda")

    def most() -> object:
        return torch.empty(int(free * 0.8), dtype=torch.uint8, device="cuda")

    found = compare(
        {"too large": too_large, "own": sleeping(1000), "most": most}, own="own", device="cuda", seconds=0.1
    )
    assert str(found["too large"]).startswith("OutOfMemoryError: CUDA out of memory")
    assert isinstance(found["most"], Comparison)
    del found
    torch.cuda.empty_cache()


@pytest.mark.alone
def test_an_error_on_the_device_is_the_error_of_the_call_that_made_it() -> None:
    def late() -> None:
        torch.cuda._sleep(100_000_000)
        raise RuntimeError("too late")

    found = compare(
        {"late": late, "own": sleeping(1000), "other": sleeping(1000)}, own="own", device="cuda", seconds=0.1
    )
    assert found["late"] == "RuntimeError: too late"
    other = found["other"]
    assert isinstance(other, Comparison)
    assert other.us < 1000  # what was still running is not its time


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    config = LlamaConfig(
        vocab_size=512, hidden_size=1024, intermediate_size=2816, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=2, max_position_embeddings=4096,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to("cuda", torch.bfloat16)


@pytest.mark.alone
@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("mode", ["inference", "training", "inference+compile", "training+compile"])
def test_every_layer_of_a_model_has_a_timing(model: torch.nn.Module, mode: str, graph: bool) -> None:
    model.train(mode.startswith("training"))
    decided = kernelwise.plan(model, mode=mode)
    groups = group(model, decided)
    ids = torch.randint(0, 512, (2, 2048), device="cuda")
    samples = capture(model, groups, {"input_ids": ids, "labels": ids}, rows=None, memory=4 << 30)
    timed = {}
    for found in groups:
        kernel, layer = found.decision.kernel, found.decision.layer
        if kernel is None or layer.path not in samples:
            continue
        result = measure_group(
            model, found, samples[layer.path], kernel, mode=mode, workload="w", seconds=0.3, graph=graph
        )
        assert isinstance(result, Timing), (layer.path, result)
        assert result.comparison.us < 5000
        assert graph or result.comparison.peak is not None
        timed[kernel.op] = result
    assert {"rms_norm", "rotary"} <= set(timed)
    if mode == "inference" and not graph:
        assert timed["rms_norm"].comparison.verdict == "faster"
    assert all(parameter.grad is None for parameter in model.parameters())
    print(*(f"{t.layer} {mode} graph={graph}: {t.comparison}" for t in timed.values()), sep="\n")


def test_the_environment_names_the_gpu_and_its_driver() -> None:
    found = dict(environment("cuda"))
    assert torch.cuda.get_device_name() in found["device"]
    assert found["driver"] != "unknown"
    assert found["architecture"].startswith(("sm_", "gfx"))
    assert found["runtime"] in (f"CUDA {torch.version.cuda}", f"ROCm {torch.version.hip}")
