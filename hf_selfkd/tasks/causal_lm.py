"""Causal language models: the next word at every position, text only or after images and sounds."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..models import classes_of, is_encoder_decoder, logits_of, virtual_tokens_of
from ..samples import IGNORE_INDEX
from .sample_classification import named
from .token_classification import TokenClassification


class CausalLM(TokenClassification):
    """One row a position, whose label is the next one."""

    name = "causal language modeling"
    shifts_labels = True
    language_model = True
    # Decoder-only models of several modalities stand in mappings of encoder-decoder tasks too: the configuration, and
    # not the mapping, tells whether a model has an encoder.
    mappings = ("CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM")
    suffixes = ("ForCausalLM", "LMHeadModel")

    def __init__(self, model: nn.Module, label_names: tuple[str, ...] = ("labels",)):
        super().__init__(model, label_names)
        self.virtual = virtual_tokens_of(self.wrapped)
        self.shifts_labels = self.virtual == 0  # the last virtual token predicts the first label

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        return not is_encoder_decoder(model) and named(model, classes_of(*cls.mappings), cls.suffixes)

    def logits(self, outputs: Any, has_loss: bool) -> torch.Tensor:
        logits = logits_of(outputs, has_loss)
        return logits[:, self.virtual - 1 : -1] if self.virtual and logits.dim() == 3 else logits

    def row_labels(self, labels: torch.Tensor) -> torch.Tensor:
        return (next_tokens(labels) if self.shifts_labels else labels).reshape(-1)


def next_tokens(labels: torch.Tensor) -> torch.Tensor:
    """The labels `[B, L]` of a causal language model where its predictions stand: one to the left, -100 at the end."""
    return F.pad(labels[..., 1:], (0, 1), value=IGNORE_INDEX)
