"""Small layers and models for the tests: plain modules, decorated as transformers decorates its own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from kernels import use_kernel_forward_from_hub, use_kernelized_func
from torch import Tensor, nn

# ------------------------------------------------------------------------------------------------------------- layers


@use_kernel_forward_from_hub("RMSNorm")
class Norm(nn.Module):
    """Llama's norm. The weights are not all ones, so that a kernel that ignores them shows."""

    def __init__(self, width: int = 8, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, width))
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(dtype)


class SameNorm(Norm):
    """A subclass that keeps its parent's forward, so it keeps the name too."""


class OtherNorm(Norm):
    """A subclass that computes something else, so it must not get its parent's kernel."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states) * 2


@use_kernel_forward_from_hub("Activation", condition=lambda module: module.wants_kernel)
class Activation(nn.Module):
    """A layer without parameters whose author can refuse a kernel."""

    def __init__(self, wants_kernel: bool = True) -> None:
        super().__init__()
        self.wants_kernel = wants_kernel

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x) + torch.sin(x)


@use_kernel_forward_from_hub("Affine")
class Affine(nn.Module):
    """Positional, defaulted and keyword-only parameters."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, width))

    def forward(self, x: Tensor, scale: float = 2.0, *, shift: float = 3.0) -> Tensor:
        return x * self.weight * scale + shift


@use_kernel_forward_from_hub("KeywordOnly")
class KeywordOnly(nn.Module):
    def forward(self, *, left: Tensor, right: Tensor) -> Tensor:
        return left - right


@use_kernel_forward_from_hub("PositionalOnly")
class PositionalOnly(nn.Module):
    def forward(self, left: Tensor, right: Tensor, /, scale: float = 2.0) -> Tensor:
        return (left - right) * scale


@use_kernel_forward_from_hub("Anything")
class Anything(nn.Module):
    def forward(self, first: Tensor, *args: Tensor, **kwargs: Tensor) -> Tensor:
        return first - sum(args) * 2 - sum(kwargs.values()) * 3


@use_kernel_forward_from_hub("Pair")
class Pair(nn.Module):
    """Takes a tuple and gives a tuple."""

    def forward(self, both: tuple[Tensor, Tensor], extra: dict[str, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        left, right = both
        for value in (extra or {}).values():
            left = left + value
        return left * 2, right * 3


def undecorated(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator that forgets `functools.wraps`."""

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    return wrapper


def drops_verbose(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator that takes a keyword which the forward itself does not have, as several of transformers do."""

    @functools.wraps(forward)
    def wrapper(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        verbose = kwargs.pop("verbose", False)
        output = forward(self, *args, **kwargs)
        return output * 2 if verbose else output

    return wrapper


@use_kernel_forward_from_hub("Undecorated")
class Undecorated(nn.Module):
    @undecorated
    def forward(self, x: Tensor) -> Tensor:
        return x + 1


@use_kernel_forward_from_hub("Widened")
class Widened(nn.Module):
    """Its decorated forward takes more than its signature says."""

    @drops_verbose
    def forward(self, x: Tensor) -> Tensor:
        return x + 1


@use_kernel_forward_from_hub("Clashing")
class Clashing(nn.Module):
    """Its parameters have the names that generated code might use for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))

    def forward(
        self,
        output: Tensor,
        kernel: float = 2.0,
        own: float = 3.0,
        plain: float = 4.0,
        needs_grad: float = 5.0,
        is_grad_enabled: float = 6.0,
        is_compiling: float = 7.0,
        state: float = 8.0,
    ) -> Tensor:
        return output * self.weight + kernel + own + plain + needs_grad + is_grad_enabled + is_compiling + state


# --------------------------------------------------------------------------------------------- functions of a forward


def rotate_half(x: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return torch.cat((-right, left), dim=-1)


@use_kernel_forward_from_hub("rotary_pos_emb")
def apply_rotary_pos_emb(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


@use_kernel_forward_from_hub("double")
def double(x: Tensor) -> Tensor:
    return x * 2


@use_kernel_forward_from_hub("triple")
def triple(x: Tensor, *, times: int = 3) -> Tensor:
    return x * times


def helper(x: Tensor) -> Tensor:
    return double(x)


@use_kernelized_func(double, triple)
class TwoFunctions(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return double(x) + triple(x)


@use_kernelized_func(double)
class ThroughHelper(nn.Module):
    """Its forward calls the function through another one."""

    def forward(self, x: Tensor) -> Tensor:
        return helper(x)


@use_kernelized_func(double)
class InsideComprehension(nn.Module):
    """Its forward calls the function in code of its own, nested in the forward's."""

    def forward(self, x: Tensor) -> Tensor:
        return sum(double(part) for part in (x, x + 1))


@use_kernelized_func(double)
class DecoratedForward(nn.Module):
    @drops_verbose
    def forward(self, x: Tensor) -> Tensor:
        return double(x) + 1


class CountedForward:
    """A decorator that is a class: its wrapped forward cannot be copied around another function."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        functools.update_wrapper(self, forward)
        self.forward = forward

    def __get__(self, instance: Any, owner: type) -> Any:
        return self if instance is None else functools.partial(self.forward, instance)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)


@use_kernelized_func(double)
class UncopyableForward(nn.Module):
    @CountedForward
    def forward(self, x: Tensor) -> Tensor:
        return double(x) + 1


calls_seen = 0


@use_kernelized_func(double)
class WritesGlobal(nn.Module):
    """Its forward writes a global, which a copy with globals of its own would hide from everybody else."""

    def forward(self, x: Tensor) -> Tensor:
        global calls_seen
        calls_seen += 1
        return double(x)


# -------------------------------------------------------------------------------------------------------- a whole model


@use_kernelized_func(apply_rotary_pos_emb)
class Attention(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.heads = 2
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, width, bias=False)
        self.v = nn.Linear(width, width, bias=False)
        self.o = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (
            layer(x).view(batch, length, self.heads, width // self.heads).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        weights = torch.softmax(q @ k.transpose(-1, -2), dim=-1)
        return self.o((weights @ v).transpose(1, 2).reshape(batch, length, width))


class MLP(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.gate = nn.Linear(width, 2 * width, bias=False)
        self.up = nn.Linear(width, 2 * width, bias=False)
        self.down = nn.Linear(2 * width, width, bias=False)
        self.act = Activation()

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm1 = Norm(width)
        self.attention = Attention(width)
        self.norm2 = SameNorm(width)
        self.mlp = MLP(width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), cos, sin)
        return x + self.mlp(self.norm2(x))


class TinyLlama(nn.Module):
    """Two blocks, a norm, a head; from token ids [B, S] to logits [B, S, 16]."""

    def __init__(self, width: int = 8, num_blocks: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(num_blocks))
        self.norm = Norm(width)
        self.head = nn.Linear(width, 16, bias=False)
        self.head_width = width // 2

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        angles = torch.arange(ids.shape[1])[None, :, None] / torch.arange(1, self.head_width + 1)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.head(self.norm(x))


def tiny(**options: Any) -> TinyLlama:
    """A seeded model in eval mode, with two rows of token ids as the usual input (`IDS`)."""
    torch.manual_seed(0)
    return TinyLlama(**options).eval()


IDS = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]])


class Shared(nn.Module):
    """One norm that stands in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Norm()
        self.second = self.first
        self.third = Norm()

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.first(x)))


class Stack(nn.Module):
    """Norms one after the other, by the classes given."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x
