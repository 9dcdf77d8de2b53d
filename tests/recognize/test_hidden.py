"""Layers that hide what they do: behind a dtype, in a container, in a mode, in an exception that they swallow."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from layers import MLP, Layer, Norm, operation, reason, rms, with_forward
from torch import Tensor, nn
from torch.nn import functional as F

import kernelwise._recognize as recognition
from kernelwise._recognize import Recognizer


def test_the_plain_ones_are_recognised():
    assert [operation(module) for module in (Norm(), MLP(), Layer())] == ["rms_norm", "gated_mlp", "decoder_layer"]


# --- behind a dtype, a shape, an argument -----------------------------------------------------------------------------


def bounded_in_float16(self: Any, x: Tensor) -> Tensor:
    y = rms(x, self.weight, self.eps)
    return y / 2 if x.dtype == torch.float16 and x.abs().max() > 3 else y


def dropped_for_one_token(self: Any, x: Tensor) -> Tensor:
    return rms(F.dropout(x, 0.1) if x.shape[1] == 1 else x, self.weight, self.eps)


def random_in_four_dimensions(self: Any, x: Tensor) -> Tensor:
    return rms(x * torch.rand(()) if x.dim() == 4 else x, self.weight, self.eps)


def writes_in_float32(self: Any, x: Tensor) -> Tensor:
    return rms(x.mul_(2) if x.dtype == torch.float32 else x, self.weight, self.eps)


def looks_at_numbers_in_float16(self: Any, x: Tensor) -> Tensor:
    return rms(x * 2 if x.dtype == torch.float16 and x.numpy()[0, 0, 0] > 1 else x, self.weight, self.eps)


@pytest.mark.parametrize(
    ("forward", "why"),
    [
        (bounded_in_float16, "depend on data"),
        (dropped_for_one_token, "random"),
        (random_in_four_dimensions, "random"),
        (writes_in_float32, "in-place"),
        (looks_at_numbers_in_float16, "without data"),
    ],
)
def test_what_cannot_be_traced_in_one_round_makes_the_layer_unknown(forward: Callable[..., Any], why: str):
    assert why in reason(with_forward(Norm, forward))


def test_a_layer_that_refuses_a_shape_is_still_known():
    def forward(self: Any, x: Tensor) -> Tensor:
        if x.dtype == torch.float16:
            raise ValueError("not in float16")
        return rms(x, self.weight, self.eps)

    assert operation(with_forward(Norm, forward)) == "rms_norm"


def without_mask(self: Any, x: Tensor, mask: Any = None) -> Tensor:
    if mask is None and x.max() > 5:
        x = x / 2
    return Layer.forward(self, x, mask)


def dropped_without_mask(self: Any, x: Tensor, mask: Any = None) -> Tensor:
    if mask is None:
        x = F.dropout(x, 0.1)
    return Layer.forward(self, x, mask)


@pytest.mark.parametrize("forward", [without_mask, dropped_without_mask])
def test_what_cannot_be_traced_without_an_argument_makes_the_layer_unknown(forward: Callable[..., Any]):
    assert operation(with_forward(Layer, forward)) is None


# --- swallowed exceptions ---------------------------------------------------------------------------------------------


def counts_if_it_can(self: Any, x: Tensor) -> Tensor:
    with contextlib.suppress(Exception):
        self.calls += 1
    return rms(x, self.weight, self.eps)


def looks_if_it_can(self: Any, x: Tensor) -> Tensor:
    with contextlib.suppress(RuntimeError):
        x = x / 2 if x.abs().max() > 10 else x
    return rms(x, self.weight, self.eps)


@pytest.mark.parametrize(("forward", "why"), [(counts_if_it_can, "writes to its"), (looks_if_it_can, "on data")])
def test_a_refusal_that_the_layer_swallows_is_not_lost(forward: Callable[..., Any], why: str):
    assert why in reason(with_forward(Norm, forward))


# --- gradients --------------------------------------------------------------------------------------------------------


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -grad


def reversed_before_the_children(self: Any, x: Tensor) -> Tensor:
    return MLP.forward(self, Reversed.apply(x))


def reversed_before_the_last(self: Any, x: Tensor) -> Tensor:
    return self.down(Reversed.apply(self.act(self.gate(x)) * self.up(x)))


def gate_without_gradient(self: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        gate = self.gate(x)
    return self.down(self.act(gate) * self.up(x))


def hooked(self: Any, x: Tensor) -> Tensor:
    y = MLP.forward(self, x)
    y.register_hook(lambda grad: grad * 0.1)
    return y


@pytest.mark.parametrize(
    ("forward", "why"),
    [
        (reversed_before_the_children, "gradient of its own"),
        (reversed_before_the_last, "gradient of its own"),
        (gate_without_gradient, "no known operation"),
        (hooked, "hook on a gradient"),
    ],
)
def test_another_gradient_makes_the_layer_unknown(forward: Callable[..., Any], why: str):
    assert why in reason(with_forward(MLP, forward))


# --- children that are called for something else ----------------------------------------------------------------------


class Observed(MLP):
    def __init__(self) -> None:
        super().__init__()
        self.observer = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.observer(x)
        return super().forward(x)


class CalledTwice(MLP):
    def forward(self, x: Tensor) -> Tensor:
        self.gate(x)
        return super().forward(x)


def test_a_child_that_is_called_and_not_used_makes_the_layer_unknown():
    assert "something else than its result" in reason(Observed())
    assert "twice" in reason(CalledTwice())


# --- containers -------------------------------------------------------------------------------------------------------


def test_another_length_of_a_container_is_another_layer():
    assert operation(MLP(nn.Sequential(nn.SiLU()))) == "gated_mlp"
    assert operation(MLP(nn.Sequential(nn.SiLU(), nn.Tanh()))) is None
    assert operation(MLP(before=())) == "gated_mlp"
    assert operation(MLP(before=(nn.Tanh(),))) is None
    assert operation(MLP(nn.Sequential(nn.Sequential(nn.SiLU())))) == "gated_mlp"
    assert operation(MLP(nn.Sequential(nn.Sequential(nn.SiLU(), nn.Tanh())))) is None


def test_a_container_that_grows_is_asked_about_again():
    module = MLP(nn.Sequential(nn.SiLU()))
    assert operation(module) == "gated_mlp"
    module.act.append(nn.Tanh())
    assert operation(module) is None


# --- modes ------------------------------------------------------------------------------------------------------------


class Dropping(MLP):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.drop(self.act(self.gate(x)) * self.up(x)))


def test_dropout_that_is_on_in_inference_makes_the_layer_unknown():
    module = Dropping().eval()
    assert operation(module, training=False) == "gated_mlp"
    module.drop.train()
    assert "drop is in another mode" in reason(module, training=False)
    module.train()
    assert operation(module, training=False) == "gated_mlp"  # asked as if eval() were called on all of it
    module.drop.eval()
    assert "drop is in another mode" in reason(module, training=False)


@pytest.mark.parametrize("mode", [True, False])
def test_layers_with_dropout_are_remembered(mode: bool, monkeypatch: pytest.MonkeyPatch):
    traced = []
    find = recognition.find
    monkeypatch.setattr(recognition, "find", lambda *args, **kwargs: traced.append(args) or find(*args, **kwargs))
    modules = [type("Own", (Dropping,), {"forward": Dropping.forward})().train(mode)]
    modules += [type(modules[0])().train(mode) for _ in range(3)]
    recognizer = Recognizer()
    answers = [recognizer.both(module) for module in modules]
    assert len(traced) == 2  # once for each mode
    assert all(inference.recognition and not training.recognition for inference, training in answers)
    modules[0].train(not mode)
    assert Recognizer().both(modules[0]) == answers[0]
    assert len(traced) == 2


# --- state ------------------------------------------------------------------------------------------------------------


def logs(self: Any, x: Tensor) -> Tensor:
    self.log.append(x.shape[1])
    return rms(x, self.weight, self.eps)


def counts_in_a_dict(self: Any, x: Tensor) -> Tensor:
    self.state["calls"] += 1
    return rms(x, self.weight, self.eps)


COUNT = 0


def counts_in_a_global(self: Any, x: Tensor) -> Tensor:
    global COUNT
    COUNT += 1
    return rms(x, self.weight, self.eps)


@pytest.mark.parametrize(
    ("forward", "why"),
    [(logs, "to a list"), (counts_in_a_dict, "to a dict"), (counts_in_a_global, "to a global variable")],
)
def test_a_layer_that_keeps_account_of_its_calls_is_unknown(forward: Callable[..., Any], why: str):
    assert why in reason(with_forward(Norm, forward))
    assert COUNT == 0


def test_a_function_child_that_keeps_account_makes_the_layer_unknown():
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[int] = []

        def forward(self, x: Tensor) -> Tensor:
            self.seen.append(1)
            return F.silu(x)

    assert "to a list" in reason(MLP(Counting()))


def test_lists_and_dicts_can_be_read():
    class Listed(Norm):
        def __init__(self) -> None:
            super().__init__()
            self.numbers, self.named = [1e-6, 2.0], {"eps": 1e-6}

        def forward(self, x: Tensor) -> Tensor:
            eps, two = self.numbers
            return rms(x, self.weight, min(eps, self.named["eps"], len(self.numbers), *self.numbers[1:], two))

    assert operation(Listed()) == "rms_norm"


class TypeOfSelf(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return rms(x * 2 if type(self) is TypeOfSelf else x, self.weight, self.eps)


class ClassOfSelf(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return rms(x * 2 if self.__class__ is ClassOfSelf else x, self.weight, self.eps)


class AttributeOfItsType(Norm):
    small = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return rms(x, self.weight, type(self).small)


def test_a_layer_that_asks_for_its_own_class_is_not_taken_for_another():
    assert operation(TypeOfSelf()) is None
    assert operation(ClassOfSelf()) is None
    assert operation(AttributeOfItsType()) == "rms_norm"


def by_grad_mode(self: Any, x: Tensor) -> Tensor:
    return rms(x if torch.is_grad_enabled() else x * 2, self.weight, self.eps)


def by_layout(self: Any, x: Tensor) -> Tensor:
    return rms(x if x.is_contiguous() else x * 2, self.weight, self.eps)


def by_inference(self: Any, x: Tensor) -> Tensor:
    return rms(x * 2 if x.is_inference() else x, self.weight, self.eps)


def by_compiler(self: Any, x: Tensor) -> Tensor:
    return rms(x * 2 if torch.compiler.is_compiling() else x, self.weight, self.eps)


def by_environment(self: Any, x: Tensor) -> Tensor:
    return rms(x * 2 if os.environ.get("DOUBLE") else x, self.weight, self.eps)


def by_device(self: Any, x: Tensor) -> Tensor:
    return rms(x * 2 if x.is_cuda else x, self.weight, self.eps)


@pytest.mark.parametrize("forward", [by_grad_mode, by_layout, by_inference, by_compiler, by_environment, by_device])
def test_what_inputs_do_not_decide_makes_the_layer_unknown(forward: Callable[..., Any]):
    assert "more than its inputs" in reason(with_forward(Norm, forward))


def by_frozen_weight(self: Any, x: Tensor) -> Tensor:
    return rms(x if self.weight.requires_grad else x * 2, self.weight, self.eps)


def by_chance(self: Any, x: Tensor) -> Tensor:
    return rms(x * 2 if random.random() < 1e-9 else x, self.weight, self.eps)


@pytest.mark.parametrize("forward", [by_frozen_weight, by_chance])
def test_a_rare_branch_makes_the_layer_unknown(forward: Callable[..., Any]):
    assert "more than its inputs" in reason(with_forward(Norm, forward))


class OtherAttributes(Norm):
    def __getattribute__(self, name: str) -> Any:
        return 0.5 if name == "eps" else super().__getattribute__(name)


def test_attributes_that_code_answers_make_the_layer_unknown():
    assert "__getattribute__" in reason(OtherAttributes())


class CalledOtherwise(Norm):
    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) * 2


def test_a_norm_that_is_called_in_another_way_is_no_norm_of_a_layer():
    layer = Layer()
    assert operation(layer) == "decoder_layer"
    layer.norm2 = CalledOtherwise()
    assert operation(layer) is None
