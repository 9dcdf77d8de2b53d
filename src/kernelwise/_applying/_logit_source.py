"""What lazy logits are computed from, when, and by what: the values behind `LazyLogits`, and an account of those alive.

Values are computed once. Logits that are still held when an optimizer steps are computed before it, because the weight they
come from is about to change; where something else has changed it, computing them raises `StaleLogitsError`.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from kernelwise._errors import StaleLogitsError

Call = Callable[..., Any]
Step = Callable[[Tensor], Tensor]  # what is done to logits, and likewise to the hidden states that stand for their rows

KEPT = "the logits were still held when an optimizer stepped, so they were computed"


class Source:
    """What logits are computed from: hidden states [..., H], weight [V, H], bias [V] or None, and the product of them.

    `loss` is the kernel `linear_cross_entropy`. `fallbacks` counts what had to be computed after all.
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, product: Call, loss: Call, fallbacks: Counter[str]
    ) -> None:
        self.hidden, self.weight, self.bias = hidden, weight, bias
        self.product, self.loss, self.fallbacks = product, loss, fallbacks
        self.watched = threading.Event()  # set once somebody wants the gradient of the logits
        self.lock = threading.RLock()
        # The same memory under other names: what is done to `parameter.data` is not done to these.
        self.held = tuple(None if t is None else t.detach() for t in (hidden, weight, bias))
        self._versions = self._seen()

    def _seen(self) -> tuple[tuple[int, bool], ...]:
        """How often each tensor was written to, and whether its memory is there: FSDP and others free it."""
        return tuple((t._version, t.untyped_storage().nbytes() == 0) for t in self.held if t is not None)

    def is_stale(self) -> bool:
        """Whether something was written to what the logits are computed from."""
        return self._seen() != self._versions

    def logits(self) -> Tensor:
        """Compute the logits as the head does, without a graph. Raises `StaleLogitsError`."""
        if self.is_stale():
            raise StaleLogitsError(
                "the logits are read after the weight of the head, or the hidden states, that they come from have changed\n"
                "  asked by   the kernel for LinearCrossEntropy, which computes logits only when they are read\n"
                "  go on      read them before the weight changes, or keep the own code there: "
                'kernelize(model, {"LinearCrossEntropy": "none"})'
            )
        return computed(self.product, self.held)


def computed(product: Call, held: Sequence[Tensor | None]) -> Tensor:
    """Return the product of hidden states, weight and bias, without a graph and in their own dtype."""
    hidden, weight, bias = held
    assert hidden is not None
    with torch.no_grad(), torch.inference_mode(False), torch.autocast(hidden.device.type, enabled=False):
        logits: Tensor = product(hidden, weight, bias)
    return logits


class Pending:
    """One tensor of lazy logits: what was done to the logits of a source to get it, and its values once they are there.

    `parent` is the tensor that the last step was taken on. A step that copies has memory of its own.
    """

    __slots__ = ("__weakref__", "copies", "parent", "source", "steps", "values")

    def __init__(self, source: Source, steps: tuple[tuple[Step, Step], ...], parent: Any, copies: bool):
        self.source, self.steps, self.parent, self.copies = source, steps, parent, copies
        self.values: Tensor | None = None

    def settle(self, why: str | None = None) -> Tensor:
        """Compute the values, and count `why`. A view shares the memory of what it is a view of."""
        with self.source.lock, torch.inference_mode(False):
            if self.values is None:
                if why is not None and not torch.compiler.is_compiling():
                    self.source.fallbacks[why] += 1
                if self.parent is None:
                    self.values = self.source.logits()
                elif self.copies and self.parent._version:  # written to since it was copied
                    self.values = self.anew()
                else:
                    self.values = self.steps[-1][0](self.parent._pending.settle())
            return self.values

    def anew(self) -> Tensor:
        """Compute the values in memory of their own."""
        values = self.source.logits()
        for step, _ in self.steps:
            values = step(values)
        return values

    def rows(self) -> Tensor:
        """Return the hidden states [..., H] whose product with the weight these logits are, within the graph."""
        hidden = self.source.hidden
        for _, step in self.steps:
            hidden = step(hidden)
        return hidden


_alive: dict[int, weakref.ref[Pending]] = {}
_hook: list[Any] = []


def remember(pending: Pending) -> None:
    """Keep account of logits until they are gone, and see to it that no optimizer steps before they are computed."""
    if not _hook:  # stays, as taking it out within a step is not safe; it does nothing where no logits are alive
        _hook.append(register_optimizer_step_pre_hook(_settle_all))
    key = id(pending)
    _alive[key] = weakref.ref(pending, lambda gone: _alive.pop(key, None))


def _settle_all(optimizer: Any, args: Any, kwargs: Any) -> None:
    for reference in list(_alive.values()):
        pending = reference()
        if pending is None or pending.values is not None or pending.source.is_stale():
            continue
        if any(t is not None and t.requires_grad for t in (pending.source.weight, pending.source.bias)):
            pending.settle(KEPT)
