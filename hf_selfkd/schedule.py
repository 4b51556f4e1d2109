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
