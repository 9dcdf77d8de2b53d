"""`kernelize(..., verify="auto")`: nothing of others goes in unproven, and a proof is asked for once."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
import types
from pathlib import Path

import checking  # noqa: F401  (names the layers of the gallery)
import gallery
import pytest
import torch
from torch import nn

import kernelwise as kw
from kernelwise._alike import function_code, traits_of
from kernelwise._data import from_json
from kernelwise._register import unregister_op
from kernelwise._reporting._report import Report
from kernelwise._verifying import _inputs, _prove, _worker
from kernelwise.sources import package

LAYERS = """
import os, time
import torch
from torch import nn


def norm(x, weight, eps):
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


class Right(nn.Module):
    def forward(self, hidden_states):
        return norm(hidden_states, self.weight, self.variance_epsilon)


class NotScaled(nn.Module):
    def forward(self, x, scale=None):
        return torch.sort(x, -1).values * self.weight


class ScaledToo(nn.Module):
    def forward(self, x, scale=None):
        y = torch.sort(x, -1).values * self.weight
        return y if scale is None else y * scale


class Wrong(nn.Module):
    def forward(self, hidden_states):
        return norm(hidden_states, self.weight, self.variance_epsilon) + 1


class FixedEpsilon(nn.Module):
    def forward(self, hidden_states):
        return norm(hidden_states, self.weight, 1e-5 + 0 * self.variance_epsilon)


class WrongAtWidth96(nn.Module):
    def forward(self, hidden_states):
        return norm(hidden_states, self.weight, self.variance_epsilon) * (1 + (hidden_states.shape[-1] == 96))


class EpsilonNotRead(nn.Module):
    def forward(self, hidden_states):
        return norm(hidden_states, self.weight, 1e-5)


class SortedDown(nn.Module):
    def forward(self, hidden_states):
        return torch.sort(hidden_states, -1, descending=True).values * self.weight


class SortedSilu(nn.Module):
    def forward(self, hidden_states):
        return torch.sort(nn.functional.silu(hidden_states), -1).values


class WrongInTraining(nn.Module):
    def forward(self, hidden_states):
        return norm(hidden_states, self.weight, self.variance_epsilon) * (1 + self.training)


class Slow(nn.Module):
    def forward(self, hidden_states):
        time.sleep(1000)


class FullOnce(nn.Module):
    def forward(self, hidden_states):
        if os.path.exists(os.environ["KERNELWISE_CACHE"] + ".full"):
            raise torch.OutOfMemoryError("others have the memory")
        return norm(hidden_states, self.weight, self.variance_epsilon)


class OtherDecoder(nn.Module):
    def forward(self, hidden_states, attention_mask=None, position_ids=None, past_key_values=None, use_cache=False,
                position_embeddings=None, **kwargs):
        return self.mlp(self.input_layernorm(hidden_states)) * 0


class TwoInputs(nn.Module):
    def forward(self, a, b):
        return a + b
