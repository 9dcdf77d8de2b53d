"""transformers: the CPU attention kernel as an attention implementation that a model can be set to.

    import kernelwise.integrations.transformers

    model.set_attn_implementation("kernelwise_sdpa")
    model.set_attn_implementation("sdpa")    # and back

It stands beside transformers' own "sdpa", computes what that computes, and hands to it whatever the kernel does not take:
other devices, dropout, position biases, paged caches, and everything where the compiled library is missing. "sdpa" is part
of the name because transformers then checks that the model can run with it. Nothing is replaced, and a model's config.json
does not name it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "kernelwise_sdpa"

_CHANGES = frozenset(
    {"position_bias", "cache", "softcap", "output_attentions"}
)  # what "sdpa" does otherwise, or refuses


def register() -> None:
    """Make the implementation known to transformers. It stays when `unpatch` takes out the rest: models may be set to it."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers' "sdpa" gives for the same arguments: query, key and value [B, H, S, D] → [B, S, H, D]."""
    kernel = _kernel() if query.device.type == "cpu" else None
    if (
        kernel is None
        or dropout
        or any(kwargs[name] is not None and kwargs[name] is not False for name in _CHANGES & kwargs.keys())
    ):
        done: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
        )
        return done
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    causal = query.shape[2] > 1 and attention_mask is None and causal
    y = kernel(query, key, value, mask=attention_mask, causal=causal, scale=scaling)
    return y.transpose(1, 2).contiguous(), None


@functools.cache
def _kernel() -> Callable[..., torch.Tensor] | None:
    """The kernel, or None where there is no library."""
    try:
        from kernelwise.kernels.cpu.attention import attention
    except ImportError:
        return None
    return attention
