"""Bench: contenders share the weights, who computes something else has no speed, and the model stays as it was."""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MethodType, ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from fakehub import kernel_files
from torch import Tensor, nn

import kernelwise
from kernelwise._cli import main
from kernelwise._errors import KernelwiseError, PlanError
from kernelwise._evidence import Run, Tuning
from kernelwise._measuring import _contenders
from kernelwise._measuring._bench import bench, evidence, show
from kernelwise._measuring._race import Contender, race, sharing_copy
from kernelwise._measuring._workload import workloads_of
from kernelwise._models import load_model
from kernelwise._weights import load_with_weights, make_inputs

SECONDS = 0.02


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KERNELWISE_CACHE", str(tmp_path / "cache"))  # or it waits for whoever else measures here
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def llama() -> Any:
    return load_model("llama").model


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(4, 250, (1, 16), generator=torch.Generator().manual_seed(1))}


def found_in(runs: tuple[Run, ...], contender: str) -> Run:
    (run,) = (run for run in runs if run.contender == contender)
    return run


def raced(model: nn.Module, inputs: Any, workload: str, **others: Callable[[nn.Module], Callable[..., Any]]) -> Any:
    """Race a model's own code with copies of it that are called through what `others` return."""
    contenders = {"eager": Contender(sharing_copy(model))}
    for name, wrap in others.items():
        copied = sharing_copy(model)
        contenders[name] = Contender(copied, call=wrap(copied))
    (wanted,) = workloads_of(model, inputs, [workload], steps=3)
    return race(contenders, wanted, device="cpu", seconds=SECONDS)


# ------------------------------------------------------------------------------------------------------- copies that share


def test_a_copy_shares_weights_and_nothing_else(llama: Any) -> None:
    llama.lm_head.register_forward_hook(hook := lambda *_: None)
    copied: Any = sharing_copy(llama)
    assert [id(p) for p in copied.parameters()] == [id(p) for p in llama.parameters()]
    assert [id(b) for b in copied.buffers()] == [id(b) for b in llama.buffers()]
    assert not set(map(id, copied.modules())) & set(map(id, llama.modules()))
    assert list(copied.lm_head._forward_hooks.values()) == [hook]
    llama.lm_head._forward_hooks.clear()
    kernelwise.kernelize(copied)
    assert "no kernels" in str(kernelwise.report(llama))


def test_a_model_that_cannot_be_copied_is_named() -> None:
    model = nn.Linear(2, 2)
    model.lock = __import__("threading").Lock()
    with pytest.raises(PlanError, match="Linear cannot be copied"):
        bench(model, torch.ones(1, 2), contenders=["builtin"])


# -------------------------------------------------------------------------------------------------- right before it is fast


