"""What a trainer has for a distiller: what is asked, and what model and data allow."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch
from accelerate.utils import broadcast
from torch.utils.data import IterableDataset
from transformers.trainer_utils import has_length

from .assembly import Setting, heads_learn, make_distiller, make_heads, make_teacher
from .checkpoint_files import STATE_FOLDER
from .checks import check_engine, check_even, sharded_by, warn_of_clipping
from .config import MethodArguments
from .distiller import SelfDistiller
from .heads.layered import NoHeads
from .losses.choose import choose_hard_loss, hard_loss_kind
from .losses.hard import CrossEntropy
from .models import uncompiled
from .processes import Processes
from .tasks import Task, task_for
from .teachers import Teacher
from .teachers.choose import Facts, choose_teacher


logger = logging.getLogger(__name__)


class Building:
    """Part of [`~hf_selfkd.SelfKDMixin`]: makes the distiller of a training."""

    def _distils(self, method: MethodArguments) -> bool:
        """Whether anything is done that the stock class does not do."""
        return method.distils or method.history_trace or method.chunked_logits or heads_learn(self.model)

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
        heads = make_heads(method, task, hard_loss, self.args.seed)
        if heads.learns:
            warn_of_clipping(self)
        teacher, schedule = self._make_teacher(method, task, heads), method.alpha_schedule
        if schedule == "linear" and isinstance(self.train_dataset, IterableDataset):
            schedule = "linear" if has_length(self.train_dataset) else "linear_step"  # a stream has no epochs to count
        distiller = make_distiller(method, hard_loss, teacher, heads, schedule, self.state.num_train_epochs)
        distiller.strict = method.teacher != "auto" or self.args.world_size > 1
        return distiller

    def _scales_correctly(self, task: Task | None) -> bool:
        """Whether plain training can be scaled by its rows, which the stock class does not do for many models."""
        if task is None or sharded_by(self) not in (None, "FSDP2", "DeepSpeed ZeRO-3") or self.args.n_gpu > 1:
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
        return make_teacher(kind, method, task, heads, self._setting(kind))

    def _setting(self, kind: str) -> Setting:
        """What this training runs on, as far as a teacher of this kind asks."""
        args, several = self.args, self.args.world_size > 1
        size, ids = self._size_and_ids() if kind in ("history", "predictions") else (0, None)
        return Setting(
            uncompiled(self.model),
            self.state.num_train_epochs,
            args.device,
            Path(args.output_dir) / STATE_FOLDER / f"node{os.environ.get('GROUP_RANK', '0')}",
            size,
            ids,
            self._rows_per_sample,
            Processes(
                args.process_index,
                args.world_size,
                args.local_process_index if several else 0,  # one process of XLA has no local index
                int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
                self._gather if several else None,
                broadcast if several else None,
            ),
        )

    def _gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.accelerator.gather(tensor.to(self.accelerator.device)).cpu()
