"""Masked language models: the words under the mask."""

from .token_classification import TokenClassification


class MaskedLM(TokenClassification):
    """One row a position; positions that are not masked have label -100."""

    name = "masked language modeling"
    language_model = True
    mappings = ("MASKED_LM",)
    suffixes = ("ForMaskedLM",)
