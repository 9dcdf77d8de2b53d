"""Softmax routers of mixtures of experts are recognised; look-alikes are told apart."""

from __future__ import annotations

import importlib

import pytest
import torch
from agreement import assert_agrees, randomize
from torch import nn
from torch.nn import functional as F

from kernelwise._data import Binding, Recognition
from kernelwise._recognize import Unknown, recognize

transformers = pytest.importorskip("transformers")


# model, class, its own config, options that tell the routers apart
ROUTERS = [
    ("qwen3_moe", "Qwen3MoeTopKRouter", {"norm_topk_prob": True}, ("softmax_first", True, "result")),
    ("qwen3_moe", "Qwen3MoeTopKRouter", {"norm_topk_prob": False}, ("softmax_first", False, "result")),
    ("olmoe", "OlmoeTopKRouter", {}, ("softmax_first", False, "result")),
    ("mixtral", "MixtralTopKRouter", {}, ("softmax_first", True, "float32")),
    ("granitemoe", "GraniteMoeTopKRouter", {}, ("top_k_first", False, "logits")),
    ("gpt_oss", "GptOssTopKRouter", {}, ("top_k_first", False, "own")),
    ("cohere2_moe", "Cohere2MoeTopKRouter", {}, ("top_k_first", False, "result")),
]


@pytest.mark.parametrize(("model_type", "class_name", "extra", "expected"), ROUTERS)
def test_routers_of_transformers(model_type, class_name, extra, expected):
    module = importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    config = transformers.AutoConfig.for_model(model_type, hidden_size=32, **extra)
    router = getattr(module, class_name)(config)
    answer = recognize(router)
    assert isinstance(answer, Recognition), answer
    assert answer.op == "softmax_router"
    options = dict(answer.options)
    assert (options["order"], options["normalize"], options["dtype"]) == expected
    assert dict(answer.roles)["top_k"] == Binding("attribute", "top_k")
    generator = torch.Generator().manual_seed(3)
    randomize(router, generator)
    assert_agrees(router, answer, {"hidden_states": torch.randn(10, 32, generator=generator)})


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.top_k = nn.Parameter(torch.randn(12, 32)), 3

    def logits(self, x):
        return F.linear(x.reshape(-1, 32), self.weight)

    def forward(self, x):
        logits = self.logits(x)
        values, indices = torch.topk(F.softmax(logits.float(), dim=-1), self.top_k, dim=-1)
        return logits, values / values.sum(dim=-1, keepdim=True), indices


def test_plain_router():
    answer = recognize(Router())
    assert isinstance(answer, Recognition)
    assert dict(answer.options)["normalize"] is True


class Sigmoid(Router):
    def forward(self, x):
        logits = self.logits(x)
        values, indices = torch.topk(torch.sigmoid(logits.float()), self.top_k, dim=-1)
        return logits, values / values.sum(dim=-1, keepdim=True), indices


class Smallest(Router):
    def forward(self, x):
        logits = self.logits(x)
        values, indices = torch.topk(F.softmax(logits.float(), dim=-1), self.top_k, dim=-1, largest=False)
        return logits, values / values.sum(dim=-1, keepdim=True), indices


class Fewer(Router):
    """One expert less where the answer would say `top_k`."""

    def forward(self, x):
        logits = self.logits(x)
        values, indices = torch.topk(F.softmax(logits.float(), dim=-1), self.top_k - 1, dim=-1)
        return logits, values / values.sum(dim=-1, keepdim=True), indices


class SumOfRows(Router):
    def forward(self, x):
        logits = self.logits(x)
        values, indices = torch.topk(F.softmax(logits.float(), dim=-1), self.top_k, dim=-1)
        return logits, values / values.sum(dim=0, keepdim=True), indices


class WithEps(Router):
    def forward(self, x):
        logits = self.logits(x)
        values, indices = torch.topk(F.softmax(logits.float(), dim=-1), self.top_k, dim=-1)
        return logits, values / (values.sum(dim=-1, keepdim=True) + 1e-6), indices


class NormalizedInBfloat16(Router):
    def forward(self, x):
        logits = self.logits(x)
        values, indices = torch.topk(F.softmax(logits.float(), dim=-1), self.top_k, dim=-1)
        values = values.to(logits.dtype)
        return logits, values / values.sum(dim=-1, keepdim=True), indices


class Noisy(Router):
    def logits(self, x):
        return super().logits(x + torch.rand_like(x) if self.training else x)


@pytest.mark.parametrize("cls", [Sigmoid, Smallest, Fewer, SumOfRows, WithEps, NormalizedInBfloat16])
def test_look_alikes(cls):
    answer = recognize(cls())
    assert isinstance(answer, Unknown), answer


def test_noise_in_training():
    assert isinstance(recognize(Noisy(), training=False), Recognition)
    assert isinstance(recognize(Noisy(), training=True), Unknown)
