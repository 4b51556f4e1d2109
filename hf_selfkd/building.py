"""What a training is made of, from what is asked and from what model and data allow."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import broadcast
from torch.utils.data import IterableDataset
from transformers.trainer_utils import has_length

from .checkpoints import STATE_FOLDER
from .checks import check_engine, check_even, sharded_by, warn_of_clipping
from .config import MethodArguments
from .distiller import SelfDistiller
from .heads import heads_of
from .heads.layered import Layered, NoHeads
from .losses.choose import choose_hard_loss, hard_loss_kind
from .losses.hard import CrossEntropy
from .models import uncompiled
from .tasks import Task, task_for
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
from .teachers.choose import Facts, choose_teacher
from .teachers.objects import ObjectStore


logger = logging.getLogger(__name__)


class Building:
    """Part of [`~hf_selfkd.SelfKDMixin`]: makes the distiller of a training."""

    def _heads_learn(self) -> bool:
        heads = heads_of(self.model)
        return heads is not None and heads.config.trains

    def _distils(self, method: MethodArguments) -> bool:
        """Whether anything is done that the stock class does not do."""
        return method.distils or method.history_trace or method.chunked_logits or self._heads_learn()

    def _find_task(self, method: MethodArguments) -> Task | None:
        """The task of the model; `None` for one that is not supported, while nothing is distilled."""
        names = tuple(dict.fromkeys(("labels", *(self.args.label_names or ()))))
        try:
            return task_for(self.model, names) if self._task_given is None else self._task_given(self.model, names)
        except ValueError:
            if self._distils(method):
                raise
            return None

    def _hard_loss(self, method: MethodArguments, task: Task) -> CrossEntropy:
        asked, weights = method.hard_loss, self.model.parameters()
        if not self._distils(method) and any(p.is_floating_point() and p.dtype != torch.float32 for p in weights):
            asked = "model"  # some models compute their loss in half precision, and plain training is to be theirs
        return choose_hard_loss(
            task,
            asked,
            method.temperature,
            method.chunked_logits,
            self.compute_loss_func,
            self.label_smoother,
        )

    def _make_distiller(self) -> SelfDistiller | None:
        method = self.method
        distils, task = self._distils(method), self._find_task(method)
        if not distils and not self._scales_correctly(task):
            return None
        check_even(self, self.model, self.train_dataset)
        hard_loss = self._hard_loss(method, task)
        heads = NoHeads(task)
        if self._heads_learn():
            heads = Layered(task, method.has_past, self.args.seed, method.temperature)
            warn_of_clipping(self)
            if heads.views > 1 and hard_loss.shows_labels:
                raise ValueError(
                    f"views='rotation' with {type(task.model).__name__}, whose own loss is not plain cross-entropy "
                    "and would count rotated images: pass it as compute_loss_func, or set views='none'."
                )
        teacher, schedule = self._make_teacher(method, task, heads), method.alpha_schedule
        if schedule == "linear" and isinstance(self.train_dataset, IterableDataset):
            schedule = "linear" if has_length(self.train_dataset) else "linear_step"  # a stream has no epochs to count
        alpha = method.alpha if method.distils and teacher.kind != "none" else 0.0
        distiller = SelfDistiller(task, hard_loss, teacher, heads, alpha, schedule, self.state.num_train_epochs)
        distiller.strict = method.teacher != "auto" or self.args.world_size > 1
        return distiller

    def _scales_correctly(self, task: Task | None) -> bool:
        """Whether plain training can be scaled by its rows, which the stock class does not do for many models."""
        if task is None or sharded_by(self) not in (None, "FSDP2") or self.args.n_gpu > 1:
            return False
        if self.compute_loss_func is not None:
            return False
        if self._task_given is not None:
            return hard_loss_kind(task) != "model"
        if self.label_smoother is not None:
            return task.unsmoothed is None  # the stock class has a way with them, which is none to scale
        return hard_loss_kind(task) == "cross_entropy"

    def _make_teacher(self, method: MethodArguments, task: Task, heads: NoHeads) -> Teacher:
        facts = Facts(self.state.num_train_epochs, heads.uses_past)
        if (method.distils and method.teacher in ("auto", "history", "predictions")) or method.history_trace:
            self._add_data_facts(facts, method, task)
        kind, reason = choose_teacher(method, facts)
        if reason:
            logger.warning(f"teacher='auto' is {kind!r}: {reason}.")
        if not self._distils(method) or kind == "none":
            return Teacher()
        check_engine(self, method, kind)
        if kind == "history":
            return self._make_history(method, task, heads)
        if kind == "predictions":
            return self._make_predictions(method, task)
        if kind == "rank":
            return self._make_rank(method, task)
        share = broadcast if self.args.world_size > 1 else None
        model, dropout = uncompiled(self.model), method.teacher_dropout
        if kind == "snapshot":
            return SnapshotTeacher(model, heads.predictions, share, method.warm_start_teacher, dropout)
        return EMATeacher(model, heads.predictions, method.ema_decay, share, dropout)

    @staticmethod
    def _make_rank(method: MethodArguments, task: Task) -> Teacher:
        if task.unranked is not None:
            raise ValueError(f"teacher='rank' with {task.name}: {task.unranked}. Use teacher='history'.")
        if task.num_classes is not None and task.num_classes < 3:
            raise ValueError(
                f"teacher='rank' with {task.num_classes} classes: there is nothing to rank beside the label, use "
                "teacher='history'."
            )
        return RankTeacher(method.rank_label_weights)

    def _make_predictions(self, method: MethodArguments, task: Task) -> Teacher:
        """
        Raises:
            ValueError: if the file is not one of predictions for this training set.
        """
        predictions = Predictions.load(method.teacher_predictions)
        told, (size, ids) = f"teacher_predictions={method.teacher_predictions!r}", self._size_and_ids()
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
        if method.sample_id_column is None and not known.any():
            raise ValueError(f"{told} has no row for any of the ids of the training set: give those of its samples.")
        return PredictionsTeacher(predictions)

    def _make_history(self, method: MethodArguments, task: Task, heads: NoHeads) -> HistoryTeacher:
        args, (size, ids) = self.args, self._size_and_ids()
        if heads.task.bernoulli and method.history_top_k is not None:
            raise ValueError(
                f"history_top_k={method.history_top_k} with {heads.task.name}: each class has a row of its own, of "
                "one number. Leave it out; history_dtype='float16' takes half the memory."
            )
        node = Path(args.output_dir) / STATE_FOLDER / f"node{os.environ.get('GROUP_RANK', '0')}"
        run = {
            "gather": self._gather if args.world_size > 1 else None,
            "rank": args.process_index,
            "writes": args.world_size == 1 or args.local_process_index == 0,  # one process of XLA has no local index
            "rows_per_sample": self._rows_per_sample,
            "bernoulli": heads.task.bernoulli,
            "local_processes": int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        }
        made_for = (method, size, ids, args.device, node, self.state.num_train_epochs)
        if task.per_object:
            return HistoryTeacher(ObjectStore(*made_for, independent=task.independent, **run))
        store = HistoryStore(*made_for, **run)
        if not heads.uses_past:
            return HistoryTeacher(store)
        views, untraced = heads.size_and_ids(size, ids), method.without_trace()
        stores = [
            HistoryStore(untraced, *views, args.device, node / f"head{i}", self.state.num_train_epochs, **run)
            for i in range(heads.count)
        ]
        return HistoryTeacher(store, stores, heads.samples)

    def _gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.accelerator.gather(tensor.to(self.accelerator.device)).cpu()
