"""What a user sees while it runs: the means that are logged beside the training loss."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .losses import Side, labelled, learning, target_entropy


Measures = dict[str, tuple[torch.Tensor | float, torch.Tensor | float]]


def measures(sides: list[Side], alpha: float | None, sums: dict[str, torch.Tensor]) -> Measures:
    """
    What one batch adds to the log, as `name: (sum, weight)`, on the device.

    Args:
        sides (`list` of [`~hf_selfkd.losses.Side`]): the labels and past rows that were learned from.
        alpha (`float`, *optional*): weight of the past now; `None` where nothing is distilled.
        sums (`dict[str, torch.Tensor]`): `hard_loss` and, with a past, `soft_loss`, summed over the rows.
    """
    labels, past = sides[0].labels, sides[0].past
    count = labelled(labels).sum()
    result: Measures = {"hard_loss": (sums["hard_loss"], count), "alpha": (alpha or 0.0, 1.0)}
    if alpha is None:
        return result
    if past is None:
        result["rows_with_history"] = (0.0, count)
        return result | ({"target_entropy": (0.0, count)} if len(sides) == 1 else {})
    learners = learning(sides[0])
    number = learners.sum()
    guess = past.log_probs.argmax(dim=-1)
    guess = guess if past.index is None else past.index.gather(-1, guess.unsqueeze(-1)).squeeze(-1)
    result["soft_loss"] = (sums["soft_loss"], number)
    result["past_agreement"] = (((guess == labels) & learners).sum(), number)
    result["rows_with_history"] = (number, count)
    if len(sides) == 1:
        entropy = target_entropy(past, labels, alpha)
        result["target_entropy"] = (torch.where(learners, entropy, 0.0).sum(), count)
    return result


class RunningMeans:
    """Sums on the device, so that logging waits for it once; see [`~SelfKDMixin.log`]."""

    names = ("hard_loss", "soft_loss", "target_entropy", "past_agreement", "rows_with_history", "alpha")

    def __init__(self):
        self.sums: torch.Tensor | None = None  # [names, (sum, weight)]

    def add(self, pairs: Measures, device: torch.device) -> None:
        """Add `name: (sum, weight)` pairs; names that are left out keep their mean."""
        zero = torch.zeros((), device=device)
        values = [value for name in self.names for value in pairs.get(name, (zero, zero))]
        values = [v if isinstance(v, torch.Tensor) else torch.full_like(zero, v) for v in values]
        sums = torch.stack([value.detach().float() for value in values])
        self.sums = sums if self.sums is None else self.sums + sums

    def take(self, reduce: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """The means since the last call, of all processes; this waits for the device."""
        if self.sums is None:
            return {}
        pairs = reduce(self.sums).view(-1, 2).tolist()
        self.sums = None
        return {name: total / weight for name, (total, weight) in zip(self.names, pairs, strict=True) if weight > 0}
