"""The gated MLP on the GPU: the product between its projections is computed again in backward, not kept."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.gpu

ROWS, WIDTH, INNER = 1000, 256, 4096
PRODUCT = ROWS * INNER * 2  # bytes


class Block(torch.nn.Module):
    def __init__(self, dtype: torch.dtype = torch.bfloat16, recompute: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.up = (torch.nn.Linear(WIDTH, INNER, False, "cuda", dtype) for _ in range(2))
        self.down = torch.nn.Linear(INNER, WIDTH, False, "cuda", dtype)
        if not recompute:  # whoever has a hook on what goes into the layer gets it as it is
            self.down.register_forward_pre_hook(lambda *_: None)

    def forward(self, x: torch.Tensor, activation: str = "silu") -> torch.Tensor:
        from kernelwise.kernels.triton.gated_mlp import gated_mlp

        return gated_mlp(x, self.gate, self.up, self.down, activation=activation)


def given(dtype: torch.dtype = torch.bfloat16, rows: int = ROWS) -> torch.Tensor:
    return torch.randn(1, rows, WIDTH, device="cuda", generator=torch.Generator("cuda").manual_seed(1)).to(dtype)


def gradients(block: Block, call: Callable[..., torch.Tensor], x: torch.Tensor, times: int = 1) -> list[torch.Tensor]:
    block.zero_grad(set_to_none=True)
    leaf = x.detach().requires_grad_()
    loss = call(leaf).float().square().mean()
    for _ in range(times):
        loss.backward(retain_graph=times > 1)
    return [leaf.grad, *(p.grad for p in block.parameters())]


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_same_bits(dtype: torch.dtype, activation: str) -> None:
    for rows in (1, 37, ROWS):
        kept, again = Block(dtype, recompute=False), Block(dtype)
        x = given(dtype, rows)
        own = gradients(kept, lambda t, kept=kept: kept(t, activation), x)
        ours = gradients(again, lambda t, again=again: again(t, activation), x)
        assert all(map(torch.equal, ours, own))
        twice = gradients(again, lambda t, again=again: again(t, activation), x, times=2)
        assert all(torch.equal(a, 2 * b) for a, b in zip(twice, own, strict=True))


def in_use(when: str = "current") -> int:
    """Bytes that were asked for: what the allocator gives out may be more, by what lies free in this process."""
    torch.cuda.synchronize()
    return torch.cuda.memory_stats()[f"requested_bytes.all.{when}"]


def test_memory_between_forward_and_backward() -> None:
    held = {}
    for recompute in (False, True):
        block, x = Block(recompute=recompute), given().requires_grad_()
        block(x).sum().backward()  # everything is compiled
        before = in_use()
        y = block(x)
        held[recompute] = in_use() - before
        y.sum().backward()
        del y
    assert held[False] - held[True] == pytest.approx(PRODUCT, rel=0.01)


def test_memory_at_its_peak_in_a_stack() -> None:
    """Of four blocks, backward holds the product of one at a time."""
    peaks = {}
    for recompute in (False, True):
        blocks = torch.nn.ModuleList(Block(recompute=recompute) for _ in range(4))

        def step(blocks: torch.nn.ModuleList = blocks) -> None:
            x = given()
            for block in blocks:
                x = x + block(x)
            x.sum().backward()
            blocks.zero_grad(set_to_none=True)

        step()
        before = in_use()
        torch.cuda.reset_peak_memory_stats()
        step()
        peaks[recompute] = in_use("peak") - before
    assert peaks[False] - peaks[True] >= 2.9 * PRODUCT


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool) -> None:
    block, x = Block(), given()
    own = gradients(block, block, x)
    ours = gradients(block, lambda t: checkpoint(block, t, use_reentrant=reentrant), x)
    assert all(map(torch.equal, ours, own))


def test_second_derivatives() -> None:
    def penalty(act: Callable[[torch.Tensor], torch.Tensor]) -> tuple[torch.Tensor, ...]:
        leaf = given(torch.float32, 8).requires_grad_()
        (first,) = torch.autograd.grad(act(leaf).square().sum(), block.down.weight, create_graph=True)
        return torch.autograd.grad(first.square().sum(), (leaf, *block.parameters()))

    block = Block(torch.float32)
    own = penalty(lambda t: block.down(F.silu(block.gate(t)) * block.up(t)))
    for new, expected in zip(penalty(block), own, strict=True):
        torch.testing.assert_close(new, expected, rtol=1e-3, atol=1e-4)


def test_compiled_and_captured() -> None:
    block, x = Block(), given()
    own = gradients(block, block, x)
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True)
    for new, expected in zip(gradients(block, compiled, x), own, strict=True):
        torch.testing.assert_close(new, expected, rtol=0.05, atol=1e-5)
    leaf = x.detach().requires_grad_()
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.autograd.grad(block(leaf).float().square().mean(), (leaf, *block.parameters()))
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            captured = torch.autograd.grad(block(leaf).float().square().mean(), (leaf, *block.parameters()))
        graph.replay()
    torch.cuda.synchronize()
    assert all(map(torch.equal, captured, own))


def test_without_gradients() -> None:
    block, x = Block(), given()
    with torch.no_grad():
        first = block(x)
    with torch.inference_mode():
        assert torch.equal(block(x), first)
