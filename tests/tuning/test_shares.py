"""How often layers are called in a workload, and which part of its time they take."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from kernelwise._discover import discover
from kernelwise._measuring._workload import Workload
from kernelwise._tuning import _shares
from kernelwise._tuning._candidates import kinds_of


class _Slow(nn.Module):
    """Takes 20 ms, and 300 ms more in its first run."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.first = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.32 if self.first else 0.02)
        self.first = False
        return self.norm(self.norm(x))


@pytest.mark.parametrize("long_s", [2.0, 0.1])
def test_what_is_set_up_in_the_first_run_is_no_part_of_the_time(monkeypatch: pytest.MonkeyPatch, long_s: float) -> None:
    """Also where that alone takes so long that the first run passes for a usual one."""
    monkeypatch.setattr(_shares, "LONG_S", long_s)
    model = _Slow().eval()
    inputs = {"x": torch.randn(2, 4)}
    kinds = kinds_of(model, discover(model), ("inference",))
    look = _shares.shares_of(model, kinds, Workload("prefill", inputs, 2), lambda: model(**inputs), "cpu")
    assert 0.02 <= look.seconds < 0.2
    (share,) = (share for share in look.shares.values() if share.calls)
    assert share.calls == 2
    assert share.part is not None
    assert 0 < share.part < 0.9


@pytest.mark.parametrize("long_s", [2.0, 0.1])
def test_what_a_run_waits_for_is_seen_in_one_that_sets_nothing_up(
    monkeypatch: pytest.MonkeyPatch, long_s: float
) -> None:
    """A device that works for 20 ms after all was given to it, whose first run takes 300 ms to be given."""
    monkeypatch.setattr(_shares, "LONG_S", long_s)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: time.sleep(0.02))
    first = [0.3]
    look = _shares.shares_of(
        nn.Identity(), [], Workload("prefill", {}, 2), lambda: time.sleep(first.pop() if first else 0.001), "cuda"
    )
    assert look.device_bound
    assert 0.02 <= look.seconds < 0.2