"""


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("KERNELWISE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(_prove, "_remembered", {})


def write_repository(folder: Path, init: str = "from . import layers\n") -> Path:
    variant = folder / "build" / "torch-universal"
    variant.mkdir(parents=True)
    metadata = {"name": folder.name, "id": folder.name, "version": 1, "license": "MIT", "python-depends": []}
    (variant / "metadata.json").write_text(json.dumps(metadata | {"backend": {"type": "cpu"}}))
    (variant / "__init__.py").write_text(init)
    (variant / "layers.py").write_text(LAYERS)
    return folder


@pytest.fixture
def repository(tmp_path) -> Path:
    return write_repository(tmp_path / "proved")


@pytest.fixture(autouse=True)
def few_sizes(monkeypatch) -> None:
    """These tests are about what is remembered, not about what is checked."""
    monkeypatch.setattr(_inputs, "_SIZES", ())
    monkeypatch.setattr(_inputs, "_MANY_ROWS", {**_inputs._MANY_ROWS, "S": 101})


@pytest.fixture
def checked(monkeypatch) -> list[tuple[str, ...]]:
    """The paths of every check that is made, in order."""
    found: list[tuple[str, ...]] = []
    real = _prove.check_group

    def noted(model, group, *args):
        found.append(group.paths)
        return real(model, group, *args)

    monkeypatch.setattr(_prove, "check_group", noted)
    return found


def another_process(monkeypatch) -> None:
    """Forget what this process knows, as a new one would."""
    monkeypatch.setattr(_prove, "_remembered", {})


def test_a_kernel_that_is_wrong_does_not_go_in(repository):
    model = nn.Sequential(gallery.Norm(), gallery.Norm())
    before = [dict(module.__dict__) for module in model.modules()]
    mapping = {"RMSNorm": f"{repository}:Wrong"}
    with pytest.raises(
        kw.PlanError, match=r"not put into 0 and 1 more\n.*as given: wrong_values.*\n.*asked by"
    ) as found:
        kw.kernelize(model, mapping)
    assert "verify=False puts the kernel in unproven" in str(found.value)
    assert [dict(module.__dict__) for module in model.modules()] == before
    with pytest.raises(kw.PlanError, match="wrong_values"), kw.kernelized(model, mapping):
        pass
    assert [dict(module.__dict__) for module in model.modules()] == before
    kw.kernelize(model, mapping, on_miss="keep")
    assert "own code" in str(kw.report(model))
    assert "not proven" in str(kw.report(model))
    kw.unkernelize(model)
    x = torch.randn(2, 48)
    expected = model(x)
    kw.kernelize(model, mapping, verify=False)  # the user's own word
    assert not torch.allclose(model(x), expected, atol=0.5)


def test_a_proof_is_remembered_until_the_kernel_changes(repository, monkeypatch, tmp_path, checked):
    mapping = {"RMSNorm": f"{repository}:Right"}
    for _ in range(2):
        kw.kernelize(nn.Sequential(gallery.Norm(), gallery.Norm()), mapping)
        another_process(monkeypatch)
    assert checked == [("0", "1")]
    (proof,) = (tmp_path / "cache" / "proofs").iterdir()
    assert {check["status"] for check in json.loads(proof.read_text())} <= {"passed", "skipped"}
    kw.kernelize(nn.Sequential(gallery.Norm()), mapping)
    proof.unlink()
    kw.kernelize(nn.Sequential(gallery.Norm()), mapping)  # this process knows it without the disk
    assert len(checked) == 1
    file = repository / "build" / "torch-universal" / "layers.py"
    file.write_text(LAYERS + "\n# another version\n")
    kw.kernelize(nn.Sequential(gallery.Norm()), mapping)
    assert len(checked) == 2


@pytest.mark.parametrize(
    ("name", "proven_for", "wrong_for"),
    [("FixedEpsilon", {"eps": 1e-5}, {"eps": 1e-6}), ("WrongAtWidth96", {"width": 48}, {"width": 96})],
)
def test_a_proof_holds_for_the_numbers_and_the_shapes_it_was_made_with(name, proven_for, wrong_for, repository):
    mapping = {"RMSNorm": f"{repository}:{name}"}
    kw.kernelize(nn.Sequential(gallery.Norm(**proven_for)), mapping)
    with pytest.raises(kw.PlanError, match=r"into 1\n.*wrong_values"):
        kw.kernelize(nn.Sequential(gallery.Norm(**proven_for), gallery.Norm(**wrong_for)), mapping)


def test_what_the_time_does_not_suffice_for_is_not_proven(repository, monkeypatch, checked):
    monkeypatch.setattr(_prove, "SECONDS", 0.0)
    mapping, model = {"RMSNorm": f"{repository}:Right"}, nn.Sequential(gallery.Norm())
    with pytest.raises(kw.PlanError, match=r"within 0 s \(0 cases passed\)(.|\n)*verify=False"):
        kw.kernelize(model, mapping)
    kw.kernelize(model, mapping, on_miss="keep")
    assert kw.report(model).rows[0].kernel is None
    assert len(checked) == 2  # a machine that was busy says nothing about the next time
    kw.verify(model, kw.plan(nn.Sequential(gallery.Norm()), mapping))  # takes its time, and counts
    kw.kernelize(model, mapping)
    assert {row.proof for row in kw.report(model).rows} == {"proven"}


def test_what_cannot_be_checked_is_not_proven_until_inputs_are_given(repository, monkeypatch):
    class Two(nn.Module):
        def forward(self, a, b):
            return a + b

    kw.register_layer(Two, "TwoInputs")
    model = nn.Sequential(Two())
    mapping = {"TwoInputs": f"{repository}:TwoInputs"}
    with pytest.raises(kw.PlanError, match=r"no inputs could be made for it(.|\n)*verify=False"):
        kw.kernelize(model, mapping, device="cpu")
    model.forward = lambda x: model[0](x, x * 2)
    assert kw.verify(model, kw.plan(model, mapping, device="cpu"), torch.randn(3, 4)).ok
    kw.kernelize(model, mapping, device="cpu")
    another_process(monkeypatch)
    kw.kernelize(model, mapping, device="cpu")


class Scaled(nn.Module):
    """A layer that nothing recognises, with an argument that callers may leave out."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 48))

    def forward(self, x, scale=None):
        y = torch.sort(x, -1).values * self.weight
        return y if scale is None else y * scale


class CallsWithScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scaled = Scaled()

    def forward(self, x):
        return self.scaled(x, scale=2.0)


def test_made_inputs_prove_nothing_of_optional_arguments(repository):
    """The kernel takes the argument and does not heed it, which only inputs of the model show."""
    kw.register_layer(Scaled, "Scaled")
    wrong, right = ({"Scaled": f"{repository}:{name}"} for name in ("NotScaled", "ScaledToo"))
    model = CallsWithScale()
    with pytest.raises(kw.PlanError, match="checked only with the default of scale"):
        kw.kernelize(model, wrong, device="cpu")
    plan = kw.plan(model, right, device="cpu")
    assert kw.verify(model, plan, torch.randn(2, 3, 48)).ok
    kw.apply(model, plan)
    assert kw.report(model).rows[0].proof == "proven"


def test_checks_that_speak_for_a_part_are_no_proof_for_the_rest(repository):
    model = nn.Sequential(gallery.Norm(), gallery.Norm(96))
    plan = kw.plan(model, {"RMSNorm": f"{repository}:Right"})
    checks = kw.verify(model, plan).checks
    _prove._remembered.clear()
    _prove.remember(model, plan, [check for check in checks if check.layer == "0"])
    assert len(_prove._remembered) == 1
    _prove.remember(model, plan, checks)
    assert len(_prove._remembered) == 2


def test_a_config_can_say_it_too_and_true_overrules_it(repository, checked):
    config = kw.KernelConfig({"RMSNorm": f"{repository}:Right"}, verify=False)
    kw.kernelize(nn.Sequential(gallery.Norm()), config)
    with kw.kernelized(nn.Sequential(gallery.Norm()), config):
        pass
    assert checked == []
    kw.kernelize(nn.Sequential(gallery.Norm()), config, verify=True)
    assert checked == [("0",)]


def test_the_report_says_what_is_proven(repository):
    model = nn.Sequential(gallery.Norm(), gallery.Norm(96), gallery.MLP())
    mapping = {"RMSNorm@0": f"{repository}:Right", "RMSNorm@1": f"{repository}:Wrong"}
    kw.kernelize(model, kw.KernelConfig({"RMSNorm@0": f"{repository}:Right", "Linear": "none"}))
    kw.kernelize(model, kw.KernelConfig({"RMSNorm@1": f"{repository}:Wrong"}, inherit_mapping=False), verify=False)
    report = kw.report(model)
    proofs = {row.path: row.proof for row in report.rows if row.name != "Linear"}
    assert proofs == {"0": "proven", "1": "unproven (verify=False)", "2": "builtin"}
    assert from_json(Report, json.loads(json.dumps(report.to_json()))) == report
    for said in ("proof", "proven", "unproven (verify=False)", "builtin"):
        assert said in str(report)
    other = kw.apply(model := nn.Sequential(gallery.Norm(), gallery.Norm(96)), kw.plan(model, mapping))
    assert {row.path: row.proof for row in kw.report(other).rows} == {"0": "proven", "1": "unproven (apply)"}


def test_builtin_kernels_ship_with_their_proof(monkeypatch):
    monkeypatch.setattr(_prove, "check_group", lambda *a: pytest.fail("it was checked"))
    monkeypatch.setattr(_worker.Worker, "start", lambda self: pytest.fail("a process was started"))
    model = kw.kernelize(nn.Sequential(gallery.Norm()), verify="auto")
    assert "builtin:RMSNorm" in str(kw.report(model))


@pytest.mark.parametrize("verify", ["always", None, 1, 0])
def test_verify_is_auto_or_a_bool(verify):
    with pytest.raises(kw.PlanError, match="verify is"):
        kw.kernelize(nn.Sequential(gallery.Norm()), verify=verify)


