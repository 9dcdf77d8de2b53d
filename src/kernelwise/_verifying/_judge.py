"""Judge: what the layer's own code, that code in float64 and a kernel gave in one case → a check with one status.

Pure: it compares what was observed. What is wrong is looked for in the order in which it explains the rest.
"""

from __future__ import annotations

from dataclasses import fields, replace

import torch

from kernelwise._data import Check, Status
from kernelwise._verifying._exact import Deviation, deviation
from kernelwise._verifying._given import Case
from kernelwise._verifying._observe import Observed

_OTHER_STRIDES = ("contiguous inputs", "inputs with gaps", "transposed inputs", "rows 2^31 elements apart")
"""Cases in which an output may be strided where the layer's own is contiguous: no user of it counts on that."""

NOT_DETERMINISTIC = "results differ between calls"
NO_SECOND = "no second gradients"
DRAWS = "draws random numbers, which the layer does not"


def judge(base: Check, case: Case, own: Observed, exact: Observed, new: Observed) -> Check:
    written = [name for name in new.overwritten if name not in own.overwritten]
    if written:
        return replace(base, status="input_overwritten", what=written[0], detail=f"{', '.join(written)} was changed")
    if changed := [name for name in new.settings if name not in own.settings]:
        return replace(base, status="setting_changed", detail=f"for the whole process: {', '.join(changed)}")
    if new.draws and not own.draws:
        base = replace(base, marks=(*base.marks, DRAWS))
    if len(new.outputs) != len(own.outputs):
        return replace(base, status="wrong_structure", detail=f"{new.structure}; the layer's own: {own.structure}")
    found: list[tuple[str, Deviation]] = []
    for index, (mine, theirs, best) in enumerate(zip(new.outputs, own.outputs, exact.outputs, strict=True)):
        if mine.device.type != theirs.device.type:
            detail = f"on {mine.device}, the layer's own is on {theirs.device}"
            return replace(base, status="wrong_device", what=f"output {index}", detail=detail)
        found.append((f"output {index}", deviation(theirs, mine.to(theirs.device), best, mean=True)))
    if bad := next((pair for pair in found if pair[1].status in ("wrong_shape", "wrong_dtype")), None):
        return _filled(base, *bad)
    if new.structure != own.structure:
        return replace(base, status="wrong_structure", detail=f"{new.structure}; the layer's own: {own.structure}")
    for index, (has, had) in enumerate(zip(new.layouts, own.layouts, strict=True)):
        free = had != "contiguous" or case.name in _OTHER_STRIDES
        if has not in (had, "contiguous") and not (has == "strided" and free):
            detail = f"{has}; the layer's own is {had}"
            return replace(base, status="wrong_layout", what=f"output {index}", detail=detail)
    gradients = _gradients(base, own, exact, new)
    if isinstance(gradients, Check):
        return gradients
    for index, (needs, needed) in enumerate(zip(new.requires_grad, own.requires_grad, strict=True)):
        if needs != needed:
            detail = f"requires_grad is {needs}, the layer's own is {needed}"
            status: Status = "missing_gradient" if needed else "wrong_requires_grad"
            return replace(base, status=status, what=f"output {index}", detail=detail)
    found += gradients
    # A wrong output explains a wrong gradient.
    worst = max(
        found,
        key=lambda pair: (pair[1].status != "passed", pair[1].status in ("wrong_values", "non_finite"), pair[1].ratio),
        default=None,
    )
    lost = any(gradient is not None and new.second.get(name) is None for name, gradient in own.second.items())
    marks = (NO_SECOND,) if case.second and lost else ()
    checked = base if worst is None else _filled(base, *worst)
    return replace(checked, marks=(*checked.marks, *marks), detail=checked.detail or (new.no_second if marks else ""))


def _gradients(base: Check, own: Observed, exact: Observed, new: Observed) -> list[tuple[str, Deviation]] | Check:
    """Compare the gradients of every leaf, or return the check that says that one is missing."""
    found: list[tuple[str, Deviation]] = []
    largest = max(own.outputs, key=torch.Tensor.numel, default=None)
    for name, theirs in own.gradients.items():
        mine, best = new.gradients.get(name), exact.gradients.get(name)
        if theirs is None or best is None:
            if mine is not None and bool(mine.any()):
                detail = "the layer's own code gives this no gradient"
                return replace(base, status="wrong_gradient", what=f"gradient of {name}", detail=detail)
        elif mine is None:
            detail = (
                "it is missing" if any(g is not None for g in new.gradients.values()) else "no gradient flows at all"
            )
            if bool(theirs.any()) or theirs.numel() == 0:
                return replace(base, status="missing_gradient", what=f"gradient of {name}", detail=detail)
        else:
            summed = largest is not None and largest.dim() > 0 and theirs.numel() < largest.numel()
            terms = largest.shape[:-1].numel() if largest is not None and summed else 1
            judged = deviation(theirs, mine, best, wrong="wrong_gradient", terms=terms)
            found.append((f"gradient of {name}", judged))
    for name, theirs in own.second.items():
        mine, best = new.second.get(name), exact.second.get(name)
        if mine is not None and theirs is not None and best is not None:
            found.append((f"second gradient of {name}", deviation(theirs, mine, best, wrong="wrong_gradient")))
    return found


def _filled(base: Check, what: str, found: Deviation) -> Check:
    values = {f.name: getattr(found, f.name) for f in fields(found) if f.name != "detail"}
    return replace(base, what=what, detail=found.detail, **values)


def compare_calls(first: Check, second: Check, new: Observed, again: Observed) -> Check:
    """A kernel that is right once and wrong once races; one that is right both times may still differ in bits."""
    if _same(new, again):
        return first
    if first.failed or second.failed:
        worse = first if first.failed else second
        if first.failed != second.failed or first.got != second.got or first.place != second.place:
            return replace(
                worse, status="not_repeatable", detail=f"{worse.status}, and another result at the second call"
            )
        return worse
    return replace(first, marks=(*first.marks, NOT_DETERMINISTIC))


def _same(one: Observed, other: Observed) -> bool:
    pairs = [*zip(one.outputs, other.outputs, strict=True)]
    pairs += [
        (a, b)
        for a, b in zip(one.gradients.values(), other.gradients.values(), strict=True)
        if a is not None and b is not None
    ]
    return all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs)
