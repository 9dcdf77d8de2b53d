"""Models of other libraries. `make test` puts timm and diffusers in front (.venv/other/models) for these tests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent.parent
sys.path[:0] = [str(TESTS), str(TESTS / "recognize")]

# timm imports torchvision, whose wheel on PyPI is built for a torch with CUDA: beside a CPU build its operators cannot be
# loaded, and its import stops at two of them that only have to exist.
_torchvision = torch.library.Library("torchvision", "FRAGMENT")
for name in ("nms", "qnms"):
    if not hasattr(torch.ops.torchvision, name):
        _torchvision.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
