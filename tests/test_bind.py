"""The functions that run in place of a layer's own code: what they pass on, and when they hand back to it."""

from __future__ import annotations

import inspect
from collections import Counter
from dataclasses import replace
from types import MethodType
from typing import Any

import fakes
import models
import pytest
import torch
from torch import Tensor, nn

from kernelwise import ApplyError
from kernelwise._applying._bind import dispatcher, function_call, layer_call
from kernelwise._applying._guards import INPUT, LOST_GRADIENT, MORE, NO_BACKWARD, carries_grad, has_trained, needs_grad
from kernelwise._data import Binding, Kernel, KernelRef, Layer, Limits, Parameter, Recognition
from kernelwise._discover import STATE
from kernelwise._forwards import rebuild, signature

REF = KernelRef("builtin", "", "K")
X = torch.linspace(-1, 1, 8)


class Own:
    """Stands in for a module's state: says why the own code ran."""

    def __init__(self) -> None:
        self.why: list[str | None] = []

    def run_own(self, module: nn.Module, why: str | None, args: Any, kwargs: Any) -> Any:
        self.why.append(why)
        return type(module).forward(module, *args, **kwargs)


def module_of(cls: type[nn.Module], *args: Any) -> Any:
    module = cls(*args)
    module.__dict__[STATE] = Own()
    return module


def layer_of(module: nn.Module, **options: Any) -> Layer:
    return Layer("layer", "Layer", "m.Layer", "registered", "cpu", signature=signature(type(module).forward), **options)


def of_class(cls: type[nn.Module]) -> Kernel:
    return Kernel(
        REF,
        has_backward=getattr(cls, "has_backward", True),
        can_torch_compile=getattr(cls, "can_torch_compile", False),
        signature=signature(cls.forward),
        function=cls.forward,
    )


def recognised(op: str = "rms_norm", **roles: tuple[str, Any]) -> dict[str, Recognition]:
    found = Recognition(op, tuple((name, Binding(*binding)) for name, binding in roles.items()), (("offset", 0.5),))
    return {"recognition": found, "recognition_in_training": found}


NORM_ROLES = recognised(
    x=("argument", "hidden_states"), weight=("attribute", "weight"), eps=("attribute", "variance_epsilon")
)


def by_roles(function: Any, **options: Any) -> Kernel:
    return Kernel(
        REF,
        "rms_norm",
        **{"limits": Limits(("cpu",), ("float32",)), "can_torch_compile": True, "function": function} | options,
    )


# ----------------------------------------------------------------------------------------------------- kernels by roles


def test_roles_are_filled_from_arguments_attributes_children_constants_and_options() -> None:
    module = module_of(models.MLP)
    roles = recognised(x=("argument", "x"), gate=("child", "gate"), weight=("constant", None), eps=("constant", 0.25))
    seen: dict[str, Any] = {}
    call = layer_call(layer_of(module, **roles), by_roles(seen.update), "inference", models.MLP.forward)
    x = torch.ones(8)
    call(module, x)
    assert seen == {"x": x, "gate": module.gate, "weight": None, "eps": 0.25, "offset": 0.5}


def test_attributes_are_read_at_every_call() -> None:
    module = module_of(models.Norm)
    call = layer_call(
        layer_of(module, **NORM_ROLES), by_roles(lambda x, weight, eps, offset: (weight, eps)), "inference", Any
    )
    weight, eps = call(module, X)
    assert weight is module.weight
    assert eps == module.variance_epsilon
    module.variance_epsilon, module.weight = 3.0, nn.Parameter(torch.zeros(8))
    assert call(module, X) == (module.weight, 3.0)


def test_a_kernel_is_given_only_the_roles_and_options_it_takes() -> None:
    module = module_of(models.Norm)

    def function(x: Tensor, eps: float) -> Any:
        return eps

    kernel = by_roles(function, signature=tuple(Parameter(n, "positional_or_keyword") for n in ("x", "eps")))
    assert layer_call(layer_of(module, **NORM_ROLES), kernel, "inference", Any)(module, X) == module.variance_epsilon


