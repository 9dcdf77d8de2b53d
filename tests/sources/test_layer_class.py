from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from kernelwise.sources._layer_class import attributes_read, class_problem, signature


class Llama(nn.Module):
    def forward(self, x: Any) -> Any:
        return self.weight * (x + self.variance_epsilon)


class Nested(nn.Module):
    def forward(self, x: Any) -> Any:
        return self.down_proj(torch.relu(self.gate_proj.weight @ x) * self.config.scale)


class Closures(nn.Module):
    def forward(self, x: Any) -> Any:
        scaled = [value * self.scale for value in x]
        return sum(scaled, (lambda: self.bias)())


class Methods(nn.Module):
    def _helper(self, x: Any) -> Any:
        return x

    def forward(self, x: Any) -> Any:
        return self._helper(x)


class Parent(nn.Module):
    def forward(self, x: Any) -> Any:
        return super().forward(x) + self.extra


class Getattr(nn.Module):
    def forward(self, x: Any) -> Any:
        return getattr(self, "weight") * x + getattr(self, "offset", 0.0)  # noqa: B009


class OtherName(nn.Module):
    def forward(module, x: Any) -> Any:  # noqa: N805
        return x * module.weight


class Decorated(nn.Module):
    @torch.no_grad()
    def forward(self, x: Any) -> Any:
        return x * self.weight


class Pure(nn.Module):
    def forward(self, x: Any, *, eps: float = 1e-6) -> Any:
        return x.weight + eps


@pytest.mark.parametrize(
    ("cls", "names"),
    [
        (Llama, ("variance_epsilon", "weight")),
        (Nested, ("config", "down_proj", "gate_proj")),
        (Closures, ("bias", "scale")),
        (Methods, ("_helper",)),
        (Parent, ("extra", "super()")),
        (Getattr, ("weight",)),
        (OtherName, ("weight",)),
        (Decorated, ("weight",)),
        (Pure, ()),
    ],
)
def test_attributes_read(cls: type[nn.Module], names: tuple[str, ...]) -> None:
    assert attributes_read(cls.forward) == names


def test_signature() -> None:
    kinds = [(p.name, p.kind, p.has_default) for p in signature(Pure.forward)]
    assert kinds == [
        ("self", "positional_or_keyword", False),
        ("x", "positional_or_keyword", False),
        ("eps", "keyword_only", True),
    ]


class Flags(nn.Module):
    has_backward = False
    can_torch_compile = True
    forward: Callable[..., Any] = Llama.forward


class Init(nn.Module):
    def __init__(self) -> None:
        super().__init__()

    forward = Llama.forward


class InheritedInit(Init):
    pass


class Member(nn.Module):
    eps = 1e-6
    forward = Llama.forward


class NoForward(nn.Module):
    pass


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (Llama, None),
        (Flags, None),
        (Init, "defines __init__"),
        (InheritedInit, "defines __init__"),
        (Member, "members besides forward: eps"),
        (Methods, "members besides forward: _helper"),
        (NoForward, "no forward"),
        (dict, "no torch.nn.Module class"),
        (len, "no torch.nn.Module class"),
    ],
)
def test_class_problem(cls: object, message: str | None) -> None:
    problem = class_problem(cls, "Name")
    assert problem is None if message is None else message in (problem or "")
