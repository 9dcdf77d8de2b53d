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

from kernelwise.kernels.cpu import gated_activation as gated_module
from kernelwise.kernels.cpu import linear as linear_module
from kernelwise.kernels.cpu.activation import activation
from kernelwise.kernels.cpu.add_layer_norm import add_layer_norm
from kernelwise.kernels.cpu.add_rms_norm import add_rms_norm
from kernelwise.kernels.cpu.attention import attention
from kernelwise.kernels.cpu.cross_entropy import cross_entropy
from kernelwise.kernels.cpu.gated_activation import gated_activation
from kernelwise.kernels.cpu.layer_norm import layer_norm
from kernelwise.kernels.cpu.linear import linear
from kernelwise.kernels.cpu.linear_cross_entropy import linear_cross_entropy
from kernelwise.kernels.cpu.qk_norm_rotary import qk_norm_rotary
from kernelwise.kernels.cpu.rms_norm import rms_norm
from kernelwise.kernels.cpu.rotary import rotary

HERE = Path(__file__).parent
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
LINEAR = ("linear", "linear of few rows")
OURS_ALWAYS = linear_module._Choice(most=1 << 62, training=0)


def calls(dtype=torch.float32):
    """Every kernel by name: function of floating tensors, those tensors. Large enough to be split among threads."""
    torch.manual_seed(0)
    half = torch.bfloat16 if dtype == torch.float32 else dtype
    angles = [torch.randn(1, 130, 64, dtype=dtype) for _ in range(2)]
    labels = torch.arange(90) * 7
    labels[3::5] = -100
    return {
        "rms_norm": (
            lambda x, w: rms_norm(x, w, 1e-6),
            torch.randn(600, 130, dtype=dtype),
            torch.randn(130, dtype=dtype),
        ),
        "add_rms_norm": (
            lambda x, r, w: add_rms_norm(x, r, w, 1e-6),
            *torch.randn(2, 600, 130, dtype=dtype),
            torch.randn(130, dtype=dtype),
        ),
        "layer_norm": (
            lambda x, w, b: layer_norm(x, w, b, 1e-5),
            torch.randn(600, 130, dtype=dtype),
            *torch.randn(2, 130, dtype=dtype),
        ),
        "add_layer_norm": (
            lambda x, r, w, b: add_layer_norm(x, r, w, b, 1e-5),
            *torch.randn(2, 600, 130, dtype=dtype),
            *torch.randn(2, 130, dtype=dtype),
        ),
        "activation": (activation, torch.randn(70, 600, dtype=dtype)),
        "gated_activation": (gated_activation, torch.randn(70, 600, dtype=dtype), torch.randn(70, 600, dtype=dtype)),
        "rotary": (
            lambda q, k: rotary(q, k, *angles),
            torch.randn(1, 6, 130, 64, dtype=dtype),
            torch.randn(1, 3, 130, 64, dtype=dtype),
        ),
        "qk_norm_rotary": (
            lambda q, k, qw, kw: qk_norm_rotary(q, k, qw, kw, *angles, 1e-6),
            torch.randn(1, 6, 130, 64, dtype=dtype),
            torch.randn(1, 3, 130, 64, dtype=dtype),
            *torch.randn(2, 64, dtype=dtype),
        ),
        "cross_entropy": (lambda x: cross_entropy(x, labels, z_loss=1e-3), torch.randn(90, 700, dtype=dtype)),
        "linear_cross_entropy": (
            lambda x, w: linear_cross_entropy(x, w, labels, chunk_bytes=100_000),
            torch.randn(90, 72, dtype=dtype),
            torch.randn(700, 72, dtype=dtype) / 8,
        ),
        "linear": (
            linear,
            torch.randn(90, 72, dtype=half),
            torch.randn(520, 72, dtype=half),
            torch.randn(520, dtype=half),
        ),
        "attention": (
            lambda q, k, v: attention(q, k, v, causal=True),
            torch.randn(2, 6, 130, 64, dtype=dtype),
            *torch.randn(2, 2, 3, 130, 64, dtype=dtype),
        ),
        "linear of many rows": (linear, torch.randn(150, 330, dtype=half), torch.randn(260, 330, dtype=half) / 8),
        "linear of few rows": (linear, torch.randn(3, 72, dtype=half), torch.randn(520, 72, dtype=half)),
    }


