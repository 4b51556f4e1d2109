"""The history of objects: which objects there are shows while training goes on."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ..samples import SampleIndex
from ..tasks.objects import image_range, names_of
from .addresses import NEVER, find_slots
from .predictions import PredictionHistory
from .storage import Gather


class ObjectHistory(PredictionHistory):
    """
    Past predictions of every object. Each object is a sample of one row; its slot is its place among the sorted ids of
    all objects that were seen. New ones get a slot at the end of the epoch, when the processes tell one another.

    Args:
        images (`int`): of the training set.
        *arguments, **named: as for [`PredictionHistory`], without `size`, `ids` and `ragged`.
    """

    def __init__(self, images: int, *arguments: Any, **named: Any):
        super().__init__(0, *arguments, ids=np.empty(0, dtype=np.int64), ragged=True, **named)
        self.images = images

    def look_up(self, samples: SampleIndex) -> tuple[np.ndarray, np.ndarray]:
        """
        Where these objects are kept and which have a prediction.

        Raises:
            ValueError: if a prediction was made for another class than the object has now.
        """
        known = np.zeros(len(samples.ids), dtype=bool)
        if not self.size:
            return known.astype(np.int64), known
        slots, known = find_slots(samples.ids, self.size, self.ids)
        known = self.stamps[slots] != NEVER if known is None else known & (self.stamps[slots] != NEVER)
        wrong = np.flatnonzero(known & (self.hashes[slots] != samples.label_hash))
        if len(wrong):
            raise ValueError(
                f"{names_of(samples.ids[wrong[0]])} has other labels than when its stored prediction was made: the "
                "training set was changed since, or objects are known by their place in a list that changes, as with "
                "random crops. Give the same dataset, and each object an 'annotation_id' in its labels."
            )
        return slots, known

    def name_of(self, slot: int) -> str:
        return names_of(int(self.ids[slot]))

    def of_images(self, sample_ids: np.ndarray) -> np.ndarray:
        """The ids of all objects known of these images, one image after the other."""
        ends = [np.searchsorted(self.ids, image_range(int(sample_id))) for sample_id in sample_ids]
        return np.concatenate([self.ids[first:last] for first, last in ends] or [self.ids[:0]])

    def _noted(self, samples: SampleIndex, slots: np.ndarray) -> np.ndarray:
        return samples.ids

    def _name_of_noted(self, noted: int) -> str:
        return names_of(noted)

    def _settled(self, everyone: np.ndarray) -> np.ndarray:
        """Give new objects a slot; the others move to theirs."""
        ids = np.union1d(self.ids, everyone[:, 0])
        moved = np.searchsorted(ids, self.ids)
        for name, empty in (("stamps", NEVER), ("hashes", 0), ("counts", 0), ("starts", -1)):
            old = getattr(self, name)
            new = np.full(len(ids), empty, dtype=old.dtype)
            new[moved] = old
            setattr(self, name, new)
        self.ids, self.size = ids, len(ids)
        return np.column_stack((np.searchsorted(ids, everyone[:, 0]), everyone[:, 1:]))

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        tensors, metadata = super().state()
        return tensors, metadata | {"images": str(self.images)}

    def load_state(
        self, tensors: dict[str, torch.Tensor], gather: Gather | None = None, keep_known: bool = False
    ) -> None:
        self.ids = tensors["ids"].numpy().copy()
        self.size = len(self.ids)
        super().load_state(tensors, gather)
