"""What a linear layer would keep of a product that is computed again in backward: same gradients, less memory."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from kernelwise.kernels import _recompute
from kernelwise.kernels._recompute import call_recomputing

WIDTH, INNER = 8, 24


def compute(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(gate) * up


class Product(torch.autograd.Function):
    """As the kernels record it: keeps gate and up, not the product."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return compute(gate, up)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, ...]:
        gate, up = (t.detach().requires_grad_() for t in ctx.saved_tensors)
        with torch.enable_grad():
            return torch.autograd.grad(compute(gate, up), (gate, up), dy)


class Block(torch.nn.Module):
    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.gate, self.up = (torch.nn.Linear(WIDTH, INNER, bias=bias) for _ in range(2))
        self.down: torch.nn.Module = torch.nn.Linear(INNER, WIDTH, bias=bias)
        self.calls = 0
        self.product: weakref.ref[torch.Tensor] | None = None
        self.recompute = True

    def counted(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return Product.apply(gate, up) if torch.is_grad_enabled() else compute(gate, up)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inputs = (self.gate(x), self.up(x))
        product = self.counted(*inputs)
        if type(product) is torch.Tensor and not torch._C._functorch.is_gradtrackingtensor(product):
            self.product = weakref.ref(product.untyped_storage())
        return call_recomputing(self.down, product, inputs, self.counted) if self.recompute else self.down(product)


def gradients(block: Block, x: torch.Tensor, recompute: bool = True, times: int = 1) -> list[torch.Tensor]:
    block.zero_grad(set_to_none=True)
    block.recompute, block.calls = recompute, 0
    leaf = x.detach().requires_grad_()
    loss = block(leaf).square().sum()
    for _ in range(times):
        loss.backward(retain_graph=times > 1)
    return [leaf.grad, *(p.grad for p in block.parameters() if p.grad is not None)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(5,), (2, 3), (1,), (2, 3, 4)])
def test_same_bits_and_computed_once_more(shape: tuple[int, ...], bias: bool) -> None:
    block, x = Block(bias), torch.randn(*shape, WIDTH)
    own = gradients(block, x, recompute=False)
    assert block.calls == 1
    ours = gradients(block, x)
    assert block.calls == 2
    assert all(map(torch.equal, ours, own))
    twice = gradients(block, x, times=2)
    assert block.calls == 3
    assert all(torch.equal(a, 2 * b) for a, b in zip(twice, own, strict=True))


def test_the_product_dies_after_forward() -> None:
    block, x = Block(), torch.randn(4, WIDTH, requires_grad=True)
    for recompute in (True, False):
        block.recompute = recompute
        y = block(x)
        assert block.product is not None
        assert (block.product() is None) == recompute
        y.sum().backward()
        del y


def test_nothing_stays_in_a_cycle() -> None:
    block, x = Block(), torch.randn(4, WIDTH, requires_grad=True)
    kept = []
    block.gate.register_forward_hook(lambda _, __, y: kept.append(weakref.ref(y.untyped_storage())))
    gc.disable()
    try:
        y = block(x)
        assert kept[0]() is not None
        y.sum().backward()  # what was saved goes with the graph
        assert kept[0]() is None
        block(x)  # no backward at all
        assert kept[1]() is None
    finally:
        gc.enable()


def test_second_derivatives() -> None:
    def penalty(recompute: bool) -> list[torch.Tensor]:
        block.recompute = recompute
        leaf = x.detach().requires_grad_()
        (first,) = torch.autograd.grad(block(leaf).square().sum(), block.down.weight, create_graph=True)
        return list(torch.autograd.grad(first.square().sum(), (leaf, *block.parameters())))

    block, x = Block().double(), torch.randn(3, WIDTH, dtype=torch.float64)
    block.counted = compute  # type: ignore[method-assign]
    for own, new in zip(penalty(False), penalty(True), strict=True):
        torch.testing.assert_close(new, own)


@pytest.mark.parametrize("who", ["gate", "up", "weight"])
def test_changed_in_place_before_backward(who: str) -> None:
    block, kept = Block(), {}
    block.gate.register_forward_hook(lambda _, __, y: kept.update(gate=y))
    block.up.register_forward_hook(lambda _, __, y: kept.update(up=y))
    x = torch.randn(4, WIDTH, requires_grad=True)
    y = block(x)
    with torch.no_grad():
        (block.down.weight if who == "weight" else kept[who]).add_(1)
    wanted = x if who == "weight" else block.down.weight
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y.sum(), wanted)


