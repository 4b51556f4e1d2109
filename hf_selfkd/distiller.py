"""`SelfDistiller`: the method, one step of it. A distiller knows no trainer: give it batches and it gives losses."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import nn

from .batch import Batch, BatchRecord
from .heads.layered import NoHeads
from .losses.hard import CrossEntropy
from .losses.soft_targets import SoftTargets, make_targets
from .metrics.running import RunningMeans
from .samples import sample_index
from .schedule import CalibratedAlpha, Progress, alpha_at
from .tasks.base import Task
from .tasks.rows import Rows
from .teachers.base import State, Taught, Teacher


logger = logging.getLogger(__name__)

HELD_OUT = "held_out"  # the name of what a checkpoint holds of held-out predictions


@lru_cache
def warn_once(logger: logging.Logger, text: str) -> None:
    """Warn, the first time."""
    logger.warning(text)


class SelfDistiller:
    """
    Progressive self-distillation of a model, in any training loop.

    Args:
        task ([`~hf_selfkd.tasks.Task`]): how batches and outputs become rows.
        hard_loss ([`~hf_selfkd.losses.hard.CrossEntropy`]): what the labels teach, and how soft targets join.
        teacher ([`~hf_selfkd.teachers.Teacher`], *optional*): where soft targets come from; silent by default.
        heads ([`~hf_selfkd.heads.layered.NoHeads`], *optional*): what auxiliary heads add; nothing by default.
        alpha (`float`, *optional*): weight of the past prediction at the end of training; 0 never asks the teacher.
        schedule (`str`, *optional*): how the weight grows; see [`SelfKDConfig`].
        num_epochs (`int`, *optional*): of the run, as planned.

    Attributes:
        epoch (`int`): the epoch of the method that is being trained, counted from 0; -1 before.
        alpha_reached (`float`): weight of the past prediction in the last step.
        calibrated ([`~hf_selfkd.schedule.CalibratedAlpha`], *optional*): the weight, if it follows held-out data.
    """

    def __init__(
        self,
        task: Task,
        hard_loss: CrossEntropy,
        teacher: Teacher | None = None,
        heads: NoHeads | None = None,
        alpha: float = 0.0,
        schedule: str = "linear",
        num_epochs: int = 1,
    ):
        self.task, self.hard_loss = task, hard_loss
        self.teacher = Teacher() if teacher is None else teacher
        self.heads = NoHeads(task) if heads is None else heads
        self.alpha, self.schedule, self.num_epochs = alpha, schedule, num_epochs
        self.calibrated = CalibratedAlpha(alpha) if alpha > 0 and schedule == "calibrated" else None
        self.metrics = RunningMeans(self.heads.terms)
        self.epoch, self.next_epoch, self.alpha_reached = -1, 0, 0.0
        self.num_classes = task.num_classes  # looked up once: a model must be searched for them
        self.steps = 0  # calls of `step`
        self.strict = True  # whether a batch that no history can address is an error

    @property
    def teaches(self) -> bool:
        """`bool`: whether anything but the labels is learned from, or anything kept for later."""
        return self.teacher.kind != "none" or self.heads.learns

    def begin_epoch(self) -> int:
        """Begin the next epoch of the method. Every process must call this. Returns the epoch, counted from 0."""
        self.epoch = self.next_epoch
        self.next_epoch += 1
        self.teacher.begin_epoch(self.epoch)
        self.hard_loss.begin_epoch()
        return self.epoch

    def step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        progress: Progress,
        num_items: torch.Tensor | int | None = None,
        record: BatchRecord | None = None,
    ) -> tuple[torch.Tensor, Any]:
        """
        The loss of a batch.

        Args:
            model (`nn.Module`): the model, wrapped as it is trained.
            inputs (`dict`): the batch.
            progress ([`~hf_selfkd.schedule.Progress`]): where training stands.
            num_items (`torch.Tensor` or `int`, *optional*): rows of the whole optimizer step; those of this batch by
                default.
            record ([`~hf_selfkd.batch.BatchRecord`], *optional*): what came beside the batch.

        Returns:
            `tuple`: the sum of the losses of the rows over `num_items`, and the outputs of the model.

        Raises:
            ValueError: if the batch shows a fault (labels, logits, ids).
        """
        self.steps += 1
        batch = self.heads.with_views(self.task.split(inputs, record), self.epoch, progress.step)
        self._check(batch, self.num_classes or self.task.classes_in(batch))
        self.teacher.prepare(batch, self.hard_loss.num_classes)
        alpha, batch.storage = self._alpha(progress), self.teacher.storage
        taught = self.teacher.targets(batch) if alpha > 0 else Taught()
        outputs = self.hard_loss.forward(model, batch, taught.model, alpha)
        outputs, results = self.heads.split(outputs)
        rows, head_rows = self.hard_loss.rows(outputs, batch), self.heads.rows(results, batch)
        rows, soft = rows.matched(taught.model)
        self._check(batch, rows.logits.shape[-1], soft)
        targets = make_targets(rows.labels, soft, batch.mixing, self.teacher.needs_ids)
        num_items = self.hard_loss.num_items(rows, batch) if num_items is None else num_items
        losses = self.hard_loss(outputs, rows, targets, alpha, num_items)
        losses = self.teacher.join(losses, rows, targets, alpha, num_items)
        loss, terms = self.heads.join(losses.loss, results, head_rows, rows, batch, taught, alpha, num_items)
        self.teacher.observe(batch, rows, head_rows)
        self.metrics.update(targets, losses.parts, alpha, losses.hard, terms, losses.soft)
        return loss, outputs

    def _alpha(self, progress: Progress) -> float:
        if self.alpha == 0:
            return 0.0
        if self.calibrated is not None:
            self.alpha_reached = self.calibrated.value
            return self.alpha_reached
        self.alpha_reached = alpha_at(
            self.alpha, self.schedule, self.epoch, self.num_epochs, progress.step, progress.num_steps
        )
        return self.alpha_reached

    def _check(self, batch: Batch, num_classes: int | None, soft: SoftTargets | None = None) -> None:
        """Labels that are no classes of the model, before they reach a device; samples that nobody can address."""
        samples = batch.samples
        if samples is None and self.teacher.needs_ids:
            told = (
                f"the batch tells no sample ids for teacher={self.teacher.kind!r} ({len(batch.labels)} rows of "
                "labels): a collator that drops, repeats or packs samples leaves no place to address their "
                "predictions, and a dataloader of your own must come from SelfKDTrainer. Use teacher='snapshot'."
            )
            if self.strict:
                raise ValueError(told)
            warn_once(logger, f"Such batches learn from their labels only: {told}")
        if soft is not None and soft.num_classes not in (None, num_classes):
            raise ValueError(
                f"the model has {num_classes} classes, the stored predictions {soft.num_classes}: resume with the "
                "model that made them, or, where the number of choices or positions is another one in each batch, "
                "use teacher='snapshot'."
            )
        if num_classes is None:
            return
        if samples is None:
            # Without an address the labels are looked at where that costs no waiting, and once on any device.
            if batch.labels.device.type != "cpu" and self.steps > 1:
                return
            samples = sample_index(np.full(len(batch.labels), -1), batch.labels.cpu())
        if not samples.fits(num_classes):
            label, sample_id = samples.misfit(num_classes)
            sample = "a sample" if sample_id < 0 else f"sample_id={sample_id}"
            raise ValueError(self.task.misfit(label, sample, num_classes))

    def take_metrics(self, reduce: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """What is logged since the last call, of all processes; this waits for the device."""
        figures = self.metrics.take(reduce, self.alpha > 0 and self.teacher.has_past)
        return figures if self.calibrated is None else figures | self.calibrated.figures()

    # What a checkpoint holds

    def states(self, keeps: bool = True) -> Iterator[tuple[str, State]]:
        """Tensors and metadata, by name of a file, that all processes agree on; see [`Teacher.states`]."""
        yield from self.teacher.states(keeps)

    def process_states(self) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        """Tensors, by name of a file, that each process has for itself."""
        yield from self.teacher.process_states()
        if self.calibrated is not None:
            yield HELD_OUT, self.calibrated.process_state()

    def observe_only(self, rows: Rows, batch: Batch) -> None:
        """Let the teacher take note of predictions that nothing is learned from."""
        self.teacher.observe(batch, rows, [])
