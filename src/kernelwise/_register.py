"""Add an operation together with its kernels: recognised, planned and put in like those that come with Kernelwise."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kernelwise import ops
from kernelwise._data import DEVICE_TYPES, Kernel, KernelRef, Scalar
from kernelwise._reference import did_you_mean, read_reference
from kernelwise._verifying._exact import deviation, float64_mode
from kernelwise.ops import Operation, Role, Variant
from kernelwise.sources import registered

Function = Callable[..., Any]
OneKernel = Function | str
Kernels = OneKernel | Mapping[str, OneKernel] | Sequence[OneKernel | Mapping[str, OneKernel]]

_SIZES = {"B": 2, "S": 7, "H": 48, "I": 96, "lead": (2, 7)}
_NUMBER = 0.37


def register_op(
    reference: Function,
    *,
    roles: Mapping[str, str],
    options: Mapping[str, tuple[Scalar, ...]] | None = None,
    name: str | None = None,
    layer_name: str | None = None,
    function: bool = False,
    kernels: Kernels = (),
) -> Operation:
    """Add an operation to those that are recognised, and kernels that are offered for it without being asked for.

    Args:
        reference: the meaning, in plain PyTorch: a function of its roles and options.
        roles: what fills each argument: `"argument B S H"` for what the layer is called with, `"attribute H"` for a
            parameter or buffer, `"child B S I"` for a submodule that gives this shape, `"number"` for a float. B, S, H and
            I are sizes no two of which are the same.
        options: the values that each further argument of the reference may have.
        name, layer_name: of the operation, and the one that a mapping may use; without them that of the reference.
        function: the reference is a function that forwards call by a global name, not a module's forward.
        kernels: functions by the same roles, or references (`"org/repo:Layer"`, an absolute path, `"package:..."`), or a dict
            from device type to those, or several of these, the best first. A function is called `"builtin:<its name>"` from
            then on; its attributes `has_backward` and `can_torch_compile` are as those of a layer class.

    Raises:
        ValueError: roles, options and arguments do not fit together, the name is taken, a reference is wrong, or a function
            does not compute what the reference computes: where its device is there, it is compared with it on random
            inputs, outputs and gradients, in float32 and bfloat16.
    """
    known = dict(ops.OPERATIONS)
    added = ops.register_op(
        reference, roles=roles, options=options, name=name, layer_name=layer_name, function=function
    )
    try:
        found = list(_read(kernels, added))
        names = [kernel.ref.layer for _, kernel in found if isinstance(kernel, Kernel)]
        if len(set(names)) != len(names):
            raise ValueError(
                f"two kernels have one name ({', '.join(names)}); a function's name is what it is called by"
            )
        for device, kernel in found:
            if isinstance(kernel, Kernel) and kernel.function is not None:
                _compare(added, kernel.function, device or "cpu")
    except BaseException:
        if added.name not in known:
            ops.unregister_op(added.name)
        raise
    registered.offer(added.name, found)
    return added


def unregister_op(name: str) -> None:
    """Take out an operation that `register_op` has added, with its kernels. Raises ValueError for one that is ours."""
    ops.unregister_op(name)
    registered.forget(name)


def _read(kernels: Kernels, op: Operation) -> Iterator[tuple[str | None, KernelRef | Kernel]]:
    several = kernels if isinstance(kernels, Sequence) and not isinstance(kernels, str) else (kernels,)
    for item in several:
        by_device = item if isinstance(item, Mapping) else {None: item}
        for device, kernel in by_device.items():
            if device is not None and device not in DEVICE_TYPES:
                raise ValueError(
                    f"{device!r} is no device type that kernels are for{did_you_mean(device, DEVICE_TYPES)}"
                )
            if callable(kernel):
                yield device, registered.kernel_of(kernel, op.name, device)
                continue
            ref, faults = read_reference(kernel)
            if ref is None:
                raise ValueError("; ".join(f"{what} ({how})" for what, how in faults))
            yield device, ref


def _compare(op: Operation, kernel: Function, device: str) -> None:
    """Raise ValueError where a function is not as exact as the reference on random inputs."""
    if device not in ("cpu", torch.get_default_device().type) and not _is_there(device):
        return
    taken = inspect.signature(kernel).parameters
    for variant in op.variants:
        options = dict(variant.options)
        if not set(options) <= set(taken):  # a plan will not offer it there
            continue
        for dtype in (torch.float32, torch.bfloat16):
            given = _arguments(op, variant, device, dtype)
            own, own_gradients = _run(op.reference, given, options)
            with float64_mode():
                exact, exact_gradients = _run(op.reference, _widened(given), options)
            with_grad = bool(getattr(kernel, "has_backward", True))
            passed = {key: value for key, value in given.items() if key in taken}
            new, gradients = _run(kernel, passed, options, with_grad=with_grad)
            if len(new) != len(own):
                raise ValueError(f"{_named(kernel)} gives {len(new)} tensors, {op.name} gives {len(own)}")
            pairs = [(f"output {i}", *triple) for i, triple in enumerate(zip(own, new, exact, strict=True))]
            pairs += [
                (f"the gradient of {key}", own_gradients[key], gradients[key], exact_gradients[key])
                for key in gradients
            ]
            for what, mine, theirs, right in pairs:
                found = deviation(mine, theirs, right)
                if found.status != "passed":
                    raise ValueError(
                        f"{_named(kernel)} does not compute {op.name} {options or ''}: {what}{list(found.place)} in "
                        f"{str(dtype)[6:]} on {device} is {found.got}, exact {found.expected} ({found.detail or found.status})"
                    )


def _is_there(device: str) -> bool:
    module = getattr(torch, "cuda" if device == "rocm" else device, None)
    return module is not None and bool(module.is_available())


def _named(kernel: Function) -> str:
    return getattr(kernel, "__name__", repr(kernel))


class _Child:
    """A linear map that takes any width and gives the one of its role."""

    def __init__(self, width: int, device: str, dtype: torch.dtype) -> None:
        self.width, self.device, self.dtype = width, device, dtype

    def __call__(self, x: Tensor) -> Tensor:
        weight = _spread(x.shape[-1] * self.width).view(x.shape[-1], self.width)
        y: Tensor = x @ weight.to(self.device, self.dtype)
        return y


def _spread(count: int) -> Tensor:
    """Numbers between -1 and 1 that every dtype holds, the same whatever the default dtype is."""
    return (torch.arange(count) * 31 % 47 - 23).to(torch.float32) / 32


def _arguments(op: Operation, variant: Variant, device: str, dtype: torch.dtype) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    constants, sizes = dict(variant.constants), {**_SIZES, **dict(variant.options)}

    def make(role: Role) -> Any:
        if role.name in constants:
            return constants[role.name]
        if role.kind == "number":
            return _NUMBER
        if role.kind == "child":
            return _Child(role.shape(sizes)[-1], device, dtype)
        return torch.randn(role.shape(sizes), generator=generator).to(device, dtype)

    return {role.name: make(role) for role in op.roles}


def _widened(given: dict[str, Any]) -> dict[str, Any]:
    def wide(value: Any) -> Any:
        if isinstance(value, _Child):
            return _Child(value.width, value.device, value.dtype)
        return value.double() if isinstance(value, Tensor) else value

    return {key: wide(value) for key, value in given.items()}


def _run(
    function: Function, given: dict[str, Any], options: dict[str, Any], *, with_grad: bool = True
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Return the outputs of a function, and the gradients of every tensor that it is given."""
    leaves = {
        key: value.detach().requires_grad_(with_grad) for key, value in given.items() if isinstance(value, Tensor)
    }
    result = function(**{**given, **leaves}, **options)
    outputs = list(result) if isinstance(result, (tuple, list)) else [result]
    total: Any = 0
    for output in outputs:
        if output.is_floating_point() and output.requires_grad:
            total = total + (output * _spread(output.numel()).view(output.shape).to(output)).sum()
    if not with_grad or not isinstance(total, Tensor):
        return [output.detach() for output in outputs], {}
    gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return [output.detach() for output in outputs], {
        key: torch.zeros_like(leaf) if gradient is None else gradient
        for (key, leaf), gradient in zip(leaves.items(), gradients, strict=True)
    }
