"""Layers that do something else at one size, for one object, or beside their result."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from layers import MLP, Layer, Norm, operation, reason, rms, with_forward
from torch import Tensor, nn

from kernelwise._recognize import Recognizer, _recognize_function, recognize
from kernelwise.sources.builtin import CATALOGUE

LOG: list[Any] = []
SEEN: dict[str, Any] = {}


class Cache:
    """A class of arguments."""


# --- sizes ------------------------------------------------------------------------------------------------------------


def doubled_at_one_length(self: Any, x: Tensor) -> Tensor:
    return rms(x * 2 if x.shape[1] == 128 else x, self.weight, self.eps)


def doubled_at_whole_blocks(self: Any, x: Tensor) -> Tensor:
    return rms(x if x.size(1) % 96 else x * 2, self.weight, self.eps)


def doubled_between_two_lengths(self: Any, x: Tensor) -> Tensor:
    return rms(x * 2 if 32 < x.shape[-2] < 48 else x, self.weight, self.eps)


def doubled_in_a_large_batch(self: Any, x: Tensor) -> Tensor:
    return rms(x * 2 if x.size(0) in (4000, 5000) else x, self.weight, self.eps)


@pytest.mark.parametrize(
    "forward",
    [doubled_at_one_length, doubled_at_whole_blocks, doubled_between_two_lengths, doubled_in_a_large_batch],
)
def test_a_size_that_code_names_is_tried(forward: Callable[..., Any]):
    assert "in bfloat16, but not on inputs" in reason(with_forward(Norm, forward))


def doubled_where_square(self: Any, x: Tensor) -> Tensor:
    return rms(x * 2 if x.shape[-1] == x.shape[-2] else x, self.weight, self.eps)


def doubled_in_a_batch_larger_than_long(self: Any, x: Tensor) -> Tensor:
    return rms(x * 2 if x.dim() > 2 and x.shape[0] > x.shape[1] else x, self.weight, self.eps)


def doubled_for_a_number_of_elements(self: Any, x: Tensor) -> Tensor:
    return rms(x * 2 if x.numel() == 32768 else x, self.weight, self.eps)


def doubled_for_a_pair_of_dtypes(self: Any, x: Tensor) -> Tensor:
    mixed = x.dtype == torch.float16 and self.weight.dtype == torch.float32
    return rms(x * 2 if mixed else x, self.weight, self.eps)


@pytest.mark.parametrize(
    "forward",
    [
        doubled_where_square,
        doubled_in_a_batch_larger_than_long,
        doubled_for_a_number_of_elements,
        doubled_for_a_pair_of_dtypes,
    ],
)
def test_what_code_compares_is_tried(forward: Callable[..., Any]):
    assert "in bfloat16, but not on inputs of" in reason(with_forward(Norm, forward))


def doubled_for_one_row(self: Any, x: Tensor) -> Tensor:
    return rms(x * 2 if x.dim() == 1 else x, self.weight, self.eps)


def doubled_in_many_dimensions(self: Any, x: Tensor) -> Tensor:
    return rms(x * 2 if len(x.shape) > 4 else x, self.weight, self.eps)


@pytest.mark.parametrize("forward", [doubled_for_one_row, doubled_in_many_dimensions])
def test_ranks_are_tried_where_code_decides_by_sizes(forward: Callable[..., Any]):
    assert "in bfloat16, but not on inputs of" in reason(with_forward(Norm, forward))


def layer_doubled_at_one_length(self: Any, x: Tensor, mask: Any = None) -> Tensor:
    x = x + self.attention(self.norm(x), mask=mask)[0]
    return (x * 2 if x.shape[1] == 128 else x) + self.mlp(self.norm2(x))


def test_sizes_are_tried_of_layers_of_a_model_too():
    assert "in bfloat16, but not on inputs" in reason(with_forward(Layer, layer_doubled_at_one_length))


def without_weight(self: Any, x: Tensor) -> Tensor:
    y = x.float()
    return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


def eps_by_width(self: Any, x: Tensor) -> Tensor:
    y = x.float()
    return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-3 / x.shape[-1])).to(x.dtype)


def doubled_where_wide(self: Any, x: Tensor) -> Tensor:
    y = x.float() * 2 if x.shape[-1] > 1024 else x.float()
    return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class WithoutWeight(nn.Module):
    eps = 1e-6


def test_a_layer_without_parameters_is_tried_at_a_second_width():
    assert operation(with_forward(WithoutWeight, without_weight)) == "rms_norm"
    for forward in (eps_by_width, doubled_where_wide):
        assert "elements wide" in reason(with_forward(WithoutWeight, forward))


def test_a_weight_that_fits_by_broadcasting_is_no_weight():
    layer = Norm()
    layer.weight = nn.Parameter(torch.ones(1))
    assert "only fit by broadcasting" in reason(layer)


def half(x: Tensor) -> Tensor:
    middle = x.shape[-1] // 2
    return torch.cat((-x[..., middle:], x[..., :middle]), -1)


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return q * cos + half(q) * sin, k * cos + half(k) * sin


def rotary_doubled_for_wide_heads(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    return rotary(q * 2 if q.shape[-1] == 96 else q, k, cos, sin, unsqueeze_dim)


def rotary_of_the_first_64(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    q_turned, k_turned = rotary(q[..., :64], k[..., :64], cos, sin, unsqueeze_dim)
    return torch.cat((q_turned, q[..., 64:]), -1), torch.cat((k_turned, k[..., 64:]), -1)


def test_heads_of_another_width_are_tried():
    assert getattr(_recognize_function(rotary), "op", None) == "rotary"
    for function in (rotary_doubled_for_wide_heads, rotary_of_the_first_64):
        assert not hasattr(_recognize_function(function), "op")


def test_no_kernel_of_an_operation_takes_the_dtype_that_is_not_tried():
    assert not [entry for entry in CATALOGUE if entry.op and (not entry.dtypes or "float64" in entry.dtypes)]


# --- who, not what ----------------------------------------------------------------------------------------------------


def asks_for_true(self: Any, x: Tensor, mask: Any = None) -> Tensor:
    x = x + self.attention(self.norm(x), mask=mask)[0]
    return (x * 2 if mask is True else x) + self.mlp(self.norm2(x))


def asks_for_a_dict(self: Any, x: Tensor, mask: Any = None) -> Tensor:
    x = x + self.attention(self.norm(x), mask=mask)[0]
    return (x * 2 if type(mask) is dict else x) + self.mlp(self.norm2(x))


def asks_for_the_device(self: Any, x: Tensor, mask: Any = None) -> Tensor:
    x = x + self.attention(self.norm(x), mask=mask)[0]
    return (x * 2 if x.device.type == "cuda" else x) + self.mlp(self.norm2(x))


def asks_for_the_stride(self: Any, x: Tensor, mask: Any = None) -> Tensor:
    x = x + self.attention(self.norm(x), mask=mask)[0]
    return (x * 2 if x.stride(-1) != 1 else x) + self.mlp(self.norm2(x))


@pytest.mark.parametrize(
    ("forward", "why"),
    [
        (asks_for_true, "one very object"),
        (asks_for_a_dict, "the type of an argument"),
        (asks_for_the_device, "(device)"),
        (asks_for_the_stride, "stride"),
    ],
)
def test_questions_that_a_trace_cannot_answer_make_the_layer_unknown(forward: Callable[..., Any], why: str):
    assert why in reason(with_forward(Layer, forward))


def asks_for_constants_of_its_own(self: Any, x: Tensor) -> Tensor:
    kept = x if self.calls is False or self.missing is None or x.dtype is torch.float64 else x * 1
    return rms(kept, self.weight, self.eps)


def test_identity_of_what_stands_on_the_layer_may_be_asked():
    layer = with_forward(Norm, asks_for_constants_of_its_own)
    layer.missing = None
    assert operation(layer) == "rms_norm"


def takes_a_part_of_a_cache(self: Any, x: Tensor, mask: Any = None) -> Tensor:
    part = mask.own if isinstance(mask, Cache) else mask
    x = x + self.attention(self.norm(x), mask=part)[0]
    return x + self.mlp(self.norm2(x))


def doubled_with_a_cache(self: Any, x: Tensor, mask: Any = None) -> Tensor:
    x = x + self.attention(self.norm(x), mask=mask)[0]
    return (x * 2 if isinstance(mask, Cache) else x) + self.mlp(self.norm2(x))


def test_a_layer_may_ask_of_which_class_an_argument_is_where_it_is_the_same_layer_either_way():
    answer = recognize(with_forward(Layer, takes_a_part_of_a_cache))
    assert getattr(answer, "op", None) == "decoder_layer"
    assert dict(answer.options)["passing"] == "other"  # type: ignore[union-attr]
    assert "not without mask as a Cache" in reason(with_forward(Layer, doubled_with_a_cache))


def gives_more_if_asked(self: Any, x: Tensor, mask: Any = None, everything: bool = False) -> Any:
    attended = self.attention(self.norm(x), mask=mask)[0]
    x = x + attended
    y = x + self.mlp(self.norm2(x))
    return (y, attended) if everything else (y, None)


def gives_another_sum_if_asked(self: Any, x: Tensor, mask: Any = None, everything: bool = False) -> Any:
    x = x + self.attention(self.norm(x), mask=mask)[0]
    y = x + self.mlp(self.norm2(x))
    return (y, x) if everything else (y, None)


def test_a_layer_may_also_give_what_a_child_gave():
    answer = recognize(with_forward(Layer, gives_more_if_asked))
    assert getattr(answer, "op", None) == "decoder_layer"
    assert dict(answer.options)["passing"] == "other"  # type: ignore[union-attr]
    assert operation(with_forward(Layer, gives_another_sum_if_asked)) is None


# --- what outlives a call ---------------------------------------------------------------------------------------------


def logs_globally(self: Any, x: Tensor) -> Tensor:
    LOG.append(x)
    return rms(x, self.weight, self.eps)


def keeps_globally(self: Any, x: Tensor) -> Tensor:
    SEEN["last"] = x
    return rms(x, self.weight, self.eps)


def counts_on_a_class(self: Any, x: Tensor) -> Tensor:
    Cache.calls = 1
    return rms(x, self.weight, self.eps)


def logging_in_a_closure() -> Callable[..., Any]:
    seen: list[Any] = []

    def forward(self: Any, x: Tensor) -> Tensor:
        seen.append(x)
        return rms(x, self.weight, self.eps)

    return forward


@pytest.mark.parametrize("forward", [logs_globally, keeps_globally, counts_on_a_class, logging_in_a_closure()])
def test_a_layer_that_changes_what_outlives_a_call_is_unknown_and_is_not_run(forward: Callable[..., Any]):
    assert "which outlives the call" in reason(with_forward(Norm, forward))
    assert not LOG
    assert not SEEN
    assert not hasattr(Cache, "calls")


def test_a_helper_that_logs_makes_the_layer_unknown():
    def helper(x: Tensor) -> Tensor:
        LOG.append(x)
        return x

    def forward(self: Any, x: Tensor) -> Tensor:
        return rms(helper(x), self.weight, self.eps)

    assert "may change LOG" in reason(with_forward(Norm, forward))
    assert LOG == []


def test_looking_twice_asks_the_code_once():
    layers = [MLP() for _ in range(4)]
    recognizer = Recognizer()
    assert len({recognizer.both(layer) for layer in layers}) == 1


library = types.ModuleType("a_library")
exec("kinds = {}\n\ndef same(x):\n    kinds[type(x)] = True\n    return x", vars(library))


def test_libraries_may_look_at_types_and_keep_them():
    def forward(self: Any, x: Tensor) -> Tensor:
        return rms(library.same(x), self.weight, self.eps)

    assert operation(with_forward(Norm, forward)) == "rms_norm"


# --- what a tensor is, besides its values -----------------------------------------------------------------------------

CPU = torch.device("cpu")


def on_another_device(self: Any, x: Tensor) -> Tensor:
    return rms(x * 2 if x.device != torch.device("cpu") else x, self.weight, self.eps)


def on_one_of_some_devices(self: Any, x: Tensor) -> Tensor:
    device = x.device
    return rms(x if device in (CPU,) else x * 2, self.weight, self.eps)


def by_the_name_of_the_device(self: Any, x: Tensor) -> Tensor:
    return rms(x * 2 if "cuda" in str(x.device) else x, self.weight, self.eps)


def by_the_device_in_a_text(self: Any, x: Tensor) -> Tensor:
    return rms(x * 2 if f"{x.device}" == "cuda:0" else x, self.weight, self.eps)


def by_the_kind_of_device(self: Any, x: Tensor) -> Tensor:
    return rms(x * 2 if x.device.type.startswith("cu") else x, self.weight, self.eps)


def by_a_table_of_devices(self: Any, x: Tensor) -> Tensor:
    return rms(x * {"cpu": 1}.get(x.device.type, 2), self.weight, self.eps)


def is_on_a_gpu(place: Any) -> bool:
    return bool(place.type == "cuda")


def is_named_cuda(place: Any) -> bool:
    kind = place.type
    return kind in ("cuda", "xpu")


def is_the_first_gpu(place: Any) -> bool:
    return bool(place == torch.device("cuda", 0))


def by_a_helper(helper: Callable[[Any], bool]) -> Callable[..., Any]:
    def forward(self: Any, x: Tensor) -> Tensor:
        return rms(x * 2 if helper(x.device) else x, self.weight, self.eps)

    return forward


def by_the_type_of_a_copy(self: Any, x: Tensor) -> Tensor:
    return rms(x * 2 if torch.device(x.device).type == "cuda" else x, self.weight, self.eps)


def by_the_name_of_the_type(self: Any, x: Tensor) -> Tensor:
    return rms(x * 2 if x.type() == "torch.cuda.FloatTensor" else x, self.weight, self.eps)


def for_parameters(self: Any, x: Tensor) -> Tensor:
    return rms(x * 2 if isinstance(x, nn.Parameter) else x, self.weight, self.eps)


def for_views(self: Any, x: Tensor) -> Tensor:
    return rms(x * 2 if x._base is not None else x, self.weight, self.eps)


def for_results(self: Any, x: Tensor) -> Tensor:
    return rms(x * 2 if x.grad_fn is not None else x, self.weight, self.eps)


def for_tensors_that_are_marked(self: Any, x: Tensor) -> Tensor:
    return rms(x * 2 if hasattr(x, "scale") else x, self.weight, self.eps)


def by_the_clock(self: Any, x: Tensor) -> Tensor:
    import time

    return rms(x * 2 if time.time() < 0 else x, self.weight, self.eps)


def by_threads(self: Any, x: Tensor) -> Tensor:
    return rms(x * 2 if torch.get_num_threads() > 64 else x, self.weight, self.eps)


def when_deterministic(self: Any, x: Tensor) -> Tensor:
    return rms(x * 2 if torch.are_deterministic_algorithms_enabled() else x, self.weight, self.eps)


def by_the_backend(self: Any, x: Tensor) -> Tensor:
    return rms(x * 2 if torch.backends.cudnn.benchmark else x, self.weight, self.eps)


def by_bytes(self: Any, x: Tensor) -> Tensor:
    return rms(x * 2 if x.nbytes > 10**9 else x, self.weight, self.eps)


@pytest.mark.parametrize(
    "forward",
    [
        on_another_device, on_one_of_some_devices, by_the_name_of_the_device, by_the_device_in_a_text,
        by_a_helper(is_on_a_gpu), by_a_helper(is_named_cuda), by_a_helper(is_the_first_gpu), by_the_type_of_a_copy,
        by_the_kind_of_device, by_a_table_of_devices, by_the_name_of_the_type, for_parameters, for_views, for_results,
        for_tensors_that_are_marked, by_the_clock, by_threads,
        when_deterministic, by_the_backend, by_bytes,
    ],
)  # fmt: skip
def test_what_else_a_tensor_is_makes_a_layer_unknown(forward: Callable[..., Any]):
    assert reason(with_forward(Norm, forward)).startswith(
        ("what it computes may depend on", "it asks which attributes")
    )


def moved_by_a_variable(self: Any, x: Tensor) -> Tensor:
    device = self.weight.device
    return rms(x.to(device), self.weight, self.eps)


def moved_to_where_the_weight_is(self: Any, x: Tensor) -> Tensor:
    return rms(x.to(device=self.weight.device), self.weight, self.eps)


def careful_on_a_device_without_kernels(self: Any, x: Tensor) -> Tensor:
    return rms(x * 2 if x.device.type == "mps" else x, self.weight, self.eps)


def cast_by_type(self: Any, x: Tensor) -> Tensor:
    return rms(x.type(torch.float32).type(x.dtype), self.weight, self.eps)


def test_a_device_that_is_only_handed_on_decides_nothing():
    for forward in (
        cast_by_type,
        moved_to_where_the_weight_is,
        moved_by_a_variable,
        careful_on_a_device_without_kernels,
    ):
        assert operation(with_forward(Norm, forward)) == "rms_norm"
