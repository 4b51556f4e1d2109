"""`SelfKDTrainer`: `Trainer` with progressive self-distillation. It wires; loss, storage and rows live elsewhere."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import Seq2SeqTrainer, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput, has_length

from .chunked import ChunkedHead, Task
from .config import SelfKDConfig, Seq2SeqSelfKDConfig, alpha_at
from .files import load_tensors, save_tensors
from .fixes import EpochLengthGroupedSampler, generation_gather, hub_copy, load_renamed_weights, stream_position
from .losses import (
    Past,
    RowLosses,
    Side,
    cross_entropy_sum,
    labelled,
    only,
    progressive_cross_entropy,
    soft_cross_entropy,
    weighted,
)
from .measures import RunningMeans, TokenFigures
from .rows import (
    Rows,
    adapter_for,
    causal_rows,
    check_labels,
    is_encoder_decoder,
    logits_of,
    next_tokens,
    num_classes_of,
    token_rows,
    without_labels,
)
from .samples import (
    IGNORE_INDEX,
    MIX_LAMBDA,
    MIX_PARTNER,
    SAMPLE_ID,
    SAMPLE_KEYS,
    SampleIdDataset,
    SampleKeys,
    SelfKDDataCollator,
    checked_ids,
    is_hf_dataset,
    sample_keys,
    seeded,
    with_sample_ids,
)
from .teachers import EMATeacher, HistoryTeacher, SnapshotTeacher, Teacher


logger = logging.getLogger(__name__)

STATE_FOLDER = "_selfkd"  # in a checkpoint and, for a history on disk, in the output folder


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
    keys: SampleKeys | None
    mix: Mix | None


def _is_mean(loss: torch.Tensor, rows: Rows, labels: torch.Tensor) -> bool:
    """Whether a loss is the mean cross-entropy of the rows with these labels."""
    mean = -Rows(rows.logits, labels).label_log_probs[labelled(labels)].mean()
    return bool(torch.isclose(loss.detach().float(), mean, rtol=1e-5, atol=0))


class _Epochs(TrainerCallback):
    """Tells the trainer what the loop does."""

    def __init__(self, trainer: SelfKDMixin):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer._begin_training()

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.trainer._begin_epoch()

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.teacher.after_step()

    def on_train_end(self, args, state, control, **kwargs):
        self.trainer._release_head()
        if args.distils and self.trainer.teacher.epoch < 1 and not args.warm_start_history:
            logger.warning(
                f"teacher={args.teacher_kind!r} never taught: training ended in its first pass over the data, so this "
                "was plain training. Let the dataset end several times before max_steps."
            )
        self.trainer.teacher.begin_epoch(self.trainer.teacher.epoch + 1)


class SelfKDMixin:
    """
    Progressive self-distillation for [`~transformers.Trainer`] and its subclasses: put it before the trainer class.

    ```python
    class MyTrainer(SelfKDMixin, MyOwnTrainer): ...
    ```

    Attributes:
        teacher ([`~hf_selfkd.teachers.Teacher`]): the live teacher; its `stored(sample_ids)` gives what it holds.
    """

    # `compute_loss` divides by the rows of the whole step: the Trainer must not divide by accumulation steps again.
    loss_is_scaled_for_ga = True
    _config_class = SelfKDConfig

    def __init__(self, model=None, args: TrainingArguments | None = None, *arguments: Any, **keywords: Any):
        args = self._config_class("tmp_trainer") if args is None else self._config_class.from_training_arguments(args)
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
        self._means = RunningMeans()
        self._passes, self._resumed = -1, False
        self._train_samples: SampleIdDataset | None = None  # what the training dataloader reads
        self._epoch_sampler: EpochLengthGroupedSampler | None = None
        self._ours: bool | None = None  # whether our cross-entropy is the hard loss; None until a batch tells
        self._drops_cache = False  # whether the model keeps no cache of keys and values when it is given labels
        super().__init__(model, args, *arguments, **keywords)
        self._rows: Callable[[torch.Tensor, torch.Tensor], Rows] = adapter_for(self.model)
        self._loss_shifts_labels = False  # what the stock Trainer counts by: we shift the labels that it is given
        self._check_setup()
        self._chunked: ChunkedHead | None = None  # in training only
        self.add_callback(_Epochs(self))

    def _check_setup(self) -> None:
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

    def _check_dataset(self) -> None:
        dataset, column = self.train_dataset, self.args.sample_id_column
        collator = self.data_collator if isinstance(self.data_collator, SelfKDDataCollator) else None
        needs_ids = self.args.distils and self.args.teacher_kind == "history" or self.args.history_trace
        if collator is not None and collator.mixes and needs_ids and collator.mix_probability == 1:
            raise ValueError(
                "mix_probability=1.0 with teacher='history': a mixed image has no row of its own to store. Use "
                "teacher='snapshot', or mix_probability below 1."
            )
        if not isinstance(dataset, IterableDataset):
            return
        if needs_ids and column is None:
            raise ValueError(
                f"{type(dataset).__name__} has no sample ids for teacher='history': use teacher='snapshot' or "
                "teacher='ema', or name a column of ids 0..len-1 in sample_id_column."
            )
        if needs_ids and not has_length(dataset):
            raise ValueError(
                f"{type(dataset).__name__} with teacher='history' must declare its size: give it a __len__ that "
                "counts the samples, or use teacher='snapshot'."
            )
        if self.args.distils and not has_length(dataset) and self.args.alpha_schedule in ("linear", "cosine"):
            raise ValueError(
                f"alpha_schedule={self.args.alpha_schedule!r} needs a known number of epochs, which "
                f"{type(dataset).__name__} without __len__ does not have: use 'linear_step' or 'constant'."
            )
        if self.args.seed_transforms:
            raise ValueError(
                "seed_transforms=True needs a map-style dataset: seed inside the iterable dataset instead."
            )

    # Data

    def _get_dataloader(self, dataset: Any, description: str, *arguments: Any, **keywords: Any):
        collator = self.data_collator
        training = keywords.get("is_training", False)
        inner = collator.collator if isinstance(collator, SelfKDDataCollator) else collator
        try:
            if training:
                dataset, inner = self._identified(dataset, inner, description)
                self.data_collator = self._training_collator(collator, inner, dataset)
            else:
                self.data_collator = inner  # evaluation sees neither ids nor mixed images
            return super()._get_dataloader(dataset, description, *arguments, **keywords)
        finally:
            self.data_collator = collator

    def _identified(self, dataset: Any, collator: Callable, description: str) -> tuple[Any, Callable]:
        """The dataset with ids, unused columns removed, and the user's collator as the stock Trainer would wrap it."""
        column = self.args.sample_id_column
        if isinstance(dataset, IterableDataset):
            return dataset, super()._get_collator_with_removed_columns(collator, description)
        wrapped = dataset if isinstance(dataset, SampleIdDataset) else with_sample_ids(dataset, column)
        inner = wrapped.dataset
        if is_hf_dataset(inner):
            ids = np.arange(len(inner)) if wrapped.ids is None else wrapped.ids
            wrapped = SampleIdDataset(self._remove_unused_columns(inner, description), ids)
        else:
            wrapped = SampleIdDataset(inner, wrapped.ids, wrapped.id_column)
            collator = super()._get_collator_with_removed_columns(collator, description)
        if self.args.seed_transforms:
            wrapped.transform_seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        self._train_samples = wrapped
        return wrapped, collator

    def _training_collator(self, outer: Callable, inner: Callable, dataset: Any) -> SelfKDDataCollator:
        iterable = isinstance(dataset, IterableDataset)
        collator = SelfKDDataCollator(inner, id_column=self.args.sample_id_column if iterable else SAMPLE_ID)
        if isinstance(outer, SelfKDDataCollator):
            for name in ("mixup_alpha", "cutmix_alpha", "mix_probability"):
                setattr(collator, name, getattr(outer, name))
        # Accelerate sends the batches of an iterable dataset from process to process, as tensors only.
        dispatched = iterable and self.args.accelerator_config.dispatch_batches is not False
        collator.shifts_labels = self._rows is causal_rows
        collator.host_keys = not (dispatched and self.args.world_size > 1)
        collator.owns_features = not iterable
        collator.seed = self.args.seed
        collator.epoch = None if iterable else dataset.epoch
        return collator

    def _get_collator_with_removed_columns(self, data_collator: Callable, description: str | None = None) -> Callable:
        if isinstance(data_collator, SelfKDDataCollator):
            return data_collator  # made by `_training_collator`: columns are removed inside it
        return super()._get_collator_with_removed_columns(data_collator, description)

    def _get_train_sampler(self, train_dataset: Dataset | None = None):
        if isinstance(train_dataset, SampleIdDataset):
            train_dataset = train_dataset.dataset
        if self.args.train_sampling_strategy == "group_by_length" and has_length(self.train_dataset):
            self._epoch_sampler = self._length_sampler(train_dataset)
            return self._epoch_sampler
        return super()._get_train_sampler(train_dataset)

    def _get_eval_sampler(self, eval_dataset: Dataset):
        # The stock Trainer groups evaluation by length too, and `predict` then returns rows in another order than
        # those of the dataset, without a word (transformers#48025).
        strategy, self.args.train_sampling_strategy = self.args.train_sampling_strategy, "sequential"
        try:
            return super()._get_eval_sampler(eval_dataset)
        finally:
            self.args.train_sampling_strategy = strategy

    def _length_sampler(self, train_dataset: Any) -> EpochLengthGroupedSampler:
        args, lengths, source = self.args, None, self.train_dataset
        source = source.dataset if isinstance(source, SampleIdDataset) else source
        if is_hf_dataset(source) and args.length_column_name in source.column_names:
            lengths = source.with_format(None)[args.length_column_name][:]  # before unused columns are removed
        names = getattr(self.processing_class, "model_input_names", None)
        return EpochLengthGroupedSampler(
            args.train_batch_size * args.gradient_accumulation_steps,
            dataset=train_dataset,
            lengths=lengths,
            model_input_name=names[0] if names else None,
            seed=args.data_seed if args.data_seed is not None else args.seed,
        )

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
            self.teacher = self._make_teacher()
            self._passes = -1
            self._resumed = False
            if self.args.warm_start_history and self.args.distils and self.args.teacher_kind == "history":
                self._warm_start()
        self._means = RunningMeans()
        averaged = self.args.average_tokens_across_devices
        self._loss_world = self.accelerator.num_processes // self.get_tp_size() if averaged else 1
        self._release_head()
        if self.args.chunked_logits:
            self._chunked = ChunkedHead(self.model)

    def _release_head(self) -> None:
        if self._chunked is not None:
            self._chunked.remove()
        self._chunked = None

    def _make_teacher(self) -> Teacher:
        args = self.args
        args.validate()  # again: hyperparameter search sets fields
        self._check_dataset()
        has_epochs = has_length(self.train_dataset)
        if args.distils and has_epochs and self.state.num_train_epochs < 2 and not args.warm_start_history:
            raise ValueError(
                f"{self.state.num_train_epochs} epoch with teacher={args.teacher_kind!r}: there is no earlier epoch "
                "to learn from. Train at least 2 epochs, set warm_start_history=True (history, snapshot) or alpha=0."
            )
        if args.teacher_kind == "none" or not (args.distils or args.history_trace):
            return Teacher()
        several = args.world_size > 1
        if args.teacher_kind == "history":
            size, ids = self._size_and_ids()
            return HistoryTeacher(
                args,
                size,
                ids,
                args.device,
                Path(args.output_dir) / STATE_FOLDER / f"node{os.environ.get('GROUP_RANK', '0')}",
                self.state.num_train_epochs,
                gather=self._gather if several else None,
                rank=args.process_index,
                writes=args.local_process_index == 0,
            )
        share = broadcast if several else None
        if args.teacher_kind == "snapshot":
            return SnapshotTeacher(self.model, self._predict, share, args.warm_start_history)
        return EMATeacher(self.model, self._predict, args.ema_decay, share)

    def _size_and_ids(self) -> tuple[int, np.ndarray | None]:
        dataset, column = self.train_dataset, self.args.sample_id_column
        if isinstance(dataset, SampleIdDataset):
            return len(dataset), dataset.ids
        if column is not None and is_hf_dataset(dataset):
            return len(dataset), checked_ids(dataset.with_format(None)[column][:], column)
        return len(dataset), None

    def _gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.accelerator.gather(tensor.to(self.accelerator.device)).cpu()

    def _predict(self, outputs: Any) -> torch.Tensor:
        logits = logits_of(outputs, has_loss=False)
        return logits if logits.dim() == 2 else logits.flatten(0, -2)

    def _begin_epoch(self) -> None:
        # Counted: a callback may end an epoch early, and of a stream without length the Trainer's epoch counts steps.
        if self._resumed and has_length(self.train_dataset):
            self._passes = int(self.state.epoch)
        else:
            self._passes += not self._resumed
        epoch, self._resumed = self._passes, False
        self.teacher.begin_epoch(epoch)
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
                self.teacher.observe(batch.keys, self._rows(logits_of(outputs, has_loss=False), batch.labels))
            self.model.train()
        self._train_samples = samples
        self.teacher.begin_epoch(0)

    # The loss

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | int | None:
        keys = [batch.get(SAMPLE_KEYS) for batch in batch_samples]
        if keys and None not in keys and self.args.world_size == 1:
            count = max(sum(part.total for part in keys), 1)
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
        ids, keys = inputs.pop(SAMPLE_ID, None), inputs.pop(SAMPLE_KEYS, None)
        partner, weight = inputs.pop(MIX_PARTNER, None), inputs.pop(MIX_LAMBDA, None)
        if "labels" not in inputs:
            raise ValueError(
                f"the batch has no 'labels', only {', '.join(inputs)}: name the label column 'label' or 'labels', or "
                "let the data collator do so."
            )
        labels = inputs.pop("labels")
        if keys is None and ids is not None and self.teacher.needs_ids:
            keys = sample_keys(ids.cpu(), labels.cpu(), self._rows is causal_rows)
        if keys is None and self.teacher.needs_ids:
            raise ValueError(
                "the batch has no sample_id for teacher='history': let the trainer build the dataloader, or carry "
                f"{self.args.sample_id_column or SAMPLE_ID!r} through your own."
            )
        return Batch(inputs, labels, keys, None if partner is None else Mix(partner, weight[0]))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """
        The loss of a batch; in training, that of progressive self-distillation, over the rows of the whole step.

        Raises:
            ValueError: at the first batch that shows a fault (labels, logits, ids), before any optimizer step.
        """
        if not (self.is_in_train and model.training):
            if self.args.world_size > 1 and self.compute_loss_func is None and self.label_smoother is None:
                # Many models ignore the count, and the stock Trainer then multiplies their mean by the processes.
                num_items_in_batch = None
            if "labels" in inputs and not (self.compute_loss_func is None and self.label_smoother is None):
                # The stock Trainer takes the labels off, and with them what the decoder starts from.
                others = {name: value for name, value in inputs.items() if name != "labels"}
                batch = Batch(others, inputs["labels"], None, None)
                inputs = self._unlabelled(batch) | {"labels": batch.labels}
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        batch = self._take(inputs)
        if self._chunked is not None:
            if self._ours is None:
                self._probe(batch)
            if self._ours:
                return self._chunked_loss(model, batch, return_outputs, num_items_in_batch)
        if self._ours is None:  # before the model sees them: its own loss may not say what is wrong
            check_labels(batch.labels, num_classes_of(self.model))
            self._unlabelled(batch)
        if self._asks_model:
            outputs = model(**batch.inputs, labels=batch.labels)
        else:
            outputs = model(**self._unlabelled(batch))
        rows = self._rows(logits_of(outputs, has_loss=self._asks_model), batch.labels)
        rows.top_k = self.teacher.top_k
        if self._ours is None:
            self._inspect(outputs, rows, batch.labels)
        alpha = self._alpha()
        past = self._past(batch, rows) if alpha > 0 else None
        sides = self._sides(rows.labels, past, batch.mix)
        loss = self._scaled_loss(outputs, rows, sides, alpha, num_items_in_batch, batch.labels)
        self.teacher.observe(batch.keys, rows, mixed=batch.mix is not None)
        return (loss, outputs) if return_outputs else loss

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
        past = self.teacher.targets(batch.keys, {}, rows) if alpha > 0 else None
        rows.top_k = self.teacher.top_k
        if self.teacher.needs_ids and rows.top_k is None:
            raise ValueError(
                "chunked_logits=True cannot go on with the checkpoint's history of whole rows: set it to False."
            )
        task = self._chunked.task = Task(rows.labels, past, alpha, self.args.temperature, rows.top_k)
        try:
            outputs = model(**self._unlabelled(batch))
        finally:
            self._chunked.task = None
        rows.summary, rows.label_log_probs = task.summary, -task.losses.hard  # instead of made from the logits
        self.teacher.observe(batch.keys, rows)
        sides = [Side(rows.labels, past, None)]
        if past is None:
            self._means.add(sides, [], alpha, task.total.detach())
        else:
            self._means.add(sides, [task.losses], alpha)
        loss = task.total / num_items * self._loss_world
        return (loss, outputs) if return_outputs else loss

    def _past(self, batch: Batch, rows: Rows) -> Past | None:
        inputs = batch.inputs if self.teacher.needs_ids else self._unlabelled(batch)  # others run the model themselves
        return self.teacher.targets(batch.keys, inputs, rows)

    def _unlabelled(self, batch: Batch) -> dict[str, Any]:
        if self._rows not in (causal_rows, token_rows):
            return batch.inputs
        inputs = without_labels(self.model, batch.inputs, batch.labels)
        return {"use_cache": False} | inputs if self._drops_cache else inputs

    def prediction_step(self, model, inputs, *arguments: Any, **keywords: Any):
        """As in [`~transformers.Trainer`]; ids that a dataset carries never reach the model."""
        inputs = {key: value for key, value in inputs.items() if key not in (SAMPLE_ID, SAMPLE_KEYS)}
        return super().prediction_step(model, inputs, *arguments, **keywords)

    @property
    def _asks_model(self) -> bool:
        """Whether the model must compute its own loss: until it is known, or if it is more than cross-entropy."""
        return self.compute_loss_func is None and self.label_smoother is None and not self._ours

    def _alpha(self) -> float:
        args, state = self.args, self.state
        if not args.distils:
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

    def _sides(self, labels: torch.Tensor, past: Past | None, mix: Mix | None) -> list[Side]:
        """The labels and past rows to learn from: the sample's own and, for mixed images, its partner's."""
        if mix is None:
            return [Side(labels, past, None)]
        # A stored row belongs to an unmixed image; other teachers have looked at the mixed image itself.
        partners = past.select(mix.partner) if past is not None and self.teacher.needs_ids else past
        return [Side(labels, past, mix.weight), Side(labels[mix.partner], partners, 1 - mix.weight)]

    def _scaled_loss(
        self,
        outputs: Any,
        rows: Rows,
        sides: list[Side],
        alpha: float,
        num_items: torch.Tensor,
        labels: torch.Tensor,
    ) -> torch.Tensor:
        """The loss, divided by the rows of the whole step; what the batch adds to the log is noted."""
        world = self._loss_world
        parts = [self._row_losses(rows, side, alpha) for side in sides if side.past is not None]
        if self._ours:
            if parts:
                total = weighted([part.total.sum() for part in parts], sides)
            else:
                total = weighted([cross_entropy_sum(rows.logits, side.labels) for side in sides], sides)
            self._means.add(sides, parts, alpha, None if parts else total.detach())
            loss = total / num_items
            return loss * world if world > 1 else loss
        hard = weighted([self._hard_loss(outputs, rows, side.labels, num_items, labels) for side in sides], sides)
        hard = hard * world if world > 1 else hard
        self._means.add(sides, parts, alpha, hard.detach() * num_items / world)
        if not parts:
            return hard
        # One number for all rows cannot be weighted row by row: it gives way by the share of rows with a past.
        masks = [labelled(side.labels) for side in sides]
        learners = [mask if part.learners is None else part.learners for mask, part in zip(masks, parts, strict=True)]
        share = weighted([mask.sum() for mask in learners], sides) / masks[0].sum().clamp_min(1)
        soft = weighted([self._soft_sum(rows, side, mask) for side, mask in zip(sides, learners, strict=True)], sides)
        return (1 - alpha * share) * hard + (alpha * world / num_items) * soft

    def _row_losses(self, rows: Rows, side: Side, alpha: float) -> RowLosses:
        if side.past.index is not None:
            normalized = rows.summary.log_norm
        else:  # a history stores the log-probabilities, others need not make them
            normalized = rows.log_probs if self.teacher.needs_ids else None
        return progressive_cross_entropy(rows.logits, side.labels, side.past, alpha, self.args.temperature, normalized)

    def _soft_sum(self, rows: Rows, side: Side, learners: torch.Tensor) -> torch.Tensor:
        soft = soft_cross_entropy(rows.logits, side.past, self.args.temperature, side.labels)
        return only(soft, learners).sum()

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
        super().log(logs, start_time)

    # Checkpoints

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        folder = Path(output_dir) / STATE_FOLDER
        if self.args.should_save:
            tensors, metadata = self.teacher.state()
            own = {
                "version": "1",
                "teacher": self.teacher.kind,
                "epoch": str(self.teacher.epoch),
                "passes": str(self._passes),
                "cross_entropy": json.dumps(self._ours),
                "drops_cache": json.dumps(self._drops_cache),
                "processes": str(self.args.world_size),
                "schedule": self._schedule(),
            }
            save_tensors(folder / "teacher.safetensors", tensors, metadata | own)
        journal = self.teacher.process_state()
        if journal:
            save_tensors(folder / f"journal_{self.args.process_index}.safetensors", journal, {})

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        self.teacher = self._make_teacher()
        self._passes, self._resumed = -1, True
        folder = Path(checkpoint) / STATE_FOLDER
        if not (folder / "teacher.safetensors").is_file():
            if self.teacher.kind == "none":
                return
            raise ValueError(
                f"{checkpoint} has no self-distillation state for teacher={self.teacher.kind!r} (plain Trainer, "
                "save_only_model or a download from the Hub): resume a run of SelfKDTrainer, or start a new run from "
                "these weights with from_pretrained."
            )
        tensors, metadata = load_tensors(folder / "teacher.safetensors")
        if metadata["teacher"] != self.teacher.kind:
            raise ValueError(
                f"{checkpoint} was written with teacher={metadata['teacher']!r}, this run has "
                f"teacher={self.teacher.kind!r}: resume with the same teacher."
            )
        written, now = int(metadata["processes"]), self.args.world_size
        ranks = range(self.args.process_index, written, now) if self.teacher.needs_ids and tensors else ()
        journals = [load_tensors(folder / f"journal_{rank}.safetensors")[0] for rank in ranks]
        self.teacher.load(tensors, metadata, journals)
        self.teacher.epoch = int(metadata["epoch"])
        self._passes = int(metadata["passes"])
        self._ours = json.loads(metadata["cross_entropy"])
        self._drops_cache = json.loads(metadata["drops_cache"])
        if metadata["schedule"] != self._schedule():
            logger.warning(f"The schedule of alpha was {metadata['schedule']} and is now {self._schedule()}.")

    def _schedule(self) -> str:
        args, state = self.args, self.state
        return f"{args.alpha_schedule} to {args.alpha} in {state.num_train_epochs} epochs ({state.max_steps} steps)"

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            load_renamed_weights(self.model if model is None else model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            load_renamed_weights(self.model, self.state.best_model_checkpoint)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # Stored predictions never reach the Hub; with hub_strategy="checkpoint" the whole folder would.
        if (Path(checkpoint_folder) / STATE_FOLDER).is_dir() and self.is_world_process_zero():
            checkpoint_folder = str(hub_copy(checkpoint_folder, self.args.output_dir, STATE_FOLDER))
        super()._push_from_checkpoint(checkpoint_folder)

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        if self.is_world_process_zero():
            shutil.rmtree(Path(self.args.output_dir) / "_hub", ignore_errors=True)


class SelfKDTrainer(SelfKDMixin, Trainer):
    """
    [`~transformers.Trainer`] with progressive self-distillation (PS-KD): change the class name in a working script.

    Every argument keeps its meaning. A plain [`~transformers.TrainingArguments`] is accepted and takes the defaults of
    [`SelfKDConfig`]. Evaluation, saving and inference are those of the bare model.

    Args:
        model ([`~transformers.PreTrainedModel`] or `nn.Module`, *optional*):
            A model for sequence, image, audio or token classification, PEFT-wrapped or not.
        args ([`SelfKDConfig`] or [`~transformers.TrainingArguments`], *optional*): the arguments.
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


class Seq2SeqSelfKDTrainer(SelfKDMixin, Seq2SeqTrainer):
    """
    [`~transformers.Seq2SeqTrainer`] with progressive self-distillation of every target token.

    Every argument keeps its meaning, `predict_with_generate` and the other generation arguments included. A plain
    [`~transformers.Seq2SeqTrainingArguments`] is accepted and takes the defaults of [`Seq2SeqSelfKDConfig`].

    Args:
        model ([`~transformers.PreTrainedModel`], *optional*): an encoder-decoder model with a language modeling head.
        args ([`Seq2SeqSelfKDConfig`] or [`~transformers.Seq2SeqTrainingArguments`], *optional*): the arguments.
        *arguments, **keywords: as for [`~transformers.Seq2SeqTrainer`].
    """

    _config_class = Seq2SeqSelfKDConfig

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """
        As in [`~transformers.Seq2SeqTrainer`], with every sentence once in `compute_metrics` for any number of
        processes, and with `token_nll` (nats), `token_accuracy` and `token_ece` (per cent, 10 right-closed bins) over
        all target tokens among the metrics, generated or not.
        """
        if not self._several_sequences():
            self.gather_function = generation_gather(self.accelerator)
        self._token_figures = TokenFigures(self.accelerator.gather_for_metrics)
        self._eval_labels: torch.Tensor | None = None
        handle = self.model.register_forward_hook(self._see_outputs, with_kwargs=True)
        try:
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        finally:
            handle.remove()
        for name, value in self._token_figures.compute().items():
            output.metrics[f"{metric_key_prefix}_{name}"] = value
        return output

    def _several_sequences(self) -> bool:
        generation = getattr(self.model, "generation_config", None)
        asked = getattr(self, "_gen_kwargs", {}).get("num_return_sequences")
        return ((asked if asked is not None else getattr(generation, "num_return_sequences", None)) or 1) > 1

    def _see_outputs(self, model: torch.nn.Module, arguments: tuple, keywords: dict[str, Any], outputs: Any) -> None:
        labels = keywords.get("labels", self._eval_labels)
        if labels is not None:  # and not one of the steps of generation
            self._token_figures.see(logits_of(outputs, has_loss="labels" in keywords), labels)

    def prediction_step(self, model, inputs, *arguments: Any, **keywords: Any):
        """As in [`~transformers.Seq2SeqTrainer`]; the figures of the target tokens are noted."""
        # Without generation the stock Trainer may take the labels off before it runs the model.
        self._eval_labels = None if self.args.predict_with_generate else self._prepare_inputs(inputs).get("labels")
        result = super().prediction_step(model, inputs, *arguments, **keywords)
        self._token_figures.gather()
        return result
