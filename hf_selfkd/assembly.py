"""The parts of a distiller, made from what is asked and from what a training runs on, whoever runs its loop."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn

from .config import MethodArguments
from .distiller import SelfDistiller
from .heads import heads_of
from .heads.layered import Layered, NoHeads
from .losses.hard import CrossEntropy
from .processes import Processes
from .tasks import Task
from .teachers import (
    EMATeacher,
    HistoryStore,
    HistoryTeacher,
    Predictions,
    PredictionsTeacher,
    RankTeacher,
    SnapshotTeacher,
    Teacher,
)
from .teachers.objects import ObjectStore


@dataclass
class Setting:
    """
    What a training runs on.

    Args:
        model (`nn.Module`): as it is trained, without the wrappers of compilation and of data parallelism.
        num_epochs (`int`): of the run, as planned.
        device (`torch.device`): where the model is.
        folder (`Path`): for a history on disk.
        size (`int`, *optional*): training samples, where a teacher knows them one by one.
        ids (`np.ndarray`, *optional*): their ids; `0..size - 1` by default.
        rows_per_sample (`float`, *optional*): labelled rows of a sample, on average; the first batch tells by default.
        processes ([`~hf_selfkd.processes.Processes`], *optional*): that train together.
    """

    model: nn.Module
    num_epochs: int
    device: torch.device
    folder: Path
    size: int = 0
    ids: np.ndarray | None = None
    rows_per_sample: float | None = None
    processes: Processes = field(default_factory=Processes)


def heads_learn(model: nn.Module) -> bool:
    """Whether a model has auxiliary heads that learn."""
    heads = heads_of(model)
    return heads is not None and heads.config.trains


def make_heads(method: MethodArguments, task: Task, hard_loss: CrossEntropy, seed: int) -> NoHeads:
    """
    What the auxiliary heads of a model add to its training.

    Raises:
        ValueError: if rotated images would be counted by a loss of the model's own.
    """
    if not heads_learn(task.wrapped):
        return NoHeads(task)
    heads = Layered(task, method.has_past, seed, method.temperature)
    if heads.views > 1 and hard_loss.shows_labels:
        raise ValueError(
            f"views='rotation' with {type(task.model).__name__}, whose own loss is not plain cross-entropy "
            "and would count rotated images: pass it as compute_loss_func, or set views='none'."
        )
    return heads


def make_distiller(
    method: MethodArguments,
    hard_loss: CrossEntropy,
    teacher: Teacher,
    heads: NoHeads,
    schedule: str,
    num_epochs: int,
) -> SelfDistiller:
    """The distiller made of these parts."""
    alpha = method.alpha if method.distils and teacher.kind != "none" else 0.0
    return SelfDistiller(heads.task, hard_loss, teacher, heads, alpha, schedule, num_epochs)


def make_teacher(kind: str, method: MethodArguments, task: Task, heads: NoHeads, setting: Setting) -> Teacher:
    """
    The teacher of a kind that was chosen.

    Raises:
        ValueError: if task, model or data do not allow such a teacher.
    """
    if kind == "none":
        return Teacher()
    if kind == "history":
        return _make_history(method, task, heads, setting)
    if kind == "predictions":
        return _make_predictions(method, task, setting)
    if kind == "rank":
        return _make_rank(method, task)
    share, dropout = setting.processes.broadcast, method.teacher_dropout
    if kind == "snapshot":
        return SnapshotTeacher(setting.model, heads.predictions, share, method.warm_start_teacher, dropout)
    return EMATeacher(setting.model, heads.predictions, method.ema_decay, share, dropout)


def _make_rank(method: MethodArguments, task: Task) -> Teacher:
    if task.unranked is not None:
        raise ValueError(f"teacher='rank' with {task.name}: {task.unranked}. Use teacher='history'.")
    if task.num_classes is not None and task.num_classes < 3:
        raise ValueError(
            f"teacher='rank' with {task.num_classes} classes: there is nothing to rank beside the label, use "
            "teacher='history'."
        )
    return RankTeacher(method.rank_label_weights)


def _make_predictions(method: MethodArguments, task: Task, setting: Setting) -> Teacher:
    """
    Raises:
        ValueError: if the file is not one of predictions for this training set.
    """
    predictions = Predictions.load(method.teacher_predictions)
    told, size, ids = f"teacher_predictions={method.teacher_predictions!r}", setting.size, setting.ids
    rows, classes = predictions.values.shape
    if task.per_token:
        raise ValueError(f"{told} with {task.name}: it is for tasks with one label a sample.")
    if task.num_classes not in (None, classes):
        raise ValueError(f"{told} has {classes} classes and the model {task.num_classes}: they must be the same.")
    if predictions.order is None and (method.sample_id_column is not None or rows != size):
        raise ValueError(
            f"{told} has {rows} rows without ids for {size} training samples"
            + (f" with sample_id_column={method.sample_id_column!r}" if method.sample_id_column else "")
            + ": give one row for each in their order, or add an array of ids."
        )
    known = predictions.places(np.arange(size) if ids is None else ids) >= 0
    if (method.sample_id_column is None or ids is not None) and not known.any():
        raise ValueError(f"{told} has no row for any of the ids of the training set: give those of its samples.")
    return PredictionsTeacher(predictions)


def _make_history(method: MethodArguments, task: Task, heads: NoHeads, setting: Setting) -> HistoryTeacher:
    if task.bernoulli and method.history_top_k is not None:
        raise ValueError(
            f"history_top_k={method.history_top_k} with {task.name}: each class has a row of its own, of "
            "one number. Leave it out; history_dtype='float16' takes half the memory."
        )
    processes, size, ids = setting.processes, setting.size, setting.ids
    run = {
        "gather": processes.gather,
        "rank": processes.rank,
        "writes": processes.local_rank == 0,
        "rows_per_sample": setting.rows_per_sample,
        "bernoulli": task.bernoulli,
        "local_processes": processes.local_count,
    }
    made_for = (method, size, ids, setting.device, setting.folder, setting.num_epochs)
    if task.per_object:
        return HistoryTeacher(ObjectStore(*made_for, independent=task.independent, **run))
    store = HistoryStore(*made_for, **run)
    if not heads.uses_past:
        return HistoryTeacher(store)
    views, untraced = heads.size_and_ids(size, ids), method.without_trace()
    stores = [
        HistoryStore(untraced, *views, setting.device, setting.folder / f"head{i}", setting.num_epochs, **run)
        for i in range(heads.count)
    ]
    return HistoryTeacher(store, stores, heads.samples)
