"""
The hard loss of a run, and how the soft term joins it. Which one a run has is decided once, by structure.

Every hard loss answers to the same three calls: `forward` runs the model as the loss needs it, `rows` makes the rows
of the outputs, and a call gives the loss of the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..batch import Batch
from ..models import loss_of
from ..tasks.base import Task
from ..tasks.rows import Rows
from .progressive import progressive_cross_entropy
from .soft import soft_cross_entropy
from .soft_targets import RowLosses, SoftTargets, Target, labelled, weighted, where_mask


_SMALL = 1e-30  # stands for no rows where something is divided by their count


@dataclass
class Losses:
    """
    What a hard loss says of a batch.

    Args:
        loss (`torch.Tensor`): hard and soft part together, over the rows of the whole optimizer step; with a gradient.
        parts (`list` of [`~hf_selfkd.losses.RowLosses`]): of each target that has soft targets.
        hard (`torch.Tensor`, *optional*): sum of the hard losses of the rows, where `parts` do not tell.
        soft (`torch.Tensor`, *optional*): sum of the soft losses of all rows, where there are no `parts`.
    """

    loss: torch.Tensor
    parts: list[RowLosses]
    hard: torch.Tensor | None = None
    soft: torch.Tensor | None = None


def row_losses(rows: Rows, target: Target, alpha: float, temperature: float) -> RowLosses:
    """The losses of rows with soft targets, with what the history needs of the rows anyway."""
    normalized = None
    if target.soft_targets.index is not None:
        normalized = rows.summary.log_norm
    elif rows.storage is not None:  # others need not make them
        normalized = rows.log_probs
    return progressive_cross_entropy(rows.logits, target.labels, target.soft_targets, alpha, temperature, normalized)


class CrossEntropy:
    """
    Plain cross-entropy of the rows: hard and soft part are computed together, in one pass.

    Args:
        task ([`~hf_selfkd.tasks.Task`]): of the model.
        temperature (`float`): of the soft part.
        check (`bool`): whether the model has a loss of its own, which is compared with the first batch of every epoch.
    """

    plain = True
    shows_labels = False  # whether the model must be shown labels
    num_classes: int | None = None  # of the rows, where the outputs will not tell

    def __init__(self, task: Task, temperature: float = 1.0, check: bool = False):
        self.task, self.temperature, self.check = task, temperature, check
        self.due = check

    def open(self) -> None:
        """Get ready for a training."""

    def close(self) -> None:
        """Leave the model as it was."""

    def begin_epoch(self) -> None:
        """Compare the model's own loss again."""
        self.due = self.check

    def forward(self, model: nn.Module, batch: Batch, soft: SoftTargets | None, alpha: float) -> Any:
        """Run the model; labels are withheld, so that no loss is computed twice."""
        if self.due:
            return model(**self.task.inputs_with_labels(batch, upright_labels(batch)))
        return model(**self.task.inputs_without_labels(batch))

    def rows(self, outputs: Any, batch: Batch) -> Rows:
        """The rows of the model's outputs."""
        rows = self.task.rows_of(self.task.logits(outputs, has_loss=self.due), batch)
        rows.storage = batch.storage
        return rows

    def num_items(self, rows: Rows, batch: Batch) -> torch.Tensor:
        """What the loss of a batch that is a step by itself is a mean over."""
        return rows.count(labelled(rows.labels)).clamp_min(1)

    def __call__(self, outputs: Any, rows: Rows, targets: list[Target], alpha: float, num_items: Any) -> Losses:
        """The loss of a batch."""
        if self.due:
            self._compare(loss_of(outputs), rows, targets)
        parts = [row_losses(rows, target, alpha, self.temperature) for target in targets if target.soft_targets]
        if parts:
            return Losses(weighted([part.total.sum() for part in parts], targets) / num_items, parts)
        loss, total = rows.hard_loss(targets, num_items)
        return Losses(loss, parts, total)

    @torch.no_grad()
    def _compare(self, own: torch.Tensor | None, rows: Rows, targets: list[Target]) -> None:
        """
        Raises:
            ValueError: if the model's own loss is not the mean cross-entropy of the rows, as its class says.
        """
        labels = targets[0].labels
        if own is None or not bool(labelled(labels).any()):
            return  # nothing to compare: the next batch may tell
        self.due = False
        means = [self.task.own_loss(-Rows(rows.logits, labels).label_log_probs, labels)]
        if rows.logits.dtype != torch.float32:
            means.append(self.task.own_loss(F.cross_entropy(rows.logits, labels, reduction="none"), labels))
        # Half precision may be summed in another order; a loss of another make differs by more.
        tolerance = 1e-4 if rows.logits.dtype == torch.float32 else 2e-2
        own = own.float()
        if not bool(torch.isfinite(own)) and not any(bool(torch.isfinite(mean)) for mean in means):
            return  # a training that went astray: its loss says so
        if not any(bool(torch.isclose(own, mean.float(), rtol=tolerance, atol=1e-6)) for mean in means):
            raise ValueError(
                f"the loss of {type(self.task.model).__name__} ({own.item():.6g}) is not the mean cross-entropy of "
                f"its rows ({means[0].item():.6g}), as its class says: set hard_loss='model' to keep the model's own "
                "loss as the hard part, or hard_loss='additive' if it is cross-entropy plus further terms."
            )


