"""Progressive cross-entropy with the top entries of past rows, by a backward of its own."""

from __future__ import annotations

import torch

from .soft_targets import LOG_ZERO, chunks, label_entries, labelled, where_mask
from .summary import summarize


def learned_probs(log_probs: torch.Tensor, distilled: torch.Tensor | None) -> torch.Tensor:
    """Past probabilities; 0 in rows that learn nothing."""
    probs = log_probs.exp()
    # Not only the result is masked: its gradient would be 0 * NaN.
    return probs if distilled is None else probs.masked_fill_(~distilled.unsqueeze(-1), 0.0)


def entries_and_tail(
    log_probs: torch.Tensor, distilled: torch.Tensor | None, tail: str, classes: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities of stored entries `[R, k]` and the mass that they lack `[R]`; 0 for rows that learn nothing."""
    probs = learned_probs(log_probs, distilled)
    kept = probs.sum(-1)
    if tail == "renormalize":
        return probs / kept.clamp_min(1e-30).unsqueeze(-1), torch.zeros_like(kept)
    if log_probs.shape[-1] == classes:
        return probs, torch.zeros_like(kept)
    return probs, where_mask((1 - kept).clamp_min_(0.0), distilled)


def _log_prob_sums(logits: torch.Tensor, log_norm: torch.Tensor) -> torch.Tensor:
    """Sum of the log-probabilities of each row, with `LOG_ZERO` for classes of probability 0."""
    result = torch.empty_like(log_norm)
    for part in chunks(logits):
        result[part] = (logits[part] - log_norm[part].unsqueeze(-1)).clamp_min_(LOG_ZERO).sum(-1)
    return result


class StoredEntries(torch.autograd.Function):
    """[`progressive_cross_entropy`] with the top entries of past rows: total, hard and soft loss of each row."""

    @staticmethod
    def forward(ctx, logits, normalized, labels, distilled, alpha, past_log_probs, index, tail):
        log_norm = summarize(logits).log_norm if normalized is None else normalized
        log_probs = logits.gather(-1, index).float().sub_(log_norm.unsqueeze(-1)).clamp_min_(LOG_ZERO)
        hard = (log_norm - label_entries(logits, labels).float()).masked_fill_(~labelled(labels), 0.0)
        probs, rest = entries_and_tail(past_log_probs, distilled, tail, logits.shape[-1])
        soft = -(probs * log_probs).sum(-1)
        outside = offset = None
        if tail == "bucket":
            outside = (1 - log_probs.exp().sum(-1)).clamp_min_(1e-6)
            soft -= rest * outside.log()
        elif tail == "label":
            soft += rest * hard
        elif tail == "uniform":
            offset = rest / max(logits.shape[-1] - index.shape[-1], 1)
            soft -= offset * (_log_prob_sums(logits, log_norm) - log_probs.sum(-1))
        soft = where_mask(soft, distilled)
        total = where_mask(torch.lerp(hard, soft, alpha), distilled, hard)
        ctx.save_for_backward(logits, log_norm, labels, distilled, probs, index, log_probs, rest, outside, offset)
        ctx.alpha, ctx.to_label = alpha, tail == "label"
        ctx.mark_non_differentiable(hard, soft)
        return total, hard, soft

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, *_):
        logits, log_norm, labels, distilled, probs, index, log_probs, rest, outside, offset = ctx.saved_tensors
        grad = grad.masked_fill(~labelled(labels), 0.0)
        soft_grad = where_mask(grad * ctx.alpha, distilled)
        scale = grad if outside is None else grad - soft_grad * rest / outside
        gradient = torch.empty_like(logits)
        for part in chunks(logits):
            place = gradient[part] if gradient.dtype == torch.float32 else None
            # On a CPU softmax takes half the time of exp(logits - log_norm), though it sums once more.
            piece = torch.softmax(logits[part].float(), dim=-1, out=place).mul_(scale[part].unsqueeze(-1))
            if offset is not None:
                piece -= (soft_grad * offset)[part].unsqueeze(-1)
            if place is None:
                gradient[part] = piece
        # Set, in float32, and not added to: in a bucket of almost no mass the scale is huge, and a difference would be
        # noise; in half precision a sum would be rounded twice.
        label = labels.clamp_min(0).unsqueeze(-1)
        at_label = soft_grad - grad if not ctx.to_label else soft_grad * (1 - rest) - grad
        hit = index == label
        if distilled is not None:  # a row without a past has filler for entries, all of them perhaps the label
            hit &= distilled.unsqueeze(-1)
        entries = log_probs.exp() * grad.unsqueeze(-1) - probs * soft_grad.unsqueeze(-1) + hit * at_label.unsqueeze(-1)
        base = (label_entries(logits, labels).float() - log_norm).exp() * scale
        if offset is not None:
            base = base - soft_grad * offset
        at_label = torch.where(hit.any(-1), (entries * hit).sum(-1), base + at_label).masked_fill_(grad == 0, 0.0)
        gradient.scatter_(-1, index, entries.to(gradient.dtype))
        gradient.scatter_(-1, label, at_label.unsqueeze(-1).to(gradient.dtype))
        return gradient, None, None, None, None, None, None, None
