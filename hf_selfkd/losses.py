"""The loss of progressive self-distillation, as pure functions of rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .samples import IGNORE_INDEX


LOG_ZERO = -1.0e4  # a finite stand-in for log(0): exp gives exactly 0 and 0 * LOG_ZERO is 0, not NaN


@dataclass
class Past:
    """
    Past predictions for the rows of a batch, as log-probabilities at temperature 1.

    Args:
        log_probs (`torch.FloatTensor` of shape `[R, C]`, or `[R, k]` with `index`): float32; where `mask` is false the
            values are arbitrary.
        mask (`torch.BoolTensor` of shape `[R]`): which rows have a past prediction.
        index (`torch.LongTensor` of shape `[R, k]`, *optional*):
            classes of the entries; the mass that they lack belongs to the other classes together.
    """

    log_probs: torch.Tensor
    mask: torch.Tensor
    index: torch.Tensor | None = None

    def select(self, order: torch.Tensor) -> Past:
        """The rows in another order (`torch.LongTensor` of shape `[R]`)."""
        index = None if self.index is None else self.index[order]
        return Past(self.log_probs[order], self.mask[order], index)


@dataclass
class Side:
    """Labels `[R]` and past rows to learn from; `weight` is a scalar tensor for mixed images."""

    labels: torch.Tensor
    past: Past | None
    weight: torch.Tensor | None


def labelled(labels: torch.Tensor) -> torch.Tensor:
    """Which rows `[R]` have a label."""
    return labels != IGNORE_INDEX


def learning(side: Side) -> torch.Tensor:
    """Which rows `[R]` have both a label and a past prediction."""
    return side.past.mask & labelled(side.labels)


def weighted(values: list[torch.Tensor], sides: list[Side]) -> torch.Tensor:
    """The values of the sides as one, by their weights; a single value comes back untouched."""
    if len(values) == 1:
        return values[0]
    return sum(side.weight * value for side, value in zip(sides, values, strict=True))


def log_softmax(logits: torch.Tensor) -> torch.Tensor:
    """Log-probabilities in float32, with `LOG_ZERO` for classes of probability 0."""
    return F.log_softmax(logits.float(), dim=-1).clamp_min(LOG_ZERO)


def _log_rest(log_probs: torch.Tensor) -> torch.Tensor:
    """log(1 - sum of the given probabilities) along the last dimension, finite also where nothing is left."""
    kept = torch.logsumexp(log_probs, dim=-1).clamp_max(-1e-6)
    return torch.log(-torch.expm1(kept))


def _soften(log_probs: torch.Tensor, temperature: float, rest_classes: int) -> torch.Tensor:
    """Log-probabilities at a temperature; with a rest column (`rest_classes` > 0) its mass counts as spread evenly."""
    if temperature == 1.0:
        return log_probs
    scaled = log_probs / temperature
    if rest_classes:
        even = torch.full_like(scaled[..., -1:], rest_classes).log()
        scaled = torch.cat((scaled[..., :-1], (log_probs[..., -1:] - even) / temperature + even), dim=-1)
    return F.log_softmax(scaled, dim=-1)


def soft_cross_entropy(logits: torch.Tensor, past: Past, temperature: float = 1.0) -> torch.Tensor:
    """
    Cross-entropy of the present predictions under the past ones, one value per row.

    Args:
        logits (`torch.FloatTensor` of shape `[R, C]`): present scores.
        past ([`Past`]): targets; no gradient flows into them.
        temperature (`float`, *optional*, defaults to 1.0):
            softens both sides; the result is multiplied by its square (Hinton et al., 2015).

    Returns:
        `torch.FloatTensor` of shape `[R]`: in nats, float32; 0 where `past.mask` is false. With `past.index`, the
        classes outside the stored entries are one bucket, compared by their total mass.
    """
    return _soft(F.log_softmax(logits.float() / temperature, dim=-1), past, temperature)


def _soft(log_probs: torch.Tensor, past: Past, temperature: float) -> torch.Tensor:
    """[`soft_cross_entropy`] from present log-probabilities that are already at the temperature."""
    past_log_probs = past.log_probs.detach()
    rest = 0 if past.index is None else log_probs.shape[-1] - past.index.shape[-1]
    log_probs = log_probs.clamp_min(LOG_ZERO)
    if past.index is not None:
        log_probs = log_probs.gather(-1, past.index)
    if rest:
        log_probs = torch.cat((log_probs, _log_rest(log_probs).unsqueeze(-1)), dim=-1)
        past_log_probs = torch.cat((past_log_probs, _log_rest(past_log_probs).unsqueeze(-1)), dim=-1)
    target = _soften(past_log_probs, temperature, rest).exp()
    target.masked_fill_(~past.mask.unsqueeze(-1), 0.0)  # and not only the result: its gradient would be 0 * NaN
    return -(target * log_probs).sum(dim=-1) * temperature**2


def cross_entropy_sum(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum of the hard cross-entropies of rows `[R, C]` with labels `[R]`; label -100 counts nothing."""
    return F.cross_entropy(logits.float(), labels, reduction="sum")


