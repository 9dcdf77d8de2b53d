"""What is offered to a kind of layers, how choices become a mapping, and the two backends that are never put in unasked."""

from __future__ import annotations

import functools
import sys
import types

import fakehub
import pytest
import torch
from exact import assert_as_exact
from torch import nn

import kernelwise as kw
from kernelwise._data import KernelRef, Layer
from kernelwise._errors import KernelConfigError, KernelLoadError
from kernelwise._tuning._candidates import (
    Kind,
    kinds_of,
    mapping_of,
    offered,
    patterns,
    read_given,
    spread_out,
    with_trust,
)
from kernelwise.ops import OPERATIONS
from kernelwise.sources import _inductor, load

transformers = pytest.importorskip("transformers")


def ref(text: str) -> KernelRef:
    found = kw.KernelConfig({"Layer": text}).rules()[0].ref
    assert found is not None
    return found


def small(kind: str = "qwen3") -> nn.Module:
    config = transformers.AutoConfig.for_model(
        kind,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=50,
    )
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def test_alike_layers_are_one_kind_and_get_all_that_there_is_for_them():
    model = small()
    kinds = {kind.layer.path: kind for kind in kinds_of(model, kw.discover(model), ("inference",))}
    norms = [kind for kind in kinds.values() if kind.layer.name == "RMSNorm"]
    assert sorted(len(kind.paths) for kind in norms) == [4, 5]  # of heads, and of layers
    assert [str(found) for found in offered(kinds["model.layers.0.mlp"], (), {})] == [
        "builtin:SwiGLUMLP",
        "builtin:inductor:SwiGLUMLP",
    ]
    rules = kw.KernelConfig(
        {"RMSNorm@model.norm": "/kernels/mine:Norm", "RMSNorm": {"training": "package:some:Norm"}}
    ).rules()
    given = read_given({"RMSNorm": "org/repo@v2:Norm", "SiLU": "org/repo@v2:SiLU"})
    assert [str(found) for found in offered(kinds["model.layers.0.input_layernorm"], rules, given)] == [
        "/kernels/mine:Norm",
        "org/repo@v2:Norm",
        "builtin:RMSNorm",
        "builtin:torch:RMSNorm",
        "builtin:inductor:RMSNorm",
    ]


def test_layers_that_hold_others_are_no_kind():
    model = small("llama")
    layers = kw.discover(model)
    assert any(layer.name == "DecoderLayer" for layer in layers)
    assert all(kind.layer.name != "DecoderLayer" for kind in kinds_of(model, layers, ("inference", "training")))


def test_packages_are_offered_where_they_are_installed_and_only_on_gpus(monkeypatch):
    model = small()
    mlp = next(kind for kind in kinds_of(model, kw.discover(model), ("inference",)) if kind.op == "gated_mlp")
    module = types.ModuleType("liger_kernel")
    module.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "liger_kernel", module)
    assert not any(found.scheme == "package" for found in offered(mlp, (), {}))
    on_gpu = Kind(_moved(mlp.layer, "cuda"), mlp.paths, mlp.mode, mlp.traits)
    found = [str(found) for found in offered(on_gpu, (), {}) if found.scheme == "package"]
    assert "package:liger_kernel.transformers.swiglu:LigerSwiGLUMLP" in found
    monkeypatch.setitem(sys.modules, "liger_kernel", None)  # as if it could not be found
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not any(found.scheme == "package" for found in offered(on_gpu, (), {}))


def _moved(layer: Layer, device: str) -> Layer:
    return Layer(**{**layer.__dict__, "device": device})


def test_what_names_no_kernel_is_said_all_at_once():
    with pytest.raises(KernelConfigError) as caught:
        read_given(["org:Norm", 7, "builtin:RMSNorm"])
    assert len(caught.value.problems) == 2
    assert "is 7" in str(caught.value)
    assert read_given("builtin:RMSNorm") == {None: (ref("builtin:RMSNorm"),)}


TWO = """
import torch
from torch import nn

raise ImportError("its code is read, and not run")


class One(nn.Module):
    def forward(self, x):
        return x


class Two(One):
    pass
"""