def off_by(factor: float) -> Callable[[nn.Module], Callable[..., Any]]:
    def wrap(model: nn.Module) -> Callable[..., Any]:
        def scale(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            return output * factor

        next(m for n, m in model.named_modules() if n.endswith("mlp")).register_forward_hook(scale)
        return model

    return wrap


@pytest.mark.parametrize("workload", ["forward", "prefill", "decode", "training"])
def test_who_computes_something_else_has_no_speed(llama: Any, inputs: Any, workload: str) -> None:
    runs = raced(llama, inputs, workload, wrong=off_by(1.01), right=off_by(1 + 1e-7))
    assert "differ from eager's by" in (found_in(runs, "wrong").error or "")
    assert found_in(runs, "wrong").comparison is None
    assert found_in(runs, "right").error is None


def test_wrong_gradients_alone_are_found(llama: Any, inputs: Any) -> None:
    class Louder(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.view_as(x)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            return grads[0] * 1.01

    def wrap(model: nn.Module) -> Callable[..., Any]:
        model.get_submodule("model.norm").register_forward_hook(lambda m, a, out: Louder.apply(out))
        return model

    assert "its gradients differ" in (found_in(raced(llama, inputs, "training", wrong=wrap), "wrong").error or "")


def test_bfloat16_allows_its_rounding_and_no_more(inputs: Any) -> None:
    model = load_model("llama", dtype="bfloat16").model
    runs = raced(model, inputs, "prefill", wrong=off_by(2.0), builtin=kernelwise.kernelize)
    assert "differ" in (found_in(runs, "wrong").error or "")
    assert found_in(runs, "builtin").error is None


def test_products_that_may_be_less_exact_allow_more() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8))
    off = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8))
    off.load_state_dict({name: value * (1 + 2e-4) for name, value in model.state_dict().items()})
    inputs = torch.randn(8, 64)

    def error_of_off() -> str | None:
        return found_in(raced(model, inputs, "forward", off=lambda model: off), "off").error

    assert "differ" in (error_of_off() or "")
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        assert error_of_off() is None
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda out: out / 0, "infinite or not a number"),
        (lambda out: out[:, :1], "other shapes"),
        (lambda out: 1 / 0, "ZeroDivisionError: division by zero"),
    ],
)
def test_a_contender_that_fails_leaves_the_others(change: Callable[[Tensor], Any], said: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

    def wrap(model: nn.Module) -> Callable[..., Any]:
        return lambda input: change(model(input))

    runs = raced(model, torch.randn(3, 4), "forward", wrong=wrap, same=lambda model: model)
    assert said in (found_in(runs, "wrong").error or "")
    assert found_in(runs, "same").comparison is not None


def test_where_eager_fails_nothing_is_said_of_others() -> None:
    class Broken(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            raise ValueError("planted")

    runs = raced(Broken(2, 2), torch.ones(1, 2), "forward", same=lambda model: model)
    assert found_in(runs, "eager").error == "ValueError: planted"
    assert found_in(runs, "same").error == "there is nothing to compare it with: ValueError: planted"


def test_a_slow_contender_is_slower() -> None:
    def wrap(model: nn.Module) -> Callable[..., Any]:
        def slow(input: Tensor) -> Any:
            time.sleep(0.005)
            return model(input)

        return slow

    runs = raced(nn.Linear(4, 4), torch.ones(1, 4), "forward", slow=wrap)
    compared = found_in(runs, "slow").comparison
    assert compared is not None
    assert compared.speedup < 0.5
    assert compared.us > 5000
    assert compared.first_s is not None
    assert compared.first_s >= 0.005


def test_a_model_that_draws_random_numbers_may_differ_by_them() -> None:
    model = nn.Sequential(nn.Linear(16, 64), nn.Dropout(0.5), nn.Linear(64, 4)).train()

    def other_numbers(model: nn.Module) -> Callable[..., Any]:
        def call(input: Tensor) -> Any:
            torch.rand(1)
            return model(input)

        return call

    runs = raced(model, torch.randn(8, 16), "training", other=other_numbers)
    assert found_in(runs, "other").error is None


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


# ------------------------------------------------------------------------------------------------------------ torch.compile


@pytest.fixture
def quick_compile(monkeypatch: pytest.MonkeyPatch, fresh_compiler: None) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))


def test_compiled_contenders_decode(llama: Any, inputs: Any, quick_compile: None) -> None:
    runs = bench(
        llama, inputs, contenders=["torch.compile", "builtin+compile"], workloads=["decode"], steps=3, seconds=SECONDS
    )
    assert [run.error for run in runs] == [None] * 3
    first = [run.comparison.first_s or 0.0 for run in runs if run.comparison is not None]
    assert first[1] > first[0]  # compiling is in it
    found = evidence(llama, runs, name="llama")
    assert any("static cache" in note for note in found.notes)


