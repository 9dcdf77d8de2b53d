"""Measure: a layer's own code against a kernel, on what the model gives the layer → a timing.

Both are called as `_verify` calls them: with the model's own weights, without hooks and without the guards that stand before
a kernel in a model. What those cost shows when the whole model is timed. In a model a layer finds neither its inputs nor its
weights in a cache, so the inputs rotate among copies, and the weights among those of the alike layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from time import perf_counter
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from kernelwise._data import Kernel, Layer
from kernelwise._errors import said
from kernelwise._evidence import OWN_CODE, Comparison, Timing
from kernelwise._measuring._compare import compare as compare
from kernelwise._measuring._compare import on_device
from kernelwise._measuring._environment import environment as environment
from kernelwise._process import user_random_state
from kernelwise._verifying._calls import Call, kernel_call, own_call
from kernelwise._verifying._check import defaults_of, own_code
from kernelwise._verifying._copies import bare_copy, clone_with_gaps, copied, memory_of
from kernelwise._verifying._groups import Group, module_of
from kernelwise._verifying._inputs import Sample, with_defaults
from kernelwise.ops import OPERATIONS

CACHE = 32 << 20
"""Bytes of the last cache before memory, where the processor does not tell."""

MEMORY = 1 << 30
"""The most bytes that the copies of a layer's inputs may take."""

COPIES = 64
"""The most copies of a layer's inputs. What is so small is in a cache in a model too: the layer before has just written it."""


@dataclass(slots=True)
class _Given:
    """What one call is given. In training, `leaves` are what needs a gradient, and `upstream` are the outputs'."""

    module: nn.Module | None
    arguments: dict[str, Any]
    leaves: list[torch.Tensor]
    upstream: list[torch.Tensor]


def measure_group(
    model: nn.Module,
    found: Group,
    sample: Sample,
    kernel: Kernel,
    *,
    mode: str,
    workload: str,
    seconds: float,
    calls: int = 1,
    graph: bool = False,
    hide_starts: bool = False,
    progress: Callable[[float], None] | None = None,
) -> Timing | str:
    """Time a kernel and the own code of a layer in turns, on what the layer was given; or say why that cannot be.

    In training a call is forward and backward, with the model's gradients of its outputs where the sample has them, else
    random ones; gradients are returned and kept nowhere. With `+compile` both are compiled, each as one graph for these
    shapes, and `first_s` is the time of the kernel's first call, compiling included. The inputs rotate among copies that
    together are larger than the device's last cache, as far as `MEMORY` and `COPIES` go. Weights are not copied: the layer is
    called with its own and with those of the layers that it speaks for, in turns.

    A result in words is an error of the kernel, or of the layer's own code on this sample.

    Args:
        found: the layers that this speaks for; their decision's layer is timed.
        sample: whole inputs of that layer, from `capture(..., rows=None)`.
        kernel: loaded, and checked for this layer: nothing is checked here.
        mode: one of `kernelwise._data.MODES`.
        workload: what the sample is from, for the record.
        seconds: how long the rounds may take; building, compiling and warming up come on top.
        calls: how often the model calls a layer of this kind in the workload, for the record.
        graph: call both inside CUDA graphs, so that what starting them costs does not count.
        hide_starts: count a CUDA device's own time alone, as in a workload in which it is what all wait for.
        progress: told which part of the rounds is done, 0 to 1.

    Raises:
        ValueError: `graph` is asked for where the layer is not on a GPU.
    """
    layer = found.decision.layer
    module = module_of(model, layer)
    own = own_code(module, layer)
    sample = with_defaults(sample, defaults_of(own))
    training, compiled = mode.startswith("training"), mode.endswith("+compile")
    device = _device_of(sample, layer)
    if graph and not device.startswith("cuda"):
        raise ValueError(f"{layer.path} is on {device}: CUDA graphs are for GPUs")
    name = str(kernel.ref)
    with on_device(device), user_random_state(), torch.set_grad_enabled(training):
        own_step = own_call(layer, own)
        try:
            # What is compiled may hold on to the weights it was compiled with, and stops after a few recompilations.
            modules = [sample.module] if compiled else _alike(model, found, sample)
            given = _rotation(layer, sample, modules, own_step, mode)
        except Exception as error:
            return f"the layer's own code fails on this sample: {said(error)}"
        turn = cycle(given)  # for both: whoever calls next gets what has been out of use longest
        steps: dict[str, Callable[[], object]] = {}
        for who, call in ((OWN_CODE, own_step), (name, kernel_call(layer, kernel, mode))):
            # Not dynamic: PyTorch remembers shapes by a function's name, and all of these calls have the same one.
            called = torch.compile(call, fullgraph=True, dynamic=False) if compiled else call
            steps[who] = _trained(called, turn) if training else _inferred(called, turn)
        made_s = 0.0
        if graph:
            for who, step in steps.items():
                began = perf_counter()
                try:
                    steps[who] = _graphed(step, len(given))
                except Exception as error:
                    return f"{who} cannot run in a CUDA graph: {said(error)}"
                made_s = perf_counter() - began
        compared = compare(
            steps, own=OWN_CODE, device=device, seconds=seconds, hide_starts=hide_starts, progress=progress
        )[name]
    if isinstance(compared, str):
        return compared
    if graph:
        compared = _one_of(compared, len(given), made_s)
    return Timing(layer.path, found.paths, name, mode, workload, compared, calls, graph)


