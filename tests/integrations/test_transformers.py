"""`from_pretrained`, `set_use_kernels`, `use_kernels`, `train()` and `eval()` of transformers with our config."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from fakehub import FakeHub, kernel_files
from tiny import ACCEPTED, IDS, LAYERS, build, logits, only
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import kernelwise as kw
from kernelwise.integrations import transformers as integration
from kernelwise.integrations.transformers import KernelConfig


def kernels_in(model: Any, mode: str = "inference") -> dict[str, str]:
    return {row.path: row.kernel for row in kw.report(model).rows if row.kernel is not None and row.mode == mode}


def test_the_version_under_test_is_the_expected_one() -> None:
    """Two runs, one with live registrations and one with dead ones; a third version would need its own look."""
    expected = {"5.22.2": True, "5.23.0": False}
    assert expected.get(transformers.__version__, ACCEPTED) == ACCEPTED
    how = {layer.name: layer.how for layer in kw.discover(build())}
    assert how["RMSNorm"] == ("registered" if ACCEPTED else "recognised")


# --------------------------------------------------------------------------------------------------- from_pretrained


@pytest.mark.parametrize("load", [AutoModelForCausalLM, LlamaForCausalLM])
def test_from_pretrained_with_a_local_kernel(llama: Path, norm: str, load: Any) -> None:
    own = logits(load.from_pretrained(llama))
    config = only({"RMSNorm": norm + "MarkedNorm"})
    model = load.from_pretrained(llama, use_kernels=True, kernel_config=config)
    assert model.use_kernels
    assert model.kernel_config is config
    assert set(kernels_in(model).values()) == {norm + "MarkedNorm"}
    assert len(kernels_in(model)) == 5
    assert not torch.allclose(logits(model), own)
    model.set_use_kernels(True, only({"RMSNorm": norm + "GoodNorm"}))
    torch.testing.assert_close(logits(model), own)


def test_from_pretrained_with_builtin_kernels(llama: Path) -> None:
    own = logits(AutoModelForCausalLM.from_pretrained(llama))
    model = AutoModelForCausalLM.from_pretrained(llama, use_kernels=True, kernel_config=KernelConfig())
    assert {"builtin:RMSNorm", "builtin:SwiGLUMLP", "builtin:rotary_pos_emb"} <= set(kernels_in(model).values())
    torch.testing.assert_close(logits(model), own)


def test_from_pretrained_with_a_hub_kernel(llama: Path, hub: FakeHub) -> None:
    hub.add("good/norm", {"v1": kernel_files(layers=LAYERS)})
    config = only({"RMSNorm": ("good/norm:MarkedNorm", {"version": 1})})
    model = AutoModelForCausalLM.from_pretrained(llama, use_kernels=True, kernel_config=config)
    assert set(kernels_in(model).values()) == {"good/norm@v1:MarkedNorm"}
    assert all(row.revision for row in kw.report(model).rows if row.kernel)


def test_allow_all_kernels_trusts_every_publisher(llama: Path, hub: FakeHub) -> None:
    hub.add("stranger/norm", {"v1": kernel_files(layers=LAYERS)})
    config = only({"RMSNorm": {"cpu": "stranger/norm:MarkedNorm"}})
    with pytest.raises(kw.KernelLoadError, match="trust"):
        AutoModelForCausalLM.from_pretrained(llama, kernel_config=config, use_kernels=True)
    model = AutoModelForCausalLM.from_pretrained(llama, kernel_config=config, use_kernels=True, allow_all_kernels=True)
    assert len(kernels_in(model)) == 5
    model.use_kernels = False
    model.use_kernels = True
    assert len(kernels_in(model)) == 5
    assert config.kernel_mapping == {"RMSNorm": {"cpu": "stranger/norm:MarkedNorm"}}
    with pytest.raises(kw.KernelLoadError, match="trust"):
        kw.kernelize(build(), config)


def test_a_wrong_form_is_said_before_anything_is_read(tmp_path: Path) -> None:
    config = KernelConfig({"RMSNorm": ("good/norm:Norm", {"version": 1, "revision": "main"})})
    with pytest.raises(kw.KernelConfigError, match="version"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "nothing", config=build().config, kernel_config=config)


def test_loading_info_is_returned_beside_the_model(llama: Path) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(llama, kernel_config=KernelConfig(), output_loading_info=True)
    assert model.use_kernels
    assert "missing_keys" in info


def test_a_kernel_for_another_device_alone_is_no_error(llama: Path) -> None:
    config = only({"RMSNorm": {"cuda": "good/norm@v1:Norm", "rocm": "good/norm@v2:Norm"}})
    model = AutoModelForCausalLM.from_pretrained(llama, use_kernels=True, kernel_config=config)
    assert kernels_in(model) == {}
    assert any("did not apply: it is for cuda" in note for note in kw.report(model).notes)


def test_none_keeps_the_own_code_there(llama: Path) -> None:
    config = KernelConfig({"RMSNorm": None, "SwiGLUMLP": {"cpu": "none"}})
    model = AutoModelForCausalLM.from_pretrained(llama, use_kernels=True, kernel_config=config)
    assert set(kernels_in(model).values()) & {"builtin:RMSNorm", "builtin:SwiGLUMLP"} == set()
    assert "builtin:rotary_pos_emb" in kernels_in(model).values()


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_a_failure_while_loading_leaves_nothing_behind(llama: Path, norm: str, mode: str) -> None:
    config = only({"RMSNorm": {mode: norm + "NoSuchLayer"}})
    with pytest.raises(kw.KernelwiseError, match="NoSuchLayer"):
        AutoModelForCausalLM.from_pretrained(llama, use_kernels=True, kernel_config=config)
    plain = AutoModelForCausalLM.from_pretrained(llama)
    assert not plain.use_kernels
    assert plain.kernel_config is None


def test_a_config_that_is_not_for_transformers_alone_is_taken_too(llama: Path, norm: str) -> None:
    config = kw.KernelConfig({"RMSNorm": norm + "MarkedNorm"}, inherit_mapping=False, verify=False)
    model = AutoModelForCausalLM.from_pretrained(llama, use_kernels=True, kernel_config=config)
    assert model.kernel_config is config
    assert len(kernels_in(model)) == 5
    model.use_kernels = False
    assert kernels_in(model) == {}


def test_an_unproven_kernel_goes_in_only_on_the_users_word(
    llama: Path, norm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KERNELWISE_CACHE", str(tmp_path / "proofs"))
    wrong = {"RMSNorm": norm + "MarkedNorm"}
    with pytest.raises(kw.PlanError, match=r"MarkedNorm is not put into .*\n.*wrong_values"):
        AutoModelForCausalLM.from_pretrained(llama, kernel_config=KernelConfig(wrong, inherit_mapping=False))
    config = KernelConfig({"RMSNorm": norm + "GoodNorm"}, inherit_mapping=False)
    model = AutoModelForCausalLM.from_pretrained(llama, kernel_config=config)
    assert {row.proof for row in kw.report(model).rows if row.kernel} == {"proven"}
    model.set_use_kernels(True, KernelConfig(wrong, inherit_mapping=False, verify=False))
    assert {row.proof for row in kw.report(model).rows if row.kernel} == {"unproven (verify=False)"}


# ------------------------------------------------------------------------------- set_use_kernels, train, eval, use_kernels


def test_set_use_kernels_on_a_model_from_a_config(norm: str) -> None:
    model = build()
    own = logits(model)
    model.set_use_kernels(True, only({"RMSNorm": norm + "MarkedNorm"}))
    assert not torch.allclose(logits(model), own)
    model.set_use_kernels(False)
    assert not model.use_kernels
    assert torch.equal(logits(model), own)


def test_use_kernels_false_is_really_off_and_true_again(norm: str) -> None:
    model = build()
    own = logits(model)
    forwards = {name: module.__dict__.copy() for name, module in model.named_modules() if name}
    config = only({"RMSNorm": norm + "MarkedNorm", "rotary_pos_emb": norm + "MarkedRotary"})
    model.set_use_kernels(True, config)
    on = logits(model)
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.use_kernels = False
        assert not model.use_kernels
        assert torch.equal(logits(model), own)
        assert {name: module.__dict__ for name, module in model.named_modules() if name} == forwards
        model.train()
        model.eval()
        assert not model.use_kernels
        assert torch.equal(logits(model), own)
        model.use_kernels = True
        assert model.use_kernels
        assert model.kernel_config is config
        assert torch.equal(logits(model), on)


def test_unkernelize_leaves_the_model_as_it_was(norm: str) -> None:
    model = build()
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    model.set_use_kernels(True, only({"RMSNorm": norm + "MarkedNorm"}))
    kw.unkernelize(model)
    assert {name: module.__dict__ for name, module in model.named_modules()} == before
    assert model.kernel_config is None
    assert not model.use_kernels


def test_unkernelize_after_off_takes_the_config_away_too() -> None:
    model = build()
    before = dict(model.__dict__)
    model.set_use_kernels(True, KernelConfig())
    model.use_kernels = False
    kw.unkernelize(model)
    assert model.__dict__ == before


def test_train_and_eval_switch_the_kernel_without_loading(norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    own = logits(model)
    config = only({"RMSNorm": {"inference": norm + "MarkedNorm", "training": norm + "GoodNorm"}})
    model.set_use_kernels(True, config)
    monkeypatch.setattr("kernelwise.sources.load", lambda *_, **__: pytest.fail("loads a kernel"))
    on = logits(model)
    for _ in range(2):
        model.train()
        assert model.use_kernels
        torch.testing.assert_close(logits(model), own)
        model.eval()
        assert torch.equal(logits(model), on)
        assert not torch.allclose(on, own)


def test_the_mode_argument_is_a_mode_of_the_kernels_library(norm: str) -> None:
    from kernels import Mode

    model = build()
    config = only({"RMSNorm": {"inference": norm + "MarkedNorm", "training": norm + "GoodNorm"}})
    own = logits(model)
    model.set_use_kernels(True, config, mode=Mode.TRAINING)
    torch.testing.assert_close(logits(model), own)
    model.set_use_kernels(True, config)
    assert not torch.allclose(logits(model), own)


def test_another_config_takes_the_place_of_the_first(norm: str) -> None:
    model = build()
    own = logits(model)
    model.set_use_kernels(True, only({"RMSNorm": norm + "MarkedNorm", "rotary_pos_emb": norm + "MarkedRotary"}))
    second = only({"RMSNorm": norm + "GoodNorm"})
    model.set_use_kernels(True, second)
    assert set(kernels_in(model).values()) == {norm + "GoodNorm"}
    assert model.kernel_config is second
    torch.testing.assert_close(logits(model), own)
    with pytest.raises(kw.KernelwiseError):
        model.set_use_kernels(True, only({"RMSNorm": norm + "NoSuchLayer"}))
    assert model.kernel_config is second
    assert set(kernels_in(model).values()) == {norm + "GoodNorm"}
    kw.unkernelize(model)
    assert torch.equal(logits(model), own)


def test_a_model_inside_a_model_has_its_own_switch(norm: str) -> None:
    model = build()
    own = logits(model)
    model.model.set_use_kernels(True, only({"RMSNorm": norm + "MarkedNorm"}))
    assert model.model.use_kernels
    assert not model.use_kernels
    model.train()
    model.eval()
    assert not torch.allclose(logits(model), own)
    model.model.use_kernels = False
    assert torch.equal(logits(model), own)


# --------------------------------------------------------------------------------- generate, copies, files, attributes


def test_generate_gives_the_same_tokens() -> None:
    model = build()
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    own = model.generate(IDS, **options)
    model.set_use_kernels(True, KernelConfig())
    assert torch.equal(model.generate(IDS, **options), own)


def test_save_pretrained_writes_what_it_writes_without_kernels(tmp_path: Path) -> None:
    model = build()
    model.save_pretrained(tmp_path / "before")
    model.set_use_kernels(True, KernelConfig())
    model.save_pretrained(tmp_path / "after")
    before, after = (
        {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("before", "after")
    )
    assert before == after
    assert model.use_kernels
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "after")), logits(build()))


def test_a_copy_has_the_kernels_and_can_be_turned_off_alone(norm: str) -> None:
    model = build()
    own = logits(model)
    model.set_use_kernels(True, only({"RMSNorm": norm + "MarkedNorm"}))
    copied = copy.deepcopy(model)
    assert copied.use_kernels
    assert copied.kernel_config == model.kernel_config
    copied.use_kernels = False
    assert torch.equal(logits(copied), own)
    assert not torch.allclose(logits(model), own)
    copied.use_kernels = True
    assert torch.equal(logits(copied), logits(model))


def without_function_wrappers(model: Any) -> Any:
    """transformers with live registrations keeps classes on its modules that no pickle can hold, with or without us."""
    if ACCEPTED:
        with pytest.raises(AttributeError, match="local object"):
            pickle.dumps(build())
    for module in model.modules():
        for attribute in ("_kernel_funcs", "_hidden_kernels"):
            module.__dict__.pop(attribute, None)
    return model


@pytest.mark.parametrize("state", ["on", "off"])
def test_a_pickled_model_loads_without_kernelwise(tmp_path: Path, norm: str, state: str) -> None:
    model = without_function_wrappers(build())
    own = logits(model)
    model.set_use_kernels(True, only({"RMSNorm": norm + "MarkedNorm"}))
    model.use_kernels = state == "on"
    torch.save(model, tmp_path / "model.pt")
    torch.save(own, tmp_path / "own.pt")
    code = """
