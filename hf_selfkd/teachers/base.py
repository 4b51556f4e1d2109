"""What every teacher answers to. Teachers know batches, rows and epochs, never tasks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from ..batch import Batch, Storage
from ..losses.hard import Losses
from ..losses.soft_targets import SoftTargets, Target
from ..tasks.rows import Rows


State = tuple[dict[str, torch.Tensor], dict[str, str]]  # tensors and metadata of a file of a checkpoint


@dataclass
class Taught:
    """
    What a teacher has to say of a batch.

    Args:
        model ([`~hf_selfkd.losses.SoftTargets`], *optional*): for the rows of the model itself.
        heads (`list`): for the rows of each auxiliary head that learns from the past; empty if none does.
    """

    model: SoftTargets | None = None
    heads: list[SoftTargets | None] = field(default_factory=list)


class Teacher:
    """
    What every teacher answers to; by itself the teacher that is silent (`teacher="none"`).

    Attributes:
        epoch (`int`): the epoch that is being trained, counted from 0; -1 before training.
    """

    kind = "none"
    needs_ids = False
    has_past = False  # whether what is learned from are predictions of another time
    first_epoch = 1  # in which there can be something to learn from, counted from 0

    def __init__(self):
        self.epoch = -1

    @property
    def storage(self) -> Storage | None:
        """[`~hf_selfkd.batch.Storage`]: what the teacher keeps of each row; `None` if nothing, or not known yet."""
        return None

    def begin_epoch(self, epoch: int) -> None:
        """Close the epoch before this one. Every process must call this; calling it again changes nothing."""
        self.epoch = epoch

    def prepare(self, batch: Batch, num_classes: int | None) -> None:
        """Get ready for rows of so many classes, if known, before the model runs. Every process must call this."""

    def targets(self, batch: Batch) -> Taught:
        """Soft targets for the rows of a batch. They need nothing of the student's outputs."""
        return Taught()

    def join(self, losses: Losses, rows: Rows, targets: list[Target], alpha: float, num_items: Any) -> Losses:
        """The losses of a batch with what the teacher has to say of the present rows; most teachers have nothing."""
        return losses

    def observe(self, batch: Batch, rows: Rows, head_rows: list[Rows]) -> None:
        """
        Take note of the present predictions; rows may have a gradient, what is kept of them has none. Every process
        must call this for every batch; nothing is kept of mixed images.
        """

    def after_step(self) -> None:
        """Take note of an optimizer step."""

    def stored(self, sample_ids: Any) -> torch.Tensor:
        """
        The probabilities held for these samples.

        Args:
            sample_ids (`Sequence[int]`, `np.ndarray` or `torch.LongTensor`, shape `[n]`): sample ids.

        Returns:
            `torch.FloatTensor` of shape `[n, C]` (token tasks: `[rows of these samples, C]`; several labels a sample:
            the probability of each), on the CPU; NaN rows where there is no past prediction. Object detection: `[known
            objects of these images, C]`.

        Raises:
            ValueError: if this teacher stores no rows, or an id is unknown.
        """
        raise ValueError(f"teacher={self.kind!r} stores no rows: use teacher='history'.")

    def states(self, keeps: bool = True) -> Iterator[tuple[str, State]]:
        """
        The files of a checkpoint, by name, that all processes agree on. Every process must call this.

        Args:
            keeps (`bool`, *optional*, defaults to `True`): whether this process has a use for their tensors.
        """
        yield "teacher", ({}, {})

    def process_states(self) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        """The files of a checkpoint, by name, that each process has for itself."""
        return iter(())

    def load(self, name: str, state: State, journals: list[dict[str, torch.Tensor]]) -> None:
        """Take over what `states` gave under a name, and what `process_states` of some processes gave."""
