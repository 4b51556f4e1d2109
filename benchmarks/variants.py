"""Trainers of sequence-to-sequence models that the benchmarks compare, and that the package does not have."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from hf_selfkd import Seq2SeqSelfKDTrainer


class RDrop(Seq2SeqSelfKDTrainer):
    """
    Half of the loss of R-Drop (Wu et al., NeurIPS 2021, https://arxiv.org/abs/2106.14448, equation 4): the mean of the
    cross-entropies of two passes with other dropout, and `r_drop / 2` of the mean of their divergences either way.
    `label_smoothing_factor` smooths the cross-entropies, as in the translation of the paper.
    """

    r_drop: float  # "alpha" of the paper, which has 5 for translation

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        names = ("input_ids", "attention_mask", "labels")
        outputs = model(**{name: torch.cat([inputs[name], inputs[name]]) for name in names})
        log_probs = outputs.logits.log_softmax(-1, dtype=torch.float32)
        first, second = (part[inputs["labels"] != -100] for part in log_probs.chunk(2))
        apart = F.kl_div(first, second, log_target=True, reduction="none") + F.kl_div(
            second, first, log_target=True, reduction="none"
        )
        hard, smoothing = outputs.loss, self.args.label_smoothing_factor
        if smoothing:
            hard = (1 - smoothing) * hard - smoothing * torch.cat([first, second]).mean()
        return hard + self.r_drop / 2 * apart.sum(-1).mean() / 2


class Smoothed(Seq2SeqSelfKDTrainer):
    """PS-KD whose labels are smoothed as well: the label's share of a target, `1 - alpha`, is spread a little."""

    smoothing: float

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs["labels"]
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            log_probs = outputs.logits[labels != -100].log_softmax(-1, dtype=torch.float32)
            label = log_probs.gather(-1, labels[labels != -100].unsqueeze(-1)).sum()
            moved = self.smoothing * (label - log_probs.mean(-1).sum())
            loss = loss + (1 - self.distiller.alpha_reached) * moved / num_items_in_batch
        return (loss, outputs) if return_outputs else loss


VARIANTS = {"r_drop": RDrop, "smoothing": Smoothed}


def variant(settings: dict[str, Any]) -> tuple[type[Seq2SeqSelfKDTrainer], dict[str, Any]]:
    """The trainer of a method, and the settings of the method that its arguments have."""
    settings = dict(settings)
    for name, base in VARIANTS.items():
        if name in settings:
            return type(base.__name__, (base,), {name: settings.pop(name)}), settings
    return Seq2SeqSelfKDTrainer, settings
