"""The loss of CTC models: the model's own for the transcript, and the past of each frame."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..batch import Batch
from ..models import loss_of
from ..tasks.ctc import CTC, Frames, watched_frames
from ..tasks.rows import Rows
from .hard import Losses, ModelLoss
from .soft_targets import SoftTargets, Target


class CTCLoss(ModelLoss):
    """
    `(1 - alpha) * CTC + alpha * soft`, where soft is the cross-entropy with the past, summed over the frames of a
    sample (padding left out). Both are in nats a sample: CTC is `-log` of the probability of all paths that spell the
    transcript, soft is the mean of `-log` of the probability of a path that the past draws. A model whose loss is a
    mean divides both by the symbols of the transcript. This is the choice of this project.

    Args:
        task ([`~hf_selfkd.tasks.ctc.CTC`]): of the model.
        temperature (`float`): of the soft part.
    """

    def __init__(self, task: CTC, temperature: float = 1.0):
        super().__init__(task, temperature)
        self.frames: Frames | None = None

    def forward(self, model: nn.Module, batch: Batch, soft: SoftTargets | None, alpha: float) -> Any:
        with watched_frames(model) as seen:
            outputs = super().forward(model, batch, soft, alpha)
        self.frames = seen.frames
        return outputs

    def rows(self, outputs: Any, batch: Batch) -> Rows:
        logits, frames = self.task.logits(outputs, has_loss=True), self.frames
        self.frames = None
        if frames is None:
            frames = self.task.frames_of(batch.inputs, batch.labels, logits.shape[1])
        return self.task.frame_rows(logits, batch.labels, frames)

    def num_items(self, rows: Rows, batch: Batch) -> torch.Tensor:
        return self.task.num_items(batch.labels)

    def __call__(self, outputs: Any, rows: Rows, targets: list[Target], alpha: float, num_items: Any) -> Losses:
        loss = loss_of(outputs)
        if loss is None:
            raise ValueError(
                f"{type(self.task.model).__name__} computed no loss from its labels, of which CTC is made: use a "
                "model that does, or set alpha=0."
            )
        if not self.task.by_length:
            return self.joined(loss, rows, targets, alpha, 1)  # a sum over samples, whatever the step has
        size = len(self.task.logits(outputs, has_loss=True))
        return self.joined(loss * (size / num_items), rows, targets, alpha, num_items)
