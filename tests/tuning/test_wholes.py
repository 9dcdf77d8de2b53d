"""Layers of layers and a head with its loss: tried in the whole model, and chosen where that is clearly better."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kernelwise as kw
from kernelwise._applying import _apply
from kernelwise._evidence import EAGER, OWN_CODE, Comparison, Run
from kernelwise._tuning import _races, _tune
from kernelwise._tuning._wholes import wholes_of

HEAD, DECODER = "builtin:LinearCrossEntropy", "builtin:DecoderLayer"
WORKLOADS = ("prefill", "training")


@pytest.fixture
def model(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> LlamaForCausalLM:
    monkeypatch.setenv("KERNELWISE_CACHE", str(tmp_path))
    monkeypatch.setattr(_tune, "_worth_tuning", lambda session: [])  # of all other layers: this is about wholes
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=2, **sizes))


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, float | str]], list[Any]]:
    """Plant how much faster a model is with a kernel for wholes in it, or why it fails; all else makes no difference."""

    def planted(speedups: dict[str, float | str]) -> list[Any]:
        seen = []

        def speed(one: Any) -> float | str:
            found = 1.0
            for name, by in speedups.items():
                paths = {"LinearCrossEntropy": "LinearCrossEntropy", "DecoderLayer": "model.layers.0"}
                if paths[name] in _apply.kernelized_paths(one.model):
                    if isinstance(by, str):
                        return by
                    found *= by
            return found

        def race(contenders: Any, workload: Any, *, own: str = EAGER, **_: Any) -> tuple[Run, ...]:
            seen.append((workload.name, own, tuple(contenders)))
            base, runs = speed(contenders[own]), []
            for name, one in contenders.items():
                by = speed(one)
                if isinstance(by, str) or isinstance(base, str):
                    runs.append(Run(name, workload.name, None, 0, str(by)))
                else:
                    by /= base
                    runs.append(Run(name, workload.name, Comparison(1.0, 1 / by, by, by * 0.99, by * 1.01, 20)))
            return tuple(runs)

        monkeypatch.setattr(_races, "race", race)
        return seen

    return planted


def tune(model: torch.nn.Module, seconds: float = 60, **options: Any) -> kw.KernelConfig:
    ids = torch.arange(24).reshape(2, 12)
    return kw.tune(model, {"input_ids": ids}, workload=WORKLOADS, seconds=seconds, contenders=[], **options)


def choice(config: kw.KernelConfig, name: str, mode: str) -> Any:
    assert config.evidence is not None
    return next(one for one in config.evidence.choices if (one.name, one.mode) == (name, mode))


def test_a_head_is_joined_with_its_loss_where_the_whole_model_is_faster(model, plant):
    seen = plant({"LinearCrossEntropy": 1.2})
    config = tune(model)
    assert config.kernel_mapping == {"LinearCrossEntropy": {"training": HEAD}}
    found = choice(config, "LinearCrossEntropy", "training")
    assert found.chosen == HEAD
    assert "1.2" in found.reason
    assert found.candidates[0].timings[0].case == "training, whole model"
    assert ("training", "tuned", ("tuned", HEAD)) in seen
    assert not any(workload == "prefill" and HEAD in names for workload, _, names in seen), "it has no loss to join"
    tuned = [run for run in config.evidence.runs if (run.contender, run.workload) == ("tuned", "training")]
    assert tuned[0].comparison.speedup == pytest.approx(1.2)
    kw.kernelize(model, config)
    assert "LinearCrossEntropy" in _apply.kernelized_paths(model)


def test_what_makes_no_difference_or_fails_stays_out_and_says_so(model, plant):
    plant({"LinearCrossEntropy": 1.0, "DecoderLayer": "its gradients differ"})
    config = tune(model)
    assert config.kernel_mapping == {}
    head, layer = choice(config, "LinearCrossEntropy", "training"), choice(config, "DecoderLayer", "training")
    assert (head.chosen, layer.chosen) == (OWN_CODE, OWN_CODE)
    assert "not clearly better" in head.reason
    assert layer.candidates[0].out == "its gradients differ"


def test_each_is_raced_beside_those_before_and_the_result_has_all(model, plant):
    plant({"LinearCrossEntropy": 1.1, "DecoderLayer": 1.1})
    config = tune(model)
    assert config.kernel_mapping == {
        "LinearCrossEntropy": {"training": HEAD},
        "DecoderLayer": DECODER,
    }
    tuned = {run.workload: run.comparison.speedup for run in config.evidence.runs if run.contender == "tuned"}
    assert tuned == pytest.approx({"prefill": 1.1, "training": 1.21})


def test_what_there_is_no_time_for_is_not_raced_and_said(model, plant):
    seen = plant({"LinearCrossEntropy": 1.2})
    config = tune(model, seconds=0.001)
    assert config.kernel_mapping == {}
    assert not any(own == "tuned" for _, own, _ in seen), "confirming alone runs"
    assert any(f"no time was left to try {HEAD}" in note and "tune again" in note for note in config.evidence.notes)


def test_all_races_together_take_a_part_of_what_is_left(model, plant, monkeypatch):
    plant({})
    allowed, race = [], _races.race
    monkeypatch.setattr(
        _races,
        "race",
        lambda *args, seconds, own=EAGER, **more: (
            allowed.append((own, seconds)) or race(*args, seconds=seconds, own=own, **more)
        ),
    )
    tune(model, seconds=20)
    wholes = [seconds for own, seconds in allowed if own == "tuned"]
    assert len(wholes) == 3  # the decoder layer in prefill and training, the head in training
    assert 0 < sum(wholes) <= 0.25 * 20


def test_what_the_user_decides_is_not_tried(model):
    layers = kw.discover(model)
    names = lambda config: {kind.layer.name for kind in wholes_of(layers, ("training",), config.rules())}  # noqa: E731
    assert names(kw.KernelConfig()) == {"LinearCrossEntropy", "DecoderLayer"}
    assert names(kw.KernelConfig({"LinearCrossEntropy": None})) == {"DecoderLayer"}
    assert names(kw.KernelConfig({"DecoderLayer": DECODER})) == {"LinearCrossEntropy"}


def test_the_real_race_finds_what_computes_something_else(model, monkeypatch):
    from kernelwise.kernels.cpu import linear_cross_entropy as module

    right = module.linear_cross_entropy
    monkeypatch.setattr(module, "linear_cross_entropy", lambda *args, **options: 1.5 * right(*args, **options))
    config = tune(model)
    assert "LinearCrossEntropy" not in config.kernel_mapping
    found = choice(config, "LinearCrossEntropy", "training")
    assert found.candidates[0].out is not None
    assert found.reason == "every candidate is out"
