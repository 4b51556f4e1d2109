"""Metrics of detectors: average precision, and how far scores are from the precision of what they are said of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np

from .arrays import as_array, split_batches
from .batched import BatchedMetrics
from .calibration import reliability_of


DETECTION_METRICS = ("map", "map_50", "map_75", "d_ece")
BINS = 10


def detection_metrics(
    predictions: Sequence[Mapping[str, Any]],
    targets: Sequence[Mapping[str, Any]],
    class_names: Sequence[str] | None = None,
    iou_threshold: float = 0.5,
    score_threshold: float = 0.3,
) -> dict[str, float]:
    """Average precision and calibration of the detections in some images.

    Args:
        predictions (`Sequence` of `dict`, one an image):
            `boxes` `[n, 4]` (left, top, right, bottom in pixels), `scores` `[n]` in 0..1 and `labels` `[n]`.
        targets (`Sequence` of `dict`, one an image):
            `boxes` `[m, 4]`, `labels` `[m]` and, where a box is of a crowd, `iscrowd` `[m]`.
        class_names (`Sequence[str]`, *optional*): Adds `map_<name>`, the average precision of each class.
        iou_threshold (`float`, *optional*, defaults to 0.5): Of `d_ece`, as in [`detection_ece`].
        score_threshold (`float`, *optional*, defaults to 0.3): Of `d_ece`, as in [`detection_ece`].

    Returns:
        `dict[str, float]`:
        - `map`: COCO's average precision, the mean over the classes that are there and IoU 0.50, 0.55, ... 0.95.
        - `map_50`, `map_75`: the same at an IoU of 0.5 and 0.75.
        - `d_ece`: [`detection_ece`], per cent.
        NaN where it cannot be told: without objects, or for `d_ece` without detections.

    Raises:
        `ImportError`: without torchmetrics and faster-coco-eval.
        `ValueError`: if images or boxes do not match.
    """
    import torch

    check_detection_extra()
    from torchmetrics.detection import MeanAveragePrecision

    predictions, targets = _checked(predictions, targets)
    measure = MeanAveragePrecision(class_metrics=class_names is not None, backend="faster_coco_eval")
    measure.warn_on_many_detections = False
    as_tensors = [[{k: torch.from_numpy(v) for k, v in image.items()} for image in s] for s in (predictions, targets)]
    measure.update(*as_tensors)
    found = measure.compute()
    result = {name: _known(found[name]) for name in DETECTION_METRICS[:3]}
    result["d_ece"] = detection_ece(predictions, targets, iou_threshold, score_threshold)
    if class_names is not None:
        shares = dict(zip(found["classes"].reshape(-1).tolist(), found["map_per_class"].reshape(-1), strict=True))
        result |= {f"map_{name}": _known(shares.get(label, -1)) for label, name in enumerate(class_names)}
    return result


def detection_ece(
    predictions: Sequence[Mapping[str, Any]],
    targets: Sequence[Mapping[str, Any]],
    iou_threshold: float = 0.5,
    score_threshold: float = 0.3,
    bins: int = BINS,
) -> float:
    """Detection calibration error by confidence alone (D-ECE, Küppers et al., CVPR Workshops 2020).

    Detections are put into bins of equal width by their score; in each the mean score is compared with the precision,
    the share of detections that are right (see [`detections_that_are_right`]).

    Args:
        predictions, targets: As in [`detection_metrics`].
        iou_threshold (`float`, *optional*, defaults to 0.5): Overlap from which on a detection may be right.
        score_threshold (`float`, *optional*, defaults to 0.3):
            Detections of lower scores are left out: a detector has hundreds of them in every image, and they would
            be most of what is measured.
        bins (`int`, *optional*, defaults to 10): Right-closed bins over 0..1.

    Returns:
        `float`: per cent; NaN without detections.
    """
    scores, right = detections_that_are_right(predictions, targets, iou_threshold, score_threshold)
    return float(reliability_of(scores, right, bins).ece) if len(scores) else math.nan


def detections_that_are_right(
    predictions: Sequence[Mapping[str, Any]],
    targets: Sequence[Mapping[str, Any]],
    iou_threshold: float = 0.5,
    score_threshold: float = 0.3,
) -> tuple[np.ndarray, np.ndarray]:
    """The scores of all detections, and which of them are right.

    As in COCO's evaluation: in the order of their scores, each takes the object of its class that it overlaps most, of
    those that are left and that it overlaps enough. One that finds none is wrong, or left out if `iou_threshold` of it
    lies in a crowd of its class.

    Args:
        predictions, targets, iou_threshold, score_threshold: As in [`detection_ece`].

    Returns:
        `tuple`: scores `[n]`, float64, and whether the detections are right `[n]`, bool.
    """
    found = [
        _right_of_image(prediction, target, iou_threshold, score_threshold)
        for prediction, target in zip(*_checked(predictions, targets), strict=True)
    ]
    scores, right = ([part[i] for part in found] for i in (0, 1))
    return np.concatenate([np.empty(0), *scores]), np.concatenate([np.empty(0, bool), *right])


class DetectionMetrics(BatchedMetrics):
    """A `compute_metrics` callable for `Trainer` that returns [`detection_metrics`], also batch by batch.

    Predictions are `[B, K, 6]`: left, top, right, bottom, score and class of a detection; labels `[B, L, 6]`: left,
    top, right, bottom, class of an object and whether it is a crowd. Rows of -100 are padding.

    Args:
        class_names (`Sequence[str]`, *optional*): Adds the average precision of each class.
        iou_threshold (`float`, *optional*, defaults to 0.5): Of `d_ece`, as in [`detection_ece`].
        score_threshold (`float`, *optional*, defaults to 0.3): Of `d_ece`, as in [`detection_ece`].

    Raises:
        `ImportError`: without torchmetrics and faster-coco-eval, before anything is trained.
    """

    def __init__(
        self, class_names: Sequence[str] | None = None, iou_threshold: float = 0.5, score_threshold: float = 0.3
    ) -> None:
        super().__init__()
        check_detection_extra()
        self.options = (class_names, iou_threshold, score_threshold)
        self.signatures: dict[str, str] = {}

    def _read(self, predictions: Any, labels: Any) -> list[tuple[dict, dict]]:
        images: list[tuple[dict, dict]] = []
        for detections, objects in split_batches(predictions, labels, label_dimensions=3):
            images += zip(detections_of(detections), objects_of(objects), strict=True)
        return images

    def _result(self, kept: list[tuple[dict, dict]]) -> dict[str, float]:
        predictions, targets = (list(part) for part in zip(*kept, strict=True))
        _, iou, score = self.options
        counted = len(detections_that_are_right(predictions, targets, iou, score)[0])
        self.signatures = {"d_ece": f"IoU {iou:g}, scores from {score:g}, {BINS} bins, {counted} detections"}
        return detection_metrics(predictions, targets, *self.options)


def detections_of(table: Any) -> list[dict[str, np.ndarray]]:
    """From `[B, K, 6]` of a [`DetectionMetrics`] to the predictions of [`detection_metrics`], without padding."""
    kept = [image[image[:, 5] >= 0] for image in as_array(table, "predictions").astype(np.float64)]
    return [{"boxes": i[:, :4], "scores": i[:, 4], "labels": i[:, 5].astype(np.int64)} for i in kept]


def objects_of(table: Any) -> list[dict[str, np.ndarray]]:
    """From `[B, L, 6]` of a [`DetectionMetrics`] to the targets of [`detection_metrics`], without padding."""
    kept = [image[image[:, 4] >= 0] for image in as_array(table, "labels").astype(np.float64)]
    return [{"boxes": i[:, :4], "labels": i[:, 4].astype(np.int64), "iscrowd": i[:, 5].astype(np.int64)} for i in kept]


def check_detection_extra() -> None:
    """
    Raises:
        `ImportError`: if what average precision needs is not installed.
    """
    missing = [name for name in ("torchmetrics", "faster_coco_eval") if find_spec(name) is None]
    if missing:
        raise ImportError(
            f"mAP needs {' and '.join(missing).replace('_', '-')}: `pip install hf_selfkd[detection]`, or use "
            "`hf_selfkd.metrics.detection_ece`, which does without."
        )


def _known(value: Any) -> float:
    """COCO says -1 where there is nothing to say."""
    return float(value) if float(value) >= 0 else math.nan


def _checked(predictions: Any, targets: Any) -> tuple[list[dict], list[dict]]:
    """NumPy arrays of all images."""
    if len(predictions) != len(targets):
        raise ValueError(
            f"predictions: {len(predictions)} images, but targets have {len(targets)}; pass both of each."
        )
    given = [_arrays(image, "predictions", ("boxes", "scores", "labels")) for image in predictions]
    wanted = [_arrays(image, "targets", ("boxes", "labels")) for image in targets]
    for image, target in zip(wanted, targets, strict=True):
        crowds = target.get("iscrowd")
        empty = np.zeros(len(image["labels"]), dtype=np.int64)
        image["iscrowd"] = empty if crowds is None else as_array(crowds, "targets['iscrowd']").astype(np.int64)
    return given, wanted


def _arrays(image: Mapping[str, Any], field: str, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    found = {name: as_array(image[name], f"{field}[{name!r}]") for name in names}
    found["boxes"] = found["boxes"].reshape(-1, 4).astype(np.float64)
    sizes = {name: len(values) for name, values in found.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"{field}: an image has {sizes}; give one of each for every box.")
    return found | {"labels": found["labels"].astype(np.int64)}


def _right_of_image(prediction: dict, target: dict, iou_threshold: float, score_threshold: float) -> tuple:
    """Scores of the detections of an image that count, and which of them are right."""
    order = np.argsort(-prediction["scores"], kind="stable")
    order = order[prediction["scores"][order] >= score_threshold]
    boxes, labels, scores = (prediction[name][order] for name in ("boxes", "labels", "scores"))
    crowd = target["iscrowd"].astype(bool)
    same = labels[:, None] == target["labels"]
    shared = _overlap(boxes, target["boxes"])
    areas, own = _area(boxes)[:, None], _area(target["boxes"])
    free = np.where(same & ~crowd, shared / np.maximum(areas + own - shared, 1e-12), -1)
    in_crowd = (np.where(same & crowd, shared / np.maximum(areas, 1e-12), -1) >= iou_threshold).any(axis=1)
    right = np.zeros(len(order), dtype=bool)
    for n in range(len(order)):
        best = int(free[n].argmax()) if free.shape[1] else -1
        if best >= 0 and free[n, best] >= iou_threshold:
            right[n], free[:, best] = True, -1
    counts = right | ~in_crowd
    return scores[counts].astype(np.float64), right[counts]


def _area(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def _overlap(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Areas that boxes `[n, 4]` and `[m, 4]` share, `[n, m]`."""
    low, high = np.maximum(one[:, None, :2], other[:, :2]), np.minimum(one[:, None, 2:], other[:, 2:])
    return np.prod(np.maximum(high - low, 0), axis=-1)