def results(name, dtype=torch.float32):
    """Outputs without gradients, outputs with them, and gradients of one call."""
    function, *tensors = calls(dtype)[name]
    alone = function(*tensors)
    leaves = [t.requires_grad_() for t in tensors]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    weights = [torch.linspace(-1, 1, o.numel(), dtype=o.dtype).view(o.shape) for o in outputs]
    gradients = torch.autograd.grad(outputs, leaves, weights)
    return [*(alone if isinstance(alone, tuple) else (alone,)), *(o.detach() for o in outputs), *gradients]


NAMES = pytest.mark.parametrize("name", calls())


@pytest.fixture
def ours_always(monkeypatch):
    monkeypatch.setattr(linear_module, "_chosen", dict.fromkeys((torch.bfloat16, torch.float16), OURS_ALWAYS))


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize(("capability", "isa"), [("default", "baseline"), ("avx2", "avx2")])
@pytest.mark.skipif("ATEN_CPU_CAPABILITY" in os.environ, reason="runs inside the run of one instruction set")
def test_every_instruction_set_is_exact(capability, isa):
    """Most exactness tests again, in a process that is allowed less than this processor offers."""
    expected = isa if cpu.isa() != "baseline" else "baseline"
    files = sorted(str(file) for file in HERE.glob("test_cpu_*.py") if file != Path(__file__))
    arguments = ["-q", "-x", "-p", "no:cacheprovider", "-k", "width or whole or digits or option or shape", *files]
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
def test_every_number_of_threads_gives_the_same_numbers(name, dtype, threads, ours_always):
    seen = []
    for num in (1, 2, 3):
        threads(num)
        found = results(name, dtype)
        seen.append(found[:1] if name == "attention" else found)  # with gradients torch's own computes
    for other in seen[1:]:
        for first, again in zip(seen[0], other, strict=True):
            assert torch.equal(first, again)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only GNU's OpenMP is in the way, only on Linux")
@pytest.mark.parametrize(
    "name",
    [name for name in calls() if name != "linear_cross_entropy"],  # torch's products wait too
)
def test_works_in_a_child_of_a_process_with_threads(name, threads, ours_always):
    """Where torch's own operators wait for ever, the kernels must not."""
    if name in ("linear", "attention") and cpu.isa() == "baseline":
        pytest.skip("without AVX2 torch's product computes")
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
    first = result[0] if isinstance(result, tuple) else result
    return (first.view(torch.int16) if first.dtype == torch.bfloat16 else first).numpy()


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
def test_compiles_in_one_graph_forward_and_backward(name, dynamic, ours_always):
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


@pytest.mark.parametrize("name", [name for name in calls() if name != "attention"])  # torch's own has none
def test_second_derivatives_are_those_of_plain_pytorch(name, ours_always, monkeypatch):
    """By what the backward functions do where they are differentiated themselves, against differences of gradients."""
    monkeypatch.setattr(gated_module, "_PLAIN_BELOW_ELSE", 0)
    monkeypatch.setattr(gated_module, "_PLAIN_BELOW", {})
    function, *tensors = calls()[name]
    leaves = [t.float().requires_grad_() if name not in LINEAR else t.requires_grad_() for t in tensors]

    def gradients(tensors, **options):
        outputs = function(*tensors)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return torch.autograd.grad(sum(o.float().square().sum() for o in outputs), tensors, **options)

    directions = [torch.randn_like(t) for t in leaves]
    first = gradients(leaves)
    for a, b in zip(first, gradients(leaves, create_graph=True), strict=True):
        assert_close(a, b, 2e-2 if a.dtype == torch.bfloat16 else 1e-4)
    along = sum((g * d).sum() for g, d in zip(gradients(leaves, create_graph=True), directions, strict=True))
    found = torch.autograd.grad(along, leaves)
    if name in LINEAR:  # differences of bfloat16 numbers have no digits: the same formula in float32 has
        wide = [t.detach().float().requires_grad_() for t in leaves]
        loss = torch.nn.functional.linear(*wide).square().sum()
        grads = torch.autograd.grad(loss, wide, create_graph=True)
        along = sum((g * d.float()).sum() for g, d in zip(grads, directions, strict=True))
        expected = torch.autograd.grad(along, wide)
    else:
        step = 1e-2
        ends = [
            gradients(
                [(t + sign * step * d).detach().requires_grad_() for t, d in zip(leaves, directions, strict=True)]
            )
            for sign in (1, -1)
        ]
        expected = [(a - b) / (2 * step) for a, b in zip(*ends, strict=True)]
    for a, b in zip(found, expected, strict=True):
        assert_close(a.float(), b.float(), 3e-2)


