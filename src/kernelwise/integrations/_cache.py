"""transformers: a cache of keys and values that has room for the next tokens.

    from kernelwise.integrations.transformers import GrowingCache

    model.generate(**inputs, past_key_values=GrowingCache(config=model.config))

transformers' own `DynamicCache` copies all keys and values of every layer for every token. This one keeps them at the front of
a larger tensor, writes the new ones behind them, and copies only when the room is used up, or the cache was cut or reordered.
What it gives is the same.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer


@dataclass(slots=True)
class _Room:
    """A tensor with free positions behind `length`, and the view of its front that was given out last."""

    whole: torch.Tensor
    given: torch.Tensor
    length: int

    def append(self, new: torch.Tensor) -> torch.Tensor | None:
        """The front with further positions at its end; None where there is no room, or what is new does not fit."""
        num = new.shape[-2]
        if self.length + num > self.whole.shape[-2]:
            return None
        place = self.whole.narrow(-2, self.length, num)
        if place.shape != new.shape or place.dtype != new.dtype or place.device != new.device:
            return None
        if place.is_inference() and not torch.is_inference_mode_enabled():
            return None
        place.copy_(new)
        self.length += num
        self.given = self.whole.narrow(-2, 0, self.length)
        return self.given


class _GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of one layer of a model, [B, H, S, D] each."""

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, step: int) -> None:
        super().__init__()
        self._step = step
        self._rooms: dict[str, _Room] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # With gradients, what was given out may be read again by a backward pass; in a graph nothing is written in place.
        compiling = torch.compiler.is_compiling()
        if torch.is_grad_enabled() or compiling:
            if not compiling:
                self._rooms.clear()
            both: tuple[torch.Tensor, torch.Tensor] = super().update(key_states, value_states, *args, **kwargs)
            return both
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._append("keys", self.keys, key_states)
        self.values = self._append("values", self.values, value_states)
        return self.keys, self.values

    def _append(self, name: str, there: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        room = self._rooms.get(name)
        # Of something else than was given last (cut, reordered, appended to by a copy of this layer) a copy is made.
        appended = room.append(new) if room is not None and room.given is there else None
        if appended is None:
            whole = torch.cat([there, new], dim=-2)  # which promotes, or says what does not fit
            size = (whole.shape[-2] // self._step + 1) * self._step
            room = _Room(whole.new_empty((*whole.shape[:-2], size, whole.shape[-1])), there, 0)
            appended = room.append(whole)
            assert appended is not None
            self._rooms[name] = room
        return appended

    # What puts other tensors in the place of keys and values: the memory of those they had is given back at once.

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._rooms.clear()

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._rooms.clear()

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._rooms.clear()

    def offload(self) -> None:
        super().offload()
        self._rooms.clear()

    def reset(self) -> None:
        super().reset()
        self._rooms.clear()


class GrowingCache(DynamicCache):  # type: ignore[misc]
    """A `DynamicCache` whose layers grow in steps of positions instead of by one copy for each token.

    Takes what `DynamicCache` takes, and `step`: for how many further positions there is room at a time. It holds memory for
    at most so many more than are used, in each sequence and layer. Layers with a sliding window, and other kinds, are
    transformers' own. With gradients and under torch.compile it does what `DynamicCache` does. What reads keys and values with
    gradients that were cached without must have its backward pass before the next position is written.

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
