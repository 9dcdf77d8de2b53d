"""A GPT written by hand in plain PyTorch: recognised like any other, kernelized and taken back."""

from __future__ import annotations

import torch
from looking import assert_all_agree, look
from torch import Tensor, nn
from torch.nn import functional as F

import kernelwise as kw


class Root(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-5)).type_as(x) * self.g


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, s, w = x.shape
        q, k, v = self.qkv(x).view(b, s, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = rope(q, k, cos, sin)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, s, w))


def rope(a: Tensor, b: Tensor, c: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    def one(x: Tensor) -> Tensor:
        u, v = x.chunk(2, dim=-1)
        return x * c + torch.cat((-v, u), dim=-1) * s

    return one(a), one(b)


class Feed(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inside, self.outside = nn.Linear(width, 8 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.inside(x).chunk(2, dim=-1)
        return self.outside(left * F.silu(right))


class Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.one, self.mix, self.two, self.feed = Root(width), Attention(width, heads), Root(width), Feed(width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.mix(self.one(x), cos, sin)
        return x + self.feed(self.two(x))


class GPT(nn.Module):
    def __init__(self, words: int = 50, width: int = 32, heads: int = 4, depth: int = 3) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(depth))
        self.last, self.head = Root(width), nn.Linear(width, words, bias=False)
        self.turns = 10000 ** (-torch.arange(0, width // heads, 2) / (width // heads))

    def forward(self, ids: Tensor) -> Tensor:
        angles = torch.outer(torch.arange(ids.shape[1]), self.turns).repeat(1, 2)
        x = self.words(ids)
        for layer in self.layers:
            x = layer(x, angles.cos(), angles.sin())
        return self.head(self.last(x))


def test_layers_of_a_gpt_are_recognised_and_equal():
    counts, cases = look(GPT())
    assert counts == {
        ("Root", "rms_norm"): 7,
        ("Linear", "linear"): 13,
        ("Feed", "gated_mlp_packed"): 3,
        ("Layer", "decoder_layer"): 3,
        ("rope", "rotary_shared"): 3,
    }
    assert assert_all_agree(cases) == 5


def test_a_gpt_is_kernelized_and_taken_back():
    torch.manual_seed(0)
    model, ids = GPT().eval(), torch.arange(24).view(2, 12)
    with torch.no_grad():
        before = model(ids)
        kw.kernelize(model, {"RMSNorm": "builtin:RMSNorm"})
        assert len({row.path for row in kw.report(model).rows if row.kernel == "builtin:RMSNorm"}) == 7
        assert torch.allclose(model(ids), before, atol=1e-5)
        kw.unkernelize(model)
        assert torch.equal(model(ids), before)
