"""BLEU, chrF and token metrics of translations; sacrebleu is imported only when they are computed."""

from __future__ import annotations

from typing import Any

import numpy as np

from .calibration import IGNORED_LABEL, RowScores, join_scores, row_scores, summary


class TranslationMetrics:
    """A `compute_metrics` callable for `Seq2SeqTrainer`; [`compute_translation_metrics`] makes one.

    Attributes:
        signatures (`dict[str, str]`):
            sacrebleu's signatures of `bleu` and `chrf`, to be published with them; empty before the first call that
            returns them.
    """

    def __init__(self, processing_class: Any, bleu_tokenizer: str = "13a") -> None:
        if not hasattr(processing_class, "batch_decode"):
            raise ValueError(
                f"processing_class: {type(processing_class).__name__} has no batch_decode; pass the tokenizer."
            )
        self.signatures: dict[str, str] = {}
        self._processing_class = processing_class
        self._bleu_tokenizer = bleu_tokenizer
        self._batches: list[tuple] = []

    def __call__(self, eval_prediction: Any, compute_result: bool | None = None) -> dict[str, float]:
        """
        Args:
            eval_prediction (`EvalPrediction` or `(predictions, labels)`): One evaluation, or one batch of it.
            compute_result (`bool`, *optional*): What `batch_eval_metrics=True` passes; as [`ClassificationMetrics`].
        """
        batches, self._batches = self._batches, []
        if compute_result is None:
            batches = []
        batch = self._read(eval_prediction[0], eval_prediction[1])
        if batches and type(batches[0]) is not type(batch):
            raise ValueError("predictions: token ids in one batch and logits in another; pass one kind.")
        batches.append(batch)
        if compute_result is False:
            self._batches = batches
            return {}
        if isinstance(batch, RowScores):
            metrics = summary(join_scores(batches))
            return {f"token_{name}": metrics[name] for name in ("nll", "ece", "accuracy")}
        return self._scores(*([item for part in column for item in part] for column in zip(*batches, strict=True)))

    def reset(self) -> None:
        """Forget remembered batches: call it after a `batch_eval_metrics` evaluation that was interrupted."""
        self._batches = []

    def _read(self, predictions: Any, labels: Any) -> RowScores | tuple[list[str], list[str], list[int]]:
        """Scores of the tokens, or translations with references and lengths."""
        if isinstance(predictions, tuple) and len(predictions) and np.ndim(predictions[0]) >= 2:
            predictions = predictions[0]
        if np.ndim(predictions) == 3:
            return row_scores(predictions, labels)
        predictions, labels = _token_ids(predictions, "predictions"), _token_ids(labels, "labels")
        if len(predictions) != len(labels):
            raise ValueError(f"labels: {len(labels)} rows for {len(predictions)} predictions; pass one for each.")
        if len(predictions) == 0:
            raise ValueError("predictions: no rows; pass at least one translation.")
        tokenizer = getattr(self._processing_class, "tokenizer", self._processing_class)  # that of a processor
        special = np.array([IGNORED_LABEL, *getattr(tokenizer, "all_special_ids", [])])
        lengths = (~np.isin(predictions, special)).sum(axis=1)
        return self._decode(predictions), self._decode(labels), lengths.tolist()

    def _decode(self, ids: np.ndarray) -> list[str]:
        rows = [row[row != IGNORED_LABEL].tolist() for row in ids]  # no tokenizer knows -100
        return [text.strip() for text in self._processing_class.batch_decode(rows, skip_special_tokens=True)]

    def _scores(self, translations: list[str], references: list[str], lengths: list[int]) -> dict[str, float]:
        try:
            from sacrebleu.metrics import BLEU, CHRF
        except ImportError as error:
            raise ImportError('sacrebleu is not installed: pip install "hf_selfkd[translation]"') from error
        metrics = {}
        for name, metric in (("bleu", BLEU(tokenize=self._bleu_tokenizer)), ("chrf", CHRF())):
            metrics[name] = float(metric.corpus_score(translations, [references]).score)
            self.signatures[name] = str(metric.get_signature())
        return metrics | {"gen_len": float(np.mean(lengths))}


def compute_translation_metrics(processing_class: Any, bleu_tokenizer: str = "13a") -> TranslationMetrics:
    """Figures of a translation model, for `compute_metrics` of `Seq2SeqTrainer`.

    Args:
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`): What decodes the token ids.
        bleu_tokenizer (`str`, *optional*, defaults to `"13a"`):
            How sacrebleu splits words, such as `"zh"`, `"ja-mecab"` or `"flores200"`.

    Returns:
        [`TranslationMetrics`], a callable that returns
        - of generated token ids `[B, L]` (`predict_with_generate=True`): `bleu` and `chrf`, sacrebleu's corpus scores
          (0 to 100) against the decoded labels, and `gen_len`, the mean number of tokens that are not special ones;
        - of logits `[B, L, V]`: `token_nll`, `token_ece` (per cent, 10 bins) and `token_accuracy` of
          [`calibration_metrics`] over the tokens whose label is not -100. Nothing is shifted: the decoder's inputs
          already are.

        -100 and padding are left out. The references are what the tokenizer makes of the labels: a text cut at the
        maximum length, or characters unknown to the tokenizer, are lost from them as well.

    Raises:
        `ImportError`: sacrebleu is missing (when BLEU is first computed).
        `ValueError`: `processing_class` cannot decode; predictions of other shapes; the errors of
            [`calibration_metrics`].

    Example:
        ```python
        compute_metrics = compute_translation_metrics(tokenizer)
        trainer = Seq2SeqSelfKDTrainer(model, args, ..., compute_metrics=compute_metrics)
        trainer.evaluate()["eval_bleu"], compute_metrics.signatures["bleu"]
        ```
    """
    return TranslationMetrics(processing_class, bleu_tokenizer)


def _token_ids(values: Any, field: str) -> np.ndarray:
    """Token ids as an array [B, L] of integers."""
    ids = np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)
    if ids.ndim != 2 or (ids.size and ids.dtype.kind not in "iu"):
        raise ValueError(
            f"{field}: shape {ids.shape} and dtype {ids.dtype} are no token ids; pass integers [B, L] "
            "(predict_with_generate=True), or logits [B, L, V] as predictions."
        )
    return ids
