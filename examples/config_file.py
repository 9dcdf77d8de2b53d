"""Keep the mapping in a file, check it against a model, and read what is wrong with another."""

import tempfile
from pathlib import Path

from transformers import GemmaConfig, GemmaForCausalLM

import kernelwise as kw

model = GemmaForCausalLM(GemmaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=1000))

file = Path(tempfile.mkdtemp()) / "kernels.toml"
config = kw.KernelConfig({"RMSNorm": {"cuda": "builtin:RMSNorm"}, "GEGLUMLP": "none"})
config.save(file)
print(file.read_text())

loaded = kw.KernelConfig.load(file)
assert loaded == config
print(kw.plan(model, loaded))

try:
    kw.plan(model, {"RMSNrom": "builtin:RMSNorm", "GEGLUMLP": ("org/repo:MLP", {"versoin": 1})})
except kw.KernelConfigError as error:
    print(error)
