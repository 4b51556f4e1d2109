"""Soft targets: past predictions for the rows of a batch, and the small operations on rows that every loss shares."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F

from ..batch import Mixing
from ..samples import IGNORE_INDEX


Tail = Literal["bucket", "label", "uniform", "renormalize"]

CHUNK_ABOVE = 2**21  # logits up to which a loss is computed in one piece

MAX_HELD = 2**18  # elements of the rows of small batches that may wait, to be worked off together

LOG_ZERO = -1.0e4  # a finite stand-in for log(0): exp gives exactly 0 and 0 * LOG_ZERO is 0, not NaN


@dataclass
class SoftTargets:
    """
    Past predictions for the rows of a batch, as log-probabilities at temperature 1.

    Args:
        log_probs (`torch.FloatTensor` of shape `[R, C]`, or `[R, k]` with `index`): float32; where `mask` is false the
            values are arbitrary.
        mask (`torch.BoolTensor` of shape `[R]`): which rows have a past prediction.
        index (`torch.LongTensor` of shape `[R, k]`, *optional*):
            classes of the entries, each once, the most probable first.
        tail (`str`, *optional*, defaults to `"bucket"`):
            where the mass goes that the entries lack: `"bucket"` (to the other classes together: their total mass is
            compared, no gradient among them), `"label"` (to the label), `"uniform"` (evenly to the other classes) or
            `"renormalize"` (nowhere: the entries are scaled up to the whole mass).
        all_valid (`bool`, *optional*, defaults to `False`):
            the host knows that every row has a past and a label, which spares the masking.
        classes (`int`, *optional*): classes of the rows, where only entries are stored.
        categorical (`bool`): whether the probabilities of a row add up to 1.
    """

    log_probs: torch.Tensor
    mask: torch.Tensor
    index: torch.Tensor | None = None
    tail: Tail = "bucket"
    all_valid: bool = False
    classes: int | None = None
    categorical: bool = True

    @property
    def num_classes(self) -> int | None:
        """`int`: classes of the rows that these are for, if known."""
        return self.log_probs.shape[-1] if self.index is None else self.classes

    def select(self, order: torch.Tensor | slice) -> SoftTargets:
        """The rows in another order (`torch.LongTensor` of shape `[R]`), or some of them."""
        index = None if self.index is None else self.index[order]
        return replace(self, log_probs=self.log_probs[order], mask=self.mask[order], index=index)

    def narrowed(self, width: int) -> SoftTargets:
        """The first classes (`int`) of dense rows, which have the whole mass."""
        if self.log_probs.shape[-1] == width:
            return self
        return replace(self, log_probs=self.log_probs[:, :width])


@dataclass
class Target:
    """Labels `[R]` and past rows to learn from; `weight` is a scalar tensor for mixed images."""

    labels: torch.Tensor
    soft_targets: SoftTargets | None
    weight: torch.Tensor | None


@dataclass
class RowLosses:
    """
    Losses of each row, `[R]`, float32, in nats. Only `total` has a gradient.

    Args:
        total: the loss of the row.
        hard: its cross-entropy with the label; 0 where there is none.
        soft: its cross-entropy with the past; 0 where nothing was learned from one.
        distilled (`torch.BoolTensor`, *optional*): which rows have both a label and a past; `None` for all.
    """

    total: torch.Tensor
    hard: torch.Tensor
    soft: torch.Tensor
    distilled: torch.Tensor | None


def labelled(labels: torch.Tensor) -> torch.Tensor:
    """Which rows `[R]` have a label."""
    return labels != IGNORE_INDEX


def label_entries(values: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The entry `[R]` of each row `[R, C]` that belongs to its label; that of class 0 where there is none."""
    return values.gather(-1, labels.clamp_min(0).unsqueeze(-1)).squeeze(-1)


def distilled_rows(soft_targets: SoftTargets, labels: torch.Tensor) -> torch.Tensor | None:
    """Which rows `[R]` have both a label and a past prediction; `None` for all."""
    return None if soft_targets.all_valid else soft_targets.mask & labelled(labels)


def where_mask(values: torch.Tensor, mask: torch.Tensor | None, otherwise: torch.Tensor | float = 0.0) -> torch.Tensor:
    """The values where the mask, if there is one, is true."""
    return values if mask is None else torch.where(mask, values, otherwise)


def weighted(values: list[torch.Tensor], targets: list[Target]) -> torch.Tensor:
    """The values of the sides as one, by their weights; a single value comes back untouched."""
    if len(values) == 1:
        return values[0]
    return sum(target.weight * value for target, value in zip(targets, values, strict=True))


def log_softmax(logits: torch.Tensor) -> torch.Tensor:
    """Log-probabilities in float32, with `LOG_ZERO` for classes of probability 0."""
    return F.log_softmax(logits, dim=-1, dtype=torch.float32).clamp_min_(LOG_ZERO)


def chunks(logits: torch.Tensor) -> Iterator[slice]:
    """Slices of rows `[R, C]` that are small enough to stay in a cache while several operations pass over them."""
    size = max(1, (2**24 if logits.is_cuda else 2**18) // logits.shape[-1])
    return (slice(start, start + size) for start in range(0, len(logits), size))


def make_targets(
    labels: torch.Tensor,
    soft_targets: SoftTargets | None,
    mixing: Mixing | None,
    addressed: bool,
    partner_labels: torch.Tensor | None = None,
) -> list[Target]:
    """
    What the rows of a batch are to learn: their own targets and, for mixed images, those of their partners.

    Args:
        labels (`torch.LongTensor` of shape `[R]`): of the rows.
        soft_targets ([`SoftTargets`], *optional*): of the rows.
        mixing ([`~hf_selfkd.batch.Mixing`], *optional*): how images were mixed.
        addressed (`bool`):
            whether soft targets are stored rows, which belong to unmixed images; other teachers have looked at the
            mixed images themselves.
        partner_labels (`torch.LongTensor` of shape `[R]`, *optional*): of the partners, where rows are views.
    """
    if mixing is None:
        return [Target(labels, soft_targets, None)]
    partners = soft_targets
    if soft_targets is not None and addressed:
        partners = soft_targets.select(mixing.partner)
    partner_labels = labels[mixing.partner] if partner_labels is None else partner_labels
    return [Target(labels, soft_targets, mixing.weight), Target(partner_labels, partners, 1 - mixing.weight)]
