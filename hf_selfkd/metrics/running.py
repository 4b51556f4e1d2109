"""What a user sees while a model trains: the means that are logged beside the training loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby

import torch

from ..losses.soft import target_entropy
from ..losses.soft_targets import MAX_HELD, RowLosses, SoftTargets, Target, labelled, weighted, where_mask


MIN_SAMPLE = 256  # rows that are kept of a batch which is too large to be kept whole

_OF_PAST = ("past_agreement", "rows_with_history", "target_entropy")

Terms = dict[str, tuple[torch.Tensor, torch.Tensor]]  # sum and weight of each mean, scalars or a value `[R]` each


@dataclass
class _Batch:
    """What the log needs of the rows of a batch; of mixed images, the labels and soft targets are the samples' own."""

    labels: torch.Tensor
    soft_targets: SoftTargets | None
    hard: torch.Tensor | None
    soft: torch.Tensor | None
    distilled: torch.Tensor | None  # `None` for all rows, where there are soft targets
    alpha: float
    hard_sum: torch.Tensor | None
    soft_sum: torch.Tensor | None
    mixed: bool

    @property
    def size(self) -> int:
        return self.labels.numel() if self.soft_targets is None else self.soft_targets.log_probs.numel()

    @property
    def kind(self) -> tuple:
        """What batches must have in common to be measured as one."""
        soft = self.soft_targets
        form = None
        if soft is not None:
            form = soft.index is None, soft.tail, soft.categorical, self.distilled is None, soft.log_probs.shape[-1]
        return self.mixed, self.alpha, self.hard_sum is None, self.soft_sum is None, form

    def rows(self) -> torch.Tensor:
        """1 for each labelled row, `[R]`."""
        if self.soft_targets is not None and self.distilled is None:
            return torch.ones_like(self.labels, dtype=torch.float32)
        return labelled(self.labels).float()

    def sample(self, size: int) -> _Batch:
        """Every n-th row, about `size` of them, as a copy that leaves the memory of the batch free."""
        step = -(-len(self.labels) // size)
        order = torch.arange(0, len(self.labels), step, device=self.labels.device)
        soft = None if self.soft_targets is None else self.soft_targets.select(order)
        distilled = None if self.distilled is None else self.distilled[order]
        return replace(self, labels=self.labels[order], soft_targets=soft, hard=None, soft=None, distilled=distilled)


def _joined(batches: list[_Batch]) -> Iterator[_Batch]:
    """Neighbours of one kind as one batch: each operation runs once, on the rows of all."""
    for _, group in groupby(batches, lambda batch: batch.kind):
        first, *others = group
        yield _join([first, *others]) if others else first


def _join(batches: list[_Batch]) -> _Batch:
    def cat(values: list[torch.Tensor | None]) -> torch.Tensor | None:
        return None if values[0] is None else torch.cat(values)

    rows = {name: cat([getattr(batch, name) for batch in batches]) for name in ("labels", "hard", "soft", "distilled")}
    soft = batches[0].soft_targets
    if soft is not None:
        names = ("log_probs", "mask", "index")
        parts = {name: cat([getattr(batch.soft_targets, name) for batch in batches]) for name in names}
        soft = replace(soft, **parts)
    sums = {}
    for name in ("hard_sum", "soft_sum"):
        values = [getattr(batch, name) for batch in batches]
        sums[name] = None if values[0] is None else torch.stack(values).sum()
    return replace(batches[0], **rows, **sums, soft_targets=soft)


def _loss_terms(batch: _Batch) -> Terms:
    rows = batch.rows()
    if batch.soft_targets is None:
        count, zero = rows.sum(), torch.zeros_like(batch.hard_sum, dtype=torch.float32)
        soft = (zero, zero) if batch.soft_sum is None else (batch.soft_sum.float(), count)
        return {
            "hard_loss": (batch.hard_sum.float(), count),
            "soft_loss": soft,
            "rows_with_history": (zero, count),
        }
    distilled = rows if batch.distilled is None else batch.distilled.float()
    return {
        "hard_loss": (batch.hard, rows),
        "soft_loss": (batch.soft, distilled),
        "rows_with_history": (distilled, rows),
    }


def _target_terms(batch: _Batch) -> Terms:
    rows, soft = batch.rows(), batch.soft_targets
    zero = torch.zeros_like(rows)
    # The target of a mixed image is another one, and that of a row whose classes are independent has no such entropy.
    without = batch.mixed or (soft is not None and not soft.categorical)
    with_entropy = zero if without else rows
    if soft is None:
        return {"target_entropy": (zero, with_entropy), "past_agreement": (zero, zero)}
    entropy = zero if without else where_mask(target_entropy(soft, batch.labels, batch.alpha), batch.distilled)
    guess = soft.log_probs.argmax(dim=-1) if soft.index is None else soft.index[:, 0]
    agrees = where_mask((guess == batch.labels).float(), batch.distilled)
    distilled = rows if batch.distilled is None else batch.distilled.float()
    return {"target_entropy": (entropy, with_entropy), "past_agreement": (agrees, distilled)}


class RunningMeans:
    """
    Means of a training run between two log entries: a dictionary of sums and weights on the device, so that logging
    waits for the device once and reduces one vector over the processes.

    - `hard_loss`, `soft_loss` and `rows_with_history` are exact means over all rows since the last entry, `alpha` is
      the mean over all batches.
    - `target_entropy` and `past_agreement` have to read the soft targets once more. They are means over the last
      batches before the entry only: all of them while these hold at most `MAX_HELD` elements of soft targets together
      and else the latest, with about that many elements or more. Of a batch that is larger by itself, they are means
      over a sample of every n-th row (`MAX_HELD` elements, at least `MIN_SAMPLE` rows).
    - Others may add terms of their own, such as the loss of a head.

    Small batches wait and are measured several at a time: on a small batch, fetching code that has not just run into
    the processor's cache takes longer than running it.

    Args:
        terms (`Iterable[str]`, *optional*):
            names of further terms that `update` will be given together. They are reduced over the processes even
            where this process had none of them, which keeps the processes in step.
    """

    def __init__(self, terms: Iterable[str] = ()):
        self._announced = tuple(terms)
        self._reset()

    def _reset(self) -> None:
        self._sums: dict[tuple[str, ...], torch.Tensor] = {}  # `[n, 2]`, sum and weight of the n terms of a group
        self._alpha, self._batches = 0.0, 0  # the same in every process
        self._waiting: list[_Batch] = []  # not added up yet
        self._held = 0  # elements of soft targets among them
        self._recent: list[_Batch] = []  # added up, but for the terms of their soft targets

    @torch.no_grad()
    def update(
        self,
        targets: list[Target],
        losses: list[RowLosses],
        alpha: float,
        hard: torch.Tensor | None = None,
        terms: Terms | None = None,
        soft: torch.Tensor | None = None,
    ) -> None:
        """
        Add a batch; this does not wait for the device.

        Args:
            targets (`list` of [`~hf_selfkd.losses.Target`]):
                the labels and soft targets that were learned from: those of the samples and, for mixed images, those
                of their partners.
            losses (`list` of [`~hf_selfkd.losses.RowLosses`]): of each target; empty without soft targets.
            alpha (`float`): the weight of the soft targets.
            hard (`torch.Tensor`, *optional*): sum of the hard losses of the rows, where `losses` do not tell.
            terms (`dict`, *optional*): further sums with their weights, scalars on the device, by the name in the log.
            soft (`torch.Tensor`, *optional*): sum of the soft losses of all rows, where there are no `losses`.
        """
        if terms:
            self._add(terms)
        own, taught = targets[0], bool(losses)
        batch = _Batch(
            own.labels,
            own.soft_targets if taught else None,
            weighted([part.hard for part in losses], targets) if taught else None,
            weighted([part.soft for part in losses], targets) if taught else None,
            losses[0].distilled if taught else None,
            alpha,
            hard,
            soft,
            len(targets) > 1,
        )
        self._alpha += alpha
        self._batches += 1
        self._waiting.append(batch)
        self._held += batch.size
        if self._held > MAX_HELD:
            waited = self._add_waiting()
            self._recent = self._latest(waited)

    def _add(self, terms: Terms) -> torch.Tensor:
        columns = torch.stack([column for pair in terms.values() for column in pair])
        sums = (columns.sum(dim=-1) if columns.dim() > 1 else columns).float().view(-1, 2)
        names = tuple(terms)
        self._sums[names] = self._sums[names] + sums if names in self._sums else sums
        return self._sums[names]

    def _add_waiting(self) -> list[_Batch]:
        """Add the losses of the batches that wait; returns these batches."""
        waited = self._waiting
        for batch in _joined(waited):
            terms = _loss_terms(batch)
            if batch.hard_sum is not None and batch.soft_targets is not None:
                # The rows do not tell the hard loss of the batch: its sum does.
                terms["hard_loss"] = (torch.zeros_like(batch.hard), terms["hard_loss"][1])
                self._add(terms)[0, 0] += batch.hard_sum
            else:
                self._add(terms)
        self._waiting, self._held = [], 0
        return waited

    @staticmethod
    def _latest(batches: list[_Batch]) -> list[_Batch]:
        """The last of some batches, of `MAX_HELD` elements at most; at least a sample of one."""
        room, newest = MAX_HELD, batches[-1]
        if newest.size > room:
            return [newest.sample(max(MIN_SAMPLE, room * len(newest.labels) // newest.size))]
        first = len(batches)
        while first and batches[first - 1].size <= room:
            first -= 1
            room -= batches[first].size
        return batches[first:]

    @torch.no_grad()
    def take(self, reduce: Callable[[torch.Tensor], torch.Tensor], distils: bool) -> dict[str, float]:
        """
        The means since the last call, of all processes; this waits for the device.

        Args:
            reduce (`Callable`): sums a vector over the processes.
            distils (`bool`): whether the run has soft targets at all; without, their terms are left out.

        Returns:
            `dict[str, float]`: without the means over no rows.
        """
        if not self._batches:
            return {}
        recent = self._recent + self._waiting
        self._add_waiting()
        if distils:
            for batch in _joined(recent):
                self._add(_target_terms(batch))
        if self._announced and self._announced not in self._sums:
            some = next(iter(self._sums.values()))
            self._sums[self._announced] = some.new_zeros(len(self._announced), 2)
        groups = sorted(self._sums)  # the same order in every process
        pairs = reduce(torch.cat([self._sums[names] for names in groups])).tolist()
        means = {"alpha": (self._alpha, float(self._batches))}
        for name, (total, weight) in zip((name for names in groups for name in names), pairs, strict=True):
            before = means.get(name, (0.0, 0.0))
            means[name] = (before[0] + total, before[1] + weight)
        self._reset()
        shown = {name: pair for name, pair in means.items() if distils or name not in _OF_PAST}
        return {name: total / weight for name, (total, weight) in shown.items() if weight > 0}