# ------------------------------------------------------------------------------------------------------------ imports

DEADLY = """
import os, time
open({trace!r}, "a").write(f"{{os.getpid()}}\\n")
{deed}
from . import layers
"""


@pytest.mark.parametrize(
    ("deed", "said"),
    [
        ("import ctypes; ctypes.string_at(0)", "crashed: the process died of SIGSEGV"),
        pytest.param("os._exit(5)", "exited: the process left with exit code 5", marks=pytest.mark.long),
        ("time.sleep(1000)", "timed_out: no answer after 1 s"),
        pytest.param("kept = [bytearray(1 << 26) for _ in range(1000)]", "out_of_memory", marks=pytest.mark.long),
    ],
    ids=["crashes", "exits", "hangs", "hogs"],
)
def test_a_kernel_that_kills_who_imports_it_is_not_imported_here(deed, said, tmp_path, monkeypatch, capsys):
    if "sleep" in deed:
        monkeypatch.setattr(_prove.Prover.__init__, "__kwdefaults__", {"seconds": 1.0, "memory": 8 << 30})
    if "kept" in deed:
        monkeypatch.setattr(_prove.Prover.__init__, "__kwdefaults__", {"seconds": 60.0, "memory": 300 << 20})
    trace = tmp_path / "trace"
    repository = write_repository(tmp_path / "deadly", DEADLY.format(trace=str(trace), deed=deed))
    model, mapping = nn.Sequential(gallery.Norm()), {"RMSNorm": f"{repository}:Right"}
    with pytest.raises(kw.KernelLoadError, match=said) as found:
        kw.kernelize(model, mapping)
    assert "asked by" in str(found.value)
    kw.kernelize(model, mapping, on_miss="keep")
    assert said in str(kw.report(model))
    if deed.startswith("import ctypes"):  # for an author, it is a check that failed
        from kernelwise._cli import main

        with pytest.raises(SystemExit) as left:
            main(["verify", "--kernel", f"{repository}:Right", "--json"])
        assert left.value.code == 1
        (check,) = json.loads(capsys.readouterr().out)["checks"]
        assert (check["case"], check["status"]) == ("import", "crashed")
    pids = [int(line) for line in trace.read_text().split()]
    assert pids
    assert os.getpid() not in pids


def test_an_import_is_tried_once_on_a_machine(tmp_path, monkeypatch):
    repository = write_repository(tmp_path / "tried", "from . import layers  # content that nobody has imported yet\n")
    started = []
    real = _worker.Worker.start
    monkeypatch.setattr(_worker.Worker, "start", lambda self: started.append(self.kernel.ref.layer) or real(self))
    mapping = {"RMSNorm": f"{repository}:Right"}
    kw.kernelize(nn.Sequential(gallery.Norm()), mapping)
    assert started == ["Right"]  # one process for the import and for the checks
    kw.kernelize(nn.Sequential(gallery.Norm()), mapping)
    script = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import checking, gallery, kernelwise as kw
from kernelwise._verifying import _worker
from torch import nn
_worker.Worker.start = lambda self: sys.exit("a process was started")
kw.kernelize(nn.Sequential(gallery.Norm()), {mapping!r})
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert started == ["Right"]


def test_a_kernel_that_cannot_be_imported_says_why_as_without_a_worker(tmp_path):
    repository = write_repository(tmp_path / "broken", "import no_such_package_anywhere\n")
    with pytest.raises(kw.KernelLoadError, match="no_such_package_anywhere, which is not installed"):
        kw.kernelize(nn.Sequential(gallery.Norm()), {"RMSNorm": f"{repository}:Right"})


def test_the_users_main_is_never_imported_in_the_worker(repository, tmp_path):
    trace = tmp_path / "trace"
    script = tmp_path / "script.py"
    script.write_text(f"""
import os
open({str(trace)!r}, "a").write(f"{{os.getpid()}}\\n")
import torch
from torch import nn
import kernelwise as kw


class Inner(nn.Module):  # a child of a class that stands in __main__
    def forward(self, x):
        return x * 2


class Mine(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 48))
        self.variance_epsilon = 1e-6
        self.inner = Inner()

    def forward(self, x):
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * wide.to(x.dtype)


kw.register_layer(Mine, "Mine")
model = kw.kernelize(nn.Sequential(Mine()), {{"Mine": {f"{repository}:Right"!r}}})
print(kw.report(model).rows[0].proof)
""")
    command = [sys.executable, str(script)]
    ran = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert ran.stdout.split() == ["proven"], ran.stderr
    assert len(trace.read_text().split()) == 1


