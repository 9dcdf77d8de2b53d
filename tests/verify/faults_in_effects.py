"""Planted faults: kernels that write to what they are given, leave memory unwritten, leak, or change a setting."""

from __future__ import annotations

import torch
from gallery import LEAKED, STALE, Attention, Fault, WithBackward, apply_rotary_pos_emb, faults, rms_norm
from torch import nn


class WritesInput(nn.Module):
    def forward(self, hidden_states):
        y = rms_norm(hidden_states, self.weight, self.variance_epsilon)
        hidden_states.detach().mul_(1.0001)
        return y


class WritesWeight(nn.Module):
    def forward(self, hidden_states):
        y = rms_norm(hidden_states, self.weight, self.variance_epsilon)
        self.weight.detach().mul_(1.0001)
        return y


class WritesBeyondTheRow(nn.Module):
    def forward(self, hidden_states):
        x = hidden_states.detach()
        if x.dim() == 3 and x.shape[1] > 1 and x.stride(-2) > x.shape[-1] and x.stride(-1) == 1:
            x.as_strided((1,), (1,), x.storage_offset() + x.shape[-1]).fill_(0)
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)


class WritesInputInBackward(nn.Module):
    def forward(self, hidden_states):
        x = hidden_states

        def change(dx, dw, ctx):
            x.detach().mul_(0.5)
            return dx, dw

        return WithBackward.apply(hidden_states, self.weight, self.variance_epsilon, change)


class WritesUpstreamGradient(nn.Module):
    """Saves memory as Liger does in place: the gradient that it is given holds its result afterwards."""

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
                with torch.enable_grad():
                    dx, dw = torch.autograd.grad(rms_norm(x, weight, ctx.eps), (x, weight), grad)
                grad.detach().copy_(dx)
                return grad, dw, None

        return Function.apply(hidden_states, self.weight, self.variance_epsilon)


class ChangesAnAttribute(nn.Module):
    def forward(self, hidden_states):
        y = rms_norm(hidden_states, self.weight, self.variance_epsilon)
        self.variance_epsilon *= 1.0001
        return y


class FreezesTheWeight(nn.Module):
    def forward(self, hidden_states):
        y = rms_norm(hidden_states, self.weight, self.variance_epsilon)
        self.weight.requires_grad_(False)
        return y


class WritesQueries(nn.Module):
    def forward(self, q, k, cos, sin, unsqueeze_dim=1):
        rotated, keys = apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim)
        q.detach().copy_(rotated.detach())
        return rotated, keys


class LeavesOneUnwritten(nn.Module):
    def forward(self, hidden_states):
        y = rms_norm(hidden_states, self.weight, self.variance_epsilon)
        if y.requires_grad or not y.numel():
            return y
        out = torch.empty_like(y)
        out.view(-1)[:-1] = y.view(-1)[:-1]
        # What memory holds is chance; here it is right, as it is when the allocator gives the same block again.
        return torch.where(torch.isnan(out), out, y)


class LeavesGradientUnwritten(nn.Module):
    def forward(self, hidden_states):
        def change(dx, dw, ctx):
            out = torch.empty_like(dx)
            out.view(-1)[1:] = dx.reshape(-1)[1:]
            return torch.where(torch.isnan(out), out, dx.contiguous()), dw

        return WithBackward.apply(hidden_states, self.weight, self.variance_epsilon, change)


class Races(nn.Module):
    def forward(self, hidden_states):
        y = rms_norm(hidden_states, self.weight, self.variance_epsilon)
        STALE["calls"] = calls = STALE.get("calls", torch.zeros(())) + 1
        return y * (1.0 + 0.01 * (int(calls) % 3))


class Leaks(nn.Module):
    def forward(self, hidden_states):
        y = rms_norm(hidden_states, self.weight, self.variance_epsilon)
        LEAKED.append(y.detach().clone())
        return y


class LeaksInBackward(nn.Module):
    def forward(self, hidden_states):
        def change(dx, dw, ctx):
            LEAKED.append(dx.clone())
            return dx, dw

        return WithBackward.apply(hidden_states, self.weight, self.variance_epsilon, change)


class SetsDefaultDtype(nn.Module):
    def forward(self, hidden_states):
        torch.set_default_dtype(torch.bfloat16)
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)


class SetsThreads(nn.Module):
    def forward(self, hidden_states):
        torch.set_num_threads(3 if torch.get_num_threads() != 3 else 2)
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)


class SeedsRandomNumbers(nn.Module):
    def forward(self, hidden_states):
        torch.manual_seed(1234)
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)


class FlushesSmallNumbers(nn.Module):
    """As a library does that is built with -ffast-math, for the whole thread that loads it."""

    def forward(self, hidden_states):
        torch.set_flush_denormal(True)
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)


FAULTS: list[Fault] = [
    *faults(WritesInput, WritesWeight, WritesBeyondTheRow, WritesInputInBackward, status="input_overwritten"),
    *faults(WritesUpstreamGradient, status="input_overwritten"),
    *faults(ChangesAnAttribute, FreezesTheWeight, status="input_overwritten"),
    *faults(LeavesOneUnwritten, LeavesGradientUnwritten, status="not_written"),
    *faults(Races, status="not_repeatable"),
    *faults(Leaks, LeaksInBackward, status="leaks_memory"),
    *faults(SetsDefaultDtype, SetsThreads, SeedsRandomNumbers, FlushesSmallNumbers, status="setting_changed"),
    *faults(WritesQueries, layer=Attention, status="input_overwritten"),
]
