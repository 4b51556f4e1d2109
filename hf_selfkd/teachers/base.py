"""What every teacher answers to. Teachers know rows and epochs, never tasks."""

from __future__ import annotations

from typing import Any

import torch

from ..losses.soft_targets import SoftTargets
from ..samples import SampleIndex
from ..tasks.rows import Rows


class Teacher:
    """
    What every teacher answers to; by itself the teacher that is silent (`teacher="none"`).

    Attributes:
        epoch (`int`): the epoch that is being trained, counted from 0; -1 before training.
    """

    kind = "none"
    needs_ids = False

    def __init__(self):
        self.epoch = -1

    @property
    def top_k(self) -> int | None:
        """`int`: entries that it stores of each row, as far as it knows; `None` if whole rows or nothing."""
        return None

    def begin_epoch(self, epoch: int) -> None:
        """Close the epoch before this one. Every process must call this; calling it again changes nothing."""
        self.epoch = epoch

    def look_up(self, samples: SampleIndex | None) -> None:
        """Look these samples up before the model runs; this spares time, and finds faults early."""

    def targets(self, samples: SampleIndex | None, inputs: dict[str, Any], rows: Rows) -> SoftTargets | None:
        """Past predictions for these rows, or `None` if there are none at all."""
        return None

    def observe(self, samples: SampleIndex | None, rows: Rows, mixed: bool = False) -> None:
        """
        Take note of the present predictions; `rows` may have a gradient, what is kept of them has none. Every process
        must call this for every batch; nothing is kept of `mixed` images.
        """

    def after_step(self) -> None:
        """Take note of an optimizer step."""

    def stored(self, sample_ids: Any) -> torch.Tensor:
        """
        The probabilities held for these samples.

        Args:
            sample_ids (`Sequence[int]`, `np.ndarray` or `torch.LongTensor`, shape `[n]`): sample ids.

        Returns:
            `torch.FloatTensor` of shape `[n, C]` (token tasks: `[rows of these samples, C]`), on the CPU; NaN rows
            where there is no past prediction.

        Raises:
            ValueError: if this teacher stores no rows, or an id is unknown.
        """
        raise ValueError(f"teacher={self.kind!r} stores no rows: use teacher='history'.")

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """What all processes agree on: tensors and metadata."""
        return {}, {}

    def process_state(self) -> dict[str, torch.Tensor]:
        """What this process has for itself."""
        return {}

    def load(
        self, tensors: dict[str, torch.Tensor], metadata: dict[str, str], journals: list[dict[str, torch.Tensor]]
    ) -> None:
        """Take over what `state` and the `process_state` of some processes gave."""
