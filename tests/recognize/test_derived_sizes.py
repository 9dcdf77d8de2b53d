"""Look-alikes that decide by what is made of sizes, or by what children give: a reviewer's smallest cases."""

from __future__ import annotations

import fractions
from collections.abc import Callable
from typing import Any

import pytest
import torch
from layers import MLP, Layer, Norm, operation, reason, rms, with_forward
from torch import Tensor

from kernelwise._data import Recognition
from kernelwise._recognize import _recognize_function, recognize
from kernelwise._recognize._children import record_calls

Question = Callable[[Any, Tensor], Any]
QUARTER = fractions.Fraction(40)


def scaled_if(question: Question) -> Callable[..., Any]:
    def forward(self: Any, x: Tensor) -> Tensor:
        return rms(x * 2 if question(self, x) else x, self.weight, self.eps)

    return forward


def fits_in_blocks(self: Any, x: Tensor) -> bool:
    try:
        x.view(x.shape[0], -1, 64, 32)
    except RuntimeError:
        return False
    return True


MADE: dict[str, Question] = {
    "all but the last": lambda self, x: x[:, :-1].shape[1] == 39,
    "one more": lambda self, x: torch.cat((x, x[:, :1]), 1).shape[1] == 41,
    "groups": lambda self, x: x.reshape(-1, 16).shape[0] == 160,
    "heads": lambda self, x: x.view(*x.shape[:2], 4, 8).transpose(1, 2).flatten(0, 1).shape[0] == 8,
    "two of a size": lambda self, x: torch.stack((x, x)).flatten(0, 1).shape[0] == 80,
    "a new tensor": lambda self, x: x.new_zeros(x.shape[1] + 1).shape[0] == 41,
}
TAKEN: dict[str, Question] = {
    "unbind": lambda self, x: len(x.unbind(1)) == 40,
    "split": lambda self, x: len(x.split(1, 1)) == 40,
    "rows": lambda self, x: sum(1 for _ in x) == 40,
    "a list": lambda self, x: len([0] * x.shape[1]) == 40,
    "sym_int": lambda self, x: torch.sym_int(x.shape[1]) == 40,
    "sym_max": lambda self, x: torch.sym_max(x.shape[1], 40) > 40,
    "index": lambda self, x: x.shape[1].__index__() == 40,
    "real": lambda self, x: x.shape[1].real == 40,
    "whole": lambda self, x: (x.shape[1] / 512).is_integer(),
    "digits": lambda self, x: round(x.shape[1] / 512, 1) > 100,
    "fraction": lambda self, x: x.shape[1] == QUARTER,
    "complex": lambda self, x: x.shape[1] * 1j == 40j,
}
FAR: dict[str, Question] = {
    "blocks": lambda self, x: x.shape[1] // 16 > 600,
    "root": lambda self, x: x.shape[1] ** 0.5 > 150,
    "rounded": lambda self, x: round(x.shape[1] / 512) > 40,
    "inverse": lambda self, x: 512 / x.shape[1] < 0.03,
    "plus": lambda self, x: +x.shape[1] == 40,
    "inverted": lambda self, x: ~x.shape[1] == -41,
    "powers of two": lambda self, x: (x.shape[1] & (x.shape[1] - 1)) == 0 and x.shape[1] > 100,
}


@pytest.mark.parametrize("question", MADE.values(), ids=list(MADE))
def test_a_size_that_the_layer_has_made_itself_decides_nothing_unseen(question: Question):
    assert "a size that it has made itself" in reason(with_forward(Norm, scaled_if(question)))


@pytest.mark.parametrize("question", TAKEN.values(), ids=list(TAKEN))
def test_a_size_is_not_taken_out_of_what_follows_it(question: Question):
    assert "cannot be followed" in reason(with_forward(Norm, scaled_if(question)))


@pytest.mark.parametrize("question", FAR.values(), ids=list(FAR))
def test_the_other_side_is_found_far_from_the_numbers_of_the_code(question: Question):
    assert "but not on inputs" in reason(with_forward(Norm, scaled_if(question)))


