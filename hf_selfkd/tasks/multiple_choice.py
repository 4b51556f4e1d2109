"""Multiple choice: which of several texts goes on, answers or fits best."""

from __future__ import annotations

import torch
from torch import nn

from ..batch import Batch
from ..models import classes_of
from .base import Task
from .rows import Rows
from .sample_classification import SampleClassification, named


class MultipleChoice(SampleClassification):
    """One row a sample, over its choices: any number of them, and one number in all batches for stored rows."""

    name = "multiple choice"
    rotates = False
    mappings = ("MULTIPLE_CHOICE",)
    suffixes = ("ForMultipleChoice",)
    unmixed = "a choice of one sample is none of another"
    headless = "heads would read the choices as samples of their own"

    def __init__(self, model: nn.Module, label_names: tuple[str, ...] = ("labels",)):
        Task.__init__(self, model, label_names)  # `num_labels` of the configuration says nothing of choices

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        return named(model, classes_of(*cls.mappings), cls.suffixes)

    @property
    def num_classes(self) -> int | None:
        return None  # as many as a batch has

    def classes_in(self, batch: Batch) -> int | None:
        found = [batch.inputs[name] for name in ("input_ids", "inputs_embeds") if name in batch.inputs]
        return found[0].shape[1] if found and found[0].dim() > 2 else None

    def rows(self, logits: torch.Tensor, labels: torch.Tensor) -> Rows:
        if logits.dim() != 2 or labels.numel() != logits.shape[0]:
            raise ValueError(
                f"logits of shape {list(logits.shape)} with labels of shape {list(labels.shape)}: multiple choice "
                "needs [batch, choices] and [batch]."
            )
        return Rows(logits, self.row_labels(labels))
