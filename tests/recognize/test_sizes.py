"""Layers that do something else at sizes which no line of their code names."""

from __future__ import annotations

import math
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from layers import MLP, Layer, Norm, operation, reason, rms, with_forward
from torch import Tensor, nn

from kernelwise._recognize import _recognize_function

BLOCK = 40
LONG = 40_000
SETTINGS = types.SimpleNamespace(block=40)
BLOCKS = (40, 50)


class Sized(Norm):
    """A norm with sizes among its attributes."""

    on_class = 40

    def __init__(self) -> None:
        super().__init__()
        self.block, self.limit, self.blocks = 40, 9000, [40, 50]
        self.config = types.SimpleNamespace(window=40)
        self.factors = {"long": 40}

    def is_special(self, length: int) -> bool:
        return length == self.on_class


def double_if(question: Callable[[Any, Tensor], Any]) -> Callable[..., Any]:
    def forward(self: Any, x: Tensor) -> Tensor:
        return rms(x * 2 if question(self, x) else x, self.weight, self.eps)

    return forward


def in_a_closure() -> Callable[[Any, Tensor], Any]:
    block = 40
    return lambda self, x: x.shape[1] == block


def in_a_default(self: Any, x: Tensor, block: int = 40) -> bool:
    return x.shape[1] == block


QUESTIONS: dict[str, Callable[[Any, Tensor], Any]] = {
    "an attribute": lambda self, x: x.shape[1] == self.block,
    "a large attribute": lambda self, x: x.shape[1] > self.limit,
    "an attribute of the class": lambda self, x: x.size(1) == self.on_class,
    "a method": lambda self, x: self.is_special(x.shape[1]),
    "a config": lambda self, x: x.shape[-2] == self.config.window,
    "a list": lambda self, x: x.shape[-2] in self.blocks,
    "a dict": lambda self, x: x.shape[-2] >= self.factors["long"] * 300,
    "a global": lambda self, x: x.shape[1] == BLOCK,
    "a large global": lambda self, x: x.shape[1] > LONG,
    "an object": lambda self, x: x.shape[1] == SETTINGS.block,
    "a tuple": lambda self, x: x.shape[1] in BLOCKS,
    "a closure": in_a_closure(),
    "a default": in_a_default,
    "more than the largest": lambda self, x: x.shape[1] > 200_000,
    "the last of many": lambda self, x: (
        (x.shape[1] in (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 640)) * 0 or x.shape[1] == 4000
    ),
    "a product": lambda self, x: x.shape[0] * x.shape[1] == 80,
    "a number of elements": lambda self, x: x[..., 0].numel() == 80,
    "a number of rows": lambda self, x: x.reshape(-1, x.shape[-1]).shape[0] == 80,
    "a whole shape": lambda self, x: x.shape[:-1] == (7, 40),
    "a sum": lambda self, x: x.shape[0] + x.shape[1] == self.limit,
    "a difference": lambda self, x: x.shape[1] - self.block > 9000,
    "a remainder": lambda self, x: not x.shape[1] % self.block,
    "a number of blocks": lambda self, x: x.shape[1] // self.block == 300,
    "a quotient": lambda self, x: x.shape[1] / self.limit > 1,
    "a ceiling": lambda self, x: math.ceil(x.shape[1] / self.block) == 500,
    "a maximum": lambda self, x: max(x.shape[1], self.limit) != self.limit,
    "two sizes": lambda self, x: x.shape[1] == 2 * x.shape[0] + 1,
    "one after another": lambda self, x: x.shape[0] == self.block and x.shape[1] == self.block + 1,
}  # fmt: skip


@pytest.mark.parametrize("question", QUESTIONS.values(), ids=list(QUESTIONS))
def test_a_size_that_is_compared_with_something_is_tried(question: Callable[[Any, Tensor], Any]):
    assert "rms_norm" in reason(with_forward(Sized, double_if(question)))


def test_a_size_that_is_too_large_to_be_tried_makes_the_layer_unknown():
    assert "not tried" in reason(with_forward(Sized, double_if(lambda self, x: x.shape[1] > 10**8)))


NOTHING_ELSE: dict[str, Callable[[Any, Tensor], Any]] = {
    "an attribute": lambda self, x: x.shape[1] > self.limit and False,
    "always": lambda self, x: x.shape[0] < 0,
    "the width": lambda self, x: x.shape[-1] != self.weight.shape[0],
}


@pytest.mark.parametrize("question", NOTHING_ELSE.values(), ids=list(NOTHING_ELSE))
def test_a_question_that_changes_nothing_leaves_the_layer_known(question: Callable[[Any, Tensor], Any]):
    assert operation(with_forward(Sized, double_if(question))) == "rms_norm"


