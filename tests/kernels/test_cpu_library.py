"""What holds for all CPU kernels: instruction sets, threads, fork, torch.compile, opcheck, and life without the library."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from kernelwise.kernels import cpu
from kernelwise.kernels.cpu import _library

if reason := cpu.why_unavailable():
    pytest.skip(reason, allow_module_level=True)

from kernelwise.kernels.cpu import linear as linear_module
from kernelwise.kernels.cpu.gated_activation import gated_activation
from kernelwise.kernels.cpu.linear import linear
from kernelwise.kernels.cpu.rms_norm import rms_norm
from kernelwise.kernels.cpu.rotary import rotary

HERE = Path(__file__).parent
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
EVERY_ROW_BLOCKWISE = linear_module._Choice(few=-1, many=0, training=0)


def calls(dtype=torch.float32):
    """Every kernel by name: function of floating tensors, those tensors. Large enough to be split among threads."""
    torch.manual_seed(0)
    half = torch.bfloat16 if dtype == torch.float32 else dtype
    angles = [torch.randn(1, 130, 64, dtype=dtype) for _ in range(2)]
    return {
        "rms_norm": (
            lambda x, w: rms_norm(x, w, 1e-6),
            torch.randn(600, 130, dtype=dtype),
            torch.randn(130, dtype=dtype),
        ),
        "gated_activation": (gated_activation, torch.randn(70, 600, dtype=dtype), torch.randn(70, 600, dtype=dtype)),
        "rotary": (
            lambda q, k: rotary(q, k, *angles),
            torch.randn(1, 6, 130, 64, dtype=dtype),
            torch.randn(1, 3, 130, 64, dtype=dtype),
        ),
        "linear": (
            linear,
            torch.randn(90, 72, dtype=half),
            torch.randn(520, 72, dtype=half),
            torch.randn(520, dtype=half),
        ),
    }


def results(name, dtype=torch.float32):
    """Outputs and gradients of one call."""
    function, *tensors = calls(dtype)[name]
    leaves = [t.requires_grad_() for t in tensors]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    weights = [torch.linspace(-1, 1, o.numel(), dtype=o.dtype).view(o.shape) for o in outputs]
    gradients = torch.autograd.grad(outputs, leaves, weights)
    return [o.detach() for o in outputs] + list(gradients)


NAMES = pytest.mark.parametrize("name", calls())


@pytest.fixture
def blockwise(monkeypatch):
    monkeypatch.setattr(linear_module, "_chosen", dict.fromkeys((torch.bfloat16, torch.float16), EVERY_ROW_BLOCKWISE))


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize(("capability", "isa"), [("default", "baseline"), ("avx2", "avx2")])
@pytest.mark.skipif("ATEN_CPU_CAPABILITY" in os.environ, reason="runs inside the run of one instruction set")
def test_every_instruction_set_is_exact(capability, isa):
    """The exactness tests again, in a process that is allowed less than this processor offers."""
    expected = isa if cpu.isa() != "baseline" else "baseline"
    files = [str(HERE / f"test_cpu_{op}.py") for op in ("rms_norm", "gated_activation", "rotary", "linear")]
    arguments = ["-q", "-x", "-p", "no:cacheprovider", "-k", "exact or digits", *files]
    code = (
        "import sys, pytest; from kernelwise.kernels import cpu; "
        f"assert cpu.isa() == {expected!r}, cpu.isa(); sys.exit(pytest.main({arguments!r}))"
    )
    environment = ENVIRONMENT | {"ATEN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]


def _run(code, environment):
    """The words that a fresh Python prints."""
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@NAMES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_number_of_threads_gives_the_same_numbers(name, dtype, threads, blockwise):
    seen = []
    for num in (1, 2, 3):
        threads(num)
        seen.append(results(name, dtype))
    for other in seen[1:]:
        for first, again in zip(seen[0], other, strict=True):
            assert torch.equal(first, again)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only GNU's OpenMP is in the way, only on Linux")
@pytest.mark.parametrize("name", ["rms_norm", "gated_activation", "rotary"])
def test_works_in_a_child_of_a_process_with_threads(name, threads):
    """Where torch's own operators wait for ever, the kernels must not."""
    threads(2)
    function, *tensors = calls()[name]
    with torch.no_grad():
        first = function(*tensors)
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        with torch.no_grad():
            again = function(*tensors)
        same = np.array_equal(_array(first), _array(again))
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0


def _array(result):
    """The (first) result as NumPy sees it: comparing with torch would start torch's threads."""
    return (result[0] if isinstance(result, tuple) else result).numpy()


def _doubled(batch):
    return torch.get_num_threads(), rms_norm(torch.stack(batch), None, 1e-6)