@dataclass
class RowLosses:
    """Losses of each row, `[R]`, float32; `soft` is 0 where there is no past, `hard` where there is no label."""

    total: torch.Tensor
    hard: torch.Tensor
    soft: torch.Tensor


def progressive_cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, past: Past, alpha: float, temperature: float = 1.0
) -> RowLosses:
    """
    Cross-entropy with the target `(1 - alpha) * onehot + alpha * past` (PS-KD, Kim et al., ICCV 2021, section 3).

    The two parts are kept apart, so that a row without a past prediction costs exactly its hard cross-entropy and a
    poisoned past row cannot reach it; both come from one log-softmax.

    Args:
        logits (`torch.FloatTensor` of shape `[R, C]`): present scores.
        labels (`torch.LongTensor` of shape `[R]`): classes; -100 for rows that do not count.
        past ([`Past`]): past predictions and which rows have one.
        alpha (`float`): weight of the past, in [0, 1].
        temperature (`float`, *optional*, defaults to 1.0): see [`soft_cross_entropy`].

    Returns:
        [`RowLosses`]: in nats.
    """
    logits = logits.float()  # once, so that both parts of the gradient are added in float32
    log_probs = F.log_softmax(logits, dim=-1)
    hard = F.nll_loss(log_probs, labels, reduction="none")
    mask = past.mask & (labels != IGNORE_INDEX) & (alpha > 0)
    past = Past(past.log_probs, mask, past.index)
    soft = _soft(log_probs, past, 1.0) if temperature == 1.0 else soft_cross_entropy(logits, past, temperature)
    soft = torch.where(mask, soft, 0.0)
    total = torch.where(mask, (1 - alpha) * hard + alpha * soft, hard)
    return RowLosses(total, hard, soft)


def target_entropy(past: Past, labels: torch.Tensor, alpha: float) -> torch.Tensor:
    """
    Entropy of the targets `(1 - alpha) * onehot + alpha * past`, one value per row.

    Args:
        past ([`Past`]): past predictions.
        labels (`torch.LongTensor` of shape `[R]`): classes; a row with -100 gives an arbitrary value.
        alpha (`float`): weight of the past.

    Returns:
        `torch.FloatTensor` of shape `[R]`: in nats; with stored top-k entries the bucket (and the label, if it is not
        among the entries) counts as one class, which makes it a lower bound.
    """
    labels = labels.clamp_min(0).unsqueeze(-1)
    target = alpha * past.log_probs.exp()
    if past.index is None:
        target = target.scatter_add(-1, labels, torch.full_like(target[..., :1], 1 - alpha))
    else:
        hit = past.index == labels
        rest = (alpha - target.sum(dim=-1, keepdim=True)).clamp_min(0)
        rest = rest + (1 - alpha) * ~hit.any(dim=-1, keepdim=True)
        target = torch.cat((target + (1 - alpha) * hit, rest), dim=-1)
    return torch.special.entr(target).sum(dim=-1)
