"""What a few samples tell of a training set before the first step: whether its labels stay, and what it holds."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np
import torch

from .samples import IGNORE_INDEX, SampleIdDataset, seeded
from .tasks.base import Task


SAMPLES = 8  # that are looked at, evenly spread


@dataclass
class DataProbe:
    """
    What a few samples of a training set told.

    Args:
        content (`str`, *optional*): a checksum of them without labels; `None` if reading them twice gives another one.
        labels_stay (`bool`): whether their labels are the same whatever random numbers a collator draws.
        rows_fit (`bool`): whether the collator gives a row of labels for each sample.
        rows_per_sample (`float`, *optional*): labelled rows of a sample, on average.
    """

    content: str | None = None
    labels_stay: bool = True
    rows_fit: bool = True
    rows_per_sample: float | None = None


def probe_data(
    dataset: SampleIdDataset,
    collator: Callable[[list[Any]], Any],
    task: Task,
    batch_size: int = SAMPLES,
) -> DataProbe:
    """
    Read a few samples, three times, with other random numbers at the third. The generators are put back.

    Args:
        dataset ([`~hf_selfkd.samples.SampleIdDataset`]): the training set.
        collator (`Callable`): of the user.
        task ([`~hf_selfkd.tasks.Task`]): tells where the labels are and what of them must stay the same.
        batch_size (`int`, *optional*): samples that the collator gets in training.
    """
    if len(dataset) == 0:
        return DataProbe()
    last = len(dataset) - 1
    places = sorted({round(i * last / (SAMPLES - 1)) for i in range(SAMPLES)})
    given = {*task.label_names, "label", "label_ids"}

    def read(seed: int) -> tuple[str, list[Any]]:
        dataset.set_epoch(seed)  # which seeds transforms, if anything does
        with seeded(seed):
            items = list(dataset.items(places))
            labels = _labels(items, collator, task.labels_in, batch_size)
        return checksum([_without(item, given) for item in items]), labels

    (_, others), (content, labels), (again, _) = read(1), read(0), read(0)
    probe = DataProbe(content if content == again else None)
    kept, seen = (list(map(task.constant_labels, parts)) for parts in (labels, others))
    labels = list(map(task.label_table, labels))
    if not all(isinstance(part, torch.Tensor) and part.dim() for part in labels):
        return probe
    probe.labels_stay = checksum(kept) == checksum(seen)
    probe.rows_fit = sum(map(len, labels)) == len(places)
    if probe.rows_fit and all(part.dim() == 2 and not part.is_floating_point() for part in labels):
        probe.rows_per_sample = sum(int((task.row_labels(part) != IGNORE_INDEX).sum()) for part in labels) / len(
            places
        )
    return probe


def _labels(
    items: list[Any], collator: Callable[[list[Any]], Any], labels_of: Callable[[Any], Any], batch_size: int
) -> list[Any]:
    """The labels of the batches that a collator makes of these items."""
    batches = [collator(items[start : start + batch_size]) for start in range(0, len(items), batch_size)]
    return [labels_of(batch) if isinstance(batch, Mapping) else None for batch in batches]


def _without(item: Any, names: set[str]) -> Any:
    return {key: value for key, value in item.items() if key not in names} if isinstance(item, Mapping) else item


def checksum(value: Any) -> str:
    """A checksum of nested tensors, arrays, numbers and texts: the same in every process and every run."""
    return f"{_crc(value, 0):08x}"


def _crc(value: Any, start: int) -> int:
    if isinstance(value, Mapping):
        for key in sorted(value, key=str):
            start = _crc(value[key], zlib.crc32(str(key).encode(), start))
        return start
    if is_dataclass(value) and not isinstance(value, type):
        return _crc({spec.name: getattr(value, spec.name) for spec in fields(value)}, start)  # slots have no vars
    if isinstance(value, (list, tuple)):
        for part in value:
            start = _crc(part, start)
        return zlib.crc32(f"{len(value)} parts".encode(), start)
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    if hasattr(value, "__array_interface__") and not isinstance(value, np.ndarray):
        value = np.asarray(value)  # such as an image
    if isinstance(value, np.ndarray) and value.dtype != object:
        start = zlib.crc32(f"{value.dtype} {value.shape}".encode(), start)
        return zlib.crc32(np.ascontiguousarray(value).tobytes(), start)
    if isinstance(value, (str, bytes, bool, int, float, type(None))):
        return zlib.crc32(value if isinstance(value, bytes) else repr(value).encode(), start)
    if hasattr(value, "tobytes") and hasattr(value, "size"):  # an image of PIL
        return zlib.crc32(value.tobytes(), zlib.crc32(str(value.size).encode(), start))
    return start  # of a make that may differ from run to run: not looked at
