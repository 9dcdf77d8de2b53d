"""Planted faults: kernels for three layers, each wrong in one way, with the status that must name it.

A fault is a layer class as a kernel repository has it. `FAULTS` says which layer it is for, in which dtype, and the status.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

STALE: dict[object, Tensor] = {}
LEAKED: list[Tensor] = []


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


class _Given(torch.autograd.Function):
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


class PlainLayerNorm(nn.LayerNorm):
    """With weights that are not all ones."""

    def __init__(self) -> None:
        super().__init__(48)
        with torch.no_grad():
            self.weight.copy_(torch.linspace(0.5, 1.5, 48))
            self.bias.copy_(torch.linspace(-1, 1, 48))


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


class IgnoresWeight(nn.Module):
    def forward(self, hidden_states):
        return rms_norm(hidden_states, self.weight * 0 + 1, self.variance_epsilon)


class LargerEpsilon(nn.Module):
    def forward(self, hidden_states):
        return rms_norm(hidden_states, self.weight, self.variance_epsilon * 10)


class SmallerEpsilon(nn.Module):
    def forward(self, hidden_states):
        return rms_norm(hidden_states, self.weight, self.variance_epsilon / 10)


class FixedEpsilon(nn.Module):
    def forward(self, hidden_states):
        return rms_norm(hidden_states, self.weight, 1e-5 + 0 * self.variance_epsilon)


class RoundsEarly(nn.Module):
    def forward(self, hidden_states):
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)


class ComputesInHalf(nn.Module):
    def forward(self, hidden_states):
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        return self.weight * (hidden_states * torch.rsqrt(variance + self.variance_epsilon))


class AddsAThousandth(nn.Module):
    def forward(self, hidden_states):
        return rms_norm(hidden_states, self.weight, self.variance_epsilon) + 1e-3


class DropsLastRowAtOddSizes(nn.Module):
    def forward(self, hidden_states):
        y = rms_norm(hidden_states, self.weight, self.variance_epsilon)
        rows = y.shape[:-1].numel()
        if rows % 2 and rows > 1:
            keep = torch.ones(rows, 1).to(y)
            keep[-1] = 0.9
            y = y * keep.view(*y.shape[:-1], 1)
        return y


class DropsLastColumnAtOddWidths(nn.Module):
    def forward(self, hidden_states):
        y = rms_norm(hidden_states, self.weight, self.variance_epsilon)
        return torch.cat((y[..., :-1], y[..., -1:] * 0), -1) if y.shape[-1] % 2 else y


class DropsTail(nn.Module):
    """A block of 256 columns at a time, and no care for the rest."""

    def forward(self, hidden_states):
        y = rms_norm(hidden_states, self.weight, self.variance_epsilon)
        width = y.shape[-1] - y.shape[-1] % 256
        return torch.cat((y[..., :width], y[..., width:] * 0), -1) if width else y


class DropsRowsAbove65535(nn.Module):
    def forward(self, hidden_states):
        y = rms_norm(hidden_states, self.weight, self.variance_epsilon)
        flat = y.flatten(0, -2)
        return torch.cat((flat[:65_535], flat[65_535:] * 0)).view_as(y) if len(flat) > 65_535 else y


class OnlyFirstBatch(nn.Module):
    def forward(self, hidden_states):
        y = rms_norm(hidden_states, self.weight, self.variance_epsilon)
        return torch.cat((y[:1], y[1:] * 0)) if len(y) > 1 else y


class WrongForOneRow(nn.Module):
    def forward(self, hidden_states):
        y = rms_norm(hidden_states, self.weight, self.variance_epsilon)
        return y * 1.01 if y.shape[:-1].numel() == 1 else y


class TakesAllForContiguous(nn.Module):
    def forward(self, hidden_states):
        x = torch.as_strided(hidden_states, hidden_states.shape, torch.empty(hidden_states.shape).stride())
        return rms_norm(x, self.weight, self.variance_epsilon)


class TakesLastStrideForOne(nn.Module):
    def forward(self, hidden_states):
        x = hidden_states
        if x.stride(-1) != 1 and x.shape[-1] > 1:
            x = x.as_strided((x.numel(),), (1,), x.storage_offset()).view(x.shape)
        return rms_norm(x, self.weight, self.variance_epsilon)


class StaleResult(nn.Module):
    def forward(self, hidden_states):
        y = rms_norm(hidden_states, self.weight, self.variance_epsilon)
        key = ("result", y.shape, y.requires_grad)
        return STALE.setdefault(key, y.detach().clone()) + (y - y.detach())


class StaleWeight(nn.Module):
    def forward(self, hidden_states):
        weight = STALE.setdefault(("weight", self.weight.shape), self.weight.detach().clone())
        return rms_norm(hidden_states, weight + (self.weight - self.weight.detach()), self.variance_epsilon)


class OverflowsOnLargeInputs(nn.Module):
    def forward(self, hidden_states):
        wide = hidden_states.float()
        variance = wide.half().pow(4).float().mean(-1, keepdim=True).sqrt() * 0 + wide.pow(2).mean(-1, keepdim=True)
        return self.weight * (wide * torch.rsqrt(variance + self.variance_epsilon)).to(hidden_states.dtype)


class HidesNan(nn.Module):
    def forward(self, hidden_states):
        return rms_norm(hidden_states.nan_to_num(), self.weight, self.variance_epsilon)


class WrongWeightGradient(nn.Module):
    def forward(self, hidden_states):
        return _Given.apply(hidden_states, self.weight, self.variance_epsilon, lambda dx, dw, ctx: (dx, dw * 1.01))


class NegatedGradient(nn.Module):
    def forward(self, hidden_states):
        return _Given.apply(hidden_states, self.weight, self.variance_epsilon, lambda dx, dw, ctx: (-dx, dw))


class GradientWithoutMean(nn.Module):
    def forward(self, hidden_states):
        wide = hidden_states.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).detach()
        return self.weight * (wide * scale).to(hidden_states.dtype)


class NoWeightGradient(nn.Module):
    def forward(self, hidden_states):
        return _Given.apply(hidden_states, self.weight, self.variance_epsilon, lambda dx, dw, ctx: (dx, None))


class NoInputGradient(nn.Module):
    def forward(self, hidden_states):
        return _Given.apply(hidden_states, self.weight, self.variance_epsilon, lambda dx, dw, ctx: (None, dw))


class NoBackward(nn.Module):
    def forward(self, hidden_states):
        return rms_norm(hidden_states.detach(), self.weight.detach(), self.variance_epsilon)


class NoGradientForFrozenWeight(nn.Module):
    def forward(self, hidden_states):
        change = lambda dx, dw, ctx: (dx if ctx.needs_input_grad[1] else None, dw)  # noqa: E731
        return _Given.apply(hidden_states, self.weight, self.variance_epsilon, change)


class AccumulatesItself(nn.Module):
    def forward(self, hidden_states):
        weight = self.weight

        def change(dx, dw, ctx):
            if weight.requires_grad:
                weight.grad = dw.clone() if weight.grad is None else weight.grad + dw
            return dx, dw

        return _Given.apply(hidden_states, weight, self.variance_epsilon, change)


class ClearsGradients(nn.Module):
    def forward(self, hidden_states):
        weight = self.weight

        def change(dx, dw, ctx):
            weight.grad = None
            return dx, dw

        return _Given.apply(hidden_states, weight, self.variance_epsilon, change)


class FlushesSmallGradients(nn.Module):
    """As a backward in a narrow dtype does with the gradients of a mean over many tokens."""

    def forward(self, hidden_states):
        change = lambda dx, dw, ctx: (dx * (dx.abs() > 1e-9), dw)  # noqa: E731
        return _Given.apply(hidden_states, self.weight, self.variance_epsilon, change)


class CountsElementsWith32Bits(nn.Module):
    """Reads a row where a sum of 32 bits says that it lies."""

    def forward(self, hidden_states):
        x = hidden_states
        last = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
        if last >= 1 << 31:
            memory = x.detach().as_strided((last + 1,), (1,), x.storage_offset())
            index = sum(
                (torch.arange(n) * s).view(-1, *(1,) * (x.dim() - 1 - at))
                for at, (n, s) in enumerate(zip(x.shape, x.stride(), strict=True))
            )
            x = memory[index % (1 << 31)] + (x - x.detach())
        return rms_norm(x, self.weight, self.variance_epsilon)


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


_BY_ADDRESS: dict[object, Tensor] = {}


class RemembersByAddress(nn.Module):
    """Keeps results by where a tensor lies, which the next batch does too."""

    def forward(self, hidden_states):
        x = hidden_states
        if torch.is_grad_enabled():
            return rms_norm(x, self.weight, self.variance_epsilon)
        key = x.data_ptr(), x._version, x.shape, x.stride(), x.dtype, self.weight.data_ptr(), self.weight._version
        if key not in _BY_ADDRESS:
            _BY_ADDRESS[key] = rms_norm(x, self.weight, self.variance_epsilon)
        return _BY_ADDRESS[key].clone()


class OneOutputForAll(nn.Module):
    """Saves memory: the result of a call lies where that of the last one lay."""

    def forward(self, hidden_states):
        y = rms_norm(hidden_states, self.weight, self.variance_epsilon)
        if y.requires_grad:
            return y
        return STALE.setdefault(("output", y.shape, y.dtype), torch.empty(y.shape, dtype=y.dtype)).copy_(y)


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


class IgnoresWhereATensorBegins(nn.Module):
    def forward(self, hidden_states):
        x = hidden_states
        if x.storage_offset():
            x = x.as_strided(x.shape, x.stride(), 0)
        return rms_norm(x, self.weight, self.variance_epsilon)


class WrongForTwoDimensions(nn.Module):
    def forward(self, hidden_states):
        y = rms_norm(hidden_states, self.weight, self.variance_epsilon)
        return y * 1.01 if y.dim() == 2 else y


class WrongForFourDimensions(nn.Module):
    def forward(self, hidden_states):
        y = rms_norm(hidden_states, self.weight, self.variance_epsilon)
        return y * 1.01 if y.dim() == 4 else y


class AsksForTheVersion(nn.Module):
    """Which tensors that were made in inference mode do not have."""

    def forward(self, hidden_states):
        assert hidden_states._version >= 0
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)


class DividesByTheLargest(nn.Module):
    """Scales every row first, which a row of padding does not survive."""

    def forward(self, hidden_states):
        y = rms_norm(hidden_states, self.weight, self.variance_epsilon)
        largest = hidden_states.detach().abs().amax(-1, keepdim=True) if y.numel() else 1
        return y * (largest / largest)


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


class SeedsRandomNumbers(nn.Module):
    def forward(self, hidden_states):
        torch.manual_seed(1234)
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)


class FlushesSmallNumbers(nn.Module):
    """As a library does that is built with -ffast-math, for the whole thread that loads it."""

    def forward(self, hidden_states):
        torch.set_flush_denormal(True)
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)


class LeaksInBackward(nn.Module):
    def forward(self, hidden_states):
        def change(dx, dw, ctx):
            LEAKED.append(dx.clone())
            return dx, dw

        return _Given.apply(hidden_states, self.weight, self.variance_epsilon, change)


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

        return _Given.apply(hidden_states, self.weight, self.variance_epsilon, change)


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

        return _Given.apply(hidden_states, self.weight, self.variance_epsilon, change)


class Races(nn.Module):
    def forward(self, hidden_states):
        y = rms_norm(hidden_states, self.weight, self.variance_epsilon)
        STALE["calls"] = calls = STALE.get("calls", torch.zeros(())) + 1
        return y * (1.0 + 0.01 * (int(calls) % 3))


class ReturnsFloat64(nn.Module):
    def forward(self, hidden_states):
        return rms_norm(hidden_states, self.weight, self.variance_epsilon).double()


class RoundsToHalf(nn.Module):
    def forward(self, hidden_states):
        return rms_norm(hidden_states, self.weight, self.variance_epsilon).half().to(hidden_states.dtype)


class ReturnsRows(nn.Module):
    def forward(self, hidden_states):
        return rms_norm(hidden_states, self.weight, self.variance_epsilon).flatten(0, -2)


class ReturnsTuple(nn.Module):
    def forward(self, hidden_states):
        return (rms_norm(hidden_states, self.weight, self.variance_epsilon),)


class ReturnsNothing(nn.Module):
    def forward(self, hidden_states):
        rms_norm(hidden_states, self.weight, self.variance_epsilon)


class ReturnsTransposed(nn.Module):
    def forward(self, hidden_states):
        y = rms_norm(hidden_states, self.weight, self.variance_epsilon)
        return y.transpose(-1, -2).contiguous().transpose(-1, -2)


class ReturnsItsInput(nn.Module):
    def forward(self, hidden_states):
        return hidden_states.view_as(hidden_states)


class RequiresGradWithoutReason(nn.Module):
    def forward(self, hidden_states):
        y = rms_norm(hidden_states, self.weight, self.variance_epsilon)
        return y if y.requires_grad else y.requires_grad_()


class FailsWithoutRows(nn.Module):
    def forward(self, hidden_states):
        if hidden_states.numel() == 0:
            raise RuntimeError("invalid configuration: a grid of 0 blocks")
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)


class FailsAtThreeRows(nn.Module):
    def forward(self, hidden_states):
        if hidden_states.shape[:-1].numel() == 3:
            raise AssertionError("rows must be a multiple of 7 or 1")
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)


class FailsInBackward(nn.Module):
    def forward(self, hidden_states):
        def change(dx, dw, ctx):
            raise NotImplementedError("no backward")

        return _Given.apply(hidden_states, self.weight, self.variance_epsilon, change)


class RecursesForever(nn.Module):
    def forward(self, hidden_states):
        def again(x):
            return again(x)

        return again(hidden_states)


class Leaks(nn.Module):
    def forward(self, hidden_states):
        y = rms_norm(hidden_states, self.weight, self.variance_epsilon)
        LEAKED.append(y.detach().clone())
        return y


class BreaksTheGraph(nn.Module):
    can_torch_compile = True

    def forward(self, hidden_states):
        torch._dynamo.graph_break()
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)


class WrongWhenCompiled(nn.Module):
    can_torch_compile = True

    def forward(self, hidden_states):
        y = rms_norm(hidden_states, self.weight, self.variance_epsilon)
        return y * 2 if torch.compiler.is_compiling() else y


class SetsDefaultDtype(nn.Module):
    def forward(self, hidden_states):
        torch.set_default_dtype(torch.bfloat16)
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)


class SetsThreads(nn.Module):
    def forward(self, hidden_states):
        torch.set_num_threads(3 if torch.get_num_threads() != 3 else 2)
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)


class RoundsToTheLargest(nn.Module):
    """Keeps as many digits of every number as the largest of all rows needs: one scale for a whole tensor."""

    def forward(self, x):
        y = self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
        if not y.numel():
            return y
        step = torch.exp2(y.detach().abs().amax().log2().floor()) * torch.finfo(y.dtype).eps
        return y + ((y / step).round() * step - y).detach()


class DropsRowsAbove128(nn.Module):
    """A block of 128 rows, and no loop over them, in the path for wide layers."""

    def forward(self, x):
        y = self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
        flat = y.flatten(0, -2)
        return torch.cat((flat[:128], flat[128:] * 0)).view_as(y) if len(flat) > 128 and y.shape[-1] > 16 else y


class SwapsGateAndUp(nn.Module):
    def forward(self, x):
        return self.down_proj(nn.functional.silu(self.up_proj(x)) * self.gate_proj(x))


class OtherActivation(nn.Module):
    def forward(self, x):
        return self.down_proj(nn.functional.gelu(self.gate_proj(x)) * self.up_proj(x))


class ReadsWeightsOnce(nn.Module):
    def forward(self, x):
        down = STALE.setdefault(("down", self.down_proj.weight.shape), self.down_proj.weight.detach().clone())
        weight = down + (self.down_proj.weight - self.down_proj.weight.detach())
        return nn.functional.linear(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x), weight)


class DetachesGate(nn.Module):
    def forward(self, x):
        return self.down_proj(nn.functional.silu(self.gate_proj(x)).detach() * self.up_proj(x))


class TurnsBackwards(nn.Module):
    def forward(self, q, k, cos, sin, unsqueeze_dim=1):
        return apply_rotary_pos_emb(q, k, cos, -sin, unsqueeze_dim)


class FirstHalfForBoth(nn.Module):
    def forward(self, q, k, cos, sin, unsqueeze_dim=1):
        cos, sin = (torch.cat((t[..., : t.shape[-1] // 2],) * 2, -1) for t in (cos, sin))
        return apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim)


class ForgetsKeys(nn.Module):
    def forward(self, q, k, cos, sin, unsqueeze_dim=1):
        return apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim)[0], k.clone()


class WritesQueries(nn.Module):
    def forward(self, q, k, cos, sin, unsqueeze_dim=1):
        rotated, keys = apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim)
        q.detach().copy_(rotated.detach())
        return rotated, keys


def _norm(*names: type[nn.Module], status: str, layer: type[nn.Module] = Norm, dtype: str = "float32") -> list:
    return [(name, layer, dtype, status) for name in names]


FAULTS: list[tuple[type[nn.Module], type[nn.Module], str, str]] = [
    *_norm(IgnoresWeight, LargerEpsilon, SmallerEpsilon, FixedEpsilon, AddsAThousandth, status="wrong_values"),
    *_norm(DropsLastRowAtOddSizes, DropsLastColumnAtOddWidths, DropsTail, status="wrong_values"),
    *_norm(CountsElementsWith32Bits, status="wrong_values", dtype="bfloat16"),
    *_norm(DropsRowsAbove65535, OnlyFirstBatch, WrongForOneRow, TakesAllForContiguous, status="wrong_values"),
    *_norm(RemembersByAddress, OneOutputForAll, IgnoresWhereATensorBegins, status="wrong_values"),
    *_norm(WrongForTwoDimensions, WrongForFourDimensions, status="wrong_values"),
    *_norm(TakesLastStrideForOne, StaleResult, StaleWeight, RoundsToHalf, status="wrong_values"),
    *_norm(ComputesInHalf, IgnoresWeight, LargerEpsilon, status="wrong_values", dtype="bfloat16"),
    *_norm(RoundsEarly, status="wrong_values", layer=LateNorm, dtype="bfloat16"),
    *_norm(OverflowsOnLargeInputs, HidesNan, DividesByTheLargest, status="non_finite"),
    *_norm(WrongWeightGradient, NegatedGradient, GradientWithoutMean, AccumulatesItself, status="wrong_gradient"),
    *_norm(WrongSecondGradient, status="wrong_gradient"),
    *_norm(ClearsGradients, status="wrong_gradient"),
    *_norm(NoWeightGradient, NoInputGradient, NoBackward, NoGradientForFrozenWeight, status="missing_gradient"),
    *_norm(WritesInput, WritesWeight, WritesBeyondTheRow, WritesInputInBackward, status="input_overwritten"),
    *_norm(WritesUpstreamGradient, status="input_overwritten"),
    *_norm(ChangesAnAttribute, FreezesTheWeight, status="input_overwritten"),
    *_norm(OverwritesWhatItSaved, OneWorkspaceForAll, TakesGradientForContiguous, status="wrong_gradient"),
    *_norm(LeavesOneUnwritten, LeavesGradientUnwritten, status="not_written"),
    *_norm(Races, status="not_repeatable"),
    *_norm(ReturnsFloat64, status="wrong_dtype"),
    *_norm(ReturnsRows, status="wrong_shape"),
    *_norm(ReturnsTuple, ReturnsNothing, status="wrong_structure"),
    *_norm(ReturnsTransposed, status="wrong_layout"),
    *_norm(ReturnsItsInput, layer=Clone, status="wrong_layout"),
    *_norm(RequiresGradWithoutReason, status="wrong_requires_grad"),
    *_norm(FailsWithoutRows, FailsAtThreeRows, FailsInBackward, RecursesForever, AsksForTheVersion, status="raised"),
    *_norm(Leaks, LeaksInBackward, status="leaks_memory"),
    *_norm(BreaksTheGraph, WrongWhenCompiled, status="does_not_compile"),
    *_norm(SetsDefaultDtype, SetsThreads, SeedsRandomNumbers, FlushesSmallNumbers, status="setting_changed"),
    *_norm(RoundsToTheLargest, DropsRowsAbove128, layer=MLP, status="wrong_values"),
    *_norm(SwapsGateAndUp, OtherActivation, ReadsWeightsOnce, layer=MLP, status="wrong_values"),
    *_norm(DetachesGate, layer=MLP, status="missing_gradient"),
    *_norm(TurnsBackwards, FirstHalfForBoth, ForgetsKeys, layer=Attention, status="wrong_values"),
    *_norm(WritesQueries, layer=Attention, status="input_overwritten"),
]
