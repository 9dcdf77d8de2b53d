"""The head of a language model with its loss: a linear layer over the vocabulary and the cross-entropy of what it gives."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from kernelwise.ops._operation import Operation, Role


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None, ignore_index: int = -100
) -> Tensor:
    """Return the mean cross-entropy of `hidden @ weight.T + bias` for the labels that are not `ignore_index`.

    hidden: [..., H]; weight: [V, H]; labels: [...]; bias: [V] or None.
    """
    logits = F.linear(hidden, weight, bias).float()
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=ignore_index)


# No graph has this operation: a model joins its head and its loss across other code. It is found by its parts, and what
# lies between them is looked at as it runs. So there is no variant to compare a graph with.
LINEAR_CROSS_ENTROPY = Operation(
    name="linear_cross_entropy",
    reference=linear_cross_entropy,
    roles=(
        Role("weight", "attribute", lambda n: (n["I"], n["H"])),
        Role("labels", "argument", lambda n: (n["B"], n["S"]), follows="indices"),
        Role("bias", "attribute", lambda n: (n["I"],)),
    ),
    variants=(),
    operators=(("nll_loss_forward.default",),),
    layer_names={(): "LinearCrossEntropy"},
    function=True,
)
