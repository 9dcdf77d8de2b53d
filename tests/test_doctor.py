"""The doctor on made-up machines: its judgement asks nothing but the facts."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kernelwise import _doctor
from kernelwise._cli import main
from kernelwise._doctor import Cache, Cpu, Facts, examine, gather, show

VERSIONS = {
    "kernelwise": "0.1.0",
    "torch": "2.13.0",
    "triton": "3.7.0",
    "kernels": "0.17.2",
    "transformers": "5.22.2",
    "huggingface_hub": "2.4.0",
    "accelerate": "1.15.0",
}
HEALTHY = Facts(
    python="3.11.7",
    system="Linux x86_64",
    versions=tuple(VERSIONS.items()),
    needs=(("kernels", ">=0.16,<0.19"), ("torch", ">=2.10"), ("transformers", ">=5.13")),
    accepted_kernels=("0.17.2", "0.18.0"),
    transformers_problem=None,
    accelerator="cuda",
    gpus=("NVIDIA H100 (sm_90)",),
    drivers=("NVIDIA",),
    compiler="/usr/bin/c++",
    cpu=Cpu("a processor", "AVX2", "avx2", "", ""),
    caches=(Cache("KERNELWISE_CACHE", "/home/user/.cache/kernelwise", True),),
)


def machine(versions: dict[str, str | None] | None = None, **changes: Any) -> Facts:
    return replace(HEALTHY, versions=tuple({**VERSIONS, **(versions or {})}.items()), **changes)


WITHOUT_GPU: dict[str, Any] = {"accelerator": None, "gpus": (), "drivers": ()}
NOT_BUILT = Cpu("a processor", "AVX2", None, "", "the C++ library was not built")

CASES = {
    "transformers too new for kernels": (
        machine({"transformers": "5.23.0"}, accepted_kernels=("0.18.2", "0.19.0")),
        "transformers 5.23.0 rejects kernels 0.17.2",
        'pip install "kernels>=0.18.2,<0.19.0"',
    ),
    "transformers too old for kernels": (
        machine({"transformers": "5.16.0"}, accepted_kernels=("0.16.0", "0.17.0")),
        "rejects kernels 0.17.2",
        'pip install "kernels>=0.16.0,<0.17.0"',
    ),
    "at the end of the window": (
        machine({"kernels": "0.18.0"}),
        "rejects kernels 0.18.0",
        'pip install "kernels>=0.17.2,<0.18.0"',
    ),
    "transformers that only takes kernels we do not": (
        machine({"transformers": "6.0.0"}, accepted_kernels=("0.20.0", "0.21.0")),
        "transformers 6.0.0 rejects",
        'pip install "transformers<6.0.0"',
    ),
    "kernels missing": (
        machine({"kernels": None}),
        "kernels is not installed",
        'pip install "kernels>=0.17.2,<0.18.0"',
    ),
    "kernels outside our range": (
        machine({"kernels": "0.15.2"}, accepted_kernels=None),
        "kernels 0.15.2 is outside >=0.16,<0.19",
        'pip install "kernels',
    ),
    "torch too old": (
        machine({"torch": "2.9.1+cu128"}),
        "torch 2.9.1+cu128 is outside >=2.10",
        'pip install "torch>=2.10"',
    ),
    "transformers too old": (
        machine({"transformers": "4.57.0"}, accepted_kernels=None),
        "transformers 4.57.0 is outside",
        'pip install "transformers>=5.13"',
    ),
    "transformers broken": (
        machine(accepted_kernels=None, transformers_problem="ImportError: no tokenizers"),
        "transformers cannot be imported",
        "pip install --force-reinstall --no-deps transformers==5.22.2",
    ),
    "GPU without Triton": (machine({"triton": None}), "a GPU without Triton", "pip install triton"),
    "GPU that torch cannot use": (
        machine(accelerator=None, gpus=()),
        "an NVIDIA GPU that torch 2.13.0 cannot use",
        "pip install --force-reinstall torch",
    ),
    "CPU kernels not built": (
        machine({"triton": None}, cpu=NOT_BUILT, **WITHOUT_GPU),
        "no CPU kernels",
        "pip install --no-build-isolation --force-reinstall --no-deps kernelwise",
    ),
    "no compiler either": (
        machine(cpu=NOT_BUILT, compiler=None, **WITHOUT_GPU),
        "no CPU kernels",
        "install a C++17 compiler first (Debian: apt install g++), then: pip install --no-build-isolation",
    ),
    "cache that cannot be written": (
        machine(caches=(Cache("KERNELWISE_CACHE", "/root/.cache/kernelwise", False),)),
        "the cache /root/.cache/kernelwise cannot be written",
        "export KERNELWISE_CACHE=",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_does_not_fit_is_found_with_its_command(name: str) -> None:
    facts, what, fix = CASES[name]
    findings = examine(facts)
    assert len(findings) == 1
    assert what in findings[0].what
    assert findings[0].fix.startswith(fix)
    shown = show(facts, findings)
    assert f"mend    {findings[0].fix}" in shown
    assert "everything fits" not in shown


@pytest.mark.parametrize(
    "facts",
    [
        HEALTHY,
        machine({"triton": None}, **WITHOUT_GPU),
        machine({"transformers": None, "accelerate": None}, accepted_kernels=None),
        machine(cpu=NOT_BUILT, compiler=None),  # models run on the GPU there
        machine({"torch": "2.14.0.dev20261101"}),
        machine(needs=()),
    ],
    ids=["all there", "no GPU", "no transformers", "no CPU kernels beside a GPU", "nightly torch", "not installed"],
)
def test_a_machine_that_fits(facts: Facts) -> None:
    assert examine(facts) == ()
    assert "everything fits together" in show(facts, ())


def test_several_faults_are_all_found() -> None:
    facts = machine({"torch": "2.9.0", "triton": None}, caches=(Cache("HF_HUB_CACHE", "/full", False),))
    assert len(examine(facts)) == 3


def test_facts_of_this_machine() -> None:
    import torch
    import transformers
    from transformers.utils import import_utils

    facts = gather()
    assert facts.version("torch") == torch.__version__
    assert facts.version("transformers") == transformers.__version__
    assert facts.accepted_kernels == (import_utils.KERNELS_MIN_VERSION, import_utils.KERNELS_MAX_VERSION)
    assert dict(facts.needs)["torch"] == ">=2.10"
    rejected = bool([finding for finding in examine(facts) if "rejects kernels" in finding.what])
    assert rejected is not import_utils.is_kernels_available()


def test_a_cache_that_is_no_directory_or_not_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    assert _doctor._cache("X", tmp_path / "not" / "yet").writable
    assert not _doctor._cache("X", tmp_path / "file" / "below").writable
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert not _doctor._cache("X", tmp_path).writable


@pytest.mark.parametrize(("facts", "code"), [(HEALTHY, 0), (machine({"triton": None}), 1)])
def test_the_exit_code_says_whether_all_fits(
    facts: Facts, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_doctor, "gather", lambda: facts)
    with pytest.raises(SystemExit) as exit_:
        main(["doctor", "--json"])
    assert (exit_.value.code or 0) == code
    data = json.loads(capsys.readouterr().out)
    assert len(data["findings"]) == code
    assert data["facts"]["python"] == "3.11.7"
