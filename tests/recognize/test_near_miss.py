"""A layer that is nearly a known operation is shown beside it."""

from __future__ import annotations

from test_gallery import CastAfter, Centred, KeepsState, Mlp, NoEps, Norm
from torch import nn

from kernelwise._recognize import near_miss


def test_norm_without_eps_is_shown_beside_the_norm():
    found = near_miss(NoEps())
    assert found is not None
    assert found.op == "rms_norm"
    marked = [line for line in found.side_by_side.splitlines() if line.startswith("*")]
    assert len(marked) == 1
    assert "add(" in marked[0]


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


def test_nothing_near():
    assert near_miss(KeepsState()) is None  # cannot be traced
    assert near_miss(nn.Conv1d(13, 4, 3)) is None