import sys
sys.modules["kernelwise"] = None
import torch
model, own = (torch.load(sys.argv[1] + name, weights_only=False) for name in ("/model.pt", "/own.pt"))
assert model.kernel_config is None and not model.use_kernels
model.train(); model.eval()
assert torch.equal(model(torch.tensor([[1, 2, 3, 4, 5, 6, 7]])).logits, own)
print("loaded")
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "loaded", done.stderr
    assert model.use_kernels == (state == "on")


def test_a_pickled_config_is_the_same_config(norm: str) -> None:
    config = only({"RMSNorm": {"cpu": norm + "GoodNorm"}}, on_miss="keep")
    for loaded in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config), copy.copy(config)):
        assert type(loaded) is KernelConfig
        assert loaded == config


def test_a_saved_config_loads_as_one_for_transformers(tmp_path: Path) -> None:
    config = only({"RMSNorm": "builtin:RMSNorm"})
    config.save(tmp_path / "kernels.toml")
    loaded = KernelConfig.load(tmp_path / "kernels.toml")
    assert type(loaded) is KernelConfig
    assert isinstance(loaded, transformers.KernelConfig)
    assert isinstance(loaded, kw.KernelConfig)
    assert loaded == config


def test_the_attributes_of_transformers_class_are_useful() -> None:
    model, config = build(), KernelConfig()
    config.store_registered_layer_names(model)
    names = config.registered_layer_names
    assert names["model.norm"] == "RMSNorm"
    assert names["model.layers.1.self_attn.rotary_pos_emb"] == "rotary_pos_emb"
    if ACCEPTED:  # with live registrations transformers' own class sees a part of the same
        theirs = transformers.KernelConfig()
        theirs.store_registered_layer_names(model)
        assert theirs.registered_layer_names.items() <= names.items()
    other = KernelConfig()
    model.set_use_kernels(True, other)
    assert other.registered_layer_names == names


