"""What reaches a kernel and what does not: gradients, dtypes, tensor subclasses, functions, torch.compile."""

from __future__ import annotations

import copy
from typing import Any

import fakes
import models
import pytest
import torch
from fakes import kernel, marked, only
from models import IDS, tiny
from roles import role_norm, role_plan
from snapshot import Snapshot
from test_apply import ran
from torch import Tensor, nn

import kernelwise as kw
from kernelwise._applying._guards import FORWARD_AD

NORM = only({"RMSNorm": kernel(fakes.MarkedNorm)})
X = torch.randn(2, 3, 8)


# --------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("of_kernel", [fakes.ForwardOnlyNorm, fakes.LyingNorm])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("needs_grad", [False, True])
def test_gradients_are_never_lost(of_kernel: type[nn.Module], frozen: bool, needs_grad: bool) -> None:
    model = models.Stack(models.Norm()).requires_grad_(not frozen)
    x = X.clone().requires_grad_(needs_grad)
    own = model(x)
    kw.kernelize(model, only({"RMSNorm": kernel(of_kernel)}))
    output = model(x)
    if frozen and not needs_grad:
        assert marked(output)
        assert kw.report(model).rows[0].fallbacks == ()
        return
    assert torch.equal(output, own)
    output.sum().backward()
    assert frozen or model.layers[0].weight.grad is not None
    assert not needs_grad or x.grad is not None
    assert sum(count for _, count in kw.report(model).rows[0].fallbacks) == 1


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("of_kernel", [fakes.ForwardOnlyNorm, fakes.LyingNorm])
def test_without_gradients_the_kernel_runs(of_kernel: type[nn.Module], context: Any) -> None:
    model = kw.kernelize(models.Stack(models.Norm()), only({"RMSNorm": kernel(of_kernel)}))
    with context():
        assert marked(model(X))
    assert all(row.fallbacks == () for row in kw.report(model).rows)


@pytest.mark.parametrize("where", ["tuple", "list", "nested", "dict"])
def test_a_kernel_without_backward_never_sees_a_gradient_inside_a_container(where: str) -> None:
    leaf = X.clone().requires_grad_()
    both: Any = (leaf, X) if where != "list" else [X, leaf]
    extra = None
    if where == "nested":
        both = (X, X)
        extra = {"a": [leaf]}
        model: nn.Module = models.Pair()
        with pytest.raises(TypeError):
            model(both, extra)  # the layer itself cannot use it; the kernel must not be asked instead
    elif where == "dict":
        both, extra = (X, X), {"a": leaf}
    model = models.Pair()
    kw.kernelize(model, only({"Pair": kernel(fakes.ForwardOnlyPair)}), device="cpu")
    if where == "nested":
        with pytest.raises(TypeError):
            model(both, extra)
        return
    outputs = model(both, extra)
    assert any(output.requires_grad for output in outputs)
    assert not marked(outputs[0])
    assert marked(model((X, X))[0])


def test_one_of_two_outputs_without_gradient_is_a_lost_gradient() -> None:
    model = kw.kernelize(models.Pair(), only({"Pair": kernel(fakes.HalfLyingPair)}), device="cpu")
    x = X.clone().requires_grad_()
    left, right = model((x, x))
    assert left.requires_grad
    assert right.requires_grad


@pytest.mark.parametrize("of_kernel", [fakes.ForwardOnlyDouble, fakes.LyingDouble])
def test_function_kernels_never_lose_gradients(of_kernel: type[nn.Module]) -> None:
    model = kw.kernelize(models.TwoFunctions(), only({"double": kernel(of_kernel)}), device="cpu")
    x = X.clone().requires_grad_()
    output = model(x)
    output.sum().backward()
    assert torch.equal(x.grad, torch.full_like(X, 5.0))
    with torch.no_grad():
        assert marked(model(x))
    counts = [row.fallbacks for row in kw.report(model).rows if row.kernel]
    assert [sum(count for _, count in fallbacks) for fallbacks in counts] == [1, 1]


