"""Look-alikes that differ in one detail are each told apart."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernelwise._data import Binding, Recognition
from kernelwise._recognize import Unknown, condition, recognize, recognize_functions
from kernelwise._recognize._fit import PLAIN


class Norm(nn.Module):
    """The plain one: the weight after the cast."""

    def __init__(self, width: int = 24, eps: float = 1e-6) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))
        self.small = eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.small)
        return self.scale * y.to(x.dtype)


def options(answer: Recognition | Unknown) -> dict[str, object]:
    assert isinstance(answer, Recognition), answer
    return dict(answer.options)


def test_plain_norm_is_recognised_under_any_names():
    answer = recognize(Norm())
    assert isinstance(answer, Recognition)
    assert answer.op == "rms_norm"
    assert dict(answer.roles) == {
        "x": Binding("argument", "x"),
        "weight": Binding("attribute", "scale"),
        "eps": Binding("attribute", "small"),
    }
    assert dict(answer.options) == {"offset": 0.0, "cast": "before"}


class SameInOtherWords(Norm):
    def forward(self, x: Tensor) -> Tensor:
        y = x.to(torch.float32).to(torch.float32).float()
        variance = torch.mean(y * y, dim=2 if x.dim() == 3 else x.dim() - 1, keepdim=True)
        return (y * (self.small + variance) ** -0.5).type_as(x) * self.scale.view(-1).contiguous()


class SameWithDivision(Norm):
    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        return (y / torch.sqrt(y.square().mean(-1, keepdim=True) + self.small)).to(x.dtype) * self.scale


@pytest.mark.parametrize("cls", [SameInOtherWords, SameWithDivision])
def test_same_formula_in_other_words(cls):
    assert recognize(cls()) == recognize(Norm())


class CastAfter(Norm):
    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.small)
        return (self.scale * y).to(x.dtype)


class OnePlus(Norm):
    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.small)
        return (y * (1.0 + self.scale.float())).type_as(x)


class OnePlusBefore(Norm):
    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.small)
        return (1 + self.scale) * y.to(x.dtype)


class CastToTheWeight(Norm):
    def forward(self, x: Tensor) -> Tensor:
        y = x * torch.rsqrt(x.to(torch.float32).pow(2).mean(-1, keepdim=True) + self.small)
        if self.scale.dtype in (torch.float16, torch.bfloat16):
            y = y.to(self.scale.dtype)
        return self.scale * y


@pytest.mark.parametrize(
    ("cls", "offset", "cast"),
    [
        (CastAfter, 0.0, "after"),
        (OnePlus, 1.0, "after"),
        (OnePlusBefore, 1.0, "before"),
        (CastToTheWeight, 0.0, "weight"),
    ],
)
def test_variants_of_a_norm(cls, offset, cast):
    assert options(recognize(cls())) == {"offset": offset, "cast": cast}


class Prescaled(Norm):
    def forward(self, x: Tensor) -> Tensor:
        y = (x.float() * (1.0 + self.scale).float()).type_as(x).float()
        return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.small)).type_as(x)


class PrescaledUnrounded(Norm):
    def forward(self, x: Tensor) -> Tensor:
        y = x.float() * (1.0 + self.scale).float()
        return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.small)).type_as(x)


def test_weight_in_front_of_the_norm():
    answer = recognize(Prescaled())
    assert isinstance(answer, Recognition)
    assert (answer.op, dict(answer.options)) == ("rms_norm_prescaled", {"offset": 1.0})
    assert isinstance(recognize(PrescaledUnrounded()), Unknown)


class Inverse(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.small).to(x.dtype)


def test_what_a_norm_multiplies_with():
    answer = recognize(Inverse())
    assert isinstance(answer, Recognition)
    assert answer.op == "inverse_rms"
    assert dict(answer.roles)["eps"] == Binding("attribute", "small")


class EpsOutsideTheRoot(Norm):
    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y / (torch.sqrt(y.pow(2).mean(-1, keepdim=True)) + self.small)
        return self.scale * y.to(x.dtype)


class NoEps(Norm):
    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        return self.scale * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True))).to(x.dtype)


class MeanOverTheWrongAxis(Norm):
    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-2, keepdim=True) + self.small)
        return self.scale * y.to(x.dtype)


class MeanOverAxisTwo(Norm):
    """Right on three dimensions, wrong on four."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(2, keepdim=True) + self.small)
        return self.scale * y.to(x.dtype)


