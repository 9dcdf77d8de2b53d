"""Logits that are computed only when somebody reads them, so that a loss can be had without them.

While a model runs with labels its head gives `LazyLogits`: a tensor with shape, dtype, device and place in the graph of the
logits, and no memory. Taking rows of them, or float32, keeps them so, and `torch.nn.functional.cross_entropy` of them is
computed from hidden states and weight by a kernel that never holds all logits. Any other use computes the logits as the head
would have, once, and goes on with them: what a model computes does not depend on what it does with its logits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from kernelwise._applying._fuse import REFUSALS
from kernelwise._applying._logit_source import Pending, Source, Step, computed, remember
from kernelwise.kernels._autograd import plain_gradients, wants_graph

READ = "the logits were read, so they were computed"
REFUSED = "the kernel refused the input"

_aten = torch.ops.aten
_no_subclass = torch._C.DisableTorchFunctionSubclass
# Makes a tensor raise where C++ code asks for the address of its memory, which for lazy logits would be null.
_refuse_address = getattr(torch._C, "_set_throw_on_mutable_data_ptr", None)


def lazy_logits(source: Source) -> LazyLogits:
    """Return the logits [..., V] of a source, within the graph and without values."""
    logits: LazyLogits = _Logits.apply(source.hidden, source.weight, source.bias, source)  # type: ignore[no-untyped-call]
    return logits


class LazyLogits(Tensor):
    """Logits [..., V] that are computed when they are read."""

    _pending: Pending

    @staticmethod
    def __new__(cls, pending: Pending, like: Tensor, device: torch.device) -> LazyLogits:
        """Make logits of the shape, strides and dtype of `like`, a tensor on the meta device."""
        made: LazyLogits = torch.Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=device
        )
        made._pending = pending
        if _refuse_address is not None:
            _refuse_address(made)
        remember(pending)
        return made

    @classmethod
    @_disable_dynamo  # what is compiled gets plain logits from here
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Take a call of PyTorch in Python: a loss, a step that keeps them lazy, a question, or a use of their values."""
        kwargs = kwargs or {}
        if func is F.cross_entropy:
            loss = _loss(*args, **kwargs)
            if loss is not None:
                return loss
        lazy = args[0] if args and isinstance(args[0], LazyLogits) else None
        if func in _WATCHING:
            tree_map_only(LazyLogits, _watch, (args, kwargs))
        elif func not in _ABOUT and not (func in _STEPS and lazy is not None and lazy._pending.values is None):
            args, kwargs = tree_map_only(LazyLogits, _plain, (args, kwargs))
        with _no_subclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operator, below the graph: take a step, or run it on the values."""
        kwargs = kwargs or {}
        if args and isinstance(args[0], LazyLogits) and args[0]._pending.values is None and not args[0]._version:
            stepped = _step(func, args[0], args[1:], kwargs)
            if stepped is not None:
                return stepped
        args, kwargs = tree_map_only(LazyLogits, lambda lazy: lazy._pending.settle(READ), (args, kwargs))
        return func(*args, **kwargs)


def _plain(lazy: LazyLogits) -> Tensor:
    """Return the logits as a plain tensor: a view, so that writing to it, and its gradient, are theirs."""
    with _no_subclass():
        plain: Tensor = _aten.alias.default(lazy)
    return plain


def _watch(lazy: LazyLogits) -> LazyLogits:
    lazy._pending.source.watched.set()
    return lazy


_T: Any = Tensor  # whose attributes are descriptors

# What is asked of the tensor itself and needs no values.
_ABOUT = {
    *(
        getattr(_T, name).__get__
        for name in (
            "shape", "dtype", "device", "layout", "requires_grad", "ndim", "is_leaf", "_version", "itemsize",
            "nbytes", "is_cpu", "is_cuda", "is_xpu", "is_mps", "is_meta", "is_sparse", "is_quantized", "is_nested",
            "output_nr",
        )
    ),
    *(
        getattr(_T, name)
        for name in (
            "size", "dim", "numel", "nelement", "stride", "is_contiguous", "is_floating_point", "is_complex", "element_size",
            "get_device", "__len__", "ndimension", "is_signed", "is_inference",
        )
    ),
    torch.numel, torch.is_floating_point, torch.is_complex,
}  # fmt: skip

# What speaks of the gradient of the logits, which has to be computed then.
_WATCHING = {
    _T.register_hook, _T.retain_grad, _T.requires_grad_, _T.detach_, _T.backward,
    _T.register_post_accumulate_grad_hook, _T.grad.__get__, _T.grad.__set__, _T.retains_grad.__get__,
    _T.requires_grad.__set__, _T._backward_hooks.__get__, _T._backward_hooks.__set__, _T.data.__set__,
    _T.grad_fn.__get__, torch.autograd.grad, torch.autograd.backward,
}  # fmt: skip

# The nodes of the graph through which the gradient of a loss goes as the kernel computes it: the head, and the steps.
_NODES = {
    "_LogitsBackward", "ViewBackward0", "UnsafeViewBackward0", "SliceBackward0", "ToCopyBackward0", "CloneBackward0",
}  # fmt: skip

# What may leave logits lazy; which of it does, `_step` says.
_STEPS = {
    Tensor.float, Tensor.to, Tensor.view, Tensor.reshape, Tensor.flatten, Tensor.contiguous, Tensor.__getitem__,
    Tensor.narrow, Tensor.clone, torch.reshape, torch.flatten, torch.narrow, torch.clone,
}  # fmt: skip


def _step(func: Any, lazy: LazyLogits, args: Any, kwargs: Any) -> LazyLogits | None:
    """Take a step that keeps the rows whole; None where it does not. `lazy` has no values, and nobody has written to it."""
    vocabulary = lazy.shape[-1]
    copies = func in (_aten._to_copy.default, _aten.clone.default)
    if func in (_aten.view.default, _aten._unsafe_view.default):
        if not args[0] or args[0][-1] not in (vocabulary, -1):
            return None
    elif func is _aten.slice.Tensor:
        if (args[0] if args else kwargs.get("dim", 0)) in (-1, lazy.dim() - 1):
            return None
    elif func is _aten._to_copy.default:
        if kwargs != {"dtype": torch.float32}:
            return None
    elif func is not _aten.clone.default:
        return None
    like = torch.empty_strided(lazy.shape, lazy.stride(), dtype=lazy.dtype, device="meta")
    result = func(like, *args, **kwargs)
    if result.dim() == 0 or result.shape[-1] != vocabulary or result.numel() == 0:
        return None
    shape, dim = result.shape[:-1], lazy.dim()

    def on_logits(logits: Tensor) -> Tensor:
        stepped: Tensor = func(logits, *args, **kwargs)
        return stepped

    def on_rows(hidden: Tensor) -> Tensor:
        if copies:
            return hidden
        if func is not _aten.slice.Tensor:
            return hidden.reshape(*shape, hidden.shape[-1])
        at, *rest = args
        sliced: Tensor = _aten.slice.Tensor(hidden, at % dim, *rest, **kwargs)
        return sliced

    pending = lazy._pending
    return LazyLogits(
        Pending(pending.source, (*pending.steps, (on_logits, on_rows)), lazy, copies), result, lazy.device
    )


def _loss(
    logits: Any,
    target: Any,
    weight: Any = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor | None:
    """Compute `cross_entropy` of lazy logits by the kernel; None where it is not for it."""
    if (
        type(logits) is not LazyLogits
        or type(target) is not Tensor
        or not (weight is size_average is reduce is None)
        or logits.dim() != 2
        or target.shape != logits.shape[:1]
        or target.dtype is not torch.int64
        or target.device != logits.device
        or torch.is_autocast_enabled(logits.device.type)
        or followed()
    ):
        return None
    source = logits._pending.source
    inputs = (source.hidden, source.weight, source.bias)
    has_graph = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    if not _is_untouched(logits, has_graph) or source.is_stale():
        return None
    pending = logits._pending
    options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "reduction": reduction}
    try:
        loss: Tensor = source.loss(
            pending.rows(), source.weight, target, **({} if source.bias is None else {"bias": source.bias}), **options
        )
    except torch.OutOfMemoryError:
        raise
    except REFUSALS:
        source.fallbacks[REFUSED] += 1
        return None
    loss = loss.to(logits.dtype)
    if not loss.requires_grad:
        return loss
    steps = tuple(step for step, _ in pending.steps)
    linked: Tensor = _Link.apply(loss, logits, target, *source.held, source, steps, options)  # type: ignore[no-untyped-call]
    return linked


def _is_untouched(logits: LazyLogits, has_graph: bool) -> bool:
    """Whether these logits are still what the head gives, and their gradient goes to the head as it is.

    Somebody may have read them, or written to them or to what they were taken from; taken it without a graph; made them need a
    gradient of their own; or put a function with a backward of its own between.
    """
    above: LazyLogits | None = logits
    with _no_subclass():
        while above is not None:
            node = above.grad_fn
            if above._version or above._pending.values is not None:
                return False
            if (has_graph or above.requires_grad) and (node is None or node.name() not in _NODES):
                return False
            above = above._pending.parent
    return True


class _Logits(torch.autograd.Function):
    """The head as a node of the graph, whose result has no values yet."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, source: Source) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias)
        ctx.set_materialize_grads(False)
        ctx.product = source.product
        like = torch.empty((*hidden.shape[:-1], weight.shape[0]), dtype=hidden.dtype, device="meta")
        return LazyLogits(Pending(source, (), None, False), like, hidden.device)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None, None
        hidden, weight, bias = ctx.saved_tensors
        if ctx.product is not F.linear or wants_graph():
            return *plain_gradients(ctx.product, (hidden, weight, bias), (grad,)), None
        needs = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        return (
            grad @ weight if needs[0] else None,
            rows.t() @ hidden.reshape(-1, hidden.shape[-1]) if needs[1] else None,
            rows.sum(0) if needs[2] else None,
            None,
        )


