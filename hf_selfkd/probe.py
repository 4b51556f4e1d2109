"""What a few samples tell of a training set before the first step: whether its labels stay, and what it holds."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
        content (`str`, *optional*): a checksum of their inputs; `None` if reading them twice gives other ones.
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
    Read a few samples, three times, with other random numbers at the third. The generators are put back.

    Args:
        dataset ([`~hf_selfkd.samples.SampleIdDataset`]): the training set.
        collator (`Callable`): of the user.
        label_names (`tuple[str]`): names under which a batch may hold the labels.
        row_labels (`Callable`): from the labels of a batch to those of its rows.
        batch_size (`int`, *optional*): samples that the collator gets in training.
    """
    count = min(SAMPLES, len(dataset), batch_size)
    if count == 0:
        return DataProbe()
    places = sorted({round(i * (len(dataset) - 1) / max(count - 1, 1)) for i in range(count)})

    def read(seed: int) -> tuple[Any, Any]:
        with seeded(seed):
            batch = collator(list(dataset.items(places)))
        if not isinstance(batch, Mapping):
            return None, batch
        labels = next((batch[name] for name in label_names if name in batch), None)
        return labels, {name: value for name, value in batch.items() if value is not labels}

    (labels, inputs), (_, again), (others, _) = read(0), read(0), read(1)
    if not isinstance(labels, torch.Tensor) or labels.dim() == 0:
        return DataProbe()
    probe = DataProbe(labels_stay=checksum(labels) == checksum(others), rows_fit=len(labels) == len(places))
    probe.content = checksum(inputs) if checksum(inputs) == checksum(again) else None
    integers = not labels.is_floating_point()
    if integers and labels.dim() > 1 and probe.rows_fit:
        probe.rows_per_sample = int((row_labels(labels) != IGNORE_INDEX).sum()) / len(places)
    return probe


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
        return zlib.crc32(f"{len(value)} parts".encode(), start)
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    if isinstance(value, np.ndarray) and value.dtype != object:
        start = zlib.crc32(f"{value.dtype} {value.shape}".encode(), start)
        return zlib.crc32(np.ascontiguousarray(value).tobytes(), start)
    if isinstance(value, (str, bytes, bool, int, float, type(None))):
        return zlib.crc32(value if isinstance(value, bytes) else repr(value).encode(), start)
    return start  # of a make that may differ from run to run: not looked at
