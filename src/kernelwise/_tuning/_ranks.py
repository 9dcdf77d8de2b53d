"""Ranks: several processes of torch.distributed take one decision, or all of them raise.

One rank for each kind of device decides; what they found is gathered on all ranks, each of which joins it in the same way. A
different result on two ranks is impossible: the results are compared before anybody gets one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import tomli_w

from kernelwise._errors import KernelwiseError, PlanError
from kernelwise._evidence import OWN_CODE, TUNED

_SPARE_S = 1800.0
"""How much longer than planned the other ranks wait for those that measure."""


def several() -> bool:
    """Return whether this process is one of several of torch.distributed."""
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def decide_together(
    prepare: Callable[[], tuple[str, str]],
    decide: Callable[[], dict[str, Any]],
    *,
    seconds: float,
    join: Callable[[Mapping[str, dict[str, Any]]], dict[str, Any]],
) -> dict[str, Any]:
    """Return the same plain data on every rank. Every rank must call this.

    Args:
        prepare: on every rank: its kind of device, and what must be the same on all ranks (a hash of the model and its inputs).
        decide: on the first rank of each kind of device: its result.
        seconds: how long that may take.
        join: on every rank: the results by kind of device → the one result. It must depend on these alone.

    Raises:
        PlanError: a rank raised, died or took too long, or the ranks have different models. On every rank that is left.
    """
    import torch.distributed as dist

    rank, own_error = dist.get_rank(), None
    said: dict[str, Any] = {}
    try:
        said["kind"], said["same"] = prepare()
    except Exception as error:
        own_error, said = error, {"error": _text(error)}
    # On the processor, with a time limit of its own: others wait here while one measures.
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=3 * seconds + _SPARE_S))
    try:
        all_said = _gather(said, group)
        _raise_if_any(all_said, own_error)
        different = [index for index, one in enumerate(all_said) if one["same"] != all_said[0]["same"]]
        if different:
            raise PlanError(
                f"ranks 0 and {different[0]} have different models, inputs or options, so one decision cannot serve both\n"
                "  go on      tune the whole model before it is split, with inputs and options that are the same on all ranks"
            )
        kinds = [one["kind"] for one in all_said]
        found: dict[str, Any] = {}
        if kinds.index(kinds[rank]) == rank:
            try:
                found = {"kind": kinds[rank], "result": decide()}
            except Exception as error:
                own_error, found = error, {"error": _text(error)}
        all_found = _gather(found, group)
        _raise_if_any(all_found, own_error)
        result = join({one["kind"]: one["result"] for one in all_found if one})
        hashes = _gather(hashlib.sha256(json.dumps(result, sort_keys=True).encode()).hexdigest(), group)
        if len(set(hashes)) > 1:
            raise PlanError(
                "the ranks came to different results from the same measurements; none is used\n"
                "  go on      see that all ranks run the same version of Kernelwise"
            )
        return result
    finally:
        dist.destroy_process_group(group)


def _gather(value: Any, group: Any) -> list[Any]:
    import torch.distributed as dist

    found: list[Any] = [None] * dist.get_world_size(group)
    try:
        dist.all_gather_object(found, value, group=group)
    except RuntimeError as error:
        raise PlanError(
            f"another rank has died or does not answer, so there is no decision: {str(error).splitlines()[0][:200]}\n"
            "  go on      look at what the other ranks say"
        ) from error
    return found


def _raise_if_any(said: list[Any], own: Exception | None) -> None:
    """Raise on this rank what any rank has met: as it was where it happened here, else as what that rank said."""
    failed = [(rank, one["error"]) for rank, one in enumerate(said) if one and "error" in one]
    if not failed:
        return
    lines = "\n".join(f"  rank {rank:<5} {text}" for rank, text in failed)
    raise PlanError(f"there is no common decision, for {len(failed)} of {len(said)} ranks failed\n{lines}") from own


def _text(error: Exception) -> str:
    text = str(error) if isinstance(error, KernelwiseError) else f"{type(error).__name__}: {error}"
    return text.replace("\n", "\n             ")


# ------------------------------------------------------------------------------------------------------- joined results


def join(found: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Make one result of those of several kinds of devices: where they differ, layers keep their own code.

    They differ in a mode where they have not the same kernels for layers of one name. Modes that nobody tuned are left as
    they are. The evidence is that of the first kind, without what is not true of the joined config.
    """
    first, *others = found.values()
    if not others:
        return first
    choices = [choice for one in found.values() for choice in one["evidence"]["choices"]]
    modes = tuple(dict.fromkeys(choice["mode"] for choice in choices))
    by_name = [_by_name(one["config"]["kernels"]) for one in found.values()]
    agreed: dict[str, Any] = {}
    differ: list[tuple[str, str]] = []
    for name in dict.fromkeys(name for one in by_name for name in one):
        rules = [one.get(name, {}) for one in by_name]
        if all(one == rules[0] for one in rules):
            agreed |= rules[0]
            continue
        for mode in modes:
            of_mode = [{key: ref for key, value in one.items() if (ref := _in_mode(value, mode))} for one in rules]
            same = all(one == of_mode[0] for one in of_mode)
            for key, ref in (of_mode[0] if same else {name: "none"}).items():
                agreed.setdefault(key, {})[mode] = ref
            differ += [] if same else [(name, mode)]
    best = {one["evidence"]["best"] for one in found.values()}
    shown = ", ".join(f"{name} ({mode})" for name, mode in differ) or "nowhere"
    note = f"{len(found)} kinds of devices, measured on one of each; own code where their choices differ: {shown}"
    config = {**first["config"], "kernels": agreed}
    evidence = {
        **first["evidence"],
        "choices": [_agreed(choice, differ) for choice in _first_of_each(choices)],
        "runs": [run for run in first["evidence"]["runs"] if not differ or not _is_of_choices(run, choices)],
        "notes": [*first["evidence"]["notes"], note],
        "best": best.pop() if len(best) == 1 and not differ else "",
        "config": tomli_w.dumps(config),
    }
    return {"config": config, "evidence": evidence}


def _by_name(kernels: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Group the rules of a config by the name of the layer that they are for."""
    found: dict[str, dict[str, Any]] = {}
    for key, value in kernels.items():
        found.setdefault(key.partition("@")[0], {})[key] = value
    return found


def _in_mode(value: Any, mode: str) -> Any:
    return value.get(mode) if isinstance(value, Mapping) else value


def _first_of_each(choices: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of the choices of several kinds of devices for the same layers, keep the first."""
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for choice in choices:
        found.setdefault((choice["layer"], choice["name"], choice["mode"]), choice)
    return list(found.values())


def _agreed(choice: dict[str, Any], differ: Sequence[tuple[str, str]]) -> dict[str, Any]:
    if (choice["name"], choice["mode"]) not in differ:
        return choice
    return {**choice, "chosen": OWN_CODE, "reason": f"devices differ; on one of them: {choice['chosen']}"}


def _is_of_choices(run: Mapping[str, Any], choices: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a run is one of the choices of one kind of device, alone or all together."""
    return run["contender"].partition("+")[0] in {TUNED, *(choice["name"] for choice in choices)}