class _Link(torch.autograd.Function):
    """Ties a loss to the logits that it was computed without, for whoever asks for the gradient of the logits.

    It holds what the logits come from as saved tensors, which are let go after backward though the loss may be kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        loss: Tensor,
        logits: Tensor,
        target: Tensor,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        source: Source,
        steps: tuple[Step, ...],
        options: dict[str, Any],
    ) -> Tensor:
        ctx.save_for_backward(target, hidden, weight, bias)
        ctx.watched, ctx.product, ctx.steps, ctx.options = source.watched, source.product, steps, options
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        nothing = (None,) * 7
        if not ctx.watched.is_set():
            return grad, None, *nothing
        if wants_graph():
            raise NotImplementedError(
                "second derivatives of a loss, of whose logits the gradient is asked for too\n"
                '  go on      keep the own code there: kernelize(model, {"LinearCrossEntropy": "none"})'
            )
        target, *held = ctx.saved_tensors
        values = computed(ctx.product, held)
        for step in ctx.steps:
            values = step(values)
        with torch.enable_grad():
            values = values.detach().requires_grad_()
            loss = F.cross_entropy(values, target, **ctx.options)
        (found,) = torch.autograd.grad(loss, values, grad)
        return None, found, *nothing


def followed() -> bool:
    """Whether somebody follows every operator that runs: tracing, another dispatch mode, `torch.func`."""
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
    )