# -------------------------------------------------------------------------------------------------------------- inputs


def _alike(model: nn.Module, found: Group, sample: Sample) -> Sequence[nn.Module | None]:
    """The modules whose weights rotate: those of the group that are where the sample's is and learn what it learns."""
    if sample.module is None or sample.module is not module_of(model, found.decision.layer):
        return [sample.module]
    looks = _looks(sample.module)
    others = (model.get_submodule(path) for path in found.paths)
    modules = dict.fromkeys([sample.module, *(module for module in others if _looks(module) == looks)])
    return [*modules][:COPIES]


def _looks(module: nn.Module) -> list[tuple[torch.device, bool]]:
    return [(parameter.device, parameter.requires_grad) for parameter in module.parameters()]


def _bare(module: nn.Module, training: bool) -> nn.Module:
    """The module with the model's own weights, without hooks and kernels; what it writes to its buffers is lost."""
    bare = bare_copy(module, lambda tensor: tensor)
    for part in bare.modules():
        part.training = training
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else buffer.clone()
    return bare


def _rotation(layer: Layer, sample: Sample, modules: Sequence[nn.Module | None], own: Call, mode: str) -> list[_Given]:
    """Return what the calls are given, one after the other: each copy of the inputs and each module in its turn."""
    training = mode.startswith("training")
    bare = [None if module is None else _bare(module, training) for module in modules]
    weights = [
        [p for p in module.parameters() if p.requires_grad] if module is not None and training else []
        for module in bare
    ]
    wanted = _wanting_gradients(layer, sample, bool(weights[0]), mode) if training else frozenset()
    arguments, leaves = _leaves(sample.arguments, wanted)
    upstream = _upstream(sample, _roots(own(bare[0], **arguments))) if training else []
    tensors = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, torch.Tensor)]
    size = sum(memory_of(tensor).nbytes for tensor in [*tensors, *upstream])
    copies = [(arguments, leaves, upstream)]
    for _ in range(_number_of_copies(size, _cache_of(tensors)) - 1):
        arguments, leaves = _leaves(tree_map_only(torch.Tensor, clone_with_gaps, sample.arguments), wanted)
        copies.append((arguments, leaves, [clone_with_gaps(gradient) for gradient in upstream]))
    given = []
    for index in range(max(len(copies), len(bare))):
        module, held = bare[index % len(bare)], weights[index % len(bare)]
        arguments, leaves, upstream = copies[index % len(copies)]
        given.append(_Given(module, arguments, [*held, *leaves], upstream))
    return given


