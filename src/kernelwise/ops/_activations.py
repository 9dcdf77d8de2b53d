"""Elementwise activations by name, each with the formulas that compute it."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Activation = Callable[[Tensor], Tensor]


def _gelu_new(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def _gelu_fast(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x)))


def _gelu_python(x: Tensor) -> Tensor:
    return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


def _gelu_accurate(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3))))


# name → how it is written. The first formula is the meaning; the others differ from it by one rounding.
# `gelu_new`, `gelu_fast` and `gelu_python` round after every step in narrow dtypes, so they have names of their own.
ACTIVATIONS: dict[str, tuple[Activation, ...]] = {
    "silu": (F.silu, lambda x: x * torch.sigmoid(x)),
    "gelu": (F.gelu,),
    "gelu_tanh": (lambda x: F.gelu(x, approximate="tanh"),),
    "gelu_new": (_gelu_new, _gelu_accurate),
    "gelu_fast": (_gelu_fast,),
    "gelu_python": (_gelu_python,),
    "quick_gelu": (lambda x: x * torch.sigmoid(1.702 * x),),
    "relu": (F.relu,),
    "relu2": (lambda x: torch.square(F.relu(x)),),
    "sigmoid": (torch.sigmoid,),
    "tanh": (torch.tanh,),
    "mish": (F.mish, lambda x: x * torch.tanh(F.softplus(x))),
    "relu6": (F.relu6,),
    "elu": (F.elu,),
    "leaky_relu": (F.leaky_relu,),
}