def assert_close(a, b, bound):
    assert (a - b).abs().max() <= bound * b.abs().max()


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
    yield operators.rotary, (q, k, c, c)
    yield operators.rotary, (q.bfloat16(), k.bfloat16(), c, c, 1)
    yield operators.rotary, (q.transpose(1, 2), k.transpose(1, 2), c, c, 2)
    yield operators.rotary, (q[:, :, :0], k[:, :, :0], c[:, :0], c[:, :0], 1)
    yield operators.rotary_backward, (q, k, c, c, 1, torch.float16)
    yield operators.add_rms_norm, (x, x, w, 1e-6, 1.0, True)
    yield operators.add_rms_norm, (x.bfloat16(), x.bfloat16().transpose(0, 1).contiguous().transpose(0, 1), w, 1e-6)
    yield operators.rms_norm_backward, (x, x, w, 1e-6, 0.0, False, False, x)
    yield operators.layer_norm, (x, w, w, 1e-5)
    yield operators.layer_norm, (x.half().transpose(0, 1), None, None, 1e-5, 0.0)
    yield operators.add_layer_norm, (x.half(), x.half(), w, None, 1e-5)
    yield operators.layer_norm_backward, (x, x, w, w, 1e-5, 0.0, True, True)
    yield operators.layer_norm_backward, (x, x, w, None, 1e-5, 0.0, False, True, x)
    yield operators.activation, (x.bfloat16(), 1)
    yield operators.activation_backward, (x, x.transpose(0, 1).contiguous().transpose(0, 1), 3)
    yield operators.qk_norm_rotary, (q, k, w, w, c, c, 1e-6)
    yield operators.qk_norm_rotary, (q.half(), k.half(), w, None, c, c, 1e-6, 0.0, True, 1)
    yield operators.qk_norm_rotary_backward, (q, k, q, k, w, None, c, c, 1e-6, 0.0, False, 1, True)
    yield operators.qk_norm_rotary_backward, (q, k, q, k, w, w, c, c, 1e-6, 0.0, False, 1, False)
    labels, losses, kept = torch.tensor([1, -100, 7]), torch.randn(3), torch.rand(3, 2) + 1
    yield operators.cross_entropy, (x[:, 0].bfloat16(), labels, -100, 0.1, 0.0, 0.0)
    yield operators.cross_entropy_backward, (losses, x[:, 0], labels, kept, -100, 0.0, 30.0, 0.1)
    yield operators.cross_entropy_backward_, (losses, x[:, 0].clone(), labels, kept, -100, 0.0, 0.0, 0.0)
    yield operators.linear_cross_entropy, (x[:, 0], x[0], None, labels % 4, None, -100, 0, 0, 0, 64, True, True, True)
    yield operators.linear_cross_entropy, (h[:3], h, h[:, 0], labels % 5, losses, 2, 0, 0, 0, 64, True, True, True)
    yield operators.linear_cross_entropy, (h[:3], h, None, labels % 5, losses, 2, 0, 0, 0, 64, False, True, False)
    yield operators.linear, (h, torch.randn(6, 8).bfloat16())
    yield operators.linear, (h[None], torch.randn(6, 8).bfloat16(), torch.randn(6).bfloat16())
    yield operators.linear_grad_x, (h, torch.randn(8, 6).bfloat16())
    yield operators.linear_grad_weight, (h, h)
    if _library.isa() != "baseline":
        yield operators.attention, (q, k, k)
        yield operators.attention, (q.half(), k.half(), k.half(), 0.3, torch.rand(1, 1, 3, 3) > 0.3, True)


