"""Finding layers: by whom they are named, and that looking changes nothing."""

from __future__ import annotations

import copy

import fakes
import models
import pytest
import torch
from fakes import kernel, only
from models import IDS, tiny
from snapshot import Snapshot
from torch import nn

import kernelwise as kw
from kernelwise._data import Layer


def named(model: nn.Module, name: str) -> list[Layer]:
    return [layer for layer in kw.discover(model) if layer.name == name]


def test_registered_layers_are_found_in_the_order_of_the_tree() -> None:
    model = tiny()
    norms = ["blocks.0.norm1", "blocks.0.norm2", "blocks.1.norm1", "blocks.1.norm2", "norm"]
    assert [layer.path for layer in named(model, "RMSNorm")] == norms
    for layer in named(model, "RMSNorm"):
        assert (layer.how, layer.device, layer.dtypes) == ("registered", "cpu", ("float32",))
        assert {"weight", "variance_epsilon", "training"} <= layer.attributes
        assert [p.name for p in layer.signature] == ["hidden_states"]
        assert layer.blocked is None


def test_looking_changes_nothing() -> None:
    model = tiny()
    before, own = Snapshot(model), model(IDS)
    kw.discover(model)
    kw.discover(model)
    kw.plan(model)
    assert before.differences(model) == []
    assert torch.equal(model(IDS), own)


def test_a_subclass_that_overrides_forward_does_not_inherit_the_name() -> None:
    model = models.Stack(models.Norm(), models.SameNorm(), models.OtherNorm())
    assert [layer.path for layer in named(model, "RMSNorm")] == ["layers.0", "layers.1"]


def test_a_subclass_that_is_registered_again_has_its_own_name() -> None:
    class Again(models.OtherNorm):
        kernel_layer_name = "OtherName"

    assert [layer.name for layer in kw.discover(Again()) if layer.how == "registered"] == ["OtherName"]


def test_a_forward_mixed_in_from_another_class_does_not_get_the_name() -> None:
    class Mixin:
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return hidden_states * 3

    class Mixed(Mixin, models.Norm):
        pass

    assert named(models.Stack(Mixed()), "RMSNorm") == []


def test_kernel_condition_excludes_an_instance() -> None:
    model = models.Stack(models.Activation(), models.Activation(wants_kernel=False))
    first, second = named(model, "Activation")
    assert first.excluded is None
    assert second.excluded is not None
    kw.kernelize(model, only({"Activation": kernel(fakes.MarkedActivation)}), device="cpu")
    assert fakes.marked(model.layers[0](torch.zeros(3)))
    assert not fakes.marked(model.layers[1](torch.zeros(3)))
    reason = [row.reason for row in kw.report(model).rows if row.path == "layers.1"]
    assert all("kernel_condition" in str(text) for text in reason)


def test_a_condition_that_fails_is_a_reason_and_no_crash() -> None:
    model = models.Stack(models.Activation())
    del model.layers[0].wants_kernel
    (layer,) = named(model, "Activation")
    assert "AttributeError" in str(layer.excluded)


