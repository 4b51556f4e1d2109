"""The loss of a detector: the model's own, with soft class targets for the objects that have a past."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.image_transforms import center_to_corners_format
from transformers.loss.loss_for_object_detection import box_iou

from ..batch import Batch
from ..models import loss_of
from ..tasks.detection import ObjectDetection
from ..tasks.matching import Matching, watched_matching
from ..tasks.rows import Rows
from .class_terms import focal_difference, softmax_difference, varifocal_difference
from .hard import Losses, ModelLoss
from .soft_targets import RowLosses, SoftTargets, Target, distilled_rows, labelled


class DetectionLoss(ModelLoss):
    """
    The loss of a detector of transformers. Boxes, auxiliary layers, denoising queries and queries without an object
    keep what the model computes; the class targets of the last layer's matched queries become
    `(1 - alpha) * label + alpha * past` where there is a past.

    Args:
        task ([`~hf_selfkd.tasks.detection.ObjectDetection`]): of the model.
        temperature (`float`): of the soft part; 1 unless the head is a softmax.
    """

    def __init__(self, task: ObjectDetection, temperature: float = 1.0):
        super().__init__(task, temperature, additive=True)
        self.matching: Matching | None = None

    def forward(self, model: nn.Module, batch: Batch, soft: SoftTargets | None, alpha: float) -> Any:
        with watched_matching(model) as seen:
            outputs = model(**batch.inputs, **{batch.label_name: batch.targets})
        if seen.matching is None:
            raise ValueError(
                f"{type(self.task.model).__name__} computed no loss that tells which query is which object: use a "
                "detector of transformers as it is, or set alpha=0."
            )
        self.matching = seen.matching
        return outputs

    def rows(self, outputs: Any, batch: Batch) -> Rows:
        rows = self.task.matched_rows(self.matching, batch.labels)
        rows.storage = batch.storage
        return rows

    def num_items(self, rows: Rows, batch: Batch) -> torch.Tensor:
        return self.task.num_items(batch.targets)

    def __call__(self, outputs: Any, rows: Rows, targets: list[Target], alpha: float, num_items: Any) -> Losses:
        matching, self.matching = self.matching, None
        (target,), loss = targets, loss_of(outputs)
        share = len(matching.targets) / num_items  # of the images of the step; 1 without accumulation
        hard_sum = loss.detach() * labelled(target.labels).sum()  # for the log, which is a mean over objects
        if target.soft_targets is None:
            return Losses(loss * share, [], hard_sum)
        part = self._row_losses(matching, rows, target, alpha)
        return Losses((loss + part.total.sum()) * share, [part], hard_sum)

    def _row_losses(self, matching: Matching, rows: Rows, target: Target, alpha: float) -> RowLosses:
        """What each row adds to the loss of the model, in its scale, and the terms of the row by themselves."""
        soft, labels = target.soft_targets, target.labels
        distilled = distilled_rows(soft, labels)
        distilled = labelled(labels) if distilled is None else distilled
        difference, hard, past = self._difference(matching, rows.logits.float(), labels, soft, alpha, distilled)
        scale = self._scale(matching, labels)
        total, hard, past = (torch.where(distilled, part, 0.0) for part in (difference * scale, hard, past))
        return RowLosses(total, hard.detach(), past.detach(), distilled)

    def _difference(
        self,
        matching: Matching,
        logits: torch.Tensor,
        labels: torch.Tensor,
        soft: SoftTargets,
        alpha: float,
        distilled: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if self.task.class_term == "softmax":
            return softmax_difference(logits, labels, soft, alpha, self.temperature)
        onehot = F.one_hot(labels.clamp_min(0), logits.shape[-1]).to(logits.dtype)
        # Rows that learn nothing get their label, and not a poisoned past: a gradient would be 0 * NaN.
        past = torch.where(distilled.unsqueeze(-1), soft.log_probs.exp(), onehot)
        criterion = matching.criterion
        if self.task.class_term == "focal":
            return focal_difference(logits, onehot, past, alpha, criterion.focal_alpha)
        overlap = overlaps(matching, len(labels)).to(logits.dtype)
        return varifocal_difference(logits, onehot, past, alpha, overlap, criterion.alpha, criterion.gamma)

    def _scale(self, matching: Matching, labels: torch.Tensor) -> torch.Tensor | float:
        """What the model multiplies the sum of its classification terms with."""
        criterion = matching.criterion
        if self.task.class_term == "softmax":  # a mean, in which queries without an object weigh less
            matched, queries = labelled(labels).sum(), matching.logits.shape[0] * matching.logits.shape[1]
            return 1 / (matched + criterion.eos_coef * (queries - matched))
        weight = criterion.weight_dict["loss_vfl"] if self.task.class_term == "varifocal" else 1.0
        return weight / matching.num_boxes


@torch.no_grad()
def overlaps(matching: Matching, num_rows: int) -> torch.Tensor:
    """Intersection over union of the box of each object and that of its query, `[R]`; 0 where there is none."""
    rows, images, queries = matching.places(num_rows // len(matching.targets))
    pairs = zip(matching.targets, matching.indices, strict=True)
    boxes = torch.cat([part["boxes"][objects] for part, (_, objects) in pairs])
    predicted, true = (center_to_corners_format(part) for part in (matching.boxes[images, queries], boxes))
    result = matching.boxes.new_zeros(num_rows)
    result[rows] = torch.diag(box_iou(predicted, true)[0])
    return result


def choose_detection_loss(task: ObjectDetection, asked: str, temperature: float, own: str | None) -> DetectionLoss:
    """
    The hard loss of a detector.

    Args:
        task ([`~hf_selfkd.tasks.detection.ObjectDetection`]): of the model.
        asked (`str`): the field `hard_loss` of the arguments.
        temperature (`float`): of the soft part.
        own (`str`, *optional*): what takes the place of the model's loss, if anything does.

    Raises:
        ValueError: if the choices contradict each other.
    """
    name = type(task.model).__name__
    if own is not None:
        raise ValueError(f"{own} with {name}: object detection learns from the model's own loss only, leave it out.")
    if asked not in ("auto", "additive"):
        raise ValueError(
            f"hard_loss={asked!r} with {name}: boxes and classes are one loss, set hard_loss='auto' (additive)."
        )
    if temperature != 1.0 and task.independent:
        raise ValueError(
            f"temperature={temperature} with {name}, whose classes have a sigmoid each: set temperature=1.0."
        )
    return DetectionLoss(task, temperature)
