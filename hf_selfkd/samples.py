"""Which sample is which: stable ids on the way from the dataset to the loss, seeded transforms, mixed images."""

from __future__ import annotations

import itertools
import operator
import random
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset


SAMPLE_ID = "sample_id"
IGNORE_INDEX = -100
TOO_LARGE = "ids must fit into 63 bits. Number the samples, or take such an id modulo 2**63 - 1 if ids stay unique."


@dataclass
class SampleIndex:
    """
    What the host knows about the rows of a batch, so that a history on the CPU or on disk needs no device sync.

    Args:
        ids (`np.ndarray` of `int64`, shape `[B]`): sample ids.
        label_hash (`np.ndarray` of `int64`, shape `[B]`):
            a hash of each sample's labels; the label itself where labels are `[B]`.
        total (`int`): number of labelled rows of all samples.
        counts (`np.ndarray` of `int64`, shape `[B]`, *optional*):
            number of labelled rows of each sample; `None` when sample `b` is row `b`.
        rows (`np.ndarray` of `int64`, shape `[counts.sum()]`, *optional*):
            where the labelled rows stand among the flattened rows of the batch; `None` when sample `b` is row `b`.
        extremes (`tuple`): the smallest and the largest label, each with the id of its sample; empty without labels.
        items (`int`, *optional*): what the loss is a mean over, where that is not the labelled rows.
        num_rows (`int`, *optional*): rows of the batch, where these are not as many as its labels.
    """

    ids: np.ndarray
    label_hash: np.ndarray
    total: int
    counts: np.ndarray | None = None
    rows: np.ndarray | None = None
    extremes: tuple[tuple[int, int], ...] = ()
    items: int | None = None
    num_rows: int | None = None

    @property
    def num_items(self) -> int:
        """`int`: what the loss is a mean over; the labelled rows, unless `items` tells."""
        return self.total if self.items is None else self.items

    def fits(self, num_classes: int) -> bool:
        """Whether every label is one of the classes 0 to `num_classes - 1`."""
        return all(0 <= label < num_classes for label, _ in self.extremes)

    def misfit(self, num_classes: int) -> tuple[int, int]:
        """A label that is no class, and the id of its sample."""
        return next(pair for pair in self.extremes if not 0 <= pair[0] < num_classes)