def test_update_kernel_writes_an_entry_of_our_form(hub: FakeHub) -> None:
    from kernels import Mode

    hub.add("good/norm", {"v2": kernel_files(layers=LAYERS), "try": kernel_files(layers=LAYERS)})
    mapping: dict[str, Any] = {}
    config = only(mapping)
    config.update_kernel("good/norm", "RMSNorm", "MarkedNorm", "cpu", Mode.INFERENCE, version=2)
    assert mapping == {}
    model = build()
    model.set_use_kernels(True, config)
    assert set(kernels_in(model).values()) == {"good/norm@v2:MarkedNorm"}
    assert kernels_in(model, "training") == {}
    config.update_kernel("good/norm", "RMSNorm", "MarkedNorm", "cpu", Mode.INFERENCE, revision="try")
    model.set_use_kernels(True, config)
    assert set(kernels_in(model).values()) == {"good/norm@try:MarkedNorm"}


# ------------------------------------------------------------------------------------------------------------ the patch


def test_the_patch_is_inert_for_other_configs(llama: Path) -> None:
    """What transformers itself does with its own config, or without one, happens as without us."""
    model = AutoModelForCausalLM.from_pretrained(llama)
    assert model.__dict__["_use_kernels"] is False
    theirs = transformers.KernelConfig({})
    if ACCEPTED:
        model.set_use_kernels(True, theirs)
        assert model.__dict__["_use_kernels"] is True
        assert model.use_kernels
        assert model.kernel_config is theirs
        assert "_kernelwise" not in model.__dict__
    else:
        with pytest.raises(ValueError, match="Kernels are not available"):
            model.set_use_kernels(True, theirs)


