"""A layer that is nearly a known operation is shown beside it."""

from __future__ import annotations

import pytest
from test_decoder_layers import ScaledResidual
from test_gated_mlps import Mlp
from test_norms import CastAfter, Centred, KeepsState, MeanOverTheWrongAxis, NoEps, Norm
from test_rotary_functions import minus, plain
from torch import nn

from kernelwise._recognize import near_miss


def test_norm_without_eps_is_shown_beside_the_norm():
    found = near_miss(NoEps())
    assert found is not None
    assert found.op == "rms_norm"
    marked = [line for line in found.side_by_side.splitlines() if line.startswith("*")]
    assert len(marked) == 2  # the sum that is missing, and what is computed from it
    assert "add(" in marked[0]
    assert "rsqrt(" in marked[1]


def test_differing_line_stands_beside_what_is_there():
    found = near_miss(Centred())
    assert found is not None
    assert found.op in ("rms_norm", "layer_norm")
    assert any(line.startswith("*") and "mean(" in line for line in found.side_by_side.splitlines())


def test_recognised_layer_has_no_marked_line():
    for layer in (Norm(), CastAfter(), Mlp()):
        found = near_miss(layer)
        assert found is not None
        assert not any(line.startswith("*") for line in found.side_by_side.splitlines())


@pytest.mark.parametrize(
    ("layer", "op", "differs"),
    [
        (MeanOverTheWrongAxis(), "rms_norm", "mean("),
        (minus, "rotary", "neg("),
        (ScaledResidual(), "decoder_layer", "mul("),
        (plain, "rotary", None),
    ],
)
def test_lines_that_differ_in_an_operand_or_a_dimension_are_marked(layer, op, differs):
    found = near_miss(layer)
    assert found.op == op
    marked = [line for line in found.side_by_side.splitlines() if line.startswith("*")]
    assert any(differs in line for line in marked) if differs else not marked


def test_nothing_near():
    assert near_miss(KeepsState()) is None  # cannot be traced
    assert near_miss(nn.Conv1d(13, 4, 3)) is None
