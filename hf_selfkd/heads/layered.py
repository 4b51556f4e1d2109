"""
Layered self-distillation in a training step: rotated views, the rows of the heads, their losses and metrics.

A model without heads that learn has [`NoHeads`], which answers to the same calls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ..batch import Batch
from ..devices import to_device
from ..losses.hard import row_losses
from ..losses.soft import divergence
from ..losses.soft_targets import Target, label_entries, labelled, make_targets, weighted, where_mask
from ..metrics.running import Terms
from ..metrics.tokens import TokenMetrics
from ..samples import IGNORE_INDEX, SampleIndex
from ..tasks.base import Task
from ..tasks.rows import Rows
from ..teachers.base import Taught
from .auxiliary import AuxiliaryHeads, HeadResults, heads_of, split_auxiliary
from .config import ROTATIONS, AuxiliaryHeadsConfig
from .rotation import choose_rotations, rotate


class NoHeads:
    """
    What heads add to a training step, where none learns: nothing.

    Args:
        task ([`~hf_selfkd.tasks.Task`]): of the model, which may have heads that do not learn.
    """

    uses_past = False
    learns = False
    views = 1
    count = 0
    terms: tuple[str, ...] = ()  # names of what is added to the log

    def __init__(self, task: Task):
        self.task, self.heads = task, heads_of(task.wrapped)

    def with_views(self, batch: Batch, epoch: int, step: int) -> Batch:
        """The batch as the model is to see it."""
        return batch

    def split(self, outputs: Any) -> tuple[Any, HeadResults | None]:
        """The outputs of the model itself for the upright views, and what its heads say."""
        return outputs, None

    def rows(self, results: HeadResults | None, batch: Batch) -> list[Rows]:
        """The rows of each head."""
        return []

    def join(
        self,
        loss: torch.Tensor,
        results: HeadResults | None,
        head_rows: list[Rows],
        rows: Rows,
        batch: Batch,
        taught: Taught,
        alpha: float,
        num_items: Any,
    ) -> tuple[torch.Tensor, Terms]:
        """The loss of the model with that of its heads, and what the heads add to the log."""
        return loss, {}

    def predictions(self, run: Callable[[dict[str, Any]], Any], batch: Batch) -> list[Rows]:
        """What a teacher that is a copy of the model says of a batch: the rows of the model, then those of heads."""
        inputs = batch.inputs if batch.upright is None else batch.upright
        shown = Batch(inputs, batch.labels, batch.label_name, targets=batch.targets)
        if self.heads is None:
            return [self.task.predict(run, shown).kept]
        with self.heads.watched(False):
            return [self.task.predict(run, shown).kept]


class Layered(NoHeads):
    """
    What the heads of a model add to a training step.

    Args:
        task ([`~hf_selfkd.tasks.Task`]): of the model that is trained, which has heads.
        distils (`bool`): whether there is a teacher.
        seed (`int`): chooses the rotations of each sample.
        temperature (`float`): of the soft part of the heads' labels.
    """

    learns = True

    def __init__(self, task: Task, distils: bool = True, seed: int = 0, temperature: float = 1.0):
        super().__init__(task)
        if self.rotates and not task.rotates:
            raise ValueError(
                f"views='rotation' with task {type(task).__name__}, which does not say that rotated images are views "
                "of the same sample (rotates = True): set views='none' in auxiliary_heads."
            )
        self.seed, self.temperature = seed, temperature
        self.uses_past = distils and self.config.uses_past
        self.terms = tuple(f"head{index}_{name}" for index in range(self.count) for name in ("loss", "accuracy"))
        if self.config.heads_to_model_weight > 0:
            self.terms += ("heads_to_model",)

    @property
    def config(self) -> AuxiliaryHeadsConfig:
        """[`AuxiliaryHeadsConfig`]: with everything decided."""
        return self.heads.config

    @property
    def count(self) -> int:
        """`int`: number of heads."""
        return len(self.heads.heads)

    @property
    def rotates(self) -> bool:
        """`bool`: whether the heads tell rotations too."""
        return self.config.views == "rotation"

    @property
    def views(self) -> int:
        """`int`: views of a sample in a step, the upright one included."""
        return 1 + self.config.views_per_step if self.rotates else 1

    # Views

    def with_views(self, batch: Batch, epoch: int, step: int) -> Batch:
        if not self.rotates:
            return batch
        size = len(batch.labels)
        # The samples of a stream without ids are told apart by their place.
        ids = size * step + np.arange(size) if batch.ids is None else batch.ids
        batch.rotations = choose_rotations(ids, self.config.views_per_step, epoch, self.seed)
        batch.labels = batch.labels.reshape(-1)
        batch.upright, batch.inputs = batch.inputs, self.expand(batch.inputs, batch.rotations)
        return batch

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

    def split(self, outputs: Any) -> tuple[Any, HeadResults | None]:
        outputs, results = split_auxiliary(self.heads, outputs)
        if self.views > 1:
            rows = len(outputs["logits"])
            for name, value in list(outputs.items()):
                if isinstance(value, torch.Tensor) and value.dim() and len(value) == rows:
                    outputs[name] = value[:: self.views]
        return outputs, results

    def joint_labels(self, labels: torch.Tensor, rotations: np.ndarray) -> torch.Tensor:
        """
        What the heads have to tell: `4 * label + quarter turns`, `[B * V]`, of labels `[B]`; -100 stays.
        """
        rotations = to_device(torch.from_numpy(rotations), labels.device)
        labels = labels.reshape(-1, 1)
        return torch.where(labelled(labels), ROTATIONS * labels + rotations, IGNORE_INDEX).reshape(-1)

    def samples(self, batch: Batch) -> SampleIndex:
        """Where the predictions of the views are kept: as samples `4 * id + quarter turns`."""
        samples, rotations = batch.samples, batch.rotations
        if rotations is None:
            return samples
        labels = samples.label_hash[:, None]  # images have one row each, whose hash is its label
        labels = np.where(labels != IGNORE_INDEX, ROTATIONS * labels + rotations, IGNORE_INDEX)
        ids = ROTATIONS * samples.ids[:, None] + rotations
        return SampleIndex(ids.reshape(-1), labels.reshape(-1), rotations.shape[1] * samples.total)

    def size_and_ids(self, size: int, ids: np.ndarray | None) -> tuple[int, np.ndarray | None]:
        """The number and the ids of all views of all samples."""
        if not self.rotates:
            return size, ids
        every = None if ids is None else (ROTATIONS * ids[:, None] + np.arange(ROTATIONS)).reshape(-1)
        return ROTATIONS * size, every

    def predictions(self, run: Callable[[dict[str, Any]], Any], batch: Batch) -> list[Rows]:
        if not self.uses_past:  # then the rotated views would be run for nothing
            return super().predictions(run, batch)
        with self.heads.watched():
            outputs = run(self.task.inputs_without_labels(batch))
        results = self.heads.take_results()
        logits = self.task.logits(outputs, has_loss=False)[:: self.views]
        return [part.kept for part in (self.task.rows_of(logits, batch), *self.rows(results, batch))]

    # Losses

    def rows(self, results: HeadResults | None, batch: Batch) -> list[Rows]:
        if results is None:  # a step that has skipped all layers (LayerDrop)
            return []
        if batch.rotations is None:
            made = [self.task.rows_of(logits, batch) for logits in results.logits]
        else:
            joint = self.joint_labels(batch.labels, batch.rotations)
            made = [Rows(logits, joint) for logits in results.logits]
        for rows in made:
            rows.storage = batch.storage if self.uses_past else None
        return made

    def join(
        self,
        loss: torch.Tensor,
        results: HeadResults | None,
        head_rows: list[Rows],
        rows: Rows,
        batch: Batch,
        taught: Taught,
        alpha: float,
        num_items: Any,
    ) -> tuple[torch.Tensor, Terms]:
        if results is None:
            return loss, {}
        partner = None
        if batch.mixing is not None and batch.rotations is not None:
            partner = self.joint_labels(batch.labels[batch.mixing.partner], batch.rotations)
        soft = taught.heads or [None] * len(head_rows)
        addressed = batch.storage is not None
        targets = [
            make_targets(part.labels, own, batch.mixing, addressed, partner)
            for part, own in zip(head_rows, soft, strict=True)
        ]
        of_heads, terms = self.loss(results, head_rows, targets, rows.logits, alpha)
        if self.config.heads_to_model_weight > 0:
            mask, aggregate = labelled(rows.labels), self.aggregate(head_rows, batch.rotations)
            away = where_mask(divergence(rows.logits, aggregate, self.config.temperature), mask).sum()
            of_heads = of_heads + self.config.heads_to_model_weight * away
            terms["heads_to_model"] = (away.detach(), mask.sum())
        return loss + of_heads / num_items, terms

    def loss(
        self,
        results: HeadResults,
        rows: list[Rows],
        targets: list[list[Target]],
        logits: torch.Tensor,
        alpha: float,
    ) -> tuple[torch.Tensor, Terms]:
        """
        Sum of the losses of all heads over the rows of a batch, averaged over the views of a sample, and loss and
        accuracy of each head for the log. With rotated views a head is right when it tells class and rotation.

        Args:
            results ([`~hf_selfkd.heads.HeadResults`]): of the batch.
            rows (`list[Rows]`): of each head.
            targets (`list[list[Target]]`): of each head, the labels and soft targets to learn from.
            logits (`torch.FloatTensor` of shape `[R, C]`): of the model itself, the deepest classifier if it tells
                the same classes as the heads.
            alpha (`float`): the weight of the past for the model itself.

        Returns:
            `tuple`: a scalar `torch.FloatTensor`, and sums with their weights, by name.
        """
        config, total, terms = self.config, 0.0, {}
        layer_weights = self.heads.layer_weights
        teacher = rows[-1].logits if self.rotates else logits
        mask = labelled(rows[0].labels)
        weight = mask.sum()
        for index, (part, own) in enumerate(zip(rows, targets, strict=True)):
            loss = torch.zeros((), device=mask.device)
            if config.hard_weight > 0:
                loss = loss + config.hard_weight * self._label_loss(part, own, config.past_weight * alpha)
            if config.deep_to_shallow_weight > 0 and not (self.rotates and index == len(rows) - 1):
                away = divergence(part.logits, teacher, config.temperature)
                if config.deep_to_shallow_trust:
                    away = away * _label_probability(teacher, part.labels)
                loss = loss + config.deep_to_shallow_weight * where_mask(away, mask).sum()
            if results.features[index] is not None:
                loss = loss + config.feature_weight * self._feature_loss(results, index, mask)
            total = total + layer_weights[index] * loss
            right = ((part.logits.detach().argmax(dim=-1) == part.labels) & mask).sum()
            terms |= {f"head{index}_loss": (loss.detach(), weight), f"head{index}_accuracy": (right, weight)}
        return total / self.views, terms

    def aggregate(self, rows: list[Rows], rotations: np.ndarray | None) -> torch.Tensor:
        """
        What the heads say together (Lee et al., ICML 2020): the mean of their scores, of a rotated view those of the
        classes in its own rotation, over views and heads.

        Args:
            rows (`list[Rows]`): of each head, with logits `[R, C]`, or `[B * V, 4 * C]` of rotated views.
            rotations (`numpy.ndarray` of shape `[B, V]`, *optional*): of the views, in quarter turns.

        Returns:
            `torch.FloatTensor` of shape `[R, C]` or `[B, C]`: float32, without a gradient.
        """
        total = sum(part.logits.detach().float() for part in rows) / len(rows)
        if rotations is None:
            return total
        own = to_device(torch.from_numpy(rotations), total.device)[..., None, None]
        joint = total.unflatten(-1, (-1, ROTATIONS)).unflatten(0, rotations.shape)
        return joint.gather(-1, own.expand(*joint.shape[:-1], 1)).squeeze(-1).mean(dim=1)

    def _label_loss(self, rows: Rows, targets: list[Target], alpha: float) -> torch.Tensor:
        if targets[0].soft_targets is None or alpha == 0:
            return weighted([rows.hard_sum(target.labels) for target in targets], targets)
        losses = [row_losses(rows, target, alpha, self.temperature) for target in targets]
        return weighted([part.total.sum() for part in losses], targets)

    @staticmethod
    def _feature_loss(results: HeadResults, index: int, mask: torch.Tensor) -> torch.Tensor:
        adapted, deep = results.features[index].float(), results.deep.float()
        distance = (adapted - deep).square().mean(dim=-1).reshape(-1)
        if len(mask) != len(distance):  # a row a class: the features are those of the sample
            mask = mask.view(len(distance), -1)
            distance = distance.unsqueeze(-1).expand_as(mask)
        # Rows of a causal model stand where their predictions do, so the mask fits the positions as it is.
        return where_mask(distance, mask).sum()


@torch.no_grad()
def _label_probability(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The probability `[R]` that rows of logits `[R, C]` give to their labels."""
    logits = logits.float()
    return (label_entries(logits, labels) - logits.logsumexp(dim=-1)).exp()


