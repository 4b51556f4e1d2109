"""`SelfKDTrainer`: `Trainer` with progressive self-distillation. It wires; loss, storage and rows live elsewhere."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import broadcast
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput, has_length

from .checkpoints import STATE_FOLDER, Checkpoints
from .config import SelfKDConfig, alpha_at
from .dataloading import DataLoading
from .fixes import EpochLengthGroupedSampler, stream_position
from .heads.attach import attach_auxiliary_heads
from .heads.auxiliary import HeadResults, heads_of, split_auxiliary
from .heads.config import ROTATIONS, AuxiliaryHeadsConfig
from .heads.layered import HeadMetrics, Layered
from .heads.rotation import choose_rotations
from .losses.chunked import ChunkedHead, Task
from .losses.cross_entropy import cross_entropy_sum
from .losses.progressive import progressive_cross_entropy
from .losses.soft import soft_cross_entropy
from .losses.soft_targets import RowLosses, SoftTargets, Target, labelled, weighted, where_mask
from .metrics.running import RunningMeans
from .models import is_encoder_decoder, logits_of, num_classes_of, without_labels
from .samples import (
    IGNORE_INDEX,
    MIX_LAMBDA,
    MIX_PARTNER,
    SAMPLE_ID,
    SAMPLE_INDEX,
    SampleIdDataset,
    SampleIndex,
    SelfKDDataCollator,
    sample_index,
    seeded,
)
from .tasks.rows import Rows, adapter_for, causal_rows, check_labels, next_tokens, token_rows
from .teachers.base import Teacher
from .teachers.history import HistoryTeacher
from .teachers.weights import EMATeacher, SnapshotTeacher


logger = logging.getLogger(__name__)


@dataclass
class Mix:
    """How the images of a batch were mixed: partners `[B]` and the weight of the own label, a scalar tensor."""

    partner: torch.Tensor
    weight: torch.Tensor


@dataclass
class Batch:
    """A batch, split into what the model sees and what is ours."""

    inputs: dict[str, Any]
    labels: torch.Tensor
    samples: SampleIndex | None
    mix: Mix | None
    rotations: np.ndarray | None = None  # the views of each sample, `[B, V]`, if there are several


def _is_mean(loss: torch.Tensor, rows: Rows, labels: torch.Tensor) -> bool:
    """Whether a loss is the mean cross-entropy of the rows with these labels, in float32 or the logits' own type."""
    means = [-Rows(rows.logits, labels).label_log_probs[labelled(labels)].mean()]
    if rows.logits.dtype != torch.float32:
        means.append(F.cross_entropy(rows.logits.detach(), labels))
    return any(bool(torch.isclose(loss.detach().float(), mean.float(), rtol=1e-5, atol=0)) for mean in means)


class _Epochs(TrainerCallback):
    """Tells the trainer what the loop does."""

    def __init__(self, trainer: SelfKDMixin):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer._begin_training()

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.trainer._begin_epoch()

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.teacher.after_step()  # those of heads are histories, to which steps are all the same

    def on_train_end(self, args, state, control, **kwargs):
        self.trainer._release_head()
        if args.distils and self.trainer.teacher.epoch < 1 and not args.warm_start_teacher:
            logger.warning(
                f"teacher={args.teacher_kind!r} never taught: training ended in its first pass over the data, so this "
                "was plain training. Let the dataset end several times before max_steps."
            )
        for teacher in self.trainer._teachers.values():
            teacher.begin_epoch(teacher.epoch + 1)


