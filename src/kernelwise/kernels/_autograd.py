"""What the backward functions share: second derivatives, by plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

Result = torch.Tensor | tuple[torch.Tensor, ...]


def wants_graph() -> bool:
    """Whether the gradients that a backward function is to return will be differentiated (`create_graph=True`)."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def plain_gradients(
    function: Callable[..., Result], leaves: Sequence[torch.Tensor | None], grads: Sequence[torch.Tensor]
) -> list[torch.Tensor | None]:
    """Return the gradients of `leaves`, as differentiable as PyTorch's own, None where a leaf needs none.

    `function(*leaves)` computes the results of the kernel once more, in plain PyTorch; `grads` are theirs.
    """
    # Views stand for the leaves: where one leaf was computed from another, that path is not this function's to follow.
    views = [None if t is None else t.view_as(t) for t in leaves]
    needed = [t for t in views if t is not None and t.requires_grad]
    results = function(*views)
    pairs = zip(results if isinstance(results, tuple) else (results,), grads, strict=True)
    roots, upstream = zip(*[(root, grad) for root, grad in pairs if root.requires_grad], strict=True)
    found = iter(torch.autograd.grad(roots, needed, upstream, create_graph=True, allow_unused=True))
    return [next(found) if t is not None and t.requires_grad else None for t in views]
