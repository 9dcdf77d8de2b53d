"""Capture: one forward of the model → what each distinct layer was given; where it computes a loss, one backward too.

Layers alike (same code, options and shapes of weights) are captured once. What is kept is at most a number of rows of
each tensor, with its strides; all samples together stay below a bound, and layers beyond it are captured in further passes.
The model is as it was afterwards. The gradients are those of the outputs of these layers alone: nothing is added to `.grad`.

A model that does not fit is captured layer by layer too. One whose weights accelerate brings in for each layer runs as it
always does. One on the meta device runs there, which takes neither memory nor time and tells shapes, dtypes and strides.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from kernelwise._applying import _apply
from kernelwise._data import Kernel, KernelRef, Layer, Plan, Target
from kernelwise._forwards import globals_called, own_forward
from kernelwise._process import user_random_state
from kernelwise._verifying._copies import clone_with_gaps, copied, lead_of, memory_of
from kernelwise._verifying._groups import Group, holds_others, module_of
from kernelwise._verifying._inputs import Sample, axes

MEMORY = 256 << 20
ROWS = 32
NOT_CALLED = "the model does not call it on these inputs"


@contextmanager
def with_weights(module: nn.Module) -> Iterator[nn.Module]:
    """Bring in the weights of a module that accelerate offloads, and of its children, for the length of a block."""
    with ExitStack() as stack:
        if any("_hf_hook" in part.__dict__ for part in module.modules()):
            from accelerate.utils import align_module_device

            for part in module.modules():
                stack.enter_context(align_module_device(part))
        yield module


def capture(
    model: nn.Module, groups: Sequence[Group], inputs: Any, *, memory: int = MEMORY, rows: int | None = ROWS
) -> dict[str, Sample]:
    """Run the model on its inputs and return what the first layer of each group was given, by that layer's path.

    A model that returns a loss runs a second time with gradients, so that each sample also has those of its outputs.

    Args:
        inputs: a dict (called `model(**inputs)`), a tuple (`model(*inputs)`), or the one argument.
        memory: the most bytes to keep in all; layers beyond it are left out.
        rows: how many rows of each batch dimension to keep; None: whole tensors, as timing needs them.
    """
    return _capture(model, groups, inputs, memory, rows)[0]


def capture_in_passes(
    model: nn.Module, groups: Sequence[Group], inputs: Any, *, memory: int = MEMORY, notes: list[str]
) -> Iterator[tuple[Sequence[Group], dict[str, Sample]]]:
    """Yield groups with samples that together stay below a bound, until every group was given; each pass runs the model.

    A layer whose inputs alone are beyond the bound is cut to fewer rows. Groups that get no sample come last, with the reason
    in `notes`: not even one row fits, or the model does not call the layer on these inputs.
    """
    left = list(groups)
    missing: list[Group] = []
    while left:
        samples, later, never = _capture(model, left, inputs, memory, ROWS)
        done = [found for found in left if found.decision.layer.path in samples]
        for found in left:
            path = found.decision.layer.path
            if path not in samples and path not in later:
                missing.append(found)
                notes.append(f"inputs were made for {path}: {never.get(path, NOT_CALLED)}")
        left = [found for found in left if found.decision.layer.path in later]
        if done:
            yield done, samples
        samples.clear()  # before the next pass takes as much again
    if missing:
        yield missing, {}


def _capture(
    model: nn.Module, groups: Sequence[Group], inputs: Any, memory: int, rows: int | None
) -> tuple[dict[str, Sample], set[str], dict[str, str]]:
    """Return the samples that fit, the paths of layers for which there was no room left, and why others never fit."""
    wholes = {found.decision.layer.path for found in groups if holds_others(found.decision)}
    recorder = _Recorder(wholes, memory, rows)
    with ExitStack() as stack:
        stack.callback(recorder.forget)
        stack.enter_context(user_random_state())
        functions = []
        for found in groups:
            layer = found.decision.layer
            if layer.function is not None:
                functions.append(found)
                continue
            module = module_of(model, layer)
            before, after = recorder.hooks(layer, own_forward(module))
            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(after).remove)
        if functions:
            stack.enter_context(_recording(model, functions, recorder))
        stack.enter_context(as_they_were(model))
        with torch.no_grad():
            result = _run(model, inputs)
        if _loss_of(result) is not None and any(parameter.requires_grad for parameter in model.parameters()):
            del result
            recorder.outputs = {}
            with torch.enable_grad():
                loss = _loss_of(_run(model, inputs))
            _add_gradients(recorder.samples, recorder.outputs, loss, rows)
        return dict(recorder.samples), recorder.later, recorder.never


class _Recorder:
    """Keeps what layers are given when the model runs, within a bound; when it runs again with gradients, what they give.

    `wholes` are the layers that are kept uncut, `memory` is the bound in bytes, `rows` as `capture` takes it.
    """

    def __init__(self, wholes: Set[str], memory: int, rows: int | None) -> None:
        self.samples: dict[str, Sample] = {}
        self.later: set[str] = set()  # layers for which there was no room left
        self.never: dict[str, str] = {}  # layers that alone are too large, and what that means
        self.outputs: dict[str, list[torch.Tensor]] | None = None  # of the layers that were captured, in the second run
        self._wholes, self._rows, self._memory, self._left = wholes, rows, memory, memory

    def before(self, layer: Layer, module: nn.Module | None, own: Callable[..., Any], args: Any, kwargs: Any) -> None:
        """Note what a layer is called with: its arguments, or in the second run which of them carry a gradient."""
        known = self.samples.get(layer.path)
        if known is not None and (self.outputs is None or known.with_grad is not None):
            return
        bound = inspect.signature(own).bind(*(args if layer.function or module is None else (module, *args)), **kwargs)
        bound.apply_defaults()
        names = {parameter.name for parameter in layer.signature}
        arguments = {name: value for name, value in bound.arguments.items() if name in names}
        if known is not None:
            with_grad = tuple(name for name, value in arguments.items() if _needs_grad(value))
            self.samples[layer.path] = replace(known, with_grad=with_grad)
            return
        if layer.path in self.later or layer.path in self.never:
            return
        cut, size = _cut_to(arguments, layer, None if layer.path in self._wholes else self._rows, self._memory)
        if size > self._memory:
            self.never[layer.path] = f"its inputs take {size} bytes, more than the {self._memory} that may be kept"
        elif size > self._left:
            self.later.add(layer.path)
        else:
            self._left -= size
            self.samples[layer.path] = Sample({n: _kept(value) for n, value in cut.items()}, module, captured=True)

    def after(self, layer: Layer, result: Any) -> None:
        """Note what a layer gives, in the second run."""
        if self.outputs is not None and layer.path in self.samples and layer.path not in self.outputs:
            self.outputs[layer.path] = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]

    def hooks(self, layer: Layer, own: Callable[..., Any]) -> tuple[Callable[..., None], Callable[..., None]]:
        """Return the hooks of a module that is this layer, with the forward `own`."""

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.before(layer, module, own, args, kwargs)

        def after(module: nn.Module, args: Any, result: Any) -> None:
            self.after(layer, result)

        return before, after

    def forget(self) -> None:
        """Let go of what was seen: the code that is compiled for a function that records is kept, with that function."""
        self.samples.clear()
        self.outputs = None


@contextmanager
def _recording(model: nn.Module, groups: Sequence[Group], recorder: _Recorder) -> Iterator[None]:
    """Put functions that record and then call the layer's own into the forwards that call them, as kernels are put in."""
    decisions = []
    for found in groups:
        layer = found.decision.layer
        original = globals_called(own_forward(module_of(model, layer)))[layer.function or ""]
        plain = type(original).forward.__get__(original) if isinstance(original, nn.Module) else original

        def recorded(
            self: Any, *args: Any, _layer: Layer = layer, _own: Any = plain, _original: Any = original, **kwargs: Any
        ) -> Any:
            recorder.before(_layer, None, _own, args, kwargs)
            result = _original(*args, **kwargs)
            recorder.after(_layer, result)
            return result

        kernel = Kernel(
            KernelRef("builtin", "", "recorder"), signature=layer.signature, can_torch_compile=True, function=recorded
        )
        mode = "training" if model.training else "inference"
        decisions.append(replace(found.decision, kernel=kernel, mode=mode, asked_by="capture", rejected=()))
    token = _apply.apply(model, Plan(Target(groups[0].decision.layer.device), tuple(decisions)))
    try:
        yield
    finally:
        _apply.remove(model, token=token)


