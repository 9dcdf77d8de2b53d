"""Rotary functions of language models that differ in one detail are each told apart."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from kernelwise._data import Binding
from kernelwise._recognize import recognize_functions


def rotate(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def rotate_the_other_way(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((x[..., half:], -x[..., :half]), dim=-1)


def plain(q, k, cos, sin, unsqueeze_dim=1):
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return q * cos + rotate(q) * sin, k * cos + rotate(k) * sin


def swapped_names(first, second, sin, cos):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return first * cos + rotate(first) * sin, second * cos + rotate(second) * sin


def heads_second(q, k, cos, sin):
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    return q * cos + rotate(q) * sin, k * cos + rotate(k) * sin


def wrong_sign(q, k, cos, sin, unsqueeze_dim=1):
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return q * cos + rotate_the_other_way(q) * sin, k * cos + rotate_the_other_way(k) * sin


def minus(q, k, cos, sin, unsqueeze_dim=1):
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return q * cos - rotate(q) * sin, k * cos - rotate(k) * sin


def keys_untouched(q, k, cos, sin, unsqueeze_dim=1):
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return q * cos + rotate(q) * sin, k


def keys_first(q, k, cos, sin, unsqueeze_dim=1):
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return k * cos + rotate(k) * sin, q * cos + rotate(q) * sin


def scaled_queries(q, k, cos, sin, unsqueeze_dim=1):
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return (q * cos + rotate(q) * sin) * 0.125, k * cos + rotate(k) * sin


def takes_positions(q, k, cos, sin, position_ids=None, unsqueeze_dim=1):
    if position_ids is not None:
        cos, sin = cos[position_ids], sin[position_ids]
    return plain(q, k, cos, sin, unsqueeze_dim)


def ignores_positions(q, k, cos, sin, position_ids=None, unsqueeze_dim=1):
    return plain(q, k, cos, sin, unsqueeze_dim)


def answer_for(function):
    space = {**globals(), "the_function": function}
    exec("def forward(self, q, k, cos, sin): return the_function(q, k, cos, sin)", space)
    cls = type("Attention", (nn.Module,), {"forward": space["forward"]})
    return dict(recognize_functions(cls())).get("the_function")


def test_rotary_function():
    answer = answer_for(plain)
    assert answer is not None
    assert answer.op == "rotary"
    assert dict(answer.options)["layout"] == "half"
    assert {role: b.value for role, b in answer.roles} == {
        "q": "q", "k": "k", "cos": "cos", "sin": "sin", "unsqueeze_dim": "unsqueeze_dim",
    }  # fmt: skip


def test_rotary_roles_do_not_come_from_names():
    answer = answer_for(swapped_names)
    assert {role: b.value for role, b in answer.roles} == {
        "q": "first", "k": "second", "cos": "cos", "sin": "sin", "unsqueeze_dim": 1,
    }  # fmt: skip


def test_rotary_with_heads_second():
    assert dict(answer_for(heads_second).roles)["unsqueeze_dim"] == Binding("constant", 2)


def test_argument_that_is_never_read():
    assert answer_for(ignores_positions) is not None


@pytest.mark.parametrize("function", [minus, keys_untouched, scaled_queries, takes_positions])
def test_no_rotary_function(function):
    assert answer_for(function) is None


def test_rotary_outputs_in_another_order_bind_the_other_way():
    answer = answer_for(keys_first)
    assert answer is None or dict(answer.roles)["q"].value == "k"


def test_replaced_helper_changes_the_answer():
    assert dict(answer_for(plain).options)["layout"] == "half"
    space = plain.__globals__
    kept = space["rotate"]
    try:
        space["rotate"] = rotate_the_other_way
        assert dict(answer_for(plain).options)["layout"] == "half_backwards"
    finally:
        space["rotate"] = kept
    assert dict(answer_for(plain).options)["layout"] == "half"


def vision(q, k, cos, sin):
    kept = q.dtype, k.dtype
    q, k = q.float(), k.float()
    cos, sin = cos.unsqueeze(-2).float(), sin.unsqueeze(-2).float()
    return (q * cos + rotate(q) * sin).to(kept[0]), (k * cos + rotate(k) * sin).to(kept[1])


def partial(q, k, cos, sin, unsqueeze_dim=1):
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    width = cos.shape[-1]
    a, b = q[..., :width], k[..., :width]
    return (
        torch.cat([a * cos + rotate(a) * sin, q[..., width:]], dim=-1),
        torch.cat([b * cos + rotate(b) * sin, k[..., width:]], dim=-1),
    )


def partial_in_a_way_nobody_knows(q, k, cos, sin, unsqueeze_dim=1):
    width = cos.shape[-1]
    a, b = plain(q[..., -width:], k[..., -width:], cos, sin, unsqueeze_dim)
    return torch.cat([q[..., :-width], a], dim=-1), torch.cat([k[..., :-width], b], dim=-1)


def rounded(q, k, cos, sin, unsqueeze_dim=1):
    a, b = plain(q, k, cos, sin, unsqueeze_dim)
    return a.to(q.dtype), b.to(k.dtype)


def chunked(q, k, cos, sin, unsqueeze_dim=1):
    def one(x):
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return one(q), one(k)


def interleaved(q, k, cos, sin, unsqueeze_dim=1):
    def turn(x):
        return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)

    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return q * cos + turn(q) * sin, k * cos + turn(k) * sin


@pytest.mark.parametrize(
    ("function", "op", "chosen"),
    [
        (plain, "rotary", ("half", "full", "promoted", "all")),
        (partial, "rotary", ("half", "full", "promoted", "first")),
        (rounded, "rotary", ("half", "full", "result", "all")),
        (chunked, "rotary", ("half", "half", "promoted", "all")),
        (interleaved, "rotary", ("interleaved", "full", "promoted", "all")),
        (wrong_sign, "rotary", ("half_backwards", "full", "promoted", "all")),
        (vision, "rotary_vision", ("half", "full", "float32", "all")),
    ],
)
def test_layouts_of_rotary(function, op, chosen):
    answer = answer_for(function)
    assert answer is not None
    assert answer.op == op
    assert tuple(value for _, value in answer.options) == chosen


def test_part_that_is_turned_matters():
    assert answer_for(partial_in_a_way_nobody_knows) is None
