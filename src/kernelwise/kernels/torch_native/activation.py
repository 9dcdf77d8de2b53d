"""Activations that models write out in several operators, with the one that PyTorch has for them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch.nn import functional as F

_gelu_tanh = partial(F.gelu, approximate="tanh")
_OPERATORS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "gelu_new": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
}


def activation(x: torch.Tensor, *, activation: str = "gelu") -> torch.Tensor:
    """The activation of every number of x, of any shape, computed in float32 and rounded once.

    "gelu_new" and "gelu_fast" are the tanh form written out. The erf form written out ("gelu_python") is not here: the
    backward of `F.gelu` errs more than that code does. Raises KeyError for others.
    """
    return _OPERATORS[activation](x)