def test_a_repository_can_be_tried_as_a_whole(tmp_path):
    folder = fakehub.write_files(tmp_path / "two", fakehub.kernel_files(layers=TWO))
    open_ended = fakehub.write_files(tmp_path / "open", fakehub.kernel_files(layers="from torch.nn import *\n"))
    notes: list[str] = []
    given = read_given(
        {"Norm": [f"{folder}:*", "builtin:RMSNorm"], "MLP": f"{tmp_path}/no:*", "Act": f"{open_ended}:*"}
    )
    found = spread_out(given, device="cpu", notes=notes)
    assert [str(one) for one in found["Norm"]] == [f"{folder}:One", f"{folder}:Two", "builtin:RMSNorm"]
    assert found["MLP"] == found["Act"] == ()
    assert notes[0].startswith(f"no layer of {tmp_path}/no:* was tried: there is no directory")
    assert "cannot be told without running its code" in notes[1]
    with pytest.raises(KernelConfigError, match="only repositories"):
        read_given(["builtin:*"])


def test_a_repository_of_the_hub_can_be_tried_as_a_whole(tmp_path):
    with fakehub.FakeHub(trusted={"good"}) as hub, hub.patched(tmp_path / "cache"):
        hub.add("good/two", {"v1": fakehub.kernel_files(layers=TWO)})
        hub.add("stranger/two", {"v3": fakehub.kernel_files(layers=TWO)})
        trusted = ("stranger/two:*", {"version": 3, "trust_remote_code": True})
        notes: list[str] = []
        found = spread_out(read_given(["good/two@v1:*", "stranger/two@v3:*", trusted]), device="cpu", notes=notes)
    assert [str(one) for one in found[None]] == [
        "good/two@v1:One",
        "good/two@v1:Two",
        "stranger/two@v3:One",
        "stranger/two@v3:Two",
    ]
    assert [one.trust_remote_code for one in found[None]] == [False, False, True, True]
    assert notes == ["no layer of stranger/two@v3:* was tried: stranger is no trusted kernel publisher"]


def test_choices_become_the_shortest_mapping_that_says_the_same():
    model = small()
    layers = kw.discover(model)
    modes = ("inference", "training")
    kinds = kinds_of(model, layers, modes)
    norms = [kind for kind in kinds if kind.layer.name == "RMSNorm"]
    mlps = [kind for kind in kinds if kind.layer.name == "SwiGLUMLP"]
    same = dict.fromkeys([*norms, *mlps], None)
    assert mapping_of(same, layers, modes) == {"RMSNorm": "none", "SwiGLUMLP": "none"}
    by_mode = {kind: "builtin:RMSNorm" if kind.mode == "inference" else None for kind in norms}
    assert mapping_of(by_mode, layers, modes) == {"RMSNorm": {"inference": "builtin:RMSNorm", "training": "none"}}
    only = {kind: "builtin:torch:RMSNorm" for kind in norms if kind.mode == "inference"}
    assert mapping_of(only, layers, ("inference",)) == {"RMSNorm": {"inference": "builtin:torch:RMSNorm"}}
    of_heads = {kind: "builtin:RMSNorm" if "self_attn" in kind.layer.path else None for kind in norms}
    mapping = mapping_of(of_heads, layers, modes)
    assert mapping == {
        "RMSNorm@model.layers.*.self_attn.q_norm": "builtin:RMSNorm",
        "RMSNorm@model.layers.*.self_attn.k_norm": "builtin:RMSNorm",
        "RMSNorm@model.layers.*.input_layernorm": "none",
        "RMSNorm@model.layers.*.post_attention_layernorm": "none",
        "RMSNorm@model.norm": "none",
    }
    decided = {d.layer.path: d.kernel for d in kw.plan(model, mapping, mode="inference").decisions}
    assert decided["model.layers.1.self_attn.k_norm"] is not None
    assert decided["model.norm"] is decided["model.layers.0.input_layernorm"] is None


def test_a_pattern_matches_no_layer_that_is_not_meant():
    named = {path: [path] for path in ("a.0.norm", "a.1.norm", "a.2.norm", "a.0.b.0.norm")}
    assert patterns(["a.0.norm", "a.1.norm"], named) == ("a.0.norm", "a.1.norm")
    assert patterns(["a.0.b.0.norm"], named) == ("a.*.b.*.norm",)
    assert patterns([*named][:3], named) == ("a.0.norm", "a.1.norm", "a.2.norm")  # `*` crosses dots


