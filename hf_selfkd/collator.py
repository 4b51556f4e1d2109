"""The collator of a training: it carries sample ids beside the batch, and mixes images (mixup, CutMix) if asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from .batch import BatchRecord, attach_record
from .samples import IdentifiedItems, SampleIndex, has_key, ids_in, without_key


class SelfKDDataCollator:
    """
    Wrap a data collator to mix images (mixup, CutMix); in a training, sample ids travel beside the batch.

    A mixed batch trains on `lambda * loss(own label) + (1 - lambda) * loss(partner's label)`, and past predictions
    follow the same partner and the same lambda. Mixing is seeded by the sample ids and the epoch, so it resumes
    exactly. One lambda per batch, as in the authors' code of both methods.

    Args:
        collator (`Callable`, *optional*): the collator to wrap; [`~transformers.default_data_collator`] by default.
        mixup_alpha (`float`, *optional*, defaults to `0.0`):
            Parameter of the Beta distribution of lambda for mixup (Zhang et al., ICLR 2018); 0 is off.
        cutmix_alpha (`float`, *optional*, defaults to `0.0`):
            The same for CutMix (Yun et al., ICCV 2019). With both, each mixed batch draws one of the two.
        mix_probability (`float`, *optional*, defaults to `1.0`):
            Share of the batches that are mixed, in [0, 1].

    Raises:
        ValueError: if a parameter is out of range, or images to mix are missing.
    """

    def __init__(
        self,
        collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        mixup_alpha: float = 0.0,
        cutmix_alpha: float = 0.0,
        mix_probability: float = 1.0,
    ):
        for name, value in (("mixup_alpha", mixup_alpha), ("cutmix_alpha", cutmix_alpha)):
            if value < 0:
                raise ValueError(f"{name}={value} must not be negative: 0 turns it off.")
        if not 0 <= mix_probability <= 1:
            raise ValueError(f"mix_probability={mix_probability} is outside [0, 1].")
        if collator is None:
            from transformers import default_data_collator as collator
        self.collator = collator
        self.mixup_alpha, self.cutmix_alpha, self.mix_probability = mixup_alpha, cutmix_alpha, mix_probability

    @property
    def mixes(self) -> bool:
        """`bool`: whether any batch can be mixed."""
        return (self.mixup_alpha > 0 or self.cutmix_alpha > 0) and self.mix_probability > 0

    def __call__(self, features: list[Any]) -> dict[str, Any]:
        """
        The batch of the wrapped collator.

        Raises:
            ValueError: if images are to be mixed, which only the training of [`SelfKDTrainer`] does.
        """
        batch = self.collator(features)
        if self.mixes:
            raise ValueError(
                "SelfKDDataCollator mixes images in the training of SelfKDTrainer only, which also mixes the labels: "
                "give the collator to the trainer as data_collator."
            )
        return batch

    def mix(self, batch: dict[str, Any], record: BatchRecord, seed: int, epoch: int) -> None:
        """
        Mix the images of a batch, or not, and note in the record how; a training calls this.

        Args:
            batch (`dict`): with `pixel_values` of shape `[B, ...]`, which are replaced.
            record ([`~hf_selfkd.batch.BatchRecord`]): of the batch; gets the partners and the weight.
            seed (`int`): of the mixing.
            epoch (`int`): of the mixing; 0 before training.

        Raises:
            ValueError: if the batch has no `pixel_values`.
        """
        images = batch.get("pixel_values")
        if images is None:
            raise ValueError(
                f"mixup_alpha={self.mixup_alpha}, cutmix_alpha={self.cutmix_alpha}: the batch has no pixel_values to "
                f"mix, only {', '.join(batch)}. Set both to 0."
            )
        if record.ids is not None:
            rng = np.random.default_rng((seed, epoch, *record.ids.tolist()))
        else:  # nothing tells two batches apart, so the global generator must
            rng = np.random.default_rng(int(torch.randint(2**62, ())))
        if rng.random() >= self.mix_probability:
            return
        methods = [a for a in ((self.mixup_alpha, False), (self.cutmix_alpha, True)) if a[0] > 0]
        alpha, cut = methods[rng.integers(len(methods))]
        weight = float(rng.beta(alpha, alpha))
        partner = torch.from_numpy(rng.permutation(len(images)))
        if cut:
            images, weight = _cut(images, partner, weight, rng)
        else:
            images = weight * images + (1 - weight) * images[partner]
        batch["pixel_values"] = images
        record.partner, record.weight = partner, weight


def _cut(
    images: torch.Tensor, partner: torch.Tensor, weight: float, rng: np.random.Generator
) -> tuple[torch.Tensor, float]:
    """Put a rectangle of the partner into each image; the weight is the share that is left."""
    height, width = images.shape[-2:]
    half_h, half_w = (int(size * (1 - weight) ** 0.5) // 2 for size in (height, width))
    y, x = rng.integers(height), rng.integers(width)
    top, bottom = max(y - half_h, 0), min(y + half_h, height)
    left, right = max(x - half_w, 0), min(x + half_w, width)
    mixed = images.clone()
    mixed[..., top:bottom, left:right] = images[partner][..., top:bottom, left:right]
    return mixed, 1 - (bottom - top) * (right - left) / (height * width)


class TrainingCollator:
    """
    What a training dataloader collates with: the user's collator, and beside its batch a record.

    Args:
        collator (`Callable`): of the user; it sees the items as the dataset gave them.
        mixer ([`SelfKDDataCollator`], *optional*): how images are mixed.
        id_column (`str`, *optional*): name of the id in the items of a stream.
        index (`Callable`, *optional*): from ids and labels to a [`~hf_selfkd.samples.SampleIndex`].
        labels_of (`Callable`, *optional*): finds the labels in a batch; those named `labels` by default.
        as_tensors (`bool`): whether records are tensors, since batches travel between processes.
        seed (`int`): of the mixing.
        epoch (`torch.LongTensor`, *optional*): the epoch, in shared memory.
        label_table (`Callable`, *optional*): from the labels of a batch to a tensor of classes, or to what is none.
    """

    def __init__(
        self,
        collator: Callable[[list[Any]], Any],
        mixer: SelfKDDataCollator | None = None,
        id_column: str | None = None,
        index: Callable[[np.ndarray, torch.Tensor], SampleIndex] | None = None,
        labels_of: Callable[[Any], Any] | None = None,
        as_tensors: bool = False,
        seed: int = 0,
        epoch: torch.Tensor | None = None,
        label_table: Callable[[Any], Any] | None = None,
    ):
        self.label_table = label_table
        self.collator, self.mixer, self.id_column, self.index = collator, mixer, id_column, index
        self.labels_of, self.as_tensors, self.seed, self.epoch = labels_of, as_tensors, seed, epoch

    def __call__(self, features: list[Any]) -> Any:
        ids = None
        if isinstance(features, IdentifiedItems):
            ids = features.ids
        elif self.id_column is not None and has_key(features[0], self.id_column):
            ids, features = ids_in(features, self.id_column), without_key(features, self.id_column)
        batch = self.collator(features)
        if not hasattr(batch, "get") or not hasattr(batch, "__setitem__"):
            return batch  # of a make that only the user's own code knows
        record = self._record(batch, ids)
        if self.mixer is not None and self.mixer.mixes:
            self.mixer.mix(batch, record, self.seed, 0 if self.epoch is None else int(self.epoch) + 1)
        if record.ids is not None or record.partner is not None:
            attach_record(batch, record, self.as_tensors)
        return batch

    def _record(self, batch: Any, ids: np.ndarray | None) -> BatchRecord:
        labels = batch.get("labels") if self.labels_of is None else self.labels_of(batch)
        table = labels if self.label_table is None else self.label_table(labels)
        if ids is None or not isinstance(table, torch.Tensor):
            return BatchRecord(ids)
        if table.dim() == 0 or len(table) != len(ids):
            return BatchRecord()  # samples were dropped, repeated or packed: no id has a row of its own
        integers = not (table.is_floating_point() or table.is_complex() or table.dtype == torch.bool)
        if self.as_tensors or self.index is None or not integers or table.dim() > 2:
            return BatchRecord(ids)
        return BatchRecord(ids, self.index(ids, labels.cpu() if labels is table else labels))
