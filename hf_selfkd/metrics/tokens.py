"""How well a language model predicts the tokens of an evaluation, summed batch by batch."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from ..losses.soft_targets import chunks, label_entries, labelled
from .calibration import perplexity


logger = logging.getLogger(__name__)

BATCHES_HELD = 64  # batches whose sums stay on the device, in float32, before they are added in float64 on the host


class TokenMetrics:
    """
    How well the target tokens of an evaluation were predicted. Only sums are kept: of each sample at first, so that
    the samples that fill the last batch of several processes can be dropped again, then of each batch.

    Logits may have any float dtype and hold -inf (probability 0). They are read in chunks, no copy of all of them is
    made, and the device is waited for once in `BATCHES_HELD` batches. It needs no float64, which some have not.

    Args:
        gather (`Callable`): concatenates `[B, n]` of all processes, without the samples that were repeated.
        bins (`int`, *optional*, defaults to 10): of the calibration error, right-closed.

    Example:
        ```python
        metrics = TokenMetrics(accelerator.gather_for_metrics)
        for batch in dataloader:
            metrics.update(model(**batch).logits, next_tokens(batch["labels"]))
            metrics.gather()
        metrics.compute()["perplexity"]
        ```
    """

    def __init__(self, gather: Callable[[torch.Tensor], torch.Tensor], bins: int = 10):
        self.gather_samples, self.bins = gather, bins
        self.seen: torch.Tensor | None = None  # `[B, 1 + 3 * bins]`: sum of nll; count, confidence, correct by bin
        self._held: list[torch.Tensor] = []
        self._sums: torch.Tensor | None = None

    @torch.no_grad()
    def update(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """
        Take note of the predictions for a batch, in place of those noted before if [`~TokenMetrics.gather`] was not
        called since.

        Args:
            logits (`torch.FloatTensor` of shape `[B, L, V]`): scores of the tokens.
            labels (`torch.LongTensor` of shape `[B, L]`):
                the tokens, where their predictions stand (those of a causal language model are shifted already); -100
                is left out.

        Raises:
            ValueError: for other shapes.
        """
        if logits.dim() != 3 or labels.shape != logits.shape[:2]:
            raise ValueError(
                f"labels: shape {list(labels.shape)} does not fit logits of shape {list(logits.shape)}; pass [B, L] "
                "and [B, L, V]."
            )
        nll, confidence, correct = (torch.empty(labels.shape, device=logits.device) for _ in range(3))
        for place, rows, label in _chunks(logits, labels):
            log_probs = F.log_softmax(rows, dim=-1, dtype=torch.float32)
            nll.view(-1)[place] = -label_entries(log_probs, label)
            confidence.view(-1)[place] = log_probs.amax(-1).exp()
            correct.view(-1)[place] = (rows.argmax(dim=-1) == label).float()
        counts = labelled(labels)
        edges = torch.arange(1, self.bins, device=logits.device) / self.bins
        bin_of = torch.bucketize(confidence, edges)
        # NaN is in no bin, but its row counts.
        in_bin = (bin_of.unsqueeze(-1) == torch.arange(self.bins, device=logits.device)) & counts.unsqueeze(-1)
        nll, *parts = (torch.where(counts, values, 0.0) for values in (nll, confidence, correct))
        by_bin = [torch.where(in_bin, part.unsqueeze(-1), 0.0).sum(1) for part in parts]
        self.seen = torch.cat([nll.sum(1, keepdim=True), in_bin.sum(1).float(), *by_bin], dim=-1)

    def gather(self) -> None:
        """Add the batch that was seen last."""
        if self.seen is not None:
            self._held.append(self.gather_samples(self.seen).sum(0))
            self.seen = None
        if len(self._held) >= BATCHES_HELD:
            self._add_held()

    def _add_held(self) -> None:
        if self._held:
            sums = torch.stack(self._held).cpu().double().sum(0)
            self._sums = sums if self._sums is None else self._sums + sums
            self._held = []

    def compute(self) -> dict[str, float]:
        """
        The metrics over all tokens so far; this waits for the device.

        Returns:
            `dict[str, float]`: `token_nll` (nats), `token_accuracy` (a fraction), `token_ece` (per cent) and
            `perplexity`, the exponential of `token_nll`; empty if no batch had labels. Of labels that are all -100, or
            of predictions that are no numbers, they are NaN, with a warning.
        """
        self._add_held()
        if self._sums is None:
            return {}
        nll, *metrics = self._sums.tolist()
        count, confidence, correct = (metrics[i * self.bins : (i + 1) * self.bins] for i in range(3))
        total = sum(count)
        if not total or math.isnan(nll):
            fault = "logits: NaN, +inf or nothing but -inf for a token" if total else "labels: all are -100"
            logger.warning(f"{fault}; the token metrics of this evaluation are NaN.")
            return dict.fromkeys(("token_nll", "token_accuracy", "token_ece", "perplexity"), math.nan)
        gap = sum(abs(a - b) for a, b in zip(confidence, correct, strict=True))
        mean = nll / total
        return {
            "token_nll": mean,
            "token_accuracy": sum(correct) / total,
            "token_ece": 100 * gap / total,
            "perplexity": perplexity(mean),
        }


def _chunks(logits: torch.Tensor, labels: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Chunks of rows `[R, V]` with their place among all rows and their labels; views, whatever the strides."""
    label, length = labels.reshape(-1), labels.shape[1]
    # `flatten` would copy logits that are a slice, such as all but the last position.
    samples = [logits.flatten(0, 1)] if logits.is_contiguous() else logits.unbind(0)
    for index, sample in enumerate(samples):
        for part in chunks(sample):
            start = index * length + part.start
            rows = sample[part]
            place = slice(start, start + len(rows))
            yield place, rows, label[place]
