"""MODEL of the command line → a model that can run, on its device, and inputs for it.

To look at a model its config is enough (`_models`); to time it, it must have weights: its own, or random ones, which are as
fast.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from kernelwise._errors import KernelwiseError, said
from kernelwise._models import (
    FORMS,
    HUB_ID,
    NamedModel,
    config_class,
    config_of,
    from_factory,
    instantiate,
    load_model,
    named_object,
    no_directory,
    place_of,
    small_config,
    transformers_library,
)


def load_with_weights(
    spec: str, *, dtype: str | None = None, device: str | None = None, full: bool = False, layers: int | None = None
) -> NamedModel:
    """Turn MODEL into a model in eval mode that can run, on a device.

    Args:
        spec: as for `load_model`. A directory or a Hub id gives its own weights, which are downloaded where they are not
            there yet; a directory with a config alone, and a model type, give random ones.
        dtype: as for `load_model`.
        device: such as "cpu" or "cuda"; None: the accelerator of this machine, else the CPU.
        full: build a model type in the sizes of its config's defaults, not small.
        layers: build it with so many hidden layers.

    Raises:
        KernelwiseError: there is no such model or device, or it cannot be built; the message says what was tried.
        MissingDependencyError: the model needs transformers, which is not installed.
    """
    place, path = _place(device), place_of(spec)
    if ":" in spec and not path.is_dir():
        if full or layers is not None:
            raise KernelwiseError(f"{spec} is built by its factory alone\n  go on      leave out --full and --layers")
        named = from_factory(spec, dtype)
        if any(tensor.is_meta for tensor in (*named.model.parameters(), *named.model.buffers())):
            raise KernelwiseError(
                f"{spec} gave a model without weights (on the meta device), which cannot run\n"
                "  go on      build it on the CPU, or give it memory: model.to_empty(device=...)"
            )
        return NamedModel(named.model.to(place), named.notes)
    if HUB_ID.fullmatch(spec) or path.is_dir():
        if full:
            raise KernelwiseError(f"{spec} has its own sizes\n  go on      leave out --full")
        return _trained(spec, dtype, place, layers)
    if "/" in spec or "\\" in spec:
        raise no_directory(spec, path)
    if not full and layers is None:
        named = load_model(spec, dtype=dtype)
        return NamedModel(named.model.to(place), named.notes)
    return _of_type(spec, dtype, place, full, layers)


def _place(device: str | None) -> torch.device:
    found = torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        return torch.device("cpu") if found is None else found
    kind = "cuda" if device == "rocm" else device  # as torch calls it
    try:
        wanted = torch.device(kind)
    except RuntimeError:  # torch knows no such device
        wanted = None
    if wanted is None or (wanted.type != "cpu" and (found is None or wanted.type != found.type)):
        raise KernelwiseError(
            f"this machine has no {device} that PyTorch can use\n"
            f"  go on      leave --device out, or take {'cpu' if found is None else f'{found.type} or cpu'}"
        )
    return wanted


def _trained(spec: str, dtype: str | None, place: torch.device, layers: int | None) -> NamedModel:
    """Load the weights of a directory or a Hub id; a directory that has none gets random ones."""
    transformers = transformers_library()
    directory = Path(os.path.expanduser(spec))
    source = str(directory) if directory.is_dir() else spec
    config = config_of(transformers, source)
    wanted = dtype or str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    notes = _cut(config, layers)
    if directory.is_dir() and not _has_weights(directory):
        return _random(transformers, config, wanted, place, spec, (*notes, "random weights: the directory has none"))
    named = next((getattr(transformers, name, None) for name in getattr(config, "architectures", None) or ()), None)
    if named is None:
        is_causal = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
        named = transformers.AutoModelForCausalLM if is_causal else transformers.AutoModel
    transformers.utils.logging.disable_progress_bar()
    try:
        model = named.from_pretrained(source, config=config, dtype=wanted)
    except Exception as error:
        raise KernelwiseError(
            f"cannot load the weights of {spec!r}: {said(error)}\n"
            "  go on      get them again if they are not whole; kernelwise layers and plan work without them"
        ) from error
    return NamedModel(model.to(place).eval(), notes)


def _has_weights(directory: Path) -> bool:
    return any(file.suffix in (".safetensors", ".bin") for file in directory.iterdir())


def _of_type(spec: str, dtype: str | None, place: torch.device, full: bool, layers: int | None) -> NamedModel:
    transformers = transformers_library()
    cls = config_class(transformers, spec)
    try:
        config = cls() if full else small_config(cls)
    except Exception as error:
        raise KernelwiseError(f"no {spec} can be built from a config alone: {said(error)}\n{FORMS}") from error
    notes = _cut(config, layers)
    size = "with the sizes of its config's defaults" if full else "small"
    return _random(transformers, config, dtype or "float32", place, spec, (*notes, f"random weights, {size}"))


def _cut(config: Any, layers: int | None) -> tuple[str, ...]:
    """Change how many hidden layers a config asks for; return what is to be said about it."""
    if layers is None:
        return ()
    text = config.get_text_config(decoder=True)
    had = getattr(text, "num_hidden_layers", None)
    if not isinstance(had, int) or layers < 1:
        raise KernelwiseError(
            f"its number of layers cannot be set to {layers}: its config has num_hidden_layers={had}\n"
            "  go on      leave out --layers"
        )
    text.num_hidden_layers = layers
    kinds = getattr(text, "layer_types", None)
    if kinds:
        text.layer_types = [kinds[at % len(kinds)] for at in range(layers)]
    return (f"{layers} hidden layers, where its config has {had}",) if layers != had else ()


def _random(
    transformers: Any, config: Any, dtype: str, place: torch.device, spec: str, notes: tuple[str, ...]
) -> NamedModel:
    devices = range(torch.cuda.device_count()) if place.type == "cuda" else ()
    with torch.random.fork_rng(devices=devices), place:
        torch.manual_seed(0)
        model = instantiate(transformers, config, dtype, spec)
    return NamedModel(model.to(place), notes)


def make_inputs(model: nn.Module, *, batch: int, tokens: int) -> dict[str, torch.Tensor]:
    """Return inputs for a model of transformers: random token ids `[batch, tokens]`, or random images where it takes images.

    The user's random state stays as it is.

    Raises:
        KernelwiseError: it is not known what the model is called with.
    """
    config: Any = getattr(model, "config", None)
    name = getattr(model, "main_input_name", None)
    place = next((parameter for parameter in model.parameters()), torch.empty(0))
    random = torch.Generator().manual_seed(0)
    size = getattr(config, "image_size", None)
    if name == "input_ids" and isinstance(getattr(config.get_text_config(), "vocab_size", None), int):
        vocabulary = config.get_text_config().vocab_size
        ids = torch.randint(0, vocabulary, (batch, tokens), generator=random)
        special = {
            v for k, v in config.to_dict().items() if k.endswith(("_token_id", "_token_index")) and type(v) is int
        }
        plain = next((at for at in range(vocabulary) if at not in special), 0)
        for taken in special:  # an image's token would ask for an image, padding ends a text
            ids[ids == taken] = plain
        ids = ids.to(place.device)
        return {"input_ids": ids, "decoder_input_ids": ids} if config.is_encoder_decoder else {"input_ids": ids}
    if name == "pixel_values" and isinstance(size, int):
        shape = (batch, getattr(config, "num_channels", 3), size, size)
        return {"pixel_values": torch.randn(shape, generator=random).to(place)}
    raise KernelwiseError(
        f"it is not known what {type(model).__name__} is called with\n"
        "  go on      --inputs module:factory, a function that returns a dict, a tuple or one argument"
    )


def load_inputs(spec: str, model: nn.Module) -> Any:
    """Return what `module:factory` gives, on the device of the model. Raises `KernelwiseError` where it fails."""
    found = named_object(spec, go_on="  go on      --inputs module:factory names a function that takes no arguments")
    if callable(found):
        try:
            found = found()
        except Exception as error:
            raise KernelwiseError(
                f"{spec} failed: {said(error)}\n  go on      name a function that takes no arguments"
            ) from error
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    return tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), found)


def check_runs(model: nn.Module, inputs: Any) -> None:
    """Call a model once, so that inputs that do not fit are known first. Raises `KernelwiseError` where it fails."""
    try:
        with torch.no_grad():
            if isinstance(inputs, Mapping):
                model(**inputs)
            else:
                model(*(inputs if isinstance(inputs, tuple) else (inputs,)))
    except Exception as error:
        raise KernelwiseError(
            f"{type(model).__name__} fails on its inputs: {said(error)}\n"
            "  go on      --inputs module:factory gives others: a dict, a tuple or one argument"
        ) from error
