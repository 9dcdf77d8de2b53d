"""A race: contenders share the weights, and who computes something else has no speed."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from racing import found_in, raced
from torch import Tensor, nn

import kernelwise
from kernelwise._errors import PlanError
from kernelwise._measuring._bench import bench
from kernelwise._measuring._race import sharing_copy
from kernelwise._models import load_model

# ------------------------------------------------------------------------------------------------------- copies that share


def test_a_copy_shares_weights_and_nothing_else(llama: Any) -> None:
    llama.lm_head.register_forward_hook(hook := lambda *_: None)
    copied: Any = sharing_copy(llama)
    assert [id(p) for p in copied.parameters()] == [id(p) for p in llama.parameters()]
    assert [id(b) for b in copied.buffers()] == [id(b) for b in llama.buffers()]
    assert not set(map(id, copied.modules())) & set(map(id, llama.modules()))
    assert list(copied.lm_head._forward_hooks.values()) == [hook]
    llama.lm_head._forward_hooks.clear()
    kernelwise.kernelize(copied)
    assert "no kernels" in str(kernelwise.report(llama))


def test_a_model_that_cannot_be_copied_is_named() -> None:
    model = nn.Linear(2, 2)
    model.lock = __import__("threading").Lock()
    with pytest.raises(PlanError, match="Linear cannot be copied"):
        bench(model, torch.ones(1, 2), contenders=["builtin"])


# -------------------------------------------------------------------------------------------------- right before it is fast


def off_by(factor: float) -> Callable[[nn.Module], Callable[..., Any]]:
    def wrap(model: nn.Module) -> Callable[..., Any]:
        def scale(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            return output * factor

        next(m for n, m in model.named_modules() if n.endswith("mlp")).register_forward_hook(scale)
        return model

    return wrap


@pytest.mark.parametrize("workload", ["forward", "prefill", "decode", "training"])
def test_who_computes_something_else_has_no_speed(llama: Any, inputs: Any, workload: str) -> None:
    runs = raced(llama, inputs, workload, wrong=off_by(1.01), right=off_by(1 + 1e-7))
    assert "differ from eager's by" in (found_in(runs, "wrong").error or "")
    assert found_in(runs, "wrong").comparison is None
    assert found_in(runs, "right").error is None


def test_wrong_gradients_alone_are_found(llama: Any, inputs: Any) -> None:
    class Louder(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.view_as(x)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            return grads[0] * 1.01

    def wrap(model: nn.Module) -> Callable[..., Any]:
        model.get_submodule("model.norm").register_forward_hook(lambda m, a, out: Louder.apply(out))
        return model

    assert "its gradients differ" in (found_in(raced(llama, inputs, "training", wrong=wrap), "wrong").error or "")


def test_bfloat16_allows_its_rounding_and_no_more(inputs: Any) -> None:
    model = load_model("llama", dtype="bfloat16").model
    runs = raced(model, inputs, "prefill", wrong=off_by(2.0), builtin=kernelwise.kernelize)
    assert "differ" in (found_in(runs, "wrong").error or "")
    assert found_in(runs, "builtin").error is None


def test_products_that_may_be_less_exact_allow_more() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8))
    off = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8))
    off.load_state_dict({name: value * (1 + 2e-4) for name, value in model.state_dict().items()})
    inputs = torch.randn(8, 64)

    def error_of_off() -> str | None:
        return found_in(raced(model, inputs, "forward", off=lambda model: off), "off").error

    assert "differ" in (error_of_off() or "")
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        assert error_of_off() is None
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda out: out / 0, "infinite or not a number"),
        (lambda out: out[:, :1], "other shapes"),
        (lambda out: 1 / 0, "ZeroDivisionError: division by zero"),
    ],
)
def test_a_contender_that_fails_leaves_the_others(change: Callable[[Tensor], Any], said: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

    def wrap(model: nn.Module) -> Callable[..., Any]:
        return lambda input: change(model(input))

    runs = raced(model, torch.randn(3, 4), "forward", wrong=wrap, same=lambda model: model)
    assert said in (found_in(runs, "wrong").error or "")
    assert found_in(runs, "same").comparison is not None


def test_where_eager_fails_nothing_is_said_of_others() -> None:
    class Broken(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            raise ValueError("planted")

    runs = raced(Broken(2, 2), torch.ones(1, 2), "forward", same=lambda model: model)
    assert found_in(runs, "eager").error == "ValueError: planted"
    assert found_in(runs, "same").error == "there is nothing to compare it with: ValueError: planted"


def test_a_slow_contender_is_slower() -> None:
    def wrap(model: nn.Module) -> Callable[..., Any]:
        def slow(input: Tensor) -> Any:
            time.sleep(0.005)
            return model(input)

        return slow

    runs = raced(nn.Linear(4, 4), torch.ones(1, 4), "forward", slow=wrap)
    compared = found_in(runs, "slow").comparison
    assert compared is not None
    assert compared.speedup < 0.5
    assert compared.us > 5000
    assert compared.first_s is not None
    assert compared.first_s >= 0.005


def test_a_model_that_draws_random_numbers_may_differ_by_them() -> None:
    model = nn.Sequential(nn.Linear(16, 64), nn.Dropout(0.5), nn.Linear(64, 4)).train()

    def other_numbers(model: nn.Module) -> Callable[..., Any]:
        def call(input: Tensor) -> Any:
            torch.rand(1)
            return model(input)

        return call

    runs = raced(model, torch.randn(8, 16), "training", other=other_numbers)
    assert found_in(runs, "other").error is None
