"""Metrics of semantic segmentation, in NumPy: intersection over union, accuracy and calibration of the pixels."""

from __future__ import annotations

import functools
import logging
import math
import operator
from dataclasses import dataclass
from typing import Any

import numpy as np

from .arrays import IGNORED_LABEL, as_array, first_output, split_batches
from .batched import BatchedMetrics


logger = logging.getLogger(__name__)

SEGMENTATION_METRICS = ("mean_iou", "mean_accuracy", "pixel_accuracy", "nll", "ece")
BINS = 10


@dataclass
class PixelSums:
    """
    What metrics need of pixels, added up.

    Args:
        confusion (`np.ndarray` of `int64`, shape `[C, C]`): pixels by class and by predicted class.
        losses (`float`): sum of their `-log p` of the class.
        bins (`np.ndarray` of shape `[3, 10]`): pixels, right ones and the sum of confidences, by confidence.
    """

    confusion: np.ndarray
    losses: float
    bins: np.ndarray

    def __add__(self, other: PixelSums) -> PixelSums:
        if self.confusion.shape != other.confusion.shape:
            raise ValueError(
                f"predictions: {len(self.confusion)} classes in one batch and {len(other.confusion)} in another; pass "
                "those of one model."
            )
        return PixelSums(self.confusion + other.confusion, self.losses + other.losses, self.bins + other.bins)


def segmentation_metrics(predictions: Any, labels: Any, ignore_index: int = 255) -> dict[str, float]:
    """Overlap, accuracy, likelihood and calibration of a semantic segmentation, over all pixels that have a class.

    Args:
        predictions (`np.ndarray`, `torch.Tensor` or `tuple` of them, of shape `[N, C, h, w]`):
            Logits, of any float dtype, on any device. They are interpolated (bilinear, as the losses of transformers
            do) to the size of the labels. With `eval_do_concat_batches=False` a `list`, one a batch.
        labels (`np.ndarray` or `torch.Tensor` of shape `[N, H, W]`): Classes, or a `list`, one a batch.
        ignore_index (`int`, *optional*, defaults to `255`): Pixels with this label, or with -100, are left out.

    Returns:
        `dict[str, float]`:
        - `mean_iou`: pixels of a class that are told to be so over those that are or are told to be, averaged over the
          classes that are or are told to be anywhere.
        - `mean_accuracy`: share of the pixels of a class that are told to be so, averaged over the classes that have
          pixels.
        - `pixel_accuracy`: share of the pixels whose class is the argmax.
        - `nll`: mean of `-log p[class]`, nats.
        - `ece`: calibration error of the pixels in per cent, 10 right-closed bins.

    Raises:
        `ValueError`: shapes that do not match, labels that are no classes, NaN, or no pixel that has a class.

    Example:
        ```python
        segmentation_metrics([[[[2.0, -1.0]], [[0.0, 0.0]]]], [[[0, 0]]])["pixel_accuracy"]  # 0.5
        ```
    """
    sums = _sums_of(predictions, labels, ignore_index)
    if not np.isfinite(sums.losses):
        raise ValueError("predictions: NaN for a pixel; pass numbers.")
    return _metrics(sums)


class SegmentationMetrics(BatchedMetrics):
    """A `compute_metrics` callable for `Trainer` that returns [`segmentation_metrics`], also batch by batch.

    With `batch_eval_metrics=True` the logits of a batch are forgotten before the next one. Predictions that are no
    numbers do not end the run: all metrics are then NaN, with a warning. One instance serves one evaluation at a time;
    [`compute_segmentation_metrics`] is a ready one.

    Args:
        ignore_index (`int`, *optional*, defaults to `255`): Pixels with this label, or with -100, are left out.
    """

    def __init__(self, ignore_index: int = 255) -> None:
        super().__init__()
        self.ignore_index = ignore_index

    def _read(self, predictions: Any, labels: Any) -> list[PixelSums]:
        return [_sums_of(predictions, labels, self.ignore_index)]

    def _add(self, kept: list[PixelSums], read: list[PixelSums]) -> list[PixelSums]:
        return [functools.reduce(operator.add, kept + read)]  # of many classes the sums of a batch are large

    def _result(self, kept: list[PixelSums]) -> dict[str, float]:
        (sums,) = kept
        if not np.isfinite(sums.losses):
            logger.warning("predictions: NaN; the metrics of this evaluation are NaN.")
            return dict.fromkeys(SEGMENTATION_METRICS, math.nan)
        return _metrics(sums)


