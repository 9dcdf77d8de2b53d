"""The form of one operation: its reference, its roles, its variants."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from kernelwise._data import Scalar

Sizes = Mapping[str, Any]  # B, S, H, ... to numbers no two of which are the same; and the options of the variant
Shape = tuple[int, ...]
RoleKind = Literal["argument", "attribute", "child", "number"]


@dataclass(frozen=True, slots=True)
class Role:
    """One argument of an operation.

    argument: a tensor that the forward is given; attribute: a parameter or buffer; child: a submodule, called with one
    tensor; number: a float that the formula contains. `shape` gives the shape of the tensor, or of what the child
    gives, at some sizes. An argument has the dtype of the activations, or the one that it `follows`.
    """

    name: str
    kind: RoleKind
    shape: Callable[[Sizes], Shape] = lambda sizes: ()
    follows: Literal["activations", "parameters", "complex", "indices"] = "activations"


@dataclass(frozen=True, slots=True)
class Variant:
    """One graph of an operation: its options, and constants that stand for a role (`weight=None`)."""

    options: tuple[tuple[str, Scalar], ...] = ()
    constants: tuple[tuple[str, Scalar], ...] = ()


@dataclass(frozen=True, slots=True)
class Operation:
    """What a layer can compute.

    `reference(**roles, **options)` is the meaning of the operation, in plain PyTorch. A layer is an instance of the
    operation if its canonical graph is that of the reference. `forms` are other ways to write the same: functions with
    the arguments of `reference` that agree with it in exact arithmetic and to the rounding of one operation.
    `operators` holds canonical operators without which no graph can be this operation: each tuple needs one of its own.
    `choices` names one integer role with the values that are tried for a function (`unsqueeze_dim`); for a module the
    values are those of the integer attributes that its forward reads (`group_size`).
    `norms` names the roles of a layer of a model that must be filled by norms. An operation that has some is recognised by
    recording how arguments pass to children, whose further arguments and results are no part of its meaning.
    """

    name: str
    reference: Callable[..., Any]
    roles: tuple[Role, ...]
    variants: tuple[Variant, ...]
    operators: tuple[tuple[str, ...], ...]
    layer_names: Mapping[tuple[tuple[str, Scalar], ...], str] = field(default_factory=dict)
    choices: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    forms: tuple[Callable[..., Any], ...] = ()
    function: bool = False  # a function that a forward calls through its globals, not a module
    norms: tuple[str, ...] = ()
    loss: bool = False  # a loss function, whose arguments may be None, numbers and more keywords
    any_rank: bool = False  # inputs may have any number of leading dimensions, and a layer must take them all

    def layer_name(self, options: tuple[tuple[str, Scalar], ...]) -> str | None:
        """The name of the most specific entry of `layer_names` whose options all hold."""
        holding = [key for key in self.layer_names if set(key) <= set(options)]
        return self.layer_names[max(holding, key=len)] if holding else None
