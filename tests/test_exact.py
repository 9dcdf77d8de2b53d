"""The judge of the kernels is judged: planted faults must be seen, an honest rewrite must pass."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from exact import assert_as_exact, float64_mode

from kernelwise._verifying._exact import deviation

EPS = 1e-6


def own(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * wide.to(x.dtype)


def _with(*, eps: float = EPS, weighted: bool = True) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        out = torch.nn.functional.rms_norm(x.float(), x.shape[-1:], None, eps).to(x.dtype)
        return out * weight if weighted else out + 0 * weight

    return norm


class OwnForwardWrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return own(x, weight)

    @staticmethod
    def backward(ctx, grad):
        x, weight = (t.detach().requires_grad_() for t in ctx.saved_tensors)
        with torch.enable_grad():
            dx, dw = torch.autograd.grad(own(x, weight), (x, weight), grad)
        return dx, 1.1 * dw


def _inputs(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {"x": torch.randn(5, 96, dtype=dtype)[:, 7:71], "weight": torch.rand(64, dtype=dtype) + 0.5}


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


@DTYPES
def test_an_honest_rewrite_passes(dtype):
    assert_as_exact(own, _with(), _inputs(dtype))
    assert_as_exact(own, own, tuple(_inputs(dtype).values()))


@DTYPES
@pytest.mark.parametrize(
    ("fault", "complaint"),
    [
        (_with(eps=1e-5), "scale 0.01.*output 0: kernel errs"),
        (_with(weighted=False), "output 0: kernel errs"),
        (lambda x, weight: own(x, weight) + 1, "output 0: kernel errs"),
        (lambda x, weight: own(x, weight).mul_(float("nan")), "NaN or infinity"),
        (lambda x, weight: own(x, weight).double(), "dtype torch.float64"),
        (lambda x, weight: own(x, weight)[:4], "shape"),
        (lambda x, weight: own(x, weight).detach().requires_grad_(), "no gradient of x"),
        (lambda x, weight: OwnForwardWrongGradient.apply(x, weight), "gradient of weight: kernel errs"),
    ],
    ids=["eps", "weight", "adds one", "nan", "dtype", "shape", "no gradient", "wrong gradient"],
)
def test_a_planted_fault_is_seen(dtype, fault, complaint):
    with pytest.raises(AssertionError, match=complaint):
        assert_as_exact(own, fault, _inputs(dtype))


def test_an_overwritten_input_is_seen():
    def overwrites(x, weight):
        out = own(x, weight)
        x.detach().mul_(1.0001)
        return out

    def overwrites_the_gap(x, weight):
        out = own(x, weight)
        x.detach().as_strided((1,), (1,), x.storage_offset() + 64).fill_(3.0)  # between two rows of a sliced input
        return out

    for fault in (overwrites, overwrites_the_gap):
        with pytest.raises(AssertionError, match="input x was overwritten"):
            assert_as_exact(own, fault, _inputs(torch.float32))


def test_nan_and_infinity_must_pass_through():
    x = torch.randn(4, 8)
    x[1, 2], x[2, 3] = float("nan"), float("inf")
    inputs = {"x": x, "weight": torch.rand(8)}
    assert_as_exact(own, _with(), inputs, scales=(1.0,))
    with pytest.raises(AssertionError, match="NaN or infinity"):
        assert_as_exact(own, lambda x, weight: own(x.nan_to_num(), weight), inputs, scales=(1.0,))


def test_outputs_may_be_nested_and_inputs_empty():
    def pair(x, weight):
        return {"a": own(x, weight), "b": (x * 2, 3)}

    assert_as_exact(pair, pair, _inputs(torch.float32))
    assert_as_exact(own, own, {"x": torch.randn(0, 8), "weight": torch.rand(8)})


def test_float64_mode_computes_llama_rms_norm_in_float64():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    torch.manual_seed(0)
    norm = llama.LlamaRMSNorm(64, eps=EPS)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(3, 64)
    expected = norm.weight.double() * x.double() * torch.rsqrt(x.double().pow(2).mean(-1, keepdim=True) + EPS)
    with float64_mode(), torch.no_grad():
        exact = norm(x.double())
    assert exact.dtype == torch.float64
    assert (exact - expected).abs().max() < 1e-14
    assert (norm.double()(x.double()) - expected).abs().max() > 1e-9  # what the module alone makes of double inputs


def test_float64_mode_rewrites_every_way_to_ask_for_a_dtype():
    x = torch.full((4,), 1 / 3, dtype=torch.float64)
    buffer = torch.zeros(4)
    with float64_mode():
        made = [x.float(), x.to(torch.bfloat16), x.half(), x.type(torch.float32), x.sum(dtype=torch.float32)]
        made += [torch.ones(2), torch.ones(2, dtype=torch.float16), torch.arange(3, dtype=torch.float32)]
        made += [torch.tensor(0.1), torch.arange(3) / 3, x.softmax(-1, dtype=torch.float32), x.new_zeros(2)]
        buffer.add_(x)  # written in place: same tensor, same dtype
    assert {t.dtype for t in made} == {torch.float64}
    assert torch.equal(made[0], x)
    assert torch.equal(made[1], x)
    assert buffer.dtype == torch.float32
    assert torch.equal(buffer, x.float())
    assert torch.get_default_dtype() == torch.float32


def test_float64_mode_reaches_the_backward_pass():
    weight = torch.randn(16, dtype=torch.bfloat16)  # closed over: widened at every use
    x = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    with float64_mode():
        (own(x, weight) ** 2).sum().backward()
    wide = x.detach().clone().requires_grad_()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    ((weight.double() * normed) ** 2).sum().backward()
    assert x.grad is not None
    assert (x.grad - wide.grad).abs().max() < 1e-12


@DTYPES
def test_a_row_of_large_numbers_does_not_hide_that_the_others_are_wrong(dtype):
    """All but the first row are garbage, and smaller than the last place of the first row's numbers."""
    exact = torch.randn(6, 64, dtype=torch.float64)
    exact[0] *= 2.0 / torch.finfo(dtype).eps
    exact = exact.to(dtype).double() if dtype != torch.float16 else (exact * 1e-3).to(dtype).double()
    own = exact.to(dtype)
    wrong = own.clone()
    wrong[1:] = -wrong[1:]
    assert deviation(own, own.clone(), exact).status == "passed"
    found = deviation(own, wrong, exact)
    assert found.status == "wrong_values"
    assert found.place[0] > 0
    assert found.ratio > 10


