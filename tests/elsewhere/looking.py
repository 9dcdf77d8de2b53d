"""What is recognised in a model that need not be of transformers, and whether it is what it is taken for."""

from __future__ import annotations

import copy
from collections import Counter

import torch
from agreement import assert_agrees, function_inputs, inputs_of, randomize
from torch import nn

from kernelwise._data import Recognition
from kernelwise._recognize import plain_function, recognize, recognize_functions
from kernelwise.ops import OPERATIONS

LARGEST = 2_000_000  # parameters of a layer that is run


def look(model: nn.Module) -> tuple[Counter[tuple[str, str]], list[tuple[nn.Module | None, Recognition, object]]]:
    """Count (class or function, operation), and one case of each: the layer, its answer, the function or None."""
    counts: Counter[tuple[str, str]] = Counter()
    cases: dict[object, tuple[nn.Module | None, Recognition, object]] = {}
    for module in model.modules():
        answer = recognize(module, training=False)
        if isinstance(answer, Recognition):
            counts[type(module).__name__, answer.op] += 1
            cases.setdefault((type(module), answer), (module, answer, None))
        for name, found in recognize_functions(module):
            counts[name, found.op] += 1
            forward = plain_function(type(module).forward)
            assert forward is not None
            function = plain_function(forward.__globals__[name])
            cases.setdefault((function, found), (None, found, function))
    return counts, list(cases.values())


def assert_all_agree(cases: list[tuple[nn.Module | None, Recognition, object]]) -> int:
    """Run every case beside the reference of its operation, on random weights and inputs; return how many were run."""
    generator = torch.Generator().manual_seed(11)
    number = 0
    for module, answer, function in cases:
        if function is not None:
            assert_agrees(nn.Module(), answer, function_inputs(function, answer, generator), call=function)
        elif module is None or OPERATIONS[answer.op].norms or sum(p.numel() for p in module.parameters()) > LARGEST:
            continue
        else:
            layer = copy.deepcopy(module).to_empty(device="cpu").eval()
            randomize(layer, generator)
            assert_agrees(layer, answer, inputs_of(layer, answer, generator))
        number += 1
    return number