def sample_index(ids: torch.Tensor | np.ndarray, labels: torch.Tensor, shifted: bool = False) -> SampleIndex:
    """
    Find out where the predictions of a batch are kept, on the host.

    Args:
        ids (`torch.LongTensor` of shape `[B]`, or such an array): sample ids, on the CPU.
        labels (`torch.LongTensor` of shape `[B]` or `[B, L]`): labels, -100 where there is none, on the CPU.
        shifted (`bool`, *optional*, defaults to `False`): whether position `i` predicts label `i + 1`.

    Returns:
        [`SampleIndex`]: the hash of a sample does not depend on where its padding stands.

    Raises:
        ValueError: if the samples were merged into rows of another number (packing).
    """
    if isinstance(ids, torch.Tensor):
        ids = ids.numpy().astype(np.int64, copy=False)
    labels = labels.numpy()
    if len(labels) != len(ids):
        raise ValueError(
            f"the batch has {len(labels)} rows of labels for {len(ids)} samples: a collator that packs, drops or "
            "repeats samples leaves no place to address their predictions. Pad instead, pack when the dataset is "
            "made, or use teacher='snapshot'."
        )
    if shifted and labels.ndim == 2:
        labels = np.concatenate((labels[:, 1:], np.full((len(ids), 1), IGNORE_INDEX, labels.dtype)), axis=1)
    if labels.ndim < 2:  # and not by the size: a batch of sequences may have length 1
        labels = labels.astype(np.int64).reshape(len(ids))
        values = labels.tolist()  # Python is done with a batch sooner than NumPy
        known = [value for value in values if value != IGNORE_INDEX]
        ends = (min(known), max(known)) if known else ()
        extremes = tuple((end, int(ids[values.index(end)])) for end in ends)
        return SampleIndex(ids, labels, len(known), extremes=extremes)
    labels = labels.reshape(len(ids), -1).astype(np.int64)
    valid = labels != IGNORE_INDEX
    # The sum of splitmix64 of (label, position among the labels), modulo 2**64.
    position = np.cumsum(valid, axis=1).astype(np.uint64)
    mixed = labels.view(np.uint64) + position * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    hashes = np.where(valid, mixed, np.uint64(0)).sum(axis=1).view(np.int64)
    rows = np.flatnonzero(valid)
    known = labels.reshape(-1)[rows]
    ends = (int(known.argmin()), int(known.argmax())) if len(known) else ()
    extremes = tuple((int(known[end]), int(ids[rows[end] // labels.shape[1]])) for end in ends)
    return SampleIndex(ids, hashes, len(rows), valid.sum(axis=1), rows, extremes)


@contextmanager
def seeded(*entropy: int):
    """Seed Python, NumPy and torch (CPU) by non-negative integers, and put their states back at the end."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    words = np.random.SeedSequence(entropy).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    torch.default_generator.manual_seed(int(words[2]))  # not torch.manual_seed, which also reseeds the accelerators
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class SampleIdDataset(Dataset):
    """
    A map-style dataset whose items carry `sample_id`; made by [`with_sample_ids`].

    Args:
        dataset: a map-style dataset of dictionaries.
        ids (`np.ndarray` of `int64`, *optional*): one id per row; row numbers by default.
        id_column (`str`, *optional*): take the id from this key of each item instead.
    """

    def __init__(self, dataset: Any, ids: np.ndarray | None = None, id_column: str | None = None):
        self.dataset, self.ids, self.id_column = dataset, ids, id_column
        self.transform_seed: int | None = None
        # In shared memory, so that worker processes that outlive an epoch see the next one.
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Tell the epoch that seeds the transforms (`int`, counted from 0; -1 before training)."""
        self.epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def _item(self, index: int) -> Any:
        if self.transform_seed is None:
            return self.dataset[index]
        sample_id = index if self.ids is None else int(self.ids[index])
        with seeded(self.transform_seed, int(self.epoch) + 1, sample_id):
            return self.dataset[index]

    def items(self, indices: list[int]) -> list[Any]:
        """The items of the dataset as it gives them, without ids."""
        if self.transform_seed is not None:
            return [self._item(int(index)) for index in indices]
        fetch = getattr(self.dataset, "__getitems__", None)
        return [self.dataset[index] for index in indices] if fetch is None else list(fetch(indices))

    def _ids(self, indices: list[int], items: list[Any]) -> np.ndarray:
        """The ids of items, which may be anything unless they hold their ids themselves."""
        if len(items) != len(indices):
            raise ValueError(f"__getitems__ of train_dataset gave {len(items)} items for {len(indices)} indices.")
        if self.id_column is None:
            indices = np.array(indices, dtype=np.int64)
            return indices if self.ids is None else self.ids[indices]
        for index, item in zip(indices, items, strict=True):
            if not has_key(item, self.id_column):
                found = ", ".join(map(str, item)) if isinstance(item, Mapping) else f"a {type(item).__name__}"
                raise ValueError(
                    f"sample_id_column={self.id_column!r} is not among the keys of train_dataset[{index}]: {found}."
                )
        return ids_in(items, self.id_column)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[int(index)]
        return self._marked([index], [self._item(index)])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        return self._marked(indices, self.items(indices))

    def _marked(self, indices: list[int], items: list[Any]) -> list[dict[str, Any]]:
        for index, item in zip(indices, items, strict=True):
            if not isinstance(item, Mapping):
                raise TypeError(
                    f"dataset[{index}] is a {type(item).__name__}: with_sample_ids needs items that are dictionaries, "
                    "to add their sample_id. The trainer itself takes items of any kind."
                )
        ids = self._ids(indices, items).tolist()
        return [{**item, SAMPLE_ID: sample_id} for item, sample_id in zip(items, ids, strict=True)]


class IdentifiedItems(list):
    """
    Items of a dataset as it gave them, in a list that knows their ids.

    Args:
        items (`list`): the items.
        ids (`np.ndarray` of `int64`, shape `[B]`): their ids.
    """

    def __init__(self, items: list[Any], ids: np.ndarray):
        super().__init__(items)
        self.ids = ids


class BatchIdDataset(SampleIdDataset):
    """A [`SampleIdDataset`] that is read in batches by [`SelfKDDataCollator`], which spares a copy of each item."""

    def __getitems__(self, indices: list[int]) -> IdentifiedItems:
        items = self.items(indices)
        return IdentifiedItems(items, self._ids(indices, items))


def is_hf_dataset(dataset: Any) -> bool:
    """Whether this is a `datasets.Dataset` (without importing the library for those who use none)."""
    import datasets

    return isinstance(dataset, datasets.Dataset)


def with_sample_ids(dataset: Any, id_column: str | None = None) -> SampleIdDataset:
    """
    Give every item of a map-style dataset a stable `sample_id`.

    The trainer does this by itself, with row numbers, for the dataset it is given. Call it yourself to fix the ids
    before you wrap the dataset further.

    Args:
        dataset (`datasets.Dataset` or `torch.utils.data.Dataset`):
            A map-style dataset of dictionaries; shuffled, selected and `with_transform` datasets keep working.
        id_column (`str`, *optional*):
            A column of unique, non-negative integers to take as ids. Without it the ids are the row numbers.

    Returns:
        [`SampleIdDataset`]: a thin wrapper; the data are neither copied nor rewritten.

    Raises:
        ValueError: if the ids are missing, not integers, negative or not unique.
        TypeError: if the dataset is iterable only.
    """
    if isinstance(dataset, SampleIdDataset):
        return dataset
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise TypeError(
            f"with_sample_ids needs a map-style dataset, not {type(dataset).__name__}: let an iterable dataset yield "
            "an id itself and name it in sample_id_column."
        )
    if id_column is None or not is_hf_dataset(dataset):
        return SampleIdDataset(dataset, id_column=id_column)
    if id_column not in dataset.column_names:
        raise ValueError(
            f"sample_id_column={id_column!r} is not a column of the dataset: choose among "
            f"{', '.join(dataset.column_names)}."
        )
    return SampleIdDataset(dataset, ids=checked_ids(dataset.with_format(None)[id_column][:], id_column))


def _as_id(value: Any, name: str) -> int:
    try:
        sample_id = operator.index(value)
    except TypeError:
        raise ValueError(f"sample_id_column={name!r} holds {value!r}: ids must be integers.") from None
    if not -(2**63) <= sample_id < 2**63:
        raise ValueError(f"sample_id_column={name!r} holds {sample_id}: {TOO_LARGE}")
    return sample_id


def has_key(item: Any, name: str) -> bool:
    """Whether an item, a dictionary or an object with fields, holds something under this name."""
    return name in item if isinstance(item, Mapping) else hasattr(item, name)


def ids_in(items: list[Any], name: str) -> np.ndarray:
    """The ids that items carry under this name."""
    values = [item.get(name) if isinstance(item, Mapping) else getattr(item, name) for item in items]
    return np.array([_as_id(value, name) for value in values], dtype=np.int64)


def without_key(items: list[Any], name: str) -> list[Any]:
    """The items without this key; they may be the dataset's own, so they are copied where one has the key. Objects
    keep their fields, as the model does not see them."""
    if not isinstance(items[0], Mapping) or name not in itertools.chain.from_iterable(items):
        return items
    return [{key: value for key, value in item.items() if key != name} for item in items]


def checked_ids(values: Any, name: str) -> np.ndarray:
    """Return `values` as `int64` ids.

    Raises:
        ValueError: if they are not unique non-negative integers; `name` is the column to blame.
    """
    ids = np.asarray(values)
    if ids.dtype.kind not in "iu":
        raise ValueError(f"sample_id_column={name!r} holds {ids.dtype}: ids must be integers without gaps in type.")
    if len(ids) and ids.min() < 0:
        raise ValueError(f"sample_id_column={name!r} holds {ids.min()}: ids must not be negative.")
    if len(ids) and ids.max() >= 2**63:
        raise ValueError(f"sample_id_column={name!r} holds {ids.max()}: {TOO_LARGE}")
    unique, counts = np.unique(ids, return_counts=True)
    if len(unique) != len(ids):
        raise ValueError(
            f"sample_id_column={name!r} holds {unique[counts.argmax()]} {counts.max()} times: ids must be unique."
        )
    return ids.astype(np.int64)