def test_transformers_own_kernels_after_ours(norm: str) -> None:
    """Ours are taken out first, because the kernels library writes over what stands there."""
    model = build()
    own = logits(model)
    model.set_use_kernels(True, only({"RMSNorm": norm + "MarkedNorm"}))
    theirs = transformers.KernelConfig({})
    theirs.inherit_mapping = False
    if ACCEPTED:
        model.set_use_kernels(True, theirs)
        assert model.kernel_config is theirs
    else:
        with pytest.raises(ValueError, match="Kernels are not available"):
            model.set_use_kernels(True, theirs)
    assert torch.equal(logits(model), own)
    assert kernels_in(model) == {}


def test_patch_is_idempotent_and_unpatch_takes_it_back(norm: str) -> None:
    cls = transformers.PreTrainedModel
    names = ("from_pretrained", "set_use_kernels", "use_kernels")
    patched = {name: cls.__dict__[name] for name in names}
    integration.patch()
    assert {name: cls.__dict__[name] for name in names} == patched
    model = build()
    own = logits(model)
    model.set_use_kernels(True, only({"RMSNorm": norm + "MarkedNorm"}))
    integration.unpatch()
    try:
        original = {name: cls.__dict__[name] for name in names}
        assert all(original[name] is not patched[name] for name in names)
        assert original["set_use_kernels"].__module__ == "transformers.modeling_utils"
        assert not hasattr(original["set_use_kernels"], "__wrapped__")
        integration.unpatch()
        assert {name: cls.__dict__[name] for name in names} == original
        model.train()  # transformers does not take the kernels for its own
        model.eval()
        assert not torch.allclose(logits(model), own)
        kw.unkernelize(model)
        assert torch.equal(logits(model), own)
    finally:
        integration.patch()
    assert all(cls.__dict__[name] is not original[name] for name in names)


