"""Layers of real architectures: recognised as what they compute, and numerically equal to the reference."""

from __future__ import annotations

import importlib

import pytest
import torch
from agreement import assert_agrees, function_inputs, inputs_of, randomize
from packaging.version import Version

from kernelwise._data import Recognition
from kernelwise._recognize import plain_function, recognize, recognize_functions
from kernelwise.ops import layer_name

transformers = pytest.importorskip("transformers")

SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 128, "pad_token_id": 0, "head_dim": 16,
}  # fmt: skip


def build(model_type: str, **extra):
    config = transformers.AutoConfig.for_model(model_type, **{**SMALL, **extra})
    return transformers.AutoModelForCausalLM.from_config(config)


# model type → variant of its norm, activation of its MLP (None: it has no gated MLP of linears), rotary layout
MODELS = {
    "llama": ((0.0, "before"), "silu", "half"),
    "mistral": ((0.0, "before"), "silu", "half"),
    "qwen3": ((0.0, "before"), "silu", "half"),
    "smollm3": ((0.0, "before"), "silu", "half"),
    "gemma": ((1.0, "after"), "gelu_tanh", "half"),
    "gemma2": ((1.0, "after"), "gelu_tanh", "half"),
    "gemma3_text": ((1.0, "after"), "gelu_tanh", "half"),
    "olmo2": ((0.0, "after"), "silu", None),
    "olmo3": ((0.0, "after"), "silu", None),
    "gpt_oss": ((0.0, "after"), None, None),
    # Until some version after 5.13 it rounded before the weight: what counts is what the installed one computes.
    "nemotron_h": ((0.0, "before" if Version(transformers.__version__) < Version("5.14") else "after"), None, None),
}
EXTRA = {
    "gpt_oss": {"num_local_experts": 4},
    "nemotron_h": {"num_hidden_layers": 2, "layers_block_type": ["linear_attention", "full_attention"]},
}


def recognised(model):
    return [(path, module, answer) for path, module in model.named_modules()
            if isinstance(answer := recognize(module), Recognition)]  # fmt: skip


@pytest.mark.parametrize("model_type", MODELS)
def test_named_models(model_type):
    variant, activation, layout = MODELS[model_type]
    model = build(model_type, **EXTRA.get(model_type, {}))
    found = recognised(model)
    norms = [m for m in model.modules() if type(m).__name__.endswith("RMSNorm")]
    answers = [answer for _, _, answer in found if answer.op == "rms_norm"]
    assert len(answers) == len(norms) > 0
    assert {(dict(a.options)["offset"], dict(a.options)["cast"]) for a in answers} == {variant}
    mlps = [answer for _, _, answer in found if answer.op == "gated_mlp"]
    assert {dict(a.options)["activation"] for a in mlps} == ({activation} if activation else set())
    assert sum(answer.op == "linear" for _, _, answer in found) == sum(
        type(m) is torch.nn.Linear for m in model.modules()
    )
    functions = [answer for m in model.modules() for _, answer in recognize_functions(m) if answer.op == "rotary"]
    if layout is not None:
        assert {dict(a.options)["layout"] for a in functions} == {layout}
        assert len(functions) == 2


@pytest.mark.parametrize("model_type", MODELS)
def test_agrees_with_the_reference(model_type):
    generator = torch.Generator().manual_seed(5)
    model = build(model_type, **EXTRA.get(model_type, {})).eval()
    seen = set()
    for _, module, answer in recognised(model):
        if (type(module), answer) not in seen:
            seen.add((type(module), answer))
            randomize(module, generator)
            assert_agrees(module, answer, inputs_of(module, answer, generator))
    for module in model.modules():
        for name, answer in recognize_functions(module):
            function = plain_function(type(module).forward.__globals__[name])
            if function not in seen:
                seen.add(function)
                given = function_inputs(function, answer, generator)
                assert_agrees(torch.nn.Module(), answer, given, call=function)


def test_layer_names():
    names = {layer_name(answer) for _, _, answer in recognised(build("llama"))}
    assert names == {"DecoderLayer", "Linear", "RMSNorm", "SwiGLUMLP", "SiLU"}
    assert "GEGLUMLP" in {layer_name(answer) for _, _, answer in recognised(build("gemma"))}
    llama = importlib.import_module("transformers.models.llama.modeling_llama")
    (found,) = [a for n, a in recognize_functions(build("llama").model.layers[0].self_attn)]
    assert layer_name(found) == "rotary_pos_emb"
    assert plain_function(llama.apply_rotary_pos_emb).__name__ == "apply_rotary_pos_emb"


# What is left of ACT2FN: two with parameters, the identity, and one whose constants are arguments.
NO_ACTIVATION = {"prelu", "xielu", "linear", "laplace"}


def test_every_activation_of_transformers_is_recognised_and_equal():
    activations = transformers.activations.ACT2FN
    generator = torch.Generator().manual_seed(5)
    unknown = set()
    for name in activations:
        layer = activations[name]
        answer = recognize(layer)
        if not isinstance(answer, Recognition):
            unknown.add(name)
            continue
        assert answer.op == "activation"
        (_, x), *_ = answer.roles
        assert_agrees(layer, answer, {str(x.value): 3 * torch.randn(4, 64, generator=generator)})
    assert unknown <= NO_ACTIVATION


def test_transformers_conv1d_is_no_linear():
    layer = transformers.pytorch_utils.Conv1D(24, 24)
    assert not isinstance(recognize(layer), Recognition)


def test_t5_norm_casts_to_its_weight():
    layer = transformers.models.t5.modeling_t5.T5LayerNorm(32)
    answer = recognize(layer)
    assert isinstance(answer, Recognition)
    assert dict(answer.options) == {"offset": 0.0, "cast": "weight"}
    generator = torch.Generator().manual_seed(5)
    randomize(layer, generator)
    assert_agrees(layer, answer, inputs_of(layer, answer, generator))
