"""Planted faults: kernels whose outputs have another form than the layer's, that fail, or that do not compile."""

from __future__ import annotations

import torch
from gallery import Clone, Fault, WithBackward, faults, rms_norm
from torch import nn


class ReturnsFloat64(nn.Module):
    def forward(self, hidden_states):
        return rms_norm(hidden_states, self.weight, self.variance_epsilon).double()


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

        return WithBackward.apply(hidden_states, self.weight, self.variance_epsilon, change)


class RecursesForever(nn.Module):
    def forward(self, hidden_states):
        def again(x):
            return again(x)

        return again(hidden_states)


class AsksForTheVersion(nn.Module):
    """Which tensors that were made in inference mode do not have."""

    def forward(self, hidden_states):
        assert hidden_states._version >= 0
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)


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


FAULTS: list[Fault] = [
    *faults(ReturnsFloat64, status="wrong_dtype"),
    *faults(ReturnsRows, status="wrong_shape"),
    *faults(ReturnsTuple, ReturnsNothing, status="wrong_structure"),
    *faults(ReturnsTransposed, status="wrong_layout"),
    *faults(ReturnsItsInput, layer=Clone, status="wrong_layout"),
    *faults(RequiresGradWithoutReason, status="wrong_requires_grad"),
    *faults(FailsWithoutRows, FailsAtThreeRows, FailsInBackward, RecursesForever, AsksForTheVersion, status="raised"),
    *faults(BreaksTheGraph, WrongWhenCompiled, status="does_not_compile"),
]
