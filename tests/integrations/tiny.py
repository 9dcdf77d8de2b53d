"""Small random models of transformers, and kernel repositories to put into them. Two versions of transformers run this.

A `Marked` kernel adds 1000 to what the layer's own code gives, so that an output alone tells which code ran.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from fakehub import kernel_files, write_files
from torch import nn
from transformers.utils.import_utils import is_kernels_available

from kernelwise.integrations.transformers import KernelConfig

ACCEPTED = is_kernels_available()
"""Whether this transformers accepts the installed kernels library; its registrations are dead where it does not."""

IDS = torch.tensor([[1, 2, 3, 4, 5, 6, 7]])

LAYERS = """
import torch
from torch import nn


class GoodNorm(nn.Module):
    can_torch_compile = True

    def forward(self, hidden_states):
        wide = hidden_states.float()
        hat = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * hat.to(hidden_states.dtype)


class MarkedNorm(nn.Module):
    can_torch_compile = True

    def forward(self, hidden_states):
        wide = hidden_states.float()
        hat = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * hat.to(hidden_states.dtype) + 1000


class LosesGradient(nn.Module):
    def forward(self, hidden_states):
        hidden_states = hidden_states.detach()
        hat = hidden_states * torch.rsqrt(hidden_states.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight.detach() * hat + 1000


class ForwardOnly(LosesGradient):
    has_backward = False

    def forward(self, hidden_states):
        hidden_states = hidden_states.detach()
        hat = hidden_states * torch.rsqrt(hidden_states.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight.detach() * hat + 1000


class MarkedRotary(nn.Module):
    def forward(self, q, k, cos, sin, unsqueeze_dim=1):
        return q + 1000, k - 1000
"""


def repository(folder: Path, name: str = "norm", *, layers: str = LAYERS) -> Path:
    """Write a kernel repository for every device and return its folder."""
    return write_files(folder / name, kernel_files(name, layers=layers))


def config_of(model_type: str, **changes: Any) -> Any:
    """A config of a few thousand parameters, in which dimensions that a mistake could mix up differ."""
    sizes = {
        "vocab_size": 48, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": None,
    }  # fmt: skip
    if model_type == "gpt_oss":
        sizes |= {"num_local_experts": 4, "num_experts_per_tok": 2}
    return transformers.AutoConfig.for_model(model_type, **(sizes | changes))


def build(model_type: str = "llama", **changes: Any) -> Any:
    """A seeded model in eval mode whose weights are not all ones anywhere."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config_of(model_type, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) / 4)
    return model.eval()


def only(kernel_mapping: dict[Any, Any], **options: Any) -> KernelConfig:
    """A config that offers no builtin kernels beside what it names, and takes the test's word for those."""
    return KernelConfig(kernel_mapping, inherit_mapping=False, **{"verify": False, **options})


def logits(model: nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        output: torch.Tensor = model(ids).logits
    return output