def test_a_row_that_is_too_narrow_to_be_judged_alone_is_judged_with_the_others():
    """Two numbers may be what is left of larger ones that cancel."""
    exact = torch.tensor([[1.0, 2.0], [1e-9, -1e-9]], dtype=torch.float64)
    own = exact.float()
    new = own + torch.tensor([[0.0, 0.0], [1e-7, 0.0]])
    assert deviation(own, new, exact).status == "passed"


def test_subnormal_numbers_may_be_flushed_to_zero_and_no_others():
    exact = torch.full((2, 64), 1e-20, dtype=torch.float64)
    exact[1] = 1e-40
    own = exact.float()
    flushed = own.clone()
    flushed[1] = 0
    assert deviation(own, flushed, own.double()).status == "passed"
    own[1] = 1e-30
    assert deviation(own, flushed, own.double()).status == "wrong_values"


def test_a_row_that_is_zero_because_something_saturates_may_be_nearly_so():
    exact = torch.randn(3, 64, dtype=torch.float64)
    exact[1] = 0
    own = exact.float()
    nearly, wrong = own.clone(), own.clone()
    nearly[1], wrong[1] = 1e-25, 1e-12
    assert deviation(own, nearly, own.double()).status == "passed"
    assert deviation(own, wrong, own.double()).status == "wrong_values"


def test_float64_mode_keeps_numbers_exact_that_would_be_rounded_to_the_default_dtype():
    third = torch.tensor(1.0, dtype=torch.float64) / 3
    with float64_mode():
        made = {
            "tensor": (torch.tensor(0.1), 0.1), "list": (torch.tensor([0.1])[0], 0.1), "full": (torch.full((), 0.1), 0.1),
            "as_tensor": (torch.as_tensor(0.1), 0.1), "divided": (torch.tensor(1) / torch.tensor(3), third),
            "times": (torch.arange(3)[1] * 0.1, 0.1), "linspace": (torch.linspace(0, 0.1, 2)[1], 0.1),
            "root": (torch.tensor(2).sqrt(), 2**0.5), "mean": (torch.arange(3)[:2].float().mean(), 0.5),
        }  # fmt: skip
        whole = torch.tensor([1, 2]), torch.tensor(3), torch.arange(3)[torch.tensor(1)]
    for name, (found, wanted) in made.items():
        assert found.dtype == torch.float64, name
        assert float(found) == pytest.approx(float(wanted), rel=1e-15), name
    assert {t.dtype for t in whole} == {torch.int64}


@DTYPES
def test_float64_mode_draws_the_random_numbers_that_the_code_draws(dtype):
    def draws(x: torch.Tensor) -> list[torch.Tensor]:
        torch.manual_seed(0)
        functional = torch.nn.functional
        made = [torch.rand(5), functional.dropout(x, 0.5), torch.native_dropout(x, 0.3, True)[0], torch.randn_like(x)]
        return [*made, x.new_empty(9).uniform_(), torch.rand_like(x), x.clone().bernoulli_(0.5), torch.rand(3)]

    with torch.random.fork_rng(devices=()):
        plain = draws(torch.ones(64, dtype=dtype))
        with float64_mode(dtype):
            wide = draws(torch.ones(64, dtype=torch.float64))
    for one, other in zip(plain, wide, strict=True):
        assert other.dtype == torch.float64
        torch.testing.assert_close(one.double(), other, rtol=torch.finfo(dtype).eps, atol=0)
    assert len(torch.unique(wide[1])) == 2


def test_float64_mode_leaves_other_threads_alone():
    found: list[torch.dtype] = []
    with float64_mode():
        thread = threading.Thread(target=lambda: found.extend((torch.ones(2).dtype, torch.get_default_dtype())))
        thread.start()
        thread.join()
    assert found == [torch.float32, torch.float32]