def test_what_pytorch_refuses_decides_nothing():
    assert "PyTorch has raised" in reason(with_forward(Norm, scaled_if(fits_in_blocks)))


def guarded(self: Any, x: Tensor) -> Tensor:
    gated = self.gate(x)
    return self.down(self.act(gated * 2 if gated.numel() > 2**29 else gated) * self.up(x))


def test_elements_of_what_a_child_gives_decide_nothing_unseen():
    assert "by a size that" in reason(with_forward(MLP, guarded))


def test_a_size_that_is_always_the_same_may_decide():
    def forward(self: Any, x: Tensor) -> Tensor:
        heads = x.view(*x.shape[:-1], 4, 8)
        return rms(x if heads.shape[-1] == 8 and heads.shape[-2] > 2 else x * 2, self.weight, self.eps)

    assert operation(with_forward(Norm, forward)) == "rms_norm"


def half(x: Tensor) -> Tensor:
    one, two = x.chunk(2, -1)
    return torch.cat((-two, one), -1)


def at_one_width(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    q = q * 2 if q.shape[-1] == 90 else q
    return q * cos + half(q) * sin, k * cos + half(k) * sin


def test_heads_of_any_even_width_are_tried():
    assert not hasattr(_recognize_function(at_one_width), "op")


def sums(self: Any, x: Tensor) -> bool:
    total = 0
    for _ in range(1500):
        total = total + x.shape[1]
    return total < 0


def squares(self: Any, x: Tensor) -> bool:
    number = x.shape[1]
    for _ in range(40):
        number = number * number % 1009
    return number == 3


def counts_down(self: Any, x: Tensor) -> bool:
    number = x.shape[1]
    while number > 4:
        number -= 4
    return False


def divides(self: Any, x: Tensor) -> bool:
    return max(d for d in range(1, x.shape[1] + 1) if x.shape[1] % d == 0) == 128


@pytest.mark.parametrize("question", [sums, squares, counts_down, divides])
def test_what_is_endless_ends(question: Question):
    assert reason(with_forward(Norm, scaled_if(question)))


def test_a_number_beyond_all_floats_is_a_number():
    assert "not tried" in reason(with_forward(Norm, scaled_if(lambda self, x: x.shape[1] > 10**400)))


Forward = Callable[..., Any]


def an_entry_of_a_cache(self: Any, x: Tensor, mask: Any = None, cache: Any = None) -> Tensor:
    x = x + self.attention(self.norm(x), mask=mask)[0]
    return x if cache is not None and cache.conv is None else x + self.mlp(self.norm2(x))


def weights(self: Any, x: Tensor, mask: Any = None) -> Tensor:
    attended, weights = self.attention(self.norm(x), mask=mask)
    x = x + attended
    x = x + self.mlp(self.norm2(x))
    return x if weights is not None else x * 2


def two_switches(
    self: Any, x: Tensor, mask: Any = None, output_attentions: bool = False, use_cache: bool = False
) -> Tensor:
    attended = self.attention(self.norm(x), mask=mask)[0]
    x = x + (attended * 2 if output_attentions and use_cache and mask is not None else attended)
    return x + self.mlp(self.norm2(x))


def other_names(self: Any, x: Tensor, mask: Any = None, cache: Any = None, position: Any = None) -> Tensor:
    m, c, p = mask, cache, position
    attended = self.attention(self.norm(x), mask=mask)[0]
    x = x + (attended * 2 if m is None and c is None and p is not None else attended)
    return x + self.mlp(self.norm2(x))


def a_list_of_answers(self: Any, x: Tensor, mask: Any = None, cache: Any = None, position: Any = None) -> Tensor:
    attended = self.attention(self.norm(x), mask=mask)[0]
    absent = [item is None for item in (mask, cache, position)]
    x = x + (attended * 2 if absent == [True, True, False] else attended)
    return x + self.mlp(self.norm2(x))


def as_many_as_attention_gives(self: Any, x: Tensor, mask: Any = None) -> Tensor:
    attended = self.attention(self.norm(x), mask=mask)[0]
    x = x[:, -attended.shape[1] :] + attended
    return x + self.mlp(self.norm2(x))


def another_dtype(self: Any, x: Tensor, mask: Any = None) -> Tensor:
    attended = self.attention(self.norm(x), mask=mask)[0]
    is_half = attended.dtype == torch.float16 and x.dtype == torch.float32
    x = x + (attended * 2 if is_half else attended)
    return x + self.mlp(self.norm2(x))


def dtypes_of_weights(self: Any, x: Tensor, mask: Any = None) -> Tensor:
    attended = self.attention(self.norm(x), mask=mask)[0]
    x = x + (attended * 2 if self.norm.weight.dtype != self.norm2.weight.dtype else attended)
    return x + self.mlp(self.norm2(x))


def no_tuple(self: Any, x: Tensor, mask: Any = None) -> Tensor:
    attended = self.attention(self.norm(x), mask=mask)
    x = x + (attended[0] if isinstance(attended, tuple) else attended * 2)
    return x + self.mlp(self.norm2(x))


def a_long_tuple(self: Any, x: Tensor, mask: Any = None) -> Tensor:
    attended = self.attention(self.norm(x), mask=mask)
    x = x + (attended[0] * 2 if len(attended) == 3 else attended[0])
    return x + self.mlp(self.norm2(x))


def an_exception(self: Any, x: Tensor, past: Any = None) -> Tensor:
    x = x + self.attention(self.norm(x))[0]
    try:
        is_late = past > 3
    except TypeError:
        is_late = False
    return x if is_late else x + self.mlp(self.norm2(x))


@pytest.mark.parametrize(
    "forward",
    [
        *(an_entry_of_a_cache, weights, two_switches, other_names, a_list_of_answers, as_many_as_attention_gives),
        *(another_dtype, dtypes_of_weights, no_tuple, a_long_tuple, an_exception),
    ],
)
def test_a_layer_that_looks_at_what_it_is_given_is_not_taken_for_one_that_hands_it_on(forward: Forward):
    assert reason(with_forward(Layer, forward))


def first_of_what_it_is_given(self: Any, x: Tensor, mask: Any = None, cache: Any = None) -> Tensor:
    x = x + self.attention(self.norm(x), mask=mask)[0]
    further = self.mlp(self.norm2(x))
    return x + (further[0] if isinstance(further, tuple) else further)


def test_a_layer_that_takes_the_first_is_known():
    assert operation(with_forward(Layer, first_of_what_it_is_given)) == "decoder_layer"


def test_a_condition_whose_other_side_is_not_found_makes_the_layer_unknown():
    assert "not tried" in reason(with_forward(Norm, scaled_if(lambda self, x: x.shape[1] * 7919 % 1000003 == 17)))


class HandsOn(Layer):
    """It gives what its last child gives, be it a tensor or a tuple. Only a tensor can be called so."""

    def __init__(self) -> None:
        super().__init__()
        self.last = MLP()

    def forward(self, x: Tensor, mask: Any = None) -> Any:
        x = x + self.attention(self.norm(x), mask=mask)[0]
        return self.last(x + self.mlp(self.norm2(x)))


class TakesApart(HandsOn):
    def forward(self, x: Tensor, mask: Any = None) -> Any:
        y = super().forward(x, mask)
        return y[0] if isinstance(y, tuple) else (y,)


def test_a_layer_that_hands_on_what_its_last_child_gives_is_called_with_tensors():
    found = recognize(HandsOn())
    assert isinstance(found, Recognition)
    assert (found.op, dict(found.options)["returns"]) == ("decoder_layer", "tensor")
    calls, _ = record_calls(HandsOn(), training=None)
    assert calls[-1].path == "last"
    assert calls[-1].lengths == (0,)
    assert "results in a tuple" in reason(TakesApart())
