"""How the weight of the past prediction grows."""

from __future__ import annotations

import math
from dataclasses import dataclass


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
    A weight of the past prediction that looks after itself: it rises while predictions on held-out data are
    over-confident and falls while they are not confident enough, so that a model that needs no softening is trained
    plainly. It is 0 in the first epoch, and before every other one

    ```
    alpha = clip(alpha + 4 * limit * change / num_epochs, 0, limit),    change = log(t) * max(1 - (e / log(t))**2, 0)
    ```

    with the temperature `t` that would calibrate the held-out predictions and `e` the standard error of its log: what
    a few samples cannot tell from 1 changes nothing (James and Stein's shrinkage).

    Args:
        limit (`float`): the weight is never above it.

    Attributes:
        value (`float`): the weight in the present epoch.
        epoch (`int`): the epoch that it was chosen for, counted from 0; -1 before.
        log_temperature (`float`, *optional*): natural log of the temperature that it was chosen by.
    """

    gain = 4.0

    def __init__(self, limit: float):
        self.limit, self.value, self.epoch = limit, 0.0, -1
        self.log_temperature: float | None = None

    def is_due(self, epoch: int) -> bool:
        """Whether the weight of an epoch, counted from 0, is still to be chosen; a half epoch has its when resumed."""
        return epoch > self.epoch

    def update(self, epoch: int, num_epochs: int, log_temperature: float, error: float = 0.0) -> None:
        """Choose the weight of an epoch of so many, by a temperature whose log has this standard error."""
        if epoch > 0 and abs(log_temperature) > error:  # before, it is the temperature of random weights
            change = log_temperature * (1 - (error / log_temperature) ** 2)
            wanted = self.value + self.gain * self.limit * change / num_epochs
            self.value = min(max(wanted, 0.0), self.limit)
        self.epoch, self.log_temperature = epoch, log_temperature

    def state(self) -> dict[str, str]:
        """What a checkpoint holds."""
        if self.log_temperature is None:
            return {}
        return {
            "alpha": repr(self.value),
            "alpha_epoch": str(self.epoch),
            "log_temperature": repr(self.log_temperature),
        }

    def load(self, state: dict[str, str]) -> None:
        """Take over what `state` gave; a checkpoint of another schedule has nothing of it."""
        if "log_temperature" in state:
            self.value, self.epoch = float(state["alpha"]), int(state["alpha_epoch"])
            self.log_temperature = float(state["log_temperature"])
