"""Encoder-decoder models from sounds to texts: transcription and translation of speech."""

from __future__ import annotations

from torch import nn

from ..models import classes_of, is_encoder_decoder
from .sample_classification import named
from .seq2seq_lm import Seq2SeqLM


# Models of the same mapping whose targets are sounds: several labels a position, which are no text.
NO_TEXT = ("DiaForConditionalGeneration",)


class SpeechSeq2Seq(Seq2SeqLM):
    """One row a target position, as of any encoder-decoder language model."""

    name = "speech to text"
    mappings = ("SPEECH_SEQ_2_SEQ",)

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        return is_encoder_decoder(model) and named(model, classes_of(*cls.mappings) - set(NO_TEXT), ())
