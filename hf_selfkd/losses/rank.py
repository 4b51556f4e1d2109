"""The order of the present scores as a teacher: Zipf's label smoothing, and what USKD makes of the label."""

from __future__ import annotations

from functools import lru_cache, partial

import numpy as np
import torch
import torch.nn.functional as F

from .by_chunks import by_chunks
from .soft_targets import LOG_ZERO, chunks, label_entries, labelled
from .summary import top_entries


EXACT_RANKS = 1024  # classes beside the label up to which each has a rank of its own
FIRST_RANKS = 256  # of more classes, as many have one, and the others share what is left


@lru_cache
def _zipf(others: int) -> tuple[np.ndarray, float, float]:
    """
    Zipf's law over so many classes: the shares of the first ranks, that of each class further behind, and the sum of
    `share * log(share)`.
    """
    ranks = others if others <= EXACT_RANKS else FIRST_RANKS
    law = 1 / np.arange(1, others + 1)
    law /= law.sum()
    behind = float(law[ranks:].mean()) if others > ranks else 0.0
    law[ranks:] = behind
    return law[:ranks].astype(np.float32), behind, float((law * np.log(law)).sum())


def _divergences(
    shares: torch.Tensor, behind: float, constant: float, logits: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor]:
    """What [`zipf_divergence`] gives, of rows that are few or a chunk of them."""
    label = labels.clamp_min(0).unsqueeze(-1)
    scores = logits.float().scatter(-1, label, -torch.inf)
    log_norm = torch.logsumexp(scores, dim=-1, keepdim=True)
    # Shares belong to ranks, so the sorted scores are all that is needed: no target of the size of the logits.
    first = (top_entries(scores, len(shares))[0] - log_norm).clamp_min(LOG_ZERO)
    loss = constant - first @ shares
    if behind:
        every = (scores - log_norm).clamp_min(LOG_ZERO).scatter(-1, label, 0.0)
        loss = loss - behind * (every.sum(-1) - first.sum(-1))
    return (loss.masked_fill(~labelled(labels), 0.0),)


def zipf_divergence(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """
    Kullback-Leibler divergence of the present prediction among the classes that are not the label from Zipf's law over
    their ranks: the class with the r-th largest score should have a share proportional to `1 / r` (Zipf's label
    smoothing, Liang et al., ECCV 2022). Of more than 1,024 such classes the first 256 are ranked, the others are to
    share the rest evenly.

    Args:
        logits (`torch.FloatTensor` of shape `[R, C]`): present scores; no gradient flows through their order.
        labels (`torch.LongTensor` of shape `[R]`): classes; -100 for rows that do not count.

    Returns:
        `torch.FloatTensor` of shape `[R]`: in nats, float32; 0 where there is no label.
    """
    shares, behind, constant = _zipf(logits.shape[-1] - 1)
    function = partial(_divergences, torch.from_numpy(shares).to(logits.device), behind, constant)
    return by_chunks(function, logits, labels)[0]


def _weighted_losses(logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor]:
    return (weights * F.cross_entropy(logits.float(), labels, reduction="none"),)


def label_offset(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """
    What the labels count more, or less, than in cross-entropy: `-(p**2 - mean(p**2)) * log(p)` with the probability
    `p` of the label, its square without a gradient and the mean over the labelled rows given. With cross-entropy added
    this is the target part of USKD (Yang et al., ICCV 2023), by which labels that are told well count most.

    Args:
        logits (`torch.FloatTensor` of shape `[R, C]`): present scores.
        labels (`torch.LongTensor` of shape `[R]`): classes; -100 for rows that do not count.

    Returns:
        `torch.FloatTensor` of shape `[R]`: in nats, float32; 0 where there is no label.
    """
    squares = torch.empty(len(logits), device=logits.device)
    with torch.no_grad():
        for part in chunks(logits):
            scores = logits[part].float()
            squares[part] = (2 * (label_entries(scores, labels[part]) - torch.logsumexp(scores, dim=-1))).exp()
    mask = labelled(labels)
    squares = squares.masked_fill(~mask, 0.0)
    return by_chunks(_weighted_losses, logits, labels, squares - squares.sum() / mask.sum().clamp_min(1))[0]
