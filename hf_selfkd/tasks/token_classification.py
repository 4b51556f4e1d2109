"""One label a position: token classification."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..models import classes_of, logits_of, virtual_tokens_of
from .base import Task
from .rows import Rows
from .sample_classification import named


class TokenClassification(Task):
    """
    One row a position. Padding stays in place, with label -100: shapes stay static and no device is waited for.
    """

    name = "token classification"
    per_token = True
    unmixed = "the words of two samples do not stand at the same places"
    mappings: tuple[str, ...] = ("TOKEN_CLASSIFICATION",)
    suffixes: tuple[str, ...] = ("ForTokenClassification",)

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        return named(model, classes_of(*cls.mappings), cls.suffixes)

    def logits(self, outputs: Any, has_loss: bool) -> torch.Tensor:
        logits = logits_of(outputs, has_loss)
        return logits[:, virtual_tokens_of(self.wrapped) :] if logits.dim() == 3 else logits

    def rows(self, logits: torch.Tensor, labels: torch.Tensor) -> Rows:
        if logits.dim() != 3 or labels.shape != logits.shape[:2]:
            raise ValueError(
                f"logits of shape {list(logits.shape)} with labels of shape {list(labels.shape)}: predictions of "
                "tokens need [batch, length, classes] and [batch, length]."
            )
        return Rows(logits.flatten(0, 1), self.row_labels(labels))
