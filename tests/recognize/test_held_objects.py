"""Objects of a layer that a trace cannot stand for, and what of them may change while a kernel is in."""

from __future__ import annotations

import collections.abc
import dataclasses
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from layers import Norm, operation, reason, rms, with_forward
from torch import Tensor, nn
from torch.nn import functional as F

import kernelwise as kw
from kernelwise._recognize._code import decides_by_size

Alias = nn.Parameter
EMPTY = object()
SPECIAL: set[nn.Module] = set()
ROW: list[nn.Module] = [nn.Identity()]


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


class Calls:
    def __call__(self) -> None:
        pass


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
        self.attributes, self.empty, self.calls = Attributes(use=True), EMPTY, Calls()
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
        lambda self, x: callable(self.calls),
        lambda self, x: not callable(self.config),
        lambda self, x: not isinstance(self.config, collections.abc.Iterable),
        lambda self, x: x.shape[1] == self.limit,
        lambda self, x: getattr(self.attributes, "use", False),
        lambda self, x: hasattr(self.attributes, "use"),
        lambda self, x: isinstance(self.attributes, Attributes),
        lambda self, x: self.empty is EMPTY,
        lambda self, x: self not in SPECIAL,
        lambda self, x: [self] != ROW,
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
    assert operation(by(lambda self, x: not isinstance(self.p1, torch.Tensor))) == "rms_norm"
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


# --- what changes while a kernel is in -----------------------------------------------------------------------------------


class Kept(Norm):
    """A norm that takes one number from many places."""

    default = 1.0

    def __init__(self) -> None:
        super().__init__()
        self._own, self._of = 1.0, self.same
        self.flags, self.nest, self.pair = {"a": 1.0}, [[1.0]], ({"a": 1.0},)
        self.config = types.SimpleNamespace(d={"a": 1.0}, dtype=torch.float32)
        self.register_parameter("bias", None)
        self._act = self.of_tensor
        self.table: dict[str, Any] = {"same": self.of_tensor}

    @property
    def through(self) -> float:
        return self._own

    @staticmethod
    def same(value: float) -> float:
        return value

    @staticmethod
    def of_tensor(x: Tensor) -> Tensor:
        return x

    def before(self, x: Tensor) -> Tensor:
        return x


class Doubled(Kept):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def other(value: Any) -> Any:
    return value * 3


def kernelized(forward: Callable[..., Any], base: type[nn.Module] = Kept) -> tuple[nn.Module, nn.Module]:
    """A model of one layer with a kernel in it, and the layer."""
    model = nn.Sequential(with_forward(base, forward)).eval()
    kw.kernelize(model)
    assert {row.kernel[:8] for row in kw.report(model).rows if row.kernel} == {"builtin:"}
    return model, model[0]


def by_number(number: Callable[[Any], float]) -> Callable[..., Any]:
    def forward(self: Any, x: Tensor) -> Tensor:
        return rms(x if number(self) == 1 else x * 3 + 0.5, self.weight, self.eps)

    return forward


@pytest.mark.parametrize(
    ("number", "change"),
    [
        (lambda self: self._own, lambda layer: setattr(layer, "_own", 2.0)),
        (lambda self: self.through, lambda layer: setattr(layer, "_own", 2.0)),
        (lambda self: self._of(1.0), lambda layer: setattr(layer, "_of", other)),
        (lambda self: self.default, lambda layer: setattr(layer, "default", 2.0)),
        (lambda self: getattr(self, "extra", 1.0), lambda layer: setattr(layer, "extra", 2.0)),
        (lambda self: 2.0 if hasattr(self, "lora") else 1.0, lambda layer: setattr(layer, "lora", nn.Linear(2, 2))),
        (lambda self: self.flags["a"], lambda layer: layer.flags.update(a=2.0)),
        (lambda self: self.config.d["a"], lambda layer: layer.config.d.update(a=2.0)),
        (lambda self: getattr(self.config, "zz", 1.0), lambda layer: setattr(layer.config, "zz", 2.0)),
        (
            lambda self: 2 - (self.config.dtype == torch.float32),
            lambda layer: setattr(layer.config, "dtype", torch.half),
        ),
        (lambda self: self.nest[0][0], lambda layer: layer.nest[0].__setitem__(0, 2.0)),
        (lambda self: self.pair[0]["a"], lambda layer: layer.pair[0].update(a=2.0)),
        (lambda self: 1 + (self.bias is not None), lambda layer: setattr(layer, "bias", nn.Parameter(torch.ones(1)))),
    ],
)
def test_a_number_that_decides_may_change(number: Callable[[Any], float], change: Callable[[Any], None]):
    model, layer = kernelized(by_number(number))
    x = torch.randn(2, 3, 32)
    with torch.no_grad():
        before = model(x)
        torch.testing.assert_close(before, rms(x, layer.weight, layer.eps))
        assert not layer._kernelwise.fallbacks
        change(layer)
        torch.testing.assert_close(model(x), rms(x * 3 + 0.5, layer.weight, layer.eps))


def calls_its_method(self: Any, x: Tensor) -> Tensor:
    return rms(self.before(x), self.weight, self.eps)


def calls_of_a_table(self: Any, x: Tensor) -> Tensor:
    return rms(self.table["same"](x), self.weight, self.eps)


def calls_a_function(self: Any, x: Tensor) -> Tensor:
    return rms(self._act(x), self.weight, self.eps)


@pytest.mark.parametrize(
    ("forward", "change"),
    [
        (calls_its_method, lambda layer: setattr(layer, "before", other)),
        (calls_a_function, lambda layer: setattr(layer, "_act", other)),
        (calls_of_a_table, lambda layer: layer.table.update(same=other)),
        (calls_a_function, lambda layer: setattr(layer, "__class__", Doubled)),
    ],
)
def test_a_function_that_it_calls_may_change(forward: Callable[..., Any], change: Callable[[Any], None]):
    model, layer = kernelized(forward)
    x = torch.randn(2, 3, 32) + 1e-3
    change(layer)
    layer.eps = 1.0  # or the factor would be divided out
    with torch.no_grad():
        torch.testing.assert_close(model(x), type(layer).forward(layer, x))
    assert any("since the kernel went in" in reason for reason in layer._kernelwise.fallbacks)


class Reversed(nn.Module):
    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = inner.weight, None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight).flip(-1)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(32, 48, bias=False), nn.Linear(32, 48, bias=False)
        self.down = nn.Linear(48, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate.bias is not None or hasattr(self.gate, "lora_A") or not isinstance(self.gate, nn.Linear):
            x = x * 2
        return self.down(F.silu(self.gate(x)) * self.up(x))


def put_lora(layer: Any) -> None:
    layer.gate.lora_A = nn.Linear(2, 2)


def put_bias(layer: Any) -> None:
    layer.gate = nn.Linear(32, 48)


def put_other(layer: Any) -> None:
    layer.gate = Reversed(layer.gate)


@pytest.mark.parametrize("change", [put_lora, put_bias, put_other])
def test_what_it_asks_of_a_child_that_fills_a_role_may_change(change: Callable[[Any], None]):
    model, layer = kernelized(Gated.forward, Gated)
    x = torch.randn(2, 3, 32)
    with torch.no_grad():
        model(x)
        assert not layer._kernelwise.fallbacks
        change(layer)
        torch.testing.assert_close(model(x), type(layer).forward(layer, x))
    assert any("since the kernel went in" in reason for reason in layer._kernelwise.fallbacks)
