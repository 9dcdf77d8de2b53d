"""What a proof speaks for: layers with the same numbers, code and modes, and all that the kernel itself runs."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import types
from pathlib import Path

import checking  # noqa: F401  (names the layers of the gallery)
import gallery
import pytest
import torch
from proving import another_process
from torch import nn

import kernelwise as kw
from kernelwise._alike import function_code, traits_of
from kernelwise._register import unregister_op
from kernelwise._verifying import _prove
from kernelwise.sources import package

pytestmark = pytest.mark.usefixtures("empty_cache", "few_sizes")


@pytest.mark.parametrize(
    ("name", "proven_for", "wrong_for"),
    [("FixedEpsilon", {"eps": 1e-5}, {"eps": 1e-6}), ("WrongAtWidth96", {"width": 48}, {"width": 96})],
)
def test_a_proof_holds_for_the_numbers_and_the_shapes_it_was_made_with(name, proven_for, wrong_for, repository):
    mapping = {"RMSNorm": f"{repository}:{name}"}
    kw.kernelize(nn.Sequential(gallery.Norm(**proven_for)), mapping)
    with pytest.raises(kw.PlanError, match=r"into 1\n.*wrong_values"):
        kw.kernelize(nn.Sequential(gallery.Norm(**proven_for), gallery.Norm(**wrong_for)), mapping)


def test_a_fixed_number_is_proven_for_layers_with_this_number_alone(repository):
    """The kernel does not read the epsilon, so only the layer can say that it has another one."""
    mapping = {"RMSNorm": f"{repository}:EpsilonNotRead"}
    kw.kernelize(nn.Sequential(gallery.Norm(eps=1e-5)), mapping)
    with pytest.raises(kw.PlanError, match=r"into 1\n.*wrong_values"):
        kw.kernelize(nn.Sequential(gallery.Norm(eps=1e-5), gallery.Norm(eps=10.0)), mapping)


class Descending(nn.Module):
    """A layer that nothing recognises."""

    def __init__(self, descending: bool = True, factor: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 48))
        self.descending, self.factor = descending, factor

    def forward(self, hidden_states):
        return torch.sort(hidden_states, -1, descending=self.descending).values * self.weight * self.factor


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


class Activated(nn.Module):
    """A layer that nothing recognises, with a function and a child that decide what it computes."""

    def __init__(self, act, child: nn.Module) -> None:
        super().__init__()
        self.act, self.child = act, child

    def forward(self, hidden_states):
        return torch.sort(self.child(self.act(hidden_states)), -1).values


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
