"""Join the head of a model and its loss: what runs in place of the model's forward, and of the head's.

The forward of the model is its own code. While it runs with labels, in this thread, the head gives lazy logits, from which
the loss is computed without them. Whatever speaks against that in a call (a hook on the head, another class, autocast,
sharding, tracing) leaves the head its own code, counted.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kernelwise._applying._lazy_logits import followed, lazy_logits
from kernelwise._applying._logit_source import Source
from kernelwise._data import Limits

Call = Callable[..., Any]

INPUT = "the hidden states have a dtype, device or tensor class that the kernel does not take"
HOOKED = "the head was replaced, hooked, wrapped or sharded since the kernel went in"
TRACED = (
    "it was called under autocast, in inference mode, or while being traced, transformed or captured in a CUDA graph"
)
SAVED = "the head was called under other hooks for saved tensors than the model, as in a checkpoint"

_any_hook: Callable[[], bool] = torch.nn.modules.module._has_any_global_hook


@dataclass(frozen=True, slots=True)
class _Asked:
    """The head from which lazy logits are wanted now, in this thread."""

    head: nn.Module
    loss: Call
    dtypes: frozenset[torch.dtype]
    devices: frozenset[str]
    fallbacks: Counter[str]
    saved_hooks: Any


_local = threading.local()


def around(
    inner: Call, head: str, labels: str, position: int, loss: Call, limits: Limits, fallbacks: Counter[str]
) -> Call:
    """Return a forward that runs `inner`, and has its child `head` give lazy logits where it is called with labels.

    `labels` is the name of that argument and `position` its place after `self`. `loss` is the kernel
    `linear_cross_entropy`, for heads within `limits`.
    """
    dtypes = frozenset(getattr(torch, name) for name in limits.dtypes)
    devices = frozenset("cuda" if name == "rocm" else name for name in limits.devices)  # as torch calls them

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        given = args[position] if len(args) > position else kwargs.get(labels)
        if given is None or torch.compiler.is_compiling():
            return inner(self, *args, **kwargs)
        module = self._modules.get(head)
        why = why_not(self, module)
        if why is not None or module is None:
            fallbacks[why or HOOKED] += 1
            return inner(self, *args, **kwargs)
        before = getattr(_local, "asked", None)
        _local.asked = _Asked(module, loss, dtypes, devices, fallbacks, _saved_hooks())
        try:
            return inner(self, *args, **kwargs)
        finally:
            _local.asked = before

    return forward


def head_call(inner: Call, product: Call) -> Call:
    """Return a forward of a linear layer that gives lazy logits where they are asked for, and else runs `inner`.

    `product(hidden, weight, bias)` is what `inner` computes.
    """

    def forward(self: nn.Module, input: Any) -> Any:
        if torch.compiler.is_compiling():
            return inner(self, input)
        asked: _Asked | None = getattr(_local, "asked", None)
        if asked is None or asked.head is not self:
            return inner(self, input)
        weight, bias = self._parameters["weight"], self._parameters["bias"]
        assert weight is not None
        if not (
            type(input) is Tensor
            and input.dim() > 1
            and input.numel()
            and input.dtype in asked.dtypes
            and input.device.type in asked.devices
            and all(t is None or (t.dtype == input.dtype and t.device == input.device) for t in (weight, bias))
        ):
            asked.fallbacks[INPUT] += 1
            return inner(self, input)
        if _saved_hooks() != asked.saved_hooks:  # a checkpoint will call the head by itself, and compare what is saved
            asked.fallbacks[SAVED] += 1
            return inner(self, input)
        return lazy_logits(Source(input, weight, bias, product, asked.loss, asked.fallbacks))

    return forward


def why_not(model: nn.Module, head: nn.Module | None) -> str | None:
    """Return why logits must not be lazy in this call of a model, or None."""
    if head is None or type(head) is not nn.Linear:
        return HOOKED
    held = head.__dict__
    weight, bias = head._parameters.get("weight"), head._parameters.get("bias")
    if (
        type(weight) is not nn.Parameter
        or not (bias is None or type(bias) is nn.Parameter)
        or head._forward_hooks
        or head._forward_pre_hooks
        or head._backward_hooks
        or head._backward_pre_hooks
        or "_hf_hook" in held
        or held.get("_compiled_call_impl") is not None
        or _any_hook()
        or _is_sharded(model, head)
    ):
        return HOOKED
    if (
        torch.is_autocast_enabled(weight.device.type)
        or torch.is_inference_mode_enabled()
        or followed()
        or _is_captured()
    ):
        return TRACED
    return None


def _is_captured() -> bool:
    """Whether what runs now goes into a CUDA graph, which would not have what computes logits later."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()  # type: ignore[no-untyped-call]


def _saved_hooks() -> Any:
    """Return the hooks that tensors saved for backward go through now, or None."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return None if top is None else top(False)


def _is_sharded(*modules: nn.Module) -> bool:
    """Whether FSDP, which frees the weights between calls, has taken one of these modules."""
    sharded = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    return sharded is not None and any(isinstance(module, sharded) for module in modules)
