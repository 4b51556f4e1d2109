"""How long a step takes, measured on the real model, data and settings."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback


if TYPE_CHECKING:
    from ..trainer import SelfKDMixin

WARM_UP, MEASURED = 3, 8  # optimizer steps


class _Clock(TrainerCallback):
    """Notes how long optimizer steps take, and ends training after a few."""

    def __init__(self):
        self.seconds: list[float] = []
        self._start = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _wait_for(args.device)
        self._start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _wait_for(args.device)
        self.seconds.append(time.perf_counter() - self._start)
        if len(self.seconds) == WARM_UP + MEASURED:
            control.should_training_stop = True
        control.should_evaluate = control.should_save = control.should_log = False


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def step_times(trainer: SelfKDMixin) -> float:
    """
    Seconds of an optimizer step: the median of a few, without reading the data. The first epoch is measured, in which
    a history is written and not read yet (reading costs about as much as writing). The trainer is used up.

    Args:
        trainer ([`SelfKDTrainer`]): as it would train; its output folder should be a temporary one.

    Returns:
        `float`: NaN if training was over before anything could be measured.
    """
    clock = _Clock()
    trainer.add_callback(clock)
    trainer.train()
    measured = clock.seconds[WARM_UP:]
    return statistics.median(measured) if measured else float("nan")