class SelfKDMixin(DataLoading, Checkpoints):
    """
    Progressive self-distillation for [`~transformers.Trainer`] and its subclasses: put it before the trainer class.

    ```python
    class MyTrainer(SelfKDMixin, MyOwnTrainer): ...
    ```

    Attributes:
        teacher ([`~hf_selfkd.teachers.Teacher`]): the live teacher; its `stored(sample_ids)` gives what it holds.
        head_teachers (`list` of [`~hf_selfkd.teachers.HistoryTeacher`]):
            with `teacher="history"` and auxiliary heads that learn from the past, one a head; with rotated views the
            prediction for a view is stored under `4 * sample_id + quarter_turns`.
    """

    # `compute_loss` divides by the rows of the whole step: the Trainer must not divide by accumulation steps again.
    loss_is_scaled_for_ga = True
    _config_class = SelfKDConfig

    def __init__(
        self,
        model=None,
        args: TrainingArguments | None = None,
        *arguments: Any,
        auxiliary_heads: AuxiliaryHeadsConfig | str | None = None,
        **keywords: Any,
    ):
        args = self._config_class("tmp_trainer") if args is None else self._config_class.from_training_arguments(args)
        args.take_heads(auxiliary_heads)
        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs in one process (nn.DataParallel) are not supported: start with `torchrun` or "
                "`accelerate launch`, or make one GPU visible with CUDA_VISIBLE_DEVICES."
            )
        launched = int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1
        if launched > 1 and args.world_size == 1:
            raise ValueError(
                f"the launcher started {launched} processes, but without an accelerator each of them would train "
                "alone, into the same output_dir: set use_cpu=True to train on the CPU together."
            )
        self.teacher: Teacher = Teacher()
        self.head_teachers: list[HistoryTeacher] = []
        self._layered: Layered | None = None  # in training, if there are heads that learn
        self._head_figures: HeadMetrics | None = None  # in evaluation, if heads are asked for
        self._means = RunningMeans()
        self._passes, self._resumed = -1, False
        self._train_samples: SampleIdDataset | None = None  # what the training dataloader reads
        self._epoch_sampler: EpochLengthGroupedSampler | None = None
        self._ours: bool | None = None  # whether our cross-entropy is the hard loss; None until a batch tells
        self._drops_cache = False  # whether the model keeps no cache of keys and values when it is given labels
        if model is not None:
            self._grow_heads(model, args)
        super().__init__(model, args, *arguments, **keywords)
        self._rows: Callable[[torch.Tensor, torch.Tensor], Rows] = adapter_for(self.model)
        self._world = self.args.world_size  # properties, which would be worked out in every step
        self._distils = self.args.distils
        self._loss_shifts_labels = False  # what the stock Trainer counts by: we shift the labels that it is given
        self._check_setup()
        self._chunked: ChunkedHead | None = None  # in training only
        self.add_callback(_Epochs(self))

    @staticmethod
    def _grow_heads(model: torch.nn.Module, args: SelfKDConfig) -> None:
        """Give a model the heads that the arguments ask for; it may have grown them before."""
        heads, asked = heads_of(model), args.heads
        if asked is not None and heads is None:
            attach_auxiliary_heads(model, asked, seed=args.seed)
        elif asked is not None and heads.config != asked.with_choices(heads.config.head, heads.config.views):
            raise ValueError(
                f"auxiliary_heads={asked} but the model has heads already, made with {heads.config}: call "
                "strip_auxiliary_heads(model) first, or leave auxiliary_heads out."
            )
        elif asked is None and heads is not None:
            args.take_heads(heads.config)

    def call_model_init(self, trial: Any = None) -> torch.nn.Module:
        """As in [`~transformers.Trainer`]; the new model grows its auxiliary heads."""
        model = super().call_model_init(trial)
        self._grow_heads(model, self.args)
        return model

    def _check_heads(self) -> None:
        heads = heads_of(self.model)
        if heads is None:
            if self.args.evaluate_heads:
                raise ValueError("evaluate_heads=True, but the model has no heads: set auxiliary_heads.")
            return
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                "auxiliary_heads do not work with weights sharded by FSDP or DeepSpeed: train with one or several "
                "whole copies of the model (torchrun, accelerate launch)."
            )
        if self.args.chunked_logits:
            raise ValueError("chunked_logits=True with auxiliary_heads: heads need whole logits, set it to False.")
        if self.optimizer is not None and heads.config.trains:
            held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
            if not held.issuperset(map(id, heads.parameters())):
                raise ValueError(
                    "the optimizer given does not hold the weights of the auxiliary heads: call "
                    "attach_auxiliary_heads(model, config) before you build it."
                )

    def _check_setup(self) -> None:
        self._check_heads()
        sharded = "FSDP" if self.is_fsdp_enabled else "DeepSpeed" if self.is_deepspeed_enabled else None
        if sharded and self.args.teacher_kind in ("snapshot", "ema"):
            raise ValueError(
                f"teacher={self.args.teacher!r} keeps whole weights, which {sharded} shards: use teacher='history'."
            )
        if self.args.use_liger_kernel:
            raise ValueError("use_liger_kernel=True hides the logits that self-distillation needs: set it to False.")
        if self.args.chunked_logits and self._rows not in (causal_rows, token_rows):
            raise ValueError("chunked_logits=True is for language models: set it to False.")
        if self.args.chunked_logits:
            ChunkedHead(self.model).remove()
        classes = type(self).__mro__
        for owner in classes[classes.index(SelfKDMixin) + 1 : classes.index(Trainer)]:
            if "compute_loss" in vars(owner):
                raise ValueError(
                    f"{owner.__name__}.compute_loss would never be called in training: pass its loss as "
                    f"compute_loss_func or, if it calls super().compute_loss, put {owner.__name__} before SelfKDMixin."
                )
        self._check_dataset()

    # The run

    def _init_training_state(
        self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
    ) -> tuple[int, int]:
        epochs, batches = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        if resume_from_checkpoint is not None and not has_length(self.train_dataset):
            epochs, batches = stream_position(resume_from_checkpoint, self.args.gradient_accumulation_steps)
        return epochs, 0 if self.args.ignore_data_skip else batches

    def _begin_training(self) -> None:
        if self.state.global_step == 0:
            self._ours, self._drops_cache = None, False
            self._make_teachers()
            self._passes = -1
            self._resumed = False
            if self.args.warm_start_teacher and self.args.distils and self.args.teacher_kind == "history":
                self._warm_start()
        self._means = RunningMeans()
        averaged = self.args.average_tokens_across_devices
        self._loss_world = self.accelerator.num_processes // self.get_tp_size() if averaged else 1
        self._distils = self.args.distils
        self._release_head()
        if self.args.chunked_logits:
            self._chunked = ChunkedHead(self.model)

    def _release_head(self) -> None:
        if self._chunked is not None:
            self._chunked.remove()
        self._chunked = None

    @property
    def _teachers(self) -> dict[str, Teacher]:
        """All teachers, by the names of their files in a checkpoint."""
        return {"teacher": self.teacher} | {f"head{i}": teacher for i, teacher in enumerate(self.head_teachers)}

    def _make_teachers(self) -> None:
        heads = heads_of(self.model)
        self._layered = Layered(heads, self._rows) if heads is not None and heads.config.trains else None
        self.teacher, self.head_teachers = self._make_teacher(), []
        if self._heads_learn_from_past and self.teacher.needs_ids:
            args = copy.copy(self.args)
            args.history_trace = False  # which is of the model's own predictions
            self.head_teachers = [self._make_history(args, f"head{i}", self._layered) for i in range(len(heads.heads))]

    @property
    def _heads_learn_from_past(self) -> bool:
        return self._layered is not None and self._layered.config.uses_past and self.args.distils

    def _make_teacher(self) -> Teacher:
        args = self.args
        args.validate()  # again: hyperparameter search sets fields
        self._check_dataset()
        has_epochs = has_length(self.train_dataset)
        if args.distils and has_epochs and self.state.num_train_epochs < 2 and not args.warm_start_teacher:
            raise ValueError(
                f"{self.state.num_train_epochs} epoch with teacher={args.teacher_kind!r}: there is no earlier epoch "
                "to learn from. Train at least 2 epochs, set warm_start_teacher=True (history, snapshot) or alpha=0."
            )
        if args.teacher_kind == "none" or not (args.distils or args.history_trace):
            return Teacher()
        several = args.world_size > 1
        if args.teacher_kind == "history":
            return self._make_history(args)
        share = broadcast if several else None
        if args.teacher_kind == "snapshot":
            return SnapshotTeacher(self.model, self._predict, share, args.warm_start_teacher, args.teacher_dropout)
        return EMATeacher(self.model, self._predict, args.ema_decay, share, args.teacher_dropout)

    def _make_history(self, args: SelfKDConfig, name: str = "", views_of: Layered | None = None) -> HistoryTeacher:
        """The history of the model's own predictions or, with a name, of a head's for the views of each sample."""
        size, ids = self._size_and_ids()
        if views_of is not None and views_of.rotates:
            size, ids = ROTATIONS * size, views_of.ids(ids)
        return HistoryTeacher(
            args,
            size,
            ids,
            args.device,
            Path(args.output_dir) / STATE_FOLDER / f"node{os.environ.get('GROUP_RANK', '0')}" / name,
            self.state.num_train_epochs,
            gather=self._gather if args.world_size > 1 else None,
            rank=args.process_index,
            writes=args.local_process_index == 0,
        )

    def _gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.accelerator.gather(tensor.to(self.accelerator.device)).cpu()

    def _predict(self, outputs: Any) -> list[torch.Tensor]:
        """Logits `[R, C]` of the model itself and, with heads that learn from the past, of each head."""
        logits = [logits_of(outputs, has_loss=False)]
        if self._layered is not None:
            logits[0] = logits[0][:: self._layered.views]
            if self._heads_learn_from_past:
                logits += self._layered.heads.results.logits
                self._layered.heads.results = None
        return [part if part.dim() == 2 else part.flatten(0, -2) for part in logits]

    def _begin_epoch(self) -> None:
        # Counted: a callback may end an epoch early, and of a stream without length the Trainer's epoch counts steps.
        if self._resumed and has_length(self.train_dataset):
            self._passes = int(self.state.epoch)
        else:
            self._passes += not self._resumed
        epoch, self._resumed = self._passes, False
        for teacher in self._teachers.values():
            teacher.begin_epoch(epoch)
        if self._train_samples is not None:
            self._train_samples.set_epoch(epoch)
        if self._epoch_sampler is not None:  # accelerate forwards the epoch through some of its wrappers only
            self._epoch_sampler.set_epoch(epoch)

    @torch.no_grad()
    def _warm_start(self) -> None:
        """Fill the history with the predictions of the initial weights, in evaluation mode: all samples, unmixed."""
        logger.info("Filling the history with the predictions of the initial weights.")
        samples, collator, drop_last = self._train_samples, self.data_collator, self.args.dataloader_drop_last
        self.data_collator = collator.collator if isinstance(collator, SelfKDDataCollator) else collator
        self.args.dataloader_drop_last = False
        with seeded(self.args.seed):  # training draws the same random numbers with and without this pass
            dataloader = self._get_dataloader(
                self.train_dataset,
                description="Warm start",
                batch_size=self.args.eval_batch_size,
                sampler_fn=torch.utils.data.SequentialSampler,
                is_training=True,
            )
            self.data_collator, self.args.dataloader_drop_last = collator, drop_last
            if samples is not None:
                self._train_samples.set_epoch(-1)
            self.model.eval()
            for inputs in dataloader:
                batch = self._take(self._prepare_inputs(inputs))
                with self.compute_loss_context_manager():
                    outputs = self.model(**self._unlabelled(batch))
                self.teacher.observe(batch.samples, self._rows(logits_of(outputs, has_loss=False), batch.labels))
            self.model.train()
        self._train_samples = samples
        self.teacher.begin_epoch(0)

    # The loss

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | int | None:
        samples = [batch.get(SAMPLE_INDEX) for batch in batch_samples]
        if samples and None not in samples and self._world == 1:
            count = max(sum(part.total for part in samples), 1)
            if self._ours and device.type == "cpu":
                return count  # only our loss sees it; an accelerator gets a tensor, as its division rounds otherwise
            return torch.tensor(count).to(device, non_blocking=True)
        # The stock Trainer counts only for models that ask for it; our loss divides by the count for every model.
        accepts = self.model_accepts_loss_kwargs
        self.model_accepts_loss_kwargs = True
        if self._rows is causal_rows:
            batch_samples = [
                {**batch, "labels": next_tokens(batch["labels"])} if "labels" in batch else batch
                for batch in batch_samples
            ]
        try:
            count = super()._get_num_items_in_batch(batch_samples, device)
        finally:
            self.model_accepts_loss_kwargs = accepts
        return count.clamp_min(1) if isinstance(count, torch.Tensor) else count  # a step without labels costs 0

    def _take(self, inputs: dict[str, Any]) -> Batch:
        """Split a batch into what the model sees and what is ours."""
        inputs = dict(inputs)
        ids, samples = inputs.pop(SAMPLE_ID, None), inputs.pop(SAMPLE_INDEX, None)
        partner, weight = inputs.pop(MIX_PARTNER, None), inputs.pop(MIX_LAMBDA, None)
        if "labels" not in inputs:
            raise ValueError(
                f"the batch has no 'labels', only {', '.join(inputs)}: name the label column 'label' or 'labels', or "
                "let the data collator do so."
            )
        labels = inputs.pop("labels")
        if samples is None and ids is not None and self.teacher.needs_ids:
            samples = sample_index(ids.cpu(), labels.cpu(), self._rows is causal_rows)
        if samples is None and self.teacher.needs_ids:
            raise ValueError(
                "the batch has no sample_id for teacher='history': let the trainer build the dataloader, or carry "
                f"{self.args.sample_id_column or SAMPLE_ID!r} through your own."
            )
        mix = None if partner is None else Mix(partner, weight[0])
        if self._layered is None or not self._layered.rotates:
            return Batch(inputs, labels, samples, mix)
        if samples is not None or ids is not None:
            ids = samples.ids if samples is not None else ids.cpu().numpy()
        else:  # a stream without ids: its samples are told apart by their place
            ids = len(labels) * self.state.global_step + np.arange(len(labels))
        rotations = choose_rotations(ids, self._layered.config.views_per_step, self._passes, self.args.seed)
        return Batch(self._layered.expand(inputs, rotations), labels, samples, mix, rotations)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """
        The loss of a batch; in training, that of progressive self-distillation, over the rows of the whole step.

        Raises:
            ValueError: at the first batch that shows a fault (labels, logits, ids), before any optimizer step.
        """
        if not (self.is_in_train and model.training):
            return self._evaluation_loss(model, inputs, return_outputs, num_items_in_batch)
        batch = self._take(inputs)
        if self._chunked is not None:
            if self._ours is None:
                self._probe(batch)
            if self._ours:
                return self._chunked_loss(model, batch, return_outputs, num_items_in_batch)
        if self._ours is None:  # before the model sees them: its own loss may not say what is wrong
            check_labels(batch.labels, num_classes_of(self.model))
            self._unlabelled(batch)
        self.teacher.look_up(batch.samples)
        if self._asks_model:
            shown = batch.labels if batch.rotations is None else self._layered.upright_labels(batch.labels)
            outputs = model(**batch.inputs, labels=shown)
        else:
            outputs = model(**self._unlabelled(batch))
        if self._layered is not None:
            outputs, results = split_auxiliary(self._layered.heads, outputs)
            outputs = self._layered.upright(outputs)
        rows = self._rows(logits_of(outputs, has_loss=self._asks_model), batch.labels)
        rows.top_k = self.teacher.top_k
        if self._ours is None:
            self._inspect(outputs, rows, batch.labels)
        alpha = self._alpha()
        soft_targets = self._past(batch, rows) if alpha > 0 else None
        targets = self._sides(rows.labels, soft_targets, batch.mix)
        loss = self._scaled_loss(outputs, rows, targets, alpha, num_items_in_batch, batch.labels)
        self.teacher.observe(batch.samples, rows, mixed=batch.mix is not None)
        if self._layered is not None and results is not None:
            heads = self._heads_loss(batch, results, rows, alpha)
            loss = loss + heads / num_items_in_batch * self._loss_world
        return (loss, outputs) if return_outputs else loss

    def _evaluation_loss(self, model, inputs, return_outputs, num_items_in_batch):
        """The loss of the stock Trainer, with what it gets wrong put right."""
        if self.args.world_size > 1 and self.compute_loss_func is None and self.label_smoother is None:
            # Many models ignore the count, and the stock Trainer then multiplies their mean by the processes.
            num_items_in_batch = None
        if "labels" in inputs and not (self.compute_loss_func is None and self.label_smoother is None):
            # The stock Trainer takes the labels off, and with them what the decoder starts from.
            others = {name: value for name, value in inputs.items() if name != "labels"}
            batch = Batch(others, inputs["labels"], None, None)
            inputs = self._unlabelled(batch) | {"labels": batch.labels}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _heads_loss(self, batch: Batch, results: HeadResults, rows: Rows, alpha: float) -> torch.Tensor:
        """The sum of the heads' losses over the rows of a batch; what they say is noted."""
        layered, pasts = self._layered, [None] * len(results.logits)
        head_rows = layered.rows(results, batch.labels, batch.rotations)
        if self._heads_learn_from_past and self.teacher.needs_ids:
            samples = layered.samples(batch.samples, batch.rotations)
            if alpha > 0:
                pasts = [t.targets(samples, {}, part) for t, part in zip(self.head_teachers, head_rows, strict=True)]
            for teacher, part in zip(self.head_teachers, head_rows, strict=True):
                part.top_k = teacher.top_k
                teacher.observe(samples, part, mixed=batch.mix is not None)
        elif self._heads_learn_from_past and self.teacher.epoch > 0:  # before, even a warm start has untrained heads
            pasts = self.teacher.of_heads or pasts
        partner = None
        if batch.mix is not None and batch.rotations is not None:
            partner = layered.joint_labels(batch.labels[batch.mix.partner], batch.rotations)
        targets = [
            self._sides(part.labels, soft_targets, batch.mix, partner)
            for part, soft_targets in zip(head_rows, pasts, strict=True)
        ]
        return layered.loss(results, head_rows, targets, rows.logits, alpha, self._row_losses)

    @torch.no_grad()
    def _probe(self, batch: Batch) -> None:
        """Find out from a few samples, in evaluation mode, whether loss and head are what `chunked_logits` needs."""
        check_labels(batch.labels, num_classes_of(self.model))
        size = len(batch.labels)
        few = {
            name: value[:4] if isinstance(value, torch.Tensor) and value.dim() and len(value) == size else value
            for name, value in batch.inputs.items()
        }
        part = Batch(few, batch.labels[:4], None, None)
        self._chunked.watching = True
        self.model.eval()
        asked = self._asks_model
        outputs = self.model(**few, labels=part.labels) if asked else self.model(**self._unlabelled(part))
        self.model.train()
        logits = logits_of(outputs, has_loss=asked)
        self._inspect(outputs, self._rows(logits, part.labels), part.labels)
        self._chunked.check(logits)
        if self._ours is False:
            raise ValueError(
                "chunked_logits=True needs plain cross-entropy as the hard loss, and this run has one of its own: set "
                "it to False."
            )

    def _chunked_loss(
        self, model: torch.nn.Module, batch: Batch, return_outputs: bool, num_items: torch.Tensor
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """[`compute_loss`] without the logits of all tokens; `outputs` has those of the first position only."""
        labels = next_tokens(batch.labels) if self._rows is causal_rows else batch.labels
        vocabulary = self._chunked.head.weight.shape[0]
        rows = Rows(self._chunked.head.weight.new_empty(0, vocabulary), labels.reshape(-1))
        alpha = self._alpha()
        soft_targets = self.teacher.targets(batch.samples, {}, rows) if alpha > 0 else None
        rows.top_k = self.teacher.top_k
        if self.teacher.needs_ids and rows.top_k is None:
            raise ValueError(
                "chunked_logits=True cannot go on with the checkpoint's history of whole rows: set it to False."
            )
        task = self._chunked.task = Task(rows.labels, soft_targets, alpha, self.args.temperature, rows.top_k)
        try:
            outputs = model(**self._unlabelled(batch))
        finally:
            self._chunked.task = None
        rows.summary, rows.label_log_probs = task.summary, -task.losses.hard  # instead of made from the logits
        self.teacher.observe(batch.samples, rows)
        targets = [Target(rows.labels, soft_targets, None)]
        if soft_targets is None:
            self._means.add(targets, [], alpha, task.total.detach())
        else:
            self._means.add(targets, [task.losses], alpha)
        loss = task.total / num_items * self._loss_world
        return (loss, outputs) if return_outputs else loss

    def _past(self, batch: Batch, rows: Rows) -> SoftTargets | None:
        if self.teacher.needs_ids:
            return self.teacher.targets(batch.samples, batch.inputs, rows)
        heads = heads_of(self.model)
        with nullcontext() if heads is None else heads.watched(self._heads_learn_from_past):
            return self.teacher.targets(batch.samples, self._unlabelled(batch), rows)  # which runs the model itself

    def _unlabelled(self, batch: Batch) -> dict[str, Any]:
        if self._rows not in (causal_rows, token_rows):
            return batch.inputs
        inputs = without_labels(self.model, batch.inputs, batch.labels)
        return {"use_cache": False} | inputs if self._drops_cache else inputs

    def prediction_step(self, model, inputs, *arguments: Any, **keywords: Any):
        """As in [`~transformers.Trainer`]; ids that a dataset carries never reach the model."""
        inputs = {key: value for key, value in inputs.items() if key not in (SAMPLE_ID, SAMPLE_INDEX)}
        result = super().prediction_step(model, inputs, *arguments, **keywords)
        if self._head_figures is not None:
            self._head_figures.update(self._prepare_inputs(inputs).get("labels"))
        return result

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As in [`~transformers.Trainer`]; with `evaluate_heads=True` every head is a classifier of its own."""
        arguments = (dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        if not self.args.evaluate_heads:
            return super().evaluation_loop(*arguments)
        heads = heads_of(self.model)
        self._head_figures = HeadMetrics(heads, self._rows, self.accelerator.gather_for_metrics)
        try:
            with heads.watched():
                output = super().evaluation_loop(*arguments)
            output.metrics.update(self._head_figures.compute(metric_key_prefix))
        finally:
            self._head_figures = None
        return output

    @property
    def _asks_model(self) -> bool:
        """Whether the model must compute its own loss: until it is known, or if it is more than cross-entropy."""
        return self.compute_loss_func is None and self.label_smoother is None and not self._ours

    def _alpha(self) -> float:
        args, state = self.args, self.state
        if not self._distils:
            return 0.0
        return alpha_at(
            args.alpha,
            args.alpha_schedule,
            self.teacher.epoch,
            state.num_train_epochs,
            state.global_step,
            state.max_steps,
        )

    def _inspect(self, outputs: Any, rows: Rows, given: torch.Tensor) -> None:
        """Find out whether the model's own loss is plain cross-entropy: then ours replaces it, in one pass."""
        check_labels(rows.labels, rows.logits.shape[-1])
        if not self._asks_model:
            self._ours = self.compute_loss_func is None and self.label_smoother is None
            return
        own = outputs.get("loss") if isinstance(outputs, dict) else outputs[0]
        no_cache = isinstance(outputs, dict) and outputs.get("past_key_values") is None
        self._drops_cache = no_cache and is_encoder_decoder(self.model)
        labels = rows.labels[rows.labels != IGNORE_INDEX]
        some = rows.logits[:64]
        spread = (some - some.mean(dim=-1, keepdim=True)).abs().max() if len(labels) else 0
        if own is not None and (labels.unique().numel() < 2 or spread < 1e-2):
            return  # here a weighted or smoothed loss would look the same: wait for a batch that can tell
        self._ours = own is None or _is_mean(own, rows, rows.labels)
        if not self._ours and self._layered is not None and self._layered.views > 1:
            raise ValueError(
                f"views='rotation' with {type(self.model).__name__}, whose own loss is not plain cross-entropy and "
                "would count rotated images: pass it as compute_loss_func, or set views='none'."
            )
        if not self._ours and self._rows is causal_rows and _is_mean(own, rows, given.reshape(-1)):
            raise ValueError(
                f"{type(self.model).__name__} compares each position with its own label and not with the next one, as "
                "causal language models do: it is not supported."
            )
        logger.info(
            "The model's loss is plain cross-entropy: hard and soft part are computed together."
            if self._ours
            else "The model has a loss of its own: it is kept as the hard part, with weight 1 - alpha."
        )

    def _sides(
        self,
        labels: torch.Tensor,
        soft_targets: SoftTargets | None,
        mix: Mix | None,
        partner: torch.Tensor | None = None,
    ) -> list[Target]:
        """
        The labels and past rows to learn from: the sample's own and, for mixed images, those of its partner, whose
        labels are given where rows are views.
        """
        if mix is None:
            return [Target(labels, soft_targets, None)]
        # A stored row belongs to an unmixed image; other teachers have looked at the mixed image itself.
        partners = (
            soft_targets.select(mix.partner) if soft_targets is not None and self.teacher.needs_ids else soft_targets
        )
        partner = labels[mix.partner] if partner is None else partner
        return [Target(labels, soft_targets, mix.weight), Target(partner, partners, 1 - mix.weight)]

    def _scaled_loss(
        self,
        outputs: Any,
        rows: Rows,
        targets: list[Target],
        alpha: float,
        num_items: torch.Tensor,
        labels: torch.Tensor,
    ) -> torch.Tensor:
        """The loss, divided by the rows of the whole step; what the batch adds to the log is noted."""
        world = self._loss_world
        parts = [self._row_losses(rows, target, alpha) for target in targets if target.soft_targets is not None]
        if self._ours:
            if parts:
                total = weighted([part.total.sum() for part in parts], targets)
            else:
                total = weighted([cross_entropy_sum(rows.logits, target.labels) for target in targets], targets)
            self._means.add(targets, parts, alpha, None if parts else total.detach())
            loss = total / num_items
            return loss * world if world > 1 else loss
        hard = weighted(
            [self._hard_loss(outputs, rows, target.labels, num_items, labels) for target in targets], targets
        )
        hard = hard * world if world > 1 else hard
        self._means.add(targets, parts, alpha, hard.detach() * num_items / world)
        if not parts:
            return hard
        # One number for all rows cannot be weighted row by row: it gives way by the share of rows with a past.
        masks = [labelled(target.labels) for target in targets]
        distilled = [
            mask if part.distilled is None else part.distilled for mask, part in zip(masks, parts, strict=True)
        ]
        share = weighted([mask.sum() for mask in distilled], targets) / masks[0].sum().clamp_min(1)
        soft = weighted(
            [self._soft_sum(rows, target, mask) for target, mask in zip(targets, distilled, strict=True)], targets
        )
        return (1 - alpha * share) * hard + (alpha * world / num_items) * soft

    def _row_losses(self, rows: Rows, target: Target, alpha: float) -> RowLosses:
        if target.soft_targets.index is not None:
            normalized = rows.summary.log_norm
        else:  # a history stores the log-probabilities, others need not make them
            normalized = rows.log_probs if self.teacher.needs_ids else None
        return progressive_cross_entropy(
            rows.logits, target.labels, target.soft_targets, alpha, self.args.temperature, normalized
        )

    def _soft_sum(self, rows: Rows, target: Target, distilled: torch.Tensor) -> torch.Tensor:
        soft = soft_cross_entropy(rows.logits, target.soft_targets, self.args.temperature, target.labels)
        return where_mask(soft, distilled).sum()

    def _hard_loss(
        self, outputs: Any, rows: Rows, labels: torch.Tensor, num_items: torch.Tensor, given: torch.Tensor
    ) -> torch.Tensor:
        """The user's or the model's own loss, over the rows of the whole step; `given` are the labels of the batch."""
        if self.label_smoother is not None and self.compute_loss_func is None:
            return self.label_smoother(outputs, labels.view(given.shape), num_items_in_batch=num_items)
        if self.compute_loss_func is not None:
            given = given if labels is rows.labels else labels.view(given.shape)
            return self.compute_loss_func(outputs, given, num_items_in_batch=num_items)
        if labels is not rows.labels:
            raise ValueError(
                "mixed images need a loss for two labels, and this model's own loss is not plain cross-entropy: pass "
                "it as compute_loss_func, or turn mixing off."
            )
        mean = outputs["loss"] if isinstance(outputs, dict) else outputs[0]
        return mean * (labelled(labels).sum() / num_items)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the means of self-distillation since the last time beside the training loss."""
        if "loss" in logs and self.is_in_train:
            several = self.args.world_size > 1
            reduce = (lambda sums: self.accelerator.reduce(sums, "sum")) if several else (lambda sums: sums)
            logs |= self._means.take(reduce, self.args.distils)
            if self._layered is not None:
                logs |= self._layered.take_metrics(reduce)
        super().log(logs, start_time)


class SelfKDTrainer(SelfKDMixin, Trainer):
    """
    [`~transformers.Trainer`] with progressive self-distillation (PS-KD): change the class name in a working script.

    Every argument keeps its meaning. A plain [`~transformers.TrainingArguments`] is accepted and takes the defaults of
    [`SelfKDConfig`]. Evaluation, saving and inference are those of the bare model.

    Args:
        model ([`~transformers.PreTrainedModel`] or `nn.Module`, *optional*):
            A model for sequence, image, audio or token classification, or a language model, PEFT-wrapped or not.
        args ([`SelfKDConfig`] or [`~transformers.TrainingArguments`], *optional*): the arguments.
        auxiliary_heads ([`AuxiliaryHeadsConfig`] or `str`, *optional*): layered distillation, as in the arguments.
        *arguments, **keywords: as for [`~transformers.Trainer`].

    Raises:
        ValueError: if the task, the data or the arguments do not allow self-distillation; the message names the
            field, its value and the remedy.

    Example:

    ```python
    from hf_selfkd import SelfKDConfig, SelfKDTrainer

    trainer = SelfKDTrainer(model, SelfKDConfig("out", num_train_epochs=30), train_dataset=data)
    trainer.train()
    ```
    """
