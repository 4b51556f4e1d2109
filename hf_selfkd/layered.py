"""Layered self-distillation in a training step: rotated views, the rows of the heads, their losses and figures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from .heads import AuxiliaryHeads, HeadResults
from .heads_config import ROTATIONS, AuxiliaryHeadsConfig
from .losses import RowLosses, Side, cross_entropy_sum, divergence, labelled, only, weighted
from .measures import TokenFigures
from .rows import Rows
from .samples import IGNORE_INDEX, SampleKeys


def choose_turns(ids: np.ndarray, views: int, epoch: int, seed: int) -> np.ndarray:
    """
    Which views of each sample are seen in an epoch: the upright one, then rotated ones.

    They depend on nothing but the arguments, so that they resume and do not depend on the number of processes; with
    one rotated view, a sample sees all three in three successive epochs, and starts with any of them.

    Args:
        ids (`np.ndarray` of `int64`, shape `[B]`): sample ids.
        views (`int`): rotated views, 0 to 3.
        epoch (`int`): counted from 0.
        seed (`int`): of the run.

    Returns:
        `np.ndarray` of `int64`, shape `[B, 1 + views]`: quarter turns, counter-clockwise, ascending.
    """
    mixed = (ids.astype(np.uint64) + np.uint64(seed % 2**32 + 1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    first = ((mixed >> np.uint64(33)) % np.uint64(3)).astype(np.int64)
    turns = 1 + (first[:, None] + epoch + np.arange(views)) % 3
    return np.concatenate((np.zeros((len(ids), 1), np.int64), np.sort(turns, axis=1)), axis=1)


def rotate(images: torch.Tensor, turns: np.ndarray) -> torch.Tensor:
    """
    The views of a batch, one sample after the other.

    Args:
        images (`torch.FloatTensor` of shape `[B, C, S, S]`): upright.
        turns (`np.ndarray` of shape `[B, V]`): quarter turns of each view, counter-clockwise.

    Returns:
        `torch.FloatTensor` of shape `[B * V, C, S, S]`: view `v` of sample `b` is row `V * b + v`.

    Raises:
        ValueError: if the images are not square.
    """
    if images.dim() != 4 or images.shape[-1] != images.shape[-2]:
        raise ValueError(
            f"views='rotation' needs square images, and these are {list(images.shape)}: resize or crop them to "
            "squares, or set views='none'."
        )
    count = turns.shape[1]
    views = images.repeat_interleave(count, dim=0)
    for quarter in range(1, ROTATIONS):
        rows = np.flatnonzero(turns.reshape(-1) == quarter)
        if len(rows):
            index = torch.from_numpy(rows).to(images.device, non_blocking=True)
            views[index] = torch.rot90(images[index // count], quarter, dims=(-2, -1))
    return views


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

    def expand(self, inputs: dict[str, Any], turns: np.ndarray) -> dict[str, Any]:
        """The inputs `[B, ...]` of a batch for all of its views, `[B * V, ...]`."""
        if "pixel_values" not in inputs:
            raise ValueError(f"views='rotation' needs pixel_values, and the batch has only {', '.join(inputs)}.")
        size, count = turns.shape
        return {
            name: rotate(value, turns)
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

    def joint_labels(self, labels: torch.Tensor, turns: np.ndarray) -> torch.Tensor:
        """
        What the heads have to tell: `4 * label + quarter turns`, `[B * V]`, of labels `[B]`; -100 stays.
        """
        turns = torch.from_numpy(turns).to(labels.device, non_blocking=True)
        labels = labels.reshape(-1, 1)
        return torch.where(labelled(labels), ROTATIONS * labels + turns, IGNORE_INDEX).reshape(-1)

    def keys(self, keys: SampleKeys, turns: np.ndarray | None) -> SampleKeys:
        """Where the predictions of the views are kept: as samples `4 * id + quarter turns`."""
        if turns is None:
            return keys
        labels = keys.label_hash[:, None]  # images have one row each, whose hash is its label
        labels = np.where(labels != IGNORE_INDEX, ROTATIONS * labels + turns, IGNORE_INDEX)
        ids = ROTATIONS * keys.ids[:, None] + turns
        return SampleKeys(ids.reshape(-1), labels.reshape(-1), turns.shape[1] * keys.total)

    def ids(self, ids: np.ndarray | None) -> np.ndarray | None:
        """The ids of all views of all samples."""
        return None if ids is None else (ROTATIONS * ids[:, None] + np.arange(ROTATIONS)).reshape(-1)

    # Losses

    def rows(self, results: HeadResults, labels: torch.Tensor, turns: np.ndarray | None) -> list[Rows]:
        """The rows of each head, with the labels `[B]` or `[B, L]` of the batch."""
        if turns is None:
            return [self.to_rows(logits, labels) for logits in results.logits]
        joint = self.joint_labels(labels, turns)
        return [Rows(logits, joint) for logits in results.logits]

    def loss(
        self,
        results: HeadResults,
        rows: list[Rows],
        sides: list[list[Side]],
        logits: torch.Tensor,
        alpha: float,
        row_losses: Callable[[Rows, Side, float], RowLosses],
    ) -> torch.Tensor:
        """
        Sum of the losses of all heads over the rows of a batch, averaged over the views of a sample.

        Args:
            results ([`~hf_selfkd.heads.HeadResults`]): of the batch.
            rows (`list[Rows]`): of each head.
            sides (`list[list[Side]]`): of each head, the labels and past rows to learn from.
            logits (`torch.FloatTensor` of shape `[R, C]`): of the model itself, the deepest classifier if it tells
                the same classes as the heads.
            alpha (`float`): the weight of the past for the model itself.
            row_losses (`Callable`): the losses of rows with a past, given rows, side and weight of the past.

        Returns:
            `torch.FloatTensor`: a scalar.
        """
        config, total, figures = self.config, 0.0, []
        teacher = rows[-1].logits if self.rotates else logits
        mask = labelled(rows[0].labels)
        for index, (part, own) in enumerate(zip(rows, sides, strict=True)):
            loss = torch.zeros((), device=mask.device)
            if config.hard_weight > 0:
                loss = loss + config.hard_weight * self._label_loss(part, own, config.past_weight * alpha, row_losses)
            if config.deep_to_shallow_weight > 0 and not (self.rotates and index == len(rows) - 1):
                away = divergence(part.logits, teacher, config.temperature)
                loss = loss + config.deep_to_shallow_weight * only(away, mask).sum()
            if results.features[index] is not None:
                loss = loss + config.feature_weight * self._feature_loss(results, index, mask)
            total = total + loss
            figures += [loss.detach(), ((part.logits.detach().argmax(dim=-1) == part.labels) & mask).sum()]
        self.sums = self.sums + torch.stack([mask.sum(), *figures]).float()
        return total / self.views

    @staticmethod
    def _label_loss(
        rows: Rows, sides: list[Side], alpha: float, row_losses: Callable[[Rows, Side, float], RowLosses]
    ) -> torch.Tensor:
        if sides[0].past is None or alpha == 0:
            return weighted([cross_entropy_sum(rows.logits, side.labels) for side in sides], sides)
        return weighted([row_losses(rows, side, alpha).total.sum() for side in sides], sides)

    @staticmethod
    def _feature_loss(results: HeadResults, index: int, mask: torch.Tensor) -> torch.Tensor:
        adapted, deep = results.features[index].float(), results.deep.float()
        distance = (adapted - deep).square().mean(dim=-1).reshape(-1)
        # Rows of a causal model stand where their predictions do, so the mask fits the positions as it is.
        return only(distance, mask).sum()

    def take_figures(self, reduce: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """
        Mean loss per row and accuracy of each head since the last call, of all processes; this waits for the device.
        With rotated views a head is right when it tells class and rotation of a view.
        """
        if isinstance(self.sums, float):
            return {}
        rows, *figures = reduce(self.sums).tolist()
        self.sums = 0.0
        names = [f"head{index}_{name}" for index in range(len(self.heads.heads)) for name in ("loss", "accuracy")]
        return {name: value / rows for name, value in zip(names, figures, strict=True)} if rows else {}


class HeadFigures:
    """
    How well each head tells the classes of an evaluation's samples.

    Args:
        heads ([`~hf_selfkd.heads.AuxiliaryHeads`]): of the model that is evaluated.
        to_rows (`Callable`): the adapter of the model's task.
        gather (`Callable`): as for [`~hf_selfkd.measures.TokenFigures`].
    """

    def __init__(self, heads: AuxiliaryHeads, to_rows: Callable, gather: Callable[[torch.Tensor], torch.Tensor]):
        self.heads, self.to_rows = heads, to_rows
        self.figures = [TokenFigures(gather) for _ in heads.heads]

    def see(self, labels: torch.Tensor | None) -> None:
        """Take note of what the heads said of the last batch, with its labels `[B]` or `[B, L]`."""
        results, self.heads.results = self.heads.results, None
        if results is None or labels is None:
            return
        for figures, logits in zip(self.figures, results.logits, strict=True):
            rows = self.to_rows(self.heads.class_logits(logits), labels)
            shape = (len(labels), -1)
            figures.see(rows.logits.view(*shape, rows.logits.shape[-1]), rows.labels.view(shape))
            figures.gather()

    def compute(self, prefix: str) -> dict[str, float]:
        """`{prefix}_head0_accuracy` (a fraction), `_nll` and `_ece` (per cent, 10 bins), and so on for every head."""
        return {
            f"{prefix}_head{index}_{name.removeprefix('token_')}": value
            for index, figures in enumerate(self.figures)
            for name, value in figures.compute().items()
        }
