"""Properties: whatever is put in, in whatever order, can be taken out again without a trace."""

from __future__ import annotations

import copy
import pickle
import random
from typing import Any

import fakes
import models
import torch
from fakes import kernel, only
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from snapshot import Snapshot
from torch import nn

import kernelwise as kw
from kernelwise._discover import OURS

LAYERS = {
    "norm": models.Norm,
    "same norm": models.SameNorm,
    "other norm": models.OtherNorm,
    "activation": models.Activation,
    "refusing activation": lambda: models.Activation(wants_kernel=False),
    "affine": models.Affine,
    "widened": models.Widened,
    "undecorated": models.Undecorated,
    "two functions": models.TwoFunctions,
    "decorated forward": models.DecoratedForward,
    "through helper": models.ThroughHelper,
    "inside comprehension": models.InsideComprehension,
    "linear": lambda: nn.Linear(8, 8),
    "silu": nn.SiLU,
}
KERNELS = {
    "RMSNorm": [fakes.GoodNorm, fakes.MarkedNorm, fakes.TwiceMarkedNorm, fakes.ForwardOnlyNorm, fakes.LyingNorm],
    "Activation": [fakes.MarkedActivation],
    "Affine": [fakes.MarkedAffine],
    "Widened": [fakes.MarkedPlusOne],
    "Undecorated": [fakes.MarkedAnyArguments],
    "double": [fakes.MarkedDouble, fakes.ForwardOnlyDouble, fakes.LyingDouble],
    "triple": [fakes.MarkedTriple],
}

shapes = st.recursive(
    st.sampled_from(sorted(LAYERS)), lambda inner: st.lists(inner, min_size=1, max_size=3), max_leaves=6
)


@st.composite
def built(draw: st.DrawFn) -> nn.Module:
    """A tree of layers, one of which may stand in two places."""
    made: list[nn.Module] = []

    def build(shape: Any) -> nn.Module:
        if isinstance(shape, list):
            return models.Stack(*map(build, shape))
        if made and draw(st.booleans()) and draw(st.booleans()):
            return draw(st.sampled_from(made))
        made.append(LAYERS[shape]())
        return made[-1]

    model = models.Stack(build(draw(shapes)), build(draw(shapes)))
    return model.train(draw(st.booleans()))


def names_in(model: nn.Module) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for layer in kw.discover(model):
        if layer.name in KERNELS:
            found.setdefault(layer.name, []).extend(layer.paths)
    return found


@st.composite
def configs(draw: st.DrawFn, model: nn.Module) -> kw.KernelConfig:
    """A mapping over names that the model has, some for a path, a device or a mode."""
    mapping: dict[str, Any] = {}
    for name, paths in names_in(model).items():
        choice = st.sampled_from([kernel(cls) for cls in KERNELS[name]] + [None])
        value = draw(
            st.one_of(
                choice,
                st.fixed_dictionaries({"inference": choice, "training": choice}),
                st.fixed_dictionaries({"cpu": choice, "cuda": choice}),
            )
        )
        if draw(st.booleans()):
            mapping[name] = value
        if draw(st.booleans()):
            mapping[f"{name}@{draw(st.sampled_from(paths))}"] = draw(choice)
    return only(mapping, on_miss="keep")


def run(model: nn.Module) -> list[torch.Tensor]:
    """Outputs in training and in inference, and the gradient of every parameter."""
    training = {module: module.training for module in model.modules()}
    x = torch.linspace(-1, 1, 16).view(2, 8).requires_grad_()
    outputs = []
    for mode in (True, False):
        output = model.train(mode)(x)
        outputs.append(output)
    gradients = torch.autograd.grad(sum(o.sum() for o in outputs), [x, *model.parameters()], allow_unused=True)
    for module, mode in training.items():
        module.training = mode
    return [*outputs, *(g for g in gradients if g is not None)]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


relaxed = settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


