"""Models of timm and diffusers: what is recognised in them, each equal to its reference."""

from __future__ import annotations

import pytest
import torch
from looking import assert_all_agree, look

timm = pytest.importorskip("timm")
diffusers = pytest.importorskip("diffusers")

TIMM = {
    "vit_tiny_patch16_224": {("LayerNorm", "layer_norm"): 25, ("Mlp", "mlp"): 12, ("Block", "decoder_layer"): 12},
    "eva02_tiny_patch14_224": {("GluMlp", "gated_mlp_packed"): 12, ("EvaBlock", "decoder_layer"): 12},
    "swin_tiny_patch4_window7_224": {("LayerNorm", "layer_norm"): 29, ("Mlp", "mlp"): 12},
    "convnext_tiny": {("LayerNorm", "layer_norm"): 18, ("Mlp", "mlp"): 18},
    "aimv2_large_patch14_224": {
        ("RmsNorm", "rms_norm"): 50,
        ("SwiGLU", "gated_mlp"): 24,
        ("Block", "decoder_layer"): 24,
    },
    "resnet18": {("Linear", "linear"): 1},
}
ONE_LAYER = {"num_layers": 1}
DIFFUSERS = {
    "FluxTransformer2DModel": (
        {"num_layers": 1, "num_single_layers": 1},
        {("RMSNorm", "rms_norm"): 6, ("GELU", "linear_activation"): 2, ("PixArtAlphaTextProjection", "mlp"): 1},
    ),
    "WanTransformer3DModel": (ONE_LAYER, {("RMSNorm", "rms_norm"): 4, ("FP32LayerNorm", "layer_norm"): 4}),
    "SD3Transformer2DModel": (ONE_LAYER, {("LayerNorm", "layer_norm"): 4, ("PixArtAlphaTextProjection", "mlp"): 1}),
    "LTXVideoTransformer3DModel": (ONE_LAYER, {("RMSNorm", "rms_norm"): 6, ("Linear", "linear"): 17}),
    "AutoencoderKL": ({}, {("SiLU", "activation"): 9}),
}


def assert_found(model: torch.nn.Module, expected: dict[tuple[str, str], int]) -> None:
    counts, cases = look(model)
    assert {key: counts[key] for key in expected} == expected
    assert assert_all_agree(cases) > 0


@pytest.mark.parametrize("name", TIMM)
def test_timm(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert_found(model, TIMM[name])


@pytest.mark.parametrize("name", DIFFUSERS)
def test_diffusers(name):
    arguments, expected = DIFFUSERS[name]
    with torch.device("meta"):
        model = getattr(diffusers, name)(**arguments)
    assert_found(model, expected)
