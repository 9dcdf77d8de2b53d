"""`kw.register_op`: an operation with kernels, from recognition to undo."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import kernelwise as kw
from kernelwise import ops
from kernelwise._register import unregister_op

ROLES = {"x": "argument B S H", "scale": "attribute H", "slope": "number"}


def scaled_tanh(x: Tensor, scale: Tensor, slope: float, *, squared: bool = False) -> Tensor:
    y = torch.tanh(x * slope)
    return (y * y if squared else y) * scale


def fast(x: Tensor, scale: Tensor, slope: float) -> Tensor:
    fast.calls += 1
    return torch.tanh(x * slope) * scale


fast.calls = 0


class Squash(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain, self.rate = nn.Parameter(torch.rand(24)), 0.25

    def forward(self, hidden: Tensor) -> Tensor:
        return self.gain * torch.tanh(self.rate * hidden)


@pytest.fixture(autouse=True)
def _forget():
    yield
    unregister_op("scaled_tanh")
    assert "scaled_tanh" not in ops.OPERATIONS


def chosen(model: nn.Module, **config) -> list[str]:
    return [str(d.kernel.ref) if d.kernel else "own" for d in kw.plan(model, **config).decisions]


def test_registered_kernel_runs_and_goes_away():
    model = nn.Sequential(Squash())
    x = torch.randn(2, 3, 24)
    own = model(x)
    kw.register_op(scaled_tanh, roles=ROLES, kernels=fast, layer_name="ScaledTanh")
    fast.calls = 0
    kw.kernelize(model)
    assert torch.equal(model(x), own)
    assert fast.calls == 1
    model(x).sum().backward()
    assert model[0].gain.grad is not None
    kw.unkernelize(model)
    model(x)
    assert fast.calls == 2
    unregister_op("scaled_tanh")
    assert not kw.discover(model)


def test_kernels_by_device_and_in_order():
    def second(x, scale, slope):
        return torch.tanh(x * slope) * scale

    kw.register_op(
        scaled_tanh,
        roles=ROLES,
        kernels=[{"cuda": "package:nowhere:Layer", "cpu": fast}, second],
        layer_name="ScaledTanh",
    )
    model = nn.Sequential(Squash())
    assert chosen(model) == ["builtin:fast"] * 2
    assert chosen(model, target=kw.Target("xpu")) == ["builtin:second"] * 2
    assert chosen(model, config={"ScaledTanh": "builtin:second"}) == ["builtin:second"] * 2
    assert chosen(model, config={"ScaledTanh": None}) == ["own"] * 2


def test_function_without_an_option_is_not_offered_for_it():
    kw.register_op(scaled_tanh, roles=ROLES, options={"squared": (False, True)}, kernels=fast)
    (decision, _) = kw.plan(nn.Sequential(Squash())).decisions
    assert decision.kernel is None
    assert "does not know the option squared" in str(decision.reason)


def off_by_little(x, scale, slope):
    return torch.tanh(x * slope) * scale * 1.001


def no_gradient(x, scale, slope):
    return torch.tanh(x.detach() * slope) * scale


def wider(x, scale, slope):
    return torch.tanh(x.float() * slope) * scale


def two_of_them(x, scale, slope):
    return scaled_tanh(x, scale, slope), x


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (off_by_little, "off_by_little does not compute scaled_tanh : output 0"),
        (no_gradient, "the gradient of x"),
        (wider, "dtype"),
        (two_of_them, "gives 2 tensors"),
        ({"cuba": fast}, "did you mean 'cuda'"),
        ("~/kernels:Layer", "absolute"),
        ([fast, {"cpu": fast}], "two kernels have one name"),
    ],
)
def test_wrong_kernels_are_refused_and_nothing_stays(kernel, message):
    with pytest.raises(ValueError, match=message):
        kw.register_op(scaled_tanh, roles=ROLES, kernels=kernel)
    assert "scaled_tanh" not in ops.OPERATIONS


def test_kernel_without_backward_is_compared_without_gradients():
    def forward_only(x, scale, slope):
        return (x * slope).tanh_().mul_(scale).detach()

    forward_only.has_backward = False
    kw.register_op(scaled_tanh, roles=ROLES, kernels=forward_only)
    model = kw.kernelize(nn.Sequential(Squash()))
    model(torch.randn(1, 2, 24)).sum().backward()
    assert model[0].gain.grad is not None
    assert "no backward" in " ".join(str(kw.report(model)).split())  # the table may break the line there


def test_children_are_linear_maps_of_the_right_width():
    def doubled(x, inner):
        return inner(x) * 2

    def twice(x, inner):
        y = inner(x)
        return y + y

    kw.register_op(doubled, roles={"x": "argument B S H", "inner": "child B S I"}, kernels=twice)
    unregister_op("doubled")
