"""Metrics of classifiers with several labels a sample, in NumPy."""

from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np

from .arrays import as_array, first_output, split_batches
from .batched import BatchedMetrics
from .calibration import reliability_of


logger = logging.getLogger(__name__)

MULTI_LABEL_METRICS = ("bce", "ece", "micro_f1", "macro_f1", "map", "subset_accuracy")


def multi_label_metrics(predictions: Any, labels: Any, from_logits: bool = True) -> dict[str, float]:
    """Likelihood, calibration and accuracy of a classifier whose classes are independent yes-or-no questions.

    Args:
        predictions (`np.ndarray`, `torch.Tensor` or `tuple` of them, of shape `[R, C]`):
            Log-odds (logits), of any float dtype, on any device. Of a tuple the first that is not `None` is taken.
            With `eval_do_concat_batches=False` a `list`, one a batch.
        labels (`np.ndarray` or `torch.Tensor` of shape `[R, C]`): 0 and 1, of any dtype, or a `list`, one a batch.
        from_logits (`bool`, *optional*, defaults to `True`): `False` if `predictions` are probabilities of yes.

    Returns:
        `dict[str, float]`:
        - `bce`: mean binary cross-entropy over samples and classes, nats.
        - `ece`: calibration error of each class in per cent (10 right-closed bins of the probability of yes, against
          the share of yes), averaged over the classes.
        - `micro_f1`, `macro_f1`: F1 at probability 0.5 (yes above it) of all answers together, and averaged over the
          classes; 0 where nothing is and nothing is told to be there.
        - `map`: average precision (area under the precision-recall steps), averaged over the classes that have a
          positive sample; NaN if none has.
        - `subset_accuracy`: share of the samples whose classes are all right.

    Raises:
        `ValueError`: shapes that do not match, no sample, labels other than 0 and 1, NaN, or no probabilities.

    Example:
        ```python
        multi_label_metrics([[2.0, -1.0], [0.5, 3.0]], [[1, 0], [0, 1]])["micro_f1"]  # 0.8
        ```
    """
    return _metrics(*_joined(predictions, labels, from_logits))


class MultiLabelMetrics(BatchedMetrics):
    """A `compute_metrics` callable for `Trainer` that returns [`multi_label_metrics`], also batch by batch.

    Predictions that are no numbers do not end the run: all metrics are then NaN, with a warning. One instance serves
    one evaluation at a time; [`compute_multi_label_metrics`] is a ready one.
    """

    def _read(self, predictions: Any, labels: Any) -> list[tuple[np.ndarray, np.ndarray]]:
        return [_joined(predictions, labels, True, finite=False)]

    def _result(self, kept: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
        odds, labels = (np.concatenate(parts) for parts in zip(*kept, strict=True))
        if np.isnan(odds).any():
            logger.warning("predictions: NaN; the metrics of this evaluation are NaN.")
            return dict.fromkeys(MULTI_LABEL_METRICS, math.nan)
        return _metrics(odds, labels)


compute_multi_label_metrics = MultiLabelMetrics()


def _joined(predictions: Any, labels: Any, from_logits: bool, finite: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Log-odds and labels of all samples, as float64 and bool `[R, C]`."""
    parts = [
        _checked(first_output(part, label), label, from_logits, finite)
        for part, label in split_batches(predictions, labels, label_dimensions=2)
    ]
    return tuple(np.concatenate(column) for column in zip(*parts, strict=True))


def _checked(predictions: Any, labels: Any, from_logits: bool, finite: bool) -> tuple[np.ndarray, np.ndarray]:
    odds, labels = as_array(predictions, "predictions").astype(np.float64), as_array(labels, "labels")
    if odds.ndim != 2 or odds.shape != labels.shape or not odds.size:
        raise ValueError(
            f"labels: shape {labels.shape} does not fit predictions of shape {odds.shape}; pass [R, C] of both."
        )
    if not np.isin(labels, (0, 1)).all():
        raise ValueError(f"labels: {labels[~np.isin(labels, (0, 1))][0]} is neither 0 nor 1.")
    if finite and np.isnan(odds).any():
        raise ValueError("predictions: NaN for a sample; pass numbers.")
    if not from_logits:
        if not ((odds >= 0) & (odds <= 1)).all():
            raise ValueError("predictions: outside 0..1; pass probabilities, or logits with from_logits=True.")
        smallest = np.finfo(np.float32).tiny  # so that a probability of 0 costs 87 nats, as in `calibration_metrics`
        odds = np.log(np.maximum(odds, smallest)) - np.log(np.maximum(1 - odds, smallest))
    return odds, labels.astype(bool)


def _metrics(odds: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    probs, told = np.exp(-np.logaddexp(0, -odds)), odds > 0
    losses = np.logaddexp(0, np.where(labels, -odds, odds))
    hits, errors = (told & labels).sum(0), (told ^ labels).sum(0)
    precisions = [_average_precision(odds[:, c], labels[:, c]) for c in range(odds.shape[1]) if labels[:, c].any()]
    return {
        "bce": float(losses.mean()),
        "ece": float(np.mean([reliability_of(probs[:, c], labels[:, c], 10).ece for c in range(odds.shape[1])])),
        "micro_f1": float(_f1(hits.sum(), errors.sum())),
        "macro_f1": float(_f1(hits, errors).mean()),
        "map": float(np.mean(precisions)) if precisions else math.nan,
        "subset_accuracy": float((told == labels).all(axis=1).mean()),
    }


def _f1(hits: np.ndarray, errors: np.ndarray) -> np.ndarray:
    return 2 * hits / np.maximum(2 * hits + errors, 1)


def _average_precision(odds: np.ndarray, labels: np.ndarray) -> float:
    """Precision at each threshold, weighted by the recall that the threshold gains; equal scores share one."""
    order = np.argsort(-odds, kind="stable")
    hits, kept = np.cumsum(labels[order]), np.arange(1, len(odds) + 1)
    last = np.append(np.flatnonzero(np.diff(odds[order])), len(odds) - 1)
    gained = np.diff(hits[last], prepend=0)
    return float((gained * hits[last] / kept[last]).sum() / hits[-1])
