"""Memory of training: what a module saves of a tensor that is quick to compute again is computed again in backward.

Between the projections of a gated MLP stands act(gate) * up. Autograd keeps gate and up for its own gradient, and the
last projection keeps the product for the gradient of its weight: a third tensor as large, of which nothing is new.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

_autograd: Any = torch._C._autograd
_hooks_enabled: Callable[[], bool] | None = None
_top_hooks: Callable[[bool], Any] | None = None
try:  # private to PyTorch: where they are not what they are known to be, nothing is recomputed
    _autograd._top_saved_tensors_default_hooks(True)
    _autograd._saved_tensors_hooks_is_enabled()
except (AttributeError, TypeError):
    pass
else:
    _hooks_enabled = _autograd._saved_tensors_hooks_is_enabled
    _top_hooks = _autograd._top_saved_tensors_default_hooks

Compute = Callable[..., torch.Tensor]
Tensors = tuple[torch.Tensor, ...]


def _unpack(saved: tuple[Compute | None, Sequence[int], Tensors, tuple[int, ...]]) -> torch.Tensor:
    compute, shape, tensors, versions = saved
    for tensor, version in zip(tensors, versions, strict=True):
        if tensor._version != version:  # with hooks, autograd leaves this check to them
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"{tensor.type()} {list(tensor.shape)} is at version {tensor._version}; expected version {version}"
            )
    if compute is None:
        return tensors[0]
    with torch.no_grad():
        return compute(*tensors).view(shape)


def _applies(module: torch.nn.Module, product: torch.Tensor) -> bool:
    """Whether the module's saved tensors may be replaced: a plain linear layer that saves its input, recorded in eager.

    Hooks that somebody else has set (checkpointing, offloading) would not see what these hide, so they keep their place.
    """
    return (
        not torch.compiler.is_compiling()
        and product.requires_grad  # nothing is recorded otherwise
        and type(module) is torch.nn.Linear
        and not module._forward_pre_hooks  # they may change what it gets unseen, as may a forward of its own
        and not torch.nn.modules.module._global_forward_pre_hooks
        and "forward" not in vars(module)
        and type(product) is torch.Tensor
        and product.is_contiguous()
        and not torch._C._len_torch_dispatch_stack()
        and _top_hooks is not None
        and _hooks_enabled is not None
        and _hooks_enabled()
        and _top_hooks(True) is None
        and module.weight.requires_grad
        and product.numel() > 0
    )


def call_recomputing(module: torch.nn.Module, product: torch.Tensor, inputs: Tensors, compute: Compute) -> torch.Tensor:
    """module(product), where `product` is `compute(*inputs)`: backward computes it again instead of keeping it.

    `inputs` must be kept for backward anyway, and `compute` must give the same bits each time. Gradients are the same.
    Where it cannot be done (see `_applies`), the module is just called.
    """
    if not _applies(module, product):
        y: torch.Tensor = module(product)
        return y
    # While the module runs the product is alive, so nothing else lies where it does.
    place, size, version = product.data_ptr(), product.numel(), product._version

    def pack(tensor: torch.Tensor) -> tuple[Compute | None, Sequence[int], Tensors, tuple[int, ...]]:
        if (
            tensor.data_ptr() == place
            and tensor.numel() == size
            and tensor._version == version
            and tensor.is_contiguous()
        ):
            return compute, tensor.shape, inputs, tuple([t._version for t in inputs])
        return None, (), (tensor.detach(),), (tensor._version,)  # as it is, but never a cycle with its own graph

    with torch.autograd.graph.saved_tensors_hooks(pack, _unpack):
        y = module(product)
    return y
