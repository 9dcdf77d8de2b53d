"""Rotary functions of vision models, and look-alikes that differ in one detail."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from agreement import assert_agrees, function_inputs
from torch import nn

from kernelwise._applying._bind import function_call
from kernelwise._applying._guards import UNPROVEN
from kernelwise._data import Kernel, KernelRef, Layer, Parameter
from kernelwise._recognize import condition, recognize_functions
from kernelwise._recognize._fit import PLAIN
from kernelwise.ops import OPERATIONS


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


# --- sizes that are the same, and arguments that do not fit together ---------------------------------------------------


def plain(q, k, cos, sin, unsqueeze_dim=1):
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return q * cos + rotate(q) * sin, k * cos + rotate(k) * sin


def doubled_where_angles_are_shared(q, k, cos, sin, unsqueeze_dim=1):
    return plain(q * 2 if cos.shape[0] == 1 and q.shape[0] > 1 else q, k, cos, sin, unsqueeze_dim)


def doubled_where_batches_differ(q, k, cos, sin, unsqueeze_dim=1):
    return plain(q * 2 if cos.shape[0] != q.shape[0] else q, k, cos, sin, unsqueeze_dim)


def doubled_where_every_query_has_its_key(q, k, cos, sin, unsqueeze_dim=1):
    return plain(q * 2 if q.shape[unsqueeze_dim] == k.shape[unsqueeze_dim] else q, k, cos, sin, unsqueeze_dim)


def doubled_for_one_head(q, k, cos, sin, unsqueeze_dim=1):
    return plain(q * 2 if k.shape[unsqueeze_dim] == 1 else q, k, cos, sin, unsqueeze_dim)


def part_doubled_where_it_is_all(q, k, cos, sin, unsqueeze_dim=1):
    width = cos.shape[-1]
    a, b = plain(q[..., :width], k[..., :width], cos, sin, unsqueeze_dim)
    a = a * 2 if width == q.shape[-1] else a
    return torch.cat((a, q[..., width:]), dim=-1), torch.cat((b, k[..., width:]), dim=-1)


@pytest.mark.parametrize(
    "function",
    [
        doubled_where_angles_are_shared,
        doubled_where_batches_differ,
        doubled_where_every_query_has_its_key,
        doubled_for_one_head,
        part_doubled_where_it_is_all,
    ],
)
def test_sizes_that_are_the_same_are_tried(function):
    assert answer_for(plain) is not None
    assert answer_for(function) is None


def other_for_mixed_dtypes(q, k, cos, sin, unsqueeze_dim=1):
    return plain(q * 2 if k.dtype != q.dtype else q, k, cos, sin, unsqueeze_dim)


def other_for_mixed_angles(q, k, cos, sin, unsqueeze_dim=1):
    return plain(q * 2 if cos.dtype != sin.dtype else q, k, cos, sin, unsqueeze_dim)


def other_for_another_place(q, k, cos, sin, unsqueeze_dim=1):
    return plain(q * 2 if unsqueeze_dim not in (1, 2) else q, k, cos, sin, unsqueeze_dim)


def other_for_angles_without_batch(q, k, cos, sin, unsqueeze_dim=1):
    return plain(q * 2 if cos.ndim == 2 else q, k, cos, sin, unsqueeze_dim)


def other_for_keys_of_another_length(q, k, cos, sin, unsqueeze_dim=1):
    return plain(q * 2 if q.shape[3 - unsqueeze_dim] != k.shape[3 - unsqueeze_dim] else q, k, cos, sin, unsqueeze_dim)


UNSQUEEZE_DIM = Parameter("unsqueeze_dim", "positional_or_keyword", True)
QUERIES, KEYS, ANGLES = (2, 4, 6, 8), (2, 2, 6, 8), (2, 6, 8)
APART = {
    other_for_mixed_dtypes: (QUERIES, KEYS, ANGLES, ANGLES, {"k": torch.bfloat16}, 1),
    other_for_mixed_angles: (QUERIES, KEYS, ANGLES, ANGLES, {"sin": torch.bfloat16}, 1),
    other_for_another_place: (QUERIES, KEYS, ANGLES, ANGLES, {}, -3),
    other_for_angles_without_batch: (QUERIES, KEYS, ANGLES[1:], ANGLES[1:], {}, 0),
    other_for_keys_of_another_length: (QUERIES, (2, 2, 1, 8), ANGLES, ANGLES, {}, 1),
}


@pytest.mark.parametrize("function", APART)
def test_arguments_that_do_not_fit_together_get_the_functions_own_code(function):
    """Whatever the kernel would make of them: this one takes everything."""
    answer = answer_for(function)
    assert answer is not None
    parameters = (*(Parameter(name, "positional_or_keyword") for name in ("q", "k", "cos", "sin")), UNSQUEEZE_DIM)
    layer = Layer(
        "attention.rotary", "rotary_pos_emb", "f", "recognised", "cpu", recognition=answer, signature=parameters
    )
    calls = []

    def kernel(**given):
        calls.append(given)
        return OPERATIONS["rotary"].reference(**given)

    described = Kernel(KernelRef("builtin", "", "rotary_pos_emb"), op="rotary", signature=(), function=kernel)
    counted: Counter[str] = Counter()
    call = function_call(layer, described, "inference", function, counted)
    *shapes, dtypes, place = APART[function]
    generator = torch.Generator().manual_seed(3)

    def given(shapes, dtypes):
        values = (torch.randn(shape, generator=generator) for shape in shapes)
        return {n: value.to(dtypes.get(n)) for n, value in zip(("q", "k", "cos", "sin"), values, strict=True)}

    for usual in (given((QUERIES, KEYS, ANGLES, ANGLES), {}), given((QUERIES, KEYS, (1, 6, 8), (1, 6, 8)), {})):
        assert all(map(torch.equal, call(**usual), function(**usual)))
    assert len(calls) == 2
    assert not counted
    apart = given(shapes, dtypes)
    assert not torch.equal(function(**apart, unsqueeze_dim=place)[0], plain(**apart, unsqueeze_dim=place)[0])
    assert all(map(torch.equal, call(**apart, unsqueeze_dim=place), function(**apart, unsqueeze_dim=place)))
    assert len(calls) == 2
    assert counted == {UNPROVEN: 1}


@pytest.mark.parametrize(
    "function", [after_prefix, in_float32, part_with_heads_second, by_matrices, by_complex_numbers]
)
def test_arguments_that_fit_together_are_those_that_were_proven(function):
    answer = answer_for(function)
    space = {PLAIN: {torch.Tensor}, **function_inputs(function, answer, torch.Generator().manual_seed(7))}
    assert eval(condition(answer), space)
    first = dict(answer.roles)[OPERATIONS[answer.op].roles[0].name].value
    for other in (space[first][None], space[first][:1], space[first][..., :2], space[first].double()):
        assert not eval(condition(answer), {**space, first: other})
