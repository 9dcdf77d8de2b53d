"""Contenders for a whole model on a GPU: device clocks, peak memory, torch.compile, and Liger where it is installed."""

from __future__ import annotations

import importlib.util

import pytest

from kernelwise._measuring._bench import bench
from kernelwise._weights import load_with_weights, make_inputs

pytestmark = pytest.mark.gpu

CONTENDERS = ["builtin", "torch.compile", *(["liger"] if importlib.util.find_spec("liger_kernel") else [])]


@pytest.mark.timeout(600)  # three workloads are compiled, while other processes compile too
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_contenders_agree_and_their_memory_is_counted(dtype: str) -> None:
    model = load_with_weights("llama", device="cuda", dtype=dtype).model
    inputs = make_inputs(model, batch=2, tokens=64)
    runs = bench(
        model, inputs, contenders=CONTENDERS, workloads=["prefill", "decode", "training"], steps=4, seconds=0.5
    )
    assert [(run.contender, run.workload, run.error) for run in runs if run.error] == []
    assert len(runs) == 3 * (1 + len(CONTENDERS))
    for run in runs:
        assert run.comparison is not None
        assert run.comparison.peak is not None
        assert run.comparison.peak > 0
        assert run.tokens_per_s
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_wrong_contender_is_found_on_the_device() -> None:
    from kernelwise._measuring._race import Contender, race, sharing_copy
    from kernelwise._measuring._workload import workloads_of

    model = load_with_weights("llama", device="cuda").model
    wrong = sharing_copy(model)
    wrong.get_submodule("model.layers.0.mlp").register_forward_hook(lambda module, args, out: out * 1.01)
    (prefill,) = workloads_of(model, make_inputs(model, batch=1, tokens=32), ["prefill"])
    contenders = {"eager": Contender(sharing_copy(model)), "wrong": Contender(wrong)}
    _, run = race(contenders, prefill, device="cuda", seconds=0.1)
    assert "differ from eager's" in (run.error or "")
    assert run.comparison is None
