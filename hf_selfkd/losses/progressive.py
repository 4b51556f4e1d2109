"""Progressive cross-entropy, the loss of PS-KD: hard and soft part in one pass over the logits."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from .by_chunks import by_chunks
from .entries import StoredEntries, learned_probs
from .soft import soft_losses
from .soft_targets import (
    CHUNK_ABOVE,
    RowLosses,
    SoftTargets,
    Tail,
    chunks,
    distilled_rows,
    labelled,
    log_softmax,
    where_mask,
)


def progressive_cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    soft_targets: SoftTargets,
    alpha: float,
    temperature: float = 1.0,
    normalized: torch.Tensor | None = None,
) -> RowLosses:
    """
    Cross-entropy with the target `(1 - alpha) * onehot + alpha * past` (PS-KD, Kim et al., ICCV 2021, section 3).

    Hard and soft part are kept apart, so that a poisoned past row cannot reach a row that does not learn from it, and
    a row without a past costs its hard cross-entropy (with whole rows: to the bit). At temperature 1 both come from
    one pass over the logits with a backward of its own. With stored entries or many rows, nothing but the gradient is
    as large as the logits, at any temperature.

    Args:
        logits (`torch.FloatTensor` of shape `[R, C]`): present scores.
        labels (`torch.LongTensor` of shape `[R]`): classes; -100 for rows that do not count.
        soft_targets ([`SoftTargets`]): past predictions and which rows have one; no gradient flows into them.
        alpha (`float`): weight of the past, in [0, 1].
        temperature (`float`, *optional*, defaults to 1.0):
            softens both sides of the soft part, which is multiplied by its square (Hinton et al., 2015).
        normalized (`torch.FloatTensor`, *optional*):
            [`log_softmax`] of the logits or, for a past with `index`, their log-normalizer `[R]`, if known already.

    Returns:
        [`RowLosses`]: one value per row.
    """
    distilled = distilled_rows(soft_targets, labels) if alpha > 0 else torch.zeros_like(soft_targets.mask)
    log_probs = soft_targets.log_probs.detach()
    if soft_targets.index is None:
        function, parts = _DenseRows if logits.numel() <= CHUNK_ABOVE else _ChunkedDenseRows, (log_probs,)
    else:
        function, parts = StoredEntries, (log_probs, soft_targets.index, soft_targets.tail)
    if temperature == 1.0:
        return RowLosses(*function.apply(logits, normalized, labels, distilled, alpha, *parts), distilled)
    past = (log_probs, soft_targets.mask if distilled is None else distilled, soft_targets.index)
    softened = partial(_softened_losses, alpha, temperature, soft_targets.tail)
    return RowLosses(*by_chunks(softened, logits, labels, distilled, *past), distilled)


def _softened_losses(
    alpha: float,
    temperature: float,
    tail: Tail,
    logits: torch.Tensor,
    labels: torch.Tensor,
    distilled: torch.Tensor | None,
    *past: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Total, hard and soft losses of rows at a temperature other than 1."""
    logits = logits.float()  # once, so that both parts of the gradient are added in float32
    hard = F.cross_entropy(logits, labels, reduction="none")
    soft = where_mask(soft_losses(temperature, tail, logits, labels, *past)[0], distilled)
    total = where_mask((1 - alpha) * hard + alpha * soft, distilled, hard)
    return total, hard.detach(), soft.detach()


def _dense_losses(
    log_probs: torch.Tensor, labels: torch.Tensor, distilled: torch.Tensor | None, probs: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hard and soft losses of rows with whole past rows."""
    hard = F.nll_loss(log_probs, labels, reduction="none")
    return hard, where_mask((probs * log_probs).sum(-1).neg_(), distilled)


def _dense_gradient(
    grad: torch.Tensor,
    log_probs: torch.Tensor,
    labels: torch.Tensor,
    distilled: torch.Tensor | None,
    probs: torch.Tensor,
    alpha: float,
) -> torch.Tensor:
    """The gradient for the logits, given that of the total of each row."""
    if distilled is None:
        return _unit_gradient(log_probs, labels, probs * -alpha, alpha) * grad.unsqueeze(-1)
    gradient = probs * (grad * -alpha).unsqueeze(-1)
    at_label = torch.where(distilled, grad * (alpha - 1), -grad).masked_fill_(~labelled(labels), 0.0)
    gradient.scatter_add_(-1, labels.clamp_min(0).unsqueeze(-1), at_label.unsqueeze(-1))
    # What log_softmax itself would do with it: rows without a past get the very bits of F.cross_entropy.
    return torch._log_softmax_backward_data(gradient, log_probs, -1, torch.float32)


def _unit_gradient(
    log_probs: torch.Tensor, labels: torch.Tensor, gradient: torch.Tensor, alpha: float
) -> torch.Tensor:
    """The gradient of the totals for the logits, where all rows learn; `gradient`, of the soft part, is reused."""
    gradient.scatter_(-1, labels.unsqueeze(-1), alpha - 1, reduce="add")
    return torch._log_softmax_backward_data(gradient, log_probs, -1, torch.float32)


class _DenseRows(torch.autograd.Function):
    """
    [`progressive_cross_entropy`] with whole past rows: total, hard and soft loss of each row. If all rows learn, the
    gradient is made at once, from what is still in the processor's cache.
    """

    @staticmethod
    def forward(ctx, logits, normalized, labels, distilled, alpha, past_log_probs):
        log_probs = log_softmax(logits) if normalized is None else normalized
        probs = learned_probs(past_log_probs, distilled)
        hard, soft = _dense_losses(log_probs, labels, distilled, probs)
        total = where_mask(torch.lerp(hard, soft, alpha), distilled, hard)
        if distilled is None:
            ctx.save_for_backward(_unit_gradient(log_probs, labels, probs.mul_(-alpha), alpha))
        else:
            ctx.save_for_backward(log_probs, labels, distilled, probs)
        ctx.alpha, ctx.dtype = alpha, logits.dtype
        ctx.mark_non_differentiable(hard, soft)
        return total, hard, soft

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, *_):
        saved = ctx.saved_tensors
        gradient = saved[0] * grad.unsqueeze(-1) if len(saved) == 1 else _dense_gradient(grad, *saved, ctx.alpha)
        return gradient.to(ctx.dtype), None, None, None, None, None


class _ChunkedDenseRows(torch.autograd.Function):
    """The same to the bit, with nothing but the gradient as large as the logits; for many or wide rows."""

    @staticmethod
    def forward(ctx, logits, normalized, labels, distilled, alpha, past_log_probs):
        hard, soft = (torch.empty(len(logits), device=logits.device) for _ in range(2))
        for part in chunks(logits):
            log_probs = log_softmax(logits[part]) if normalized is None else normalized[part]
            mask = None if distilled is None else distilled[part]
            probs = learned_probs(past_log_probs[part], mask)
            hard[part], soft[part] = _dense_losses(log_probs, labels[part], mask, probs)
        total = where_mask(torch.lerp(hard, soft, alpha), distilled, hard)
        ctx.save_for_backward(logits, normalized, labels, distilled, past_log_probs)
        ctx.alpha = alpha
        ctx.mark_non_differentiable(hard, soft)
        return total, hard, soft

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, *_):
        logits, normalized, labels, distilled, past_log_probs = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        for part in chunks(logits):
            log_probs = log_softmax(logits[part]) if normalized is None else normalized[part]
            mask = None if distilled is None else distilled[part]
            probs = learned_probs(past_log_probs[part], mask)
            gradient[part] = _dense_gradient(grad[part], log_probs, labels[part], mask, probs, ctx.alpha)
        return gradient, None, None, None, None, None