@pytest.mark.parametrize(
    ("change", "fits"),
    [
        (lambda module, x: x, True),
        (lambda module, x: x.double(), False),
        (lambda module, x: x.to(torch.bfloat16), False),
        (lambda module, x: x.to("meta"), False),
        (lambda module, x: nn.Parameter(x), True),
        (lambda module, x: x.as_subclass(type("Sub", (Tensor,), {})), False),
        (lambda module, x: setattr(module, "weight", nn.Parameter(module.weight.double())) or x, False),
        (lambda module, x: setattr(module, "weight", None) or x, False),
    ],
)
def test_an_input_that_the_kernel_does_not_take_goes_to_the_own_code(change: Any, fits: bool) -> None:
    module = module_of(models.Norm)
    x = change(module, X)
    ran: list[str] = []
    kernel = by_roles(lambda **roles: ran.append("kernel"))
    call = layer_call(layer_of(module, **NORM_ROLES), kernel, "inference", models.Norm.forward)
    try:
        call(module, x)
    except (TypeError, RuntimeError, NotImplementedError):  # the own code cannot have a weight that is None, or on meta
        assert not fits
    assert ran == (["kernel"] if fits else [])
    assert getattr(module, STATE).why == ([] if fits else [INPUT])


def test_every_tensor_is_looked_at_not_only_the_first() -> None:
    class Sub(Tensor):
        pass

    module = module_of(models.PositionalOnly)
    roles = recognised("linear", x=("argument", "left"), y=("argument", "right"), scale=("argument", "scale"))
    ran: list[str] = []
    kernel = replace(by_roles(lambda **roles: ran.append("kernel")), op="linear")
    call = layer_call(layer_of(module, **roles), kernel, "inference", models.PositionalOnly.forward)
    call(module, X, X, 3.0)
    assert ran == ["kernel"]
    call(module, X, X.as_subclass(Sub), 3.0)
    assert ran == ["kernel"]
    assert getattr(module, STATE).why == [INPUT]


def test_a_property_can_stand_where_a_parameter_did() -> None:
    class Computed(nn.Module):
        variance_epsilon = 1e-6
        forward = models.Norm.forward

        @property
        def weight(self) -> Tensor:
            return X * 2

    module = module_of(Computed)
    call = layer_call(layer_of(module, **NORM_ROLES), by_roles(lambda x, weight, eps, offset: weight), "inference", Any)
    assert torch.equal(call(module, X), X * 2)


# ------------------------------------------------------------------------------------------------------ layer classes


def test_a_plan_made_by_hand_with_a_kernel_that_does_not_fit_is_refused() -> None:
    module = module_of(models.Norm)
    with pytest.raises(ApplyError, match="hidden_states"):
        layer_call(layer_of(module), of_class(fakes.TooFewArguments), "inference", models.Norm.forward)


def test_a_described_kernel_cannot_be_bound() -> None:
    module = module_of(models.Norm)
    with pytest.raises(ApplyError, match="described"):
        layer_call(layer_of(module), Kernel(REF), "inference", models.Norm.forward)
    with pytest.raises(ApplyError, match="described"):
        function_call(layer_of(module), Kernel(REF), "inference", models.double, Counter())


def test_reasons_are_told_apart() -> None:
    module = module_of(models.Norm)
    why = getattr(module, STATE).why
    layer_call(layer_of(module), of_class(fakes.ForwardOnlyNorm), "inference", models.Norm.forward)(module, X)
    layer_call(layer_of(module), of_class(fakes.LyingNorm), "inference", models.Norm.forward)(module, X)
    assert why == [NO_BACKWARD, LOST_GRADIENT]
    widened = module_of(models.Widened)
    call = layer_call(layer_of(widened), of_class(fakes.MarkedPlusOne), "inference", models.Widened.forward)
    assert torch.equal(call(widened, X, verbose=True), (X + 1) * 2)
    assert getattr(widened, STATE).why == [MORE]


def test_alike_layers_share_one_function() -> None:
    first, second = module_of(models.Norm), module_of(models.Norm)
    kernel = of_class(fakes.MarkedNorm)
    calls = [layer_call(layer_of(m), kernel, "inference", models.Norm.forward) for m in (first, second)]
    assert calls[0] is calls[1]


# ---------------------------------------------------------------------------------------------------------- gradients


LEAF = torch.ones(2, requires_grad=True)
PLAIN = torch.ones(2)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), False),
        ((PLAIN,), False),
        ((PLAIN, LEAF), True),
        (((PLAIN, LEAF),), True),
        (([PLAIN, [LEAF]],), True),
        (({"a": PLAIN, "b": {"c": (LEAF,)}},), True),
        (({"a": PLAIN}, "text", None, 3), False),
        ((torch.nn.utils.rnn.PackedSequence(LEAF, torch.tensor([2])),), True),
    ],
)
def test_needs_grad_looks_into_containers(arguments: Any, expected: bool) -> None:
    assert needs_grad(*arguments) == expected