def test_works_in_the_workers_of_a_data_loader():
    rows = list(torch.randn(4, 20000))
    loader = torch.utils.data.DataLoader(rows, batch_size=2, num_workers=2, collate_fn=_doubled)
    for (num_threads, got), first in zip(loader, (0, 2), strict=True):
        assert num_threads == 1
        assert torch.equal(got, rms_norm(torch.stack(rows[first : first + 2]), None, 1e-6))


@NAMES
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_in_one_graph_forward_and_backward(name, dynamic, blockwise):
    function, *tensors = calls()[name]
    leaves = [t.requires_grad_() for t in tensors]

    def sums(*tensors):
        outputs = function(*(t * 1 for t in tensors))
        return sum(o.float().mul(0.5).sum() for o in (outputs if isinstance(outputs, tuple) else (outputs,)))

    expected = torch.autograd.grad(sums(*leaves), leaves)
    torch._dynamo.reset()
    compiled = torch.compile(sums, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for a, b in zip(expected, torch.autograd.grad(compiled(*leaves), leaves), strict=True):
        assert torch.equal(a, b)
    with torch.no_grad():
        assert torch.equal(compiled(*leaves), sums(*leaves))


def test_compiles_with_inductor():
    """Strides of the results must be those that the fake implementations promise."""
    function, q, k = calls()["rotary"]
    torch._dynamo.reset()
    compiled = torch.compile(lambda q, k: [x.transpose(1, 2).contiguous() for x in function(q, k)], fullgraph=True)
    for a, b in zip(compiled(q, k), function(q, k), strict=True):
        assert torch.equal(a, b.transpose(1, 2))


def _samples():
    x, w, h = torch.randn(3, 4, 8), torch.randn(8), torch.randn(5, 8).bfloat16()
    q, k, c = torch.randn(2, 3, 4, 8).transpose(1, 2), torch.randn(2, 3, 1, 8).transpose(1, 2), torch.randn(1, 3, 8)
    operators = torch.ops.kernelwise
    yield operators.rms_norm, (x, w, 1e-6, 0.0, False)
    yield operators.rms_norm, (x.bfloat16(), w, 1e-6)
    yield operators.rms_norm, (x.half().transpose(0, 1), None, 1e-6)
    yield operators.rms_norm, (x[:, :0], w, 1e-6)
    yield operators.rms_norm_backward, (x, x, w, 1e-6, 0.0, False, True)
    yield operators.rms_norm_backward, (x.bfloat16(), x.bfloat16(), None, 1e-6, 0.0, True, False)
    yield operators.gated_activation, (x[..., :4], x[..., 4:], 0)
    yield operators.gated_activation_backward, (x, x, x, 2)
    yield operators.rotary, (q, k, c, c, 1)
    yield operators.rotary, (q.bfloat16(), k.bfloat16(), c, c, 1)
    yield operators.rotary, (q.transpose(1, 2), k.transpose(1, 2), c, c, 2)
    yield operators.rotary, (q[:, :, :0], k[:, :, :0], c[:, :0], c[:, :0], 1)
    yield operators.rotary_backward, (q, k, c, c, 1, torch.float16)
    yield operators.linear, (h, torch.randn(6, 8).bfloat16(), None, 8)
    yield operators.linear, (h[None], torch.randn(6, 8).bfloat16(), torch.randn(6).bfloat16(), 0)
    yield operators.linear_grad_x, (h, torch.randn(8, 6).bfloat16())
    yield operators.linear_grad_weight, (h, h)


@pytest.mark.parametrize(("operator", "arguments"), list(_samples()), ids=lambda value: str(value)[:40])
def test_opcheck(operator, arguments):
    torch.library.opcheck(operator.default, arguments)


def test_what_is_missing_is_said(monkeypatch, tmp_path):
    _library._loaded.cache_clear()
    monkeypatch.setattr(_library, "FILE", tmp_path / "_kernels.so")
    try:
        assert not cpu.is_available()
        assert "was not built" in cpu.why_unavailable()
        assert "pip install" in cpu.why_unavailable()
        with pytest.raises(ImportError, match="was not built"):
            _library.load()
        (tmp_path / "_kernels.so").write_bytes(b"not a library")
        _library._loaded.cache_clear()
        assert "does not load with torch" in cpu.why_unavailable()
    finally:
        monkeypatch.undo()
        _library._loaded.cache_clear()


def test_importing_the_package_loads_nothing():
    code = (
        "import sys, torch, kernelwise.kernels.cpu as cpu; "
        "print(hasattr(torch.ops.kernelwise, 'rms_norm'), 'transformers' in sys.modules); "
        "import kernelwise.kernels.cpu.rms_norm; print(hasattr(torch.ops.kernelwise, 'rms_norm'))"
    )
    assert _run(code, ENVIRONMENT) == ["False", "False", "True"]
