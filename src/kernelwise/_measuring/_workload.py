"""Workloads: a model and its inputs → what a user does with it, as calls that can be made again and again.

Prefill, decoding and a training step ask different things of a kernel, so each is timed by itself. Every call does the same
work and leaves no trace: a cache is put back before each decoding, gradients are dropped after each backward pass.
`undisturbed` sees to what lasts longer: modes, gradients and buffers of the user, random states.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from kernelwise._errors import PlanError
from kernelwise._process import user_random_state
from kernelwise._reference import did_you_mean
from kernelwise._verifying._capture import as_they_were

WORKLOADS = ("forward", "prefill", "decode", "training")
STEPS = 16
"""How many tokens one run of "decode" computes for each row."""

_OF_LANGUAGE = ("prefill", "decode")
_CACHES = ("past_key_values", "cache_params")


@dataclass(frozen=True, slots=True, eq=False)
class Workload:
    """One thing that is done with a model: "forward", "prefill", "decode" or "training".

    `inputs` is what the model is called with: arguments by name, or a tuple of them. `tokens` is how many tokens one run
    computes, 0 where the inputs are not tokens; `steps` is how many each row gets in "decode".
    """

    name: str
    inputs: Mapping[str, Any] | tuple[Any, ...]
    tokens: int = 0
    steps: int = 0

    @property
    def training(self) -> bool:
        """Whether the model is in training mode, and gradients are computed."""
        return self.name == "training"


def workloads_of(
    model: nn.Module, inputs: Any, names: Sequence[str] | None = None, *, steps: int = STEPS
) -> tuple[Workload, ...]:
    """Return what a model can be timed doing on these inputs.

    - "forward": the inputs as given, without gradients. For any model.
    - "prefill": the same with a cache, and the logits of the last token. For causal language models.
    - "decode": `steps` tokens after these inputs, one at a time. Which tokens is no choice of the model's: all contenders
      compute the same. The prompt is not part of a run.
    - "training": forward and backward. The loss is the model's, with the inputs as labels where a causal language model is
      given none; where it has none, the mean of the squares of its outputs.

    Args:
        inputs: what the model is called with: a dict, a tuple, or one argument.
        names: None: "prefill" and "decode" for a causal language model, else "forward"; and "training" where the model is in
            training mode or the inputs have labels.

    Raises:
        PlanError: there is no workload of such a name, or the model or its inputs do not allow it.
    """
    given = _by_name(model, inputs)
    reason = _no_language_model(model, given)
    if names is None:
        has_labels = isinstance(given, Mapping) and given.get("labels") is not None
        names = ("forward",) if reason else _OF_LANGUAGE
        names = (*names, "training") if model.training or has_labels else names
    for name in names:
        if name not in WORKLOADS:
            raise PlanError(
                f"{name!r} is no workload{did_you_mean(name, WORKLOADS)}\n  go on      name some of {', '.join(WORKLOADS)}"
            )
        if name in _OF_LANGUAGE and reason:
            raise PlanError(f'"{name}" is for causal language models: {reason}\n  go on      take "forward" instead')
        if name == "training" and not any(parameter.requires_grad for parameter in model.parameters()):
            raise PlanError(
                '"training" needs gradients, and no parameter of the model requires one\n'
                "  go on      model.requires_grad_(True), or leave this workload out"
            )
    return tuple(
        _workload(model, given, name, steps, is_language_model=reason is None) for name in dict.fromkeys(names)
    )


def _workload(
    model: nn.Module, given: Mapping[str, Any] | tuple[Any, ...], name: str, steps: int, *, is_language_model: bool
) -> Workload:
    if not isinstance(given, Mapping):
        return Workload(name, given)
    ids = given.get("input_ids")
    tokens = ids.numel() if isinstance(ids, torch.Tensor) else 0
    accepted = inspect.signature(model.forward).parameters
    changed = dict(given)
    if name in _OF_LANGUAGE:
        changed.pop("labels", None)
        changed["use_cache"] = True
        if "logits_to_keep" in accepted:
            changed["logits_to_keep"] = 1
        if name == "decode":
            tokens = ids.shape[0] * steps if isinstance(ids, torch.Tensor) else 0
            return Workload(name, changed, tokens, steps)
    elif name == "training" and is_language_model and changed.get("labels") is None:
        mask = changed.get("attention_mask")
        padded = isinstance(mask, torch.Tensor) and isinstance(ids, torch.Tensor) and mask.shape == ids.shape
        changed["labels"] = ids.masked_fill(mask == 0, -100) if padded else ids  # type: ignore[union-attr]
    if name == "training" and is_language_model and "use_cache" in accepted:
        changed.setdefault("use_cache", False)
    return Workload(name, changed, tokens)


def _by_name(model: nn.Module, inputs: Any) -> Mapping[str, Any] | tuple[Any, ...]:
    """Return the arguments by name where the model says how they are called, else as a tuple."""
    if isinstance(inputs, Mapping):
        return dict(inputs)
    given = inputs if isinstance(inputs, tuple) else (inputs,)
    parameters = list(inspect.signature(model.forward).parameters.values())[: len(given)]
    if len(parameters) == len(given) and all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters):
        return {p.name: value for p, value in zip(parameters, given, strict=True)}
    return given


def _no_language_model(model: nn.Module, given: Mapping[str, Any] | tuple[Any, ...]) -> str | None:
    """Say why a model with these inputs is no causal language model, or None."""
    config: Any = getattr(model, "config", None)
    if not callable(getattr(model, "generate", None)) or config is None:
        return f"{type(model).__name__} does not generate text"
    if getattr(config, "is_encoder_decoder", False):
        return f"{type(model).__name__} is an encoder with a decoder"
    if not hasattr(config, "vocab_size") and not hasattr(config, "text_config"):
        return "its config has no vocab_size"
    ids = given.get("input_ids") if isinstance(given, Mapping) else None
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2:
        return "input_ids [batch, length] are not among the inputs"
    return None


def run_of(
    model: nn.Module, workload: Workload, *, call: Callable[..., Any] | None = None, static_cache: bool = False
) -> Callable[[], Any]:
    """Return a call that does the work of a workload once: the same work every time it is called.

    It gives the outputs in "forward", the logits of the last token in "prefill" and "decode", and `(loss, gradients)` in
    "training", whose gradients are no longer on the parameters. The model must be in the mode of the workload (`undisturbed`).
    For "decode" the prompt is computed here, by the model itself.

    Args:
        call: what runs the model, such as a compiled one; None: the model.
        static_cache: decode with transformers' `StaticCache`, whose shapes do not change, as torch.compile needs it.

    Raises:
        PlanError: the model gives no cache to decode with.
    """
    run: Callable[..., Any] = model if call is None else call
    if workload.name == "decode":
        return _decode(model, workload, run, static_cache)
    if workload.name == "training":
        return _training(model, workload, run)

    def forward() -> Any:
        with torch.no_grad():
            found = _call(run, workload.inputs)
        return found.logits[:, -1] if workload.name == "prefill" else found

    return forward


def _call(run: Callable[..., Any], inputs: Mapping[str, Any] | tuple[Any, ...]) -> Any:
    return run(**inputs) if isinstance(inputs, Mapping) else run(*inputs)


def _training(model: nn.Module, workload: Workload, run: Callable[..., Any]) -> Callable[[], Any]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def training() -> Any:
        with torch.enable_grad():
            loss = _loss_of(_call(run, workload.inputs))
            loss.backward()  # type: ignore[no-untyped-call]
        gradients = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        return loss.detach(), gradients

    return training


def _loss_of(found: Any) -> torch.Tensor:
    named = found.get("loss") if isinstance(found, Mapping) else getattr(found, "loss", None)
    if isinstance(named, torch.Tensor):
        return named
    outputs = [t for t in tree_leaves(found) if isinstance(t, torch.Tensor) and t.requires_grad]
    if not outputs:
        raise PlanError(
            "the model returns nothing that has a gradient, so it cannot be timed in training\n"
            "  go on      give inputs with labels, or leave this workload out"
        )
    return torch.stack([output.float().square().mean() for output in outputs]).sum()


def _decode(model: nn.Module, workload: Workload, run: Callable[..., Any], static_cache: bool) -> Callable[[], Any]:
    prompt = dict(workload.inputs)
    ids: torch.Tensor = prompt["input_ids"]
    batch, length = ids.shape
    if static_cache:
        from transformers import StaticCache

        config: Any = model.config
        prompt["past_key_values"] = StaticCache(
            config=config.get_text_config(decoder=True), max_cache_len=length + workload.steps
        )
    with torch.no_grad():
        found = model(**prompt)
    name = next((name for name in _CACHES if getattr(found, name, None) is not None), None)
    if name is None:
        raise PlanError(
            f"{type(model).__name__} gives no cache when it is called with use_cache=True, so decoding cannot be timed\n"
            '  go on      time "prefill" or "forward" alone'
        )
    cache = getattr(found, name)
    steps: list[dict[str, Any]] = []
    mask = prompt.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.dim() == 2:
        mask = torch.cat([mask, mask.new_ones(batch, workload.steps)], dim=1)
    for step in range(workload.steps):
        at = step % length
        steps.append({"input_ids": ids[:, at : at + 1].contiguous(), "use_cache": True})
        if isinstance(mask, torch.Tensor) and mask.dim() == 2:
            steps[-1]["attention_mask"] = mask[:, : length + step + 1]
    state = _CacheState(cache)

    def decode() -> torch.Tensor:
        state.put_back()
        held = cache
        with torch.no_grad():
            for step in steps:
                found = run(**step, **{name: held})
                held = getattr(found, name)
        state.settle()
        logits: torch.Tensor = found.logits[:, -1]
        return logits

    return decode


class _CacheState:
    """What a cache holds, to be put back before every run.

    Most caches replace their tensors by longer ones, so that it is enough to keep the tensors. Which ones they write into is
    seen after the first run; only those are copied back.
    """

    def __init__(self, cache: Any) -> None:
        self._containers: list[tuple[Any, Any]] = []
        self._slots: list[tuple[Any, dict[str, Any]]] = []
        self._tensors: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._settled = False
        self._look(cache, set())

    def _look(self, value: Any, seen: set[int]) -> None:
        if id(value) in seen or isinstance(value, (nn.Module, type, FunctionType, MethodType)):
            return
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            self._tensors.append((value, value.detach().clone()))
        elif isinstance(value, (dict, list)):
            self._containers.append((value, value.copy()))
            for item in value.values() if isinstance(value, dict) else value:
                self._look(item, seen)
        elif isinstance(value, tuple):
            for item in value:
                self._look(item, seen)
        elif hasattr(value, "__dict__"):
            self._look(vars(value), seen)
        else:
            names = [name for cls in type(value).__mro__ for name in getattr(cls, "__slots__", ())]
            kept = {name: getattr(value, name) for name in names if hasattr(value, name)}
            if kept:
                self._slots.append((value, kept))
                self._look(tuple(kept.values()), seen)

    @torch.no_grad()
    def put_back(self) -> None:
        for container, kept in self._containers:
            if isinstance(container, dict):
                container.clear()
                container.update(kept)
            else:
                container[:] = kept
        for value, attributes in self._slots:
            for name, kept in attributes.items():
                object.__setattr__(value, name, kept)
        for tensor, kept in self._tensors:
            tensor.copy_(kept)

    def settle(self) -> None:
        """After the first run: forget the tensors that it has not written into."""
        if not self._settled:
            self._tensors = [(tensor, kept) for tensor, kept in self._tensors if not torch.equal(tensor, kept)]
            self._settled = True


@contextmanager
def undisturbed(*models: nn.Module, training: bool | None = None) -> Iterator[None]:
    """Put models into a mode for the length of a `with` block, and leave them as they were: see below.

    Their modes, gradients, buffers and counts come back as they were, and so do the random states. Inside, no parameter has
    a gradient. Models may share parameters and buffers.

    Args:
        training: the mode inside of the block; None: as it is.
    """
    modules = list(dict.fromkeys(module for model in models for module in model.modules()))
    modes = [(module, module.training) for module in modules]
    roots = [model.training for model in models]
    gradients = {id(p): (p, p.grad) for model in models for p in model.parameters()}
    for parameter, _ in gradients.values():
        parameter.grad = None
    with user_random_state(), as_they_were(*models):
        try:
            if training is not None:
                for model in models:
                    model.train(training)
            yield
        finally:
            for model, was in zip(models, roots, strict=True):
                if model.training != was:
                    model.train(was)  # some models do more in it than to set a flag
            for module, was in modes:
                module.training = was
            for parameter, gradient in gradients.values():
                parameter.grad = gradient
