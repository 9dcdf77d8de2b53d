"""Kernels for the layers of `models`, right, marked or wrong, and configs that name them.

A kernel named `Marked...` adds 1000 to what the layer's own code gives, so that an output alone tells which code ran.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kernelwise import KernelConfig

MARK = 1000.0


class GoodNorm(nn.Module):
    """The norm as a kernel."""

    can_torch_compile = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        wide = hidden_states.float()
        hat = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * hat.to(hidden_states.dtype)


class MarkedNorm(nn.Module):
    can_torch_compile = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        wide = hidden_states.float()
        hat = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * hat.to(hidden_states.dtype) + MARK


class TwiceMarkedNorm(nn.Module):
    can_torch_compile = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        wide = hidden_states.float()
        hat = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * hat.to(hidden_states.dtype) + 2 * MARK


class UncompilableNorm(nn.Module):
    """Does not work under torch.compile: it looks at values."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        float(hidden_states.detach().sum())
        return hidden_states * self.weight + MARK


class ForwardOnlyNorm(nn.Module):
    """Says that it has no backward, and gives an output outside the graph."""

    has_backward = False
    can_torch_compile = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states.detach() * self.weight.detach() + MARK


class LyingNorm(nn.Module):
    """Claims a backward (the default) and has none."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states.detach() * self.weight.detach() + MARK


class ForwardOnlyPair(nn.Module):
    has_backward = False

    def forward(self, both: Any, extra: Any = None) -> Any:
        return both[0].detach() + MARK, both[1].detach() + MARK


class HalfLyingPair(nn.Module):
    """The second output has lost its gradient."""

    def forward(self, both: Any, extra: Any = None) -> Any:
        return both[0] * 2 + MARK, both[1].detach() * 3 + MARK


class MarkedActivation(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x) + torch.sin(x) + MARK


class MarkedAffine(nn.Module):
    def forward(self, x: Tensor, factor: float = 7.0, *, shift: float = 11.0) -> Tensor:
        return x * self.weight * factor + shift + MARK


class MarkedKeywordOnly(nn.Module):
    def forward(self, *, right: Tensor, left: Tensor) -> Tensor:
        return left - right + MARK


class MarkedPositionalOnly(nn.Module):
    def forward(self, a: Tensor, b: Tensor, scale: float = 5.0) -> Tensor:
        return (a - b) * scale + MARK


class Swapped(nn.Module):
    """Names the two arguments of a subtraction in the other order."""

    def forward(self, right: Tensor, left: Tensor) -> Tensor:
        return left - right


class MarkedAnything(nn.Module):
    def forward(self, first: Tensor, *args: Tensor, **kwargs: Tensor) -> Tensor:
        return first - sum(args) * 2 - sum(kwargs.values()) * 3 + MARK


class MarkedAnyArguments(nn.Module):
    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        return sum(args) + sum(kwargs.values()) + 1 + MARK


class MarkedPlusOne(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1 + MARK


class MarkedClashing(nn.Module):
    def forward(self, a, b=0.0, c=0.0, d=0.0, e=0.0, f=0.0, g=0.0, h=0.0):  # type: ignore[no-untyped-def]
        return a * self.weight + b + c + d + e + f + g + h + MARK


class LyingClashing(nn.Module):
    def forward(self, a, b=0.0, c=0.0, d=0.0, e=0.0, f=0.0, g=0.0, h=0.0):  # type: ignore[no-untyped-def]
        return a.detach() + MARK


class ForwardOnlyClashing(nn.Module):
    has_backward = False

    def forward(self, a, b=0.0, c=0.0, d=0.0, e=0.0, f=0.0, g=0.0, h=0.0):  # type: ignore[no-untyped-def]
        return a.detach() + MARK


class MarkedDouble(nn.Module):
    can_torch_compile = True

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 + MARK


class MarkedTriple(nn.Module):
    can_torch_compile = True

    def forward(self, x: Tensor, *, times: int = 3) -> Tensor:
        return x * times + 2 * MARK


class LyingDouble(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.detach() * 2 + MARK


class ForwardOnlyDouble(nn.Module):
    has_backward = False

    def forward(self, x: Tensor) -> Tensor:
        return x.detach() * 2 + MARK


class GoodRotary(nn.Module):
    can_torch_compile = True

    def forward(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)

        def turn(x: Tensor) -> Tensor:
            left, right = x.chunk(2, dim=-1)
            return x * cos + torch.cat((-right, left), dim=-1) * sin

        return turn(q), turn(k)


class MarkedRotary(nn.Module):
    can_torch_compile = True

    def forward(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        return q + MARK, k + MARK


class TooFewArguments(nn.Module):
    def forward(self) -> Tensor:
        return self.weight


class ReadsMore(nn.Module):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states * self.weight * self.gain


def kernel(cls: type[nn.Module]) -> str:
    """The reference of a kernel of this file, as a mapping takes it."""
    return f"package:{__name__}:{cls.__name__}"


def only(kernel_mapping: dict[Any, Any], **options: Any) -> KernelConfig:
    """A config that offers no builtin kernels beside what it names, and takes the test's word for those."""
    return KernelConfig(kernel_mapping, inherit_mapping=False, **{"verify": False, **options})


def marked(output: Tensor) -> bool:
    """Whether a `Marked...` kernel ran last."""
    return bool((output.detach().double().abs() > MARK / 2).all())
