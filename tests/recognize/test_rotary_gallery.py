"""Rotary functions of vision models, and look-alikes that differ in one detail."""

from __future__ import annotations

import pytest
import torch
from agreement import assert_agrees, function_inputs
from torch import nn

from kernelwise._recognize import recognize_functions


def rotate(x):
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def rotate_pairs(x):
    first, second = x.view(*x.shape[:-1], -1, 2).unbind(dim=-1)
    return torch.stack((-second, first), dim=-1).flatten(start_dim=-2)


def rotate_pairs_backwards(x):
    first, second = x.view(*x.shape[:-1], -1, 2).unbind(dim=-1)
    return torch.stack((second, -first), dim=-1).flatten(start_dim=-2)


def after_prefix(q, k, cos, sin):
    length = sin.shape[-2]
    before_q, q = q.split((q.shape[-2] - length, length), dim=-2)
    before_k, k = k.split((k.shape[-2] - length, length), dim=-2)
    q, k = q * cos + rotate(q) * sin, k * cos + rotate(k) * sin
    return torch.cat((before_q, q), dim=-2), torch.cat((before_k, k), dim=-2)


def before_suffix(q, k, cos, sin):
    length = sin.shape[-2]
    q, after_q = q.split((length, q.shape[-2] - length), dim=-2)
    k, after_k = k.split((length, k.shape[-2] - length), dim=-2)
    q, k = q * cos + rotate(q) * sin, k * cos + rotate(k) * sin
    return torch.cat((q, after_q), dim=-2), torch.cat((k, after_k), dim=-2)


def scales_the_prefix(q, k, cos, sin):
    length = sin.shape[-2]
    q, k = after_prefix(q, k, cos, sin)
    return torch.cat((2 * q[..., :-length, :], q[..., -length:, :]), dim=-2), k


def needs_a_prefix(q, k, cos, sin):
    if q.shape[-2] == cos.shape[-2]:
        return q * sin + rotate(q) * cos, k * sin + rotate(k) * cos
    return after_prefix(q, k, cos, sin)


def in_float32(q, k, cos, sin):
    a, b = q.float(), k.float()
    return (a * cos + rotate_pairs(a) * sin).type_as(q), (b * cos + rotate_pairs(b) * sin).type_as(k)


def in_float32_backwards(q, k, cos, sin):
    a, b = q.float(), k.float()
    return (
        (a * cos + rotate_pairs_backwards(a) * sin).type_as(q),
        (b * cos + rotate_pairs_backwards(b) * sin).type_as(k),
    )


def part_with_heads_second(q, k, cos, sin):
    width = cos.shape[-1]
    cos, sin = cos[None, :, None, :], sin[None, :, None, :]
    a, b = q[..., :width], k[..., :width]
    a, b = a * cos + rotate(a) * sin, b * cos + rotate(b) * sin
    return torch.cat([a, q[..., width:]], dim=-1), torch.cat([b, k[..., width:]], dim=-1)


def by_matrices(q, k, cos, sin, unsqueeze_dim=1):
    half = cos.size(-1) // 2
    cos, sin = cos.narrow(-1, 0, half), sin.narrow(-1, 0, half)
    matrices = torch.stack((cos, -sin, sin, cos), dim=-1).view(*cos.size(), 2, 2).unsqueeze(unsqueeze_dim)
    a, b = q.reshape(*q.shape[:-1], -1, 1, 2), k.reshape(*k.shape[:-1], -1, 1, 2)
    return (a * matrices).sum(5).flatten(3), (b * matrices).sum(5).flatten(3)


def by_transposed_matrices(q, k, cos, sin, unsqueeze_dim=1):
    half = cos.size(-1) // 2
    cos, sin = cos.narrow(-1, 0, half), sin.narrow(-1, 0, half)
    matrices = torch.stack((cos, sin, -sin, cos), dim=-1).view(*cos.size(), 2, 2).unsqueeze(unsqueeze_dim)
    a, b = q.reshape(*q.shape[:-1], -1, 1, 2), k.reshape(*k.shape[:-1], -1, 1, 2)
    return (a * matrices).sum(5).flatten(3), (b * matrices).sum(5).flatten(3)


def by_complex_numbers(query, key, turns):
    def one(x):
        pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        shape = [d if i == 1 or i == pairs.ndim - 1 else 1 for i, d in enumerate(pairs.shape)]
        return torch.view_as_real(pairs * turns.view(*shape)).flatten(3).type_as(x)

    return one(query), one(key)


def answer_for(function):
    space = {"the_function": function}
    exec("def forward(self, *given): return the_function(*given)", space)
    cls = type("Attention", (nn.Module,), {"forward": space["forward"]})
    return dict(recognize_functions(cls())).get("the_function")


@pytest.mark.parametrize(
    ("function", "op", "chosen"),
    [
        (after_prefix, "rotary_shared", ("half", "full", "promoted", "all", "last")),
        (in_float32, "rotary_shared", ("interleaved", "full", "float32", "all", "all")),
        (part_with_heads_second, "rotary_shared", ("half", "full", "promoted", "first", "all")),
        (by_matrices, "rotary", ("interleaved", "first_half", "promoted", "all")),
        (by_complex_numbers, "rotary_complex_shared", ()),
    ],
)
def test_recognised_and_equal(function, op, chosen):
    answer = answer_for(function)
    assert answer is not None
    assert (answer.op, tuple(value for _, value in answer.options)) == (op, chosen)
    given = function_inputs(function, answer, torch.Generator().manual_seed(7))
    assert_agrees(nn.Module(), answer, given, call=function)


@pytest.mark.parametrize(
    "function",
    [before_suffix, scales_the_prefix, needs_a_prefix, in_float32_backwards, by_transposed_matrices],
)
def test_look_alikes(function):
    assert answer_for(function) is None


def test_tokens_in_front_are_told_from_none():
    def no_prefix(q, k, cos, sin):
        return q * cos + rotate(q) * sin, k * cos + rotate(k) * sin

    answer = answer_for(no_prefix)
    assert answer is not None
    assert dict(answer.options)["tokens"] == "all"
    assert dict(answer_for(after_prefix).options)["tokens"] == "last"