TABLE = {128: 2}


@pytest.mark.parametrize(
    "question",
    [
        lambda self, x: TABLE.get(x.shape[1]),
        lambda self, x: len(x) == self.block,
        lambda self, x: int(x.shape[1]) == self.block,
        lambda self, x: math.sqrt(x.shape[1]) > self.block,
        lambda self, x: x.shape[1].bit_length() > 14,
        lambda self, x: x.shape.numel() > self.limit,
    ],
)
def test_a_size_that_cannot_be_followed_makes_the_layer_unknown(question: Callable[[Any, Tensor], Any]):
    assert "cannot be followed" in reason(with_forward(Sized, double_if(question)))


def scaled_before_a_block_is_full(self: Any, x: Tensor) -> Tensor:
    return rms(x * (1 + x.shape[1] % 4001 // 4000), self.weight, self.eps)


def scaled_when_long(self: Any, x: Tensor) -> Tensor:
    return rms(x * (1 + x.shape[1] // self.limit), self.weight, self.eps)


@pytest.mark.parametrize("forward", [scaled_before_a_block_is_full, scaled_when_long])
def test_a_number_of_blocks_is_tried_without_a_branch(forward: Callable[..., Any]):
    assert "rms_norm" in reason(with_forward(Sized, forward))


def cut_at_the_end(self: Any, x: Tensor) -> Tensor:
    return rms(x[:, : self.limit], self.weight, self.eps)


def cut_at_the_start(self: Any, x: Tensor) -> Tensor:
    return rms(x[..., -self.limit :, :], self.weight, self.eps)


def first_of_some_pieces(self: Any, x: Tensor) -> Tensor:
    return rms(x.split(self.limit, 1)[0], self.weight, self.eps)


def piece_by_piece(self: Any, x: Tensor) -> Tensor:
    pieces = [x[:, i : i + self.limit] * (i + 1) for i in range(0, x.shape[1], self.limit)]
    return rms(torch.cat(pieces, 1), self.weight, self.eps)


@pytest.mark.parametrize("forward", [cut_at_the_end, cut_at_the_start, first_of_some_pieces, piece_by_piece])
def test_a_part_that_is_the_whole_of_something_short_is_tried_on_something_long(forward: Callable[..., Any]):
    assert "9001" in reason(with_forward(Sized, forward))


def clamped_when_long(self: Any, x: Tensor) -> Tensor:
    hidden = nn.functional.silu(self.gate(x))
    if x.shape[-2] > LONG:
        hidden = hidden.clamp(max=0.1)
    return self.down(hidden * self.up(x))


def skipping_at_one_length(self: Any, x: Tensor, mask: Any = None) -> Tensor:
    x = x + self.attention(self.norm(x), mask=mask)[0]
    y = self.mlp(self.norm2(x))
    return y if x.shape[1] == BLOCK else x + y


def test_sizes_of_layers_with_children_are_tried_too():
    assert "gated_mlp" in reason(with_forward(MLP, clamped_when_long))
    assert "decoder_layer" in reason(with_forward(Layer, skipping_at_one_length))


def half(x: Tensor) -> Tensor:
    one, two = x.chunk(2, -1)
    return torch.cat((-two, one), -1)


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return q * cos + half(q) * sin, k * cos + half(k) * sin


def scaled_when_long_rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    return rotary(q * 1.5 if q.shape[-2] > LONG else q, k, cos, sin, unsqueeze_dim)


def doubled_for_some_heads(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    return rotary(q * 2 if q.shape[1] == BLOCK else q, k, cos, sin, unsqueeze_dim)


def doubled_for_some_key_heads(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    return rotary(q, k * 2 if k.shape[1] == BLOCK else k, cos, sin, unsqueeze_dim)


def doubled_for_wide_heads(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    return rotary(q, k * 2 if k.shape[-1] // 2 > BLOCK * 4 else k, cos, sin, unsqueeze_dim)


def test_sizes_of_functions_are_tried_too():
    assert getattr(_recognize_function(rotary), "op", None) == "rotary"
    for function in (
        scaled_when_long_rotary,
        doubled_for_some_heads,
        doubled_for_some_key_heads,
        doubled_for_wide_heads,
    ):
        assert not hasattr(_recognize_function(function), "op")


def looks_into_what_it_hands_on(self: Any, x: Tensor, count: Any, fused: bool = False) -> Tensor:
    attended = self.attention(self.norm(x))[0]
    x = x + (attended * 2 if fused and x.shape[0] // 2 >= count else attended)
    return x + self.mlp(self.norm2(x))


def test_an_argument_that_is_compared_with_a_size_is_looked_into():
    assert "but not without fused" in reason(with_forward(Layer, looks_into_what_it_hands_on))
