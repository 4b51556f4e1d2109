"""
How sure an exit has to be: thresholds of which it can be shown, on validation data, what they cost in accuracy.

Learn then Test (Angelopoulos et al., 2021, arXiv 2110.01052) with a fixed sequence of hypotheses: thresholds are
tested from the strictest to laxer ones, each by an exact binomial bound, until the first that does not pass. No matter
how many are tested, the probability that the last one that has passed does not keep its promise is at most
`1 - confidence`. Jazbec et al. (2024, arXiv 2405.20915, "Fast yet Safe") control the risk of early exits. All exits
have one threshold in common, so that there is one sequence. The thresholds that are tested do not depend on the data.
"""

from __future__ import annotations

import math

import torch


NEVER = 2.0  # a threshold that no probability reaches


def levels(num_classes: int) -> list[float]:
    """
    The thresholds that are tested, from the strictest, at which no sample leaves, to 0, at which all leave first.

    Args:
        num_classes (`int`): of the model; no largest probability is below `1 / num_classes`.
    """
    lowest = -math.log(max(num_classes - 1, 1))  # of the log odds
    steps = int((14 - lowest) / 0.1) + 1
    return [NEVER, *(1 / (1 + math.exp(0.1 * step - 14)) for step in range(steps)), 0.0]


def _log_binomial(successes: torch.Tensor, trials: int, rate: float) -> torch.Tensor:
    """Natural log of the probability of each number of successes."""
    n = torch.tensor(float(trials), dtype=torch.float64)
    ways = torch.lgamma(n + 1) - torch.lgamma(successes + 1) - torch.lgamma(n - successes + 1)
    return ways + successes * math.log(rate) + (n - successes) * math.log1p(-rate)


def most_failures(samples: int, rate: float, confidence: float) -> int:
    """
    The most failures among some samples that show, with a confidence, that they happen at most at some rate: the
    largest `k` with `P(Binomial(samples, rate) <= k) <= 1 - confidence`; -1 if not even 0 does.

    Args:
        samples (`int`): independent draws.
        rate (`float`): in (0, 1).
        confidence (`float`): in (0, 1).
    """
    counts = torch.arange(samples + 1, dtype=torch.float64)
    below = torch.logcumsumexp(_log_binomial(counts, samples, rate), dim=0)
    return int((below <= math.log(1 - confidence)).sum()) - 1


def upper_bound(failures: int, samples: int, confidence: float) -> float:
    """
    The exact upper bound (Clopper and Pearson, 1934) of the rate of failures.

    Args:
        failures (`int`): that were seen.
        samples (`int`): independent draws.
        confidence (`float`): in (0, 1), of this one bound.
    """
    if failures >= samples:
        return 1.0
    counts = torch.arange(failures + 1, dtype=torch.float64)
    low, high = failures / samples, 1.0
    for _ in range(60):
        rate = (low + high) / 2
        inside = 0 < rate < 1 and torch.logsumexp(_log_binomial(counts, samples, rate), 0) > math.log(1 - confidence)
        low, high = (rate, high) if inside else (low, rate)
    return high


def first_sure(confidences: torch.Tensor, threshold: float) -> torch.Tensor:
    """
    Which exit answers each sample.

    Args:
        confidences (`torch.FloatTensor` of shape `[E, N]`): the largest probability at each exit.
        threshold (`float`): that it has to reach.

    Returns:
        `torch.LongTensor` of shape `[N]`: an index of an exit; `E` for the model itself.
    """
    sure = confidences >= threshold
    return torch.where(sure.any(dim=0), sure.int().argmax(dim=0), len(confidences))


def failures_at(confidences: torch.Tensor, fails: torch.Tensor, threshold: float) -> int:
    """
    How many answers fail.

    Args:
        confidences (`torch.FloatTensor` of shape `[E, N]`): the largest probability at each exit.
        fails (`torch.BoolTensor` of shape `[E + 1, N]`): whether the answer of each exit and the model fails.
        threshold (`float`): of all exits.
    """
    return int(fails.gather(0, first_sure(confidences, threshold).unsqueeze(0)).sum())


def laxest_shown(
    confidences: torch.Tensor, fails: torch.Tensor, rate: float, confidence: float, num_classes: int
) -> float | None:
    """
    The laxest threshold that a fixed sequence of tests reaches, each of which shows that at most some rate of answers
    fails.

    Args:
        confidences (`torch.FloatTensor` of shape `[E, N]`): the largest probability at each exit.
        fails (`torch.BoolTensor` of shape `[E + 1, N]`): whether the answer of each exit and the model fails.
        rate (`float`): of failures, in (0, 1).
        confidence (`float`): the probability, over draws of the `N` samples, that the threshold keeps the promise.
        num_classes (`int`): of the model.

    Returns:
        `float`: `None` if not even the whole model is shown to fail so rarely.
    """
    allowed, chosen = most_failures(fails.shape[1], rate, confidence), None
    for threshold in levels(num_classes):
        if failures_at(confidences, fails, threshold) > allowed:
            break
        chosen = threshold
    return chosen


def strictest_affordable(confidences: torch.Tensor, costs: list[float], target: float, num_classes: int) -> float:
    """
    The strictest threshold at which samples cost no more than some share of the whole model's work on average.

    Args:
        confidences (`torch.FloatTensor` of shape `[E, N]`): the largest probability at each exit.
        costs (`list[float]`): the share of work of each exit and of the whole model, heads included.
        target (`float`): the share that is aimed at.
        num_classes (`int`): of the model.

    Raises:
        ValueError: if the first exit alone costs more.
    """
    weights = torch.tensor(costs, dtype=torch.float64)
    for threshold in levels(num_classes):
        if float(weights[first_sure(confidences, threshold)].mean()) <= target:
            return threshold
    raise ValueError(
        f"target_cost={target} is below {costs[0]:.3f}, the cost of the first exit: set a larger one, or put a head "
        "on an earlier layer."
    )
