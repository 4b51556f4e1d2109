"""Layered self-distillation in a training step: rotated views, the rows of the heads, their losses and metrics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ..losses.cross_entropy import cross_entropy_sum
from ..losses.soft import divergence
from ..losses.soft_targets import RowLosses, Target, labelled, weighted, where_mask
from ..metrics.tokens import TokenMetrics
from ..samples import IGNORE_INDEX, SampleIndex
from ..tasks.rows import Rows
from .auxiliary import AuxiliaryHeads, HeadResults
from .config import ROTATIONS, AuxiliaryHeadsConfig
from .rotation import rotate


class Layered:
    """
    What the heads of a model add to a training step.

    Args:
        heads ([`~hf_selfkd.heads.AuxiliaryHeads`]): of the model that is trained.
        to_rows (`Callable`): the adapter of the model's task, from logits and labels to [`~hf_selfkd.rows.Rows`].
    """

    def __init__(self, heads: AuxiliaryHeads, to_rows: Callable[[torch.Tensor, torch.Tensor], Rows]):
        self.heads, self.to_rows = heads, to_rows
        self.sums: torch.Tensor | float = 0.0

    @property
    def config(self) -> AuxiliaryHeadsConfig:
        """[`AuxiliaryHeadsConfig`]: with everything decided."""
        return self.heads.config

    @property
    def rotates(self) -> bool:
        """`bool`: whether the heads tell rotations too."""
        return self.config.views == "rotation"

    @property
    def views(self) -> int:
        """`int`: views of a sample in a step, the upright one included."""
        return 1 + self.config.views_per_step if self.rotates else 1

    # Views

    def expand(self, inputs: dict[str, Any], rotations: np.ndarray) -> dict[str, Any]:
        """The inputs `[B, ...]` of a batch for all of its views, `[B * V, ...]`."""
        if "pixel_values" not in inputs:
            raise ValueError(f"views='rotation' needs pixel_values, and the batch has only {', '.join(inputs)}.")
        size, count = rotations.shape
        return {
            name: rotate(value, rotations)
            if name == "pixel_values"
            else value.repeat_interleave(count, dim=0)
            if isinstance(value, torch.Tensor) and value.dim() and len(value) == size
            else value
            for name, value in inputs.items()
        }

    def upright_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """Labels `[B]` for a model that is shown all views: `[B * V]`, -100 for the rotated ones."""
        upright = labels.new_full((len(labels), self.views), IGNORE_INDEX)
        upright[:, 0] = labels
        return upright.reshape(-1)

    def upright(self, outputs: Any) -> Any:
        """A model's outputs for the upright views alone."""
        if self.views == 1:
            return outputs
        rows = len(outputs["logits"])
        for name, value in list(outputs.items()):
            if isinstance(value, torch.Tensor) and value.dim() and len(value) == rows:
                outputs[name] = value[:: self.views]
        return outputs

    def joint_labels(self, labels: torch.Tensor, rotations: np.ndarray) -> torch.Tensor:
        """
        What the heads have to tell: `4 * label + quarter turns`, `[B * V]`, of labels `[B]`; -100 stays.
        """
        rotations = torch.from_numpy(rotations).to(labels.device, non_blocking=True)
        labels = labels.reshape(-1, 1)
        return torch.where(labelled(labels), ROTATIONS * labels + rotations, IGNORE_INDEX).reshape(-1)

    def samples(self, samples: SampleIndex, rotations: np.ndarray | None) -> SampleIndex:
        """Where the predictions of the views are kept: as samples `4 * id + quarter turns`."""
        if rotations is None:
            return samples
        labels = samples.label_hash[:, None]  # images have one row each, whose hash is its label
        labels = np.where(labels != IGNORE_INDEX, ROTATIONS * labels + rotations, IGNORE_INDEX)
        ids = ROTATIONS * samples.ids[:, None] + rotations
        return SampleIndex(ids.reshape(-1), labels.reshape(-1), rotations.shape[1] * samples.total)

    def ids(self, ids: np.ndarray | None) -> np.ndarray | None:
        """The ids of all views of all samples."""
        return None if ids is None else (ROTATIONS * ids[:, None] + np.arange(ROTATIONS)).reshape(-1)

    # Losses

    def rows(self, results: HeadResults, labels: torch.Tensor, rotations: np.ndarray | None) -> list[Rows]:
        """The rows of each head, with the labels `[B]` or `[B, L]` of the batch."""
        if rotations is None:
            return [self.to_rows(logits, labels) for logits in results.logits]
        joint = self.joint_labels(labels, rotations)
        return [Rows(logits, joint) for logits in results.logits]

    def loss(
        self,
        results: HeadResults,
        rows: list[Rows],
        targets: list[list[Target]],
        logits: torch.Tensor,
        alpha: float,
        row_losses: Callable[[Rows, Target, float], RowLosses],
    ) -> torch.Tensor:
        """
        Sum of the losses of all heads over the rows of a batch, averaged over the views of a sample.

        Args:
            results ([`~hf_selfkd.heads.HeadResults`]): of the batch.
            rows (`list[Rows]`): of each head.
            targets (`list[list[Side]]`): of each head, the labels and past rows to learn from.
            logits (`torch.FloatTensor` of shape `[R, C]`): of the model itself, the deepest classifier if it tells
                the same classes as the heads.
            alpha (`float`): the weight of the past for the model itself.
            row_losses (`Callable`): the losses of rows with a past, given rows, side and weight of the past.

        Returns:
            `torch.FloatTensor`: a scalar.
        """
        config, total, metrics = self.config, 0.0, []
        teacher = rows[-1].logits if self.rotates else logits
        mask = labelled(rows[0].labels)
        for index, (part, own) in enumerate(zip(rows, targets, strict=True)):
            loss = torch.zeros((), device=mask.device)
            if config.hard_weight > 0:
                loss = loss + config.hard_weight * self._label_loss(part, own, config.past_weight * alpha, row_losses)
            if config.deep_to_shallow_weight > 0 and not (self.rotates and index == len(rows) - 1):
                away = divergence(part.logits, teacher, config.temperature)
                loss = loss + config.deep_to_shallow_weight * where_mask(away, mask).sum()
            if results.features[index] is not None:
                loss = loss + config.feature_weight * self._feature_loss(results, index, mask)
            total = total + loss
            metrics += [loss.detach(), ((part.logits.detach().argmax(dim=-1) == part.labels) & mask).sum()]
        self.sums = self.sums + torch.stack([mask.sum(), *metrics]).float()
        return total / self.views

    @staticmethod
    def _label_loss(
        rows: Rows, targets: list[Target], alpha: float, row_losses: Callable[[Rows, Target, float], RowLosses]
    ) -> torch.Tensor:
        if targets[0].soft_targets is None or alpha == 0:
            return weighted([cross_entropy_sum(rows.logits, target.labels) for target in targets], targets)
        return weighted([row_losses(rows, target, alpha).total.sum() for target in targets], targets)

    @staticmethod
    def _feature_loss(results: HeadResults, index: int, mask: torch.Tensor) -> torch.Tensor:
        adapted, deep = results.features[index].float(), results.deep.float()
        distance = (adapted - deep).square().mean(dim=-1).reshape(-1)
        # Rows of a causal model stand where their predictions do, so the mask fits the positions as it is.
        return where_mask(distance, mask).sum()

    def take_metrics(self, reduce: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """
        Mean loss per row and accuracy of each head since the last call, of all processes; this waits for the device.
        With rotated views a head is right when it tells class and rotation of a view.
        """
        if isinstance(self.sums, float):
            return {}
        rows, *metrics = reduce(self.sums).tolist()
        self.sums = 0.0
        names = [f"head{index}_{name}" for index in range(len(self.heads.heads)) for name in ("loss", "accuracy")]
        return {name: value / rows for name, value in zip(names, metrics, strict=True)} if rows else {}


class HeadMetrics:
    """
    How well each head tells the classes of an evaluation's samples.

    Args:
        heads ([`~hf_selfkd.heads.AuxiliaryHeads`]): of the model that is evaluated.
        to_rows (`Callable`): the adapter of the model's task.
        gather (`Callable`): as for [`~hf_selfkd.measures.TokenMetrics`].
    """

    def __init__(self, heads: AuxiliaryHeads, to_rows: Callable, gather: Callable[[torch.Tensor], torch.Tensor]):
        self.heads, self.to_rows = heads, to_rows
        self.metrics = [TokenMetrics(gather) for _ in heads.heads]

    def update(self, labels: torch.Tensor | None) -> None:
        """Take note of what the heads said of the last batch, with its labels `[B]` or `[B, L]`."""
        results, self.heads.results = self.heads.results, None
        if results is None or labels is None:
            return
        for metrics, logits in zip(self.metrics, results.logits, strict=True):
            rows = self.to_rows(self.heads.class_logits(logits), labels)
            shape = (len(labels), -1)
            metrics.update(rows.logits.view(*shape, rows.logits.shape[-1]), rows.labels.view(shape))
            metrics.gather()

    def compute(self, prefix: str) -> dict[str, float]:
        """`{prefix}_head0_accuracy` (a fraction), `_nll` and `_ece` (per cent, 10 bins), and so on for every head."""
        return {
            f"{prefix}_head{index}_{name.removeprefix('token_')}": value
            for index, metrics in enumerate(self.metrics)
            for name, value in metrics.compute().items()
        }
