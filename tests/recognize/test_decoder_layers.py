"""Decoder layers are recognised by how arguments pass to their children, and look-alikes are told apart."""

from __future__ import annotations

import pytest
import torch
from agreement import assert_agrees
from torch import Tensor, nn
from torch.nn import functional as F

from kernelwise import ops
from kernelwise._data import Binding, Recognition
from kernelwise._recognize import Unknown, recognize
from kernelwise._recognize._children import record_calls
from kernelwise._recognize._passing import HIDDEN, Given

WIDTH = 24


class Norm(nn.Module):
    def __init__(self, eps: float = 1e-6) -> None:
        super().__init__()
        self.scale, self.eps = nn.Parameter(torch.ones(WIDTH)), eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        return self.scale * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, mask=None, cache=None, **kwargs):
        return self.proj(x.cumsum(-2)), None


class Layer(nn.Module):
    """Llama's, under other names."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.mix, self.between = Norm(), Mixer(), Norm()
        self.dense, self.third, self.fourth = nn.Linear(WIDTH, WIDTH), Norm(), Norm()
        self.up, self.down = nn.Linear(WIDTH, 40), nn.Linear(40, WIDTH)
        self.drop, self.scale, self.gain = nn.Dropout(0.1), 0.25, nn.Parameter(torch.ones(WIDTH))

    def forward(self, hidden, mask=None, cache=None, **kwargs):
        mixed, _ = self.mix(self.before(hidden), mask=mask, cache=cache, **kwargs)
        hidden = hidden + mixed
        return hidden + self.dense(self.between(hidden))


def roles(answer: Recognition | Unknown) -> dict[str, object]:
    assert isinstance(answer, Recognition), answer
    return {role: binding.value for role, binding in answer.roles if binding.value is not None}


def test_plain_layer():
    layer = Layer()
    answer = recognize(layer)
    assert isinstance(answer, Recognition)
    assert answer.op == "decoder_layer"
    assert dict(answer.options) == {"returns": "tensor", "clamp": "none", "passing": "plain", "norm": "rms_norm"}
    assert roles(answer) == {
        "x": "hidden", "input_norm": "before", "attention": "mix", "mlp_norm": "between", "mlp": "dense",
    }  # fmt: skip
    assert dict(answer.roles)["multiplier"] == Binding("constant", None)
    assert ops.layer_name(answer) == "DecoderLayer"
    assert_agrees(layer, answer, {"hidden": torch.randn(2, 5, WIDTH)})


def test_how_children_are_called():
    (before, mix, between, dense), refused = record_calls(Layer(), training=False)
    assert refused is None
    assert [call.path for call in (before, mix, between, dense)] == ["before", "mix", "between", "dense"]
    assert before.args == (HIDDEN,)
    assert not before.kwargs
    passed = dict(mix.kwargs)
    assert set(passed) == {"mask", "cache", "_kernelwise_more"}
    assert all(type(item) is Given for item in passed.values())
    assert mix.lengths == (2,)
    assert dense.lengths == (0,)


class Sandwich(Layer):
    def forward(self, hidden, mask=None, **kwargs):
        mixed, _ = self.mix(self.before(hidden), mask, **kwargs)
        hidden = hidden + self.third(mixed)
        residual = hidden
        hidden = self.fourth(self.dense(self.between(hidden)))
        return residual + hidden


class Multiplied(Layer):
    def forward(self, hidden, mask=None, **kwargs):
        hidden = hidden + self.mix(self.before(hidden), mask, **kwargs)[0] * self.scale
        return hidden + self.dense(self.between(hidden)) * self.scale


class Inline(Layer):
    def forward(self, hidden, mask=None, **kwargs):
        residual = hidden
        hidden, _ = self.mix(self.before(hidden), mask, **kwargs)
        hidden = residual + self.drop(hidden)
        return hidden + self.drop(self.down(self.drop(F.gelu(self.up(self.between(hidden))))))


class Cross(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.cross = Mixer()

    def forward(self, hidden, mask=None, states=None, states_mask=None, **kwargs):
        hidden = hidden + self.mix(self.before(hidden), mask, **kwargs)[0]
        if states is not None:
            hidden = hidden + self.cross(self.third(hidden), states, mask=states_mask, **kwargs)[0]
        return hidden + self.dense(self.between(hidden))


class CrossWithBlock(Cross):
    """The MLP is a child that may give anything, called second where there is no context and third where there is one."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU())


class CrossRefused(Layer):
    """As GPT-2, which has no attention to a context unless it was built with it."""

    def forward(self, hidden, mask=None, states=None, **kwargs):
        hidden = hidden + self.mix(self.before(hidden), mask, **kwargs)[0]
        if states is not None:
            if not hasattr(self, "cross"):
                raise ValueError(f"{self} has no attention to a context")
            hidden = hidden + self.cross(self.third(hidden), states)
        return hidden + self.dense(self.between(hidden))


