"""A cache that has room for the next tokens gives what transformers' own gives, in every way in which one is used."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, MistralConfig

from kernelwise.integrations.transformers import GrowingCache

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL)).eval()


def ids(rows: int = 1, length: int = 5) -> torch.Tensor:
    return torch.randint(0, 96, (rows, length), generator=torch.Generator().manual_seed(3))


def states(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(shape), torch.randn(shape)


def both(model: Any, prompt: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What is generated with transformers' cache and with this one, in steps so small that it must grow several times."""
    given = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, **options}
    mask = torch.ones_like(prompt)
    own = model.generate(prompt, attention_mask=mask, past_key_values=DynamicCache(config=model.config), **given)
    cache = GrowingCache(config=model.config, step=7)
    return own, model.generate(prompt, attention_mask=mask, past_key_values=cache, **given)


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}, {"prompt_lookup_num_tokens": 3}],
    ids=["greedy", "beams", "several", "lookup"],
)
def test_the_same_is_generated(model: Any, options: dict[str, Any]) -> None:
    rows = 1 if "prompt_lookup_num_tokens" in options else 2
    own, ours = both(model, ids(rows).repeat(1, 3), **options)
    assert torch.equal(own, ours)


def test_logits_are_the_same_bit_for_bit(model: Any) -> None:
    own, ours = DynamicCache(), GrowingCache(step=4)
    with torch.no_grad():
        for part in ids(2, 23).split([9, 1, 1, 1, 4, 1, 1, 5], dim=1):
            a = model(part, past_key_values=own).logits
            b = model(part, past_key_values=ours).logits
            assert torch.equal(a, b)
    assert own.get_seq_length() == ours.get_seq_length() == 23


def test_tokens_are_written_where_there_is_room() -> None:
    """The keys stay where they are for a step of tokens, while transformers' own go elsewhere with each."""
    own, ours = DynamicCache(), GrowingCache(step=16)
    kept = {}
    with torch.no_grad():
        for cache in (own, ours):
            given = [cache.update(*states(1, 2, 1, 8), 0) for _ in range(40)]  # held, so that no place is used again
            kept[cache] = len({(keys.data_ptr(), values.data_ptr()) for keys, values in given})
    assert kept[own] == 40
    assert kept[ours] == 3
    assert ours.layers[0]._rooms["keys"].whole.shape[2] == 48


def test_a_copy_goes_on_by_itself(model: Any) -> None:
    """A prompt is computed once, and each continuation takes a deep copy, or one that shares the tensors."""
    prompt = GrowingCache(step=64)
    with torch.no_grad():
        model(ids(1, 9), past_key_values=prompt)
        deep = copy.deepcopy(prompt)
        shallow = copy.copy(prompt)
        shallow.layers = [copy.copy(layer) for layer in prompt.layers]
        stored = pickle.loads(pickle.dumps(prompt))
        found = [
            [model(torch.tensor([[start + step]]), past_key_values=cache).logits for step in range(3)]
            for start, cache in ((1, prompt), (30, deep), (60, shallow), (1, stored))
        ]
        again = DynamicCache()
        model(ids(1, 9), past_key_values=again)
        for start, got in ((1, found[0]), (30, found[1]), (60, found[2]), (1, found[3])):
            fresh = copy.deepcopy(again)
            for step in range(3):
                assert torch.equal(got[step], model(torch.tensor([[start + step]]), past_key_values=fresh).logits)


def test_what_was_given_out_is_not_written_to_again() -> None:
    cache = GrowingCache(step=32)
    with torch.no_grad():
        keys, _ = cache.update(*states(1, 2, 6, 8), 0)
        before = keys.clone()
        cache.crop(-3)
        cut, _ = cache.update(*states(1, 2, 3, 8), 0)
        assert torch.equal(keys, before)
        assert torch.equal(cut[:, :, :3], before[:, :, :3])
        assert not torch.equal(cut, before)


def test_a_reset_cache_is_as_long_as_transformers_own() -> None:
    caches = DynamicCache(), GrowingCache(step=32)
    with torch.no_grad():
        for cache in caches:
            cache.update(*states(1, 2, 6, 8), 0)
            cache.reset()
            cache.length = cache.get_seq_length()
            cache.update(*states(1, 2, 2, 8), 0)
    own, ours = caches
    assert own.length == ours.length
    assert own.get_seq_length() == ours.get_seq_length()


def test_batches_are_reordered_repeated_and_selected() -> None:
    caches = DynamicCache(), GrowingCache(step=5)
    torch.manual_seed(1)
    parts = [states(2, 2, 3, 8), states(2, 2, 1, 8), states(4, 2, 1, 8), states(2, 2, 1, 8)]
    with torch.no_grad():
        for cache in caches:
            cache.update(*parts[0], 0)
            cache.reorder_cache(torch.tensor([1, 0]))
            cache.update(*parts[1], 0)
            cache.batch_repeat_interleave(2)
            cache.update(*parts[2], 0)
            cache.batch_select_indices(torch.tensor([3, 0]))
            cache.update(*parts[3], 0)
    own, ours = (cache.layers[0] for cache in caches)
    assert torch.equal(own.keys, ours.keys)
    assert torch.equal(own.values, ours.values)