def test_every_parameter_of_a_module_is_looked_at() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).requires_grad_(False)
    assert not has_trained(module)
    module[1].bias.requires_grad_(True)
    assert has_trained(module)


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (LEAF, True),
        (PLAIN, False),
        (PLAIN.to(torch.complex64), False),
        (torch.ones(2, dtype=torch.int64), True),
        ((LEAF, torch.ones(2, dtype=torch.bool)), True),
        ((LEAF, PLAIN), False),
        ([LEAF, (PLAIN,)], False),
        ({"a": LEAF, "b": LEAF}, True),
        ({"a": LEAF, "b": PLAIN}, False),
        (None, True),
        ((), True),
        ("text", True),
    ],
)
def test_carries_grad_wants_every_floating_tensor_in_the_graph(output: Any, expected: bool) -> None:
    assert carries_grad(output) == expected


# --------------------------------------------------------------------------------------------------------- dispatcher


@pytest.mark.parametrize(
    "cls",
    [
        models.Norm,
        models.Affine,
        models.KeywordOnly,
        models.PositionalOnly,
        models.Anything,
        models.Pair,
        models.Clashing,
        models.Attention,
    ],
)
def test_the_dispatcher_has_the_signature_of_the_forward(cls: type[nn.Module]) -> None:
    found = inspect.signature(dispatcher(cls.forward))
    own = inspect.signature(cls.forward)
    assert [(p.name, p.kind, p.default) for p in found.parameters.values()] == [
        (p.name, p.kind, p.default) for p in own.parameters.values()
    ]
    assert dispatcher(cls.forward).__doc__ == cls.forward.__doc__
    assert dispatcher(cls.forward).__qualname__ == cls.forward.__qualname__


def test_a_dispatcher_without_a_state_runs_the_own_code() -> None:
    for cls, args, kwargs in (
        (models.Norm, (X,), {}),
        (models.Affine, (X,), {"shift": 2.0}),
        (models.Undecorated, (X,), {}),
        (models.Widened, (X,), {"verbose": True}),
        (models.PositionalOnly, (X, X * 2), {}),
    ):
        module = cls()
        bound = MethodType(dispatcher(cls.forward), module)
        assert torch.equal(bound(*args, **kwargs), module(*args, **kwargs))


def test_an_error_inside_a_kernel_is_not_taken_for_a_missing_state() -> None:
    module = models.Norm()

    def fails(*args: Any) -> None:
        raise AttributeError("inside the kernel")

    state = Own()
    state.inference = state.training = fails  # type: ignore[attr-defined]
    module.__dict__[STATE] = state
    with pytest.raises(AttributeError, match="inside the kernel"):
        MethodType(dispatcher(models.Norm.forward), module)(X)


# ------------------------------------------------------------------------------------------------------------ rebuild


def test_a_rebuilt_forward_sees_the_replacement_and_the_original_does_not() -> None:
    forward = models.TwoFunctions.forward
    globals_before = dict(forward.__globals__)
    rebuilt = rebuild(forward, {"double": lambda x: x * 0})
    assert rebuilt is not None
    module = models.TwoFunctions()
    torch.testing.assert_close(rebuilt(module, X), X * 3)
    torch.testing.assert_close(forward(module, X), X * 5)
    assert {name: forward.__globals__[name] for name in globals_before} == globals_before
    assert forward.__globals__["double"] is models.double


def test_a_rebuilt_forward_keeps_defaults_closures_and_decorators() -> None:
    factor = 3

    class Module(nn.Module):
        @models.drops_verbose
        def forward(self, x: Tensor, times: int = 2, *, plus: int = 1) -> Tensor:
            assert __class__ is Module  # type: ignore[name-defined]
            return rotate(x) * times * factor + plus  # type: ignore[name-defined]  # noqa: F821

    Module.forward.__wrapped__.__globals__["rotate"] = lambda x: x
    try:
        rebuilt = rebuild(Module.forward, {"rotate": lambda x: x * 10})
        assert rebuilt is not None
        module = Module()
        torch.testing.assert_close(rebuilt(module, X), X * 60 + 1)
        torch.testing.assert_close(rebuilt(module, X, 1, plus=0, verbose=True), X * 60)
        torch.testing.assert_close(module(X), X * 6 + 1)
        assert inspect.signature(rebuilt) == inspect.signature(Module.forward)
    finally:
        del globals()["rotate"]


@pytest.mark.parametrize("cls", [models.UncopyableForward, models.WritesGlobal])
def test_what_cannot_be_copied_is_not_rebuilt(cls: type[nn.Module]) -> None:
    assert rebuild(cls.forward, {"double": len}) is None
