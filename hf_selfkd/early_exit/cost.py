"""What the exits of a model cost, in operations."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..exits.costs import counted
from ..heads.auxiliary import heads_of
from ..models import evaluating
from .passing import ExitPass


def shares_of_work(
    model: nn.Module, heads: list[int], exits: list[int], inputs: dict[str, Any], size: int
) -> list[float]:
    """
    The work up to each exit, with the heads that have been asked until then, over that of the whole model without
    heads: operations of matrix products and convolutions; layers, for a model of which none can be counted.

    Args:
        model (`nn.Module`): with heads.
        heads (`list[int]`): the indices of the heads that are exits.
        exits (`list[int]`): how many layers come before each of them, and before the model's own classifier.
        inputs (`dict`): a small batch.
        size (`int`): how many samples it has.

    Returns:
        `list[float]`: one share an exit, and that of a sample that has gone all the way, which is above 1.
    """
    counts: list[int] = []

    def count(place: int, logits: torch.Tensor) -> None:
        counts.append(counter.get_total_flops())

    with evaluating(model):
        with counted() as plain, heads_of(model).watched(False):
            model(**inputs)
        with counted() as counter:
            ExitPass(model, heads, [1.0] * len(exits), None).run(inputs, set(), size, count)
    whole = plain.get_total_flops()
    if not whole:
        return [exit / exits[-1] for exit in exits]
    return [operations / whole for operations in (*counts, counter.get_total_flops())]
