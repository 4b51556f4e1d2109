"""What a user sees while it runs: the means that are logged beside the training loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import groupby

import torch

from ..losses.soft import target_entropy
from ..losses.soft_targets import MAX_HELD, RowLosses, Target, labelled, weighted, where_mask


SUMS = ("hard_loss", "soft_loss", "target_entropy", "past_agreement", "distilled", "rows", "rows_with_entropy")


@torch.no_grad()
def measures(
    targets: list[Target], parts: list[RowLosses], alpha: float, hard: torch.Tensor | None = None
) -> torch.Tensor:
    """
    What rows add to the log, on the device.

    Args:
        targets (`list` of [`~hf_selfkd.losses.Target`]): the labels and past rows that were learned from.
        parts (`list` of [`~hf_selfkd.losses.RowLosses`]): the losses of each side; empty without a past.
        alpha (`float`): the weight of the past.
        hard (`torch.Tensor`, *optional*): sum of the hard losses of the rows, where `parts` do not tell.

    Returns:
        `torch.FloatTensor` of shape `[7]`: sums over the rows, in the order of `SUMS`.
    """
    labels, soft_targets = targets[0].labels, targets[0].soft_targets
    whole = bool(parts) and parts[0].distilled is None  # every row has a label, too
    rows = torch.ones_like(parts[0].hard) if whole else labelled(labels).float()
    with_entropy = rows if len(targets) == 1 else torch.zeros_like(rows)  # the target of a mixed image is another one
    if not parts:
        zero = torch.zeros_like(hard, dtype=torch.float32)
        return torch.stack((hard.float(), zero, zero, zero, zero, rows.sum(), with_entropy.sum()))
    distilled = rows if whole else parts[0].distilled.float()
    guess = soft_targets.log_probs.argmax(dim=-1) if soft_targets.index is None else soft_targets.index[:, 0]
    entropy = (
        where_mask(target_entropy(soft_targets, labels, alpha), parts[0].distilled)
        if len(targets) == 1
        else with_entropy
    )
    columns = (
        weighted([part.hard for part in parts], targets),
        weighted([part.soft for part in parts], targets),
        entropy,
        where_mask((guess == labels).float(), parts[0].distilled),
        distilled,
        rows,
        with_entropy,
    )
    sums = torch.stack(columns).sum(dim=-1)
    if hard is not None:
        sums[0] = hard
    return sums


def _kind(batch: tuple) -> tuple:
    """What batches must have in common to be measured as one; `batch` holds arguments of [`measures`]."""
    targets, parts, alpha, hard = batch
    soft_targets = targets[0].soft_targets
    of_past = (
        soft_targets is None or (soft_targets.index is None, soft_targets.tail),
        bool(parts) and parts[0].distilled is None,
    )
    return len(targets), len(parts), alpha, hard is None, of_past


def _joined(batches: list[tuple]) -> tuple:
    """One-sided batches of a kind as one batch: each operation runs once, on the rows of all."""
    (first,), parts, alpha, hard = batches[0]
    soft_targets = first.soft_targets
    if soft_targets is not None:
        log_probs, mask, index = (
            torch.cat([getattr(target.soft_targets, name) for (target,), *_ in batches]) if part is not None else None
            for name, part in (
                ("log_probs", soft_targets.log_probs),
                ("mask", soft_targets.mask),
                ("index", soft_targets.index),
            )
        )
        soft_targets = replace(soft_targets, log_probs=log_probs, mask=mask, index=index)
    if parts:
        hards, softs = (torch.cat([getattr(part, name) for _, (part,), *_ in batches]) for name in ("hard", "soft"))
        distilled = parts[0].distilled
        if distilled is not None:
            distilled = torch.cat([part.distilled for _, (part,), *_ in batches])
        parts = [RowLosses(hards, hards, softs, distilled)]
    labels = torch.cat([target.labels for (target,), *_ in batches])
    hard = None if hard is None else torch.stack([batch[3] for batch in batches]).sum()
    return [Target(labels, soft_targets, None)], parts, alpha, hard


class RunningMeans:
    """
    Sums on the device, so that logging waits for it once; see [`~SelfKDMixin.log`].

    Small batches wait and are measured several at a time: on a small batch, fetching code that has not just run into
    the processor's cache takes longer than running it.
    """

    def __init__(self):
        self.sums: torch.Tensor | float = 0.0
        self.alpha, self.batches = 0.0, 0  # the same in every process
        self.waiting: list[tuple] = []  # arguments of `measures`
        self.held = 0  # elements of past rows among them

    def update(
        self, targets: list[Target], parts: list[RowLosses], alpha: float, hard: torch.Tensor | None = None
    ) -> None:
        """Add a batch; the arguments are those of [`measures`]."""
        self.alpha += alpha
        self.batches += 1
        for part in parts:
            part.total = part.hard  # nobody asks for it any more, and the graph must not wait
        self.waiting.append((targets, parts, alpha, hard))
        for target in targets:
            self.held += (
                target.labels.numel() if target.soft_targets is None else target.soft_targets.log_probs.numel()
            )
        if self.held > MAX_HELD:
            self._sum()

    def _sum(self) -> None:
        for (num_sides, *_), group in groupby(self.waiting, _kind):
            batches = list(group)
            for batch in [_joined(batches)] if num_sides == 1 and len(batches) > 1 else batches:
                self.sums = self.sums + measures(*batch)
        self.waiting, self.held = [], 0

    def take(self, reduce: Callable[[torch.Tensor], torch.Tensor], distils: bool) -> dict[str, float]:
        """The means since the last call, of all processes; this waits for the device."""
        if not self.batches:
            return {}
        self._sum()
        sums = dict(zip(SUMS, reduce(self.sums).tolist(), strict=True))
        means = {"hard_loss": (sums["hard_loss"], sums["rows"]), "alpha": (self.alpha, self.batches)}
        if distils:
            means["soft_loss"] = (sums["soft_loss"], sums["distilled"])
            means["past_agreement"] = (sums["past_agreement"], sums["distilled"])
            means["rows_with_history"] = (sums["distilled"], sums["rows"])
            means["target_entropy"] = (sums["target_entropy"], sums["rows_with_entropy"])
        self.__init__()
        return {name: total / weight for name, (total, weight) in means.items() if weight > 0}