@contextmanager
def as_they_were(*models: nn.Module) -> Iterator[None]:
    """Give models the buffers and the numbers back that they count in as they run: running means, lengths seen, calls.

    Flags stay as the run has set them: wrappers note in them that they have been set up. Models may share buffers.
    """
    modules = list(dict.fromkeys(module for model in models for module in model.modules()))
    numbers = [
        (module.__dict__, {n: v for n, v in module.__dict__.items() if type(v) in (int, float)}) for module in modules
    ]
    tables = [(module._buffers, dict(module._buffers)) for module in modules if module._buffers]
    buffers = {id(b): b for _, table in tables for b in table.values() if b is not None and not b.is_meta}
    values = [(buffer, buffer.detach().clone()) for buffer in buffers.values()]
    try:
        yield
    finally:
        for table, before in tables:  # other tensors may have been put in their places
            table.clear()
            table.update(before)
        for held, counted in numbers:
            held.update({name: value for name, value in counted.items() if name in held})
        with torch.no_grad():
            for buffer, value in values:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


def _cut_to(arguments: dict[str, Any], layer: Layer, rows: int | None, memory: int) -> tuple[dict[str, Any], int]:
    """Cut arguments to a number of rows, or to as few more as it takes to stay below a bound; return them and their bytes."""
    while True:
        cut = arguments if rows is None else _cut_rows(arguments, layer, rows)
        size = sum(memory_of(leaf).nbytes for leaf in tree_leaves(cut) if isinstance(leaf, torch.Tensor))
        if size <= memory or rows is None or rows <= 1:
            return cut, size
        rows //= 2