class Experts(Layer):
    """A mixture that gives its router's scores too, or not."""

    def forward(self, hidden, mask=None, **kwargs):
        hidden = hidden + self.mix(self.before(hidden), mask, **kwargs)[0]
        residual = hidden
        hidden = self.mixture(self.between(hidden))
        if isinstance(hidden, tuple):
            hidden, _ = hidden
        return residual + hidden

    def __init__(self) -> None:
        super().__init__()
        self.mixture = Mixer()


class GivesWeights(Layer):
    def forward(self, hidden, mask=None, output_attentions=False, **kwargs):
        mixed, weights = self.mix(self.before(hidden), mask, **kwargs)
        hidden = hidden + mixed
        outputs = (hidden + self.dense(self.between(hidden)),)
        if output_attentions:
            outputs += (weights,)
        return outputs


class Parallel(Layer):
    def forward(self, hidden, mask=None, **kwargs):
        normed = self.before(hidden)
        return hidden + self.mix(normed, mask, **kwargs)[0] + self.dense(normed)


class ParallelWithTwoNorms(Layer):
    def forward(self, hidden, mask=None, **kwargs):
        inner = hidden + self.mix(self.before(hidden), mask, **kwargs)[0]
        return inner + self.dense(self.between(hidden))


class NormedOut(Layer):
    def forward(self, hidden, mask=None, **kwargs):
        hidden = hidden + self.before(self.mix(hidden, mask, **kwargs)[0])
        return hidden + self.between(self.dense(hidden))


class PostNorm(Layer):
    def forward(self, hidden, mask=None, **kwargs):
        hidden = self.before(hidden + self.mix(hidden, mask, **kwargs)[0])
        return self.between(hidden + self.dense(hidden))


class Half(Layer):
    def forward(self, hidden, mask=None, **kwargs):
        return hidden + self.mix(self.before(hidden), mask, **kwargs)[0]


@pytest.mark.parametrize(
    ("cls", "op", "named"),
    [
        (Sandwich, "decoder_layer", {"attention_out": "third", "mlp_out": "fourth"}),
        (Multiplied, "decoder_layer", {"multiplier": "scale", "mlp": "dense"}),
        (Inline, "decoder_layer_inline", {"up": "up", "down": "down"}),
        (Cross, "decoder_layer_cross", {"context": "states", "cross_norm": "third", "cross_attention": "cross"}),
        (CrossWithBlock, "decoder_layer_cross", {"context": "states", "cross_attention": "cross"}),
        (CrossRefused, "decoder_layer", {"mlp": "dense"}),
        (Experts, "decoder_layer", {"mlp": "mixture"}),
        (GivesWeights, "decoder_layer", {"attention": "mix"}),
        (Parallel, "decoder_layer_parallel", {"norm": "before"}),
        (ParallelWithTwoNorms, "decoder_layer_parallel", {"norm": "before", "other_norm": "between"}),
        (NormedOut, "decoder_layer_normed_out", {"attention_norm": "before", "mlp_norm": "between"}),
        (PostNorm, "decoder_layer_post_norm", {"attention_norm": "before", "mlp_norm": "between"}),
        (Half, "residual_block", {"norm": "before", "inner": "mix"}),
    ],
)
def test_other_layers(cls, op, named):
    layer = cls().eval()
    answer = recognize(layer)
    assert isinstance(answer, Recognition), answer
    assert answer.op == op
    assert named.items() <= roles(answer).items()
    given = {str(b.value): torch.randn(2, 5, WIDTH) for _, b in answer.roles if b.kind == "argument"}
    assert_agrees(layer, answer, given)


class ResidualAfterTheNorm(Layer):
    def forward(self, hidden, mask=None, **kwargs):
        hidden = self.before(hidden)
        hidden = hidden + self.mix(hidden, mask, **kwargs)[0]
        return hidden + self.dense(self.between(hidden))


class ResidualOfTheInput(Layer):
    """The second sum starts from the layer's input."""

    def forward(self, hidden, mask=None, **kwargs):
        inner = hidden + self.mix(self.before(hidden), mask, **kwargs)[0]
        return hidden + self.dense(self.between(inner))


class ScaledOnce(Layer):
    def forward(self, hidden, mask=None, **kwargs):
        hidden = hidden + self.mix(self.before(hidden), mask, **kwargs)[0] * self.scale
        return hidden + self.dense(self.between(hidden))


class ScaledResidual(Layer):
    def forward(self, hidden, mask=None, **kwargs):
        hidden = hidden * self.scale + self.mix(self.before(hidden), mask, **kwargs)[0]
        return hidden * self.scale + self.dense(self.between(hidden))


class NormedUsedTwice(Layer):
    def forward(self, hidden, mask=None, **kwargs):
        normed = self.before(hidden)
        hidden = hidden + self.mix(normed, mask, **kwargs)[0] + normed
        return hidden + self.dense(self.between(hidden))


class OneNormTwice(Layer):
    def forward(self, hidden, mask=None, **kwargs):
        hidden = hidden + self.mix(self.before(hidden), mask, **kwargs)[0]
        return hidden + self.dense(self.before(hidden))


class Float32Residual(Layer):
    def forward(self, hidden, mask=None, **kwargs):
        inner = hidden.float() + self.mix(self.before(hidden), mask, **kwargs)[0]
        return (inner + self.dense(self.between(inner.to(hidden.dtype)))).to(hidden.dtype)


