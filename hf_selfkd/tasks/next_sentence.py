"""Next sentence prediction: whether the second text goes on from the first."""

from __future__ import annotations

from torch import nn

from ..models import classes_of
from .base import Task
from .sample_classification import SampleClassification, named


class NextSentence(SampleClassification):
    """One row a pair of texts, over yes (0) and no (1); labels may also be called `next_sentence_label`."""

    name = "next sentence prediction"
    rotates = False
    mappings = ("NEXT_SENTENCE_PREDICTION",)
    suffixes = ("ForNextSentencePrediction",)
    unmixed = "a text of one pair goes on from none of another"

    def __init__(self, model: nn.Module, label_names: tuple[str, ...] = ("labels",)):
        # `num_labels` of the configuration says nothing of these two classes.
        Task.__init__(self, model, tuple(dict.fromkeys((*label_names, "next_sentence_label"))))

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        return named(model, classes_of(*cls.mappings), cls.suffixes)

    @property
    def num_classes(self) -> int | None:
        return 2
