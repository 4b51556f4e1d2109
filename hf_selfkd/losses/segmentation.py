"""The loss of semantic segmentation: the model's own at the size of the labels, softened at the size of the logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..batch import Batch
from ..models import loss_of
from ..tasks.rows import Rows
from ..tasks.segmentation import SemanticSegmentation
from .hard import Losses, ModelLoss, UserLoss
from .soft_targets import SoftTargets, Target, labelled


class SegmentationLoss(ModelLoss):
    """
    The hard part is the loss of the model, over the labelled pixels. The soft part is the cross-entropy with the past
    at each place of the logits, times the labelled pixels that the place stands for; both are means over the pixels.

    The loss is `(1 - alpha) * loss + alpha * soft`; the term of an auxiliary head of the model's own keeps its weight,
    `loss + alpha * (soft - hard)`, for which the cross-entropy of the pixels is computed once more.

    Args:
        task ([`~hf_selfkd.tasks.segmentation.SemanticSegmentation`]): of the model.
        temperature (`float`): of the soft part.
        additive (`bool`): whether the model's loss is cross-entropy plus further terms.
        own (`bool`): whether the model computes a loss; else the loss is the cross-entropy of the pixels.
    """

    def __init__(self, task: SemanticSegmentation, temperature: float = 1.0, additive: bool = False, own: bool = True):
        super().__init__(task, temperature, additive)
        self.shows_labels = own

    def forward(self, model: nn.Module, batch: Batch, soft: SoftTargets | None, alpha: float) -> Any:
        if self.shows_labels:
            return super().forward(model, batch, soft, alpha)
        return model(**self.task.inputs_without_labels(batch))

    def rows(self, outputs: Any, batch: Batch) -> Rows:
        rows = self.task.rows_of(self.task.logits(outputs, has_loss=self.shows_labels), batch)
        rows.storage = batch.storage
        return rows

    def hard(self, outputs: Any, rows: Rows, num_items: Any) -> torch.Tensor:
        """The hard loss over the pixels of the whole step; 0 for a batch without a labelled one."""
        mean, count = loss_of(outputs) if self.shows_labels else None, rows.count(labelled(rows.labels))
        if mean is None:
            return rows.hard_sum(rows.labels) / num_items
        return torch.where(count > 0, mean, torch.zeros_like(mean)) * (count / num_items)

    def __call__(self, outputs: Any, rows: Rows, targets: list[Target], alpha: float, num_items: Any) -> Losses:
        return self.joined(self.hard(outputs, rows, num_items), rows, targets, alpha, num_items)


def choose_segmentation_loss(
    task: SemanticSegmentation,
    kind: str,
    temperature: float,
    function: Callable[..., torch.Tensor] | None,
) -> ModelLoss:
    """
    The hard loss of a model for semantic segmentation.

    Args:
        task ([`~hf_selfkd.tasks.segmentation.SemanticSegmentation`]): of the model.
        kind (`str`):
            `"stock"` (a class of transformers), `"cross_entropy"` (that of the pixels, whatever the model computes),
            `"additive"` (the model's own, which is that and further terms) or `"model"` (the model's own).
        temperature (`float`): of the soft part.
        function (`Callable`, *optional*): `compute_loss_func` of the trainer.
    """
    if function is not None:
        return UserLoss(task, temperature, function)
    additive = kind == "additive" or (kind == "stock" and task.adds_auxiliary)
    return SegmentationLoss(task, temperature, additive, own=kind != "cross_entropy")
