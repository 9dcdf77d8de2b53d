"""Gated MLPs that differ in one detail are each told apart."""

from __future__ import annotations

import pytest
import torch
from test_norms import Norm, options
from torch import Tensor, nn
from torch.nn import functional as F

from kernelwise._data import Binding, Recognition
from kernelwise._recognize import Unknown, recognize


class Mlp(nn.Module):
    def __init__(self, activation=None) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(24, 40), nn.Linear(24, 40, bias=False), nn.Linear(40, 24)
        self.act = nn.SiLU() if activation is None else activation

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.act(self.a(x)) * self.b(x))


def test_gate_and_up_are_told_apart():
    class Swapped(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.a(x) * self.act(self.b(x)))

    plain, swapped = recognize(Mlp()), recognize(Swapped())
    assert isinstance(plain, Recognition)
    assert isinstance(swapped, Recognition)
    assert plain.op == swapped.op == "gated_mlp"
    assert {role: b.value for role, b in plain.roles} == {"x": "x", "gate": "a", "up": "b", "down": "c"}
    assert {role: b.value for role, b in swapped.roles} == {"x": "x", "gate": "b", "up": "a", "down": "c"}


def test_equal_widths_do_not_confuse_the_children():
    layer = Mlp()
    layer.a, layer.b, layer.c = nn.Linear(24, 24), nn.Linear(24, 24), nn.Linear(24, 24)
    answer = recognize(layer)
    assert isinstance(answer, Recognition)
    assert {role: b.value for role, b in answer.roles} == {"x": "x", "gate": "a", "up": "b", "down": "c"}


@pytest.mark.parametrize(
    ("activation", "name"),
    [
        (nn.SiLU(), "silu"), (nn.GELU(), "gelu"), (nn.GELU(approximate="tanh"), "gelu_tanh"), (nn.ReLU(), "relu"),
        (F.silu, "silu"), (nn.Sequential(nn.SiLU()), "silu"), (nn.Sigmoid(), "sigmoid"),
        (lambda x: x * torch.sigmoid(1.702 * x), "quick_gelu"),
    ],
)  # fmt: skip
def test_second_instance_with_another_activation(activation, name):
    assert options(recognize(Mlp()))["activation"] == "silu"
    assert options(recognize(Mlp(activation)))["activation"] == name


@pytest.mark.parametrize(
    "activation",
    [
        nn.LeakyReLU(0.3),
        nn.ELU(0.7),
        nn.Identity(),
        lambda x: x * torch.sigmoid(1.7 * x),
        nn.PReLU(),
        nn.Softplus(),
        nn.SiLU,
    ],
)
def test_unknown_activation(activation):
    if activation is nn.SiLU:  # somebody watches this one
        activation = nn.SiLU()
        activation.register_forward_hook(lambda module, args, output: output * 2)
    assert isinstance(recognize(Mlp(activation)), Unknown)


def test_instance_with_its_own_forward_on_the_activation_is_unknown():
    layer = Mlp()
    assert isinstance(recognize(layer), Recognition)
    layer.act.forward = torch.relu  # type: ignore[method-assign]
    answer = recognize(layer)
    assert isinstance(answer, Unknown)


def test_hook_on_a_leaf_child_stays_with_the_child():
    layer = Mlp()
    layer.a.register_forward_hook(lambda module, args, output: output * 2)
    assert isinstance(recognize(layer), Recognition)


