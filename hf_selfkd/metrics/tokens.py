"""How well a language model predicts the tokens of an evaluation, summed batch by batch."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..losses.soft_targets import chunks, label_entries, labelled


class TokenMetrics:
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
    def update(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Take note of the predictions `[B, L, V]` for the labels `[B, L]` of a batch."""
        flat, label = logits.flatten(0, 1), labels.flatten()
        nll, confidence, guess = (torch.empty(len(flat), device=flat.device) for _ in range(3))
        for part in chunks(flat):
            rows = flat[part].float()
            best = rows.max(dim=-1)
            norm = torch.logsumexp(rows, dim=-1)
            nll[part] = norm - label_entries(rows, label[part])
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
        nll, *metrics = self.sums.tolist()
        count, confidence, correct = (metrics[i * self.bins : (i + 1) * self.bins] for i in range(3))
        total = sum(count)
        if not total:
            return {}
        gap = sum(abs(a - b) for a, b in zip(confidence, correct, strict=True))
        return {"token_nll": nll / total, "token_accuracy": sum(correct) / total, "token_ece": 100 * gap / total}
