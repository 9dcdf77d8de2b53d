"""A language model written by hand, whose head is joined with its loss, and what is asked of it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss

import kernelwise as kw
from kernelwise._applying._lazy_logits import LazyLogits

WIDTH, VOCABULARY = 24, 331
RULE = {"LinearCrossEntropy": "builtin:LinearCrossEntropy"}


class Output(NamedTuple):
    loss: Any
    logits: Tensor


class Writer(nn.Module):
    """The least model of which the head can be joined with the loss."""

    def __init__(self, *, bias: bool = False, tied: bool = False, loss: Any = ForCausalLMLoss) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=bias)
        if tied:
            self.head.weight = self.embed.weight
        self.loss_function = loss

    def forward(self, ids: Tensor, labels: Tensor | None = None, **options: Any) -> Any:
        logits = self.head(torch.tanh(self.mix(self.embed(ids))))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=VOCABULARY, **options)
        return Output(loss, logits)


def join(model: nn.Module, rules: dict[str, str] | None = None) -> nn.Module:
    return kw.kernelize(model, RULE | (rules or {}))


def writer(**options: Any) -> Writer:
    return Writer(**options).train()


def batch(rows: int = 2, tokens: int = 19) -> tuple[Tensor, Tensor]:
    ids = torch.randint(VOCABULARY, (rows, tokens))
    labels = ids.clone()
    labels[0, 3:8] = -100
    return ids, labels


def fallbacks(model: nn.Module) -> dict[str, int]:
    (row,) = (r for r in kw.report(model).rows if r.name == "LinearCrossEntropy" and r.mode.startswith("training"))
    assert row.kernel == "builtin:LinearCrossEntropy"
    return dict(row.fallbacks)


def is_lazy(logits: Any) -> bool:
    """Whether these are logits without values. (Asking whether they are is no use of them.)"""
    return type(logits) is LazyLogits and logits._pending.values is None


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], msg=lambda text, name=name: f"{name}: {text}")


# The loss


def both(**options: Any) -> tuple[Writer, Any, Any]:
    """A kernelized model, and what it gave without its kernel and with it."""
    model = writer(**options)
    ids, labels = batch()
    own = model(ids, labels)
    join(model)
    return model, own, model(ids, labels)
