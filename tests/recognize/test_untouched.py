"""Recognition leaves no trace: not in the module, not in the random state, not in memory; and it is cheap."""

from __future__ import annotations

import gc
import logging
import threading
import time
import weakref

import pytest
import torch
from torch import nn

import kernelwise as kw
import kernelwise._recognize as recognition
from kernelwise._data import Recognition
from kernelwise._recognize import Unknown, recognize, recognize_functions
from kernelwise._recognize._compare import forget_references

transformers = pytest.importorskip("transformers")


def llama(layers: int = 2, **extra):
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=128, **extra,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def snapshot(module: nn.Module):
    """Everything a module holds, by identity, with versions of its tensors."""
    state = []
    for path, item in module.named_modules():
        state.append((path, type(item), tuple(item.__dict__)))
        for key, value in item.__dict__.items():
            state.append((path, key, id(value)))
            if isinstance(value, dict):
                state.extend((path, key, name, id(entry)) for name, entry in value.items())
        for name, tensor in (*item._parameters.items(), *item._buffers.items()):
            if tensor is not None:
                state.append((path, name, tensor._version, tensor.requires_grad, tensor.grad, tensor.sum().item()))
    return state


def test_model_and_surroundings_are_untouched():
    model = llama().eval()
    calls = []
    model.model.layers[0].mlp.register_forward_hook(lambda *args: calls.append(args))
    model.model.norm.register_forward_pre_hook(lambda *args: calls.append(args))
    registered = nn.modules.module.register_module_forward_hook(lambda *args: calls.append(args))
    try:
        before, random, default = snapshot(model), torch.get_rng_state(), torch.get_default_dtype()
        gc.collect()
        subclasses = len(type(model.model.norm).__subclasses__())
        for module in model.modules():
            recognize(module)
            recognize(module, training=True)
            recognize_functions(module)
        gc.collect()
        assert snapshot(model) == before
        assert torch.equal(torch.get_rng_state(), random)
        assert torch.get_default_dtype() == default
        assert torch.is_grad_enabled()
        assert calls == []
        assert len(type(model.model.norm).__subclasses__()) == subclasses
    finally:
        registered.remove()


def test_a_class_that_keeps_a_registry_does_not_hear_of_the_stand_in():
    heard = []

    class Registry(nn.Module):
        def __init_subclass__(cls):
            heard.append(cls)

        def forward(self, x):
            return torch.relu(x)

    recognize(Registry())
    assert heard == []


def test_lists_and_dicts_of_the_module_are_copies_in_the_trace():
    class Appends(nn.Module):
        def __init__(self):
            super().__init__()
            self.seen = []

        def forward(self, x):
            self.seen.append(x)
            return x

    layer = Appends()
    recognize(layer)
    assert layer.seen == []


def test_meta_parameters_and_inference_mode():
    with torch.device("meta"):
        model = llama()
    assert isinstance(recognize(model.model.norm), Recognition)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert isinstance(recognize(llama().model.layers[0].mlp), Recognition)


def test_answers_keep_no_module_alive():
    model = llama(1)
    for module in model.modules():
        recognize(module)
    dead = weakref.ref(model.model.layers[0].mlp)
    del model, module
    gc.collect()
    assert dead() is None


def test_answers_keep_no_class_alive():
    def make():
        class Local(nn.Module):
            def __init__(self):
                super().__init__()
                self.act = nn.SiLU()

            def forward(self, x):
                return super().extra_repr() or self.act(x)

        layer = Local()
        recognize(layer)
        return weakref.ref(Local)

    dead = make()
    gc.collect()
    assert dead() is None


def test_memory_does_not_grow():
    tracemalloc = pytest.importorskip("tracemalloc")

    def look():
        for width in (24, 32, 40):
            model = llama(1)
            model.config.hidden_size = width
            for module in model.modules():
                recognize(module)

    look()
    gc.collect()
    tracemalloc.start()
    look()
    gc.collect()
    first = tracemalloc.get_traced_memory()[0]
    for _ in range(5):
        look()
    gc.collect()
    grown = tracemalloc.get_traced_memory()[0] - first
    tracemalloc.stop()
    assert grown < 200_000


def test_threads_get_the_same_answer():
    class Norm(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(24))

        def forward(self, x):
            y = x.float()
            return self.w * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)

    answers = []
    threads = [threading.Thread(target=lambda: answers.append(recognize(Norm()))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 8
    assert len(set(answers)) == 1
    assert isinstance(answers[0], Recognition)


def test_nothing_is_logged(caplog):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(24, 40), nn.Linear(24, 40)

        def forward(self, x):
            return self.a(x) @ self.b.weight @ self.b.weight

    with caplog.at_level(logging.WARNING, logger="torch._subclasses.fake_tensor"):
        assert isinstance(recognize(Odd()), Unknown)
    assert caplog.records == []


def test_changed_attribute_changes_the_answer():
    layer = llama(1).model.norm
    first = recognize(layer)
    layer.variance_epsilon = 1e-2
    assert recognize(layer) == first  # an attribute: read at every call
    layer.weight = None
    assert recognize(layer) != first


def test_cost():
    """32 layers cold in 2 s with the references' graphs forgotten too, and in 50 ms from memory."""
    recognition._modules.clear()
    recognition._functions.clear()
    forget_references()
    model = llama(32)
    cold = timed(list(model.modules()))
    assert cold < 2
    assert min(timed(list(model.modules())) for _ in range(5)) < 0.05


def timed(modules) -> float:
    """Processor time, of which a busy machine takes none away."""
    start = time.process_time()
    for module in modules:
        recognize(module)
        recognize_functions(module)
    return time.process_time() - start


def test_layers_without_a_shape_are_refused_by_name():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.LazyLinear(3)))
    with pytest.raises(kw.PlanError, match=r"(?s)1\.0 \(LazyLinear\) has no shape yet.*model\(batch\)"):
        kw.discover(model)
    model(torch.ones(2, 4))
    assert [layer.path for layer in kw.discover(model)] == ["0", "1.0"]
