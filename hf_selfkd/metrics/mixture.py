"""What earlier predictions are worth beside present ones: their weight in a mixture of both, on held-out data."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch


Reduce = Callable[[torch.Tensor], torch.Tensor]
WEIGHTS = torch.linspace(0, 1, 201)


@dataclass
class Look:
    """
    What a model says of held-out data.

    Args:
        temperature (`float`): at which its predictions are calibrated.
        log_probs (`torch.FloatTensor` of shape `[R]`):
            what it gives the label of each row at that temperature, of this process.
    """

    temperature: float
    log_probs: torch.Tensor


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
