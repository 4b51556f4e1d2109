"""Encoder-decoder models from images to texts: captions, optical character recognition."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..batch import Batch
from ..models import classes_of, is_encoder_decoder
from .sample_classification import named
from .seq2seq_lm import Seq2SeqLM


# Models that hide padding from their decoder where they make its inputs of the labels.
MASKING = {"Pix2StructForConditionalGeneration"}


class ImageToText(Seq2SeqLM):
    """One row a target position, as of any encoder-decoder language model."""

    name = "image to text"
    mappings = ("IMAGE_TEXT_TO_TEXT", "VISION_2_SEQ")

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        return is_encoder_decoder(model) and named(model, classes_of(*cls.mappings), ())

    def inputs_without_labels(self, batch: Batch) -> dict[str, Any]:
        inputs = super().inputs_without_labels(batch)
        masked = not MASKING.isdisjoint(cls.__name__ for cls in type(self.model).__mro__)
        if not masked or "decoder_input_ids" in batch.inputs or inputs.get("decoder_attention_mask") is not None:
            return inputs
        mask = inputs["decoder_input_ids"] != self.model.config.pad_token_id
        mask[:, 0] = True
        return inputs | {"decoder_attention_mask": mask.float()}