class SumForMean(Norm):
    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).sum(-1, keepdim=True) + self.small)
        return self.scale * y.to(x.dtype)


class NoFloat32(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return self.scale * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.small))


class Centred(Norm):
    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y - y.mean(-1, keepdim=True)
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.small)
        return self.scale * y.to(x.dtype)


class WithBias(Norm):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(24))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.bias


class TwoPlus(Norm):
    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.small)
        return (y * (2.0 + self.scale.float())).type_as(x)


class OneMinus(Norm):
    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.small)
        return (y * (1.0 - self.scale.float())).type_as(x)


class DetachedVariance(Norm):
    """The same values, another gradient."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.small).detach()
        return self.scale * y.to(x.dtype)


class VarianceWithoutGrad(Norm):
    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        with torch.no_grad():
            root = torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.small)
        return self.scale * (y * root).to(x.dtype)


class WholeWithoutGrad(Norm):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class LongInputsOtherwise(Norm):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if x.shape[-2] < 4096 else y * 2


class OneTokenOtherwise(Norm):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y * 2 if x.dim() > 1 and x.shape[-2] == 1 else y


class HalfOtherwise(Norm):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y.clamp(-1.0, 1.0) if x.dtype == torch.float16 else y


class KeepsState(Norm):
    def forward(self, x: Tensor) -> Tensor:
        self.calls = 1
        return super().forward(x)


class LooksAtData(Norm):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if x.abs().max() > 0 else x


class Noisy(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.rand_like(x) * 0


class WritesItsInput(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mul_(1.0))


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2


class CustomAutograd(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(Straight.apply(x))


class OptionalArgument(Norm):
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return super().forward(x) if scale == 1.0 else super().forward(x) * scale


class Keywords(Norm):
    def forward(self, x: Tensor, **kwargs: float) -> Tensor:
        return super().forward(x) * kwargs.get("scale", 1.0)


class TupleOfOne(Norm):
    def forward(self, x: Tensor) -> tuple[Tensor]:  # type: ignore[override]
        return (super().forward(x),)


class AnotherOutputDtype(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).float()


@pytest.mark.parametrize(
    "cls",
    [
        EpsOutsideTheRoot, NoEps, MeanOverTheWrongAxis, MeanOverAxisTwo, SumForMean, NoFloat32, Centred, WithBias, TwoPlus,
        OneMinus, DetachedVariance, VarianceWithoutGrad, WholeWithoutGrad, LongInputsOtherwise, OneTokenOtherwise,
        HalfOtherwise, KeepsState, LooksAtData, Noisy, WritesItsInput, CustomAutograd, OptionalArgument, Keywords,
        TupleOfOne, AnotherOutputDtype,
    ],
)  # fmt: skip
def test_no_norm_of_ours(cls):
    answer = recognize(cls())
    assert isinstance(answer, Unknown) or answer.op != "rms_norm", answer


@pytest.mark.parametrize(
    ("cls", "word"),
    [
        (LooksAtData, "depend on data"), (Noisy, "random"), (CustomAutograd, "gradient of its own"),
        (KeepsState, "writes to its attribute calls"), (WritesItsInput, "in-place"), (HalfOtherwise, "float16"),
        (OptionalArgument, "scale"),
    ],
)  # fmt: skip
def test_unknown_says_why(cls, word):
    answer = recognize(cls())
    assert isinstance(answer, Unknown)
    assert word in answer.reason


def test_second_instance_with_another_eps_is_not_the_first():
    class Fixed(Norm):
        def forward(self, x: Tensor) -> Tensor:
            y = x.float()
            y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + (1e-6 if self.small < 1e-3 else 1e-2))
            return self.scale * y.to(x.dtype)

    first, second = recognize(Fixed(eps=1e-6)), recognize(Fixed(eps=1.0))
    assert isinstance(first, Recognition)
    assert isinstance(second, Recognition)
    # The number in the first equals the attribute, but it does not come from it.
    assert dict(first.roles)["eps"] == Binding("constant", 1e-6)
    assert dict(second.roles)["eps"] == Binding("constant", 1e-2)


def test_number_is_bound_to_the_attribute_it_comes_from():
    class TwoNumbers(Norm):
        def __init__(self) -> None:
            super().__init__()
            self.decoy = 1e-6
            self.other = 1e-6

        def forward(self, x: Tensor) -> Tensor:
            assert self.decoy
            y = x.float()
            y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.other)
            return self.scale * y.to(x.dtype)

    answer = recognize(TwoNumbers())
    assert isinstance(answer, Recognition)
    assert dict(answer.roles)["eps"] == Binding("attribute", "other")


def test_eps_from_a_config_is_a_constant_that_follows_the_config():
    class Config:
        eps = 1e-5

    class FromConfig(Norm):
        def __init__(self, config: Config) -> None:
            super().__init__()
            self.config = config

        def forward(self, x: Tensor) -> Tensor:
            y = x.float()
            y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.config.eps)
            return self.scale * y.to(x.dtype)

    config = Config()
    layer = FromConfig(config)
    answer = recognize(layer)
    assert isinstance(answer, Recognition)
    assert dict(answer.roles)["eps"] == Binding("constant", 1e-5)
    config.eps = 1e-3
    answer = recognize(layer)
    assert isinstance(answer, Recognition)
    assert dict(answer.roles)["eps"] == Binding("constant", 1e-3)


# ---------------------------------------------------------------------------------------------------------------------


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


# ---------------------------------------------------------------------------------------------------------------------


def rotate(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def rotate_the_other_way(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((x[..., half:], -x[..., :half]), dim=-1)


def plain(q, k, cos, sin, unsqueeze_dim=1):
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return q * cos + rotate(q) * sin, k * cos + rotate(k) * sin


def swapped_names(first, second, sin, cos):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return first * cos + rotate(first) * sin, second * cos + rotate(second) * sin


def heads_second(q, k, cos, sin):
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    return q * cos + rotate(q) * sin, k * cos + rotate(k) * sin


def wrong_sign(q, k, cos, sin, unsqueeze_dim=1):
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return q * cos + rotate_the_other_way(q) * sin, k * cos + rotate_the_other_way(k) * sin


def minus(q, k, cos, sin, unsqueeze_dim=1):
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return q * cos - rotate(q) * sin, k * cos - rotate(k) * sin


def keys_untouched(q, k, cos, sin, unsqueeze_dim=1):
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return q * cos + rotate(q) * sin, k


def keys_first(q, k, cos, sin, unsqueeze_dim=1):
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return k * cos + rotate(k) * sin, q * cos + rotate(q) * sin


def scaled_queries(q, k, cos, sin, unsqueeze_dim=1):
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return (q * cos + rotate(q) * sin) * 0.125, k * cos + rotate(k) * sin


def takes_positions(q, k, cos, sin, position_ids=None, unsqueeze_dim=1):
    if position_ids is not None:
        cos, sin = cos[position_ids], sin[position_ids]
    return plain(q, k, cos, sin, unsqueeze_dim)


def ignores_positions(q, k, cos, sin, position_ids=None, unsqueeze_dim=1):
    return plain(q, k, cos, sin, unsqueeze_dim)


def answer_for(function):
    space = {**globals(), "the_function": function}
    exec("def forward(self, q, k, cos, sin): return the_function(q, k, cos, sin)", space)
    cls = type("Attention", (nn.Module,), {"forward": space["forward"]})
    return dict(recognize_functions(cls())).get("the_function")


def test_rotary_function():
    answer = answer_for(plain)
    assert answer is not None
    assert answer.op == "rotary"
    assert dict(answer.options)["layout"] == "half"
    assert {role: b.value for role, b in answer.roles} == {
        "q": "q", "k": "k", "cos": "cos", "sin": "sin", "unsqueeze_dim": "unsqueeze_dim",
    }  # fmt: skip


def test_rotary_roles_do_not_come_from_names():
    answer = answer_for(swapped_names)
    assert {role: b.value for role, b in answer.roles} == {
        "q": "first", "k": "second", "cos": "cos", "sin": "sin", "unsqueeze_dim": 1,
    }  # fmt: skip


def test_rotary_with_heads_second():
    assert dict(answer_for(heads_second).roles)["unsqueeze_dim"] == Binding("constant", 2)


def test_argument_that_is_never_read():
    assert answer_for(ignores_positions) is not None


@pytest.mark.parametrize("function", [minus, keys_untouched, scaled_queries, takes_positions])
def test_no_rotary_function(function):
    assert answer_for(function) is None


def test_rotary_outputs_in_another_order_bind_the_other_way():
    answer = answer_for(keys_first)
    assert answer is None or dict(answer.roles)["q"].value == "k"


def test_replaced_helper_changes_the_answer():
    assert dict(answer_for(plain).options)["layout"] == "half"
    space = plain.__globals__
    kept = space["rotate"]
    try:
        space["rotate"] = rotate_the_other_way
        assert dict(answer_for(plain).options)["layout"] == "half_backwards"
    finally:
        space["rotate"] = kept
    assert dict(answer_for(plain).options)["layout"] == "half"


# ---------------------------------------------------------------------------------------------------------------------


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


def vision(q, k, cos, sin):
    kept = q.dtype, k.dtype
    q, k = q.float(), k.float()
    cos, sin = cos.unsqueeze(-2).float(), sin.unsqueeze(-2).float()
    return (q * cos + rotate(q) * sin).to(kept[0]), (k * cos + rotate(k) * sin).to(kept[1])


def partial(q, k, cos, sin, unsqueeze_dim=1):
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    width = cos.shape[-1]
    a, b = q[..., :width], k[..., :width]
    return (
        torch.cat([a * cos + rotate(a) * sin, q[..., width:]], dim=-1),
        torch.cat([b * cos + rotate(b) * sin, k[..., width:]], dim=-1),
    )


def partial_in_a_way_nobody_knows(q, k, cos, sin, unsqueeze_dim=1):
    width = cos.shape[-1]
    a, b = plain(q[..., -width:], k[..., -width:], cos, sin, unsqueeze_dim)
    return torch.cat([q[..., :-width], a], dim=-1), torch.cat([k[..., :-width], b], dim=-1)


def rounded(q, k, cos, sin, unsqueeze_dim=1):
    a, b = plain(q, k, cos, sin, unsqueeze_dim)
    return a.to(q.dtype), b.to(k.dtype)


def chunked(q, k, cos, sin, unsqueeze_dim=1):
    def one(x):
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return one(q), one(k)


def interleaved(q, k, cos, sin, unsqueeze_dim=1):
    def turn(x):
        return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)

    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return q * cos + turn(q) * sin, k * cos + turn(k) * sin


@pytest.mark.parametrize(
    ("function", "op", "chosen"),
    [
        (plain, "rotary", ("half", "full", "promoted", "all")),
        (partial, "rotary", ("half", "full", "promoted", "first")),
        (rounded, "rotary", ("half", "full", "result", "all")),
        (chunked, "rotary", ("half", "half", "promoted", "all")),
        (interleaved, "rotary", ("interleaved", "full", "promoted", "all")),
        (wrong_sign, "rotary", ("half_backwards", "full", "promoted", "all")),
        (vision, "rotary_vision", ("half", "full", "float32", "all")),
    ],
)
def test_layouts_of_rotary(function, op, chosen):
    answer = answer_for(function)
    assert answer is not None
    assert answer.op == op
    assert tuple(value for _, value in answer.options) == chosen


def test_part_that_is_turned_matters():
    assert answer_for(partial_in_a_way_nobody_knows) is None


class Grouped(nn.Module):
    def __init__(self, group_size: int = 8) -> None:
        super().__init__()
        self.weight, self.eps, self.size, self.decoy = nn.Parameter(torch.ones(24)), 1e-6, group_size, group_size

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        y = x.float()
        if gate is not None:
            y = y * F.silu(gate.float())
        y = y.view(*x.shape[:-1], -1, self.size)
        y = (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)).view(x.shape)
        return self.weight * y.to(x.dtype)


class IgnoresItsGate(Grouped):
    """Without a gate it is no norm at all."""

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        return super().forward(x, gate) if gate is not None else x


def test_groups_of_a_gated_norm():
    answer = recognize(Grouped())
    assert isinstance(answer, Recognition), answer
    assert answer.op == "rms_norm_gated_grouped"
    assert {role: b.value for role, b in answer.roles} == {
        "x": "x", "gate": "gate", "weight": "weight", "eps": "eps", "group_size": "size",
    }  # fmt: skip
    again = recognize(Grouped(4))
    assert again == answer
    answer = recognize(IgnoresItsGate())
    assert isinstance(answer, Unknown)
    assert "not without gate" in answer.reason


def test_a_gate_that_does_not_fit_gets_the_layers_own_code():
    fits = condition(recognize(Grouped()))
    x = torch.ones(2, 24)
    for gate, expected in ((None, True), (x, True), (x.half(), False), (x[:1], False)):
        assert eval(fits, {PLAIN: {Tensor}, "x": x, "gate": gate}) is expected


class OnGpuOtherwise(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return self.helped(x)

    def helped(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y * 2 if x.is_cuda else y


def test_branch_on_the_device_is_unknown():
    answer = recognize(OnGpuOtherwise())
    assert isinstance(answer, Unknown)
    assert "is_cuda" in answer.reason
