"""The soft term by itself, at any temperature; divergence from a teacher; entropy of the targets."""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F

from .by_chunks import by_chunks
from .entries import entries_and_tail
from .soft_targets import LOG_ZERO, SoftTargets, Tail, chunks, label_entries, log_softmax


def _log_rest(log_probs: torch.Tensor) -> torch.Tensor:
    """log(1 - sum of the given probabilities) along the last dimension, finite also where nothing is left."""
    kept = torch.logsumexp(log_probs, dim=-1, keepdim=True).clamp_max(-1e-6)
    return torch.log(-torch.expm1(kept))


def _soften(log_probs: torch.Tensor, temperature: float, rest_classes: int) -> torch.Tensor:
    """Log-probabilities at a temperature; the last of them stands for `rest_classes` even ones, if not 0."""
    if temperature == 1.0:
        return log_probs
    scaled = log_probs / temperature
    if rest_classes:
        even = math.log(rest_classes)
        scaled = torch.cat((scaled[..., :-1], (log_probs[..., -1:] - even) / temperature + even), dim=-1)
    return F.log_softmax(scaled, dim=-1)


def _columns(
    log_probs: torch.Tensor, soft_targets: SoftTargets, labels: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Present and past log-probabilities of the stored entries, the remainder as one more column; its classes."""
    present, stored = log_probs.gather(-1, soft_targets.index), soft_targets.log_probs
    others = log_probs.shape[-1] - soft_targets.index.shape[-1]
    if soft_targets.tail == "renormalize":
        return present, stored - torch.logsumexp(stored, dim=-1, keepdim=True), 0
    if not others:
        return present, stored, 0
    rest = _log_rest(stored)
    if soft_targets.tail == "label":
        label = labels.clamp_min(0).unsqueeze(-1)
        hit = soft_targets.index == label
        stored = torch.where(hit, torch.logaddexp(stored, rest), stored)
        rest = rest.masked_fill(hit.any(-1, keepdim=True), LOG_ZERO)
        return torch.cat((present, log_probs.gather(-1, label)), -1), torch.cat((stored, rest), -1), 0
    if soft_targets.tail == "uniform":
        column = (log_probs.sum(-1, keepdim=True) - present.sum(-1, keepdim=True)) / others
    else:
        column = _log_rest(present)
    return torch.cat((present, column), -1), torch.cat((stored, rest), -1), others


def soft_cross_entropy(
    logits: torch.Tensor, soft_targets: SoftTargets, temperature: float = 1.0, labels: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Cross-entropy of the present predictions under the past ones, one value per row, at any temperature.

    Args:
        logits (`torch.FloatTensor` of shape `[R, C]`): present scores.
        soft_targets ([`SoftTargets`]): targets; no gradient flows into them.
        temperature (`float`, *optional*, defaults to 1.0):
            softens both sides; the result is multiplied by its square (Hinton et al., 2015).
        labels (`torch.LongTensor` of shape `[R]`, *optional*): for a past whose remainder goes to the label.

    Returns:
        `torch.FloatTensor` of shape `[R]`: in nats, float32; 0 where `past.mask` is false.
    """
    past = (soft_targets.log_probs, soft_targets.mask, soft_targets.index)
    return by_chunks(partial(soft_losses, temperature, soft_targets.tail), logits, labels, *past)[0]


def soft_losses(
    temperature: float,
    tail: Tail,
    logits: torch.Tensor,
    labels: torch.Tensor | None,
    log_probs: torch.Tensor,
    mask: torch.Tensor,
    index: torch.Tensor | None,
) -> tuple[torch.Tensor]:
    """What [`soft_cross_entropy`] gives, of rows that are few or a chunk of them."""
    present, stored, others = F.log_softmax(logits.float() / temperature, dim=-1), log_probs, 0
    present = present.clamp_min(LOG_ZERO)
    if index is not None:
        present, stored, others = _columns(present, SoftTargets(log_probs, mask, index, tail), labels)
    target = _soften(stored.detach(), temperature, others).exp()
    # The target and not only the result: its gradient would be 0 * NaN.
    target = target.masked_fill(~mask.unsqueeze(-1), 0.0)
    return (-(target * present).sum(dim=-1) * temperature**2,)


def divergence(logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """
    Kullback-Leibler divergence of the present predictions from those of a teacher, one value per row, times the square
    of the temperature (Hinton et al., 2015).

    Args:
        logits (`torch.FloatTensor` of shape `[R, C]`): present scores.
        teacher_logits (`torch.FloatTensor` of shape `[R, C]`): the teacher's; no gradient flows into them.
        temperature (`float`, *optional*, defaults to 1.0): softens both.

    Returns:
        `torch.FloatTensor` of shape `[R]`: in nats, float32.
    """
    present = F.log_softmax(logits.float() / temperature, dim=-1).clamp_min(LOG_ZERO)
    teacher = log_softmax(teacher_logits.detach().float() / temperature)
    return (teacher.exp() * (teacher - present)).sum(dim=-1) * temperature**2


def target_entropy(soft_targets: SoftTargets, labels: torch.Tensor, alpha: float) -> torch.Tensor:
    """
    Entropy of the targets `(1 - alpha) * onehot + alpha * past`, one value per row, without making them.

    Args:
        soft_targets ([`SoftTargets`]): past predictions.
        labels (`torch.LongTensor` of shape `[R]`): classes; a row with -100 gives an arbitrary value.
        alpha (`float`): weight of the past, in (0, 1].

    Returns:
        `torch.FloatTensor` of shape `[R]`: in nats; with stored entries, the mass that they lack counts as one class
        (the label's if it is not among the entries), which makes it a lower bound.
    """
    if soft_targets.index is None:
        # Sums of p and p log(p) over all classes, and the label's share of both.
        sum_prob, sum_plogp = 1.0, torch.empty(len(labels), device=labels.device)
        for part in chunks(soft_targets.log_probs):
            sum_plogp[part] = (soft_targets.log_probs[part].exp() * soft_targets.log_probs[part]).sum(-1)
        label_logp = label_entries(soft_targets.log_probs, labels)
        label_prob = label_logp.exp()
        label_plogp = label_prob * label_logp
    else:
        probs, rest = entries_and_tail(soft_targets.log_probs, None, soft_targets.tail, math.inf)
        hit, plogp = soft_targets.index == labels.unsqueeze(-1), -torch.special.entr(probs)
        at_label = 1.0 if soft_targets.tail == "label" else 1.0 - hit.any(-1).float()
        label_prob, label_plogp = (probs * hit).sum(-1) + rest * at_label, (plogp * hit).sum(-1)
        sum_prob, sum_plogp = probs.sum(-1) + rest, plogp.sum(-1) - torch.special.entr(rest) * (1 - at_label)
    others = (sum_plogp - label_plogp) * alpha + (sum_prob - label_prob) * (alpha * math.log(alpha))
    return torch.special.entr((1 - alpha) + alpha * label_prob) - others
