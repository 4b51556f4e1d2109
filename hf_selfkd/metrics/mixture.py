"""What earlier predictions are worth beside present ones: their weight in a mixture of both, on held-out data."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..losses.soft_targets import chunks, label_entries


Reduce = Callable[[torch.Tensor], torch.Tensor]
WEIGHTS = torch.linspace(0, 1, 201)


@dataclass
class Look:
    """
    What a model says of held-out data.

    Args:
        temperature (`float`): at which its predictions would be calibrated.
        log_probs (`torch.FloatTensor` of shape `[R]`): what it gives the label of each row, of this process.
    """

    temperature: float
    log_probs: torch.Tensor


@torch.no_grad()
def label_log_probs(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """
    Log-probabilities `[R]`, float32, of the labels `[R]`, all of them classes, under the scores `[R, C]`.
    """
    parts = [label_entries(logits[part].float().log_softmax(dim=-1), labels[part]) for part in chunks(logits)]
    return torch.cat(parts) if parts else logits.new_zeros(0, dtype=torch.float32)


def past_weight(now: torch.Tensor, before: torch.Tensor, reduce: Reduce = lambda sums: sums) -> float:
    """
    The weight of the earlier predictions in a mixture with the present ones.

    The mean of `w` in [0, 1], each as likely before, after labels were seen that have the probability `(1 - w) * now +
    w * before` each: a Bayesian mixture of two experts. Where labels tell nothing, as without any, that is a half.

    Args:
        now (`torch.FloatTensor` of shape `[R]`): log-probabilities of the labels under the present predictions.
        before (`torch.FloatTensor` of shape `[R]`): under the earlier ones.
        reduce (`Callable`, *optional*): adds the sums of all processes up.

    Returns:
        `float`: NaN if some log-probabilities are.
    """
    weights = WEIGHTS.to(now.device).unsqueeze(-1)
    gains = torch.logaddexp(torch.log1p(-weights), weights.log() + (before - now))  # over the present ones alone
    gains = reduce(gains.sum(dim=-1)).double().cpu()
    gains[[0, -1]] -= math.log(2)  # the trapezoidal rule
    chances = gains.softmax(dim=0)
    return math.nan if not bool(chances.isfinite().all()) else float(chances @ WEIGHTS.double())