class Norm(nn.Module):
    def __init__(self, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(8)), eps

    def forward(self, hidden_states):
        dtype, hidden_states = hidden_states.dtype, hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(dtype)


class Places(nn.Module):
    """Norms at places of a model, run one after the other."""

    def __init__(self, **places: nn.Module) -> None:
        super().__init__()
        for name, module in places.items():
            self.add_module(name, module)

    def forward(self, x):
        for module in self.children():
            for norm in module.values() if isinstance(module, nn.ModuleDict) else module:
                x = norm(x)
        return x


def shared() -> nn.Module:
    norm = Norm()
    return Places(x=nn.ModuleList([norm, Norm()]), y=nn.ModuleList([Norm(1e-5), norm]))


def odd_names() -> nn.Module:
    return Places(d=nn.ModuleDict({"a[0]": Norm(), "a0": Norm(1e-5), "a*": Norm(1e-4)}))


@pytest.mark.parametrize("make", [shared, odd_names])
def test_a_mapping_gives_each_layer_what_was_chosen_wherever_else_it_stands(make):
    model = make().eval()
    layers = kw.discover(model)
    kinds = kinds_of(model, layers, ("inference",))
    assert len(kinds) == len({kind.layer.path for kind in kinds}) > 1
    for chosen in kinds:
        refs = {kind: "builtin:torch:RMSNorm" if kind is chosen else None for kind in kinds}
        decided = kw.plan(model, mapping_of(refs, layers, ("inference",)), mode="inference").decisions
        assert {d.layer.path for d in decided if d.kernel is not None} == set(chosen.paths)


def test_a_rule_for_any_place_of_a_layer_offers_its_kernel():
    model = shared().eval()
    first, _ = kinds_of(model, kw.discover(model), ("inference",))
    assert "y.1" not in first.paths
    rules = kw.KernelConfig({"RMSNorm@y.1": "/kernels/mine:Norm"}).rules()
    assert next(str(found) for found in offered(first, rules, {})) == "/kernels/mine:Norm"


@pytest.mark.parametrize("pin", [{"version": 2}, {"revision": "some/branch"}])
def test_what_is_trusted_stays_trusted(pin):
    leaf = ("org/repo:Norm", {**pin, "trust_remote_code": True})
    for given in (leaf, [leaf], {"RMSNorm": leaf}, {"RMSNorm": [leaf]}):
        ((ref,),) = read_given(given).values()
        assert ref.trust_remote_code
        mapping = {"RMSNorm": {"inference": str(ref), "training": "builtin:RMSNorm"}, "SiLU": str(ref)}
        config = kw.KernelConfig(with_trust(mapping, {str(ref): ref}))
        assert [rule.ref == ref for rule in config.rules()] == [True, False, True]
        assert kw.KernelConfig.from_dict(config.to_dict()) == config
    with pytest.raises(KernelConfigError, match="version"):
        read_given([("org/repo:Norm", {"trust_remote_code": True})])


# --------------------------------------------------------------------------------------------------------------- backends


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "op", "options"),
    [
        ("RMSNorm", "rms_norm", {"cast": "after", "offset": 0.0}),
        ("RMSNorm", "rms_norm", {"cast": "before", "offset": 0.0}),
        ("LayerNorm", "layer_norm", {"dtype": "own", "offset": 0.0}),
        ("LayerNorm", "layer_norm", {"dtype": "float32", "offset": 0.0}),
        ("SiLU", "activation", {"activation": "silu"}),
        ("GeLU", "activation", {"activation": "gelu"}),
        ("GeluTanh", "activation", {"activation": "gelu_tanh"}),
        ("NewGELU", "activation", {"activation": "gelu_new"}),
        ("FastGELU", "activation", {"activation": "gelu_fast"}),
    ],
)
def test_operators_of_pytorch_are_as_exact_as_what_they_replace(name, op, options, dtype):
    kernel = load(ref(f"builtin:torch:{name}"), device="cpu")
    assert kernel.op == op
    assert all(value in dict(kernel.limits.options).get(key, (value,)) for key, value in options.items())
    taken = {parameter.name for parameter in kernel.signature}
    given = {"x": torch.randn(3, 7, 100).to(dtype)}
    if op != "activation":
        given |= {"weight": torch.rand(100).to(dtype) + 0.5, "eps": 1e-5}  # type: ignore[dict-item]
    if op == "layer_norm":
        given["bias"] = torch.randn(100).to(dtype)
    passed = {key: value for key, value in options.items() if key in taken}
    assert_as_exact(
        lambda **values: OPERATIONS[op].reference(**values, **options),
        lambda **values: kernel.function(**values, **passed),
        given,
    )


