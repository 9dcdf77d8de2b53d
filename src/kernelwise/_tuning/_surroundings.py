"""Surroundings: what a result of tuning depends on besides layers and kernels: settings, the model as a whole, its device."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from kernelwise._alike import function_code, traits_of
from kernelwise._errors import PlanError


def place(model: nn.Module) -> str:
    """Return the device that a model is on, with its number: `"cpu"`, `"cuda:1"`."""
    places = list(dict.fromkeys(str(parameter.device) for parameter in model.parameters()))
    places = places or [str(buffer.device) for buffer in model.buffers()][:1]
    if len(places) > 1:
        raise PlanError(
            f"the model is spread over {', '.join(places)}, and only a model on one device can be tuned\n"
            "  go on      tune it with fewer layers on one of them; the config serves the whole model too"
        )
    return places[0] if places else "cpu"


def is_split(module: nn.Module) -> bool:
    """Whether a module holds only a part of itself, or talks to other processes when it runs."""
    names = {cls.__name__ for cls in type(module).__mro__}
    names |= {type(parameter).__name__ for parameter in module._parameters.values()}
    names |= {type(parameter.data).__name__ for parameter in module._parameters.values() if parameter is not None}
    return bool(names & {"DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule", "DTensor"})


def settings(device: str) -> tuple[tuple[str, str], ...]:
    """What PyTorch is told for all that runs, and what runs depends on: autocast, precision, deterministic algorithms."""
    kind = device.partition(":")[0]
    autocast = torch.is_autocast_enabled(kind) and str(torch.get_autocast_dtype(kind))
    cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    found = {
        "autocast": autocast,
        "float32 products": [_read(torch, "get_float32_matmul_precision"), _read(cuda, "fp32_precision")],
        "tf32": [_read(cuda, "allow_tf32"), _read(cudnn, "allow_tf32")],
        "reduced sums": (cuda.allow_fp16_reduced_precision_reduction, cuda.allow_bf16_reduced_precision_reduction),
        "deterministic": (torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark),
    }
    return tuple((name, str(value)) for name, value in found.items())


def _read(owner: Any, name: str) -> Any:
    """Return a setting; None where this PyTorch has none of that name, or it was set by another one."""
    try:
        value = getattr(owner, name, None)
        return value() if callable(value) else value
    except RuntimeError:
        return None


def hash_of(model: nn.Module) -> str:
    """What the time of a whole model depends on: its code, its shapes, the numbers it holds, its hooks, what is trained."""
    traits = [
        trait for trait in traits_of(model, None, {}) if trait[0] != "generation_config"
    ]  # it holds the hash of an object
    traits += [(name, parameter.requires_grad) for name, parameter in model.named_parameters()]
    traits += [(path, code) for path, module in model.named_modules() for code in _put_on(module)]
    return hashlib.sha256(repr(traits).encode()).hexdigest()


def _put_on(module: nn.Module) -> list[str]:
    """Return the code of what was put on a module: hooks, and a forward of its own."""
    hooks = (
        module._forward_pre_hooks,
        module._forward_hooks,
        module._backward_pre_hooks,
        module._backward_hooks,
    )
    found = [hook for some in hooks for hook in some.values()]
    found += [module.__dict__[name] for name in ("forward", "_old_forward") if name in module.__dict__]
    return [function_code(getattr(one, "__func__", one)) for one in found]


def by_name(inputs: Mapping[str, Any] | tuple[Any, ...]) -> Mapping[str, Any]:
    """Return what a model is called with by names; arguments in a tuple have their number for one."""
    return inputs if isinstance(inputs, Mapping) else {str(index): value for index, value in enumerate(inputs)}
