"""Rows: one prediction over the classes with its label, whatever the task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ..batch import Storage
from ..losses.cross_entropy import cross_entropy_sum
from ..losses.soft_targets import LOG_ZERO, SoftTargets, Target, label_entries, labelled, log_softmax, weighted
from ..losses.summary import Summary, summarize


class lazy:
    """`functools.cached_property` without its lock, which Python takes before 3.12 and a step notices."""

    def __init__(self, function: Callable[[Any], Any]):
        self.function, self.__doc__ = function, function.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if instance is None:
            return self
        value = instance.__dict__[self.name] = self.function(instance)
        return value


@dataclass
class Rows:
    """
    The predictions of a batch.

    Args:
        logits (`torch.FloatTensor` of shape `[R, C]`): class scores.
        labels (`torch.LongTensor` of shape `[R]`): classes, -100 for a row that does not count.
        storage ([`~hf_selfkd.batch.Storage`], *optional*): what a history will keep of each row.
        allowed (`torch.BoolTensor` of shape `[R, C]`, *optional*):
            classes that a teacher may believe in; the others, such as padding, get no mass of a target.
        width (`int`, *optional*): classes of the rows of every batch, where C differs from batch to batch.
        independent (`bool`, *optional*, defaults to `False`):
            whether each class has a probability of its own, which do not add up to 1.
        weights (`torch.Tensor` of shape `[R]`, *optional*):
            how much each row counts, in what the loss is a mean over; 1 by default.
    """

    logits: torch.Tensor
    labels: torch.Tensor
    storage: Storage | None = None
    allowed: torch.Tensor | None = None
    width: int | None = None
    independent: bool = False
    weights: torch.Tensor | None = None

    def count(self, mask: torch.Tensor) -> torch.Tensor:
        """
        How much some rows count together.

        Args:
            mask (`torch.BoolTensor` of shape `[R]`): which rows.
        """
        return mask.sum() if self.weights is None else (mask * self.weights).sum()

    @property
    def top_k(self) -> int | None:
        """`int`: entries of each row that a history will keep, if not all."""
        return None if self.storage is None else self.storage.top_k

    @lazy
    def kept(self) -> Rows:
        """[`Rows`]: as a teacher keeps or says them; without a gradient."""
        if self.allowed is None and self.width is None:
            return self
        logits = self.logits.detach()
        logits = logits if self.allowed is None else logits.masked_fill(~self.allowed, LOG_ZERO)
        return Rows(self._padded(logits), self.labels, self.storage)

    def _padded(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits `[R, C]` of the width of every batch."""
        missing = 0 if self.width is None else self.width - logits.shape[-1]
        return F.pad(logits, (0, missing), value=LOG_ZERO) if missing else logits

    def matched(self, soft: SoftTargets | None) -> tuple[Rows, SoftTargets | None]:
        """
        These rows and soft targets for them, of one width.

        Args:
            soft ([`~hf_selfkd.losses.SoftTargets`] or `None`): made of [`~Rows.kept`] of these rows or earlier ones.
        """
        if self.width is None or soft is None:
            return self, soft
        if soft.index is None:
            return self, soft.narrowed(self.logits.shape[-1])
        allowed = self.allowed
        if allowed is not None:
            allowed = F.pad(allowed, (0, self.width - allowed.shape[-1]), value=False)
        return Rows(self._padded(self.logits), self.labels, self.storage, allowed, self.width), soft

    def hard_sum(self, labels: torch.Tensor) -> torch.Tensor:
        """
        The sum of the cross-entropies of the rows with some labels.

        Args:
            labels (`torch.LongTensor` of shape `[R]`): classes, -100 for rows that do not count.
        """
        return cross_entropy_sum(self.logits, labels)

    def hard_loss(self, targets: list[Target], num_items: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """
        What the labels alone cost.

        Args:
            targets (`list` of [`~hf_selfkd.losses.Target`]): the labels, of mixed images those of the partners too.
            num_items (`torch.Tensor` or `int`): rows of the whole optimizer step.

        Returns:
            `tuple`: the sum of the losses of the rows over `num_items`, and the sum itself without a gradient.
        """
        total = weighted([self.hard_sum(target.labels) for target in targets], targets)
        return total / num_items, total.detach()

    @lazy
    def log_probs(self) -> torch.Tensor:
        """[`~hf_selfkd.losses.log_softmax`] of the logits, without a gradient; made once for loss and history."""
        return log_softmax(self.logits.detach())

    @lazy
    def summary(self) -> Summary:
        """The [`~hf_selfkd.losses.Summary`] of the logits, without a gradient; made once for loss and history."""
        return summarize(self.logits.detach(), self.top_k)

    @lazy
    def label_log_probs(self) -> torch.Tensor:
        """Log-probabilities of the labels, `[R]`, without a gradient; arbitrary where there is none."""
        return label_entries(self.logits.detach(), self.labels).float() - self.summary.log_norm


@dataclass
class BernoulliRows(Rows):
    """
    Rows of two classes, no and yes, whose scores are 0 and the log-odds of yes. All of them have a label.

    Args:
        odds (`torch.FloatTensor` of shape `[R]`): log-odds of yes.
    """

    odds: torch.Tensor | None = None

    @classmethod
    def of(cls, odds: torch.Tensor, labels: torch.Tensor) -> BernoulliRows:
        """
        The rows of a model that gives log-odds.

        Args:
            odds (`torch.FloatTensor` of shape `[R]`): log-odds of yes.
            labels (`torch.LongTensor` of shape `[R]`): 0 or 1.
        """
        return cls(F.pad(odds.unsqueeze(-1), (1, 0)), labels, odds=odds)

    def hard_sum(self, labels: torch.Tensor) -> torch.Tensor:
        known, yes = labelled(labels).float(), labels.float()
        return F.binary_cross_entropy_with_logits(self.odds.float(), yes, known, reduction="sum")

    def hard_loss(self, targets: list[Target], num_items: Any) -> tuple[torch.Tensor, torch.Tensor]:
        # The mean of a batch first: its gradient is then that of `BCEWithLogitsLoss` to the bit.
        odds = self.odds.float()
        means = [F.binary_cross_entropy_with_logits(odds, target.labels.float()) for target in targets]
        mean, count = weighted(means, targets), len(odds)
        return mean * (count / num_items), mean.detach() * count