class ModelLoss(CrossEntropy):
    """
    The model's own loss.

    Args:
        task, temperature: as for [`CrossEntropy`].
        additive (`bool`):
            Whether the loss is known to be plain cross-entropy plus further terms (balancing of experts, boxes):
            then `loss + alpha * (soft - hard)` over the rows with soft targets, so that further terms keep their
            weight.
            Otherwise the loss gives way as a whole, `(1 - alpha) * loss + alpha * soft`: of a weighted loss, plain
            cross-entropy taken off would teach the opposite.
    """

    plain = False
    shows_labels = True

    def __init__(self, task: Task, temperature: float = 1.0, additive: bool = False):
        super().__init__(task, temperature)
        self.additive = additive

    def forward(self, model: nn.Module, batch: Batch, soft: SoftTargets | None, alpha: float) -> Any:
        return model(**self.task.inputs_with_labels(batch, upright_labels(batch)))

    def rows(self, outputs: Any, batch: Batch) -> Rows:
        rows = self.task.rows_of(self.task.logits(outputs, has_loss=True), batch)
        rows.storage = batch.storage
        return rows

    def hard(self, outputs: Any, rows: Rows, num_items: Any) -> torch.Tensor | None:
        """The hard loss over the rows of the whole step; `None` if the model computed none."""
        mean = loss_of(outputs)
        return None if mean is None else mean * (rows.count(labelled(rows.labels)) / num_items)

    def __call__(self, outputs: Any, rows: Rows, targets: list[Target], alpha: float, num_items: Any) -> Losses:
        if loss_of(outputs) is None:  # as all of its outputs will: the model leaves the loss to others
            return super().__call__(outputs, rows, targets, alpha, num_items)
        if len(targets) > 1:
            raise ValueError(
                f"mixed images need a loss for two labels, and {type(self.task.model).__name__} has one of its own: "
                "pass it as compute_loss_func, set hard_loss='cross_entropy', or turn mixing off."
            )
        return self.joined(self.hard(outputs, rows, num_items), rows, targets, alpha, num_items)

    def joined(self, hard: torch.Tensor, rows: Rows, targets: list[Target], alpha: float, num_items: Any) -> Losses:
        """The hard loss and the soft part as one."""
        parts = [row_losses(rows, target, alpha, self.temperature) for target in targets if target.soft_targets]
        hard_sum = hard.detach() * num_items
        if rows.weights is not None:  # the log has a mean over rows
            own = labelled(targets[0].labels)
            hard_sum = hard_sum * (own.sum() / rows.count(own).clamp_min(_SMALL))
        if not parts:
            return Losses(hard, parts, hard_sum)
        masks = [labelled(target.labels) for target in targets]
        distilled = [
            mask if part.distilled is None else part.distilled for mask, part in zip(masks, parts, strict=True)
        ]
        soft = weighted(
            [self._soft_sum(rows, target, mask) for target, mask in zip(targets, distilled, strict=True)], targets
        )
        if self.additive:
            plain = [torch.where(mask, target.labels, -100) for target, mask in zip(targets, distilled, strict=True)]
            plain = weighted([rows.hard_sum(labels) for labels in plain], targets)
            return Losses(hard + (alpha / num_items) * (soft - plain), parts, hard_sum)
        # One number for all rows cannot be weighted row by row: the loss gives way by the share of distilled rows.
        share = weighted([rows.count(mask) for mask in distilled], targets) / rows.count(masks[0]).clamp_min(_SMALL)
        return Losses((1 - alpha * share) * hard + (alpha / num_items) * soft, parts, hard_sum)

    def _soft_sum(self, rows: Rows, target: Target, distilled: torch.Tensor) -> torch.Tensor:
        soft = soft_cross_entropy(rows.logits, target.soft_targets, self.temperature, target.labels)
        soft = where_mask(soft, distilled)
        return (soft if rows.weights is None else rows.weights * soft).sum()


class UserLoss(ModelLoss):
    """
    A loss of the user's (`compute_loss_func`), which takes the outputs of a model that was run without labels; the
    loss gives way as a whole.

    Args:
        task, temperature: as for [`CrossEntropy`].
        function (`Callable`): `function(outputs, labels, num_items_in_batch=...)`, labels as the batch has them.
    """

    shows_labels = False

    def __init__(self, task: Task, temperature: float, function: Callable[..., torch.Tensor]):
        super().__init__(task, temperature)
        self.function = function
        self.shape: torch.Size | None = None

    def forward(self, model: nn.Module, batch: Batch, soft: SoftTargets | None, alpha: float) -> Any:
        self.given = batch.labels
        return model(**self.task.inputs_without_labels(batch))

    def rows(self, outputs: Any, batch: Batch) -> Rows:
        rows = self.task.rows_of(self.task.logits(outputs, has_loss=False), batch)
        rows.storage = batch.storage
        return rows

    def __call__(self, outputs: Any, rows: Rows, targets: list[Target], alpha: float, num_items: Any) -> Losses:
        given, self.given = self.given, None
        labels = self.labels_for(given, targets)
        hard = [self.function(outputs, part, num_items_in_batch=num_items) for part in labels]
        return self.joined(weighted(hard, targets), rows, targets, alpha, num_items)

    def labels_for(self, given: torch.Tensor, targets: list[Target]) -> list[torch.Tensor]:
        """The labels of each target as the function takes them: those of the batch, and those of mixed partners."""
        labels = [given] + [target.labels.view(given.shape) for target in targets[1:]]
        return [self.task.shown(part) for part in labels]


class SmoothedLoss(UserLoss):
    """Label smoothing of the Trainer, which compares predictions with the labels where they stand."""

    def labels_for(self, given: torch.Tensor, targets: list[Target]) -> list[torch.Tensor]:
        return [target.labels.view(given.shape) for target in targets]


def upright_labels(batch: Batch) -> torch.Tensor:
    """The labels for a model that is shown all views of a batch: -100 for the rotated ones."""
    if batch.rotations is None:
        return batch.labels
    upright = batch.labels.new_full(batch.rotations.shape, -100)
    upright[:, 0] = batch.labels.reshape(-1)
    return upright.reshape(-1)
