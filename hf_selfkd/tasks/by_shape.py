"""Modules that transformers does not know: the shape of the logits tells what their rows are."""

from __future__ import annotations

import torch

from .base import Task
from .rows import Rows
from .sample_classification import SampleClassification
from .token_classification import TokenClassification


class ByShape(Task):
    """A row a sample for logits `[B, C]`, a row a position for logits `[B, L, C]`."""

    name = "classification"
    rotates = True

    def rows(self, logits: torch.Tensor, labels: torch.Tensor) -> Rows:
        return (TokenClassification if logits.dim() == 3 else SampleClassification).rows(self, logits, labels)
