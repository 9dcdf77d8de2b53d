"""Put kernels into a model, see what runs, take them out again."""

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

import kernelwise as kw

torch.manual_seed(0)
config = Qwen3Config(
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
)
model = Qwen3ForCausalLM(config).eval()
ids = torch.randint(0, 1000, (1, 64))

with torch.no_grad():
    own = model(ids).logits
    with kw.kernelized(model):
        kernels = model(ids).logits
        print(kw.report(model))
    again = model(ids).logits

print(f"largest difference with kernels: {(kernels - own).abs().max():.1e}")
print(f"identical after undo: {torch.equal(again, own)}")
