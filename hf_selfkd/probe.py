"""What a few samples tell of a training set before the first step: whether its labels stay, and what it holds."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np
import torch

from .samples import IGNORE_INDEX, SampleIdDataset, seeded


SAMPLES = 8  # that are looked at, evenly spread


@dataclass
class DataProbe:
    """
    What a few samples of a training set told.

    Args:
        content (`str`, *optional*):
            a checksum of them, for any size of batches; `None` if reading them twice gives other ones.
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
    label_names: tuple[str, ...],
    row_labels: Callable[[torch.Tensor], torch.Tensor],
    batch_size: int = SAMPLES,
) -> DataProbe:
    """
    Read a few samples, some of them with other random numbers too. The generators are put back.

    Args:
        dataset ([`~hf_selfkd.samples.SampleIdDataset`]): the training set.
        collator (`Callable`): of the user.
        label_names (`tuple[str]`): names under which a batch may hold the labels.
        row_labels (`Callable`): from the labels of a batch to those of its rows.
        batch_size (`int`, *optional*): samples that the collator gets in training.
    """
    if len(dataset) == 0:
        return DataProbe()
    places = _places(dataset, batch_size)

    def read(seed: int) -> Any:
        with seeded(seed):
            batch = collator(list(dataset.items(places)))
        if not isinstance(batch, Mapping):
            return None
        return next((batch[name] for name in label_names if name in batch), None)

    probe, labels, others = DataProbe(_content(dataset)), read(0), read(1)
    if not isinstance(labels, torch.Tensor) or labels.dim() == 0:
        return probe
    probe.labels_stay, probe.rows_fit = checksum(labels) == checksum(others), len(labels) == len(places)
    integers = not labels.is_floating_point()
    if integers and labels.dim() > 1 and probe.rows_fit:
        probe.rows_per_sample = int((row_labels(labels) != IGNORE_INDEX).sum()) / len(places)
    return probe


def _places(dataset: SampleIdDataset, limit: int = SAMPLES) -> list[int]:
    count = min(SAMPLES, len(dataset), limit)
    return sorted({round(i * (len(dataset) - 1) / max(count - 1, 1)) for i in range(count)})


def _content(dataset: SampleIdDataset) -> str | None:
    """A checksum of a few items as the dataset gives them: no collator pads them to the length of their batch."""
    found = set()
    for _ in range(2):
        with seeded(0):
            found.add(checksum(dataset.items(_places(dataset))))
    return found.pop() if len(found) == 1 else None


def checksum(value: Any) -> str:
    """A checksum of nested tensors, arrays, numbers and texts: the same in every process and every run."""
    return f"{_crc(value, 0):08x}"


def _crc(value: Any, start: int) -> int:
    if isinstance(value, Mapping):
        for key in sorted(value, key=str):
            start = _crc(value[key], zlib.crc32(str(key).encode(), start))
        return start
    if isinstance(value, (list, tuple)):
        for part in value:
            start = _crc(part, start)
        return zlib.crc32(str(len(value)).encode(), start)
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    if hasattr(value, "__array_interface__") and not isinstance(value, (np.ndarray, np.generic)):
        value = np.asarray(value)  # such as an image of PIL
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype != object:
        start = zlib.crc32(f"{value.dtype} {value.shape}".encode(), start)
        return zlib.crc32(np.ascontiguousarray(value).tobytes(), start)
    if isinstance(value, (str, bytes, bool, int, float, type(None))):
        return zlib.crc32(value if isinstance(value, bytes) else repr(value).encode(), start)
    if is_dataclass(value):
        return _crc({spec.name: getattr(value, spec.name) for spec in fields(value)}, start)
    return start  # of a make that may differ from run to run: not looked at
