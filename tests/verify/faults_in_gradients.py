"""Planted faults: kernels whose outputs are right, and whose gradients are wrong or missing."""

from __future__ import annotations

import torch
from gallery import MLP, STALE, Fault, WithBackward, faults, rms_norm
from torch import nn


class WrongWeightGradient(nn.Module):
    def forward(self, hidden_states):
        return WithBackward.apply(
            hidden_states, self.weight, self.variance_epsilon, lambda dx, dw, ctx: (dx, dw * 1.01)
        )


class NegatedGradient(nn.Module):
    def forward(self, hidden_states):
        return WithBackward.apply(hidden_states, self.weight, self.variance_epsilon, lambda dx, dw, ctx: (-dx, dw))


class GradientWithoutMean(nn.Module):
    def forward(self, hidden_states):
        wide = hidden_states.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).detach()
        return self.weight * (wide * scale).to(hidden_states.dtype)


class AccumulatesItself(nn.Module):
    def forward(self, hidden_states):
        weight = self.weight

        def change(dx, dw, ctx):
            if weight.requires_grad:
                weight.grad = dw.clone() if weight.grad is None else weight.grad + dw
            return dx, dw

        return WithBackward.apply(hidden_states, weight, self.variance_epsilon, change)


class ClearsGradients(nn.Module):
    def forward(self, hidden_states):
        weight = self.weight

        def change(dx, dw, ctx):
            weight.grad = None
            return dx, dw

        return WithBackward.apply(hidden_states, weight, self.variance_epsilon, change)


class FlushesSmallGradients(nn.Module):
    """As a backward in a narrow dtype does with the gradients of a mean over many tokens."""

    def forward(self, hidden_states):
        change = lambda dx, dw, ctx: (dx * (dx.abs() > 1e-9), dw)  # noqa: E731
        return WithBackward.apply(hidden_states, self.weight, self.variance_epsilon, change)


class WrongSecondGradient(nn.Module):
    def forward(self, hidden_states):
        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x, weight, eps):
                ctx.save_for_backward(x, weight)
                ctx.eps = eps
                return rms_norm(x, weight, eps)

            @staticmethod
            def backward(ctx, grad):
                x, weight = ctx.saved_tensors
                wide = x.float()
                r = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + ctx.eps)
                r = r.detach()
                g = grad * weight
                dx = r * g - wide * r**3 * (g * wide).mean(-1, keepdim=True)
                return dx.to(x.dtype), (grad * (wide * r)).flatten(0, -2).sum(0).to(weight.dtype), None

        return Function.apply(hidden_states, self.weight, self.variance_epsilon)


class OverwritesWhatItSaved(nn.Module):
    def forward(self, hidden_states):
        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x, weight, eps):
                ctx.saved = x.detach().clone(), weight.detach().clone()
                ctx.eps = eps
                return rms_norm(x, weight, eps)

            @staticmethod
            @torch.autograd.function.once_differentiable
            def backward(ctx, grad):
                x, weight = (t.detach().clone().requires_grad_() for t in ctx.saved)
                with torch.enable_grad():
                    dx, dw = torch.autograd.grad(rms_norm(x, weight, ctx.eps), (x, weight), grad)
                ctx.saved[0].copy_(dx)
                return dx, dw, None

        return Function.apply(hidden_states, self.weight, self.variance_epsilon)


class OneWorkspaceForAll(nn.Module):
    """What a backward needs lies where the next call, of the next layer, writes too."""

    def forward(self, hidden_states):
        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x, weight, eps):
                ctx.x = STALE.setdefault(("workspace", x.shape, x.dtype), torch.empty(x.shape, dtype=x.dtype)).copy_(x)
                ctx.save_for_backward(weight)
                ctx.eps = eps
                return rms_norm(x, weight, eps)

            @staticmethod
            @torch.autograd.function.once_differentiable
            def backward(ctx, grad):
                (weight,) = ctx.saved_tensors
                x, weight = ctx.x.clone().requires_grad_(), weight.detach().requires_grad_()
                with torch.enable_grad():
                    return (*torch.autograd.grad(rms_norm(x, weight, ctx.eps), (x, weight), grad), None)

        return Function.apply(hidden_states, self.weight, self.variance_epsilon)


class TakesGradientForContiguous(nn.Module):
    """The gradient of a sum is one number for all, and that of a transposed view is transposed."""

    def forward(self, hidden_states):
        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x, weight, eps):
                ctx.save_for_backward(x, weight)
                ctx.eps = eps
                return rms_norm(x, weight, eps)

            @staticmethod
            @torch.autograd.function.once_differentiable
            def backward(ctx, grad):
                x, weight = (t.detach().requires_grad_() for t in ctx.saved_tensors)
                memory = torch.zeros(grad.numel(), dtype=grad.dtype)
                held = min(grad.numel(), grad.untyped_storage().nbytes() // grad.element_size())
                memory[:held] = grad.as_strided((held,), (1,), 0)
                with torch.enable_grad():
                    y = rms_norm(x, weight, ctx.eps)
                    return (*torch.autograd.grad(y, (x, weight), memory.view(grad.shape)), None)

        return Function.apply(hidden_states, self.weight, self.variance_epsilon)


class NoWeightGradient(nn.Module):
    def forward(self, hidden_states):
        return WithBackward.apply(hidden_states, self.weight, self.variance_epsilon, lambda dx, dw, ctx: (dx, None))


class NoInputGradient(nn.Module):
    def forward(self, hidden_states):
        return WithBackward.apply(hidden_states, self.weight, self.variance_epsilon, lambda dx, dw, ctx: (None, dw))


class NoBackward(nn.Module):
    def forward(self, hidden_states):
        return rms_norm(hidden_states.detach(), self.weight.detach(), self.variance_epsilon)


class NoGradientForFrozenWeight(nn.Module):
    def forward(self, hidden_states):
        change = lambda dx, dw, ctx: (dx if ctx.needs_input_grad[1] else None, dw)  # noqa: E731
        return WithBackward.apply(hidden_states, self.weight, self.variance_epsilon, change)


class DetachesGate(nn.Module):
    def forward(self, x):
        return self.down_proj(nn.functional.silu(self.gate_proj(x)).detach() * self.up_proj(x))


FAULTS: list[Fault] = [
    *faults(WrongWeightGradient, NegatedGradient, GradientWithoutMean, AccumulatesItself, status="wrong_gradient"),
    *faults(WrongSecondGradient, status="wrong_gradient"),
    *faults(ClearsGradients, status="wrong_gradient"),
    *faults(NoWeightGradient, NoInputGradient, NoBackward, NoGradientForFrozenWeight, status="missing_gradient"),
    *faults(OverwritesWhatItSaved, OneWorkspaceForAll, TakesGradientForContiguous, status="wrong_gradient"),
    *faults(DetachesGate, layer=MLP, status="missing_gradient"),
]
