"""Encoder-decoder language models: translation, summarization and the like."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..batch import Batch
from ..models import classes_of, decoder_input_ids, drops_cache, is_encoder_decoder
from .sample_classification import named
from .token_classification import TokenClassification


class Seq2SeqLM(TokenClassification):
    """One row a target position; the decoder's inputs are shifted already."""

    name = "encoder-decoder language modeling"
    language_model = True
    mappings = ("SEQ_TO_SEQ_CAUSAL_LM", "CAUSAL_LM")
    suffixes = ()

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        return is_encoder_decoder(model) and named(model, classes_of(*cls.mappings), ("ForConditionalGeneration",))

    def inputs_without_labels(self, batch: Batch) -> dict[str, Any]:
        inputs = batch.inputs
        if not inputs.keys() & {"decoder_input_ids", "decoder_inputs_embeds"}:
            inputs = inputs | {"decoder_input_ids": decoder_input_ids(self.model, batch.labels)}
        return {"use_cache": False} | inputs if drops_cache(self.model) else inputs
