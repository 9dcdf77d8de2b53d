"""Fixtures of the tests of tuning."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from planted import write

from kernelwise._tuning import _races, _session, _trials
from kernelwise._verifying import _cases


@pytest.fixture(scope="module")
def few_sizes() -> Iterator[None]:
    """For tests that are about what is done with checks and times, not about these."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_cases, "_SIZES", ())
        patch.setattr(_cases, "_MANY_ROWS", {**_cases._MANY_ROWS, "S": 101})
        patch.setattr(_races, "MOST_S", 1.0)
        patch.setattr(_trials, "TIMING_S", 0.2)
        patch.setattr(_session, "_rivals_of", lambda model: ())  # compiling takes seconds
        yield


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The kernels that are planted for a `SleepyNorm`."""
    return write(tmp_path_factory.mktemp("kernels") / "planted")


@pytest.fixture(scope="module")
def one_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What one test of a file has measured, the next one knows."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("KERNELWISE_CACHE", str(folder))
        yield folder