class HeadMetrics:
    """
    How well each head tells the classes of an evaluation's samples.

    Args:
        heads ([`~hf_selfkd.heads.AuxiliaryHeads`]): of the model that is evaluated.
        task ([`~hf_selfkd.tasks.Task`]): of that model.
        gather (`Callable`): as for [`~hf_selfkd.metrics.tokens.TokenMetrics`].
    """

    def __init__(self, heads: AuxiliaryHeads, task: Task, gather: Callable[[torch.Tensor], torch.Tensor]):
        self.heads, self.task = heads, task
        self.metrics = [TokenMetrics(gather) for _ in heads.heads]

    def update(self, labels: torch.Tensor | None) -> None:
        """Take note of what the heads said of the last batch, with its labels `[B]` or `[B, L]`."""
        results = self.heads.take_results()
        if results is None or labels is None:
            return
        for metrics, logits in zip(self.metrics, results.logits, strict=True):
            rows = self.task.rows(self.heads.class_logits(logits), labels)
            shape = (len(labels), -1)
            metrics.update(rows.logits.view(*shape, rows.logits.shape[-1]), rows.labels.view(shape))
            metrics.gather()

    def compute(self, prefix: str) -> dict[str, float]:
        """
        `{prefix}_head0_accuracy` (a fraction), `_nll`, `_ece` (per cent, 10 bins) and `_perplexity`, and so on for
        every head.
        """
        return {
            f"{prefix}_head{index}_{name.removeprefix('token_')}": value
            for index, metrics in enumerate(self.metrics)
            for name, value in metrics.compute().items()
        }