def test_register_layer_names_a_class_and_changes_nothing_on_it() -> None:
    class Own(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.cumsum(-1)

    class Child(Own):
        pass

    class Other(Own):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    before = dict(vars(Own))
    assert kw.register_layer(Own, "Sum") is Own
    assert dict(vars(Own)) == before
    model = models.Stack(Own(), Child(), Other())
    assert [(layer.path, layer.how) for layer in named(model, "Sum")] == [("layers.0", "named"), ("layers.1", "named")]
    kw.kernelize(model, only({"Sum": kernel(fakes.MarkedPlusOne)}), device="cpu")
    assert fakes.marked(model.layers[0](torch.zeros(3)))
    kw.unkernelize(model)


@pytest.mark.parametrize("bad", [(int, "Name"), ("Norm", "Name"), (models.Norm(), "Name")])
def test_register_layer_takes_only_classes_of_modules(bad: tuple[type, str]) -> None:
    with pytest.raises(TypeError):
        kw.register_layer(*bad)


@pytest.mark.parametrize("name", ["", "not a name", "a.b", "a@b", None, 3])
def test_register_layer_takes_only_identifiers(name: str) -> None:
    with pytest.raises(TypeError):
        kw.register_layer(models.OtherNorm, name)


def test_functions_hidden_on_a_module() -> None:
    model = tiny()
    layers = named(model, "rotary_pos_emb")
    assert [layer.path for layer in layers] == [f"blocks.{i}.attention.rotary_pos_emb" for i in (0, 1)]
    for layer in layers:
        assert layer.function == "apply_rotary_pos_emb"
        assert [p.name for p in layer.signature] == ["q", "k", "cos", "sin", "unsqueeze_dim"]
    assert "rotary_pos_emb" not in dict(model.blocks[0].attention.named_children())


def test_functions_under_the_other_attribute() -> None:
    model = models.TwoFunctions()
    model.__dict__["_hidden_kernels"] = model.__dict__.pop("_kernel_funcs")
    assert [layer.function for layer in kw.discover(model)] == ["double", "triple"]


def test_a_name_that_is_only_an_attribute_in_the_forward_is_no_call_of_the_function() -> None:
    from kernels import use_kernelized_func

    @use_kernelized_func(models.double)
    class CallsMethod(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.double()

    CallsMethod.forward.__globals__["double"] = models.double
    (layer,) = named(CallsMethod(), "double")
    assert layer.blocked is not None


def test_two_functions_of_one_layer_name_are_two_rows() -> None:
    from kernels import use_kernel_forward_from_hub, use_kernelized_func

    space: dict[str, object] = {"torch": torch}
    exec("def one(x):\n    return x * 2\ndef two(x):\n    return x * 2\n", space)
    one, two = (use_kernel_forward_from_hub("double")(space[name]) for name in ("one", "two"))
    space |= {"one": one, "two": two, "nn": nn}
    exec("class Both(nn.Module):\n    def forward(self, x):\n        return one(x) + two(x)\n", space)
    model = use_kernelized_func(one, two)(space["Both"])()  # type: ignore[operator]
    if len(model.__dict__["_kernel_funcs"]) < 2:  # the library keeps wrappers by name
        model.__dict__["_kernel_funcs"] = {"one": one, "two": two}
    assert [layer.function for layer in named(model, "double")] == ["one", "two"]
    x = torch.zeros(3)
    kw.kernelize(model, only({"double": kernel(fakes.MarkedDouble)}), device="cpu")
    assert torch.equal(model(x), x + 2 * fakes.MARK)
    assert len([row for row in kw.report(model).rows if row.kernel]) == 4


def test_a_decorated_function_held_as_a_submodule_is_blocked() -> None:
    model = models.Stack(models.double)
    (layer,) = named(model, "double")
    assert "shared" in str(layer.blocked)
    with pytest.raises(kw.PlanError, match="shared"):
        kw.kernelize(model, only({"double": kernel(fakes.MarkedDouble)}), device="cpu")


def test_each_layer_has_its_own_size() -> None:
    model = nn.Sequential(
        nn.Linear(4, 8),
        nn.Linear(8, 8, bias=False),
        nn.Linear(4, 8),
        nn.LayerNorm(8, elementwise_affine=False),
    )
    found = {layer.path: layer.numel for layer in kw.discover(model) if layer.name in ("Linear", "LayerNorm")}
    assert found["0"] == found["2"] == 4 * 8 + 8
    assert found["1"] == 8 * 8
    assert found["3"] == 0


def test_shared_modules_are_one_layer() -> None:
    model = models.Stack(*[models.Norm()] * 3)
    (layer,) = named(model, "RMSNorm")
    assert layer.path == "layers.0"
    assert layer.paths == ("layers.0", "layers.1", "layers.2")


def test_a_kernelized_model_is_discovered_as_before() -> None:
    model = tiny()
    before = kw.discover(model)
    kw.kernelize(model, only({"RMSNorm": kernel(fakes.MarkedNorm), "rotary_pos_emb": kernel(fakes.MarkedRotary)}))
    assert kw.discover(model) == before
    assert kw.discover(copy.deepcopy(model)) == before
    kw.unkernelize(model)
    assert kw.discover(model) == before


@pytest.mark.parametrize("inner", [models.TwoFunctions, models.Activation])
def test_kernels_further_in_do_not_hide_what_a_module_computes(inner: type[nn.Module]) -> None:
    model = models.Stack(models.Stack(inner(), nn.Linear(8, 8)), nn.SiLU())
    before = kw.discover(model)
    assert before[0].path == ""
    mapping = {"triple": kernel(fakes.MarkedTriple)} if inner is models.TwoFunctions else {}
    mapping |= {"Activation": kernel(fakes.MarkedActivation)} if inner is models.Activation else {}
    kw.kernelize(model, only(mapping))
    assert kw.discover(model) == before


def test_a_deep_copy_can_have_function_kernels() -> None:
    """The copy holds copies of the wrappers, while its forward still calls the functions themselves."""
    model = copy.deepcopy(models.TwoFunctions())
    kw.kernelize(model, only({"double": kernel(fakes.MarkedDouble)}), device="cpu")
    assert fakes.marked(model(torch.zeros(3)))


def test_training_and_eval_are_discovered_alike() -> None:
    model = tiny()
    assert kw.discover(model.train()) == kw.discover(model.eval())


def test_devices_are_told_per_layer() -> None:
    model = models.Stack(models.Norm(), models.Norm().to("meta"), models.Activation())
    assert [layer.device for layer in kw.discover(model)] == ["cpu", "meta", "cpu"]


def test_odd_models_are_looked_at_without_harm() -> None:
    class Odd(nn.Module):
        forward = staticmethod(lambda x: x)  # type: ignore[assignment]

    class NoForward(nn.Module):
        pass

    class HasAttributes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self._kernel_funcs = None

        def __getattr__(self, name: str) -> object:
            if name.startswith("_"):
                return super().__getattr__(name)
            raise RuntimeError(f"nobody may ask for {name}")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    scripted = torch.jit.script(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    traced = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    model = nn.ModuleList([Odd(), NoForward(), HasAttributes(), scripted, traced, nn.Identity(), nn.ModuleDict()])
    keys = [list(module.__dict__) for module in model]
    kw.discover(model)
    kw.kernelize(model)
    kw.unkernelize(model)
    assert [list(module.__dict__) for module in model] == keys


def test_a_model_without_layers() -> None:
    assert kw.discover(nn.Module()) == ()
    assert kw.discover(nn.Sequential()) == ()
