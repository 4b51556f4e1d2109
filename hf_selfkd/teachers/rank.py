"""The teacher that needs no past: the order of the present scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ..losses.hard import Losses
from ..losses.rank import label_offset, zipf_divergence
from ..losses.soft_targets import Target, weighted
from ..tasks.rows import Rows
from .base import Teacher


class RankTeacher(Teacher):
    """
    Zipf's law over the ranks of the present scores (Zipf's label smoothing, Liang et al., ECCV 2022): a term beside
    the hard loss, `alpha * KL(Zipf || prediction among the classes that are not the label)`. The teacher acts in the
    first epoch and keeps nothing.

    Args:
        weighs_labels (`bool`): whether labels that are told well count more than others, by
            [`~hf_selfkd.losses.rank.label_offset`] over the rows of a micro-batch of one process.
    """

    kind = "rank"
    first_epoch = 0

    def __init__(self, weighs_labels: bool = False):
        super().__init__()
        self.weighs_labels = weighs_labels

    def join(self, losses: Losses, rows: Rows, targets: list[Target], alpha: float, num_items: Any) -> Losses:
        if alpha == 0:
            return losses

        def summed(term: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> torch.Tensor:
            return weighted([term(rows.logits, target.labels).sum() for target in targets], targets)

        soft = summed(zipf_divergence)
        beside = alpha * soft + (summed(label_offset) if self.weighs_labels else 0.0)
        return replace(losses, loss=losses.loss + beside / num_items, soft=soft.detach())
