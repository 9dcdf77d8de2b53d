"""Layers for faults to be planted in, and kernels that are right for them.

A fault is a layer class as a kernel repository has it, wrong in one way. The files `faults_in_...` have them, each with the
layer that it is for, its dtype, and the status that must name it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

Fault = tuple[type[nn.Module], type[nn.Module], str, str]
"""A kernel, the layer that it is for, its dtype, and the status of the check that finds it."""

STALE: dict[object, Tensor] = {}
LEAKED: list[Tensor] = []
"""What faulty kernels keep from one call to the next; emptied before each test."""


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    wide = x.float()
    hat = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)
    return hat if weight is None else weight * hat


class Norm(nn.Module):
    """Llama's norm, which rounds before the weight."""

    def __init__(self, width: int = 48, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, width))
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(dtype)


class LateNorm(Norm):
    """The norm of GptOss, which rounds after the weight."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return (self.weight * hidden_states).to(dtype)


class MLP(nn.Module):
    def __init__(self, width: int = 32, inner: int = 48) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


def rotate_half(x: Tensor) -> Tensor:
    return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), dim=-1)


def apply_rotary_pos_emb(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


class Attention(nn.Module):
    """Calls the rotary function as attention layers do."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(64, 64)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q = self.proj(x).unflatten(-1, (4, 16)).transpose(1, 2)
        q, k = apply_rotary_pos_emb(q, q, cos, sin)
        return (q + k).transpose(1, 2).flatten(2)


class Clone(nn.Module):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states.clone()


class PlainLayerNorm(nn.LayerNorm):
    """With weights that are not all ones."""

    def __init__(self) -> None:
        super().__init__(48)
        with torch.no_grad():
            self.weight.copy_(torch.linspace(0.5, 1.5, 48))
            self.bias.copy_(torch.linspace(-1, 1, 48))


class WithBackward(torch.autograd.Function):
    """The norm with a backward that `change` distorts: what it is given and returns are the gradients of x and weight."""

    @staticmethod
    def forward(ctx, x, weight, eps, change):
        ctx.save_for_backward(x, weight)
        ctx.eps, ctx.change = eps, change
        return rms_norm(x, weight, eps)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight = (t.detach().requires_grad_() for t in ctx.saved_tensors)
        with torch.enable_grad():
            dx, dw = torch.autograd.grad(rms_norm(x, weight, ctx.eps), (x, weight), grad)
        return (*ctx.change(dx, dw, ctx), None, None)


class Good(nn.Module):
    def forward(self, hidden_states):
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)


class GoodInTwoPasses(nn.Module):
    """Right, with the forward and the backward written out as fused kernels have them."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight, eps):
            wide = x.float()
            r = torch.rsqrt(wide.pow(2).sum(-1, keepdim=True) / x.shape[-1] + eps)
            ctx.save_for_backward(x, weight, r)
            return (wide * r).to(x.dtype) * weight

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, grad):
            x, weight, r = ctx.saved_tensors
            m, wide = (grad * weight).float(), x.float()
            dx = r * m + r * (-(1 / x.shape[-1]) * r * r * (m * wide).sum(-1, keepdim=True) * wide)
            dw = (grad * (wide * r).to(x.dtype)).float().flatten(0, -2).sum(0)
            return dx.to(x.dtype), dw.to(weight.dtype), None

    def forward(self, hidden_states):
        return self.Function.apply(hidden_states, self.weight, self.variance_epsilon)


class GoodLayerNormInTwoPasses(nn.Module):
    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight, bias, eps):
            wide = x.float()
            mean = wide.sum(-1, keepdim=True) / x.shape[-1]
            r = torch.rsqrt(((wide - mean) ** 2).sum(-1, keepdim=True) / x.shape[-1] + eps)
            ctx.save_for_backward(x, weight, bias, mean, r)
            return ((wide - mean) * r * weight.float() + bias.float()).to(x.dtype)

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, grad):
            x, weight, bias, mean, r = ctx.saved_tensors
            hat, g = (x.float() - mean) * r, grad.float()
            wdy = weight.float() * g
            c1, c2 = (hat * wdy).sum(-1, keepdim=True) / x.shape[-1], wdy.sum(-1, keepdim=True) / x.shape[-1]
            dx = (wdy - (hat * c1 + c2)) * r
            dw, db = (g * hat).flatten(0, -2).sum(0), g.flatten(0, -2).sum(0)
            return dx.to(x.dtype), dw.to(weight.dtype), db.to(bias.dtype), None

    def forward(self, input):
        return self.Function.apply(input, self.weight, self.bias, self.eps)


def faults(
    *kernels: type[nn.Module], status: str, layer: type[nn.Module] = Norm, dtype: str = "float32"
) -> list[Fault]:
    return [(kernel, layer, dtype, status) for kernel in kernels]
