"""One history of objects, whose number shows while training goes on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ..config import MethodArguments
from ..history import Plan, PredictionHistory
from ..history.objects import ObjectHistory
from ..samples import SampleIndex
from .history import HistoryStore


class ObjectStore(HistoryStore):
    """
    One prediction history of the objects of images; see [`HistoryStore`]. Rows are kept whole.

    Args:
        *arguments: as for [`HistoryStore`].
        independent (`bool`): whether each class has a probability of its own.
        **named: as for [`HistoryStore`].
    """

    def __init__(self, *arguments: Any, independent: bool = False, **named: Any):
        super().__init__(*arguments, **named)
        self.independent = independent

    def plan(self, num_rows: int, num_classes: int, config: MethodArguments | None = None) -> Plan:
        plan = super().plan(num_rows, num_classes, replace(config or self.config, history_top_k=num_classes))
        plan.codec.categorical = not self.independent
        return plan

    def stored(self, sample_ids: Any) -> torch.Tensor:
        """The probabilities held for the objects of these images, `[objects, C]`, in the order of their ids."""
        if self.history is None:
            raise ValueError("no predictions are stored yet: train first.")
        objects = self.history.of_images(np.asarray(torch.as_tensor(sample_ids).cpu()).reshape(-1))
        return self.history.probabilities(objects)

    def _num_rows(self, samples: SampleIndex, ragged: bool) -> int:
        if self.rows_per_sample is not None:
            return max(1, round(self.size * self.rows_per_sample))
        counted = torch.tensor([samples.items, samples.total])
        if self.gather is not None:
            counted = self.gather(counted).view(-1, 2).sum(dim=0)
        images, objects = counted.tolist()
        return max(1, -(-self.size * objects // max(images, 1)))

    def _make(self, plan: Plan, ragged: bool, **options: Any) -> PredictionHistory:
        return ObjectHistory(self.size, plan.codec, plan.place, self.device, self.folder, **options)

    def _has_grown(self, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> bool:
        """
        Raises:
            ValueError: if the history was made for other images.
        """
        if metadata.get("images") != str(self.size):
            raise ValueError(
                f"the checkpoint's history was made for {metadata.get('images', 'no')} images, the training set has "
                f"{self.size}: give the same dataset as before, or start a new run from these weights with "
                "from_pretrained."
            )
        return False
