"""The hooks of `Trainer` between the training set and its batches: ids, collator, samplers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch.utils.data import Dataset, IterableDataset
from transformers.trainer_utils import has_length

from .fixes import EpochLengthGroupedSampler
from .heads.auxiliary import heads_of
from .samples import (
    SAMPLE_ID,
    BatchIdDataset,
    SampleIdDataset,
    SelfKDDataCollator,
    checked_ids,
    is_hf_dataset,
    with_sample_ids,
)
from .tasks.rows import causal_rows


class DataLoading:
    """Part of [`~hf_selfkd.SelfKDMixin`]: gives every training sample its id, and evaluation nothing of it."""

    def _check_dataset(self) -> None:
        dataset, column = self.train_dataset, self.args.sample_id_column
        collator = self.data_collator if isinstance(self.data_collator, SelfKDDataCollator) else None
        needs_ids = self.args.distils and self.args.teacher_kind == "history" or self.args.history_trace
        if collator is not None and collator.mixes and needs_ids and collator.mix_probability == 1:
            raise ValueError(
                "mix_probability=1.0 with teacher='history': a mixed image has no row of its own to store. Use "
                "teacher='snapshot', or mix_probability below 1."
            )
        heads = heads_of(self.model)
        rotates = heads is not None and heads.config.views == "rotation" and heads.config.uses_past
        if collator is not None and collator.mixes and needs_ids and rotates:
            raise ValueError(
                "mixed images, rotated views and teacher='history': the partner's stored view would be another one. "
                "Use teacher='snapshot'."
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
            wrapped = BatchIdDataset(self._remove_unused_columns(inner, description), ids)
        else:
            wrapped = BatchIdDataset(inner, wrapped.ids, wrapped.id_column)
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

    def _size_and_ids(self) -> tuple[int, np.ndarray | None]:
        dataset, column = self.train_dataset, self.args.sample_id_column
        if isinstance(dataset, SampleIdDataset):
            return len(dataset), dataset.ids
        if column is not None and is_hf_dataset(dataset):
            return len(dataset), checked_ids(dataset.with_format(None)[column][:], column)
        return len(dataset), None