def test_compiling_again_and_again_is_an_error(monkeypatch: pytest.MonkeyPatch, quick_compile: None) -> None:
    monkeypatch.setattr(_contenders, "MAX_COMPILATIONS", 2)

    class EverNew(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.key = nn.Linear(2, 2), ""

        def forward(self, input: Tensor) -> Tensor:
            self.key = self.key + "a"
            out: Tensor = self.linear(input)
            return out + len(self.key) * 0

    runs = bench(EverNew(), torch.ones(1, 2), contenders=["torch.compile"], workloads=["forward"], seconds=SECONDS)
    assert "recompile" in (found_in(runs, "torch.compile").error or "").lower()


# -------------------------------------------------------------------------------------------------- kernels of others


@pytest.fixture
def fake_liger(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A package that patches like Liger: functions of transformers for everybody, layers of the given model."""
    from transformers.models.llama import modeling_llama

    seen = SimpleNamespace(rotations=0, norms=0, was=modeling_llama.apply_rotary_pos_emb, module=modeling_llama)

    def rotate(*args: Any, **kwargs: Any) -> Any:
        seen.rotations += 1
        return seen.was(*args, **kwargs)

    def patch(model: Any) -> None:
        seen.module.apply_rotary_pos_emb = rotate
        seen.module.LlamaMLP.forward, seen.mlp = (lambda self, x: mlp(self, x)), seen.module.LlamaMLP.forward
        norm = model.model.norm

        def forward(self: Any, x: Tensor) -> Any:
            seen.norms += 1
            return type(self).forward(self, x)

        norm.forward = MethodType(forward, norm)

    mlp = modeling_llama.LlamaMLP.forward
    package, transformers, patches = (ModuleType(n) for n in ("liger_kernel", "liger_kernel.transformers", "patches"))
    patches.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": patch}  # type: ignore[attr-defined]
    patches._apply_liger_kernel_to_instance = patch  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", transformers)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", patches)
    monkeypatch.setattr(_contenders, "_runs_triton", lambda model: True)
    seen.mlp = mlp
    yield seen
    modeling_llama.apply_rotary_pos_emb, modeling_llama.LlamaMLP.forward = seen.was, mlp


def test_liger_is_there_during_its_own_turns_alone(llama: Any, inputs: Any, fake_liger: SimpleNamespace) -> None:
    seen: list[bool] = []
    llama.model.embed_tokens.register_forward_hook(
        lambda *_: seen.append(fake_liger.module.apply_rotary_pos_emb is fake_liger.was)
    )
    try:
        runs = bench(llama, inputs, contenders=["builtin", "liger"], workloads=["prefill"], seconds=SECONDS)
    finally:
        llama.model.embed_tokens._forward_hooks.clear()
    assert [run.error for run in runs] == [None] * 3
    assert fake_liger.norms
    assert fake_liger.rotations
    assert True in seen
    assert False in seen
    assert fake_liger.module.apply_rotary_pos_emb is fake_liger.was
    assert fake_liger.module.LlamaMLP.forward is fake_liger.mlp
    assert "forward" not in vars(llama.model.norm)


def test_liger_has_no_patch_for_every_model(inputs: Any, fake_liger: SimpleNamespace) -> None:
    model = load_model("gpt2").model
    runs = bench(model, inputs, contenders=["liger"], workloads=["prefill"], seconds=SECONDS)
    assert "no patch for models of type 'gpt2'" in (found_in(runs, "liger").error or "")


def test_transformers_runs_its_kernels(llama: Any, inputs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What transformers puts in is seen, on the copy alone; that it put in nothing is said."""
    model: Any = sharing_copy(llama)
    calls: list[bool] = []

    def kernel(self: Any, hidden_states: Tensor) -> Any:
        calls.append(self.training)
        return type(self).forward(self, hidden_states)

    def use_kernels(self: Any, wanted: bool) -> None:
        for module in self.modules():
            if type(module).__name__ == "LlamaRMSNorm":
                module.forward = MethodType(kernel, module)
            elif type(module).__name__ == "LlamaMLP":
                module.forward = MethodType(type(module).forward, module)  # as where none could be loaded

    monkeypatch.setattr(type(model), "set_use_kernels", use_kernels)
    runs = bench(model, inputs, contenders=["transformers"], workloads=["prefill", "training"], seconds=SECONDS)
    assert [run.error for run in runs] == [None] * 4
    assert set(calls) == {True, False}
    assert "forward" not in vars(model.model.norm)
    monkeypatch.undo()


def test_kernels_that_transformers_loads_are_seen(llama: Any, inputs: Any, tmp_path: Path) -> None:
    """With the libraries as they are, and a repository of kernels on this machine."""
    from kernels import LocalLayerRepository, Mode, use_kernel_mapping
    from kernels.layer.kernelize import _KERNEL_MAPPING

    source = (
        "import torch\nfrom torch import nn\n"
        "class RMSNorm(nn.Module):\n"
        "    has_backward = True\n"
        "    def forward(self, hidden_states):\n"
        "        return torch.rms_norm(hidden_states, (hidden_states.shape[-1],), self.weight, self.variance_epsilon)FAULT\n"
    )
    found = {}
    for name, fault in (("right", ""), ("wrong", " * 1.01")):
        for path, data in kernel_files("norm", layers=source.replace("FAULT", fault)).items():
            file = tmp_path / name / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
        repository = LocalLayerRepository(repo_path=tmp_path / name, layer_name="RMSNorm")
        with use_kernel_mapping({"RMSNorm": {"cpu": {Mode.INFERENCE: repository}}}):
            known = set(_KERNEL_MAPPING.get())  # other tests may have had transformers register its own for good
            runs = bench(llama, inputs, contenders=["transformers"], workloads=["prefill"], seconds=SECONDS)
            assert set(_KERNEL_MAPPING.get()) == known  # what transformers registers is gone
        found[name] = found_in(runs, "transformers").error
    assert found["right"] is None
    assert "differ from eager's" in (found["wrong"] or "")
    assert "forward" not in vars(llama.model.norm)


def test_transformers_without_kernels_for_this_machine(llama: Any, inputs: Any) -> None:
    if torch.cuda.is_available():
        pytest.skip("there may be kernels in the cache of this machine")
    runs = bench(llama, inputs, contenders=["transformers"], workloads=["prefill"], seconds=SECONDS)
    assert "could be loaded for this model on cpu" in (found_in(runs, "transformers").error or "")


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


# ---------------------------------------------------------------------------------------------------- weights and inputs


def test_a_directory_gives_its_weights(llama: Any, tmp_path: Path) -> None:
    llama.save_pretrained(tmp_path)
    named = load_with_weights(str(tmp_path), device="cpu", dtype="bfloat16")
    for name, value in llama.state_dict().items():
        assert torch.equal(named.model.state_dict()[name], value.to(torch.bfloat16))
    assert not named.model.training
    cut = load_with_weights(str(tmp_path), device="cpu", layers=1)
    assert len(cut.model.model.layers) == 1  # type: ignore[union-attr, arg-type]
    assert cut.notes == ("1 hidden layers, where its config has 2",)


def test_a_directory_without_weights_gets_random_ones(llama: Any, tmp_path: Path) -> None:
    llama.config.save_pretrained(tmp_path)
    named = load_with_weights(str(tmp_path), device="cpu", layers=3)
    assert not any(parameter.is_meta for parameter in named.model.parameters())
    assert named.notes == ("3 hidden layers, where its config has 2", "random weights: the directory has none")


def test_layers_of_a_type_repeat_its_kinds() -> None:
    named = load_with_weights("gemma3_text", device="cpu", layers=14)
    kinds = named.model.config.layer_types  # type: ignore[union-attr]
    assert len(kinds) == 14
    assert len(set(kinds)) == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"spec": "llama", "device": "nowhere"}, "has no nowhere"),
        ({"spec": "llama", "device": "xla" if torch.cuda.is_available() else "cuda"}, "that PyTorch can use"),
        ({"spec": "somebody:model", "layers": 2}, "leave out --full and --layers"),
        ({"spec": "lama", "layers": 2}, "no model type of transformers"),
        ({"spec": "./nowhere", "layers": 2}, "no such directory"),
        ({"spec": "resnet", "layers": 2}, "number of layers cannot be set"),
    ],
)
def test_what_cannot_be_loaded_is_said(arguments: Any, said: str) -> None:
    with pytest.raises(KernelwiseError, match=said):
        load_with_weights(**arguments)


@pytest.mark.parametrize("model_type", ["llama", "bert", "t5", "vit"])
def test_made_inputs_run_the_model(model_type: str) -> None:
    model: Any = load_with_weights(model_type, device="cpu").model
    given = make_inputs(model, batch=2, tokens=8)
    with torch.no_grad():
        assert next(iter(model(**given).values())).shape[0] == 2
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    make_inputs(model, batch=2, tokens=8)
    assert torch.equal(torch.rand(1), expected)


def test_made_tokens_are_none_of_the_special_ones(llama: Any) -> None:
    llama.config.image_token_id = 17
    ids = make_inputs(llama, batch=8, tokens=512)["input_ids"]
    del llama.config.image_token_id
    assert not (ids == 17).any()
    assert int(ids.max()) < 256
    assert len(ids.unique()) > 200