class UnusedChild(Layer):
    """What it calls and throws away is a part of what it does."""

    def forward(self, hidden, mask=None, **kwargs):
        hidden = hidden + self.mix(self.before(hidden), mask, **kwargs)[0]
        self.up(hidden)
        return hidden + self.dense(self.between(hidden))


class LooksAtTheMask(Layer):
    def forward(self, hidden, mask=None, **kwargs):
        hidden = hidden + self.mix(self.before(hidden), mask, **kwargs)[0]
        if mask is not None:
            hidden = hidden * 0.5
        return hidden + self.dense(self.between(hidden))


class LooksAtMore(Layer):
    def forward(self, hidden, mask=None, **kwargs):
        hidden = hidden + self.mix(self.before(hidden), mask, **kwargs)[0]
        hidden = hidden * kwargs.get("factor", 1)
        return hidden + self.dense(self.between(hidden))


class DoesMoreWithContext(Layer):
    def forward(self, hidden, mask=None, states=None, **kwargs):
        hidden = hidden + self.mix(self.before(hidden), mask, **kwargs)[0]
        if states is not None:
            hidden = hidden + states.mean()
        return hidden + self.dense(self.between(hidden))


class SwitchChangesIt(Layer):
    def forward(self, hidden, mask=None, twice=False, **kwargs):
        hidden = hidden + self.mix(self.before(hidden), mask, **kwargs)[0]
        hidden = hidden + self.dense(self.between(hidden))
        return hidden + hidden if twice else hidden


class NoNorm(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.between = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden, mask=None, **kwargs):
        hidden = hidden + self.mix(self.before(hidden), mask, **kwargs)[0]
        return hidden + self.dense(self.between(hidden))


class ClampsInFloat16(Layer):
    def forward(self, hidden, mask=None, **kwargs):
        hidden = hidden + self.mix(self.before(hidden), mask, **kwargs)[0]
        hidden = hidden + self.dense(self.between(hidden))
        return hidden.clamp(-100, 100) if hidden.dtype == torch.float16 else hidden


class ByTheDtypesOfTwoChildren(Layer):
    def forward(self, hidden, mask=None, **kwargs):
        mixed = self.mix(self.before(hidden), mask, **kwargs)[0]
        hidden = hidden + mixed
        dense = self.dense(self.between(hidden))
        return hidden + (dense if dense.dtype == mixed.dtype else 2 * dense)


@pytest.mark.parametrize(
    "cls",
    [
        ResidualAfterTheNorm,
        ResidualOfTheInput,
        ScaledOnce,
        ScaledResidual,
        NormedUsedTwice,
        OneNormTwice,
        Float32Residual,
        UnusedChild,
        LooksAtTheMask,
        LooksAtMore,
        DoesMoreWithContext,
        SwitchChangesIt,
        NoNorm,
        ClampsInFloat16,
        ByTheDtypesOfTwoChildren,
    ],
)
def test_look_alikes(cls):
    answer = recognize(cls().eval())
    assert isinstance(answer, Unknown), answer


def test_dropout_in_training():
    layer = Inline()
    assert isinstance(recognize(layer, training=False), Recognition)
    assert isinstance(recognize(layer, training=True), Unknown)
    layer.drop.p = 0.0
    assert isinstance(recognize(layer, training=True), Recognition)


def test_swapped_norms_are_swapped_in_the_answer():
    class Swapped(Layer):
        def forward(self, hidden, mask=None, **kwargs):
            hidden = hidden + self.mix(self.between(hidden), mask, **kwargs)[0]
            return hidden + self.dense(self.before(hidden))

    assert roles(recognize(Swapped()))["input_norm"] == "between"


def test_answer_is_asked_again_when_a_norm_is_no_norm_any_more():
    class Switched(Norm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if self.eps > 0 else x * self.scale

    layer = Layer()
    layer.between = Switched()
    assert isinstance(recognize(layer), Recognition)
    layer.between.eps = -1.0
    assert isinstance(recognize(layer), Unknown)


def test_multiplier_is_read_from_the_layer():
    answer = recognize(Multiplied())
    assert isinstance(answer, Recognition)
    assert dict(answer.roles)["multiplier"] == Binding("attribute", "scale")


def test_clamp_of_float16():
    class Clamped(Layer):
        def forward(self, hidden, mask=None, **kwargs):
            hidden = hidden + self.mix(self.before(hidden), mask, **kwargs)[0]
            hidden = hidden + self.dense(self.between(hidden))
            if hidden.dtype == torch.float16:
                limit = torch.finfo(hidden.dtype).max - 1000
                hidden = torch.clamp(hidden, min=-limit, max=limit)
            return hidden

    answer = recognize(Clamped())
    assert isinstance(answer, Recognition)
    assert dict(answer.options)["clamp"] == "float16"


def test_layer_is_untouched():
    layer = Layer()
    before = {name: dict(module.__dict__) for name, module in layer.named_modules()}
    recognize(layer)
    assert {name: dict(module.__dict__) for name, module in layer.named_modules()} == before
