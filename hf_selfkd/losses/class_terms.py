"""
The classification terms of detectors for rows with soft targets, as the losses of transformers weigh and scale them.

Each function gives, for every row, the term with the soft target minus the term with the label, so that the sum over
rows is what a model's own loss lacks. The soft forms of the focal terms are this project's choice.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .soft import soft_cross_entropy
from .soft_targets import SoftTargets


def softmax_difference(
    logits: torch.Tensor, labels: torch.Tensor, soft_targets: SoftTargets, alpha: float, temperature: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Cross-entropy over the classes and no-object (DETR, YOLOS): `alpha * (soft - hard)`, with the weight of a label, 1.

    Returns:
        `tuple`: the difference, the hard and the soft term, `[R]` each.
    """
    hard = F.cross_entropy(logits, labels, reduction="none")
    soft = soft_cross_entropy(logits, soft_targets, temperature, labels)
    return alpha * (soft - hard), hard, soft


def focal_rows(logits: torch.Tensor, targets: torch.Tensor, weight: float, gamma: float = 2.0) -> torch.Tensor:
    """The sigmoid focal loss of rows `[R, C]` whose targets are any probabilities, as transformers computes it."""
    probs = logits.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    loss = entropy * (1 - (probs * targets + (1 - probs) * (1 - targets))) ** gamma
    if weight >= 0:
        loss = (weight * targets + (1 - weight) * (1 - targets)) * loss
    return loss.sum(-1)


def focal_difference(
    logits: torch.Tensor, onehot: torch.Tensor, past: torch.Tensor, alpha: float, weight: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    The focal loss (Deformable and Conditional DETR) at the targets `(1 - alpha) * onehot + alpha * past`, one
    probability a class, minus the one at `onehot`.

    Args:
        logits, onehot, past (`torch.FloatTensor` of shape `[R, C]`): present scores, labels, past probabilities.
        alpha (`float`): weight of the past.
        weight (`float`): of positive classes, `focal_alpha` of the model's configuration.

    Returns:
        `tuple`: the difference, the hard and the soft term, `[R]` each.
    """
    hard = focal_rows(logits, onehot, weight)
    mixed = focal_rows(logits, (1 - alpha) * onehot + alpha * past, weight)
    return mixed - hard, hard, focal_rows(logits.detach(), past, weight)


def varifocal_rows(
    logits: torch.Tensor, classes: torch.Tensor, scores: torch.Tensor, weight: float, gamma: float
) -> torch.Tensor:
    """The varifocal loss of rows `[R, C]`: `classes` tell how far each class is meant, `scores` how sure of it."""
    weights = weight * logits.detach().sigmoid().pow(gamma) * (1 - classes) + scores
    return F.binary_cross_entropy_with_logits(logits, scores, weight=weights, reduction="none").sum(-1)


def varifocal_difference(
    logits: torch.Tensor,
    onehot: torch.Tensor,
    past: torch.Tensor,
    alpha: float,
    overlap: torch.Tensor,
    weight: float,
    gamma: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    The varifocal loss (RT-DETR, D-FINE) at soft targets, minus the one at the labels. What is asked of a class is the
    overlap of the boxes where it is the label, and of that the past is a prediction: scores are
    `(1 - alpha) * overlap * onehot + alpha * past`, and `(1 - alpha) * onehot + alpha * past` tells negatives apart.

    Args:
        logits, onehot, past (`torch.FloatTensor` of shape `[R, C]`): present scores, labels, past probabilities.
        alpha (`float`): weight of the past.
        overlap (`torch.FloatTensor` of shape `[R]`): intersection over union of the predicted and the true box.
        weight, gamma (`float`): of negative classes.

    Returns:
        `tuple`: the difference, the hard and the soft term, `[R]` each.
    """
    scores = overlap.unsqueeze(-1) * onehot
    hard = varifocal_rows(logits, onehot, scores, weight, gamma)
    classes, mixed = (torch.lerp(part, past, alpha) for part in (onehot, scores))
    soft = varifocal_rows(logits.detach(), past, past, weight, gamma)
    return varifocal_rows(logits, classes, mixed, weight, gamma) - hard, hard, soft
