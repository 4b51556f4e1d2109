"""Which object is which: the id of its image and its own, as one number."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


KEY_NAMES = ("annotation_id", "annotation_ids", "id", "ids")  # of the objects, beside `class_labels`
KEY_BITS = 31


def object_ids(ids: np.ndarray, targets: list[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """
    The ids of all objects of a batch, one image after the other.

    Args:
        ids (`np.ndarray` of `int64`, shape `[B]`): of the images.
        targets (`list` of `dict`): their labels.

    Returns:
        `tuple`: `id of the image * 2**31 + id of the object`, `[objects]`, and which images name their objects, `[B]`.

    Raises:
        ValueError: if ids are too large or negative, not one an object, or not unique in their image.
    """
    if len(ids) and int(ids.max()) >= 2**KEY_BITS:
        raise ValueError(f"sample_id={ids.max()} with object detection: ids of images must be below 2**{KEY_BITS}.")
    keys = [_keys_of(int(sample_id), target) for sample_id, target in zip(ids, targets, strict=True)]
    packed = [(int(image) << KEY_BITS) + values for image, (values, _) in zip(ids, keys, strict=True)]
    return np.concatenate(packed) if packed else np.empty(0, np.int64), np.array([by_id for _, by_id in keys], bool)


def image_range(sample_id: int) -> tuple[int, int]:
    """The first id that an object of an image can have, and the first one after them."""
    return sample_id << KEY_BITS, (sample_id + 1) << KEY_BITS


def names_of(object_id: int) -> str:
    """An object in words."""
    return f"object {object_id % 2**KEY_BITS} of sample_id={object_id >> KEY_BITS}"


def _keys_of(sample_id: int, target: Mapping[str, Any]) -> tuple[np.ndarray, bool]:
    size, name = len(target["class_labels"]), next((name for name in KEY_NAMES if name in target), None)
    if name is None:
        return np.arange(size), False
    keys = torch.as_tensor(target[name]).cpu().numpy().reshape(-1)
    told = f"labels[{name!r}] of sample_id={sample_id}"
    if len(keys) != size:
        raise ValueError(f"{told} are {len(keys)} ids for {size} objects: give one integer for each of class_labels.")
    if size and (keys.dtype.kind not in "iu" or keys.min() < 0 or keys.max() >= 2**KEY_BITS):
        raise ValueError(f"{told} hold {keys.min()} to {keys.max()}: ids of objects are integers below 2**{KEY_BITS}.")
    if len(np.unique(keys)) != size:
        raise ValueError(f"{told} are {keys.tolist()}: ids must be unique in an image, leave the field out otherwise.")
    return keys.astype(np.int64), True