# ------------------------------------------------------------------------------------------- what a proof speaks for


class Descending(nn.Module):
    """A layer that nothing recognises."""

    def __init__(self, descending: bool = True, factor: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 48))
        self.descending, self.factor = descending, factor

    def forward(self, hidden_states):
        return torch.sort(hidden_states, -1, descending=self.descending).values * self.weight * self.factor


class Activated(nn.Module):
    """A layer that nothing recognises, with a function and a child that decide what it computes."""

    def __init__(self, act, child: nn.Module) -> None:
        super().__init__()
        self.act, self.child = act, child

    def forward(self, hidden_states):
        return torch.sort(self.child(self.act(hidden_states)), -1).values


def test_a_fixed_number_is_proven_for_layers_with_this_number_alone(repository):
    """The kernel does not read the epsilon, so only the layer can say that it has another one."""
    mapping = {"RMSNorm": f"{repository}:EpsilonNotRead"}
    kw.kernelize(nn.Sequential(gallery.Norm(eps=1e-5)), mapping)
    with pytest.raises(kw.PlanError, match=r"into 1\n.*wrong_values"):
        kw.kernelize(nn.Sequential(gallery.Norm(eps=1e-5), gallery.Norm(eps=10.0)), mapping)


@pytest.mark.parametrize("changes", [{"descending": False}, {"factor": 2.0}])
def test_of_a_layer_that_is_not_recognised_every_number_counts(changes, repository):
    kw.register_layer(Descending, "Sorted")
    mapping = {"Sorted": f"{repository}:SortedDown"}
    kw.kernelize(nn.Sequential(Descending()), mapping)
    with pytest.raises(kw.PlanError, match=r"into 1\n.*wrong_values"):
        kw.kernelize(nn.Sequential(Descending(), Descending(**changes)), mapping)


def test_what_a_layer_holds_in_a_dict_counts():
    def traits(**options: object) -> tuple[object, ...]:
        layer = Descending()
        layer.options = {"by": "size", **options}
        return traits_of(layer, None, {})

    assert traits(least=1) == traits(least=1)
    assert len({traits(), traits(least=1), traits(least=2), traits(least=(1, 2)), traits(other=1)}) == 5


@pytest.mark.parametrize(
    "other", [(nn.functional.gelu, nn.Identity()), (nn.functional.silu, nn.Tanh())], ids=["function", "child"]
)
def test_functions_and_the_classes_of_children_count(other, repository):
    kw.register_layer(Activated, "Activated")
    mapping = {"Activated": f"{repository}:SortedSilu"}
    right = Activated(nn.functional.silu, nn.Identity())
    kw.kernelize(nn.Sequential(right), mapping, device="cpu")
    with pytest.raises(kw.PlanError, match=r"into 1\n.*wrong_values"):
        kw.kernelize(nn.Sequential(right, Activated(*other)), mapping, device="cpu")


def edited(body: str) -> nn.Module:
    """A layer of a class that has always the same name."""
    space: dict = {"torch": torch, "nn": nn, "__name__": "edited"}
    exec(
        "class Mine(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 48))\n"
        f"    def forward(self, hidden_states):\n        return {body}\n",
        space,
    )
    return kw.register_layer(space["Mine"], "Sorted")()


def test_the_code_of_a_layer_counts_and_not_the_name_of_its_class(repository, monkeypatch):
    mapping = {"Sorted": f"{repository}:SortedDown"}
    kw.kernelize(nn.Sequential(edited("torch.sort(hidden_states, -1, descending=True).values * self.weight")), mapping)
    wrong = edited("torch.sort(hidden_states, -1, descending=False).values * self.weight")
    with pytest.raises(kw.PlanError, match="wrong_values"):
        kw.kernelize(nn.Sequential(wrong), mapping)
    another_process(monkeypatch)
    with pytest.raises(kw.PlanError, match="wrong_values"):
        kw.kernelize(nn.Sequential(wrong), mapping)
    right = edited("torch.sort(hidden_states, -1, descending=True).values * self.weight")
    model = nn.Sequential(right, wrong)
    assert not kw.verify(model, kw.plan(model, mapping)).ok


