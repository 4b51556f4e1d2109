"""Semantic segmentation: one row for each place of the map of logits, which stands for the pixels around it."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..batch import Batch, BatchRecord
from ..models import base_model, classes_of, evaluating, is_stock, logits_of
from ..samples import IGNORE_INDEX, SampleIndex, sample_index
from .base import Task
from .maps import blocks_of, counts_of, labels_of_blocks
from .rows import Rows
from .sample_classification import named


_NO_CLASS = -1  # stands for -100 where another number means "ignored"


@dataclass
class MapRows(Rows):
    """
    The predictions of the places of maps `[B, C, h, w]`, `B * h * w` rows; see [`Rows`]. The weight of a place is the
    number of its labelled pixels.

    Args:
        maps (`torch.FloatTensor` of shape `[B, C, h, w]`): the logits as the model gave them.
        pixels (`torch.LongTensor` of shape `[B, H, W]`): the labels, -100 for pixels that do not count.
    """

    maps: torch.Tensor | None = None
    pixels: torch.Tensor | None = None

    def hard_sum(self, labels: torch.Tensor) -> torch.Tensor:
        """
        The sum of the cross-entropies of the labelled pixels of some places, between which logits are interpolated as
        the losses of transformers do.

        Args:
            labels (`torch.LongTensor` of shape `[R]`): of the places, -100 for those whose pixels do not count.
        """
        size, (height, width) = self.pixels.shape[-2:], self.maps.shape[-2:]
        lines, columns = blocks_of(size[0], height, labels.device), blocks_of(size[1], width, labels.device)
        counts = (labels != IGNORE_INDEX).view(-1, height, width)[:, lines][:, :, columns]
        full = F.interpolate(self.maps, size=size, mode="bilinear", align_corners=False)
        return F.cross_entropy(full.float(), torch.where(counts, self.pixels, IGNORE_INDEX), reduction="sum")


class SampleMaps(SampleIndex):
    """
    Where the predictions of images are kept: all places of a map, labelled or not. How many there are is found out
    when a history first asks.

    Args:
        found ([`~hf_selfkd.samples.SampleIndex`]): of the images.
        places (`Callable`): gives the number of places of a map.
    """

    def __init__(self, found: SampleIndex, places: Callable[[], int]):
        self.ids, self.label_hash, self.extremes = found.ids, found.label_hash, found.extremes
        self.items, self.total, self._places = found.num_items, -1, places  # how many are labelled nobody has counted

    @property
    def num_rows(self) -> int:
        return len(self.ids) * self._places()

    @property
    def counts(self) -> np.ndarray:
        return np.full(len(self.ids), self._places())

    @property
    def rows(self) -> np.ndarray:
        return np.arange(self.num_rows)


class SemanticSegmentation(Task):
    """
    One row for each place of the map of logits `[B, C, h, w]`, whatever the size of the labels `[B, H, W]`. A place
    stands for the pixels that are nearest to it, and counts as many times as it has labelled ones.

    Pixels with the number that the configuration names (`semantic_loss_ignore_index`, 255) do not count.
    """

    name = "semantic segmentation"
    per_token = True
    mappings = ("SEMANTIC_SEGMENTATION",)
    suffixes = ("ForSemanticSegmentation",)
    unmixed = "a pixel of a mixture belongs to two images, which is not supported"
    unsmoothed = "labels have another size than logits"
    headless = "heads tell classes of images or positions, not of pixels"
    unranked = "a place of the logits may stand for pixels of several classes"
    many_rows = "a history would hold a row for each place of the logits of each image"
    untraced = "an image has a class for each pixel"
    labels_move = (
        "the labels of an image change from one reading to the next, as with random crops and flips: "
        "teacher='history' would compare predictions of other pixels. Use teacher='snapshot'"
    )

    def __init__(self, model: nn.Module, label_names: tuple[str, ...] = ("labels",)):
        super().__init__(model, label_names)
        config = getattr(self.model, "config", None)
        found = [getattr(config, f"{name}loss_ignore_index", None) for name in ("semantic_", "")]
        self.ignored: int = next((number for number in found if number is not None), IGNORE_INDEX)
        self._sizes: dict[tuple, tuple[int, int]] = {}  # of maps, by the shapes of inputs; measured, never changed
        if getattr(config, "num_labels", 2) == 1 and is_stock(self.model):
            raise ValueError(
                f"num_labels=1 with {self.name}: one score a pixel has no classes to learn from. Set num_labels=2."
            )

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        return named(model, classes_of(*cls.mappings), cls.suffixes)

    @property
    def adds_auxiliary(self) -> bool:
        """`bool`: whether the loss of the model has the term of an auxiliary head of its own beside cross-entropy."""
        return isinstance(getattr(self.model, "auxiliary_head", None), nn.Module)

    def split(self, inputs: dict[str, Any], record: BatchRecord | None = None) -> Batch:
        batch = super().split(inputs, record)
        if batch.samples is not None:
            batch.samples = SampleMaps(batch.samples, lambda: int(np.prod(self.size_of_maps(batch.inputs))))
        return batch

    def labels_in(self, inputs: Any) -> Any:
        """The labels `[B, H, W]` with -100 for pixels that do not count."""
        labels = super().labels_in(inputs)
        if not isinstance(labels, torch.Tensor) or labels.is_floating_point() or labels.dtype == torch.bool:
            return labels
        labels = labels.long()
        if self.ignored == IGNORE_INDEX:
            return labels
        known = torch.where(labels == IGNORE_INDEX, _NO_CLASS, labels)
        return torch.where(labels == self.ignored, IGNORE_INDEX, known)

    def checked_labels(self, labels: Any) -> torch.Tensor:
        labels = super().checked_labels(labels)
        if labels.dim() != 3:
            raise ValueError(f"labels of shape {list(labels.shape)}: {self.name} needs [batch, height, width].")
        return labels

    def misfit(self, label: int, sample: str, num_classes: int) -> str:
        found = "below 0 (-100 among them)" if label == _NO_CLASS else str(label)
        return (
            f"a label of {sample} is {found}, and none of the {num_classes} classes of the model: set num_labels of "
            f"the model, or give {self.ignored} to the pixels to ignore, as its configuration has it."
        )

    def sample_index(self, ids: np.ndarray, labels: torch.Tensor) -> SampleIndex:
        """
        What the host knows of the images: what the loss is a mean over are the labelled pixels.

        Args:
            ids (`np.ndarray` of `int64`, shape `[B]`): sample ids.
            labels (`torch.LongTensor` of shape `[B, H, W]`): their labels, on the CPU.
        """
        table = np.ascontiguousarray(labels.numpy())
        shape = str(table.shape[1:]).encode()
        hashes = [zlib.crc32(image.tobytes(), zlib.crc32(shape)) for image in table]
        found = sample_index(ids, torch.tensor(hashes))
        known, flat = table != IGNORE_INDEX, table.reshape(len(table), -1)
        ends = []
        if known.any():
            low = np.where(known, table, np.iinfo(np.int64).max).reshape(flat.shape).min(1)
            high = flat.max(1)
            ends = [(int(low.min()), int(ids[low.argmin()])), (int(high.max()), int(ids[high.argmax()]))]
        return replace(found, total=int(known.sum()), extremes=tuple(ends))

    def shown(self, labels: torch.Tensor) -> torch.Tensor:
        return labels.masked_fill(labels == IGNORE_INDEX, self.ignored)

    def size_of_maps(self, inputs: dict[str, Any]) -> tuple[int, int]:
        """
        Height and width of the logits: the model is run on one image of each size, in evaluation mode.

        Args:
            inputs (`dict`): of the model.
        """
        size = max(len(value) for value in inputs.values() if isinstance(value, torch.Tensor) and value.dim())
        one = {name: value[:1] if _is_batch(value, size) else value for name, value in inputs.items()}
        shapes = tuple(tuple(value.shape) for value in one.values() if isinstance(value, torch.Tensor))
        if shapes not in self._sizes:
            with evaluating(self.model):
                self._sizes[shapes] = tuple(self.logits(base_model(self.wrapped)(**one), has_loss=False).shape[-2:])
        return self._sizes[shapes]

    def logits(self, outputs: Any, has_loss: bool) -> torch.Tensor:
        logits = logits_of(outputs, has_loss)
        if logits.dim() != 4:
            raise ValueError(
                f"logits of shape {list(logits.shape)}: {self.name} needs [batch, classes, height, width]."
            )
        return logits

    def rows(self, logits: torch.Tensor, labels: torch.Tensor) -> MapRows:
        if logits.dim() != 4 or labels.dim() != 3 or len(logits) != len(labels):
            raise ValueError(
                f"logits of shape {list(logits.shape)} with labels of shape {list(labels.shape)}: {self.name} needs "
                "[batch, classes, height, width] and [batch, height, width]."
            )
        weights = counts_of(labels != IGNORE_INDEX, logits.shape[-2:])
        return MapRows(
            logits.permute(0, 2, 3, 1).reshape(-1, logits.shape[1]),
            labels_of_blocks(labels, weights).reshape(-1),
            weights=weights.reshape(-1),
            maps=logits,
            pixels=labels,
        )


def _is_batch(value: Any, size: int) -> bool:
    """Whether an input has an entry for each sample."""
    return isinstance(value, torch.Tensor) and value.dim() > 0 and len(value) == size
