"""Word and character error rates of transcripts, in NumPy."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from .arrays import IGNORED_LABEL, as_array, first_output, split_batches
from .batched import BatchedMetrics


logger = logging.getLogger(__name__)


def error_rates(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Word and character error rate of a corpus.

    Args:
        predictions (`list[str]`): Transcripts.
        references (`list[str]`): What was said. One without a word counts what was told there as insertions.

    Returns:
        `dict[str, float]`: `wer` and `cer`, the words (characters, spaces among them) that must be put in, taken out
        or replaced, over those of all references: fractions, better when lower, above 1 where much is put in. NaN
        if no reference has any.

    Raises:
        `ValueError`: another number of predictions than of references.

    Example:
        ```python
        error_rates(["the cat sat"], ["the cat sits down"])["wer"]  # 0.5
        ```
    """
    if len(predictions) != len(references):
        raise ValueError(f"references: {len(references)} for {len(predictions)} predictions; pass one for each.")
    words = [(one.split(), other.split()) for one, other in zip(predictions, references, strict=True)]
    letters = [(" ".join(one), " ".join(other)) for one, other in words]
    return {"wer": _rate(words), "cer": _rate(letters)}


def _rate(pairs: list[tuple[Sequence[str], Sequence[str]]]) -> float:
    length = sum(len(reference) for _, reference in pairs)
    return sum(edit_distance(one, other) for one, other in pairs) / length if length else math.nan


def edit_distance(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many items of a sequence must be put in, taken out or replaced to make another of it (Levenshtein)."""
    table = {item: number for number, item in enumerate(dict.fromkeys((*one, *other)))}
    found = np.array([table[item] for item in other], dtype=np.int64)
    steps = np.arange(len(found) + 1)
    costs = steps
    for count, item in enumerate(one, 1):
        through = np.minimum(costs[:-1] + (found != table[item]), costs[1:] + 1)
        # What is put in follows: the smallest of what came before, one more for each step.
        costs = np.minimum.accumulate(np.concatenate(([count], through)) - steps) + steps
    return int(costs[-1])


class SpeechMetrics(BatchedMetrics):
    """A `compute_metrics` callable for speech to text; [`compute_speech_metrics`] makes one.

    Args:
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`): What decodes the token ids.
    """

    def __init__(self, processing_class: Any) -> None:
        super().__init__()
        if not hasattr(processing_class, "batch_decode"):
            raise ValueError(
                f"processing_class: {type(processing_class).__name__} has no batch_decode; pass the tokenizer."
            )
        self._tokenizer = getattr(processing_class, "tokenizer", processing_class)
        # Of transformers' tokenizers `decode` passes it on.
        ways = (getattr(self._tokenizer, name, None) for name in ("decode", "_decode"))
        self._groups = any("group_tokens" in inspect.signature(way).parameters for way in ways if way is not None)

    def _read(self, predictions: Any, labels: Any) -> list[tuple[list[str], list[str]]]:
        parts = split_batches(predictions, labels, label_dimensions=2)
        return [self._texts(first_output(part, labels), labels) for part, labels in parts]

    def _result(self, kept: list[tuple[list[str], list[str]]]) -> dict[str, float]:
        transcripts, references = ([text for part in column for text in part] for column in zip(*kept, strict=True))
        rates = error_rates(transcripts, references)
        if math.isnan(rates["cer"]):
            logger.warning("labels: no transcript has a word; the metrics of this evaluation are NaN.")
        return rates

    def _texts(self, predictions: Any, labels: Any) -> tuple[list[str], list[str]]:
        """Transcripts and references."""
        found, labels = as_array(predictions, "predictions"), as_array(labels, "labels")
        if found.ndim not in (2, 3) or labels.ndim != 2 or len(found) != len(labels):
            raise ValueError(
                f"labels: shape {labels.shape} does not fit predictions of shape {found.shape}; pass token ids [B, L] "
                "(predict_with_generate=True) or logits of CTC [B, T, V], and labels [B, L]."
            )
        rows = [self._path(row) for row in found] if found.ndim == 3 else found
        return self._decode(rows), self._decode(labels)

    def _path(self, logits: np.ndarray) -> np.ndarray:
        """The symbols of the best path of CTC: repetitions are one, and the blank, which is the padding, is none."""
        frames = logits[~(logits == IGNORED_LABEL).all(axis=-1)]  # by which batches were filled up
        best = frames.argmax(axis=-1)
        first = np.diff(best, prepend=-1) != 0
        return best[first & (best != self._tokenizer.pad_token_id)]

    def _decode(self, rows: Any) -> list[str]:
        ids = [[int(token) for token in row if token != IGNORED_LABEL] for row in rows]
        grouping = {"group_tokens": False} if self._groups else {}  # that tokenizers of CTC would do by themselves
        return [self._tokenizer.decode(row, skip_special_tokens=True, **grouping).strip() for row in ids]


def compute_speech_metrics(processing_class: Any) -> SpeechMetrics:
    """Word and character error rate of speech to text, for `compute_metrics`.

    Args:
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`): What decodes the token ids.

    Returns:
        [`SpeechMetrics`], a callable that returns [`error_rates`] of token ids `[B, L]` that were generated
        (`predict_with_generate=True`), or of logits of CTC `[B, T, V]`, of which the best path is read: repetitions
        are one symbol, and the padding token is the blank. Special tokens and -100 are left out of both sides.

    Raises:
        `ValueError`: `processing_class` cannot decode; predictions of other shapes.

    Example:
        ```python
        args = Seq2SeqSelfKDConfig("out", predict_with_generate=True)
        compute_metrics = compute_speech_metrics(tokenizer)
        trainer = Seq2SeqSelfKDTrainer(model, args, collator, eval_dataset=test, compute_metrics=compute_metrics)
        trainer.evaluate()["eval_wer"]
        ```
    """
    return SpeechMetrics(processing_class)
