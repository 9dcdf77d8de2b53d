"""Softmax cross-entropy over a vocabulary, as language models are trained with it."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from kernelwise.ops._operation import Operation, Role, Variant


def cross_entropy(
    logits: Tensor,
    labels: Tensor | None,
    num_items: Tensor | float | None,
    shifted: Tensor | None,
    ignore_index: int = -100,
    *,
    shift: str = "labels",
    upcast: bool = True,
) -> Tensor:
    """Return the mean cross-entropy of the counted positions, or their sum divided by `num_items` where that is given.

    logits: [..., S, V]; labels: [..., S]. A position counts if its label is not `ignore_index`. `shift` "labels": each
    position is judged by the label of the next one, the last by none; "logits": the same, the last left out; "none": each
    by its own. `shifted` are labels that need no shift. `upcast`: the logits are taken to float32 first.
    """
    if upcast:
        logits = logits.float()
    if shifted is None:
        assert labels is not None
        shifted = labels
        if shift == "labels":
            shifted = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        elif shift == "logits":
            logits, shifted = logits[..., :-1, :], labels[..., 1:]
    rows, targets = logits.reshape(-1, logits.shape[-1]), shifted.reshape(-1)
    if num_items is None:
        return F.cross_entropy(rows, targets, ignore_index=ignore_index)
    return F.cross_entropy(rows, targets, ignore_index=ignore_index, reduction="sum") / num_items


CROSS_ENTROPY = Operation(
    name="cross_entropy",
    reference=cross_entropy,
    roles=(
        Role("logits", "argument", lambda n: (n["B"], n["S"], n["I"])),
        Role("labels", "argument", lambda n: (n["B"], n["S"]), follows="indices"),
        Role("num_items", "argument", follows="indices"),
        Role("shifted", "argument", lambda n: (n["B"], n["S"]), follows="indices"),
    ),
    variants=tuple(
        Variant((("shift", shift), ("upcast", upcast)))
        for shift in ("labels", "logits", "none")
        for upcast in (True, False)
    ),
    operators=(("nll_loss_forward.default",),),
    layer_names={(): "CrossEntropyLoss", (("shift", "labels"),): "ForCausalLMLoss"},
    choices={"ignore_index": (-100,)},
    loss=True,
)
