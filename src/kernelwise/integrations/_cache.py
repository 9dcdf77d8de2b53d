"""transformers: a cache of keys and values that has room for the next tokens.

    from kernelwise.integrations.transformers import GrowingCache

    model.generate(**inputs, past_key_values=GrowingCache(config=model.config))

transformers' own `DynamicCache` copies all keys and values of every layer for every token. This one keeps them at the front of
a larger tensor, writes the new ones behind them, and copies only when the room is used up. What it gives is the same.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer


@dataclass(slots=True)
class _Room:
    """A tensor with free positions, and the view of its front that was given out last: only that one may be appended to."""

    whole: torch.Tensor
    given: torch.Tensor


class _GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of one layer of a model, [B, H, S, D] each."""

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, step: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._step = step
        self._rooms: dict[str, _Room] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # With gradients, what was given out may be read again by a backward pass; in a graph nothing is written in place.
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            self._rooms.clear()
            both: tuple[torch.Tensor, torch.Tensor] = super().update(key_states, value_states, *args, **kwargs)
            return both
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._append("keys", self.keys, key_states)
        self.values = self._append("values", self.values, value_states)
        return self.keys, self.values

    def _append(self, name: str, there: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        length = there.shape[-2] if there.numel() else 0
        end = length + new.shape[-2]
        if length and _apart_from_length(there) != _apart_from_length(new):
            self._rooms.pop(name, None)
            return torch.cat([there, new], dim=-2)  # which says what does not fit
        room = self._rooms.get(name)
        if (
            room is None
            or room.given is not there  # cut, reordered, or appended to by a copy of this layer
            or end > room.whole.shape[-2]
            or (room.whole.is_inference() and not torch.is_inference_mode_enabled())
        ):
            room = self._rooms[name] = self._more_room(there if length else new[:, :, :0], end)
        room.whole.narrow(2, length, end - length).copy_(new)
        room.given = room.whole.narrow(2, 0, end)
        return room.given

    def _more_room(self, there: torch.Tensor, end: int) -> _Room:
        """A room that begins with what is there and has free positions after `end`."""
        size = (end // self._step + 1) * self._step
        whole = there.new_empty((*there.shape[:2], size, there.shape[-1]))
        whole.narrow(2, 0, there.shape[-2]).copy_(there)
        return _Room(whole, whole)

    def offload(self) -> None:
        super().offload()
        self._rooms.clear()

    def reset(self) -> None:
        super().reset()
        self._rooms.clear()


def _apart_from_length(states: torch.Tensor) -> tuple[object, ...]:
    return *states.shape[:2], *states.shape[3:], states.dtype, states.device


class GrowingCache(DynamicCache):  # type: ignore[misc]
    """A `DynamicCache` whose layers grow in steps of positions instead of by one copy for each token.

    Takes what `DynamicCache` takes, and `step`: for how many further positions there is room at a time. It holds memory for
    at most so many more than are used, in each sequence and layer. Layers with a sliding window, and other kinds, are
    transformers' own. With gradients and under torch.compile it does what `DynamicCache` does.

    Raises:
        ValueError: `step` is below one.
    """

    layer_class_to_replicate: Any

    def __init__(self, *args: Any, step: int = 256, **kwargs: Any) -> None:
        if step < 1:
            raise ValueError(f"GrowingCache takes a step of at least one position, not {step}")
        super().__init__(*args, **kwargs)
        for index, layer in enumerate(self.layers):
            if type(layer) is DynamicLayer:
                self.layers[index] = _GrowingLayer(step)
                self.layers[index].__dict__.update(layer.__dict__)  # it may have been given keys and values
        if self.layer_class_to_replicate is DynamicLayer:
            self.layer_class_to_replicate = functools.partial(_GrowingLayer, step)
