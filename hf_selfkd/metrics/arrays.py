"""What users hand to metrics, as NumPy arrays: tensors, tuples of model outputs, lists of batches, binary scores."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np


IGNORED_LABEL = -100  # of a row or token that has no label and counts for nothing


def classified_rows(predictions: Any, labels: Any, from_logits: bool) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """
    Predictions as floats `[R, C]` and labels as int64 `[R]`, ignored rows included: of each batch, where
    `eval_do_concat_batches=False` makes lists of batches, or else of everything.
    """
    for part, label in split_batches(predictions, labels):
        yield _checked_rows(first_output(part, label), label, from_logits)


def split_batches(predictions: Any, labels: Any, label_dimensions: int = 1) -> Iterator[tuple[Any, Any]]:
    """
    Pairs of predictions and labels: one a batch where both are lists of batches, else a single one.

    Args:
        label_dimensions (`int`, *optional*, defaults to 1): those that the labels of a batch have at least.
    """
    if labels is None:
        raise ValueError("labels: None; pass the labels, which the predictions are compared with.")
    if not (isinstance(predictions, list) and isinstance(labels, (list, tuple)) and predictions and len(labels)):
        yield predictions, labels
        return
    first = predictions[0]
    of_batches = hasattr(first, "shape") or isinstance(first, tuple) or _dimensions(first) >= 2
    if not of_batches or _dimensions(labels[0]) < label_dimensions:
        yield predictions, labels
        return
    if len(predictions) != len(labels):
        raise ValueError(f"labels: {len(labels)} batches for {len(predictions)} of predictions; pass one for each.")
    yield from zip(predictions, labels, strict=True)


def first_output(predictions: Any, labels: Any) -> Any:
    """Of a tuple of model outputs the first that is not `None`; anything else as it is."""
    if not isinstance(predictions, tuple):
        return predictions
    outputs = [output for output in predictions if output is not None]
    if not outputs:
        return predictions
    first = outputs[0]
    if len(outputs) < len(predictions) or _dimensions(first) >= 2:
        return first
    # Scores of a binary classifier with further outputs; as many outputs as labels would be rows.
    binary = hasattr(first, "shape") and _dimensions(first) == 1
    rows = len(labels) if _dimensions(labels) else None
    return first if binary and len(first) == rows != len(predictions) else predictions


def as_array(values: Any, field: str) -> np.ndarray:
    """A NumPy array of numbers, from any device."""
    try:
        array = np.asarray(_on_host(values))
        if array.dtype.kind in "OSU":
            raise TypeError(f"its dtype would be {array.dtype}")
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{field}: got {type(values).__name__} that is no array of numbers ({error}); pass one array or tensor."
        ) from error
    return array


def _on_host(values: Any) -> Any:
    if hasattr(values, "detach"):  # a tensor; asking so keeps torch from being imported here
        values = values.detach().cpu()
        return values.float() if "float8" in str(values.dtype) or "bfloat16" in str(values.dtype) else values
    if isinstance(values, (list, tuple)) and any(hasattr(value, "detach") for value in values):
        return [np.asarray(_on_host(value)) for value in values]
    return values


def _dimensions(values: Any) -> int:
    """Dimensions of an array, a tensor or nested sequences, which may be ragged."""
    if hasattr(values, "ndim"):
        return values.ndim
    if not isinstance(values, (list, tuple)):
        return 0
    return 1 + _dimensions(values[0]) if len(values) else 1


def _checked_rows(predictions: Any, labels: Any, from_logits: bool) -> tuple[np.ndarray, np.ndarray]:
    predictions, labels = as_array(predictions, "predictions"), as_array(labels, "labels")
    if labels.ndim == 2 and labels.shape[1] == 1 and predictions.ndim <= 2:
        labels = labels[:, 0]
    if predictions.ndim == 1 and predictions.shape == labels.shape and predictions.size:
        if predictions.dtype.kind in "biu":
            raise ValueError(
                f"predictions: integers of shape {predictions.shape} are classes; pass the scores that they were "
                "chosen by."
            )
        predictions = predictions[:, None]
    if predictions.ndim < 2 or labels.shape != predictions.shape[:-1]:
        raise ValueError(
            f"labels: shape {labels.shape} does not fit predictions of shape {predictions.shape}; pass predictions "
            "[R, C] with class indices [R], or [B, L, C] with [B, L], or [R] of the second of two classes with [R]."
        )
    if predictions.dtype.kind != "f":
        predictions = predictions.astype(np.float64)
    if predictions.ndim == 2 and predictions.shape[1] == 1:
        predictions = _both_classes(predictions, from_logits)
    return predictions.reshape(-1, predictions.shape[-1]), _checked_labels(labels, predictions.shape[-1])


def _both_classes(scores: np.ndarray, from_logits: bool) -> np.ndarray:
    """Scores `[R, 1]` of the second of two classes -> those of both, `[R, 2]`."""
    return np.concatenate([np.zeros_like(scores) if from_logits else 1 - scores, scores], axis=1)


def _checked_labels(labels: np.ndarray, classes: int) -> np.ndarray:
    if classes < 2:
        raise ValueError(f"predictions: {classes} class in the last dimension; pass one score per class, at least 2.")
    if labels.size and labels.dtype.kind not in "iub":
        raise ValueError(f"labels: dtype {labels.dtype} is not an integer type; pass class indices.")
    labels = labels.reshape(-1).astype(np.int64)
    outside = labels[(labels != IGNORED_LABEL) & ((labels < 0) | (labels >= classes))]
    if outside.size:
        raise ValueError(
            f"labels: {outside[0]} is outside 0..{classes - 1}; check the number of classes, or use {IGNORED_LABEL} "
            "for rows to leave out."
        )
    return labels
