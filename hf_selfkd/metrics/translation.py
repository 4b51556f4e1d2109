"""BLEU, chrF and token metrics of translations; sacrebleu is imported only when they are computed."""

from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np

from .arrays import IGNORED_LABEL, as_array, first_output, split_batches
from .batched import BatchedMetrics
from .calibration import RowScores, join_scores, metrics_or_nan, perplexity, row_scores


logger = logging.getLogger(__name__)


class TranslationMetrics(BatchedMetrics):
    """A `compute_metrics` callable for `Seq2SeqTrainer`; [`compute_translation_metrics`] makes one.

    Sentences whose labels are all -100 have no reference and are left out of BLEU and chrF. Metrics that cannot be
    computed, for want of any label for instance, are NaN, with a warning.

    Args:
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`): What decodes the token ids.
        bleu_tokenizer (`str`, *optional*, defaults to `"13a"`): How sacrebleu splits words.

    Attributes:
        signatures (`dict[str, str]`):
            sacrebleu's signatures of `bleu` and `chrf`, to be published with them; empty before the first call that
            returns them.
    """

    def __init__(self, processing_class: Any, bleu_tokenizer: str = "13a") -> None:
        super().__init__()
        if not hasattr(processing_class, "batch_decode"):
            raise ValueError(
                f"processing_class: {type(processing_class).__name__} has no batch_decode; pass the tokenizer."
            )
        self.signatures: dict[str, str] = {}
        self._processing_class = processing_class
        self._bleu_tokenizer = bleu_tokenizer

    def _read(self, predictions: Any, labels: Any) -> list[RowScores] | list[tuple]:
        parts = split_batches(predictions, labels, label_dimensions=2)
        return [self._part(first_output(part, labels), labels) for part, labels in parts]

    def _add(self, kept: list[Any], read: list[Any]) -> list[Any]:
        kept = super()._add(kept, read)
        if any(type(part) is not type(kept[0]) for part in read):
            raise ValueError("predictions: token ids in one batch and logits in another; pass one kind.")
        return kept

    def _result(self, kept: list[RowScores] | list[tuple]) -> dict[str, float]:
        if isinstance(kept[0], RowScores):
            metrics = metrics_or_nan(join_scores(kept))
            tokens = {f"token_{name}": metrics[name] for name in ("nll", "ece", "accuracy")}
            return tokens | {"perplexity": perplexity(metrics["nll"])}
        return self._scores(*([item for part in column for item in part] for column in zip(*kept, strict=True)))

    def _part(self, predictions: Any, labels: Any) -> RowScores | tuple[list[str], list[str | None], list[int]]:
        """Scores of the tokens, or translations with references (`None` where there is none) and lengths."""
        array = as_array(predictions, "predictions")
        if array.ndim == 3:
            return row_scores(array, labels)
        predictions, labels = _token_ids(array, "predictions"), _token_ids(labels, "labels")
        if len(predictions) != len(labels):
            raise ValueError(f"labels: {len(labels)} rows for {len(predictions)} predictions; pass one for each.")
        tokenizer = getattr(self._processing_class, "tokenizer", self._processing_class)  # that of a processor
        special = np.array([IGNORED_LABEL, *getattr(tokenizer, "all_special_ids", [])])
        lengths = (~np.isin(predictions, special)).sum(axis=1)
        references = zip(self._decode(labels), (labels != IGNORED_LABEL).any(axis=1), strict=True)
        return self._decode(predictions), [text if known else None for text, known in references], lengths.tolist()

    def _decode(self, ids: np.ndarray) -> list[str]:
        rows = [row[row != IGNORED_LABEL].tolist() for row in ids]  # no tokenizer knows -100
        if not rows:  # which older versions of transformers take for one row
            return []
        return [text.strip() for text in self._processing_class.batch_decode(rows, skip_special_tokens=True)]

    def _scores(self, translations: list[str], references: list[str | None], lengths: list[int]) -> dict[str, float]:
        try:
            from sacrebleu.metrics import BLEU, CHRF
        except ImportError as error:
            raise ImportError('sacrebleu is not installed: pip install "hf_selfkd[translation]"') from error
        known = [index for index, reference in enumerate(references) if reference is not None]
        if not known:
            told = f"labels: none of {len(references)} rows has a token (all are {IGNORED_LABEL}); pass references."
            logger.warning(f"{told} The metrics of this evaluation that need them are NaN.")
        translations, references = [translations[index] for index in known], [references[index] for index in known]
        metrics = {}
        for name, metric in (("bleu", BLEU(tokenize=self._bleu_tokenizer)), ("chrf", CHRF())):
            metrics[name] = float(metric.corpus_score(translations, [references]).score) if known else math.nan
            if known:
                self.signatures[name] = str(metric.get_signature())
        return metrics | {"gen_len": float(np.mean(lengths)) if lengths else math.nan}


def compute_translation_metrics(processing_class: Any, bleu_tokenizer: str = "13a") -> TranslationMetrics:
    """Metrics of a translation model, for `compute_metrics` of `Seq2SeqTrainer`.

    Args:
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`): What decodes the token ids.
        bleu_tokenizer (`str`, *optional*, defaults to `"13a"`):
            How sacrebleu splits words, such as `"zh"`, `"ja-mecab"` or `"flores200"`.

    Returns:
        [`TranslationMetrics`], a callable that returns
        - of generated token ids `[B, L]` (`predict_with_generate=True`): `bleu` and `chrf`, sacrebleu's corpus scores
          (0 to 100) against the decoded labels, and `gen_len`, the mean number of tokens that are not special ones;
        - of logits `[B, L, V]`: `token_nll`, `token_ece` (per cent, 10 bins) and `token_accuracy` of
          [`calibration_metrics`] over the tokens whose label is not -100, and `perplexity`. Nothing is shifted: the
          decoder's inputs already are.

        -100 and padding are left out. The references are what the tokenizer makes of the labels: a text cut at the
        maximum length, or characters unknown to the tokenizer, are lost from them as well.

    Raises:
        `ImportError`: sacrebleu is missing (when BLEU is first computed).
        `ValueError`: `processing_class` cannot decode; predictions of other shapes; the errors of
            [`calibration_metrics`] about shapes and labels.

    Example:
        ```python
        compute_metrics = compute_translation_metrics(tokenizer)
        args = Seq2SeqSelfKDConfig("out", predict_with_generate=True)
        trainer = Seq2SeqSelfKDTrainer(model, args, collator, eval_dataset=test, compute_metrics=compute_metrics)
        trainer.evaluate()["eval_bleu"], compute_metrics.signatures["bleu"]
        ```
    """
    return TranslationMetrics(processing_class, bleu_tokenizer)


def _token_ids(values: Any, field: str) -> np.ndarray:
    """Token ids as an array [B, L] of integers."""
    ids = as_array(values, field)
    if ids.ndim != 2 or (ids.size and ids.dtype.kind not in "iu"):
        raise ValueError(
            f"{field}: shape {ids.shape} and dtype {ids.dtype} are no token ids; pass integers [B, L] "
            "(predict_with_generate=True), or logits [B, L, V] as predictions."
        )
    return ids
