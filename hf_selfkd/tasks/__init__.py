"""Tasks: how a batch and the outputs of a model become rows. One file a task, one line here."""

from __future__ import annotations

from torch import nn

from ..models import base_model
from .base import SUPPORTED, Task
from .by_shape import ByShape
from .causal_lm import CausalLM
from .ctc import CTC
from .detection import ObjectDetection
from .image_prefix_lm import ImagePrefixLM
from .image_to_text import ImageToText
from .masked_lm import MaskedLM
from .multi_label import MULTI_LABEL, MultiLabelClassification
from .multiple_choice import MultipleChoice
from .next_sentence import NextSentence
from .question_answering import QuestionAnswering
from .rows import Rows
from .sample_classification import SampleClassification
from .segmentation import SemanticSegmentation
from .seq2seq_lm import Seq2SeqLM
from .speech_seq2seq import SpeechSeq2Seq
from .token_classification import TokenClassification


__all__ = ["SUPPORTED", "TASKS", "Rows", "Task", "task_for"]

TASKS: tuple[type[Task], ...] = (
    SpeechSeq2Seq,
    ImageToText,
    Seq2SeqLM,
    ImagePrefixLM,
    CausalLM,
    MaskedLM,
    TokenClassification,
    QuestionAnswering,
    MultipleChoice,
    MultiLabelClassification,
    SampleClassification,
    ObjectDetection,
    SemanticSegmentation,
    CTC,
    NextSentence,
)


def task_for(model: nn.Module, label_names: tuple[str, ...] = ("labels",)) -> Task:
    """
    Choose the task of a model from its class, before any batch is seen.

    Args:
        model (`nn.Module`): a transformers model in any wrapper, or any module that returns logits.
        label_names (`tuple[str]`, *optional*): names under which a batch may hold the labels.

    Returns:
        [`Task`]: [`~tasks.by_shape.ByShape`] for a class that transformers does not know.

    Raises:
        ValueError: if the task or the problem type is not supported.
    """
    base = base_model(model)
    problem = getattr(getattr(base, "config", None), "problem_type", None)
    found = next((task for task in TASKS if task.matches(base)), None)
    if problem == "regression" or (problem == MULTI_LABEL and found is not MultiLabelClassification):
        why = (
            "a number is no distribution to learn from, self-distillation needs classes"
            if problem == "regression"
            else f"{type(base).__name__} has one label a row"
        )
        raise ValueError(
            f"problem_type={problem!r} is not supported: {why} (problem_type='single_label_classification')."
        )
    if found is not None:
        return found(model, label_names)
    if type(base).__module__.startswith("transformers.") or any(_has_head(cls) for cls in type(base).__mro__):
        name = type(base).__name__
        raise ValueError(f"{name} is of a task that is not supported yet: supported are {SUPPORTED}.")
    return ByShape(model, label_names)


def _has_head(cls: type) -> bool:
    """Whether this class of transformers is for a certain task (`...ForX`, `...LMHeadModel`), no mere backbone."""
    return cls.__module__.startswith("transformers.models.") and ("For" in cls.__name__ or "Head" in cls.__name__)