def test_derivatives_in_forward_mode_are_never_lost() -> None:
    """Nothing requires a gradient there, so a kernel that knows no tangents would drop them in silence."""
    model = models.Stack(models.Norm()).requires_grad_(False)
    tangent = torch.randn_like(X)
    output, derivative = torch.func.jvp(model, (X,), (tangent,))
    kw.kernelize(model, NORM)
    found = torch.func.jvp(model, (X,), (tangent,))
    torch.testing.assert_close(found, (output, derivative), rtol=0, atol=0)
    assert derivative.norm() > 0
    assert kw.report(model).rows[0].fallbacks == ((FORWARD_AD, 1),)
    assert marked(model(X))


def test_a_layer_with_a_lying_kernel_and_clashing_names_keeps_its_arguments() -> None:
    for of_kernel in (fakes.LyingClashing, fakes.ForwardOnlyClashing):
        model = models.Clashing()
        own = model(X, 1.0, own=5.0)
        kw.kernelize(model, only({"Clashing": kernel(of_kernel)}))
        assert torch.equal(model(X, 1.0, own=5.0), own)


# ------------------------------------------------------------------------------------------------------------ tensors


class Wrapped(Tensor):
    """A tensor subclass as quantisation and sharding use them."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_function__(func, types, args, kwargs or {})


def test_a_kernel_by_roles_gets_the_layers_own_values() -> None:
    model = models.Stack(models.Norm(eps=0.25))
    own = model(X)
    kw.apply(model, role_plan(model, role_norm))
    torch.testing.assert_close(model(X) - fakes.MARK, own, atol=1e-3, rtol=0)
    model.layers[0].variance_epsilon = 4.0
    assert not torch.allclose(model(X) - fakes.MARK, own, atol=1e-3)


def test_tensor_subclasses_take_the_own_code_and_are_counted() -> None:
    model = models.Stack(models.Norm())
    kw.apply(model, role_plan(model, role_norm))
    with torch.no_grad():
        assert not marked(model(X.as_subclass(Wrapped)))
        model.layers[0].weight = nn.Parameter(model.layers[0].weight.detach().as_subclass(Wrapped))
        assert not marked(model(X))
    assert sum(count for _, count in kw.report(model).rows[0].fallbacks) == 2


def test_tensor_subclasses_take_the_own_code_for_layer_classes_too() -> None:
    model = models.Stack(models.Norm())
    kw.kernelize(model, NORM)
    with torch.no_grad():
        assert not marked(model(X.as_subclass(Wrapped)))
        model.layers[0].weight = nn.Parameter(model.layers[0].weight.detach().as_subclass(Wrapped))
        assert not marked(model(X))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_another_dtype_after_kernelize(dtype: torch.dtype) -> None:
    for config in (None, only({"RMSNorm": kernel(fakes.GoodNorm)})):
        model = models.Stack(models.Norm())
        expected = copy.deepcopy(model).to(dtype)(X.to(dtype))
        if config is None:
            kw.apply(model, role_plan(model, role_norm, dtypes=("float32",)))
        else:
            kw.kernelize(model, config)
        output = model.to(dtype)(X.to(dtype))
        assert output.dtype == dtype
        torch.testing.assert_close(output, expected)


def test_autocast() -> None:
    model = tiny()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        own = model(IDS)
        kw.kernelize(model, only({"RMSNorm": kernel(fakes.GoodNorm), "rotary_pos_emb": kernel(fakes.GoodRotary)}))
        assert torch.equal(model(IDS), own)


# ------------------------------------------------------------------------------------------------- function kernels


def test_a_function_kernel_changes_only_the_model_it_was_asked_for() -> None:
    one, other = models.TwoFunctions(), models.TwoFunctions()
    before, after = Snapshot(one), Snapshot(other)
    function = models.double
    wrapper = Snapshot(function)
    kw.kernelize(one, only({"double": kernel(fakes.MarkedDouble)}), device="cpu")
    assert ran(one, X)
    assert not ran(other, X)
    assert not ran(function, X)
    assert models.double is function
    assert after.differences(other) == []
    assert wrapper.differences(function) == []
    kw.unkernelize(one)
    assert before.differences(one) == []
    assert not ran(one, X)


def test_two_functions_in_one_forward_go_in_and_out_apart() -> None:
    model = models.TwoFunctions()
    before, own = Snapshot(model), model(X)
    kw.kernelize(model, only({"double": kernel(fakes.MarkedDouble)}), device="cpu")
    kw.kernelize(model, only({"triple": kernel(fakes.MarkedTriple)}), device="cpu")
    torch.testing.assert_close(model(X) - 3 * fakes.MARK, own, atol=1e-3, rtol=0)
    kw.unkernelize(model, paths=["double"])
    torch.testing.assert_close(model(X) - 2 * fakes.MARK, own, atol=1e-3, rtol=0)
    kw.unkernelize(model, paths=["triple"])
    assert before.differences(model) == []
    kw.kernelize(
        model, only({"triple": kernel(fakes.MarkedTriple), "double": kernel(fakes.MarkedDouble)}), device="cpu"
    )
    torch.testing.assert_close(model(X) - 3 * fakes.MARK, own, atol=1e-3, rtol=0)
    kw.unkernelize(model)
    assert before.differences(model) == []
    assert torch.equal(model(X), own)


def test_a_forward_decorated_with_wraps_is_rebuilt_with_its_decorator() -> None:
    model = models.DecoratedForward()
    before, own = Snapshot(model), model(X)
    kw.kernelize(model, only({"double": kernel(fakes.MarkedDouble)}), device="cpu")
    assert ran(model, X)
    assert not ran(models.DecoratedForward(), X)
    kw.unkernelize(model)
    assert before.differences(model) == []
    assert torch.equal(model(X), own)


def test_a_function_called_in_nested_code_is_changed_or_unknown() -> None:
    model = models.InsideComprehension()
    own = model(X)
    kw.kernelize(model, only({"double": kernel(fakes.MarkedDouble)}), device="cpu", on_miss="keep")
    rows = [row for row in kw.report(model).rows if row.name == "double"]
    assert rows
    assert ran(model, X) == (rows[0].kernel is not None)
    kw.unkernelize(model)
    assert torch.equal(model(X), own)


@pytest.mark.parametrize("cls", [models.ThroughHelper, models.UncopyableForward, models.WritesGlobal])
def test_a_forward_that_cannot_be_rebuilt_is_reported_unknown(cls: type[nn.Module]) -> None:
    model = cls()
    own = model(X)
    before = Snapshot(model)
    kw.kernelize(model, device="cpu")  # a wish is no error
    config = only({"double": kernel(fakes.MarkedDouble)})
    kw.kernelize(model, config, device="cpu", on_miss="keep")
    assert torch.equal(model(X), own)
    row = next(row for row in kw.report(model).rows if row.name == "double")
    assert row.kernel is None
    assert row.reason
    with pytest.raises(kw.PlanError, match="double"):
        kw.kernelize(model, config, device="cpu")
    kw.unkernelize(model)
    assert before.differences(model) == []


# ------------------------------------------------------------------------------------------------------ torch.compile


@pytest.mark.usefixtures("fresh_compiler")
class TestCompile:
    """With the graph whole (`fullgraph`), and no recompiling."""

    @staticmethod
    def counting(graphs: list[Any]) -> Any:
        def backend(graph: Any, inputs: Any) -> Any:
            graphs.append(graph)
            return graph.forward

        return backend

    def test_after(self) -> None:
        graphs: list[Any] = []
        model = tiny()
        own = model(IDS)
        kw.kernelize(model, only({"RMSNorm": kernel(fakes.GoodNorm), "rotary_pos_emb": kernel(fakes.MarkedRotary)}))
        expected = model(IDS)
        compiled = torch.compile(model, fullgraph=True, backend=self.counting(graphs))
        for _ in range(4):
            torch.testing.assert_close(compiled(IDS), expected)
        assert len(graphs) == 1
        assert not torch.allclose(expected, own)

    def test_before(self) -> None:
        graphs: list[Any] = []
        model = models.Stack(models.Norm(), models.Norm())
        compiled = torch.compile(model, fullgraph=True, backend=self.counting(graphs))
        own = compiled(X)
        kw.kernelize(model, NORM)
        for _ in range(3):
            assert marked(compiled(X))
        assert len(graphs) == 2
        kw.unkernelize(model)
        for _ in range(3):
            assert torch.equal(compiled(X), own)
        assert len(graphs) <= 3

    def test_functions_before(self) -> None:
        graphs: list[Any] = []
        model = models.TwoFunctions()
        compiled = torch.compile(model, fullgraph=True, backend=self.counting(graphs))
        own = compiled(X)
        kw.kernelize(model, only({"double": kernel(fakes.MarkedDouble)}), device="cpu")
        assert marked(compiled(X))
        kw.unkernelize(model)
        assert torch.equal(compiled(X), own)

    def test_undone_after_compiling_runs_the_own_code(self) -> None:
        graphs: list[Any] = []
        model = models.Stack(models.Norm(), models.Norm())
        own = model(X)
        kw.kernelize(model, NORM)
        compiled = torch.compile(model, fullgraph=True, backend=self.counting(graphs))
        assert marked(compiled(X))
        kw.unkernelize(model)
        assert torch.equal(compiled(X), own)

    def test_a_counter_does_not_recompile(self) -> None:
        """The kernel without backward falls back at every call in training, which is counted outside the graph only."""
        graphs: list[Any] = []
        model = models.Stack(models.Norm())
        own = model(X)
        kw.kernelize(model, only({"RMSNorm": kernel(fakes.ForwardOnlyNorm)}))
        compiled = torch.compile(model, fullgraph=True, backend=self.counting(graphs))
        for _ in range(12):
            torch.testing.assert_close(compiled(X), own)
        assert len(graphs) == 1
        for _ in range(3):
            model(X)  # counts, eagerly
            compiled(X)
        assert len(graphs) == 1

    def test_a_kernel_that_does_not_compile_leaves_the_graph_whole(self) -> None:
        graphs: list[Any] = []
        model = models.Stack(models.Norm())
        own = model(X)
        kw.kernelize(model, only({"RMSNorm": kernel(fakes.UncompilableNorm)}))
        assert marked(model(X))
        compiled = torch.compile(model, fullgraph=True, backend=self.counting(graphs))
        for _ in range(3):
            torch.testing.assert_close(compiled(X), own)
        assert len(graphs) == 1

    def test_train_and_eval_take_one_graph_each(self) -> None:
        graphs: list[Any] = []
        model = models.Stack(models.Norm())
        kw.kernelize(
            model,
            only({"RMSNorm": {"inference": kernel(fakes.MarkedNorm), "training": kernel(fakes.TwiceMarkedNorm)}}),
        )
        compiled = torch.compile(model, fullgraph=True, backend=self.counting(graphs))
        for _ in range(3):
            assert (compiled.eval()(X) < 1.5 * fakes.MARK).all()
            assert (compiled.train()(X) > 1.5 * fakes.MARK).all()
        assert len(graphs) == 2

    def test_compiled_in_place(self) -> None:
        graphs: list[Any] = []
        model = models.Stack(models.Norm())
        own = model(X)
        model.compile(fullgraph=True, backend=self.counting(graphs))
        kw.kernelize(model, NORM)
        assert marked(model(X))
        kw.unkernelize(model)
        assert torch.equal(model(X), own)

    def test_the_compiled_model_itself_can_be_kernelized(self) -> None:
        graphs: list[Any] = []
        model = models.Stack(models.Norm())
        compiled = torch.compile(model, fullgraph=True, backend=self.counting(graphs))
        own = compiled(X)
        before = Snapshot(compiled)
        kw.kernelize(compiled, NORM)
        assert marked(compiled(X))
        kw.unkernelize(compiled)
        assert torch.equal(compiled(X), own)
        assert before.differences(compiled) == []

    def test_a_kernel_by_roles(self) -> None:
        graphs: list[Any] = []
        model = models.Stack(models.Norm())

        def plain(x: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0, cast: str = "before") -> Tensor:
            return x * weight + fakes.MARK

        kw.apply(model, role_plan(model, plain))
        compiled = torch.compile(model, fullgraph=True, backend=self.counting(graphs))
        for _ in range(3):
            assert marked(compiled(X))
        assert len(graphs) == 1
