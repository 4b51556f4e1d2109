"""A batch of training, split into what the model sees and what self-distillation knows beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .samples import SampleIndex


@dataclass
class Mixing:
    """How the images of a batch were mixed: partners `[B]` and the weight of the own label, a scalar tensor."""

    partner: torch.Tensor
    weight: torch.Tensor


@dataclass
class Storage:
    """What a history keeps of each row: all classes (`top_k=None`) or the entries with the largest scores."""

    top_k: int | None = None


@dataclass
class Batch:
    """
    A batch of training.

    Args:
        inputs (`dict`): what the model sees, without labels.
        labels (`torch.LongTensor`): classes, -100 where there is none; the task knows the shape.
        label_name (`str`): the name under which the model takes the labels.
        ids (`np.ndarray` of `int64`, shape `[B]`, *optional*): sample ids.
        samples ([`~hf_selfkd.samples.SampleIndex`], *optional*): where predictions of these samples are kept.
        mixing ([`Mixing`], *optional*): how images were mixed.
        rotations (`np.ndarray` of `int64`, shape `[B, V]`, *optional*): quarter turns of the views of each sample.
        upright (`dict`, *optional*): the inputs of the upright views alone, where `inputs` are those of all views.
        storage ([`Storage`], *optional*): what the history, if there is one, will keep of the rows.
        targets (`Any`, *optional*): the labels as the model takes them, where they are more than classes.
    """

    inputs: dict[str, Any]
    labels: torch.Tensor
    label_name: str = "labels"
    ids: np.ndarray | None = None
    samples: SampleIndex | None = None
    mixing: Mixing | None = None
    rotations: np.ndarray | None = None
    upright: dict[str, Any] | None = None
    storage: Storage | None = None
    targets: Any = None


@dataclass
class BatchRecord:
    """
    What travels beside a batch from the collator to the step. The record stays on the host.

    Args:
        ids (`np.ndarray` of `int64`, shape `[B]`, *optional*): sample ids.
        samples ([`~hf_selfkd.samples.SampleIndex`], *optional*): their addresses, if the collator found labels.
        partner (`torch.LongTensor` of shape `[B]`, *optional*): partners of mixed images.
        weight (`float`, *optional*): weight of the own label of mixed images.
    """

    ids: np.ndarray | None = None
    samples: SampleIndex | None = None
    partner: torch.Tensor | None = None
    weight: float | None = None


RECORD = "_hf_selfkd"  # under which a record stands in a batch until the loop takes it out
_TENSORS = {"ids": f"{RECORD}_ids", "partner": f"{RECORD}_partner", "weight": f"{RECORD}_weight"}


def attach_record(batch: dict[str, Any], record: BatchRecord, as_tensors: bool) -> None:
    """Put a record into a batch; as tensors of `B` elements where accelerate sends batches between processes."""
    if not as_tensors:
        batch[RECORD] = record
        return
    if record.ids is not None:
        batch[_TENSORS["ids"]] = torch.from_numpy(record.ids)
    if record.partner is not None:
        batch[_TENSORS["partner"]] = record.partner
        # float32: some devices know nothing wider
        batch[_TENSORS["weight"]] = torch.full((len(record.partner),), record.weight)


def peek_record(batch: Any) -> BatchRecord | None:
    """The record of a batch, which stays there; `None` if the collator could not attach one as it is."""
    return batch.get(RECORD) if isinstance(batch, dict) or hasattr(batch, "get") else None


def pop_record(batch: Any) -> BatchRecord | None:
    """Take the record out of a batch, which is then what the user's collator made."""
    if not hasattr(batch, "pop") or not hasattr(batch, "keys"):
        return None
    record = batch.pop(RECORD, None)
    if record is not None:
        return record
    found = {name: batch.pop(key, None) for name, key in _TENSORS.items()}
    if all(value is None for value in found.values()):
        return None
    ids, weight = found["ids"], found["weight"]
    return BatchRecord(
        None if ids is None else ids.cpu().numpy(),
        None,
        found["partner"],
        None if weight is None else float(weight[0]),
    )


class RecordedBatches(list):
    """
    The micro-batches of an optimizer step, as a user's own code may see them; tells which of them the loop is at.

    Args:
        batches (`list`): as the dataloader gave them; their records are taken out.

    Attributes:
        present ([`BatchRecord`], *optional*): of the micro-batch that the loop is at.
    """

    def __init__(self, batches: list[Any]):
        super().__init__(batches)
        self.records = [pop_record(batch) for batch in batches]
        self.present: BatchRecord | None = None

    def __iter__(self):
        for batch, record in zip(super().__iter__(), self.records, strict=True):
            self.present = record
            yield batch
        self.present = None