def test_an_operator_of_pytorch_refuses_what_would_come_out_in_another_dtype():
    kernel = load(ref("builtin:torch:RMSNorm"), device="cpu")
    assert kernel.function is not None
    with pytest.raises(RuntimeError, match="weight"):
        kernel.function(torch.randn(2, 8).bfloat16(), torch.ones(8), 1e-6)


def test_backends_are_named_by_their_references_and_never_offered_unasked(tmp_path):
    config = kw.KernelConfig({"RMSNorm": "builtin:torch:RMSNorm", "SwiGLUMLP": "builtin:inductor:SwiGLUMLP"})
    config.save(tmp_path / "kernels.toml")
    assert kw.KernelConfig.load(tmp_path / "kernels.toml") == config
    model = small("llama")
    decided = {d.layer.path: d.kernel for d in kw.plan(model, config, mode="inference").decisions}
    assert str(decided["model.norm"].ref) == "builtin:torch:RMSNorm"  # type: ignore[union-attr]
    assert str(decided["model.layers.0.mlp"].ref) == "builtin:inductor:SwiGLUMLP"  # type: ignore[union-attr]
    unasked = [d.kernel.ref.location for d in kw.plan(model).decisions if d.kernel is not None]
    assert unasked
    assert not any(unasked)


def test_what_a_backend_does_not_have_is_named():
    with pytest.raises(KernelLoadError, match="RMSNorm"):
        load(ref("builtin:torch:RMSNrm"), device="cpu")
    with pytest.raises(KernelLoadError, match="RMSNorm"):
        load(ref("builtin:inductor:RMSNrm"), device="cpu")
    with pytest.raises(KernelLoadError, match="not on mps"):
        load(ref("builtin:inductor:RMSNorm"), device="mps")


def test_inductor_needs_a_compiler(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(KernelLoadError, match=r"C\+\+ compiler"):
        load(ref("builtin:inductor:RMSNorm"), device="cpu")


@pytest.fixture
def traced_only(monkeypatch, fresh_compiler) -> None:
    """Graphs are traced, but run as they are: building them takes seconds each."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    _inductor._compiled.cache_clear()
    yield
    _inductor._compiled.cache_clear()


def test_a_compiled_kernel_is_proven_before_it_goes_in(traced_only, monkeypatch, tmp_path):
    monkeypatch.setenv("KERNELWISE_CACHE", str(tmp_path))
    model = nn.Sequential(nn.Linear(16, 16), transformers.activations.ACT2FN["gelu_new"]).eval()
    x = torch.randn(4, 16)
    own = model(x)
    kw.kernelize(model, {"NewGELU": "builtin:inductor:NewGELU"})
    row = next(row for row in kw.report(model).rows if row.path == "1")
    assert (row.kernel, row.proof) == ("builtin:inductor:NewGELU", "proven")
    assert torch.allclose(model(x), own, atol=1e-6)
    assert list((tmp_path / "proofs").iterdir())


def test_a_kind_of_input_too_many_runs_the_layers_own_code(traced_only, monkeypatch):
    monkeypatch.setattr(_inductor, "RECOMPILES", 1)
    model = nn.Sequential(transformers.activations.ACT2FN["gelu_new"]).eval()
    kw.kernelize(model, {"NewGELU": "builtin:inductor:NewGELU"}, device="cpu", verify=False)
    with torch.no_grad():
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            for dims in (1, 2, 3):
                x = torch.randn(*[4] * dims).to(dtype)
                assert torch.allclose(model(x), nn.functional.gelu(x, approximate="tanh"), atol=2e-2)
    found = [count for row in kw.report(model).rows for _, count in row.fallbacks]
    assert set(found) == {8}  # all but the first kind of nine


def test_inductor_computes_what_the_operation_is(fresh_compiler):
    kernel = load(ref("builtin:inductor:NewGELU"), device="cpu")
    assert kernel.function is not None
    x = torch.randn(5, 33)
    own = OPERATIONS["activation"].reference(x, activation="gelu_new")
    torch.testing.assert_close(kernel.function(x=x, activation="gelu_new"), own)
