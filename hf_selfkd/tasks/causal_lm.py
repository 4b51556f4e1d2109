"""Causal language models: the next word at every position, text only or after images and sounds."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..models import classes_of, is_encoder_decoder
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

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        return not is_encoder_decoder(model) and named(model, classes_of(*cls.mappings), cls.suffixes)

    def row_labels(self, labels: torch.Tensor) -> torch.Tensor:
        return next_tokens(labels).reshape(-1)


def next_tokens(labels: torch.Tensor) -> torch.Tensor:
    """The labels `[B, L]` of a causal language model where its predictions stand: one to the left, -100 at the end."""
    return F.pad(labels[..., 1:], (0, 1), value=IGNORE_INDEX)
