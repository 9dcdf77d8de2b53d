"""Models with weights, as commands that run them need: from a directory, or random; and inputs that run the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kernelwise._errors import KernelwiseError
from kernelwise._models import load_model
from kernelwise._weights import load_with_weights, make_inputs

pytestmark = pytest.mark.usefixtures("offline")


@pytest.fixture(scope="module")
def llama() -> Any:
    return load_model("llama").model


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