compute_segmentation_metrics = SegmentationMetrics()


def _sums_of(predictions: Any, labels: Any, ignore_index: int) -> PixelSums:
    sums = None
    for part, label in split_batches(predictions, labels, label_dimensions=3):
        logits, classes = _checked(first_output(part, label), label, ignore_index)
        for image, pixels in zip(logits, classes, strict=True):
            own = _sums_of_image(image, pixels)
            sums = own if sums is None else sums + own
    if sums is None:
        raise ValueError("predictions: no image; pass at least one.")
    return sums


def _checked(predictions: Any, labels: Any, ignore_index: int) -> tuple[np.ndarray, np.ndarray]:
    logits, labels = as_array(predictions, "predictions"), as_array(labels, "labels")
    if logits.ndim != 4 or labels.ndim != 3 or len(logits) != len(labels):
        raise ValueError(
            f"labels: shape {labels.shape} does not fit predictions of shape {logits.shape}; pass logits "
            "[N, C, h, w] and classes [N, H, W]."
        )
    labels = np.where(labels == ignore_index, IGNORED_LABEL, labels.astype(np.int64))
    outside = labels[(labels != IGNORED_LABEL) & ((labels < 0) | (labels >= logits.shape[1]))]
    if outside.size:
        raise ValueError(
            f"labels: {outside[0]} is outside 0..{logits.shape[1] - 1}; check the number of classes, or use "
            f"{ignore_index} for pixels to leave out."
        )
    return logits, labels


def _sums_of_image(logits: np.ndarray, labels: np.ndarray) -> PixelSums:
    classes, known = len(logits), labels != IGNORED_LABEL
    rows, columns = (_interpolation(old, new) for old, new in zip(logits.shape[1:], labels.shape, strict=True))
    pixels = (rows @ logits.astype(np.float64) @ columns.T)[:, known]
    labels = labels[known]
    pixels = pixels - pixels.max(axis=0, initial=-np.inf)
    log_probs = pixels - np.log(np.exp(pixels).sum(axis=0))
    told, confidence = log_probs.argmax(axis=0), np.exp(log_probs.max(axis=0, initial=-np.inf))
    confusion = np.bincount(labels * classes + told, minlength=classes**2).reshape(classes, classes)
    places = np.clip(np.ceil(np.nan_to_num(confidence) * BINS).astype(int) - 1, 0, BINS - 1)
    bins = [np.bincount(places, weight, BINS) for weight in (np.ones(len(told)), told == labels, confidence)]
    return PixelSums(confusion, float(-log_probs[labels, np.arange(len(labels))].sum()), np.stack(bins))


def _interpolation(old: int, new: int) -> np.ndarray:
    """The matrix `[new, old]` of bilinear interpolation along a line, edges not aligned."""
    places = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, None)
    low = np.minimum(places.astype(int), old - 1)
    high, share = np.minimum(low + 1, old - 1), places - low
    matrix = np.zeros((new, old))
    np.add.at(matrix, (np.arange(new), low), 1 - share)
    np.add.at(matrix, (np.arange(new), high), share)
    return matrix


def _metrics(sums: PixelSums) -> dict[str, float]:
    count = sums.confusion.sum()
    if count == 0:
        raise ValueError("labels: no pixel has a class; pass some that do.")
    right, are, told = sums.confusion.diagonal(), sums.confusion.sum(axis=1), sums.confusion.sum(axis=0)
    union = are + told - right
    return {
        "mean_iou": float((right[union > 0] / union[union > 0]).mean()),
        "mean_accuracy": float((right[are > 0] / are[are > 0]).mean()),
        "pixel_accuracy": float(right.sum() / count),
        "nll": float(sums.losses / count),
        "ece": float(100 * np.abs(sums.bins[1] - sums.bins[2]).sum() / count),
    }
