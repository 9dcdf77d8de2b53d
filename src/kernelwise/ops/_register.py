"""Operations that users add."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Mapping
from typing import Any, cast, get_args

from kernelwise._data import Scalar
from kernelwise.ops._operation import Operation, Role, RoleKind, Shape, Sizes, Variant

_SIZES = ("B", "S", "H", "I")


def operation(
    reference: Callable[..., Any],
    *,
    roles: Mapping[str, str],
    options: Mapping[str, tuple[Scalar, ...]] | None = None,
    name: str | None = None,
    layer_name: str | None = None,
    function: bool = False,
) -> Operation:
    """Return an operation whose meaning is `reference(**roles, **options)`, a function in plain PyTorch.

    `roles` says what fills each argument of the reference, and the shape of a tensor in sizes B, S, H and I:
    "argument B S H" for what the layer is called with, "attribute H" for a parameter or buffer, "child B S I" for a
    submodule that gives this shape, "number" for a float of the formula. `options` holds the values that each further
    argument may have. `function` is for functions that a forward calls; without it, layers are compared.
    Raises ValueError where roles, options and the arguments of the reference do not fit together.
    """
    options = dict(options or {})
    accepted = inspect.signature(reference).parameters
    unknown = [key for key in (*roles, *options) if key not in accepted]
    missing = [p.name for p in accepted.values() if p.default is p.empty and p.name not in (*roles, *options)]
    if unknown or missing:
        problem = f"takes no {', '.join(unknown)}" if unknown else f"needs a role for {', '.join(missing)}"
        raise ValueError(f"the reference {reference.__name__} {problem}; its arguments are {', '.join(accepted)}")
    names = tuple(options)
    return Operation(
        name=name or reference.__name__,
        reference=reference,
        roles=tuple(_role(key, text) for key, text in roles.items()),
        variants=tuple(
            Variant(tuple(zip(names, values, strict=True))) for values in itertools.product(*options.values())
        ),
        operators=(),
        layer_names={(): layer_name or name or reference.__name__},
        function=function,
    )


def _role(name: str, text: str) -> Role:
    kind, *sizes = text.split()
    wrong = [size for size in sizes if size not in _SIZES]
    if kind not in get_args(RoleKind) or wrong:
        raise ValueError(
            f"role {name} is {text!r}; write one of {', '.join(get_args(RoleKind))}, then sizes of {' '.join(_SIZES)}"
        )

    def shape(n: Sizes) -> Shape:
        return tuple(n[size] for size in sizes)

    return Role(name, cast(RoleKind, kind), shape)
