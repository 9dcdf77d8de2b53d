"""What changes about a layer after its kernel went in: the kernel must not run on, and must not fail where the layer works."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import kernelwise as kw


class Norm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)
        self.eps = 1e-6
        self.plus_one = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        weight = 1.0 + self.weight if self.plus_one else self.weight
        return weight * wide.to(x.dtype)


class MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.act = nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x))


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 3, 16)


def kernelized(layer: nn.Module) -> nn.Sequential:
    model = nn.Sequential(layer).eval()
    kw.kernelize(model)
    assert any(row.path == "0" and row.kernel for row in kw.report(model).rows)
    return model


def fallbacks(model: nn.Module) -> int:
    return sum(count for row in kw.report(model).rows if row.mode == "inference" for _, count in row.fallbacks)


def own(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return type(model[0]).forward(model[0], x)  # type: ignore[index,operator]


def test_an_activation_that_is_replaced_is_used(x: torch.Tensor) -> None:
    model = kernelized(MLP(16))
    model[0].act = nn.GELU()
    assert torch.equal(model(x), own(model, x))
    assert fallbacks(model) == 1
    kw.kernelize(model)  # planned again, the new activation has a kernel of its own
    torch.testing.assert_close(model(x), own(model, x))
    assert fallbacks(model) == 1


def test_an_attribute_that_decides_the_computation_is_read_at_every_call(x: torch.Tensor) -> None:
    model = kernelized(Norm(16))
    torch.testing.assert_close(model(x), own(model, x))
    assert fallbacks(model) == 0
    model[0].plus_one = True
    assert torch.equal(model(x), own(model, x))
    assert fallbacks(model) == 1


@pytest.mark.parametrize(
    "register", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"]
)
def test_a_hook_on_a_child_that_the_kernel_absorbs_fires(x: torch.Tensor, register: str) -> None:
    model = kernelized(MLP(16))
    seen: list[int] = []
    getattr(model[0].act, register)(lambda *_: seen.append(1))
    model(x.requires_grad_()).sum().backward()
    assert seen == [1]


def test_a_copy_looks_at_its_own_children(x: torch.Tensor) -> None:
    model = kernelized(MLP(16))
    twin = copy.deepcopy(model)
    model[0].act = nn.ReLU()
    twin(x)
    assert fallbacks(twin) == 0
    twin[0].act = nn.ReLU()
    assert torch.equal(twin(x), own(twin, x))


def test_a_plan_is_not_put_into_a_model_that_computes_something_else() -> None:
    plan = kw.plan(nn.Sequential(MLP(16)))
    other = nn.Sequential(MLP(16))
    other[0].act = nn.GELU()
    with pytest.raises(kw.ApplyError, match="plan again"):
        kw.apply(other, plan)
    assert "forward" not in other[0].__dict__


def test_a_replica_reads_its_own_weights(x: torch.Tensor) -> None:
    model = kernelized(Norm(16))
    replica = model[0]._replicate_for_data_parallel()
    replica._parameters = {"weight": torch.full((16,), 3.0)}
    assert torch.equal(replica(x), type(replica).forward(replica, x)) or torch.allclose(
        replica(x), type(replica).forward(replica, x)
    )
    assert not torch.allclose(replica(x), model(x))


@pytest.mark.parametrize(("weights", "inputs"), [(torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)])
def test_dtypes_that_the_kernel_does_not_mix_go_to_the_own_code(weights: torch.dtype, inputs: torch.dtype) -> None:
    model = kernelized(Norm(16).to(weights))
    x = torch.randn(2, 16, dtype=inputs)
    assert torch.equal(model(x), own(model, x))
    assert fallbacks(model) == 1


def test_a_weight_that_broadcasts_works(x: torch.Tensor) -> None:
    model = kernelized(Norm(16))
    assert torch.equal(model(x[..., :1]), own(model, x[..., :1]))


@pytest.mark.parametrize("dims", [(1, 2), (0, 1), (0, 2)])
def test_the_result_lies_in_memory_as_the_layers_does(dims: tuple[int, int]) -> None:
    model = kernelized(Norm(16))
    x = torch.randn(2, 3, 4, 16).transpose(*dims)
    assert model(x).stride() == own(model, x).stride()
    torch.testing.assert_close(model(x), own(model, x))


def test_function_transforms_work(x: torch.Tensor) -> None:
    model = kernelized(Norm(16))
    jacobian = torch.func.jacrev(lambda row: model(row).sum())(x[0, 0])
    torch.testing.assert_close(jacobian, torch.func.jacrev(lambda row: own(model, row).sum())(x[0, 0]))
    torch.testing.assert_close(torch.func.vmap(model)(x), own(model, x))


def test_compiles_with_the_guards_in_place(x: torch.Tensor, fresh_compiler: None) -> None:
    model = nn.Sequential(Norm(16), MLP(16)).eval()
    kw.kernelize(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), model(x))
    model[1].act = nn.GELU()
    torch.testing.assert_close(compiled(x), model(x))


def test_t5_keeps_its_own_norms() -> None:
    from transformers import T5Config, T5EncoderModel

    model = T5EncoderModel(T5Config(d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=2, vocab_size=50)).eval()
    ids = torch.arange(10)[None]
    before = model(ids).last_hidden_state
    kw.kernelize(model)
    torch.testing.assert_close(model(ids).last_hidden_state, before)


class InLists(nn.Module):
    """A gated MLP whose children stand in a `ModuleList` and in a `Sequential`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ends = nn.ModuleList([nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)])
        self.gate = nn.Sequential(nn.Linear(width, width, bias=False), nn.SiLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.ends[1](self.gate(x) * self.ends[0](x))


class InPlainList(nn.Module):
    """A gated MLP whose children stand in a list and are registered under numbers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = [nn.Linear(width, width, bias=False) for _ in range(3)]
        for index, layer in enumerate(self.layers):
            self.add_module(str(index), layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[2](nn.functional.silu(self.layers[0](x)) * self.layers[1](x))


@pytest.mark.parametrize("kind", [InLists, InPlainList])
def test_children_in_lists_are_reached(kind: type[nn.Module], x: torch.Tensor) -> None:
    model = nn.Sequential(kind(16)).eval()
    expected = model(x)
    assert not kw.verify(model).failures
    kw.kernelize(model)
    row = kw.report(model).rows[0]
    assert row.kernel == "builtin:SwiGLUMLP"
    torch.testing.assert_close(model(x), expected)
    assert not model[0].__dict__["_kernelwise"].fallbacks


@pytest.mark.parametrize("at", [0, 1])
def test_a_hook_on_a_child_of_a_container_that_the_kernel_absorbs_fires(at: int, x: torch.Tensor) -> None:
    model = nn.Sequential(InLists(16)).eval()
    kw.kernelize(model)
    before = model(x)
    model[0].gate[at].register_forward_hook(lambda module, given, output: output * 2)
    assert not torch.allclose(model(x), before)
