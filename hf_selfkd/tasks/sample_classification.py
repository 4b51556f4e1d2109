"""One label a sample: sequence, image, audio and video classification."""

from __future__ import annotations

import torch
from torch import nn

from ..models import classes_of
from .base import Task
from .rows import Rows


class SampleClassification(Task):
    """One row a sample."""

    name = "single-label classification"
    rotates = True
    mappings = ("SEQUENCE_CLASSIFICATION", "IMAGE_CLASSIFICATION", "AUDIO_CLASSIFICATION", "VIDEO_CLASSIFICATION")
    suffixes = ("ForSequenceClassification", "ForImageClassification", "ForAudioClassification")

    def __init__(self, model: nn.Module, label_names: tuple[str, ...] = ("labels",)):
        super().__init__(model, label_names)
        config = getattr(self.model, "config", None)
        if getattr(config, "num_labels", 2) == 1 and getattr(config, "num_classes", 1) == 1:
            raise ValueError(
                "num_labels=1 is regression, which is not supported: self-distillation needs num_labels of at least 2."
            )

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        return named(model, classes_of(*cls.mappings), cls.suffixes)

    def rows(self, logits: torch.Tensor, labels: torch.Tensor) -> Rows:
        if logits.dim() != 2 or labels.numel() != logits.shape[0]:
            raise ValueError(
                f"logits of shape {list(logits.shape)} with labels of shape {list(labels.shape)}: single-label "
                "classification needs [batch, classes] and [batch]."
            )
        return Rows(logits, self.row_labels(labels))


def named(model: nn.Module, known: set[str], suffixes: tuple[str, ...]) -> bool:
    """Whether one of the classes of a model is known by its name."""
    return any(cls.__name__ in known or cls.__name__.endswith(suffixes) for cls in type(model).__mro__)