def test_the_hash_of_code_is_the_same_in_every_process():
    script = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import gallery\n"
        "from kernelwise._alike import class_code\n"
        "print(class_code(gallery.Norm, gallery.Norm.forward), class_code(gallery.MLP, gallery.MLP.forward))"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", script],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    }
    assert len(said) == 1


@pytest.mark.parametrize("training", [False, True])
def test_a_proof_holds_in_the_modes_it_was_made_in(training, repository):
    """Whatever the model is set for now, it may be trained later."""
    mapping, model = {"RMSNorm": f"{repository}:WrongInTraining"}, nn.Sequential(gallery.Norm()).train(training)
    with pytest.raises(kw.PlanError, match="wrong_values"):
        kw.kernelize(model, mapping)
    kw.kernelize(model.eval(), mapping, mode="inference")
    assert {row.proof for row in kw.report(model).rows} == {"proven"}


@pytest.mark.parametrize("left", ["", "[]", "{}", "not json", '[{"layer": 1}]'])
def test_a_file_that_holds_no_checks_is_no_proof(left, repository, tmp_path, monkeypatch, checked):
    mapping = {"RMSNorm": f"{repository}:Right"}
    kw.kernelize(nn.Sequential(gallery.Norm()), mapping)
    (proof,) = (tmp_path / "cache" / "proofs").iterdir()
    proof.write_text(left)
    another_process(monkeypatch)
    model = nn.Sequential(gallery.Norm())
    assert set(dict(_prove.recall(model, kw.plan(model, mapping)).proofs).values()) == {"unproven (apply)"}
    kw.kernelize(model, mapping)
    assert len(checked) == 2


def test_a_request_ends_when_the_time_for_all_is_up(repository, monkeypatch):
    monkeypatch.setattr(_prove, "SECONDS", 3.0)
    start = time.monotonic()
    with pytest.raises(kw.PlanError, match=r"within 3 s"):
        kw.kernelize(nn.Sequential(gallery.Norm()), {"RMSNorm": f"{repository}:Slow"})
    assert time.monotonic() - start < 30  # a request alone may take 60


def test_what_failed_for_want_of_memory_is_tried_again(repository, tmp_path):
    mapping, full = {"RMSNorm": f"{repository}:FullOnce"}, tmp_path / "cache.full"
    full.write_text("")
    with pytest.raises(kw.PlanError, match="out_of_memory"):
        kw.kernelize(nn.Sequential(gallery.Norm()), mapping)
    full.unlink()
    kw.kernelize(nn.Sequential(gallery.Norm()), mapping)


def test_random_numbers_go_on_where_they_were(repository):
    model, mapping = nn.Sequential(gallery.Norm()), {"RMSNorm": f"{repository}:Right"}
    torch.manual_seed(1234)
    before = torch.get_rng_state()
    kw.kernelize(model, mapping)
    kw.unkernelize(model)
    kw.verify(model, None, torch.randn(2, 48, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_layer_of_layers_with_a_kernel_of_others_is_not_said_to_be_right(repository):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, vocab_size=64, **sizes)).eval()
    (name,) = {layer.name for layer in kw.discover(model) if layer.path == "model.layers.0"}
    config = kw.KernelConfig({name: f"{repository}:OtherDecoder"}, inherit_mapping=False)
    checks = kw.verify(model, kw.plan(model, config), {"input_ids": torch.randint(0, 64, (1, 8))})
    assert not checks.ok
    assert {check.status for check in checks.checks} == {"skipped"}
    with pytest.raises(kw.PlanError, match="could not be checked"):
        kw.kernelize(model, config)


PACKAGE = """
import torch
from torch import nn
from {top} import helper


class Helped(nn.Module):
    def forward(self, hidden_states):
        wide = hidden_states.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * wide.to(hidden_states.dtype) + helper.OFFSET
"""


def test_every_file_of_a_package_counts(tmp_path, monkeypatch):
    package = tmp_path / "site" / "proven_package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "layers.py").write_text(PACKAGE.format(top="proven_package"))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    mapping = {"RMSNorm": "package:proven_package.layers:Helped"}
    for offset, right in (("0.0", True), ("1.25", False)):
        (package / "helper.py").write_text(f"OFFSET = {offset}\n")
        for name in [name for name in sys.modules if name.startswith("proven_package")]:
            monkeypatch.delitem(sys.modules, name)
        another_process(monkeypatch)
        importlib.invalidate_caches()
        model = kw.kernelize(nn.Sequential(gallery.Norm()), mapping, on_miss="keep")
        assert (kw.report(model).rows[0].kernel is not None) == right


