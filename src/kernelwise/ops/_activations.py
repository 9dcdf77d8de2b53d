"""Elementwise activations by name, each with the formulas that compute it; and the layer that is nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from kernelwise.ops._operation import Operation, Role, Variant

Activation = Callable[[Tensor], Tensor]


def _gelu_new(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def _gelu_fast(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x)))


def _gelu_python(x: Tensor) -> Tensor:
    return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


def _gelu_accurate(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3))))


def _laplace(x: Tensor) -> Tensor:
    return 0.5 * (1.0 + torch.erf((x - 0.707107).div(0.282095 * math.sqrt(2.0))))


# name → how it is written. The first formula is the meaning; the others differ from it by one rounding.
# `gelu_new`, `gelu_fast` and `gelu_python` round after every step in narrow dtypes, so they have names of their own.
ACTIVATIONS: dict[str, tuple[Activation, ...]] = {
    "silu": (F.silu, lambda x: x * torch.sigmoid(x)),
    "gelu": (F.gelu,),
    "gelu_tanh": (lambda x: F.gelu(x, approximate="tanh"),),
    "gelu_new": (_gelu_new, _gelu_accurate),
    "gelu_fast": (_gelu_fast,),
    "gelu_python": (_gelu_python,),
    "gelu_10": (lambda x: torch.clip(F.gelu(x), -10, 10),),
    "quick_gelu": (lambda x: x * torch.sigmoid(1.702 * x),),
    "relu": (F.relu,),
    "relu2": (lambda x: torch.square(F.relu(x)),),
    "relu6": (F.relu6, lambda x: F.hardtanh(x, 0.0, 6.0)),
    "leaky_relu": (F.leaky_relu,),
    "elu": (F.elu,),
    "sigmoid": (torch.sigmoid,),
    "tanh": (torch.tanh,),
    "softplus": (F.softplus,),
    "sqrtsoftplus": (lambda x: F.softplus(x).sqrt(),),
    "mish": (F.mish, lambda x: x * torch.tanh(F.softplus(x))),
    "hardswish": (F.hardswish,),
    "hardsigmoid": (F.hardsigmoid,),
    "laplace": (_laplace,),
}
VARIANTS = tuple(Variant((("activation", name),)) for name in ACTIVATIONS)


def activation(x: Tensor, *, activation: str) -> Tensor:
    """Return the activation of every element of x, of any shape."""
    return ACTIVATIONS[activation][0](x)


def _other_formula(x: Tensor, *, activation: str) -> Tensor:
    return ACTIVATIONS[activation][-1](x)


ACTIVATION = Operation(
    name="activation",
    reference=activation,
    forms=(_other_formula,),
    roles=(Role("x", "argument", lambda n: (n["B"], n["S"], n["H"])),),
    variants=VARIANTS,
    operators=(),
    layer_names={
        (): "Activation",
        (("activation", "silu"),): "SiLU",
        (("activation", "gelu"),): "GeLU",
        (("activation", "gelu_tanh"),): "GeluTanh",
        (("activation", "gelu_new"),): "NewGELU",
        (("activation", "gelu_fast"),): "FastGELU",
        (("activation", "quick_gelu"),): "QuickGELU",
    },
)