def test_a_backward_pass_reads_what_it_saved(model: Any) -> None:
    """With gradients nothing is written in place, also where keys need none and queries do."""
    cache = GrowingCache(step=64)
    with torch.no_grad():
        model(ids(1, 4), past_key_values=cache)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    queries = [layer.self_attn.q_proj.weight.requires_grad_() for layer in model.model.layers]
    try:
        logits = [model(torch.tensor([[t]]), past_key_values=cache).logits for t in range(3)]
        sum(item.sum() for item in logits).backward()
        assert all(weight.grad is not None for weight in queries)
    finally:
        model.zero_grad()
        model.requires_grad_(True)


def test_inference_mode_and_back(model: Any) -> None:
    own, ours = DynamicCache(), GrowingCache(step=64)
    for cache in (own, ours):
        with torch.inference_mode():
            model(ids(1, 4), past_key_values=cache)
        with torch.no_grad():
            cache.last = model(ids(1, 1), past_key_values=cache).logits
        with torch.inference_mode():
            cache.last = model(ids(1, 1), past_key_values=cache).logits
    assert torch.equal(own.last, ours.last)


def test_states_that_do_not_fit_are_an_error() -> None:
    for cache in (DynamicCache(), GrowingCache()):
        with torch.no_grad():
            cache.update(*states(1, 2, 3, 8), 0)
            with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
                cache.update(*states(2, 2, 1, 8), 0)
            assert cache.get_seq_length() == 3


@pytest.mark.parametrize(
    "parts",
    [
        [states(1, 3, 8), states(1, 2, 8)],
        [states(1, 2, 2, 3, 8), states(1, 2, 2, 1, 8)],
        [(torch.randn(1, 2, 5, 6), torch.empty(1, 2, 5, 0)), (torch.randn(1, 2, 1, 6), torch.empty(1, 2, 1, 0))],
        [states(0, 2, 5, 8), states(0, 2, 1, 8)],
        [(torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8).bfloat16()), states(1, 2, 1, 8)],
        [states(1, 2, 3, 8), tuple(part.bfloat16() for part in states(1, 2, 1, 8))],
        [tuple(part.bfloat16() for part in states(1, 2, 3, 8)), states(1, 2, 1, 8)],
    ],
    ids=["3 dimensions", "5 dimensions", "no width", "no sequence", "two dtypes", "a narrower dtype", "a wider dtype"],
)
def test_any_states_are_cached_as_transformers_does(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    own, ours = DynamicCache(), GrowingCache(step=4)
    with torch.no_grad():
        for part in parts:
            for a, b in zip(own.update(*part, 0), ours.update(*part, 0), strict=True):
                assert a.dtype == b.dtype
                assert torch.equal(a, b)


def test_what_is_left_after_a_cut_is_of_its_batch() -> None:
    for cache in (DynamicCache(), GrowingCache()):
        with torch.no_grad():
            cache.update(*states(2, 2, 3, 8), 0)
            cache.crop(-3)
            with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
                cache.update(*states(1, 2, 1, 8), 0)


@pytest.mark.parametrize("change", ["reorder_cache", "batch_repeat_interleave", "batch_select_indices"])
def test_a_batch_that_was_changed_holds_nothing_of_the_old_one(change: str) -> None:
    cache = GrowingCache()
    with torch.no_grad():
        cache.update(*states(2, 2, 3, 8), 0)
        getattr(cache, change)(2 if change == "batch_repeat_interleave" else torch.tensor([1, 0]))
    assert not cache.layers[0]._rooms


def test_under_compile_nothing_breaks_the_graph(model: Any) -> None:
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    own, ours = DynamicCache(config=model.config), GrowingCache(config=model.config)
    with torch.no_grad():
        for cache in (own, ours):
            model(ids(1, 9), past_key_values=cache)
            cache.last = [compiled(torch.tensor([[t]]), past_key_values=cache).logits for t in range(3)]
            cache.last.append(model(torch.tensor([[7]]), past_key_values=cache).logits)
    for a, b in zip(own.last, ours.last, strict=True):
        assert torch.equal(a, b)


def test_an_offloaded_layer_holds_no_room() -> None:
    cache = GrowingCache()
    with torch.no_grad():
        keys, _ = cache.update(*states(1, 2, 3, 8), 0)
        cache.layers[0].offload()
        assert not cache.layers[0]._rooms
        more, _ = cache.update(*states(1, 2, 1, 8), 0)
    assert torch.equal(more[:, :, :3], keys)


def test_layers_with_a_window_are_left_alone() -> None:
    config = MistralConfig(**SMALL, sliding_window=8)
    own, ours = DynamicCache(config=config), GrowingCache(config=config)
    assert [type(layer) for layer in ours.layers] == [type(layer) for layer in own.layers]


def test_it_can_be_given_keys_and_values() -> None:
    given = [states(1, 2, 3, 8), states(1, 2, 3, 8)]
    cache = GrowingCache(given)
    more = states(1, 2, 1, 8)
    with torch.no_grad():
        keys, _ = cache.update(*more, 1)
    assert torch.equal(keys, torch.cat([given[1][0], more[0]], dim=2))


def test_a_step_must_be_a_number_of_positions() -> None:
    with pytest.raises(ValueError, match="at least one position, not 0"):
        GrowingCache(step=0)