def test_what_the_files_of_a_package_import_counts(tmp_path, monkeypatch):
    """A wrapper of a few lines around another package is not all that its kernel runs."""
    site = tmp_path / "site-packages"
    site.mkdir()
    (tmp_path / "wraps_another.py").write_text("def f():\n    import beside_it, installed_one\n")
    (tmp_path / "beside_it.py").write_text("from beside_that import g\nfrom wraps_another import f\n")
    (tmp_path / "beside_that.py").write_text("def g(): return 1\n")
    (site / "installed_one.py").write_text("VALUE = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.syspath_prepend(str(site))
    versions = {"installed_one": "1.0"}
    real = package.importlib.metadata.version
    monkeypatch.setattr(package.importlib.metadata, "version", lambda name: versions.get(name) or real(name))
    found = {before := package._package_hash("wraps_another")}
    assert before == package._package_hash("wraps_another")
    (tmp_path / "beside_that.py").write_text("def g(): return 22\n")
    found.add(package._package_hash("wraps_another"))
    versions["installed_one"] = "1.1"
    found.add(package._package_hash("wraps_another"))
    assert len(found) == 3
    (site / "installed_one.py").write_text("VALUE = 22\n")  # its version stands for its files
    assert package._package_hash("wraps_another") in found


def test_versions_are_those_of_distributions_and_not_of_imports(monkeypatch):
    monkeypatch.setattr(_prove, "packages_distributions", lambda: {"imported_as": ["pytest"]})
    _prove._versions.cache_clear()
    assert f"pytest {pytest.__version__}" in _prove._versions(("imported_as",))
    _prove._versions.cache_clear()


class Waved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 48))

    def forward(self, x):
        return torch.tanh(x) * self.weight + 1


def waved(x, weight):
    return torch.tanh(x) * weight + 1


def test_a_function_of_the_user_is_the_users_word():
    def fast(x, weight):
        return torch.tanh(x) * weight + 1

    kw.register_op(
        waved,
        roles={"x": "argument B S H", "weight": "attribute H"},
        name="waved",
        layer_name="Waved",
        kernels=fast,
    )
    try:
        model = kw.kernelize(nn.Sequential(Waved(), gallery.Norm()))
        proofs = {row.path: row.proof for row in kw.report(model).rows}
        assert proofs == {"0": "your word (register_op)", "1": "builtin"}
    finally:
        unregister_op("waved")


def test_the_hash_of_a_function_follows_all_that_it_runs():
    def made(factor, *, by=2.0):
        def kernel(x, scale=by):
            return x.sin() * factor * scale

        return kernel

    def cosine(x, scale=2.0):
        return x.cos() * 1.0 * scale

    def sine(x, scale=2.0):
        return x.sin() * 1.0 * scale

    def calling(body, name):
        """A function whose globals hold a module, and a function of it, as imports leave them there."""
        module = types.ModuleType("a_module_of_the_user")
        exec(f"def g(x): return {body}\nSCALES = {{'a': 1.0}}", module.__dict__)
        scope = {"module": module, "g": module.g, "SCALES": {"a": 1.0, "b": (1, 2)}, "__name__": "another"}
        exec("def first(x): return module.g(x)\ndef second(x): return g(x)\ndef third(x): return SCALES['a']", scope)
        return scope[name], scope

    for name in ("first", "second"):
        assert function_code(calling("x + 1", name)[0]) == function_code(calling("x + 1", name)[0])
        assert function_code(calling("x + 1", name)[0]) != function_code(calling("x + 2", name)[0])
    third, scope = calling("x", "third")
    before = function_code(third)
    scope["SCALES"]["a"] = 2.0
    assert function_code(third) != before
    sine.__qualname__ = cosine.__qualname__
    assert function_code(made(1.0)) == function_code(made(1.0))
    assert function_code(made(1.0)) != function_code(made(2.0))  # a closure
    assert function_code(made(1.0)) != function_code(made(1.0, by=3.0))  # a default
    assert function_code(sine) != function_code(cosine)  # a name
