"""Extractive question answering: where in a text the answer starts, and where it ends."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from ..batch import Batch
from ..models import classes_of, is_encoder_decoder, takes, virtual_tokens_of
from ..samples import IGNORE_INDEX, SampleIndex, sample_index
from .base import Task
from .rows import Rows
from .sample_classification import named


START, END = "start_positions", "end_positions"


class QuestionAnswering(Task):
    """
    Two rows a sample, over the positions of its text: that of the start at `2 * b`, that of the end at `2 * b + 1`.

    As in the loss of transformers, a position below 0 is taken for 0, and one behind the end of the batch does not
    count. A teacher believes in no padding, so a row means the same however far its batch is padded.
    """

    name = "extractive question answering"
    per_token = True
    mappings = ("QUESTION_ANSWERING", "DOCUMENT_QUESTION_ANSWERING")
    unmixed = "an answer has no place in a mixture of two texts"
    headless = "heads tell classes, and positions are none"
    unsmoothed = "there are no `labels` of its own"
    unranked = "padding has ranks too"

    def __init__(self, model: nn.Module, label_names: tuple[str, ...] = ("labels",)):
        super().__init__(model, (START, END))
        if virtual_tokens_of(self.wrapped):
            raise ValueError(
                f"prompt tuning with {self.name}: virtual tokens move the positions of the answers. Use another "
                "method of PEFT, such as LoRA."
            )
        config = getattr(self.model, "config", None)
        self.width: int | None = getattr(config, "max_position_embeddings", None)
        if self.width is None or self.width <= 0:
            self.width = None
            self.no_history = (
                f"{type(self.model).__name__} tells no longest sequence (max_position_embeddings), over which "
                "teacher='history' stores positions. Use teacher='snapshot'"
            )

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        # Some models of these mappings answer from a list or by search: they take no positions, or give no logits.
        return named(model, classes_of(*cls.mappings), ()) and takes(model, START) and takes(model, END)

    @property
    def num_classes(self) -> int | None:
        return None  # as many as the batch is long

    def labels_in(self, inputs: Any) -> Any:
        """The positions `[B, 2]`, of start and end, -100 for one behind the end of the batch."""
        found = [inputs[name] for name in (START, END) if name in inputs]
        if len(found) < 2:
            return None
        other = next((part for part in found if not isinstance(part, torch.Tensor) or part.is_floating_point()), None)
        if other is not None:
            return other  # which is refused by its type
        # DataParallel and some collators leave a dimension of 1.
        labels = torch.stack([part.reshape(len(part)) if part.dim() else part for part in found], dim=-1).long()
        length = _length(inputs)
        labels = labels.clamp_min(0)
        return labels if length is None else labels.masked_fill(labels >= length, IGNORE_INDEX)

    def taken(self, name: str) -> tuple[str, ...]:
        return (START, END)

    def no_labels(self, inputs: dict[str, Any]) -> str:
        return (
            f"the batch needs {START!r} and {END!r}, and has only {', '.join(inputs)}: give both, as "
            "AutoModelForQuestionAnswering takes them."
        )

    def sample_index(self, ids: np.ndarray, labels: torch.Tensor) -> SampleIndex:
        # Both rows are kept, whether their labels count or not: each sample has as many in every epoch.
        found = sample_index(ids, labels)
        return replace(found, counts=np.full(len(found.ids), 2), rows=np.arange(2 * len(found.ids)))

    def inputs_without_labels(self, batch: Batch) -> dict[str, Any]:
        unused_cache = is_encoder_decoder(self.model) and takes(self.model, "use_cache")
        return {"use_cache": False} | batch.inputs if unused_cache else batch.inputs

    def inputs_with_labels(self, batch: Batch, labels: torch.Tensor) -> dict[str, Any]:
        # Behind the end: below 0 would be taken for the first position.
        start, end = labels.masked_fill(labels == IGNORE_INDEX, torch.iinfo(labels.dtype).max).unbind(-1)
        return batch.inputs | {START: start, END: end}

    def logits(self, outputs: Any, has_loss: bool) -> torch.Tensor:
        """Those of start and end, `[B, 2, L]`."""
        if isinstance(outputs, dict):
            found = [outputs.get("start_logits"), outputs.get("end_logits")]
        else:
            found = list(outputs[int(has_loss) : int(has_loss) + 2]) if isinstance(outputs, (tuple, list)) else []
        if len(found) < 2 or not all(isinstance(part, torch.Tensor) and part.dim() == 2 for part in found):
            told = ", ".join(outputs) if isinstance(outputs, dict) else type(outputs).__name__
            raise ValueError(f"the model returned no start_logits and end_logits [batch, length] but {told}.")
        return torch.stack(found, dim=1)

    def rows(self, logits: torch.Tensor, labels: torch.Tensor) -> Rows:
        if logits.dim() != 3 or labels.shape != logits.shape[:2]:
            raise ValueError(
                f"logits of shape {list(logits.shape)} with labels of shape {list(labels.shape)}: answers need "
                "[batch, 2, length] and [batch, 2]."
            )
        width = None if self.width is None or logits.shape[-1] > self.width else self.width
        return Rows(logits.flatten(0, 1), self.row_labels(labels), width=width)

    def rows_of(self, logits: torch.Tensor, batch: Batch) -> Rows:
        rows = self.rows(logits, batch.labels)
        mask = self._mask(batch.inputs)
        if mask is not None and mask.shape == (len(batch.labels), logits.shape[-1]):
            rows.allowed = mask.bool().repeat_interleave(2, dim=0)
        return rows

    def _mask(self, inputs: dict[str, Any]) -> torch.Tensor | None:
        """Which positions `[B, L]` are no padding."""
        if inputs.get("attention_mask") is not None:
            return inputs["attention_mask"]
        padding = getattr(getattr(self.model, "config", None), "pad_token_id", None)
        if inputs.get("input_ids") is None or padding is None:
            return None
        return inputs["input_ids"] != padding

    def own_loss(self, losses: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The mean over the starts and that over the ends, averaged."""
        known = (labels != IGNORE_INDEX).view(-1, 2)
        sums = torch.where(known, losses.view(-1, 2), 0.0).sum(0)
        return (sums / known.sum(0)).mean()


def _length(inputs: Any) -> int | None:
    """Positions of a batch, as its inputs tell."""
    for name in ("decoder_input_ids", "input_ids", "inputs_embeds"):
        value = inputs[name] if name in inputs else None
        if isinstance(value, torch.Tensor) and value.dim() > 1:
            return value.shape[1]
    return None
