"""What Kernelwise may cost: a call, and memory. Times are differences of the fastest of interleaved repeats."""

from __future__ import annotations

import gc
import timeit
from collections.abc import Callable
from typing import Any

import fakes
import models
import pytest
import torch
from fakes import kernel, only
from torch import nn

import kernelwise as kw


def overhead_us(model: nn.Module, direct: Callable[[], Any], call: Callable[[], Any]) -> float:
    """How much longer a call takes than the kernel alone, in microseconds: the difference of the fastest repeats."""
    number = 500
    timers = [timeit.Timer(function) for function in (direct, call)]
    for timer in timers:
        timer.timeit(number)
    fastest = [min(column) for column in zip(*[[t.timeit(number) for t in timers] for _ in range(160)], strict=True)]
    return (fastest[1] - fastest[0]) / number * 1e6


class Cheap(nn.Module):
    """A kernel that does next to nothing, so that what is measured is the way to it."""

    can_torch_compile = True

    def forward(self, hidden_states):  # type: ignore[no-untyped-def]
        return hidden_states


class CheapReading(nn.Module):
    """Reads of the module what a norm reads."""

    can_torch_compile = True

    def forward(self, hidden_states):  # type: ignore[no-untyped-def]
        self.weight, self.variance_epsilon  # noqa: B018
        return hidden_states


class CheapForwardOnly(nn.Module):
    can_torch_compile = True
    has_backward = False

    def forward(self, hidden_states):  # type: ignore[no-untyped-def]
        return hidden_states


X = torch.randn(1, 8)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(("of_kernel", "most_us"), [(Cheap, 1.0), (CheapReading, 1.0), (CheapForwardOnly, 2.5)])
def test_a_call_costs_little_more_than_the_kernel_itself(
    of_kernel: type[nn.Module], most_us: float, grad: bool
) -> None:
    """A layer class; with gradients on, the kernel runs on frozen weights, as it does where none is needed."""
    norm = models.Norm().requires_grad_(False)
    kw.kernelize(norm, only({"RMSNorm": f"package:{__name__}:{of_kernel.__name__}"}))
    forward, function = norm.forward, of_kernel.forward
    with torch.set_grad_enabled(grad):
        assert forward(X) is X
        cost = overhead_us(norm, lambda: function(norm, X), lambda: forward(X))
    print(f"\n{of_kernel.__name__}, gradients {'on' if grad else 'off'}: {cost:.2f} us more a call")
    assert cost <= most_us


def test_a_call_in_training_costs_little_more_than_the_kernel_itself() -> None:
    """Weights and input need gradients and the kernel gives them."""
    norm = models.Norm()
    kw.kernelize(norm, only({"RMSNorm": f"package:{__name__}:Cheap"}))
    x = torch.randn(1, 8, requires_grad=True)
    forward, function = norm.forward, Cheap.forward
    assert forward(x) is x
    cost = overhead_us(norm, lambda: function(norm, x), lambda: forward(x))
    print(f"\nCheap, training: {cost:.2f} us more a call")
    assert cost <= 1.0


@pytest.mark.parametrize("grad", [False, True])
def test_a_kernel_by_roles_costs_little_more_than_itself(grad: bool) -> None:
    from roles import role_plan

    def cheap(x, weight, eps, *, offset=0.0, cast="before"):  # type: ignore[no-untyped-def]
        return x

    norm = models.Norm()
    kw.apply(norm, role_plan(norm, cheap))
    forward, weight, eps = norm.forward, norm.weight, norm.variance_epsilon
    with torch.set_grad_enabled(grad):
        assert forward(X) is X
        direct: Callable[[], Any] = lambda: cheap(x=X, weight=weight, eps=eps, offset=0.0, cast="before")  # noqa: E731
        cost = overhead_us(norm, direct, lambda: forward(X))
    print(f"\nby roles, gradients {'on' if grad else 'off'}: {cost:.2f} us more a call")
    assert cost <= 1.0


@pytest.mark.parametrize("grad", [False, True])
def test_a_kernel_that_calls_children_costs_little_more_than_itself(grad: bool) -> None:
    """An MLP, whose kernel stands for its activation too and is held by what that is."""
    from roles import role_plan
    from transformers.activations import ACT2FN

    def cheap(x, gate, up, down, *, activation="silu"):  # type: ignore[no-untyped-def]
        return x

    class MLP(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(8, 8, bias=False) for _ in range(3))
            self.act_fn = ACT2FN["silu"]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
            return y

    mlp = MLP()
    kw.apply(mlp, role_plan(mlp, cheap, op="gated_mlp"))
    forward, gate, up, down = mlp.forward, mlp.gate_proj, mlp.up_proj, mlp.down_proj
    with torch.set_grad_enabled(grad):
        assert forward(X) is X
        direct: Callable[[], Any] = lambda: cheap(x=X, gate=gate, up=up, down=down, activation="silu")  # noqa: E731
        cost = overhead_us(mlp, direct, lambda: forward(X))
    print(f"\nwith children, gradients {'on' if grad else 'off'}: {cost:.2f} us more a call")
    assert cost <= 1.0


def test_no_parameter_is_copied() -> None:
    """Neither by putting in, calling and taking out, nor by a plan: no storage comes up beside those of the model."""
    model = models.Stack(*(models.Norm(4096) for _ in range(8)))
    pointers = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    expected = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())

    def held() -> int:
        gc.collect()
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for tensor in gc.get_objects()
            if type(tensor) in (torch.Tensor, nn.Parameter) and tensor.device.type == "cpu"
        }
        return sum(storages.values())

    before = held()
    config = only({"RMSNorm": kernel(fakes.GoodNorm)})
    kw.kernelize(model, config)
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == pointers
    assert held() - before < expected / 100
    kw.kernelize(model)
    kw.unkernelize(model)
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == pointers
    assert held() - before < expected / 100


def test_kernelizing_again_and_again_keeps_nothing() -> None:
    """What a kernelization holds is gone after undoing it: the number of live objects does not grow."""
    model = models.Stack(*(models.Norm() for _ in range(20)), models.TwoFunctions())
    config = only({"RMSNorm": kernel(fakes.GoodNorm), "double": kernel(fakes.MarkedDouble)})

    def once() -> None:
        kw.kernelize(model, config)
        with torch.no_grad():
            model(X)
        kw.unkernelize(model)

    for _ in range(3):
        once()
    gc.collect()
    before = len(gc.get_objects())
    for _ in range(10):
        once()
    gc.collect()
    assert len(gc.get_objects()) - before < 100
