"""
Corrections of the stock Trainer that a self-distillation run depends on, each with its upstream issue.

What the other modules correct by being what they are: the loss inflated by accumulation steps and by processes for
models that ignore `num_items_in_batch` (transformers#47688; here `SelfKDMixin.compute_loss` owns the scale),
random augmentation that does not resume because prefetched batches have used up random numbers by the time the
generators are saved (accelerate#4191; here `seed_transforms`), resuming from a checkpoint that a crash cut short
(transformers#35525; here `checkpoint_files`), and a step too many when a run that `max_steps` ended within an epoch is
resumed (here `SelfKDMixin._init_training_state`).
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME


logger = logging.getLogger(__name__)


def load_renamed_weights(model: nn.Module, checkpoint: str | Path) -> None:
    """
    Load the weights of a checkpoint under the names that they have in memory.

    transformers 5 renamed modules of many models (ViT among them) and saves under the old names; `from_pretrained`
    converts them back, `Trainer` on resume and at `load_best_model_at_end` does not and silently leaves those weights
    as they are (transformers#48805, #43701, #40187; PR #48822).

    Args:
        model (`nn.Module`):
            changed in place; anything but a bare [`~transformers.PreTrainedModel`] is left alone, and so is one whose
            names are all in the checkpoint.
        checkpoint (`str` or `Path`): a folder written by `save_pretrained`.
    """
    if not isinstance(model, PreTrainedModel):
        return
    names = model.state_dict().keys() - set(model._keys_to_ignore_on_save or ())  # such as those of auxiliary heads
    saved = _saved_names(checkpoint)
    if names - _tied_names(model, saved) <= saved:
        return
    dtypes = {tensor.dtype for tensor in model.state_dict().values() if tensor.is_floating_point()}
    widest = reduce(torch.promote_types, dtypes)  # a head kept in float32 on a model in bfloat16 loses no bit
    loaded = type(model).from_pretrained(checkpoint, config=model.config, dtype=widest)
    model.load_state_dict(loaded.state_dict(), strict=False)


def _tied_names(model: nn.Module, saved: set[str]) -> set[str]:
    """Names of weights that are, under another name, in the checkpoint."""
    held = {id(tensor) for name, tensor in model.state_dict(keep_vars=True).items() if name in saved}
    return {name for name, tensor in model.state_dict(keep_vars=True).items() if id(tensor) in held}


def _saved_names(checkpoint: str | Path) -> set[str]:
    index, weights = (os.path.join(checkpoint, name) for name in (SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME))
    if os.path.isfile(index):
        with open(index, encoding="utf-8") as file:
            return set(json.load(file)["weight_map"])
    with safe_open(weights, framework="pt") as file:
        return set(file.keys())


def stream_position(checkpoint: str | Path, accumulation: int) -> tuple[int, int]:
    """
    Where a run over a dataset without length stood.

    `Trainer` takes such a dataset for one endless epoch: on resume it skips `global_step` steps of the first pass,
    which is too many once the dataset has started over (transformers#26413; PR #33544).

    Args:
        checkpoint (`str` or `Path`): a checkpoint.
        accumulation (`int`): `gradient_accumulation_steps`.

    Returns:
        `tuple`: passes completed, and batches taken in the present one.
    """
    state = TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_NAME))
    passes = int(state.epoch)  # within a pass it grows by 1 / (max_steps * accumulation) a batch
    return passes, round((state.epoch - passes) * state.max_steps * accumulation)


class EpochLengthGroupedSampler(LengthGroupedSampler):
    """
    The length-grouped order of transformers, drawn from (seed, epoch) instead of the global generator.

    The stock sampler draws before the generators are restored, so a resumed run trains on another permutation: some
    samples twice, some never (transformers PR #48025 gave the evaluation sampler a generator, not this one).

    Args:
        seed (`int`): `data_seed`, or the seed of the run; the other arguments are those of the stock sampler.
    """

    def __init__(self, *args: Any, seed: int, **kwargs: Any):
        super().__init__(*args, generator=torch.Generator(), **kwargs)
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Tell the epoch (`int`, counted from 0)."""
        self.epoch = epoch

    def __iter__(self):
        self.generator.manual_seed(self.seed + self.epoch)
        yield from super().__iter__()


@contextmanager
def pushed_folder(trainer: Trainer, checkpoint: str | Path, private: str) -> Iterator[str]:
    """
    The checkpoint as the Hub may see it, for the asynchronous upload to read: without the folder that must not get
    there. A copy is made only where the strategy uploads the folder, and is gone after the upload.

    Args:
        trainer ([`~transformers.Trainer`]): which is about to push.
        checkpoint (`str` or `Path`): the checkpoint.
        private (`str`): name of the folder to leave out.
    """
    uploads = trainer.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS)
    if not (uploads and (Path(checkpoint) / private).is_dir() and trainer.is_world_process_zero()):
        yield str(checkpoint)
        return
    copy = _copy_without(checkpoint, _copies(trainer), private)
    before = list(getattr(trainer.push_in_progress, "jobs", ()))
    try:
        yield str(copy)
    finally:
        jobs = [job for job in getattr(trainer.push_in_progress, "jobs", ()) if job not in before]
        if not jobs:  # nothing was uploaded
            _remove(copy)
        for job in jobs[-1:]:  # the folder itself, after the model
            job.add_done_callback(lambda _: _remove(copy))


def forget_copies(trainer: Trainer) -> None:
    """Remove the copies of checkpoints that a process left which was killed during an upload."""
    jobs = getattr(getattr(trainer, "push_in_progress", None), "jobs", ())
    if trainer.is_world_process_zero() and all(job.done() for job in jobs):
        for copy in _copies(trainer).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
            _remove(copy)


def _copies(trainer: Trainer) -> Path:
    return Path(trainer.args.output_dir) / "_hub"


def _remove(copy: Path) -> None:
    shutil.rmtree(copy, ignore_errors=True)
    with suppress(OSError):  # other copies are still read
        copy.parent.rmdir()


def _copy_without(checkpoint: str | Path, parent: Path, private: str) -> Path:
    """A copy made of hard links, where there are such, in a folder of the same name."""
    copy = parent / Path(checkpoint).name
    shutil.rmtree(copy, ignore_errors=True)

    def link(source: str, target: str) -> None:
        try:
            os.link(source, target)
        except OSError:  # another file system, or one without hard links
            shutil.copy2(source, target)

    shutil.copytree(checkpoint, copy, copy_function=link, ignore=shutil.ignore_patterns(private))
    return copy


@contextmanager
def written_on_each_node(model: nn.Module, args: TrainingArguments) -> Iterator[None]:
    """
    Let `save_pretrained` write the weights on every machine that is to save: transformers 5.24 asks whether a process
    is the first one of all, also with `save_on_each_node=True`, so that the other machines had nothing to resume from.

    Args:
        model (`nn.Module`): the model that will be saved.
        args (`TrainingArguments`): who saves.
    """
    if not (args.save_on_each_node and args.should_save and hasattr(model, "should_save_on_this_rank")):
        yield
        return
    model.should_save_on_this_rank = bool  # of what the trainer says about this process
    try:
        yield
    finally:
        del model.should_save_on_this_rank


def generation_gather(accelerator: Any) -> Callable:
    """
    How generated sentences of several processes are collected: each once.

    `Seq2SeqTrainer` collects with `accelerator.gather` and keeps the samples that fill the last batch, so that
    `compute_metrics` sees some sentences twice (transformers#26818; `Trainer` itself drops them). Not for several
    sequences a sample, where the count of samples does not tell how many rows to drop.
    """
    return accelerator.gather_for_metrics
