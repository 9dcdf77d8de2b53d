"""Operations that users add are recognised like the ones that come with Kernelwise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from kernelwise import ops
from kernelwise._data import Binding, Recognition
from kernelwise._recognize import Unknown, recognize


def scaled_tanh(x: Tensor, scale: Tensor, slope: float, *, squared: bool) -> Tensor:
    y = torch.tanh(x * slope)
    return (y * y if squared else y) * scale


class Squash(nn.Module):
    def __init__(self, *, squared: bool = False, slope: float = 0.25) -> None:
        super().__init__()
        self.gain, self.rate, self.squared = nn.Parameter(torch.ones(24)), slope, squared

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.rate * x)
        return self.gain * (y.pow(2) if self.squared else y)


ROLES = {"x": "argument B S H", "scale": "attribute H", "slope": "number"}


@pytest.fixture
def registered():
    yield ops.register_op(scaled_tanh, roles=ROLES, options={"squared": (False, True)}, layer_name="Squash")
    ops.unregister_op("scaled_tanh")


def test_added_operation_is_recognised_at_once():
    before = recognize(Squash())
    assert isinstance(before, Unknown)
    ops.register_op(scaled_tanh, roles=ROLES, options={"squared": (False, True)}, layer_name="Squash")
    try:
        answer = recognize(Squash())
        assert isinstance(answer, Recognition)
        assert answer == Recognition(
            "scaled_tanh",
            (
                ("x", Binding("argument", "x")),
                ("scale", Binding("attribute", "gain")),
                ("slope", Binding("attribute", "rate")),
            ),
            (("squared", False),),
            depends=("squared",),
        )
        assert ops.layer_name(answer) == "Squash"
        assert "Squash" in ops.layer_names()
        squared = recognize(Squash(squared=True))
        assert isinstance(squared, Recognition)
        assert dict(squared.options) == {"squared": True}
    finally:
        ops.unregister_op("scaled_tanh")
    assert isinstance(recognize(Squash()), Unknown)


def test_look_alike_of_an_added_operation(registered):
    class Plus(Squash):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    assert isinstance(recognize(Plus()), Unknown)


def test_arguments_are_checked(registered):
    with pytest.raises(ValueError, match="needs a role for slope"):
        ops.register_op(
            scaled_tanh, roles={"x": "argument B S H", "scale": "attribute H"}, options={"squared": (True,)}
        )
    with pytest.raises(ValueError, match="takes no weight"):
        ops.register_op(scaled_tanh, roles={**ROLES, "weight": "attribute H"})
    with pytest.raises(ValueError, match="role x is 'input B'"):
        ops.register_op(scaled_tanh, roles={**ROLES, "x": "input B"}, options={"squared": (True,)})
    with pytest.raises(ValueError, match="already"):
        ops.register_op(lambda x: x, roles={"x": "argument B S H"}, name="scaled_tanh")
    with pytest.raises(ValueError, match="stays"):
        ops.unregister_op("rms_norm")
