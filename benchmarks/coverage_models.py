"""The models of transformers without their weights: every model type, built small, and what is recognised in it.

Models are built from their default configs on the meta device, so nothing is downloaded and no memory is needed.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib
import inspect
import itertools
import multiprocessing
import os
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("OMP_NUM_THREADS", "1")
warnings.filterwarnings("ignore")

import torch  # noqa: E402
import transformers  # noqa: E402
from torch import nn  # noqa: E402
from transformers.models.auto import modeling_auto  # noqa: E402

from kernelwise._data import Recognition  # noqa: E402
from kernelwise._recognize import Unknown, functions_called, plain_function, recognize, recognize_functions  # noqa: E402
from kernelwise._recognize._children import record_calls  # noqa: E402
from kernelwise.ops import OPERATIONS  # noqa: E402

HERE = Path(__file__).parent
HEADS = (
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES", "MODEL_FOR_PRETRAINING_MAPPING_NAMES", "MODEL_MAPPING_NAMES",
)  # fmt: skip
SECONDS = 300  # for one model type
LARGEST = 4_000_000  # parameters of a layer that is run


def model_types() -> dict[str, tuple[str, ...]]:
    """Model type → the classes to build it with, the best first."""
    found: dict[str, list[str]] = {}
    for table in HEADS:
        for model_type, cls in getattr(modeling_auto, table, {}).items():
            found.setdefault(model_type, []).append(cls if isinstance(cls, str) else cls[0])
    return {name: tuple(found[name]) for name in sorted(found)}


def folder_of(class_name: str) -> str | None:
    """The folder of the modeling file of a model class; None for one that this installation cannot import."""
    with contextlib.suppress(Exception):
        return str(getattr(transformers, class_name).__module__).split(".")[-2]
    return None


def build(model_type: str, class_names: tuple[str, ...]) -> nn.Module:
    """The model with its default config and a few layers, without memory, from the first class that can be built."""
    problem: Exception | None = None
    for class_name in class_names:
        try:
            return build_class(model_type, class_name)
        except Exception as error:
            problem = problem or error
    assert problem is not None
    raise problem


def build_class(model_type: str, class_name: str) -> nn.Module:
    config = transformers.CONFIG_MAPPING[model_type]()
    for part in (config, *(getattr(config, field.name, None) for field in dataclasses.fields(config))):
        if isinstance(part, transformers.PreTrainedConfig):
            shorten(part)
    cls = getattr(transformers, class_name)
    with torch.device("meta"):
        model: nn.Module = cls(config)
    return model


def shorten(config: transformers.PreTrainedConfig) -> None:
    """Keep one layer of each kind, and two at least."""
    count = getattr(config, "num_hidden_layers", None)
    kinds = getattr(config, "layer_types", None)
    if not isinstance(count, int) or kinds is not None:
        return
    with contextlib.suppress(Exception):
        config.num_hidden_layers = min(count, 6)


class Row(NamedTuple):
    """A class or a function (`model.Name`): what it is, or why that is not known; whether transformers registers it."""

    name: str
    op: str | None
    tagged: bool = False
    reason: str | None = None


def row(name: str, answer: Recognition | Unknown, *, tagged: bool = False) -> Row:
    if isinstance(answer, Recognition):
        return Row(name, answer.op, tagged)
    return Row(name, None, tagged, answer.reason)


def rows_of(model: nn.Module) -> Iterator[Row]:
    """One row for each answer about a class or a function of a model."""
    seen = set()
    for module in model.modules():
        cls = type(module)
        answer = recognize(module, training=False)
        op = answer.op if isinstance(answer, Recognition) else None
        if (cls, op) not in seen:
            seen.add((cls, op))
            yield row(name_of(cls.__module__, cls.__name__), answer, tagged=hasattr(cls, "kernel_layer_name"))
        forward = plain_function(cls.forward)
        if forward is None or forward in seen:
            continue
        seen.add(forward)
        for name, function, found in functions_called(module):
            if re.match(r"(vision_)?apply_.*rot", name):
                tagged = isinstance(forward.__globals__[name], nn.Module)
                yield row(name_of(function.__module__, name), found, tagged=tagged)


def name_of(module: str, name: str) -> str:
    return f"{module.rpartition('.')[2].removeprefix('modeling_')}.{name}"


CRASHED = "recognition failed: "
Look = tuple[str, list[Row], str | None]  # the model type, its rows, what went wrong


def look(model_type: str, class_names: tuple[str, ...]) -> Look:
    """What is recognised in a model type, or why it cannot be looked at."""
    torch.set_num_threads(1)
    begun = ""
    try:
        model = build(model_type, class_names)
        begun = CRASHED
        return model_type, list(rows_of(model)), None
    except Exception as error:
        first = str(error).splitlines()[0][:100] if str(error) else ""
        return model_type, [], f"{begun}{type(error).__name__}: {first}"


def classes_alone(names: list[str]) -> list[Row]:
    """What the classes of a list are that stand in no model built here, each built alone; those that can be."""
    found = []
    for name in names:
        stem, _, class_name = name.partition(".")
        for file in Path(transformers.__file__).parent.glob(f"models/*/modeling_{stem}.py"):
            try:
                module = importlib.import_module(f"transformers.models.{file.parent.name}.{file.stem}")
            except ImportError:
                continue
            layer = build_alone(module, getattr(module, class_name))
            if layer is not None:
                found.append(row(name, recognize(layer, training=False)))
    return found


# For sizes that a default config leaves open.
SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "shared_intermediate_size": 96,
    "shared_expert_intermediate_size": 96, "hidden_size_per_layer_input": 32, "num_attention_heads": 4, "head_dim": 16,
    "num_key_value_heads": 2, "n_routed_experts": 4, "num_experts": 4, "num_local_experts": 4, "top_k_experts": 2,
    "n_shared_experts": 1, "num_experts_per_tok": 2, "num_fwd_mem_blocks": 1,
}  # fmt: skip


def build_alone(module: Any, cls: type[nn.Module]) -> nn.Module | None:
    """A layer from the first config of its model that its constructor takes, as it is or with its open sizes filled in."""
    bases = (transformers.PreTrainedConfig,)
    configs = [c for c in vars(module).values() if isinstance(c, type) and issubclass(c, bases) and c not in bases]
    made: list[Any] = []
    for config_class in configs:
        with contextlib.suppress(Exception):
            config = config_class()
            made += [config, *(part for part in vars(config).values() if isinstance(part, bases))]
    parameters = inspect.signature(cls.__init__).parameters.values()
    needed = [p for p in list(parameters)[1:] if p.default in (p.empty, None) and p.kind is p.POSITIONAL_OR_KEYWORD]
    tried = itertools.product((False, True), [*made, *map(filled, made)] or [None])
    for with_sizes, config in tried:  # a size that need not be given: only where the layer cannot be built without
        values = {
            p.name: argument(p, config) for p in needed if with_sizes or p.default is p.empty or "size" not in p.name
        }
        with contextlib.suppress(Exception), torch.device("meta"):
            layer = cls(**{name: value for name, value in values.items() if value is not None})
            if all(parameter.numel() for parameter in layer.parameters()):
                return layer
    return None


def filled(config: Any) -> Any:
    """A copy of a config without open sizes, and with those that its model reads and that it does not have."""
    config = copy.deepcopy(config)
    for name, size in SMALL.items():
        with contextlib.suppress(Exception):
            if getattr(config, name, None) in (None, 0):
                setattr(config, name, size)
    for name, kind in (("layer_types", "full_attention"), ("mlp_layer_types", "dense")):
        with contextlib.suppress(Exception):
            if getattr(config, name, kind) is None:
                setattr(config, name, [kind] * config.num_hidden_layers)
    return config


def argument(parameter: inspect.Parameter, config: Any) -> Any:
    """What to give a constructor for one of its parameters; None to give nothing."""
    name = parameter.name
    if "config" in name:
        return config
    if "idx" in name:
        return 0
    if "act" in name:
        return "gelu" if parameter.default is parameter.empty else None
    return 64 if parameter.default is parameter.empty or name.endswith("size") else None


_compared: set[object] = set()  # what this process has run: a class that many models share is run once


def disagreements(model_type: str, class_names: tuple[str, ...]) -> tuple[str, int, list[str]]:
    """How many recognised layers and functions of a model were compared with their references, and which differ.

    In layers of a model, blocks of one weight stand for children that the layer only hands arguments and results to.
    """
    sys.path[:0] = [str(HERE.parent / "tests"), str(HERE.parent / "tests" / "recognize")]
    agreement = importlib.import_module("agreement")
    torch.set_num_threads(1)
    number = 0
    wrong: list[str] = []
    try:
        model = build(model_type, class_names).eval()
    except Exception:
        return model_type, 0, []
    for module in model.modules():
        cases: list[tuple[object, Recognition, object]] = []
        answer = recognize(module, training=False)
        if isinstance(answer, Recognition) and size_of(module, answer) < LARGEST:
            cases.append((type(module), answer, None))
        for name, found in recognize_functions(module):
            function = plain_function(plain_function(type(module).forward).__globals__[name])
            cases.append((function, found, function))
        for what, found, function in cases:
            if (what, found) in _compared:
                continue
            _compared.add((what, found))
            number += 1
            generator = torch.Generator().manual_seed(3)
            is_whole = function is None and bool(OPERATIONS[found.op].norms)
            layer = nn.Module() if function else module if is_whole else copy.deepcopy(module).to_empty(device="cpu")
            try:
                if not is_whole:
                    agreement.randomize(layer, generator)
                make = agreement.function_inputs if function else agreement.inputs_of
                agreement.assert_agrees(layer, found, make(function or layer, found, generator), call=function)
            except Exception as error:
                name = getattr(function, "__qualname__", type(module).__name__)
                wrong.append(f"{name} as {found.op} {dict(found.options)}: {type(error).__name__}: {str(error)[:200]}")
    return model_type, number, wrong


def size_of(module: nn.Module, found: Recognition) -> int:
    """How many parameters a layer has, without children that only something is handed to."""
    calls = record_calls(module, training=False)[0] if OPERATIONS[found.op].norms else ()
    handed = {id(p) for call in calls if call.is_open for p in module.get_submodule(call.path).parameters()}
    return sum(parameter.numel() for parameter in module.parameters() if id(parameter) not in handed)


def registered(names: list[str]) -> set[str]:
    """Those of the listed classes and functions that transformers registers for kernels."""
    found = set()
    for name in names:
        stem, _, own_name = name.partition(".")
        for file in Path(transformers.__file__).parent.glob(f"models/*/modeling_{stem}.py"):
            with contextlib.suppress(ImportError):
                module = importlib.import_module(f"transformers.models.{file.parent.name}.{file.stem}")
                if hasattr(getattr(module, own_name, None), "kernel_layer_name"):
                    found.add(name)
    return found


def functions_alone(names: list[str]) -> list[Row]:
    """What the functions of a list are, looked at without a model around them."""
    found = []
    for name in names:
        stem, _, function_name = name.partition(".")
        for file in Path(transformers.__file__).parent.glob(f"models/*/modeling_{stem}.py"):
            with contextlib.suppress(ImportError):
                module = importlib.import_module(f"transformers.models.{file.parent.name}.{file.stem}")
                space = {**vars(module)}
                exec(f"def forward(self): {function_name}()", space)
                holder = type("Holder", (nn.Module,), {"forward": space["forward"]})()
                found += [
                    row(name, answer) for called, _, answer in functions_called(holder) if called == function_name
                ]
    return found


def run(look: Any, types: dict[str, tuple[str, ...]], jobs: int) -> list[Any]:
    """Look at every model type, in processes that can be given up on."""
    results: list[Any] = []
    with multiprocessing.get_context("fork").Pool(jobs, maxtasksperchild=20) as pool:
        waiting = [(name, pool.apply_async(look, (name, cls))) for name, cls in types.items()]
        for number, (name, result) in enumerate(waiting):
            try:
                results.append(result.get(SECONDS))
            except multiprocessing.TimeoutError:
                results.append((name, [], f"not done in {SECONDS} s"))
            print(f"\r{number + 1}/{len(waiting)} {name:40s}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return results
