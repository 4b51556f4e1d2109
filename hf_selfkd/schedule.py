"""How the weight of the past prediction grows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .metrics.mixture import Look, Reduce, past_weight


@dataclass
class Progress:
    """Where training stands, in optimizer steps; `num_steps` is what was planned."""

    step: int
    num_steps: int


def alpha_at(
    alpha: float, schedule: str, epoch: int, num_epochs: int, step: int | None = None, num_steps: int | None = None
) -> float:
    """
    Weight of the past prediction at one point of training.

    Args:
        alpha (`float`): the weight at the end of training, alpha_T.
        schedule (`str`): as in [`SelfKDConfig`].
        epoch (`int`): the epoch, counted from 0.
        num_epochs (`int`): number of epochs T, the last one included even if it is cut short.
        step (`int`, *optional*): the optimizer step, counted from 0; for `"linear_step"`.
        num_steps (`int`, *optional*): number of optimizer steps; for `"linear_step"`.

    Returns:
        `float`: `alpha * t / T` with `t = epoch + 1` for `"linear"` (PS-KD, section 3: 0.8 over 300 epochs gives
        0.0027 in the first epoch and 0.8 in the last); never more than `alpha`.
    """
    if schedule == "constant":
        return alpha
    if schedule == "linear_step":
        return alpha * min((step + 1) / num_steps, 1.0)
    share = min((epoch + 1) / num_epochs, 1.0)
    return alpha * (1 - math.cos(math.pi * share)) / 2 if schedule == "cosine" else alpha * share


class CalibratedAlpha:
    """
    A weight of the past prediction that looks after itself: that of `"linear"`, by as much as held-out data say that
    the past is worth. In epoch `t = 1..T` it is

    ```
    limit * t / T * min(2 * w, 1)
    ```

    where `w` is the weight that the predictions of held-out data an epoch ago deserve beside the present ones
    ([`~hf_selfkd.metrics.mixture.past_weight`]), both calibrated with a temperature each, so that what they know is
    compared and not how sure they are; the mean of that and of the last `w`. Of two predictions that are worth the
    same each deserves a half. A model that still learns fast knows more than it did: `w` is near 0, and it is trained
    plainly.

    Args:
        limit (`float`): the weight at the end of training is never above it.

    Attributes:
        value (`float`): the weight in the present epoch.
        epoch (`int`): the epoch that it was chosen for, counted from 0; -1 before.
        worth (`float`): `w`; 0 before the second epoch.
        temperature (`float`, *optional*): at which held-out predictions were calibrated.
        seen (`torch.FloatTensor` of shape `[R]`, *optional*):
            log-probabilities of held-out labels at that temperature, those of this process.
    """

    def __init__(self, limit: float):
        self.limit, self.value, self.epoch = limit, 0.0, -1
        self.worth, self.temperature = 0.0, None
        self.seen: torch.Tensor | None = None

    def is_due(self, epoch: int) -> bool:
        """Whether the weight of an epoch, counted from 0, is still to be chosen; a half epoch has its when resumed."""
        return epoch > self.epoch

    def update(self, epoch: int, num_epochs: int, look: Look, reduce: Reduce = lambda sums: sums) -> None:
        """
        Choose the weight of an epoch. Every process must call this.

        Args:
            epoch (`int`): counted from 0.
            num_epochs (`int`): of the run.
            look ([`~hf_selfkd.metrics.mixture.Look`]): at held-out data, with the weights that the epoch begins with.
            reduce (`Callable`, *optional*): adds the sums of all processes up.
        """
        now, before = look.log_probs, self.seen
        if before is None or len(before) != len(now):  # of no or of other rows, perhaps in this process alone
            before = torch.full_like(now, math.nan)
        worth = past_weight(now, before.to(now.device), reduce)
        self.worth = self.worth if math.isnan(worth) else (self.worth + worth) / 2  # by luck one epoch is better
        self.value = alpha_at(self.limit, "linear", epoch, num_epochs) * min(2 * self.worth, 1.0)
        self.epoch, self.temperature, self.seen = epoch, look.temperature, now

    def figures(self) -> dict[str, float]:
        """What is logged."""
        if self.temperature is None:
            return {}
        return {"held_out_temperature": self.temperature, "held_out_past_weight": self.worth}

    def state(self) -> dict[str, str]:
        """What a checkpoint holds, the same in every process."""
        if self.temperature is None:
            return {}
        return {
            "alpha": repr(self.value),
            "alpha_epoch": str(self.epoch),
            "past_weight": repr(self.worth),
            "held_out_temperature": repr(self.temperature),
        }

    def process_state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint holds of each process."""
        return {} if self.seen is None else {"log_probs": self.seen}

    def load(self, state: dict[str, str], seen: torch.Tensor | None) -> None:
        """
        Take over what `state` and `process_state` gave; a checkpoint of another schedule has nothing of them. Without
        the latter, as with another number of processes, the past stays worth what it was for an epoch.
        """
        if "past_weight" in state:
            self.value, self.epoch = float(state["alpha"]), int(state["alpha_epoch"])
            self.worth, self.temperature = float(state["past_weight"]), float(state["held_out_temperature"])
            self.seen = seen
