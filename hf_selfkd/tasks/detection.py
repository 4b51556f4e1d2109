"""Object detection: one row an object, which is what the model says at the query that it matches with the object."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers.loss.loss_d_fine import DFineForObjectDetectionLoss
from transformers.loss.loss_deformable_detr import DeformableDetrForObjectDetectionLoss
from transformers.loss.loss_for_object_detection import ForObjectDetectionLoss
from transformers.loss.loss_rt_detr import RTDetrForObjectDetectionLoss

from ..batch import Batch, BatchRecord
from ..losses.soft_targets import LOG_ZERO, log_softmax
from ..models import classes_of
from ..samples import IGNORE_INDEX, SampleIndex, sample_index
from .base import Task
from .matching import Matching, watched_matching
from .objects import KEY_NAMES, object_ids
from .rows import Rows, lazy
from .sample_classification import named


# The classification terms of the losses of transformers, by the functions that compute them.
CLASS_TERMS: dict[Callable[..., Any], str] = {
    ForObjectDetectionLoss: "softmax",
    DeformableDetrForObjectDetectionLoss: "focal",
    RTDetrForObjectDetectionLoss: "varifocal",
    DFineForObjectDetectionLoss: "varifocal",
}


@dataclass
class ObjectRows(Rows):
    """
    The predictions of the objects of a batch, `[B * L]` rows; see [`Rows`].

    Args:
        missed (`torch.BoolTensor` of shape `[R]`): objects without a query, of which nothing is to be stored.
    """

    missed: torch.Tensor | None = None

    @lazy
    def log_probs(self) -> torch.Tensor:
        """Log-probabilities without a gradient: `log_softmax`, or `log_sigmoid` of each class; NaN where missed."""
        logits = self.logits.detach()
        log_probs = F.logsigmoid(logits.float()).clamp_min_(LOG_ZERO) if self.independent else log_softmax(logits)
        return log_probs.masked_fill_(self.missed.unsqueeze(-1), torch.nan)


class ObjectDetection(Task):
    """
    One row an object.

    Labels are those of transformers' detectors: for each image a dictionary of `class_labels` `[n]`, `boxes` `[n, 4]`
    and whatever else. An object is known by the id of its image and by its own, `annotation_id` or `id` `[n]` among
    the labels of its image. Without them it is known by its place in the list, which must then stay the same.
    """

    name = "object detection"
    per_token = True
    per_object = True
    labels_move = (
        "the objects of an image change from one reading to the next, as with random crops, and have no ids: "
        "teacher='history' could not tell them apart. Put an 'annotation_id' (one integer an object) beside "
        "'class_labels' in the labels of each image, or use teacher='snapshot'"
    )

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        return named(model, classes_of("OBJECT_DETECTION"), ()) and model.loss_function in CLASS_TERMS

    @lazy
    def class_term(self) -> str:
        """`str`: how the loss of the model teaches classes; one of `CLASS_TERMS`."""
        function = getattr(self.model, "loss_function", None)
        if function not in CLASS_TERMS:
            raise ValueError(
                f"the loss of {type(self.model).__name__} is not one of transformers' for detectors: object detection "
                "needs a detector of transformers with its own loss, or set alpha=0."
            )
        return CLASS_TERMS[function]

    @property
    def independent(self) -> bool:
        return self.class_term != "softmax"

    @property
    def num_classes(self) -> int | None:
        return getattr(getattr(self.model, "config", None), "num_labels", None)

    def split(self, inputs: dict[str, Any], record: BatchRecord | None = None) -> Batch:
        inputs, record = dict(inputs), BatchRecord() if record is None else record
        name = next((name for name in self.label_names if name in inputs), None)
        if name is None or not _is_of_objects(inputs[name]):
            found = f"only {', '.join(inputs)}" if name is None else f"{name} that are a {type(inputs[name]).__name__}"
            raise ValueError(
                f"the batch has {found}: object detection needs 'labels', a list of one dictionary an image with "
                "class_labels and boxes. Set remove_unused_columns=False and collate labels into a list."
            )
        if record.partner is not None:
            raise ValueError(
                "mixed images with object detection: the boxes are not mixed. Set mixup_alpha=0 and cutmix_alpha=0."
            )
        targets = inputs.pop(name)
        samples = record.samples
        if samples is None and record.ids is not None:
            samples = self.sample_index(record.ids, targets)
        table = self.label_table(targets)
        return Batch(inputs, table, name, record.ids, samples, targets=targets)

    def accepts(self, inputs: dict[str, Any]) -> bool:
        return any(_is_of_objects(inputs[name]) for name in self.label_names if name in inputs)

    def label_table(self, labels: Any) -> Any:
        """Classes `[B, L]`, -100 where an image has fewer objects; one column at least."""
        if not _is_of_objects(labels):
            return labels
        classes = [target["class_labels"].long() for target in labels]
        table = classes[0].new_full((len(classes), max(1, *map(len, classes))), IGNORE_INDEX)
        for row, values in zip(table, classes, strict=True):
            row[: len(values)] = values
        return table

    def constant_labels(self, labels: Any) -> Any:
        """The classes of the objects that have no ids."""
        if not _is_of_objects(labels):
            return labels
        return [None if set(KEY_NAMES) & set(target) else target["class_labels"] for target in labels]

    def num_items(self, labels: Any) -> torch.Tensor:
        """Images: what the losses of detectors are, up to the weights of their terms, means over."""
        return torch.tensor(len(labels))

    def sample_index(self, ids: np.ndarray, labels: Any) -> SampleIndex:
        """
        Where the predictions of objects are kept: each is a sample by itself.

        Args:
            ids (`np.ndarray` of `int64`, shape `[B]`): of the images.
            labels (`list` of `dict`): of the images.
        """
        table = self.label_table(labels).cpu()
        found, named_by_id = object_ids(ids, labels)
        images = sample_index(ids, table)
        counts = images.counts
        # An object with an id has the hash of its class, others that of the list in which they have their places.
        of_image = np.repeat(images.label_hash, counts)
        classes = table.numpy().reshape(-1)[images.rows].astype(np.int64)
        return SampleIndex(
            found,
            np.where(np.repeat(named_by_id, counts), classes, of_image),
            images.total,
            np.ones(len(found), dtype=np.int64),
            images.rows,
            images.extremes,
            items=len(ids),
        )

    def predict(self, run: Callable[[dict[str, Any]], Any], batch: Batch) -> ObjectRows:
        """
        The rows that a model gives. The model is shown the labels, to match its own queries with the objects.

        Args:
            run (`Callable`): from inputs of the model, or of a copy that is run in its place, to outputs.
            batch ([`~hf_selfkd.batch.Batch`]): as [`~Task.split`] gave it.
        """
        with watched_matching(self.model) as seen:
            run(batch.inputs | {batch.label_name: batch.targets})
        return self.matched_rows(seen.matching, batch.labels)

    def matched_rows(self, matching: Matching, labels: torch.Tensor) -> ObjectRows:
        """
        The rows of the objects of a batch.

        Args:
            matching ([`~hf_selfkd.tasks.matching.Matching`]): what the loss of the model matched.
            labels (`torch.LongTensor` of shape `[B, L]`): their classes.
        """
        rows, images, queries = matching.places(labels.shape[1])
        logits = matching.logits.new_zeros(labels.numel(), matching.logits.shape[-1])
        logits = logits.index_put((rows,), matching.logits[images, queries])
        matched = torch.zeros(labels.numel(), dtype=torch.bool, device=labels.device)
        matched[rows] = True
        known = torch.where(matched, labels.reshape(-1), IGNORE_INDEX)
        return ObjectRows(logits, known, independent=self.independent, missed=~matched)


def _is_of_objects(labels: Any) -> bool:
    """Whether these are the labels of images with objects."""
    return (
        isinstance(labels, (list, tuple))
        and len(labels) > 0
        and all(isinstance(part, Mapping) and "class_labels" in part for part in labels)
    )
