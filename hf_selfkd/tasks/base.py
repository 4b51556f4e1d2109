"""What every task answers to: how a batch and the outputs of a model become rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from ..batch import Batch, BatchRecord, Mixing
from ..devices import to_device
from ..models import base_model, logits_of, num_classes_of, output_embeddings_of
from ..samples import IGNORE_INDEX, SampleIndex, sample_index
from .rows import Rows


class Task:
    """
    A kind of task, for one model. A task keeps nothing of a run: the same batch always gives the same rows.

    A new task is a subclass: [`~Task.matches`] says which models the task is for, [`~Task.rows`] turns logits and
    labels into rows. Give the class to the trainer (`SelfKDTrainer(..., task=MyTask)`), or add a line to `TASKS`.
    The loss of a model of transformers, in training and evaluation, is then the cross-entropy of these rows. A model
    class of one's own keeps the loss that it computes, unless `hard_loss="cross_entropy"` is asked for.

    Args:
        model (`nn.Module`): the model, in any wrapper.
        label_names (`tuple[str]`, *optional*, defaults to `("labels",)`):
            names under which a batch may hold the labels.

    Attributes:
        name (`str`): for messages.
        shifts_labels (`bool`): whether the prediction at a position is of the label at the next one.
        per_token (`bool`): whether a sample has a row a position.
        language_model (`bool`): whether classes are words: evaluation has token metrics, logits can be chunked.
        rotates (`bool`): whether a rotated image is a view of the same sample.
        bernoulli (`bool`): whether the classes of a row are no and yes, whose odds are one number.
        unsmoothed (`str`, *optional*): why labels cannot be smoothed, if they cannot.
        unmixed (`str`, *optional*): why samples cannot be mixed, if they cannot.
        headless (`str`, *optional*): why the model cannot have auxiliary heads, if it cannot.
        unranked (`str`, *optional*): why the order of the scores teaches nothing, if it does not.
        no_history (`str`, *optional*): why rows cannot be stored, if they cannot.
        per_object (`bool`): whether rows are objects, of which a sample may show some today and others tomorrow.
        independent (`bool`): whether each class of a row has a probability of its own, which do not add up to 1.
        bare_logits (`bool`): whether a model may return its logits alone, which a trainer would take for a loss.
        labels_move (`str`): what to say where the labels of a sample change from one reading to the next.
        many_rows (`str`, *optional*): why `teacher="auto"` stores no rows, though they can be stored.
        uncalibrated (`str`, *optional*): why held-out data tell no temperature, if they do not.
        untraced (`str`, *optional*): why there is no probability of the true class of a sample, if there is not.
    """

    name = "a task"
    shifts_labels = False
    per_token = False
    language_model = False
    rotates = False
    bernoulli = False
    unmixed: str | None = None
    unsmoothed: str | None = None
    headless: str | None = None
    unranked: str | None = None
    no_history: str | None = None
    per_object = False
    independent = False
    many_rows: str | None = None
    uncalibrated: str | None = None
    untraced: str | None = None
    bare_logits = False
    labels_move = (
        "the labels of a sample change from one reading to the next, as with random masking: teacher='history' would "
        "compare predictions of other words. Use teacher='snapshot', or mask when the dataset is made"
    )

    def __init__(self, model: nn.Module, label_names: tuple[str, ...] = ("labels",)):
        self.wrapped, self.model, self.label_names = model, base_model(model), label_names

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        """
        Whether the task is that of a model.

        Args:
            model (`nn.Module`): bare, without wrappers.
        """
        return False

    @property
    def num_classes(self) -> int | None:
        """`int`: classes of a row, as far as the model tells before it has run."""
        if self.language_model and output_embeddings_of(self.wrapped) is None:
            return None  # `num_labels` of the configuration says nothing of words
        return num_classes_of(self.wrapped)

    def classes_in(self, batch: Batch) -> int | None:
        """
        Classes of the rows of a batch, where they differ from batch to batch and its inputs tell.

        Args:
            batch ([`~hf_selfkd.batch.Batch`]): as [`~Task.split`] gave it.
        """
        return None

    @property
    def has_known_rows(self) -> bool:
        """`bool`: whether the rows are made by this package, so that the loss of a model of transformers is theirs."""
        owner = next(kind for kind in type(self).__mro__ if "rows" in vars(kind))
        return owner.__module__.partition(".")[0] == __name__.partition(".")[0]

    def split(self, inputs: dict[str, Any], record: BatchRecord | None = None) -> Batch:
        """
        Split a batch into what the model sees and its labels.

        Args:
            inputs (`dict`): as the dataloader gave them; the dictionary is left as it is.
            record ([`~hf_selfkd.batch.BatchRecord`], *optional*): what came beside them.

        Raises:
            ValueError: if there are no labels, or other ones than classes.
        """
        name = next((name for name in self.label_names if name in inputs), None)
        found = self.labels_in(inputs)
        if name is None or (found is None and inputs[name] is not None):
            raise ValueError(self.no_labels(inputs))
        labels = self.checked_labels(found)
        inputs = {key: value for key, value in inputs.items() if key not in self.taken(name)}
        record = BatchRecord() if record is None else record
        samples = record.samples
        if samples is None and record.ids is not None:
            samples = self.sample_index(record.ids, labels.cpu())
        if record.partner is not None and self.unmixed is not None:
            raise ValueError(f"mixup_alpha or cutmix_alpha with {self.name}: {self.unmixed}. Set both to 0.")
        mixing = None
        if record.partner is not None:
            weight = torch.tensor(record.weight, dtype=torch.float32, device=labels.device)
            mixing = Mixing(self.partner_rows(to_device(record.partner, labels.device), labels), weight)
        return Batch(inputs, labels, name, record.ids, samples, mixing)

    def labels_in(self, inputs: Any) -> Any:
        """
        The labels among the inputs of a model, as a collator made them: one tensor, whatever the names are.

        Args:
            inputs (`dict`): as the dataloader gave them.

        Returns:
            `torch.Tensor`: with a sample for each of its first dimension; `None` if there are none.
        """
        return next((inputs[name] for name in self.label_names if name in inputs), None)

    def taken(self, name: str) -> tuple[str, ...]:
        """
        What of the inputs is labels, which the model is not shown.

        Args:
            name (`str`): the first of the names of labels that the inputs have.
        """
        return (name,)

    def no_labels(self, inputs: dict[str, Any]) -> str:
        """
        What to say of a batch without labels.

        Args:
            inputs (`dict`): as the dataloader gave them.
        """
        return (
            f"the batch has no {' or '.join(map(repr, self.label_names))}, only {', '.join(inputs)}: name the "
            "label column 'label' or 'labels', or say its name in label_names."
        )

    def accepts(self, inputs: dict[str, Any]) -> bool:
        """
        Whether a batch holds labels that are classes, under one of their names.

        Args:
            inputs (`dict`): as the dataloader gave them.
        """
        labels = self.labels_in(inputs)
        return isinstance(labels, torch.Tensor) and labels.dtype == torch.int64

    def checked_labels(self, labels: Any) -> torch.Tensor:
        """
        The labels as `torch.LongTensor`.

        Args:
            labels (`torch.Tensor`): of a batch.

        Raises:
            ValueError: if they are no integers.
        """
        if not isinstance(labels, torch.Tensor):
            raise ValueError(f"labels are a {type(labels).__name__}: self-distillation needs a tensor of classes.")
        if labels.is_floating_point() and labels.dim() == 2 and not self.per_token:
            raise ValueError(
                f"labels are {labels.dtype} of shape {list(labels.shape)}, as MixUp and CutMix of torchvision or "
                "multi-label data give them: mix with SelfKDDataCollator(mixup_alpha=..., cutmix_alpha=...), and give "
                "one integer class for each sample; or set problem_type='multi_label_classification' of the model."
            )
        if labels.is_floating_point() or labels.dtype == torch.bool:
            raise ValueError(
                f"labels are {labels.dtype}: regression is not supported, and several labels a sample need "
                f"problem_type='multi_label_classification' of the model; else integer classes ({SUPPORTED})."
            )
        return labels.long()

    def sample_index(self, ids: np.ndarray, labels: torch.Tensor) -> SampleIndex:
        """
        Where the predictions of samples are kept.

        Args:
            ids (`np.ndarray` of `int64`, shape `[B]`): sample ids.
            labels (`torch.LongTensor` of shape `[B]` or `[B, L]`): their labels, on the CPU.
        """
        if not self.per_token and labels.numel() == len(ids):
            labels = labels.reshape(-1)
        return sample_index(ids, labels, self.shifts_labels)

    def inputs_without_labels(self, batch: Batch) -> dict[str, Any]:
        """
        What the model needs to be run without labels.

        Args:
            batch ([`~hf_selfkd.batch.Batch`]): as [`~Task.split`] gave it.
        """
        return batch.inputs

    def inputs_with_labels(self, batch: Batch, labels: torch.Tensor) -> dict[str, Any]:
        """
        What the model needs to compute its own loss.

        Args:
            batch ([`~hf_selfkd.batch.Batch`]): as [`~Task.split`] gave it.
            labels (`torch.LongTensor`): of the batch; with rotated views, of all of them.
        """
        return batch.inputs | {batch.label_name: self.shown(labels)}

    def shown(self, labels: torch.Tensor) -> torch.Tensor:
        """
        Labels as a loss of the model's or of the user's takes them.

        Args:
            labels (`torch.LongTensor`): of a batch.
        """
        return labels

    def partner_rows(self, partner: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """
        The rows that mixed images learn from beside their own.

        Args:
            partner (`torch.LongTensor` of shape `[B]`): which image is mixed into each.
            labels (`torch.LongTensor` of shape `[B]` or `[B, L]`): of the batch.

        Returns:
            `torch.LongTensor` of shape `[R]`.
        """
        return partner

    def misfit(self, label: int, sample: str, num_classes: int) -> str:
        """
        What to say of a label that is no class.

        Args:
            label (`int`): the label.
            sample (`str`): whose it is.
            num_classes (`int`): classes of a row.
        """
        return (
            f"label {label} of {sample} is not one of the {num_classes} classes of the model: set num_labels of the "
            "model, or -100 for rows to ignore."
        )

    def logits(self, outputs: Any, has_loss: bool) -> torch.Tensor:
        """
        The logits among a model's outputs.

        Args:
            outputs (`dict` or `tuple`): of the model.
            has_loss (`bool`): whether a tuple starts with the loss.
        """
        if self.bare_logits and isinstance(outputs, torch.Tensor):
            return outputs
        return logits_of(outputs, has_loss)

    def predict(self, run: Callable[[dict[str, Any]], Any], batch: Batch) -> Rows:
        """
        The rows that a model gives without being trained.

        Args:
            run (`Callable`): from inputs of the model to outputs.
            batch ([`~hf_selfkd.batch.Batch`]): as [`~Task.split`] gave it.
        """
        return self.rows_of(self.logits(run(self.inputs_without_labels(batch)), has_loss=False), batch)

    def rows(self, logits: torch.Tensor, labels: torch.Tensor) -> Rows:
        """
        The rows of logits and labels.

        Args:
            logits (`torch.FloatTensor`): of the model or of a head; a sample is at the same place as in the labels.
            labels (`torch.LongTensor` of shape `[B]` or `[B, L]`): of a batch.

        Raises:
            ValueError: if the shapes do not fit.
        """
        raise NotImplementedError(f"{type(self).__name__}.rows")

    def rows_of(self, logits: torch.Tensor, batch: Batch) -> Rows:
        """
        The rows of a batch, where more than the labels says what they are; by default [`~Task.rows`].

        Args:
            logits (`torch.FloatTensor`): as [`~Task.logits`] gave them, or of a head.
            batch ([`~hf_selfkd.batch.Batch`]): as [`~Task.split`] gave it.
        """
        return self.rows(logits, batch.labels)

    def own_loss(self, losses: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """
        What a model of transformers makes of the cross-entropies of the rows of a batch: their mean.

        Args:
            losses (`torch.FloatTensor` of shape `[R]`): of the rows.
            labels (`torch.LongTensor` of shape `[R]`): of the rows.
        """
        return losses[labels != IGNORE_INDEX].mean()

    def label_table(self, labels: Any) -> Any:
        """
        The labels of a batch as a tensor of classes `[B]` or `[B, L]`; as they are, if they are none.

        Args:
            labels (`Any`): as a collator gave them.
        """
        return labels

    def constant_labels(self, labels: Any) -> Any:
        """
        What of the labels of a batch must be the same whenever its samples are read.

        Args:
            labels (`Any`): as a collator gave them.
        """
        return labels

    def num_items(self, labels: Any) -> torch.Tensor:
        """
        What the loss of a batch is a mean over: its labelled rows.

        Args:
            labels (`Any`): as a collator gave them.
        """
        return self.row_labels(labels).ne(IGNORE_INDEX).sum()

    def row_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """
        The labels `[R]` of the rows.

        Args:
            labels (`torch.LongTensor` of shape `[B]` or `[B, L]`): of a batch.
        """
        return labels.reshape(-1)


SUPPORTED = (
    "single- and multi-label sequence, image, audio and video classification, token classification, extractive "
    "question answering, multiple choice, next sentence prediction, causal, masked and encoder-decoder language "
    "models (of texts, sounds and images), CTC, object detection (detectors of the DETR family and YOLOS) and "
    "semantic segmentation"
)
