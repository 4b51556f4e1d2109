"""Encoder-decoder models from images to texts: captions, optical character recognition, questions about pictures."""

from __future__ import annotations

from torch import nn

from ..models import classes_of, is_encoder_decoder
from .sample_classification import named
from .seq2seq_lm import Seq2SeqLM


class ImageToText(Seq2SeqLM):
    """One row a target position, as of any encoder-decoder language model."""

    name = "image to text"
    mappings = ("IMAGE_TEXT_TO_TEXT", "VISION_2_SEQ")

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        return is_encoder_decoder(model) and named(model, classes_of(*cls.mappings), ())
