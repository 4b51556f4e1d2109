"""Calibration and ranking metrics of classifiers, as published with PS-KD (arXiv 2006.12000), in NumPy.

Everything starts from five numbers a row ([`RowScores`]); curves, metrics and the `compute_metrics` callable are made
of those. So rows are scored a chunk at a time, and `batch_eval_metrics` keeps no logits.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from .arrays import IGNORED_LABEL, classified_rows
from .batched import BatchedMetrics


logger = logging.getLogger(__name__)

METRICS = ("accuracy", "top5_accuracy", "nll", "brier", "ece", "ece_15", "aurc", "eaurc")

_CHUNK_VALUES = 2**22  # float64 values held at once while rows are scored: 32 MiB an array

_SUM_TOLERANCE = 3e-3  # bfloat16 rounds each entry of a row by up to 2**-9 of itself


class RowScores(NamedTuple):
    """What the metrics need to know of each of R labelled rows.

    A row whose predictions hold NaN or +inf, or nothing but -inf, has NaN in place of all numbers.

    Attributes:
        confidence (`np.ndarray` of shape `[R]`):
            Largest class probability. float64, or the dtype of the predictions where these are probabilities, so that
            a float32 0.6 lies on the bin edge 0.6 and not 2e-8 above it.
        correct (`np.ndarray` of bool of shape `[R]`):
            Whether the label is the argmax (of equal scores the first class, as `np.argmax`).
        in_top5 (`np.ndarray` of bool of shape `[R]`):
            Whether fewer than five classes come before the label, with the same rule for equal scores.
        nll (`np.ndarray` of float64 of shape `[R]`):
            Minus the natural log of the label's probability, in nats.
        brier (`np.ndarray` of float64 of shape `[R]`):
            Squared distance of the probabilities to the one-hot label, summed over classes: 0 to 2.
    """

    confidence: np.ndarray
    correct: np.ndarray
    in_top5: np.ndarray
    nll: np.ndarray
    brier: np.ndarray


class ReliabilityCurve(NamedTuple):
    """Accuracy against confidence in `B` equal bins `(i/B, (i+1)/B]`; the first also holds confidence 0.

    Attributes:
        edges (`np.ndarray` of float64 of shape `[B + 1]`): Bin edges, 0 to 1.
        confidence (`np.ndarray` of float64 of shape `[B]`): Mean confidence in the bin, NaN where it is empty.
        accuracy (`np.ndarray` of float64 of shape `[B]`): Fraction of correct rows, NaN where the bin is empty.
        count (`np.ndarray` of int64 of shape `[B]`): Rows in the bin.
    """

    edges: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray
    count: np.ndarray

    @property
    def ece(self) -> float:
        """Expected calibration error in per cent: the mean over rows of their bin's |accuracy - confidence|."""
        gap = np.abs(self.accuracy - self.confidence)
        return float(100 * np.nansum(self.count * gap) / self.count.sum())


class RiskCoverageCurve(NamedTuple):
    """Error rate among the most confident rows, for every number of rows kept.

    Attributes:
        coverage (`np.ndarray` of float64 of shape `[R]`): Fraction kept, `1/R` to 1.
        risk (`np.ndarray` of float64 of shape `[R]`): Error rate among those kept, a fraction.
    """

    coverage: np.ndarray
    risk: np.ndarray

    @property
    def aurc(self) -> float:
        """Area under the curve (mean risk over all coverages), times 1000."""
        return float(1000 * self.risk.mean())

    @property
    def eaurc(self) -> float:
        """`aurc` minus that of the best possible order of the same errors (all of them last), times 1000."""
        rows = len(self.risk)
        errors = round(self.risk[-1] * rows)
        kept = np.arange(1, rows + 1)
        return float(1000 * (self.risk - np.maximum(kept - (rows - errors), 0) / kept).mean())


