"""Norms that differ in one detail are each told apart."""

from __future__ import annotations

import pytest
import torch
from layers import reason, with_forward
from torch import Tensor, nn
from torch.nn import functional as F

from kernelwise._data import Binding, Recognition
from kernelwise._recognize import Unknown, condition, recognize
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


def no_arguments(self): ...


def three_arguments(self, x, height, width): ...


def two_that_may_be_none(self, x, gate=None, mask=None):
    return x if gate is None and mask is None else gate


def all_may_be_none(self, x=None):
    return x


@pytest.mark.parametrize(
    ("forward", "takes"),
    [
        (no_arguments, "nothing"), (three_arguments, "x, height, width"),
        (two_that_may_be_none, "x, gate=None, mask=None"), (all_may_be_none, "x=None"),
    ],
)  # fmt: skip
def test_too_many_or_too_few_arguments_are_named_beside_what_is_known(forward, takes):
    known = "known operations take one tensor, or two, the second of which may be None"
    assert reason(with_forward(Norm, forward)) == f"its forward takes {takes}; {known}"


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
