"""Layer against kernel on what the model gives the layer. Whether the clock is read well is for test_compare.py."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import kernelwise
from kernelwise._data import Decision, Kernel, KernelRef, Limits
from kernelwise._evidence import Timing
from kernelwise._measuring import _compare, _measure
from kernelwise._measuring._environment import environment
from kernelwise._measuring._measure import measure_group
from kernelwise._verifying._capture import capture
from kernelwise._verifying._groups import Group, group
from kernelwise._verifying._inputs import Sample
from kernelwise.sources._layer_class import kernel_of


class Scale(nn.Module):
    """A layer with a weight and a buffer that it writes to in training."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.seen.add_(1)
        return x * self.weight * by


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(8))
        self.scales = nn.ModuleList(Scale() for _ in range(2))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        x, by = x + self.shift, torch.full((8,), 2.0)
        for scale in self.scales:
            x = scale(x, by)
        return {"loss": (x * torch.arange(8.0)).sum()}


kernelwise.register_layer(Scale, "Scale")


class Fast(nn.Module):
    """A kernel that notes what it is given."""

    calls: ClassVar[list[tuple[torch.Tensor, torch.Tensor, bool]]] = []
    gradients: ClassVar[list[torch.Tensor]] = []

    weight: torch.Tensor
    training: bool

    def forward(self, x: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        Fast.calls.append((x, by, torch.is_grad_enabled()))
        found = x * self.weight * by
        if found.requires_grad:
            found.register_hook(Fast.gradients.append)
        return found


class Slow(nn.Module):
    weight: torch.Tensor

    def forward(self, x: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        time.sleep(0.003)
        return x * self.weight * by


class Wrong(nn.Module):
    def forward(self, x: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("this width is not supported\nsee elsewhere")


class Constant(nn.Module):
    """Loses the gradient."""

    def forward(self, x: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        return x.detach() * 1.0


@pytest.fixture(autouse=True)
def nothing_noted() -> Iterator[None]:
    Fast.calls, Fast.gradients = [], []
    yield
    Fast.calls, Fast.gradients = [], []


def of(cls: Any) -> Kernel:
    return kernel_of(KernelRef("path", "/gallery", cls.__name__), cls, limits=Limits(), content_hash=None)


def one_group(model: nn.Module, kernel: Kernel, name: str = "Scale") -> Group:
    layers = [layer for layer in kernelwise.discover(model) if layer.name == name]
    paths = tuple(layer.path for layer in layers)
    return Group(Decision(layers[0], "inference", kernel, "test"), paths, ("inference",))


def measured(cls: Any, mode: str = "inference", *, model: nn.Module | None = None, **how: Any) -> Timing | str:
    model = model or Model().train(mode.startswith("training"))
    kernel = of(cls)
    found = one_group(model, kernel)
    sample = capture(model, [found], torch.randn(4, 6, 8), rows=None)["scales.0"]
    seconds = how.pop("seconds", 0.05)
    return measure_group(model, found, sample, kernel, mode=mode, workload="forward", seconds=seconds, **how)


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_a_kernel_that_sleeps_is_slower(mode: str) -> None:
    found = measured(Slow, mode, calls=48)
    assert isinstance(found, Timing)
    assert found.comparison.verdict == "slower"
    assert found.comparison.us >= 3000
    assert found.comparison.first_s is not None
    assert found.comparison.first_s >= 0.003
    assert (found.layer, found.paths) == ("scales.0", ("scales.0", "scales.1"))
    assert (found.candidate, found.mode, found.workload) == ("/gallery:Slow", mode, "forward")
    assert (found.calls, found.graph) == (48, False)


def test_a_kernel_that_does_the_same_is_of_no_use(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    class Clocked(nn.Module):
        weight: torch.Tensor

        def forward(self, x: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
            nonlocal now
            now += 1e-3
            return x * self.weight * by

    monkeypatch.setattr(_compare, "perf_counter", lambda: now)
    own = Scale.forward
    monkeypatch.setattr(Scale, "forward", lambda self, x, by: Clocked.forward(self, x, by))
    model = Model()
    sample = Sample({"x": torch.randn(4, 8), "by": torch.ones(8)}, model.scales[0])
    found = measure_group(
        model, one_group(model, of(Clocked)), sample, of(Clocked), mode="inference", workload="w", seconds=0.1
    )
    assert isinstance(found, Timing)
    assert (found.comparison.speedup, found.comparison.verdict) == (pytest.approx(1.0), "no clear difference")
    assert own is not Scale.forward


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_what_raises_has_no_timing_but_a_reason(mode: str) -> None:
    assert measured(Wrong, mode) == "RuntimeError: this width is not supported"


def test_a_kernel_without_backward_has_no_timing_in_training() -> None:
    assert isinstance(measured(Constant), Timing)
    found = measured(Constant, "training")
    assert found == "ValueError: 0 of its outputs have a gradient, not 1"


def test_own_code_that_fails_is_told_apart() -> None:
    model = Model()
    sample = Sample({"x": torch.randn(4, 7), "by": torch.ones(8)}, model.scales[0])
    for mode, who in (("training", "the layer's own code fails on this sample"), ("inference", "own code fails")):
        found = measure_group(model, one_group(model, of(Fast)), sample, of(Fast), mode=mode, workload="w", seconds=0.0)
        assert isinstance(found, str)
        assert who in found
        assert "RuntimeError: The size of tensor a (7) must match" in found


def test_the_layer_is_timed_on_all_that_it_was_given() -> None:
    measured(Fast)
    assert {tuple(x.shape) for x, _, _ in Fast.calls} == {(4, 6, 8)}
    assert not any(grad for *_, grad in Fast.calls)


def test_in_training_the_backward_is_the_models() -> None:
    """Gradients go where the model's go (x, not `by`), and begin with those that the model has."""
    measured(Fast, "training")
    assert all(grad and x.requires_grad and x.is_leaf and not by.requires_grad for x, by, grad in Fast.calls)
    expected = (torch.arange(8.0) * 2).expand(4, 6, 8)
    assert Fast.gradients
    assert all(torch.equal(gradient, expected) for gradient in Fast.gradients)


def test_where_the_models_backward_ends_that_of_the_timing_ends_too() -> None:
    model = Model().train()
    model.shift.requires_grad_(False)
    measured(Fast, "training", model=model)
    assert not any(x.requires_grad for x, _, _ in Fast.calls)
    assert Fast.gradients


def test_a_frozen_layer_hands_gradients_through() -> None:
    """The first of alike layers may have nothing before it that learns; those that it speaks for have."""
    model = Model().train()
    model.requires_grad_(False)
    model.scales[1].weight.requires_grad_()
    measured(Fast, "training", model=model)
    assert all(x.requires_grad for x, _, _ in Fast.calls)


def test_without_a_loss_the_gradients_are_made() -> None:
    model = Model().train()
    sample = Sample({"x": torch.randn(4, 8), "by": torch.ones(8)}, model.scales[0])
    kernel = of(Fast)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    found = measure_group(model, one_group(model, kernel), sample, kernel, mode="training", workload="w", seconds=0.0)
    assert torch.equal(torch.rand(1), expected)
    assert isinstance(found, Timing)
    assert all(x.requires_grad for x, _, _ in Fast.calls)
    assert Fast.gradients[0].shape == (4, 8)


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_the_model_is_left_as_it_was(mode: str) -> None:
    model = Model()
    model.scales[0].weight.requires_grad_(False)
    hooked: list[str] = []
    model.scales[0].register_forward_hook(lambda *_: hooked.append("hook"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kernel = of(Fast)
    found = one_group(model, kernel)
    sample = capture(model, [found], torch.randn(4, 6, 8), rows=None)["scales.0"]
    hooked.clear()
    kept = {name: value.clone() for name, value in sample.arguments.items()}
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    measure_group(model, found, sample, kernel, mode=mode, workload="w", seconds=0.02)
    assert torch.equal(torch.rand(1), expected)
    assert model.training
    assert not hooked
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [parameter.requires_grad for parameter in model.parameters()] == [True, False, True]
    assert all(torch.equal(sample.arguments[name], value) for name, value in kept.items())
    assert not any(value.requires_grad for value in sample.arguments.values())
    assert all(x.grad is None for x, _, _ in Fast.calls)


@pytest.mark.parametrize("frozen", [False, True])
def test_weights_are_those_of_all_alike_layers_in_turns(frozen: bool) -> None:
    class Noting(nn.Module):
        weights: ClassVar[list[int]] = []
        weight: torch.Tensor

        def forward(self, x: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
            Noting.weights.append(self.weight.data_ptr())
            return x * self.weight * by

    model = Model()
    model.scales[1].weight.requires_grad_(not frozen)  # in training it would have less to do
    measured(Noting, model=model)
    own, other = (scale.weight.data_ptr() for scale in model.scales)
    assert set(Noting.weights) == ({own} if frozen else {own, other})
    times = [Noting.weights.count(weight) for weight in (own, other)]
    assert frozen or abs(times[0] - times[1]) <= 0.1 * sum(times)


def test_a_layer_that_was_made_keeps_its_own_weights() -> None:
    model, made = Model(), Scale()
    sample = Sample({"x": torch.randn(4, 8), "by": torch.ones(8)}, made)
    assert _measure._alike(model, one_group(model, of(Fast)), sample) == [made]
    sample = Sample(sample.arguments, model.scales[0])
    assert _measure._alike(model, one_group(model, of(Fast)), sample) == [*model.scales]


def test_inputs_rotate_until_the_cache_has_forgotten_them(monkeypatch: pytest.MonkeyPatch) -> None:
    each = (4 * 6 * 8 + 8) * 4
    monkeypatch.setattr(_measure, "CACHE", 10 * each)
    measured(Fast)
    assert len({x.data_ptr() for x, _, _ in Fast.calls}) == 11
    assert len({by.data_ptr() for _, by, _ in Fast.calls}) == 11


@pytest.mark.parametrize(
    ("size", "cache", "number"),
    [
        (1 << 10, 32 << 20, 64),  # what is so small stays in the cache of a model too
        (8 << 20, 32 << 20, 5),
        (9 << 20, 32 << 20, 5),
        (64 << 20, 32 << 20, 2),
        (600 << 20, 32 << 20, 1),  # two would be more than the bound
        (3 << 30, 50 << 20, 1),
        (0, 32 << 20, 64),
    ],
)
def test_how_many_copies_there_are(size: int, cache: int, number: int) -> None:
    assert _measure._number_of_copies(size, cache) == number


def test_strides_are_those_that_the_layer_was_given() -> None:
    model = Model()
    x = torch.randn(6, 4, 8).transpose(0, 1)
    sample = Sample({"x": x, "by": torch.ones(1).expand(8)}, model.scales[0])
    kernel = of(Fast)
    for mode in ("inference", "training"):
        measure_group(model, one_group(model, kernel), sample, kernel, mode=mode, workload="w", seconds=0.0)
    assert {(x.stride(), by.stride()) for x, by, _ in Fast.calls} == {((8, 32, 1), (0,))}


def test_own_code_is_not_the_kernel_that_is_in_the_model_already() -> None:
    model = Model()
    found = one_group(model, of(Fast))
    plan = kernelwise.plan(model)
    decisions = tuple(Decision(found.decision.layer.at((path,)), "inference", of(Slow), "test") for path in found.paths)
    kernelwise.apply(model, type(plan)(plan.target, decisions))
    model.eval()
    result = measured(Fast, model=model)
    assert isinstance(result, Timing)
    assert result.comparison.own_us < 3000
    kernelwise.unkernelize(model)


def test_a_graph_is_for_gpus() -> None:
    with pytest.raises(ValueError, match=r"scales.0 is on cpu"):
        measured(Fast, graph=True)


class Breaking(nn.Module):
    weight: torch.Tensor

    def forward(self, x: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return x * self.weight * by


class Plain(nn.Module):
    weight: torch.Tensor

    def forward(self, x: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        return x * self.weight * by


@pytest.fixture
def compiled_by(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """Compile without Inductor, which takes its time; return how often."""
    compiled: list[str] = []
    whole = torch.compile

    def compile(call: Any, **how: Any) -> Any:
        assert how == {"fullgraph": True, "dynamic": False}

        def backend(graph: Any, inputs: Any) -> Any:
            compiled.append("once")
            return graph.forward

        return whole(call, backend=backend, **how)

    monkeypatch.setattr(torch, "compile", compile)
    return lambda: compiled


@pytest.mark.parametrize("mode", ["inference+compile", "training+compile"])
def test_both_are_compiled_once_for_all_copies(mode: str, compiled_by: Callable[[], list[str]]) -> None:
    for shape in ((4, 6, 8), (3, 5, 8)):  # a second shape is no reason to compile for any shape
        compiled_by().clear()
        model = Model().train(mode.startswith("training"))
        kernel = of(Plain)
        found = one_group(model, kernel)
        sample = capture(model, [found], torch.randn(shape), rows=None)["scales.0"]
        result = measure_group(model, found, sample, kernel, mode=mode, workload="w", seconds=0.02)
        assert isinstance(result, Timing), result
        assert len(compiled_by()) == 2


def test_what_does_not_compile_as_a_whole_is_out(compiled_by: Callable[[], list[str]]) -> None:
    found = measured(Breaking, "inference+compile")
    assert isinstance(found, str)
    assert "Unsupported" in found


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_every_layer_of_a_model_with_its_builtin_kernel(mode: str) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
    )
    model = LlamaForCausalLM(config).train(mode == "training")
    decided = kernelwise.plan(model, mode=mode)
    groups = group(model, decided)
    ids = torch.randint(0, 64, (2, 40))
    samples = capture(model, groups, {"input_ids": ids, "labels": ids}, rows=None)
    assert {found.decision.kernel.op for found in groups if found.decision.kernel} >= {
        "rms_norm",
        "gated_mlp",
        "rotary",
    }
    for found in groups:
        kernel, layer = found.decision.kernel, found.decision.layer
        assert kernel is not None
        sample = samples[layer.path]
        wanted = ("q", "k") if kernel.op == "rotary" else None
        assert wanted is None or sample.with_grad == wanted
        result = measure_group(model, found, sample, kernel, mode=mode, workload="w", seconds=0.0)
        assert isinstance(result, Timing), (layer.path, result)
        assert result.comparison.rounds >= 5
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_environment_names_what_times_depend_on() -> None:
    found = dict(environment("cpu"))
    assert found["torch"] == torch.__version__.partition("+")[0] or found["torch"] == torch.__version__
    assert found["threads"] == str(torch.get_num_threads())
    assert found["device"] == "cpu"
    assert torch.backends.cpu.get_cpu_capability() in found["processor"]
    assert {"system", "python", "kernelwise", "transformers"} <= set(found)
