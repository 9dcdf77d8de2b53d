"""Planted faults: kernels whose outputs are wrong, for some inputs or for all."""

from __future__ import annotations

import torch
from gallery import MLP, STALE, Attention, Fault, LateNorm, apply_rotary_pos_emb, faults, rms_norm
from torch import Tensor, nn


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


class DividesByTheLargest(nn.Module):
    """Scales every row first, which a row of padding does not survive."""

    def forward(self, hidden_states):
        y = rms_norm(hidden_states, self.weight, self.variance_epsilon)
        largest = hidden_states.detach().abs().amax(-1, keepdim=True) if y.numel() else 1
        return y * (largest / largest)


class RoundsToHalf(nn.Module):
    def forward(self, hidden_states):
        return rms_norm(hidden_states, self.weight, self.variance_epsilon).half().to(hidden_states.dtype)


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


FAULTS: list[Fault] = [
    *faults(IgnoresWeight, LargerEpsilon, SmallerEpsilon, FixedEpsilon, AddsAThousandth, status="wrong_values"),
    *faults(DropsLastRowAtOddSizes, DropsLastColumnAtOddWidths, DropsTail, status="wrong_values"),
    *faults(CountsElementsWith32Bits, status="wrong_values", dtype="bfloat16"),
    *faults(DropsRowsAbove65535, OnlyFirstBatch, WrongForOneRow, TakesAllForContiguous, status="wrong_values"),
    *faults(RemembersByAddress, OneOutputForAll, IgnoresWhereATensorBegins, status="wrong_values"),
    *faults(WrongForTwoDimensions, WrongForFourDimensions, status="wrong_values"),
    *faults(TakesLastStrideForOne, StaleResult, StaleWeight, RoundsToHalf, status="wrong_values"),
    *faults(ComputesInHalf, IgnoresWeight, LargerEpsilon, status="wrong_values", dtype="bfloat16"),
    *faults(RoundsEarly, status="wrong_values", layer=LateNorm, dtype="bfloat16"),
    *faults(OverflowsOnLargeInputs, HidesNan, DividesByTheLargest, status="non_finite"),
    *faults(RoundsToTheLargest, DropsRowsAbove128, layer=MLP, status="wrong_values"),
    *faults(SwapsGateAndUp, OtherActivation, ReadsWeightsOnce, layer=MLP, status="wrong_values"),
    *faults(TurnsBackwards, FirstHalfForBoth, ForgetsKeys, layer=Attention, status="wrong_values"),
]
