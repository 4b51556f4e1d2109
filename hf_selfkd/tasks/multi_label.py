"""Several labels a sample: each class is a yes-or-no question of its own."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from ..models import forward_owner, is_stock
from .base import Task
from .rows import BernoulliRows
from .sample_classification import SampleClassification


MULTI_LABEL = "multi_label_classification"

_NEITHER = 2  # stands for a label that is neither 0 nor 1


class MultiLabelClassification(Task):
    """
    A row for each class of each sample, of the two answers no and yes: row `b * C + c` is class `c` of sample `b`.

    The loss is the binary cross-entropy of `BCEWithLogitsLoss`, a mean over samples and classes.
    """

    name = "multi-label classification"
    per_token = True
    bernoulli = True
    unranked = "each class is a question of its own"
    unsmoothed = "each class has a label of its own"

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        asked = getattr(getattr(model, "config", None), "problem_type", None) == MULTI_LABEL
        return asked and SampleClassification.matches(model) and _reads_problem_type(model)

    @property
    def num_classes(self) -> int | None:
        return 2  # of a row: no and yes

    def labels_in(self, inputs: Any) -> Any:
        """The labels `[B, C]`, 0 and 1, as integers; anything else as it is, or as a class that there is not."""
        labels = super().labels_in(inputs)
        if not isinstance(labels, torch.Tensor) or labels.dim() != 2:
            return labels
        # No look at the values here: it would wait for the device. The host finds a 2 where it has the labels anyway.
        return torch.where((labels == 0) | (labels == 1), labels, _NEITHER).long()

    def checked_labels(self, labels: Any) -> torch.Tensor:
        if not isinstance(labels, torch.Tensor) or labels.dim() != 2:
            told = (
                f"{labels.dtype} of shape {list(labels.shape)}" if isinstance(labels, torch.Tensor) else type(labels)
            )
            raise ValueError(
                f"labels are {told}: {self.name} needs [batch, classes] of 0 and 1 in floating point, as "
                f"problem_type={MULTI_LABEL!r} of transformers does."
            )
        return labels.long()

    def misfit(self, label: int, sample: str, num_classes: int) -> str:
        return (
            f"a label of {sample} is neither 0 nor 1: {self.name} learns from yes and no. To mix images give a "
            "SelfKDDataCollator(mixup_alpha=..., cutmix_alpha=...)."
        )

    def shown(self, labels: torch.Tensor) -> torch.Tensor:
        return labels.float()

    def partner_rows(self, partner: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        classes = labels.shape[-1]
        return (partner[:, None] * classes + torch.arange(classes, device=partner.device)).reshape(-1)

    def rows(self, logits: torch.Tensor, labels: torch.Tensor) -> BernoulliRows:
        if logits.dim() != 2 or labels.shape != logits.shape:
            raise ValueError(
                f"logits of shape {list(logits.shape)} with labels of shape {list(labels.shape)}: {self.name} needs "
                "[batch, classes] of both."
            )
        return BernoulliRows.of(logits.reshape(-1), self.row_labels(labels))


def _reads_problem_type(model: nn.Module) -> bool:
    """Whether a model of transformers computes another loss for several labels; some know one label only."""
    code = inspect.unwrap(forward_owner(model).forward).__code__
    return not is_stock(model) or bool({"problem_type", "loss_function"} & set(code.co_names))