@relaxed
@given(st.data())
def test_apply_then_undo_changes_nothing(data: st.DataObject) -> None:
    model = data.draw(built())
    own = run(model)
    before = Snapshot(model)
    kw.kernelize(model, data.draw(configs(model)), device="cpu", mode=data.draw(st.sampled_from([None, "inference"])))
    with_kernels = run(model)
    assert len(with_kernels) == len(own)  # a gradient that was there is there still
    kw.unkernelize(model)
    assert before.differences(model) == []
    assert same(run(model), own)


@relaxed
@given(st.data())
def test_several_kernelizations_undone_in_any_order(data: st.DataObject) -> None:
    """Blocks that overlap, and parts by their paths: what is left runs what its remaining kernelizations say."""
    model = data.draw(built())
    own = run(model)
    before = Snapshot(model)
    blocks = [
        kw.kernelized(model, data.draw(configs(model)), device="cpu") for _ in range(data.draw(st.integers(1, 3)))
    ]
    for block in blocks:
        block.__enter__()
    for block in data.draw(st.permutations(blocks)):
        block.__exit__(None, None, None)
    assert before.differences(model) == []
    assert same(run(model), own)


@relaxed
@given(st.data())
def test_the_order_in_which_blocks_end_does_not_matter(data: st.DataObject) -> None:
    """After all but one have ended, the model is as if only that one had ever been entered."""
    model = data.draw(built())
    chosen = [data.draw(configs(model)) for _ in range(3)]
    kept = data.draw(st.integers(0, 2))
    blocks = [kw.kernelized(model, config, device="cpu") for config in chosen]
    for block in blocks:
        block.__enter__()
    for index in data.draw(st.permutations([i for i in range(3) if i != kept])):
        blocks[index].__exit__(None, None, None)
    left = run(model)
    blocks[kept].__exit__(None, None, None)
    with kw.kernelized(model, chosen[kept], device="cpu"):
        assert same(run(model), left)


@relaxed
@given(st.data())
def test_parts_by_their_paths(data: st.DataObject) -> None:
    model = data.draw(built())
    own = run(model)
    before = Snapshot(model)
    kw.kernelize(model, data.draw(configs(model)), device="cpu")
    paths = sorted({row.path for row in kw.report(model).rows if row.kernel})
    random.Random(0).shuffle(paths)
    for path in paths:
        kw.unkernelize(model, paths=[path])
        assert not [row for row in kw.report(model).rows if row.path == path and row.kernel]
    kw.unkernelize(model)
    assert before.differences(model) == []
    assert same(run(model), own)


@relaxed
@given(st.data())
def test_copies_and_files(data: st.DataObject) -> None:
    """A deep copy computes the same and is undone apart; a pickle holds the model's own code."""
    model = data.draw(built())
    own = run(model)
    before = Snapshot(model)
    kw.kernelize(model, data.draw(configs(model)), device="cpu")
    with_kernels = run(model)
    twin = copy.deepcopy(model)
    assert same(run(twin), with_kernels)
    if not [m for m in model.modules() if m.__dict__.get("_kernel_funcs")]:  # those cannot be pickled as they are
        loaded = pickle.loads(pickle.dumps(model))
        assert same(run(loaded), own)
        assert not [key for m in loaded.modules() for key in m.__dict__ if key in (*OURS, "forward")]
    kw.unkernelize(twin)
    assert same(run(twin), own)
    assert not [key for m in twin.modules() for key in m.__dict__ if key in (*OURS, "forward")]
    assert same(run(model), with_kernels)
    kw.unkernelize(model)
    assert before.differences(model) == []


@relaxed
@given(st.data())
def test_planning_changes_nothing_and_repeats_itself(data: st.DataObject) -> None:
    model = data.draw(built())
    before = Snapshot(model)
    config = data.draw(configs(model))
    plan = kw.plan(model, config, device="cpu")
    assert before.differences(model) == []
    kw.apply(model, plan)
    again = kw.plan(model, config, device="cpu")
    assert again == plan
    kw.unkernelize(model)
    assert before.differences(model) == []