@pytest.mark.parametrize("hidden", [False, True])
def test_changed_in_place_on_the_way_into_the_module(hidden: bool) -> None:
    def change(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        (args[0].data if hidden else args[0]).mul_(2)

    block, x = Block(), torch.randn(4, WIDTH)
    block.down.register_forward_pre_hook(change)
    assert all(map(torch.equal, gradients(block, x), gradients(block, x, recompute=False)))


def test_hooks_of_others_see_all() -> None:
    block, x = Block(), torch.randn(4, WIDTH)
    own = gradients(block, x, recompute=False)
    seen: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(tuple(t.shape)) or t, lambda t: t):
        assert all(map(torch.equal, gradients(block, x), own))
    assert (4, INNER) in seen
    assert block.calls == 1
    with torch.autograd.graph.save_on_cpu():
        assert all(map(torch.equal, gradients(block, x), own))
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        assert all(map(torch.equal, gradients(block, x), own))
    assert block.calls == 1


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool) -> None:
    block, x = Block(), torch.randn(4, WIDTH)
    own = gradients(block, x, recompute=False)
    block.zero_grad(set_to_none=True)
    block.recompute = True
    leaf = x.detach().requires_grad_()
    checkpoint(block, leaf, use_reentrant=reentrant).square().sum().backward()
    assert all(map(torch.equal, [leaf.grad, *(p.grad for p in block.parameters())], own))


def test_where_nothing_is_recorded_or_kept() -> None:
    block, x = Block(), torch.randn(4, WIDTH)
    with torch.no_grad():
        expected = block(x)
    with torch.inference_mode():
        assert torch.equal(block(x), expected)
    block.down.requires_grad_(False)  # then the product is not kept, and not computed again
    own = gradients(block, x, recompute=False)
    assert all(map(torch.equal, gradients(block, x), own))
    assert block.calls == 1
    block.requires_grad_(False)
    assert torch.equal(block(x), expected)
    empty = Block()(x[:0].requires_grad_())
    empty.sum().backward()


@pytest.mark.parametrize("kind", ["subclass", "sequence", "dropped"])
def test_other_modules_are_just_called(kind: str) -> None:
    class Scaled(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x.data.mul_(2)  # nobody can see this
            return super().forward(x)

    layers: dict[str, Callable[[], torch.nn.Module]] = {
        "subclass": lambda: Scaled(INNER, WIDTH),
        "sequence": lambda: torch.nn.Sequential(torch.nn.Linear(INNER, WIDTH), torch.nn.Tanh()),
        "dropped": lambda: torch.nn.Sequential(torch.nn.Dropout(0.0), torch.nn.Linear(INNER, WIDTH)),
    }
    block, x = Block(), torch.randn(4, WIDTH)
    block.down = layers[kind]()
    assert all(map(torch.equal, gradients(block, x), gradients(block, x, recompute=False)))


def test_functional_gradients() -> None:
    block, x = Block(), torch.randn(4, WIDTH)
    block.counted = compute  # type: ignore[method-assign]

    def loss(values: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(block, values, (x,)).square().sum()

    found = torch.func.grad(loss)(dict(block.named_parameters()))
    own = torch.autograd.grad(loss(dict(block.named_parameters())), list(block.parameters()))
    for new, expected in zip(found.values(), own, strict=True):
        torch.testing.assert_close(new, expected)


def test_compiles() -> None:
    torch._dynamo.reset()
    block, x = Block(), torch.randn(4, WIDTH)
    block.counted = compute  # type: ignore[method-assign]

    def layer(x: torch.Tensor) -> torch.Tensor:
        inputs = (block.gate(x), block.up(x))
        return call_recomputing(block.down, compute(*inputs), inputs, compute)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    own, ours = (f(x.clone().requires_grad_()) for f in (layer, compiled))
    torch.testing.assert_close(ours, own)


def test_another_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where PyTorch does not say which hooks are set, the module is just called."""
    for name in ("_top_hooks", "_hooks_enabled"):
        with monkeypatch.context() as patch:
            patch.setattr(_recompute, name, None)
            block, x = Block(), torch.randn(4, WIDTH)
            assert all(map(torch.equal, gradients(block, x), gradients(block, x, recompute=False)))
            gradients(block, x)
            assert block.calls == 1