def calibration_metrics(predictions: Any, labels: Any, from_logits: bool = True) -> dict[str, float]:
    """Accuracy, likelihood, calibration and ranking of a classifier.

    Args:
        predictions (`np.ndarray`, `torch.Tensor` or `tuple` of them, of shape `[R, C]` or `[B, L, C]`):
            Logits, of any float dtype, on any device; -inf is probability 0. Of a tuple (a `Trainer` hands out several
            model outputs so) the first that is not `None` is taken. With two classes also `[R]` or `[R, 1]`: the logit
            (of a sigmoid) or the probability of class 1. With `eval_do_concat_batches=False` a `list` of all this, one
            a batch, whose shapes may differ.
        labels (`np.ndarray` or `torch.Tensor` of integers, of shape `[R]`, `[R, 1]` or `[B, L]`):
            Class indices, or a `list` of them, one a batch; rows labelled -100 are left out. Causal language models:
            shift them yourself.
        from_logits (`bool`, *optional*, defaults to `True`):
            `False` if `predictions` are probabilities. A probability of exactly 0 then counts as the smallest normal
            number of its dtype (float32: 87.3 nats), so that `nll` stays finite; logits have no such limit, and a
            label whose logit is -inf makes `nll` infinite.

    Returns:
        `dict[str, float]`:
        - `accuracy`, `top5_accuracy`: fractions. Top-5 is top-`min(5, C)`, hence 1 for five classes or fewer.
        - `nll`: mean negative log-likelihood, nats, temperature 1.
        - `brier`: mean squared distance to the one-hot label, summed over classes (0 to 2).
        - `ece`, `ece_15`: expected calibration error in per cent over 10 (as published) and 15 right-closed bins.
        - `aurc`, `eaurc`: area under the risk-coverage curve and its excess over the best order, x1000. Rows of equal
          confidence share their mean risk (see [`risk_coverage_curve`]), whatever order they are stored in.

    Raises:
        `ValueError`: shapes that do not match, fewer than two classes, no labelled row, labels that are not integers
            in `[0, C)`, NaN, +inf or nothing but -inf in a labelled row, or rows that are not probabilities.

    Example:
        ```python
        calibration_metrics([[2.0, 0.0], [0.0, 1.0]], [0, 0])["accuracy"]  # 0.5
        ```
    """
    return _metrics(_require_usable(row_scores(predictions, labels, from_logits)))


def reliability_curve(predictions: Any, labels: Any, bins: int = 10, from_logits: bool = True) -> ReliabilityCurve:
    """Accuracy and mean confidence by confidence bin, the data of a reliability diagram.

    Args:
        predictions, labels, from_logits: As for [`calibration_metrics`], with the same errors.
        bins (`int`, *optional*, defaults to 10): Number of equal, right-closed bins.
    """
    if bins < 1:
        raise ValueError(f"bins: got {bins}; use at least 1 (10 as published).")
    scores = _require_usable(row_scores(predictions, labels, from_logits))
    return reliability_of(scores.confidence, scores.correct, bins)


def risk_coverage_curve(predictions: Any, labels: Any, from_logits: bool = True) -> RiskCoverageCurve:
    """Error rate among the k most confident rows, for k from 1 to R.

    Where rows have the same confidence any order among them is as good as another, so the risk is the mean over all
    those orders: it does not depend on how the rows are stored, and a constant confidence has risk = error rate at
    every coverage. (A stable sort instead would reward data sets that happen to hold their errors last.)

    Args:
        predictions, labels, from_logits: As for [`calibration_metrics`], with the same errors.
    """
    scores = _require_usable(row_scores(predictions, labels, from_logits))
    return risk_coverage_of(scores.confidence, scores.correct)