def _leaves(arguments: dict[str, Any], wanted: frozenset[str]) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """Make leaves of what needs a gradient. What is no tensor is copied, since it may be a cache that a call writes to."""
    found = {name: copied(value) if _no_tensors(value) else value for name, value in arguments.items()}
    leaves: list[torch.Tensor] = []

    def leaf(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point():
            return tensor
        leaves.append(tensor.detach().requires_grad_())
        return leaves[-1]

    for name in wanted:
        found[name] = tree_map_only(torch.Tensor, leaf, found[name])
    return found, leaves


def _upstream(sample: Sample, roots: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The gradients of the outputs: those that the model gave them, else random ones."""
    if not roots:
        raise ValueError("nothing that it gives has a gradient")
    given = [*sample.upstream, *([None] * len(roots))]
    return [
        torch.randn_like(root) if upstream is None or upstream.shape != root.shape else upstream.to(root)
        for root, upstream in zip(roots, given, strict=False)
    ]


def _no_tensors(value: Any) -> bool:
    return not any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(value))


def _number_of_copies(size: int, cache: int) -> int:
    """So many copies that when the first one's turn comes again, the others have driven it out of the cache."""
    fitting = max(1, MEMORY // max(size, 1))
    return min(1 + -(-cache // max(size, 1)), fitting, COPIES)


def _cache_of(tensors: Sequence[torch.Tensor]) -> int:
    on_gpu = next((tensor.device for tensor in tensors if tensor.is_cuda), None)
    return CACHE if on_gpu is None else int(torch.cuda.get_device_properties(on_gpu).L2_cache_size)


def _wanting_gradients(layer: Layer, sample: Sample, weights: bool, mode: str) -> frozenset[str]:
    """The arguments through which a backward goes on: those that were seen, else those that are activations.

    `weights` says whether the layer has some that learn. Without, there would be no backward at all, but alike layers that
    stand behind one that learns have one.
    """
    if sample.with_grad or (sample.with_grad is not None and weights):
        return frozenset(sample.with_grad)
    found = layer.computes(mode)
    if found is None:
        return frozenset(name for name, value in sample.arguments.items() if not _no_tensors(value))
    roles = {role.name for role in OPERATIONS[found.op].roles if role.follows == "activations"}
    bound = {str(b.value) for role, b in found.roles if role in roles and b.kind == "argument"}
    return frozenset(bound & set(sample.arguments))


def _device_of(sample: Sample, layer: Layer) -> str:
    held = () if sample.module is None else sample.module.parameters()
    tensors = [leaf for leaf in tree_leaves(sample.arguments) if isinstance(leaf, torch.Tensor)]
    return next((str(tensor.device) for tensor in [*tensors, *held]), layer.device)


# --------------------------------------------------------------------------------------------------------------- steps


def _inferred(call: Call, turn: Iterator[_Given]) -> Callable[[], object]:
    def step() -> object:
        given = next(turn)
        return call(given.module, **given.arguments)

    return step


def _trained(call: Call, turn: Iterator[_Given]) -> Callable[[], object]:
    """Forward and backward. Gradients are handed out, not added up: in a step of training the first ones are not either."""

    def step() -> object:
        given = next(turn)
        roots = _roots(call(given.module, **given.arguments))
        if len(roots) != len(given.upstream):
            raise ValueError(f"{len(roots)} of its outputs have a gradient, not {len(given.upstream)}")
        return torch.autograd.grad(roots, given.leaves, given.upstream, allow_unused=True)

    return step


def _roots(found: Any) -> list[torch.Tensor]:
    leaves = [found] if isinstance(found, torch.Tensor) else tree_leaves(found)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.requires_grad]


def _graphed(step: Callable[[], object], times: int) -> Callable[[], object]:
    """Capture a step `times` in one CUDA graph, once for each copy of the inputs, and return its replay."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # what is set up on first use must not be captured
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            step()
    return graph.replay


def _one_of(compared: Comparison, times: int, made_s: float) -> Comparison:
    """What is true of one call, of a replay of so many. A graph holds its memory, so that replaying takes none."""
    return replace(
        compared, own_us=compared.own_us / times, us=compared.us / times, own_peak=None, peak=None, first_s=made_s
    )
