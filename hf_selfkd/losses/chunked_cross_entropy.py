"""The hard loss of a language model that never holds the logits of all tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..batch import Batch
from ..models import loss_of, uncompiled, virtual_tokens_of
from ..tasks.base import Task
from ..tasks.rows import Rows
from .chunked import ChunkedHead, ChunkedRows
from .hard import CrossEntropy, Losses
from .soft_targets import SoftTargets, Target


class ChunkedCrossEntropy(CrossEntropy):
    """
    Plain cross-entropy of the rows, computed where the head of the model stands; `outputs.logits` of a training step
    hold the first position only.

    Args:
        task ([`~hf_selfkd.tasks.Task`]): of a language model whose head is an `nn.Linear`.
        temperature (`float`): of the soft part.

    Raises:
        ValueError: if the logits are more than what the head makes of hidden states.
    """

    def __init__(self, task: Task, temperature: float = 1.0):
        super().__init__(task, temperature)
        if not task.language_model:
            raise ValueError("chunked_logits=True is for language models: set it to False.")
        if virtual_tokens_of(task.wrapped):
            raise ValueError(
                "chunked_logits=True with prompt tuning, whose virtual tokens have no labels: set it to False."
            )
        ChunkedHead(task.wrapped).remove()  # refuses what does not fit
        self.head: ChunkedHead | None = None
        self.num_classes = task.model.get_output_embeddings().weight.shape[0]
        self.work: ChunkedRows | None = None

    def open(self) -> None:
        """Take the place of the head until [`~ChunkedCrossEntropy.close`]."""
        self.close()
        self.head, self.checked = ChunkedHead(self.task.wrapped), False

    def close(self) -> None:
        """Give the head back."""
        if self.head is not None:
            self.head.remove()
        self.head = None

    def forward(self, model: nn.Module, batch: Batch, soft: SoftTargets | None, alpha: float) -> Any:
        if not self.checked:
            self._check(batch)
        top_k = None if batch.storage is None else batch.storage.top_k
        if batch.storage is not None and top_k is None:
            raise ValueError(
                "chunked_logits=True cannot go on with the checkpoint's history of all classes: set it to False."
            )
        labels = self.task.row_labels(batch.labels)
        self.work = self.head.task = ChunkedRows(labels, soft, alpha, self.temperature, top_k)
        try:
            return model(**self.task.inputs_without_labels(batch))
        finally:
            self.head.task = None

    def rows(self, outputs: Any, batch: Batch) -> Rows:
        weight = self.head.head.weight
        rows = Rows(weight.new_empty(0, weight.shape[0]), self.work.labels, batch.storage)
        rows.summary, rows.label_log_probs = self.work.summary, -self.work.losses.hard  # not made from logits
        return rows

    def __call__(self, outputs: Any, rows: Rows, targets: list[Target], alpha: float, num_items: Any) -> Losses:
        work, self.work = self.work, None
        parts = [] if work.soft_targets is None else [work.losses]
        return Losses(work.total / num_items, parts, None if parts else work.total.detach())

    @torch.no_grad()
    def _check(self, batch: Batch) -> None:
        """Compare loss and logits of a few samples, in evaluation mode, with those that are computed here."""
        model, size = uncompiled(self.task.wrapped), len(batch.labels)
        few = {
            name: value[:4] if isinstance(value, torch.Tensor) and value.dim() and len(value) == size else value
            for name, value in batch.inputs.items()
        }
        part = Batch(few, batch.labels[:4], batch.label_name)
        self.head.watching, training = True, model.training
        model.eval()
        outputs = model(**few, **{part.label_name: part.labels})
        model.train(training)
        logits = self.task.logits(outputs, has_loss=True)
        rows = self.task.rows(logits, part.labels)
        self._compare(loss_of(outputs), rows, [Target(rows.labels, None, None)])
        self.head.check(logits)
        self.checked = True
