"""Bench: all contenders in all workloads, the model stays as it was, and the command."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from racing import SECONDS, found_in
from torch import Tensor, nn

import kernelwise
from kernelwise._cli import main
from kernelwise._errors import PlanError
from kernelwise._evidence import Tuning
from kernelwise._measuring._bench import bench, show
from kernelwise._measuring._race import race, sharing_copy

# ------------------------------------------------------------------------------------------------------------------- bench


def test_bench_times_contenders_and_changes_nothing(llama: Any, inputs: dict[str, Tensor]) -> None:
    model: Any = kernelwise.kernelize(sharing_copy(llama)).train()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    values = [None if gradient is None else gradient.clone() for gradient in gradients]
    report, state = str(kernelwise.report(model)), {n: v.clone() for n, v in model.state_dict().items()}
    runs = bench(
        model,
        inputs,
        contenders=["builtin", "plain"],
        configs={"plain": {"RMSNorm": "builtin:RMSNorm"}},
        seconds=SECONDS,
    )
    assert [(run.workload, run.contender) for run in runs] == [
        (workload, contender)
        for workload in ("prefill", "decode", "training")
        for contender in ("eager", "builtin", "plain")
    ]
    assert [run.error for run in runs] == [None] * 9
    assert all(run.tokens_per_s for run in runs)
    assert model.training
    assert all(module.training for module in model.modules())
    assert all(one is other.grad for one, other in zip(gradients, model.parameters(), strict=True))
    assert all(
        one is other or (one is not None and other is not None and torch.equal(one, other))
        for one, other in zip(values, gradients, strict=True)
    )
    assert str(kernelwise.report(model)) == report
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_eager_is_the_model_without_the_kernels_it_has(
    llama: Any, inputs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel that somebody forced in is no part of eager, so that it is seen to be wrong."""
    copied: Any = kernelwise.kernelize(sharing_copy(llama))
    seen: list[bool] = []

    def spied(contenders: Any, *rest: Any, **options: Any) -> Any:
        seen.append("no kernels" in str(kernelwise.report(contenders["eager"].model)))
        return race(contenders, *rest, **options)

    monkeypatch.setattr("kernelwise._measuring._bench.race", spied)
    bench(copied, inputs, contenders=["builtin"], workloads=["prefill"], seconds=SECONDS)
    assert seen == [True]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"contenders": ["builtins"]}, "did you mean 'builtin'"),
        ({"contenders": ["liger+compile"]}, "is no contender"),
        ({"configs": {"liger": None}}, "is a contender of its own"),
        ({"workloads": ["decoding"]}, "is no workload"),
    ],
)
def test_wrong_names_are_said_at_once(llama: Any, inputs: Any, options: Any, said: str) -> None:
    with pytest.raises(PlanError, match=said):
        bench(llama, inputs, **options)


def test_a_model_on_meta_cannot_run() -> None:
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    with pytest.raises(PlanError, match="meta"):
        bench(model, torch.ones(1, 2))


def test_without_a_kernel_builtin_says_so() -> None:
    runs = bench(nn.Linear(2, 2).double().eval(), torch.ones(1, 2).double(), contenders=["builtin"], seconds=SECONDS)
    assert "no kernel for any layer" in (found_in(runs, "builtin").error or "")
    assert found_in(runs, "eager").comparison is not None


def test_what_cannot_run_here_is_a_run_with_a_reason(llama: Any, inputs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    began = time.perf_counter()
    runs = bench(llama, inputs, contenders=["transformers", "liger"], workloads=["prefill"], seconds=SECONDS)
    assert "the Hub, which cannot be reached" in (found_in(runs, "transformers").error or "")
    assert torch.cuda.is_available() or "Triton" in (found_in(runs, "liger").error or "")
    assert time.perf_counter() - began < 30


# ------------------------------------------------------------------------------------------------------------ command line


def run_cli(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit_:
        main(args)
    captured = capsys.readouterr()
    return int(exit_.value.code or 0), captured.out, captured.err


def test_command_prints_a_table_and_writes_files(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config, file, html = tmp_path / "mine.toml", tmp_path / "found.json", tmp_path / "found.html"
    config.write_text('[kernels]\nRMSNorm = "builtin:RMSNorm"\n')
    code, out, _ = run_cli(
        capsys, "bench", "llama", "--device", "cpu", "--tokens", "8", "--new-tokens", "2", "--seconds", "0.02",
        "--contender", "builtin", "--contender", "mine", "--contender", "liger", "--config", str(config),
        "--json", str(file), "--html", str(html),
    )  # fmt: skip
    assert code == 0
    lines = [line.split() for line in out.splitlines()]
    assert [line[:2] for line in lines if line[:1] in (["prefill"], ["decode"])] == [
        ["prefill", "eager"],
        ["decode", "eager"],
    ]
    assert sum(line[:1] == ["mine"] for line in lines) == 2
    assert "█" in out
    assert "not run: liger (prefill, decode):" in out
    assert next(line for line in out.splitlines() if "decode" in line).count("/token") == 1
    assert "random weights" in out
    assert "input_ids [1, 8]" in out
    found = Tuning.from_json(json.loads(file.read_text()))
    assert show(found) in out
    assert {run.contender for run in found.runs} == {"eager", "builtin", "mine", "liger"}
    assert found.environment
    assert found.date
    assert "builtin" in html.read_text()


def test_command_with_a_factory_and_its_inputs(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_bench_model.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def model(): return nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.LayerNorm(8))\n"
        "def inputs(): return torch.ones(2, 4)\n"
    )
    arguments = ("bench", "my_bench_model:model", "--device", "cpu", "--seconds", "0.02", "--contender", "builtin")
    code, out, _ = run_cli(capsys, *arguments, "--inputs", "my_bench_model:inputs")
    assert code == 0
    assert "forward" in out
    assert "tokens/s" not in out
    code, _, err = run_cli(capsys, *arguments)
    assert code == 1
    assert "--inputs module:factory" in err


def test_files_that_cannot_be_written_are_said_before_anything_runs(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, out, err = run_cli(capsys, "bench", "llama", "--json", str(tmp_path / "nowhere" / "found.json"))
    assert code == 1
    assert not out
    assert "its directory does not exist" in err


def test_exit_code_where_not_even_the_own_code_runs(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_broken_model.py").write_text(
        "import torch\nfrom torch import nn\ndef model(): return nn.Linear(4, 8)\ndef inputs(): return torch.ones(2, 3)\n"
    )
    code, out, _ = run_cli(
        capsys, "bench", "my_broken_model:model", "--device", "cpu", "--inputs", "my_broken_model:inputs",
        "--contender", "builtin",
    )  # fmt: skip
    assert code == 1
    assert "no contender ran" in out
    assert "RuntimeError" in out
