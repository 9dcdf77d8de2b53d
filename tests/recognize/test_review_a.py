"""Objects of a layer that a trace cannot stand for, and what of them may change while a kernel is in."""

from __future__ import annotations

import collections
import dataclasses
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from test_gallery2 import Norm, operation, reason, rms, with_forward
from torch import Tensor, nn
from torch.nn import functional as F

from kernelwise._recognize._code import decides_by_size

Alias = nn.Parameter
EMPTY = object()


class Own:
    """An object that answers for itself."""

    def __bool__(self) -> bool:
        return False

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Own)

    def __hash__(self) -> int:
        return 1


@dataclasses.dataclass
class Numbers:
    a: int = 1


class Attributes(dict[str, Any]):
    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class Holding(Norm):
    """A norm that holds one object of many kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.flag, self.zero, self.heads, self.queue = (
            np.bool_(False),
            np.int32(0),
            set[int](),
            collections.deque[int](),
        )
        self.own, self.one, self.other, self.limit = Own(), Numbers(), Numbers(), np.int64(40)
        self.config = types.SimpleNamespace(n=np.int64(3), heads=set[int](), act=F.silu)
        self.attributes, self.empty = Attributes(use=True), EMPTY
        self.a = nn.Identity()
        self.b, self.p1 = self.a, nn.Parameter(torch.ones(3))
        self.p2 = self.p1
        self.p1.quant = 1  # type: ignore[attr-defined]
        self.act, self.function = nn.SiLU(), F.silu


def by(condition: Callable[[Any, Tensor], bool]) -> nn.Module:
    """A layer that does something else where the condition holds."""
    namespace = {**condition.__globals__, "rms": rms}
    code = condition.__code__
    asks = types.FunctionType(code, namespace, "asks")

    class Asking(Holding):
        def forward(self, x: Tensor) -> Tensor:
            return rms(x * 3 + 1 if self.asks(x) else x, self.weight, self.eps)  # type: ignore[attr-defined]

    Asking.asks = asks  # type: ignore[attr-defined]
    return Asking()


@pytest.mark.parametrize(
    "condition",
    [
        lambda self, x: not self.flag,
        lambda self, x: self.zero == 0,
        lambda self, x: not self.heads,
        lambda self, x: self.heads == set(),
        lambda self, x: not self.queue,
        lambda self, x: not self.own,
        lambda self, x: self.one == self.other,
        lambda self, x: str(self.one) == "Numbers(a=1)",
        lambda self, x: not self.config.heads,
        lambda self, x: self.config.n == 3,
        lambda self, x: (self.config.n != 3) is False,
        lambda self, x: x.shape[1] == self.limit,
        lambda self, x: getattr(self.attributes, "use", False),
        lambda self, x: hasattr(self.attributes, "use"),
        lambda self, x: isinstance(self.attributes, Attributes),
        lambda self, x: self.empty is EMPTY,
        lambda self, x: self.a is self.b,
        lambda self, x: self.a == self.b,
        lambda self, x: self.a in (self.b,),
        lambda self, x: id(self.a) == id(self.b),
        lambda self, x: self.p1 is self.p2,
        lambda self, x: repr(self.act) == "SiLU()",
        lambda self, x: str(self.act) == "SiLU()",
        lambda self, x: getattr(self.p1, "quant", None) is not None,
        lambda self, x: hasattr(self.p1, "quant"),
        lambda self, x: self.p1.__class__.__name__ == "Parameter",
        lambda self, x: isinstance(self.p1, Alias),
        lambda self, x: x.shape[:-1].numel() == 80,
        lambda self, x: x.size().numel() == 2560,
        lambda self, x: x.requires_grad_() is None,
        lambda self, x: torch._C._get_tracing_state() is not None,
        lambda self, x: torch.onnx.is_in_onnx_export(),
        lambda self, x: torch.compiler.is_exporting(),
        lambda self, x: torch.initial_seed() == 3,
    ],
)
def test_what_a_trace_cannot_answer_makes_a_layer_unknown(condition: Callable[[Any, Tensor], bool]):
    assert operation(by(condition)) is None


def test_what_it_can_answer_does_not():
    assert operation(by(lambda self, x: self.config is None or not self.config)) == "rms_norm"
    assert operation(by(lambda self, x: self.function is None or self.act is None)) == "rms_norm"
    assert operation(by(lambda self, x: isinstance(self.config, dict) or self.one.a == 2)) == "rms_norm"
    assert operation(by(lambda self, x: self.p1.dtype is torch.int32 or self.p1.numel() == 7)) == "rms_norm"


def parts_of_a_shape(self: Any, x: Tensor) -> Tensor:
    leading = x.shape[:-1]
    return rms(x * 2 if leading.numel() == 80 else x, self.weight, self.eps)


def test_the_number_of_elements_of_a_part_of_a_shape():
    assert "number of elements of a shape" in reason(with_forward(Norm, parts_of_a_shape))


def test_ndimension_is_a_look_at_sizes():
    assert decides_by_size((lambda x: x * 2 if x.ndimension() == 5 else x).__code__)


class LayerNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(32)), nn.Parameter(torch.zeros(32))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (32,), self.weight, self.bias, 1e-5)


def under_autocast(self: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return F.layer_norm(x, (32,), self.weight, self.bias, 1e-5)


def without_autocast(self: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return F.layer_norm(x, (32,), self.weight, self.bias, 1e-5)


def test_autocast_switched_on_inside():
    assert operation(LayerNorm()) == operation(with_forward(LayerNorm, without_autocast)) == "layer_norm"
    assert "autocast" in reason(with_forward(LayerNorm, under_autocast))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert operation(type("Again", (LayerNorm,), {})()) == "layer_norm"
