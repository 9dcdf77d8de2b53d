"""Linear layers and activations that differ in one detail, and forwards that were replaced."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from test_gated_mlps import Mlp
from test_norms import Norm
from torch import Tensor, nn
from torch.nn import functional as F

from kernelwise._data import Binding, Recognition
from kernelwise._recognize import Unknown, recognize


class Transposed(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return x @ self.weight


class ScaledLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return F.linear(x, self.weight * 2, self.bias)


class Square(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return F.linear(x, self.weight.t(), self.bias)


@pytest.mark.parametrize("layer", [Transposed(24, 24), Transposed(40, 24), ScaledLinear(24, 40), Square(24, 24)])
def test_no_linear(layer):
    assert isinstance(recognize(layer), Unknown)


def test_linear_and_its_bias():
    with_bias, without = recognize(nn.Linear(24, 40)), recognize(nn.Linear(24, 40, bias=False))
    assert isinstance(with_bias, Recognition)
    assert isinstance(without, Recognition)
    assert dict(with_bias.roles)["bias"] == Binding("attribute", "bias")
    assert dict(without.roles)["bias"] == Binding("constant", None)


def test_parametrized_linear_is_unknown():
    class Half(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight * 0.5

    layer = nn.Linear(24, 40)
    assert isinstance(recognize(layer), Recognition)
    nn.utils.parametrize.register_parametrization(layer, "weight", Half())
    assert isinstance(recognize(layer), Unknown)


def test_forward_replaced_on_the_instance():
    layer = Norm()
    layer.forward = lambda x: x  # type: ignore[method-assign]
    answer = recognize(layer)
    assert isinstance(answer, Unknown)
    assert "replaced" in answer.reason


def test_wrapper_around_forward_of_accelerate_is_looked_under():
    accelerate = pytest.importorskip("accelerate")
    layer = Norm()
    accelerate.hooks.add_hook_to_module(layer, accelerate.hooks.ModelHook())
    assert recognize(layer) == recognize(Norm())


def test_deepcopy_gets_the_same_answer():
    layer = Mlp()
    assert recognize(copy.deepcopy(layer)) == recognize(layer)


def test_constants_of_gelu_are_compared():
    class NearlyGelu(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.0447 * torch.pow(x, 3.0))))

    assert isinstance(recognize(Mlp(NearlyGelu())), Unknown)