def _run(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*(inputs if isinstance(inputs, tuple) else (inputs,)))


def _loss_of(result: Any) -> torch.Tensor | None:
    """Return what a model says is its loss, or the only number among the tensors that it returns."""
    named = result.get("loss") if isinstance(result, Mapping) else getattr(result, "loss", None)
    if isinstance(named, torch.Tensor):
        return named
    numbers = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor) and t.dim() == 0 and t.is_floating_point()]
    return numbers[0] if len(numbers) == 1 else None


def _add_gradients(
    samples: dict[str, Sample], outputs: Mapping[str, list[torch.Tensor]], loss: torch.Tensor | None, rows: int | None
) -> None:
    """Take the gradients of the outputs of each captured layer, cut as its inputs were."""
    wanted = [(path, output) for path, found in outputs.items() for output in found if output.requires_grad]
    if loss is None or not loss.requires_grad or not wanted:
        return
    found = torch.autograd.grad(loss, [output for _, output in wanted], allow_unused=True)
    by_path: dict[str, list[torch.Tensor | None]] = {}
    for (path, _), gradient in zip(wanted, found, strict=True):
        by_path.setdefault(path, []).append(gradient)
    for path, gradients in by_path.items():
        kept = (g if g is None or rows is None else _cut_like(samples[path], g) for g in gradients)
        samples[path] = replace(samples[path], upstream=tuple(None if g is None else g.clone() for g in kept))


def _cut_like(sample: Sample, gradient: torch.Tensor) -> torch.Tensor:
    """Cut the gradient of an output to the rows that its layer's inputs were cut to: those of an input of as many dims."""
    tensors = [value for value in sample.arguments.values() if isinstance(value, torch.Tensor)]
    like = next((t for t in tensors if t.dim() == gradient.dim() and t.shape[-1] == gradient.shape[-1]), None)
    like = next((t for t in tensors if t.dim() == gradient.dim()), None) if like is None else like
    for at in range(gradient.dim() - 1):
        if like is not None and like.shape[at] < gradient.shape[at]:
            gradient = gradient.narrow(at, 0, like.shape[at])
    return gradient


def _needs_grad(value: Any) -> bool:
    return any(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in tree_leaves(value))


def _cut_rows(arguments: dict[str, Any], layer: Layer, rows: int) -> dict[str, Any]:
    named = axes(layer.recognition or layer.recognition_in_training, arguments)
    cut = dict(arguments)
    for name, names in named.items():
        for symbol, most in (("B", min(2, rows)), ("S", rows)):
            if symbol in names:
                at = names.index(symbol)
                cut[name] = cut[name].narrow(at, 0, min(most, cut[name].shape[at]))
        cut[name] = _closed_up(cut[name], arguments[name].shape)
    return cut


def _closed_up(cut: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Copy a cut tensor with the order of its strides and the gaps it had when its shape was `shape`, without new ones.

    It begins its memory where, and only where, the tensor did.
    """
    strides = list(cut.stride())
    span_before, span = 1, 1
    for at in sorted(range(cut.dim()), key=lambda d: (cut.stride(d), shape[d] != 1)):
        if cut.stride(at) > 0:
            strides[at] = span + max(0, cut.stride(at) - span_before)
            span_before, span = cut.stride(at) * shape[at], strides[at] * cut.shape[at]
    memory = torch.empty(lead_of(cut) + (span if cut.numel() else 0), dtype=cut.dtype, device=cut.device)
    return memory.as_strided(cut.shape, strides, lead_of(cut)).copy_(cut)


def _kept(value: Any) -> Any:
    """Copy a tensor with its strides and what lies between its elements; the model may write to its memory later."""
    if type(value) in (tuple, list):
        return type(value)(_kept(item) for item in value)
    if isinstance(value, dict):
        return {name: _kept(item) for name, item in value.items()}
    if not isinstance(value, torch.Tensor):
        return copied(value)
    return clone_with_gaps(value)
