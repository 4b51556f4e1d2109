"""The hooks of `Trainer` between the training set and its batches: ids, collator, samplers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset, IterableDataset, SequentialSampler
from transformers import TrainingArguments
from transformers.trainer_utils import TrainOutput, has_length

from .checks import check_unsplit
from .collator import SelfKDDataCollator, TrainingCollator
from .config import MethodArguments
from .fixes import EpochLengthGroupedSampler
from .heads import heads_of
from .probe import DataProbe, probe_data
from .samples import BatchIdDataset, SampleIdDataset, checked_ids, is_hf_dataset, with_sample_ids
from .tasks import Task
from .teachers.choose import Facts


class DataLoading:
    """
    Part of [`~hf_selfkd.SelfKDMixin`]: in a training, ids travel beside the samples. Evaluation, and a dataloader that
    somebody else asks for, have nothing of it.
    """

    _in_loop = False  # whether the training loop itself asks for the dataloader
    _train_samples: SampleIdDataset | None = None  # what the training dataloader reads
    _train_collator: TrainingCollator | None = None
    _epoch_sampler: EpochLengthGroupedSampler | None = None
    _probe = DataProbe()  # what a few samples told

    def _check_dataset(self, method: MethodArguments) -> None:
        """Everything about the training set that is known before it is read."""
        dataset, facts = self.train_dataset, Facts(2)
        if dataset is None:
            return  # a dataloader of the user's own
        self._add_known_facts(facts, method)
        if method.teacher == "history" or method.history_trace:
            if facts.no_ids or facts.no_rows:
                raise ValueError(facts.no_ids or facts.no_rows)
        if not isinstance(dataset, IterableDataset):
            return
        check_unsplit(dataset, self.args.world_size)
        by_epoch = {"cosine", "calibrated"} | ({"linear"} if method.teacher != "auto" else set())
        if method.distils and not has_length(dataset) and method.alpha_schedule in by_epoch:
            raise ValueError(
                f"alpha_schedule={method.alpha_schedule!r} needs a known number of epochs, which "
                f"{type(dataset).__name__} without __len__ does not have: use 'linear_step' or 'constant'."
            )
        if method.seed_transforms:
            raise ValueError(
                "seed_transforms=True needs a map-style dataset: seed inside the iterable dataset instead."
            )

    def _mixer(self) -> SelfKDDataCollator | None:
        return self.data_collator if isinstance(self.data_collator, SelfKDDataCollator) else None

    def _add_known_facts(self, facts: Facts, method: MethodArguments) -> None:
        dataset, name = self.train_dataset, type(self.train_dataset).__name__
        if isinstance(dataset, IterableDataset) and method.sample_id_column is None:
            facts.no_ids = (
                f"{name} has no sample ids for teacher='history': use teacher='snapshot' or teacher='ema', or name a "
                "column of ids 0..len-1 in sample_id_column"
            )
        elif isinstance(dataset, IterableDataset) and not has_length(dataset):
            facts.no_ids = (
                f"{name} with teacher='history' must declare its size: give it a __len__ that counts the samples, or "
                "use teacher='snapshot'"
            )
        mixer, heads = self._mixer(), heads_of(self.model)
        if mixer is None or not mixer.mixes:
            return
        if mixer.mix_probability == 1:
            facts.no_rows = (
                "mix_probability=1.0 with teacher='history': a mixed image has no row of its own to store. Use "
                "teacher='snapshot', or mix_probability below 1"
            )
        elif heads is not None and heads.config.views == "rotation" and heads.config.uses_past:
            facts.no_rows = (
                "mixed images, rotated views and teacher='history': the partner's stored view would be another one. "
                "Use teacher='snapshot'"
            )

    def _add_data_facts(self, facts: Facts, method: MethodArguments, task: Task) -> None:
        """What decides whether samples have rows of their own; reads a few of them."""
        self._add_known_facts(facts, method)
        facts.no_rows, facts.many_rows = facts.no_rows or task.no_history, task.many_rows
        if facts.no_ids or facts.no_rows or isinstance(self.train_dataset, IterableDataset):
            return
        if self._train_samples is None:
            facts.no_ids = (
                "a dataloader that is not made by SelfKDTrainer has no sample ids for teacher='history': use "
                "teacher='snapshot', or build it upon super().get_train_dataloader()"
            )
            return
        collator = self._train_collator.collator
        self._probe = probe_data(self._train_samples, collator, task, self.args.train_batch_size)
        if not self._probe.labels_stay:
            facts.no_rows = task.labels_move
        elif not self._probe.rows_fit:
            facts.no_rows = (
                "the data collator gives another number of rows than samples (it packs, drops or repeats some): "
                "teacher='history' has no place to address their predictions. Use teacher='snapshot'"
            )

    @property
    def _rows_per_sample(self) -> float | None:
        return self._probe.rows_per_sample

    # The training dataloader

    def _inner_training_loop(
        self,
        batch_size: int | None = None,
        args: TrainingArguments | None = None,
        resume_from_checkpoint: str | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        self._in_loop, self._train_samples, self._probe = True, None, DataProbe()
        return super()._inner_training_loop(batch_size, args, resume_from_checkpoint, trial, ignore_keys_for_eval)

    def get_train_dataloader(self) -> DataLoader:
        """
        As in [`~transformers.Trainer`]: its batches hold what the user's collator made of the user's items. Ids travel
        beside them only where the training loop itself asks.
        """
        try:
            return super().get_train_dataloader()
        finally:
            self._in_loop = False

    def _get_dataloader(
        self,
        dataset: Any,
        description: str,
        batch_size: int,
        sampler_fn: Callable | None = None,
        is_training: bool = False,
        dataloader_key: str | None = None,
    ) -> DataLoader:
        given, inner = self.data_collator, self._collator_without_mixing()
        method = self.method
        task = self._find_task(method) if is_training and self._in_loop else None
        try:
            self.data_collator = inner  # evaluation sees neither ids nor mixed images
            if task is not None and (self._distils(method) or self._mixer_of(given) or self._scales_correctly(task)):
                dataset, inner = self._identified(dataset, inner, description, method)
                self.data_collator = self._training_collator(self._mixer_of(given), inner, dataset, method, task)
            return super()._get_dataloader(dataset, description, batch_size, sampler_fn, is_training, dataloader_key)
        finally:
            self.data_collator = given

    def _collator_without_mixing(self) -> Callable:
        given = self.data_collator
        return given.collator if isinstance(given, SelfKDDataCollator) else given

    @staticmethod
    def _mixer_of(collator: Any) -> SelfKDDataCollator | None:
        return collator if isinstance(collator, SelfKDDataCollator) and collator.mixes else None

    def _identified(
        self, dataset: Any, collator: Callable, description: str, method: MethodArguments
    ) -> tuple[Any, Callable]:
        """The dataset with ids, unused columns removed, and the user's collator as the stock Trainer would wrap it."""
        if isinstance(dataset, IterableDataset):
            return dataset, super()._get_collator_with_removed_columns(collator, description)
        wrapped = with_sample_ids(dataset, method.sample_id_column)
        if self._kept_ids is not None:
            wrapped = SampleIdDataset(wrapped.dataset, self._kept_ids)
        inner = wrapped.dataset
        if is_hf_dataset(inner):
            ids = np.arange(len(inner)) if wrapped.ids is None else wrapped.ids
            wrapped = BatchIdDataset(self._remove_unused_columns(inner, description), ids)
        else:
            wrapped = BatchIdDataset(inner, wrapped.ids, wrapped.id_column)
            collator = super()._get_collator_with_removed_columns(collator, description)
        if method.seed_transforms:
            wrapped.transform_seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        self._train_samples = wrapped
        return wrapped, collator

    def _training_collator(
        self, mixer: SelfKDDataCollator | None, inner: Callable, dataset: Any, method: MethodArguments, task: Task
    ) -> TrainingCollator:
        iterable, dispatched = isinstance(dataset, IterableDataset), self.args.accelerator_config.dispatch_batches
        if type(task).__module__.startswith(f"{__package__}."):  # one of a user's may look at its model
            task = copy.copy(task)
            task.model = task.wrapped = None  # worker processes that are spawned are sent all of the collator
        self._train_collator = TrainingCollator(
            inner,
            mixer,
            method.sample_id_column if iterable else None,
            task.sample_index,
            task.labels_in,
            # Accelerate sends such batches from process to process, as tensors only.
            as_tensors=self.args.world_size > 1 and (iterable if dispatched is None else dispatched),
            seed=self.args.seed,
            epoch=None if iterable else dataset.epoch,
            label_table=task.label_table,
        )
        return self._train_collator

    def _get_collator_with_removed_columns(self, data_collator: Callable, description: str | None = None) -> Callable:
        if isinstance(data_collator, TrainingCollator):
            return data_collator  # columns are removed inside it
        return super()._get_collator_with_removed_columns(data_collator, description)

    def _set_epoch(self, epoch: int) -> None:
        """Tell samples and sampler the epoch; accelerate forwards it through some of its wrappers only."""
        if self._train_samples is not None:
            self._train_samples.set_epoch(epoch)
        if self._epoch_sampler is not None:
            self._epoch_sampler.set_epoch(epoch)

    def _warm_start_dataloader(self) -> DataLoader:
        """All training samples in their order, unmixed, as before the first epoch."""
        collator = copy.copy(self._train_collator)
        collator.mixer = None
        self._set_epoch(-1)
        samples = self.train_dataset if self._train_samples is None else self._train_samples
        streams = isinstance(samples, IterableDataset)
        dataloader = DataLoader(
            samples,
            self.args.eval_batch_size,
            sampler=None if streams else SequentialSampler(samples),
            collate_fn=collator,
            num_workers=self.args.dataloader_num_workers,
        )
        return self.accelerator.prepare(dataloader)

    # Samplers

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
            # Of all processes, which the stock Trainer leaves out: the order is then that of one process.
            args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            dataset=train_dataset,
            lengths=lengths,
            model_input_name=names[0] if names else None,
            seed=args.data_seed if args.data_seed is not None else args.seed,
        )

    def _size_and_ids(self) -> tuple[int, np.ndarray | None]:
        dataset, column = self.train_dataset, self.method.sample_id_column
        if self._kept_ids is not None:
            return len(dataset), self._kept_ids
        if isinstance(dataset, SampleIdDataset):
            return len(dataset), dataset.ids
        if column is not None and is_hf_dataset(dataset):
            return len(dataset), checked_ids(dataset.with_format(None)[column][:], column)
        return len(dataset), None