class ClassificationMetrics(BatchedMetrics):
    """A `compute_metrics` callable for `Trainer` that returns [`calibration_metrics`], also batch by batch.

    An evaluation without a labelled row, or with predictions that are no numbers, does not end the run: all metrics
    are then NaN, with a warning.

    With `batch_eval_metrics=True` it keeps five numbers a row between calls instead of the logits. One instance serves
    one evaluation at a time; [`compute_classification_metrics`] is a ready one.
    """

    def _read(self, predictions: Any, labels: Any) -> list[RowScores]:
        return [row_scores(predictions, labels)]

    def _result(self, kept: list[RowScores]) -> dict[str, float]:
        return metrics_or_nan(join_scores(kept))


compute_classification_metrics = ClassificationMetrics()


def row_scores(predictions: Any, labels: Any, from_logits: bool = True) -> RowScores:
    """Score every labelled row. There may be none, and rows that are no numbers have NaN for scores.

    Args:
        predictions, labels, from_logits: As for [`calibration_metrics`], with the same errors otherwise.
    """
    return join_scores(
        scores
        for rows, row_labels in classified_rows(predictions, labels, from_logits)
        for scores in _score_chunks(rows, row_labels, from_logits)
    )


def _score_chunks(predictions: np.ndarray, labels: np.ndarray, from_logits: bool) -> Iterator[RowScores]:
    labelled = np.flatnonzero(labels != IGNORED_LABEL)
    step = max(1, _CHUNK_VALUES // predictions.shape[1])
    for start in range(0, max(1, len(labelled)), step):
        rows = labelled[start : start + step]
        yield _score(predictions[rows], labels[rows], from_logits)


def _score(rows: np.ndarray, labels: np.ndarray, from_logits: bool) -> RowScores:
    """`rows` [R, C] and `labels` [R], all labelled -> the scores of one chunk."""
    index = np.arange(len(rows))
    if from_logits:
        probabilities, nll = _softmax(rows, labels)
        confidence = probabilities.max(axis=1)
    else:
        _check_probabilities(rows)
        probabilities = rows.astype(np.float64)
        nll = -np.log(np.maximum(probabilities[index, labels], np.finfo(rows.dtype).tiny))
        confidence = rows.max(axis=1)
    probabilities[index, labels] -= 1
    brier = np.einsum("rc,rc->r", probabilities, probabilities)
    place = _place_of_label(rows, labels)
    no_numbers = ~np.isfinite(rows.max(axis=1, initial=-np.inf))  # NaN and +inf win; -inf is left if there is no other
    for values in (confidence, nll, brier):
        values[no_numbers] = np.nan
    return RowScores(confidence, place == 0, place < 5, nll, brier)


def _softmax(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities [R, C] and negative log-likelihood [R], float64, without overflow or log(0)."""
    shifted = logits.astype(np.float64)
    with np.errstate(invalid="ignore"):  # rows of NaN or infinite logits: the caller marks them
        shifted -= shifted.max(axis=1, keepdims=True)
        at_label = shifted[np.arange(len(labels)), labels]
        probabilities = np.exp(shifted, out=shifted)
        total = probabilities.sum(axis=1)
        probabilities /= total[:, None]
        return probabilities, np.log(total) - at_label


def _place_of_label(rows: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """How many classes come before the label, [R]: larger scores, and equal scores of a smaller index."""
    own = rows[np.arange(len(labels)), labels][:, None]
    earlier = np.arange(rows.shape[1]) < labels[:, None]
    return ((rows > own) | ((rows == own) & earlier)).sum(axis=1)


def metrics_or_nan(scores: RowScores) -> dict[str, float]:
    """The metrics of [`calibration_metrics`]; NaN, with a warning, where they cannot be computed."""
    fault = _fault(scores)
    if fault is None:
        return _metrics(scores)
    logger.warning(f"{fault} The metrics of this evaluation are NaN.")
    return dict.fromkeys(METRICS, float("nan"))


def noise_of_gap(accuracy: float, samples: int) -> float:
    """
    Percentage points by which mean confidence and accuracy may differ by chance, with 95 % confidence, also where few
    samples are all right or all wrong (Agresti and Coull, The American Statistician, 1998).

    Args:
        accuracy (`float`): a fraction.
        samples (`int`): that it was measured on.
    """
    count = samples + 4
    centre = (samples * accuracy + 2) / count
    return 196 * math.sqrt(centre * (1 - centre) / count)


def perplexity(nll: float) -> float:
    """`exp(nll)`, infinite where that is too large for a number."""
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf


def _metrics(scores: RowScores) -> dict[str, float]:
    rows = scores.confidence, scores.correct
    curve = risk_coverage_of(*rows)
    return {
        "accuracy": float(scores.correct.mean()),
        "top5_accuracy": float(scores.in_top5.mean()),
        "nll": float(scores.nll.mean()),
        "brier": float(scores.brier.mean()),
        "ece": reliability_of(*rows, 10).ece,
        "ece_15": reliability_of(*rows, 15).ece,
        "aurc": curve.aurc,
        "eaurc": curve.eaurc,
    }


def reliability_of(confidence: np.ndarray, correct: np.ndarray, bins: int) -> ReliabilityCurve:
    """[`reliability_curve`] of rows by their confidence `[R]` and whether they are right `[R]`."""
    edges = np.arange(bins + 1) / bins  # i/bins, each correctly rounded: np.arange(0, 1, 0.1) would miss 0.3, 0.6, 0.7
    # The edges are compared in the dtype of the confidence; rounding may have lifted a probability above 1.
    bin_of = np.minimum(np.searchsorted(edges[1:].astype(confidence.dtype), confidence, side="left"), bins - 1)
    count = np.bincount(bin_of, minlength=bins)
    with np.errstate(invalid="ignore"):
        mean_confidence = np.bincount(bin_of, weights=confidence, minlength=bins) / count
        accuracy = np.bincount(bin_of, weights=correct, minlength=bins) / count
    return ReliabilityCurve(edges, mean_confidence, accuracy, count)


def risk_coverage_of(confidence: np.ndarray, correct: np.ndarray) -> RiskCoverageCurve:
    """[`risk_coverage_curve`] of rows by their confidence `[R]` and whether they are right `[R]`."""
    order = np.argsort(-confidence, kind="stable")
    confidence = confidence[order]
    errors = np.cumsum(~correct[order])
    last_of_tie = np.flatnonzero(np.append(confidence[1:] != confidence[:-1], True))
    kept = np.arange(1, len(order) + 1)
    # Errors grow evenly through a run of equal confidences: their expectation over the orders of that run.
    errors = np.interp(kept, np.append(0, last_of_tie + 1), np.append(0, errors[last_of_tie]))
    return RiskCoverageCurve(kept / len(order), errors / kept)


def join_scores(parts: Iterable[RowScores]) -> RowScores:
    return RowScores(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _require_usable(scores: RowScores) -> RowScores:
    fault = _fault(scores)
    if fault is not None:
        raise ValueError(fault)
    return scores


def _fault(scores: RowScores) -> str | None:
    """Why metrics of these rows cannot be computed."""
    if len(scores.correct) == 0:
        return f"labels: none is a class (all are {IGNORED_LABEL}, or there are none); pass labelled rows."
    bad = int(np.isnan(scores.confidence).sum())
    if bad:
        return (
            f"predictions: NaN, +inf or nothing but -inf in {bad} of {len(scores.correct)} labelled rows; find the "
            "step that made them."
        )
    return None


def _check_probabilities(rows: np.ndarray) -> None:
    off = np.abs(rows.sum(axis=1, dtype=np.float64) - 1)
    if (rows < 0).any() or (off > _SUM_TOLERANCE).any():
        raise ValueError(
            f"predictions: rows are not probabilities (smallest value {rows.min():.4g}, a sum differs from 1 by "
            f"{off.max():.4g}); pass from_logits=True for logits, or normalise the rows."
        )
