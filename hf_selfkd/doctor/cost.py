"""How long a step takes, measured on the real model, data and settings."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import has_length


if TYPE_CHECKING:
    from ..trainer import SelfKDMixin

FIRST, MEASURED = 6, 8  # optimizer steps: of a shortened first epoch, and of later ones


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
        if len(self.seconds) == FIRST + MEASURED:
            control.should_training_stop = True
        control.should_evaluate = control.should_save = control.should_log = False


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def short_epochs(trainer: SelfKDMixin) -> list[str]:
    """
    Flags that make epochs of a few steps, so that what is measured is an epoch in which the past teaches; none for a
    training of one epoch, or of few samples.

    Args:
        trainer ([`SelfKDTrainer`]): after [`plan_of`].
    """
    args, data = trainer.args, trainer.train_dataset
    samples = FIRST * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    if trainer.state.num_train_epochs < 2 or not has_length(data) or len(data) <= samples:
        return []
    return ["--max_train_samples", str(samples), "--max_steps", "-1", "--num_train_epochs", "4"]


def step_times(trainer: SelfKDMixin) -> float:
    """
    Seconds of an optimizer step: the median of a few after the first six, without reading the data. The trainer is
    used up.

    Args:
        trainer ([`SelfKDTrainer`]): as it would train; its output folder should be a temporary one.

    Returns:
        `float`: NaN if training was over before anything could be measured.
    """
    clock = _Clock()
    trainer.add_callback(clock)
    trainer.train()
    measured = clock.seconds[FIRST:]
    return statistics.median(measured) if measured else float("nan")
