"""Decide on a laptop what will run on a GPU: the model stays on the meta device, kernels are described, not loaded."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kernelwise as kw

with torch.device("meta"):  # 8 billion parameters, no memory
    model = LlamaForCausalLM(LlamaConfig(hidden_size=4096, intermediate_size=14336, num_key_value_heads=8)).bfloat16()

config = kw.KernelConfig({"RMSNorm@model.layers.0.*": "none"})
for arch in ("sm_75", "sm_90"):
    print(f"--- {arch}")
    print(kw.plan(model, config, target=kw.Target("cuda", arch=arch)))
