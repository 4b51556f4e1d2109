"""Connectionist temporal classification (CTC): one row a frame of sound, and no label for any of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from ..models import base_model, classes_of
from ..samples import IGNORE_INDEX, SampleIndex, sample_index
from .base import Task
from .rows import Rows
from .sample_classification import named


# Methods by which models tell how many frames they make of an input.
_LENGTHS = ("_get_feat_extract_output_lengths", "_get_subsampling_output_length")


@dataclass
class Frames:
    """
    What the loss of a model was given beside its logits.

    Args:
        lengths (`torch.LongTensor` of shape `[B]`): frames of each sample, padding left out.
        targets (`torch.LongTensor` of shape `[B]`): symbols of each transcript.
    """

    lengths: torch.Tensor
    targets: torch.Tensor


class CTC(Task):
    """
    One row a frame. Nobody knows the label of a frame: the hard loss, of the transcript, is the model's own, and only
    the soft part is of rows. What stands for their labels in the log is what the model says now.
    """

    name = "connectionist temporal classification (CTC)"
    per_token = True
    mappings = ("CTC",)
    suffixes = ("ForCTC",)
    headless = "heads learn labels of positions, and a frame has none"
    unmixed = "a mixture of two sounds has two transcripts"
    unsmoothed = "a frame has no label to smooth"
    unranked = "a frame has no label to put first"
    uncalibrated = "a frame has no label to be right about"
    untraced = "a frame has no class that is true"
    no_history = (
        "a frame has no label to be known by, and how many a sound has the model tells only when it is run: "
        "teacher='history' has no place to address predictions of CTC. Use teacher='snapshot'"
    )

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        return named(model, classes_of(*cls.mappings), cls.suffixes)

    @property
    def num_classes(self) -> int | None:
        return getattr(getattr(self.model, "config", None), "vocab_size", None)

    @property
    def by_length(self) -> bool:
        """`bool`: whether the loss is a mean over samples of what a symbol of the transcript costs; else a sum."""
        return getattr(getattr(self.model, "config", None), "ctc_loss_reduction", "mean") == "mean"

    def checked_labels(self, labels: Any) -> torch.Tensor:
        labels = super().checked_labels(labels)
        if labels.dim() != 2:
            raise ValueError(f"labels of shape {list(labels.shape)}: {self.name} needs transcripts [batch, length].")
        return labels

    def sample_index(self, ids: np.ndarray, labels: torch.Tensor) -> SampleIndex:
        return replace(sample_index(ids, labels), items=len(ids))

    def num_items(self, labels: Any) -> torch.Tensor:
        """Samples: what the loss is a mean over."""
        return torch.tensor(len(labels))

    def rows(self, logits: torch.Tensor, labels: torch.Tensor) -> Rows:
        """
        The rows of all frames, those of padding among them.

        Args:
            logits (`torch.FloatTensor` of shape `[B, T, C]`): of the model.
            labels (`torch.LongTensor` of shape `[B, L]`): transcripts.
        """
        if logits.dim() != 3 or len(logits) != len(labels):
            raise ValueError(
                f"logits of shape {list(logits.shape)} with labels of shape {list(labels.shape)}: {self.name} needs "
                "[batch, frames, classes] and [batch, length]."
            )
        return Rows(logits.flatten(0, 1), logits.detach().argmax(-1).flatten())

    def frame_rows(self, logits: torch.Tensor, labels: torch.Tensor, frames: Frames) -> Rows:
        """
        The rows of a batch: frames of padding have label -100. A frame counts 1, or one over the symbols of its
        transcript where the loss of the model does so.

        Args:
            logits, labels: as for [`~CTC.rows`].
            frames ([`Frames`]): of the batch.
        """
        rows, (size, length) = self.rows(logits, labels), logits.shape[:2]
        known = torch.arange(length, device=logits.device) < frames.lengths.to(logits.device).unsqueeze(-1)
        rows.labels = torch.where(known.flatten(), rows.labels, IGNORE_INDEX)
        share = 1 / frames.targets.to(logits.device).clamp_min(1) if self.by_length else logits.new_ones(size)
        rows.weights = torch.where(known, share.float().unsqueeze(-1), 0.0).flatten()
        return rows

    def frames_of(self, inputs: dict[str, Any], labels: torch.Tensor, length: int) -> Frames:
        """
        The frames of a batch where the loss of the model was not seen.

        Args:
            inputs (`dict`): of the model.
            labels (`torch.LongTensor` of shape `[B, L]`): transcripts.
            length (`int`): frames of the logits.

        Raises:
            ValueError: if sounds are padded and the model does not tell how many frames that makes.
        """
        mask, targets = inputs.get("attention_mask", inputs.get("padding_mask")), (labels >= 0).sum(-1)
        if mask is None:
            return Frames(torch.full_like(targets, length), targets)
        found = ((module, name) for module in self.model.modules() for name in _LENGTHS if hasattr(module, name))
        module, name = next(found, (None, ""))
        if module is None:
            raise ValueError(
                f"{type(self.model).__name__} does not tell how many frames of a padded sound count: its loss must be "
                "self.loss_function(logits=..., logit_lengths=...) of transformers, or pad no sounds."
            )
        return Frames(getattr(module, name)(mask.reshape(len(labels), -1).sum(-1)).long(), targets)


class SeenFrames:
    """
    What was seen while a model ran.

    Attributes:
        frames ([`Frames`], *optional*): of the batch; `None` if the model calls no loss function of transformers.
    """

    frames: Frames | None = None


@contextmanager
def watched_frames(model: nn.Module) -> Iterator[SeenFrames]:
    """
    See what the loss of a CTC model is given, when the model is run with labels inside this context. The model is
    afterwards as it was.

    Args:
        model (`nn.Module`): in any wrapper.
    """
    base, seen = base_model(model), SeenFrames()
    if not hasattr(type(base), "loss_function"):
        yield seen
        return
    own, had = base.loss_function, "_loss_function" in vars(base)

    def watched(*arguments: Any, **named: Any) -> Any:
        if {"labels", "logit_lengths"} <= named.keys():
            labels = named["labels"]
            symbols = (labels != IGNORE_INDEX) & (labels != named.get("blank_token_id", IGNORE_INDEX))
            seen.frames = Frames(named["logit_lengths"], symbols.sum(-1))
        return own(*arguments, **named)

    base.loss_function = watched
    try:
        yield seen
    finally:
        if had:
            base.loss_function = own
        else:
            del base._loss_function