class Scaled(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 0.5


class Residual(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class ExtraBias(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(24))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.bias


class GateTwice(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.act(self.a(x)) * self.a(x))


class NoUp(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.act(self.a(x)))


class Clamped(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.act(self.a(x)).clamp(max=7.0) * self.b(x))


class ReadsTheWeight(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.act(x @ self.a.weight.t()) * self.b(x))


@pytest.mark.parametrize("cls", [Scaled, Residual, ExtraBias, GateTwice, NoUp, Clamped, ReadsTheWeight])
def test_no_gated_mlp(cls):
    answer = recognize(cls())
    assert isinstance(answer, Unknown) or answer.op != "gated_mlp", answer


def test_dropout_counts_in_training_alone():
    class Dropping(Mlp):
        def __init__(self, p: float) -> None:
            super().__init__()
            self.drop = nn.Dropout(p)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.drop(self.act(self.a(x)) * self.b(x)))

    layer = Dropping(0.1)
    assert isinstance(recognize(layer.eval()), Recognition)
    answer = recognize(layer.train())
    assert isinstance(answer, Unknown)
    assert "random" in answer.reason
    assert isinstance(recognize(layer, training=False), Recognition)
    assert isinstance(recognize(layer.eval(), training=True), Unknown)
    assert isinstance(recognize(Dropping(0.0).train()), Recognition)


class WidensForDown(Mlp):
    """As T5: right in one dtype, another computation where the last weight is kept in float32."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.a(x)) * self.b(x)
        return self.c(y.to(self.c.weight.dtype))


def test_input_cast_to_the_dtype_of_the_last_weight():
    answer = recognize(WidensForDown())
    assert isinstance(answer, Recognition)
    assert answer.op == "gated_mlp_cast"


class Normed(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.norm = Norm(40)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.norm(self.act(self.a(x)) * self.b(x)))


class Bounded(Mlp):
    limit = 7.0

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.a(x).clamp(max=self.limit), self.b(x).clamp(min=-self.limit, max=self.limit)
        return self.c(self.act(gate) * up)


class BoundedLate(Bounded):
    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.act(self.a(x)).clamp(max=self.limit), self.b(x).clamp(min=-self.limit, max=self.limit)
        return self.c(gate * up)


class Lopsided(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.a(x).clamp(max=7.0), self.b(x).clamp(min=-6.0, max=7.0)
        return self.c(self.act(gate) * up)


def test_relatives_of_the_gated_block():
    normed, bounded = recognize(Normed()), recognize(Bounded())
    assert isinstance(normed, Recognition), normed
    assert isinstance(bounded, Recognition)
    assert normed.op == "gated_mlp_normed"
    assert bounded.op == "gated_mlp_clamped"
    late = recognize(BoundedLate())
    assert isinstance(late, Recognition)
    assert "clamp" not in dict(bounded.options)
    assert dict(late.options)["clamp"] == "after"
    assert dict(bounded.roles)["limit"] in (Binding("attribute", "limit"), Binding("constant", 7.0))
    assert isinstance(recognize(Lopsided()), Unknown)


class CastsWhatTheGateGives(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.act(self.a(x).to(x.dtype)) * self.b(x))


def test_cast_that_matters_where_a_child_gives_another_dtype():
    answer = recognize(CastsWhatTheGateGives())
    assert isinstance(answer, Unknown)
    assert "another dtype" in answer.reason


class ByTheDtypesOfTwo(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.a(x), self.b(x)
        if gate.dtype != up.dtype:
            up = up * 2
        return self.c(self.act(gate) * up)


class ByTheDtypeOfOne(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.a(x), self.b(x)
        if gate.dtype == torch.float32 and x.dtype == torch.bfloat16 and up.dtype == torch.bfloat16:
            up = up * 2
        return self.c(self.act(gate) * up)


class ByOneInFloat32(Mlp):
    """As a model in float16 does that keeps a layer in float32."""

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.a(x), self.b(x)
        if gate.dtype == torch.float32 and up.dtype == torch.float16:
            gate = gate * 2
        return self.c(self.act(gate) * up)


class ThreeInOneDtype(Mlp):
    """Asks for dtypes, and takes no others."""

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.a(x), self.b(x)
        if gate.dtype != up.dtype:
            raise TypeError("gate and up differ")
        return self.c(self.act(gate) * up)


class NamesakeOfAChild(Mlp):
    """Its argument is called as one of its children."""

    def forward(self, a: Tensor) -> Tensor:
        gate, up = self.a(a), self.b(a)
        if gate.dtype == torch.float64:
            gate = gate * 2
        return self.c(self.act(gate) * up)


def test_children_that_give_different_dtypes():
    for cls in (ByTheDtypesOfTwo, ByTheDtypeOfOne, ByOneInFloat32):
        answer = recognize(cls())
        assert isinstance(answer, Unknown), cls
        assert "a giving float32" in answer.reason
    for cls in (ThreeInOneDtype, NamesakeOfAChild):
        answer = recognize(cls())
        assert isinstance(answer, Recognition), cls
        assert answer.op == "gated_mlp"
