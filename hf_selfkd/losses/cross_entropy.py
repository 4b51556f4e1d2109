"""Hard cross-entropy of many rows in chunks, equal to `F.cross_entropy` to the bit."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..samples import IGNORE_INDEX
from .soft_targets import CHUNK_ABOVE, chunks, label_entries, labelled


def cross_entropy_sum(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """
    Sum of the hard cross-entropies of rows `[R, C]` with labels `[R]`; label -100 counts nothing. The value and the
    gradient are those of `F.cross_entropy` to the bit; large logits are worked off in pieces, which takes a third of
    its memory.
    """
    if logits.numel() <= CHUNK_ABOVE:
        return F.cross_entropy(logits.float(), labels, reduction="sum")
    return _ChunkedCrossEntropy.apply(logits, labels)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The sum of the cross-entropies of many rows, with nothing but the gradient as large as the logits."""

    @staticmethod
    def forward(ctx, logits, labels):
        ctx.save_for_backward(logits, labels)
        log_probs = torch.empty(len(logits), device=logits.device)
        for part in chunks(logits):
            log_probs[part] = label_entries(F.log_softmax(logits[part], -1, dtype=torch.float32), labels[part])
        only_class = torch.where(labelled(labels), 0, IGNORE_INDEX)
        return F.nll_loss(log_probs.unsqueeze(-1), only_class, reduction="sum")

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        logits, labels = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        label, at_label = labels.clamp_min(0).unsqueeze(-1), torch.where(labelled(labels), -grad, 0.0).unsqueeze(-1)
        for part in chunks(logits):
            log_probs = F.log_softmax(logits[part], -1, dtype=torch.float32)
            piece = torch.zeros_like(log_probs).scatter_(-1, label[part], at_label[part])
            gradient[part] = torch._log_softmax_backward_data(piece, log_probs, -1, torch.float32)
        return gradient, None
