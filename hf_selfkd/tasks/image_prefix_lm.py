"""Causal language models that put the places of an image before the words, and answer for both (GIT)."""

from __future__ import annotations

import torch
from torch import nn

from .causal_lm import CausalLM
from .rows import Rows
from .sample_classification import named


class ImagePrefixLM(CausalLM):
    """One row a word, whose label is the next one; what is said at the places of the image does not count."""

    name = "causal language modeling after images"
    headless = "a head would answer for the places of the image too"

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        return named(model, {"GitForCausalLM"}, ())

    def rows(self, logits: torch.Tensor, labels: torch.Tensor) -> Rows:
        return super().rows(logits[:, max(logits.shape[1] - labels.shape[1], 0) :], labels)
