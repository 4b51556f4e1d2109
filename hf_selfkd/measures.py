"""What a user sees while it runs: the means that are logged beside the training loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import groupby

import torch

from .losses import MAX_HELD, RowLosses, Side, chunks, labelled, of_label, only, target_entropy, weighted


SUMS = ("hard_loss", "soft_loss", "target_entropy", "past_agreement", "learners", "rows", "rows_with_entropy")


@torch.no_grad()
def measures(
    sides: list[Side], parts: list[RowLosses], alpha: float, hard: torch.Tensor | None = None
) -> torch.Tensor:
    """
    What rows add to the log, on the device.

    Args:
        sides (`list` of [`~hf_selfkd.losses.Side`]): the labels and past rows that were learned from.
        parts (`list` of [`~hf_selfkd.losses.RowLosses`]): the losses of each side; empty without a past.
        alpha (`float`): the weight of the past.
        hard (`torch.Tensor`, *optional*): sum of the hard losses of the rows, where `parts` do not tell.

    Returns:
        `torch.FloatTensor` of shape `[7]`: sums over the rows, in the order of `SUMS`.
    """
    labels, past = sides[0].labels, sides[0].past
    whole = bool(parts) and parts[0].learners is None  # every row has a label, too
    rows = torch.ones_like(parts[0].hard) if whole else labelled(labels).float()
    with_entropy = rows if len(sides) == 1 else torch.zeros_like(rows)  # the target of a mixed image is another one
    if not parts:
        zero = torch.zeros_like(hard, dtype=torch.float32)
        return torch.stack((hard.float(), zero, zero, zero, zero, rows.sum(), with_entropy.sum()))
    learners = rows if whole else parts[0].learners.float()
    guess = past.log_probs.argmax(dim=-1) if past.index is None else past.index[:, 0]
    entropy = only(target_entropy(past, labels, alpha), parts[0].learners) if len(sides) == 1 else with_entropy
    columns = (
        weighted([part.hard for part in parts], sides),
        weighted([part.soft for part in parts], sides),
        entropy,
        only((guess == labels).float(), parts[0].learners),
        learners,
        rows,
        with_entropy,
    )
    sums = torch.stack(columns).sum(dim=-1)
    if hard is not None:
        sums[0] = hard
    return sums


def _kind(batch: tuple) -> tuple:
    """What batches must have in common to be measured as one; `batch` holds arguments of [`measures`]."""
    sides, parts, alpha, hard = batch
    past = sides[0].past
    of_past = (past is None or (past.index is None, past.remainder), bool(parts) and parts[0].learners is None)
    return len(sides), len(parts), alpha, hard is None, of_past


def _joined(batches: list[tuple]) -> tuple:
    """One-sided batches of a kind as one batch: each operation runs once, on the rows of all."""
    (first,), parts, alpha, hard = batches[0]
    past = first.past
    if past is not None:
        log_probs, mask, index = (
            torch.cat([getattr(side.past, name) for (side,), *_ in batches]) if part is not None else None
            for name, part in (("log_probs", past.log_probs), ("mask", past.mask), ("index", past.index))
        )
        past = replace(past, log_probs=log_probs, mask=mask, index=index)
    if parts:
        hards, softs = (torch.cat([getattr(part, name) for _, (part,), *_ in batches]) for name in ("hard", "soft"))
        learners = parts[0].learners
        if learners is not None:
            learners = torch.cat([part.learners for _, (part,), *_ in batches])
        parts = [RowLosses(hards, hards, softs, learners)]
    labels = torch.cat([side.labels for (side,), *_ in batches])
    hard = None if hard is None else torch.stack([batch[3] for batch in batches]).sum()
    return [Side(labels, past, None)], parts, alpha, hard


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

    def add(self, sides: list[Side], parts: list[RowLosses], alpha: float, hard: torch.Tensor | None = None) -> None:
        """Add a batch; the arguments are those of [`measures`]."""
        self.alpha += alpha
        self.batches += 1
        for part in parts:
            part.total = part.hard  # nobody asks for it any more, and the graph must not wait
        self.waiting.append((sides, parts, alpha, hard))
        for side in sides:
            self.held += side.labels.numel() if side.past is None else side.past.log_probs.numel()
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
            means["soft_loss"] = (sums["soft_loss"], sums["learners"])
            means["past_agreement"] = (sums["past_agreement"], sums["learners"])
            means["rows_with_history"] = (sums["learners"], sums["rows"])
            means["target_entropy"] = (sums["target_entropy"], sums["rows_with_entropy"])
        self.__init__()
        return {name: total / weight for name, (total, weight) in means.items() if weight > 0}


class TokenFigures:
    """
    How well the target tokens of an evaluation were predicted: sums per sample, so that the samples that fill the last
    batch of several processes can be dropped again.

    Args:
        gather (`Callable`): concatenates `[B, n]` of all processes, without the samples that were repeated.
        bins (`int`, *optional*, defaults to 10): of the calibration error, right-closed.
    """

    def __init__(self, gather: Callable[[torch.Tensor], torch.Tensor], bins: int = 10):
        self.gather_samples, self.bins = gather, bins
        self.seen: torch.Tensor | None = None
        self.sums: torch.Tensor | float = 0.0

    @torch.no_grad()
    def see(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Take note of the predictions `[B, L, V]` for the labels `[B, L]` of a batch."""
        flat, label = logits.flatten(0, 1), labels.flatten()
        nll, confidence, guess = (torch.empty(len(flat), device=flat.device) for _ in range(3))
        for part in chunks(flat):
            rows = flat[part].float()
            best = rows.max(dim=-1)
            norm = torch.logsumexp(rows, dim=-1)
            nll[part] = norm - of_label(rows, label[part])
            confidence[part], guess[part] = (best.values - norm).exp(), (best.indices == label[part]).float()
        counts = labelled(labels)
        edges = torch.arange(1, self.bins, device=flat.device) / self.bins
        in_bin = torch.nn.functional.one_hot(torch.bucketize(confidence, edges).view_as(labels), self.bins)
        in_bin = in_bin * counts.unsqueeze(-1)
        parts = [torch.where(counts, values.view_as(labels), 0.0) for values in (nll, confidence, guess)]
        by_bin = [(in_bin * part.unsqueeze(-1)).sum(1) for part in parts[1:]]
        self.seen = torch.cat([parts[0].sum(1, keepdim=True), in_bin.sum(1), *by_bin], dim=-1)

    def gather(self) -> None:
        """Add the batch that was seen last."""
        if self.seen is not None:
            self.sums = self.sums + self.gather_samples(self.seen).double().sum(0)
        self.seen = None

    def compute(self) -> dict[str, float]:
        """`token_nll`, `token_accuracy` and `token_ece`; empty if no labels were seen."""
        if isinstance(self.sums, float):
            return {}
        nll, *figures = self.sums.tolist()
        count, confidence, correct = (figures[i * self.bins : (i + 1) * self.bins] for i in range(3))
        total = sum(count)
        if not total:
            return {}
        gap = sum(abs(a - b) for a, b in zip(confidence, correct, strict=True))
        return {"token_nll": nll / total, "token_accuracy": sum(correct) / total, "token_ece": 100 * gap / total}
