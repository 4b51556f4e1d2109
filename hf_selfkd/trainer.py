"""`SelfKDTrainer`: `Trainer` with progressive self-distillation. It wires; loss, storage and rows live elsewhere."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import (
    BaseImageProcessor,
    DataCollator,
    EvalPrediction,
    FeatureExtractionMixin,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import has_length

from .batch import Batch, RecordedBatches, peek_record, pop_record
from .building import Building
from .cards import Evaluation as Evaluated
from .checkpoints import Checkpoints
from .checks import (
    check_calibration,
    check_compute_loss,
    check_detection,
    check_engine,
    check_headless,
    check_heads,
    check_launch,
    check_task,
    never_called,
)
from .config import MethodArguments, SelfKDConfig, default_alpha
from .dataloading import DataLoading
from .devices import to_device
from .distiller import SelfDistiller
from .evaluation import Evaluation
from .fixes import stream_position
from .heads import attach_auxiliary_heads, heads_of, strip_auxiliary_heads
from .heads.config import AuxiliaryHeadsConfig
from .held_out import Calibration
from .models import uncompiled
from .samples import seeded
from .schedule import Progress
from .sharing import Sharing
from .tasks import Rows, Task
from .teachers import Teacher


logger = logging.getLogger(__name__)


class _Loop(TrainerCallback):
    """Tells the trainer what its loop does."""

    def __init__(self, trainer: SelfKDMixin):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer._begin_training()

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.trainer._begin_epoch()

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.teacher.after_step()

    def on_train_end(self, args, state, control, **kwargs):
        self.trainer._end_training()


class _NotTrained(Teacher):
    """Stands where the teacher of a training will be."""

    def stored(self, sample_ids: Any) -> torch.Tensor:
        raise ValueError("no predictions are stored yet: train first.")


class SelfKDMixin(Building, DataLoading, Calibration, Sharing, Checkpoints, Evaluation):
    """
    Progressive self-distillation for [`~transformers.Trainer`] and its subclasses: put it before the trainer class.

    ```python
    class MyTrainer(SelfKDMixin, MyOwnTrainer): ...
    ```

    Args:
        model (`nn.Module`, *optional*): as for the trainer class.
        args ([`~transformers.TrainingArguments`], *optional*): with the fields of [`SelfKDConfig`], or without.
        *positional, **named: as for the trainer class.
        auxiliary_heads ([`AuxiliaryHeadsConfig`] or `str`, *optional*): layered distillation, as in the arguments.
        task (`type`, *optional*): a subclass of [`~hf_selfkd.tasks.Task`] for a task of your own.

    Attributes:
        distiller ([`~hf_selfkd.distiller.SelfDistiller`], *optional*):
            the method in the present or last training; `None` before, and where training is that of the stock class.
        evaluations (`dict` of [`~hf_selfkd.cards.Evaluation`]): the last evaluation of each split, for the model card.
        teacher ([`~hf_selfkd.teachers.Teacher`]): the live teacher; its `stored(sample_ids)` gives what it holds.
    """

    _config_class = SelfKDConfig

    def __init__(
        self,
        model: PreTrainedModel | torch.nn.Module | None = None,
        args: TrainingArguments | None = None,
        *positional: Any,
        auxiliary_heads: AuxiliaryHeadsConfig | str | None = None,
        task: type[Task] | None = None,
        **named: Any,
    ):
        args = self._config_class("tmp_trainer") if args is None else args
        self.distiller: SelfDistiller | None = None
        self._heads_given, self._task_given = AuxiliaryHeadsConfig.resolve(auxiliary_heads), task
        self.evaluations: dict[str, Evaluated] = {}
        self.best_is_loaded = False  # whether the weights are those that a metric chose
        self._failed_pushes: list[Any] = []  # uploads in the background that were told to have failed
        self._batches: RecordedBatches | None = None  # of the present optimizer step
        self._resumed: tuple[int, bool] | None = None  # epochs of the Trainer that are over, and whether one is half
        method = MethodArguments.read(args)
        check_launch(args, method.distils)
        grown = model is not None and heads_of(model) is None
        try:
            if model is not None:
                self._grow_heads(model, args)
            super().__init__(model, args, *positional, **named)
            self._check_setup()
        except BaseException:
            if grown:
                strip_auxiliary_heads(uncompiled(model))
            raise
        self.add_callback(_Loop(self))

    # What is asked

    @property
    def method(self) -> MethodArguments:
        """[`~hf_selfkd.config.MethodArguments`]: as the arguments have them now."""
        return MethodArguments.read(self.args)

    @property
    def teacher(self) -> Teacher:
        """[`~hf_selfkd.teachers.Teacher`]: of the present or last training."""
        return _NotTrained() if self.distiller is None else self.distiller.teacher

    @property
    def sample_ids(self) -> np.ndarray | None:
        """
        `np.ndarray` of `int64`, shape `[B]`: the ids of the samples of the present micro-batch, for a `training_step`
        or `compute_loss` of your own; `None` between steps and where samples have none.
        """
        record = None if self._batches is None else self._batches.present
        return None if record is None else record.ids

    def _heads_asked(self, args: TrainingArguments) -> AuxiliaryHeadsConfig | None:
        named = AuxiliaryHeadsConfig.resolve(MethodArguments.read(args).auxiliary_heads)
        if None not in (named, self._heads_given) and named != self._heads_given:
            raise ValueError(
                f"auxiliary_heads={args.auxiliary_heads!r} in the arguments and another one given to the trainer: "
                "leave out one of them."
            )
        return named if self._heads_given is None else self._heads_given

    def _grow_heads(self, model: torch.nn.Module, args: TrainingArguments) -> None:
        """Give a model the heads that are asked for; it may have grown them before."""
        heads, asked = heads_of(model), self._heads_asked(args)
        if asked is not None and heads is None:
            check_headless(model, self._task_given)
            attach_auxiliary_heads(uncompiled(model), asked, seed=args.seed)
        elif asked is not None and heads.config != asked.with_choices(heads.config.head, heads.config.views):
            raise ValueError(
                f"auxiliary_heads={asked} but the model has heads already, made with {heads.config}: call "
                "strip_auxiliary_heads(model) first, or leave auxiliary_heads out."
            )

    def call_model_init(self, trial: Any = None) -> torch.nn.Module:
        """As in [`~transformers.Trainer`]; the new model grows its auxiliary heads."""
        model = super().call_model_init(trial)
        self._grow_heads(model, self.args)
        return model

    def _hp_search_setup(self, trial: Any) -> None:
        """As in [`~transformers.Trainer`]; an alpha that nobody has chosen is that of the trial's teacher."""
        args = self.args
        untouched = getattr(args, "alpha_left_out", False) and args.alpha == default_alpha(args.teacher)
        if self.hp_search_backend is None or trial is None or not untouched:
            return super()._hp_search_setup(trial)
        args.alpha = None
        try:
            super()._hp_search_setup(trial)
        finally:
            args.alpha = default_alpha(args.teacher) if args.alpha is None else float(args.alpha)

    def _check_setup(self) -> None:
        method, heads = self.method, heads_of(self.model)
        check_heads(self, method, heads)
        task = self._find_task(method)
        self._check_metrics(task)
        if not self._distils(method):
            return
        check_compute_loss(self, SelfKDMixin)
        check_engine(self, method, method.teacher)
        check_task(method, task)
        if task.per_object:
            check_detection(method, task, self._mixer() is not None and self._mixer().mixes)
        self._hard_loss(method, task)
        self._split_training_set(method)
        self._check_dataset(method)
        check_calibration(self, method)

    # The run

    def _init_training_state(
        self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
    ) -> tuple[int, int]:
        epochs, batches = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        sized = has_length(self.train_dataset) if self.train_dataset is not None else num_train_epochs < 2**31
        if resume_from_checkpoint is not None and not sized:
            epochs, batches = stream_position(resume_from_checkpoint, self.args.gradient_accumulation_steps)
            batches = 0 if self.args.ignore_data_skip else batches
        if resume_from_checkpoint is not None and self.state.global_step >= max_steps:
            epochs, batches = num_train_epochs, 0  # nothing is left to do: the stock class would train one step more
        half = not sized or self.state.global_step % num_update_steps_per_epoch != 0
        self._resumed = None if resume_from_checkpoint is None else (epochs, half)
        if self.distiller is not None:
            self.distiller.hard_loss.close()
        self.distiller = self._make_distiller()
        return epochs, batches

    def _begin_training(self) -> None:
        self.evaluations.clear()  # of other weights
        self.best_is_loaded = False
        averaged = self.args.average_tokens_across_devices
        self._data_parallel_size = self.accelerator.num_processes // self.get_tp_size() if averaged else 1
        if self.distiller is None:
            return
        self.distiller.hard_loss.open()
        self._held_out = None
        if self.state.global_step == 0 and self.method.warm_start_teacher and self.teacher.kind == "history":
            self._warm_start()

    def _begin_epoch(self) -> None:
        distiller = self.distiller
        if distiller is None:
            self._set_epoch(int(self.state.epoch or 0))
            return
        epoch = distiller.begin_epoch()
        self._set_epoch(epoch)
        if distiller.calibrated is not None and distiller.calibrated.is_due(epoch):
            look, reduce = self._look_at_held_out(), self._sum_over_processes
            distiller.calibrated.update(epoch, distiller.num_epochs, look, reduce)

    def _end_training(self) -> None:
        distiller = self.distiller
        if distiller is None:
            return
        distiller.hard_loss.close()
        if distiller.alpha > 0:
            self._warn_of_little(distiller)
        distiller.teacher.begin_epoch(distiller.epoch + 1)

    def _never_taught(self) -> bool:
        """Whether training has not come to where there is something to learn from."""
        return self.distiller.epoch < self.teacher.first_epoch and not self.method.warm_start_teacher

    def _warn_of_little(self, distiller: SelfDistiller) -> None:
        """Say at the end what self-distillation could not do, for a reason that the loss does not show."""
        if self._never_taught():
            logger.warning(
                f"teacher={distiller.teacher.kind!r} never taught: training ended in its first pass over the data, so "
                "this was plain training. Let the dataset end several times before max_steps."
            )
        elif self.teacher.kind == "predictions" and self.teacher.found == 0:
            logger.warning(
                f"teacher_predictions={self.method.teacher_predictions!r} has no prediction for any sample that was "
                "seen, so this was plain training: give the ids of sample_id_column."
            )
        elif distiller.calibrated is None and distiller.alpha_reached < 0.75 * distiller.alpha:
            logger.warning(
                f"alpha reached {distiller.alpha_reached:.3g} of {distiller.alpha:.3g}: training ended in epoch "
                f"{distiller.epoch + 1} of the {distiller.num_epochs} that alpha was planned for. Plan fewer epochs "
                "(num_train_epochs, max_steps), or set alpha_schedule='constant'."
            )

    @contextmanager
    def _looking(self) -> Iterator[None]:
        """A pass in evaluation mode: training draws the same random numbers with and without the pass."""
        with seeded(self.args.seed), torch.no_grad():
            self.model.eval()
            yield
            self.model.train()

    def _predict(self, inputs: dict[str, Any]) -> tuple[Rows, Batch]:
        """The rows of the model for a batch, and the batch as it was split."""
        record, task = pop_record(inputs), self.distiller.task
        batch = task.split(self._prepare_inputs(inputs), record)
        with self.compute_loss_context_manager():
            return task.predict(lambda shown: self.model(**shown), batch), batch

    def _sum_over_processes(self, sums: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(sums, "sum") if self.args.world_size > 1 else sums

    def _warm_start(self) -> None:
        """Fill the history with the predictions of the initial weights, in evaluation mode: all samples, unmixed."""
        logger.info("Filling the history with the predictions of the initial weights.")
        with self._looking():
            for inputs in self._warm_start_dataloader():
                self.distiller.observe_only(*self._predict(inputs))
        self.teacher.begin_epoch(0)

    # The loss

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """As in [`~transformers.Trainer`]; what travels beside the batches is taken out of them."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._batches = RecordedBatches(batches)
        return self._batches, num_items

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | int | None:
        distiller = self.distiller
        if distiller is None or not batch_samples:
            return super()._get_num_items_in_batch(batch_samples, device)
        records = [peek_record(batch) for batch in batch_samples]
        known = [None if record is None else record.samples for record in records]
        if None not in known and self.args.world_size == 1:
            count = max(sum(samples.num_items for samples in known), 1)
            if distiller.hard_loss.plain and device.type == "cpu":
                return count  # only our loss sees it; an accelerator gets a tensor, as its division rounds otherwise
            return to_device(torch.tensor(count), device)
        task = distiller.task
        labels = [task.labels_in(batch) for batch in batch_samples]
        if any(part is None for part in labels):
            return super()._get_num_items_in_batch(batch_samples, device)
        count = sum(task.num_items(part) for part in labels).to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            count = self.accelerator.gather(count).sum()
        return count.clamp_min(1)  # a step without labels costs 0

    def training_step(self, model, inputs, num_items_in_batch=None):
        """As in [`~transformers.Trainer`].

        Raises:
            ValueError: if a `compute_loss` of the user's leaves self-distillation out.
        """
        vars(self).pop("loss_is_scaled_for_ga", None)  # `compute_loss` says so, if it is called
        distiller = self.distiller
        steps = 0 if distiller is None else distiller.steps
        loss = super().training_step(model, inputs, num_items_in_batch)
        if distiller is not None and distiller.steps == steps and self._distils(self.method):
            raise ValueError(never_called(type(self).__name__))
        return loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """
        The loss of a batch; in training, that of progressive self-distillation, over the rows of the whole step.

        Raises:
            ValueError: at the first batch that shows a fault (labels, logits, ids), before any optimizer step.
        """
        if not (self.is_in_train and model.training):
            return self._evaluation_loss(model, inputs, return_outputs, num_items_in_batch)
        distiller = self.distiller
        if distiller is None or not (distiller.teaches or distiller.task.accepts(inputs)):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self.loss_is_scaled_for_ga = True  # by the rows of the whole step
        progress = Progress(self.state.global_step, self.state.max_steps)
        record = None if self._batches is None else self._batches.present
        loss, outputs = distiller.step(model, inputs, progress, num_items_in_batch, record)
        if self._data_parallel_size > 1 and num_items_in_batch is not None:
            loss = loss * self._data_parallel_size
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the means of self-distillation since the last time beside the training loss."""
        if "loss" in logs and self.is_in_train and self.distiller is not None:
            logs |= self.distiller.take_metrics(self._sum_over_processes)
        parent = super().log
        timed = "start_time" in inspect.signature(parent).parameters  # a trainer of older make may not take it
        parent(logs, start_time) if timed else parent(logs)


class SelfKDTrainer(SelfKDMixin, Trainer):
    """
    [`~transformers.Trainer`] with progressive self-distillation (PS-KD): change the class name in a working script.

    Every argument keeps its meaning. Plain [`~transformers.TrainingArguments`] are accepted and have the defaults of
    [`SelfKDConfig`]. Evaluation, saving and inference are those of the bare model.

    Args:
        model ([`~transformers.PreTrainedModel`] or `nn.Module`, *optional*):
            A model for sequence, image, audio or video classification (one label or several), token classification,
            extractive question answering, multiple choice or semantic segmentation, an object detector, a model of
            speech (CTC), or a language model, PEFT-wrapped or not.
        args ([`SelfKDConfig`] or [`~transformers.TrainingArguments`], *optional*): the arguments.
        data_collator (`Callable`, *optional*): as for [`~transformers.Trainer`], or a [`SelfKDDataCollator`].
        train_dataset, eval_dataset, processing_class, model_init, compute_loss_func, compute_metrics, callbacks,
        optimizers, optimizer_cls_and_kwargs, preprocess_logits_for_metrics: as for [`~transformers.Trainer`].
        auxiliary_heads ([`AuxiliaryHeadsConfig`] or `str`, *optional*): layered distillation, as in the arguments.
        task (`type`, *optional*): a subclass of [`~hf_selfkd.tasks.Task`] for a task of your own.

    Raises:
        ValueError: if the task, the data or the arguments do not allow self-distillation; the message names the
            field, its value and the remedy.

    Example:

    ```python
    from hf_selfkd import SelfKDConfig, SelfKDTrainer

    trainer = SelfKDTrainer(model, SelfKDConfig("out", num_train_epochs=30), train_dataset=train)
    trainer.train()
    ```
    """

    def __init__(
        self,
        model: PreTrainedModel | torch.nn.Module | None = None,
        args: TrainingArguments | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase
        | BaseImageProcessor
        | FeatureExtractionMixin
        | ProcessorMixin
        | None = None,
        model_init: Callable[..., PreTrainedModel] | None = None,
        compute_loss_func: Callable | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        auxiliary_heads: AuxiliaryHeadsConfig | str | None = None,
        task: type[Task] | None = None,
    ):
        super().__init__(
            model,
            args,
            data_collator,
            train_dataset,
            eval_dataset,
            processing_class,
            model_init,
            compute_loss_func,
            compute_metrics,
            callbacks,
            optimizers,
            optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics,
            auxiliary_heads=auxiliary_heads,
            task=task,
        )
