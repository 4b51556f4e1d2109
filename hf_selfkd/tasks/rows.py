"""Rows: one prediction over the classes with its label, whatever the task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.auto import modeling_auto

from ..losses.soft_targets import label_entries, log_softmax
from ..losses.summary import Summary, summarize
from ..models import base_model
from ..samples import IGNORE_INDEX


class lazy:
    """`functools.cached_property` without its lock, which Python takes before 3.12 and a step notices."""

    def __init__(self, function: Callable[[Any], Any]):
        self.function, self.__doc__ = function, function.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if instance is None:
            return self
        value = instance.__dict__[self.name] = self.function(instance)
        return value


@dataclass
class Rows:
    """
    The predictions of a batch.

    Args:
        logits (`torch.FloatTensor` of shape `[R, C]`): class scores.
        labels (`torch.LongTensor` of shape `[R]`): classes, -100 for a row that does not count.
        top_k (`int`, *optional*): entries of each row that a history will store.
    """

    logits: torch.Tensor
    labels: torch.Tensor
    top_k: int | None = None

    @lazy
    def log_probs(self) -> torch.Tensor:
        """[`~hf_selfkd.losses.log_softmax`] of the logits, without a gradient; made once for loss and history."""
        return log_softmax(self.logits.detach())

    @lazy
    def summary(self) -> Summary:
        """The [`~hf_selfkd.losses.Summary`] of the logits, without a gradient; made once for loss and history."""
        return summarize(self.logits.detach(), self.top_k)

    @lazy
    def label_log_probs(self) -> torch.Tensor:
        """Log-probabilities of the labels, `[R]`, without a gradient; arbitrary where there is none."""
        return label_entries(self.logits.detach(), self.labels).float() - self.summary.log_norm


def sample_rows(logits: torch.Tensor, labels: torch.Tensor) -> Rows:
    """One row per sample: sequence, image and audio classification.

    Raises:
        ValueError: if `logits` are not `[B, C]` or `labels` not `[B]`.
    """
    if logits.dim() != 2 or labels.numel() != logits.shape[0]:
        raise ValueError(
            f"logits of shape {list(logits.shape)} with labels of shape {list(labels.shape)}: single-label "
            "classification needs [batch, classes] and [batch]."
        )
    return Rows(logits, labels if labels.dim() == 1 else labels.reshape(-1))


def token_rows(logits: torch.Tensor, labels: torch.Tensor) -> Rows:
    """
    One row per position: token classification, masked language models, targets of encoder-decoder models. Padding
    stays in place, with label -100: shapes stay static and no device is waited for.

    Raises:
        ValueError: if `logits` are not `[B, L, C]` or `labels` not `[B, L]`.
    """
    if logits.dim() != 3 or labels.shape != logits.shape[:2]:
        raise ValueError(
            f"logits of shape {list(logits.shape)} with labels of shape {list(labels.shape)}: predictions of tokens "
            "need [batch, length, classes] and [batch, length]."
        )
    return Rows(logits.flatten(0, 1), labels.reshape(-1))


def next_tokens(labels: torch.Tensor) -> torch.Tensor:
    """The labels `[B, L]` of a causal language model where its predictions stand: one to the left, -100 at the end."""
    return F.pad(labels[..., 1:], (0, 1), value=IGNORE_INDEX)


def causal_rows(logits: torch.Tensor, labels: torch.Tensor) -> Rows:
    """One row per position of a causal language model; its label is the next token.

    Raises:
        ValueError: as [`token_rows`].
    """
    return token_rows(logits, next_tokens(labels))


_SAMPLE_TASKS = ("SEQUENCE_CLASSIFICATION", "IMAGE_CLASSIFICATION", "AUDIO_CLASSIFICATION", "VIDEO_CLASSIFICATION")

_SAMPLE_SUFFIXES = ("ForSequenceClassification", "ForImageClassification", "ForAudioClassification")

_TOKEN_SUFFIXES = ("ForTokenClassification", "ForMaskedLM")

_TOKEN_TASKS = ("TOKEN_CLASSIFICATION", "MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM")

_CAUSAL_SUFFIXES = ("ForCausalLM", "LMHeadModel")

SUPPORTED = (
    "single-label sequence, image, audio and video classification, token classification, and causal, masked and "
    "encoder-decoder language models"
)


def _classes_of(*tasks: str) -> set[str]:
    names: set[str] = set()
    for task in tasks:
        mapping = getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES", {})
        for value in mapping.values():
            names.update((value,) if isinstance(value, str) else value)
    return names


def adapter_for(model: nn.Module) -> Callable[[torch.Tensor, torch.Tensor], Rows]:
    """
    Choose the rows adapter of a model from its class, before any batch is seen.

    Args:
        model (`nn.Module`): a transformers model, PEFT-wrapped or not, or any module that returns logits.

    Returns:
        `Callable`: [`sample_rows`], [`token_rows`] or [`causal_rows`]; for a class that transformers does not know, a
        function that decides by the shapes.

    Raises:
        ValueError: if the task or the problem type is not supported.
    """
    model = base_model(model)
    config, names = getattr(model, "config", None), [cls.__name__ for cls in type(model).__mro__]
    problem = getattr(config, "problem_type", None)
    if problem in ("regression", "multi_label_classification"):
        raise ValueError(
            f"problem_type={problem!r} is not supported: self-distillation needs one class per row "
            "(problem_type='single_label_classification')."
        )
    if _matches(names, _classes_of(*_TOKEN_TASKS), _TOKEN_SUFFIXES):
        return token_rows  # before causal models: those with an encoder count as both, and do not shift
    if _matches(names, _classes_of("CAUSAL_LM"), _CAUSAL_SUFFIXES):
        return causal_rows
    if _matches(names, _classes_of(*_SAMPLE_TASKS), _SAMPLE_SUFFIXES):
        if getattr(config, "num_labels", 2) == 1:
            raise ValueError(
                "num_labels=1 is regression, which is not supported: self-distillation needs num_labels of at least 2."
            )
        return sample_rows
    if type(model).__module__.startswith("transformers.") or any(_has_head(cls) for cls in type(model).__mro__):
        raise ValueError(f"{names[0]} is of a task that is not supported yet: supported are {SUPPORTED}.")
    return _rows_by_shape


def _has_head(cls: type) -> bool:
    """Whether this class of transformers is for a certain task (`...ForX`, `...LMHeadModel`), no mere backbone."""
    return cls.__module__.startswith("transformers.models.") and ("For" in cls.__name__ or "Head" in cls.__name__)


def _matches(names: list[str], known: set[str], suffixes: tuple[str, ...]) -> bool:
    return any(name in known or name.endswith(suffixes) for name in names)


def _rows_by_shape(logits: torch.Tensor, labels: torch.Tensor) -> Rows:
    return token_rows(logits, labels) if logits.dim() == 3 else sample_rows(logits, labels)


def check_labels(labels: Any, num_classes: int | None = None) -> None:
    """
    Check the labels of the first batch; with the number of classes, this waits for the device.

    Raises:
        ValueError: if they are missing, not integers, or not among the classes.
    """
    if not isinstance(labels, torch.Tensor):
        raise ValueError(f"labels are a {type(labels).__name__}: self-distillation needs a tensor of classes.")
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(
            f"labels are {labels.dtype}: regression and multi-label targets are not supported, only integer classes "
            f"({SUPPORTED})."
        )
    if num_classes is None:
        return
    valid = labels[labels != -100]
    if valid.numel() and (int(valid.min()) < 0 or int(valid.max()) >= num_classes):
        raise ValueError(
            f"labels run from {int(valid.min())} to {int(valid.max())} but the model has {num_classes} classes: set "
            "num_labels of the model, or -100 for rows to ignore."
        )