def test_unpatch_leaves_what_somebody_else_put_around_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    cls = transformers.PreTrainedModel
    ours = cls.set_use_kernels

    def theirs(self: Any, *args: Any, **kwargs: Any) -> None:
        ours(self, *args, **kwargs)

    monkeypatch.setattr(cls, "set_use_kernels", theirs)
    integration.unpatch()
    try:
        assert cls.set_use_kernels is theirs
    finally:
        monkeypatch.undo()
        integration.unpatch()
        cls.set_use_kernels = ours.__wrapped__
        integration.patch()


def test_importing_kernelwise_imports_no_transformers() -> None:
    code = "import kernelwise, sys; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_without_transformers_the_message_has_the_command() -> None:
    code = "import sys; sys.modules['transformers'] = None; import kernelwise.integrations.transformers"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert 'pip install "kernelwise[transformers]"' in done.stderr
    assert "MissingDependencyError" in done.stderr


def test_buffers_hold_no_kernelwise_name(norm: str) -> None:
    """The bytes of a pickled model do not name this library."""
    model = without_function_wrappers(build())
    model.set_use_kernels(True, only({"RMSNorm": norm + "MarkedNorm"}))
    file = io.BytesIO()
    torch.save(model, file)
    assert b"kernelwise" not in file.getvalue()
