"""What an answer depends on besides the layer: changing any of it asks again."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from layers import Norm, operation, rms
from torch import Tensor

settings = types.ModuleType("settings")
space = types.SimpleNamespace(doubles=False)
TABLE: dict[str, Callable[[Tensor], Tensor]] = {}
FLAG = False


class Switch:
    doubles = False

    @staticmethod
    def before(x: Tensor) -> Tensor:
        return x * 2 if FLAG else x


def same(x: Tensor) -> Tensor:
    return x


def twice(x: Tensor) -> Tensor:
    return x * 2


def pow(x: Tensor) -> Tensor:
    return x


def scaled(x: Tensor, by: float = 1.0) -> Tensor:
    return x * by


by_one = functools.partial(scaled, by=1.0)


def decorated(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def wrapper(self: Any, x: Tensor) -> Tensor:
        return forward(self, x * 2) if FLAG else forward(self, x)  # type: ignore[no-any-return]

    return wrapper


class Base(Norm):
    def before(self, x: Tensor) -> Tensor:
        return x


class ByModule(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return rms(x * 2 if settings.doubles else x, self.weight, self.eps)


class ByClass(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return rms(x * 2 if Switch.doubles else x, self.weight, self.eps)


class ByObject(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return rms(x * 2 if space.doubles else x, self.weight, self.eps)


class ByAlias(Norm):
    def forward(self, x: Tensor) -> Tensor:
        config = space
        return rms(x * 2 if config.doubles else x, self.weight, self.eps)


class ByTable(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return rms(TABLE["before"](x), self.weight, self.eps)


class ByShadow(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return rms(pow(x), self.weight, self.eps)


class ByFunctionOfModule(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return rms(settings.before(x), self.weight, self.eps)


class ByDecorator(Norm):
    @decorated
    def forward(self, x: Tensor) -> Tensor:
        return rms(x, self.weight, self.eps)


class ByStaticMethod(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return rms(Switch.before(x), self.weight, self.eps)


class BySuper(Base):
    def forward(self, x: Tensor) -> Tensor:
        return rms(super().before(x), self.weight, self.eps)


class ByTypeOfSelf(Norm):
    factor = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return rms(x * type(self).factor, self.weight, self.eps)


class ByProperty(Norm):
    @property
    def factor(self) -> int:
        return 1

    def forward(self, x: Tensor) -> Tensor:
        return rms(x * self.factor, self.weight, self.eps)


class ByPartial(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return rms(by_one(x), self.weight, self.eps)


class ByDefault(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return rms(scaled(x), self.weight, self.eps)


class ByCode(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return rms(same(x), self.weight, self.eps)


def by_closure() -> tuple[type[Norm], dict[str, bool]]:
    kept = {"doubles": False}

    def helper(x: Tensor) -> Tensor:
        return x * 2 if kept["doubles"] else x

    class ByClosure(Norm):
        def forward(self, x: Tensor) -> Tensor:
            return rms(helper(x), self.weight, self.eps)

    return ByClosure, kept


HERE = globals()
ByClosure, closed = by_closure()


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "doubles", False, raising=False)
    monkeypatch.setattr(settings, "before", same, raising=False)
    monkeypatch.setitem(TABLE, "before", same)


@pytest.mark.parametrize(
    ("cls", "change"),
    [
        (ByModule, lambda m: m.setattr(settings, "doubles", True)),
        (ByClass, lambda m: m.setattr(Switch, "doubles", True)),
        (ByObject, lambda m: m.setattr(space, "doubles", True)),
        (ByAlias, lambda m: m.setattr(space, "doubles", True)),
        (ByTable, lambda m: m.setitem(TABLE, "before", twice)),
        (ByShadow, lambda m: m.setitem(HERE, "pow", twice)),
        (ByFunctionOfModule, lambda m: m.setattr(settings, "before", twice)),
        (ByDecorator, lambda m: m.setitem(HERE, "FLAG", True)),
        (ByStaticMethod, lambda m: m.setitem(HERE, "FLAG", True)),
        (BySuper, lambda m: m.setattr(Base, "before", lambda self, x: x * 2)),
        (ByTypeOfSelf, lambda m: m.setattr(ByTypeOfSelf, "factor", 2.0)),
        (ByProperty, lambda m: m.setattr(ByProperty, "factor", property(lambda self: 2))),
        (ByPartial, lambda m: m.setitem(HERE, "by_one", functools.partial(scaled, by=2.0))),
        (ByDefault, lambda m: m.setattr(scaled, "__defaults__", (2.0,))),
        (ByCode, lambda m: m.setattr(same, "__code__", twice.__code__)),
        (ByClosure, lambda m: m.setitem(closed, "doubles", True)),
    ],
)
def test_what_the_code_looks_up_asks_again_when_it_changes(
    cls: type[Norm], change: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
):
    layer = cls()
    assert operation(layer) == "rms_norm"
    with monkeypatch.context() as patch:
        change(patch)
        assert operation(layer) is None
    assert operation(layer) == "rms_norm"


def test_a_builtin_that_is_shadowed_later_asks_again(monkeypatch: pytest.MonkeyPatch):
    class ByBuiltin(Norm):
        def forward(self, x: Tensor) -> Tensor:
            return rms(x * abs(1.0), self.weight, self.eps)

    layer = ByBuiltin()
    assert operation(layer) == "rms_norm"
    monkeypatch.setitem(HERE, "abs", lambda value: 2.0)
    assert operation(layer) is None


def test_answers_do_not_depend_on_what_torch_holds():
    layer = ByCode()
    assert operation(layer) == "rms_norm"
    torch.manual_seed(1)
    assert operation(layer) == "rms_norm"