@pytest.mark.parametrize(("operator", "arguments"), list(_samples()), ids=lambda value: str(value)[:40])
def test_opcheck(operator, arguments):
    torch.library.opcheck(operator.default, arguments)


@pytest.mark.parametrize("name", [name for name in calls() if "cross_entropy" not in name])
def test_a_call_without_gradients_takes_the_short_way(name, monkeypatch):
    function, *tensors = calls(torch.bfloat16)[name]

    def refuse(*_):
        raise AssertionError("a call in Python more")

    monkeypatch.setattr(torch._ops.OpOverload, "__call__", refuse)
    function(*tensors)


@pytest.mark.parametrize(("operator", "arguments"), list(_samples()), ids=lambda value: str(value)[:40])
def test_nothing_is_kept_of_a_call(operator, arguments):
    """Also not where tensors are copied first, nor where the call fails."""
    given = [a.transpose(0, -1).contiguous().transpose(0, -1) if isinstance(a, torch.Tensor) else a for a in arguments]
    for args in (arguments,) if operator.default._schema.is_mutable else (arguments, given):
        tensors = {id(a): a for a in args if isinstance(a, torch.Tensor)}.values()
        before = [t._use_count() for t in tensors]
        results = operator.default(*args)
        for result in results if isinstance(results, tuple) else (results,):
            assert result is None or result._use_count() == 1
        wrong = [a.to(torch.complex64) if isinstance(a, torch.Tensor) else a for a in args]
        with pytest.raises(RuntimeError):
            operator.default(*wrong)
        assert [t._use_count() for t in tensors] == before
        assert all(t._use_count() == 1 for t in wrong if isinstance(t, torch.Tensor))


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
        monkeypatch.undo()
        monkeypatch.setitem(_library.SHAPES, "an operator of tomorrow", _library.SHAPES["rms_norm"])
        _library._loaded.cache_clear()
        assert "was built from other sources (it has no an operator of tomorrow)" in cpu.why_unavailable()
        monkeypatch.undo()
        monkeypatch.setitem(_library.SHAPES, "rms_norm", lambda x, weight, eps, offset=1.0, cast_after=False: x)
        _library._loaded.cache_clear()
        assert "was built from other sources (rms_norm takes other arguments)" in cpu.why_unavailable()
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


@pytest.mark.parametrize("name", ["rms_norm", "layer_norm"])
def test_second_derivatives_where_the_input_was_computed_from_the_weight(name):
    """The path from the weight through the input is autograd's to follow, once."""
    wanted = torch.nn.functional.rms_norm if name == "rms_norm" else torch.nn.functional.layer_norm

    def gradient(norm):
        w = torch.linspace(0.5, 2, 8).requires_grad_()
        (first,) = torch.autograd.grad(norm(w * torch.arange(16.0).view(2, 8), w).pow(3).sum(), w, create_graph=True)
        return first, torch.autograd.grad(first.sum(), w)[0]

    own = (lambda x, w: rms_norm(x, w, 1e-6)) if name == "rms_norm" else (lambda x, w: layer_norm(x, w, None, 1e-6))
    for a, b in zip(gradient(own), gradient(lambda x, w: wanted(x, (8,), w, eps=1e-6)), strict=True):
        assert_close(a, b, 1e-4)


@pytest.mark.parametrize(
    "statistics", [torch.empty(0, 2), torch.empty(()), torch.empty(3, 3), torch.empty(3, 2).double()]
)
def test_backward_of_the_loss_takes_only_statistics_of_its_rows(statistics: torch.Tensor) -> None:
    _library.load()
    logits, labels = torch.randn(3, 8), torch.tensor([1, -100, 7])
    with pytest.raises(RuntimeError, match="statistics must be float32"):
        torch.ops.kernelwise.cross_entropy_backward.default(
            torch.randn(3), logits, labels, statistics, -100, 0.0, 30.0, 0.1
        )
