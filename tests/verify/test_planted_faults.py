"""The checker is checked: every planted fault is rejected with the status that names it; what is right is not."""

from __future__ import annotations

import faults_in_effects
import faults_in_form
import faults_in_gradients
import faults_in_values
import gallery
import pytest
import torch
from checking import checks_of, decision

from kernelwise._verifying._check import NO_BACKWARD, Options

FAULTS = [
    fault
    for kind in (faults_in_values, faults_in_gradients, faults_in_effects, faults_in_form)
    for fault in kind.FAULTS
]


@pytest.mark.parametrize(
    ("fault", "layer", "dtype", "status"),
    FAULTS,
    ids=[f"{fault.__name__}-{dtype}" for fault, _, dtype, _ in FAULTS],
)
def test_a_planted_fault_is_rejected(fault, layer, dtype, status, as_kernel):
    decided, module = decision(layer().to(getattr(torch, dtype)), as_kernel(fault))
    options = Options(isolate=False, compile=status == "does_not_compile")
    failed = next((check for check in checks_of(decided, module, options=options) if check.failed), None)
    assert failed is not None, "the checker is blind to it"
    assert failed.status == status, str(failed)


def test_the_gallery_has_many_faults():
    assert len({fault for fault, *_ in FAULTS}) >= 40


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_kernel_without_a_fault_passes(dtype, as_kernel):
    decided, module = decision(gallery.Norm().to(getattr(torch, dtype)), as_kernel(gallery.Good))
    checks = list(checks_of(decided, module))
    assert [str(check) for check in checks if check.status != "passed"] == []
    assert len(checks) > 20


def test_a_kernel_that_says_it_has_no_backward_is_not_asked_for_one(as_kernel):
    class SaysSo(faults_in_gradients.NoBackward):
        has_backward = False

    decided, module = decision(gallery.Norm(), as_kernel(SaysSo))
    checks = list(checks_of(decided, module))
    assert [str(check) for check in checks if check.failed] == []
    assert NO_BACKWARD in checks[0].marks
